"""Losses by name with arguments, and the weights of classes in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flashtask.core.errors import UnknownNameError, UsageError, did_you_mean
from flashtask.core.named_choice import check_arguments, name_and_arguments
from flashtask.core.number_checks import is_number

__all__ = ["LABELS_LOSSES", "LABEL_LOSSES", "NUMBER_LOSSES", "check_weights", "chosen_loss", "class_weights"]

#: What a loss of labels is called with: outputs, targets, the weight of each class (or None), the label smoothing, and
#: the weight of each sample (B,) (or None). Its keyword-only parameters are the arguments that a user can give.
Loss = Callable[..., Tensor]


def _cross_entropy(
    outputs: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float, samples: Tensor | None = None
) -> Tensor:
    if samples is None:
        return functional.cross_entropy(outputs, targets, weight, label_smoothing=smoothing)
    each = functional.cross_entropy(outputs, targets, weight, reduction="none", label_smoothing=smoothing)
    return _mean_of_labels(each * samples, targets, weight)


def _focal(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    smoothing: float,
    samples: Tensor | None = None,
    *,
    gamma: float = 2.0,
) -> Tensor:
    """Cross-entropy times (1 - p)^gamma, p the probability of the sample's class (Lin et al., arXiv:1708.02002)."""
    each = functional.cross_entropy(outputs, targets, weight, reduction="none", label_smoothing=smoothing)
    sure = outputs.softmax(dim=1).gather(1, targets[:, None])[:, 0]
    losses = _to_the_power(1 - sure, gamma) * each
    return _mean_of_labels(losses if samples is None else losses * samples, targets, weight)


def _binary_of_one_label(
    outputs: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float, samples: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy with one-hot targets, the mean over classes (Wightman et al., arXiv:2110.00476).

    Smoothing spreads evenly over the classes, as in timm's `BinaryCrossEntropy`.
    """
    hot = functional.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
    soft = hot * (1 - smoothing) + smoothing / outputs.shape[1]
    losses = functional.binary_cross_entropy_with_logits(outputs, soft, reduction="none").mean(dim=1)
    if weight is not None:
        losses = losses * weight[targets]
    return _mean_of_labels(losses if samples is None else losses * samples, targets, weight)


def _to_the_power(missing: Tensor, gamma: float) -> Tensor:
    """`missing` ** gamma with a finite gradient at 0, where that of a power below 1 is infinite."""
    return (missing.clamp(min=1e-7) if 0 < gamma < 1 else missing) ** gamma


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
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    smoothing: float,
    samples: Tensor | None = None,
    *,
    gamma: float = 2.0,
) -> Tensor:
    """The focal loss of each label (Lin et al., arXiv:1708.02002)."""
    soft = targets * (1 - smoothing) + smoothing / 2
    each = functional.binary_cross_entropy_with_logits(outputs, soft, pos_weight=weight, reduction="none")
    chance = outputs.sigmoid()
    sure = targets * chance + (1 - targets) * (1 - chance)
    losses = _to_the_power(1 - sure, gamma) * each
    return (losses if samples is None else losses * samples[:, None]).mean()


def _asymmetric(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    smoothing: float,
    samples: Tensor | None = None,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
) -> Tensor:
    """The asymmetric loss of each label (Ridnik et al., arXiv:2009.14119), the mean over labels and samples.

    -y (1 - p)^gamma_pos log p - (1 - y) q^gamma_neg log(1 - q), with q = max(p - clip, 0).
    """
    soft = targets * (1 - smoothing) + smoothing / 2
    chance = outputs.sigmoid()
    shifted = (chance - clip).clamp(min=0)
    positive = (1 - chance) ** gamma_pos * functional.logsigmoid(outputs)
    # The number nearest to 1 that float32 has: log1p(-1) is infinite.
    negative = shifted**gamma_neg * torch.log1p(-shifted.clamp(max=1 - 2**-24))
    if weight is not None:
        positive = positive * weight
    losses = -(soft * positive + (1 - soft) * negative)
    return (losses if samples is None else losses * samples[:, None]).mean()


def _huber(outputs: Tensor, targets: Tensor, reduction: str = "mean", *, delta: float = 1.0) -> Tensor:
    return functional.huber_loss(outputs, targets, reduction=reduction, delta=delta)


def _smooth_l1(outputs: Tensor, targets: Tensor, reduction: str = "mean", *, beta: float = 1.0) -> Tensor:
    return functional.smooth_l1_loss(outputs, targets, reduction=reduction, beta=beta)


def _mse(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return functional.mse_loss(outputs, targets, reduction=reduction)


def _l1(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return functional.l1_loss(outputs, targets, reduction=reduction)


#: For one label an image: logits (B, classes) and class indices (B,).
LABEL_LOSSES: Mapping[str, Loss] = {
    "cross_entropy": _cross_entropy,
    "focal": _focal,
    "binary_cross_entropy": _binary_of_one_label,
    "bce": _binary_of_one_label,
}
#: For any number of labels: logits and zeros and ones, both (B, labels).
LABELS_LOSSES: Mapping[str, Loss] = {
    "binary_cross_entropy": _binary_cross_entropy,
    "bce": _binary_cross_entropy,
    "focal": _binary_focal,
    "asymmetric": _asymmetric,
}
#: For numbers: outputs and targets, both (B, numbers), in units of the training targets' standard deviation.
NUMBER_LOSSES: Mapping[str, Loss] = {"huber": _huber, "mse": _mse, "l1": _l1, "smooth_l1": _smooth_l1}

#: Arguments of losses that cannot be 0, and the one that stays below 1.
_ABOVE_ZERO, _BELOW_ONE = ("delta", "beta"), ("clip",)


def chosen_loss(given: object, known: Mapping[str, Loss]) -> Loss | None:
    """The loss that a name means, with its arguments; None for a callable of the user's.

    Args:
        given: a name, `(name, {arguments})`, `{name: {arguments}}`, or a callable.
        known: losses by name.

    Raises:
        UnknownNameError: a loss or an argument that does not exist, with the nearest names.
        UsageError: something else, or an argument that is not a number in its range.
    """
    if callable(given):
        return None
    choice = name_and_arguments(given)
    if choice is None:
        raise UsageError(
            f"loss_fn must be {', '.join(known)}, or a callable of outputs and targets, not {given!r}",
            fix=f'loss_fn="{next(iter(known))}"',
        )
    name, arguments = choice
    if name not in known:
        error = UnknownNameError("loss", name, sorted(known))
        if name in LABELS_LOSSES and known is LABEL_LOSSES:
            error.fix = f"{name} is for any number of labels per image: multi_label=True"
        raise error
    check_arguments(f"loss {name!r}", known[name], arguments)
    for argument, value in arguments.items():
        is_right = is_number(value) and value >= 0
        if not is_right or (argument in _ABOVE_ZERO and value == 0) or (argument in _BELOW_ONE and value >= 1):
            bounds = "above 0" if argument in _ABOVE_ZERO else "from 0 to below 1" if argument in _BELOW_ONE else ">= 0"
            raise UsageError(f"loss {name!r}: {argument} must be a number {bounds}, not {value!r}")
    return partial(known[name], **arguments) if arguments else known[name]


#: The rules that make class weights of the number of training images of each class -> their arguments.
_RULES: Mapping[str, Mapping[str, float]] = {"balanced": {}, "effective_number": {"beta": 0.9999}}


def _rule(given: object) -> tuple[str, dict[str, Any]] | None:
    """The rule that class weights name, with its arguments; None if they are numbers."""
    choice = name_and_arguments(given)
    return None if choice is None else (choice[0], {**_RULES.get(choice[0], {}), **choice[1]})


def check_weights(given: object) -> None:
    """Refuse class weights of another form than `class_weights` takes.

    Raises:
        UnknownNameError: an argument that a rule does not have.
        UsageError: something else.
    """
    if given is None:
        return
    rule = _rule(given)
    if rule is not None and rule[0] in _RULES:
        name, arguments = rule
        for argument, value in arguments.items():
            if argument not in _RULES[name]:
                raise UnknownNameError(f"argument of class_weights {name!r}", argument, _RULES[name])
            if not is_number(value) or not 0 <= value < 1:
                raise UsageError(f"class_weights: {argument} must be from 0 to below 1, not {value!r}")
        return
    numbers = list(given.values()) if isinstance(given, Mapping) else given
    if rule or not isinstance(numbers, Sequence) or not all(is_number(n) and n > 0 for n in numbers):
        near = did_you_mean(rule[0], _RULES) if rule else ""
        raise UsageError(
            f"class_weights must be {', '.join(_RULES)}, or a number above 0 for each class, not {given!r}",
            fix=near or 'class_weights="balanced", or class_weights={"cat": 1.0, "dog": 2.5}',
        )


def class_weights(
    given: Any, labels: Sequence[str], counts: Mapping[str, int] | None, num_samples: int | None = None
) -> Tensor:
    """The weight of each class: (classes,) float32.

    Args:
        given: `balanced`; `effective_number`, also with its `beta` (0.9999); a weight by label, 1 where none is given;
            or one for each class in order.
        labels: in the order of the outputs.
        counts: of training samples by label, which the rules need.
        num_samples: for any number of labels a sample: `balanced` is then the ratio of samples without a label to
            those with it. Else it is samples / (classes * samples of the class), as in scikit-learn.

    Raises:
        UsageError: a label that the model does not have, another number of weights, or no counts.
    """
    if (rule := _rule(given)) is not None:
        name, arguments = rule
        if not counts:
            raise UsageError(
                f"class_weights={name!r} needs the number of training images of each class",
                why="the data does not provide them",
                fix='class_weights={"cat": 1.0, "dog": 2.5}',
            )
        found = torch.tensor([float(counts.get(label, 0)) for label in labels])
        if name == "effective_number":
            return _by_effective_number(found, **arguments)
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


def _by_effective_number(counts: Tensor, beta: float) -> Tensor:
    """(1 - beta) / (1 - beta^n), scaled to a mean of 1 over the classes (Cui et al., arXiv:1901.05555)."""
    weights = (1 - beta) / (1 - beta ** counts.clamp(min=1).double())
    return (weights * len(weights) / weights.sum()).float()
