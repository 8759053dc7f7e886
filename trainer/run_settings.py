"""The settings that decide a run's numbers beside its seed: compared when a run is resumed."""

from __future__ import annotations

from typing import Any

from flashtask.trainer.loading import OrderedBatches

__all__ = ["settings_of"]

_OF_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


def settings_of(run: Any) -> dict[str, Any]:
    """Finetuning strategy, accumulation, gradient clipping and, where the loader tells it, batch size of a fit run."""
    settings = {name: getattr(run.trainer, name) for name in _OF_TRAINER}
    settings["strategy"] = run.freezing.finetuning.recipe() if run.freezing is not None else "no_freeze"
    batches = getattr(run.loader, "batch_sampler", None)
    size = batches.batch_size if isinstance(batches, OrderedBatches) else getattr(run.loader, "batch_size", None)
    return settings if size is None else {**settings, "batch_size": size}
