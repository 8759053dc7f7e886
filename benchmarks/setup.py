"""What every player gets: the same images, transforms, network, weights, batch size, optimizer and rate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

__all__ = [
    "Network",
    "Outcome",
    "Setup",
    "accuracy_of",
    "image_set",
    "loader",
    "network",
    "perceptron",
    "random_vectors",
]


@dataclass(frozen=True)
class Setup:
    """One run of one player, as it crosses from the command to the process that is measured.

    Args:
        folder: holds elpv/train, elpv/val, photos/ and model.ckpt.
        backbone: a name of flashtask's registry.
        pretrained: with its weights.
        epochs: of finetuning.
        batch_size: images a step.
        rate: of AdamW, constant.
        threads: of torch.
        workers: processes that load, for those who have them.
        tuned: bfloat16 and channels-last, for those who document how.
        steps: of the small network by which the engine's overhead is measured.
        seed: of the run.
    """

    folder: str
    backbone: str = "efficientnet_lite0"
    pretrained: bool = True
    epochs: int = 1
    batch_size: int = 32
    rate: float = 3e-3
    threads: int = 2
    workers: int = 0
    tuned: bool = False
    steps: int = 2000
    seed: int = 0

    def path(self, *parts: str) -> Path:
        """A path below the folder of the data."""
        return Path(self.folder, *parts)

    def to_json(self) -> str:
        """Of `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Outcome:
    """What a player says of its own run.

    Args:
        seconds: of the work itself, imports left out.
        items: images (or steps) that it went through.
        accuracy: in 0..1, None where there is none.
    """

    seconds: float
    items: int
    accuracy: float | None = None


class Network(nn.Module):
    """A backbone and a linear layer; a frozen backbone stays in eval mode and has no gradients."""

    def __init__(self, backbone: nn.Module, head: nn.Module, *, frozen: bool) -> None:
        super().__init__()
        self.backbone, self.head, self.frozen = backbone, head, frozen
        backbone.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.backbone(images))
        return outputs


def network(setup: Setup, num_classes: int, *, frozen: bool) -> Network:
    """The network that everybody trains, its head drawn from the seed."""
    from flashtask import build_backbone

    torch.manual_seed(setup.seed)
    built = build_backbone(setup.backbone, pretrained=setup.pretrained)
    head = nn.Linear(built.num_features, num_classes)
    made = Network(built.module, head, frozen=frozen)
    return made.to(memory_format=torch.channels_last) if setup.tuned else made  # type: ignore[call-overload]


def image_set(setup: Setup, *parts: str) -> Any:
    """Class folders, as torchvision's own documentation reads them, with the backbone's own preprocessing."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    from flashtask import build_backbone

    wanted = build_backbone(setup.backbone, pretrained=False).preprocessing
    side = wanted.input_size[1]
    steps = [
        v2.Resize(int(side / wanted.crop_pct), interpolation=InterpolationMode(wanted.interpolation)),
        v2.CenterCrop(side),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(wanted.mean, wanted.std),
    ]
    return ImageFolder(str(setup.path(*parts)), v2.Compose(steps))


def loader(data: Dataset[Any], setup: Setup, *, shuffle: bool) -> Any:
    """A plain loader of batches."""
    return torch.utils.data.DataLoader(
        data,
        batch_size=setup.batch_size,
        shuffle=shuffle,
        num_workers=setup.workers,
        persistent_workers=setup.workers > 0,
    )


def perceptron() -> nn.Module:
    """The small network by which the engine's overhead is measured."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def random_vectors(setup: Setup) -> TensorDataset:
    """What the perceptron is trained on: `steps` batches."""
    generator = torch.Generator().manual_seed(setup.seed)
    size = setup.steps * setup.batch_size
    return TensorDataset(torch.randn(size, 64, generator=generator), torch.randint(0, 10, (size,), generator=generator))


def accuracy_of(found: Sequence[int], wanted: Sequence[int]) -> float:
    """The share that is right."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
