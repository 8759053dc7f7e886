"""Heads and strategies on photographs of solar cells: accuracy, seconds and how many parameters train.

The 1,200 ELPV images of `make demo` with its split (960 to train on, 240 to validate on), EfficientNet-Lite0 with its
packaged ImageNet weights, batches of 32. Each case is a whole run from Python with an empty cache, with each of the
seeds in turn; accuracy and loss are those of the best epoch on the validation images. It needs the extra `demo`.

Run: `python benchmarks/heads_and_strategies.py [--only WORD] [--seeds 3] [--output FILE]`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from flashtask import ImageClassificationData, ImageClassifier, Trainer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from lay_out_elpv import lay_out  # noqa: E402 - it stands beside the demo

IMAGES = ROOT / "demo" / "elpv"
NUM_IMAGES = 1200
BACKBONE = "efficientnet_lite0"


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: of the row; `--only` looks for a part of it.
        strategy: of finetuning.
        epochs: at the most.
        model: arguments of the task beside its backbone.
        most_seeds: runs at the most, for what takes long.
    """

    name: str
    strategy: Any = "freeze"
    epochs: int = 5
    model: dict[str, Any] = field(default_factory=dict)
    most_seeds: int = 3


HEADS = [
    Case("head: linear", model={"head": "linear"}),
    Case("head: mlp", model={"head": "mlp"}),
    Case("head: cosine", model={"head": "cosine"}),
    Case("head: prototype", model={"head": "prototype"}),
    Case(
        "head: prototype, euclidean",
        model={"head": "prototype", "head_options": {"distance": "euclidean"}},
        most_seeds=1,
    ),
    Case("head: ridge", model={"head": "ridge"}),
    Case("head: logistic", model={"head": "logistic"}),
]

STRATEGIES = [
    Case(f"strategy: {strategy}", strategy, epochs=3, most_seeds=1)
    for strategy in (
        "no_freeze",
        "freeze_unfreeze:1",
        "lp_ft:1",
        "gradual:1",
        "layer_decay:0.75",
        "bitfit",
        "norm_only",
        "lora:8",
    )
]

CASES = [*HEADS, *STRATEGIES]


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    accuracy: float
    loss: float
    seconds: float
    cpu_seconds: float
    trainable: int
    epochs: int


def run(case: Case, seed: int, folder: Path) -> Outcome:
    """Train the case once, with nothing in the cache."""
    os.environ["FLASHTASK_CACHE"] = str(folder / "cache")
    data = ImageClassificationData.from_root(IMAGES)
    model = ImageClassifier(BACKBONE, **case.model)
    trainer = Trainer(
        output_dir=folder,
        max_epochs=case.epochs,
        seed=seed,
        logger=True,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start, cpu = time.perf_counter(), time.process_time()
    trainer.finetune(model, datamodule=data, strategy=case.strategy)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    history = trainer.fit_run.history
    best = max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    trainable = int(max(row["trainable_parameters"] for row in history))
    return Outcome(best["val_accuracy"], best["val_loss"], seconds, cpu, trainable, len(history))


def row_of(case: Case, outcomes: list[Outcome]) -> str:
    """A line of the table: medians, and the range of accuracies where there are several runs."""
    accuracies = sorted(one.accuracy for one in outcomes)
    spread = f" ({accuracies[0]:.3f} to {accuracies[-1]:.3f})" if len(outcomes) > 1 else ""
    loss, seconds, cpu = (
        statistics.median(getattr(one, name) for one in outcomes) for name in ("loss", "seconds", "cpu_seconds")
    )
    first = outcomes[0]
    cells = [
        case.name,
        str(case.strategy),
        str(first.epochs),
        f"{statistics.median(accuracies):.3f}{spread}",
        f"{loss:.3f}",
        f"{seconds:.1f}",
        f"{cpu:.1f}",
        f"{first.trainable:,}",
        str(len(outcomes)),
    ]
    return f"| {' | '.join(cells)} |"


def table(cases: Iterable[Case], seeds: int) -> Iterable[str]:
    """The lines of the table, as the runs are done."""
    names = ("case", "strategy", "epochs", "validation accuracy", "validation loss", "seconds", "CPU seconds")
    names += ("trainable parameters", "runs")
    yield f"| {' | '.join(names)} |"
    yield f"| {' | '.join('---' for _ in names)} |"
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            outcomes = [
                run(case, seed, Path(folder) / f"{number}-{seed}") for seed in range(min(seeds, case.most_seeds))
            ]
            yield row_of(case, outcomes)


def main() -> None:
    """Run the cases that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case, with the seeds 0, 1, ...")
    parser.add_argument("--output", type=Path, help="a Markdown file to write the table to as well")
    arguments = parser.parse_args()
    lay_out(IMAGES, NUM_IMAGES)
    versions = f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"
    lines = [f"{torch.get_num_threads()} threads on {platform.machine()}, {versions}", ""]
    print(*lines, sep="\n", flush=True)
    for line in table([case for case in CASES if arguments.only in case.name], arguments.seeds):
        print(line, flush=True)
        lines.append(line)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
