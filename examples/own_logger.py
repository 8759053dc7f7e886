"""A logger of your own, here for a service that flashtask has no logger for. Run: `python examples/own_logger.py`.

A class with `log_metrics(metrics, step)` is a logger. The other methods are called if it has them; in a run of several
processes the first one alone calls them. `ServiceLogger` works with any service that has a function to begin a run and
one to send a value:

    import comet_ml
    ServiceLogger(comet_ml.start, lambda run, name, value, step: run.log_metric(name, value, step=step))

    import neptune
    ServiceLogger(neptune.init_run, lambda run, name, value, step: run[name].append(value, step=step))

    from clearml import Task
    ServiceLogger(
        lambda: Task.init(project_name="flowers", task_name="first"),
        lambda run, name, value, step: run.get_logger().report_scalar(name, name, value=value, iteration=step),
    )
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from flashtask import Module, Trainer


class ServiceLogger:
    """Sends values to a service.

    Args:
        begin: begins a run of the service and returns it; called when it is needed first.
        send: sends a value: of the run, with its name, as a number, at an optimizer step.
    """

    name = "service"
    version: str | None = None

    def __init__(self, begin: Callable[[], Any], send: Callable[[Any, str, float, int], None]) -> None:
        self.begin, self.send = begin, send

    @cached_property
    def experiment(self) -> Any:
        """The run of the service; `self.logger.experiment` in a module."""
        return self.begin()

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """The hyper-parameters of module and data; here those that are numbers, at step 0."""
        for name, value in params.items():
            if isinstance(value, (int, float)):
                self.send(self.experiment, f"hyper_parameters/{name}", value, 0)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values of a step, of an epoch, of `validate` or `test`; the epoch is among them."""
        for name, value in metrics.items():
            self.send(self.experiment, name, value, step)

    def save(self) -> None:
        """Called at the end of an epoch and before a checkpoint: write down what waits."""

    def finalize(self, status: str) -> None:
        """The end of a run, `success` or `failed`."""
        print(f"{status}: the service has {len(self.experiment)} values", file=sys.stderr)


class Line(Module):
    """A line through points."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The squared error, logged by step and by epoch."""
        inputs, targets = batch
        loss = torch.nn.functional.mse_loss(self.layer(inputs), targets)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)


def main(**options: Any) -> list[tuple[str, float, int]]:
    """Train, and return what was sent; the service is a list."""
    logger = ServiceLogger(list, lambda run, name, value, step: run.append((name, value, step)))
    inputs = torch.linspace(-1, 1, 64).unsqueeze(1)
    loader = DataLoader(TensorDataset(inputs, 2 * inputs + 1), batch_size=8)
    Trainer(max_epochs=3, log_every_n_steps=4, logger=logger, **options).fit(Line(), loader)
    return logger.experiment


if __name__ == "__main__":
    for sent in main():
        print(*sent)
