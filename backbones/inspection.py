"""What a module does not say of itself, from its structure and from running it: its blocks, its number of features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.library_internals import tensor_tables

__all__ = ["built_without_values", "default_layer_groups", "make_features_flat", "run_without_values"]

T = TypeVar("T")

#: What layers make their weights with. Everything else (ranges, lists of widths) may be read while a model is built.
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
_ROWS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def make_features_flat(module: nn.Module, input_size: tuple[int, int, int], name: str) -> int:
    """Make sure that a module gives one feature vector an image, and say how long it is.

    The module is run once in eval mode, without its values where that is possible (meta device). If it gives
    maps (B, F, H, W) or (B, H, W, F), or tokens (B, N, F), a forward hook pools them; its own keys and class stay. Maps
    are averaged. Of tokens the first is taken where the module has `global_pool = "token"` (timm's word for it), else
    the mean of all behind its `num_prefix_tokens`.

    Args:
        module: takes images (B, C, H, W).
        input_size: (C, H, W) of those images.
        name: what messages call it.

    Raises:
        UsageError: it cannot be run on such images, or gives something else than features.
    """
    shape = _output_shape(module, input_size, name)
    sizes = (getattr(module, attribute, None) for attribute in ("head_hidden_size", "num_features"))
    declared = [size for size in sizes if isinstance(size, int)]
    if len(shape) == 2:
        return shape[1]
    axes = _pooled_axes(shape, declared, name)
    if axes == (1,) and getattr(module, "global_pool", None) == "token":
        module.register_forward_hook(_FirstToken())
    else:
        prefix = getattr(module, "num_prefix_tokens", 0) if axes == (1,) else 0
        module.register_forward_hook(_MeanOver(axes, prefix if isinstance(prefix, int) else 0))
    return next(shape[axis] for axis in range(1, len(shape)) if axis not in axes)


class _MeanOver:
    """A forward hook that averages the output over axes; a class, so that copies and pickles keep it."""

    def __init__(self, axes: tuple[int, ...], num_prefix_tokens: int = 0) -> None:
        self.axes, self.num_prefix_tokens = axes, num_prefix_tokens

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output[:, self.num_prefix_tokens :].mean(dim=self.axes)


class _FirstToken:
    """A forward hook that takes the class token."""

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output[:, 0]


def _pooled_axes(shape: tuple[int, ...], declared: list[int], name: str) -> tuple[int, ...]:
    """The axes to average: all but the first and that of the features (in the common place if it is open)."""
    places = {4: (1, 3), 3: (2, 1)}.get(len(shape), ())
    for place in places:
        if not declared or shape[place] in declared:
            return tuple(axis for axis in range(1, len(shape)) if axis != place)
    sizes = ", ".join(map(str, shape[1:]))
    raise UsageError(
        f"the backbone {name!r} gives an output of shape (B, {sizes}), which is not a vector of features",
        why=f"its num_features is {declared[-1]}" if declared else "",
        fix="let it return (B, F), (B, F, H, W) or (B, N, F), with its num_features = F",
    )


def _output_shape(module: nn.Module, input_size: tuple[int, int, int], name: str) -> tuple[int, ...]:
    try:
        output = run_without_values(module, input_size)
    except Exception as error:
        raise UsageError(
            f"the backbone {name!r} cannot be run on images of {input_size}",
            why=f"{type(error).__name__}: {error}",
        ) from error
    if isinstance(output, Tensor):
        return tuple(output.shape)
    raise UsageError(
        f"the backbone {name!r} gives a {type(output).__name__}, not a tensor of features",
        why=_parts_shown(output),
        fix=f"give a module whose forward picks one: return self.net(images)[{_first_key(output)!r}]",
    )


def run_without_values(module: nn.Module, input_size: tuple[int, int, int]) -> Any:
    """What a module gives for images of a size, in eval mode; without its values where that is possible.

    Args:
        module: its modes and values are as before afterwards.
        input_size: (C, H, W).
    """
    modes = {inner: inner.training for inner in module.modules()}
    module.eval()
    try:
        return _run(module, input_size)
    finally:
        for inner, training in modes.items():
            inner.training = training


def _parts_shown(output: Any) -> str:
    """What is in a tuple or dictionary of outputs, for the choice between them."""
    if isinstance(output, Mapping):
        items: list[tuple[Any, Any]] = list(output.items())
    elif isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    else:
        return ""
    shown = [
        f"{key!r}: {tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__}" for key, part in items
    ]
    return f"it holds {', '.join(shown[:5])}"


def _first_key(output: Any) -> Any:
    """The first part of an output that is a tensor."""
    items = (
        output.items() if isinstance(output, Mapping) else enumerate(output if isinstance(output, tuple | list) else ())
    )
    return next((key for key, part in items if isinstance(part, Tensor)), 0)


@torch.no_grad()
def _run(module: nn.Module, input_size: tuple[int, int, int]) -> Any:
    try:
        with _without_values(module):
            return module(torch.zeros(2, *input_size, device="meta"))
    except Exception:  # it needs values: own tensors that are no buffers, sizes that depend on data
        like = next(iter(module.parameters()), torch.zeros(()))
        return module(torch.zeros(1, *input_size, device=like.device, dtype=like.dtype))


@contextmanager
def _without_values(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of a module have shapes alone.

    torch's `functional_call` would not put back those of a part that is used in two places (timm's CoaT).
    """
    tables: list[dict[str, Any]] = [table for part in module.modules() for table in tensor_tables(part)]
    before = [(table, dict(table)) for table in tables]
    shapes: dict[int, Tensor] = {}
    try:
        for table, tensors in before:
            for name, tensor in tensors.items():
                if tensor is not None:
                    table[name] = shapes.setdefault(id(tensor), _shape_of(tensor))
        yield
    finally:
        for table, tensors in before:
            table.update(tensors)


def _shape_of(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def built_without_values(build: Callable[[], T]) -> T:
    """What a function builds, with all parameters on the meta device: shapes alone, which cost neither memory nor time.

    Raises:
        UnknownNameError, UsageError, RuntimeError: as `build`.
    """
    everything: AbstractContextManager[Any] = torch.device("meta")
    try:
        with everything:
            return build()
    except UnknownNameError:
        raise
    except (UsageError, RuntimeError):
        with _WeightsWithoutValues():  # some families read numbers from tensors while they are built
            return build()


class _WeightsWithoutValues(TorchFunctionMode):
    """Puts what layers make their weights with on the meta device, and leaves every other tensor alone."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _FACTORIES and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


def default_layer_groups(module: nn.Module) -> list[list[str]]:
    """One group for each block, in the order of registration; a part without blocks is one group.

    Blocks are what a `Sequential`, `ModuleList` or `ModuleDict` holds, at any depth, with two matrices or kernels at
    least. Parameters of the module itself come first; those of a norm beside blocks belong to the block before it; one
    that two parts share belongs to the first.
    """
    shapes = {name: parameter.ndim for name, parameter in module.named_parameters()}
    groups: list[list[str]] = []
    for names in _parts(module, ""):
        own = [name for name in names if name in shapes]
        if groups and own and all(shapes[name] < 2 for name in own) and "." in own[0]:
            groups[-1].extend(own)
        elif own:
            groups.append(own)
        for name in own:
            del shapes[name]
    return groups


def _parts(module: nn.Module, prefix: str) -> Iterator[list[str]]:
    yield [prefix + name for name, _ in module.named_parameters(recurse=False)]
    for name, child in module.named_children():
        if _has_blocks(child):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield [f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()]


def _has_blocks(module: nn.Module) -> bool:
    """Whether a part is a row of blocks, or a stage: something with nearly all that it has in such rows."""
    if isinstance(module, _ROWS):
        return any(_is_block(child) for child in module.children())
    whole = sum(parameter.numel() for parameter in module.parameters())
    rows = [child for child in module.children() if isinstance(child, _ROWS)]
    inside = sum(parameter.numel() for row in rows if _has_blocks(row) for parameter in row.parameters())
    return inside > whole * 0.6


def _is_block(module: nn.Module) -> bool:
    return sum(parameter.ndim > 1 for parameter in module.parameters()) > 1
