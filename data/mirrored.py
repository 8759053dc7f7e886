"""Names that a mirrored image would contradict: left and right, digits, letters."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["changed_by_mirroring", "mirrored_keypoints"]

_PAIRS = (("left", "right"), ("clockwise", "counterclockwise"), ("clockwise", "anticlockwise"), ("east", "west"))
_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def changed_by_mirroring(labels: Sequence[str]) -> str:
    """Why a horizontal flip probably makes images of another class, in words; empty if no name says so.

    Args:
        labels: names of classes. Three digits or letters are needed, since `0` and `1` often mean no and yes.
    """
    words = {label: re.findall(r"[a-z]+|\d+", label.lower()) for label in labels}
    for pair in _PAIRS:
        found = [next((label for label, of_it in words.items() if word in of_it), None) for word in pair]
        if None not in found and found[0] != found[1]:
            return f"the classes {found[0]!r} and {found[1]!r} are mirror images of each other"
    for kind in ("digits", "letters"):
        is_one = str.isdigit if kind == "digits" else str.isalpha
        signs = [label for label in labels if (len(label) == 1 and is_one(label)) or _is_digit_word(label, kind)]
        if len(signs) == len(labels) > 2:
            return f"the classes are {kind}, which are others or none when they are mirrored"
    return ""


def mirrored_keypoints(names: Sequence[str]) -> tuple[int, ...]:
    """For each keypoint the one that it becomes in a mirror, by `left` and `right` (or `l` and `r`) in the names.

    Returns:
        Positions in `names`; empty if one has no counterpart, or if several names speak of no side at all.
    """
    words = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() for name in names]
    side = re.compile(rf"(?<![a-z])({'|'.join(_SIDES)})(?![a-z])")
    others = [side.sub(lambda found: _SIDES[found[0]], word) for word in words]
    if not set(others) <= set(words) or (others == words and len(names) > 1):
        return ()
    return tuple(words.index(other) for other in others)


def _is_digit_word(label: str, kind: str) -> bool:
    return kind == "digits" and label.lower() in _DIGITS
