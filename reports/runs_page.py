"""The page of a list of runs: a row a run, with everything that is known of it."""

# ruff: noqa: E501 - a tag on two lines is harder to read

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashtask.data.page_style import HEAD, page_template
from flashtask.reports.page import STYLE
from flashtask.trainer.metric_order import direction_of

__all__ = ["runs_page"]

#: Columns of text, which begin at the left.
_WORDS = ("run", "task", "backbone", "strategy", "stopped")

_PAGE = (
    HEAD
    + STYLE
    + """\
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ "{:,}".format(rows|length) }} runs; the best value of each metric of validation is bold, for each task</p>
<div class="wide"><table><thead><tr>{% for name in columns %}<th{% if name in words %} style="text-align: left"{% endif %}>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell, is_best in row %}<td class="range"{% if columns[loop.index0] in words %} style="text-align: left"{% endif %}>{% if is_best %}<b>{{ cell }}</b>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
</body>
</html>
"""
)


def runs_page(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], text: Callable[[Any], str]) -> str:
    """One HTML file without scripts and network; what is put in is escaped.

    Args:
        title: of the page.
        columns: their names.
        rows: the values of each run.
        text: a value as it is shown.
    """
    shown = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
    best = {(task, name): mark for name in shown for task, mark in _best_of(name, rows).items()}
    cells = [
        [
            (text(value := row.get(name)), value is not None and value == best.get((row.get("task"), name)))
            for name in shown
        ]
        for row in rows
    ]
    page: str = page_template(_PAGE).render(title=title, columns=shown, rows=cells, words=_WORDS)
    return page


def _best_of(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[Any, float]:
    """By task, the best value of a metric of validation, where several runs have one."""
    mode = direction_of(name) if name.startswith("val_") else None
    known: dict[Any, list[float]] = {}
    for row in rows if mode else ():
        value = row.get(name)
        if isinstance(value, float) and not math.isnan(value):
            known.setdefault(row.get("task"), []).append(value)
    return {task: max(own) if mode == "max" else min(own) for task, own in known.items() if len(own) > 1}
