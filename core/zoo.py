"""The zoo: what zoo.yaml says about providers, backbones, heads, tasks, checkpoints and recipes, checked.

Over the shipped file go the user's own: those that `$FLASHTASK_ZOO` names, then those given to `use_zoo_file`, in
that order. A file in the working folder is never read by itself.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import FlashtaskError, UsageError, did_you_mean
from flashtask.core.files import missing_file
from flashtask.core.yaml_reader import YamlDocument, read_yaml

if TYPE_CHECKING:
    from flashtask.core.zoo_schema import Zoo

__all__ = ["ZooFile", "leave_zoo_file", "load_zoo", "name_is_taken", "nothing_to_replace", "own_file_of"]
__all__ += ["own_zoo_files", "read_zoo", "read_zoo_file", "shipped_zoo", "tell", "use_zoo_file"]

_NAME = re.compile(r"[\w][\w.+-]*")
_used: list[Path] = []


@dataclass(frozen=True)
class ZooFile:
    """One zoo file, read and checked.

    Args:
        path: of the file; None for text.
        zoo: its entries.
        document: its content, which knows where each key stands.
    """

    path: Path | None
    zoo: Zoo
    document: YamlDocument

    def entries(self) -> Iterator[tuple[str, str, Any]]:
        """(section, name, entry) of all that stands in it."""
        for section in type(self.zoo).model_fields:
            for name, entry in getattr(self.zoo, section).items():
                yield section, name, entry

    def error(self, *keys: str, what: str, why: str = "", fix: str = "") -> UsageError:
        """A UsageError that begins with the file, line and column of a key."""
        return self.document.error(keys, what, why=why, fix=fix)


def read_zoo_file(source: Path | str, *, name: str = "") -> ZooFile:
    """Read and check one zoo file (a Path) or its text (a str).

    Raises:
        MissingInputError: there is no such file.
        UsageError: a wrong key, type, value or name; the message has the file, line and column.
    """
    from flashtask.core.zoo_schema import check_zoo_document  # pydantic is not loaded before a zoo is read

    if isinstance(source, Path) and not source.is_file():
        raise missing_file(source)
    document = read_yaml(source, name=name)
    file = ZooFile(source if isinstance(source, Path) else None, check_zoo_document(document), document)
    for section, entry, _ in file.entries():
        if not _NAME.fullmatch(entry):
            why = "a name has letters, digits, `_`, `-` and `.`; what stands before a `/` is a library"
            raise file.error(section, entry, what=f"{section}: {entry!r} is no name for an entry", why=why)
    return file


def read_zoo(source: Path | str, *, name: str = "") -> Zoo:
    """The entries of one zoo file (a Path) or its text (a str); errors as `read_zoo_file`."""
    return read_zoo_file(source, name=name).zoo


def load_zoo() -> Zoo:
    """The zoo that holds now: the shipped file, and over it the user's own; read once.

    Raises:
        MissingInputError, UsageError: a file of the user's is not there, or wrong.
    """
    return _merged(_from_environment(), tuple(_used))[0]


def own_zoo_files() -> list[ZooFile]:
    """The user's own zoo files that are merged over the shipped one, the strongest last."""
    return list(_merged(_from_environment(), tuple(_used))[1])


def own_file_of(section: str, name: str) -> ZooFile | None:
    """The user's own zoo file that an entry comes from; None for a shipped one and for a name that nothing has."""
    return next((file for file in reversed(own_zoo_files()) if name in getattr(file.zoo, section)), None)


def use_zoo_file(path: str | os.PathLike[str]) -> ZooFile:
    """Merge a zoo file of the user's over what there is, for the rest of the process. Once more reads it anew.

    Args:
        path: of the file.

    Raises:
        MissingInputError: there is no such file.
        UsageError: the file is wrong, or it has a name that there is already and does not say `override: true`.
    """
    own = _absolute(path)
    _own.cache_clear()
    _merged.cache_clear()
    if own not in (*_from_environment(), *_used):
        _merged(_from_environment(), (*_used, own))  # an error leaves all as it was
        _used.append(own)
    return next(file for file in own_zoo_files() if file.path == own)


def leave_zoo_file(path: str | os.PathLike[str]) -> None:
    """Take a file that was given to `use_zoo_file` out again; one of `$FLASHTASK_ZOO` stays."""
    if (own := _absolute(path)) in _used:
        _used.remove(own)


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _from_environment() -> tuple[Path, ...]:
    given = os.environ.get("FLASHTASK_ZOO", "")
    return tuple(_absolute(part) for part in given.split(os.pathsep) if part.strip())


@cache
def shipped_zoo() -> Zoo:
    """What flashtask itself ships, without the user's own files."""
    return read_zoo(Path(__file__).parent.parent / "zoo.yaml", name="zoo.yaml")


@cache
def _own(path: Path) -> ZooFile:
    return read_zoo_file(path)


@cache
def tell(text: str) -> None:
    """Print a note on standard error, once in a process."""
    print(f"note: {text}", file=sys.stderr)


@cache
def _merged(environment: tuple[Path, ...], used: tuple[Path, ...]) -> tuple[Zoo, tuple[ZooFile, ...]]:
    """The shipped zoo with files merged over it, and those files. What they replace is told on standard error."""
    files = []
    zoo = shipped_zoo()
    for path in dict.fromkeys((*environment, *used)):
        try:
            file = _own(path)
        except FlashtaskError as error:
            if path in environment:
                error.why = f"{error.why}; FLASHTASK_ZOO names this file".lstrip("; ")
            raise
        zoo = _over(zoo, file)
        files.append(file)
    return zoo, tuple(files)


def _over(zoo: Zoo, file: ZooFile) -> Zoo:
    sections = {section: dict(getattr(zoo, section)) for section in type(zoo).model_fields}
    for section, name, entry in file.entries():
        before = sections[section]
        if name in before and not entry.override:
            raise name_is_taken(file, section, name, "an entry")
        if name in before:
            tell(f"{section}.{name} is replaced by {file.path}")
        elif entry.override and section != "backbones":  # its names are in libraries too: that room looks there
            raise nothing_to_replace(file, section, name, list(before))
        before[name] = entry
    return zoo.model_copy(update=sections)


def name_is_taken(file: ZooFile, section: str, name: str, by: str) -> UsageError:
    """The error for an entry whose name means something already, and that does not say that it replaces it."""
    return file.error(
        section,
        name,
        what=f"{section}.{name}: there is {by} of this name already",
        fix=f"choose another name, or write `override: true` in {section}.{name} to replace it",
    )


def nothing_to_replace(file: ZooFile, section: str, name: str, known: list[str]) -> UsageError:
    """The error for an entry that says `override: true` and replaces nothing."""
    fix = did_you_mean(name, known) or f"leave `override: true` out of {section}.{name}"
    return file.error(section, name, what=f"{section}.{name}: there is nothing of this name to replace", fix=fix)
