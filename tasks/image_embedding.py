"""`ImageEmbedder`: one feature vector an image, without any training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flashtask.core.errors import UsageError
from flashtask.tasks.task import Task

__all__ = ["ImageEmbedder"]


class ImageEmbedder(Task):
    """A backbone alone: `predict` gives its features, float32 of shape (num_features,) an image.

    Args:
        backbone: a registered name, or a module.
        options: `pretrained`, `in_chans` and `backbone_options` of `Task`.
    """

    name = "image_embedding"
    pipeline_tag = "image-feature-extraction"

    def __init__(self, backbone: str | nn.Module = "resnet18", **options: Any) -> None:
        super().__init__(backbone, head=None, **options)
        self.save_hyperparameters()

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """There is nothing to train."""
        raise UsageError("ImageEmbedder is not trained", fix="fine-tune an ImageClassifier, and use its backbone")
