"""Making a run ready: device, precision, data, loaders, optimizers, callbacks, the run folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from flashtask.core.errors import UsageError
from flashtask.core.seeding import seed_generators
from flashtask.trainer.accelerators import resolve_device
from flashtask.trainer.callbacks import Callback
from flashtask.trainer.datamodule import DataModule, GivenLoaders
from flashtask.trainer.finetuning import Freezing
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.hooks import listeners
from flashtask.trainer.loading import length_of, rebuild_loader
from flashtask.trainer.module import Module
from flashtask.trainer.optimizers import read_optimizers
from flashtask.trainer.precision import resolve_precision
from flashtask.trainer.restoring import restore_run
from flashtask.trainer.run import EvaluationRun, Run
from flashtask.trainer.stages import Finetuning

__all__ = ["check_module", "data_of", "prepare_evaluation", "prepare_fit"]


def check_module(module: Any) -> Module:
    """The module itself, or an error that says what was given instead."""
    if not isinstance(module, Module):
        raise UsageError(
            f"a Trainer needs a flashtask.Module, not {type(module).__name__}",
            fix="class Net(flashtask.Module): ... with training_step and configure_optimizers",
        )
    return module


def data_of(module: Module, datamodule: Any, **loaders: Any) -> DataModule:
    """The data module of a verb: the one given (also as first loader), or one around the given loaders."""
    given = {stage: loader for stage, loader in loaders.items() if loader is not None}
    for stage, loader in list(given.items()):
        if isinstance(loader, DataModule):
            datamodule = given.pop(stage)
    if datamodule is None:
        return GivenLoaders(module, **given)
    if given:
        raise UsageError("give either a datamodule or loaders, not both", fix="drop one of them")
    if not isinstance(datamodule, DataModule):
        raise UsageError(f"datamodule must be a flashtask.DataModule, not {type(datamodule).__name__}")
    return datamodule


def _start(run: Run, stage: str) -> None:
    """The common beginning of every verb: the data is fetched, meets the module, and is set up."""
    trainer, module, data = run.trainer, run.module, run.data
    module.trainer = data.trainer = trainer
    trainer.active_run = run
    data.prepare_data()
    module.connect(data)
    data.setup(stage)
    module.setup(stage)
    for callback in run.callbacks:
        callback.setup(trainer, module, stage)
    run.memory_format = _memory_format(trainer, module, run)
    module.to(device=run.device, memory_format=run.memory_format)
    for part in module.modules():
        if isinstance(part, Metric):
            part.reset()  # what an earlier run that failed may have left
    run.listeners = listeners(trainer, module, run.callbacks, Module, Callback)


def _memory_format(trainer: Any, module: Module, run: Run) -> torch.memory_format:
    name = trainer.memory_format or module.default_memory_format
    if name == "auto":
        convolutions = any(isinstance(part, nn.Conv2d) for part in module.modules())
        name = "channels_last" if convolutions and run.device.type in ("cpu", "cuda") else "contiguous"
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def _new(kind: type[Any], trainer: Any, module: Module, data: DataModule) -> Any:
    device = resolve_device(trainer.accelerator, trainer.devices)
    precision = resolve_precision(trainer.precision or module.default_precision, device)
    return kind(trainer, module, data, device, precision)


def prepare_fit(
    trainer: Any, module: Module, data: DataModule, finetuning: Finetuning | None, ckpt_path: Any
) -> FitRun:
    """A fit run that is ready to be driven: at its start, or where the checkpoint was written."""
    run: FitRun = _new(FitRun, trainer, module, data)
    run.seed, run.max_epochs, run.max_steps = trainer.seed, trainer.max_epochs, trainer.max_steps
    run.accumulate = trainer.accumulate_grad_batches
    run.callbacks = trainer.callbacks_of("fit")
    trainer.fit_run = run
    trainer.open_output(resume_from=ckpt_path)
    seed_generators(run.seed)
    _start(run, "fit")
    if finetuning is not None:
        run.freezing = Freezing(module, finetuning)
    loader = data.train_dataloader()
    if loader is None:
        raise UsageError("there is nothing to train on", fix="trainer.fit(model, datamodule=data)")
    run.loader = rebuild_loader(loader, seed=run.seed, training=True)
    run.limit = _limit(trainer.limit_train_batches, run.loader)
    _add_validation(run)
    run.optimizers, run.schedulers = read_optimizers(module.configure_optimizers())
    if ckpt_path is not None:
        restore_run(run, ckpt_path)
        run.sanity = None
    return run


def _add_validation(run: FitRun) -> None:
    trainer = run.trainer
    writes_step = type(run.module).validation_step is not Module.validation_step
    loaders = _loaders(run.data.val_dataloader(), run.seed) if writes_step else []
    limits = [_limit(trainer.limit_val_batches, loader) for loader in loaders]
    if not loaders or all(limit == 0 for limit in limits):
        return
    run.validation = EvaluationRun(run, "validation", loaders, limits, parent=run)
    if trainer.num_sanity_val_steps:
        steps = trainer.num_sanity_val_steps
        few = limits if steps < 0 else [steps if limit is None else min(steps, limit) for limit in limits]
        run.sanity = EvaluationRun(run, "validation", loaders, few, parent=run)


def prepare_evaluation(trainer: Any, module: Module, data: DataModule, stage: str) -> EvaluationRun:
    """A run of `validate`, `test` or `predict` that is ready to be driven."""
    word = {"validate": "validation", "test": "test", "predict": "predict"}[stage]
    run: Run = _new(Run, trainer, module, data)
    run.callbacks = trainer.callbacks_of(stage)
    _start(run, stage)
    short = {"validate": "val"}.get(stage, stage)
    step = f"{word}_step"
    if stage != "predict" and getattr(type(module), step) is getattr(Module, step):
        raise UsageError(f"{type(module).__name__} has no {step}", fix=f"def {step}(self, batch, batch_idx)")
    loaders = _loaders(getattr(data, f"{short}_dataloader")(), trainer.seed)
    if not loaders:
        raise UsageError(f"there is nothing to {stage} on", fix=f"trainer.{stage}(model, dataloaders=...)")
    limits = [_limit(getattr(trainer, f"limit_{short}_batches"), loader) for loader in loaders]
    evaluation = EvaluationRun(run, word, loaders, limits, keep_outputs=stage == "predict")
    evaluation.callbacks, evaluation.listeners = run.callbacks, run.listeners
    return evaluation


def _loaders(given: Any, seed: int) -> list[Any]:
    if given is None:
        return []
    several = list(given) if isinstance(given, (list, tuple)) and not _is_batch_list(given) else [given]
    return [rebuild_loader(loader, seed=seed, training=False) for loader in several if loader is not None]


def _is_batch_list(given: Any) -> bool:
    """A list of tensors or of tuples is a list of batches, so one loader; a list of loaders is several."""
    return len(given) > 0 and isinstance(given[0], (torch.Tensor, tuple, dict))


def _limit(limit: Any, loader: Any) -> int | None:
    """How many batches a `limit_*_batches` means: a whole number of them, or a share of the loader's length."""
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return None
    if isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0:
        return limit
    if isinstance(limit, float) and 0 <= limit < 1:
        length = length_of(loader)
        if length is None:
            raise UsageError(f"a share of batches ({limit}) needs a loader with a length", fix="give a whole number")
        return max(1, int(length * limit)) if limit else 0
    raise UsageError(f"a limit of batches is a whole number or a share from 0.0 to 1.0, not {limit!r}")
