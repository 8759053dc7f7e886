"""`Audit`: the findings about a data set, as text, JSON or a page; and which of them the user wants to ignore."""

from __future__ import annotations

import os
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from flashtask.core.errors import BadDataError, MissingInputError, UsageError, did_you_mean
from flashtask.core.files import atomic_write_text, missing_file
from flashtask.core.names import shown_name
from flashtask.core.plain_json import number_or_null
from flashtask.data.audit_page import page
from flashtask.data.image_source import FILES, ImageSource

__all__ = ["KINDS", "Audit", "Finding", "Kind", "Sample", "read_ignored"]

#: Examples of each kind that a terminal shows, and its columns.
_SHOWN, _WIDTH = 3, 80


class Kind(NamedTuple):
    """A kind of finding.

    Args:
        spoils: whether it spoils a result, so that the command ends with an error.
        title: for people.
        advice: what may be done about it.
    """

    spoils: bool
    title: str
    advice: str


#: All kinds, the worst first.
KINDS = {
    "unreadable": Kind(True, "Unreadable files", "Replace or remove them; on_bad_image='skip' leaves them out."),
    "leak": Kind(
        True, "The same picture in two parts", "Keep it in one part: a model is measured on what it has seen."
    ),
    "conflict": Kind(True, "The same picture with two targets", "Keep the right one: the other teaches a mistake."),
    "group_leak": Kind(True, "A group in two parts", "Keep all samples of a group (a patient, a site) in one part."),
    "label": Kind(False, "Suspected label errors", "Look at them, the most suspicious first."),
    "neighbour": Kind(False, "Neighbours in two parts", "Look whether they show the same object or are copies."),
    "duplicate": Kind(False, "The same picture twice in a part", "Remove copies, unless they are to count more."),
    "missing_class": Kind(False, "Classes missing from a part", "Their metrics cannot be computed on this part."),
    "few": Kind(False, "Classes with few images", "Add images, or merge classes."),
    "imbalance": Kind(False, "Imbalanced classes", "Consider weights of classes, and metrics per class."),
    "size": Kind(False, "Odd sizes", "Very small or very long pictures show a model little."),
    "blank": Kind(False, "Blank pictures", "All pixels have nearly the same grey level."),
    "dark": Kind(False, "Dark pictures", "Much darker than the others."),
    "bright": Kind(False, "Overexposed pictures", "Much brighter than the others."),
    "blurred": Kind(False, "Blurred pictures", "Much less sharp than the others at the size that a model sees."),
}


@dataclass(frozen=True)
class Sample:
    """A sample that a finding is about.

    Args:
        part: train, val, test or predict.
        name: relative to the folder of the part, with forward slashes.
        path: absolute.
        target: as text; empty if there is none.
    """

    part: str
    name: str
    path: str
    target: str

    @property
    def shown(self) -> str:
        """Part and name on one line."""
        return shown_name(f"{self.part}/{self.name}")


@dataclass(frozen=True)
class Finding:
    """Something suspicious.

    Args:
        kind: one of `KINDS`.
        detail: what was found, in words.
        samples: that it is about; of copies all of them. Empty if it is about a class.
        score: how suspicious, to compare with others of its kind; None if that makes no difference.
        subject: the class or the group that it is about.
    """

    kind: str
    detail: str
    samples: tuple[Sample, ...] = ()
    score: float | None = None
    subject: str = ""

    @property
    def about(self) -> Kind:
        """What is known of its kind."""
        return KINDS[self.kind]

    def matches(self, pattern: str) -> bool:
        """Whether a line of an ignore file is about this finding."""
        kind, wanted = _split(pattern)
        names = [*(f"{sample.part}/{sample.name}" for sample in self.samples), *filter(None, [self.subject])]
        return kind in ("", self.kind) and any(fnmatchcase(name, wanted) for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        files = [{"part": s.part, "name": s.name, "path": s.path, "target": s.target} for s in self.samples]
        score = None if self.score is None else number_or_null(self.score)
        own = {"kind": self.kind, "spoils": self.about.spoils, "detail": self.detail, "score": score}
        return {**own, "subject": self.subject or None, "samples": files}

    def shown(self) -> str:
        """One line for a terminal."""
        places = " = ".join(sample.shown for sample in self.samples[:2]) or shown_name(self.subject)
        more = f" and {len(self.samples) - 2} more" if len(self.samples) > 2 else ""
        return f"{places}{more}: {self.detail}"


@dataclass(frozen=True)
class Audit:
    """The findings of an audit, the worst first.

    Args:
        sizes: samples of each part.
        findings: without those that were ignored.
        ignored: how many were.
        unused: lines of the ignore file that no finding matches.
        label_errors: why no label errors were looked for; empty if they were.
        images: where the pictures of the samples are read, for the page.
    """

    sizes: Mapping[str, int]
    findings: tuple[Finding, ...]
    ignored: int = 0
    unused: tuple[str, ...] = ()
    label_errors: str = ""
    images: ImageSource = field(default=FILES, repr=False, compare=False)

    @property
    def spoils(self) -> bool:
        """Whether a finding is of a kind that spoils a result."""
        return any(finding.about.spoils for finding in self.findings)

    @cached_property
    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind that has any, the worst kind first."""
        found: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            found[finding.kind].append(finding)
        return {kind: found[kind] for kind in KINDS if kind in found}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "sizes": dict(self.sizes),
            "spoils": self.spoils,
            "counts": {kind: len(found) for kind, found in self.by_kind.items()},
            "ignored": self.ignored,
            "label_errors": self.label_errors or None,
            "findings": [finding.to_dict() for found in self.by_kind.values() for finding in found],
        }

    def __str__(self) -> str:
        """A table of the kinds and some examples of each, in 80 columns."""
        lines = [self.summary, *([""] if self.by_kind else [])]
        for found in self.by_kind.values():
            kind = found[0].about
            lines.append(f"{kind.title:<36}{len(found):>7,}{'  spoils results' if kind.spoils else ''}")
        for name, found in self.by_kind.items():
            kind = found[0].about
            lines += ["", *_wrapped(f"{kind.title} ({name}). {kind.advice}")]
            for finding in found[:_SHOWN]:
                lines += _wrapped(finding.shown(), "  ")
            if len(found) > _SHOWN:
                lines.append(f"  ... and {len(found) - _SHOWN:,} more")
        remarks = [f"nothing matches {line!r} in the ignore file" for line in self.unused]
        if self.label_errors:
            remarks.append(f"no label errors were looked for: {self.label_errors}")
        for remark in remarks:
            lines += ["", *_wrapped(remark)]
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """One line: how many samples and findings there are."""
        sizes = ", ".join(f"{size:,} {part}" for part, size in self.sizes.items())
        count = f"{len(self.findings):,} finding(s)" if self.findings else "nothing suspicious"
        return f"{sizes} image(s): {count}" + (f", {self.ignored:,} ignored" if self.ignored else "")

    def to_html(self) -> str:
        """A page with thumbnails, without links to anything outside of it."""
        return page(self)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the page; a file of that name is replaced.

        Raises:
            OutputError, StorageError: it cannot be written.
        """
        atomic_write_text(Path(path), self.to_html())


def read_ignored(path: str | os.PathLike[str]) -> list[str]:
    """The patterns in an ignore file, a line each: `KIND: PATTERN` or `PATTERN`; `#` begins a comment.

    A pattern is compared with `PART/NAME` of the samples of a finding, or with the class or group that it is about;
    `*` and `?` stand for any characters.

    Raises:
        MissingInputError: there is no such file.
        BadDataError: it is not text in UTF-8.
        UsageError: a line names a kind that does not exist.
    """
    file = Path(path)
    try:
        lines = file.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise missing_file(file) from None
    except IsADirectoryError:
        raise MissingInputError(f"{str(file)!r} is a folder, not an ignore file") from None
    except UnicodeDecodeError as error:
        raise BadDataError(f"{str(file)!r} is not text in UTF-8", why=str(error)) from None
    patterns = []
    for number, line in enumerate(lines, start=1):
        pattern = line.partition("#")[0].strip()
        kind = _split(pattern)[0]
        if kind and kind not in KINDS:
            hint = did_you_mean(kind, KINDS) or f"the kinds are {', '.join(KINDS)}"
            raise UsageError(f"{str(file)!r}, line {number}: no findings of the kind {kind!r}", fix=hint)
        if pattern:
            patterns.append(pattern)
    return patterns


def _split(pattern: str) -> tuple[str, str]:
    """The kind, which may be missing, and what names must look like; a colon after a slash is part of a name."""
    kind, colon, rest = pattern.partition(":")
    return (kind.strip(), rest.strip() or "*") if colon and "/" not in kind else ("", pattern)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
