"""The sections of a zoo file and their keys, as pydantic models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Checkpoint",
    "HeadEntry",
    "OwnBackbone",
    "PackagedWeights",
    "Provider",
    "RecipeEntry",
    "TaskEntry",
    "Zoo",
]

SHA256 = r"^[0-9a-f]{64}$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Provider(_Section):
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
    file: str
    size: int | None = Field(default=None, ge=1)
    sha256: str | None = Field(default=None, pattern=SHA256)


class OwnBackbone(_Section):
    """A model of a library with its own weights, preprocessing or options.

    Args:
        source: `timm/NAME` or `torchvision/NAME`.
        weights: where the weights come from; those of the source without it.
        preprocessing: fields that replace the source's own.
        options: arguments for the source's builder.
    """

    description: str = ""
    source: str = Field(pattern=r"^[a-z]+/[\w.]+$")
    weights: PackagedWeights | None = None
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    licence: str | None = None


class HeadEntry(_Section):
    """A head's line in listings, and its options with their defaults."""

    description: str
    options: dict[str, Any] = Field(default_factory=dict)


class TaskEntry(_Section):
    """A task's line in listings, and its defaults."""

    description: str
    defaults: dict[str, Any] = Field(default_factory=dict)


class Checkpoint(_Section):
    """A trained task on the hub, at one revision."""

    description: str = ""
    task: str
    repository: str
    revision: str
    size: int | None = Field(default=None, ge=1)
    sha256: str | None = Field(default=None, pattern=SHA256)
    licence: str | None = None


class RecipeEntry(_Section):
    """A recipe and the result that it is expected to reach."""

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
