"""Which paths an archive may bring: all that is refused about a name, and the error for one that is taken."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

from flashtask.core.errors import OutputError
from flashtask.data.archive_limits import Budget

__all__ = ["HIDDEN", "Names", "name_taken"]

#: Start of every hidden name that flashtask itself makes in a data folder; no archive may bring one.
HIDDEN = ".flashtask-"


class Names:
    """The paths seen so far in one archive; what is refused about a name is all here."""

    def __init__(self, budget: Budget, taken: Collection[str]) -> None:
        self._budget, self._taken = budget, taken
        self._seen: dict[str, tuple[str, str]] = {}  # folded path -> (spelling, file | folder | implied folder)

    def accept(self, name: str, is_folder: bool) -> list[str]:
        """The parts of a member's path after every check; no parts for the archive's own root."""
        stripped = name.removeprefix("./").removesuffix("/" if is_folder else "")
        if is_folder and stripped in ("", "."):
            return []
        parts = stripped.split("/")
        if reason := self._wrong(name, parts):
            raise self._budget.refuse(reason, name)
        if parts[0] in self._taken:
            raise name_taken(f"{parts[0]!a} in the target folder")
        for depth in range(1, len(parts)):
            self._note("/".join(parts[:depth]), "implied folder", name)
        self._note(stripped, "folder" if is_folder else "file", name)
        return parts

    def _wrong(self, name: str, parts: list[str]) -> str:
        limits = self._budget.limits
        try:
            encoded = [len(part.encode()) for part in parts]
        except UnicodeEncodeError:
            return "its name is not UTF-8"
        if name.startswith("/") or re.match(r"[A-Za-z]:", parts[0]):
            return "its path is absolute"
        for part in parts:
            if part == "..":
                return "its path leads out of the folder (..)"
            if part in ("", "."):
                return "its path has an empty part"
            if "\\" in part or "\0" in part:
                return "its path holds a backslash or NUL"
        if parts[0].startswith(HIDDEN):
            return f"names that start with {HIDDEN} are reserved"
        if len(parts) > limits.max_depth:
            return f"it lies deeper than {limits.max_depth} folders"
        if max(encoded) > 255 or sum(encoded) + len(parts) - 1 > limits.max_name_bytes:
            return "its name is too long"
        return ""

    def _note(self, path: str, kind: str, member: str) -> None:
        key = unicodedata.normalize("NFC", path).casefold()
        if key not in self._seen:
            self._budget.count_entry(member)
            self._seen[key] = (path, kind)
            return
        spelling, earlier = self._seen[key]
        if spelling != path:
            raise self._budget.refuse(f"its path differs from {spelling!a} only in case or accents", member)
        if kind == "implied folder" and earlier != "file":
            return
        if kind != "folder" or earlier != "implied folder":
            raise self._budget.refuse("the same path is in the archive twice", member)
        self._seen[key] = (path, kind)


def name_taken(where: str) -> OutputError:
    """The error for a file or folder that stands where the archive wants to put one."""
    return OutputError(
        f"{where} exists already",
        why="the archive brings a file or folder of that name, and nothing is overwritten",
        fix="remove it, or choose another folder",
    )
