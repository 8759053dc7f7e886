"""Checks the content of a YAML document against a pydantic model, and says where and how it is wrong."""

from __future__ import annotations

import re
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.core.yaml_reader import YamlDocument

__all__ = ["check_document"]

M = TypeVar("M", bound=BaseModel)


def check_document(document: YamlDocument, schema: type[M]) -> M:
    """The document as an instance of `schema`.

    Raises:
        UsageError: a wrong key (with the nearest right one), a wrong type or a missing key; the message has
            the file, line and column, of the first problem if there are several.
    """
    if not isinstance(document.content, dict):
        raise document.error((), f"this must be a mapping of keys, not {_kind(document.content)}")
    try:
        return schema.model_validate(document.content)
    except ValidationError as error:
        problems = [_problem(document, schema, details) for details in error.errors(include_url=False)]
        first = min(problems, key=lambda problem: problem[0])[1]
        if len(problems) > 1:
            first.why = f"{first.why}; {len(problems) - 1} more below".lstrip("; ")
        raise first from error


def _problem(
    document: YamlDocument, schema: type[BaseModel], details: Any
) -> tuple[tuple[bool, tuple[int, int]], UsageError]:
    path, written = _written_path(document.content, details["loc"])
    name = ".".join(str(part) for part in path)
    if details["type"] == "extra_forbidden":
        known = _known_keys(schema, path[:-1])
        fix = did_you_mean(str(path[-1]), known) or f"the keys here are: {', '.join(known)}"
        return (False, document.place(path)), document.error(path, f"there is no key {name!r}", fix=fix)
    if details["type"] == "missing":
        # Told last: a mistyped key is also a missing one.
        return (True, document.place(path)), document.error(path, f"the key {name!r} is missing")
    fix = _right_value(schema, path, details, written)
    error = document.error(path, f"{name}: {details['msg'].lower()}", why=f"it is {_kind(written)}", fix=fix)
    return (False, document.place(path)), error


def _right_value(schema: type[BaseModel], path: tuple[Any, ...], details: Any, written: Any) -> str:
    """What to write instead: the nearest of the words that may stand there, or what the schema says of the field."""
    if details["type"] == "literal_error":
        return did_you_mean(str(written), re.findall(r"'(\w+)'", details["ctx"]["expected"]))
    model = _model_at(schema, path[:-1])
    field = model.model_fields.get(path[-1]) if model and path else None
    return (field.description if field else None) or ""


def _written_path(content: Any, loc: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """The part of pydantic's location that stands in the document: its own marks for unions are left out."""
    path: list[Any] = []
    for position, part in enumerate(loc):
        if part == "[key]":  # pydantic's mark for a wrong key, which is the part before it
            break
        is_key = isinstance(content, dict) and part in content
        is_index = isinstance(content, list) and isinstance(part, int) and part < len(content)
        if is_key or is_index:
            content = content[part]
        elif position == len(loc) - 1 and isinstance(content, dict):
            content = None  # the missing key itself
        else:
            continue
        path.append(part)
    return tuple(path), content


def _known_keys(schema: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    model = _model_at(schema, path)
    return list(model.model_fields) if model else []


def _model_at(schema: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel] | None:
    """The model that stands at a path of names, mappings' keys and positions."""
    annotation: Any = schema
    for part in path:
        model = _model_in(annotation)
        if model is annotation:
            annotation = model.model_fields[part].annotation if part in model.model_fields else None
        elif get_args(annotation):
            annotation = model  # a mapping's key or a list's position leads to its values
    return _model_in(annotation)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    names = {dict: "a mapping", list: "a list", str: "the text", bool: "the value", int: "the number"}
    kind = names.get(type(value), "the value")
    return kind if isinstance(value, (dict, list)) else f"{kind} {value!r}"
