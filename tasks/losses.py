"""Losses by name, and the weights of classes in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flashtask.core.errors import UnknownNameError, UsageError, did_you_mean
from flashtask.core.number_checks import is_number

__all__ = ["LABELS_LOSSES", "LABEL_LOSSES", "NUMBER_LOSSES", "check_loss", "check_weights", "class_weights"]

#: What a loss of labels is called with: outputs, targets, the weight of each class (or None), the label smoothing, and
#: the weight of each sample (B,) (or None).
Loss = Callable[..., Tensor]


#: Of the focal loss.
_GAMMA = 2.0


def _cross_entropy(
    outputs: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float, samples: Tensor | None = None
) -> Tensor:
    if samples is None:
        return functional.cross_entropy(outputs, targets, weight, label_smoothing=smoothing)
    each = functional.cross_entropy(outputs, targets, weight, reduction="none", label_smoothing=smoothing)
    return _mean_of_labels(each * samples, targets, weight)


def _focal(
    outputs: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float, samples: Tensor | None = None
) -> Tensor:
    """Cross-entropy that counts samples less, the surer the model is of their class (Lin et al., 2017)."""
    each = functional.cross_entropy(outputs, targets, weight, reduction="none", label_smoothing=smoothing)
    sure = outputs.softmax(dim=1).gather(1, targets[:, None])[:, 0]
    losses = (1 - sure) ** _GAMMA * each
    return _mean_of_labels(losses if samples is None else losses * samples, targets, weight)


def _mean_of_labels(losses: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """The mean of losses (B,) that are multiplied by class weights already, as torch takes it."""
    return losses.mean() if weight is None else losses.sum() / weight[targets].sum()


def _binary_cross_entropy(
    outputs: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float, samples: Tensor | None = None
) -> Tensor:
    soft = targets * (1 - smoothing) + smoothing / 2
    if samples is None:
        return functional.binary_cross_entropy_with_logits(outputs, soft, pos_weight=weight)
    each = functional.binary_cross_entropy_with_logits(outputs, soft, pos_weight=weight, reduction="none")
    return (each * samples[:, None]).mean()


def _binary_focal(
    outputs: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float, samples: Tensor | None = None
) -> Tensor:
    soft = targets * (1 - smoothing) + smoothing / 2
    each = functional.binary_cross_entropy_with_logits(outputs, soft, pos_weight=weight, reduction="none")
    chance = outputs.sigmoid()
    sure = targets * chance + (1 - targets) * (1 - chance)
    losses = (1 - sure) ** _GAMMA * each
    return (losses if samples is None else losses * samples[:, None]).mean()


#: For one label an image: logits (B, classes) and class indices (B,).
LABEL_LOSSES: Mapping[str, Loss] = {"cross_entropy": _cross_entropy, "focal": _focal}
#: For any number of labels: logits and zeros and ones, both (B, labels).
LABELS_LOSSES: Mapping[str, Loss] = {"binary_cross_entropy": _binary_cross_entropy, "focal": _binary_focal}
#: For numbers: outputs and targets, both (B, numbers), in units of the training targets' standard deviation.
NUMBER_LOSSES: Mapping[str, Loss] = {
    "huber": functional.huber_loss,
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
}


def check_loss(given: Any, known: Mapping[str, Loss]) -> None:
    """Refuse what is neither the name of a loss nor a callable.

    Raises:
        UnknownNameError: with the nearest names.
        UsageError: something else.
    """
    if isinstance(given, str):
        if given not in known:
            raise UnknownNameError("loss", given, sorted(known))
    elif not callable(given):
        raise UsageError(
            f"loss_fn must be {', '.join(known)}, or a callable of outputs and targets, not {given!r}",
            fix=f'loss_fn="{next(iter(known))}"',
        )


def check_weights(given: Any) -> None:
    """Refuse class weights of another form than `class_weights` takes.

    Raises:
        UsageError: something else.
    """
    if given is None or given == "balanced":
        return
    numbers = list(given.values()) if isinstance(given, Mapping) else given
    if (
        isinstance(numbers, str)
        or not isinstance(numbers, Sequence)
        or not all(is_number(n) and n > 0 for n in numbers)
    ):
        raise UsageError(
            f"class_weights must be balanced, or a number above 0 for each class, not {given!r}",
            fix='class_weights="balanced", or class_weights={"cat": 1.0, "dog": 2.5}',
        )


def class_weights(
    given: Any, labels: Sequence[str], counts: Mapping[str, int] | None, num_samples: int | None = None
) -> Tensor:
    """The weight of each class: (classes,) float32.

    Args:
        given: `balanced`; a weight by label, 1 where none is given; or one for each class in order.
        labels: in the order of the outputs.
        counts: of training samples by label, which `balanced` needs.
        num_samples: for any number of labels a sample: `balanced` is then the ratio of samples without a label to
            those with it. Else it is samples / (classes * samples of the class), as in scikit-learn.

    Raises:
        UsageError: a label that the model does not have, another number of weights, or no counts.
    """
    if given == "balanced":
        if not counts:
            raise UsageError(
                "class_weights='balanced' needs the number of training images of each class",
                why="the data does not provide them",
                fix='class_weights={"cat": 1.0, "dog": 2.5}',
            )
        found = torch.tensor([float(counts.get(label, 0)) for label in labels])
        if num_samples is not None:
            return ((num_samples - found) / found.clamp(min=1)).clamp(min=1e-3)
        return found.sum() / (len(labels) * found.clamp(min=1))
    if isinstance(given, Mapping):
        for name in given:
            if name not in labels:
                raise UsageError(
                    f"class_weights has {name!r}, which is not one of the classes: {', '.join(labels[:8])}",
                    fix=did_you_mean(str(name), labels) or "",
                )
        return torch.tensor([float(given.get(label, 1.0)) for label in labels])
    if len(given) != len(labels):
        raise UsageError(f"class_weights has {len(given)} numbers for {len(labels)} classes")
    return torch.tensor([float(weight) for weight in given])
