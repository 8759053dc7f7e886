"""From a folder to what a checkpoint would hold of the same task: flashtask's own folders, and those of plain timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from flashtask.backbones.weights import read_weights
from flashtask.core.errors import IntegrityError
from flashtask.core.preprocessing import stored_preprocessing
from flashtask.tasks.pretrained.timm_layout import CONFIG, HEAD, WEIGHTS, flashtask_part, read_config
from flashtask.tasks.pretrained.timm_names import split_classifier
from flashtask.trainer.run_record import PROVENANCE

__all__ = ["folder_content"]


def folder_content(folder: Path) -> dict[str, Any]:
    """What a folder holds, under the names of a checkpoint's content; nothing of it has been built.

    Raises:
        MissingInputError: there is no such folder, or a file is missing in it.
        IntegrityError: a file is damaged or hostile, or the folder is of another format.
    """
    config = read_config(folder)
    part = flashtask_part(config, folder)
    if part is None:
        from flashtask.tasks.pretrained.plain_timm import timm_content

        return timm_content(folder)
    _check_preprocessing(part, folder)
    content = {
        **part["more"],
        "task": part["task"],
        "preprocessing": part["preprocessing"],
        "hyper_parameters": part["hyper_parameters"],
        "hyper_parameters_form": part["hyper_parameters_form"],
        "state_dict": _state(part["weights"], folder),
        **_known(part["provenance"]),
    }
    return content if part["labels"] is None else {**content, "labels": part["labels"]}


def _known(provenance: dict[str, Any] | None) -> dict[str, Any]:
    """What a folder tells of the run that made it; it may have none, or only say where its weights came from."""
    return {key: value for key, value in (provenance or {}).items() if key in PROVENANCE}


def _check_preprocessing(part: dict[str, Any], folder: Path) -> None:
    try:
        stored_preprocessing(part["preprocessing"])
    except IntegrityError as error:
        raise IntegrityError(f"{folder / CONFIG}: flashtask.preprocessing cannot be used: {error.why}") from error


def _state(weights: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """All weights under the task's own names."""
    layout, path = weights.get("timm"), folder / WEIGHTS
    if layout == "none":
        return read_weights(path)
    if layout == "backbone":
        state = {f"backbone.{name}": tensor for name, tensor in read_weights(path).items()}
        head = read_weights(folder / HEAD) if weights.get("head") else {}
        return {**state, **{f"head.{name}": tensor for name, tensor in head.items()}}
    names, prefix = weights.get("classifiers"), weights.get("head_prefix")
    if layout != "whole" or not isinstance(prefix, str) or not _are_names(names):
        raise IntegrityError(f"{folder / CONFIG}: flashtask.weights does not say where the weights are")
    state, weight, bias = split_classifier(read_weights(path), names or [], path)
    own = {f"backbone.{name}": tensor for name, tensor in state.items()}
    own[f"head.{prefix}weight"] = weight
    if bias is not None and weights.get("head_bias"):
        own[f"head.{prefix}bias"] = bias
    return own


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) < 10 and all(isinstance(name, str) for name in value)
