"""What a model has forgotten that was trained further: the recall of each old class before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flashtask.reports.judgement import Judged
from flashtask.trainer.text_table import WIDTH, text_table, wrapped

__all__ = ["ClassRecall", "Forgetting", "forgetting"]


class ClassRecall(NamedTuple):
    """A class that the old model knew, on the old validation samples.

    Args:
        label: its name.
        samples: that have it.
        before: the share of them that the old model gets right.
        after: the share that the new one gets right.
    """

    label: str
    samples: int
    before: float
    after: float

    @property
    def points(self) -> float:
        """How far it rose, in percentage points; below 0: how far it fell."""
        return 100 * (self.after - self.before)


@dataclass(frozen=True)
class Forgetting:
    """The old validation samples before and after, beside the new ones.

    Args:
        classes: that have old validation samples.
        allowed: percentage points that a class may fall.
        old: accuracy on all old validation samples, before and after.
        new: accuracy of the new model on the new validation samples; None without any.
        num_new: these samples.
    """

    classes: tuple[ClassRecall, ...]
    allowed: float
    old: tuple[float, float]
    new: float | None
    num_new: int = 0

    @property
    def fallen(self) -> tuple[ClassRecall, ...]:
        """The classes that fell by more than is allowed."""
        return tuple(one for one in self.classes if -one.points > self.allowed + 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: accuracies and recalls as shares, `points` in percentage points."""
        classes = [{**one._asdict(), "points": one.points} for one in self.classes]
        of_new = {"new": {"accuracy": self.new, "samples": self.num_new}}
        old = {"before": self.old[0], "after": self.old[1]}
        return {"allowed": self.allowed, "old": old, **of_new, "classes": classes, "is_refused": bool(self.fallen)}

    def lines(self) -> Iterator[str]:
        """A table of the old classes, and both accuracies, in 80 columns."""
        count = sum(one.samples for one in self.classes)
        whole = ClassRecall("all", count, *self.old)
        rows = [
            [one.label, f"{one.samples:,}", f"{one.before:.4f}", f"{one.after:.4f}", f"{one.points:+.1f}"]
            for one in (*self.classes, whole)
        ]
        yield text_table(["old validation data", "samples", "before", "after", "points"], rows).rstrip()
        if self.new is not None:
            yield from wrapped(f"new validation data: {self.new:.4f} of {self.num_new:,} samples are right", WIDTH)


def forgetting(
    before: Sequence[Judged], after: Sequence[Judged], new: Sequence[Judged], allowed: float = 2.0
) -> Forgetting:
    """Compare what an old and a new model make of the same samples, which have one label each.

    Args:
        before: the old validation samples, judged by the old model.
        after: the same, judged by the new one.
        new: the new validation samples, judged by the new one.
        allowed: percentage points that the recall of a class may fall.
    """
    labels = sorted({one.target for one in before})
    classes = []
    for label in labels:
        old_right, new_right = ([not one.is_wrong for one in side if one.target == label] for side in (before, after))
        classes.append(ClassRecall(label, len(old_right), _mean(old_right), _mean(new_right)))
    old = (_mean([not one.is_wrong for one in before]), _mean([not one.is_wrong for one in after]))
    of_new = _mean([not one.is_wrong for one in new]) if new else None
    return Forgetting(tuple(classes), allowed, old, of_new, len(new))


def _mean(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
