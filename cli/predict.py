"""`flashtask predict`: a row for each image, in the order of the input, as it is known."""

from __future__ import annotations

import codecs
import io
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from flashtask.cli.finished_rows import FinishedRows
from flashtask.cli.input_paths import checkpoint_source, image_inputs
from flashtask.cli.options import PREDICT, given
from flashtask.cli.output import require_creatable, require_writable_file
from flashtask.cli.processes import agreed, check_distributed, device_of, launched
from flashtask.cli.ray_engine import require_ray, results_of_ray
from flashtask.cli.rows import (
    PARQUET,
    ROW_FORMATS,
    WRITERS,
    Columns,
    Row,
    format_of,
    require_parquet,
    row_of,
    write_parquet,
)
from flashtask.cli.shares import Share, part_of
from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.files import atomic_write
from flashtask.core.names import quoted_name
from flashtask.core.preprocessing import as_value_range
from flashtask.data.image_source import IMAGE_LOADERS, loader_of_model
from flashtask.data.layout import is_image_name
from flashtask.tasks.prediction_files import FILE_FORMATS, drawn, output_names

if TYPE_CHECKING:
    from flashtask.data.pictures import Pictures

__all__ = ["predict"]

#: Images that one of several processes predicts before the next one's are written.
_CHUNK = 64
#: How text is encoded where the bytes of file names count.
_KEEP_BYTES = "flashtask-keep-bytes"


def predict(ckpt: str, images: Sequence[str], params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        ckpt: a checkpoint of a task, a run folder, a folder in timm's layout, or an address.
        images: files, folders and addresses, a table, or a folder of shards.
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
    output = _output_of(params["output"], params["shard"])
    form = format_of(params["format"], output)
    checkpoint = checkpoint_source(ckpt)
    pictures = image_inputs(images, params["input"], params["root"], _is_image(checkpoint))
    if form in FILE_FORMATS and not output:
        raise UsageError(f"--format {form} writes files, not rows", fix=f"--format {form} --output OUTPUT")
    if form in FILE_FORMATS and params["on_bad_image"] == "row":
        raise UsageError(f"--format {form} writes files, not rows", fix="--on-bad-image skip")
    if form in FILE_FORMATS and params["shard"]:
        raise UsageError(f"--shard divides rows, and --format {form} writes files", fix="leave out --shard")
    if form == PARQUET:
        require_parquet(output)
    if output and form not in FILE_FORMATS:
        require_writable_file(Path(output))
    for place in (params["draw"], output):
        if place:
            require_creatable(Path(place).absolute().parent)
    on_bad_image = params["on_bad_image"] or ("row" if form == PARQUET else "error")
    own = {**params, "format": form, "output": output, "on_bad_image": on_bad_image, "names": pictures.names}
    pictures = pictures[part_of(len(pictures), params["shard"])]
    options = {key.removeprefix("trainer."): value for key, (_, value) in given(PREDICT, params).items()}
    if params["engine"] == "ray":
        _check_ray(params)
        options = {key: value for key, value in options.items() if key == "precision"}
    with launched(options) as strategy:
        _predict(checkpoint, pictures, own, options, strategy)


def _is_image(checkpoint: Path | str) -> Callable[[str], bool]:
    """Which files of a folder count: those that the model's own function reads, if it has one."""
    if not IMAGE_LOADERS.names():  # then no model has one, and none has to be loaded to know
        return is_image_name
    task = _load(checkpoint, "cpu")
    return is_image_name if task.load_image is None else loader_of_model(task.load_image).is_image


def _check_ray(params: Mapping[str, Any]) -> None:
    """Refuse what Ray decides itself, and require the library."""
    for flag, value in (("--distributed", params["distributed"]), ("--num-nodes", params["num_nodes"])):
        if value:
            raise UsageError("--engine ray starts the processes of a cluster itself", fix=f"leave out {flag}")
    if params["devices"] is not None and not (isinstance(params["devices"], int) and params["devices"] > 0):
        raise UsageError("--engine ray: --devices is the number of actors", fix="--devices 4")
    require_ray()


def _output_of(output: str | None, shard: str | None) -> str | None:
    """The file of this job: `OUT-00003-of-00016.csv` for shard 3/16 of OUT.csv."""
    if output is None or shard is None:
        return output
    number, jobs = map(int, shard.split("/"))
    path = Path(output)
    return str(path.with_name(f"{path.stem}-{number:05d}-of-{jobs:05d}{path.suffix}"))


def _predict(
    checkpoint: Path | str,
    pictures: Pictures,
    params: Mapping[str, Any],
    options: Mapping[str, Any],
    strategy: Any,
) -> None:
    with redirect_stdout(sys.stderr):
        task = _load(checkpoint, device_of(strategy, options))
        if "precision" in options:
            task.default_precision = options["precision"]
        if params["value_range"]:
            task.preprocessing = replace(task.preprocessing, value_range=as_value_range(params["value_range"]))
        pictures, _ = task.read_inputs(pictures)
    columns = _columns(task, pictures, params)
    if params["output"] is None or params["format"] in FILE_FORMATS:
        results = _results(task, pictures, 0, params, strategy)
        if results is None:
            return
        if params["format"] in FILE_FORMATS:
            good = (one for one in results if not _is_left_out(one))
            task.prediction_class.write(params["format"], good, params["output"], _file_names(params))
            return
        rows = (row for one in results if (row := _row(one, params, columns)) is not None)
        with _stream(None, params["format"]) as stream:
            WRITERS[params["format"]](rows, stream, columns)
        return
    _to_file(task, pictures, params, columns, strategy)


def _to_file(task: Any, pictures: Pictures, params: Mapping[str, Any], columns: Columns, strategy: Any) -> None:
    """Write the rows of all pictures to a file, also those that this job had finished when it was stopped."""
    form = params["format"]
    kept = FinishedRows(Path(params["output"]), len(pictures), lambda: _about(task, pictures, params, columns))
    is_first = strategy is None or strategy.is_global_zero
    with kept.claimed() if is_first else nullcontext():
        done = agreed(strategy, lambda: kept.done)
        results = _results(task, pictures, done, params, strategy)
        if results is None:
            return
        kept.gather(_row(one, params, columns) for one in results)
        if form == PARQUET:
            with atomic_write(params["output"]) as file:
                write_parquet(kept, file)
        else:
            with _stream(params["output"], form) as stream:
                WRITERS[form](kept, stream, columns)
        kept.remove()


def _about(task: Any, pictures: Pictures, params: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """What decides the rows of a job, under the names that a message has for it."""
    from flashtask.tasks.export.facts import weights_digest

    return {
        "the model": weights_digest(task),
        "the preprocessing": repr(task.preprocessing),
        "the precision": str(task.default_precision),
        "the images": f"{len(pictures)}, {pictures.digest()}",
        "the columns": [params["format"], list(columns.labels), repr(columns.options)],
        "--on-bad-image": params["on_bad_image"],
    }


def _results(
    task: Any, pictures: Pictures, done: int, params: Mapping[str, Any], strategy: Any
) -> Iterator[Any] | None:
    """What the task says of each picture that is not done, in order; None in a process that does not write.

    A picture that cannot be read is a `BadImage`, unless it is an error; then all of them are in it.
    """
    from flashtask.data.decoded_cache import DecodedCache
    from flashtask.tasks.prediction import predictions_of

    cache = None
    if params["on_bad_image"] == "error":
        with redirect_stdout(sys.stderr):
            cache = DecodedCache()
            _refuse_bad_images(Share.of(strategy, len(pictures), _CHUNK), pictures, task.preprocessing, cache)
    rest = pictures[done:]
    given = {
        "batch_size": params["batch_size"],
        "num_workers": params["num_workers"],
        "keeps_bad": params["on_bad_image"] != "error",
    }
    if params["engine"] == "ray":
        has_gpu = params["accelerator"] in ("gpu", "cuda")
        results = results_of_ray(task.cpu(), rest, given, params["devices"], has_gpu)
    else:
        share = Share.of(strategy, len(rest), params["batch_size"] or _CHUNK)
        results = share.in_order(predictions_of(task, rest.at(share.own), cache=cache, **given))
        if not share.is_first:
            deque(results, maxlen=0)
            return None
    if params["draw"]:
        return drawn(results, rest, _file_names(params), params["draw"])
    return results


def _file_names(params: Mapping[str, Any]) -> dict[str, str]:
    """What files of each image are called; those of other shards count, so that all may be in one folder."""
    return output_names([*map(str, params["names"])])


def _row(result: Any, params: Mapping[str, Any], columns: Columns) -> Row | None:
    """The row of an image; None for one that is left out."""
    from flashtask.data.checks import BadImage

    if params["on_bad_image"] == "row":
        if isinstance(result, BadImage):
            return {"path": result.path, "error": result.reason}
        return {**row_of(result, params["format"], columns), "error": None}
    return None if _is_left_out(result) else row_of(result, params["format"], columns)


def _is_left_out(result: Any) -> bool:
    """Whether an image cannot be read; if so, it is named on stderr."""
    from flashtask.data.checks import BadImage

    if isinstance(result, BadImage):
        print(f"left out {quoted_name(result.path)}: {result.reason}", file=sys.stderr)
    return isinstance(result, BadImage)


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


def _columns(task: Any, pictures: Pictures, params: Mapping[str, Any]) -> Columns:
    """What a row shows, as the task's predictions can and the options ask for.

    Raises:
        UsageError: the predictions do not have what is asked for.
    """
    form = params["format"]
    if form in FILE_FORMATS and form not in task.prediction_class.formats:
        known = ", ".join([*ROW_FORMATS, *task.prediction_class.formats])
        raise UsageError(f"--format {form}: predictions of {task.name} are not such files", fix=f"one of: {known}")
    labels = getattr(task, "labels", None) or tuple(map(str, range(getattr(task, "num_classes", None) or 0)))
    top_k, all_scores = params["top_k"], params["scores"] == "all"
    for flag, option, is_given in (("--top-k", "top_k", top_k), ("--scores all", "all_scores", all_scores)):
        if is_given and option not in task.prediction_class.options:
            raise UsageError(f"{flag}: the predictions of {task.name} have no such scores", fix=f"leave out {flag}")
    if top_k and top_k > len(labels):
        raise UsageError(f"--top-k {top_k}: there are {len(labels)} labels", fix=f"--top-k {len(labels)}")
    options = {"top_k": top_k or None, "all_scores": labels if all_scores else None}
    return Columns(pictures.names, labels, {name: value for name, value in options.items() if value is not None})


def _refuse_bad_images(share: Share, pictures: Pictures, preprocessing: Any, cache: Any) -> None:
    """Decode every image, so that all bad ones are named before the first row is written; what has room is kept.

    Raises:
        BadDataError: some cannot be read.
    """
    from flashtask.data.checks import describe, find_bad_images
    from flashtask.data.transforms import eval_transform

    first = eval_transform(preprocessing).first
    names = [*map(str, pictures.at(share.own).names)]
    found = find_bad_images(
        names,
        preprocessing.input_size[0],
        lambda name: pictures.input(name).read(first, cache),
        value_range=preprocessing.value_range,
    )
    if bad := share.collected(found, pictures.names):
        raise BadDataError(
            f"{len(bad)} of {len(pictures)} images cannot be read",
            why="\n    ".join(["nothing was predicted; the files are:", *describe(bad)]),
            fix="replace or remove them, or leave them out with --on-bad-image skip",
        )


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
