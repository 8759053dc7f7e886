"""`Problems`: everything that is wrong with the rows of a data set, collected and named in one error."""

from __future__ import annotations

from collections.abc import Iterator

from flashtask.core.errors import BadDataError

__all__ = ["OTHER_ROOT", "Problems"]

#: What to do about paths in a table that lead nowhere.
OTHER_ROOT = 'images_root="FOLDER", if paths count from another folder'

#: Problems that a message names at the most, over all kinds.
_SHOWN = 10


class Problems:
    """What is wrong with rows, by kind."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self._fixes: dict[str, str] = {}

    def add(self, kind: str, place: str, *, fix: str = "") -> None:
        """Note one problem.

        Args:
            kind: what the message counts: `empty cell`.
            place: one line that names the file, the row and the column, and what is wrong there.
            fix: what to do with all of this kind.
        """
        self._found.setdefault(kind, []).append(place)
        if fix:
            self._fixes.setdefault(kind, fix)

    def advise(self, kind: str, fix: str) -> None:
        """Say what to do with all of a kind, once all of it is known."""
        self._fixes.setdefault(kind, fix)

    def take(self, others: Problems) -> None:
        """Add all that others noted."""
        for kind, places in others._found.items():
            self._found.setdefault(kind, []).extend(places)
        self._fixes = others._fixes | self._fixes

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))

    def refuse(self, where: str) -> None:
        """Raise one error for all that was found.

        Args:
            where: the files or arguments, for the first line; several are joined by ` and `.

        Raises:
            BadDataError: something was found; it names ten places of all kinds, and the number of each kind.
        """
        if not self._found:
            return
        counts = ", ".join(f"{kind}: {len(places):,}" for kind, places in self._found.items())
        shown = list(self._shown())
        more = len(self) - len(shown)
        lines = [*shown, *([f"... and {more:,} more"] if more else [])]
        verb, noun = "have" if " and " in where else "has", "problems" if len(self) > 1 else "problem"
        raise BadDataError(
            f"{where} {verb} {len(self):,} {noun} ({counts})",
            why="\n    ".join(lines),
            fix="; ".join(dict.fromkeys(self._fixes.values())),
        )

    def _shown(self) -> Iterator[str]:
        """As many of each kind as there is room for, kind by kind."""
        room, kinds = _SHOWN, len(self._found)
        for places in sorted(self._found.values(), key=len):
            count = min(len(places), max(1, room // kinds))
            yield from places[:count]
            room, kinds = room - count, kinds - 1
