"""`Module`: a model, its loss and its optimizers, as the engine trains them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import nn
from torch.optim import Optimizer

from flashtask.core.errors import UsageError, nearest
from flashtask.trainer.batch_transfer import detached, move_to_device, stacked
from flashtask.trainer.datamodule import BatchTransfer, DataModule
from flashtask.trainer.devices.precision import Precision, recorded_precision
from flashtask.trainer.finetuning.lora import merge
from flashtask.trainer.hyperparameters import HyperparametersMixin
from flashtask.trainer.manual_optimization import ManualOptimizer, clip, train_only
from flashtask.trainer.module_hooks import ModuleHooks
from flashtask.trainer.results import Logged, LogSettings, reduction_name
from flashtask.trainer.wrapping import keep_unwrapped_names, unwrapped, unwrapped_name

if TYPE_CHECKING:
    from pathlib import Path

    from flashtask.core.checkpoint import MapLocation
    from flashtask.core.files import PathLike
    from flashtask.trainer.callbacks.callback import Callback
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.loggers.logger import Logger
    from flashtask.trainer.trainer import Trainer

__all__ = ["Module"]

AnyOptimizer = Optimizer | ManualOptimizer


class Module(ModuleHooks, BatchTransfer, HyperparametersMixin, nn.Module):
    """An `nn.Module` with the steps of training; `training_step` and `configure_optimizers` must be written."""

    _hparams_are_stored = True
    _trainer: Trainer | None = None

    #: False: `training_step` computes gradients and steps `self.optimizers()` itself, and returns what it likes.
    automatic_optimization: bool = True
    #: The metric by which checkpoints are ranked, and whether more is better (`max`) or less (`min`).
    monitor: str = "val_loss"
    monitor_mode: str = "min"
    #: What `Trainer(precision=None)` means for this module.
    default_precision: str = "32"
    #: What `Trainer(memory_format=None)` means for this module: `contiguous`, `channels_last` or `auto`.
    default_memory_format: str = "contiguous"
    #: What `Trainer.finetune`, `plan` and `tune` take where no strategy is given; `tune` takes none for `no_freeze`.
    default_strategy: Any = "no_freeze"
    #: Epochs of a run whose trainer has no `max_epochs`, and no `max_steps` or `max_time` that ends it.
    default_max_epochs: int = 1000
    #: Whether a checkpoint that is loaded must hold every weight and nothing else.
    strict_loading: bool = True
    #: A batch of inputs that `forward` takes (a tuple or dictionary: its arguments), for sizes in `ModelSummary`.
    example_input_array: Any = None
    #: Distributions (names on PyPI) that the module's outputs depend on; their versions are recorded with a run.
    libraries: tuple[str, ...] = ()
    #: What logs call a sample.
    sample_noun: str = "samples"
    #: A fit has changed the weights since they were made, or read from a file.
    was_fitted: bool = False
    #: The run that made the weights, as `run_record.provenance_of` describes it; None where nothing is known of it.
    provenance: dict[str, Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        keep_unwrapped_names(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a batch: a scalar tensor, or a dictionary with `loss`; None skips the batch."""
        raise UsageError(f"{type(self).__name__} has no training_step", fix="def training_step(self, batch, batch_idx)")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """What is done with a batch of validation; usually logs metrics."""
        raise UsageError(f"{type(self).__name__} has no validation_step")

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """What is done with a batch of a test; usually logs metrics."""
        raise UsageError(f"{type(self).__name__} has no test_step", fix="def test_step(self, batch, batch_idx)")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """What `Trainer.predict` collects for a batch: `forward`, unless you write something else."""
        return self(batch)

    def configure_optimizers(self) -> Any:
        """Optimizers and schedulers, in any form that `trainer.optimizers.read_optimizers` names."""
        written = [name for name in dir(type(self)) if name != "configure_optimizers" and name not in dir(Module)]
        close = nearest("configure_optimizers", written, most=1)
        raise UsageError(
            f"{type(self).__name__} has no configure_optimizers",
            fix=f"rename {close[0]}"
            if close
            else "def configure_optimizers(self): return torch.optim.Adam(self.parameters())",
        )

    # ---- manual optimization: `automatic_optimization = False`

    def optimizers(self) -> Any:
        """The optimizer that `configure_optimizers` gave, or a list of them where there are several.

        What it gives is stepped through the run's precision and counted; everything else is the optimizer's own.

        Raises:
            UsageError: outside of a fit.
        """
        return _one_or_all([ManualOptimizer(optimizer, self._fit()) for optimizer in self._fit().optimizers])

    def lr_schedulers(self) -> Any:
        """The learning-rate scheduler, a list of them where there are several, or None; step it yourself."""
        return _one_or_all([rate.scheduler for rate in self._fit().schedulers])

    def manual_backward(self, loss: torch.Tensor, **options: Any) -> None:
        """Compute gradients as the run's precision wants it; options are those of `Tensor.backward`.

        Raises:
            DivergedError: the loss is NaN or infinite.
        """
        run = self._fit()
        run.check_finite("the loss", loss)
        run.notify("before_backward", loss)
        run.precision.update()  # a step since the last loss may have changed the scale of the next
        run.precision.backward(loss, **options)
        run.notify("after_backward")

    def clip_gradients(
        self,
        optimizer: AnyOptimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimizer's parameters by `norm` or by `value`.

        What is not given is the trainer's; 0 clips nothing.

        Raises:
            DivergedError: the norm is NaN or infinite.
        """
        run, inner = self._fit(), _inner(optimizer)
        limit = run.trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        algorithm = gradient_clip_algorithm or run.trainer.gradient_clip_algorithm
        if not limit:
            return
        if not run.automatic:
            run.agree_on_gradients(inner)
        run.precision.unscale(inner)
        norm = clip(inner, limit, algorithm)
        if norm is not None and not run.precision.skips_overflow:
            run.check_finite("the norm of the gradients", norm)

    def toggle_optimizer(self, optimizer: AnyOptimizer) -> None:
        """Let only this optimizer's parameters want gradients, until `untoggle_optimizer`."""
        object.__setattr__(self, "_toggled", train_only(_inner(optimizer), self._fit().optimizers))

    def untoggle_optimizer(self, optimizer: AnyOptimizer) -> None:
        """Let all parameters want gradients that did before `toggle_optimizer`."""
        for parameter, wanted in getattr(self, "_toggled", {}).items():
            parameter.requires_grad_(wanted)
        object.__setattr__(self, "_toggled", {})

    def _fit(self) -> FitRun:
        run = self.trainer.fit_run if self.trainer is not None else None
        if run is None:
            raise UsageError(f"{type(self).__name__} is not being fitted", fix="call this in training_step")
        return run

    # ---- parts of a step that the engine leaves to the module where they are written

    def backward(self, loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        """Compute gradients of a loss, which the run's precision may have scaled; options are `Tensor.backward`'s.

        The optimizer and its number, which Lightning 1.x gives after the loss, are ignored.
        """
        loss.backward(**options)  # type: ignore[no-untyped-call]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Let an optimizer step: `optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure)`.

        Gradients have been computed and clipped. The closure gives the loss; only from its second call on, or after
        the weights were changed, does it run `training_step` and the backward pass again. An optimizer that is not
        stepped here loses its gradients. `optimizer_idx` may be named before the closure.
        """
        given = (options.get("optimizer_closure"), *arguments[3:])
        closure = next((one for one in given if callable(one)), None)
        _argument("optimizer", 2, arguments, options).step(closure=closure)

    def optimizer_zero_grad(self, *arguments: Any, **options: Any) -> None:
        """Clear gradients after a step: `optimizer_zero_grad(self, epoch, batch_idx, optimizer)`."""
        _argument("optimizer", 2, arguments, options).zero_grad()

    def configure_gradient_clipping(self, *arguments: Any, **options: Any) -> None:
        """Clip gradients: `(self, optimizer, gradient_clip_val, gradient_clip_algorithm)`, which are the trainer's.

        Call `self.clip_gradients` in it, with what you choose.
        """
        names = ("optimizer", "gradient_clip_val", "gradient_clip_algorithm")
        self.clip_gradients(**{**dict(zip(names, arguments, strict=False)), **options})

    def lr_scheduler_step(self, *arguments: Any, **options: Any) -> None:
        """Step a scheduler: `lr_scheduler_step(self, scheduler, metric)`; the metric is None without a `monitor`."""
        scheduler = _argument("scheduler", 0, arguments, options)
        metric = options["metric"] if "metric" in options else arguments[-1]
        scheduler.step() if metric is None else scheduler.step(metric)

    # ---- around a run

    def configure_callbacks(self) -> Callback | Sequence[Callback]:
        """Callbacks of the module, which take the places of the trainer's of the same classes."""
        return []

    def connect(self, datamodule: DataModule) -> None:
        """Meet the data: called once per stage before `setup` and before optimizers are made."""

    def data_is_set_up(self, datamodule: DataModule) -> None:
        """Take what the data knows only after its `setup`, such as the range of its values; called once per stage."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint holds of the module beside its weights (a task: name, labels, preprocessing)."""
        recorded = recorded_precision(self)
        return {} if recorded is None else {"inference_precision": recorded}

    def describe_use(self) -> dict[str, Any]:
        """What of `describe()` may be settled after a fit and is then stored with its best weights."""
        return {}

    def recipe(self) -> dict[str, Any] | None:
        """The sections of a recipe about the module, `{"task": ..., "model": {...}}`; None if it has no recipe.

        It may also hold `not_saved`: dotted key of the recipe -> what it cannot hold; and `data`: arguments for
        the constructor of the data.
        """
        return None

    def modules_to_freeze(self) -> nn.Module | Iterable[nn.Module] | None:
        """What a finetuning strategy may freeze: the attribute `backbone`; None for nothing."""
        backbone = getattr(self, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise UsageError(
                f"a finetuning strategy needs to know what to freeze, and {type(self).__name__} has no `backbone`",
                fix="write modules_to_freeze(self) -> list of modules",
            )
        return [backbone]

    def parts_to_freeze(self) -> list[nn.Module]:
        """What `modules_to_freeze` gives, as a list."""
        given = self.modules_to_freeze()
        if isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList):
            return [given]
        return [] if given is None else list(given)

    def head_to_solve(self) -> Any:
        """What a `freeze` run may solve instead of training it: the attribute `head`, if it has a method `solve`.

        An object, or before it is made its class, with `solve(features, targets)` and, where gradient steps make no
        sense for it, `requires_solving = True`; anything else is trained.
        """
        return getattr(self, "head", None)

    def unused_by_solving(self) -> list[str]:
        """The arguments that were given and have no effect where the head is solved: those of gradient steps."""
        return []

    def frozen_features(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the part that `freeze` freezes gives for a batch: features (B, ...), and the targets (B, ...).

        It is called in eval mode without gradients, with a batch that is on the device.
        """
        raise UsageError(
            f"{type(self).__name__} has no frozen_features",
            fix="def frozen_features(self, batch): inputs, targets = batch; return self.backbone(inputs), targets",
        )

    def takes_features(self, stage: str) -> bool:
        """Whether the steps work as well with `FrozenFeatures` in the place of a batch's inputs.

        While the backbone is frozen a run then computes features once, and not in every epoch.

        Args:
            stage: whose steps: fit, validate or test.
        """
        return False

    def feature_size(self) -> int:
        """Numbers in the features of a sample, 0 if that is not known.

        Features that take more than 1 GiB for all training samples are kept only if `feature_cache` asks for them.
        """
        return 0

    def why_no_features(self, stage: str) -> str:
        """In words, why `takes_features` is false."""
        return f"the steps of {type(self).__name__} want the inputs themselves"

    def describe_frozen(self) -> dict[str, Any] | None:
        """What `modules_to_freeze()` compute, apart from their weights, in plain values: names, options, versions.

        Features are kept for other runs under it; None keeps them for the run alone.
        """
        return None

    def inference_copy(self, precision: Precision) -> Self:
        """What computes features and predictions of many samples faster than the module itself, in eval mode.

        It must give the module's own outputs but for rounding in float32, and is thrown away after one pass. By
        default it is the module itself, in whatever mode it is.

        Args:
            precision: that the pass is computed in.
        """
        return self

    def finished_run(self, trainer: Trainer, folder: Path, data: DataModule) -> Any:
        """What `trainer.result` gives of a run that has a folder: by default None, for which it gives the `FitResult`.

        Args:
            trainer: of the run.
            folder: that it wrote.
            data: that it was trained on.
        """
        return None

    def write_report(self, trainer: Trainer, folder: Path, data: DataModule) -> Path | None:
        """Write a page about a run of `finetune` into its folder, once it is over; by default there is none.

        Args:
            trainer: of the run.
            folder: that it wrote.
            data: that it was trained on.

        Returns:
            The file, or None.
        """
        return None

    def solve_head(self, features: torch.Tensor, targets: torch.Tensor) -> Any:
        """Solve `head_to_solve()` on the features of all samples (N, ...), float32 on the CPU.

        Returns:
            A line to print about the solution, or None.
        """
        return self.head_to_solve().solve(features, targets)

    def layer_groups(self) -> list[list[str]]:
        """Names of the parameters of `modules_to_freeze()`, in groups from the input to the output.

        The default takes each child of a frozen module that has parameters as one group.
        """
        names = {id(parameter): unwrapped_name(name) for name, parameter in self.named_parameters()}
        groups = []
        for root in map(unwrapped, self.parts_to_freeze()):
            parts = list(root.children()) or [root]
            direct = [names[id(p)] for p in root.parameters(recurse=False)] if list(root.children()) else []
            groups += [direct, *([names[id(p)] for p in part.parameters()] for part in parts)]
        return [group for group in groups if group]

    def merge_lora(self) -> Self:
        """Add the factors of a `lora` strategy to the weights that they belong to, and remove them.

        What the module computes stays the same up to rounding. A checkpoint keeps factors and weights apart, so merge
        after the last one has been written.
        """
        merge(self)
        return self

    def freeze(self) -> Self:
        """No gradients, and eval mode that training does not undo."""
        self.requires_grad_(False)
        self.eval()
        self._frozen = True
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`: gradients and train mode for all parameters."""
        self.requires_grad_(True)
        self._frozen = False
        self.train()
        return self

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, except that what `freeze()` froze stays in eval mode."""
        return super().train(mode and not getattr(self, "_frozen", False))

    @property
    def trainer(self) -> Trainer:
        """The trainer of the run, also for a module inside another one; None outside of a run."""
        return self._trainer  # type: ignore[return-value]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        for part in self.modules():
            if isinstance(part, Module):
                object.__setattr__(part, "_trainer", trainer)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: everything but the run that the module is in."""
        state = dict(super().__getstate__())  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name not in ("_trainer", "_toggled")}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        first = next(self.parameters(), None)
        return first.device if first is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the first floating-point parameter; torch's default without any."""
        found = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        return next(found, torch.get_default_dtype())

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far in the fit run."""
        return self.trainer.global_step if self.trainer is not None else 0

    @property
    def current_epoch(self) -> int:
        """The epoch of the fit run, counted from 0."""
        return self.trainer.current_epoch if self.trainer is not None else 0

    @property
    def logger(self) -> Any:
        """The trainer's first logger that the user chose, None outside of a run."""
        return self.trainer.logger if self.trainer is not None else None

    @property
    def loggers(self) -> list[Logger]:
        """All loggers of the trainer; none outside of a run."""
        return list(self.trainer.loggers) if self.trainer is not None else []

    @property
    def global_rank(self) -> int:
        """The number of this process, counted from 0."""
        return self.trainer.strategy.global_rank if self.trainer is not None else 0

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine, counted from 0."""
        return self.trainer.strategy.local_rank if self.trainer is not None else 0

    def print(self, *values: Any, **options: Any) -> None:
        """Print, in the first process alone."""
        if self.global_rank == 0:
            print(*values, **options)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """The same structure with each tensor as all processes have it, stacked: (number of processes, ...).

        Outside of a run, and with one process, the data itself.

        Args:
            data: tensors of one shape in all processes, in lists, tuples or dictionaries.
            group: None, for all processes.
            sync_grads: gradients do not flow through it, so only False can be given where there are several.

        Raises:
            UsageError: a group, or gradients.
        """
        if self.trainer is None or self.trainer.strategy.world_size == 1:
            return data
        if group is not None or sync_grads:
            raise UsageError(
                "all_gather(group=..., sync_grads=True): what is gathered is of all processes, without gradients",
                fix="torch.distributed.nn.functional.all_gather",
            )
        return stacked([move_to_device(one, self.device) for one in self.trainer.strategy.gather(detached(data))])

    def log(
        self,
        name: str,
        value: Logged | Mapping[str, Logged],
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        batch_size: int | None = None,
        sync_dist: bool = False,
        rank_zero_only: bool = False,
        add_dataloader_idx: bool = True,
        trainer: bool = True,
    ) -> None:
        """Log a number, a scalar tensor, a torchmetrics object, or a dictionary of them as one chart.

        Args:
            name: of the metric; of the chart, whose values are called `name/key` everywhere else.
            value: epoch values are means weighted by batch size; a metric object is computed and reset for you.
            prog_bar: show it on the progress bar.
            logger: give it to the loggers; `epoch`, `step` and `seconds` are columns of their own there.
            on_step: keep each step's value; the default depends on the hook.
            on_epoch: keep the value over the epoch; the default depends on the hook.
            reduce_fx: `mean`, `sum`, `max` or `min` over the epoch; also torch's functions of these names.
            batch_size: weight of the value; found from the batch if not given.
            sync_dist: reduce the value over all processes, as `reduce_fx` says; a mean counts each process by its
                samples. Metric objects do so by themselves.
            rank_zero_only: log it in the first process alone.
            add_dataloader_idx: with several loaders, give each its own name, `name/dataloader_idx_0`.
            trainer: False is another word for `logger=False`.

        Outside of a run the value is ignored with a warning.

        Raises:
            UsageError: nothing can be logged in this hook, or not like this.
        """
        if self.trainer is None:
            warnings.warn(f"log({name!r}) outside of a run is ignored", stacklevel=2)
            return
        if rank_zero_only and not self.trainer.is_global_zero:
            return
        shown, how = logger and trainer, reduction_name(reduce_fx)
        settings = LogSettings(prog_bar, shown, on_step, on_epoch, how, sync_dist, add_dataloader_idx)
        self.trainer.current_run.log(name, value, settings, batch_size)

    def log_dict(self, values: Mapping[str, Logged], **options: Any) -> None:
        """Log several values with the same options."""
        for name, value in values.items():
            self.log(name, value, **options)

    def to_onnx(self, *arguments: object, **options: object) -> NoReturn:
        """Raise a UsageError that names `torch.onnx.export`."""
        raise self._no_export("to_onnx", "torch.onnx.export(model, inputs, path)")

    def to_torchscript(self, *arguments: object, **options: object) -> NoReturn:
        """Raise a UsageError that names `torch.jit.trace`."""
        raise self._no_export("to_torchscript", "torch.jit.trace(model, inputs)")

    def to_tensorrt(self, *arguments: object, **options: object) -> NoReturn:
        """Raise a UsageError that names `torch.onnx.export`, whose files TensorRT reads."""
        raise self._no_export("to_tensorrt", "torch.onnx.export(model, inputs, path)")

    def _no_export(self, name: str, fix: str) -> UsageError:
        return UsageError(f"{type(self).__name__} has no {name}", why="torch exports any module in eval mode", fix=fix)

    @classmethod
    def check_content(cls, content: Mapping[str, Any], given: Mapping[str, Any], path: PathLike) -> None:
        """Refuse a checkpoint before a module is built for it; by default nothing is refused.

        Args:
            content: of the checkpoint.
            given: constructor arguments that win over the stored ones.
            path: of the checkpoint, for messages.
        """

    @classmethod
    def rebuild(cls, arguments: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> Self:
        """The module that takes a checkpoint's weights, from the constructor arguments that the checkpoint holds."""
        del weights  # a subclass may limit the size of the module by theirs
        return cls(**arguments)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: PathLike,
        map_location: MapLocation = None,
        strict: bool | None = None,
        **given: Any,
    ) -> Self:
        """The module that a checkpoint holds, in eval mode; no data is needed and no code from the file runs.

        Args:
            checkpoint_path: a file written by `save_checkpoint` or a run, or a run folder: its best checkpoint, else
                its last.
            map_location: device for the tensors.
            strict: every weight must be there and nothing else; None means the module's `strict_loading`.
            given: constructor arguments; they win over the stored ones, and replace those that could not be
                stored.

        Raises:
            MissingInputError: there is no such file, or no checkpoint in the folder.
            UsageError: an argument is needed that the file does not hold.
            IntegrityError: the file is damaged.
        """
        from flashtask.trainer.checkpoints.restoring import module_from_checkpoint

        return module_from_checkpoint(cls, checkpoint_path, map_location, strict, given)


def _inner(optimizer: AnyOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, ManualOptimizer) else optimizer


def _argument(name: str, place: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """An argument that was given by its name or its place."""
    return options[name] if name in options else arguments[place]


def _one_or_all(found: list[Any]) -> Any:
    return found[0] if len(found) == 1 else found or None
