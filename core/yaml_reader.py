"""YAML for zoo files and recipes: a small, bounded subset with the place of every key.

No tags, no duplicate keys, no merge keys, one document. `true` and `false` are the only booleans (`no`, `off`
and `yes` are class labels), `1e-3` is a number, dates and `1:30` are text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.files import open_regular

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_EXPANDED", "YamlDocument", "read_yaml"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_EXPANDED = 10_000

KeyPath = tuple[str | int | float | bool, ...]

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_SPECIAL: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


class YamlDocument:
    """The content of a YAML file and where in it each key stands.

    Args:
        name: the file's name, for messages.
        content: dicts, lists, text, numbers, booleans and None.
        places: (line, column), both from 1, of each key path; of a list's item where it starts.
    """

    def __init__(self, name: str, content: Any, places: dict[KeyPath, tuple[int, int]]) -> None:
        self.name, self.content, self._places = name, content, places

    def place(self, path: KeyPath) -> tuple[int, int]:
        """(line, column) of a key path, or of the nearest key around it."""
        while path not in self._places and path:
            path = path[:-1]
        return self._places.get(path, (1, 1))

    def error(self, path: KeyPath, what: str, *, why: str = "", fix: str = "") -> UsageError:
        """A UsageError that begins with the file, line and column of a key path."""
        line, column = self.place(path)
        return UsageError(f"{_where(self.name, line, column)}: {what}", why=why, fix=fix)


def read_yaml(source: Path | str, *, name: str = "") -> YamlDocument:
    """Read one YAML document.

    Args:
        source: a Path is a file to read; a str is the text itself.
        name: what messages call it; the path of a file without one.

    Raises:
        MissingInputError: there is no such file.
        IntegrityError: it is a pipe or a device.
        UsageError: it is no YAML of the subset, or above 1 MiB, 64 levels or 10,000 nodes from aliases; the
            message says file, line and column.
    """
    name = name or (str(source) if isinstance(source, Path) else "YAML text")
    raw = _read_bytes(source) if isinstance(source, Path) else source.encode("utf-8", "surrogatepass")
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{_where(name, 1, 1)}: larger than 1 MiB", why="recipes and zoo files are small")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise UsageError(f"{_where(name, line, column)}: not UTF-8 text", fix="save it as UTF-8") from error
    return _Composer(name, text).document()


def _read_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        if path.is_dir():
            raise UsageError(f"{path} cannot be read", why="it is a folder") from error
        raise MissingInputError(f"no such file: {path}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read", why=error.strerror or str(error)) from error


def _where(name: str, line: int, column: int) -> str:
    return f"{name}, line {line}, column {column}"


class _Composer:
    """Builds values from the parser's events, so that every limit is checked before memory is spent."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._places: dict[KeyPath, tuple[int, int]] = {}
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._num_nodes = 0
        self._num_expanded = 0

    def document(self) -> YamlDocument:
        self._events = self._parse()
        next(self._events)  # the stream's start
        content: Any = None
        if isinstance(next(self._events), yaml.DocumentStartEvent):
            content = self._value(next(self._events), ())
            next(self._events)  # the document's end
            if isinstance(extra := next(self._events), yaml.DocumentStartEvent):
                self._refuse(extra, "a second document begins here", "keep one document in a file")
        return YamlDocument(self._name, content, self._places)

    def _parse(self) -> Iterator[Any]:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            yield from yaml.parse(self._text, Loader=loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            message = f"{_where(self._name, line, column)}: {error.problem or 'not YAML'}"
            raise UsageError(message, why=error.context or "") from error
        except yaml.reader.ReaderError as error:
            line, column = self._place_of_bad_character()
            message = f"{_where(self._name, line, column)}: a character that YAML does not allow"
            raise UsageError(message, why=str(error.reason)) from error

    def _place_of_bad_character(self) -> tuple[int, int]:
        bad = yaml.reader.Reader.NON_PRINTABLE.search(self._text)
        before = self._text[: bad.start() if bad else 0]
        return before.count("\n") + 1, len(before) - before.rfind("\n")

    def _value(self, event: Any, path: KeyPath) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if event.tag is not None:
            self._refuse(event, f"tags are not allowed ({event.tag})", "write the plain value")
        if len(path) > MAX_DEPTH:
            self._refuse(event, f"more than {MAX_DEPTH} levels deep")
        first = self._num_nodes
        self._num_nodes += 1
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(path)
        else:
            value = self._mapping(path)
        if event.anchor:
            self._anchors[event.anchor] = (value, self._num_nodes - first)
        return value

    def _alias(self, event: Any) -> Any:
        if event.anchor not in self._anchors:
            self._refuse(event, f"the alias *{event.anchor} refers to nothing before it (or to itself)")
        value, size = self._anchors[event.anchor]
        self._num_nodes += size
        self._num_expanded += size
        if self._num_expanded > MAX_EXPANDED:
            self._refuse(event, f"aliases expand to more than {MAX_EXPANDED} values")
        return copy.deepcopy(value)

    def _sequence(self, path: KeyPath) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            inner = (*path, len(values))
            self._note(inner, event)
            values.append(self._value(event, inner))
        return values

    def _mapping(self, path: KeyPath) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event)
            if key in values:
                line, _ = self._places[(*path, key)]
                self._refuse(event, f"the key {key!r} stands twice", f"remove one; the first is in line {line}")
            inner = (*path, key)
            self._note(inner, event)
            values[key] = self._value(next(self._events), inner)
        return values

    def _key(self, event: Any) -> Any:
        if not isinstance(event, yaml.ScalarEvent):
            self._refuse(event, "a key must be a name or a number")
        if event.tag is not None:
            self._refuse(event, f"tags are not allowed ({event.tag})", "write the plain key")
        key = self._scalar(event)
        if key is None:
            self._refuse(event, "a key is missing before the colon")
        if key == "<<" and event.implicit[0]:
            self._refuse(event, "merge keys (<<) are not allowed", "write the keys out")
        return key

    def _scalar(self, event: Any) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted or block text
            return text
        if text in _SPECIAL:
            return _SPECIAL[text]
        if _INT.fullmatch(text):
            if len(text) > 1000:
                self._refuse(event, "a whole number of more than 1000 digits")
            return int(text, 0)
        return float(text) if _FLOAT.fullmatch(text) else text

    def _note(self, path: KeyPath, event: Any) -> None:
        self._places[path] = (event.start_mark.line + 1, event.start_mark.column + 1)

    def _refuse(self, event: Any, what: str, fix: str = "") -> NoReturn:
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        raise UsageError(f"{_where(self._name, line, column)}: {what}", fix=fix)
