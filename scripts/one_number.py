"""Hold every way to a score against every other, for each image of a folder.

    python scripts/one_number.py best.ckpt elpv --sample 100

`best.ckpt` is a checkpoint of an image classifier on a timm backbone; `elpv` holds images, at any depth. Each way gives
the scores of all classes for each image; the last way is plain timm, which reads the folder that `save_pretrained`
writes, in float32 and unfolded, with timm's own transform. Printed for each pair: on how many images the labels
differ, and the largest difference of a score.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import flashtask
from flashtask import ImageClassificationData, Trainer
from flashtask.tasks.image_classification import ImageClassifier

Scores = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def command(checkpoint: Path, model: ImageClassifier, *options: str) -> Callable[[Sequence[str]], Scores]:
    """`flashtask predict` in a process of its own."""

    def scores(paths: Sequence[str]) -> Scores:
        with tempfile.TemporaryDirectory() as place:
            output = Path(place, "scores.jsonl")
            words = ["predict", str(checkpoint), *paths, "--format", "jsonl", "--output", str(output), *options]
            labels = list(model.labels or ())
            subprocess.run(
                [sys.executable, "-m", "flashtask", *words, "--top-k", str(len(labels))],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            found = np.full((len(paths), len(labels)), np.nan)
            rows = {path: number for number, path in enumerate(paths)}
            for line in output.read_text().splitlines():
                row = json.loads(line)
                found[rows[row["path"]], [labels.index(label) for label in row["labels"]]] = row["scores"]
            return found

    return scores


def of_model(model: ImageClassifier, **options: int) -> Callable[[Sequence[str]], Scores]:
    """`model.predict` of a list."""
    return lambda paths: _ordered(model, model.predict(list(paths), **options))


def one_by_one(model: ImageClassifier) -> Callable[[Sequence[str]], Scores]:
    """`model.predict` of each image alone."""
    return lambda paths: _ordered(model, [model.predict(path) for path in paths])


def in_another_order(model: ImageClassifier, size: int) -> Callable[[Sequence[str]], Scores]:
    """`model.predict` of groups, in an order that is drawn."""

    def scores(paths: Sequence[str]) -> Scores:
        order = random.Random(0).sample(range(len(paths)), len(paths))
        found = np.empty((len(paths), len(model.labels or ())))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            found[chosen] = _ordered(model, model.predict([paths[number] for number in chosen]))
        return found

    return scores


def of_trainer(model: ImageClassifier, folder: Path, batch_size: int) -> Callable[[Sequence[str]], Scores]:
    """`trainer.predict` with a data module."""

    def scores(paths: Sequence[str]) -> Scores:
        trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        data = ImageClassificationData.from_folders(predict_folder=folder, batch_size=batch_size)
        found = np.concatenate([batch.double().numpy() for batch in trainer.predict(model, datamodule=data)])
        rows = {path: number for number, path in enumerate(data.predict_dataloader().dataset.paths)}
        return found[[rows[path] for path in paths]]

    return scores


def plain_timm(model: ImageClassifier) -> Callable[[Sequence[str]], Scores]:
    """timm alone, with the folder that `save_pretrained` writes."""

    def scores(paths: Sequence[str]) -> Scores:
        with tempfile.TemporaryDirectory() as place:
            theirs = timm.create_model(f"local-dir:{model.save_pretrained(Path(place, 'model'))}", pretrained=True)
        theirs = theirs.eval()
        transform = create_transform(**resolve_data_config({}, model=theirs), is_training=False)
        found = []
        with torch.no_grad():
            for path in paths:
                images = transform(Image.open(path).convert("RGB")).unsqueeze(0)
                found.append(theirs(images).softmax(dim=1).double().numpy())
        return np.concatenate(found)

    return scores


def _ordered(model: ImageClassifier, predictions: Sequence[flashtask.Prediction]) -> Scores:
    labels = model.labels or ()
    return np.array([[one.probabilities[label] for label in labels] for one in predictions])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sample", type=int, default=100, help="images for the ways that take long: one by one")
    options = parser.parse_args()
    model = flashtask.load(options.checkpoint)
    assert isinstance(model, ImageClassifier)
    paths = sorted(str(path.absolute()) for path in options.folder.rglob("*") if path.is_file())
    few = paths[:: max(1, len(paths) // options.sample)]
    ways: dict[str, tuple[Sequence[str], Callable[[Sequence[str]], Scores]]] = {
        "flashtask predict": (paths, command(options.checkpoint, model)),
        "flashtask predict --num-workers 1": (paths, command(options.checkpoint, model, "--num-workers", "1")),
        "flashtask predict --batch-size 7": (paths, command(options.checkpoint, model, "--batch-size", "7")),
        "model.predict": (paths, of_model(model)),
        "model.predict, groups of 20, shuffled": (paths, in_another_order(model, 20)),
        "model.predict, one by one": (few, one_by_one(model)),
        "trainer.predict, batches of 32": (paths, of_trainer(model, options.folder, 32)),
        "plain timm": (paths, plain_timm(model)),
    }
    found = {}
    for name, (given, way) in ways.items():
        found[name] = dict(zip(given, way(given), strict=True))
        print(f"{len(given):,} images by {name}", file=sys.stderr, flush=True)
    print("| one way | another | images | labels that differ | largest difference of a score |")
    print("| --- | --- | ---: | ---: | ---: |")
    for one, other in combinations(found, 2):
        both = [path for path in found[one] if path in found[other]]
        ours, theirs = (np.array([found[name][path] for path in both]) for name in (one, other))
        flips = int((ours.argmax(axis=1) != theirs.argmax(axis=1)).sum())
        print(f"| {one} | {other} | {len(both):,} | {flips} | {np.abs(ours - theirs).max():.1e} |")


if __name__ == "__main__":
    main()
