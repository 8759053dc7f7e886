"""`ImageEmbedder`: one feature vector an image, without any training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashtask.backbones.default import AUTO
from flashtask.core.errors import UsageError
from flashtask.tasks.task import Task

if TYPE_CHECKING:
    from flashtask.tasks.export.outputs import Outputs

__all__ = ["ImageEmbedder"]


class ImageEmbedder(Task):
    """A backbone alone: `predict` gives its features, float32 of shape (num_features,) an image.

    Args:
        backbone: a registered name, or a module.
        options: `pretrained`, `in_chans` and `backbone_options` of `Task`.
    """

    name = "image_embedding"
    pipeline_tag = "image-feature-extraction"

    def __init__(self, backbone: str | nn.Module = AUTO, **options: Any) -> None:
        super().__init__(backbone, head=None, **options)
        self.save_hyperparameters()

    def export_outputs(self) -> Outputs:
        """`features` (N, num_features)."""
        from flashtask.tasks.export.outputs import FeatureOutputs

        return FeatureOutputs()

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """There is nothing to train."""
        raise UsageError("ImageEmbedder is not trained", fix="fine-tune an ImageClassifier, and use its backbone")
