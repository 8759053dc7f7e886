"""Good files of every kind that flashtask reads, small: what hostile and damaged ones are made from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from small import colour_folders

import flashtask
from flashtask.backbones import build_backbone
from flashtask.core.tensor_file import read_tensor_file, write_tensor_file

TINY = "timm/test_resnet"
CONFIG = {"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": {"input_size": [3, 40, 40]}}
RECIPE = """\
task: image_classification
data:
  from_folders: {train_folder: %s, batch_size: 8, num_workers: 0}
model: {backbone: timm/test_resnet, pretrained: false}
trainer: {max_epochs: 1, max_steps: 1, seed: 0}
"""
ZOO = """\
backbones:
  mine:
    description: a small one
    source: timm/test_resnet
    options: {drop_rate: 0.1}
"""


def make_good_files(root: Path) -> None:
    """last.ckpt, folder/ (flashtask's), timm/ (plain timm's), weights.pth, recipe.yaml and zoo.yaml."""
    images = colour_folders(root / "images", each=4)
    model = flashtask.ImageClassifier(TINY, pretrained=False)
    data = flashtask.ImageClassificationData.from_folders(train_folder=images, batch_size=8, num_workers=0)
    trainer = flashtask.Trainer(
        max_epochs=2, max_steps=2, output_dir=root / "run", enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, datamodule=data)
    (root / "run" / "last.ckpt").rename(root / "last.ckpt")
    flashtask.load(root / "last.ckpt").save_pretrained(root / "folder")
    weights = build_backbone(TINY, pretrained=False).module.state_dict()
    whole = {**weights, "fc.weight": torch.zeros(2, 96), "fc.bias": torch.zeros(2)}
    (root / "timm").mkdir()
    (root / "timm" / "config.json").write_text(json.dumps(CONFIG))
    save_file(whole, root / "timm" / "model.safetensors")
    torch.save({"state_dict": dict(weights), "epoch": 3}, root / "weights.pth")
    (root / "recipe.yaml").write_text(RECIPE % images)
    (root / "zoo.yaml").write_text(ZOO)


def forge(source: Path, target: Path, change) -> Path:
    """A checkpoint with a right digest whose tree and tensors were changed by `change(tree, tensors)`."""
    tree, tensors = read_tensor_file(source)
    change(tree, tensors)
    write_tensor_file(target, tree, tensors)
    return target
