"""What keypoints lose, their similarity to the true ones, and how a head's outputs become objects with keypoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flashtask.data.boxes import CROWD
from flashtask.tasks.box_loss import Places, assign, detection_loss, places_of_outputs

__all__ = ["COCO_PERSON", "COCO_SIGMAS", "keypoint_loss", "keypoints_of_outputs", "sigmas_of", "similarity"]
__all__ += ["triples_of"]

#: COCO's keypoints of a person, and how much their annotators differed, as a share of the object's size.
COCO_PERSON: tuple[str, ...] = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
)
COCO_PERSON += ("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee")
COCO_PERSON += ("left_ankle", "right_ankle")
COCO_SIGMAS: tuple[float, ...] = (
    0.026,
    0.025,
    0.025,
    0.035,
    0.035,
    0.079,
    0.079,
    0.072,
    0.072,
    0.062,
    0.062,
    0.107,
    0.107,
    0.087,
    0.087,
)
COCO_SIGMAS += (0.089, 0.089)
#: That of other keypoints, if none are given: about the middle of COCO's.
_SIGMA = 0.05
#: Share of a box that its object fills, on average in COCO: OKS divides by the area of the object.
_FILLED = 0.53
#: Weights of the parts of the loss.
_POINT_WEIGHT, _VISIBLE_WEIGHT = 2.0, 0.5


def sigmas_of(names: Sequence[str]) -> tuple[float, ...]:
    """How exactly each keypoint can be placed: COCO's numbers for a person, 0.05 for others."""
    return COCO_SIGMAS if tuple(names) == COCO_PERSON else (_SIGMA,) * len(names)


def similarity(found: Tensor, true: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    """COCO's object keypoint similarity (OKS), averaged over the labelled keypoints; 0 if none is labelled.

    Args:
        found: (..., K, 2), x and y.
        true: (..., K, 3), x, y, and above 0 if labelled.
        areas: (...), of the true objects, in square pixels.
        sigmas: (K,), of each keypoint.
    """
    is_labelled = true[..., 2] > 0
    distances = (found - true[..., :2]).square().sum(-1)
    exponents = distances / (2 * areas[..., None].clamp(min=1e-9) * (2 * sigmas).square())
    return ((-exponents).exp() * is_labelled).sum(-1) / is_labelled.sum(-1).clamp(min=1)


def keypoint_loss(
    outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Any]], strides: Sequence[int], sigmas: Sequence[float]
) -> dict[str, Tensor]:
    """The parts of the loss: `cls` and `box` as of boxes, `point` and `visible`.

    `point` is 1 - OKS (Maji et al., YOLO-Pose, 2022) with a smooth L1 distance in sizes of the object beside it, since
    OKS has no slope where a keypoint is far off. `visible` is binary cross-entropy with whether a keypoint is labelled.

    Args:
        outputs: of a `KeypointHead`.
        targets: as of `detection_loss`, with `keypoints` (n, K, 3).
        strides: of the maps.
        sigmas: of the keypoints.
    """
    losses = detection_loss(outputs["maps"], targets, strides)
    places = Places(outputs["maps"], strides)
    points, logits = _flat(outputs["points"], places)
    own, own_logits, true, areas = [], [], [], []
    for row, target in enumerate(targets):
        is_object = target["labels"] != CROWD
        boxes = target["boxes"][is_object].to(points)
        learned = assign(places, boxes)
        at = (learned >= 0).nonzero()[:, 0]
        own.append(points[row, at])
        own_logits.append(logits[row, at])
        true.append(target["keypoints"][is_object].to(points)[learned[at]])
        areas.append((boxes[:, 2:] - boxes[:, :2]).prod(1)[learned[at]])
    found, wanted, size = torch.cat(own), torch.cat(true), _FILLED * torch.cat(areas)
    is_labelled = wanted[..., 2] > 0
    count = is_labelled.any(-1).sum().clamp(min=1)
    alike = similarity(found, wanted, size, found.new_tensor(sigmas))
    scale = size.clamp(min=1).sqrt()[:, None, None]
    apart = functional.smooth_l1_loss(found / scale, wanted[..., :2] / scale, reduction="none", beta=0.1).sum(-1)
    apart = (apart * is_labelled).sum(-1) / is_labelled.sum(-1).clamp(min=1)
    of_points = ((1 - alike) * is_labelled.any(-1) + apart).sum() / count
    is_there = functional.binary_cross_entropy_with_logits(
        torch.cat(own_logits), is_labelled.to(found), reduction="none"
    )
    of_visible = is_there.mean(-1).sum() / max(1, len(found))
    return {**losses, "point": _POINT_WEIGHT * of_points, "visible": _VISIBLE_WEIGHT * of_visible}


def triples_of(rows: Tensor) -> Tensor:
    """The last dimension (..., 3 * K) as (..., K, 3)."""
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // 3, 3)


def _flat(maps: Sequence[Tensor], places: Places) -> tuple[Tensor, Tensor]:
    """Keypoints (B, P, K, 2) in pixels of the input, and logits (B, P, K)."""
    whole = torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)
    count = whole.shape[2] // 3
    offsets = whole[..., : 2 * count].reshape(*whole.shape[:2], count, 2)
    return places.points[:, None] + offsets, whole[..., 2 * count :]


def keypoints_of_outputs(
    outputs: Mapping[str, Any], strides: Sequence[int], nms_threshold: float = 0.5
) -> list[Tensor]:
    """What a dense head has found in each image, the best first: at most 100 objects, by non-maximum suppression.

    Args:
        outputs: of a `KeypointHead`.
        strides: of the maps.
        nms_threshold: as of boxes.

    Returns:
        For each image (n, 6 + 3 * K): left, top, right, bottom in pixels of the input, score, class; then x, y and the
        probability that it is there of each keypoint.
    """
    points, logits = _flat(outputs["points"], Places(outputs["maps"], strides))
    whole = torch.cat([points, logits.sigmoid()[..., None]], dim=-1).flatten(2)
    found = places_of_outputs(outputs["maps"], strides, nms_threshold)
    return [torch.cat([rows, whole[row, at].to(rows)], dim=1) for row, (rows, at) in enumerate(found)]
