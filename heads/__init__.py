"""From features to outputs: the registry of heads. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.core.registry import Registry, check_options
from flashtask.core.zoo import ShippedSource
from flashtask.heads.smp_decoders import SmpDecoders

if TYPE_CHECKING:
    from torch import nn

    from flashtask.core.feature_info import FeatureInfo

__all__ = ["HEADS", "build_head", "features_taken"]

HEADS: Registry[Callable[..., nn.Module]] = Registry("head", group="flashtask.heads")
HEADS.add_source(
    ShippedSource(
        "head",
        {
            "linear": "flashtask.heads.linear:LinearHead",
            "mlp": "flashtask.heads.mlp:MLPHead",
            "cosine": "flashtask.heads.cosine:CosineHead",
            "prototype": "flashtask.heads.prototype:PrototypeHead",
            "ridge": "flashtask.heads.ridge:RidgeHead",
            "logistic": "flashtask.heads.logistic:LogisticHead",
            "detection": "flashtask.heads.detection:DetectionHead",
            "keypoints": "flashtask.heads.keypoints:KeypointHead",
            "condinst": "flashtask.heads.condinst:CondInstHead",
            "fpn": "flashtask.heads.fpn:FPNHead",
            "unet": "flashtask.heads.unet:UNetHead",
        },
    )
)
HEADS.add_source(SmpDecoders())


def build_head(name: str | nn.Module, num_features: int | FeatureInfo, num_outputs: int, **options: Any) -> nn.Module:
    """Build a head by name; a module passes through as it is.

    A builder says by its attribute `takes` which features it wants: `pooled` (if it says nothing), `maps` or `tokens`.
    One for pooled features is called with their number, the others with the `FeatureInfo`.

    Args:
        name: a name of `HEADS`, or a module from features, such as (B, num_features), to outputs.
        num_features: features a sample, at least 1; or the `features` of a backbone.
        num_outputs: outputs a sample, at least 1.
        options: the head's own arguments (`hidden_sizes`, `dropout`, ...).

    Raises:
        UnknownNameError: no head or no option has this name.
        UsageError: a size below 1, options for a ready module, a builder that gives no module, or features of another
            kind than the head takes.
    """
    from torch import nn

    from flashtask.core.feature_info import FEATURE_KINDS, FeatureInfo

    kind, takes = (num_features.kind if isinstance(num_features, FeatureInfo) else "pooled"), features_taken(name)
    if kind != takes:
        shown = name if isinstance(name, str) else type(name).__name__
        raise UsageError(
            f"the head {shown!r} takes {takes}, and the backbone gives {kind}",
            why=f"{takes}: {FEATURE_KINDS[takes]}; {kind}: {FEATURE_KINDS[kind]}",
            fix=f'a backbone built for it: build_backbone("...", gives="{takes}")',
        )
    if isinstance(name, nn.Module):
        if options:
            raise UsageError(f"a head that is a module takes no options, but {', '.join(options)} was given")
        return name
    size = num_features.num_features if isinstance(num_features, FeatureInfo) else num_features
    for what, value in (("num_features", size), ("num_outputs", num_outputs)):
        if not is_whole(value):
            raise UsageError(f"{what} of the head {name!r} must be a whole number of at least 1, not {value!r}")
    builder = HEADS.get(name)
    check_options(f"head {name!r}", builder, options, given=2)
    head = builder(size if takes == "pooled" else num_features, num_outputs, **options)
    if not isinstance(head, nn.Module):
        raise UsageError(f"the head {name!r} built a {type(head).__name__}, not a torch.nn.Module")
    return head


def features_taken(head: str | nn.Module | None) -> str:
    """The kind of features that a head takes: `pooled`, `maps` or `tokens`.

    Args:
        head: a name of `HEADS`, a module, or None.

    Raises:
        UnknownNameError: no head has this name.
        UsageError: its `takes` is not a kind of features.
    """
    from flashtask.core.feature_info import check_kind

    builder = HEADS.get(head) if isinstance(head, str) else head
    kind: str = getattr(getattr(builder, "func", builder), "takes", "pooled")
    check_kind(kind, f"`takes` of the head {head if isinstance(head, str) else type(head).__name__!r}")
    return kind
