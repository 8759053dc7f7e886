"""Runs at their edges: saved at odd places, cut short, nested, failing, with loaders of the user's own."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from small import Net, digest, loaders, net
from test_resume import SignalAt, state_digest
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from flashtask import Callback, ModelCheckpoint, Trainer, read_checkpoint
from flashtask.core.errors import DivergedError, OutputError, UsageError


def trainer(folder, **options):
    options = {"max_epochs": 2, "seed": 3, **options}
    return Trainer(output_dir=folder, enable_progress_bar=False, enable_model_summary=False, **options)


class At(Callback):
    """Calls a function in a hook, the nth time it is called."""

    def __init__(self, hook, function, count=1):
        self.count, self.function = count, function
        setattr(self, f"on_{hook}", self._hook)

    def _hook(self, trainer, module, *arguments):
        self.count -= 1
        return self.function(trainer, module) if self.count == 0 else None


def test_a_checkpoint_saved_after_the_fit_continues_with_the_next_epoch(tmp_path):
    first = trainer(tmp_path / "a")
    first.fit(net(), *loaders())
    first.save_checkpoint(tmp_path / "saved.ckpt")
    second = trainer(tmp_path / "b", max_epochs=4)
    second.fit(net(seed=9), *loaders(), ckpt_path=tmp_path / "saved.ckpt")
    assert [row["step"] for row in second.fit_run.history] == [7, 14, 21, 28]
    whole = trainer(tmp_path / "c", max_epochs=4)
    whole.fit(net(), *loaders())
    assert state_digest(tmp_path / "b" / "last.ckpt") == state_digest(tmp_path / "c" / "last.ckpt")


@pytest.mark.long
def test_an_epoch_that_max_steps_cut_short_is_continued_where_it_stopped(tmp_path):
    trainer(tmp_path / "a", max_epochs=None, max_steps=10).fit(net(), *loaders())
    saved = read_checkpoint(tmp_path / "a" / "last.ckpt")
    assert (saved["epoch"], saved["progress"]["samples"], saved["progress"]["epoch_is_complete"]) == (1, 24, False)
    longer = trainer(tmp_path / "b", max_epochs=None, max_steps=21)
    longer.fit(net(seed=9), *loaders(), ckpt_path=tmp_path / "a" / "last.ckpt")
    assert [(row["epoch"], row["step"]) for row in longer.fit_run.history] == [(0, 7), (1, 14), (2, 21)]
    trainer(tmp_path / "c", max_epochs=None, max_steps=21).fit(net(), *loaders())
    assert state_digest(tmp_path / "b" / "last.ckpt") == state_digest(tmp_path / "c" / "last.ckpt")


def test_evaluation_inside_a_hook_leaves_the_fit_alone(tmp_path):
    results = []

    def validate(trainer, module):
        results.append(trainer.validate(module, loaders()[1])[0]["val_loss"])

    nested, plain = net(), net()
    trainer(tmp_path / "a", callbacks=At("train_batch_end", validate, count=3)).fit(nested, *loaders())
    trainer(tmp_path / "b").fit(plain, *loaders())
    assert len(results) == 1
    assert digest(nested) == digest(plain)


def test_a_checkpoint_in_the_middle_of_a_step_is_refused(tmp_path):
    def save(trainer, module):
        trainer.save_checkpoint(tmp_path / "middle.ckpt")

    with pytest.raises(UsageError, match="in the middle of a step"):
        trainer(tmp_path / "a", accumulate_grad_batches=2, callbacks=At("train_batch_end", save)).fit(net(), *loaders())
    assert not (tmp_path / "middle.ckpt").exists()


def test_the_place_in_the_epoch_does_not_depend_on_what_batches_look_like(tmp_path):
    """A batch whose first tensor is no list of samples."""

    class Odd(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[1], batch_idx)

    def odd_loader():
        loader = loaders()[0]
        collate = loader.collate_fn
        return DataLoader(
            loader.dataset, batch_size=8, shuffle=True, collate_fn=lambda rows: (torch.zeros(40), collate(rows))
        )

    def make():
        torch.manual_seed(1)
        return Odd()

    whole = make()
    trainer(tmp_path / "a").fit(whole, odd_loader())
    stopping = SignalAt("train_batch_end", 4, signal.SIGTERM)
    with pytest.raises(SystemExit):
        trainer(tmp_path / "b", callbacks=stopping).fit(make(), odd_loader())
    resumed = make()
    trainer(tmp_path / "b").fit(resumed, odd_loader(), ckpt_path="last")
    assert digest(resumed) == digest(whole)


class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            inputs = torch.randn(4, generator=generator)
            yield inputs, int(inputs.sum() > 0)


def test_a_stream_is_continued_behind_what_was_trained_on_and_says_so(tmp_path, capsys):
    whole = net()
    trainer(tmp_path / "a").fit(whole, DataLoader(Stream(), batch_size=8))
    stopping = SignalAt("train_batch_end", 7, signal.SIGTERM)
    with pytest.raises(SystemExit):
        trainer(tmp_path / "b", callbacks=stopping).fit(net(), DataLoader(Stream(), batch_size=8))
    resumed = net(seed=9)
    trainer(tmp_path / "b").fit(resumed, DataLoader(Stream(), batch_size=8), ckpt_path="last")
    assert digest(resumed) == digest(whole)
    assert "the first 2 batches of epoch 1 are read again and left out" in capsys.readouterr().err


def test_training_metrics_survive_a_stop_in_the_middle_of_an_epoch(tmp_path):
    class Measuring(Net):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()

        def training_step(self, batch, batch_idx):
            self.mean.update(float(batch_idx))
            self.log("mean_idx", self.mean, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    stopping = SignalAt("train_batch_end", 3, signal.SIGTERM)
    with pytest.raises(SystemExit):
        trainer(tmp_path, max_epochs=1, callbacks=stopping).fit(Measuring(), *loaders())
    resumed = trainer(tmp_path, max_epochs=1)
    resumed.fit(Measuring(), *loaders(), ckpt_path="last")
    assert resumed.callback_metrics["mean_idx"] == pytest.approx(3.0)


def test_a_second_fit_begins_with_a_clean_best(tmp_path):
    class Fixed(Net):
        value = 1.0

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.value)

    checkpoint = ModelCheckpoint()
    both = Trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=checkpoint, enable_progress_bar=False)
    both.finetune(Fixed(), *loaders(), strategy="no_freeze")
    worse = Fixed()
    worse.value = 2.0
    both.finetune(worse, *loaders(), strategy="no_freeze")
    assert checkpoint.best_score == 2.0
    assert checkpoint.best_model_path == str(tmp_path / "runs" / "001" / "best.ckpt")
    assert torch.equal(worse.head.weight, read_checkpoint(checkpoint.best_model_path)["state_dict"]["head.weight"])


def test_the_best_so_far_comes_along_into_another_folder(tmp_path):
    class Worsening(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    trainer(tmp_path / "a", max_epochs=2).finetune(Worsening(), *loaders(), strategy="no_freeze")
    resumed = trainer(tmp_path / "b", max_epochs=3)
    resumed.finetune(Worsening(), *loaders(), strategy="no_freeze", ckpt_path=tmp_path / "a" / "last.ckpt")
    assert read_checkpoint(tmp_path / "b" / "best.ckpt")["epoch"] == 0
    assert resumed.checkpoint_callback.best_score == 0.0


def test_gradients_from_before_the_run_do_not_enter_it(tmp_path):
    dirty, clean = net(), net()
    for parameter in dirty.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer(tmp_path / "a").fit(dirty, *loaders())
    trainer(tmp_path / "b").fit(clean, *loaders())
    assert digest(dirty) == digest(clean)


def test_minus_one_at_the_start_of_a_batch_ends_the_epoch(tmp_path):
    run = trainer(tmp_path, callbacks=At("train_batch_start", lambda trainer, module: -1, count=3))
    run.fit(net(), *loaders())
    assert [row["step"] for row in run.fit_run.history] == [2, 9]


def test_a_nan_gradient_does_not_reach_the_weights(tmp_path):
    class Diverging(Net):
        def on_after_backward(self):
            if self.global_step == 2:
                self.head.weight.grad[0, 0] = math.nan

    module = Diverging()
    with pytest.raises(DivergedError, match="norm of the gradients became nan"):
        trainer(tmp_path, gradient_clip_val=1.0).fit(module, *loaders())
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.parametrize("options", [{"max_epochs": None, "max_steps": 3}, {"limit_train_batches": 0}])
def test_a_loader_without_batches_is_an_error(tmp_path, options):
    few = loaders(samples=4)[0].dataset
    with pytest.raises(UsageError, match="no batch"):
        trainer(tmp_path, **options).fit(net(), DataLoader(few, batch_size=8, drop_last=True))


def test_what_a_module_does_at_the_end_of_an_epoch_is_in_the_checkpoint(tmp_path):
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("epochs", torch.zeros(()))

        def on_epoch_end(self):
            self.epochs += 1

    trainer(tmp_path).fit(Counting(), *loaders())
    assert read_checkpoint(tmp_path / "last.ckpt")["state_dict"]["epochs"] == 2


def test_two_callbacks_with_one_state_key_are_an_error(tmp_path):
    class Stateful(Callback):
        def state_dict(self):
            return {"count": 1}

    with pytest.raises(UsageError, match="store their state as 'Stateful'"):
        trainer(tmp_path, callbacks=[Stateful(), Stateful()]).fit(net(), *loaders())


def test_a_refused_second_fit_leaves_the_first_one_as_it_was(tmp_path):
    run = trainer(tmp_path)
    run.fit(net(), *loaders())
    with pytest.raises(OutputError):
        run.fit(net(), *loaders())
    assert run.global_step == 14
    run.save_checkpoint(tmp_path / "saved.ckpt")
    assert read_checkpoint(tmp_path / "saved.ckpt")["global_step"] == 14


def test_teardown_is_called_and_modes_come_back_after_a_failure(tmp_path):
    class Failing(Net):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    class Watch(Callback):
        stages = ()

        def teardown(self, trainer, module, stage):
            self.stages += (stage,)

        def on_exception(self, trainer, module, exception):
            self.exception = exception

    module, watch = Failing().train(), Watch()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, callbacks=watch).validate(module, loaders()[1])
    assert watch.stages == ("validate",)
    assert str(watch.exception) == "broken"
    assert module.training
    assert module.trainer is None


def test_a_signal_at_the_very_end_is_obeyed(tmp_path):
    class Watch(SignalAt):
        def on_exception(self, trainer, module, exception):
            self.exception = exception

    watch = Watch("fit_end", 1, signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        trainer(tmp_path, callbacks=watch).fit(net(), *loaders())
    assert stopped.value.code == 143
    assert isinstance(watch.exception, SystemExit)
    versions = json.loads((tmp_path / "summary.json").read_text())["versions"]
    assert set(versions) == {"flashtask", "torch", "torchmetrics", "python"}  # of no library that it does not use


def test_metrics_of_some_epochs_rank_only_those(tmp_path):
    run = trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=2, callbacks=ModelCheckpoint(monitor="val_loss"))
    run.fit(net(), *loaders())
    assert run.checkpoint_callback.best_epoch in (1, 3)


def test_a_plateau_schedule_waits_for_epochs_that_validate(tmp_path):
    class Plateau(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    run = trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=2)
    run.fit(Plateau(), *loaders())
    assert [row["learning_rate"] for row in run.fit_run.history] == [0.1] * 4
    assert run.fit_run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_weights_alone_after_best_was_restored_are_of_one_epoch(tmp_path):
    class Worsening(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    run = trainer(tmp_path / "run", max_epochs=3)
    run.finetune(Worsening(), *loaders(), strategy="no_freeze")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    content = read_checkpoint(tmp_path / "weights.ckpt")
    assert (content["epoch"], content["metrics"]["val_loss"]) == (0, 0.0)
    assert "optimizer_states" not in content


def test_a_module_with_loaders_of_its_own_needs_no_data(tmp_path):
    class Own(Net):
        def train_dataloader(self):
            return loaders()[0]

        def val_dataloader(self):
            return loaders(samples=16)[1]

    run = trainer(tmp_path)
    run.fit(Own())
    assert run.global_step == 14
    assert "val_loss" in run.validate(Own())[0]


def test_several_optimizers_take_turns_with_their_own_parameters(tmp_path):
    """Each has its own step on each batch; the other's parameters want no gradient in it."""
    seen = []

    class Two(Net):
        def training_step(self, batch, batch_idx, optimizer_idx):
            seen.append((optimizer_idx, self.head.weight.requires_grad, self.backbone[0].weight.requires_grad))
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            heads = torch.optim.SGD(self.head.parameters(), lr=0.1)
            return [heads, torch.optim.SGD(self.backbone.parameters(), lr=0.1)]

    run = trainer(tmp_path, max_epochs=None, max_steps=2)
    run.fit(Two(), *loaders())
    assert seen == [(0, True, False), (1, False, True)] * 2
    assert run.global_step == 2


def test_outputs_of_an_epoch_reach_the_hooks_that_ask_for_them(tmp_path):
    seen = {}

    class Collecting(Net):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "index": batch_idx}

        def training_step_end(self, outputs):
            outputs["index"] += 100

        def training_epoch_end(self, outputs):
            seen["train"] = [output["index"] for output in outputs]
            assert not outputs[0]["loss"].requires_grad

        def validation_step(self, batch, batch_idx):
            return batch_idx

        def validation_step_end(self, outputs):
            return outputs + 10

        def validation_epoch_end(self, outputs):
            self.log("val_loss", float(sum(outputs)))
            seen["val"] = list(outputs)

    run = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    run.fit(Collecting(), *loaders(samples=24))
    assert seen == {"train": [100, 101, 102], "val": [10, 11, 12]}
    assert run.callback_metrics["val_loss"] == 33


def test_a_kill_of_the_first_start_leaves_a_folder_that_can_be_continued(tmp_path):
    """The lock of a dead process is no lock."""
    trainer(tmp_path, max_epochs=1).fit(net(), *loaders())
    (tmp_path / ".lock").write_text(f"process {os.getpid() + 10_000} on elsewhere\n")
    trainer(tmp_path).fit(net(), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert not (tmp_path / ".lock").exists()
