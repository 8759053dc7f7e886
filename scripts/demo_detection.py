"""The demo of detection: lay out aerial photographs of trees, fine-tune, measure, draw predictions beside the truth.

Every start is a run of its own in demo/trees-runs/NNN. Made by `make demo-detection`, which fetches the photographs;
after that it needs no network.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lay_out_trees import lay_out
from PIL import Image

import flashtask
from flashtask import ObjectDetectionData, ObjectDetector, Trainer
from flashtask.data.box_drawing import draw_boxes

WHEEL = Path("demo/packages/deepforest-2.1.0-py3-none-any.whl")
IMAGES = Path("demo/trees")
RUNS = Path("demo/trees-runs")
# About four minutes on two cores.
EPOCHS = 18
BACKBONE = "efficientnet_lite0"
# A tile is about 400 pixels wide and high, so nothing is resized by more than a few per cent.
MODEL = {
    "image_size": 416,
    "learning_rate": 2e-3,
    "backbone_learning_rate": 5e-4,
    "head_options": {"width": 64},
}
# Batches of four, because there are 36 tiles.
DATA = {"batch_size": 4, "flip": "both"}
# The first blocks of the backbone keep what they know of photographs.
STRATEGY = [{"train": "head", "epochs": 1}, {"train": ["head", {"layers": 10}]}]


def next_run() -> Path:
    """The first free folder after those that are taken."""
    taken = [int(folder.name) for folder in RUNS.glob("[0-9]*") if folder.name.isdigit()]
    return RUNS / f"{max(taken, default=-1) + 1:03}"


def draw(model: ObjectDetector, data: ObjectDetectionData, folder: Path) -> None:
    """A picture for each tile to validate and test on: the true boxes on the left, the predicted ones on the right."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("val", "test"):
        for path, true in data.true_boxes(part):
            picture = Image.open(path)
            both = Image.new("RGB", (2 * picture.width + 8, picture.height), "white")
            boxes = true["boxes"]
            both.paste(draw_boxes(picture, boxes, true["labels"], [0] * len(boxes)), (0, 0))
            both.paste(model.predict(path).draw(picture), (picture.width + 8, 0))
            both.save(folder / f"{part}_{Path(path).name}")


def main() -> None:
    os.chdir(Path(__file__).resolve().parents[1])
    if not WHEEL.exists():
        sys.exit(f"{WHEEL} is not there: make demo-detection fetches it")
    for part, (tiles, boxes) in lay_out(WHEEL, IMAGES).items():
        print(f"{part}: {tiles} tiles, {boxes} trees")
    data = ObjectDetectionData.from_folders(IMAGES / "train", IMAGES / "val", IMAGES / "test", **DATA)
    flashtask.seed_everything(0)
    model = ObjectDetector(BACKBONE, **MODEL)
    trainer = Trainer(max_epochs=EPOCHS, output_dir=next_run())
    trainer.finetune(model, datamodule=data, strategy=STRATEGY)
    for stage in ("validate", "test"):
        (found,) = getattr(trainer, stage)(model, datamodule=data, verbose=False)
        name = {"validate": "val", "test": "test"}[stage]
        what = {"val": "another photograph of this forest", "test": "two other forests"}[name]
        numbers = ", ".join(
            f"{title} {found[f'{name}_{key}']:.3f}" for title, key in (("AP", "map"), ("AP50", "map_50"))
        )
        print(f"{what}: {numbers}, F1 {found[f'{name}_f1']:.3f}")
    draw(model, data, trainer.output_dir / "pictures")
    print(f"truth (left) and predictions (right): {trainer.output_dir / 'pictures'}")


if __name__ == "__main__":
    main()
