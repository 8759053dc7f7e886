"""Microseconds that the engine adds to a step of a small network, against the same loop by hand in the same process.

A two-layer perceptron (64-64-10), batches of 32 from memory, SGD, 2,000 steps, a loss logged each step, the progress
bar on; by hand and through the trainer in turn. Run: `python benchmarks/engine_overhead.py [ROUNDS]`.
"""

from __future__ import annotations

import io
import platform
import statistics
import sys
import time

import torch
from torch import nn

from flashtask import Module, ProgressBar, Trainer

STEPS = 2000


class Perceptron(Module):
    """The network by which the overhead is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Terminal(io.StringIO):
    """A stream that says it is a terminal, so that the bar is drawn."""

    def isatty(self) -> bool:
        return True


def by_hand(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    module = Perceptron()
    optimizer = module.configure_optimizers()
    module.train()
    start = time.perf_counter()
    for inputs, targets in batches:
        loss = nn.functional.cross_entropy(module.layers(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def by_trainer(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, callbacks=[ProgressBar(stream=Terminal())], enable_progress_bar=False, **options)
    module = Perceptron()
    start = time.perf_counter()
    trainer.fit(module, batches)
    return time.perf_counter() - start


def main(rounds: int = 7) -> None:
    """Time both in turn and print each round and the median."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(32, 64, generator=generator), torch.randint(0, 10, (32,), generator=generator))
        for _ in range(STEPS)
    ]
    by_hand(batches)
    by_trainer(batches)
    added = []
    for _ in range(rounds):
        hand, trainer = by_hand(batches), by_trainer(batches)
        added.append((trainer - hand) / STEPS * 1e6)
        print(
            f"by hand {hand / STEPS * 1e6:6.1f} us a step, trainer {trainer / STEPS * 1e6:6.1f}, added {added[-1]:5.1f}"
        )
    print(
        f"added: median {statistics.median(added):.1f} us a step ({min(added):.1f} to {max(added):.1f}); "
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread"
    )


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
