"""One run of the scaling work: `python benchmarks/scaling_run.py NETWORK PROCESSES THREADS BATCH STEPS`.

Trains a network on random images from memory and prints a line of JSON: seconds of each step, of forward and backward
with and without an exchange of gradients, and of exchanges alone. The script starts its other processes itself (`ddp`).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flashtask import Callback, Module, Trainer

#: bytes that are exchanged alone, to find latency and bandwidth
SIZES = (4, 4096, 65_536, 1_048_576, 4_194_304, 16_777_216, 67_108_864)
#: steps that are left out at the beginning
WARM_UP = 3


class Classifier(Module):
    """A network of timm with random weights and two classes; BatchNorm learns, as in full finetuning."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = timm.create_model(name, num_classes=2)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(Callback):
    """Seconds from the start of a batch to the end of its backward pass and to its end."""

    def __init__(self) -> None:
        self.backward: list[float] = []
        self.whole: list[float] = []
        self.exchanges: dict[int, float] = {}
        self._start = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.backward.append(time.perf_counter() - self._start)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.whole.append(time.perf_counter() - self._start)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        if trainer.strategy.world_size > 1:
            gradients = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
            self.exchanges = {size: _exchange(size) for size in (*SIZES, gradients)}


def _exchange(size: int) -> float:
    values = torch.zeros(max(1, size // 4))
    seconds = []
    for _ in range(10):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(values)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def run(network: str, processes: int, batch: int, steps: int, accumulate: int) -> Clock:
    """Train; every `accumulate`th batch ends with an exchange of gradients."""
    torch.manual_seed(0)
    count = (steps + WARM_UP) * processes * batch * accumulate
    few = 2 * batch * processes
    images, targets = torch.randn(few, 3, 224, 224), torch.randint(0, 2, (few,))
    # The same few images again and again: what is read costs nothing.
    places = torch.arange(count) % few

    class Repeated(TensorDataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            return super().__getitem__(int(places[index]))

    clock = Clock()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "single",
        accumulate_grad_batches=accumulate,
        callbacks=clock,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(network), DataLoader(Repeated(images, targets), batch_size=batch))
    return clock


def main() -> None:
    """Measure, and print what the first process saw."""
    network, (processes, threads, batch, steps) = sys.argv[1], map(int, sys.argv[2:6])
    torch.set_num_threads(threads * processes)  # the strategy gives each process its share
    each = run(network, processes, batch, steps, accumulate=1)
    pairs = run(network, processes, batch, steps, accumulate=2)
    parameters = sum(p.numel() for p in timm.create_model(network, num_classes=2).parameters())
    found = {
        "network": network,
        "processes": processes,
        "threads": threads,
        "batch": batch,
        "gradient_bytes": 4 * parameters,
        "step": each.whole[WARM_UP:],
        "forward_backward_alone": pairs.backward[2 * WARM_UP :: 2],
        "forward_backward_exchanging": pairs.backward[2 * WARM_UP + 1 :: 2],
        "exchanges": each.exchanges,
    }
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
