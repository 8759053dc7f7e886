"""Which places of a dense head learn which box, what they lose, and how their outputs become boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss

from flashtask.data.boxes import CROWD
from flashtask.data.geometry import Geometry

__all__ = ["LEAST_SCORE", "MOST_BOXES", "MOST_PLACES", "Places", "assign", "boxes_in_file"]
__all__ += ["boxes_of_outputs", "detection_loss", "flat_outputs", "places_of_outputs"]

#: Places of each level that are candidates for a box (Zhang et al., 2020).
_CANDIDATES = 9
#: Side of the square, in strides, that stands for a place when its overlap with a box is measured.
_SIDE = 8.0
#: Weight of the overlap beside that of the classes (Li et al., 2020).
_BOX_WEIGHT = 2.0
#: Of an image: places that may become boxes, and boxes, at the most.
MOST_PLACES, MOST_BOXES = 1000, 100
#: A score below which a place is no box; COCO's average precision ends long before.
LEAST_SCORE = 0.01


class Places:
    """The middles of all pixels of a head's maps, in pixels of the image.

    Args:
        maps: of the head, (B, C, H, W), the finest first.
        strides: of each map.
    """

    def __init__(self, maps: Sequence[Tensor], strides: Sequence[int]) -> None:
        points, reaches = [], []
        for level, stride in zip(maps, strides, strict=True):
            height, width = level.shape[-2:]
            down, across = (torch.arange(n, device=level.device, dtype=torch.float32) + 0.5 for n in (height, width))
            grid = torch.meshgrid(down * stride, across * stride, indexing="ij")
            points.append(torch.stack(grid[::-1], dim=-1).reshape(-1, 2))
            reaches.append(torch.full((height * width,), float(stride), device=level.device))
        #: (P, 2), x and y.
        self.points = torch.cat(points)
        #: (P,), the stride of each.
        self.strides = torch.cat(reaches)
        #: How many each level has.
        self.counts = [len(one) for one in points]

    def boxes(self, distances: Tensor) -> Tensor:
        """Boxes (..., P, 4) from distances to the left, upper, right and lower edge."""
        return torch.cat([self.points - distances[..., :2], self.points + distances[..., 2:]], dim=-1)


def flat_outputs(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The distances (B, P, 4) and logits (B, P, classes) of all maps."""
    whole = torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)
    return whole[..., :4], whole[..., 4:]


def assign(places: Places, boxes: Tensor) -> Tensor:
    """For each place the box that it learns, by adaptive training sample selection (Zhang et al., ATSS, 2020).

    Candidates of a box are the nine places of each level that are nearest to its middle. Those that lie in the box and
    overlap with it at least as much as the mean plus the deviation of all candidates learn it; of several boxes the one
    with the most overlap. A box without any, because it is smaller than the distance of places, gets the nearest place.

    Args:
        places: P of them.
        boxes: (G, 4).

    Returns:
        (P,) int64, positions in `boxes`, -1 for none.
    """
    found = torch.full((len(places.points),), -1, dtype=torch.long, device=boxes.device)
    if not len(boxes):
        return found
    half = (places.strides * (_SIDE / 2))[:, None]
    overlap = box_iou(torch.cat([places.points - half, places.points + half], dim=1), boxes)
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    distance = torch.cdist(places.points, middles)
    chosen, start = [], 0
    for count in places.counts:
        nearest = distance[start : start + count].topk(min(_CANDIDATES, count), dim=0, largest=False).indices
        chosen.append(nearest + start)
        start += count
    candidates = torch.cat(chosen)
    of_candidates = overlap.gather(0, candidates)
    least = of_candidates.mean(0) + of_candidates.std(0)
    points = places.points[candidates]
    is_inside = ((points > boxes[:, :2]) & (points < boxes[:, 2:])).all(-1)
    learns = torch.zeros_like(overlap, dtype=torch.bool)
    learns.scatter_(0, candidates, (of_candidates >= least) & is_inside)
    # The place that is taken when no other is: of the level that fits the size of the box best.
    best = of_candidates.max(0).values
    nearest = distance.gather(0, candidates).where(of_candidates >= best - 1e-6, torch.inf).argmin(0)
    alone = candidates.gather(0, nearest[None])[0]
    is_without = ~learns.any(0)
    learns[alone[is_without], is_without.nonzero()[:, 0]] = True
    ranked = overlap.where(learns, -1.0)
    most, box = ranked.max(dim=1)
    return found.where(most < 0, box)


def detection_loss(
    outputs: Sequence[Tensor], targets: Sequence[Mapping[str, Any]], strides: Sequence[int]
) -> dict[str, Tensor]:
    """The parts of the loss: `cls` (quality focal loss) and `box` (generalized IoU).

    Args:
        outputs: maps of a `DetectionHead`.
        targets: of each image `boxes` (n, 4) in pixels of the input, and `labels` (n,), `CROWD` for regions in which
            nothing is learned.
        strides: of the maps.
    """
    distances, logits = flat_outputs(outputs)
    places = Places(outputs, strides)
    predicted = places.boxes(distances)
    wanted, weights = torch.zeros_like(logits), torch.ones_like(logits[..., :1])
    own, true = [], []
    for row, target in enumerate(targets):
        boxes, labels = target["boxes"].to(predicted), target["labels"]
        is_object = labels != CROWD
        for region in boxes[~is_object]:
            is_inside = ((places.points > region[:2]) & (places.points < region[2:])).all(1)
            weights[row, is_inside] = 0
        learned = assign(places, boxes[is_object])
        at = (learned >= 0).nonzero()[:, 0]
        of_places = boxes[is_object][learned[at]]
        weights[row, at] = 1
        overlap = _overlap(predicted[row, at].detach(), of_places)
        wanted[row, at, labels[is_object][learned[at]]] = overlap
        own.append(predicted[row, at])
        true.append(of_places)
    count = max(1, sum(map(len, own)))
    scores = logits.sigmoid()
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    of_classes = ((scores - wanted).abs().square() * each * weights).sum() / count
    own_boxes, true_boxes = torch.cat(own), torch.cat(true)
    of_boxes = generalized_box_iou_loss(own_boxes, true_boxes, reduction="none").sum() / count
    return {"cls": of_classes, "box": _BOX_WEIGHT * of_boxes}


def _overlap(one: Tensor, two: Tensor) -> Tensor:
    """Intersection over union of boxes (n, 4) two by two."""
    shared = (torch.minimum(one[:, 2:], two[:, 2:]) - torch.maximum(one[:, :2], two[:, :2])).clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (one, two)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-9)


def boxes_of_outputs(outputs: Sequence[Tensor], strides: Sequence[int], nms_threshold: float = 0.5) -> list[Tensor]:
    """What a dense head has found in each image, the best first: at most 100 boxes, by non-maximum suppression.

    Args:
        outputs: maps of a `DetectionHead`.
        strides: of the maps.
        nms_threshold: overlap with a better box of its class above which a box is left out.

    Returns:
        For each image (n, 6): left, top, right, bottom in pixels of the input, score, class.
    """
    return [boxes for boxes, _ in places_of_outputs(outputs, strides, nms_threshold)]


def places_of_outputs(
    outputs: Sequence[Tensor], strides: Sequence[int], nms_threshold: float = 0.5
) -> list[tuple[Tensor, Tensor]]:
    """What `boxes_of_outputs` gives, with the position (n,) in `Places` at which each box was found."""
    distances, logits = flat_outputs(outputs)
    boxes, scores = Places(outputs, strides).boxes(distances), logits.sigmoid()
    found = []
    for row in range(len(scores)):
        values, order = scores[row].flatten().sort(descending=True, stable=True)
        count = min(MOST_PLACES, int((values >= LEAST_SCORE).sum()))
        values, order = values[:count], order[:count]
        classes = order % scores.shape[2]
        at = order.div(scores.shape[2], rounding_mode="floor")
        own = boxes[row, at]
        kept = batched_nms(own, values, classes, nms_threshold)[:MOST_BOXES]
        rows = torch.cat([own[kept], values[kept, None], classes[kept, None].to(values)], dim=1)
        found.append((rows, at[kept]))
    return found


def boxes_in_file(found: Tensor, geometry: Geometry) -> Tensor:
    """Boxes in pixels of the file, cut off at its edges.

    Args:
        found: (n, 6), as `boxes_of_outputs` gives them for an image.
        geometry: of the image in the input.
    """
    corners = geometry.points_in_file(found[:, :4].reshape(-1, 2, 2))
    edge = corners.new_tensor(geometry.whole)
    return torch.cat([corners.clamp(min=0).minimum(edge).reshape(-1, 4), found[:, 4:]], dim=1)
