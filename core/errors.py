"""Every error a user can meet, its exit code, and the one place where its wording is put together.

A message states what is wrong (with the file or name), why, and the fix as a command or a line of code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BadDataError",
    "DivergedError",
    "FlashtaskError",
    "HubError",
    "IntegrityError",
    "MissingInputError",
    "OutOfMemoryError",
    "OutputError",
    "ProcessLostError",
    "StorageError",
    "UnknownInFileError",
    "UnknownNameError",
    "UsageError",
    "did_you_mean",
    "key_fix",
    "nearest",
]


class FlashtaskError(Exception):
    """What every error of flashtask derives from.

    Args:
        what: what is wrong, with the file or name; one line.
        why: the reason, where it is known.
        fix: a command or a line of code that mends it.
    """

    exit_code = 70

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        parts = [self.what]
        if self.why:
            parts.append(f"  why: {self.why}")
        if self.fix:
            parts.append(f"  fix: {self.fix}")
        return "\n".join(parts)

    def about(self, path: object) -> None:
        """Let the message begin with the file that the error comes from, if it does not name it yet."""
        if str(path) not in str(self):
            self.what = f"{path}: {self.what}"
            self.args = (self.what,)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (data workers, ranks): rebuild without calling __init__ again.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[FlashtaskError], args: tuple[object, ...], state: dict[str, object]) -> FlashtaskError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class UsageError(FlashtaskError, ValueError):
    """An invalid argument, option or recipe value."""

    exit_code = 2


class UnknownNameError(UsageError, LookupError):
    """A name that nothing has: the message gives near matches and the command that lists the rest."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, listed_by: str = "") -> None:
        known = list(known)
        close = nearest(name, known)
        fix = f"did you mean {_one_of(close)}?" if close else ""
        if not close and known and len(known) <= 12:
            fix = f"choose one of: {', '.join(known)}"
        elif not close and known and not listed_by:
            fix = f"choose one of {len(known):,}: {', '.join(known[:12])}, ..."
        if listed_by:
            fix = f"{fix} `{listed_by}` lists all {len(known)}".strip()
        super().__init__(f"no {kind} named {name!r}", fix=fix)
        self.name, self.suggestions = name, close


class BadDataError(FlashtaskError, ValueError):
    """Data that is there but cannot be used: an unreadable image, an empty class, labels that do not match."""

    exit_code = 65


class MissingInputError(FlashtaskError, FileNotFoundError):
    """A file or folder that was asked for and does not exist."""

    exit_code = 66


class HubError(FlashtaskError, OSError):
    """The hub or a download server could not be reached, or refused."""

    exit_code = 69


class ProcessLostError(FlashtaskError, OSError):
    """A process of a distributed run died or hung."""

    exit_code = 71


class OutputError(FlashtaskError, OSError):
    """Output cannot be created at the start, or the run folder is taken."""

    exit_code = 73


class StorageError(FlashtaskError, OSError):
    """A write failed later (disk full, I/O error)."""

    exit_code = 74


class IntegrityError(FlashtaskError, ValueError):
    """A file is damaged or hostile and was refused."""

    exit_code = 76


class UnknownInFileError(IntegrityError, UnknownNameError):
    """A file names something that is not registered here, so it is refused; an import may make the name known.

    Args:
        error: what the registry said of the name.
        what: in place of its words.
        fix: in place of its near matches, which are no other names for what a file needs.
    """

    def __init__(self, error: UnknownNameError, *, what: str = "", why: str = "", fix: str = "") -> None:
        why = why or "the file needs it, and holds names in place of code; here the name is not registered"
        fix = fix or "if it is your own, import the module that registers it first"
        FlashtaskError.__init__(self, what or error.what, why=why, fix=fix)
        self.name, self.suggestions = error.name, []


class DivergedError(FlashtaskError, ValueError):
    """The loss (or a gradient) became NaN or infinite."""

    exit_code = 80


class OutOfMemoryError(FlashtaskError, OSError):
    """The work does not fit into memory."""

    exit_code = 81


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """The known names closest to a mistyped one, best first.

    Args:
        name: what the user wrote.
        known: the names there are.
        most: how many to give at the most.
    """
    known = list(known)
    lowered = {candidate.lower(): candidate for candidate in known}
    wanted = name.lower().replace("-", "_")
    found = difflib.get_close_matches(wanted, lowered, n=most, cutoff=0.6)
    if not found and len(wanted) >= 3:
        found = sorted((low for low in lowered if wanted in low), key=len)[:most]
    return [lowered[low] for low in found]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest known name, or an empty string if none is near."""
    close = nearest(name, known)
    return f"did you mean {_one_of(close)}?" if close else ""


def key_fix(key: str, known: Iterable[str]) -> str:
    """What to write in the place of a key that is not among those known: the nearest, or one of all."""
    known = list(known)
    return did_you_mean(key, known) or f"the keys are {', '.join(known)}"


def _one_of(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)
