"""`flashtask predict`: a row for each image, in the order of the input, as it is known."""

from __future__ import annotations

import codecs
import io
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from flashtask.cli.input_paths import checkpoint_source, image_inputs
from flashtask.cli.options import PREDICT, given
from flashtask.cli.output import require_creatable, require_writable_file
from flashtask.cli.processes import check_distributed, device_of, launched
from flashtask.cli.rows import WRITERS, Columns, format_of
from flashtask.cli.shares import Share
from flashtask.core.errors import BadDataError, HubError, IntegrityError, UsageError
from flashtask.core.files import atomic_write
from flashtask.core.names import quoted_name
from flashtask.core.preprocessing import as_value_range
from flashtask.data.image_source import IMAGE_LOADERS
from flashtask.tasks.prediction_files import FILE_FORMATS, drawn, output_names

if TYPE_CHECKING:
    from flashtask.data.inputs import Input

__all__ = ["predict"]

#: Images that one of several processes predicts before the next one's are written.
_CHUNK = 64
#: How text is encoded where the bytes of file names count.
_KEEP_BYTES = "flashtask-keep-bytes"


def predict(ckpt: str, images: Sequence[str], params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        ckpt: a checkpoint of a task, a run folder, a folder in timm's layout, or an address.
        images: files, folders and addresses.
        params: the options of the command.

    Raises:
        MissingInputError: the checkpoint or an input is not there.
        UsageError: options that contradict each other.
        BadDataError: images that cannot be read, all of them named; nothing has been written then.
        OutputError: the output cannot be written.
    """
    check_distributed(params["distributed"])
    if params["top_k"] and params["scores"] == "all":
        raise UsageError("--top-k and --scores all contradict each other", fix="leave out --top-k")
    form = format_of(params["format"], params["output"])
    checkpoint = checkpoint_source(ckpt)
    # Which files of a folder count depends on the model, if a format of the user's own is registered.
    inputs = None if IMAGE_LOADERS.names() else image_inputs(images)
    if form in FILE_FORMATS and not params["output"]:
        raise UsageError(f"--format {form} writes files, not rows", fix=f"--format {form} --output OUTPUT")
    if params["output"] and form not in FILE_FORMATS:
        require_writable_file(Path(params["output"]))
    for place in (params["draw"], params["output"]):
        if place:
            require_creatable(Path(place).absolute().parent)
    options = {key.removeprefix("trainer."): value for key, (_, value) in given(PREDICT, params).items()}
    with launched(options) as strategy:
        _predict(checkpoint, images, inputs, {**params, "format": form}, options, strategy)


def _predict(
    checkpoint: Path | str,
    images: Sequence[str],
    inputs: Sequence[Input] | None,
    params: Mapping[str, Any],
    options: Mapping[str, Any],
    strategy: Any,
) -> None:
    from flashtask.data.decoded_cache import DecodedCache
    from flashtask.tasks.prediction import predictions_of

    with redirect_stdout(sys.stderr):
        task = _load(checkpoint, device_of(strategy, options))
        if "precision" in options:
            task.default_precision = options["precision"]
        if params["value_range"]:
            task.preprocessing = replace(task.preprocessing, value_range=as_value_range(params["value_range"]))
        inputs = image_inputs(images if inputs is None else inputs, task.read_inputs)
        share = Share.of(strategy, [each.path or each.name for each in inputs], params["batch_size"] or _CHUNK)
        by_path = {each.path or each.name: each for each in inputs}
        cache = DecodedCache()
        bad = _bad_images(share, by_path, task.preprocessing, params["on_bad_image"] or "error", cache)
        share = share.without(bad)
    columns = _columns(task, share.paths, params)
    own = [by_path[path] for path in share.own]
    predictions = predictions_of(task, own, params["batch_size"], params["num_workers"], cache=cache)
    rows = share.in_order(predictions)
    if not share.is_first:
        deque(rows, maxlen=0)
        return
    is_named = params["draw"] or params["format"] in FILE_FORMATS
    names = output_names(share.paths) if is_named else {}
    if params["draw"]:
        rows = drawn(rows, by_path, names, params["draw"])
    if params["format"] in FILE_FORMATS:
        task.prediction_class.write(params["format"], rows, params["output"], names)
        return
    with _stream(params["output"], params["format"]) as stream:
        WRITERS[params["format"]](rows, stream, columns)


def _load(checkpoint: Path | str, device: Any) -> Any:
    from flashtask import load
    from flashtask.tasks.predictions import Prediction

    task = load(checkpoint)
    if task.prediction_class is Prediction:
        raise UsageError(
            f"the predictions of {task.name} in {checkpoint} are tensors, which have no rows",
            fix=f'flashtask.load("{checkpoint}").predict("IMAGE") in Python gives them',
        )
    return task.to(device)


def _columns(task: Any, paths: Sequence[str], params: Mapping[str, Any]) -> Columns:
    """What a row shows, as the task's predictions can and the options ask for.

    Raises:
        UsageError: the predictions do not have what is asked for.
    """
    form = params["format"]
    if form in FILE_FORMATS and form not in task.prediction_class.formats:
        known = ", ".join([*WRITERS, *task.prediction_class.formats])
        raise UsageError(f"--format {form}: predictions of {task.name} are not such files", fix=f"one of: {known}")
    labels = getattr(task, "labels", None) or tuple(map(str, range(getattr(task, "num_classes", None) or 0)))
    top_k, all_scores = params["top_k"], params["scores"] == "all"
    for flag, option, is_given in (("--top-k", "top_k", top_k), ("--scores all", "all_scores", all_scores)):
        if is_given and option not in task.prediction_class.options:
            raise UsageError(f"{flag}: the predictions of {task.name} have no such scores", fix=f"leave out {flag}")
    if top_k and top_k > len(labels):
        raise UsageError(f"--top-k {top_k}: there are {len(labels)} labels", fix=f"--top-k {len(labels)}")
    options = {"top_k": top_k or None, "all_scores": labels if all_scores else None}
    return Columns(paths, labels, {name: value for name, value in options.items() if value is not None})


def _bad_images(
    share: Share, inputs: Mapping[str, Input], preprocessing: Any, on_bad_image: str, cache: Any
) -> set[str]:
    """Decode every image, so that all bad ones are named before the first row is written; what has room is kept."""
    from flashtask.data.checks import describe, find_bad_images
    from flashtask.data.transforms import eval_transform

    first = eval_transform(preprocessing).first

    def read(path: str) -> None:
        try:
            inputs[path].read(first, cache)
        except (HubError, IntegrityError) as error:  # an address that cannot be had
            if on_bad_image == "error":
                raise
            raise BadDataError(error.what, why=f"{error.what}: {error.why}" if error.why else error.what) from error

    found = find_bad_images(share.own, preprocessing.input_size[0], read, value_range=preprocessing.value_range)
    bad = share.collected(found)
    if bad and on_bad_image == "error":
        raise BadDataError(
            f"{len(bad)} of {len(share.paths)} images cannot be read",
            why="\n    ".join(["nothing was predicted; the files are:", *describe(bad)]),
            fix="replace or remove them, or leave them out with --on-bad-image skip",
        )
    for image in bad:
        print(f"left out {quoted_name(image.path)}: {image.reason}", file=sys.stderr)
    return {image.path for image in bad}


@contextmanager
def _stream(output: str | None, form: str) -> Iterator[TextIO]:
    """Standard output, or a file that appears when all rows are in it; in CSV names keep bytes that are not UTF-8."""
    codecs.register_error(_KEEP_BYTES, _byte_or_escape)
    if output is None:
        before = getattr(sys.stdout, "errors", None)
        if form == "csv" and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=_KEEP_BYTES)
        try:
            yield sys.stdout
        finally:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors=before)
        return
    with atomic_write(output) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors=_KEEP_BYTES, newline="")
        yield text
        text.flush()
        text.detach()


def _byte_or_escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """For a character that cannot be encoded: the byte that it stands for in the name of a file, else an escape."""
    assert isinstance(error, UnicodeEncodeError)
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:
        return bytes([code - 0xDC00]), error.start + 1
    return codecs.backslashreplace_errors(error)
