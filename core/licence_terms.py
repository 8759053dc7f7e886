"""What follows from common licences, by their SPDX identifiers. A summary to find one's way, and no legal advice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Part", "Terms", "conclusions", "terms_of"]


@dataclass(frozen=True)
class Terms:
    """What a licence asks of whoever uses or passes on what it covers.

    Args:
        name: the SPDX identifier, or the text that was given where it is not known here.
        attribution: keep the notices, or name the authors; None where that is not known.
        share_alike: what is made of it and passed on has to have the same licence.
        commercial: whether commercial use is allowed.
        remark: what else matters.
    """

    name: str
    attribution: bool | None = None
    share_alike: bool | None = None
    commercial: bool | None = None
    remark: str = ""

    @property
    def is_known(self) -> bool:
        """Whether it is in the table."""
        return self.attribution is not None

    def words(self) -> str:
        """What follows, in one line."""
        if not self.is_known:
            return self.remark
        found = [
            "attribution" if self.attribution else "",
            "share alike" if self.share_alike else "",
            "" if self.commercial else "no commercial use",
            self.remark,
        ]
        return ", ".join(filter(None, found)) or "no conditions"


_NETWORK = "also for users over a network"
_USES = "restricted uses are listed in its text"
_TABLE = (
    Terms("0BSD", False, False, True),
    Terms("AFL-3.0", True, False, True),
    Terms("AGPL-3.0-only", True, True, True, _NETWORK),
    Terms("AGPL-3.0-or-later", True, True, True, _NETWORK),
    Terms("Apache-2.0", True, False, True, "state changes"),
    Terms("BSD-2-Clause", True, False, True),
    Terms("BSD-3-Clause", True, False, True),
    Terms("CC-BY-4.0", True, False, True, "state changes"),
    Terms("CC-BY-NC-4.0", True, False, False, "state changes"),
    Terms("CC-BY-NC-ND-4.0", True, False, False, "nothing changed may be passed on"),
    Terms("CC-BY-NC-SA-4.0", True, True, False, "state changes"),
    Terms("CC-BY-ND-4.0", True, False, True, "nothing changed may be passed on"),
    Terms("CC-BY-SA-4.0", True, True, True, "state changes"),
    Terms("CC0-1.0", False, False, True),
    Terms("CDLA-Permissive-2.0", True, False, True),
    Terms("CreativeML-OpenRAIL-M", True, False, True, _USES),
    Terms("GPL-2.0-only", True, True, True),
    Terms("GPL-3.0-only", True, True, True),
    Terms("GPL-3.0-or-later", True, True, True),
    Terms("ISC", True, False, True),
    Terms("LGPL-3.0-only", True, True, True),
    Terms("MIT", True, False, True),
    Terms("MPL-2.0", True, True, True, "for changed files"),
    Terms("ODbL-1.0", True, True, True),
    Terms("OpenRAIL", True, False, True, _USES),
    Terms("Unlicense", False, False, True),
)
_BY_NAME: Mapping[str, Terms] = {terms.name.lower(): terms for terms in _TABLE}
#: What the hub, timm and people write, and the identifier that it means.
_ALSO = {
    "agpl-3.0": "AGPL-3.0-only",
    "gpl-2.0": "GPL-2.0-only",
    "gpl-3.0": "GPL-3.0-only",
    "lgpl-3.0": "LGPL-3.0-only",
    "apache 2.0": "Apache-2.0",
    "apache2": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "cc0": "CC0-1.0",
    "odbl": "ODbL-1.0",
}
_NOT_SAID = ("", "unknown", "none", "not noted")
_PROPRIETARY = ("proprietary", "all rights reserved", "licenseref-proprietary")


def terms_of(licence: str | None) -> Terms:
    """What follows from a licence.

    Args:
        licence: an SPDX identifier in any case, or what the hub calls one; None where nobody has said.
    """
    text = " ".join((licence or "").split())
    lowered = text.lower()
    if lowered in _NOT_SAID:
        return Terms("unknown", remark="ask whoever made it")
    if lowered in _PROPRIETARY:
        return Terms("proprietary", remark="its owner decides")
    found = _BY_NAME.get(_ALSO.get(lowered, lowered).lower())
    return found or Terms(text[:100], remark="not known here: read its text")


@dataclass(frozen=True)
class Part:
    """Something that a model is made of.

    Args:
        kind: `code`, `backbone`, `began from`, `data` or `weights`.
        name: of what it is.
        licence: that is stated or noted for it; None where there is none.
    """

    kind: str
    name: str
    licence: str | None

    @property
    def terms(self) -> Terms:
        """What follows."""
        return terms_of(self.licence)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        terms = self.terms
        return {
            "part": self.kind,
            "name": self.name,
            "licence": terms.name if self.licence else None,
            "known": terms.is_known,
            "attribution": terms.attribution,
            "share_alike": terms.share_alike,
            "commercial": terms.commercial,
            "remark": terms.remark,
        }


def conclusions(parts: Iterable[Part]) -> list[str]:
    """What follows for somebody who passes the model on or uses it, a sentence each.

    Args:
        parts: of the model.
    """
    parts = list(parts)
    named = [(part, part.terms) for part in parts]

    def of(condition: Iterable[bool]) -> str:
        return ", ".join(f"{part.kind} ({part.name})" for part, holds in zip(parts, condition, strict=True) if holds)

    found = []
    if places := of(terms.commercial is False for _, terms in named):
        found.append(f"no commercial use, because of: {places}")
    if places := of(bool(terms.share_alike) for _, terms in named):
        found.append(f"share alike, what is made of it has the same licence: {places}")
    if places := of(bool(terms.attribution) for _, terms in named):
        found.append(f"attribution, keep notices and name the authors: {places}")
    if places := of(_USES in terms.remark for _, terms in named):
        found.append(f"some uses are forbidden, listed in the text of the licence: {places}")
    if places := of(not terms.is_known for _, terms in named):
        found.append(f"unknown, so nothing is certain before somebody has found out: {places}")
    own = next((terms for part, terms in named if part.kind == "weights"), None)
    if own is not None and own.commercial and any(terms.commercial is False for _, terms in named):
        found.append(f"{own.name} was given to the weights, but not everything that they are made of allows as much")
    return found
