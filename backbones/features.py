"""How many features a module gives, found by running it, and pooling for modules that give maps or tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flashtask.core.errors import UsageError

__all__ = ["default_layer_groups", "make_features_flat"]


def make_features_flat(module: nn.Module, input_size: tuple[int, int, int], name: str) -> int:
    """Make sure that a module gives one feature vector an image, and say how long it is.

    The module is run once in eval mode, without its values where that is possible (meta device). If it gives
    maps (B, F, H, W) or (B, H, W, F), or tokens (B, N, F), a forward hook takes their mean; its own keys and
    class stay.

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
    module.register_forward_hook(_MeanOver(axes))
    return next(shape[axis] for axis in range(1, len(shape)) if axis not in axes)


def default_layer_groups(module: nn.Module) -> list[list[str]]:
    """One group for each child that has parameters, in the order of the children.

    Parameters of the module itself come first; a parameter that two children share belongs to the first.
    """
    groups: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        child = name.partition(".")[0] if "." in name else ""
        groups.setdefault(child, []).append(name)
    return list(groups.values())


class _MeanOver:
    """A forward hook that averages the output over axes; a class, so that copies and pickles keep it."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        self.axes = axes

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.mean(dim=self.axes)


def _pooled_axes(shape: tuple[int, ...], declared: list[int], name: str) -> tuple[int, ...]:
    """The axes to average: all but the first and that of the features (in the common place if it is open)."""
    places = {4: (1, 3), 3: (2, 1)}.get(len(shape), ())
    for place in places:
        if not declared or shape[place] in declared:
            return tuple(axis for axis in range(1, len(shape)) if axis != place)
    sizes = ", ".join(map(str, shape[1:]))
    raise UsageError(
        f"the backbone {name!r} gives an output of shape (B, {sizes}), which is no features",
        why=f"its num_features is {declared[-1]}" if declared else "",
        fix="let it return (B, F), (B, F, H, W) or (B, N, F), with its num_features = F",
    )


def _output_shape(module: nn.Module, input_size: tuple[int, int, int], name: str) -> tuple[int, ...]:
    modes = {inner: inner.training for inner in module.modules()}
    module.eval()
    try:
        output = _run(module, input_size)
    except Exception as error:
        raise UsageError(
            f"the backbone {name!r} cannot be run on images of {input_size}",
            why=f"{type(error).__name__}: {error}",
        ) from error
    finally:
        for inner, training in modes.items():
            inner.training = training
    if not isinstance(output, Tensor):
        raise UsageError(f"the backbone {name!r} gives a {type(output).__name__}, not a tensor of features")
    return tuple(output.shape)


@torch.no_grad()
def _run(module: nn.Module, input_size: tuple[int, int, int]) -> Any:
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    without_values = {name: tensor.to("meta") for name, tensor in tensors.items()}
    try:
        return functional_call(module, without_values, (torch.zeros(2, *input_size, device="meta"),))
    except Exception:  # it needs values: own tensors that are no buffers, sizes that depend on data
        like = next(iter(module.parameters()), torch.zeros(()))
        return module(torch.zeros(1, *input_size, device=like.device, dtype=like.dtype))
