"""`flashtask export`: a trained model as a file for ONNX Runtime, torch.export or OpenVINO."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from flashtask.cli.evaluate import data_source, data_to_judge
from flashtask.cli.input_paths import checkpoint_source
from flashtask.core.errors import UsageError

__all__ = ["export"]

_FORMATS = {".onnx": "onnx", ".pt2": "torch", ".xml": "openvino"}


def export(ckpt: str, params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        ckpt: a checkpoint of a task, a run folder, a folder in timm's layout, or an address.
        params: the options of the command.

    Raises:
        MissingInputError: the checkpoint or the data is not there.
        UsageError: options that contradict each other.
        OutputError: the file is there already, or its folder is not.
        IntegrityError: the exported model does not give the results of the checkpoint.
    """
    checkpoint = checkpoint_source(ckpt)
    form, output = _place(checkpoint, params["format"], params["output"])
    dynamic = params["dynamic"]
    names = None if dynamic is None else [] if dynamic == "none" else [dynamic] if isinstance(dynamic, str) else dynamic
    source = None if params["data"] is None else data_source(params["data"], "val", {})[0]
    with redirect_stdout(sys.stderr):
        from flashtask import load

        task = load(checkpoint)
        data = None if source is None else data_to_judge(task, source, "val", {})
        made = task.export(
            output,
            format=form,
            dynamic=names,
            quantize=params["quantize"],
            preprocessing=not params["no_preprocessing"],
            data=data,
            **({} if params["max_loss"] is None else {"max_loss": params["max_loss"]}),
            licence=params["licence"],
            overwrite=params["overwrite"],
        )
    if params["json"]:
        found = {"path": str(made.path), "script": made.script and str(made.script), **made.agreement.to_dict()}
        click.echo(json.dumps(found))
        return
    click.echo(f"written: {made.path} ({os.path.getsize(made.path) / 1e6:.1f} MB)")
    for line in made.agreement.lines():
        click.echo(line)
    if made.as_float:
        click.echo(f"layers in float, because the metric would have lost too much: {len(made.as_float)}")
    if made.script is not None:
        click.echo(f"next: python {made.script} IMAGE")
    if form == "openvino":
        settings = '{"INFERENCE_PRECISION_HINT": "f32"}'
        click.echo("On a CPU with bfloat16, OpenVINO rounds and labels differ. For float32:")
        click.echo(f'openvino.Core().compile_model("{made.path}", "CPU", {settings})')


def _place(checkpoint: Path | str, form: str | None, output: str | None) -> tuple[str, Path]:
    """The format, and where the file goes: as it was asked for, else beside the checkpoint.

    Raises:
        UsageError: the ending of the file is that of another format, or of none.
    """
    ending = None if output is None else Path(output).suffix
    form = form or _FORMATS.get(ending or ".onnx")
    endings = {name: one for one, name in _FORMATS.items()}
    if form is None or (ending is not None and ending != endings[form]):
        wanted = " or ".join(_FORMATS) if form is None else f"{endings[form]} for --format {form}"
        raise UsageError(f"--output {output}: the file must end in {wanted}")
    if output is not None:
        return form, Path(output)
    if isinstance(checkpoint, Path):
        return form, checkpoint.with_suffix(
            endings[form]
        ) if checkpoint.is_file() else checkpoint / f"model{endings[form]}"
    return form, Path(f"{checkpoint.rpartition('/')[2].partition('@')[0]}{endings[form]}")
