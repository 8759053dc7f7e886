"""`StochasticWeightAveraging`: the mean of the weights of a fit's last epochs, trained at a constant rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.library_internals import batch_norm_class, tensor_tables
from flashtask.core.metrics import is_metric, uncounted
from flashtask.core.number_checks import is_number, is_whole
from flashtask.core.seeding import generator_states, seed_generators, set_generator_states
from flashtask.trainer.callbacks.weight_averaging import (
    AverageFunction,
    AveragingCallback,
    replace_in_state,
    trained_parameters,
)
from flashtask.trainer.optimizers import set_rate
from flashtask.trainer.signals import RunInterruptedError
from flashtask.trainer.wrapping import unwrapped_name

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["StochasticWeightAveraging", "constant_rates"]


class StochasticWeightAveraging(AveragingCallback):
    """Averages the weights at the ends of the last epochs (Izmailov et al. 2018, arXiv:1803.05407).

    Up to the start epoch everything is as without the callback. From there on schedulers pause, the rates go from where
    they are to `swa_lrs` and stay there, and the weights at the end of each epoch are averaged. At the end of
    training the averages are put into the module, and the statistics of BatchNorm layers that train are computed for
    them in one more pass over the training data.

    The averages are what the module holds after the fit and what `averaged.ckpt` in the run folder holds; best weights
    are not put back over them. `best.ckpt` and `last.ckpt` hold weights as they were trained. Validation during the
    fit measures those too: `trainer.validate()` after it measures the averages.

    Args:
        swa_lrs: the rate to end with, or a list of them, one for each parameter group; None means half of the rate that
            a group's optimizer was made with, which is what the paper does with residual networks.
        swa_epoch_start: a whole number is an epoch, counted from 0; a number from 0.0 to below 1.0 is a share of the
            run's epochs. A run that is resumed and made longer goes on with the start it had.
        annealing_epochs: epochs that the rates take to get to `swa_lrs`.
        annealing_strategy: `cos` (half a cosine) or `linear`.
        avg_fn: (average, value, number of values in the average) -> new average; None gives all equal weight.

    Raises:
        UsageError: an invalid argument, or one that does not fit the run; BatchNorm in a module with
            `automatic_optimization = False`; two callbacks that average.
        UnknownNameError: another annealing strategy.
    """

    def __init__(
        self,
        swa_lrs: float | Sequence[float] | None = None,
        swa_epoch_start: int | float = 0.75,
        annealing_epochs: int = 10,
        annealing_strategy: str = "cos",
        avg_fn: AverageFunction | None = None,
    ) -> None:
        super().__init__(avg_fn)
        _check_arguments(swa_lrs, swa_epoch_start, annealing_epochs, annealing_strategy)
        self.swa_lrs, self.swa_epoch_start = swa_lrs, swa_epoch_start
        self.annealing_epochs, self.annealing_strategy = annealing_epochs, annealing_strategy

    def _forget(self) -> None:
        super()._forget()
        self._start = 0
        #: the epoch in which the rates began to change, and from what to what they go; None before it
        self._begun_at: int | None = None
        self._rates: list[float] = []
        self._targets: list[float] = []
        #: names of the parts that were in eval mode in the last epoch that was averaged
        self._in_eval_mode: list[str] = []

    # ---- training

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Refuse strategies that share the weights out, before they do so."""
        super().setup(trainer, module, stage)
        strategy = trainer.strategy
        if stage == "fit" and strategy.shares_weights and strategy.world_size > 1:
            raise UsageError(
                f"StochasticWeightAveraging does not work with strategy={strategy.name!r}",
                why="it runs the module at the end of the fit, outside of a step",
                fix='WeightAveraging(update_starting_at_epoch=...), or strategy="ddp"',
            )

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Settle when averaging begins; go on with the average of a run that is resumed."""
        run = trainer.current_fit
        if not run.automatic and _layers_with_statistics(module):
            raise UsageError(
                "StochasticWeightAveraging cannot compute BatchNorm's statistics with automatic_optimization = False",
                why="that needs a pass of training steps that do not train, and these step the optimizers themselves",
                fix="WeightAveraging(update_starting_at_epoch=...), which averages the statistics too",
            )
        self._average.join(trained_parameters(run))
        self._start = _first_epoch(run, self.swa_epoch_start) if self._begun_at is None else self._begun_at
        self._settle_rates(run, run.epoch)

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Announce the averaging when it begins."""
        run = trainer.current_fit
        if run.epoch == self._begun_at and not run.batch_idx:
            rates = ", ".join(f"{rate:g}" for rate in self._targets)
            there, epochs = run.epoch + self.annealing_epochs, run.total_epochs
            reached = f"are {rates} from epoch {there} on"
            if epochs is not None and there >= epochs:
                reached = f"go towards {rates}, which they would reach in epoch {there}, after the last one"
            trainer.say(f"epoch {run.epoch}: averaging weights from here on; learning rates {reached}")

    def on_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """Take in the weights and set the rates of the next epoch; one that was cut short is first continued."""
        run = trainer.current_fit
        if not run.epoch_is_complete:
            return
        if self._begun_at is not None and run.epoch >= self._begun_at:
            self._average.update(trained_parameters(run))
            self._in_eval_mode = _parts_in_eval_mode(module)
        self._settle_rates(run, run.epoch + 1)

    def _settle_rates(self, run: FitRun, epoch: int) -> None:
        """Set the rates of an epoch from the start on: a function of the epoch and of the rates that it began with.

        They are set at the end of the epoch before, as a scheduler does it, so that a log of rates has the right ones.
        """
        if epoch < self._start:
            return
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        if self._begun_at is None:
            self._begun_at = epoch
            self._rates = [float(group["lr"]) for group in groups]
            self._targets = constant_rates(groups, self.swa_lrs)
        for scheduled in run.schedulers:
            scheduled.is_paused = True
        passed = epoch - self._begun_at
        for group, rate, target in zip(groups, self._rates, self._targets, strict=True):
            set_rate(group, _annealed(rate, target, passed, self.annealing_epochs, self.annealing_strategy))

    # ---- the end

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        """Put the averages into the module, with statistics that fit them, and into a file."""
        run = trainer.current_fit
        if not self._average.count:
            trainer.say(
                f"StochasticWeightAveraging: the run ended before epoch {self._start} was complete, so nothing was "
                "averaged"
            )
            return
        stored = module.state_dict()
        buffers = {unwrapped_name(name): buffer for name, buffer in module.named_buffers()}
        tensors = trained_parameters(run) | {name: buffer for name, buffer in buffers.items() if name in stored}
        self._put_in(tensors)
        try:
            refreshed = _refresh_statistics(run, int(run.history[-1]["epoch"]), self._in_eval_mode)
        except BaseException:
            self._put_back(tensors)
            raise
        self._hand_over(trainer, refreshed)

    def _hand_over(self, trainer: Trainer, refreshed: int) -> None:
        """Write the averages to a file, and print what was written."""
        run = trainer.current_fit
        assert self._begun_at is not None
        first, last = self._begun_at, self._begun_at + self._average.count - 1
        epochs = f"epochs {first} to {last}" if last > first else f"epoch {first}"
        lines = [f"the module holds the averaged weights of {epochs}"]
        if refreshed:
            lines.append("BatchNorm's statistics are computed for it")
        if trainer.enable_checkpointing:
            path = trainer.output_dir / "averaged.ckpt"
            trainer.save_checkpoint(path, weights_only=True)
            lines.append(f"it is in {path}")
        if run.restores_best:
            run.keep_last_weights()
            lines.append("the best epoch's weights are not put back over it")
        trainer.say("; ".join(lines))

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The averages, when they began, and the rates; after the end also what the module held before."""
        return {
            "count": self._average.count,
            "average": self._average.tensors,
            "begun_at": self._begun_at,
            "rates": self._rates,
            "targets": self._targets,
            "in_eval_mode": self._in_eval_mode,
            "trained": self._held,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called when a run is resumed."""
        self._average.count, self._average.tensors = state["count"], state["average"]
        self._begun_at, self._rates, self._targets = state["begun_at"], state["rates"], state["targets"]
        self._in_eval_mode = state["in_eval_mode"]

    def on_save_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """The averages have not been measured: the metrics of the weights that were trained are not theirs."""
        if self._held:
            checkpoint["metrics"] = {}

    def on_load_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """A file that was written after the end goes on with the weights as they were trained."""
        trained = checkpoint["callbacks"].get(self.state_key, {}).get("trained", {})
        replace_in_state(checkpoint["state_dict"], trained, module)


def _first_epoch(run: FitRun, start: int | float) -> int:
    """The epoch that averaging begins with."""
    epochs = run.total_epochs
    if isinstance(start, int):
        if epochs is not None and start >= epochs and not run.trainer.fast_dev_run:
            raise UsageError(
                f"swa_epoch_start={start}: the run has {epochs} epochs, counted from 0, so nothing would be averaged",
                fix="swa_epoch_start=0.75",
            )
        return start
    if epochs is None:
        raise UsageError(
            f"swa_epoch_start={start} is a share of the run's epochs, whose number is not known",
            why="max_epochs is not given, and the training loader has no length",
            fix="swa_epoch_start=<epoch>, a whole number",
        )
    return math.floor(start * epochs + 1e-9)


# ---- learning rates: functions of the epoch

_CURVES: dict[str, Callable[[float], float]] = {
    "cos": lambda share: (1 - math.cos(math.pi * share)) / 2,
    "linear": lambda share: share,
}


def _check_arguments(rates: object, start: object, annealing_epochs: object, strategy: str) -> None:
    given = [] if rates is None else rates if isinstance(rates, (list, tuple)) else [rates]
    is_empty = rates is not None and not given
    if is_empty or not all(is_number(rate) and rate > 0 for rate in given):
        raise UsageError(f"swa_lrs={rates!r}: learning rates above 0 are needed", fix="swa_lrs=0.01")
    if not is_whole(start, 0) and not (isinstance(start, float) and 0 <= start < 1):
        raise UsageError(
            f"swa_epoch_start={start!r}: an epoch (a whole number) or a share of the epochs (from 0.0 to below 1.0) is "
            "needed",
            fix="swa_epoch_start=0.75",
        )
    if not is_whole(annealing_epochs, 0):
        raise UsageError(
            f"annealing_epochs={annealing_epochs!r}: a whole number of at least 0 is needed", fix="annealing_epochs=10"
        )
    if strategy not in _CURVES:
        raise UnknownNameError("annealing strategy", str(strategy), _CURVES)


def _annealed(rate: float, target: float, epoch: int, epochs: int, strategy: str) -> float:
    """The rate of an epoch on the way from one rate to another, as `torch.optim.swa_utils.SWALR` has it.

    Args:
        rate: of epoch 0.
        target: of all epochs from number `epochs` on.
        epoch: counted from the beginning of the way.
        epochs: length of the way.
        strategy: `cos` or `linear`.
    """
    weight = _CURVES[strategy](min(1.0, epoch / epochs) if epochs else 1.0)
    return target * weight + rate * (1 - weight)


def constant_rates(groups: list[dict[str, Any]], given: float | Sequence[float] | None) -> list[float]:
    """The rates that parameter groups are to have: those given, or half of what their optimizer was made with.

    Raises:
        UsageError: another number of rates than of groups.
    """
    if given is None:
        return [0.5 * float(group.get("initial_lr", group["lr"])) for group in groups]
    if not isinstance(given, Sequence):
        return [float(given)] * len(groups)
    # Two groups of one name are one to the user: the second holds the parameters without weight decay.
    names = [group.get("name", number) for number, group in enumerate(groups)]
    own = list(dict.fromkeys(names))
    if len(given) != len(own):
        raise UsageError(
            f"swa_lrs has {len(given)} learning rates, and the optimizers have {len(own)} parameter groups",
            fix="one rate for each group in their order, or swa_lrs=0.01 for all",
        )
    return [float(given[own.index(name)]) for name in names]


# ---- BatchNorm's statistics of weights that were not trained as they are


def _layers_with_statistics(module: nn.Module) -> list[Any]:
    """The BatchNorm layers of a module that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, batch_norm_class()) and part.running_mean is not None]


def _parts_in_eval_mode(module: nn.Module) -> list[str]:
    """Names of the parts that are in eval mode, because they are frozen or a hook set them so."""
    return [unwrapped_name(name) for name, part in module.named_modules() if not part.training]


def _refresh_statistics(run: FitRun, epoch: int, in_eval_mode: Collection[str]) -> int:
    """Compute BatchNorm's statistics as means over one pass over the training data; nothing else changes.

    It is `torch.optim.swa_utils.update_bn`, but through the module's own training step, so it takes any batch. The pass
    has the order and the augmentation of an epoch; the generators are seeded for it and put back.

    Args:
        run: of the fit, between two epochs.
        epoch: whose order and augmentation.
        in_eval_mode: names of the parts that stay in eval mode, with the statistics they have.

    Returns:
        The number of layers whose statistics are new.

    Raises:
        RunInterruptedError: a signal came during the pass; the statistics are not to be used.
    """
    stays = set(in_eval_mode)
    with _leaving_no_trace(run):
        for name, part in run.module.named_modules():
            part.training = unwrapped_name(name) not in stays
        layers = [layer for layer in _layers_with_statistics(run.module) if layer.training]
        if layers:
            # Compiled parts would be compiled again for this pass alone, because its momentum differs.
            with _cumulative(layers), torch.compiler.set_stance("force_eager"):
                _pass_over_training_data(run, epoch)
    return len(layers)


@contextmanager
def _cumulative(layers: list[Any]) -> Iterator[None]:
    """Reset the statistics, and compute a mean over all batches in place of a moving average."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _pass_over_training_data(run: FitRun, epoch: int) -> None:
    """The forward half of an epoch's training steps.

    Gradients are not turned off: a training step may need some of its own (a penalty, adversarial images).
    """
    run.go_to(epoch)
    for batch_idx, batch in enumerate(islice(iter(run.loader), run.limit)):
        if run.interrupted_by is not None:
            raise RunInterruptedError(run.interrupted_by)
        run.forward_only(batch, batch_idx)
    for optimizer in run.optimizers:
        optimizer.zero_grad()


@contextmanager
def _leaving_no_trace(run: FitRun) -> Iterator[None]:
    """Put back what a training step changes besides BatchNorm: modes, buffers, metrics, logged values, generators."""
    module = run.module
    modes = [(part, part.training) for part in module.modules()]
    buffers = _other_buffers(module)
    states = generator_states()
    # A loader that is not reordered draws its order and its transforms from these generators.
    seed_generators(run.seed)
    try:
        with run.logging_nothing(), uncounted(part for part in module.modules() if is_metric(part)):
            yield
    finally:
        set_generator_states(states)
        for part, name, buffer, before in buffers:
            buffer.copy_(before)
            tensor_tables(part)[1][name] = buffer
        for part, mode in modes:
            part.training = mode


def _other_buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """(module, name, buffer, copy) of all buffers but the statistics of BatchNorm."""
    others = (part for part in module.modules() if not isinstance(part, batch_norm_class()))
    found = ((part, name, buffer) for part in others for name, buffer in tensor_tables(part)[1].items())
    return [(part, name, buffer, buffer.clone()) for part, name, buffer in found if buffer is not None]
