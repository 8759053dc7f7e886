"""The live line and the lines of epochs: what they show, how wide they are, how often they change."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
import torch
from small import colour_folders, loaders, net

from flashtask import ImageClassificationData, ImageClassifier, Trainer
from flashtask.trainer.callbacks.progress import ProgressBar


class Terminal(io.StringIO):
    """A stream that says it is a terminal and keeps what was drawn."""

    def isatty(self) -> bool:
        return True

    @property
    def drawn(self) -> list[str]:
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())
        return [part.rstrip() for part in re.split(r"[\r\n]", text) if part.strip()]


class Plain(io.StringIO):
    """A file."""


def train(tmp_path, stream, module=None, samples=50, **options) -> Trainer:
    options = {"max_epochs": 2, "output_dir": tmp_path / "run", "enable_model_summary": False, **options}
    bar = ProgressBar(stream)
    trainer = Trainer(enable_progress_bar=False, callbacks=[bar], **options)
    trainer.fit(net() if module is None else module, *loaders(samples))
    return trainer


def slow(module, seconds: float = 0.11):
    """Every batch takes long enough to be drawn."""
    step = module.training_step

    def waiting(batch, batch_idx):
        time.sleep(seconds)
        return step(batch, batch_idx)

    module.training_step = waiting
    return module


def with_accuracy(module):
    step = module.validation_step

    def more(batch, batch_idx):
        step(batch, batch_idx)
        module.log("val_accuracy", torch.tensor(0.84))

    module.validation_step = more
    return module


@pytest.mark.parametrize("columns", [80, 120])
def test_the_live_line_shows_the_last_validation_beside_loss_speed_and_time_left(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    train(tmp_path, terminal, slow(with_accuracy(net())), samples=24)
    second = [line for line in terminal.drawn if line.startswith("epoch 1 ")]
    assert second
    assert all(re.search(r" loss \d.*val_loss \d.*val_accuracy 0\.840.*\d+( samples)?/s", line) for line in second)
    assert all("left" in line for line in second)
    first = [line for line in terminal.drawn if line.startswith("epoch 0 ")]
    assert first
    assert not any("val_" in line for line in first)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("columns", [20, 40, 80])
def test_the_live_line_is_never_wider_than_the_terminal(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    module = slow(with_accuracy(net()))
    step = module.training_step

    def chatty(batch, batch_idx):
        for name in ("one", "another", "a_third_with_a_long_name"):
            module.log(name, torch.tensor(1.0), prog_bar=True)
        return step(batch, batch_idx)

    module.training_step = chatty
    train(tmp_path, terminal, module, samples=24)
    live = [line for line in terminal.drawn if not re.match(r"epoch \d/1|  ", line)]
    assert live
    assert max(map(len, live)) < columns
    assert all(line.startswith(("epoch", "validating")) for line in live)


@pytest.mark.long
def test_the_live_line_is_drawn_at_most_ten_times_a_second(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    begin = time.monotonic()
    trainer = train(tmp_path, terminal, samples=1600, max_epochs=1)
    spent = time.monotonic() - begin
    assert trainer.global_step == 200
    live = [line for line in terminal.drawn if "left" in line]
    assert 1 <= len(live) <= 10 * spent + 1
    assert not any(line.endswith(" 0 samples/s") for line in live)


def test_what_is_printed_meanwhile_has_a_line_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    terminal, module = Terminal(), slow(net())
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    step = module.training_step

    def talking(batch, batch_idx):
        print("on standard output" if batch_idx else "a_long_message " * 10, file=None if batch_idx else sys.stderr)
        return step(batch, batch_idx)

    module.training_step = talking
    train(tmp_path, None, module, samples=24, max_epochs=1)
    assert ("a_long_message " * 10).rstrip() in terminal.drawn
    assert terminal.drawn.count("on standard output") == 2
    assert terminal.drawn[-1].startswith("epoch 0/0  train_loss")
    assert sys.stderr is sys.stdout is terminal


def test_a_file_gets_a_line_an_epoch_that_fits_80_columns(tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    plain = Plain()
    train(tmp_path, plain, with_accuracy(net()), max_epochs=10)
    lines = plain.getvalue().splitlines()
    assert plain.getvalue().replace("\n", "").isprintable()
    assert len(lines) == 10
    assert max(map(len, lines)) <= 80
    assert re.fullmatch(
        r"epoch 3/9  train_loss \d\.\d{4}  val_loss \d\.\d{4}  val_accuracy 0\.8400  \d+\.\d s", lines[3]
    )


def test_the_speed_is_shown_where_it_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    plain = Plain()
    train(tmp_path, plain, with_accuracy(net()), max_epochs=1)
    assert re.search(r"  \d+\.\d s  \d+ samples/s\n$", plain.getvalue())


def test_many_metrics_go_on_in_the_next_line_and_none_is_lost(tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    plain, module = Plain(), net()
    step = module.validation_step

    def more(batch, batch_idx):
        step(batch, batch_idx)
        for number in range(6):
            module.log(f"val_metric_{number}", torch.tensor(0.5))

    module.validation_step = more
    train(tmp_path, plain, module, max_epochs=1)
    lines = plain.getvalue().splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert all(line.startswith("  ") for line in lines[1:])
    assert all(f"val_metric_{number} 0.5000" in plain.getvalue() for number in range(6))


def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    train(tmp_path, terminal, max_epochs=1)
    assert not re.search(r"[\r\x1b]", terminal.getvalue())


def frozen_run(tmp_path, stream):
    """A frozen run whose backbone takes 0.11 s a batch, of 16 images."""
    folder = colour_folders(tmp_path / "images", each=60)
    model = ImageClassifier("timm/test_resnet", pretrained=False)
    model.backbone.register_forward_pre_hook(lambda module, inputs: time.sleep(0.11))
    options = {"num_sanity_val_steps": 0, "output_dir": tmp_path / "run", "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, enable_progress_bar=False, callbacks=[ProgressBar(stream)], **options)
    made = ImageClassificationData.from_folders(folder, val_split=0.2, num_workers=0)
    trainer.finetune(model, datamodule=made, strategy="freeze", restore_best=False)
    return trainer


@pytest.mark.long
def test_a_pass_that_computes_features_shows_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    frozen_run(tmp_path, terminal)
    shown = [line for line in terminal.drawn if line.startswith("features ")]
    assert re.match(r"features  1/6  \d:\d\d left  \d+ images/s$", shown[0])
    assert [line.split()[1] for line in shown] == ["1/6", "2/6", "3/6", "4/6", "5/6", "6/6", "1/2", "2/2"]
    assert terminal.drawn[-1].startswith("epoch 0/0")


@pytest.mark.long
def test_without_a_terminal_a_pass_shows_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    plain = Plain()
    frozen_run(tmp_path, plain)
    assert plain.getvalue().startswith("epoch 0/0")
    assert plain.getvalue().count("\n") == 1
