"""The sections of a zoo file and their keys, as pydantic models, and the check of a YAML document against them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashtask.core.errors import UsageError, did_you_mean, key_fix
from flashtask.core.yaml_reader import YamlDocument

__all__ = ["Checkpoint", "HeadEntry", "OwnBackbone", "PackagedWeights", "PreprocessingFields", "Provider"]
__all__ += ["RecipeEntry", "TaskEntry", "Zoo", "check_zoo_document"]

NAME = r"^\w[\w.+-]*$"
SHA256 = r"^[0-9a-f]{64}$"
INSIDE = r"^\w[\w.+ -]*(/\w[\w.+ -]*)*$"
COMMIT = r"^[0-9a-f]{40}$"
SOURCE = r"^([a-z]+/[\w.]+|hf-hub:[\w.-]+/[\w.-]+@[0-9a-f]{40})$"
_SOURCE = "write timm/NAME, torchvision/NAME, or hf-hub:ORGANISATION/NAME@ and the 40 digits of a commit"
#: Characters of a value that a message quotes.
_SHOWN = 80
_SUM = "write the 64 digits that `sha256sum FILE` prints"


_Name = Annotated[str, Field(pattern=NAME)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Entry(_Section):
    """The fields that every entry may have.

    Args:
        override: it replaces what its name means without this file.
    """

    override: bool = False


class Provider(_Entry):
    """A library that models come from."""

    credit: str
    url: str
    licence: str


class PackagedWeights(_Section):
    """Weights inside an installed package.

    Args:
        package: the distribution's name for pip.
        file: path of the weights from where packages are installed.
        size: bytes, as read from the file.
        sha256: of the file, verified before it is used.
    """

    package: str
    file: str = Field(pattern=INSIDE, description="write the path inside of the package's folder")
    size: int | None = Field(default=None, ge=1)
    sha256: str | None = Field(default=None, pattern=SHA256, description=_SUM)


class PreprocessingFields(_Section):
    """The fields of `Preprocessing` in which an entry differs from its source."""

    input_size: list[int] | None = Field(default=None, min_length=3, max_length=3)
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are given."""
        return self.model_dump(exclude_none=True)


class OwnBackbone(_Entry):
    """A model of a library with its own weights, preprocessing or options.

    Args:
        source: `timm/NAME` or `torchvision/NAME`, with or without the tag of its weights, or a repository of the hub
            at one commit.
        weights: where the weights come from; those of the source without it.
        preprocessing: fields that replace the source's own.
        options: arguments for the source's builder.
    """

    description: str = ""
    source: str = Field(pattern=SOURCE, description=_SOURCE)
    weights: PackagedWeights | None = None
    preprocessing: PreprocessingFields = Field(default_factory=PreprocessingFields)
    options: dict[str, Any] = Field(default_factory=dict)
    licence: str | None = None


class HeadEntry(_Entry):
    """A head's line in listings, and its options with their defaults.

    Args:
        source: the head that it is made from; only the heads of flashtask itself have none.
    """

    description: str
    source: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class TaskEntry(_Entry):
    """A task's line in listings, and what the command line takes for arguments of it that are not given."""

    description: str
    defaults: dict[str, Any] = Field(default_factory=dict)


class Checkpoint(_Entry):
    """A trained task on the hub, at one commit (40 hexadecimal digits, for a branch or a tag can move)."""

    description: str = ""
    task: str
    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="write organisation/name")
    revision: str = Field(pattern=COMMIT, description="write the 40 hexadecimal digits of a commit")
    size: int | None = Field(default=None, ge=1)
    sha256: str | None = Field(default=None, pattern=SHA256, description=_SUM)
    licence: str | None = None


class RecipeEntry(_Entry):
    """A recipe, and the result that it reached where that was measured."""

    description: str = ""
    recipe: dict[str, Any]
    expected: dict[str, float] = Field(default_factory=dict)


class Zoo(_Section):
    """A whole zoo file."""

    providers: dict[_Name, Provider] = Field(default_factory=dict)
    backbones: dict[_Name, OwnBackbone] = Field(default_factory=dict)
    heads: dict[_Name, HeadEntry] = Field(default_factory=dict)
    tasks: dict[_Name, TaskEntry] = Field(default_factory=dict)
    checkpoints: dict[_Name, Checkpoint] = Field(default_factory=dict)
    recipes: dict[_Name, RecipeEntry] = Field(default_factory=dict)


def check_zoo_document(document: YamlDocument) -> Zoo:
    """The entries of a zoo file.

    Raises:
        UsageError: a wrong key (with the nearest right one), a wrong type or a missing key; the message has
            the file, line and column, of the first problem if there are several.
    """
    if not isinstance(document.content, dict):
        raise document.error(what=f"this must be a mapping of keys, not {_kind(document.content, quoted=False)}")
    try:
        return Zoo.model_validate(document.content)
    except ValidationError as error:
        # A mistyped key is also a missing one, so what is missing comes last.
        problems = sorted(error.errors(), key=lambda each: (each["type"] == "missing", document.place(_path(each))))
        first = _problem(document, problems[0])
        if len(problems) > 1:
            first.why = f"{first.why}; {len(problems) - 1} more below".lstrip("; ")
        raise first from error


def _path(details: Any) -> tuple[Any, ...]:
    """Where in the document a problem is; pydantic marks a wrong key of a mapping by `[key]` behind it."""
    loc: tuple[Any, ...] = details["loc"]
    return loc[:-1] if loc[-1] == "[key]" else loc


def _problem(document: YamlDocument, details: Any) -> UsageError:
    path, kind = _path(details), details["type"]
    name = ".".join(map(str, path))
    fields = _model_at(path[:-1]).model_fields
    if kind == "extra_forbidden":
        return document.error(*path, what=f"there is no key {name!r}", fix=key_fix(str(path[-1]), fields))
    if kind == "missing":
        return document.error(*path, what=f"the key {name!r} is missing")
    if kind == "string_pattern_mismatch" and details["loc"][-1] == "[key]":
        why = "a name has letters, digits, `_`, `-` and `.`; a library comes before a `/`"
        return document.error(*path, what=f"{path[0]}: {path[1]!r} cannot be the name of an entry", why=why)
    if kind == "literal_error":
        fix = did_you_mean(str(details["input"]), re.findall(r"'(\w+)'", details["ctx"]["expected"]))
    else:
        fix = (field.description if (field := fields.get(path[-1])) else None) or ""
    why = f"it is {_kind(details['input'])}"
    return document.error(*path, what=f"{name}: {details['msg'].lower()}", why=why, fix=fix)


def _model_at(path: tuple[Any, ...]) -> type[BaseModel]:
    """The model whose keys are at a path; one without fields where they are free."""
    model: type[BaseModel] = Zoo
    for part in (*path[:1], *path[2:]):  # the second part is the name of an entry
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        model = next((kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")), BaseModel)
    return model


def _kind(value: Any, quoted: bool = True) -> str:
    """What a value is; a file that is not a zoo file at all is not quoted, because it may hold anything."""
    known = {dict: "a mapping", list: "a list", type(None): "empty"}
    if (found := known.get(type(value))) is not None:
        return found
    kind = {str: "text", int: "number"}.get(type(value), "value")
    text = repr(value)
    return f"the {kind} {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}" if quoted else f"a {kind}"
