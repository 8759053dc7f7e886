"""The demo of instance segmentation: nuclei under a microscope, with pictures of what came out.

Made by `make demo-instances`; it needs no network once the wheel with the data is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import demo
import numpy as np
from lay_out_nuclei import lay_out_instances
from PIL import Image

from flashtask import InstanceSegmentation, InstanceSegmentationData, Trainer, seed_everything
from flashtask.data.instance_drawing import draw_instances
from flashtask.data.masks import read_mask
from flashtask.data.shapes import numbered_objects, shape_block, shape_text

PACKAGES, DATA = Path("demo/nuclei"), Path("demo/nuclei-instances")
EPOCHS = 24
#: A nucleus is about 12 pixels wide, so places are 4 pixels apart; pictures are drawn larger.
STRIDE, ENLARGED = 4, 3


def draw(image: Image.Image, numbers: np.ndarray) -> Image.Image:
    """A picture with the objects of a label image."""
    larger = image.resize((ENLARGED * image.width, ENLARGED * image.height), Image.Resampling.NEAREST)
    found = list(numbered_objects(numbers.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)))
    blocks = [shape_block(shape_text(one.shape), larger.size) for one in found]
    return draw_instances(larger, blocks, [one.box for one in found], ["nucleus"] * len(found))


def beside_each_other(model: InstanceSegmentation, output: Path) -> None:
    """Three pictures, with the true nuclei on the left and the predicted ones on the right."""
    rows = []
    for time in (0, 4, 9):
        path = DATA / "val" / "images" / f"{time}.png"
        true, _, _ = read_mask(str(DATA / "val" / "masks" / "nucleus" / path.name))
        shown = [draw(Image.open(path), one) for one in (true, np.array(model.predict(path).as_image()))]
        rows.append(np.concatenate([np.array(one) for one in shown], axis=1))
    Image.fromarray(np.concatenate(rows)).save(output)


def main() -> None:
    """Fine-tune, print the metrics, draw predictions."""
    os.chdir(Path(__file__).resolve().parents[1])
    PACKAGES.mkdir(parents=True, exist_ok=True)
    print(
        f"{lay_out_instances(DATA, PACKAGES)} images in {DATA}: the left of a time series trains, the right validates"
    )
    data = InstanceSegmentationData.from_folders(
        DATA / "train", DATA / "val", batch_size=2, augment="medium", flip="both"
    )
    seed_everything(0)
    model = InstanceSegmentation(
        "efficientnet_lite0",
        image_size=(208, 272),
        learning_rate=2e-3,
        backbone_learning_rate=2e-3,
        head_options={"width": 64, "least_stride": STRIDE},
    )
    trainer = Trainer(max_epochs=EPOCHS, output_dir=demo.next_run(), check_val_every_n_epoch=EPOCHS // 4)
    trainer.finetune(model, datamodule=data)
    (found,) = trainer.validate(model, datamodule=data, verbose=False)
    named = {"AP": "map", "AP50": "map_50", "AP of boxes": "box_map", "F1": "f1"}
    print("the right of the series: " + ", ".join(f"{name} {found[f'val_{key}']:.3f}" for name, key in named.items()))
    beside_each_other(model, trainer.output_dir / "beside.png")
    print(f"truth (left) and prediction (right): {trainer.output_dir / 'beside.png'}")


if __name__ == "__main__":
    sys.exit(main())
