"""The examples of the notes (docs/notes.md): custom loops, plugins, accelerators, callbacks."""

from __future__ import annotations

import pytest
import torch
import torch as t
from small import digest, loaders
from torch import nn

import flashtask as pl
from flashtask import Callback, Trainer
from flashtask.core.errors import UsageError
from flashtask.trainer.devices.accelerators import Accelerator
from flashtask.trainer.devices.precision import Precision
from flashtask.trainer.distribution.process_strategies import STRATEGIES, Strategy
from flashtask.trainer.lightning1.loops import (
    EvaluationEpochLoop,
    EvaluationLoop,
    FitLoop,
    Loop,
    ManualOptimization,
    OptimizerLoop,
    PredictionLoop,
    TrainingBatchLoop,
    TrainingEpochLoop,
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The examples write into the working folder."""
    monkeypatch.chdir(tmp_path)


def loss_fn(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)


class Net(pl.LightningModule):
    """What the reference loop trains, with the modes that its parts ran in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(4, 3)
        self.modes = set()

    def forward(self, inputs):
        return self.fc(inputs)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        outputs = self(inputs)
        self.modes.add(("train", self.training, t.is_grad_enabled()))
        return loss_fn(outputs, targets)

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        outputs = self(inputs)
        self.modes.add(("val", self.training, t.is_grad_enabled()))
        loss = loss_fn(outputs, targets)
        self.log("val_loss", loss)

    def configure_optimizers(self):
        return t.optim.SGD(self.parameters(), lr=0.1)


# ---- Custom loops


def test_s113_the_engine_does_what_the_reference_loop_does():
    """The loop without a trainer, and the engine in its two forms: the same weights and losses, bit for bit."""
    max_epochs, (traindl, valdl) = 2, (loaders()[1], loaders(samples=16)[1])

    model, val_losses = Net(), []
    optim = t.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(max_epochs):
        model.train()
        with t.enable_grad():
            for batch in traindl:
                inputs, targets = batch

                optim.zero_grad()
                outputs = model(inputs)
                loss = loss_fn(outputs, targets)
                loss.backward()
                optim.step()

        model.eval()
        with t.no_grad():
            losses = []
            for batch in valdl:
                inputs, targets = batch
                outputs = model(inputs)
                loss = loss_fn(outputs, targets)
                losses.append(loss.item())
            val_losses.append(sum(losses) / len(losses))

    for by_objects in (False, True):
        trainer, by_engine = Trainer(max_epochs=max_epochs), Net()
        if by_objects:
            assert isinstance(trainer.fit_loop, FitLoop)
        trainer.fit(by_engine, traindl, valdl)
        assert digest(by_engine) == digest(model)
        assert [row["val_loss"] for row in trainer.fit_run.history] == pytest.approx(val_losses, rel=1e-6)
        assert by_engine.modes == {("train", True, True), ("val", False, False)}


def test_s107_a_trainer_has_the_loops_of_the_notes():
    trainer = Trainer()
    assert isinstance(trainer.fit_loop, FitLoop)
    assert isinstance(trainer.fit_loop.epoch_loop, TrainingEpochLoop)
    assert isinstance(trainer.validate_loop, EvaluationLoop)
    assert isinstance(trainer.test_loop, EvaluationLoop)
    assert isinstance(trainer.predict_loop, PredictionLoop)
    epoch_loop = trainer.fit_loop.epoch_loop
    assert isinstance(epoch_loop.batch_loop, TrainingBatchLoop)
    assert isinstance(epoch_loop.val_loop, EvaluationLoop)
    assert isinstance(epoch_loop.batch_loop.optimizer_loop, OptimizerLoop)
    assert isinstance(epoch_loop.batch_loop.manual_loop, ManualOptimization)
    assert isinstance(epoch_loop.val_loop.epoch_loop, EvaluationEpochLoop)
    assert all(issubclass(kind, Loop) for kind in (FitLoop, TrainingEpochLoop, EvaluationLoop, PredictionLoop))


def test_s106_run_is_what_the_notes_say():
    class Noting(Loop):
        """Each method by its name, and `run` written out."""

        def __init__(self):
            self.calls = []

        @property
        def done(self):
            return self.calls.count("advance") == 2

        def written_out(self):
            self.on_run_start()
            while not self.done:
                self.on_advance_start()
                self.advance()
                self.on_advance_end()
            return self.on_run_end()

        def on_run_start(self):
            self.calls.append("on_run_start")

        def on_advance_start(self):
            self.calls.append("on_advance_start")

        def advance(self):
            self.calls.append("advance")

        def on_advance_end(self):
            self.calls.append("on_advance_end")

        def on_run_end(self):
            self.calls.append("on_run_end")
            return "the end"

    loop, written_out = Noting(), Noting()
    assert loop.run() == written_out.written_out() == "the end"
    assert loop.calls == written_out.calls


def test_s107_s112_a_batch_is_optimized_automatically_or_by_the_module():
    chosen = []

    class Automatic(OptimizerLoop):
        def advance(self, *arguments):
            chosen.append("automatic")
            super().advance(*arguments)

    class Manual(ManualOptimization):
        def advance(self, *arguments):
            chosen.append("manual")
            super().advance(*arguments)

    class ByItself(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    digests = []
    for model in (Net(), ByItself()):
        trainer = Trainer(max_epochs=1)
        trainer.fit_loop.epoch_loop.batch_loop.replace(optimizer_loop=Automatic, manual_loop=Manual)
        trainer.fit(model, loaders()[1])
        digests.append(digest(model))
    assert chosen == ["automatic"] * 7 + ["manual"] * 7
    assert digests[0] == digests[1]


def test_s108_a_loop_of_ones_own_takes_the_place_of_the_fit_loop():
    class MyFancyLoop(Loop):
        turns = 0

        @property
        def done(self):
            return self.turns == 3

        def advance(self):
            self.turns += 1

    model = Net()
    trainer = Trainer()
    trainer.fit_loop = MyFancyLoop()
    trainer.fit(model, *loaders())
    assert trainer.fit_loop.turns == 3
    assert digest(model) == digest(Net())


def test_s109_a_subclass_of_the_fit_loop_changes_a_part_of_it():
    class CustomFitLoop(FitLoop):
        turns = 0

        def advance(self):
            super().advance()
            self.turns += 1

    model, by_page = Net(), Net()
    trainer = Trainer(max_epochs=3)
    trainer.fit_loop = CustomFitLoop()
    trainer.fit(model, *loaders())
    assert trainer.fit_loop.turns == 3
    Trainer(max_epochs=3).fit(by_page, *loaders())
    assert digest(model) == digest(by_page)


class MyEpochLoop(TrainingEpochLoop):
    turns = 0

    def advance(self):
        super().advance()
        self.turns += 1


def test_s110_replace_puts_another_epoch_loop_in():
    trainer, model = Trainer(max_epochs=2), Net()
    trainer.fit_loop.replace(epoch_loop=MyEpochLoop)
    trainer.fit(model, *loaders())
    assert trainer.fit_loop.epoch_loop.turns == 14


def test_s110_an_assignment_does_the_same_here():
    """The notes were told not to, and ask why: here a loop tells those below it of the trainer."""
    trainer, model = Trainer(max_epochs=2), Net()
    trainer.fit_loop.epoch_loop = MyEpochLoop()
    trainer.fit(model, *loaders())
    assert trainer.fit_loop.epoch_loop.turns == 14
    by_page = Net()
    Trainer(max_epochs=2).fit(by_page, *loaders())
    assert digest(model) == digest(by_page)


def test_s111_connect_keeps_the_loops_of_the_next_level():
    trainer, model = Trainer(max_epochs=2), Net()
    batch_loop, val_loop = trainer.fit_loop.epoch_loop.batch_loop, trainer.fit_loop.epoch_loop.val_loop
    epoch_loop = MyEpochLoop()
    epoch_loop.connect(trainer.fit_loop.epoch_loop.batch_loop, trainer.fit_loop.epoch_loop.val_loop)
    trainer.fit_loop.connect(epoch_loop=epoch_loop)
    trainer.fit(model, *loaders())
    assert epoch_loop.turns == 14
    assert (epoch_loop.batch_loop, epoch_loop.val_loop) == (batch_loop, val_loop)


# ---- Plugins and accelerators


class CustomDDPStrategy(Strategy):
    """One process, which notes that it was asked."""

    def __init__(self, accelerator=None, precision_plugin=None):
        super().__init__(accelerator, precision_plugin)
        self.modules = []

    def setup(self, module):
        self.modules.append(module)
        return super().setup(module)


class CustomPrecisionPlugin(Precision):
    """Float32, with the steps counted."""

    def __init__(self):
        self.steps = 0

    def step(self, optimizer, closure=None):
        self.steps += 1
        return super().step(optimizer, closure)


class MyPrecision(CustomPrecisionPlugin):
    pass


class MyAccelerator(Accelerator):
    """The CPU, with the devices that were asked for."""

    def __init__(self):
        self.asked = []

    def device(self, index):
        self.asked.append(index)
        return torch.device("cpu")


def test_s114_a_strategy_takes_an_accelerator_and_a_precision():
    accelerator, precision = MyAccelerator(), MyPrecision()
    strategy = CustomDDPStrategy(accelerator=accelerator, precision_plugin=precision)
    assert (strategy.accelerator, strategy.precision_plugin) == (accelerator, precision)


def test_s115_flags_set_up_accelerator_strategy_and_precision():
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="gpus=4: the CUDA devices here are: none"):
            Trainer(gpus=4, precision=16)
    trainer = Trainer(gpus=0, precision=16, max_epochs=1)
    trainer.fit(Net(), *loaders())
    run = trainer.fit_run
    assert (run.device_plan.accelerator.name, run.strategy.name, run.precision.name) == ("cpu", "single", "16-mixed")


def test_s118_a_strategy_and_a_precision_of_ones_own_are_set():
    strategy, precision = CustomDDPStrategy(), CustomPrecisionPlugin()
    trainer = Trainer(strategy=strategy, plugins=[precision], max_epochs=1)
    trainer.fit(Net(), *loaders())
    assert trainer.fit_run.strategy is strategy
    assert precision.steps == 7


def test_a_plugin_that_writes_checkpoints_is_refused_with_what_to_do_instead():
    class OwnIO:
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            raise NotImplementedError

    with pytest.raises(UsageError, match="a Strategy or a Precision is needed") as caught:
        Trainer(plugins=[OwnIO()])
    assert "ModelCheckpoint(dirpath=...)" in caught.value.fix


def test_s118_plugins_take_strategies_too():
    """The notes guess so."""
    strategy = CustomDDPStrategy()
    trainer = Trainer(plugins=[strategy], max_epochs=1)
    trainer.fit(Net(), *loaders())
    assert trainer.fit_run.strategy is strategy
    with pytest.raises(UsageError, match="strategy is given twice"):
        Trainer(strategy=CustomDDPStrategy(), plugins=[strategy])


def test_s118_a_strategy_brings_its_own_accelerator_and_precision():
    accelerator, precision = MyAccelerator(), MyPrecision()
    trainer = Trainer(
        strategy=CustomDDPStrategy(accelerator=accelerator, precision_plugin=precision),
        max_epochs=1,
    )
    trainer.fit(Net(), *loaders())
    assert precision.steps == 7
    assert accelerator.asked == [0]
    assert trainer.fit_run.device == torch.device("cpu")


def test_s119_the_registry_lists_what_is_there(capsys):
    for plugin in STRATEGIES.keys():  # noqa: SIM118 - as a registry of 1.x was asked
        print(plugin)
    listed = capsys.readouterr().out.split()
    assert "single" in listed
    for plugin in listed:
        Trainer(strategy=plugin)


@pytest.mark.parametrize(
    "plugin",
    [
        "ddp_sharded_find_unused_parameters_false",
        "ddp_sharded_spawn_find_unused_parameters_false",
        "deepspeed",
        "deepspeed_stage_1",
        "deepspeed_stage_2",
        "deepspeed_stage_2_offload",
        "deepspeed_stage_3",
        "deepspeed_stage_3_offload",
        "deepspeed_stage_3_offload_nvme",
        "tpu_spawn_debug",
    ],
)
def test_s119_a_plugin_of_the_notes_that_is_not_there_says_what_to_use(plugin):
    with pytest.raises(UsageError) as told:
        Trainer(strategy=plugin)
    assert told.value.why
    assert 'distribution: strategy="' in told.value.fix


@pytest.mark.parametrize("plugin", ["ddp_find_unused_parameters_false", "ddp_spawn_find_unused_parameters_false"])
def test_s119_a_plugin_of_the_notes_has_its_spelling(plugin):
    assert Trainer(strategy=plugin).strategy.name == plugin.removesuffix("_find_unused_parameters_false")


# ---- Callbacks


def test_s120_a_callback_has_the_hooks_that_the_notes_name():
    called = []

    class Mine(Callback):
        def on_train_start(self, trainer, module):
            called.append("on_train_start")

        def on_validation_start(self, trainer, module):
            called.append("on_validation_start")

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            called.append("on_train_batch_start")

    Trainer(callbacks=[Mine()], max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0).fit(Net(), *loaders())
    assert called == ["on_train_start", "on_train_batch_start", "on_validation_start"]
