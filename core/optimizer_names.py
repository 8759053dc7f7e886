"""Optimizers of timm by the names of its factory, for those whose name torch has not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flashtask.core.errors import UsageError

__all__ = ["timm_optimizer", "timm_optimizer_names"]

_PREFIX = "timm/"
#: What the factory gives optimizers that have a momentum.
_MOMENTUM = 0.9


def timm_optimizer_names() -> list[str]:
    """The names of timm's factory."""
    from timm.optim import list_optimizers  # type: ignore[attr-defined]  # public, but not in an __all__

    return [str(name) for name in list_optimizers()]


def timm_optimizer(name: str) -> Any:
    """What makes an optimizer, with timm's defaults for this name; None if timm has none of it.

    Args:
        name: `lamb`, or `timm/lamb`.

    Raises:
        UsageError: it needs a library or a device that is not there, or second derivatives.
    """
    from timm.optim import get_optimizer_class, get_optimizer_info  # type: ignore[attr-defined]  # as above

    bare = name.lower().removeprefix(_PREFIX)
    if bare not in timm_optimizer_names():
        return None
    info = get_optimizer_info(bare)
    if info.second_order:
        raise UsageError(f"optimizer {name!r} needs second derivatives, which training does not compute")
    try:
        made: Callable[..., Any] = get_optimizer_class(bare)
    except (AssertionError, ImportError) as error:
        raise UsageError(f"optimizer {name!r} cannot be used here", why=str(error), fix='optimizer="adamw"') from None
    return partial(made, momentum=_MOMENTUM) if info.has_momentum else made
