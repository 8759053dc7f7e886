"""Small class folders of images for the tests of the data room."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    """A picture of noise that differs from file name to file name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_tree(root: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8)) -> Path:
    """`counts[name]` images in `root/name`."""
    for name, count in counts.items():
        for i in range(count):
            write_image(root / name / f"{i}.png", size)
    return root


def picture(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture of soft spots with a little noise; no two numbers look alike.

    Args:
        number: of the picture.
        size: (width, height).
    """
    rng = np.random.default_rng(number)
    spots = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(spots, dtype=np.int16) + rng.integers(-20, 21, (size[1], size[0], 3), dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def picture_tree(
    root: Path, sizes: dict[str, int], classes: tuple[str, ...] = ("cat", "dog"), size: tuple[int, int] = (64, 48)
) -> Path:
    """Parts with so many different pictures of each class."""
    number = 0
    for part, count in sizes.items():
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                number += 1
                picture(number, size).save(root / part / name / f"{index:03}.png")
    return root
