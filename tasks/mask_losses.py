"""Losses of masks by name: logits (B, C, H, W) and class numbers (B, H, W), in which 255 does not count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flashtask.data.semantic_segmentation import IGNORED

__all__ = ["MASK_LOSSES"]

#: Called with outputs, targets and the weight of each class (or None); the others are arguments that a user can give.
MaskLoss = Callable[..., Any]


def _cross_entropy(outputs: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """The mean over pixels that count; 0 if there are none."""
    return _mean(
        functional.cross_entropy(outputs, targets, weight, ignore_index=IGNORED, reduction="none"), targets, weight
    )


def _focal(outputs: Tensor, targets: Tensor, weight: Tensor | None, *, gamma: float = 2.0) -> Tensor:
    """Cross-entropy times (1 - p)^gamma, p the probability of the pixel's class (Lin et al., arXiv:1708.02002)."""
    each = functional.cross_entropy(outputs, targets, weight, ignore_index=IGNORED, reduction="none")
    sure = outputs.softmax(dim=1).gather(1, targets.where(targets != IGNORED, 0)[:, None])[:, 0]
    return _mean((1 - sure) ** gamma * each, targets, weight)


def _mean(losses: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """The mean of losses (B, H, W) that are multiplied by class weights already."""
    counts = targets != IGNORED
    total = counts.sum() if weight is None else weight[targets.where(counts, 0)].where(counts, 0).sum()
    return losses.sum() / total.clamp(min=1e-6)


def _dice(outputs: Tensor, targets: Tensor, weight: Tensor | None, *, smooth: float = 1.0) -> Tensor:
    """1 - Dice of probabilities over the pixels of the batch (Milletari et al., arXiv:1606.04797).

    The mean over classes, by their weights. A class that the batch does not have is left out.
    """
    counts = targets != IGNORED
    chances = outputs.softmax(dim=1) * counts[:, None]
    hot = functional.one_hot(targets.where(counts, 0), outputs.shape[1]).movedim(-1, 1) * counts[:, None]
    both = (chances * hot).sum(dim=(0, 2, 3))
    sizes = hot.sum(dim=(0, 2, 3))
    dice = (2 * both + smooth) / (chances.sum(dim=(0, 2, 3)) + sizes + smooth)
    return _over_classes(1 - dice, sizes > 0, weight)


def _lovasz(outputs: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """Lovasz-softmax, an extension of 1 - IoU (Berman et al., arXiv:1705.08790), over the classes of the batch."""
    counts = targets != IGNORED
    chances = outputs.softmax(dim=1).movedim(1, -1)[counts]
    numbers = targets[counts]
    if not len(numbers):
        return outputs.sum() * 0
    losses = []
    for place in range(outputs.shape[1]):
        own = (numbers == place).to(chances.dtype)
        errors, order = (own - chances[:, place]).abs().sort(descending=True)
        ordered = own[order]
        total = ordered.sum()
        jaccard = 1 - (total - ordered.cumsum(0)) / (total + (1 - ordered).cumsum(0))
        jaccard = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
        losses.append(errors @ jaccard)
    there = torch.bincount(numbers, minlength=outputs.shape[1]) > 0
    return _over_classes(torch.stack(losses), there, weight)


def _over_classes(losses: Tensor, there: Tensor, weight: Tensor | None) -> Tensor:
    share = there.to(losses.dtype) if weight is None else weight * there
    return (losses * share).sum() / share.sum().clamp(min=1e-6)


def _cross_entropy_dice(
    outputs: Tensor, targets: Tensor, weight: Tensor | None, *, smooth: float = 1.0
) -> Mapping[str, Tensor]:
    """The sum of both (Isensee et al., arXiv:1809.10486): the one is smooth, the other counts small classes alike."""
    return {
        "cross_entropy": _cross_entropy(outputs, targets, weight),
        "dice": _dice(outputs, targets, weight, smooth=smooth),
    }


MASK_LOSSES: Mapping[str, MaskLoss] = {
    "cross_entropy_dice": _cross_entropy_dice,
    "cross_entropy": _cross_entropy,
    "dice": _dice,
    "focal": _focal,
    "lovasz": _lovasz,
}
