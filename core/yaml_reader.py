"""YAML for zoo files and recipes: a small, bounded subset with the place of every key.

No tags, aliases, merge keys or duplicate keys, and one document. `true` and `false` are the only booleans (`no`, `off`
and `yes` are class labels), `1e-3` is a number, dates and `1:30` are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import BaseResolver

from flashtask.core.errors import FlashtaskError, UsageError
from flashtask.core.files import open_regular

__all__ = ["MAX_BYTES", "MAX_DEPTH", "YamlDocument", "read_yaml"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
_MAX_DIGITS = 1000

KeyPath = tuple[str | int | float | bool, ...]


@dataclass(frozen=True, eq=False)
class YamlDocument:
    """The content of a YAML file and the place of each key in it.

    Args:
        name: the file's name, for messages.
        content: dicts, lists, text, numbers, booleans and None.
        places: (line, column), both from 1, of each key path; of a list's item where it starts.
    """

    name: str
    content: Any
    places: dict[KeyPath, tuple[int, int]]

    def place(self, path: KeyPath) -> tuple[int, int]:
        """(line, column) of a key path, or of the nearest key around it."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, (1, 1))

    def error(self, *path: Any, what: str, why: str = "", fix: str = "") -> UsageError:
        """A UsageError that begins with the file, line and column of a key path."""
        return _error(self.name, self.place(path), what, why=why, fix=fix)


def read_yaml(source: Path | str, *, name: str = "") -> YamlDocument:
    """Read one YAML document.

    Args:
        source: a Path is a file to read; a str is the text itself.
        name: what messages call it; the path of a file without one.

    Raises:
        MissingInputError: there is no such file, or it is a folder.
        IntegrityError: it is a pipe or a device.
        UsageError: it is not YAML of the subset, or above 1 MiB or 64 levels; the message has file, line and column.
    """
    name = name or (str(source) if isinstance(source, Path) else "YAML text")
    raw = _read_bytes(source) if isinstance(source, Path) else source.encode("utf-8", "surrogatepass")
    if len(raw) > MAX_BYTES:
        raise _error(name, (1, 1), "larger than 1 MiB", why="recipes and zoo files are small")
    text = raw.decode("utf-8-sig", "surrogateescape")
    if bad := yaml.reader.Reader.NON_PRINTABLE.search(text):
        before = text[: bad.start()]
        place = before.count("\n") + 1, len(before) - before.rfind("\n")
        if "\udc80" <= bad[0] <= "\udcff":  # how `surrogateescape` writes a wrong byte
            raise _error(name, place, "not UTF-8 text", fix="save it as UTF-8")
        raise _error(name, place, f"a character that YAML does not allow ({bad[0]!r})")
    try:
        return _Loader(name, text).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _error(name, _place(mark), error.problem or "not YAML", why=error.context or "") from error


def _read_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(MAX_BYTES + 1)
    except FlashtaskError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read", why=error.strerror or str(error)) from error


class _Loader(Composer, SafeConstructor, BaseResolver):
    """PyYAML's safe loader for the subset. The parser's events come from libyaml where PyYAML was built with it."""

    def __init__(self, name: str, text: str) -> None:
        parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        self.check_event, self.peek_event, self.get_event = parser.check_event, parser.peek_event, parser.get_event
        for base in (Composer, SafeConstructor, BaseResolver):
            base.__init__(self)
        self._name, self._depth = name, 0
        self._places: dict[KeyPath, tuple[int, int]] = {}

    def document(self) -> YamlDocument:
        self.get_event()  # the stream's start
        node = None if self.check_event(yaml.StreamEndEvent) else self.compose_document()
        if not self.check_event(yaml.StreamEndEvent):
            self._refuse(self.peek_event(), "a second document begins here", "keep one document in a file")
        return YamlDocument(self._name, None if node is None else self._value(node, ()), self._places)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuses what the subset leaves out while the document is parsed, before it takes memory."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"aliases are not allowed (*{event.anchor})", "write the value out")
        if event.tag is not None:
            self._refuse(event, f"tags are not allowed ({event.tag})", "write the plain value")
        if self._depth > MAX_DEPTH:
            self._refuse(event, f"more than {MAX_DEPTH} levels deep")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self._placed_value(item, (*path, i), item) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            values: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                here = (*path, key := self._key(key_node))
                if key in values:
                    fix = f"remove one; the first is on line {self._places[here][0]}"
                    self._refuse(key_node, f"the key {key!r} appears twice", fix)
                values[key] = self._placed_value(key_node, here, value_node)
            return values
        if node.tag == _TAG + "int" and len(node.value) > _MAX_DIGITS:
            self._refuse(node, f"a whole number of more than {_MAX_DIGITS} digits")
        return self.construct_object(node)

    def _placed_value(self, start: yaml.Node, path: KeyPath, node: yaml.Node) -> Any:
        self._places[path] = _place(start.start_mark)
        return self._value(node, path)

    def _key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            self._refuse(node, "a key must be a name or a number")
        if node.tag == _TAG + "merge":
            self._refuse(node, "merge keys (<<) are not allowed", "write the keys out")
        if (key := self._value(node, ())) is None:
            self._refuse(node, "a key is missing before the colon")
        return key

    def _refuse(self, at: Any, what: str, fix: str = "") -> NoReturn:
        raise _error(self._name, _place(at.start_mark), what, fix=fix)


_TAG = "tag:yaml.org,2002:"
for _kind, _pattern in {
    "null": r"|~|null|Null|NULL",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+",
    "float": r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"({_pattern})\Z"), None)


def _error(name: str, place: tuple[int, int], what: str, *, why: str = "", fix: str = "") -> UsageError:
    return UsageError(f"{name}, line {place[0]}, column {place[1]}: {what}", why=why, fix=fix)


def _place(mark: Any) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)
