"""The life of a run: prepare it, run its loop, call its hooks, and clean up whatever happens."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch

from flashtask.core.errors import FlashtaskError
from flashtask.core.failures import as_users_see_it
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.loop import Hooks
from flashtask.trainer.profiling.attaching import profiling
from flashtask.trainer.run import EvaluationRun, Run
from flashtask.trainer.run_record import announce, provenance_of, summary_of, told_of_recipe
from flashtask.trainer.signals import RunInterruptedError, stopping_at_the_next_step

__all__ = ["execute"]


def execute(run: FitRun | EvaluationRun, loop: Callable[[Any], Hooks]) -> None:
    """Carry out a run in every process of its strategy, and call the hooks of callbacks and module.

    Args:
        run: of a fit or an evaluation; nothing has been prepared yet.
        loop: what yields its hooks.

    Raises:
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM; the place in the run has been saved.
        OutOfMemoryError: a batch did not fit.
    """
    for logger in run.trainer.called_loggers:
        logger.attach(run.trainer)
    with run.strategy.launch(), _ending_well(run):
        run.strategy.begin(run)
        run.prepare()
        if isinstance(run, FitRun):
            _begin(run)
        with _circumstances(run), closing(loop(run)) as hooks:
            told = run.listeners
            for hook in hooks:
                if hook[0] in told:
                    run.notify(*hook)
        if isinstance(run, FitRun):
            _conclude(run)


@contextmanager
def _ending_well(run: FitRun | EvaluationRun) -> Iterator[None]:
    """Call the hooks of an error, and undo what was done for the run, whatever happens inside."""
    trainer = run.trainer
    # A stage may be called in a hook of another: what belongs to that one is put back.
    outer = (run.module.trainer, run.data.trainer, trainer.active_run)
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
        failure = seen = _as_users_see_it(run, error)
        for call in (*run.listeners.get("exception", ()), run.data.on_exception):
            try:
                call(seen)
            except Exception as another:  # it must not hide what ended the run
                seen.add_note(f"and in on_exception: {type(another).__name__}: {another}")
        if seen is error:
            raise
        raise seen from (None if isinstance(error, RunInterruptedError) else error)
    finally:
        try:
            _end(run, failure)
        except Exception as error:
            if failure is None:
                raise
            failure.add_note(f"and on the way out: {type(error).__name__}: {error}")
        finally:
            run.module.trainer, run.data.trainer, trainer.active_run = outer


@contextmanager
def _circumstances(run: Run) -> Iterator[None]:
    """What holds around a run and no longer: signals end a fit at its next step, torch's switches are set."""
    with ExitStack() as stack:
        if isinstance(run, FitRun):
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(stopping_at_the_next_step(run))
            if run.trainer.detect_anomaly:
                stack.enter_context(torch.autograd.set_detect_anomaly(True))
            stack.enter_context(_noted(run))
        if run.precision.dtype is torch.float64:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        stack.enter_context(_switches(run.trainer.deterministic, run.trainer.benchmark))
        stack.enter_context(profiling(run.trainer.profiler, run))
        yield


@contextmanager
def _switches(deterministic: bool | str | None, benchmark: bool | None) -> Iterator[None]:
    """Switches of the whole process, as a trainer wants them, for the length of a run.

    Args:
        deterministic: True lets torch use deterministic algorithms alone and raise where there is none, `warn` warns
            there; None leaves the switch as it is.
        benchmark: whether cuDNN tries which algorithm is fastest; None leaves the switch as it is.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.benchmark
    if deterministic is not None:
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    if benchmark is not None:
        torch.backends.cudnn.benchmark = benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = cudnn


#: The threads in which fits are going on, one entry a fit.
_fitting: list[int] = []


@contextmanager
def _noted(run: FitRun) -> Iterator[None]:
    """Warn if a fit of another thread draws from the same generators."""
    thread = threading.get_ident()
    if any(other != thread for other in _fitting):
        run.trainer.say(
            "another fit is going on in another thread of this process: both draw from the same random generators, so "
            "neither can be repeated or resumed exactly; give each a process of its own"
        )
    _fitting.append(thread)
    try:
        yield
    finally:
        _fitting.remove(thread)


def _begin(run: FitRun) -> None:
    """Write the run folder's first files, and print what will be trained."""
    trainer = run.trainer
    run.begin()
    if trainer.run_folder is not None:
        trainer.run_folder.write_recipe(run.recipe)
        trainer.run_folder.write_split(run.data.split_rows())
        if told := told_of_recipe(run.recipe):
            trainer.say(told)
    for logger in run.loggers:
        logger.begin(trainer.output_dir, run.rows, run.global_step)
        logger.log_hyperparameters({**run.data.logged_hparams, **run.module.logged_hparams})
    if trainer.enable_model_summary:
        for line in announce(run):
            trainer.say(line)


def _conclude(run: FitRun) -> None:
    """The end of a fit; a signal that came too late to stop it is still obeyed."""
    trainer = run.trainer
    if nothing := run.why_nothing_was_left:
        trainer.say(nothing)
    if trainer.run_folder is not None:
        trainer.require_own_folder()
        trainer.run_folder.write_summary(summary_of(run, trainer.checkpoint_callback))
    run.module.provenance = provenance_of(run)
    if run.restores_best:
        trainer.restore_best(run)
    if run.interrupted_by is not None:
        raise RunInterruptedError(run.interrupted_by)


def _end(run: Run, error: BaseException | None) -> None:
    """Undo what was done for the run; each part of it is, even if another fails."""
    trainer = run.trainer
    with ExitStack() as last_first:
        if isinstance(run, FitRun):
            run.module.was_fitted = run.module.was_fitted or run.samples_seen > 0
            if not run.is_prepared:
                last_first.callback(trainer.forget, run)
            last_first.callback(trainer.close_output, run)
            for logger in reversed(run.loggers):
                last_first.callback(logger.end, error)
            if run.freezing is not None:
                last_first.callback(run.freezing.restore)
        elif isinstance(run, EvaluationRun):
            for logger in reversed(run.loggers_to_close()):
                last_first.callback(logger.end, error)
        for undo in run.undo:
            last_first.callback(undo)
        last_first.callback(run.abandon_evaluation)


def _as_users_see_it(run: FitRun | EvaluationRun, error: BaseException) -> BaseException:
    """What is raised: an interruption after the place was saved, a named lack of memory, or the error as it is."""
    if not isinstance(error, RunInterruptedError):
        return as_users_see_it(error, run.batch_size)
    run.abandon_evaluation()
    checkpoint = run.trainer.checkpoint_callback
    if checkpoint is not None and isinstance(run, FitRun) and not run.done:
        stopped = f"stopped in epoch {run.epoch} after {run.samples} samples"
        try:
            path = checkpoint.write_last(run.trainer)
            run.trainer.say(f"{stopped}; continue from {path}")
        except FlashtaskError as failed:  # the signal is obeyed all the same
            run.trainer.say(f"{stopped}, and this place could not be saved: {failed}")
    return SystemExit(143) if error.signal_number == signal.SIGTERM else KeyboardInterrupt()
