"""Convolutions in bfloat16 on a CPU whose gradients are computed in float32, where the library's are slow or wrong.

Slow: oneDNN computes a depthwise convolution in bfloat16 quickly, but not its gradients by inputs of a convolution with
a stride, nor those by weights of a kernel above 3: in EfficientNet-Lite0 these few took more than half of a training
step. In float32 they take a tenth, and lose nothing: values are rounded to bfloat16 once, at the end.

Wrong: with AVX-512 BF16, the gradient by the weights of a convolution with a stride holds uninitialised memory where
its input is narrower than the stride, as in the last stages of a network on images of 16 pixels (torch 2.14.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["bfloat16_convolutions", "has_bad_gradients"]

#: The widest kernel that bfloat16 is fast at.
_KERNEL = 3
_FORMATS = (torch.float32, torch.bfloat16)
_FUNCTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def has_bad_gradients(module: nn.Module) -> bool:
    """Whether a module has a convolution whose gradients in bfloat16 are slow, or wrong for narrow inputs."""
    convolutions = [part for part in module.modules() if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    return any(
        (
            isinstance(part, nn.Conv2d)
            and 1 < part.groups == part.in_channels
            and _is_slow(part.kernel_size, part.stride)
        )
        or (part.stride[-1] > 1 and part.kernel_size[-1] > 1)
        for part in convolutions
    )


@contextmanager
def bfloat16_convolutions() -> Iterator[None]:
    """Autocast on a CPU to bfloat16, and inside of it convolutions with sound and fast gradients.

    The outputs are those of autocast alone, bit by bit, except where the input is narrower than the stride: there they
    are computed in float32. Gradients are as near to the exact ones or nearer.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16), _Mode():
        yield


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _FUNCTIONS or kwargs or not torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        if _is_narrow(args):
            with torch.autocast("cpu", enabled=False):
                return func(*(one.float() if isinstance(one, Tensor) else one for one in args)).to(torch.bfloat16)
        return _convolved(*args) if func is torch.conv2d and _is_depthwise(args) else func(*args)


def _is_narrow(args: tuple[Any, ...]) -> bool:
    """Whether the input is narrower than the stride, with arguments by place as `nn.Conv2d` and its like give them."""
    if len(args) != 7 or not isinstance(args[0], Tensor) or not isinstance(args[3], (tuple, list)):
        return False
    return bool(args[0].shape[-1] < args[3][-1] and args[1].shape[-1] > 1)


def _is_depthwise(args: tuple[Any, ...]) -> bool:
    """Whether the arguments, all by place as `nn.Conv2d` gives them, are of a depthwise one with slow gradients."""
    if len(args) != 7 or type(args[0]) is not Tensor or args[0].ndim != 4 or args[0].dtype not in _FORMATS:
        return False
    images, weight, _, stride, padding, dilation, groups = args
    is_slow: bool = (
        1 < groups == images.shape[1]
        and weight.dtype in _FORMATS
        and all(isinstance(one, (tuple, list)) for one in (stride, padding, dilation))
        and _is_slow(weight.shape[2:], stride)
    )
    return is_slow


def _is_slow(kernel: Sequence[int], stride: Sequence[int]) -> bool:
    return max(stride) > 1 or max(kernel) > _KERNEL


def _convolved(images: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    # In bfloat16 before the function, so that autograd brings gradients back into the formats of the givers.
    images, weight = images.to(torch.bfloat16), weight.to(torch.bfloat16)
    bias = None if bias is None else bias.to(torch.bfloat16)
    made: Tensor = _Depthwise.apply(images, weight, bias, *how)
    return made


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(images: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        return torch.conv2d(images, weight, bias, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.how = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        by_images, by_weight, by_bias, *_ = ctx.needs_input_grad
        slow_images = by_images and max(ctx.how[0]) > 1
        slow_weight = by_weight and max(weight.shape[2:]) > _KERNEL
        plain = gradients[0]
        exact = plain.to(torch.float32) if slow_images or slow_weight else plain
        found: list[Tensor | None] = [None, None, None]
        if by_images:
            found[0] = _gradient(0, exact if slow_images else plain, images, weight, ctx.how)
        if by_weight:
            found[1] = _gradient(1, exact if slow_weight else plain, images, weight, ctx.how)
        if by_bias:
            found[2] = plain.sum((0, 2, 3))
        return *found, *[None for _ in ctx.how]


def _gradient(which: int, gradient: Tensor, images: Tensor, weight: Tensor, how: tuple[Any, ...]) -> Tensor:
    """By images (0) or by the weight (1), computed in the format of `gradient`, given in bfloat16."""
    if which == 0 and gradient.dtype != images.dtype:
        images_there = torch.empty_like(images, dtype=gradient.dtype)  # of images, their gradient needs the shape alone
    else:
        images_there = images.to(gradient.dtype)
    stride, padding, dilation, groups = how
    mask = [number == which for number in range(3)]
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient,
        images_there,
        weight.to(gradient.dtype),
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        groups,
        mask,
    )[which]
    return found.to(images.dtype)
