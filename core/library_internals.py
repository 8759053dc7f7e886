"""What flashtask uses of other libraries beyond their documented interfaces, each in one function that explains why.

A release may move any of it without notice: tests/test_library_internals.py tries each function by itself. A library is
imported when a function is called, so this file costs nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer
    from torchmetrics import Metric

    from flashtask.core.accuracy import Accuracy

__all__ = [
    "batch_norm_class",
    "before_each_operation",
    "change_count",
    "compiled_call",
    "extractor_graphs",
    "forget_fsdp",
    "forget_groups",
    "forward_hooks",
    "fused_convolution",
    "give_own_part_table",
    "hook_tables",
    "hub_weight_names",
    "is_from_compiler",
    "is_view",
    "layer_versions",
    "let_workers_go",
    "makes_no_memory",
    "mark_as_stepped",
    "metric_state",
    "metric_sums",
    "normalization_class",
    "on_meta",
    "rate_lists",
    "repeated_while",
    "seen_attentions",
    "set_layer_versions",
    "set_update_count",
    "tensor_tables",
    "timm_arguments",
    "update_count",
    "value_of_batch",
]


# ---- torch


def batch_norm_class() -> type[nn.Module]:
    """The base class of all BatchNorm layers, those of timm included: torch exports only its subclasses."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return _BatchNorm


def normalization_class() -> type[nn.Module]:
    """The base class of all BatchNorm and InstanceNorm layers: torch exports only its subclasses."""
    from torch.nn.modules.batchnorm import _NormBase

    return _NormBase


def tensor_tables(module: nn.Module) -> tuple[dict[str, nn.Parameter | None], dict[str, Tensor | None]]:
    """A module's own parameters and buffers, to be replaced in place: `setattr` would change their order."""
    return module._parameters, module._buffers


def give_own_part_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """The table of parts of a shallow copy: a new one, because `copy.copy` leaves it that of the original."""
    module._modules = dict(module._modules)
    return module._modules


def forward_hooks(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    """The hooks before and after a module's forward pass: torch has no public list of them."""
    return (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def hook_tables(module: nn.Module) -> dict[str, OrderedDict[int, Any]]:
    """The tables of a module's hooks, by their attributes: a hook whose handle is lost can only be removed there."""
    return {name: table for name, table in vars(module).items() if "hooks" in name and isinstance(table, OrderedDict)}


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor shares the memory of another one from which autograd made it."""
    return tensor._base is not None


def mark_as_stepped(optimizer: Optimizer, has_stepped: bool = True) -> None:
    """Let schedulers take an optimizer for one that has stepped: they warn of the order if they step before it."""
    optimizer._opt_called = has_stepped  # type: ignore[attr-defined]


def forget_fsdp(module: nn.Module) -> None:
    """Let `fully_shard` take a part of a module for new: torch has no way to undo it."""
    from torch.distributed._composable_state import _module_state_mapping

    _module_state_mapping.pop(module, None)


def forget_groups(mesh: DeviceMesh) -> None:
    """Let a mesh hold no process group: torch keeps meshes for good, in what it remembers of operations."""
    vars(mesh).get("_pg_registry", {}).clear()


def change_count(tensor: Tensor) -> int:
    """How often a tensor was changed in place; autograd counts it, and only so is a change seen without a copy."""
    return tensor._version


def compiled_call(wrapper: nn.Module, module: nn.Module) -> None:
    """Let a module compile its calls as the wrapper does that `torch.compile` made of it.

    `module.compile()` does the same, but the options that the wrapper was made with are not public.
    """
    compiles: Any = wrapper.dynamo_ctx
    module._compiled_call_impl = compiles(module._call_impl)


def rate_lists(schedule: object) -> Iterator[list[float]]:
    """The lists in which a schedule, and those inside of it, keep a rate for each parameter group.

    They are to be changed in place: torch has no way to give a schedule other base rates.
    """
    for name in ("base_lrs", "max_lrs", "_last_lr"):
        rates = getattr(schedule, name, None)
        if isinstance(rates, list):
            yield rates
    for inner in getattr(schedule, "_schedulers", ()):
        yield from rate_lists(inner)


def layer_versions(state: Mapping[str, Any]) -> Any:
    """The version of each layer's layout, which `state_dict()` attaches to its result; None for another mapping."""
    return getattr(state, "_metadata", None)


def set_layer_versions(state: Mapping[str, Any], versions: Any) -> None:
    """Attach what `layer_versions` gave: without it torch loads a state dict as that of its oldest layers."""
    state._metadata = versions  # type: ignore[attr-defined]


def before_each_operation(check: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> AbstractContextManager[Any]:
    """Inside, `check(operation, args, options)` is called before every operation: no public mode sees them all.

    Args:
        check: stops the operation by an exception. The operations that it carries out itself are not passed to it.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Checking(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            options = dict(kwargs or {})
            check(func, args, options)
            return func(*args, **options)

    mode: AbstractContextManager[Any] = Checking()  # type: ignore[no-untyped-call]
    return mode


def makes_no_memory(operation: Any) -> bool:
    """Whether an operation works on its arguments' own memory, or gives a view of it; only its schema shows it."""
    return any(argument.alias_info is not None for argument in operation._schema.arguments)


def let_workers_go(loader: Any, batches: Any = None) -> None:
    """End the processes of a DataLoader, which has no method that does: those it keeps, and those of an iterator.

    The traceback of an error keeps them too; when garbage collection finds them later, it waits 5 s for each process,
    because the queues that end them are gone by then.

    Args:
        loader: whose persistent processes end.
        batches: its iterator after an error.
    """
    kept, loader._iterator = loader._iterator, None
    for iterator in (kept, batches):
        if iterator is not None:
            iterator._shutdown_workers()


def on_meta(values: Any) -> Any:
    """The same nested values with each tensor on the meta device: the public trees do not know all of torch's own."""
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), values)


def are_on_meta(values: Any) -> bool:
    """Whether nested values hold tensors and all are on the meta device, as in a run that only asks for shapes."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    tensors = [one for one in tree_leaves(values) if isinstance(one, Tensor)]
    return bool(tensors) and all(one.is_meta for one in tensors)


def fused_convolution() -> Callable[..., Tensor] | None:
    """oneDNN's convolution with an activation, which otherwise torch's compiler alone calls; None without oneDNN."""
    import torch

    found: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    return found


def repeated_while(
    condition: Callable[..., Tensor], step: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """A loop over tensors that stays one in an exported graph: torch has no public name for that."""
    import torch

    if torch.compiler.is_exporting():
        from torch._higher_order_ops import while_loop

        found: tuple[Tensor, ...] = while_loop(condition, step, state)  # type: ignore[no-untyped-call]
        return found
    while condition(*state):
        state = step(*state)
    return state


def is_from_compiler(error: BaseException) -> bool:
    """Whether `torch.compile` raised an error: its errors have no public base class."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


# ---- torchvision, timm, torchmetrics, huggingface_hub


def extractor_graphs(extractor: nn.Module) -> tuple[Any, Any]:
    """The graphs for training and evaluation of torchvision's feature extractor, to change what it returns."""
    return extractor.train_graph, extractor.eval_graph


def timm_arguments(model: nn.Module) -> Mapping[str, Any] | None:
    """The arguments that a model of timm was built with: `get_model_args` leaves some out and adds others."""
    return getattr(model, "_model_args", None)


@contextmanager
def seen_attentions(blocks: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the attention of each block of a transformer of timm is collected, (B, heads, tokens, tokens) each.

    timm gives none: fused attention never has the matrix in memory, and the other one passes it to its dropout alone.
    Nothing is collected where a block has another kind of attention.
    """
    seen: list[Tensor] = []
    layers: list[Any] = [part for part in blocks.modules() if hasattr(part, "fused_attn")]
    count = sum(1 for _ in blocks.children())
    if len(layers) != count or not all(hasattr(layer, "attn_drop") for layer in layers):
        layers = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(setattr, layer, "fused_attn", layer.fused_attn)
            layer.fused_attn = False
            stack.callback(layer.attn_drop.register_forward_hook(keep).remove)
        yield seen


def hub_weight_names(filename: str | None) -> Iterator[str]:
    """The files in a repository that timm looks for, in its order: it cannot be asked what is in the cache."""
    from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives

    wanted = filename or HF_WEIGHTS_NAME
    yield from _get_safe_alternatives(wanted)
    yield wanted


def metric_state(metric: Metric | Accuracy) -> list[str]:
    """The names of the attributes in which a metric of torchmetrics keeps what it has counted."""
    return [*metric._defaults, "_update_count", "_computed", "_forward_cache"]


def metric_sums(metric: Metric | Accuracy) -> dict[str, Any]:
    """The states that a metric of torchmetrics sums up, by name: its own `state_dict` leaves most of them out."""
    return {name: getattr(metric, name) for name in metric._defaults}


def update_count(metric: Metric | Accuracy) -> int:
    """How often a metric of torchmetrics was updated."""
    return metric._update_count


def set_update_count(metric: Metric | Accuracy, count: int) -> None:
    """Let a metric of torchmetrics have been updated so often: its states alone do not show it, and it warns of 0."""
    metric._update_count = count


def value_of_batch(metric: Metric | Accuracy) -> Any:
    """What a metric of torchmetrics gave for the last batch that it was called with; None before one."""
    return metric._forward_cache
