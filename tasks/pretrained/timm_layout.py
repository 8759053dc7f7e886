"""The files of a folder, and `config.json`: written plainly, read as something a stranger may have made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from flashtask.core.errors import IntegrityError, MissingInputError, UsageError
from flashtask.core.files import missing_file
from flashtask.core.foreign_config import read_foreign_config

__all__ = [
    "CARD",
    "CONFIG",
    "FILES",
    "FORMAT",
    "HEAD",
    "ONNX",
    "WEIGHTS",
    "config_text",
    "flashtask_part",
    "is_pretrained_folder",
    "plain",
    "read_config",
]

FORMAT = 1
CONFIG, WEIGHTS, HEAD, CARD = "config.json", "model.safetensors", "head.safetensors", "README.md"
#: The whole model for other runtimes, where it was asked for; flashtask itself does not read it.
ONNX = "model.onnx"
#: All that a folder of flashtask's may hold.
FILES = (CONFIG, WEIGHTS, HEAD, CARD, ONNX)

#: The keys of the part `flashtask`, with what each must be.
_PART: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "version": (str,),
    "task": (str,),
    "hyper_parameters": (dict,),
    "hyper_parameters_form": (dict, type(None)),
    "labels": (list, type(None)),
    "preprocessing": (dict,),
    "more": (dict,),
    "weights": (dict,),
    "provenance": (dict, type(None)),
}


def plain(value: Any, where: str = "hyper_parameters") -> Any:
    """A value as JSON holds it: tuples become lists.

    Raises:
        UsageError: a value or a key that JSON cannot hold, with its place.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise UsageError(f"{where} has the key {key!r}, and config.json holds text as keys only")
        return {key: plain(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, f"{where}[{index}]") for index, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} is {value}, which config.json cannot hold")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UsageError(f"{where} is a {type(value).__name__}, which config.json cannot hold")


def config_text(config: dict[str, Any]) -> str:
    """The text of `config.json`."""
    return json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def is_pretrained_folder(path: Any) -> bool:
    """Whether a path is a folder with a `config.json`."""
    return Path(path).is_dir() and (Path(path) / CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`, of flashtask's or of plain timm's.

    Raises:
        MissingInputError: there is no such file.
        IntegrityError: it is too large, not plain JSON, or asks for code to be run.
    """
    path = folder / CONFIG
    if not path.is_file():
        if folder.is_dir():
            raise MissingInputError(
                f"{folder} holds no {CONFIG}, so it is not a pretrained model",
                fix=f"model.save_pretrained({str(folder)!r}) writes one; a run folder's model is its best.ckpt",
            )
        raise missing_file(path)
    return read_foreign_config(path)


def flashtask_part(config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The checked part `flashtask` of a config, None for a plain timm repository.

    Raises:
        IntegrityError: another format number, an unknown or missing key, or a value of another type.
    """
    if "flashtask" not in config:
        return None
    part, path = config["flashtask"], folder / CONFIG
    if not isinstance(part, dict) or type(part.get("format")) is not int:
        raise IntegrityError(f"{path}: its part `flashtask` has no format number")
    if part["format"] != FORMAT:
        raise IntegrityError(
            f"{path} was written in format {part['format']}, and this flashtask reads {FORMAT}",
            fix="pip install --upgrade flashtask",
        )
    for key in sorted(part.keys() | _PART.keys()):
        if key not in _PART or key not in part:
            raise IntegrityError(
                f"{path}: its part `flashtask` has {'no' if key in _PART else 'an unknown'} key {key!r}"
            )
        if not isinstance(part[key], _PART[key]):
            raise IntegrityError(f"{path}: flashtask.{key} is a {type(part[key]).__name__}")
    labels = part["labels"]
    if labels is not None and (not all(isinstance(name, str) for name in labels) or len(set(labels)) != len(labels)):
        raise IntegrityError(f"{path}: flashtask.labels are not different names")
    return part
