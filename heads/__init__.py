"""From features to outputs: the registry of heads. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.core.registry import Registry, check_options
from flashtask.core.zoo import ShippedSource

if TYPE_CHECKING:
    from torch import nn

__all__ = ["HEADS", "build_head"]

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


def build_head(name: str | nn.Module, num_features: int, num_outputs: int, **options: Any) -> nn.Module:
    """Build a head by name; a module passes through as it is.

    Args:
        name: a name of `HEADS`, or a module from (B, num_features) to (B, num_outputs).
        num_features: features a sample, at least 1.
        num_outputs: outputs a sample, at least 1.
        options: the head's own arguments (`hidden_sizes`, `dropout`, ...).

    Raises:
        UnknownNameError: no head or no option has this name.
        UsageError: a size below 1, options for a ready module, or a builder that gives no module.
    """
    from torch import nn

    if isinstance(name, nn.Module):
        if options:
            raise UsageError(f"a head that is a module takes no options, but {', '.join(options)} was given")
        return name
    for what, value in (("num_features", num_features), ("num_outputs", num_outputs)):
        if not is_whole(value):
            raise UsageError(f"{what} of the head {name!r} must be a whole number of at least 1, not {value!r}")
    builder = HEADS.get(name)
    check_options(f"head {name!r}", builder, options, given=2)
    head = builder(num_features, num_outputs, **options)
    if not isinstance(head, nn.Module):
        raise UsageError(f"the head {name!r} built a {type(head).__name__}, not a torch.nn.Module")
    return head
