"""`BatchPicture`: samples as a model gets them, drawn beside each other with their targets."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.core.files import atomic_write
from flashtask.core.number_checks import is_whole
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.seeding import SampleKey
from flashtask.data.datasets import ImageFileDataset
from flashtask.data.images import is_image_name
from flashtask.data.samples import PARTS, SampleTable, WeightedTargets
from flashtask.data.targets import TargetReader

__all__ = ["BatchPicture", "check_shown", "denormalised", "picture_of_samples"]

#: Pixels: of a picture's longer side at the most and at the least, between pictures, of the text.
_MOST_SIDE, _LEAST_SIDE, _GAP, _TEXT = 256, 128, 12, 14
_MOST_COLUMNS, _MOST_LINES = 4, 3
_BACK, _INK, _SOFT = "white", "#1d2430", "#5b6676"


def denormalised(values: torch.Tensor, preprocessing: Preprocessing) -> Image.Image:
    """The picture that a model's input (C, H, W) was made of; what lies beyond black and white is cut off.

    Args:
        values: floating point, with 1 or 3 channels.
        preprocessing: with the mean and the deviation that it was normalised with.
    """
    mean, std = (torch.tensor(numbers).reshape(-1, 1, 1) for numbers in (preprocessing.mean, preprocessing.std))
    pixels = ((values.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)).convert("RGB")


class BatchPicture:
    """Pictures in a grid, each above the lines that describe it; a notebook shows it.

    Args:
        pictures: of any sizes, at least one.
        lines: for each picture.
        title: above all.
    """

    def __init__(self, pictures: Sequence[Image.Image], lines: Sequence[Sequence[str]], title: str = "") -> None:
        self.pictures, self.lines, self.title = list(pictures), [list(own) for own in lines], title

    def __repr__(self) -> str:
        return f"BatchPicture({self.title})"

    @property
    def image(self) -> Image.Image:
        """The whole picture, in mode RGB."""
        font = ImageFont.load_default(_TEXT)
        pictures = [_scaled(picture) for picture in self.pictures]
        width, height = (max(getattr(picture, side) for picture in pictures) for side in ("width", "height"))
        columns = min(_MOST_COLUMNS, math.ceil(math.sqrt(len(pictures))))
        words = [_fitted(own, width, font) for own in self.lines]
        row_height = round(1.35 * _TEXT)
        below = row_height * max(map(len, words), default=0) + (4 if any(words) else 0)
        whole_width = columns * (width + _GAP) + _GAP
        title = _fitted([self.title] if self.title else [], whole_width - 2 * _GAP, font)
        top = _GAP + (row_height * len(title) + 6 if title else 0)
        rows = math.ceil(len(pictures) / columns)
        made = Image.new("RGB", (whole_width, top + rows * (height + below + _GAP)), _BACK)
        pen = ImageDraw.Draw(made)
        for number, line in enumerate(title):
            pen.text((_GAP, _GAP + row_height * number), line, _SOFT, font)
        for number, (picture, own) in enumerate(zip(pictures, words, strict=True)):
            left = _GAP + number % columns * (width + _GAP)
            upper = top + number // columns * (height + below + _GAP)
            made.paste(picture, (left + (width - picture.width) // 2, upper + (height - picture.height) // 2))
            for place, line in enumerate(own):
                pen.text((left, upper + height + 4 + row_height * place), line, _INK, font)
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture in the format of the file's ending; a file of that name is replaced.

        Raises:
            UsageError: the ending is not that of an image.
            OutputError, StorageError: the file cannot be written.
        """
        file = Path(path)
        Image.init()
        kind = Image.EXTENSION.get(file.suffix.lower())
        if not is_image_name(file.name) or kind not in Image.SAVE:
            raise UsageError(f"{str(file)!r} does not end like the name of an image", fix=f"{file.stem or 'batch'}.png")
        held = io.BytesIO()
        self.image.save(held, kind)
        with atomic_write(file) as target:
            target.write(held.getvalue())

    def _repr_png_(self) -> bytes:
        held = io.BytesIO()
        self.image.save(held, "PNG")
        return held.getvalue()


def check_shown(part: str, table: SampleTable, *, num_samples: int, epoch: int, seed: int) -> None:
    """Refuse what `show_batch` cannot draw.

    Raises:
        UsageError: a part without samples, or a number that is not whole or too small.
    """
    known = [name for name in PARTS if table.has(name)]
    if part not in known:
        what = f"there is no {part} data" if part in PARTS else f"no part {part!r}"
        raise UsageError(what, fix=did_you_mean(part, known) or f"the parts are {', '.join(known)}")
    for name, value, least in (("num_samples", num_samples, 1), ("epoch", epoch, 0), ("seed", seed, 0)):
        if not is_whole(value, least):
            raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")


def picture_of_samples(
    dataset: ImageFileDataset,
    keys: Sequence[SampleKey],
    reader: TargetReader,
    preprocessing: Preprocessing,
    title: str,
) -> BatchPicture:
    """Samples as the dataset gives them.

    Args:
        dataset: that loads and transforms them.
        keys: of the samples.
        reader: says in words what their targets are, or draws them.
        preprocessing: that they were normalised with.
        title: above all.
    """
    pictures, lines = [], []
    for key in keys:
        samples = dataset.__getitems__([key])
        sample = samples[len(samples) // 2]  # the middle one, where a picture is cut into tiles
        values, target = sample if isinstance(sample, tuple) else (sample, None)
        picture, own = denormalised(values, preprocessing), [os.path.basename(dataset.paths[key.index])]
        if target is not None:
            target = target.values if isinstance(target, WeightedTargets) else target
            picture, own = reader.draw(picture, target), reader.lines(target)
        pictures.append(picture)
        lines.append(own)
    return BatchPicture(pictures, lines, title)


def _scaled(picture: Image.Image) -> Image.Image:
    """Not larger than a cell; small ones enlarged by a whole number, so that their pixels can be seen."""
    longer = max(picture.size)
    if longer > _MOST_SIDE:
        ratio = _MOST_SIDE / longer
        return picture.resize([max(1, round(side * ratio)) for side in picture.size], Image.Resampling.LANCZOS)
    factor = _LEAST_SIDE // longer
    return picture if factor < 2 else picture.resize((picture.width * factor, picture.height * factor), 0)


def _fitted(lines: Sequence[str], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The lines, broken where they are longer than so many pixels, and cut after a few."""
    found: list[str] = []
    for line in lines:
        most = max(4, int(len(line) * width / max(1.0, font.getlength(line))))
        found += textwrap.wrap(line, most) if font.getlength(line) > width else [line]
    if len(found) > _MOST_LINES:
        found = [*found[: _MOST_LINES - 1], found[_MOST_LINES - 1][:-3] + "..."]
    return found
