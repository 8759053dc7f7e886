"""The backbone of a task for which none is named: one whose weights are here, so that a first run needs no network."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from flashtask.core.zoo import load_zoo

__all__ = ["AUTO", "default_backbone", "installed_backbone"]

#: The name that means "choose one"; checkpoints and the recipes of runs hold the name that it became.
AUTO = "auto"


def installed_backbone() -> str | None:
    """The first backbone of the zoo whose weights are in an installed package."""
    found = (name for name, own in load_zoo().backbones.items() if own.weights and _is_installed(own.weights.package))
    return next(found, None)


def default_backbone() -> str:
    """The backbone whose weights are installed; `resnet18`, whose weights are fetched, where none are."""
    return installed_backbone() or "resnet18"


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
