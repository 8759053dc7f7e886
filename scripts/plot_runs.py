"""Draw validation accuracy by epoch of some runs: `python scripts/plot_runs.py OUT.png TITLE RUN [RUN ...]`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(out: str, title: str, *runs: str) -> None:
    """Draw one line a run, with its best epoch marked, and write the picture."""
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=130)
    for run in runs:
        with (Path(run) / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        summary = json.loads((Path(run) / "summary.json").read_text())
        epochs = [int(row["epoch"]) for row in rows]
        accuracies = [100 * float(row["val_accuracy"]) for row in rows]
        best = summary["best"]
        label = f"{summary['strategy']}: best {100 * best['val_accuracy']:.2f} %"
        (line,) = axes.plot(epochs, accuracies, marker="o", markersize=4, label=label)
        axes.plot(
            best["epoch"], 100 * best["val_accuracy"], marker="o", markersize=9, color=line.get_color(), alpha=0.4
        )
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
