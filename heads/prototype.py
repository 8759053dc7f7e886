"""A head without training: a class is the mean of its features, and the nearest mean wins."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from flashtask.core.errors import UnknownNameError
from flashtask.heads.closed_form import best_scale, check_features, check_positive, class_counts

__all__ = ["PrototypeHead"]

_DISTANCES = ("cosine", "euclidean")
#: How far the logit of a class without samples lies below the lowest.
_UNSEEN = 10.0


class PrototypeHead(nn.Module):
    """Nearest class mean.

    With `cosine`, features are centred at the mean of the class means and brought to length 1; logits are cosines with
    the class means times a factor. With `euclidean` they are negative squared distances times a factor. The factor is
    the inverse temperature. A class without a sample is never predicted.

    Args:
        num_features: features a sample.
        num_outputs: classes.
        distance: `cosine` or `euclidean`.
        temperature: what cosines, or squared distances as shares of their mean, are divided by, above 0; None takes
            that of the least cross-entropy over the training samples, each left out of the mean of its class.

    Shape: (B, num_features) floats to (B, num_outputs).
    """

    requires_solving: ClassVar[bool] = True
    prototypes: Tensor
    center: Tensor
    scale: Tensor
    seen: Tensor

    def __init__(
        self, num_features: int, num_outputs: int, *, distance: str = "cosine", temperature: float | None = None
    ) -> None:
        super().__init__()
        if distance not in _DISTANCES:
            raise UnknownNameError("distance", str(distance), _DISTANCES)
        check_positive("prototype", "temperature", temperature)
        self.distance, self.temperature = distance, temperature
        self.register_buffer("prototypes", torch.zeros(num_outputs, num_features))
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("seen", torch.zeros(num_outputs, dtype=torch.bool))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, num_outputs)."""
        scores = self._scores(features - self.center, self.prototypes) * self.scale
        return torch.where(self.seen, scores, scores.amin(dim=1, keepdim=True) - _UNSEEN)

    def _scores(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """How near centred features (B, F) are to prototypes (K, F): (B, K)."""
        if self.distance == "cosine":
            features, prototypes = (nn.functional.normalize(each, dim=1) for each in (features, prototypes))
            return features @ prototypes.T
        # The square of the features is left out: it is the same for every class, and so no part of a probability.
        return 2 * features @ prototypes.T - prototypes.square().sum(dim=1)

    @torch.no_grad()
    def solve(self, features: Tensor, targets: Tensor) -> str:
        """Take the mean of each class; see `ClosedFormHead`.

        Raises:
            BadDataError: features that are NaN or infinite.
            UsageError: shapes or classes that are not the head's.
        """
        num_outputs, num_features = self.prototypes.shape
        features, targets = check_features(features, targets, num_features, num_outputs)
        counts = class_counts(targets, num_outputs)
        seen = counts > 0
        means = _class_means(features, targets, counts)
        center = means[seen].mean(dim=0)
        features, means = features - center, means - center
        if self.distance == "cosine":
            features = nn.functional.normalize(features, dim=1)
            means = _class_means(features, targets, counts)
        means[~seen] = 0
        unit = 1.0 if self.distance == "cosine" else _mean_distance(features, means[seen])
        scale = 1 / self.temperature if self.temperature else self._fitted(features, targets, means, counts, unit)
        for buffer, value in ((self.prototypes, means), (self.center, center), (self.seen, seen)):
            buffer.copy_(value)
        self.scale.fill_(scale / unit)
        empty = int((~seen).sum())
        without = f"; {empty} of {num_outputs} classes have no sample and are never predicted" if empty else ""
        return f"prototype: class means of {len(features)} samples, temperature {1 / scale:.3g}{without}"

    def _fitted(self, features: Tensor, targets: Tensor, means: Tensor, counts: Tensor, unit: float) -> float:
        """The scale that suits samples which are not part of their own class's mean."""
        can_be_left_out = counts[targets] > 1
        features, targets = features[can_be_left_out], targets[can_be_left_out]
        own_count = counts[targets][:, None].double()
        without = (means[targets] * own_count - features) / (own_count - 1)
        scores = self._scores(features, means)
        if self.distance == "cosine":
            own = (nn.functional.normalize(features, dim=1) * nn.functional.normalize(without, dim=1)).sum(dim=1)
        else:
            own = 2 * (features * without).sum(dim=1) - without.square().sum(dim=1)
        scores = scores.scatter(1, targets[:, None], own[:, None])[:, counts > 0]
        place = torch.cumsum(counts > 0, 0) - 1  # of a class among those that are there
        return best_scale(scores / unit, place[targets])


def _class_means(features: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """(K, F); zeros for a class without samples."""
    sums = torch.zeros(len(counts), features.shape[1], dtype=features.dtype).index_add_(0, targets, features)
    return sums / counts.clamp(min=1)[:, None]


def _mean_distance(features: Tensor, means: Tensor) -> float:
    """The mean of all squared distances between samples and class means, 1 if all are 0."""
    mean = float(features.square().sum(dim=1).mean() + means.square().sum(dim=1).mean())
    mean -= 2 * float(features.mean(dim=0) @ means.mean(dim=0))
    return mean if mean > 0 else 1.0
