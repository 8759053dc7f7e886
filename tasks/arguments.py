"""Which arguments of a task belong to its weights, and which to its head. Importing this loads no torch."""

from __future__ import annotations

__all__ = ["OF_THE_HEAD", "OF_THE_WEIGHTS"]

#: Arguments that the weights decide: they come with them.
OF_THE_WEIGHTS = ("backbone", "backbone_options", "in_chans", "pretrained")
#: Arguments that mean a head other than the trained one.
OF_THE_HEAD = ("head", "head_options")
