"""`flashtask predict`: a row for each image, in the order of the input, as it is known."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from flashtask.cli.inputs import checkpoint_source, image_paths
from flashtask.cli.output import require_writable_file
from flashtask.cli.rows import WRITERS
from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.files import atomic_write

__all__ = ["predict"]


def predict(ckpt: str, images: Sequence[str], params: Mapping[str, Any]) -> None:
    """Run the command.

    Args:
        ckpt: a checkpoint of a task.
        images: files and folders.
        params: the options of the command.

    Raises:
        MissingInputError: the checkpoint or an input is not there.
        BadDataError: images that cannot be read, all of them named; nothing has been written then.
        OutputError: the output cannot be written.
    """
    checkpoint = checkpoint_source(ckpt)
    paths = image_paths(images)
    if params["output"]:
        require_writable_file(Path(params["output"]))
    from flashtask.data.decoded_cache import DecodedCache
    from flashtask.tasks.prediction import predictions_of

    with redirect_stdout(sys.stderr):
        task = _load(checkpoint, params["accelerator"])
        cache = DecodedCache()
        paths = _readable(paths, task.preprocessing, params["on_bad_image"] or "error", cache)
    labels = task.labels or tuple(str(number) for number in range(task.num_classes))
    top_k = params["top_k"]
    if top_k and top_k > len(labels):
        raise UsageError(f"--top-k {top_k}: there are {len(labels)} labels", fix=f"--top-k {len(labels)}")
    predictions = predictions_of(task, paths, params["batch_size"], params["num_workers"], cache=cache)
    write = WRITERS[params["format"] or "table"]
    with _stream(params["output"]) as stream:
        write(predictions, stream, top_k=top_k, paths=paths, labels=labels)


def _load(checkpoint: Path | str, accelerator: str | None) -> Any:
    from flashtask import load
    from flashtask.trainer.placement.accelerators import resolve_device

    task = load(checkpoint)
    if not hasattr(task, "labels"):
        raise UsageError(
            f"{checkpoint} holds a task without labels ({task.name})",
            fix=f'flashtask.load("{checkpoint}").predict("IMAGE") in Python gives its outputs',
        )
    return task.to(resolve_device(accelerator or "auto"))


def _readable(paths: list[str], preprocessing: Any, on_bad_image: str, cache: Any) -> list[str]:
    """Decode every image, so that all bad ones are named before the first row is written; what has room is kept."""
    from flashtask.data.checks import describe, find_bad_images
    from flashtask.data.transforms import eval_transform

    first = eval_transform(preprocessing).first
    bad = find_bad_images(paths, preprocessing.input_size[0], lambda path: cache.read(first, path))
    if bad and on_bad_image == "error":
        raise BadDataError(
            f"{len(bad)} of {len(paths)} images cannot be read",
            why="\n    ".join(["nothing was predicted; the files are:", *describe(bad)]),
            fix="replace or remove them, or leave them out with --on-bad-image skip",
        )
    for image in bad:
        print(f"left out {image.path!r}: {image.reason}", file=sys.stderr)
    left_out = {image.path for image in bad}
    return [path for path in paths if path not in left_out]


@contextmanager
def _stream(output: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when all rows are in it."""
    if output is None:
        yield sys.stdout
        return
    with atomic_write(output) as file:
        # Names of files need not be UTF-8; their bytes are kept.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield text
        text.flush()
        text.detach()
