"""From features to outputs: the registry of heads. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashtask.core.registry import Registry
from flashtask.core.zoo import ShippedSource

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
        },
    )
)


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
    from flashtask.heads.building import build

    return build(name, num_features, num_outputs, options)


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
