"""Images a second of `flashtask predict`, beside a loop by hand and ONNX Runtime, from files to a CSV file.

    python benchmarks/predicting.py CHECKPOINT IMAGE_FOLDER [--images 1000] [--rounds 3] [--output FILE.md]

The arms take turns in one process with the same number of threads, and the median of the rounds counts. By hand: a
DataLoader with a worker process for each core, torchvision's transforms and eager mode, in batches of 64. ONNX Runtime:
the exported file without preprocessing, images decoded and preprocessed as by hand, in batches of 16. Each arm begins
with the checkpoint or the exported file, and its labels are compared with those of flashtask.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from flashtask import load
from flashtask.cli import run
from flashtask.data.folders import list_images


class Images(Dataset):
    """Images preprocessed by torchvision."""

    def __init__(self, paths, preprocessing):
        side = preprocessing.input_size[1]
        self.paths = paths
        self.transform = v2.Compose(
            [
                v2.Resize(int(side / preprocessing.crop_pct), InterpolationMode(preprocessing.interpolation)),
                v2.CenterCrop(side),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(preprocessing.mean, preprocessing.std),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def write(path, rows):
    """A CSV file of paths, labels and scores."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "score"), *rows])


def by_hand(checkpoint, paths, output):
    """PyTorch, as it is written by hand."""
    task = load(checkpoint)
    network = torch.nn.Sequential(task.backbone, task.head).eval()
    workers = torch.get_num_threads()
    rows = []
    with torch.inference_mode():
        for batch in DataLoader(Images(paths, task.preprocessing), 64, num_workers=workers):
            best = network(batch).softmax(1).max(1)
            rows += zip((task.labels[label] for label in best.indices), best.values.tolist(), strict=True)
    write(output, [(path, *row) for path, row in zip(paths, rows, strict=True)])


def with_onnxruntime(exported, labels, preprocessing, paths, output):
    """An exported file in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    rows = []
    for batch in DataLoader(Images(paths, preprocessing), 16, num_workers=torch.get_num_threads()):
        (scores,) = session.run(None, {"images": batch.numpy()})
        rows += [(labels[int(one.argmax())], float(one.max())) for one in scores]
    write(output, [(path, *row) for path, row in zip(paths, rows, strict=True)])


def labels_of(output):
    """The labels in a CSV file, in order."""
    with open(output, newline="") as file:
        return [row["label"] for row in csv.DictReader(file)]


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("images")
    parser.add_argument("--images", type=int, default=1000, dest="count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output")
    options = parser.parse_args()
    paths = list(list_images(Path(options.images), "images").paths)
    paths = paths[:: max(1, len(paths) // options.count)][: options.count]
    task = load(options.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        table, rows, exported = (str(Path(folder, name)) for name in ("images.csv", "rows.csv", "model.onnx"))
        Path(table).write_text("file\n" + "".join(f"{path}\n" for path in paths))
        task.export(exported, preprocessing=False)
        arms = {
            "flashtask predict": lambda: run(
                ["predict", options.checkpoint, table, "--output", rows, "--on-bad-image", "row"]
            ),
            "PyTorch by hand": lambda: by_hand(options.checkpoint, paths, rows),
            "ONNX Runtime": lambda: with_onnxruntime(exported, task.labels, task.preprocessing, paths, rows),
        }
        took = {name: [] for name in arms}
        found = {}
        for number in range(options.rounds):
            for name, predict in arms.items():
                start = time.perf_counter()
                predict()
                took[name].append(time.perf_counter() - start)
                found[name] = labels_of(rows)
                print(f"round {number + 1}: {name} {len(paths) / took[name][-1]:.1f}", flush=True)
    lines = ["| | images/s | of the rounds | labels that differ |", "| --- | ---: | --- | ---: |"]
    for name, seconds in took.items():
        rates = sorted(len(paths) / one for one in seconds)
        differ = sum(one != other for one, other in zip(found[name], found["flashtask predict"], strict=True))
        spread = f"{rates[0]:.1f} - {rates[-1]:.1f}"
        lines.append(f"| {name} | {statistics.median(rates):.1f} | {spread} | {differ} |")
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision", "onnxruntime")
    )
    machine = f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}, {torch.get_num_threads()} threads"
    about = f"`python benchmarks/predicting.py`, {len(paths):,} images, {options.rounds} rounds; {machine}, {versions}."
    text = "\n".join([*lines, "", about])
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
