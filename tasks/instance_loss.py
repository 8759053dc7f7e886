"""The masks that a `CondInstHead` draws, how they are trained, and which objects it has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from flashtask.data.boxes import CROWD
from flashtask.heads.condinst import MASK_LAYERS
from flashtask.tasks.box_loss import Places, assign, detection_loss, places_of_outputs

__all__ = ["FoundObjects", "instance_loss", "objects_of_outputs"]

#: Places of an image whose masks are trained in a step, about; each object has one at least.
_MOST_MASKS = 64
#: Coordinates are distances to the place, in so many strides of its level.
_REACH = 8.0
#: Masks are compared in steps of half the stride of the mask features.
_FINER = 2
_EPSILON = 1e-5


class FoundObjects(NamedTuple):
    """What was found in an image, the best first; a mask is drawn when it is needed, and only around its box.

    Args:
        boxes: (n, 6): left, top, right, bottom in pixels of the input, score, class.
        points: (n, 2), the places at which they were found, x and y in pixels.
        strides: (n,), of these places.
        parameters: (n, 169), of the networks that draw the masks.
        features: (8, h, w), in steps of `stride` pixels; the last may lie beyond the input.
        stride: of the features.
    """

    boxes: Tensor
    points: Tensor
    strides: Tensor
    parameters: Tensor
    features: Tensor
    stride: int

    def chosen(self, rows: Any) -> FoundObjects:
        """Some of the objects."""
        own = {name: getattr(self, name)[rows] for name in ("boxes", "points", "strides", "parameters")}
        return self._replace(**own)

    def cpu(self) -> FoundObjects:
        """The same in the memory of the CPU."""
        return self._replace(**{name: value.cpu() for name, value in self._asdict().items() if name != "stride"})

    def masks(self, columns: slice = slice(None), lines: slice = slice(None)) -> Tensor:
        """The logits (n, h, w) of the masks.

        Args:
            columns: of the features, for a part of them.
            lines: of the features.
        """
        origin = ((columns.start or 0) * self.stride, (lines.start or 0) * self.stride)
        points = self.points - self.points.new_tensor(origin)
        return _drawn(self.features[:, lines, columns], self.parameters, points, self.strides, self.stride)


def instance_loss(
    outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Any]], strides: Sequence[int]
) -> dict[str, Tensor]:
    """The parts of `detection_loss`, and `mask`: 1 - Dice of the masks that the places of an object draw.

    Args:
        outputs: of a `CondInstHead`.
        targets: of each image, beside `boxes` and `labels`, `masks` (L, H, W) with numbers of objects in pixels of the
            input, and the `numbers` (n,) of the boxes; or `masks` (n, H, W) alone, one of each box.
        strides: of the maps.
    """
    maps, features = outputs["maps"], outputs["features"]
    places = Places(maps, strides)
    controllers, logits = _flat(outputs["controllers"]), _flat(maps)[..., 4:]
    losses = [(controllers[..., :0].sum() + features[:, :0].sum())[None]]  # so that each weight has a gradient
    for row, target in enumerate(targets):
        learned, numbers, layers = _wanted(target, places)
        at = (learned >= 0).nonzero()[:, 0]
        if not len(at):
            continue
        scores = logits[row, at, target["labels"][target["labels"] != CROWD][learned[at]]]
        at = at[_best_of_each(learned[at], scores.detach(), int(learned.max()) + 1)]
        drawn = _drawn(features[row], controllers[row, at], places.points[at], places.strides[at], strides[0])
        true = _in_steps(layers, drawn.shape[-2:], strides[0])
        wanted = (true[None] == numbers[learned[at], None, None, None]).any(1)
        losses.append(_dice_loss(drawn, wanted.to(drawn))[wanted.flatten(1).any(1)])
    parts = detection_loss(maps, targets, strides)
    count = max(1, sum(map(len, losses)) - 1)
    return {**parts, "mask": torch.cat(losses).sum() / count}


def _wanted(target: Mapping[str, Any], places: Places) -> tuple[Tensor, Tensor, Tensor]:
    """For each place the object that it learns, -1 for none; the numbers of the objects, and the layers with them."""
    is_object = target["labels"] != CROWD
    layers = target["masks"]
    numbers = target.get("numbers")
    if numbers is None:
        numbers = torch.arange(1, len(is_object) + 1, device=layers.device)
        layers = layers.int() * numbers[:, None, None]
    return assign(places, target["boxes"][is_object].to(places.points)), numbers[is_object], layers


def _best_of_each(objects: Tensor, scores: Tensor, count: int) -> Tensor:
    """Positions of the places with the best scores of each object, about `_MOST_MASKS` in all."""
    order = scores.argsort(descending=True, stable=True)
    order = order[objects[order].argsort(stable=True)]
    sizes = objects.bincount(minlength=count)
    ranks = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[objects[order]]
    return order[ranks < max(1, _MOST_MASKS // max(1, int((sizes > 0).sum())))]


def _flat(maps: Sequence[Tensor]) -> Tensor:
    """Maps of all levels as (B, P, C)."""
    return torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)


def _drawn(features: Tensor, parameters: Tensor, points: Tensor, strides: Tensor, stride: int) -> Tensor:
    """The logits (n, h, w) of masks.

    Args:
        features: (8, h, w), of one image.
        parameters: (n, 169), of the networks that draw them.
        points: (n, 2), the places to which the networks belong, x and y in pixels.
        strides: (n,), of these places.
        stride: of the features.
    """
    channels, height, width = features.shape
    down, across = (torch.arange(n, device=features.device, dtype=features.dtype) + 0.5 for n in (height, width))
    pixels = torch.stack(torch.meshgrid(across * stride, down * stride, indexing="xy")).flatten(1)
    away = (pixels - points[..., None]) / (strides * _REACH)[:, None, None]
    now = torch.cat([away, features.flatten(1).expand(len(points), channels, -1)], dim=1)
    start = 0
    for number, (before, after) in enumerate(MASK_LAYERS):
        weight = parameters[:, start : start + before * after].reshape(-1, after, before)
        bias = parameters[:, start + before * after : start + before * after + after, None]
        start += before * after + after
        now = torch.baddbmm(bias, weight, now.relu() if number else now)
    return now.reshape(-1, height, width)


def _in_steps(layers: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """The numbers of layers (L, H, W) at the middles of the steps in which masks are compared: (L, 2 h, 2 w).

    A step whose middle lies beyond the input has no object.
    """
    step = stride / _FINER
    rows, columns = (((torch.arange(_FINER * n, device=layers.device) + 0.5) * step).long() for n in size)
    is_inside = (rows < layers.shape[1])[:, None] & (columns < layers.shape[2])
    found = layers[:, rows.clamp(max=layers.shape[1] - 1)[:, None], columns.clamp(max=layers.shape[2] - 1)]
    return found.where(is_inside, 0)


def _dice_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """1 - Dice (n,) of logits (n, h, w) and masks (n, 2 h, 2 w)."""
    finer = functional.interpolate(drawn[:, None], scale_factor=_FINER, mode="bilinear", align_corners=False)
    own, true = finer.sigmoid().flatten(1), wanted.flatten(1)
    shared = 2 * (own * true).sum(1)
    return 1 - shared / (own.square().sum(1) + true.sum(1) + _EPSILON)


def objects_of_outputs(
    outputs: Mapping[str, Any], strides: Sequence[int], nms_threshold: float = 0.5
) -> list[FoundObjects]:
    """What a `CondInstHead` has found in each image, the best first: at most 100 objects, by suppression of boxes.

    Args:
        outputs: of the head.
        strides: of the maps.
        nms_threshold: overlap with a better box of its class above which an object is left out.
    """
    maps, features = outputs["maps"], outputs["features"]
    places, controllers = Places(maps, strides), _flat(outputs["controllers"])
    found = []
    for row, (boxes, at) in enumerate(places_of_outputs(maps, strides, nms_threshold)):
        of_places = (places.points[at], places.strides[at], controllers[row, at])
        found.append(FoundObjects(boxes, *of_places, features[row], strides[0]))
    return found
