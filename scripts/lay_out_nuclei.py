"""Lay out a microscopy time series as images and masks: `background`, `cell` and `nucleus`.

The series is in the wheel of the pip package `ndev-sampledata` 0.0.3 (BSD-3-Clause, Tim Monko): a scratch assay at ten
times, with 730 nuclei and 828 cells as label images; a few cells have no label. The wheel is downloaded without what it
depends on, and read as an archive. Images of a time series are much alike, so they are split by area: the left of each
picture trains, the right validates, with a gap between the two.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

VERSION, SHA256 = "0.0.3", "e9e30806bd154c3919cc1744e01124ad978fa974f72ddf5f7f0a0bd74d840355"
SERIES = "ndev_sampledata/samples/scratch-assay-labeled-10T-2Ch.tiff"
NAMES = ("background", "cell", "nucleus")
COLOURS = ((0, 0, 0), (0, 158, 115), (230, 159, 0))
HEIGHT, WIDTH, NUM_TIMES = 208, 272, 10
PARTS = {"train": slice(0, WIDTH), "val": slice(-WIDTH, None)}


def wheel(folder: Path) -> Path:
    """The package's wheel in a folder, downloaded if it is not there."""
    file = folder / f"ndev_sampledata-{VERSION}-py3-none-any.whl"
    if not file.is_file():
        words = ["download", "--quiet", "--no-deps", "--dest", str(folder), f"ndev-sampledata=={VERSION}"]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{file} is not the wheel of ndev-sampledata {VERSION}")
    return file


def pages(file: Path) -> np.ndarray:
    """The series: (4, times, height, width), the channels being the nuclear stain, light, nuclei and cells."""
    with zipfile.ZipFile(file) as archive, Image.open(io.BytesIO(archive.read(SERIES))) as series:
        found = np.stack([np.array(page) for page in ImageSequence.Iterator(series)])
    return found.reshape(4, NUM_TIMES, *found.shape[1:])


def lay_out(folder: Path) -> int:
    """Write `folder/train` and `folder/val`, each with `images`, `masks` and `classes.txt`."""
    pictures, nuclei, cells = pictures_and_objects(folder)
    masks = np.where(nuclei > 0, 2, np.where(cells > 0, 1, 0)).astype(np.uint8)
    palette = [value for colour in COLOURS for value in colour]
    for part, columns in PARTS.items():
        for name in ("images", "masks"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        (folder / part / "classes.txt").write_text("\n".join(NAMES) + "\n")
        for time in range(NUM_TIMES):
            Image.fromarray(pictures[time, :, columns]).save(folder / part / "images" / f"{time}.png")
            mask = Image.fromarray(masks[time, :, columns]).convert("P")
            mask.putpalette(palette)
            mask.save(folder / part / "masks" / f"{time}.png")
    return 2 * NUM_TIMES


def lay_out_instances(folder: Path, packages: Path) -> int:
    """Write `folder/train` and `folder/val`, each with `images`, and label images of the nuclei in `masks/nucleus`.

    Args:
        folder: to write into.
        packages: where the wheel is, or will be.
    """
    pictures, nuclei, _ = pictures_and_objects(packages)
    for part, columns in PARTS.items():
        images, masks = folder / part / "images", folder / part / "masks" / "nucleus"
        for time in range(NUM_TIMES):
            for place, pixels in ((images, pictures), (masks, nuclei.astype(np.uint16))):
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.ascontiguousarray(pixels[time, :, columns])).save(place / f"{time}.png")
    return 2 * NUM_TIMES


def pictures_and_objects(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures (times, height, width, 3) of the series, and its nuclei and cells, each with a number of its own.

    Args:
        folder: of the package's wheel.
    """
    stain, light, nuclei, cells = pages(wheel(folder))[:, :, :HEIGHT]
    # Light in red and green, the stain in blue; from black to white by what occurs where the model is trained.
    light, stain = (bytes_of(channel, PARTS["train"]) for channel in (light, stain))
    return np.stack([light, light, stain], axis=-1), nuclei, cells


def bytes_of(channel: np.ndarray, columns: slice) -> np.ndarray:
    """A channel as uint8, from the first to the 99.8th percentile of some columns."""
    low, high = np.percentile(channel[..., columns], (1, 99.8))
    return (np.clip((channel - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    target: Path = parser.parse_args().folder
    target.mkdir(parents=True, exist_ok=True)
    print(f"{lay_out(target)} images in {target}")
