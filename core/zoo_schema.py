"""The sections of a zoo file and their keys, as pydantic models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Checkpoint",
    "HeadEntry",
    "OwnBackbone",
    "PackagedWeights",
    "PreprocessingFields",
    "Provider",
    "RecipeEntry",
    "TaskEntry",
    "Zoo",
]

SHA256 = r"^[0-9a-f]{64}$"
INSIDE = r"^\w[\w.+ -]*(/\w[\w.+ -]*)*$"
COMMIT = r"^[0-9a-f]{40}$"
SOURCE = r"^([a-z]+/[\w.]+|hf-hub:[\w.-]+/[\w.-]+@[0-9a-f]{40})$"
_SOURCE = "write timm/NAME, torchvision/NAME, or hf-hub:ORGANISATION/NAME@ and the 40 digits of a commit"
_SUM = "write the 64 digits that `sha256sum FILE` prints"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Entry(_Section):
    """What every entry may say.

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
    """The fields of `Preprocessing` that an entry says otherwise than its source."""

    input_size: list[int] | None = Field(default=None, min_length=3, max_length=3)
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are said."""
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
    """A task's line in listings, and what the command line takes for arguments of it that are not said."""

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

    providers: dict[str, Provider] = Field(default_factory=dict)
    backbones: dict[str, OwnBackbone] = Field(default_factory=dict)
    heads: dict[str, HeadEntry] = Field(default_factory=dict)
    tasks: dict[str, TaskEntry] = Field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = Field(default_factory=dict)
    recipes: dict[str, RecipeEntry] = Field(default_factory=dict)
