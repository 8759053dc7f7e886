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

_PAGE = (
    HEAD
    + STYLE
    + """\
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ "{:,}".format(rows|length) }} runs; the best value of each metric is bold</p>
<div class="wide"><table><thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}<td class="range">{% if (loop.index0, cell) in best %}<b>{{ cell }}</b>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
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
    best = {}
    for place, name in enumerate(columns):
        known = [value for row in rows if isinstance(value := row.get(name), float) and not math.isnan(value)]
        if name.startswith("val_") and (mode := direction_of(name)) and len(known) > 1:
            best[place] = text(max(known) if mode == "max" else min(known))
    cells = [[text(row.get(name)) for name in columns] for row in rows]
    page: str = page_template(_PAGE).render(title=title, columns=columns, rows=cells, best=set(best.items()))
    return page
