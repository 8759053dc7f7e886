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
