"""Optimizers of timm by the names of its factory, for those whose name torch has not."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flashtask.core.errors import UnknownNameError, UsageError

__all__ = ["refuse_unknown", "timm_optimizer", "timm_optimizer_names"]

_PREFIX = "timm/"
#: What the factory gives optimizers that have a momentum.
_MOMENTUM = 0.9


def refuse_unknown(name: str) -> None:
    """Refuse a name that the sources of torch and timm do not hold; neither is imported, which takes seconds.

    Raises:
        UnknownNameError: with the nearest names.
    """
    of_torch = _in_source("torch", "optim/__init__.py", r"^from torch\.optim\.\w+ import (\w+) as \1$")
    of_timm = _in_source("timm", "optim/_optim_factory.py", r"^ +name='([\w-]+)',$")
    quoted = _in_source("timm", "optim/_optim_factory.py", r"'([\w-]+)'")  # a few names are in loops
    if not of_torch or not of_timm or name.lower().removeprefix(_PREFIX) in {*of_torch, *quoted}:
        return  # sources in another form say nothing; whoever makes the optimizer checks its name again
    raise UnknownNameError("optimizer", name, [*sorted(of_torch - {"optimizer"}), *sorted(of_timm - of_torch)])


def _in_source(library: str, file: str, pattern: str) -> set[str]:
    found = importlib.util.find_spec(library)
    path = Path(found.origin).parent / file if found is not None and found.origin else None
    if path is None or not path.is_file():
        return set()
    return {name.lower() for name in re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)}


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
