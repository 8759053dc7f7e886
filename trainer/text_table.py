"""A table in plain text, for logs and terminals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["text_table"]


def text_table(heads: Sequence[str], rows: Iterable[Sequence[str]], most: int = 80) -> str:
    """Lines with the first column to the left, cut where it is too long, and the others to the right.

    Args:
        heads: what stands above each column.
        rows: as many texts each.
        most: characters of a line.
    """
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    widths[0] = min(widths[0], most - sum(widths[1:]) - 2 * (len(heads) - 1))
    return "\n".join("  ".join([_cut(line[0], widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def _cut(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else f"{text[: width - 1]}…"
