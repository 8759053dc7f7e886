"""Driving a run: going through its moments, telling those who listen, and ending well whatever happens."""

from __future__ import annotations

import signal
from contextlib import closing, nullcontext
from typing import Any

import torch

from flashtask.core.errors import FlashtaskError, OutOfMemoryError
from flashtask.trainer.loop import Moments
from flashtask.trainer.run import RunInterruptedError
from flashtask.trainer.signals import stopping_at_the_next_step
from flashtask.trainer.summary import announce, summary_of

__all__ = ["drive"]


def drive(run: Any, moments: Moments, stage: str) -> None:
    """Go through the moments of a run and tell callbacks and module of each.

    Args:
        run: a fit or evaluation run that has been prepared.
        moments: what the loop yields.
        stage: `fit`, `validate`, `test` or `predict`.

    Raises:
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM; the place in the run has been saved.
        OutOfMemoryError: a batch did not fit.
    """
    trainer, told = run.trainer, run.listeners
    listening = stopping_at_the_next_step(run) if stage == "fit" else nullcontext()
    try:
        if stage == "fit":
            _begin(run)
        with listening, closing(moments):
            for moment, *arguments in moments:
                trainer.active_run.moment = moment
                for call in told.get(moment, ()):
                    answer = call(*arguments)
                    if moment == "train_batch_start" and isinstance(answer, int) and answer == -1:
                        run.skip_epoch = True
        if stage == "fit" and trainer.run_folder is not None:
            trainer.run_folder.write_summary(summary_of(run, trainer.checkpoint_callback))
    except BaseException as error:
        for call in told.get("exception", ()):
            call(error)
        run.data.on_exception(error)
        raise _as_users_see_it(run, error) from _cause(error)
    finally:
        _end(run, stage)


def _begin(run: Any) -> None:
    """The run folder's files, and what is said before training."""
    trainer = run.trainer
    if trainer.run_folder is not None:
        trainer.run_folder.write_recipe(trainer.recipe(run))
    for logger in trainer.loggers:
        logger.start(trainer.output_dir, run.history, run.global_step)
        logger.log_hyperparameters(dict(run.module.hparams))
    if trainer.enable_model_summary:
        for line in announce(run):
            trainer.say(line)


def _end(run: Any, stage: str) -> None:
    trainer = run.trainer
    for callback in run.callbacks:
        callback.teardown(trainer, run.module, stage)
    run.module.teardown(stage)
    run.data.teardown(stage)
    run.module.trainer = run.data.trainer = None
    trainer.active_run = trainer.fit_run
    if stage == "fit":
        for logger in trainer.loggers:
            logger.close()


def _as_users_see_it(run: Any, error: BaseException) -> BaseException:
    """An interruption after the place was saved, a lack of memory with what would fit, or the error as it is."""
    if isinstance(error, RunInterruptedError):
        trainer = run.trainer
        if trainer.checkpoint_callback is not None:
            path = trainer.checkpoint_callback.save_last(trainer)
            trainer.say(f"stopped in epoch {run.epoch} after {run.samples} samples; continue from {path}")
        return SystemExit(143) if error.signal_number == signal.SIGTERM else KeyboardInterrupt()
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        half = max(1, run.batch_size // 2)
        return OutOfMemoryError(
            f"out of memory with batches of {run.batch_size}",
            why=str(error).splitlines()[0],
            fix=f"batch_size={half} with accumulate_grad_batches=2 trains the same",
        )
    if isinstance(error, FlashtaskError) and "Original Traceback" in error.what:
        # From a data worker: the loader puts the whole traceback into the message; the error's own text ends it.
        return type(error)(error.what.rsplit(f"{type(error).__name__}: ", 1)[-1].strip())
    return error


def _cause(error: BaseException) -> BaseException | None:
    return None if isinstance(error, RunInterruptedError) else error.__cause__
