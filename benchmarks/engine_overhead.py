"""Microseconds that the engine adds to a step of a small network, against the same loop by hand in the same process.

A two-layer perceptron (64-64-10), batches of 32 from memory, SGD, 2,000 steps, a loss logged each step, the progress
bar on; by hand, through the trainer, and through Lightning if it is installed, in turn. What is counted is the time of
the processor, so that other programs disturb less. Run: `python benchmarks/engine_overhead.py [ROUNDS]`.
"""

from __future__ import annotations

import io
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout

import torch
from torch import nn

from flashtask import Module, ProgressBar, Trainer

STEPS = 2000


class Network:
    """The network by which the overhead is measured, for a module of any engine."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss)  # type: ignore[attr-defined]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.layers.parameters(), lr=0.01)


class Perceptron(Network, Module):
    """It as a module of flashtask."""


class Terminal(io.StringIO):
    """A stream that says it is a terminal, so that the bar is drawn."""

    def isatty(self) -> bool:
        return True


class Batches:
    """The same batches from memory in each pass."""

    def __init__(self, count: int) -> None:
        made = torch.Generator().manual_seed(0)
        self._batches = [
            (torch.randn(32, 64, generator=made), torch.randint(0, 10, (32,), generator=made)) for _ in range(count)
        ]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def by_hand(batches: Batches) -> None:
    module = Perceptron()
    optimizer = module.configure_optimizers()
    module.train()
    for inputs, targets in batches:
        loss = nn.functional.cross_entropy(module.layers(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_trainer(batches: Batches) -> None:
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, callbacks=[ProgressBar(stream=Terminal())], enable_progress_bar=False, **options)
    trainer.fit(Perceptron(), batches)


def by_lightning() -> Callable[[Batches], None] | None:
    """The same in Lightning with its own progress bar; None if it is not installed."""
    try:
        import lightning
    except ImportError:
        return None
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Peer(Network, lightning.LightningModule):
        pass

    def fit(batches: Batches) -> None:
        options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
        with redirect_stdout(Terminal()), redirect_stderr(Terminal()):
            lightning.Trainer(max_epochs=1, **options).fit(Peer(), batches)

    return fit


def seconds(run: Callable[[Batches], None], batches: Batches) -> float:
    """Of the processor, for the whole of a run."""
    start = time.process_time()
    run(batches)
    return time.process_time() - start


def main(rounds: int = 7) -> None:
    """Time all in turn; print each round, then medians."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    batches = Batches(STEPS)
    players = {"trainer": by_trainer} | ({"lightning": peer} if (peer := by_lightning()) else {})
    for run in (by_hand, *players.values()):
        seconds(run, batches)
    bare: list[float] = []
    added: dict[str, list[float]] = {name: [] for name in players}
    for _ in range(rounds):
        bare.append(seconds(by_hand, batches) / STEPS * 1e6)
        for name, run in players.items():
            added[name].append(seconds(run, batches) / STEPS * 1e6 - bare[-1])
        print(f"by hand {bare[-1]:6.1f} us a step; added: {', '.join(f'{n} {v[-1]:.1f}' for n, v in added.items())}")
    for name, values in added.items():
        ratios = [value / base for value, base in zip(values, bare, strict=True)]
        print(
            f"{name} adds {statistics.median(values):.1f} us ({min(values):.1f} to {max(values):.1f}) to a step of "
            f"{statistics.median(bare):.1f}: {statistics.median(ratios):.1%}"
        )
    print(f"medians of {rounds} rounds; torch {torch.__version__}, Python {platform.python_version()}, one thread")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
