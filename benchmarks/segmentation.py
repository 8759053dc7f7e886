"""Cells and nuclei: flashtask beside segmentation_models_pytorch with a plain loop.

    python benchmarks/segmentation.py FOLDER [--players flashtask smp] [--epochs 40] [--seconds N] [--seeds 1]

FOLDER gets the data (scripts/lay_out_nuclei.py), the left of a time series to train on and the right to measure. Both
start from EfficientNet-Lite0 with the weights of its package, and have the same images, crops, flips, batch size,
optimizer, rates and loss (cross-entropy and Dice); the decoders are the FPN of each. The library's model is trained for
the seconds of CPU time that flashtask took, or for `--seconds`; its rate falls over that time as flashtask's does over
its epochs. The mean IoU is counted by one function, in pixels of the files, after the last step of both.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

import flashtask
from flashtask import SemanticSegmentation, SemanticSegmentationData, Trainer, build_pyramid
from flashtask.tasks.mask_losses import MASK_LOSSES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from lay_out_nuclei import HEIGHT, NAMES, WIDTH, lay_out

BACKBONE, SIZE, BATCH_SIZE, RATE = "efficientnet_lite0", (HEIGHT, WIDTH), 5, 2e-3

Sample = tuple[Image.Image, np.ndarray]


def samples(folder: Path) -> list[Sample]:
    """The images of a part with their masks."""
    images = sorted((folder / "images").glob("*.png"))
    return [(Image.open(one).convert("RGB"), np.array(Image.open(folder / "masks" / one.name))) for one in images]


def report(player: str, seed: int, seconds: float, predict: Callable[[Image.Image], np.ndarray], folder: Path) -> None:
    """A line for a run, with the mean over classes of IoU over the pixels of all images."""
    part = samples(folder / "val")
    own = np.concatenate([predict(image).ravel() for image, _ in part])
    true = np.concatenate([mask.ravel() for _, mask in part])
    each = [((own == k) & (true == k)).sum() / ((own == k) | (true == k)).sum() for k in range(len(NAMES))]
    shown = ", ".join(f"{name} {iou:.3f}" for name, iou in zip(NAMES, each, strict=True))
    print(f"{player}, seed {seed}: {seconds:.0f} s of CPU time; mean IoU {np.mean(each):.3f} ({shown})", flush=True)


def with_flashtask(folder: Path, seed: int, epochs: int) -> float:
    """Train with the options of the demo; the CPU seconds of the fit, validation left out."""
    options = {"augment": "medium", "flip": "both", "batch_size": BATCH_SIZE, "val_split": None}
    data = SemanticSegmentationData.from_folders(folder / "train", **options)
    flashtask.seed_everything(seed)
    model = SemanticSegmentation(BACKBONE, image_size=SIZE, learning_rate=RATE)
    start = time.process_time()
    trainer = Trainer(max_epochs=epochs, output_dir=folder / f"run{seed}", seed=seed, enable_progress_bar=False)
    trainer.finetune(model, datamodule=data, strategy="no_freeze", restore_best=False)
    seconds = time.process_time() - start
    report("flashtask", seed, seconds, lambda image: model.predict(image).classes, folder)
    return seconds


def batches(part: list[Sample], draws: np.random.Generator) -> Iterator[list[Sample]]:
    """Endless: each image once, in a new order each time."""
    while True:
        order = draws.permutation(len(part)).tolist()
        for start in range(0, len(order), BATCH_SIZE):
            yield [part[row] for row in order[start : start + BATCH_SIZE]]


def with_library(folder: Path, seed: int, seconds: float) -> None:
    """Train the library's FPN by a plain loop for so many seconds of CPU time."""
    torch.manual_seed(seed)
    made = build_pyramid(BACKBONE)
    model = smp.FPN("tu-tf_efficientnet_lite0", encoder_weights=None, classes=len(NAMES))
    model.encoder.model.load_state_dict(made.module.state_dict())
    mean, std = (torch.tensor(one)[:, None, None] for one in (made.preprocessing.mean, made.preprocessing.std))
    change = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(0.35, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4),
        ]
    )

    def pixels(image: Image.Image) -> Tensor:
        return (v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True) - mean) / std

    body = list(model.encoder.parameters())
    others = [*model.decoder.parameters(), *model.segmentation_head.parameters()]
    rates = (RATE, RATE / 10)
    optimizer = torch.optim.AdamW([{"params": others, "lr": rates[0]}, {"params": body, "lr": rates[1]}])
    model.train()
    model.to(memory_format=torch.channels_last)
    start, steps = time.process_time(), 0
    for batch in batches(samples(folder / "train"), np.random.default_rng(seed)):
        done = (time.process_time() - start) / seconds
        if done >= 1:
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
        pairs = [change(image, tv_tensors.Mask(torch.from_numpy(mask))) for image, mask in batch]
        images, masks = zip(*pairs, strict=True)
        outputs = model(torch.stack([pixels(one) for one in images]).to(memory_format=torch.channels_last))
        loss = sum(MASK_LOSSES["cross_entropy_dice"](outputs, torch.stack(masks).long(), None).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    used = time.process_time() - start
    model.eval()

    def predict(image: Image.Image) -> np.ndarray:
        with torch.no_grad():
            return model(pixels(image)[None])[0].argmax(0).numpy()

    print(f"segmentation_models_pytorch {smp.__version__}: {steps} steps")
    report("smp", seed, used, predict, folder)


def main() -> None:
    """Print a line for each player and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--players", nargs="+", default=["flashtask", "smp"])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seconds", type=float, help="of CPU time for the library; those that flashtask took")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lay_out(arguments.folder)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for seed in range(arguments.seeds):
        seconds = arguments.seconds
        if "flashtask" in arguments.players:
            seconds = with_flashtask(arguments.folder, seed, arguments.epochs)
        if "smp" in arguments.players:
            if seconds is None:
                parser.error("smp alone needs --seconds")
            with_library(arguments.folder, seed, seconds)


if __name__ == "__main__":
    main()
