"""The zoo: what zoo.yaml says about providers, backbones, heads, tasks, checkpoints and recipes, checked."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flashtask.core.errors import did_you_mean
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.yaml_reader import read_yaml

if TYPE_CHECKING:
    from flashtask.core.zoo_schema import Zoo

__all__ = ["load_zoo", "read_zoo"]


def read_zoo(source: Path | str, *, name: str = "") -> Zoo:
    """Read and check one zoo file (a Path) or its text (a str).

    Raises:
        UsageError: a wrong key, type or value; the message has the file, line and column.
    """
    from flashtask.core.schema import check_document  # pydantic is not loaded before a zoo is read
    from flashtask.core.zoo_schema import Zoo

    document = read_yaml(source, name=name)
    zoo = check_document(document, Zoo)
    known = Preprocessing.__dataclass_fields__
    for key, own in zoo.backbones.items():
        for field in own.preprocessing:
            path = ("backbones", key, "preprocessing", field)
            if field not in known:
                raise document.error(path, f"there is no key {'.'.join(path)!r}", fix=did_you_mean(field, known))
    return zoo


@cache
def load_zoo() -> Zoo:
    """The zoo that flashtask ships, read once."""
    return read_zoo(Path(__file__).parent.parent / "zoo.yaml", name="zoo.yaml")
