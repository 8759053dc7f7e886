"""What a backbone gives and a head takes: the contract between the two, which neither room defines for the other."""

from __future__ import annotations

from dataclasses import dataclass

from flashtask.core.errors import UsageError

__all__ = ["FEATURE_KINDS", "FeatureInfo", "check_kind"]

#: The kinds of features, with the shapes that a module gives them in.
FEATURE_KINDS = {
    "pooled": "one vector an image, (B, F)",
    "maps": "a list of maps (B, C, H, W), the finest first",
    "tokens": "a row of vectors, (B, N, F)",
}


@dataclass(frozen=True)
class FeatureInfo:
    """The features of a backbone.

    Args:
        kind: one of `FEATURE_KINDS`.
        channels: of each map, the finest first; of `pooled` and `tokens` one number, F.
        reductions: of each map, the pixels of the image in one pixel of the map along one side (its stride).
        num_tokens: N, for images of the size in the backbone's preprocessing.
        num_prefix_tokens: tokens that come first and belong to no place in the image, such as a class token.
    """

    kind: str
    channels: tuple[int, ...]
    reductions: tuple[int, ...] = ()
    num_tokens: int = 0
    num_prefix_tokens: int = 0

    @property
    def num_features(self) -> int:
        """F of vectors and tokens; of maps the channels of the coarsest."""
        return self.channels[-1]


def check_kind(kind: object, what: str) -> None:
    """Refuse what is not a kind of features.

    Args:
        kind: to check.
        what: whose it is, for the message.

    Raises:
        UsageError: it is not one.
    """
    if kind not in FEATURE_KINDS:
        known = "; ".join(f"{name} ({shape})" for name, shape in FEATURE_KINDS.items())
        raise UsageError(f"{what} is one of {known}; not {kind!r}")
