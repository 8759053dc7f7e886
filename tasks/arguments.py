"""Which arguments of a task belong to its weights, to its head and to training. Importing this loads no torch."""

from __future__ import annotations

__all__ = ["OF_THE_HEAD", "OF_THE_TRAINING", "OF_THE_WEIGHTS"]

#: Arguments that the weights decide: they come with them.
OF_THE_WEIGHTS = ("backbone", "backbone_options", "image_size", "in_chans", "pretrained", "resize", "tile_overlap")
#: Arguments that only a fit needs.
OF_THE_TRAINING = (
    "learning_rate",
    "backbone_learning_rate",
    "optimizer",
    "optimizer_options",
    "lr_scheduler",
    "lr_scheduler_options",
)
#: Arguments that mean a head other than the trained one.
OF_THE_HEAD = ("head", "head_options")
