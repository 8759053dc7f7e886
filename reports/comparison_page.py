"""The page of a comparison of runs: metrics, settings, and the pictures that flipped."""

# ruff: noqa: E501 - a tag on two lines is harder to read

from __future__ import annotations

import math
from typing import Any

from flashtask.core.errors import FlashtaskError
from flashtask.data.inputs import input_of
from flashtask.data.page_style import HEAD, page_template, picture_address
from flashtask.reports.comparison import Comparison, Flip

__all__ = ["comparison_page"]

#: Pictures of each kind, and pixels of their longer side.
_MOST, _SIDE = 60, 200

_PAGE = (
    HEAD
    + """\
table { border-collapse: collapse; margin-top: .75rem; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ part }} data; each run beside {{ names[0] }}</p>
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="wide"><table><thead><tr>{% for head in table.heads %}<th>{{ head }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
{% for one in differences %}
<h2>{{ one.name }}</h2>
<p>{{ one.verdict }}</p>
{% for group in one.groups %}
<h2>{{ group.title }} <span class="count">{{ group.count }}</span></h2>
<div class="grid">
{% for card in group.cards %}
<div class="card"><figure><div class="frame">{% if card.picture %}<img src="{{ card.picture }}" alt="">{% else %}cannot be read{% endif %}</div>
<figcaption>{{ card.name }}<br><span class="target">{{ card.target }}</span></figcaption></figure>
<p class="detail">{{ card.before }} &rarr; {{ card.after }}</p></div>
{% endfor %}
</div>
{% endfor %}
{% endfor %}
</body>
</html>
"""
)


def comparison_page(made: Comparison) -> str:
    """The HTML of a comparison; names and labels are escaped, no script is on the page."""
    tables = [
        {
            "title": "Metrics",
            "heads": ["", *made.names],
            "rows": [[name, *map(_number, values)] for name, values in made.metrics.items()],
        },
        {
            "title": "Settings that differ",
            "heads": ["", *made.names],
            "rows": [
                [key, *("" if one is None else str(one) for one in values)] for key, values in made.settings.items()
            ],
        },
        {
            "title": "Data that differs",
            "heads": ["", *made.names],
            "rows": [
                [what, *("" if one is None else f"{one:,}" for one in counts)] for what, counts in made.data.items()
            ],
        },
    ]
    differences = []
    for name, one in zip(made.names[1:], made.differences, strict=True):
        if one.per_class:
            rows = [[a.label, _number(a.f1), _number(b.f1), f"{b.f1 - a.f1:+.4f}"] for a, b in one.per_class]
            heads = ["", made.names[0], name, "difference"]
            tables.append({"title": f"F1 of each class, {name}", "heads": heads, "rows": rows})
        groups = [
            ("Became right", [flip for flip in one.flips if flip.is_better]),
            ("Became wrong", [flip for flip in one.flips if not flip.is_better]),
        ]
        shown = [
            {"title": title, "count": f"{len(flips):,}", "cards": [_card(flip) for flip in flips[:_MOST]]}
            for title, flips in groups
            if flips
        ]
        differences.append({"name": f"{name} beside {made.names[0]}", "verdict": f"{one.verdict}.", "groups": shown})
    page: str = page_template(_PAGE).render(
        title=" and ".join(made.names),
        part=made.evaluations[0].part,
        names=made.names,
        tables=[table for table in tables if table["rows"]],
        differences=differences,
    )
    return page


def _card(flip: Flip) -> dict[str, Any]:
    try:
        picture = picture_address(input_of(flip.after.input).thumbnail(_SIDE), _SIDE)
    except (FlashtaskError, OSError):
        picture = ""
    before, after = flip
    return {
        "picture": picture,
        "name": after.name,
        "target": after.target,
        "before": before.said,
        "after": after.said,
    }


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
