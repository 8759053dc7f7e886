"""Images per second of a loader: folders, a table and shards of flashtask, torchvision's ImageFolder, webdataset.

    python benchmarks/loading.py [--images 2000] [--side 256] [--rounds 5] [--workers 0] [--output FILE]

The same JPEGs, decoded, resized, cropped and normalised for a network of 224 pixels, in batches of 32, without a
network. All take turns in each round, in one process; the medians count. No decoded picture is kept. webdataset reads
the same shards. Seconds of processor time, of all threads, depend less on what else the machine does. Writes Markdown.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from flashtask import ImageClassificationData
from flashtask.data.decoded_cache import DecodedCache
from flashtask.trainer.data_loaders import order_of, rebuild_loader

HERE = Path(__file__).resolve().parent
BATCH = 32
Epochs = Callable[[int], Iterable[Any]]


def write_images(folder: Path, count: int, side: int) -> None:
    """Two classes of JPEGs of quality 90."""
    rng = np.random.default_rng(0)
    for number in range(count):
        spots = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        path = folder / ("cat", "dog")[number % 2] / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        spots.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(path, quality=90)


def of_flashtask(data: ImageClassificationData, workers: int) -> Epochs:
    """The loader of data as a run has it, without pictures that were kept."""
    data._cache = DecodedCache(0)
    data.num_workers = workers
    data.setup("fit")
    loader = rebuild_loader(data.train_dataloader(), seed=0, training=True)

    def epoch(number: int) -> Iterable[Any]:
        order = order_of(loader)
        assert order is not None
        order.set_position(number)
        return loader  # type: ignore[no-any-return]

    return epoch


STEPS = v2.Compose(
    [
        v2.Resize(256),
        v2.CenterCrop(224),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def of_torchvision(folder: Path, workers: int) -> Epochs:
    """ImageFolder with the usual transforms of evaluation."""
    dataset = ImageFolder(str(folder), STEPS)
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda number: loader


def of_webdataset(shards: Path, workers: int) -> Epochs:
    """webdataset with its usual buffer for shuffling, on the shards that flashtask wrote."""
    import webdataset

    files = sorted(map(str, shards.glob("train-*.tar")))
    dataset = webdataset.WebDataset(files, shardshuffle=len(files)).shuffle(1000).decode("pil")
    dataset = dataset.to_tuple("jpg", "cls").map_tuple(STEPS, int)
    loader = DataLoader(dataset, BATCH, num_workers=workers, persistent_workers=workers > 0)
    return lambda number: loader


def measured(players: dict[str, Epochs], count: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Of each player by round, images per second and per second of processor time; the first epoch does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in players}
    for number in range(rounds + 1):
        for name, epoch in players.items():
            start, busy = time.perf_counter(), time.process_time()
            seen = sum(len(targets) for _, targets in epoch(number))
            assert seen == count, f"{name} gave {seen} images"
            if number:
                taken = time.perf_counter() - start, time.process_time() - busy
                found[name].append((count / taken[0], count / taken[1]))
    return found


def _row(name: str, rates: tuple[float, ...], of_cpu: tuple[float, ...]) -> str:
    middle, ends = statistics.median(rates), f"{min(rates):.0f} - {max(rates):.0f}"
    return f"| {name} | {middle:.0f} | {ends} | {statistics.median(of_cpu):.0f} |"


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=256, help="height of the JPEGs; they are 4 / 3 as wide")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / f"loading-{date.today()}.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images")
        write_images(folder, asked.images, asked.side)
        table = Path(scratch, "images.csv")
        files = sorted(folder.rglob("*.jpg"))
        table.write_text("file,kind\n" + "".join(f"{file},{file.parent.name}\n" for file in files))
        options: dict[str, Any] = {"batch_size": BATCH, "augment": "none"}
        folders = ImageClassificationData.from_folders(folder, **options)
        shards = ImageClassificationData.from_folders(folder, **options).save_shards(Path(scratch, "shards"))
        players = {
            "flashtask, folders": of_flashtask(folders, asked.workers),
            "flashtask, table": of_flashtask(
                ImageClassificationData.from_csv("file", "kind", table, **options), asked.workers
            ),
            "flashtask, shards": of_flashtask(ImageClassificationData.from_shards(shards, **options), asked.workers),
            "torchvision ImageFolder, DataLoader": of_torchvision(folder, asked.workers),
            "webdataset, DataLoader, the same shards": of_webdataset(shards, asked.workers),
        }
        found = measured(players, asked.images, asked.rounds)
    lines = [
        f"# Loading images, {date.today()}",
        "",
        f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, "
        f"Python {platform.python_version()}.",
        f"{asked.images:,} JPEGs of {asked.side * 4 // 3} x {asked.side} pixels to 224 x 224, batches of {BATCH}, "
        f"{asked.workers} workers, {asked.rounds} alternating rounds; no decoded picture is kept. flashtask decodes a",
        "batch in threads of its process, and large JPEGs at a fraction of their size.",
        "",
        "| loader | images/s (median) | min - max | images per second of processor time |",
        "| --- | --- | --- | --- |",
        *(_row(name, *zip(*rates, strict=True)) for name, rates in found.items()),
    ]
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
