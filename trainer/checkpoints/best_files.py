"""The checkpoint files of a run that are kept: their ranking, their names, and what becomes of those pushed out."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flashtask.core.checkpoint import read_header
from flashtask.core.errors import IntegrityError, MissingInputError
from flashtask.core.files import atomic_write
from flashtask.trainer.checkpoints.names import versions, versions_of
from flashtask.trainer.metric_order import rank

__all__ = ["BestFiles", "SavedFile", "place_in"]


@dataclass(frozen=True)
class SavedFile:
    """A checkpoint file and what it is ranked by.

    Args:
        score: of the monitored metric; None if there was none, then a newer file is better.
        tie_break: the loss that decides between equal scores.
        epoch: and `step`: where the run stood.
        step: see `epoch`.
        metrics: of that place.
        name: of the file.
    """

    score: float | None
    tie_break: float
    epoch: int
    step: int
    metrics: dict[str, float]
    name: str = ""


class BestFiles:
    """Which files of a folder are kept, best first.

    What `take` changes stands when the file has been written (`keep`), or is taken back (`undo`).

    Args:
        folder: where they are.
        most: how many are kept; -1 for all.
        mode: `max` if a higher score is better, else `min`.
        may_replace: whether a file of this name, which is not among those kept, may be overwritten; None means never.
    """

    def __init__(self, folder: Path, most: int, mode: str, may_replace: Callable[[str], bool] | None = None) -> None:
        self.folder, self.most, self._mode, self._may_replace = folder, most, mode, may_replace
        self.files: list[SavedFile] = []
        #: pushed out; they are removed when what replaces them is safe
        self.leaving: list[SavedFile] = []
        self._before = self.files

    @property
    def best(self) -> SavedFile | None:
        """The best file; one whose score is no number is never it."""
        first = self.files[0] if self.files else None
        return first if first is not None and (first.score is None or math.isfinite(first.score)) else None

    def wants(self, new: SavedFile) -> bool:
        """Whether a file would be kept."""
        return any(file is new for file in self._ranked(new)[0])

    def take(self, new: SavedFile, stem: str, taken: Collection[str]) -> SavedFile:
        """Put a file among those kept, under a free name, or that of a file whose place it takes.

        Args:
            new: a file that is wanted.
            stem: of its name.
            taken: names that others keep.
        """
        stay, leave = self._ranked(new)
        again = versions_of(stem)
        name = next((file.name for file in leave if again.fullmatch(file.name)), None)
        if name is None:
            taken = {*taken, *(file.name for file in self.files)}
            name = next(name for name in versions(stem) if self._is_free(name, taken))
        named = replace(new, name=name)
        self.files = [named if file is new else file for file in stay]
        self.leaving = [file for file in leave if file.name != name]
        return named

    def keep(self) -> None:
        """What was taken has been written."""
        self._before = self.files

    def undo(self) -> None:
        """What was taken has not been written."""
        if self.files is not self._before:
            self.files, self.leaving = self._before, []

    def remove_leaving(self, say: Callable[[str], None]) -> None:
        """Remove the files that were pushed out."""
        for file in self.leaving:
            try:
                (self.folder / file.name).unlink(missing_ok=True)
            except OSError as error:
                say(f"cannot remove {self.folder / file.name}, which is no longer among the best: {error.strerror}")
        self.leaving = []

    def _ranked(self, new: SavedFile) -> tuple[list[SavedFile], list[SavedFile]]:
        """(what stays, best first; what goes) with a new file; of one step there is only the newest."""
        same = [file for file in self.files if file.step == new.step]
        # Of equals the older stays in front, because sorting leaves them in their order.
        ordered = sorted([*(f for f in self.files if f not in same), new], key=self._rank, reverse=True)
        most = len(ordered) if self.most < 0 else self.most
        return ordered[:most], [*same, *(file for file in ordered[most:] if file is not new)]

    def _rank(self, file: SavedFile) -> tuple[float, ...]:
        if file.score is None:
            return 1, file.step, 0
        if not math.isfinite(file.score):
            return 0, file.step, 0
        return 2, *rank(file.score, file.tie_break, self._mode)

    def _is_free(self, name: str, taken: Collection[str]) -> bool:
        if name in taken or not os.path.lexists(self.folder / name):
            return name not in taken
        return self._may_replace is not None and self._may_replace(name)

    # ---- what survives a resume

    def state_dict(self) -> dict[str, Any]:
        """The files that are kept, and those that a kill may leave behind."""
        return {"files": list(map(asdict, self.files)), "leaving": list(map(asdict, self.leaving))}

    def load_state_dict(self, state: dict[str, Any], beside: Path, say: Callable[[str], None]) -> bool:
        """Take back what `state_dict` gave, as far as the files are there.

        Args:
            state: what it gave.
            beside: the folder of the checkpoint that is resumed; files that lie there and not here are copied.
            say: tells the user what is not there.

        Returns:
            Whether some of them lie here already.
        """
        rows = [SavedFile(**row) for row in state["files"]]
        here = [file for file in rows if self._is_there(self.folder, file)]
        self.files = self._before = [file for file in rows if file in here or self._bring(file, beside)]
        lost = [file.name for file in rows if file not in self.files]
        if lost:
            say(f"gone or overwritten since the checkpoint was written, so no longer among the best: {', '.join(lost)}")
        kept = {file.name for file in self.files}
        for file in (SavedFile(**row) for row in state["leaving"]):
            if file.name not in kept and place_in(self.folder / file.name) == (file.epoch, file.step):
                (self.folder / file.name).unlink()  # a kill came between it and what has replaced it
        return bool(here)

    def _bring(self, file: SavedFile, beside: Path) -> bool:
        source = beside / file.name
        if os.path.lexists(self.folder / file.name) or not self._is_there(beside, file):
            return False
        with source.open("rb") as content, atomic_write(self.folder / file.name, size=source.stat().st_size) as copy:
            shutil.copyfileobj(content, copy)
        return True

    def _is_there(self, folder: Path, file: SavedFile) -> bool:
        path = folder / file.name
        # Reading all of very many files would take longer than it is worth: none of them is ever overwritten.
        return path.is_file() if self.most < 0 else place_in(path) == (file.epoch, file.step)


def place_in(path: Path) -> tuple[int, int] | None:
    """(epoch, step) of a checkpoint file; None if there is no whole one."""
    try:
        header = read_header(path)
    except (IntegrityError, MissingInputError):
        return None
    return header.get("epoch", -1), header.get("global_step", -1)
