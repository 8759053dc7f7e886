"""Strategies of distribution: over which processes a run is spread, and how these communicate.

Finetuning strategies are something else: they decide what is frozen (trainer/finetuning/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from flashtask.core.errors import UnknownNameError, UsageError, nearest
from flashtask.core.registry import Aliases, LazySource, Registry
from flashtask.trainer.devices.selection import check_devices
from flashtask.trainer.finetuning.phase import Phase
from flashtask.trainer.finetuning.strategies import FINETUNING, Finetuning

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flashtask.trainer.devices.accelerators import Accelerator
    from flashtask.trainer.devices.precision import Precision
    from flashtask.trainer.module import Module
    from flashtask.trainer.run import Run

__all__ = ["REDUCTIONS", "STRATEGIES", "SingleDevice", "Strategy", "automatic_strategy", "resolve_strategy"]
__all__ += ["advice_on_distribution", "check_strategy_name", "point_out_distribution"]

T = TypeVar("T")

STRATEGIES: Registry[Any] = Registry("strategy")

REDUCTIONS = ("mean", "sum", "max", "min")


class Strategy:
    """How a run is spread over processes. The base is one process; a subclass changes what several do differently.

    Args:
        accelerator: a name or an object; None leaves it to `Trainer(accelerator=...)`.
        precision_plugin: a name or an object; None leaves it to `Trainer(precision=...)`.

    Raises:
        UsageError: no accelerator or precision has this name.
    """

    #: how messages and files call it
    name = "custom"
    #: devices that it can use at the most; None for any number
    most_devices: int | None = 1
    #: how many processes there are, which of them this is, and which on its machine; both counted from 0
    world_size = 1
    global_rank = 0
    local_rank = 0
    #: number of processes that were started on this machine from outside; None if none were
    local_world_size: int | None = None
    #: whether each process holds a part of the weights alone between two forward passes
    shares_weights = False

    def __init__(self, accelerator: Any = None, precision_plugin: Any = None) -> None:
        # They load torch; the names of strategies are looked at without it.
        from flashtask.trainer.devices.accelerators import check_accelerator
        from flashtask.trainer.devices.precision import check_precision

        self.accelerator: Accelerator | None = None if accelerator is None else check_accelerator(accelerator)
        self.precision_plugin: Precision | str | None = (
            None if precision_plugin is None else check_precision(precision_plugin)
        )

    @property
    def strategy_name(self) -> str:
        """The same as `name`."""
        return self.name

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.global_rank == 0

    def plan(self, device: torch.device, devices: int, num_nodes: int) -> None:
        """Take the settings of the trainer, before anything is started.

        Args:
            device: that this process computes on.
            devices: on each machine.
            num_nodes: machines.
        """

    @contextmanager
    def launch(self) -> Iterator[None]:
        """Around a whole stage: its content is run by every process, those that are started here too."""
        yield

    def begin(self, run: Run) -> None:
        """Take the run that is about to be prepared; called in each process."""

    def agree(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Check that every process has the same, such as the shapes of the module's parameters.

        Args:
            facts: gives what this process has, by names that an error can show.

        Raises:
            UsageError: another process has something else; in each of them.
        """

    def setup(self, module: Module) -> None:
        """Make the module ready: agree on its weights, or share them out.

        It is on its device and has its number format; optimizers are made after this.
        """

    def begin_evaluation(self, module: nn.Module) -> None:
        """Make the module the same in every process: what follows is validation, test or prediction."""

    def wrap_step(self, module: Module, step: Callable[..., Any]) -> Callable[..., Any]:
        """The training step as it is called: through a wrapper where processes must agree about gradients."""
        return step

    def average_gradients(self, parameters: Iterable[nn.Parameter], samples: int) -> None:
        """Average gradients over all processes, where a module steps its optimizers itself.

        Args:
            parameters: the same in every process.
            samples: that the gradients of this process are a mean of.
        """

    @contextmanager
    def whole_weights(self, module: nn.Module) -> Iterator[None]:
        """Around what calls the module outside of a training step: each process has all weights, wherever they are.

        All processes come and go together. What they do meanwhile may differ.
        """
        yield

    def reduce(self, value: T, how: str = "mean") -> T:
        """A number or tensor over all processes: `mean`, `sum`, `max` or `min`; asked in the same order by each.

        Raises:
            UnknownNameError: another way.
        """
        if how not in REDUCTIONS:
            raise UnknownNameError("way to reduce", how, REDUCTIONS)
        return value

    def gather(self, value: T) -> list[T]:
        """What every process has, in the order of their ranks."""
        return [value]

    def barrier(self, name: str = "") -> None:
        """Wait until every process is here; the name is for messages."""


@STRATEGIES.register("single", description="one process on one device")
class SingleDevice(Strategy):
    """One process on one device."""

    name = "single"


_DISTRIBUTED = {
    "ddp": ("data_parallel:DataParallel", "a process for each device; the script is started again in each"),
    "ddp_spawn": ("data_parallel:ForkedDataParallel", "ddp by forked processes: for notebooks, no guard and no script"),
    "ddp_find_unused_parameters": (
        "data_parallel:DataParallelWithUnused",
        "ddp where not every parameter is in every loss",
    ),
    "fsdp": ("sharded:FullyShardedDataParallel", "ddp with weights, gradients and optimizer states shared out"),
    "fsdp_cpu_offload": ("sharded:OffloadedFullyShardedDataParallel", "fsdp with the shares in the host's memory"),
    "fsdp_spawn": ("sharded:ForkedFullyShardedDataParallel", "fsdp by forked processes: for notebooks"),
}
_SPELLINGS = {
    "auto": "single",
    "single_device": "single",
    "ddp_fork": "ddp_spawn",
    "ddp_notebook": "ddp_spawn",
    "ddp_find_unused_parameters_true": "ddp_find_unused_parameters",
    "ddp_find_unused_parameters_false": "ddp",
    "ddp_spawn_find_unused_parameters_false": "ddp_spawn",
}
STRATEGIES.add_source(LazySource("strategy", "flashtask.trainer.distribution", _DISTRIBUTED))
STRATEGIES.add_source(Aliases(STRATEGIES, _SPELLINGS))

#: first word of a name that others use -> what the message adds about it
_NOT_HERE = {
    "bagua": "there is no Bagua support",
    "colossalai": "there is no ColossalAI support",
    "ddp2": "torch has removed ddp2",
    "deepspeed": "there is no DeepSpeed support",
    "dp": 'several devices in one process are slower than one process each: strategy="ddp"',
    "fairscale": "there is no FairScale support",
    "hivemind": "there is no Hivemind support",
    "horovod": "there is no Horovod support",
    "hpu": "there is no HPU support",
    "ipu": "there is no IPU support",
    "tpu": "there is no TPU support",
    "xla": "there is no TPU support",
}
#: why a strategy of distribution is not a finetuning strategy
_OF_PROCESSES = "this is a strategy of distribution, and a finetuning strategy decides what is trained"
_SAVES_MEMORY = ("bagua", "colossalai", "deepspeed", "fairscale")


def resolve_strategy(strategy: Any) -> Strategy:
    """The strategy behind a name or an object; None is `auto`. No device is asked for.

    Raises:
        UnknownNameError: no strategy has this name; finetuning strategies are pointed out.
        UsageError: no strategy at all.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        raise UsageError(
            f"strategy={strategy.__name__}: not an object but a class", fix=f"strategy={strategy.__name__}()"
        )
    if _is_finetuning(strategy):
        raise UsageError(
            f"strategy={strategy!r} is for finetuning; the Trainer's own is about devices and processes",
            fix=f"trainer.finetune(model, ..., strategy={strategy!r})",
        )
    name = "auto" if strategy is None else strategy
    if not isinstance(name, str):
        raise UsageError(
            f"strategy={strategy!r}: a name or a Strategy is needed", fix='strategy="auto", or strategy=MyStrategy()'
        )
    check_strategy_name(name)
    made = STRATEGIES.get(name)()
    if not isinstance(made, Strategy):
        raise UsageError(f"the strategy {name!r} is registered as {made!r}", fix="class Mine(flashtask.Strategy)")
    return made


def automatic_strategy(devices: Any, num_nodes: int = 1) -> str:
    """What `auto` means: a process for each device where there are several, or where a launcher has started several.

    Raises:
        UsageError: the environment has the number of processes, but not which one this is.
    """
    from flashtask.trainer.distribution.environment import process_info

    process = process_info()
    if process is not None and process.world_size > 1:
        return "ddp"
    wanted = check_devices(devices, None)
    several = wanted is not None and wanted != 1 and not (isinstance(wanted, tuple) and len(wanted) == 1)
    if num_nodes > 1:
        return "ddp"
    if not several:
        return "single"
    from flashtask.trainer.distribution.launching import is_script

    return "ddp" if is_script() else "ddp_spawn"


def check_strategy_name(name: str) -> None:
    """A strategy has this name; none is loaded.

    Raises:
        UnknownNameError: none has; finetuning strategies are pointed out.
    """
    if name not in STRATEGIES:
        raise _unknown(name)


def advice_on_distribution(strategy: Any) -> tuple[str, str] | None:
    """Why something that was given as a finetuning strategy is not one, and the `Trainer(strategy=...)` to write.

    Args:
        strategy: a name, also a mistyped one or one of another engine; or a `Strategy` or its class.

    Returns:
        The reason, and a name or a call; None for what is no strategy of distribution either.
    """
    if isinstance(strategy, Strategy):
        return _OF_PROCESSES, f"{type(strategy).__name__}(...)"
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        return _OF_PROCESSES, f"{strategy.__name__}()"
    if not isinstance(strategy, str):
        return None
    if strategy in STRATEGIES:
        return _OF_PROCESSES, strategy
    if (first := _first_word(strategy)) in _NOT_HERE:
        return f"{_OF_PROCESSES}; {_NOT_HERE[first]}", _instead_of(first)
    if not nearest(strategy, FINETUNING.names()) and (close := nearest(strategy, STRATEGIES.names(), most=1)):
        return f"{close[0]!r} would be a strategy of distribution", close[0]
    return None


def point_out_distribution(error: UsageError, strategy: Any) -> None:
    """Add to the error about a finetuning strategy where a strategy of distribution belongs, if it is one.

    Args:
        error: it is changed.
        strategy: what was given as a finetuning strategy.
    """
    given = strategy[0] if isinstance(strategy, (tuple, list)) and strategy else strategy
    given = given.partition(":")[0] if isinstance(given, str) else given
    if advice := advice_on_distribution(given):
        error.why, right = advice
        given_here = f"Trainer(strategy={right!r})" if isinstance(given, str) else f"Trainer(strategy={right})"
        error.fix = f"{given_here}; for finetuning choose one of: {', '.join(FINETUNING.names())}"


def _first_word(name: str) -> str:
    """The word that identifies a name of another engine: `deepspeed_stage_2`; `ddp_sharded` was FairScale's."""
    return "fairscale" if "sharded" in name.lower() else name.lower().partition("_")[0]


def _instead_of(first: str) -> str:
    return "fsdp" if first in _SAVES_MEMORY else "ddp"


def _is_finetuning(strategy: Any) -> bool:
    """A finetuning strategy in any of its forms: `freeze`, `freeze_unfreeze:5`, `("freeze_unfreeze", 5)`, an object."""
    if isinstance(strategy, (tuple, list)) and strategy:
        return _is_finetuning(strategy[0])
    if isinstance(strategy, str):
        return strategy.partition(":")[0] in FINETUNING
    if isinstance(strategy, Mapping):
        return "phases" in strategy or "stages" in strategy
    return isinstance(strategy, (Finetuning, Phase)) or hasattr(strategy, "stages") or hasattr(strategy, "phases")


def _unknown(name: str) -> UnknownNameError:
    error = UnknownNameError("strategy", name, [*STRATEGIES.names(), "auto"])
    first = _first_word(name)
    if first in _NOT_HERE:
        error.why = _NOT_HERE[first]
        finetuning = 'finetuning: trainer.finetune(model, ..., strategy="freeze"); '
        error.fix = f'{finetuning}distribution: strategy="{_instead_of(first)}"'
    elif not error.suggestions and (close := nearest(name, FINETUNING.names(), most=1)):
        error.why = "the Trainer's strategy is about devices and processes"
        error.fix = f"for finetuning: trainer.finetune(model, ..., strategy={close[0]!r})"
    return error
