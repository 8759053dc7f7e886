"""A copy of a network for inference, in which each BatchNorm is folded into the convolution before it.

Only a copy is ever folded, and it is never saved. Which convolution a BatchNorm follows is seen by running the network,
and the copy must give the same outputs to `TOLERANCE`, else there is none.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["TOLERANCE", "folded_copy"]

#: The most that an output may change in float32, as a share of the largest one.
TOLERANCE = 1e-4

# Convolutions that use their weights as they are; timm's pads by itself before it does.
_CONVOLUTIONS = ("Conv2d", "Conv2dSame")
# timm's BatchNorm has the activation behind it in the same layer.
_NORMS = ("BatchNorm2d", "BatchNormAct2d")


def folded_copy(module: nn.Module, example: Tensor) -> nn.Module | None:
    """A folded copy in eval mode, or None if there is nothing to fold or the outputs would not be the same.

    Args:
        module: in float32; it is not changed.
        example: inputs to try both on, such as two images (2, C, H, W), on the module's device.
    """
    plain = copy.deepcopy(module).eval()
    with torch.no_grad():
        pairs, before = _followed(plain, example)
        if not pairs:
            return None
        for convolution, norm in pairs:
            _fold(plain.get_submodule(convolution), plain.get_submodule(norm))
            parent, _, name = norm.rpartition(".")
            setattr(plain.get_submodule(parent), name, _rest_of(plain.get_submodule(norm)))
        after = plain(example)
    scale = before.abs().max().clamp(min=1e-6)
    is_same = before.shape == after.shape and bool((before - after).abs().max() <= TOLERANCE * scale)
    return plain if is_same else None


def _followed(module: nn.Module, example: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """Names of (convolution, the BatchNorm that alone takes its output), each called once; and the module's output."""
    calls: list[tuple[str, Any, Any]] = []  # the tensors are held, so that no two have the same identity
    handles = [
        part.register_forward_hook(lambda _, given, output, name=name: calls.append((name, given[0], output)))
        for name, part in module.named_modules()
        if _is_convolution(part) or _is_norm(part)
    ]
    try:
        output: Tensor = module(example)
    finally:
        for handle in handles:
            handle.remove()
    times = [name for name, _, _ in calls]
    made = {id(out): name for name, _, out in calls if _is_convolution(module.get_submodule(name))}
    pairs = [(made[id(given)], name) for name, given, _ in calls if id(given) in made]
    taken = [convolution for convolution, _ in pairs]
    once = [(c, n) for c, n in pairs if times.count(c) == times.count(n) == taken.count(c) == 1]
    return [(c, n) for c, n in once if _is_norm(module.get_submodule(n))], output


def _is_convolution(part: nn.Module) -> bool:
    return type(part).__name__ in _CONVOLUTIONS and isinstance(part, nn.Conv2d) and _is_plain(part)


def _is_norm(part: nn.Module) -> bool:
    is_norm = type(part).__name__ in _NORMS and isinstance(part, nn.BatchNorm2d)
    return is_norm and part.running_mean is not None and _is_plain(part)


def _is_plain(part: nn.Module) -> bool:
    """Neither hooks nor parametrizations (which make another class of it) stand between its weights and its output."""
    return not (part._forward_hooks or part._forward_pre_hooks or "parametrizations" in part._modules)


def _fold(convolution: Any, norm: Any) -> None:
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def _rest_of(norm: nn.Module) -> nn.Module:
    """What a BatchNorm did besides normalising."""
    rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    kept = [part for part in rest if not isinstance(part, nn.Identity)]
    return nn.Sequential(*kept) if kept else nn.Identity()
