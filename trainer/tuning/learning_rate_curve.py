"""What a learning-rate range test saw, and which rate follows from it: no torch."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from flashtask.core.errors import OutputError, UsageError, did_you_mean
from flashtask.core.files import PathLike, atomic_write

__all__ = ["LearningRateCurve", "beginning_of", "check_picture", "falls_clearly", "smoothed", "steepest"]

#: How many times its own uncertainty the smoothed loss must fall to be more than noise: with losses that only vary it
#: does so in about one sweep of ten.
_CLEAR = 5.0


@dataclass(frozen=True)
class LearningRateCurve:
    """What a range test saw: one loss for each rate, and the rate that it suggests.

    Args:
        rates: of the steps, in their order.
        losses: before each step; of an accumulation group, the mean over its samples.
        smoothed: exponential means of the losses, corrected for their start.
        suggestion: the rate at which the smoothed loss falls most steeply from one step to the next.
        is_clear: whether the loss fell by more than the noise of the batches explains.
        ended_by: why the sweep ended; empty if it went through all rates.
        mode: `exponential` or `linear`, as in `RangeTest`.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float
    is_clear: bool = True
    ended_by: str = ""
    mode: str = "exponential"

    def __str__(self) -> str:
        doubt = "" if self.is_clear else " (unclear: it varies much)"
        return f"learning rate {self.suggestion:.3g}: the loss fell fastest there{doubt}"

    def plot(self, path: PathLike) -> None:
        """Write a picture of the curve: PNG, PDF, SVG, ... by the ending of the file's name.

        Raises:
            UsageError: pictures of this kind cannot be written.
            StorageError: the file cannot be written.
        """
        _draw(self, path)


def smoothed(losses: Sequence[float], smoothing: float) -> list[float]:
    """Exponential means of the losses so far, corrected for starting at zero.

    Args:
        losses: one a step.
        smoothing: the weight of the past, from 0 to below 1.
    """
    mean, found = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = smoothing * mean + (1 - smoothing) * loss
        found.append(mean / (1 - smoothing**step))
    return found


def beginning_of(steps: int, smoothing: float) -> int:
    """The first step to look at: the smoothed losses before it are means of few."""
    return max(1, min(math.ceil(1 / (1 - smoothing)), steps // 4))


def steepest(means: Sequence[float], begin: int = 1) -> int | None:
    """The step at which the smoothed loss falls most, by half the difference between the steps around it.

    It is looked for in the last descent, from where a tenth of the whole fall is behind for good to the lowest point:
    before it the loss only varies from batch to batch, and what falls behind the lowest point has risen before.

    Args:
        means: smoothed losses, one a step.
        begin: the first step to look at, at least 1.

    Returns:
        The number of the step, or None if the loss falls nowhere.
    """
    lowest = _lowest(means, begin)
    first = means[begin : begin + max(1, (lowest - begin) // 4)]
    level = sum(first) / len(first) if first else 0.0
    behind = level - (level - means[lowest]) / 10 if first else 0.0
    start = max((step for step in range(begin, lowest) if means[step] >= behind), default=begin)
    inner = range(start, min(lowest + 1, len(means) - 1))
    falls = {step: (means[step - 1] - means[step + 1]) / 2 for step in inner}
    best = max(falls, key=lambda step: falls[step], default=None)
    # A constant loss "falls" by what its mean is rounded by.
    return best if best is not None and falls[best] > 1e-9 * abs(means[best]) else None


def falls_clearly(losses: Sequence[float], smoothing: float) -> bool:
    """Whether the smoothed loss falls further than losses that only vary would make it wander.

    Args:
        losses: at least two, one a step.
        smoothing: the weight of the past.
    """
    means, begin = smoothed(losses, smoothing), beginning_of(len(losses), smoothing)
    lowest = _lowest(means, begin)
    fall = max(means[begin : lowest + 1]) - means[lowest]
    # From one step to the next the loss hardly changes but by noise.
    changes = [(b - a) ** 2 for a, b in pairwise(losses)]
    noise = math.sqrt(sum(changes) / len(changes) / 2)
    return fall >= _CLEAR * noise * math.sqrt((1 - smoothing) / (1 + smoothing))


def _lowest(means: Sequence[float], begin: int) -> int:
    return min(range(begin, len(means)), key=lambda step: means[step], default=0)


# ---- the picture; matplotlib is imported when it is drawn


def check_picture(path: PathLike) -> str:
    """The kind of picture that the ending of a file's name means: `png`, `pdf`, `svg`, ...

    Raises:
        UsageError: there is no ending, or pictures of this kind cannot be written.
        OutputError: there is no folder to write it to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kind = Path(path).suffix.lstrip(".").lower()
    known = FigureCanvasAgg.get_supported_filetypes()
    if kind not in known:
        raise UsageError(
            f"cannot write {os.fspath(path)!r}: pictures end in {', '.join(sorted(known))}",
            fix=did_you_mean(kind, known) or f"{Path(path).with_suffix('.png').name}",
        )
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {os.fspath(path)!r}: there is no such folder", fix=f"mkdir -p {folder}")
    return kind


def _draw(curve: LearningRateCurve, path: PathLike) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = check_picture(path)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(curve.rates, curve.losses, linewidth=0.8, alpha=0.5, label="loss")
    axes.plot(curve.rates, curve.smoothed, linewidth=2, label="smoothed")
    axes.axvline(curve.suggestion, linestyle="--", color="black", label=f"{curve.suggestion:.3g}")
    axes.set(xlabel="learning rate", ylabel="training loss", xscale="log" if curve.mode == "exponential" else "linear")
    # The last steps may be far above all others, which would then be a flat line.
    lowest = min(range(len(curve.smoothed)), key=lambda step: curve.smoothed[step])
    least, most = min(curve.smoothed), max(curve.smoothed[: lowest + 1])
    margin = (most - least) or abs(most) or 1.0
    axes.set_ylim(least - 0.3 * margin, most + margin)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=120)
    with atomic_write(path, size=content.tell()) as file:
        file.write(content.getvalue())
