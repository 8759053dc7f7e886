"""Averages of the weights that are kept while training: `WeightAveraging`, `EMAWeightAveraging`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from flashtask.core.errors import UsageError
from flashtask.core.number_checks import is_number, is_whole
from flashtask.trainer.callbacks.callback import Callback
from flashtask.trainer.distribution.sharded_tensors import as_held, whole
from flashtask.trainer.wrapping import unwrapped_name

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun
    from flashtask.trainer.module import Module
    from flashtask.trainer.run import Run
    from flashtask.trainer.trainer import Trainer

__all__ = [
    "AverageFunction",
    "AveragingCallback",
    "EMAWeightAveraging",
    "RunningAverage",
    "WeightAveraging",
    "replace_in_state",
    "trained_parameters",
]

#: (average, value, number of values in the average) -> the new average, as in `torch.optim.swa_utils`
AverageFunction = Callable[[Tensor, Tensor, int], Tensor]
#: The same in place for lists of averages and values.
_MultiAverageFunction = Callable[[list[Tensor], list[Tensor], int], None]


class RunningAverage:
    """Averages of named tensors, and how many values each of them holds; half precisions are averaged in float32.

    Args:
        avg_fn: computes one average from (average, value, number of values so far); None means equal weights.
        multi_avg_fn: the same in place for lists of averages and values, which is faster on an accelerator.
    """

    def __init__(
        self, avg_fn: AverageFunction | None = None, multi_avg_fn: _MultiAverageFunction | None = None
    ) -> None:
        if avg_fn is not None:
            multi_avg_fn = _one_by_one(avg_fn)
        self._multi_avg_fn = multi_avg_fn or get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        self.clear()

    def clear(self) -> None:
        """Forget the averages and how many there were."""
        self.tensors: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor]) -> None:
        """Take in one value of each tensor; the first ones decide which tensors there are."""
        if not self.count:
            self.tensors = {n: value.detach().to(_wide(value.dtype), copy=True) for n, value in values.items()}
        else:
            # One kernel works on a list of tensors of one device and dtype.
            groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
            for name, average in self.tensors.items():
                averages, news = groups.setdefault((average.device, average.dtype), ([], []))
                averages.append(average)
                news.append(values[name].detach().to(average.dtype))
            for averages, news in groups.values():
                self._multi_avg_fn(averages, news, self.count)
        self.count += 1

    def join(self, values: Mapping[str, Tensor]) -> None:
        """Move averages that came from a file to where their tensors are.

        Raises:
            UsageError: one of them is not there.
        """
        for name in self.tensors:
            if name not in values:
                raise UsageError(
                    f"the run that is resumed averaged {name}, which no optimizer holds now",
                    fix="resume with the finetuning strategy and optimizer of the first run",
                )
        self.tensors = {
            name: as_held(average.to(values[name].device), values[name]) for name, average in self.tensors.items()
        }


def _one_by_one(avg_fn: AverageFunction) -> _MultiAverageFunction:
    def update(averages: list[Tensor], values: list[Tensor], count: int) -> None:
        for average, value in zip(averages, values, strict=True):
            average.copy_(avg_fn(average, value, count))

    return update


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A half precision is too coarse for an average: the small share of one update would be rounded away."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def trained_parameters(run: FitRun) -> dict[str, Tensor]:
    """The parameters that an optimizer holds, by their unwrapped names; the others never change and need no average.

    A shared parameter is listed once, under the first of its names.
    """
    held = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
    return {unwrapped_name(name): p for name, p in run.module.named_parameters() if id(p) in held}


def replace_in_state(state: dict[str, Any], tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    """Put tensors into a state dict of the module, under each of the names that a shared one has there."""
    names: dict[int, list[str]] = {}
    own = module.state_dict(keep_vars=True)
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    for name, tensor in tensors.items():
        for alias in names[id(own[name])] if name in own else ():
            if alias in state:
                state[alias] = tensor


class AveragingCallback(Callback):
    """Base of the callbacks that average weights, of which a fit has at most one.

    Args:
        avg_fn, multi_avg_fn: how they are averaged, as in `RunningAverage`.

    Raises:
        UsageError: not a function, or two of them.
    """

    def __init__(
        self, avg_fn: AverageFunction | None = None, multi_avg_fn: _MultiAverageFunction | None = None
    ) -> None:
        for name, function in (("avg_fn", avg_fn), ("multi_avg_fn", multi_avg_fn)):
            if function is not None and not callable(function):
                raise UsageError(f"{name}={function!r}: a function is needed", fix="torch.optim.swa_utils has some")
        if avg_fn is not None and multi_avg_fn is not None:
            raise UsageError("avg_fn and multi_avg_fn contradict each other", fix="drop one of them")
        self._average = RunningAverage(avg_fn, multi_avg_fn)
        self._forget()

    def _forget(self) -> None:
        self._average.clear()
        #: what the tensors held before the averages were put in; empty before that
        self._held: dict[str, Tensor] = {}

    @property
    def num_averaged(self) -> int:
        """How many values are in the average."""
        return self._average.count

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Forget an earlier fit; two averages of one module are refused."""
        if stage != "fit":
            return
        if sum(isinstance(callback, AveragingCallback) for callback in trainer.callbacks) > 1:
            raise UsageError("two callbacks average the weights of one module", fix="drop one of them")
        self._forget()

    def _put_in(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the averages into tensors of the same names; what all of them hold is kept for `_put_back`."""
        self._held = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        _copy(self._average.tensors, tensors)

    def _put_back(self, tensors: Mapping[str, Tensor]) -> None:
        _copy(self._held, tensors)
        self._held = {}


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names; these stay the same objects, which optimizers hold."""
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)


class WeightAveraging(AveragingCallback):
    """Averages the weights over optimizer steps; what is measured, saved and left at the end is the average.

    Validation (and a test within a fit) sees the averages, so metrics, the best checkpoint and early stopping go by
    them. Training goes on with its own weights, which checkpoints hold beside the averages for a resume. Until the
    first update there is no average, and everything is as without the callback.

    What no optimizer holds at the start of the fit is left alone, and so are buffers of whole numbers.

    Args:
        avg_fn: (average, value, number of values in the average) -> new average; None gives all equal weight (Polyak
            and Juditsky 1992), which is for averages that start late.
        multi_avg_fn: the same in place for lists of tensors, as `torch.optim.swa_utils.get_ema_multi_avg_fn` makes it.
        use_buffers: average floating-point buffers too, so that BatchNorm's statistics fit the averaged weights.
        update_every_n_steps: update after every so many optimizer steps.
        update_starting_at_step: no update before this step, counted from 0.
        update_starting_at_epoch: no update before this epoch, counted from 0.

    Raises:
        UsageError: an invalid argument, two callbacks that average, or nothing to average.
    """

    def __init__(
        self,
        avg_fn: AverageFunction | None = None,
        multi_avg_fn: _MultiAverageFunction | None = None,
        use_buffers: bool = True,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        super().__init__(avg_fn, multi_avg_fn)
        _check_whole("update_every_n_steps", update_every_n_steps, least=1)
        if update_starting_at_step is not None:
            _check_whole("update_starting_at_step", update_starting_at_step)
        if update_starting_at_epoch is not None:
            _check_whole("update_starting_at_epoch", update_starting_at_epoch)
        self.use_buffers, self.update_every_n_steps = use_buffers, update_every_n_steps
        self.update_starting_at_step, self.update_starting_at_epoch = update_starting_at_step, update_starting_at_epoch

    def _forget(self) -> None:
        super()._forget()
        self._parameters: dict[str, Tensor] = {}
        self._buffers: set[str] = set()
        #: the step that was looked at last
        self._last_step: int | None = None
        self._is_training = False
        #: the run for which the module holds the averages: of an evaluation, or the fit's own when it has ended
        self._shown_to: Run | None = None

    def should_update(self, step_idx: int, epoch_idx: int) -> bool:
        """Whether the average takes in the weights after a step; write your own for another rhythm.

        Args:
            step_idx: the optimizer step that was just taken, counted from 0.
            epoch_idx: the epoch that it belongs to.
        """
        if step_idx < (self.update_starting_at_step or 0) or epoch_idx < (self.update_starting_at_epoch or 0):
            return False
        return (step_idx + 1) % self.update_every_n_steps == 0

    # ---- training

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """Find the tensors to average; go on with the average of a run that is resumed."""
        run = trainer.current_fit
        stored = module.state_dict(keep_vars=True)
        trained = trained_parameters(run)
        self._parameters = {name: tensor for name, tensor in trained.items() if name in stored}
        if not self._parameters:
            raise UsageError(
                f"{type(self).__name__} has nothing to average: no optimizer holds a weight of {type(module).__name__}",
                fix="return an optimizer from configure_optimizers",
            )
        if self.use_buffers:
            # An infinite constant, such as a mask, would become NaN in an average.
            buffers = {unwrapped_name(name): b for name, b in module.named_buffers() if b.is_floating_point()}
            self._buffers = {n for n, b in buffers.items() if n in stored and bool(torch.isfinite(b).all())}
        if self._average.count:
            self._join(module)
        self._is_training = True
        if self._last_step is None:
            self._last_step = run.global_step
        # A checkpoint that another callback wrote may lie between a step and its update.
        self._follow(trainer, module)

    def _join(self, module: Module) -> None:
        """Go on with the average of a checkpoint; it keeps the tensors that it has."""
        available = self._parameters | {unwrapped_name(name): buffer for name, buffer in module.named_buffers()}
        self._average.join(available)
        self._buffers = set(self._average.tensors) - set(self._parameters)
        self._parameters = {n: p for n, p in self._parameters.items() if n in self._average.tensors}

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take in the weights if the batch completed a step."""
        self._follow(trainer, module)

    def _follow(self, trainer: Trainer, module: Module) -> None:
        run = trainer.current_fit
        if run.global_step == self._last_step:
            return
        self._last_step = run.global_step
        if self.should_update(run.global_step - 1, run.epoch):
            self._average.update(self._values(module))

    def _values(self, module: Module) -> dict[str, Tensor]:
        """The tensors that are averaged, as they are now; a buffer may have been assigned a new tensor."""
        buffers = ((unwrapped_name(name), buffer) for name, buffer in module.named_buffers() if self._buffers)
        return self._parameters | {name: buffer for name, buffer in buffers if name in self._buffers}

    # ---- what the module holds

    def on_validation_start(self, trainer: Trainer, module: Module) -> None:
        """Put the averages in, if this evaluates the module that is being trained."""
        if (
            self._is_training
            and self._average.count
            and self._shown_to is None
            and module is trainer.current_fit.module
        ):
            self._show(module, trainer.current_run)

    def on_validation_end(self, trainer: Trainer, module: Module) -> None:
        """Put the weights that train back, unless an outer evaluation still uses the averages."""
        if self._shown_to is not None and self._shown_to is trainer.active_run:
            self._hide(module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _show(self, module: Module, run: Run) -> None:
        values = self._values(module)
        self._put_in({name: values[name] for name in self._average.tensors})
        self._shown_to = run

    def _hide(self, module: Module) -> None:
        self._put_back(self._values(module))
        self._shown_to = None

    def on_train_end(self, trainer: Trainer, module: Module) -> None:
        """Leave the averages in the module, in place of the trained weights."""
        self._is_training = False
        if self._average.count:
            self._show(module, trainer.current_fit)
        else:
            trainer.say(f"{type(self).__name__}: the run ended before the first update, so nothing was averaged")

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        """Put sharded tensors together while all processes are still here."""
        self._average.tensors, self._held = whole(self._average.tensors), whole(self._held)

    def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Put the weights that train back where an evaluation ended with an error."""
        if stage != "fit":
            self.on_validation_end(trainer, module)
            return
        if self._is_training and self._shown_to is not None:
            self._hide(module)
        self._is_training = False

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """How far the average is; `on_save_checkpoint` adds the tensors."""
        return {"count": self._average.count, "last_step": self._last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called when a run is resumed."""
        self._average.count, self._last_step = state["count"], state["last_step"]

    def on_save_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """Let the averages be the weights of the checkpoint, and put those that train aside for a resume."""
        if not self._average.count:
            return
        state, averages = checkpoint["state_dict"], self._average.tensors
        trained = self._held or {name: state[name] for name in averages}
        replace_in_state(state, {name: average.to(trained[name].dtype) for name, average in averages.items()}, module)
        # Averages of half precisions, whose weights are rounded.
        finer = {name: average for name, average in averages.items() if average.dtype != trained[name].dtype}
        checkpoint["callbacks"][self.state_key] |= {"trained": trained, "finer": finer}

    def on_load_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """Let the run go on with the weights that train, and keep the averages."""
        kept, state = checkpoint["callbacks"].get(self.state_key, {}), checkpoint["state_dict"]
        trained = kept.get("trained", {})
        self._average.tensors = {name: kept["finer"].get(name, state[name]) for name in trained}
        replace_in_state(state, trained, module)


class EMAWeightAveraging(WeightAveraging):
    """An exponential moving average of the weights, updated after optimizer steps.

    It remembers about `1 / (1 - decay)` updates. A run that is not much longer ends close to its first weights, and a
    message at the start reports it. Lower the decay, or let it rise with the number of updates n, which an `avg_fn` of
    `WeightAveraging` can do: `lambda a, w, n: a.lerp(w, 1 - min(0.999, (1 + n) / (10 + n)))`.

    Args:
        decay: weight of the average in each update, from 0 to below 1; the new weights have the rest.
        use_buffers: as in `WeightAveraging`.
        update_every_n_steps: as in `WeightAveraging`.
        update_starting_at_step: as in `WeightAveraging`.
        update_starting_at_epoch: as in `WeightAveraging`.

    Raises:
        UsageError: an invalid argument.
    """

    def __init__(
        self,
        decay: float = 0.999,
        use_buffers: bool = True,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        if not is_number(decay) or not 0 <= decay < 1:
            raise UsageError(f"decay={decay!r}: a number from 0 to below 1 is needed", fix="decay=0.999")
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(
            None, average, use_buffers, update_every_n_steps, update_starting_at_step, update_starting_at_epoch
        )
        self.decay = decay

    def on_train_start(self, trainer: Trainer, module: Module) -> None:
        """Warn if the run is too short for the decay."""
        steps, memory = trainer.current_fit.total_steps, 1 / (1 - self.decay)
        updates = None if steps is None else steps // self.update_every_n_steps
        if updates is not None and updates < memory:
            trainer.say(
                f"EMAWeightAveraging: decay={self.decay:g} remembers about {memory:.0f} updates and the run makes at "
                f"most {updates}, so its first weights keep much weight; a lower decay forgets them"
            )


def _check_whole(name: str, value: object, least: int = 0) -> None:
    if not is_whole(value, least):
        raise UsageError(
            f"{name}={value!r}: a whole number of at least {least} is needed", fix=f"{name}={least or 100}"
        )
