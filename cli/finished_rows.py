"""The finished rows of a prediction that takes long, in part files, from which a job that was stopped continues."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashtask.cli.rows import Row
from flashtask.core.errors import IntegrityError, OutputError
from flashtask.core.files import atomic_write, atomic_write_text
from flashtask.core.names import shown_name
from flashtask.core.plain_json import read_json
from flashtask.trainer.run_folder import RunFolder

__all__ = ["FinishedRows"]

#: A part ends after so many images, or seconds; what is predicted sooner needs no part.
_IMAGES, _SECONDS = 10_000, 30.0
_ABOUT = "job.json"
#: A part is named after the positions of its images.
_PART = re.compile(r"rows-(\d{12})-(\d{12})\.jsonl")


class FinishedRows:
    """The rows of a job, of which those in `OUTPUT.parts` survive a kill.

    A part is written in one step. The file `OUTPUT` is written when all rows are known, and then the parts are removed.

    Args:
        output: the file that the job writes.
        count: of all images.
        about: what decides the rows, as plain values by name; called when it is needed.
    """

    def __init__(self, output: Path, count: int, about: Callable[[], Mapping[str, Any]]) -> None:
        self.folder, self.count = output.with_name(f"{output.name}.parts"), count
        self._output, self._about = output, about
        self._owned: RunFolder | None = None
        self._parts: list[Path] = []
        self._held: list[Row] = []
        #: Images whose rows are in parts.
        self.done = 0

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Take over what a job that was stopped has finished; at the end of the block others may.

        Raises:
            OutputError: another process is working there, or the parts are those of another job.
        """
        try:
            if self.folder.is_dir():
                self._claim()
                self._take_over()
            yield
        finally:
            if self._owned is not None:
                self._owned.release()

    def _claim(self) -> None:
        self._owned = RunFolder(self.folder, resume=True)
        about, place = self._about(), self.folder / _ABOUT
        if not place.exists():
            atomic_write_text(place, json.dumps(about, indent=2) + "\n")
        known = read_json(place, most=2**20)
        if known != about:
            names = [name for name in about if not isinstance(known, dict) or known.get(name) != about[name]]
            raise OutputError(
                f"{self.folder} holds rows of a job that was stopped, and this is another one",
                why=f"what differs: {', '.join(names)}",
                fix=f"repeat the command of that job, or remove them: rm -r {self.folder}",
            )

    def _take_over(self) -> None:
        for path in sorted(self.folder.iterdir()):
            if (found := _PART.fullmatch(path.name)) and int(found[1]) == self.done:
                self._parts.append(path)
                self.done = int(found[2])
            elif found:  # a part before it is gone
                path.unlink()
        if self.done:
            print(f"continuing after {self.done:,} of {self.count:,} images, from {self.folder}", file=sys.stderr)

    def gather(self, rows: Iterable[Row | None]) -> None:
        """Take all rows that are not in parts yet, and keep them as they come.

        Args:
            rows: one for each image that is not done, in order; None for one that is left out.

        Raises:
            OutputError, StorageError: a part cannot be written.
        """
        begun = last = 0.0
        first = stop = self.done
        for row in rows:
            now = time.monotonic()
            begun, last = begun or now, last or now  # not when processes and the model were still starting
            stop += 1
            if row is not None:
                self._held.append(row)
            if (stop - self.done >= _IMAGES or now - last >= _SECONDS) and stop < self.count:
                self._write_part(stop)
                rate = (stop - first) / max(now - begun, 1e-9)
                print(f"{stop:,} of {self.count:,} images, {rate:,.1f} a second", file=sys.stderr)
                last = now

    def _write_part(self, stop: int) -> None:
        if self._owned is None:
            self._claim()
        path = self.folder / f"rows-{self.done:012d}-{stop:012d}.jsonl"
        with atomic_write(path) as file:
            file.writelines(json.dumps(row, default=_plain).encode() + b"\n" for row in self._held)
        self._parts.append(path)
        self._held, self.done = [], stop

    def __iter__(self) -> Iterator[Row]:
        """All rows, in order.

        Raises:
            IntegrityError: a part is damaged.
        """
        for path in self._parts:
            with path.open("rb") as file:
                try:
                    yield from map(json.loads, file)
                except ValueError as error:
                    raise IntegrityError(
                        f"{shown_name(str(path))} is damaged", why=str(error), fix=f"rm {path}, and repeat the command"
                    ) from error
        yield from self._held

    def remove(self) -> None:
        """Remove the parts, when the output is written."""
        if self._owned is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _plain(value: Any) -> Any:
    """A number of NumPy or torch, which a task of the user's may have put into a row."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return os.fspath(value)
