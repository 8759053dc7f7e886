"""What `Trainer(feature_cache=...)` may be."""

from __future__ import annotations

from typing import Any

from flashtask.core.checks import is_whole
from flashtask.core.errors import UsageError

__all__ = ["check_feature_cache"]


def check_feature_cache(value: Any) -> None:
    """Refuse what is neither `auto`, True, False nor a number of views.

    Raises:
        UsageError: it is none of them.
    """
    is_word = isinstance(value, bool) or (isinstance(value, str) and value == "auto")
    if not is_word and not is_whole(value):
        raise UsageError(
            f'Trainer(feature_cache={value!r}): "auto", True, False or a number of views is needed',
            fix='feature_cache="auto"',
        )
