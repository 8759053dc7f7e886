"""Tables and paragraphs in plain text, for logs and terminals."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import OverflowMethod

__all__ = ["WIDTH", "text_table", "wrapped"]

#: Columns of what is written for people, whatever it is written to.
WIDTH = 80
#: Columns of a table that is not to be cut.
_ANY_WIDTH = 100_000


def text_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    width: int | None = WIDTH,
    *,
    num_left: int = 1,
    is_drawn: bool = False,
) -> str:
    """A table as lines of text; where it is too wide, the first column is cut, or folded if the table is drawn.

    Args:
        heads: titles of the columns.
        rows: as many texts each.
        width: columns of the longest line; None for no limit.
        num_left: how many columns are aligned to the left; the others hold numbers, aligned to the right.
        is_drawn: with lines around the cells and the last row in bold, as the sum of the others: for a terminal.
    """
    from rich.box import HEAVY_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold" if is_drawn else "")
    if is_drawn:
        table.box = HEAVY_HEAD
    else:
        table.box, table.pad_edge, table.padding = None, False, (0, 2, 0, 0)
    for number, title in enumerate(heads):
        # Only a column that may be wrapped is made narrower; its cells decide whether they are cut instead.
        table.add_column(Text(title), justify="left" if number < num_left else "right", no_wrap=number > 0)
    overflow: OverflowMethod = "fold" if is_drawn else "ellipsis"
    cells = [[Text(cell, no_wrap=not is_drawn, overflow=overflow) for cell in row] for row in rows]
    for number, row in enumerate(cells, start=1):
        is_sum = is_drawn and number == len(cells)
        if is_sum:
            table.add_section()
        table.add_row(*row, style="bold" if is_sum else None)
    text = io.StringIO()
    # In a notebook rich would show the table itself instead of writing it.
    Console(file=text, width=width or _ANY_WIDTH, force_terminal=is_drawn, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def wrapped(text: str, width: int = WIDTH) -> list[str]:
    """The lines of a paragraph, broken between words; all but the first are indented."""
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
