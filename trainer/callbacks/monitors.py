"""What is watched beside the module's own metrics: learning rates, and the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from flashtask.core.errors import UsageError
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.distribution.sharded_tensors import whole
from flashtask.trainer.results import LogSettings

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["DeviceStatsMonitor", "GradientNormMonitor", "LearningRateMonitor"]


class LearningRateMonitor(Callback):
    """Logs the learning rates of all optimizers.

    A rate is called by the `name` in its scheduler's settings, else `lr-<optimizer class>`; where an optimizer has
    several parameter groups, `/<name of the group>` or `/pg1`, `/pg2`, ... follows. A name that is taken gets `-1`.

    Args:
        logging_interval: `step` (the rate that each logged step uses), `epoch` (the rate an epoch begins with), or
            None: each by the `interval` of its scheduler.
        log_momentum: log `<name>-momentum` too (the first beta of Adam and the like); 0 for an optimizer without it.
        log_weight_decay: log `<name>-weight_decay` too; 0 for an optimizer without it.

    Attributes:
        lrs: the rates of the fit by the name that logs have, in the order in which they were read.
        last_momentum_values: the last momentum by name, if it is logged; so is `last_weight_decay_values`.

    Raises:
        UsageError: another interval.
    """

    def __init__(
        self, logging_interval: str | None = None, log_momentum: bool = False, log_weight_decay: bool = False
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise UsageError(
                f'LearningRateMonitor(logging_interval={logging_interval!r}): "step", "epoch" or None is needed',
                fix='logging_interval="step"',
            )
        self.logging_interval = logging_interval
        self.log_momentum, self.log_weight_decay = log_momentum, log_weight_decay
        self._forget()

    def _forget(self) -> None:
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float] = {}
        self.last_weight_decay_values: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Find a name for each optimizer's rates, and whether they are logged by step or by epoch."""
        self._forget()
        run = trainer.current_fit
        watched = _named_optimizers(run.optimizers, run.schedulers)
        chosen = [(name, optimizer, self.logging_interval or interval) for name, optimizer, interval in watched]
        self._watched = {
            wanted: [(name, optimizer) for name, optimizer, interval in chosen if interval == wanted]
            for wanted in ("step", "epoch")
        }

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Log what is watched by epoch."""
        self._log(trainer, "epoch")

    def on_train_batch_start(self, trainer: Trainer, module: Module, batch: Any, batch_idx: int) -> None:
        """Log what is watched by step, for a step whose values are given to the loggers."""
        if _step_is_logged(trainer):
            self._log(trainer, "step")

    def _log(self, trainer: Trainer, interval: str) -> None:
        for name, optimizer in self._watched[interval]:
            for label, group in _labelled_groups(name, optimizer):
                self.lrs.setdefault(label, []).append(float(group["lr"]))
                _log(trainer, label, group["lr"])
                if self.log_momentum:
                    self.last_momentum_values[f"{label}-momentum"] = momentum = _momentum(group)
                    _log(trainer, f"{label}-momentum", momentum)
                if self.log_weight_decay:
                    self.last_weight_decay_values[f"{label}-weight_decay"] = decay = group.get("weight_decay", 0.0)
                    _log(trainer, f"{label}-weight_decay", decay)


class DeviceStatsMonitor(Callback):
    """Logs what the device is doing, as `device/<key>`, with the steps whose values are given to the loggers.

    CUDA: the counters of `torch.cuda.memory_stats`; MPS: allocated memory, both in bytes. CPU (needs psutil): load,
    memory and swap of the machine in percent, memory of the process in bytes.

    Args:
        cpu_stats: the CPU's values: True always, False never, None where the CPU is the device.
        filter_keys: log only these keys.

    Raises:
        UsageError: psutil is needed and not installed, or a key that the device does not have.
    """

    def __init__(self, cpu_stats: bool | None = None, filter_keys: Collection[str] | None = None) -> None:
        self.cpu_stats = cpu_stats
        self.filter_keys = None if filter_keys is None else set(filter_keys)

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Find out what there is to log."""
        device = trainer.current_fit.device
        self._with_cpu = device.type == "cpu" if self.cpu_stats is None else self.cpu_stats
        unknown = (self.filter_keys or set()) - set(self._read(device))
        # Some of CUDA's counters are there only after something was allocated.
        if unknown and device.type != "cuda":
            raise UsageError(
                f"DeviceStatsMonitor(filter_keys=...): {device.type} has no {', '.join(sorted(unknown))}",
                fix=f"choose from {', '.join(self._read(device))}",
            )

    def on_train_batch_start(self, trainer: Trainer, module: Module, batch: Any, batch_idx: int) -> None:
        """Log the device's values; none of them waits for the device."""
        if not _step_is_logged(trainer):
            return
        for key, value in self._read(trainer.current_fit.device).items():
            if self.filter_keys is None or key in self.filter_keys:
                _log(trainer, f"device/{key}", value)

    def _read(self, device: torch.device) -> dict[str, float]:
        values: dict[str, float] = {}
        if device.type == "cuda":
            values |= torch.cuda.memory_stats(device)
        elif device.type == "mps":
            values["current_allocated_bytes"] = torch.mps.current_allocated_memory()
            values["driver_allocated_bytes"] = torch.mps.driver_allocated_memory()
        return values | _cpu_stats() if self._with_cpu else values


class GradientNormMonitor(Callback):
    """Logs the norm of all gradients, as `grad_2.0_norm_total`, with the steps whose values are given to the loggers.

    It is the norm before gradients are clipped; with several optimizers that of each, `.../optimizer_1`.

    Args:
        norm_type: which p-norm: a number above 0, or `inf`.
        per_parameter: log each parameter's norm too, as `grad_2.0_norm/<name>`.

    Raises:
        UsageError: another norm.
    """

    def __init__(self, norm_type: float | str = 2.0, per_parameter: bool = False) -> None:
        try:
            self.norm_type = float(norm_type)
        except (TypeError, ValueError):
            self.norm_type = -1.0
        if not self.norm_type > 0:
            raise UsageError(f"a norm of gradients is a number above 0 or inf, not {norm_type!r}", fix="norm_type=2")
        self.per_parameter = per_parameter

    @property
    def state_key(self) -> str:
        """The class and the norm: two may log different norms."""
        return f"GradientNormMonitor({self.norm_type})"

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Say so if the run is too short for anything to be logged."""
        steps = trainer.current_fit.total_steps
        if steps is not None and steps < trainer.log_every_n_steps:
            every = trainer.log_every_n_steps
            trainer.say(f"no norm of gradients will be logged: {steps} steps in all, log_every_n_steps={every}")

    def on_before_optimizer_step(self, trainer: Trainer, module: Module, optimizer: Optimizer) -> None:
        """Log the norm; it is read when the value is shown."""
        if not _step_is_logged(trainer):
            return
        own = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        named = ((name, p.grad) for name, p in module.named_parameters() if id(p) in own)
        gradients = {name: gradient.float() for name, gradient in named if gradient is not None}
        if not gradients:
            return
        norms = {name: torch.linalg.vector_norm(grad, self.norm_type) for name, grad in gradients.items()}
        several = len(trainer.optimizers) > 1
        ending = f"/optimizer_{trainer.optimizers.index(optimizer)}" if several else ""
        total = torch.linalg.vector_norm(torch.stack([*norms.values()]), self.norm_type)
        _log(trainer, f"grad_{self.norm_type}_norm_total{ending}", whole(total))
        for name, norm in norms.items() if self.per_parameter else ():
            _log(trainer, f"grad_{self.norm_type}_norm/{name}", whole(norm))


def _cpu_stats() -> dict[str, float]:
    try:
        psutil = import_module("psutil")
    except ImportError:
        raise UsageError(
            "DeviceStatsMonitor needs psutil to watch the CPU", fix="pip install psutil, or cpu_stats=False"
        ) from None
    return {
        "cpu_percent": float(psutil.cpu_percent()),
        "cpu_memory_percent": float(psutil.virtual_memory().percent),
        "cpu_swap_percent": float(psutil.swap_memory().percent),
        "process_bytes": float(psutil.Process().memory_info().rss),
    }


def _step_is_logged(trainer: Trainer) -> bool:
    """Whether the step that the batch belongs to is one whose values go to the loggers."""
    step: int = trainer.current_fit.global_step + 1
    every: int = trainer.log_every_n_steps
    return step % every == 0


def _log(trainer: Trainer, name: str, value: Any) -> None:
    """Keep a value under the hook that runs now, as `Module.log` would."""
    # A value of the whole run counts once, however large the batch is.
    trainer.current_run.log(name, value, LogSettings(), batch_size=1)


def _named_optimizers(optimizers: list[Optimizer], schedulers: list[Any]) -> Iterator[tuple[str, Optimizer, str]]:
    """(name, optimizer, interval) of each optimizer; where several schedulers change one, the first decides."""
    rates = {id(getattr(rate.scheduler, "optimizer", None)): rate for rate in reversed(schedulers)}
    taken: Counter[str] = Counter()
    for optimizer in optimizers:
        rate = rates.get(id(optimizer))
        name = (rate.name if rate is not None else None) or f"lr-{type(optimizer).__name__}"
        ending = f"-{taken[name]}" if taken[name] else ""
        taken[name] += 1
        yield name + ending, optimizer, rate.interval if rate is not None else "epoch"


def _labelled_groups(name: str, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    groups = [(n, group) for n, group in enumerate(optimizer.param_groups, start=1) if group.get("shown", True)]
    for number, group in groups:
        yield (name if len(groups) == 1 else f"{name}/{group.get('name', f'pg{number}')}"), group


def _momentum(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))
