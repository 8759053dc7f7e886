"""Boxes around trees: flashtask beside torchvision's FCOS over the same maps, with a plain loop.

    python benchmarks/detection.py WHEEL FOLDER [--players flashtask torchvision] [--epochs N] [--seconds N] [--seeds 1]

WHEEL is deepforest-2.1.0-py3-none-any.whl, whose photographs are laid out in FOLDER (scripts/lay_out_trees.py). Both
start from EfficientNet-Lite0 with the weights of its package, and have the same tiles, crops, flips, batch size, width
and depth of the head, optimizer and rates. torchvision's detector is trained for the seconds of CPU time that flashtask
took, or for `--seconds`; its rate falls over that time as flashtask's does over its epochs. Average precision is
counted by one function, in pixels of the files, after the last step of both.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7
from torchvision.transforms import v2

import flashtask
from flashtask import ObjectDetectionData, ObjectDetector, Trainer, build_pyramid
from flashtask.tasks.detection_metrics import DetectionScores

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import demo_detection as recipe
from lay_out_trees import lay_out

Sample = tuple[Image.Image, Tensor]


def samples(folder: Path) -> list[Sample]:
    """The tiles of a part with their boxes."""
    content = json.loads((folder / "annotations.json").read_text())
    found = []
    for image in content["images"]:
        own = [one["bbox"] for one in content["annotations"] if one["image_id"] == image["id"]]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in own]).reshape(-1, 4)
        found.append((Image.open(folder / image["file_name"]).convert("RGB"), boxes))
    return found


def measure(predict: Callable[[Image.Image], Tensor], part: list[Sample]) -> str:
    """AP and AP50 of rows (n, 6): box, score, class."""
    scores = DetectionScores(1)
    for image, boxes in part:
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        nothing = torch.zeros(len(boxes))
        scores.update([predict(image)], [{"boxes": boxes, "labels": nothing, "is_crowd": nothing, "areas": areas}])
    scores.compute()
    return f"AP {scores.numbers['map']:.3f}, AP50 {scores.numbers['map_50']:.3f}"


def report(player: str, seed: int, seconds: float, predict: Callable[[Image.Image], Tensor], folder: Path) -> None:
    """A line for a run."""
    parts = {"another photograph": "val", "two other forests": "test"}
    numbers = "; ".join(f"{name}: {measure(predict, samples(folder / part))}" for name, part in parts.items())
    print(f"{player}, seed {seed}: {seconds:.0f} s of CPU time; {numbers}", flush=True)


def with_flashtask(folder: Path, seed: int, epochs: int) -> float:
    """Train by the recipe of the demo; the CPU seconds of the fit, validation left out."""
    data = ObjectDetectionData.from_folders(folder / "train", **recipe.DATA)
    flashtask.seed_everything(seed)
    model = ObjectDetector(recipe.BACKBONE, **recipe.MODEL)
    start = time.process_time()
    trainer = Trainer(max_epochs=epochs, output_dir=folder / f"run{seed}", seed=seed, enable_progress_bar=False)
    trainer.finetune(model, datamodule=data, strategy=recipe.STRATEGY, restore_best=False)
    seconds = time.process_time() - start
    model.score_threshold = 0

    def predict(image: Image.Image) -> Tensor:
        found = model.predict(image)
        rows = [(*box, score, 0) for box, score in zip(found.boxes, found.scores, strict=True)]
        return torch.tensor(rows).reshape(-1, 6)

    report("flashtask", seed, seconds, predict, folder)
    return seconds


class Maps(nn.Module):
    """A feature pyramid of torchvision over the maps of the backbone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        made = build_pyramid(recipe.BACKBONE)
        self.body, self.out_channels, self.preprocessing = made.module, width, made.preprocessing
        self.groups = made.layer_groups
        self.places = [place for place, stride in enumerate(made.features.reductions) if stride >= 8]
        channels = [made.features.channels[place] for place in self.places]
        self.pyramid = FeaturePyramidNetwork(channels, width, extra_blocks=LastLevelP6P7(width, width))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        found: dict[str, Tensor] = self.pyramid({str(place): maps[place] for place in self.places})
        return found

    def train(self, mode: bool = True) -> Maps:
        """BatchNorm keeps its statistics, as in torchvision's own recipes."""
        super().train(mode)
        self.body.eval()
        return self


def batches(part: list[Sample], draws: np.random.Generator) -> Iterator[list[Sample]]:
    """Endless: each tile once, in a new order each time."""
    while True:
        order = draws.permutation(len(part)).tolist()
        for start in range(0, len(order), recipe.DATA["batch_size"]):
            yield [part[row] for row in order[start : start + recipe.DATA["batch_size"]]]


def with_torchvision(folder: Path, seed: int, seconds: float) -> None:
    """Train FCOS by a plain loop for so many seconds of CPU time."""
    torch.manual_seed(seed)
    size, width = recipe.MODEL["image_size"], recipe.MODEL["head_options"]["width"]
    maps = Maps(width)
    strides = (8, 16, 32, 64, 128)
    anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
    head = FCOSHead(width, 1, 1, num_convs=2)
    looks = {"image_mean": list(maps.preprocessing.mean), "image_std": list(maps.preprocessing.std)}
    model = FCOS(maps, 1, size, size, anchor_generator=anchors, head=head, **looks)
    change = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.7, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ColorJitter(brightness=0.1, contrast=0.1),
            v2.SanitizeBoundingBoxes(min_size=2, labels_getter=None),
        ]
    )
    body = list(maps.body.parameters())
    ours = {id(one) for one in body}
    others = [one for one in model.parameters() if id(one) not in ours]
    rates = (recipe.MODEL["learning_rate"], recipe.MODEL["backbone_learning_rate"])
    optimizer = torch.optim.AdamW([{"params": others, "lr": rates[0]}, {"params": body, "lr": rates[1]}])
    model.train()
    model.to(memory_format=torch.channels_last)
    own, start, losses, steps = samples(folder / "train"), time.process_time(), [], 0
    for batch in batches(own, np.random.default_rng(seed)):
        done = (time.process_time() - start) / seconds
        if done >= 1:
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
        images, targets = [], []
        for image, boxes in batch:
            moving = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.size[::-1])
            image, moving = change(image, moving)
            images.append(v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True))
            labels = torch.zeros(len(moving), dtype=torch.int64)
            targets.append({"boxes": moving.as_subclass(Tensor).float(), "labels": labels})
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        losses.append(float(loss.detach()))
    model.eval()

    def predict(image: Image.Image) -> Tensor:
        with torch.no_grad():
            (found,) = model([v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)])
        return torch.cat([found["boxes"], found["scores"][:, None], torch.zeros(len(found["scores"]), 1)], dim=1)

    print(f"torchvision: {steps} steps, loss {np.mean(losses[:10]):.2f} to {np.mean(losses[-10:]):.2f}")
    report("torchvision's FCOS", seed, time.process_time() - start, predict, folder)


def main() -> None:
    """Print a line for each player and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--players", nargs="+", default=["flashtask", "torchvision"])
    parser.add_argument("--epochs", type=int, default=recipe.EPOCHS)
    parser.add_argument("--seconds", type=float, help="of CPU time for torchvision; those that flashtask took")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    lay_out(arguments.wheel, arguments.folder)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.get_num_threads()} threads")
    for seed in range(arguments.seeds):
        seconds = arguments.seconds
        if "flashtask" in arguments.players:
            seconds = with_flashtask(arguments.folder, seed, arguments.epochs)
        if "torchvision" in arguments.players:
            if seconds is None:
                parser.error("torchvision alone needs --seconds")
            with_torchvision(arguments.folder, seed, seconds)


if __name__ == "__main__":
    main()
