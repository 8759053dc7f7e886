"""`flashtask predict`: a row for each image, in the order of the input, as it is known."""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from flashtask.cli.inputs import checkpoint_source, image_paths
from flashtask.cli.options import PREDICT, given
from flashtask.cli.output import require_writable_file
from flashtask.cli.processes import check_distributed, device_of, launched
from flashtask.cli.rows import WRITERS
from flashtask.cli.shares import Share
from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.files import atomic_write
from flashtask.core.preprocessing import as_value_range

__all__ = ["predict"]

#: Images that one of several processes predicts before the next one's are written.
_CHUNK = 64


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
    check_distributed(params["distributed"])
    checkpoint = checkpoint_source(ckpt)
    paths = image_paths(images)
    if params["output"]:
        require_writable_file(Path(params["output"]))
    options = {key.removeprefix("trainer."): value for key, (_, value) in given(PREDICT, params).items()}
    with launched(options) as strategy:
        _predict(checkpoint, paths, params, options, strategy)


def _predict(
    checkpoint: Path | str, paths: list[str], params: Mapping[str, Any], options: Mapping[str, Any], strategy: Any
) -> None:
    from flashtask.data.decoded_cache import DecodedCache
    from flashtask.tasks.prediction import predictions_of

    share = Share.of(strategy, paths, params["batch_size"] or _CHUNK)
    with redirect_stdout(sys.stderr):
        task = _load(checkpoint, device_of(strategy, options))
        if params["value_range"]:
            task.preprocessing = replace(task.preprocessing, value_range=as_value_range(params["value_range"]))
        cache = DecodedCache()
        bad = _bad_images(share, task.preprocessing, params["on_bad_image"] or "error", cache)
        share = share.without(bad)
    labels = task.labels or tuple(str(number) for number in range(task.num_classes))
    top_k = params["top_k"]
    if top_k and top_k > len(labels):
        raise UsageError(f"--top-k {top_k}: there are {len(labels)} labels", fix=f"--top-k {len(labels)}")
    predictions = predictions_of(task, share.own, params["batch_size"], params["num_workers"], cache=cache)
    rows = share.in_order(predictions)
    if not share.is_first:
        deque(rows, maxlen=0)
        return
    write = WRITERS[params["format"] or "table"]
    with _stream(params["output"]) as stream:
        write(rows, stream, top_k=top_k, paths=share.paths, labels=labels)


def _load(checkpoint: Path | str, device: Any) -> Any:
    from flashtask import load

    task = load(checkpoint)
    if not hasattr(task, "labels"):
        raise UsageError(
            f"{checkpoint} holds a task without labels ({task.name})",
            fix=f'flashtask.load("{checkpoint}").predict("IMAGE") in Python gives its outputs',
        )
    return task.to(device)


def _bad_images(share: Share, preprocessing: Any, on_bad_image: str, cache: Any) -> set[str]:
    """Decode every image, so that all bad ones are named before the first row is written; what has room is kept."""
    from flashtask.data.checks import describe, find_bad_images
    from flashtask.data.transforms import eval_transform

    first = eval_transform(preprocessing).first
    channels, value_range = preprocessing.input_size[0], preprocessing.value_range
    found = find_bad_images(share.own, channels, lambda path: cache.read(first, path), value_range=value_range)
    bad = share.collected(found)
    if bad and on_bad_image == "error":
        raise BadDataError(
            f"{len(bad)} of {len(share.paths)} images cannot be read",
            why="\n    ".join(["nothing was predicted; the files are:", *describe(bad)]),
            fix="replace or remove them, or leave them out with --on-bad-image skip",
        )
    for image in bad:
        print(f"left out {image.path!r}: {image.reason}", file=sys.stderr)
    return {image.path for image in bad}


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
