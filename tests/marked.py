"""The pictures of squares.py with keypoints: the middle of each object, and its lower corners at the left and right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import squares

#: The names say that the corners change sides in a mirror.
NAMES = ("middle", "left_corner", "right_corner")


def points_of(box: Any) -> list[float]:
    """x, y, visibility of the keypoints of an object (left, top, right, bottom)."""
    left, top, right, bottom = box
    return [(left + right) / 2, (top + bottom) / 2, 2, left, bottom, 2, right, bottom, 1]


def coco(folder: Path, count: int = 24, seed: int = 0, names: Any = NAMES, **options: Any) -> Path:
    """A folder of pictures with COCO's file."""
    squares.coco(folder, count, seed, **options)
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    for one in content["annotations"]:
        left, top, width, height = one["bbox"]
        one["keypoints"] = points_of((left, top, left + width, top + height))
        one["num_keypoints"] = 3
    for one in content["categories"]:
        one |= {"keypoints": list(names), "skeleton": [[1, 2], [1, 3]]}
    file.write_text(json.dumps(content))
    return folder


def yolo(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """A data set of YOLO with train and val; gives its `data.yaml`."""
    file = squares.yolo(folder, count, seed)
    for part, own in (("train", seed), ("val", seed + 1)):
        for number, (picture, objects) in enumerate(squares.draw(count, own)):
            labels = folder / part / "labels" / f"{number:03}.txt"
            if not objects:
                continue
            lines = labels.read_text().splitlines()
            for place, (_, *box) in enumerate(objects):
                values = points_of(box)
                for start in range(0, 9, 3):
                    x, y, seen = values[start : start + 3]
                    lines[place] += f" {x / picture.width} {y / picture.height} {seen}"
            labels.write_text("\n".join(lines) + "\n")
    with file.open("a") as text:
        text.write(f"kpt_shape: [3, 3]\nflip_idx: [0, 2, 1]\nkpt_names: {{0: {list(NAMES)}}}\n")
    return file
