"""Backbones built on the meta device: their shapes, layers and sizes, without memory or time for their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from flashtask.backbones import build_backbone
from flashtask.backbones.backbone import Backbone
from flashtask.core.errors import UnknownNameError, UsageError

__all__ = ["build_without_values"]

#: What layers make their weights with. Everything else (ranges, lists of widths) may be read while a model is built.
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


def build_without_values(name: str, **options: Any) -> Backbone:
    """The backbone of a name with all its parameters on the meta device.

    Args:
        name: as for `build_backbone`.
        options: as for `build_backbone`; weights are never loaded.

    Raises:
        UnknownNameError: no backbone has this name.
        UsageError: it cannot be built, on the meta device or with these options.
    """
    everything: AbstractContextManager[Any] = torch.device("meta")
    try:
        with everything:
            return build_backbone(name, pretrained=False, **options)
    except UnknownNameError:
        raise
    except (UsageError, RuntimeError):
        with _WeightsWithoutValues():  # some families read numbers from tensors while they are built
            return build_backbone(name, pretrained=False, **options)


class _WeightsWithoutValues(TorchFunctionMode):
    """Puts what layers make their weights with on the meta device, and leaves every other tensor alone."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _FACTORIES and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)
