"""The images and the checkpoint that the works use, made once in a folder and found there the next time.

Cells of solar modules (package elpv-dataset, CC BY-NC-SA 4.0, 300 x 300, grey PNG) and large photographs (4000 x 3000
JPEG, made from those in scikit-image).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flashtask import ImageClassificationData, ImageClassifier, Trainer

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from lay_out_elpv import lay_out, rows

__all__ = ["make"]


def make(folder: Path, *, train: int, val: int, all_images: int, photos: int, backbone: str, pretrained: bool) -> None:
    """Lay out what is missing.

    Args:
        folder: of the material; another number of images needs another folder.
        train: images to train on.
        val: others to validate on.
        all_images: images to predict.
        photos: large photographs.
        backbone: of the checkpoint.
        pretrained: with its weights.
    """
    _split(folder / "elpv", train, val)
    lay_out(folder / "elpv" / "all", all_images)
    for number in range(photos):
        _photo(folder / "photos", number)
    if not (folder / "model.ckpt").exists():
        _checkpoint(folder, backbone, pretrained)


def _split(folder: Path, train: int, val: int) -> None:
    """Every fifth (or so) of evenly chosen images validates."""
    table = rows()
    chosen = [table[len(table) * number // (train + val)] for number in range(train + val)]
    every = (train + val) // val
    for number, (source, probability) in enumerate(chosen):
        part = "val" if number % every == every - 1 else "train"
        target = folder / part / ("functional" if probability < 0.5 else "defective") / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.write_bytes(source.read_bytes())


def _photo(folder: Path, number: int) -> None:
    from skimage import data

    names = ("astronaut", "coffee", "chelsea")
    target = folder / ("defective", "functional")[number % 2] / f"{number:03}.jpg"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    picture: Any = Image.fromarray(getattr(data, names[number % len(names)])())
    large = np.asarray(picture.resize((4000, 3000), Image.Resampling.LANCZOS)).astype(np.int16)
    noise = np.random.default_rng(number).integers(
        -6, 7, large.shape
    )  # a sensor's: it makes files as large as real ones
    Image.fromarray(np.clip(large + noise, 0, 255).astype(np.uint8)).save(target, quality=90)


def _checkpoint(folder: Path, backbone: str, pretrained: bool) -> None:
    data = ImageClassificationData.from_folders(folder / "elpv" / "train", batch_size=32)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model = ImageClassifier(backbone, pretrained=pretrained)
    trainer.finetune(model, datamodule=data, strategy="freeze", restore_best=False)
    trainer.save_checkpoint(folder / "model.ckpt")
