"""Making a run ready: device, precision, data, loaders, optimizers, callbacks, the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from flashtask.core.allocator import keep_freed_memory
from flashtask.core.checkpoint import put_to_use, read_checkpoint
from flashtask.core.checks import is_whole
from flashtask.core.errors import UsageError
from flashtask.core.metrics import is_metric
from flashtask.core.seeding import derive_seed, seed_generators
from flashtask.trainer.callbacks.base import Callback, keeps_state
from flashtask.trainer.checkpoints.restoring import load_checkpoint_into, restore_run
from flashtask.trainer.closed_form import ClosedFormFit, fits_in_closed_form, refuse_gradients
from flashtask.trainer.datamodule import DataModule, GivenLoaders, transfer_hooks
from flashtask.trainer.distribution.agreement import facts_of_data, facts_of_module
from flashtask.trainer.feature_cache import use_features, use_known_features
from flashtask.trainer.finetuning.freezing import Freezing
from flashtask.trainer.finetuning.lora import adapt, adapted_layers
from flashtask.trainer.finetuning.progress import PhaseProgress, require_phase_groups
from flashtask.trainer.finetuning.strategies import Finetuning
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.given_loaders import check_loader, is_batch_list
from flashtask.trainer.hooks import listeners, report_misspelled_data_methods
from flashtask.trainer.loading import length_of, rebuild_loader
from flashtask.trainer.module import Module
from flashtask.trainer.optimizers import read_optimizers, require_no_closure
from flashtask.trainer.placement.placement import Placement, resolve_placement
from flashtask.trainer.placement.precision import record_precision
from flashtask.trainer.run import EvaluationRun, Run, as_it_takes

__all__ = ["check_module", "data_of", "evaluation_run", "fit_run", "prepare"]


def check_module(module: Any) -> Module:
    """The module itself, or an error that says what was given instead."""
    if not isinstance(module, Module):
        raise UsageError(
            f"a Trainer needs a flashtask.Module, not {type(module).__name__}",
            fix="class Net(flashtask.Module): ... with training_step and configure_optimizers",
        )
    return module


def data_of(module: Module, datamodule: Any, **loaders: Any) -> DataModule:
    """The data module of a verb: the one given (also as first loader), or one around the given loaders.

    Raises:
        UsageError: what was given is neither a loader nor a data module, or two of them say what the data is.
    """
    given = {stage: loader for stage, loader in loaders.items() if loader is not None}
    for stage, loader in list(given.items()):
        if isinstance(loader, type) and issubclass(loader, DataModule):
            raise _is_a_class(loader)
        check_loader(loader, stage, module)
        if isinstance(loader, DataModule):
            if datamodule is not None and datamodule is not loader:
                raise UsageError("two data modules are given, and a run takes one", fix="drop one of them")
            datamodule = given.pop(stage)
    if datamodule is None:
        return GivenLoaders(module, **given)
    if isinstance(datamodule, type) and issubclass(datamodule, DataModule):
        raise _is_a_class(datamodule)
    if not isinstance(datamodule, DataModule):
        check_loader(datamodule, next(iter(loaders)), module)
        raise UsageError(
            f"datamodule must be a flashtask.DataModule, not {type(datamodule).__name__}",
            fix="give a loader without a name, after the model: trainer.fit(model, loader)",
        )
    if given:
        raise UsageError("give either a datamodule or loaders, not both", fix="drop one of them")
    return datamodule


def _is_a_class(given: type) -> UsageError:
    name = given.__name__
    return UsageError(f"{name} is a class, and a data module is needed", fix=f"datamodule={name}(...)")


def fit_run(trainer: Any, module: Module, data: DataModule, finetuning: Finetuning | None, resume_from: Any) -> FitRun:
    """A fit run that has not touched anything yet."""
    return FitRun(trainer, module, data, _placement(trainer, module), finetuning, resume_from)


def evaluation_run(trainer: Any, module: Module, data: DataModule, stage: str) -> EvaluationRun:
    """A run of `validate`, `test` or `predict` that has not touched anything yet."""
    return EvaluationRun(trainer, module, data, _placement(trainer, module), stage, None)


def _placement(trainer: Any, module: Module) -> Placement:
    return resolve_placement(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        strategy=trainer.strategy,
        precision=trainer.precision,
        plugins=trainer.plugins,
        default_precision=module.default_precision,
        num_nodes=trainer.num_nodes,
    )


def prepare(run: Run) -> None:
    """Make a run ready to be driven: at its start, or where its checkpoint was written."""
    if isinstance(run, FitRun):
        _prepare_fit(run)
    elif isinstance(run, EvaluationRun):
        _prepare_evaluation(run)


def _start(run: Run) -> None:
    """The common beginning of every verb: the data is fetched, meets the module, and is set up."""
    trainer, module, data = run.trainer, run.module, run.data
    run.callbacks = trainer.callbacks_of(run.stage)
    module.trainer = data.trainer = trainer
    trainer.active_run = run
    report_misspelled_data_methods(data, DataModule)
    run.listeners = listeners(trainer, module, run.callbacks, Module, Callback, run.own_part)
    if run.strategy.local_rank == 0:
        data.prepare_data()
    run.strategy.barrier("prepare_data")
    module.connect(data)
    _set_up_data(run, run.stage)
    module.data_is_set_up(data)
    run.undo.append(partial(module.teardown, run.stage))
    module.setup(run.stage)
    run.undo += [partial(callback.teardown, trainer, module, run.stage) for callback in reversed(run.callbacks)]
    for callback in run.callbacks:
        callback.setup(trainer, module, run.stage)
    run.memory_format = _memory_format(trainer, module, run)
    module.to(device=run.device, memory_format=run.memory_format)
    run.precision.convert_module(module)
    if trainer.sync_batchnorm and run.strategy.world_size > 1:
        from flashtask.core.batchnorm import synchronize_batchnorm

        synchronize_batchnorm(module, run.device)
    run.strategy.agree(lambda: facts_of_module(module))
    if isinstance(run, FitRun):
        _adapt(run)
    run.strategy.setup(module)
    run.transfer = transfer_hooks(data, module)


def _set_up_data(run: Run, stage: str) -> None:
    """`setup` of the data module, whose `teardown` is called at the end of the run, also if `setup` fails half-way."""
    run.undo.append(partial(run.data.teardown, stage))
    run.data.setup(stage)


def _memory_format(trainer: Any, module: Module, run: Run) -> torch.memory_format:
    name = trainer.memory_format or module.default_memory_format
    if name == "auto":
        convolutions = any(isinstance(part, nn.Conv2d) for part in module.modules())
        # torch refuses to lay out 5-D weights like 4-D ones.
        possible = run.device.type in ("cpu", "cuda") and all(p.dim() != 5 for p in module.parameters())
        name = "channels_last" if convolutions and possible else "contiguous"
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def _prepare_fit(run: FitRun) -> None:
    trainer, module, data = run.trainer, run.module, run.data
    refuse_gradients(module, run.finetuning)
    trainer.open_output(run)
    seed_generators(run.seed)
    record_precision(module, trainer.precision)
    run.loggers = trainer.loggers if trainer.is_global_zero else []
    _start(run)
    if run.device.type == "cpu":
        keep_freed_memory()
    _check_state_keys(run)
    for part in module.modules():
        if is_metric(part):
            part.reset()  # what a run that failed may have left
    # An error in a turn of one of several optimizers leaves the parameters of the others switched off.
    run.undo.append(partial(_want_gradients, {p: p.requires_grad for p in module.parameters()}))
    if run.finetuning is not None:
        run.freezing = Freezing(module, run.finetuning)
        run.phases = PhaseProgress(run.freezing.finetuning, module)
        if (most := run.finetuning.length) is not None:
            run.max_epochs = most if run.max_epochs is None else min(most, run.max_epochs)
    content = None if run.resume_from is None else read_checkpoint(run.resume_from)
    if content is not None and "datamodule" in content:
        with put_to_use(str(run.resume_from)):
            data.load_state_dict(content["datamodule"])  # its loaders may depend on it
    loader = data.train_dataloader()
    check_loader(loader, "train", module)
    if isinstance(loader, (list, tuple)) and any(isinstance(one, DataLoader) for one in loader):
        raise UsageError(
            f"there are several loaders to train on ({len(loader)})",
            why="a step is given the batches of one",
            fix="DataLoader(ConcatDataset([...])), or a loader of your own that gives what a step needs",
        )
    if loader is None:
        raise UsageError("there is nothing to train on", fix="trainer.fit(model, datamodule=data)")
    run.loader, run.limit = _training_loader(trainer, loader, run.seed)
    run.strategy.agree(lambda: facts_of_data(run))
    run.training_step = _training_step(run)
    run.keeps_outputs = hasattr(module, "training_epoch_end")
    _add_validation(run)
    _add_training(run)
    if run.strategy.global_rank:
        # Dropout is to fall on other numbers in each process; weights are those of the first one.
        seed_generators(derive_seed("process", run.seed, run.strategy.global_rank) % 2**32)
    if content is not None:
        restore_run(run, run.resume_from, content)
        run.sanity = None
        if run.solving is not None:
            run.solving.resume()
    use_features(run)


def _add_training(run: FitRun) -> None:
    """Optimizers and schedulers; where the head is solved, the pass that takes their place."""
    module = run.module
    refuse_gradients(module, run.finetuning)  # the data may have made the head
    if fits_in_closed_form(module, run.finetuning):
        run.solving = ClosedFormFit(run)
        run.solving.prepare()
        return
    run.optimizers, run.schedulers = read_optimizers(module.configure_optimizers(), run)
    if run.freezing is not None and run.freezing.finetuning.has_rates:
        require_phase_groups(run.optimizers, run.freezing.rates, module)
    if run.automatic:
        require_no_closure(run.optimizers)
    else:
        _leave_optimization_to(module, run)


def _adapt(run: FitRun) -> None:
    """Give the layers that LoRA is to train their factors, before anybody looks at the parameters."""
    settings = None if run.finetuning is None else run.finetuning.lora
    if settings is not None:
        adaptation = adapt(run.module, run.module.modules_to_freeze(), settings, run.seed)
        if run.trainer.enable_model_summary:
            run.trainer.say(str(adaptation))
    elif adapted_layers(run.module):
        raise UsageError(
            "the model has LoRA factors, and this run would not train them",
            fix='model.merge_lora() before the fit, or strategy="lora:8" with the same rank',
        )


def _want_gradients(wanted: Mapping[nn.Parameter, bool]) -> None:
    for parameter, before in wanted.items():
        parameter.requires_grad_(before)


def _leave_optimization_to(module: Module, run: FitRun) -> None:
    """With manual optimization, what the engine would do by itself is the module's own."""
    for argument, off, instead in (
        ("accumulate_grad_batches", 1, "call optimizer.step() every so many batches in training_step"),
        ("gradient_clip_val", None, "self.clip_gradients(optimizer, gradient_clip_val=...) in training_step"),
    ):
        value = getattr(run.trainer, argument)
        if value not in (off, 0):
            raise UsageError(
                f"{argument}={value!r} does nothing with manual optimization",
                why=f"{type(module).__name__}.automatic_optimization is False",
                fix=instead,
            )
    for rate in run.schedulers:
        rate.is_paused = True


def _training_loader(trainer: Any, loader: Any, seed: int) -> tuple[Any, int | None]:
    """The loader to train on and how many batches at the most; to overfit, the same first ones in every epoch."""
    if hasattr(loader, "__next__") and trainer.max_steps < 0 and trainer.max_epochs != 1:
        raise UsageError(
            f"the training data is a {type(loader).__name__}, which gives its batches only once",
            why="a run goes through the batches in every epoch",
            fix="a list of the batches: list(...); or Trainer(max_epochs=1), or max_steps=... where it never ends",
        )
    few = trainer.overfit_batches
    rebuilt = _shared(trainer, loader, seed=seed, training=True, in_order=bool(few))
    if few and rebuilt is loader and type(getattr(loader, "sampler", None)) is not SequentialSampler:
        trainer.say(f"overfit_batches={few}: your own loader keeps its order; if it shuffles, the batches change")
    return rebuilt, _limit(few or trainer.limit_train_batches, rebuilt)


def _check_state_keys(run: FitRun) -> None:
    seen = set[str]()
    for callback in run.callbacks:
        if not keeps_state(callback):
            continue
        if callback.state_key in seen:
            raise UsageError(
                f"two callbacks store their state as {callback.state_key!r}",
                fix="give each its own: a property state_key in the class",
            )
        seen.add(callback.state_key)


def _training_step(run: FitRun) -> Callable[..., Any]:
    """The module's step, followed by its `training_step_end` if there is one."""
    module = run.module
    step = run.strategy.wrap_step(module, as_it_takes(module.training_step))
    if not hasattr(module, "training_step_end"):
        return step

    def step_and_end(*arguments: Any) -> Any:
        outputs = step(*arguments)
        run.moment = "training_step_end"
        changed = module.training_step_end(outputs)
        return outputs if changed is None else changed

    return step_and_end


def _add_validation(run: FitRun) -> None:
    trainer = run.trainer
    writes_step = type(run.module).validation_step is not Module.validation_step
    if not writes_step and isinstance(run.data, GivenLoaders) and run.data.has("val"):
        trainer.say(f"{type(run.module).__name__} has no validation_step: the validation data is not used")
    wanted = writes_step and not trainer.overfit_batches
    loaders = _loaders(run.data.val_dataloader(), "val", run) if wanted else []
    limits = [_limit(trainer.limit_val_batches, loader) for loader in loaders]
    if not loaders or all(limit == 0 for limit in limits):
        return
    run.validation = _nested_validation(run, loaders, limits)
    if steps := trainer.num_sanity_val_steps:
        few = limits if steps < 0 else [steps if limit is None else min(steps, limit) for limit in limits]
        run.sanity = _nested_validation(run, loaders, few)
        run.sanity.loggers = []  # it leaves no trace


def _nested_validation(run: FitRun, loaders: list[Any], limits: list[int | None]) -> EvaluationRun:
    nested = EvaluationRun(run.trainer, run.module, run.data, run.placement, "validate", run)
    nested.transfer = run.transfer
    nested.memory_format, nested.loaders, nested.limits = run.memory_format, loaders, limits
    nested.callbacks, nested.loggers, nested.listeners = run.callbacks, run.loggers, run.listeners
    return nested


def _prepare_evaluation(run: EvaluationRun) -> None:
    trainer, stage, step = run.trainer, run.stage, f"{run.word}_step"
    if stage != "predict" and getattr(type(run.module), step) is getattr(Module, step):
        raise UsageError(f"{type(run.module).__name__} has no {step}", fix=f"def {step}(self, batch, batch_idx)")
    _start(run)
    if run.weights_from is not None:
        load_checkpoint_into(run.module, read_checkpoint(run.weights_from), run.weights_from)
    short = {"validate": "val"}.get(stage, stage)
    if trainer.overfit_batches and stage != "predict":
        _set_up_data(run, "fit")
        if (loader := run.data.train_dataloader()) is not None:
            few, limit = _training_loader(trainer, loader, trainer.seed)
            run.loaders, run.limits = [few], [limit]
            return
    run.loaders = _loaders(getattr(run.data, f"{short}_dataloader")(), short, run)
    if not run.loaders:
        raise UsageError(f"there is nothing to {stage} on", fix=f"trainer.{stage}(model, dataloaders=...)")
    run.limits = [_limit(getattr(trainer, f"limit_{short}_batches"), loader) for loader in run.loaders]
    use_known_features(run)


def _loaders(given: Any, stage: str, run: Run) -> list[Any]:
    if given is None:
        return []
    check_loader(given, stage, run.module)
    several = list(given) if isinstance(given, (list, tuple)) and not is_batch_list(given) else [given]
    seed = run.trainer.seed
    return [_shared(run.trainer, loader, seed=seed, training=False) for loader in several if loader is not None]


def _shared(trainer: Any, loader: Any, **options: Any) -> Any:
    """The loader with the run's order, and in each of several processes with its share of the samples."""
    strategy = trainer.strategy
    if strategy.world_size == 1 or not trainer.use_distributed_sampler:
        return rebuild_loader(loader, **options)
    rebuilt = rebuild_loader(loader, **options, process=(strategy.global_rank, strategy.world_size))
    if rebuilt is loader and not isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise UsageError(
            f"each of {strategy.world_size} processes would take all samples of a loader",
            why="it has an order of its own (a sampler, an IterableDataset, a list of batches), which cannot be shared",
            fix="a plain DataLoader without a sampler; or share the samples yourself and use_distributed_sampler=False",
        )
    return rebuilt


def _limit(limit: Any, loader: Any) -> int | None:
    """How many batches a `limit_*_batches` means: a whole number of them, or a share of the loader's length."""
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return None
    if is_whole(limit, 0):
        return limit
    if isinstance(limit, float) and 0 <= limit < 1:
        length = length_of(loader)
        if length is None:
            raise UsageError(f"a share of batches ({limit}) needs a loader with a length", fix="give a whole number")
        return max(1, int(length * limit)) if limit else 0
    raise UsageError(f"a limit of batches is a whole number or a share from 0.0 to 1.0, not {limit!r}")
