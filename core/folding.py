"""A copy of a network for inference: BatchNorm folded into the convolution before it, activations fused with theirs.

Only a copy is ever changed, and it is never saved. Which BatchNorm and which activation take the output of which
convolution is seen by running the network, and the copy must give the same outputs to `TOLERANCE`, else there is none.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from flashtask.core.library_internals import change_count, forward_hooks, fused_convolution

__all__ = ["TOLERANCE", "folded_copy"]

#: The most that an output may change in float32, as a share of the largest one.
TOLERANCE = 1e-5

# Convolutions that use their weights as they are; timm's pads by itself before it does.
_CONVOLUTIONS = ("Conv2d", "Conv2dSame")
# timm's BatchNorm has the activation behind it in the same layer.
_NORMS = ("BatchNorm2d", "BatchNormAct2d")
#: activation -> what oneDNN calls it, with its numbers
_ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}


def folded_copy(module: nn.Module, example: Tensor, *, fuses: bool = False) -> nn.Module | None:
    """A folded copy in eval mode, or None if there is nothing to fold or the outputs would not be the same.

    Args:
        module: in float32; it is not changed.
        example: inputs to try both on, such as two images (2, C, H, W), on the module's device.
        fuses: let oneDNN compute a convolution with the activation behind it, for inputs of the example's height and
            width on a CPU in float32; others are computed one after the other.
    """
    if not any(_is_norm(part) for part in module.modules()):
        return None
    made = copy.deepcopy(module).eval()
    with torch.no_grad():
        pairs, _, before = _followed(made, example, _is_norm)
        if not pairs:
            return None
        for convolution, norm in pairs:
            _fold(made.get_submodule(convolution), made.get_submodule(norm))
            _replace(made, norm, _rest_of(made.get_submodule(norm)))
        pairs, sizes, after = _followed(made, example, _is_activation)
        if not _is_same(before, after):
            return None
        if not fuses or _FUSED is None:
            return made
        fused = copy.deepcopy(made)
        _fuse(fused, dict(pairs), sizes)
        return fused if _is_same(before, fused(example)) else made


def _is_same(before: Tensor | Sequence[Tensor], after: Tensor | Sequence[Tensor]) -> bool:
    if not isinstance(before, Tensor):
        return len(before) == len(after) and all(map(_is_same, before, after))
    assert isinstance(after, Tensor)
    scale = before.abs().max().clamp(min=1e-6)
    return before.shape == after.shape and bool((before - after).abs().max() <= TOLERANCE * scale)


def _followed(
    module: nn.Module, example: Tensor, follows: Callable[[nn.Module], bool]
) -> tuple[list[tuple[str, str]], dict[str, torch.Size], Any]:
    """Run a network once and see what follows what.

    Returns:
        Names of (convolution, the layer that alone takes its output), each called once; the height and width of what
        goes into each of these layers, by name; the module's output.
    """
    named = {name: part for name, part in module.named_modules() if _is_convolution(part) or follows(part)}
    events: list[tuple[str, bool, Tensor, int]] = []  # the tensors are held, so that no two have the same identity

    def note(name: str, is_output: bool, tensor: Tensor) -> None:
        events.append((name, is_output, tensor, change_count(tensor)))

    handles = []
    for name, part in named.items():
        handles.append(part.register_forward_pre_hook(lambda _, given, name=name: note(name, False, given[0])))
        handles.append(part.register_forward_hook(lambda _, given, output, name=name: note(name, True, output)))
    try:
        output = module(example)
    finally:
        for handle in handles:
            handle.remove()
    made: dict[int, tuple[str, int]] = {}
    pairs: list[tuple[str, str]] = []
    changed: set[str] = set()
    for name, is_output, tensor, version in events:
        if not is_output and id(tensor) in made:
            convolution, then = made[id(tensor)]
            pairs.append((convolution, name))
            if version != then:
                changed.add(convolution)  # such as by a residual that was added in place
        elif is_output and _is_convolution(named[name]):
            made[id(tensor)] = name, version
        elif is_output:
            made.pop(id(tensor), None)  # an activation that works in place gives the convolution's own tensor on
    times = Counter(name for name, is_output, _, _ in events if is_output)
    taken = Counter(convolution for convolution, _ in pairs)
    once = [(c, n) for c, n in pairs if times[c] == times[n] == taken[c] == 1 and c not in changed]
    sizes = {name: tensor.shape[2:] for name, is_output, tensor, _ in events if not is_output}
    return [(c, n) for c, n in once if follows(named[n])], sizes, output


def _is_convolution(part: nn.Module) -> bool:
    return type(part).__name__ in _CONVOLUTIONS and isinstance(part, nn.Conv2d) and _is_plain(part)


def _is_norm(part: nn.Module) -> bool:
    is_norm = type(part).__name__ in _NORMS and isinstance(part, nn.BatchNorm2d)
    return is_norm and part.running_mean is not None and _is_plain(part)


def _is_activation(part: nn.Module) -> bool:
    return type(part) in _ACTIVATIONS and _is_plain(part)


def _is_plain(part: nn.Module) -> bool:
    """Whether a layer has neither hooks nor parametrizations (which make another class of it)."""
    return not (forward_hooks(part) or is_parametrized(part))


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, part)


def _fold(convolution: Any, norm: Any) -> None:
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def _rest_of(norm: nn.Module) -> nn.Module:
    """What a BatchNorm did besides normalising."""
    rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    kept = [part for part in rest if not isinstance(part, nn.Identity)]
    return kept[0] if len(kept) == 1 else nn.Sequential(*kept) if kept else nn.Identity()


# ---- a convolution with its padding and its activation in one call

_FUSED: Any = fused_convolution()


class _FusedConvolution(nn.Module):
    """A convolution, the padding that timm's does by itself before it, and an activation."""

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module | None, height_and_width: torch.Size) -> None:
        super().__init__()
        self.plain = nn.Sequential(convolution, *([] if activation is None else [activation]))
        self.height_and_width = height_and_width
        weight: Tensor = convolution.weight.detach()
        padding: Any = convolution.padding
        if type(convolution).__name__ == "Conv2dSame":
            weight, padding = _padded_as_same(convolution, height_and_width)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        kind, numbers = ("none", []) if activation is None else _ACTIVATIONS[type(activation)]
        where = (padding, convolution.stride, convolution.dilation, convolution.groups)
        self.how = (*where, kind, numbers, "none")

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != self.height_and_width or images.dtype is not torch.float32:
            made: Tensor = self.plain(images)
            return made
        found: Tensor = _FUSED(images, self.weight, self.plain[0].bias, *self.how)
        return found


def _padded_as_same(convolution: nn.Conv2d, height_and_width: torch.Size) -> tuple[Tensor, list[int]]:
    """Weight and padding that give TensorFlow's "same" padding, which may be wider behind an image than before it.

    The kernel is widened by zeros in front, so that the wider padding can be used on both sides.
    """
    weight = convolution.weight.detach()
    padding: list[int] = []
    for axis, (size, kernel, stride) in enumerate(
        zip(height_and_width, convolution.kernel_size, convolution.stride, strict=True), start=2
    ):
        whole = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        before, behind = whole // 2, whole - whole // 2
        zeros = weight.new_zeros([behind - before if axis == d else n for d, n in enumerate(weight.shape)])
        weight = torch.cat([zeros, weight], dim=axis)
        padding.append(behind)
    return weight, padding


def _fuse(module: nn.Module, behind: dict[str, str], sizes: dict[str, torch.Size]) -> None:
    """Replace each convolution that an activation follows, or that pads by itself, by one call of oneDNN.

    Args:
        module: it is changed.
        behind: name of a convolution -> name of the activation behind it.
        sizes: height and width of what goes into each layer.
    """
    for name, height_and_width in sizes.items():
        part = module.get_submodule(name)
        if not (isinstance(part, nn.Conv2d) and _is_convolution(part) and _is_ordinary(part)):
            continue
        if name in behind:
            _replace(module, name, _FusedConvolution(part, module.get_submodule(behind[name]), height_and_width))
            _replace(module, behind[name], nn.Identity())
        elif type(part).__name__ == "Conv2dSame":
            _replace(module, name, _FusedConvolution(part, None, height_and_width))


def _is_ordinary(part: nn.Conv2d) -> bool:
    return part.padding_mode == "zeros" and not isinstance(part.padding, str) and max(part.dilation) == 1
