"""The zoo: what zoo.yaml holds about providers, backbones, heads, tasks, checkpoints and recipes, checked.

The user's own files are merged over the shipped one: those that `$FLASHTASK_ZOO` names, then those given to
`use_zoo_file`, in that order. A file in the working folder is never read by itself. Names that need code are checked
by the rooms that have it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import FlashtaskError, UsageError, did_you_mean
from flashtask.core.files import missing_file
from flashtask.core.registry import RegistryEntry, imported
from flashtask.core.yaml_reader import YamlDocument, read_yaml

if TYPE_CHECKING:
    from flashtask.core.zoo_schema import Zoo

__all__ = ["ShippedSource", "ZooFile", "load_zoo", "name_is_taken", "nothing_to_replace", "own_file_of"]
__all__ += ["own_zoo_files", "read_zoo_file", "shipped_zoo", "tell", "use_zoo_file"]

_used: list[Path] = []


@dataclass(frozen=True, eq=False)
class ZooFile(YamlDocument):
    """One zoo file, read and checked.

    Args:
        path: of the file; None for text.
        zoo: its entries.
    """

    path: Path | None
    zoo: Zoo

    def entries(self) -> Iterator[tuple[str, str, Any]]:
        """(section, name, entry) of every entry."""
        for section in type(self.zoo).model_fields:
            for name, entry in getattr(self.zoo, section).items():
                yield section, name, entry

    @contextmanager
    def at(self, *keys: str) -> Iterator[None]:
        """Let a UsageError that is raised in the block begin with the file, line and column of a key, and the key."""
        try:
            yield
        except UsageError as error:
            what = f"{'.'.join(keys)}: {error.what}"
            raise self.error(*keys, what=what, why=error.why, fix=error.fix) from error


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
    path = source if isinstance(source, Path) else None
    return ZooFile(**vars(document), path=path, zoo=check_zoo_document(document))


def load_zoo() -> Zoo:
    """The entries of the shipped file with the user's own merged over them; each file is read once.

    Raises:
        MissingInputError, UsageError: a file of the user's is missing or wrong.
    """
    return _merged(_from_environment(), tuple(_used))[0]


def own_zoo_files() -> list[ZooFile]:
    """The user's own zoo files, in the order in which they are merged over the shipped one."""
    return list(_merged(_from_environment(), tuple(_used))[1])


def own_file_of(section: str, name: str) -> ZooFile | None:
    """The user's zoo file that an entry comes from; None for a shipped entry and for an unknown name."""
    return next((file for file in reversed(own_zoo_files()) if name in getattr(file.zoo, section)), None)


def use_zoo_file(path: str | os.PathLike[str], check: Callable[[], None] = lambda: None) -> ZooFile:
    """Merge a zoo file of the user's over the others, for the rest of the process; a file in use is read again.

    Args:
        path: of the file.
        check: called with the file in use; if it raises, the file is not used.

    Raises:
        MissingInputError: there is no such file.
        UsageError: the file is wrong, or replaces a name without `override: true`.
    """
    own = _absolute(path)
    _merged.cache_clear()
    before = list(_used)
    if own not in (*_from_environment(), *_used):
        _used.append(own)
    try:
        files = own_zoo_files()
        check()
    except BaseException:
        _used[:] = before
        raise
    return next(file for file in files if file.path == own)


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))


def _from_environment() -> tuple[Path, ...]:
    given = os.environ.get("FLASHTASK_ZOO", "")
    return tuple(_absolute(part) for part in given.split(os.pathsep) if part.strip())


@cache
def shipped_zoo() -> Zoo:
    """What flashtask itself ships, without the user's own files."""
    return read_zoo_file(Path(__file__).parent.parent / "zoo.yaml", name="zoo.yaml").zoo


@cache
def tell(text: str) -> None:
    """Print a note on standard error, once in a process."""
    print(f"note: {text}", file=sys.stderr)


@cache
def _merged(environment: tuple[Path, ...], used: tuple[Path, ...]) -> tuple[Zoo, tuple[ZooFile, ...]]:
    """The shipped zoo with files merged over it, and those files. What they replace is printed on standard error."""
    files = []
    zoo = shipped_zoo()
    for path in dict.fromkeys((*environment, *used)):
        try:
            file = read_zoo_file(path)
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
        elif entry.override and section != "backbones":  # libraries have such names too: their room checks that
            raise nothing_to_replace(file, section, name, list(before))
        elif section == "providers":
            what = f"providers.{name}: flashtask builds models of {' and '.join(before)} only"
            raise file.error(section, name, what=what)
        before[name] = entry
    return zoo.model_copy(update=sections)


def name_is_taken(file: ZooFile, section: str, name: str, by: str) -> UsageError:
    """The error for an entry whose name is in use already, without `override: true`."""
    what = f"{section}.{name}: there is {by} of this name already"
    fix = f"choose another name, or write `override: true` in {section}.{name} to replace it"
    return file.error(section, name, what=what, fix=fix)


def nothing_to_replace(file: ZooFile, section: str, name: str, known: list[str]) -> UsageError:
    """The error for an entry with `override: true` that replaces nothing."""
    fix = did_you_mean(name, known) or f"leave `override: true` out of {section}.{name}"
    return file.error(section, name, what=f"{section}.{name}: there is nothing of this name to replace", fix=fix)


class ShippedSource:
    """flashtask's own names of a registry, described by a section of zoo.yaml and imported when first asked for.

    A user's zoo file may add a head that is one of these with other options, and change a task's defaults.

    Args:
        kind: head or task; the section of zoo.yaml is its plural.
        targets: `package.module:attribute` of each name.
    """

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        self.kind, self._targets = kind, dict(targets)
        self._section = f"{kind}s"
        self._checked: set[ZooFile] = set()

    def names(self) -> Iterator[str]:
        """The names, in the order given, then those of the user's own zoo files."""
        return iter(dict.fromkeys([*self._targets, *self._entries()]))

    spellings = names  # they have no library in front

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of a name, with its description from zoo.yaml or the user's own zoo file."""
        described = self._entries().get(name)
        if name not in self._targets and described is None:
            return None
        metadata = {"provider": "flashtask", **(described.model_dump(exclude={"override"}) if described else {})}
        metadata = {key: value for key, value in metadata.items() if value is not None}
        if (file := own_file_of(self._section, name)) is not None:
            metadata |= {"provider": "zoo", "zoo_file": str(file.path)}
        source = metadata.get("source")
        load = partial(_load, self._targets[source or name], metadata["options"] if source else None)
        return RegistryEntry(name, self.kind, metadata, load)

    def _entries(self) -> Mapping[str, Any]:
        for file in own_zoo_files():
            if file not in self._checked:
                for name, entry in getattr(file.zoo, self._section).items():
                    self._check(file, name, entry)
                self._checked.add(file)
        entries: Mapping[str, Any] = getattr(load_zoo(), self._section)
        return entries

    def _check(self, file: ZooFile, name: str, entry: Any) -> None:
        """A user's head is made from one of flashtask's; a user's task is one of flashtask's."""
        keys: tuple[str, ...] = (self._section, name)
        wanted, why = name, "a new task is code: an installed package adds it by an entry point"
        if self.kind == "head":
            keys, wanted, why = (*keys, "source"), entry.source, ""
        if wanted in self._targets:
            return
        what = f"{'.'.join(keys)}: flashtask has no {self.kind} named {wanted!r}"
        if wanted is None:
            what = f"{'.'.join(keys)} is missing: a head in a zoo file is one of flashtask's with other options"
        fix = did_you_mean(wanted or "", self._targets) or f"choose one of: {', '.join(self._targets)}"
        raise file.error(*keys, what=what, why=why, fix=fix)


def _load(target: str, options: Mapping[str, Any] | None) -> Any:
    """The object, or a builder with other defaults; arguments that it is called with replace them."""
    found = imported(target)
    return found if options is None else partial(found, **options)
