"""`sync_batchnorm`: statistics of a batch over all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flashtask.core.errors import UsageError

__all__ = ["synchronize_batchnorm"]


def synchronize_batchnorm(module: nn.Module, device: torch.device) -> None:
    """Let every BatchNorm of a module see the batches of all processes; names of weights stay as they are.

    Args:
        module: is changed in place.
        device: of its weights.

    Raises:
        UsageError: it is not on a GPU, where torch has no such layer.
    """
    if device.type != "cuda":
        raise UsageError(
            f"sync_batchnorm=True: torch's SyncBatchNorm refuses tensors on {device.type}",
            fix='leave it out, or accelerator="cuda"',
        )
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    if any(isinstance(part, _BatchNorm) and type(part).__module__.startswith("timm.") for part in module.modules()):
        # timm's layers hold the activation that follows, which torch's own conversion would lose.
        from timm.layers.norm_act import convert_sync_batchnorm as convert
    for name, child in module.named_children():
        setattr(module, name, convert(child))
