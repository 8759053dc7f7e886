"""Names of checkpoint files: templates such as `{epoch:02d}-{val_loss:.2f}`, filled in without ever becoming a path."""

from __future__ import annotations

import math
import os
import re
import string
from collections.abc import Iterator, Mapping

from flashtask.core.errors import UnknownNameError, UsageError

__all__ = ["SUFFIX", "NameTemplate", "versions", "versions_of"]

SUFFIX = ".ckpt"

#: what some system takes for the border of a folder, or refuses in a name
_NO_NAME = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
#: what counts steps and not measures: whole numbers
_COUNTED = ("epoch", "step")
#: bytes that a name may have, less what versions and an unfinished file's name add
_LONGEST = 240


class NameTemplate:
    """A file name with places for values: `epoch`, `step` and every logged metric, formatted as in Python.

    Args:
        text: of the template; an ending `.ckpt` may be left out.
        insert_names: write `epoch=02` for `{epoch:02d}`, else `02`.

    Raises:
        UsageError: it is no template, a path, or no name that a file can have.
    """

    def __init__(self, text: str, insert_names: bool = True) -> None:
        if not isinstance(text, str):
            raise UsageError(f"filename={text!r}: a text is needed", fix='filename="{epoch:02d}-{val_loss:.2f}"')
        self.text, self._insert_names = text.removesuffix(SUFFIX), insert_names
        #: (text before, name, format) of each place, and the text behind the last
        self._parts = self._read()
        self._check()

    @property
    def fields(self) -> list[str]:
        """The names of what is filled in."""
        return [name for _, name, _ in self._parts if name is not None]

    def fill(self, values: Mapping[str, float], *, is_early: bool = False) -> str:
        """The name without its ending; what cannot stand in a name becomes `_`.

        Args:
            values: `epoch`, `step` and what was measured so far.
            is_early: something may not have been measured yet: then it is `nan`.

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
            filled.append(_NO_NAME.sub("_", f"{name}={text}" if self._insert_names else text))
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
        """Fill the template in once, so that what is wrong with it is known before anything is trained."""
        literal = "".join(before for before, _, _ in self._parts)
        if _NO_NAME.search(literal) or self.text in ("", ".", "..") or literal.startswith("."):
            raise self._error(
                "it is a name, without folders and signs that systems keep for themselves, and not hidden",
                'dirpath="my/path", filename="{epoch:02d}-{val_loss:.2f}"',
            )
        if any(int(digits) > _LONGEST for _, _, spec in self._parts for digits in re.findall(r"\d+", spec)):
            raise self._error(f"a file's name has {_LONGEST} bytes at the most", 'filename="{epoch:02d}"')
        if len(os.fsencode(self.fill(dict.fromkeys(self.fields, 0)))) > _LONGEST:
            raise self._error(f"a file's name has {_LONGEST} bytes at the most", "a shorter one")

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
        return UsageError(f"filename={self.text!r} names no checkpoint", why=why, fix=fix)


def versions_of(name: str) -> re.Pattern[str]:
    """What matches a file's name and its versions: `a.ckpt`, `a-v1.ckpt`, `a-v2.ckpt`, ..."""
    return re.compile(rf"{re.escape(name)}(-v[1-9]\d*)?{re.escape(SUFFIX)}", re.DOTALL)


def versions(stem: str) -> Iterator[str]:
    """`a.ckpt`, `a-v1.ckpt`, `a-v2.ckpt` and so on."""
    yield stem + SUFFIX
    number = 0
    while True:
        number += 1
        yield f"{stem}-v{number}{SUFFIX}"
