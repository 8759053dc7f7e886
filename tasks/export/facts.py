"""What an exported file says of itself: labels, thresholds, preprocessing, where its weights come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from flashtask._version import __version__
from flashtask.core.licence_terms import conclusions
from flashtask.tasks import TASKS
from flashtask.tasks.export.outputs import BoxOutputs, LabelOutputs, MaskOutputs, NumberOutputs, Outputs
from flashtask.tasks.licences import noted_licence, parts_of
from flashtask.trainer.wrapping import parameters_by_name

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["facts_of", "weights_digest"]


def facts_of(task: Task, outputs: Outputs, has_preprocessing: bool, licence: str | None) -> dict[str, Any]:
    """The metadata of an export, apart from how it agrees with the task.

    Args:
        task: that is exported.
        outputs: what the file gives.
        has_preprocessing: whether it takes pictures, else normalised inputs.
        licence: of the weights; None if nobody has said.
    """
    facts: dict[str, Any] = {
        "task": TASKS.name_of(type(task)) or type(task).__name__,
        "input": "pictures" if has_preprocessing else "normalised",
        "outputs": {name: ["images", *axes] for name, axes in outputs.axes.items()},
        "preprocessing": task.preprocessing.to_dict(),
        "made_by": f"flashtask {__version__}, torch {version('torch')}",
        "weights_sha256": weights_digest(task),
    }
    names = list(task.output_names(task._head.sizes[1])) if task._head.sizes[1] else []
    if isinstance(outputs, (LabelOutputs, BoxOutputs, MaskOutputs)):
        facts["labels"] = names
    if isinstance(outputs, NumberOutputs):
        facts["names"] = names
    thresholds: torch.Tensor | None = getattr(outputs, "thresholds", None)
    if thresholds is not None:
        facts["thresholds"] = [round(value, 6) for value in thresholds.tolist()]
    points = getattr(task, "operating", None)
    if points is not None:
        facts["temperature"] = points.temperature
    if points is not None and points.decides:
        facts["operating"] = {"thresholds": dict(points.thresholds), "abstain_below": points.abstain_below}
    record = task.licence_record()
    if licence is not None:
        record["weights"] = licence
    if record["weights"] is not None:
        facts["licence"] = record["weights"]
    facts["licences"] = record
    facts["what_follows"] = conclusions(parts_of(record))
    backbone = task.hparams.get("backbone")
    if isinstance(backbone, str) and task.hparams.get("pretrained", True) is not False:
        facts["backbone"] = {"weights": backbone, "licence": noted_licence(backbone) or "not noted"}
    source: Mapping[str, Any] | None = task.pretrained_from
    if source is not None:
        facts["checkpoint"] = {name: value for name, value in source.items() if name != "path"}
    return facts


def weights_digest(task: Task) -> str:
    """A hash of backbone and head, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted({**parameters_by_name(task), **dict(task.named_buffers())}.items()):
        if name.startswith(("backbone.", "head.")):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
