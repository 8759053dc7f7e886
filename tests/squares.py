"""Pictures with drawn squares and discs, and their boxes in each of the formats that detectors are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

#: Not dense, as COCO's own ids are not.
CATEGORIES = {"disc": 7, "square": 3}


def draw(count: int, seed: int = 0, size: tuple[int, int] = (96, 80), most: int = 3) -> list[tuple[Image.Image, list]]:
    """Pictures, each with a list of (label, left, top, right, bottom); every eighth has no object."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        pixels = generator.integers(20, 60, (size[1], size[0], 3)).astype(np.uint8)
        picture, objects = Image.fromarray(pixels), []
        pen = ImageDraw.Draw(picture)
        for _ in range(0 if number % 8 == 7 else int(generator.integers(1, most + 1))):
            side = int(generator.integers(16, 30))
            left, top = (int(generator.integers(0, whole - side + 1)) for whole in size)
            box = (left, top, left + side, top + side)
            if any(_overlap(box, other[1:]) for other in objects):
                continue
            label = ("disc", "square")[int(generator.integers(2))]
            shape = pen.ellipse if label == "disc" else pen.rectangle
            shape(
                (left, top, left + side - 1, top + side - 1), fill=(230, 60, 50) if label == "disc" else (60, 90, 240)
            )
            objects.append((label, *box))
        found.append((picture, objects))
    return found


def masks(objects: list, size: tuple[int, int] = (96, 80)) -> list[np.ndarray]:
    """The pixels (H, W) of each object, as `draw` has drawn them."""
    found = []
    for label, left, top, right, bottom in objects:
        own = Image.new("1", size)
        pen = ImageDraw.Draw(own)
        (pen.ellipse if label == "disc" else pen.rectangle)((left, top, right - 1, bottom - 1), fill=1)
        found.append(np.array(own))
    return found


def runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths of a mask, by its own program."""
    from pycocotools.mask import encode

    found = encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def label_images(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """A folder with `images`, and `masks` in which each object of an image has a number; the classes are not there."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (picture, objects) in enumerate(draw(count, seed)):
        picture.save(folder / "images" / f"{number:03}.png")
        values = np.zeros(picture.size[::-1], dtype=np.uint16)
        for place, mask in enumerate(masks(objects), 1):
            values[mask] = 300 * place  # any numbers
        Image.fromarray(values).save(folder / "masks" / f"{number:03}.png")
    return folder


def _overlap(one: Any, two: Any) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def coco(
    folder: Path,
    count: int = 24,
    seed: int = 0,
    name: str = "annotations.json",
    *,
    has_masks: bool = False,
    **options: Any,
) -> Path:
    """A folder of pictures with COCO's file."""
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number, (picture, objects) in enumerate(draw(count, seed, **options)):
        picture.save(folder / f"{number:03}.png")
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": 100 + number, "file_name": f"{number:03}.png", **size})
        shapes = masks(objects, picture.size) if has_masks else [None] * len(objects)
        for (label, left, top, right, bottom), mask in zip(objects, shapes, strict=True):
            bbox = [left, top, right - left, bottom - top]
            more = {} if mask is None else {"segmentation": runs(mask), "area": int(mask.sum())}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + number,
                    "category_id": CATEGORIES[label],
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": 0,
                    **more,
                }
            )
    categories = [{"id": number, "name": label} for label, number in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / name).write_text(json.dumps(content))
    return folder


def voc(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """A folder of Pascal VOC."""
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for number, (picture, objects) in enumerate(draw(count, seed)):
        picture.save(folder / "JPEGImages" / f"{number:03}.png")
        boxes = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
            "</bndbox></object>"
            for label, a, b, c, d in objects
        )
        size = f"<size><width>{picture.width}</width><height>{picture.height}</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{number:03}.xml").write_text(
            f"<annotation><filename>{number:03}.png</filename>{size}{boxes}</annotation>"
        )
    return folder


def yolo(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """A data set of YOLO with train and val; gives its `data.yaml`."""
    names = sorted(CATEGORIES)
    for part, own in (("train", seed), ("val", seed + 1)):
        for name in ("images", "labels"):
            (folder / part / name).mkdir(parents=True)
        for number, (picture, objects) in enumerate(draw(count, own)):
            picture.save(folder / part / "images" / f"{number:03}.png")
            width, height = picture.size
            lines = [
                f"{names.index(label)} {(a + c) / 2 / width} {(b + d) / 2 / height} "
                f"{(c - a) / width} {(d - b) / height}"
                for label, a, b, c, d in objects
            ]
            if lines:
                (folder / part / "labels" / f"{number:03}.txt").write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text(f"train: ../train/images\nval: ../val/images\nnc: 2\nnames: {names}\n")
    return folder / "data.yaml"


def table(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """A table with a row a box."""
    folder.mkdir(parents=True)
    lines = ["image_path,xmin,ymin,xmax,ymax,label"]
    for number, (picture, objects) in enumerate(draw(count, seed)):
        picture.save(folder / f"{number:03}.png")
        lines += [f"{number:03}.png,{a},{b},{c},{d},{label}" for label, a, b, c, d in objects]
        lines += [] if objects else [f"{number:03}.png,,,,,"]
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    return folder / "boxes.csv"
