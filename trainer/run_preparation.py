"""What making a run ready needs: what a stage was given, where it runs, its loaders and their limits, and checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DistributedSampler, SequentialSampler

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_whole
from flashtask.core.seeding import derive_seed
from flashtask.trainer.callbacks.callback import keeps_state, state_name
from flashtask.trainer.combined_loader import CombinedLoader, combined, holds_loaders
from flashtask.trainer.data_loaders import length_of, rebuild_loader
from flashtask.trainer.datamodule import DataModule, GivenLoaders, Loaders
from flashtask.trainer.device_plan import DevicePlan, resolve_device_plan
from flashtask.trainer.given_loaders import check_loader
from flashtask.trainer.module import Module
from flashtask.trainer.restarting_loader import RestartingLoader
from flashtask.trainer.wrapping import without_wrapper

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.trainer import Trainer

__all__ = [
    "check_module",
    "check_state_keys",
    "check_training_data",
    "data_of",
    "device_plan_of",
    "evaluation_loaders",
    "leave_optimization_to_module",
    "limit_of",
    "memory_format_of",
    "training_loader",
    "want_gradients",
]


def check_module(module: object) -> Module:
    """The module itself, also of `torch.compile(module)`, or an error that names what was given instead."""
    module = without_wrapper(module)
    if not isinstance(module, Module):
        raise UsageError(
            f"a Trainer needs a flashtask.Module, not {type(module).__name__}",
            fix="class Net(flashtask.Module): ... with training_step and configure_optimizers",
        )
    return module


def data_of(module: Module, datamodule: DataModule | None, **loaders: Loaders | None) -> DataModule:
    """The data module of a stage: the one given (also as first loader), or one around the given loaders.

    Raises:
        UsageError: what was given is neither a loader nor a data module, or two of them define the data.
    """
    given = {stage: loader for stage, loader in loaders.items() if loader is not None}
    for stage, loader in list(given.items()):
        if isinstance(loader, type) and issubclass(loader, DataModule):
            raise _is_a_class(loader)
        check_loader(loader, stage, module)
        if isinstance(loader, DataModule):
            if datamodule is not None and datamodule is not loader:
                raise UsageError("two data modules are given, and a run takes one", fix="drop one of them")
            datamodule = loader
            del given[stage]
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


def device_plan_of(trainer: Trainer, module: Module | None = None) -> DevicePlan:
    """Where the runs of a trainer are, and in which number formats: the argument, else what the module prefers."""
    return resolve_device_plan(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        strategy=trainer.strategy,
        precision=trainer.precision,
        plugins=trainer.plugins,
        default_precision=(module or Module).default_precision,
        num_nodes=trainer.num_nodes,
    )


def memory_format_of(module: Module, device: torch.device, name: str | None = None) -> torch.memory_format:
    """The layout of weights and images in memory: the one of this name, else what the module prefers."""
    name = name or module.default_memory_format
    if name == "auto":
        convolutions = any(isinstance(part, nn.Conv2d) for part in module.modules())
        # torch refuses to lay out 5-D weights like 4-D ones.
        possible = device.type in ("cpu", "cuda") and all(p.dim() != 5 for p in module.parameters())
        name = "channels_last" if convolutions and possible else "contiguous"
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def want_gradients(wanted: Mapping[nn.Parameter, bool]) -> None:
    """Set `requires_grad` of each parameter to the value that is given for it."""
    for parameter, before in wanted.items():
        parameter.requires_grad_(before)


def leave_optimization_to_module(run: FitRun) -> None:
    """With manual optimization the module does what the engine does otherwise.

    Raises:
        UsageError: the trainer was given an argument that only the engine's own steps obey.
    """
    for argument, off, instead in (
        ("accumulate_grad_batches", 1, "call optimizer.step() every so many batches in training_step"),
        ("gradient_clip_val", None, "self.clip_gradients(optimizer, gradient_clip_val=...) in training_step"),
    ):
        value = getattr(run.trainer, argument)
        if value not in (off, 0):
            raise UsageError(
                f"{argument}={value!r} does nothing with manual optimization",
                why=f"{type(run.module).__name__}.automatic_optimization is False",
                fix=instead,
            )
    for rate in run.schedulers:
        rate.is_paused = True


def check_training_data(loader: object, module: Module) -> None:
    """There is something to train on.

    Raises:
        UsageError: there is nothing, or it is something else than loaders.
    """
    check_loader(loader, "train", module)
    if loader is None:
        raise UsageError("there is nothing to train on", fix="trainer.fit(model, datamodule=data)")


def training_loader(trainer: Trainer, loader: Any, seed: int, *, joins_single: bool = False) -> tuple[Any, int | None]:
    """The loader to train on and how many batches at the most; to overfit, the same first ones in every epoch.

    Args:
        trainer: whose limits count.
        loader: that the data has given.
        seed: of the run.
        joins_single: as in `OrderedBatches`: the model has BatchNorm that trains.
    """
    if hasattr(loader, "__next__") and trainer.max_steps < 0 and trainer.max_epochs != 1:
        raise UsageError(
            f"the training data is a {type(loader).__name__}, which gives its batches only once",
            why="a run goes through the batches in every epoch",
            fix="a list of the batches: list(...); or Trainer(max_epochs=1), or max_steps=... where it never ends",
        )
    few = trainer.overfit_batches

    def shared(number: int, one: Any) -> Any:
        """Several loaders have orders of their own, also where they have the same samples."""
        own_seed = derive_seed("loader", seed, number) if number else seed
        return _shared(trainer, one, seed=own_seed, training=True, in_order=bool(few), joins_single=joins_single)

    loader = combined(loader)
    rebuilt = loader.with_loaders(shared) if isinstance(loader, CombinedLoader) else shared(0, loader)
    if few and rebuilt is loader and type(getattr(loader, "sampler", None)) is not SequentialSampler:
        trainer.say(f"overfit_batches={few}: your own loader keeps its order; if it shuffles, the batches change")
    return rebuilt, limit_of(few or trainer.limit_train_batches, rebuilt)


def check_state_keys(run: FitRun) -> None:
    """Each callback that has state stores it under a name of its own."""
    seen = set[str]()
    for callback in run.callbacks:
        if not keeps_state(callback):
            continue
        name = state_name(callback)
        if name in seen:
            raise UsageError(
                f"two callbacks store their state as {name!r}",
                fix="give each its own: a property state_key in the class",
            )
        seen.add(name)


def evaluation_loaders(trainer: Trainer, module: Module, given: Any, stage: str) -> list[Any]:
    """The loaders of a validation, test or prediction, one after the other; empty if there is none."""
    if given is None:
        return []
    check_loader(given, stage, module)
    in_turn = isinstance(given, CombinedLoader) and given.mode == "sequential"
    several = given.flattened if in_turn else CombinedLoader(given).flattened if holds_loaders(given) else [given]

    def shared(number: int, one: Any) -> Any:
        return _shared(trainer, one, seed=trainer.seed, training=False)

    return [
        one.with_loaders(shared) if isinstance(one, CombinedLoader) else shared(number, one)
        for number, one in enumerate(several)
        if one is not None
    ]


def _shared(trainer: Trainer, loader: Any, **options: Any) -> Any:
    """The loader with the run's order, and in each of several processes with its share of the samples."""
    strategy = trainer.strategy
    shares = strategy.world_size > 1 and trainer.use_distributed_sampler
    if shares:
        options["process"] = strategy.global_rank, strategy.world_size
    rebuilt = rebuild_loader(loader, **options)
    if isinstance(rebuilt, RestartingLoader):
        rebuilt.say = trainer.say
    if shares and rebuilt is loader and not isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise UsageError(
            f"each of {strategy.world_size} processes would take all samples of a loader",
            why="it has an order of its own (a sampler, an IterableDataset, a list of batches), which cannot be shared",
            fix="a plain DataLoader without a sampler; or share the samples yourself and use_distributed_sampler=False",
        )
    return rebuilt


def limit_of(limit: float | None, loader: Any) -> int | None:
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
