"""The examples of the notes (docs/notes.md): optimizers, schedules, learning rates, early stopping."""

from __future__ import annotations

import csv

import pytest
import torch
from small import digest, loaders
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

import flashtask as pl
from flashtask import EarlyStopping, LearningRateMonitor, Trainer
from flashtask.core.errors import UnknownNameError


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The examples write into the working folder."""
    monkeypatch.chdir(tmp_path)


def loss_fn(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)


class Base(pl.LightningModule):
    """What the examples leave out: a layer, and steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.fc(inputs)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return loss_fn(self(inputs), targets)

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=0.1)


# ---- Optimizers


def test_s34_one_optimizer_steps_every_batch_and_its_schedule_every_epoch():
    """The pseudocode as a program, and the engine: the same weights, bit for bit."""
    n_epochs, traindl = 3, loaders()[1]

    class Net(Base):
        def configure_optimizers(self):
            optim = Adam(self.parameters(), lr=0.1)
            return {"optimizer": optim, "lr_scheduler": ExponentialLR(optim, gamma=0.1)}

    by_hand = Net()
    optim = Adam(by_hand.parameters(), lr=0.1)
    lr_sched = ExponentialLR(optim, gamma=0.1)
    for _ in range(n_epochs):
        for batch_idx, batch in enumerate(traindl):
            optim.zero_grad()
            loss = by_hand.training_step(batch, batch_idx)
            loss.backward()
            optim.step()
        lr_sched.step()

    model = Net()
    Trainer(max_epochs=n_epochs).fit(model, traindl)
    assert digest(model) == digest(by_hand) != digest(Net())


def test_s36_several_optimizers_take_turns_on_every_batch():
    """The same for several optimizers and schedules, which know their turn by the index."""
    n_epochs, traindl = 2, loaders()[1]

    class Net(Base):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx, optimizer_idx):
            inputs, targets = batch
            network = self.fc if optimizer_idx == 0 else self.other
            return loss_fn(network(inputs) + self.other(inputs), targets)

        def configure_optimizers(self):
            optims = [Adam(self.fc.parameters(), lr=0.1), SGD(self.other.parameters(), lr=0.2)]
            return optims, [ExponentialLR(optim, gamma=0.5) for optim in optims]

    by_hand = Net()
    optims, lr_scheds = by_hand.configure_optimizers()
    for _ in range(n_epochs):
        for batch_idx, batch in enumerate(traindl):
            for optim_idx, optim in enumerate(optims):
                optim.zero_grad()
                loss = by_hand.training_step(batch, batch_idx, optim_idx)
                loss.backward()
                optim.step()

        for lr_sched in lr_scheds:
            lr_sched.step()

    model = Net()
    Trainer(max_epochs=n_epochs).fit(model, traindl)
    assert digest(model) == digest(by_hand) != digest(Net())


def in_every_form(model):
    """What `configure_optimizers` may return, by what the notes call it: (returned, optimizers, schedulers)."""
    one, other = Adam(model.fc.parameters(), lr=0.1), Adam(model.other.parameters(), lr=0.1)
    sched, sched2 = ExponentialLR(one, gamma=0.1), ExponentialLR(other, gamma=0.1)
    config = {"scheduler": sched, "interval": "step"}
    return {
        "one": (one, [one], []),
        "a list": ([one, other], [one, other], []),
        "a tuple": ((one, other), [one, other], []),
        "two lists": (([one, other], [sched, sched2]), [one, other], [sched, sched2]),
        "two lists with a config": (([one], [config]), [one], [sched]),
        "a dict": ({"optimizer": one, "lr_scheduler": sched}, [one], [sched]),
        "a dict with a config": ({"optimizer": one, "lr_scheduler": config}, [one], [sched]),
        "a tuple of dicts": (
            ({"optimizer": one, "lr_scheduler": sched}, {"optimizer": other, "lr_scheduler": sched2}),
            [one, other],
            [sched, sched2],
        ),
    }


class TwoLayers(Base):
    def __init__(self, form):
        super().__init__()
        self.other = nn.Linear(4, 3)
        self.forms = in_every_form(self)
        self.form = form

    def forward(self, inputs):
        return self.fc(inputs) + self.other(inputs)

    def training_step(self, batch, batch_idx, optimizer_idx=0):
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return self.forms[self.form][0]


@pytest.mark.parametrize("form", list(in_every_form(TwoLayers("one"))))
def test_s37_optimizers_may_be_returned_in_every_form(form):
    model = TwoLayers(form)
    _, optimizers, schedulers = model.forms[form]
    trainer = Trainer(max_epochs=1)
    trainer.fit(model, loaders()[0])
    assert [id(one) for one in trainer.optimizers] == [id(one) for one in optimizers]
    assert [id(one.scheduler) for one in trainer.lr_scheduler_configs] == [id(one) for one in schedulers]
    steps = 7 if "config" in form else 1
    assert [one.last_epoch for one in schedulers] == [steps] * len(schedulers)
    assert all(optimizer.state for optimizer in optimizers)


def test_s37_scenario_1_a_single_optimizer():
    class Net(Base):
        def configure_optimizers(self):
            return Adam(self.parameters(), lr=0.1)

    trainer = Trainer(max_epochs=2)
    trainer.fit(Net(), loaders()[0])
    assert [row["learning_rate"] for row in trainer.fit_run.history] == [0.1, 0.1]


def test_s37_scenario_2_a_standard_schedule():
    class Net(Base):
        def configure_optimizers(self):
            optim = Adam(self.parameters(), lr=0.1)
            lr_scheduler = ExponentialLR(optim, gamma=0.1)
            return {"optimizer": optim, "lr_scheduler": lr_scheduler}

    trainer = Trainer(max_epochs=3)
    trainer.fit(Net(), loaders()[0])
    assert [row["learning_rate"] for row in trainer.fit_run.history] == pytest.approx([0.1, 0.01, 0.001])


def test_s38_scenario_3_a_schedule_that_watches_a_metric():
    class Net(Base):
        def configure_optimizers(self):
            optim = Adam(self.parameters(), lr=0.1)
            lr_scheduler = ReduceLROnPlateau(optim, patience=0)
            return {"optimizer": optim, "lr_scheduler": {"scheduler": lr_scheduler, "monitor": "val_loss"}}

        def validation_step(self, batch, batch_idx):
            loss = 1.0 + self.current_epoch  # it gets worse
            self.log("val_loss", loss)

    trainer = Trainer(max_epochs=3)
    trainer.fit(Net(), *loaders())
    assert [row["learning_rate"] for row in trainer.fit_run.history] == pytest.approx([0.1, 0.1, 0.01])


def test_s39_a_schedule_watches_a_value_in_a_dictionary_by_its_path():
    """The notes' own question: the value is watched as `loss/val_loss`; `val_loss` alone names nothing."""

    class Net(Base):
        monitors = "loss/val_loss"

        def configure_optimizers(self):
            optim = Adam(self.parameters(), lr=0.1)
            lr_scheduler = ReduceLROnPlateau(optim, patience=0)
            return {"optimizer": optim, "lr_scheduler": {"scheduler": lr_scheduler, "monitor": self.monitors}}

        def validation_step(self, batch, batch_idx):
            loss = 1.0 + self.current_epoch
            self.log("loss", {"val_loss": loss})

    trainer = Trainer(max_epochs=3, callbacks=[EarlyStopping("loss/val_loss")])
    trainer.fit(Net(), *loaders())
    assert [row["learning_rate"] for row in trainer.fit_run.history] == pytest.approx([0.1, 0.1, 0.01])

    class Bare(Net):
        monitors = "val_loss"

    with pytest.raises(UnknownNameError, match="did you mean 'loss/val_loss'"):
        Trainer(max_epochs=3).fit(Bare(), *loaders())


# ---- Logging learning rates


def test_s40_a_callback_logs_learning_rates_under_the_name_of_the_schedule():
    class Net(Base):
        def configure_optimizers(self):
            optim = Adam(self.parameters(), lr=0.1)
            config = {"scheduler": ExponentialLR(optim, gamma=0.1), "name": "my_rate"}
            return {"optimizer": optim, "lr_scheduler": config}

    trainer = Trainer(callbacks=[LearningRateMonitor()], max_epochs=2)
    trainer.fit(Net(), loaders()[0])
    rows = list(csv.DictReader((trainer.output_dir / "metrics.csv").read_text().splitlines()))
    assert [float(row["my_rate"]) for row in rows] == pytest.approx([0.1, 0.01])


# ---- Early stopping


def test_s41_s43_early_stopping_watches_a_loss():
    class Net(Base):
        losses = (1.0, 0.5, 0.6, 0.7, 0.8, 0.1)

        def validation_step(self, batch, batch_idx):
            loss = self.losses[self.current_epoch]
            # the mean over an epoch is what counts, not its last batch
            self.log("val_loss", loss + (1 if batch_idx else -1), batch_size=1)

    stopping = EarlyStopping(monitor="val_loss")
    trainer = Trainer(callbacks=[stopping], max_epochs=6)
    trainer.fit(Net(), loaders()[0], loaders(samples=16)[1])
    assert (stopping.stopped_epoch, stopping.best_score) == (4, 0.5)
    assert len(trainer.fit_run.history) == 5


def test_s41_early_stopping_watches_an_accuracy():
    class Net(Base):
        accuracies = (0.5, 0.9, 0.9, 0.8, 0.7, 0.6, 1.0)

        def validation_step(self, batch, batch_idx):
            acc = self.accuracies[self.current_epoch]
            self.log("val_acc", acc)

    stopping = EarlyStopping(monitor="val_acc", mode="max")
    trainer = Trainer(callbacks=[stopping], max_epochs=7)
    trainer.fit(Net(), *loaders())
    # one that is just as good is no bad one
    assert (stopping.stopped_epoch, stopping.best_score) == (5, 0.9)


def test_s42_minus_one_at_the_start_of_a_batch_leaves_the_rest_of_an_epoch_out():
    """The other of the two ways: it ends epochs, not the fit."""

    class Net(Base):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    trainer = Trainer(max_epochs=2)
    trainer.fit(Net(), loaders()[0])
    assert (trainer.current_epoch, trainer.global_step) == (2, 4)
