"""A finished run that is made longer: its schedule is drawn again, and why nothing is left to do is told."""

import pytest
import torch
from small import Net, colour_folders, loaders
from torch.optim.lr_scheduler import CosineAnnealingLR

from flashtask import Callback, EarlyStopping, ImageClassifier, Trainer
from flashtask.cli import run as command


class Rates(Callback):
    """The rate of each optimizer step."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


class Cosine(Net):
    """With the schedule of tasks, over the whole run."""

    def configure_optimizers(self):
        return {"optimizer": torch.optim.SGD(self.parameters(), lr=0.1), "lr_scheduler": "cosine"}


class OneCycle(Net):
    """With a cycle over the whole run."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": ("OneCycleLR", {"max_lr": 0.5})}


def fitted(folder, epochs, module=None, callbacks=(), batch_size=50, **options):
    """The rates of the steps of a fit of so many epochs in a folder."""
    rates = Rates()
    settings = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "seed": 3, "output_dir": folder}
    trainer = Trainer(**settings, max_epochs=epochs, callbacks=[rates, *callbacks])
    trainer.fit(module or Cosine(), *loaders(50, batch_size), **options)
    return rates.rates


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("first", "batch_size"), [(2, 50), (2, 25), (3, 50)])
def test_a_run_that_is_made_longer_has_the_rates_of_the_longer_run(first, batch_size, tmp_path, capsys):
    whole = fitted(tmp_path / "whole", 5, batch_size=batch_size)
    fitted(tmp_path / "run", first, batch_size=batch_size)
    capsys.readouterr()
    rest = fitted(tmp_path / "run", 5, batch_size=batch_size, ckpt_path="last")
    assert rest == pytest.approx(whole[first * 50 // batch_size :])
    assert min(rest) > 0
    said = "".join(capsys.readouterr())
    assert said.count(f"drawn again for the {5 * 50 // batch_size} steps of this run") == 1
    assert f"the rate {rest[0]:g}, not 0" in said


def test_a_cycle_of_a_run_that_is_made_longer_is_that_of_the_longer_run(tmp_path):
    whole = fitted(tmp_path / "whole", 5, OneCycle(), batch_size=25)
    fitted(tmp_path / "run", 2, OneCycle(), batch_size=25)
    rest = fitted(tmp_path / "run", 5, OneCycle(), batch_size=25, ckpt_path="last")
    assert rest == pytest.approx(whole[4:])


@pytest.mark.parametrize("kind", [Cosine, OneCycle])
def test_a_run_of_the_same_length_keeps_its_rates_to_the_bit(kind, tmp_path, capsys):
    whole = fitted(tmp_path / "whole", 4, kind(), batch_size=10)
    first = fitted(tmp_path / "run", 4, kind(), callbacks=[_After(7)], batch_size=10)
    rest = fitted(tmp_path / "run", 4, kind(), batch_size=10, ckpt_path="last")
    assert first + rest == whole
    assert "drawn again" not in "".join(capsys.readouterr())


class _After(Callback):
    """Ends a fit in the middle of an epoch."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer.current_fit.leave()


@pytest.mark.long
def test_phases_of_a_strategy_have_the_rates_of_the_longer_run(tmp_path):
    def rates_of(name, epochs, **options):
        rates = Rates()
        settings = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "seed": 3}
        trainer = Trainer(**settings, max_epochs=epochs, callbacks=[rates], output_dir=tmp_path / name)
        module = ImageClassifier("timm/test_vit", pretrained=False, num_classes=2)
        images = [(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1]))]
        trainer.finetune(module, images, strategy="freeze_unfreeze:1", **options)
        return rates.rates

    whole = rates_of("whole", 4)
    first = rates_of("run", 2)
    rest = rates_of("run", 4, ckpt_path="last")
    assert len(first) == 2
    assert rest == pytest.approx(whole[2:])


def test_a_schedule_of_ones_own_that_has_come_to_0_is_told(tmp_path, capsys):
    class Own(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, 2)}

    fitted(tmp_path, 2, Own())
    assert fitted(tmp_path, 4, Own(), ckpt_path="last")[0] == 0
    said = "".join(capsys.readouterr())
    assert "the learning rate of CosineAnnealingLR is 0 here, so the next step trains nothing" in said


@pytest.mark.parametrize("stops", [False, True])
def test_a_fit_that_has_nothing_left_to_do_tells_why(stops, tmp_path, capsys):
    stopping = [EarlyStopping("val_loss", stopping_threshold=100.0)] if stops else []
    fitted(tmp_path, 2, callbacks=stopping)
    capsys.readouterr()
    assert fitted(tmp_path, 8 if stops else 2, callbacks=stopping, ckpt_path="last") == []
    said = "".join(capsys.readouterr())
    assert ("has reached 100" if stops else "nothing left to do: it has had its 2 epochs and 2 steps") in said
    assert said.count("nothing left to do") == 1


def test_the_command_tells_why_more_epochs_do_not_continue_a_run_that_was_stopped(tmp_path, capsys):
    colour_folders(tmp_path / "data", 5)
    run = ["--output-dir", str(tmp_path / "run")]
    stopping = "trainer.callbacks=[{early_stopping: {stopping_threshold: 100.0, monitor: val_loss}}]"
    model = ["--backbone", "timm/test_vit", "--no-pretrained", "--seed", "3"]
    assert command(["finetune", str(tmp_path / "data"), *model, *run, "--epochs", "3", "--set", stopping]) == 0
    capsys.readouterr()
    assert command(["finetune", "--resume", *run, "--epochs", "8"]) == 0
    said = "".join(capsys.readouterr())
    assert "ended after 1 epoch, and more epochs do not continue it: val_loss" in said
    assert f"flashtask finetune --from {tmp_path / 'run'}" in said
