"""`Task.export`: a task as a file for another runtime, which is written only if it gives what the task gives."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashtask.core.errors import FlashtaskError, IntegrityError, OutputError, UnknownNameError, UsageError
from flashtask.core.files import atomic_write_text
from flashtask.tasks.export.comparing import Agreement, Reference
from flashtask.tasks.export.facts import facts_of
from flashtask.tasks.export.graph import ExportGraph
from flashtask.tasks.export.onnx_file import OnnxFile, require_onnx
from flashtask.tasks.export.openvino_file import OpenVinoFile, require_openvino
from flashtask.tasks.export.torch_file import TorchFile

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["DYNAMIC", "ENDINGS", "MOST_LOST", "QUANTIZATIONS", "Export", "export_task"]

#: The formats, and how their files end.
ENDINGS: Mapping[str, str] = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}
#: What `dynamic` may name: how many pictures there are, and how large they are.
DYNAMIC = ("batch", "size")
QUANTIZATIONS = ("int8",)
#: How much of the metric quantization may cost: half a point.
MOST_LOST = 0.005
#: How far apart scores in float32 may be although the labels are the same.
_MOST_APART = 0.01
#: Images by which the ranges of activations are found, at the most.
_CALIBRATED = 128

_Made = OnnxFile | TorchFile | OpenVinoFile


@dataclass(frozen=True)
class Export:
    """A file that was written.

    Args:
        path: of it.
        script: the reference script beside it; None for formats that have none.
        agreement: how it compares with the task.
        as_float: layers that quantization left as they are, because the metric would have lost too much.
    """

    path: Path
    script: Path | None
    agreement: Agreement
    as_float: tuple[str, ...] = ()


def export_task(
    task: Task,
    path: str | os.PathLike[str],
    *,
    form: str = "onnx",
    dynamic: Sequence[str] | None = None,
    quantize: str | None = None,
    preprocessing: bool = True,
    data: Any = None,
    max_loss: float = MOST_LOST,
    licence: str | None = None,
    overwrite: bool = False,
) -> Export:
    """What `Task.export` does; the arguments are those.

    Raises:
        UsageError, OutputError, IntegrityError, StorageError: as there.
    """
    axes = _checked(task, form, dynamic, quantize, preprocessing, data, max_loss)
    target = Path(path).expanduser()
    script = target.with_suffix(".py") if form == "onnx" else None
    _require_free([target, script, target.with_suffix(".bin") if form == "openvino" else None], overwrite)
    if script is not None:
        _require_own_script(script)
    if form == "openvino":
        require_openvino()
    if form != "torch":
        require_onnx()
    outputs = task.export_outputs()
    made, reference = _in_eval_mode(task, outputs, axes, form, preprocessing, data)
    agreement = reference.compared(made.run, made.num_threads)
    kept: tuple[str, ...] = ()
    _require_same(agreement)
    if quantize is not None:
        assert not isinstance(made, TorchFile)
        made, agreement, kept = _quantized(made, reference, max_loss)
    facts = facts_of(task, outputs, preprocessing, licence)
    facts["agreement"] = agreement.to_dict()
    if quantize is not None:
        facts["quantization"] = {"kind": quantize, "as_float": list(kept)}
    made.write(target, facts)
    if script is not None:
        # Read, not imported: it needs ONNX Runtime.
        atomic_write_text(script, Path(__file__).with_name("reference_script.py").read_text(encoding="utf-8"))
    return Export(target, script, agreement, kept)


def _checked(
    task: Task,
    form: str,
    dynamic: Sequence[str] | None,
    quantize: str | None,
    preprocessing: bool,
    data: Any,
    max_loss: float,
) -> tuple[str, ...]:
    """The axes that may have any length.

    Raises:
        UsageError: arguments that contradict each other.
        UnknownNameError: a name that does not exist.
    """
    if form not in ENDINGS:
        raise UnknownNameError("format", str(form), ENDINGS)
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise UnknownNameError("quantization", str(quantize), QUANTIZATIONS)
    axes = (DYNAMIC if preprocessing else ("batch",)) if dynamic is None else tuple(dynamic)
    for name in axes:
        if name not in DYNAMIC:
            raise UnknownNameError("axis", str(name), DYNAMIC)
    if "size" in axes and not preprocessing:
        raise UsageError(
            "dynamic: `size` is that of pictures, and without preprocessing the input has the size of the model",
            fix='dynamic=["batch"]',
        )
    if quantize is not None and form == "torch":
        raise UsageError(
            f"quantize={quantize!r} is for the formats onnx and openvino, not for torch", fix="leave out quantize"
        )
    if quantize is not None and data is None:
        raise UsageError(
            f"quantize={quantize!r} needs data: images for the ranges of activations, and for the metric",
            fix="data=DATA, with validation images",
        )
    if not 0 <= max_loss <= 1:
        raise UsageError(f"max_loss must be from 0 to 1, not {max_loss!r}")
    if task.preprocessing.crop_mode == "tile":
        raise UsageError(
            "images are cut into tiles, which is not part of an exported model",
            fix='export a model with resize="pad", or predict with flashtask',
        )
    if task.head is None and task._head.kind is not None:
        raise UsageError(
            f"{type(task).__name__} does not know yet how many outputs its head has",
            fix="train it, or give num_classes",
        )
    return axes


def _require_free(paths: Iterable[Path | None], overwrite: bool) -> None:
    for path in paths:
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise OutputError(f"cannot write {str(path)!r}: there is no such folder", fix=f"mkdir -p {path.parent}")
        if path.is_dir() or (os.path.lexists(path) and not overwrite):
            what = "a folder" if path.is_dir() else "there is such a file"
            raise OutputError(f"cannot write {str(path)!r}: {what}", fix="another path, or overwrite=True")


def _require_own_script(script: Path) -> None:
    """A script beside the file is replaced only if an export has written it: its name may be that of another one.

    Raises:
        OutputError: it is another one.
    """
    if not script.exists():
        return
    first = Path(__file__).with_name("reference_script.py").read_text(encoding="utf-8").partition("\n")[0]
    with script.open("rb") as file:
        is_own = file.readline(len(first) + 2).rstrip(b"\r\n") == first.encode()
    if not is_own:
        raise OutputError(
            f"cannot write {str(script)!r}: the file of this name was not written by an export",
            fix=f"another path than {str(script.with_suffix('.onnx'))!r}, or move the script away",
        )


def _in_eval_mode(
    task: Task, outputs: Any, axes: Sequence[str], form: str, preprocessing: bool, data: Any
) -> tuple[_Made, Reference]:
    """The model in its format, and what the task itself gives; the task is left as it was."""
    device = task.device
    modes = [(part, part.training) for part in task.modules()]
    try:
        task.cpu().eval()
        if data is not None:
            task.connect(data)
            data.prepare_data()
            data.setup("validate")
            task.data_is_set_up(data)
        reference = Reference(task, outputs, data, "size" not in axes, has_preprocessing=preprocessing)
        # The first time that OpenVINO 2026.4 computes a graph with `If`, its scores are wrong.
        graph = ExportGraph(task, outputs, preprocessing, may_branch=form != "openvino").eval()
        program = _program(graph, task, axes, preprocessing, reference.size)
    finally:
        task.to(device)
        for part, mode in modes:
            part.training = mode
    if form == "torch":
        return TorchFile(program, list(outputs.axes)), reference
    made = OnnxFile.of_program(program, _names(axes), outputs.axes)
    return (OpenVinoFile(made) if form == "openvino" else made), reference


def _names(axes: Sequence[str]) -> dict[int, str]:
    """Axis of the input -> its name, of those that may have any length."""
    return ({0: "batch"} if "batch" in axes else {}) | ({1: "height", 2: "width"} if "size" in axes else {})


def _program(
    graph: ExportGraph, task: Task, axes: Sequence[str], preprocessing: bool, size: tuple[int, int] | None
) -> torch.export.ExportedProgram:
    """The graph that `torch.export` finds.

    Raises:
        UsageError: it cannot follow the network, with its reason.
    """
    channels, *sides = task.preprocessing.input_size
    height, width = size or sides
    count = 2 if "batch" in axes else 1
    if "size" in axes:
        height, width = height + 56, width + 77  # of no meaning, but different from each other and from the input
    shape = (count, height, width, channels) if preprocessing else (count, channels, height, width)
    example = torch.zeros(shape, dtype=torch.uint8 if preprocessing else torch.float32)
    lengths = {axis: torch.export.Dim(name) for axis, name in _names(axes).items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(graph, (example,), dynamic_shapes=(lengths,))
        except FlashtaskError:
            raise
        except Exception as error:
            raise UsageError(
                f"torch.export cannot follow {type(task).__name__} on {task.hparams.get('backbone')}",
                why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
                fix="dynamic=[], or another backbone; some networks choose by the values or sizes of their inputs",
            ) from error


def _require_same(agreement: Agreement) -> None:
    if agreement.differing:
        raise IntegrityError(
            f"the exported model gives other results than the task: {agreement.differing} of {agreement.images} differ",
            why=f"the largest difference is {agreement.largest:.3g} ({agreement.unit}); nothing was written",
        )
    if agreement.unit == "score" and agreement.largest > _MOST_APART:
        raise IntegrityError(
            f"the exported model gives other scores than the task: the largest difference is {agreement.largest:.3g}",
            why=f"no label of {agreement.images} differs, but rounding explains no more than {_MOST_APART:g}; "
            "nothing was written",
        )


def _quantized(
    made: OnnxFile | OpenVinoFile, reference: Reference, max_loss: float
) -> tuple[OnnxFile | OpenVinoFile, Agreement, tuple[str, ...]]:
    """The quantized model with as many layers as the metric allows: the first and the last go back to float first.

    Raises:
        IntegrityError: the metric loses too much even with half of the layers in float.
        UsageError: the task has no metric.
    """
    if reference.metric is None:
        raise UsageError("int8 cannot be checked, because this task has no metric", fix="leave out quantize")
    pictures = reference.pictures
    chosen = pictures[:: max(1, len(pictures) // _CALIBRATED)][:_CALIBRATED]

    def samples() -> Iterator[np.ndarray[Any, Any]]:
        for one in chosen:
            yield reference.picture(one)[0][None] if reference.has_preprocessing else reference.inputs(one)

    tried: list[Agreement] = []
    count = 0
    while count <= len(made.layers) // 2:
        ends = (made.layers[: -(-count // 2)], made.layers[len(made.layers) - count // 2 :])
        kept = (*ends[0], *ends[1])
        found = made.quantized(samples(), kept)
        agreement = reference.compared(found.run, found.num_threads)
        if agreement.loss_of_metric <= max_loss:
            return found, agreement, kept
        tried.append(agreement)
        count = max(2, 2 * count)
    best = min(tried, key=lambda one: one.loss_of_metric)
    raise IntegrityError(
        f"int8 costs more of {best.metric} than {max_loss:g}: {best.theirs:.4f} in place of {best.ours:.4f}",
        why="also with half of the layers in float; nothing was written",
        fix=f"a larger max_loss ({best.loss_of_metric:.3f} was the best), or no quantization",
    )
