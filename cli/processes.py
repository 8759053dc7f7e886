"""Several processes carry out one command: how they are started, what they agree on, and which of them speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

from flashtask.core.errors import ProcessLostError, UnknownNameError, UsageError
from flashtask.trainer.devices.selection import check_devices
from flashtask.trainer.distribution.environment import ProcessInfo, process_info
from flashtask.trainer.distribution.process_strategies import STRATEGIES, check_strategy_name
from flashtask.trainer.finetuning.strategies import FINETUNING

__all__ = ["OF_THE_MACHINE", "SHARED", "agreed", "are_several", "check_distributed", "device_of", "heard", "here"]
__all__ += ["is_distributed", "launched", "refuse_search", "require_same", "silence"]

#: What a recipe's `trainer` section says of processes, as `Trainer` calls it.
_KEYS = ("accelerator", "devices", "num_nodes", "strategy")
#: Keys that each machine may have otherwise, besides paths.
OF_THE_MACHINE = ("trainer.accelerator", "trainer.devices", "trainer.enable_progress_bar", "zoo")
#: The commands that several processes can carry out together.
SHARED = ("finetune", "plan", "predict", "test", "validate")

#: Set where `ddp` started this process: what ends it is read and told by the first (distribution/launching.py).
REPORTS = "FLASHTASK_REPORTS"

T = TypeVar("T")


def check_distributed(name: Any, source: str = "--distributed") -> None:
    """A strategy of distribution has this name; torch is not loaded for that.

    Args:
        name: None and `auto` say nothing.
        source: where it was said.

    Raises:
        UnknownNameError: none has, with near matches.
        UsageError: it is a strategy of finetuning.
    """
    if name is None or name == "auto" or not isinstance(name, str):
        return
    shown = source if source.startswith("--") else f"{source}: trainer.strategy"
    if name.partition(":")[0] in FINETUNING:
        raise UsageError(f"{shown}: {name!r} is a finetuning strategy", fix=f"--strategy {name}")
    try:
        check_strategy_name(name)
    except UnknownNameError as error:
        error.what = f"{shown}: {error.what}"
        if not error.suggestions:
            error.fix = f"choose one of: auto, {', '.join(STRATEGIES.names())}"
        raise


def is_distributed(name: Any) -> bool:
    """Whether this is a strategy of distribution; torch is not loaded for that."""
    return name in STRATEGIES


def here() -> ProcessInfo | None:
    """Which of several processes that somebody has started this is; None for one alone, or where that is unclear."""
    try:
        process = process_info()
    except UsageError:
        return None  # the command that needs to know tells it
    return process if process is not None and process.world_size > 1 else None


def are_several(options: Mapping[str, Any]) -> bool:
    """Whether more than one process is to carry out a command.

    Args:
        options: arguments of a Trainer.
    """
    devices = check_devices(options.get("devices") or "auto", None)
    many = devices is not None and (len(devices) > 1 if isinstance(devices, tuple) else devices != 1)
    distributed = options.get("strategy") not in (None, "auto", "single", "single_device")
    return many or distributed or (options.get("num_nodes") or 1) > 1 or process_info() is not None


@contextmanager
def launched(options: Mapping[str, Any]) -> Iterator[Any]:
    """Around what several processes do: gives the strategy that joins them, None where there is one process alone.

    Only the first of them is heard inside. They begin to import and to read at the same time, before there is a model.

    Args:
        options: arguments of a Trainer.

    Raises:
        UsageError: they cannot be meant, or the processes cannot be started.
    """
    if not are_several(options):
        yield None
        return
    from flashtask.trainer.device_plan import check_device_plan

    said = {"accelerator": "auto", "devices": "auto", "strategy": "auto", **_said(options)}
    strategy = check_device_plan(**said, precision=None, plugins=None)
    _placed(strategy, options)
    with strategy.launch(), ExitStack() as stack:
        if not strategy.is_global_zero:
            stack.enter_context(silence())  # forked ones do not come from the beginning of the command
        yield strategy


def device_of(strategy: Any, options: Mapping[str, Any]) -> Any:
    """The device of this process.

    Args:
        strategy: as `launched` gives it.
        options: arguments of a Trainer.

    Raises:
        UsageError: it is not here.
    """
    return _placed("single" if strategy is None else strategy, options).device


def _placed(strategy: Any, options: Mapping[str, Any]) -> Any:
    from flashtask.trainer.device_plan import resolve_device_plan

    said = {"accelerator": "auto", "devices": "auto", **_said(options), "strategy": strategy}
    return resolve_device_plan(**said, precision=None, plugins=None, default_precision="32")


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of a Trainer, those that were given and say where it runs."""
    return {key: options[key] for key in _KEYS if options.get(key) is not None}


def agreed(strategy: Any, make: Callable[[], T]) -> T:
    """What the first process makes, for all of them.

    Args:
        strategy: as `launched` gives it.
        make: called in the first process alone.
    """
    if strategy is None:
        return make()
    found: T = strategy.gather(make() if strategy.is_global_zero else None)[0]
    return found


def require_same(strategy: Any, values: Mapping[str, Any]) -> None:
    """Every process is asked for the same; each may have its own paths.

    Args:
        strategy: as `launched` gives it.
        values: what is compared, under the names that a message has for them.

    Raises:
        UsageError: another process is asked for something else; raised by all of them.
    """
    everybody: list[Mapping[str, Any]] = [] if strategy is None else strategy.gather(dict(values))
    for rank, theirs in enumerate(everybody):
        different = [key for key in {**everybody[0], **theirs} if everybody[0].get(key) != theirs.get(key)]
        if different:
            lines = [f"{key}: {everybody[0].get(key)!r} in process 0, {theirs.get(key)!r} there" for key in different]
            raise UsageError(
                f"process {rank} of {len(everybody)} was given other settings than process 0",
                why="\n    ".join(["the differences are", *lines[:4]]),
                fix="start all of them with the same command line and the same recipe",
            )


def refuse_search(strategy: Any, option: str = "`auto`", fix: str = "") -> None:
    """A batch size, a learning rate, and what fits a budget are found by one process.

    Args:
        strategy: that joins several processes, or None.
        option: that asks for it.
        fix: how to find it before; by default with `tune`.

    Raises:
        UsageError: there are several.
    """
    if strategy is not None:
        raise UsageError(
            f"{option} can only be resolved in one process, and this run has several",
            why="they share the memory, and the result is valid for the batches of one process",
            fix=fix or "flashtask tune DATA, with one process; then --batch-size N --lr X",
        )


@contextmanager
def silence() -> Iterator[None]:
    """Nothing that Python prints is seen, warnings neither: the first process says the same."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def heard(text: str, error: BaseException, process: ProcessInfo | None) -> str:
    """What a process tells of what ended it: the first on each machine all of it, another a line.

    Nothing where the first of them tells the same: of a process that `ddp` started, and of what was typed for all.

    Args:
        text: all of it.
        error: that ended the command.
        process: as `here` gives it.
    """
    if process is None or not process.rank or isinstance(error, ProcessLostError):
        return text
    if REPORTS in os.environ or (isinstance(error, UsageError) and process.local_rank):
        return ""
    if process.local_rank:
        text = text.splitlines()[0]
    who, what = str(process), text.removeprefix("error: ")
    return what if what.startswith(who) else f"{who}: {what}"
