"""`sync_batchnorm`: statistics of a batch over all processes."""

from __future__ import annotations

import torch
from torch import nn

from flashtask.core.errors import UsageError
from flashtask.core.library_internals import batch_norm_class

__all__ = ["synchronize_batchnorm"]


def synchronize_batchnorm(module: nn.Module, device: torch.device) -> None:
    """Let every BatchNorm of a module see the batches of all processes; names of weights stay as they are.

    Args:
        module: is changed in place.
        device: of its weights.

    Raises:
        UsageError: it is not on a GPU, where torch has no such layer; or a layer computes more than its class in torch
            does, and nothing is known that keeps that.
    """
    if device.type != "cuda":
        raise UsageError(
            f"sync_batchnorm=True: torch's SyncBatchNorm refuses tensors on {device.type}",
            fix='leave it out, or accelerator="cuda"',
        )
    for name, child in module.named_children():
        setattr(module, name, _converted(child))


def _converted(part: nn.Module) -> nn.Module:
    """A part with torch's SyncBatchNorm in the place of each BatchNorm."""
    base = batch_norm_class()
    if not isinstance(part, base):
        for name, child in part.named_children():
            setattr(part, name, _converted(child))
        return part
    if type(part).__module__.startswith("timm."):
        # timm's layers hold the activation that follows, which torch's own conversion would lose.
        from timm.layers.norm_act import convert_sync_batchnorm

        converted: nn.Module = convert_sync_batchnorm(part)  # type: ignore[no-untyped-call]
        return converted
    if type(part).forward not in (base.forward, nn.SyncBatchNorm.forward):
        raise UsageError(
            f"sync_batchnorm=True: torch would put its own class in the place of {type(part).__qualname__}",
            why="it has a `forward` of its own, and what that adds would be lost",
            fix="leave sync_batchnorm out, and convert the layers of the module yourself",
        )
    of_torch: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(part)  # type: ignore[no-untyped-call]
    return of_torch
