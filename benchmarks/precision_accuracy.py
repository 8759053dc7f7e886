"""What `auto` costs in accuracy: its number and memory format against float32, on photographs of solar cells.

All 2,624 ELPV images, a fifth of them to validate on, chosen anew with each seed; EfficientNet-Lite0 with its packaged
ImageNet weights, batches of 32, no augmentation. Both settings have the same seed, split and order of samples. It needs
the extra `demo`.

Run: `python benchmarks/precision_accuracy.py [--seeds 5] [--only frozen|full] [--output FILE]`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from flashtask import ImageClassificationData, ImageClassifier, Trainer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from lay_out_elpv import lay_out  # noqa: E402 - it stands beside the demo

IMAGES = ROOT / "demo" / "elpv-all"
#: work -> (strategy, epochs, learning rate)
WORKS = {"frozen": ("freeze", 10, 3e-3), "full": ("no_freeze", 1, 1e-3)}
#: name -> what the trainer is given
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "32", "memory_format": "contiguous"},
    "auto": {"precision": "auto", "memory_format": "auto"},
}


def main(given: list[str] | None = None) -> int:
    """Run both settings in turn with each seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=list(WORKS))
    parser.add_argument("--images", type=int, default=2624, help="of the data set")
    parser.add_argument("--output", type=Path, help="Markdown")
    options = parser.parse_args(given)
    lay_out(IMAGES, options.images)
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    ]
    for work in [options.only] if options.only else WORKS:
        lines += ["", f"## {work}", "", *_table(work, options.seeds)]
    text = "\n".join(lines) + "\n"
    if options.output:
        options.output.write_text(text)
    return 0


def _table(work: str, seeds: int) -> list[str]:
    strategy, epochs, rate = WORKS[work]
    lines = [f"{strategy}, {epochs} epochs, rate {rate:g}; accuracy of the last epoch in %", ""]
    lines += [
        "| seed | float32 | auto | difference | seconds: float32 | auto |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    print(*lines[-2:], sep="\n", flush=True)
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for seed in range(seeds):
        seconds = {}
        for name in SETTINGS:
            accuracy, seconds[name] = _run(work, seed, SETTINGS[name])
            found[name].append(100 * accuracy)
        one, other = (found[name][-1] for name in SETTINGS)
        lines.append(
            f"| {seed} | {one:.2f} | {other:.2f} | {other - one:+.2f} | "
            + " | ".join(f"{s:.1f}" for s in seconds.values())
            + " |"
        )
        print(lines[-1], flush=True)
    one, other = (statistics.mean(values) for values in found.values())
    lines.append(f"| mean | {one:.2f} | {other:.2f} | {other - one:+.2f} | | |")
    print(lines[-1], flush=True)
    return lines


def _run(work: str, seed: int, setting: dict[str, Any]) -> tuple[float, float]:
    strategy, epochs, rate = WORKS[work]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FLASHTASK_CACHE"] = cache
        start = time.perf_counter()
        data = ImageClassificationData.from_folders(IMAGES, val_split=0.2, split_seed=seed, augment="none")
        model = ImageClassifier("efficientnet_lite0", learning_rate=rate)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(max_epochs=epochs, seed=seed, **quiet, **setting)
        trainer.finetune(model, datamodule=data, strategy=strategy, restore_best=False)
        return float(trainer.callback_metrics["val_accuracy"]), time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
