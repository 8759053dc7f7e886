"""Learning rates on their way to the constant ones that weights are averaged at: pure functions of the epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flashtask.core.checks import is_number, is_whole
from flashtask.core.errors import UnknownNameError, UsageError

__all__ = ["annealed", "check_annealing", "constant_rates", "set_rate"]

_CURVES: dict[str, Callable[[float], float]] = {
    "cos": lambda share: (1 - math.cos(math.pi * share)) / 2,
    "linear": lambda share: share,
}


def check_annealing(rates: Any, epochs: Any, strategy: Any) -> None:
    """Refuse rates, a length or a curve that cannot be meant.

    Raises:
        UsageError: rates that are not above 0, or a length that is no whole number of at least 0.
        UnknownNameError: another curve.
    """
    given = [] if rates is None else rates if isinstance(rates, (list, tuple)) else [rates]
    is_empty = rates is not None and not given
    if is_empty or not all(is_number(r) and r > 0 for r in given):
        raise UsageError(f"swa_lrs={rates!r}: learning rates above 0 are needed", fix="swa_lrs=0.01")
    if not is_whole(epochs, 0):
        raise UsageError(
            f"annealing_epochs={epochs!r}: a whole number of at least 0 is needed", fix="annealing_epochs=10"
        )
    if strategy not in _CURVES:
        raise UnknownNameError("annealing strategy", str(strategy), _CURVES)


def annealed(rate: float, target: float, epoch: int, epochs: int, strategy: str) -> float:
    """The rate of an epoch on the way from one rate to another, as `torch.optim.swa_utils.SWALR` has it.

    Args:
        rate: of epoch 0.
        target: of all epochs from number `epochs` on.
        epoch: counted from the beginning of the way.
        epochs: length of the way.
        strategy: `cos` or `linear`.
    """
    weight = _CURVES[strategy](min(1.0, epoch / epochs) if epochs else 1.0)
    return target * weight + rate * (1 - weight)


def constant_rates(groups: list[dict[str, Any]], given: float | Sequence[float] | None) -> list[float]:
    """The rates that parameter groups are to have: those given, or half of what their optimizer was made with.

    Raises:
        UsageError: another number of rates than of groups.
    """
    if given is None:
        return [0.5 * float(group.get("initial_lr", group["lr"])) for group in groups]
    if not isinstance(given, Sequence):
        return [float(given)] * len(groups)
    # Two groups of one name are one to the user: the second holds what weight decay spares.
    names = [group.get("name", number) for number, group in enumerate(groups)]
    own = list(dict.fromkeys(names))
    if len(given) != len(own):
        raise UsageError(
            f"swa_lrs has {len(given)} learning rates, and the optimizers have {len(own)} parameter groups",
            fix="one rate for each group in their order, or swa_lrs=0.01 for all",
        )
    return [float(given[own.index(name)]) for name in names]


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the rate of a parameter group, in place where it is a tensor that compiled steps read."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
