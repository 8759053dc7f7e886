"""What flashtask uses of other libraries beyond their documented interfaces, each in one function that says why.

A release may move any of it without notice: tests/test_library_internals.py tries each function by itself. A library is
imported when a function is called, so this file costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "batch_norm_class",
    "before_each_operation",
    "change_count",
    "extractor_graphs",
    "forward_hooks",
    "fused_convolution",
    "give_own_part_table",
    "hub_client_factory",
    "hub_weight_names",
    "is_from_compiler",
    "layer_versions",
    "let_workers_go",
    "makes_no_memory",
    "metric_state",
    "on_meta",
    "set_layer_versions",
    "tensor_tables",
    "timm_arguments",
]


# ---- torch


def batch_norm_class() -> type[nn.Module]:
    """The base class of all BatchNorm layers, those of timm included: torch exports only its subclasses."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return _BatchNorm


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


def change_count(tensor: Tensor) -> int:
    """How often a tensor was changed in place; autograd counts it, and only so is a change seen without a copy."""
    return tensor._version


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
    """Whether an operation works on its arguments' own memory, or gives another view of it: only its schema says so."""
    return any(argument.alias_info is not None for argument in operation._schema.arguments)


def let_workers_go(loader: Any) -> None:
    """End the persistent processes of a DataLoader: it has no method that does, and keeps them while it lives."""
    loader._iterator = None


def on_meta(values: Any) -> Any:
    """The same nested values with each tensor on the meta device: the public trees do not know all of torch's own."""
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), values)


def fused_convolution() -> Callable[..., Tensor] | None:
    """oneDNN's convolution with an activation, which otherwise torch's compiler alone calls; None without oneDNN."""
    import torch

    found: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    return found


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


def hub_weight_names(filename: str | None) -> Iterator[str]:
    """The files in a repository that timm looks for, in its order: it cannot be asked what is in the cache."""
    from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives

    wanted = filename or HF_WEIGHTS_NAME
    yield from _get_safe_alternatives(wanted)
    yield wanted


def metric_state(metric: Any) -> list[str]:
    """The names of the attributes in which a metric of torchmetrics keeps what it has counted."""
    return [*metric._defaults, "_update_count", "_computed", "_forward_cache"]


def hub_client_factory() -> Callable[[], Any]:
    """What makes the hub's HTTP sessions now, a user's own function included: the library has only a way to set it."""
    from huggingface_hub.utils import _http

    factory: Callable[[], Any] = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    return factory
