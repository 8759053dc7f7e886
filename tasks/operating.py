"""Decisions after the training of a classifier: the temperature of its scores, and which predictions are accepted."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from flashtask.core.errors import BadDataError, IntegrityError, UnknownNameError, UsageError
from flashtask.core.names import shown_name
from flashtask.core.number_checks import is_number
from flashtask.core.plain_json import number_or_null
from flashtask.reports.confidence import (
    UnreachableError,
    conformal_rank,
    cross_fitted,
    exact_interval,
    fitted_temperature,
    lower_bound,
    scores_calibration,
    threshold_for_coverage,
    threshold_for_precision,
    threshold_for_recall,
)
from flashtask.reports.statistics import Interval
from flashtask.trainer.text_table import WIDTH, text_table, wrapped

if TYPE_CHECKING:
    from flashtask.tasks.image_classification import ImageClassifier
    from flashtask.trainer.trainer import Trainer

__all__ = ["ACCEPTED", "UNKNOWN", "OperatingPoints", "operated", "stored_operating"]

ACCEPTED, UNKNOWN = "accepted", "unknown"


@dataclass(frozen=True)
class OperatingPoints:
    """The temperature of a classifier's scores, and the thresholds that decide whether a prediction is accepted.

    Args:
        temperature: what the outputs are divided by before they become probabilities.
        thresholds: of some classes, by label, from 0 to 1: a prediction is unknown where the score of such a class
            reaches its threshold though it was not predicted, or the other way round.
        abstain_below: a prediction with a lower score is unknown; None for no such limit.
        found: how they were chosen and what to expect of them, as plain values.
    """

    temperature: float = 1.0
    thresholds: Mapping[str, float] = field(default_factory=dict)
    abstain_below: float | None = None
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decides(self) -> bool:
        """Whether predictions are accepted or unknown, rather than only scored."""
        return bool(self.thresholds) or self.abstain_below is not None

    def decision(self, scores: Mapping[str, float], said: Collection[str]) -> str | None:
        """`accepted` or `unknown`; None if there is no threshold.

        Args:
            scores: of every label, with the temperature.
            said: the labels that are predicted.
        """
        if not self.decides:
            return None
        agrees = all((scores[label] >= bound) == (label in said) for label, bound in self.thresholds.items())
        is_sure = self.abstain_below is None or max(scores.values()) >= self.abstain_below
        return ACCEPTED if agrees and is_sure else UNKNOWN

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint holds them; `stored_operating` reads them."""
        return {
            "temperature": self.temperature,
            "thresholds": dict(self.thresholds),
            "abstain_below": self.abstain_below,
            "found": dict(self.found),
        }

    def lines(self) -> Iterator[str]:
        """What was found, for people: lines of at most 80 characters."""
        found = self.found
        yield f"temperature {self.temperature:.4g}, fitted on {found['samples']:,} images ({found['part']})"
        before, after = (found["calibration_error"][name] for name in ("before", "after"))
        if before is not None and after is not None:
            yield f"calibration error: {before:.4f} before, {after:.4f} after (cross-fitted on two halves)"
        if points := found["points"]:
            yield ""
            rows = [
                [
                    shown_name(one["label"]),
                    f"{one['kind']} {one['target']:g}",
                    f"{one['threshold']:.4f}",
                    *(_short(one[name]) for name in ("recall", "precision")),
                ]
                for one in points
            ]
            yield text_table(["class", "target", "threshold", "recall", "precision"], rows).rstrip()
            yield "in brackets: 95 % intervals (Clopper-Pearson)"
        for one in points:
            yield from wrapped(_promise(one), WIDTH)
        if points and found["has_groups"]:
            yield from wrapped("images of a group are not independent, so intervals and bounds are too narrow", WIDTH)
        if self.abstain_below is not None:
            yield f"a prediction with a score below {self.abstain_below:.4f} is {UNKNOWN}"
        if self.decides:
            yield ""
            yield f"{ACCEPTED}: {_percent(found['accepted'])} of the images"
            if found["accuracy_accepted"] is not None:
                yield f"accuracy: {_percent(found['accuracy_accepted'])} of these, {_percent(found['accuracy'])} of all"


class _Measured(NamedTuple):
    """What the model gives for the samples of a part: logits (N, classes), and zeros and ones (N, classes)."""

    outputs: torch.Tensor
    truth: np.ndarray[Any, Any]
    groups: Sequence[Any] | None


def operated(
    task: ImageClassifier,
    data: Any,
    part: str = "val",
    *,
    trainer: Trainer | None = None,
    recall: Mapping[str, float] | None = None,
    precision: Mapping[str, float] | None = None,
    coverage: float | None = None,
    abstain_below: float | None = None,
) -> OperatingPoints:
    """Fit the temperature on a part of the data, and choose thresholds on it; the arguments are those of `operate`."""
    targets = [("recall", *one) for one in (recall or {}).items()]
    targets += [("precision", *one) for one in (precision or {}).items()]
    _check(task, targets, coverage, abstain_below)
    measured = _measured(task, data, part, trainer)
    exclude, truth = not task.multi_label, measured.truth
    logits = measured.outputs.double().numpy()
    temperature = fitted_temperature(logits, truth, exclude=exclude)
    scores = task.scores(measured.outputs, temperature).double().numpy()
    plain = task.scores(measured.outputs, None).double().numpy()
    halves = cross_fitted(logits, truth, exclude=exclude, groups=measured.groups)
    before, after = (scores_calibration(one, truth, exclude=exclude) for one in (plain, halves))
    labels = task.output_names(scores.shape[1])
    points = [_point(kind, label, target, scores, truth, labels, part) for kind, label, target in targets]
    if coverage is not None:
        abstain_below = threshold_for_coverage(scores.max(axis=1), coverage)
    thresholds = {one["label"]: one["threshold"] for one in points}
    found: dict[str, Any] = {
        "part": part,
        "samples": len(scores),
        "has_groups": measured.groups is not None,
        "calibration_error": {
            "before": None if before is None else number_or_null(before.error),
            "after": None if after is None else number_or_null(after.error),
        },
        "points": points,
    }
    made = OperatingPoints(temperature, thresholds, abstain_below, found)
    return made if not made.decides else _with_shares(made, task, scores, truth, labels)


def _check(task: ImageClassifier, targets: Sequence[tuple[str, str, float]], coverage: Any, abstain_below: Any) -> None:
    """What can be refused before anything is computed.

    Raises:
        UsageError, UnknownNameError: a class or a target that does not exist, or targets that contradict each other.
    """
    labels = task.output_names(task.num_classes or 0)
    for kind, label, target in targets:
        if label not in labels:
            raise UnknownNameError("class", label, labels)
        if not is_number(target) or not 0 < target < 1:
            raise UsageError(
                f"{kind} of {label} must be above 0 and below 1, not {target!r}", fix=f"{kind}={{{label!r}: 0.95}}"
            )
    names = [label for _, label, _ in targets]
    if twice := [label for label in names if names.count(label) > 1]:
        raise UsageError(f"{twice[0]} has two targets, and a class has one threshold", fix="leave out one of them")
    if coverage is not None and abstain_below is not None:
        raise UsageError(
            "coverage and abstain_below both set the score below which nothing is accepted",
            fix="leave out one of them",
        )
    for name, value in (("coverage", coverage), ("abstain_below", abstain_below)):
        if value is not None and (not is_number(value) or not 0 < value <= 1):
            raise UsageError(f"{name} must be above 0 and up to 1, not {value!r}", fix=f"{name}=0.9")
        if value is not None and task.multi_label:
            raise UsageError(
                f"{name} is for models with one label an image, and this one has several",
                fix='recall={"LABEL": 0.95} for each label',
            )


def _measured(task: ImageClassifier, data: Any, part: str, trainer: Trainer | None) -> _Measured:
    from flashtask.tasks.judged_pass import measured

    outputs: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []

    def keep(step: Any, inputs: tuple[Any, Any]) -> None:
        outputs.append(step.outputs.detach().float().cpu())
        targets.append(inputs[1].cpu())

    measured(task, data, part, keep, trainer)
    table, logits, truth = data.samples(part), torch.cat(outputs), torch.cat(targets)
    if len(logits) != len(table):
        raise UsageError(f"{type(task).__name__} has steps of its own, which do not say what each image got")
    if not task.multi_label:
        truth = torch.nn.functional.one_hot(truth, logits.shape[1])
    return _Measured(logits, truth.bool().numpy(), None if table.groups is None else table.groups.tolist())


def _point(
    kind: str, label: str, target: float, scores: Any, truth: Any, labels: Sequence[str], part: str
) -> dict[str, Any]:
    """The threshold of one class, with what to expect of it.

    Raises:
        BadDataError: the part has no image of the class.
        UsageError: no threshold reaches the target; with the best one that can be reached.
    """
    own, is_class = scores[:, labels.index(label)], truth[:, labels.index(label)]
    support = int(is_class.sum())
    if not support:
        raise BadDataError(f"there is no image of {label} in {part}", fix=f"data with images of {label}")
    choose = threshold_for_recall if kind == "recall" else threshold_for_precision
    try:
        threshold = choose(own, is_class, target)
    except UnreachableError as error:
        best = math.floor(error.best * 1e4) / 1e4
        why = f"at no threshold more than {best:g} of what reaches it is {label}"
        if kind == "recall":
            why = f"{support} images of {label} can promise at most {support} / {support + 1} = {best:g}"
        fix = f"{label}={best:g}, or more images of it" if best else f"a model that recognises {label}"
        raise UsageError(f"{kind} {label}={target:g} cannot be reached on {part}", why=why, fix=fix) from None
    says = own >= threshold
    hits = int((says & is_class).sum())
    made: dict[str, Any] = {"label": label, "kind": kind, "target": target}
    made |= {"threshold": threshold, "support": support}
    made["recall"] = _plain(exact_interval("recall", hits, support))
    made["precision"] = _plain(exact_interval("precision", hits, int(says.sum())))
    if kind == "recall":
        kept = support + 1 - conformal_rank(support, target)
        made["conformal"], made["least_recall"] = kept / (support + 1), lower_bound(kept, support)
    return made


def _with_shares(
    made: OperatingPoints, task: ImageClassifier, scores: Any, truth: Any, labels: Sequence[str]
) -> OperatingPoints:
    """With how much is accepted, and how much of that is right."""
    if task.multi_label:
        said = scores >= np.array(task.score_thresholds(made.temperature))
    else:
        said = np.arange(scores.shape[1]) == scores.argmax(axis=1)[:, None]
    rows = [dict(zip(labels, row, strict=True)) for row in scores.tolist()]
    names = [{label for label, is_said in zip(labels, row, strict=True) if is_said} for row in said.tolist()]
    accepted = np.array([made.decision(*one) == ACCEPTED for one in zip(rows, names, strict=True)])
    found = {**made.found, "accepted": _plain(exact_interval("accepted", int(accepted.sum()), len(accepted)))}
    found |= {"accuracy": None, "accuracy_accepted": None}
    if not task.multi_label:
        right = (said & truth).any(axis=1)
        found["accuracy"] = _plain(exact_interval("accuracy", int(right.sum()), len(right)))
        hits = int((right & accepted).sum())
        found["accuracy_accepted"] = _plain(exact_interval("accuracy", hits, int(accepted.sum())))
    return OperatingPoints(made.temperature, made.thresholds, made.abstain_below, found)


def _plain(one: Interval) -> dict[str, float | None]:
    return {name: number_or_null(getattr(one, name)) for name in ("value", "low", "high")}


def _short(one: Mapping[str, Any]) -> str:
    if one["value"] is None:
        return ""
    return f"{one['value']:.3f} ({one['low']:.3f}-{one['high']:.3f})"


def _percent(one: Mapping[str, Any]) -> str:
    if one["value"] is None:
        return "none"
    return f"{100 * one['value']:.1f} % ({100 * one['low']:.1f} to {100 * one['high']:.1f})"


def _promise(one: Mapping[str, Any]) -> str:
    """What to expect of new images, in words."""
    label = shown_name(one["label"])
    if one["kind"] == "precision":
        return f"{label}: the precision is that of the images it was chosen on, so expect less on new ones"
    return (
        f"{label}: a new image of it reaches the threshold with a probability of {one['conformal']:.4f} or more (split "
        f"conformal, {one['support']:,} images); with 95 % confidence its recall is at least {one['least_recall']:.4f}"
    )


# ---- what files hold


def stored_operating(stored: Any, labels: Any) -> OperatingPoints | None:
    """The operating points in a file, which need not be one of ours; None if it has none.

    Raises:
        IntegrityError: they are not what `OperatingPoints.to_dict` gives, or are about other labels.
    """
    if stored is None:
        return None
    if not isinstance(stored, dict) or set(stored) != {"temperature", "thresholds", "abstain_below", "found"}:
        raise IntegrityError("its operating points are not a temperature, thresholds and what was found")
    temperature, thresholds, least = (stored[name] for name in ("temperature", "thresholds", "abstain_below"))
    if not is_number(temperature) or temperature <= 0:
        raise IntegrityError(f"its temperature is {str(temperature)[:40]}, not a number above 0")
    if not isinstance(thresholds, dict) or not isinstance(stored["found"], dict):
        raise IntegrityError("its operating points are not thresholds by label")
    for label, bound in [*thresholds.items(), *([] if least is None else [("abstain_below", least)])]:
        if not is_number(bound) or not 0 <= bound <= 1:
            raise IntegrityError(f"the threshold {str(label)[:40]} is not a number from 0 to 1")
    if unknown := [label for label in thresholds if label not in (labels or ())]:
        raise IntegrityError(f"it has a threshold for {str(unknown[0])[:40]!r}, which is not one of its labels")
    return OperatingPoints(float(temperature), dict(thresholds), least, dict(stored["found"]))
