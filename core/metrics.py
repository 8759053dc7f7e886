"""Whether something is a metric, asked without importing torchmetrics, which takes two seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeGuard

from flashtask.core.accuracy import Accuracy
from flashtask.core.library_internals import metric_state

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["is_metric", "uncounted"]


def is_metric(value: object) -> TypeGuard[Metric | Accuracy]:
    """Whether `value` is an `Accuracy` or a `Metric` of torchmetrics, of which there are none before its import."""
    library = sys.modules.get("torchmetrics")
    kind = getattr(library, "Metric", None)
    return isinstance(value, Accuracy) or (kind is not None and isinstance(value, kind))


@contextmanager
def uncounted(metrics: Iterable[Metric | Accuracy]) -> Iterator[None]:
    """What metrics are given inside is not counted: afterwards they have the state that they had before."""
    before = [(metric, _counted(metric)) for metric in metrics]
    try:
        yield
    finally:
        for metric, state in before:
            metric.__dict__.update(state)


def _counted(metric: Metric | Accuracy) -> dict[str, Any]:
    """What a metric has counted so far, as attributes."""
    return {name: deepcopy(getattr(metric, name)) for name in metric_state(metric)}
