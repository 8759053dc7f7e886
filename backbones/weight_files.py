"""Tensors from files that others wrote: safetensors, or what `torch.save` wrote, never unpickled unsafely."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from flashtask.core.foreign_weights import read_foreign_weights

__all__ = ["WEIGHT_SUFFIXES", "read_weights"]

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU; a pickled one is read in a process of its own.

    If a file of `torch.save` holds one state dict beside other things (an epoch, an optimizer), that one is taken.

    Args:
        path: safetensors, or a checkpoint of flashtask, or a file of `torch.save` (`.pth`, `.pt`, `.bin`).

    Raises:
        MissingInputError, IntegrityError, UsageError, StorageError: as `read_foreign_weights`.
    """
    # Names that begin so are what checkpoints of flashtask hold beside the weights: the optimizer's state, ...
    return {name: tensor for name, tensor in read_foreign_weights(path).items() if not name.startswith("@")}
