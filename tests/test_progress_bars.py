"""Progress bars that people change, those of tqdm and rich, notebooks, and streams without a known end."""

from __future__ import annotations

import re
import sys
import time
import types

import pytest
import torch
from small import Net, loaders, net
from test_progress import Plain, Terminal

from flashtask import ProgressBar, RichProgressBar, RichProgressBarTheme, TQDMProgressBar, Trainer
from flashtask.core.errors import UsageError
from flashtask.trainer.callbacks.callback_registry import make_callbacks


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """Bars draw as often as they may, however fast the steps are."""
    monkeypatch.setattr("flashtask.trainer.callbacks.progress._REFRESH_SECONDS", 0.0)
    monkeypatch.setattr("flashtask.trainer.callbacks.progress._NOTEBOOK_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "160")


def fit(tmp_path, bar, module=None, train=None, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, logger=False, callbacks=[bar], output_dir=tmp_path / "run", **quiet, **options)
    given, val = loaders()
    trainer.fit(net() if module is None else module, given if train is None else train, val)
    return trainer


class Stream(torch.utils.data.IterableDataset):
    """Samples that come one by one; nobody knows how many."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(24):
            yield torch.randn(4, generator=generator), 1


KINDS = {"line": ProgressBar, "tqdm": TQDMProgressBar, "rich": RichProgressBar}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_bar_shows_can_be_changed(tmp_path, kind):
    class Mine(KINDS[kind]):
        def get_metrics(self, trainer, module):
            items = super().get_metrics(trainer, module)
            assert items.pop("loss") > 0
            return {"steps": trainer.global_step, "mood": "good", **items}

    class Shown(Net):
        def training_step(self, batch, batch_idx):
            self.log("asked", 2.0, prog_bar=True)
            return super().training_step(batch, batch_idx)

    terminal = Terminal()
    fit(tmp_path, Mine(stream=terminal), Shown())
    text = "\n".join(terminal.drawn)
    assert re.search(r"steps[ =]7", text)
    assert re.search(r"mood[ =]good", text)
    assert re.search(r"asked[ =]2", text)
    assert not re.search(r"[ ,]loss[ =]", text)
    assert terminal.drawn[-1].startswith("epoch 0/0  train_loss")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_without_a_known_end_has_a_bar_without_an_end(tmp_path, kind):
    terminal = Terminal()
    stream = torch.utils.data.DataLoader(Stream(), batch_size=4)
    fit(tmp_path, KINDS[kind](stream=terminal), train=stream)
    shown = [line for line in terminal.drawn if line.startswith("epoch 0") and "train_loss" not in line]
    sign = {"line": "6 batches  0:0", "tqdm": "6it [00:0", "rich": "6 batches 0:0"}[kind]
    assert sign in shown[-1]
    assert not any("left" in line or "/None" in line for line in shown)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bar_is_drawn_for_each_stage_and_is_gone_at_the_end(tmp_path, kind):
    terminal = Terminal()
    bar = KINDS[kind](stream=terminal)
    trainer = fit(tmp_path, bar)
    trainer.test(dataloaders=loaders()[1])
    trainer.validate(dataloaders=loaders()[1])
    for sign in ("epoch 0", "validating", "testing"):
        assert any(line.startswith(sign) for line in terminal.drawn), sign
    assert (bar._line, getattr(bar, "_bar", None), getattr(bar, "_progress", None)) == (None, None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bar_is_switched_off_and_on_and_prints(tmp_path, kind):
    class Half(KINDS[kind]):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                self.disable()
            if batch_idx == 5:
                self.enable()
                self.print("half", "way", sep="-")

    terminal = Terminal()
    bar = Half(stream=terminal, refresh_rate=1)
    fit(tmp_path, bar, num_sanity_val_steps=0)
    assert (bar.is_enabled, bar.is_disabled) == (True, False)
    shown = {int(found[1]) for line in terminal.drawn if (found := re.match(r"epoch 0.*\b(\d)/7", line))}
    assert {1, 2, 6, 7} <= shown
    assert not shown & {3, 4, 5}
    assert "half-way" in terminal.drawn
    assert KINDS[kind](refresh_rate=0).is_disabled
    with pytest.raises(UsageError, match=f"{KINDS[kind].__name__}.refresh_rate=-1"):
        KINDS[kind](refresh_rate=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gets_a_line_an_epoch_whatever_the_bar_is(tmp_path, kind):
    plain = Plain()
    fit(tmp_path, KINDS[kind](stream=plain))
    assert re.fullmatch(r"epoch 0/0  train_loss .*\n", plain.getvalue())


def test_the_bars_of_tqdm_can_be_changed_where_they_are_made(tmp_path):
    class Mine(TQDMProgressBar):
        seen = ()

        def init_validation_tqdm(self):
            bar = super().init_validation_tqdm()
            bar.set_description("running validation")
            return bar

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            self.seen = (*self.seen, (self.train_progress_bar.n, self.train_progress_bar.total))
            assert self.val_progress_bar is None

    terminal = Terminal()
    bar = Mine(stream=terminal, leave=True)
    fit(tmp_path, bar)
    assert bar.seen == tuple((n, 7) for n in range(1, 8))
    assert any(line.startswith("running validation: 100%") for line in terminal.drawn)
    assert not any("running validation" in line and "sanity" in line for line in terminal.drawn)


def test_the_columns_and_styles_of_rich_can_be_chosen(tmp_path):
    from rich.progress import TextColumn

    class Mine(RichProgressBar):
        def configure_columns(self, trainer):
            return [*super().configure_columns(trainer)[:2], TextColumn("of {task.fields[batches]}!", markup=False)]

    terminal = Terminal()
    theme = RichProgressBarTheme(progress_bar="green1", description="bold")
    fit(tmp_path, Mine(stream=terminal, theme=theme, console_kwargs={"color_system": "256"}))
    assert any(line.endswith("of 7/7!") for line in terminal.drawn)
    assert "\x1b[38;5;46m" in terminal.getvalue()  # green1


def test_bars_have_names():
    made = make_callbacks([("tqdm_progress_bar", {"refresh_rate": 5}), {"rich_progress_bar": {"leave": True}}])
    assert [type(one) for one in made] == [TQDMProgressBar, RichProgressBar]
    assert (made[0].refresh_rate, made[1].leave) == (5, True)


def in_a_notebook(monkeypatch, get_ipython=lambda: types.SimpleNamespace(kernel=object())):
    """What a process sees of a notebook: an IPython with a kernel, and a stream that is not a terminal."""
    stream = Plain()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=get_ipython))
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_notebook_has_a_bar_that_is_rewritten_by_carriage_returns_alone(tmp_path, monkeypatch):
    notebook = in_a_notebook(monkeypatch)
    fit(tmp_path, ProgressBar())
    text = notebook.getvalue()
    assert "\x1b" not in text
    shown = [part for part in text.split("\r") if re.match(r"epoch 0  \d/7", part)]
    assert len(shown) == 7
    assert re.search(r"\r +\repoch 0/0  train_loss .*\n$", text)
    # The output of a notebook is what is left when each carriage return has gone back to the line's beginning.
    lines = []
    for line in text.split("\n"):
        seen = ""
        for part in line.split("\r"):
            seen = part + seen[len(part) :]
        lines.append(seen.rstrip())
    assert [line[:10] for line in lines] == ["epoch 0/0 ", ""]


def test_a_notebook_is_drawn_to_at_most_twice_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr("flashtask.trainer.callbacks.progress._NOTEBOOK_SECONDS", 0.5)
    notebook = in_a_notebook(monkeypatch)
    begin = time.monotonic()
    fit(tmp_path, ProgressBar())
    assert 1 <= len(re.findall(r"\d samples/s", notebook.getvalue())) <= 2 * (time.monotonic() - begin) + 2


def test_a_file_that_a_notebook_writes_has_no_bar(tmp_path, monkeypatch):
    in_a_notebook(monkeypatch)
    plain = Plain()
    fit(tmp_path, ProgressBar(plain))
    assert plain.getvalue().count("\n") == 1
    assert "\r" not in plain.getvalue()


def test_ipython_in_a_terminal_is_not_a_notebook(tmp_path, monkeypatch):
    piped = in_a_notebook(monkeypatch, types.SimpleNamespace)
    fit(tmp_path, ProgressBar())
    assert piped.getvalue().startswith("epoch 0/0")
    assert "\r" not in piped.getvalue()
