"""What switches for imbalanced classes and augmentation do on ELPV: metrics of the best epoch over three splits.

    python benchmarks/switches.py FOLDER [--augment]

FOLDER gets the photographs (scripts/lay_out_elpv.py). The head of EfficientNet-Lite0 is trained for 10 epochs, with
split and seed 0, 1 and 2. Features are computed once for each split. With `--augment`, augmentations are compared
instead: the whole network is trained for 4 epochs at 64 pixels, on 20 % of the photographs, and measured on the others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashtask import ImageClassificationData, ImageClassifier, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from lay_out_elpv import lay_out

BACKBONE, SEEDS = "efficientnet_lite0", (0, 1, 2)
METRICS = ("accuracy", "recall_macro", "f1_macro")

Options = dict[str, Any]
#: Name -> arguments of the model and of the data.
IMBALANCE: dict[str, tuple[Options, Options]] = {
    "none": ({}, {}),
    "class_weights=balanced": ({"class_weights": "balanced"}, {}),
    "class_weights=effective_number": ({"class_weights": "effective_number"}, {}),
    "sampler=balanced": ({}, {"sampler": "balanced"}),
    "loss_fn=focal": ({"loss_fn": "focal"}, {}),
    "label_smoothing=0.1": ({"label_smoothing": 0.1}, {}),
}
AUGMENT: dict[str, tuple[Options, Options]] = {
    f"augment={name}": ({"image_size": 64}, {"augment": name, "val_split": 0.8})
    for name in ("none", "light", "medium", "strong", "trivial_augment")
}


def measured(folder: Path, model: Options, data: Options, strategy: str, epochs: int) -> Iterator[dict[str, float]]:
    """The metrics of the best epoch for each seed; with the whole network of the last epoch, which alone validates."""
    for seed in SEEDS:
        given = ImageClassificationData.from_folders(folder, split_seed=seed, **{"val_split": 0.2, **data})
        task = ImageClassifier(BACKBONE, metrics=["f1_macro", "recall_macro"], **model)
        every = 1 if strategy == "freeze" else epochs
        options: Options = {"logger": False, "enable_progress_bar": False, "check_val_every_n_epoch": every}
        result = Trainer(max_epochs=epochs, seed=seed, **options).finetune(task, datamodule=given, strategy=strategy)
        yield {name: 100 * float(result.metrics[f"val_{name}"]) for name in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--augment", action="store_true", help="compare augmentations")
    given = parser.parse_args()
    if not given.folder.exists():
        lay_out(given.folder)
    print(f"| switch | {' | '.join(METRICS)} |\n| --- | --- | --- | --- |")
    for name, (model, data) in (AUGMENT if given.augment else IMBALANCE).items():
        found = list(measured(given.folder, model, data, *(("no_freeze", 4) if given.augment else ("freeze", 10))))
        cells = [[one[metric] for one in found] for metric in METRICS]
        shown = [f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" for values in cells]
        print(f"| `{name}` | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
