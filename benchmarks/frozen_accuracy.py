"""Whether a head from cached bfloat16 features is as good as one from a loop by hand in float32, over seeds.

The images of `run.py`'s frozen works (640 ELPV images to train on, 160 to validate on), EfficientNet-Lite0, batches of
32, AdamW at a constant rate, 5 epochs; accuracy of the last epoch. flashtask with its defaults but `augment="none"`; by
hand, the features of the same images in float32, each computed once, and a plain loop over a linear layer.

Run: `python benchmarks/frozen_accuracy.py DATA [--seeds 8] [--precision 32]`, where DATA is the `elpv` folder that
`run.py` has made.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from setup import Setup, image_set
from torch import nn

from flashtask import ImageClassificationData, ImageClassifier, Trainer, build_backbone

EPOCHS, BATCH = 5, 32
BACKBONE = "efficientnet_lite0"


def main() -> int:
    """Print a row for each rate and player."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--precision", default="auto", help="of flashtask")
    options = parser.parse_args()
    setup = Setup(str(options.data))
    backbone = build_backbone(BACKBONE).module.eval()
    train, val = _features(backbone, setup, "train"), _features(backbone, setup, "val")
    print("| rate | player | mean | least to most | accuracy of each seed |\n| ---: | --- | ---: | ---: | --- |")
    for rate in (1e-2, 3e-3):
        found = {
            "flashtask": [_flashtask(options.data, rate, seed, options.precision) for seed in range(options.seeds)],
            "by hand": [_by_hand(train, val, rate, seed) for seed in range(options.seeds)],
        }
        for name, values in found.items():
            each = ", ".join(f"{value:.3f}" for value in values)
            mean = statistics.mean(values)
            print(f"| {rate:g} | {name} | {mean:.4f} | {min(values):.3f} to {max(values):.3f} | {each} |", flush=True)
    return 0


def _flashtask(folder: Path, rate: float, seed: int, precision: str) -> float:
    data = ImageClassificationData.from_folders(folder / "train", folder / "val", batch_size=BATCH, augment="none")
    model = ImageClassifier(BACKBONE, learning_rate=rate, lr_scheduler="constant")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=EPOCHS, seed=seed, precision=precision, **quiet)
    trainer.finetune(model, datamodule=data, strategy="freeze", restore_best=False)
    return float(trainer.callback_metrics["val_accuracy"])


@torch.no_grad()
def _features(backbone: nn.Module, setup: Setup, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    loader = torch.utils.data.DataLoader(image_set(setup, part), batch_size=BATCH)
    batches = [(backbone(images), targets) for images, targets in loader]
    return torch.cat([features for features, _ in batches]), torch.cat([targets for _, targets in batches])


def _by_hand(
    train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor], rate: float, seed: int
) -> float:
    torch.manual_seed(seed)
    head = nn.Linear(train[0].shape[1], 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(train[0])).split(BATCH):
            nn.functional.cross_entropy(head(train[0][chosen]), train[1][chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
    right = head(val[0]).argmax(dim=1) == val[1]
    return float(right.float().mean())


if __name__ == "__main__":
    sys.exit(main())
