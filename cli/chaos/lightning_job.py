"""Lightning's part in `flashtask chaos`: `fit DATA FOLDER SEED [--resume]`, or `check CHECKPOINT...`."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def fit(data: Path, folder: Path, seed: int, resume: bool) -> None:
    """Train, and leave the weights in `weights.safetensors`."""
    import timm
    from safetensors.torch import save_file
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    pl = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning")

    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]  # a module that may not be installed
        def __init__(self) -> None:
            super().__init__()
            backbone: Any = timm.create_model("test_efficientnet", num_classes=0)
            hidden = torch.nn.Linear(backbone.num_features, 64), torch.nn.ReLU(), torch.nn.Dropout(0.2)
            self.layers = torch.nn.Sequential(backbone, *hidden, torch.nn.Linear(64, 2))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1]))

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)}

    pl.seed_everything(seed)
    plain = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    augmented = [transforms.RandomResizedCrop(32, (0.6, 1.0)), transforms.RandomHorizontalFlip(), *plain]
    train = ImageFolder(str(data / "train"), transforms.Compose(augmented))
    val = ImageFolder(str(data / "val"), transforms.Compose(plain))
    module = Net()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pl.callbacks.ModelCheckpoint(folder, filename="best", save_last=True, every_n_train_steps=2)],
    )
    loaders = torch.utils.data.DataLoader(train, 8, shuffle=True), torch.utils.data.DataLoader(val, 8)
    last = folder / "last.ckpt"
    trainer.fit(module, *loaders, ckpt_path=str(last) if resume and last.exists() else None)
    if trainer.global_step == 3 * len(loaders[0]):  # else a signal has ended the fit
        weights = {name: value.contiguous() for name, value in module.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")


def check(files: list[str]) -> None:
    """Print those that cannot be loaded, as a JSON list."""
    refused = []
    for file in files:
        try:
            torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            refused.append(file)
    print(json.dumps(refused))


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check(sys.argv[2:])
    else:
        fit(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), "--resume" in sys.argv)
