"""Runs at their edges: unusual callers, loaders, losses and failures, and what is told of them."""

from __future__ import annotations

import io
import math
import os
import shutil
import signal

import pytest
import torch
from small import Net, loaders, net
from torch.utils.data import DataLoader, WeightedRandomSampler
from torchmetrics import MeanMetric

from flashtask import Callback, DataModule, EarlyStopping, Module, ProgressBar, Timer, Trainer, read_checkpoint
from flashtask.core.errors import DivergedError, OutputError, UnknownNameError, UsageError
from flashtask.trainer.results import Entry, LogSettings, Results


def quiet(tmp_path, **options):
    options = {"output_dir": tmp_path / "run", "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(**{"max_epochs": 1, **options})


class Data(DataModule):
    def train_dataloader(self):
        return loaders()[0]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_s113_a_fit_computes_gradients_wherever_it_is_called(tmp_path, context):
    trainer, module, data = quiet(tmp_path), net(), loaders()
    with context():
        trainer.fit(module, *data)
        assert not torch.is_grad_enabled()
    assert trainer.global_step == 7


def test_s81_teardown_undoes_only_what_was_set_up_and_does_not_hide_the_first_error(tmp_path):
    class Holding(Data):
        def setup(self, stage):
            self.file = (tmp_path / "file").open("w")

        def teardown(self, stage):
            self.file.close()
            del self.file

    data = Holding()
    quiet(tmp_path).fit(net(), data)
    with pytest.raises(OutputError, match="already holds a run"):
        quiet(tmp_path).fit(net(), data)


def test_s81_a_failing_teardown_does_not_hide_the_error_and_leaves_the_trainer_usable(tmp_path):
    class Failing(Data):
        def teardown(self, stage):
            raise RuntimeError("teardown")

    class Broken(Net):
        def training_step(self, batch, batch_idx):
            raise ValueError("the first")

    module, trainer = Broken(), quiet(tmp_path)
    with pytest.raises(ValueError, match="the first") as caught:
        trainer.fit(module, Failing())
    assert "teardown" in caught.value.__notes__[0]
    assert module.trainer is None
    assert trainer.active_run is None
    trainer.fit(net(), Data())


def test_s84_callbacks_hear_of_an_exception_before_the_first_step_too(tmp_path):
    class Broken(Data):
        def prepare_data(self):
            raise RuntimeError("no network")

    class Watch(Callback):
        def on_exception(self, trainer, module, exception):
            self.heard = str(exception)

    watch = Watch()
    with pytest.raises(RuntimeError, match="no network"):
        quiet(tmp_path, callbacks=watch).fit(net(), Broken())
    assert watch.heard == "no network"


def test_s16_outputs_of_an_epoch_hold_no_graph_at_any_depth(tmp_path):
    class Collecting(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "parts": [loss, (loss,), {"again": loss}]}

        def training_epoch_end(self, outputs):
            parts = outputs[0]["parts"]
            assert not any(part.requires_grad for part in (parts[0], parts[1][0], parts[2]["again"]))

    quiet(tmp_path).fit(Collecting(), loaders()[0])


def test_a_plain_list_of_the_batches_that_a_loader_gives_is_one_loader(tmp_path):
    train, val = loaders()
    trainer = quiet(tmp_path)
    trainer.fit(net(), list(train), list(val))
    assert trainer.test(net(), list(val))[0].keys() == {"test_loss"}


def test_s14_a_loss_of_several_numbers_is_refused(tmp_path):
    class Several(Net):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum(1)

    with pytest.raises(UsageError, match=r"a loss of shape \(8,\)"):
        quiet(tmp_path).fit(Several(), loaders()[0])


def test_s14_a_batch_that_was_skipped_is_no_step(tmp_path):
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx < 3 else super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    trainer = quiet(tmp_path)
    trainer.fit(Skipping(), loaders()[0])
    assert trainer.global_step == 4
    assert trainer.fit_run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 16)


@pytest.mark.parametrize("options", [{"check_val_every_n_epoch": 5}, {"overfit_batches": 3}])
def test_s89_fast_dev_run_validates_whatever_else_is_asked_for(tmp_path, options):
    trainer = quiet(tmp_path, fast_dev_run=True, **options)
    trainer.fit(net(), *loaders())
    assert "val_loss" in trainer.callback_metrics


def test_s81_s92_each_setup_has_its_teardown_while_overfitting(tmp_path):
    told = []

    class Told(Data):
        def setup(self, stage):
            told.append(f"+{stage}")

        def teardown(self, stage):
            told.append(f"-{stage}")

    quiet(tmp_path, overfit_batches=2).validate(net(), Told())
    assert sorted(told) == ["+fit", "+validate", "-fit", "-validate"]


def test_s83_s92_overfitting_takes_the_first_batches_whatever_the_sampler(tmp_path):
    seen = []

    class Seen(Net):
        def training_step(self, batch, batch_idx):
            seen.append(round(float(batch[0].sum()), 4))
            return super().training_step(batch, batch_idx)

    data = loaders()[1].dataset
    sampler = WeightedRandomSampler([1.0] * len(data), len(data))
    quiet(tmp_path, max_epochs=3, overfit_batches=2).fit(Seen(), DataLoader(data, batch_size=8, sampler=sampler))
    assert seen == [round(float(inputs.sum()), 4) for inputs, _ in loaders()[1]][:2] * 3


def test_s84_the_state_of_a_datamodule_is_back_before_its_loaders_are_asked_for(tmp_path):
    told = []

    class Told(Data):
        def setup(self, stage):
            told.append("setup")

        def train_dataloader(self):
            told.append("loader")
            return loaders()[0]

        def state_dict(self):
            return {"stage": 1}

        def load_state_dict(self, state):
            told.append("state")

    quiet(tmp_path).fit(net(), Told())
    told.clear()
    quiet(tmp_path, max_epochs=2).fit(net(), Told(), ckpt_path="last")
    assert told == ["setup", "state", "loader"]


def test_s86_the_hyperparameters_of_the_data_are_logged_and_stored(tmp_path):
    class Sized(Data):
        def __init__(self, batch_size=4):
            self.save_hyperparameters()

    quiet(tmp_path).fit(net(), Sized(8))
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["datamodule_hyper_parameters"] == {"batch_size": 8}


def test_a_hook_of_older_trainers_names_the_one_that_took_its_place(tmp_path):
    for name, now in (
        ("on_epoch_start", "on_train_epoch_start"),
        ("on_batch_end", "on_train_batch_end"),
        ("on_keyboard_interrupt", "on_exception"),
    ):
        old = type("Old", (Callback,), {name: lambda *arguments: None})
        with pytest.warns(UserWarning, match=f"did you mean {now}"):
            quiet(tmp_path, fast_dev_run=True, callbacks=old()).fit(net(), *loaders())


def test_the_class_of_a_datamodule_in_place_of_one_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"Data is a class"):
        quiet(tmp_path).fit(net(), Data)


def test_a_generator_that_is_used_up_is_told(tmp_path):
    with pytest.raises(UsageError, match="only once"):
        quiet(tmp_path, max_epochs=2).fit(net(), (batch for batch in loaders()[0]))


@pytest.mark.parametrize("name", ["epoch", "step", "seconds"])
def test_a_value_named_like_a_column_of_the_log_is_for_callbacks_alone(tmp_path, name):
    class Own(Net):
        def validation_step(self, batch, batch_idx):
            self.log(name, 70.0)

    trainer = quiet(tmp_path)
    trainer.fit(Own(), *loaders())
    assert trainer.callback_metrics[name] == 70
    assert trainer.fit_run.history[-1][name] != 70


def test_a_learning_rate_of_ones_own_is_logged_in_the_place_of_the_engines(tmp_path):
    class Own(Net):
        def validation_step(self, batch, batch_idx):
            self.log("learning_rate", 7.0)

    trainer = quiet(tmp_path)
    trainer.fit(Own(), *loaders())
    assert trainer.fit_run.history[0]["learning_rate"] == 7.0


def test_a_fit_inside_a_fit_of_the_same_trainer_is_refused(tmp_path):
    class Nested(Net):
        def on_train_epoch_end(self):
            self.trainer.fit(net(), *loaders())

    trainer = quiet(tmp_path)
    with pytest.raises(UsageError, match="in the middle of a fit"):
        trainer.fit(Nested(), *loaders())
    assert not (tmp_path / "run" / ".lock").exists()


class Parts(Net):
    """An optimizer for the backbone and one for the head."""

    def training_step(self, batch, batch_idx, optimizer_idx):
        self.turns = [*getattr(self, "turns", []), optimizer_idx]
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.backbone, self.head)]


def test_an_optimizer_whose_parameters_are_frozen_has_no_turn(tmp_path):
    module = Parts()
    trainer = quiet(tmp_path, max_epochs=2, limit_train_batches=2)
    trainer.finetune(module, *loaders(), strategy=("freeze_unfreeze", 1))
    assert module.turns == [1, 1, 0, 1, 0, 1]


def test_modes_of_what_was_frozen_are_put_back(tmp_path):
    module = net()
    quiet(tmp_path).finetune(module, *loaders(), strategy="freeze")
    assert module.backbone.training


def test_a_folder_whose_run_never_wrote_a_checkpoint_says_what_to_do(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("epoch\n")
    with pytest.raises(OutputError, match="before its first checkpoint"):
        quiet(tmp_path).fit(net(), *loaders())


def test_a_validation_iterator_that_is_used_up_is_told(tmp_path):
    with pytest.raises(UsageError, match="used up"):
        quiet(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(net(), loaders()[0], iter(list(loaders()[1])))


def test_a_hook_that_fails_on_an_exception_does_not_hide_it(tmp_path):
    heard = []

    class Clumsy(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise KeyError("the cause")

        def on_exception(self, trainer, module, exception):
            raise ValueError("clumsy")

    class Listening(Data):
        def on_exception(self, exception):
            heard.append(exception)

    with pytest.raises(KeyError, match="the cause") as caught:
        quiet(tmp_path, callbacks=[Clumsy()]).fit(net(), datamodule=Listening())
    assert any("clumsy" in note for note in caught.value.__notes__)
    assert heard == [caught.value]


@pytest.mark.parametrize("size", [0, -4, "a", 1.5])
def test_a_weight_that_cannot_be_one_is_told(tmp_path, size):
    class Wrong(Net):
        def validation_step(self, batch, batch_idx):
            self.log("x", 1.0, batch_size=size)

    with pytest.raises(UsageError, match="at least 1"):
        quiet(tmp_path).fit(Wrong(), *loaders())


@pytest.mark.parametrize("path", [3, True, ""])
def test_a_checkpoint_path_that_is_none_is_told(tmp_path, path):
    with pytest.raises(UsageError, match="ckpt_path"):
        quiet(tmp_path).fit(net(), *loaders(), ckpt_path=path)


@pytest.mark.parametrize("time", [{"seconds": float("nan")}, {"seconds": float("inf")}, {"days": 10**12}])
def test_a_time_without_an_end_is_told(time):
    with pytest.raises(UsageError, match="not a length of time"):
        Trainer(max_time=time)


def test_a_loss_that_was_detached_is_told(tmp_path):
    class Detached(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    with pytest.raises(UsageError, match="nothing can be learned"):
        quiet(tmp_path).fit(Detached(), *loaders())


def test_a_step_may_take_the_batch_alone(tmp_path):
    class Short(Net):
        def training_step(self, batch):
            return super().training_step(batch, 0)

        def validation_step(self, batch):
            self.log("val_loss", 1.0)

    trainer = quiet(tmp_path)
    trainer.fit(Short(), *loaders())
    assert trainer.callback_metrics["val_loss"] == 1.0


class TrainsOnly(Module):
    """The least that a module needs: no validation."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("name", "meant"), [("validaton_step", "validation_step"), ("val_dataloaders", "val_dataloader")]
)
def test_a_method_named_almost_like_a_step_is_reported(tmp_path, name, meant):
    module = type("Mistyped", (TrainsOnly,), {name: lambda self, *arguments: None})()
    with pytest.warns(UserWarning, match=f"did you mean {meant}"):
        quiet(tmp_path).fit(module, loaders()[0])


def test_validation_data_without_a_step_is_said(tmp_path, capsys):
    quiet(tmp_path).fit(TrainsOnly(), *loaders())
    assert "no validation_step" in capsys.readouterr().err


class Terminal(io.StringIO):
    """A stream that says it is a terminal, so that the bar is drawn."""

    def isatty(self):
        return True


def test_an_error_in_one_optimizers_turn_leaves_no_parameter_switched_off(tmp_path):
    class Boom(Parts):
        def training_step(self, batch, batch_idx, optimizer_idx):
            if batch_idx == 1:
                raise KeyError("boom")
            return super().training_step(batch, batch_idx, optimizer_idx)

    module = Boom()
    with pytest.raises(KeyError, match="boom") as caught:
        quiet(tmp_path).fit(module, *loaders())
    assert caught.traceback  # it holds the loop alive, whose own clean-up has not run yet
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("returned", [(1, 2), None, "done"])
def test_the_bar_takes_whatever_a_manual_step_returns(tmp_path, returned):
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad()
            return returned

    bar = ProgressBar(stream=Terminal())
    quiet(tmp_path, callbacks=[bar]).fit(Manual(), *loaders())
    assert "epoch 0" in bar.stream.getvalue()


def test_a_norm_that_is_nan_never_reaches_the_weights_of_a_manual_step(tmp_path):
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward((self.head.weight.sum() * 0).sqrt() + super().training_step(batch, batch_idx))
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()

    module = Manual()
    with pytest.raises(DivergedError, match="norm of the gradients"):
        quiet(tmp_path).fit(module, *loaders())
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_gradients_of_a_manual_module_are_kept_over_the_end_of_an_epoch(tmp_path):
    class Accumulating(Net):
        automatic_optimization = False
        found = ()

        def training_step(self, batch, batch_idx):
            self.found = (*self.found, self.head.weight.grad is not None)
            self.manual_backward(super().training_step(batch, batch_idx))

    module = Accumulating()
    quiet(tmp_path, max_epochs=2, limit_train_batches=2).fit(module, *loaders())
    assert module.found == (False, True, True, True)


@pytest.mark.parametrize(("how", "expected"), [("max", 3.0), ("min", 1.0), ("sum", 6.0)])
def test_values_on_a_device_are_reduced_without_waiting_for_it(how, expected):
    entry = Entry("value", LogSettings(on_epoch=True, on_step=False, reduce_fx=how))
    for value in (2.0, 3.0, 1.0):
        entry.update(torch.tensor(value, device="meta"), 1)  # a device whose values cannot be read at all
    assert entry.total.device.type == "meta"
    entry = Entry("value", LogSettings(on_epoch=True, on_step=False, reduce_fx=how))
    for value in (2.0, 3.0, 1.0):
        entry.update(value, 1)
    assert entry.epoch_value() == expected
    entry.update(float("nan"), 1)
    entry.update(0.5, 1)
    assert math.isnan(entry.epoch_value())


class Scheduled(Net):
    def configure_optimizers(self):
        return self.returned


def test_a_schedule_by_name_is_checked_and_its_settings_stay_the_users(tmp_path):
    module = Scheduled()
    module.returned = {"optimizer": ("sgd", {"lr": 0.0}), "lr_scheduler": {"scheduler": "cosine", "interval": "weekly"}}
    with pytest.raises(UsageError, match='"epoch" or "step"'):
        quiet(tmp_path).fit(module, *loaders())
    module.returned["lr_scheduler"]["interval"] = "step"
    for name in ("a", "b"):
        trainer = quiet(tmp_path, output_dir=tmp_path / name)
        trainer.fit(module, *loaders())
    assert trainer.optimizers[0].defaults["lr"] == 0.0


def test_a_schedule_that_could_not_be_resumed_is_told(tmp_path):
    class Bare:
        def step(self):
            """Does nothing."""

    module = Scheduled()
    module.returned = ([torch.optim.SGD(module.parameters(), lr=0.1)], [Bare()])
    with pytest.raises(UsageError, match="state_dict"):
        quiet(tmp_path).fit(module, *loaders())


def test_a_plateau_schedule_may_step_with_every_step(tmp_path):
    class Steps(Scheduled):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("step_loss", 1.0)
            return loss

    module = Steps()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    rate = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    settings = {"scheduler": rate, "monitor": "step_loss", "interval": "step"}
    module.returned = {"optimizer": optimizer, "lr_scheduler": settings}
    quiet(tmp_path, max_steps=3).fit(module, *loaders())
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_predict_has_the_hook_of_its_outputs(tmp_path):
    class Predicting(Net):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

        def predict_epoch_end(self, outputs):
            self.seen = len(outputs)

    module = Predicting()
    quiet(tmp_path).predict(module, loaders()[1])
    assert module.seen == 7


def test_another_files_weights_are_not_what_save_checkpoint_writes(tmp_path):
    other, trainer = quiet(tmp_path, output_dir=tmp_path / "other"), quiet(tmp_path, max_epochs=2)
    other.fit(net(2), *loaders())
    trainer.fit(net(), *loaders())
    trainer.test(ckpt_path=tmp_path / "other" / "last.ckpt", dataloaders=loaders()[1])
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert read_checkpoint(tmp_path / "saved.ckpt")["global_step"] == trainer.global_step == 14


def test_s75_a_fit_that_never_got_ready_does_not_take_the_place_of_the_last_one(tmp_path):
    class Broken(Data):
        def setup(self, stage):
            raise RuntimeError("no data today")

    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, enable_progress_bar=False, enable_model_summary=False)
    module = net()
    trainer.fit(module, *loaders())
    metrics, folder, best = trainer.callback_metrics, trainer.output_dir, trainer.checkpoint_file("best")
    with pytest.raises(RuntimeError, match="no data today"):
        trainer.fit(net(2), Broken())
    assert (trainer.global_step, trainer.callback_metrics, trainer.output_dir) == (7, metrics, folder)
    assert trainer.checkpoint_file("best") == best
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = read_checkpoint(tmp_path / "saved.ckpt")
    assert saved["global_step"] == 7
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in module.state_dict().items())


def test_s75_a_run_that_never_got_ready_is_not_saved(tmp_path):
    class Broken(Data):
        def setup(self, stage):
            raise RuntimeError("no data today")

    trainer = quiet(tmp_path)
    with pytest.raises(RuntimeError, match="no data today"):
        trainer.fit(net(), Broken())
    with pytest.raises(UsageError, match="save_checkpoint needs a fit first"):
        trainer.save_checkpoint(tmp_path / "hollow.ckpt")
    assert not (tmp_path / "hollow.ckpt").exists()


class Counting(Callback):
    """Two of a class, whose state grows only later."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen["batches"] = self.seen.get("batches", 0) + 1

    def state_dict(self):
        return self.seen

    def load_state_dict(self, state):
        self.seen = state


def test_s84_two_callbacks_of_one_state_key_are_told_before_either_has_state(tmp_path):
    with pytest.raises(UsageError, match="two callbacks store their state as 'Counting'") as caught:
        quiet(tmp_path, callbacks=[Counting(), Counting()]).fit(net(), *loaders())
    assert "state_key" in caught.value.fix


def test_s84_two_callbacks_without_state_may_share_a_name(tmp_path):
    class Silent(Callback):
        pass

    trainer = quiet(tmp_path, callbacks=[Silent(), Silent()])
    trainer.fit(net(), *loaders())
    assert "Silent" not in read_checkpoint(trainer.checkpoint_file("last"))["callbacks"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [("prepare_dat", "prepare_data"), ("train_dataloaders", "train_dataloader"), ("tear_down", "teardown")],
)
def test_s79_a_slip_in_a_data_modules_method_is_reported(tmp_path, written, meant):
    class Slipped(DataModule):
        def val_dataloader(self):
            return loaders()[1]

    setattr(Slipped, written, lambda self: None)
    with pytest.warns(UserWarning, match=rf"Slipped\.{written} is never called by a trainer; did you mean {meant}\?"):
        quiet(tmp_path).validate(net(), datamodule=Slipped())


def test_s89_a_modules_logger_can_be_used_in_a_brief_run(tmp_path):
    class Drawing(Net):
        def on_train_end(self):
            self.trainer.logger.experiment.add_image("input", torch.zeros(3, 2, 2), 0)
            self.trainer.logger.log_step({"loss": 1.0}, 0, 0)
            self.drawn = True

    module = Drawing()
    trainer = Trainer(default_root_dir=tmp_path, fast_dev_run=True, enable_progress_bar=False)
    trainer.fit(module, *loaders())
    assert module.drawn
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fit", "finetune", "validate", "test", "predict", "tune"])
def test_a_mistyped_argument_of_a_method_is_told_with_the_right_one(tmp_path, name):
    with pytest.raises(UnknownNameError) as caught:
        getattr(quiet(tmp_path), name)(net(), datamodul=Data())
    assert f"no argument of {name}() named 'datamodul'" in str(caught.value)
    assert "did you mean 'datamodule'" in caught.value.fix


def test_a_mistyped_argument_of_a_callback_is_told_with_the_right_one():
    with pytest.raises(UnknownNameError, match="no argument of EarlyStopping named 'moniter'") as caught:
        EarlyStopping(moniter="val_loss")
    assert "did you mean 'monitor'" in caught.value.fix

    class Mine(Callback):
        def __init__(self, every=1):
            self.every = every

    assert Mine(every=3).every == Mine(3).every == 3
    with pytest.raises(UnknownNameError, match="no argument of Mine named 'evry'"):
        Mine(evry=3)


@pytest.mark.parametrize(("signal_number", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_s76_a_signal_is_obeyed_where_its_place_cannot_be_saved(tmp_path, capsys, signal_number, ends):
    class LosesItsFolder(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                shutil.rmtree(tmp_path / "run")
                os.kill(os.getpid(), signal_number)

        def on_exception(self, trainer, module, exception):
            self.heard = exception

    callback = LosesItsFolder()
    with pytest.raises(ends) as caught:
        quiet(tmp_path, callbacks=callback, logger=False).fit(net(), *loaders())
    assert callback.heard is caught.value
    if ends is SystemExit:
        assert caught.value.code == 143
    said = capsys.readouterr().err
    assert "stopped in epoch 0 after 24 samples, and this place could not be saved: " in said
    assert "last.ckpt" in said


def test_s55_the_state_of_a_metric_comes_back_to_the_device_that_the_metric_is_on():
    module = Module()
    module.mean = MeanMetric()
    module.mean.update(3.0)
    results = Results()
    results.log("training_step", "mean", module.mean, 1, LogSettings(on_epoch=True, on_step=False))
    state = results.state_dict(module)
    module.mean.to("meta")
    Results().load_state_dict(state, module)
    assert module.mean.mean_value.device.type == "meta"


def test_a_timer_of_ones_own_runs_beside_max_time(tmp_path):
    own = Timer()
    trainer = quiet(tmp_path, max_time={"hours": 1}, callbacks=own)
    trainer.fit(net(), *loaders())
    assert 0 < own.time_elapsed("train") < 60
    assert {"Timer", "max_time"} <= set(read_checkpoint(trainer.checkpoint_file("last"))["callbacks"])


@pytest.mark.parametrize("name", ["max_steps", "limit_train_batches", "fast_dev_run", "num_sanity_val_steps"])
def test_a_number_that_no_counter_holds_is_told_at_once(name):
    with pytest.raises(UsageError, match=name):
        Trainer(**{name: 10**30})


def test_a_hook_may_return_anything(tmp_path):
    class Returning(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            return batch[0]

    trainer = quiet(tmp_path, callbacks=Returning())
    trainer.fit(net(), *loaders())
    assert trainer.global_step == 7


def test_a_complex_loss_is_told(tmp_path):
    class Complex(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 1j

    with pytest.raises(UsageError, match="a complex loss"):
        quiet(tmp_path).fit(Complex(), *loaders())


def test_a_loader_that_takes_batches_as_they_come_stays_so(tmp_path):
    data = loaders()[0].dataset
    trainer = quiet(tmp_path)
    trainer.fit(net(), DataLoader(data, batch_size=8, in_order=False))
    assert trainer.train_dataloader.in_order is False
