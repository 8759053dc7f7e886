"""What pages have in common: one HTML file, without scripts and network, for phones, the dark and paper."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["HEAD", "page_template", "picture_address"]

_QUALITY = 72

#: The head of a page up to its own style: `{{ title }}` is what the tab shows. Only what is in the file may be loaded.
HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --line: #dfe3e8; --text: #1d2430; --soft: #5b6676;
  --bad: #b3261e; --bad-back: #fbe9e7; --link: #1c5fb8; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1e232b; --line: #333b47;
  --text: #e6e9ee; --soft: #a3adbb; --bad: #ff9d94; --bad-back: #43211e; --link: #8ab8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.6rem; overflow-wrap: anywhere; }
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
"""


@cache
def page_template(text: str) -> Any:
    """A template of jinja2; what is put in is escaped."""
    from jinja2 import Environment

    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)


def picture_address(picture: Image, side: int, quality: int = _QUALITY) -> str:
    """An address with a JPEG in it.

    Args:
        picture: of any mode; it is not changed.
        side: pixels of the longer side at the most.
        quality: of the JPEG.
    """
    small = picture.convert("RGB") if picture.mode not in ("RGB", "L") else picture.copy()
    small.thumbnail((side, side))
    held = io.BytesIO()
    small.save(held, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode("ascii")
