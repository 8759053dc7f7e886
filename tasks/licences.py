"""The licences of what a trained model is made of: its code, the weights it began from, its data, its own weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from flashtask.backbones import BACKBONES
from flashtask.core.errors import FlashtaskError, UsageError, key_fix
from flashtask.core.licence_terms import Part
from flashtask.core.zoo import load_zoo

__all__ = ["STATED", "checked_statements", "licences_in", "noted_licence", "parts_of", "record_of"]

#: What users state the licence of.
STATED = ("weights", "data")
_OWN = "Apache-2.0"
_MOST = 200


def checked_statements(given: Mapping[str, Any]) -> dict[str, str]:
    """Licences that a user states, by what they are of.

    Raises:
        UsageError: of something else, or no text.
    """
    for name, licence in given.items():
        if name not in STATED:
            raise UsageError(f"licences has no key {name!r}", fix=key_fix(str(name), STATED))
        if not (isinstance(licence, str) and licence.strip() and len(licence) <= _MOST):
            raise UsageError(f"licences: {name} must be a licence, not {licence!r}", fix=f"{name}: CC-BY-4.0")
    return {name: " ".join(licence.split()) for name, licence in given.items()}


def noted_licence(backbone: str) -> str | None:
    """The licence of pretrained weights, as the zoo or their library notes it for a name."""
    try:
        found = BACKBONES.entry(backbone).known().get("licence")
    except (FlashtaskError, ImportError):
        return None
    return found if isinstance(found, str) else None


def record_of(
    arguments: Mapping[str, Any],
    stated: Mapping[str, str],
    began_from: Mapping[str, Any] | None,
    source: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a checkpoint holds: names with licences, None where none is known.

    Args:
        arguments: of the task.
        stated: by the user, for this model.
        began_from: the record of the model whose weights this one began from, if it has one.
        source: where those weights were read.
    """
    backbone = arguments.get("backbone")
    named = backbone if isinstance(backbone, str) else None
    provider = (named or "").partition("/")[0]
    provider = provider if provider in load_zoo().providers else "timm" if named else ""
    found: dict[str, Any] = {"code": {"flashtask": _OWN}}
    if provider:
        found["code"][provider] = load_zoo().providers[provider].licence
    if began_from and isinstance(began_from.get("backbone"), Mapping):
        found["backbone"] = dict(began_from["backbone"])
    elif arguments.get("pretrained", True) is not False:
        found["backbone"] = {"name": named, "licence": None if named is None else noted_licence(named)}
    if source is not None or began_from:
        known = began_from or {}
        place = source or {}
        name = place.get("repository") or os.path.basename(place.get("path") or "") or "another model"
        found["began_from"] = {"name": name, "weights": known.get("weights"), "data": known.get("data")}
    return {**found, "data": stated.get("data"), "weights": stated.get("weights")}


def licences_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """The record in the content of a file; of a file without one, what follows from the names in it."""
    found = content.get("licences")
    if isinstance(found, Mapping):
        return dict(found)
    return record_of(content.get("hyper_parameters") or {}, {}, None, content.get("pretrained_from"))


def parts_of(record: Mapping[str, Any]) -> Iterator[Part]:
    """The parts of a model.

    Args:
        record: of a file, which may be somebody else's: what is no text in it is not known.
    """
    for name, licence in _mapping(record.get("code")).items():
        yield Part("code", _text(name) or "code", _text(licence))
    if "backbone" in record:
        backbone = _mapping(record["backbone"])
        yield Part(
            "backbone", _text(backbone.get("name")) or "weights of unknown origin", _text(backbone.get("licence"))
        )
    if "began_from" in record:
        before = _mapping(record["began_from"])
        name = _text(before.get("name")) or "another model"
        yield Part("began from", name, _text(before.get("weights")))
        if before.get("data"):
            yield Part("its data", name, _text(before.get("data")))
    yield Part("data", "training data", _text(record.get("data")))
    yield Part("weights", "this model", _text(record.get("weights")))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    """A text without control characters, which a terminal would obey."""
    text = "".join(filter(str.isprintable, value[:_MOST])) if isinstance(value, str) else ""
    return text.strip() or None
