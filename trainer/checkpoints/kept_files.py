"""The checkpoint files of a run: how they are named, which are kept, and what the folder they lie in may hold."""

from __future__ import annotations

import math
import os
import re
import shutil
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.checkpoint import read_header
from flashtask.core.errors import IntegrityError, MissingInputError, OutputError, UnknownNameError, UsageError
from flashtask.core.files import PathLike, atomic_write, remove_partials
from flashtask.trainer.metric_order import rank

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["BestFiles", "CheckpointFolder", "NameTemplate", "SavedFile", "is_last_name"]

_SUFFIX = ".ckpt"
#: Characters that separate folders or that some system refuses in a file name.
_NOT_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
#: Values that are whole numbers; every other one is a measurement.
_COUNTED = ("epoch", "step")
#: Bytes of the longest name, less what version numbers and the name of an unfinished file add.
_LONGEST = 240


# ---- names


class NameTemplate:
    """A file name with places for values: `epoch`, `step` and every logged metric, formatted as in Python.

    Args:
        text: the template; the ending `.ckpt` may be left out.
        insert_names: write `epoch=02` for `{epoch:02d}`, else `02`.

    Raises:
        UsageError: it is not a template, or a path, or not a valid file name.
    """

    def __init__(self, text: str, insert_names: bool = True) -> None:
        if not isinstance(text, str):
            raise UsageError(f"filename={text!r}: a text is needed", fix='filename="{epoch:02d}-{val_loss:.2f}"')
        self.text, self._insert_names = text.removesuffix(_SUFFIX), insert_names
        #: (text before, name, format) of each place, and the text behind the last
        self._parts = self._read()
        self._check()

    @property
    def fields(self) -> list[str]:
        """The names of the values that are filled in."""
        return [name for _, name, _ in self._parts if name is not None]

    def fill(self, values: Mapping[str, float], *, is_early: bool = False) -> str:
        """The name without its ending; characters that a name may not have become `_`.

        Args:
            values: `epoch`, `step` and what was measured so far.
            is_early: a metric may not have been measured yet: then it is `nan`.

        Raises:
            UnknownNameError: nothing of a name was logged.
        """
        filled = []
        for before, name, spec in self._parts:
            filled.append(before)
            if name is None:
                continue
            if name not in values and not is_early:
                raise UnknownNameError(f"metric for filename={self.text!r}", name, sorted(values))
            text = self._formatted(name, values.get(name, math.nan), spec)
            filled.append(_NOT_IN_NAMES.sub("_", f"{name}={text}" if self._insert_names else text))
        return "".join(filled)

    def _read(self) -> list[tuple[str, str | None, str]]:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise self._error(str(error), 'filename="{epoch:02d}-{val_loss:.2f}"') from None
        for _, name, spec, conversion in parts:
            if name == "" or conversion or "{" in (spec or ""):
                raise self._error("a place for a value is a name and perhaps a format", 'filename="{val_loss:.2f}"')
        return [(before, name, spec or "") for before, name, spec, _ in parts]

    def _check(self) -> None:
        """Fill the template in once, so that mistakes in it are found before anything is trained."""
        literal = "".join(before for before, _, _ in self._parts)
        if _NOT_IN_NAMES.search(literal) or self.text in ("", ".", "..") or literal.startswith("."):
            raise self._error(
                "it must be a plain file name: no folders, no reserved characters, no dot at the start",
                'dirpath="my/path", filename="{epoch:02d}-{val_loss:.2f}"',
            )
        if any(int(digits) > _LONGEST for _, _, spec in self._parts for digits in re.findall(r"\d+", spec)):
            raise self._error(f"a file name has at most {_LONGEST} bytes", 'filename="{epoch:02d}"')
        if len(os.fsencode(self.fill(dict.fromkeys(self.fields, 0)))) > _LONGEST:
            raise self._error(f"a file name has at most {_LONGEST} bytes", "a shorter one")

    def _formatted(self, name: str, value: float, spec: str) -> str:
        try:
            return format(int(value) if name in _COUNTED else float(value), spec)
        except ValueError as error:
            kind = "whole numbers" if name in _COUNTED else "numbers with a fraction"
            raise self._error(
                f"{{{name}:{spec}}} does not format {kind} ({error})",
                f"{{{name}:{'02d' if name in _COUNTED else '.2f'}}}",
            ) from None

    def _error(self, why: str, fix: str) -> UsageError:
        return UsageError(f"filename={self.text!r} is not a valid name for checkpoints", why=why, fix=fix)


def _versions(stem: str) -> Iterator[str]:
    """`a.ckpt`, `a-v1.ckpt`, `a-v2.ckpt` and so on."""
    yield stem + _SUFFIX
    number = 0
    while True:
        number += 1
        yield f"{stem}-v{number}{_SUFFIX}"


def _is_version_of(stem: str, name: str) -> bool:
    return re.fullmatch(rf"{re.escape(stem)}(-v[1-9]\d*)?{re.escape(_SUFFIX)}", name, re.DOTALL) is not None


def is_last_name(name: str) -> bool:
    """Whether a file name is `last.ckpt` or one of its versions, `last-v1.ckpt` and so on."""
    return _is_version_of("last", name)


# ---- the best files


@dataclass(frozen=True)
class SavedFile:
    """A checkpoint file and what it is ranked by.

    Args:
        score: of the monitored metric; None if nothing is monitored, then a newer file is better.
        tie_break: the loss that decides between equal scores.
        epoch: in which it was written.
        step: after which it was written.
        metrics: of that epoch and step.
        name: of the file.
    """

    score: float | None
    tie_break: float
    epoch: int
    step: int
    metrics: dict[str, float]
    name: str = ""


class BestFiles:
    """The files of a folder that are kept, best first.

    What `take` changes becomes final when the file has been written (`keep`), or is taken back (`undo`).

    Args:
        folder: where they are.
        most: how many are kept; -1 for all.
        mode: `max` if a higher score is better, else `min`.
        may_replace: whether a file of this name, which is not among those kept, may be overwritten; None means never.
    """

    def __init__(self, folder: Path, most: int, mode: str, may_replace: Callable[[str], bool] | None = None) -> None:
        self.folder, self.most, self._mode, self._may_replace = folder, most, mode, may_replace
        self.files: list[SavedFile] = []
        #: pushed out by better ones; they are removed when what replaces them has been written
        self.leaving: list[SavedFile] = []
        self._before = self.files

    @property
    def best(self) -> SavedFile | None:
        """The best file; one with a score of NaN or infinity never is."""
        first = self.files[0] if self.files else None
        return first if first is not None and (first.score is None or math.isfinite(first.score)) else None

    def wants(self, new: SavedFile) -> bool:
        """Whether a file is good enough to be among those kept."""
        return any(file is new for file in self._ranked(new)[0])

    def take(self, new: SavedFile, stem: str, taken: Collection[str]) -> SavedFile:
        """Put a file among those kept, under a free name or the name of a file that it replaces.

        Args:
            new: a file that is wanted.
            stem: of its name.
            taken: names that others keep.
        """
        stay, leave = self._ranked(new)
        name = next((file.name for file in leave if _is_version_of(stem, file.name)), None)
        if name is None:
            taken = {*taken, *(file.name for file in self.files)}
            name = next(name for name in _versions(stem) if self._is_free(name, taken))
        named = replace(new, name=name)
        self.files = [named if file is new else file for file in stay]
        self.leaving = [file for file in leave if file.name != name]
        return named

    def keep(self) -> None:
        """Make final what was taken: it has been written."""
        self._before = self.files

    def undo(self) -> None:
        """Take back what was taken since the last `keep`."""
        if self.files is not self._before:
            self.files, self.leaving = self._before, []

    def remove_leaving(self, say: Callable[[str], None]) -> None:
        """Remove the files that were pushed out; what cannot be removed is reported to `say`."""
        for file in self.leaving:
            try:
                (self.folder / file.name).unlink(missing_ok=True)
            except OSError as error:
                say(f"cannot remove {self.folder / file.name}, which is no longer among the best: {error.strerror}")
        self.leaving = []

    def _ranked(self, new: SavedFile) -> tuple[list[SavedFile], list[SavedFile]]:
        """(what stays, best first; what goes) with a new file; of one step only the newest file is kept."""
        same = [file for file in self.files if file.step == new.step]
        # Sorting is stable, so of equals the older stays in front.
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

    def state_dict(self) -> dict[str, Any]:
        """The files that are kept, and those that a kill may leave behind."""
        return {"files": list(map(asdict, self.files)), "leaving": list(map(asdict, self.leaving))}

    def load_state_dict(self, state: dict[str, Any], beside: Path, say: Callable[[str], None]) -> bool:
        """Take back what `state_dict` gave, as far as the files are still there.

        Args:
            state: what it gave.
            beside: the folder of the checkpoint that is resumed; files that are there and not here are copied.
            say: is given a message about files that are gone.

        Returns:
            Whether some of the files are already in this folder.
        """
        rows = [SavedFile(**row) for row in state["files"]]
        here = [file for file in rows if self._is_in(self.folder, file)]
        self.files = self._before = [file for file in rows if file in here or self._copy_from(beside, file)]
        lost = [file.name for file in rows if file not in self.files]
        if lost:
            say(f"gone or overwritten since the checkpoint was written, so no longer among the best: {', '.join(lost)}")
        kept = {file.name for file in self.files}
        for file in (SavedFile(**row) for row in state["leaving"]):
            if file.name not in kept and _place_in(self.folder / file.name) == (file.epoch, file.step):
                (self.folder / file.name).unlink()  # the run was killed after writing what replaced it
        return bool(here)

    def _copy_from(self, folder: Path, file: SavedFile) -> bool:
        source = folder / file.name
        if os.path.lexists(self.folder / file.name) or not self._is_in(folder, file):
            return False
        with source.open("rb") as content, atomic_write(self.folder / file.name, size=source.stat().st_size) as copy:
            shutil.copyfileobj(content, copy)
        return True

    def _is_in(self, folder: Path, file: SavedFile) -> bool:
        path = folder / file.name
        # Where all files are kept there may be very many, and none is ever overwritten: they need not be read.
        return path.is_file() if self.most < 0 else _place_in(path) == (file.epoch, file.step)


def _place_in(path: Path) -> tuple[int, int] | None:
    """(epoch, step) of a checkpoint file; None if it is missing or damaged."""
    try:
        header = read_header(path)
    except (IntegrityError, MissingInputError):
        return None
    return header.get("epoch", -1), header.get("global_step", -1)


# ---- the folder


class CheckpointFolder:
    """The folder of a fit's checkpoints, and the name of `last.ckpt` in it; it is made if it does not exist.

    A run folder belongs to one run. Any other folder may hold checkpoints of other runs: they are left alone, and
    `last.ckpt` becomes `last-v1.ckpt`.

    Args:
        trainer: whose fit it is.
        dirpath: relative to the trainer's `default_root_dir`; None means the run folder.

    Raises:
        OutputError: it cannot be made.
    """

    def __init__(self, trainer: Trainer, dirpath: PathLike | None) -> None:
        self._run = trainer.current_fit
        self._is_run_folder = dirpath is None
        self.path = Path(trainer.output_dir) if dirpath is None else Path(trainer.default_root_dir, dirpath).absolute()
        if not self._is_run_folder and trainer.is_global_zero:
            self._make()
        #: the file that the fit is continued from
        self.resumed: Path | None = None if self._run.resume_from is None else Path(self._run.resume_from).resolve()
        is_here = self.resumed is not None and self.resumed.parent == self.path.resolve()
        #: the files in it were written by the run that is continued
        self.is_ours = self.resumed is not None and (self._is_run_folder or is_here)
        self._resumed_name = self.resumed.name if self.resumed is not None and is_here else ""
        self.last_name = self._find_last_name()

    def use_last_name(self, name: str) -> None:
        """Keep the name that `last.ckpt` had before the resume, unless another such file is resumed."""
        if self.is_ours and not is_last_name(self._resumed_name):
            self.last_name = name

    def may_replace(self, name: str, *, is_fixed: bool) -> bool:
        """Whether a file that is not among those kept may be overwritten: the resumed run itself wrote it.

        Args:
            name: of the file.
            is_fixed: it is the name of one file with changing content, as `best.ckpt`; any other file must hold the
                epoch and step at which the run is now.
        """
        place = (self._run.epoch, self._run.global_step)
        return self.is_ours and (is_fixed or _place_in(self.path / name) == place)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make the folder {self.path} for checkpoints: {error.strerror}",
                fix='ModelCheckpoint(dirpath="..."), relative to default_root_dir; None means the run folder',
            ) from error
        remove_partials(self.path)

    def _find_last_name(self) -> str:
        if is_last_name(self._resumed_name):
            return self._resumed_name
        if self.is_ours or self._is_run_folder:
            return "last.ckpt"
        return next(name for name in _versions("last") if not os.path.lexists(self.path / name))
