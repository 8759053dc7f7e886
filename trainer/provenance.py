"""Where a module's weights come from: the run that made them, as a checkpoint or a model card tells it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashtask.trainer.fit_run import FitRun

__all__ = ["data_counts", "provenance_in", "provenance_of"]

_KEYS = ("epoch", "global_step", "metrics", "environment", "recipe", "data_counts", "pretrained_from")


def data_counts(data: Any) -> dict[str, dict[str, int]]:
    """Samples of each class by part of the data (`train`, `val`), as far as the data module knows them."""
    counts: dict[str, dict[str, int]] = getattr(data, "counts", dict)()
    return counts


def provenance_in(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint tells of the run that wrote it; None if it was not written by a run."""
    if "epoch" not in content:
        return None
    return {key: content.get(key) for key in _KEYS}


def provenance_of(run: FitRun) -> dict[str, Any]:
    """The same from a run, as it stands now."""
    from flashtask.trainer.checkpoints.content import environment  # which needs this module

    return {
        "epoch": int(run.history[-1]["epoch"]) if run.history else run.epoch,
        "global_step": run.global_step,
        "metrics": dict(run.metrics),
        "environment": environment(run),
        "recipe": run.recipe,
        "data_counts": data_counts(run.data),
        "pretrained_from": run.module.describe().get("pretrained_from"),
    }
