"""The demo of segmentation: cells and nuclei under a microscope, from the command line, with pictures of what came out.

Made by `make demo-segmentation`; it needs no network once the wheel with the data is there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import demo
import numpy as np
from lay_out_nuclei import NAMES, lay_out
from PIL import Image

DATA = Path("demo/nuclei")
EPOCHS = 40


def masks_of(folder: Path) -> dict[str, np.ndarray]:
    """Class numbers by name."""
    return {file.name: np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def mean_iou(predicted: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """The mean over classes, over the pixels of all masks."""
    own, true = (np.concatenate([one.ravel() for one in masks]) for masks in (predicted, truth))
    each = [((own == k) & (true == k)).sum() / ((own == k) | (true == k)).sum() for k in range(len(NAMES))]
    return float(np.mean(each))


def beside_each_other(run: Path, output: Path) -> None:
    """Pictures of three images, their true masks and the predicted ones."""
    from flashtask import load
    from flashtask.data.masks import overlay
    from flashtask.data.semantic_segmentation import MaskReader

    reader = MaskReader.from_dict(load(run).target_description)
    rows = []
    for name in ("0.png", "4.png", "9.png"):
        image = Image.open(DATA / "val" / "images" / name)
        masks = [reader.class_map(str(folder / name)) for folder in (DATA / "val" / "masks", run / "masks")]
        shown = [image, *(overlay(image, mask, reader.labels, reader.colours, has_legend=False) for mask in masks)]
        rows.append(np.concatenate([np.array(one.convert("RGB")) for one in shown], axis=1))
    made = Image.fromarray(np.concatenate(rows))
    made.resize((2 * made.width, 2 * made.height), Image.Resampling.NEAREST).save(output)


def main() -> None:
    os.chdir(Path(__file__).resolve().parents[1])
    DATA.mkdir(parents=True, exist_ok=True)
    print(f"{lay_out(DATA)} images in {DATA}: the left of a time series to train on, the right to validate")
    run = demo.next_run()
    model = ["--task", "semantic_segmentation", "--backbone", "efficientnet_lite0", "--head", "fpn"]
    images = ["--image-size", "208x272", "--augment", "medium", "--flip", "both", "--batch-size", 5]
    training = ["--strategy", "no_freeze", "--epochs", EPOCHS, "--lr", 2e-3]
    demo.flashtask("finetune", DATA, *model, *images, *training, "--output-dir", run)
    written = ["--output", run / "masks", "--draw", run / "drawn"]
    demo.flashtask("predict", run, DATA / "val" / "images", "--format", "png", *written)
    truth = masks_of(DATA / "val" / "masks")
    found = mean_iou(list(masks_of(run / "masks").values()), list(truth.values()))
    constant = mean_iou([np.zeros_like(mask) for mask in truth.values()], list(truth.values()))
    best = json.loads((run / "summary.json").read_text())["best"]
    beside_each_other(run, run / "beside.png")
    print(f"\nmean IoU: {found:.4f} counted from the masks that were written, {best['val_miou']:.4f} in the run")
    print(f"mean IoU of `background` everywhere: {constant:.4f}")
    print(f"image, truth and prediction beside each other: {run / 'beside.png'}")


if __name__ == "__main__":
    sys.exit(main())
