"""Whether something is a metric of torchmetrics, asked without importing that library, which takes two seconds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["is_metric"]


def is_metric(value: Any) -> TypeGuard[Metric]:
    """Whether `value` is a torchmetrics `Metric`; nothing can be one before that library has been imported."""
    library = sys.modules.get("torchmetrics")
    kind = getattr(library, "Metric", None)
    return kind is not None and isinstance(value, kind)
