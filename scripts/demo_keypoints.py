"""The demo of keypoints: the middle and the four extreme points of nuclei under a microscope, from the command line.

The keypoints are derived exactly from label images (see lay_out_nuclei.py), nobody has drawn them. Made by
`make demo-keypoints`; it needs no network once the wheel with the data is there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import demo
import numpy as np
from lay_out_nuclei import HEIGHT, NUM_TIMES, WIDTH, bytes_of, pages, wheel
from PIL import Image

DATA = Path("demo/nucleus_points")
EPOCHS = 15
NAMES = ("middle", "left", "right", "top", "bottom")
SKELETON = [[1, 2], [1, 3], [1, 4], [1, 5]]


def points_of(mask: np.ndarray) -> list[float]:
    """x, y, visibility of the middle of all pixels (H, W) and of the outermost ones, 0 at the picture's edges."""
    rows, columns = mask.nonzero()
    left, right, top, bottom = columns.min(), columns.max(), rows.min(), rows.max()
    places = [
        (columns.mean() + 0.5, rows.mean() + 0.5),
        (left, rows[columns == left].mean() + 0.5),
        (right + 1, rows[columns == right].mean() + 0.5),
        (columns[rows == top].mean() + 0.5, top),
        (columns[rows == bottom].mean() + 0.5, bottom + 1),
    ]
    return [float(number) for x, y in places for number in (x, y, 2)]


def lay_out(folder: Path) -> int:
    """Write images and COCO's `annotations.json` to `folder/train` and `folder/val`; nuclei at an edge are crowds.

    Returns:
        How many nuclei are not at an edge.
    """
    stain, light, nuclei, _ = pages(wheel(folder))[:, :, :HEIGHT]
    parts = {"train": slice(0, WIDTH), "val": slice(-WIDTH, None)}
    channels = [bytes_of(light, parts["train"]), bytes_of(light, parts["train"]), bytes_of(stain, parts["train"])]
    pictures = np.stack(channels, axis=-1)
    whole = 0
    for part, columns in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for time in range(NUM_TIMES):
            name = f"{time}.png"
            Image.fromarray(pictures[time, :, columns]).save(folder / part / name)
            images.append({"id": time, "file_name": name, "width": WIDTH, "height": HEIGHT})
            labels = nuclei[time, :, columns]
            at_edge = {*labels[0].tolist(), *labels[-1].tolist(), *labels[:, 0].tolist(), *labels[:, -1].tolist()}
            for number in np.unique(labels[labels > 0]).tolist():
                points = points_of(labels == number)
                left, right, top, bottom = points[3], points[6], points[10], points[13]
                made = {"id": len(objects) + 1, "image_id": time, "category_id": 1, "iscrowd": int(number in at_edge)}
                made |= {"bbox": [left, top, right - left, bottom - top], "area": float((labels == number).sum())}
                whole += number not in at_edge
                objects.append({**made, "keypoints": points, "num_keypoints": len(NAMES)})
        category = {"id": 1, "name": "nucleus", "keypoints": NAMES, "skeleton": SKELETON}
        content = {"images": images, "annotations": objects, "categories": [category]}
        (folder / part / "annotations.json").write_text(json.dumps(content))
    return whole


def beside_each_other(run: Path, output: Path) -> None:
    """Pictures of three images with their true keypoints and the predicted ones."""
    from flashtask import KeypointDetectionData, load
    from flashtask.data.keypoint_drawing import draw_keypoints

    model, data = load(run), KeypointDetectionData.from_folders(val_folder=DATA / "val")
    skeleton = [(one - 1, two - 1) for one, two in SKELETON]
    true = dict(data.true_keypoints("val"))
    rows = []
    for name in ("0.png", "4.png", "9.png"):
        image = Image.open(DATA / "val" / name)
        large = image.resize((3 * image.width, 3 * image.height))
        own = true[str((DATA / "val" / name).resolve())]
        found = model.predict(str(DATA / "val" / name))
        shown = [
            draw_keypoints(
                large, 3 * np.array(boxes).reshape(-1, 4), scaled(points), [""] * len(boxes), classes, skeleton
            )
            for boxes, points, classes in (
                (own["boxes"], own["keypoints"], [-1 if one else 1 for one in own["crowds"]]),
                (found.boxes, found.keypoints, [1] * len(found.boxes)),
            )
        ]
        rows.append(np.concatenate([np.array(one) for one in shown], axis=1))
    Image.fromarray(np.concatenate(rows)).save(output)


def scaled(points: Any) -> Any:
    """Keypoints (n, 5, 3) in a picture that is three times as large."""
    return np.array(points).reshape(-1, len(NAMES), 3) * (3, 3, 1)


def main() -> None:
    """Fine-tune, print the metrics, draw predictions."""
    os.chdir(Path(__file__).resolve().parents[1])
    DATA.mkdir(parents=True, exist_ok=True)
    print(f"{lay_out(DATA)} whole nuclei in {DATA}: the left of a time series to train on, the right to validate")
    run = demo.next_run()
    model = ["--task", "keypoint_detection", "--backbone", "efficientnet_lite0"]
    images = ["--image-size", "208x272", "--augment", "light", "--batch-size", 5]
    # The outermost point of a round shape is not as exactly placed as its middle.
    images += ["--set", "model.sigmas=[0.05, 0.1, 0.1, 0.1, 0.1]"]
    training = ["--strategy", "no_freeze", "--epochs", EPOCHS, "--lr", 3e-3]
    training += ["--set", "trainer.check_val_every_n_epoch=5", "--set", "model.head_options.width=64"]
    demo.flashtask("finetune", DATA, *model, *images, *training, "--output-dir", run)
    written = ["--output", run / "found.json", "--draw", run / "drawn"]
    demo.flashtask("predict", run, DATA / "val", "--format", "coco", *written)
    best = json.loads((run / "summary.json").read_text())["best"]
    beside_each_other(run, run / "beside.png")
    named = {name: best[f"val_{name}"] for name in ("map", "map_50", "pck", "f1", "box_map")}
    print("\n" + ", ".join(f"{name} {value:.3f}" for name, value in named.items()))
    print(f"truth and prediction beside each other: {run / 'beside.png'}")


if __name__ == "__main__":
    sys.exit(main())
