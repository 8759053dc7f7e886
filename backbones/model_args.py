"""Arguments for timm's builders that come from a file: plain, of modest size, and none that reads anything."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from flashtask.core.errors import UsageError

__all__ = ["REFUSED_ARGS", "check_model_args", "parts_of"]

#: What reads a file or an address, swaps code, or makes another kind of model.
REFUSED_ARGS = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
        *("pretrained_model_args", "checkpoint_path", "cache_dir", "file", "url", "state_dict", "source"),
        *("hf_hub_id", "hf_hub_filename", "custom_load", "features_only", "out_indices", "feature_cls", "feature_cfg"),
        *("model_cls", "model_cfg", "cfg", "variant", "model_name", "kwargs_filter", "pruned", "weights"),
        *("scriptable", "exportable", "no_jit", "args", "kwargs"),
    )
)
_MAX_BLOCKS = 2_000  # the deepest model of timm has some hundred
_MAX_SIZE = 65_536
_ABOUT_DEPTH = re.compile(r"depth|layers|blocks|repeat|num_stages|num_heads")


def check_model_args(values: Any) -> dict[str, Any]:
    """Arguments for timm's builder that come from a file: plain values of modest size, none that reads anything.

    Raises:
        UsageError: there are others.
    """
    if not isinstance(values, Mapping) or len(values) > 100:
        raise UsageError("model_args is no table of at most 100 arguments")
    for name, value in values.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,60}", name):
            raise UsageError(f"model_args has the key {str(name)[:60]!r}, which is no name of an argument")
        if name in REFUSED_ARGS:
            raise UsageError(f"model_args has {name!r}, which is not for a file to say")
        _check_size(name, value)
    return dict(values)


def parts_of(value: Any) -> Iterator[Any]:
    """What a table or list holds; nothing for other values."""
    return iter(value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ())


def _check_size(name: str, value: Any, depth: int = 0) -> None:
    """Numbers, texts and short lists of them; what counts blocks stays below what any model has."""
    if depth > 5:
        raise UsageError(f"model_args: {name} is nested too deeply")
    if isinstance(value, dict | list | tuple):
        parts = list(parts_of(value))
        if len(parts) > 1_000 or (isinstance(value, dict) and not all(len(key) <= 60 for key in value)):
            raise UsageError(f"model_args: {name} has too many parts")
        for part in parts:
            _check_size(name, part, depth + 1)
    elif isinstance(value, str):
        if len(value) > 200 or "/" in value or "\\" in value or ":" in value:
            raise UsageError(f"model_args: {name} is a text that no argument needs: {value[:60]!r}")
    elif value is not None and not isinstance(value, bool | int | float):
        raise UsageError(f"model_args: {name} is a {type(value).__name__}")
    elif value is not None and abs(value) > _MAX_SIZE:
        raise UsageError(f"model_args: {name} = {str(value)[:40]} is out of all proportion")
    if depth == 0 and _ABOUT_DEPTH.search(name) and sum(_numbers(value)) > _MAX_BLOCKS:
        raise UsageError(f"model_args: {name} makes more than {_MAX_BLOCKS:,} blocks")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield abs(value)
    for part in parts_of(value):
        yield from _numbers(part)
