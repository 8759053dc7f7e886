"""The page of an audit: one HTML file with thumbnails, readable on a phone and in the dark, without any network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashtask.core.errors import FlashtaskError
from flashtask.core.names import shown_name
from flashtask.data.page_style import HEAD, page_template, picture_address
from flashtask.data.threads import in_threads

if TYPE_CHECKING:
    from flashtask.data.findings import Audit, Finding, Sample
    from flashtask.data.image_source import ImageSource

__all__ = ["page"]

#: Findings of a kind, and pictures of a finding, at the most.
_MOST_FINDINGS, _MOST_PICTURES = 60, 4
#: Pixels of the longer side of a thumbnail: sharp on screens of two pixels a point.
_SIDE = 320

_TEMPLATE = (
    HEAD
    + """\
</style>
</head>
<body>
<h1>Audit</h1>
<p>{{ summary }}</p>
{%- if label_errors %}
<p class="soft">No label errors were looked for: {{ label_errors }}</p>
{%- endif %}
<nav>
{%- for one in sections %}
<a href="#{{ one.kind }}"{% if one.spoils %} class="bad"{% endif %}>{{ one.title }}: {{ one.count }}</a>
{%- endfor %}
</nav>
{%- for one in sections %}
<section id="{{ one.kind }}">
<h2>{{ one.title }} {% if one.spoils %}<span class="count bad">spoils results</span>{% endif %}</h2>
<p class="soft">{{ one.advice }}</p>
<div class="grid">
{%- for card in one.cards %}
<div class="card">
{%- if card.pictures %}
<div class="pictures">
{%- for picture in card.pictures %}
<figure>
<div class="frame">
{%- if picture.source %}<img src="{{ picture.source }}" alt="" loading="lazy">{% else %}no picture{% endif -%}
</div>
<figcaption>{% if picture.target %}<span class="target">{{ picture.target }}</span> {% endif -%}
<span class="soft">{{ picture.name }}</span></figcaption>
</figure>
{%- endfor %}
</div>
{%- endif %}
<p class="detail">{{ card.detail }}
{%- if card.hidden %} <span class="soft">({{ card.hidden }} more)</span>{% endif %}</p>
</div>
{%- endfor %}
</div>
{%- if one.hidden %}
<p class="soft">and {{ one.hidden }} more, which the option --json lists</p>
{%- endif %}
</section>
{%- endfor %}
</body>
</html>
"""
)


def page(audit: Audit) -> str:
    """The HTML of an audit. Names of files and labels are escaped; no script is on the page."""
    shown = {kind: found[:_MOST_FINDINGS] for kind, found in audit.by_kind.items()}
    samples = [sample for found in shown.values() for finding in found for sample in finding.samples[:_MOST_PICTURES]]
    paths = list(dict.fromkeys(sample.path for sample in samples))
    sources = dict(zip(paths, in_threads(lambda path: _thumbnail(audit.images, path), paths), strict=True))
    sections = [
        {
            **found[0].about._asdict(),
            "kind": kind,
            "count": f"{len(audit.by_kind[kind]):,}",
            "cards": [_card(finding, sources) for finding in found],
            "hidden": len(audit.by_kind[kind]) - len(found),
        }
        for kind, found in shown.items()
    ]
    return str(
        page_template(_TEMPLATE).render(
            title="Audit", summary=audit.summary, label_errors=audit.label_errors, sections=sections
        )
    )


def _card(finding: Finding, sources: dict[str, str]) -> dict[str, Any]:
    pictures = [_picture(sample, sources) for sample in finding.samples[:_MOST_PICTURES]]
    return {"pictures": pictures, "detail": finding.detail, "hidden": len(finding.samples) - len(pictures)}


def _picture(sample: Sample, sources: dict[str, str]) -> dict[str, str]:
    return {"source": sources[sample.path], "target": shown_name(sample.target), "name": sample.shown}


def _thumbnail(images: ImageSource, path: str) -> str:
    """An address with a small JPEG in it; empty if the picture cannot be read."""
    try:
        picture = images.input(path).thumbnail(_SIDE)
    except FlashtaskError:
        return ""
    return picture_address(picture, _SIDE)
