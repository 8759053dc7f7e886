"""Whether something is a metric, asked without importing torchmetrics, which takes two seconds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from flashtask.core.accuracy import Accuracy

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["is_metric"]


def is_metric(value: Any) -> TypeGuard[Metric | Accuracy]:
    """Whether `value` is an `Accuracy` or a `Metric` of torchmetrics, of which there are none before its import."""
    library = sys.modules.get("torchmetrics")
    kind = getattr(library, "Metric", None)
    return isinstance(value, Accuracy) or (kind is not None and isinstance(value, kind))
