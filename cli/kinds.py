"""What the value of an option may be: functions from text to value; ValueError says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from flashtask.core.errors import did_you_mean

__all__ = ["AUTO", "Kind", "auto_or", "below_one", "choice", "delimiter", "devices", "fold", "image_size", "magnitude"]
__all__ += ["names", "not_negative", "one_of", "positive", "positive_share", "probability", "share", "share_of_class"]
__all__ += ["steps", "text", "value_range", "weights", "whole"]

Kind = Callable[[str], Any]

#: The word for a number that is to be found.
AUTO = "auto"


def text(value: str) -> str:
    """Anything but nothing."""
    if not value.strip():
        raise ValueError("is empty")
    return value


def choice(value: str) -> str | dict[str, dict[str, Any]]:
    """A name, or a name with arguments such as `focal:gamma=3`."""
    name, colon, arguments = value.partition(":")
    if not name.strip() or (colon and not arguments):
        raise ValueError(f"{value!r} is not a name, or a name with arguments such as focal:gamma=3")
    return {name.strip(): dict(map(_argument, arguments.split(",")))} if colon else name.strip()


def weights(value: str) -> Any:
    """The name of a rule, or a number for each label: `cat=1,dog=2.5`."""
    if ":" in value or "=" not in value:
        return choice(value)
    pairs = list(map(_argument, value.split(",")))
    labels = [label for label, _ in pairs]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"{value!r} names {twice[0]!r} twice")
    return dict(pairs)


def _argument(given: str) -> tuple[str, float]:
    """A name and its number; labels may hold `=`."""
    name, equals, number = given.rpartition("=")
    if not equals or not name.strip():
        raise ValueError(f"{given!r} is not a name and a number such as gamma=3")
    return name.strip(), _number(number)


def share_of_class(value: str) -> tuple[str, float]:
    """A label and a share above 0 and below 1: `defective=0.95`."""
    label, equals, number = value.rpartition("=")
    if not equals or not label.strip():
        raise ValueError(f"{value!r} is not a label and a share such as defective=0.95")
    found = _number(number)
    if not 0 < found < 1:
        raise ValueError(f"must be a share above 0 and below 1, not {number}")
    return label.strip(), found


def names(value: str) -> str | list[str]:
    """A name, or several with commas between them."""
    parts = [part.strip() for part in value.split(",")]
    if not all(parts):
        raise ValueError(f"{value!r} is not a name or a list of names such as a,b")
    return parts if len(parts) > 1 else parts[0]


def delimiter(value: str) -> str:
    """What stands between two labels; `\\t` is a tab."""
    if not value:
        raise ValueError("is empty")
    return value.replace("\\t", "\t")


def whole(at_least: int = 0, at_most: int | None = None) -> Kind:
    """A whole number from `at_least` to `at_most`."""

    def read(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a whole number") from None
        if number < at_least:
            raise ValueError(f"must be at least {at_least}, not {number}")
        if at_most is not None and number > at_most:
            raise ValueError(f"must be at most {at_most}, not {number}")
        return number

    return read


def auto_or(kind: Kind) -> Kind:
    """The word `auto`, or what another kind reads."""

    def read(value: str) -> Any:
        if value == AUTO:
            return value
        try:
            return kind(value)
        except ValueError as error:
            hint = did_you_mean(value, [AUTO])
            raise ValueError(f"{error}; {hint}" if hint else str(error)) from None

    return read


def steps(value: str) -> int:
    """A whole number of at least 1, or -1 for no limit."""
    return -1 if value == "-1" else int(whole(1)(value))


def positive(value: str) -> float:
    """A number above 0."""
    number = _number(value)
    if not 0 < number < math.inf:
        raise ValueError(f"must be above 0, not {number:g}")
    return number


def not_negative(value: str) -> float:
    """A number of 0 or more."""
    number = _number(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"must be 0 or more, not {number:g}")
    return number


def positive_share(value: str) -> float:
    """A number above 0 and up to 1."""
    number = _number(value)
    if not 0 < number <= 1:
        raise ValueError(f"must be above 0 and up to 1, not {number:g}")
    return number


def below_one(value: str) -> float:
    """A number from 0 to below 1."""
    number = _number(value)
    if not 0 <= number < 1:
        raise ValueError(f"must be from 0 to below 1, not {number:g}")
    return number


def probability(value: str) -> float:
    """A number from 0 to 1."""
    number = _number(value)
    if not 0 <= number <= 1:
        raise ValueError(f"must be from 0 to 1, not {number:g}")
    return number


def share(value: str) -> float | int:
    """A share above 0 and below 1, or a whole number, of which 0 means none."""
    number = _number(value)
    if 0 < number < 1:
        return number
    if number >= 0 and number.is_integer():
        return int(number)
    raise ValueError(f"must be a share above 0 and below 1, or a number of images (0 for none), not {value}")


def fold(value: str) -> str:
    """Which fold of how many: `2/5`."""
    return _one_of_many(value, "a fold", 2)


def shard(value: str) -> str:
    """Which job of how many: `3/16`."""
    return _one_of_many(value, "a shard", 1)


def _one_of_many(value: str, noun: str, fewest: int) -> str:
    number, slash, count = value.partition("/")
    if not (slash and number.strip().isdecimal() and count.strip().isdecimal()):
        raise ValueError(f"{value!r} is not {noun} such as 2/5")
    if not 1 <= int(number) <= int(count) or int(count) < fewest:
        raise ValueError(f"must be from 1/N to N/N with N of at least {fewest}, not {value}")
    return f"{int(number)}/{int(count)}"


def one_of(words: Sequence[str]) -> Kind:
    """One of a few words; a mistyped one is answered with the nearest."""

    def read(value: str) -> str:
        if value not in words:
            hint = did_you_mean(value, words)
            raise ValueError(f"{value!r} is not one of {', '.join(words)}" + (f"; {hint}" if hint else ""))
        return value

    return read


def magnitude(value: str) -> int:
    """A number above 0 with or without k, M or B for thousands, millions and billions: `500k`, `1.5M`."""
    factors = {"k": 10**3, "m": 10**6, "b": 10**9}
    factor = factors.get(value[-1:].lower(), 1)
    try:
        number = positive(value[:-1] if factor > 1 else value) * factor
    except ValueError:
        raise ValueError(f"{value!r} is not a number above 0 such as 500k or 10M") from None
    return round(number)


def image_size(value: str) -> int | tuple[int, int]:
    """Pixels of a square, or height and width such as `224x192`."""
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{value!r} is not a number of pixels such as 224, or 224x192")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def devices(value: str) -> str | int | list[int]:
    """`auto`, how many (-1: all), or which ones, such as `0,2`."""
    if value == "auto":
        return value
    try:
        numbers = [int(part) for part in value.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if "," in value and numbers and min(numbers) >= 0:
        return numbers
    if len(numbers) == 1 and (numbers[0] > 0 or numbers[0] == -1):
        return numbers[0]
    raise ValueError(f"{value!r} is not auto, a number of devices, or device indices such as 0,2")


def value_range(value: str) -> str | list[float]:
    """`format`, or the lowest and the highest value, such as `0,4095`."""
    if value == "format":
        return value
    ends = [_number(part) for part in value.split(",")]
    if len(ends) != 2 or not -math.inf < ends[0] < ends[1] < math.inf:
        raise ValueError(f"{value!r} is not a lowest and a highest value such as 0,4095")
    return ends


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None
