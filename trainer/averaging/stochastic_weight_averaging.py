"""`StochasticWeightAveraging`: the mean of the weights of a fit's last epochs, trained at a constant rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flashtask.core.checks import is_whole
from flashtask.core.errors import UsageError
from flashtask.trainer.averaging.annealing import annealed, check_annealing, constant_rates, set_rate
from flashtask.trainer.averaging.batchnorm_statistics import (
    layers_with_statistics,
    parts_in_eval_mode,
    refresh_statistics,
)
from flashtask.trainer.averaging.running_average import (
    AverageFunction,
    RunningAverage,
    copy_tensors,
    replace_in_state,
    trained_parameters,
)
from flashtask.trainer.averaging.weight_averaging import WeightAveraging
from flashtask.trainer.callbacks.base import Callback
from flashtask.trainer.wrapping import own_name

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["StochasticWeightAveraging"]


class StochasticWeightAveraging(Callback):
    """Averages the weights at the ends of the last epochs (Izmailov et al. 2018, arXiv:1803.05407).

    Up to the start epoch everything is as without the callback. From there on schedulers stand still, the rates go from
    where they are to `swa_lrs` and stay there, and the weights at the end of each epoch are averaged. At the end of
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
        UsageError: an argument that cannot be meant or that does not fit the run; BatchNorm in a module with
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
        check_annealing(swa_lrs, annealing_epochs, annealing_strategy)
        _check_start(swa_epoch_start)
        if avg_fn is not None and not callable(avg_fn):
            raise UsageError(f"avg_fn={avg_fn!r}: a function is needed", fix="torch.optim.swa_utils.get_swa_avg_fn()")
        self.swa_lrs, self.swa_epoch_start = swa_lrs, swa_epoch_start
        self.annealing_epochs, self.annealing_strategy = annealing_epochs, annealing_strategy
        self._average = RunningAverage(avg_fn)
        self._forget()

    def _forget(self) -> None:
        self._average.clear()
        self._start = 0
        #: the epoch in which the rates began to change, and from what to what they go; None before it
        self._begun_at: int | None = None
        self._rates: list[float] = []
        self._targets: list[float] = []
        #: names of the parts that were in eval mode in the last epoch that was averaged
        self._in_eval_mode: list[str] = []
        #: what the module held before the averages were put in; empty before that
        self._trained: dict[str, Tensor] = {}

    @property
    def num_averaged(self) -> int:
        """How many epochs' weights are in the average."""
        return self._average.count

    # ---- training

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Forget an earlier fit; two averages of one module are refused."""
        if stage != "fit":
            return
        averaging = (StochasticWeightAveraging, WeightAveraging)
        if sum(isinstance(callback, averaging) for callback in trainer.callbacks) > 1:
            raise UsageError("two callbacks average the weights of one module", fix="drop one of them")
        self._forget()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Settle when it begins; go on with the average of a run that is resumed."""
        run = trainer.fit_run
        if not run.automatic and layers_with_statistics(module):
            raise UsageError(
                "StochasticWeightAveraging cannot compute BatchNorm's statistics with automatic_optimization = False",
                why="that needs a pass of training steps that do not train, and these step the optimizers themselves",
                fix="WeightAveraging(update_starting_at_epoch=...), which averages the statistics too",
            )
        self._average.join(_parameters_of(run))
        self._start = _first_epoch(run, self.swa_epoch_start) if self._begun_at is None else self._begun_at
        self._settle_rates(run, run.epoch)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Say when averaging begins."""
        run = trainer.fit_run
        if run.epoch == self._begun_at and not run.batch_idx:
            rates = ", ".join(f"{rate:g}" for rate in self._targets)
            there, epochs = run.epoch + self.annealing_epochs, _epochs_of(run)
            reached = f"are {rates} from epoch {there} on"
            if epochs is not None and there >= epochs:
                reached = f"go towards {rates}, which they would reach in epoch {there}, after the last one"
            trainer.say(f"epoch {run.epoch}: averaging weights from here on; learning rates {reached}")

    def on_epoch_end(self, trainer: Any, module: Any) -> None:
        """Take in the weights and set the rates of the next epoch; one that was cut short is first continued."""
        run = trainer.fit_run
        if not run.epoch_is_complete:
            return
        if self._begun_at is not None and run.epoch >= self._begun_at:
            self._average.update(_parameters_of(run))
            self._in_eval_mode = parts_in_eval_mode(module)
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
            set_rate(group, annealed(rate, target, passed, self.annealing_epochs, self.annealing_strategy))

    # ---- the end

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Put the averages into the module, with statistics that fit to them, and into a file."""
        run = trainer.fit_run
        if not self._average.count:
            trainer.say(
                f"StochasticWeightAveraging: the run ended before epoch {self._start} was complete, so nothing was "
                "averaged"
            )
            return
        stored = module.state_dict()
        buffers = {own_name(name): buffer for name, buffer in module.named_buffers()}
        tensors = _parameters_of(run) | {name: buffer for name, buffer in buffers.items() if name in stored}
        trained = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        last_epoch = int(run.history[-1]["epoch"])
        try:
            self._average.put_into(tensors)
            refreshed = refresh_statistics(run, last_epoch, self._in_eval_mode)
        except BaseException:
            copy_tensors(trained, tensors)
            raise
        self._trained = trained
        self._hand_over(trainer, refreshed)

    def _hand_over(self, trainer: Any, refreshed: int) -> None:
        """Write the averages down, and say what there is now."""
        run = trainer.fit_run
        assert self._begun_at is not None
        first, last = self._begun_at, self._begun_at + self._average.count - 1
        epochs = f"epochs {first} to {last}" if last > first else f"epoch {first}"
        said = [f"the module holds the averaged weights of {epochs}"]
        if refreshed:
            said.append("BatchNorm's statistics are computed for it")
        if trainer.enable_checkpointing:
            path = trainer.output_dir / "averaged.ckpt"
            trainer.save_checkpoint(path, weights_only=True)
            said.append(f"it is in {path}")
        if run.restores_best:
            run.keep_last_weights()
            said.append("the best epoch's weights are not put back over it")
        trainer.say("; ".join(said))

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
            "trained": self._trained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._average.count, self._average.tensors = state["count"], state["average"]
        self._begun_at, self._rates, self._targets = state["begun_at"], state["rates"], state["targets"]
        self._in_eval_mode = state["in_eval_mode"]

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """The averages have not been measured: the metrics of the weights that were trained are not theirs."""
        if self._trained:
            checkpoint["metrics"] = {}

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """A file that was written after the end goes on with the weights as they were trained."""
        trained = checkpoint["callbacks"].get(self.state_key, {}).get("trained", {})
        replace_in_state(checkpoint["state_dict"], trained, module)


def _check_start(start: Any) -> None:
    if not is_whole(start, 0) and not (isinstance(start, float) and 0 <= start < 1):
        raise UsageError(
            f"swa_epoch_start={start!r}: an epoch (a whole number) or a share of the epochs (from 0.0 to below 1.0) is "
            "needed",
            fix="swa_epoch_start=0.75",
        )


def _first_epoch(run: FitRun, start: int | float) -> int:
    """The epoch that averaging begins with."""
    epochs = _epochs_of(run)
    if isinstance(start, int):
        if epochs is not None and start >= epochs and not run.trainer.fast_dev_run:
            raise UsageError(
                f"swa_epoch_start={start}: the run has {epochs} epochs, counted from 0, so nothing would be averaged",
                fix="swa_epoch_start=0.75",
            )
        return start
    if epochs is None:
        raise UsageError(
            f"swa_epoch_start={start} is a share of the run's epochs, and nobody knows how many there are",
            why="max_epochs is not given, and the training loader has no length",
            fix="swa_epoch_start=<epoch>, a whole number",
        )
    return math.floor(start * epochs + 1e-9)


def _epochs_of(run: FitRun) -> int | None:
    """How many epochs a run has, the last of which `max_steps` may cut short; None if nobody knows."""
    if run.max_steps < 0:
        return run.max_epochs
    epochs = 0
    while run.max_epochs is None or epochs < run.max_epochs:
        steps = run.steps_before(epochs)
        if steps is None:
            return run.max_epochs
        if steps >= run.max_steps:
            break
        epochs += 1
    return epochs


def _parameters_of(run: FitRun) -> dict[str, Tensor]:
    return trained_parameters(run.module, run.optimizers)
