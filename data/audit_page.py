"""The page of an audit: one HTML file with thumbnails, readable on a phone and in the dark, without any network."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import FlashtaskError
from flashtask.core.names import shown_name
from flashtask.data.threads import in_threads

if TYPE_CHECKING:
    from flashtask.data.findings import Audit, Finding, Sample
    from flashtask.data.image_source import ImageSource

__all__ = ["page"]

#: Findings of a kind, and pictures of a finding, at the most.
_MOST_FINDINGS, _MOST_PICTURES = 60, 4
#: Pixels of the longer side of a thumbnail: sharp on screens of two pixels a point.
_SIDE, _QUALITY = 320, 72

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Audit</title>
<style>
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --line: #dfe3e8; --text: #1d2430; --soft: #5b6676;
  --bad: #b3261e; --bad-back: #fbe9e7; --link: #1c5fb8; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1e232b; --line: #333b47; --text: #e6e9ee;
  --soft: #a3adbb; --bad: #ff9d94; --bad-back: #43211e; --link: #8ab8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.6rem; }
h2 { margin: 2.25rem 0 .1rem; font-size: 1.2rem; }
p { margin: .15rem 0; }
a { color: var(--link); }
.soft { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0 0; }
nav a, .count { padding: .2rem .65rem; border: 1px solid var(--line); border-radius: 1rem; background: var(--card);
  font-size: .9rem; text-decoration: none; white-space: nowrap; }
.bad { color: var(--bad); background: var(--bad-back); border-color: transparent; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: .75rem;
  margin-top: .75rem; align-items: start; }
.card { border: 1px solid var(--line); border-radius: .6rem; background: var(--card); overflow: hidden; }
.pictures { display: flex; flex-wrap: wrap; gap: 1px; background: var(--line); }
figure { flex: 1 1 45%; min-width: 0; margin: 0; background: var(--card); }
.frame { height: 9.5rem; display: flex; align-items: center; justify-content: center; background: var(--back);
  color: var(--soft); font-size: .85rem; }
.frame img { max-width: 100%; max-height: 100%; min-width: 2.5rem; min-height: 2.5rem; object-fit: contain;
  image-rendering: auto; }
figcaption { padding: .35rem .6rem; font-size: .82rem; overflow-wrap: anywhere; }
.target { font-weight: 600; }
.detail { margin: 0; padding: .45rem .6rem .55rem; border-top: 1px solid var(--line); font-size: .9rem;
  overflow-wrap: anywhere; }
.card > .detail:first-child { border-top: 0; }
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
    return str(_template().render(summary=audit.summary, label_errors=audit.label_errors, sections=sections))


@cache
def _template() -> Any:
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(_TEMPLATE)


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
    picture.thumbnail((_SIDE, _SIDE))
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode("ascii")
