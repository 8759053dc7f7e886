"""Pictures of what was measured; matplotlib is imported when the first is drawn."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flashtask.core.errors import OutputError, UsageError, did_you_mean
from flashtask.core.files import PathLike, atomic_write

if TYPE_CHECKING:
    from flashtask.trainer.tuning.learning_rate_curve import LearningRateCurve

__all__ = ["check_picture", "draw_learning_rates"]


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


def draw_learning_rates(curve: LearningRateCurve, path: PathLike) -> None:
    """Losses over learning rates, with the suggestion.

    Raises:
        UsageError: pictures of this kind cannot be written.
        StorageError: the file cannot be written.
    """
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
