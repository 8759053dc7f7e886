"""What the engine asks of a strategy: when, in which order, and what it does with the answers."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from small import Net, loaders, net
from torchmetrics import MeanMetric

from flashtask import Callback, DataModule, Strategy, Trainer

#: of two processes with 8 samples a step each: 16, 16, 16 and 2
SAMPLES, STEPS = 50, 4


class Recorded(Strategy):
    """One process that writes down what it is asked, and plays a second one that has twice its values."""

    name = "recorded"
    world_size = 2

    def __init__(self, local_rank: int = 0) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.local_rank = local_rank
        self.reason = ""

    @contextmanager
    def launch(self):
        self.asked.append("launch")
        yield
        self.asked.append("end")

    def setup(self, module):
        self.asked.append("setup")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()

    def wrap_step(self, module, step):
        self.asked.append("wrap_step")

        def called(*arguments):
            self.steps = getattr(self, "steps", 0) + 1
            return step(*arguments)

        return called

    def reduce(self, value, how="mean"):
        other = value * 2
        return {"mean": (value + other) / 2, "sum": value + other, "max": other, "min": value}[how]

    def gather(self, value):
        return [value, self.reason if isinstance(value, str) else value]

    def barrier(self, name=""):
        self.asked.append(name)


class Data(DataModule):
    def __init__(self, asked):
        self.asked = asked

    def prepare_data(self):
        self.asked.append("prepare_data()")

    def setup(self, stage):
        self.asked.append("data.setup")

    def train_dataloader(self):
        return loaders()[0]


class Watched(Net):
    def configure_optimizers(self):
        self.trainer.strategy.asked.append("configure_optimizers")
        assert all(not parameter.any() for parameter in self.parameters())
        return super().configure_optimizers()


def trainer(tmp_path, strategy, **options):
    options = {"max_epochs": 1, "output_dir": tmp_path / "run", **options}
    return Trainer(strategy=strategy, enable_progress_bar=False, enable_model_summary=False, **options)


def test_s114_a_strategy_is_asked_around_and_within_a_fit(tmp_path):
    strategy = Recorded()
    trainer(tmp_path, strategy).fit(Watched(), Data(strategy.asked))
    assert strategy.asked == [
        "launch",
        "prepare_data()",
        "prepare_data",
        "data.setup",
        "setup",
        "wrap_step",
        "configure_optimizers",
        "checkpoint",
        "end",
    ]
    assert strategy.steps == STEPS


def test_s79_only_the_first_process_of_a_machine_prepares_data(tmp_path):
    strategy = Recorded(local_rank=1)
    strategy.most_devices = None
    asked = strategy.asked

    class Second(Data):
        def setup(self, stage):
            assert asked[-1] == "prepare_data"
            super().setup(stage)

    from flashtask.trainer.devices.accelerators import CPUAccelerator

    class Two(CPUAccelerator):
        def device_count(self):
            return 2

    trainer(tmp_path, strategy, accelerator=Two(), devices=2).fit(net(), Second(asked))
    assert "prepare_data()" not in asked
    assert "data.setup" in asked


@pytest.mark.parametrize(("how", "of_one"), [("mean", 1.5), ("sum", 6.0), ("max", 3.0), ("min", 0.0)])
def test_s98_values_are_reduced_over_processes_where_that_is_asked_for(tmp_path, how, of_one):
    class Logging(Net):
        def training_step(self, batch, batch_idx):
            settings = {"reduce_fx": how, "batch_size": 1, "on_epoch": True, "on_step": True}
            self.log("own", float(batch_idx), **settings)
            self.log("shared", float(batch_idx), **settings, sync_dist=True)
            return super().training_step(batch, batch_idx)

    run = trainer(tmp_path, Recorded())
    run.fit(Logging(), loaders()[0])
    found = run.callback_metrics
    # The other process has twice the values and, as every number that is asked for is doubled, twice the weight.
    expected = {"mean": of_one * 3 / 3, "sum": of_one * 3, "max": of_one * 2, "min": of_one}[how]
    assert found["own_epoch"] == of_one
    assert found["shared_epoch"] == expected
    step = {"mean": 3.0, "sum": 9.0, "max": 6.0, "min": 3.0}[how]
    assert (found["own_step"], found["shared_step"]) == (3.0, step)


def test_s98_a_metric_object_is_left_to_share_its_own_state(tmp_path):
    class Logging(Net):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()

        def training_step(self, batch, batch_idx):
            self.mean.update(float(batch_idx))
            self.log("mean", self.mean, on_step=False, on_epoch=True, sync_dist=True)
            return super().training_step(batch, batch_idx)

    run = trainer(tmp_path, Recorded())
    run.fit(Logging(), loaders()[0])
    assert run.callback_metrics["mean"] == 1.5


def test_s114_where_one_process_stops_all_do(tmp_path):
    strategy = Recorded()

    class Elsewhere(Callback):
        def on_epoch_end(self, trainer, module):
            strategy.reason = "another process saw enough" if trainer.current_epoch == 1 else ""

    run = trainer(tmp_path, strategy, max_epochs=5, callbacks=Elsewhere())
    run.fit(net(), loaders()[0])
    assert run.current_epoch == 2
    assert run.fit_run.stop_reason == "another process saw enough"
