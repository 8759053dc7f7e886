"""A Gradio app around an exported model, as the folder of a Space: it runs where flashtask is not installed."""

from __future__ import annotations

import json
import os
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flashtask._version import __version__
from flashtask.core.atomic_folders import atomic_folder
from flashtask.core.licence_terms import conclusions
from flashtask.tasks.licences import parts_of
from flashtask.tasks.pretrained.timm_layout import CARD, ONNX

if TYPE_CHECKING:
    from flashtask.tasks.export.exporting import Export
    from flashtask.tasks.task import Task

__all__ = ["SPACE_FILES", "write_space"]

#: The version of Gradio that the app was tested with.
_GRADIO = "6.31.0"
_APP, _SCRIPT, _REQUIREMENTS = "app.py", "model.py", "requirements.txt"
SPACE_FILES = (_APP, CARD, ONNX, _SCRIPT, _REQUIREMENTS)


def write_space(task: Task, folder: str | os.PathLike[str], title: str, licence: str | None = None) -> Path:
    """Write the folder of a Space that shows what a task says about images.

    Args:
        task: which `Task.export` can write for ONNX Runtime; the file is compared with it.
        folder: new or empty, or one that was written so before, which is replaced.
        title: of the page.
        licence: of the weights; None for the one that the task has.

    Raises:
        OutputError: the folder holds other things, or cannot be created.
        UsageError, IntegrityError, StorageError: as `Task.export`.
    """
    with atomic_folder(folder, SPACE_FILES) as place:
        made = task.export(place / ONNX, licence=licence)
        record = task.licence_record()
        record["weights"] = licence or record["weights"]
        (place / _APP).write_text(_app(title, record["weights"]), encoding="utf-8")
        needs = ["numpy", f"onnxruntime=={metadata.version('onnxruntime')}", "pillow"]
        (place / _REQUIREMENTS).write_text("\n".join(needs) + "\n", encoding="utf-8")
        (place / CARD).write_text(_card(title, record, made), encoding="utf-8")
    return Path(folder)


def _app(title: str, licence: str | None) -> str:
    template = resources.files("flashtask.tasks.pretrained").joinpath("space_app.txt").read_text(encoding="utf-8")
    description = "Licence of the weights: " + licence if licence else "No licence has been given for the weights."
    for name, text in (("title", title), ("description", description)):
        template = template.replace(f'"{{{name}}}"', json.dumps(text, ensure_ascii=False))
    return template


def _card(title: str, record: dict[str, Any], made: Export) -> str:
    front: dict[str, Any] = {"title": title, "sdk": "gradio", "sdk_version": _GRADIO, "app_file": _APP}
    front |= {"license": record["weights"]} if record["weights"] else {}
    front["tags"] = ["flashtask"]
    parts = [
        f"# {title}",
        f"`{ONNX}` is the whole model with its preprocessing, `{_SCRIPT}` predicts with it: "
        f"`python {_SCRIPT} photo.jpg`. `{_APP}` is the page.",
        "Before it was written, it was compared with the model that was trained:",
        "\n".join(f"- {line}" for line in made.agreement.lines()),
        "What follows from the licences of its parts, as a summary:",
        "\n".join(f"- {line}" for line in conclusions(parts_of(record))),
        f"Made by flashtask {__version__}.",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(parts) + "\n"
