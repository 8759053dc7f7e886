"""Profilers: what they see of a run, what they say and write, and that a run without one is left alone."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch
from small import Net, digest, loaders, net

from flashtask import Callback, Trainer
from flashtask.core.errors import OutputError, UnknownNameError, UsageError
from flashtask.trainer.callbacks.callback import LambdaCallback
from flashtask.trainer.profiling.profilers import (
    PROFILERS,
    AdvancedProfiler,
    PassThrough,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
    resolve_profiler,
)
from flashtask.trainer.text_table import text_table


def quiet(tmp_path, profiler, *callbacks, **options):
    settings = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    settings |= {"output_dir": tmp_path / "run", "callbacks": list(callbacks), "profiler": profiler}
    return Trainer(**{**settings, **options})


class Slow(Callback):
    """Takes two hundredths of a second after each batch."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        time.sleep(0.02)


class Marking(Net):
    """Profiles a part of its own."""

    def training_step(self, batch, batch_idx):
        with self.trainer.profiler.profile("my part"):
            time.sleep(0.005)
        return super().training_step(batch, batch_idx)


# ---- simple


def test_profilers_simple_counts_and_measures_every_action(tmp_path):
    profiler = SimpleProfiler()
    quiet(tmp_path, profiler, Slow()).fit(net(), *loaders())
    calls = profiler.calls
    for action in ("training_step", "backward", "optimizer_step", "validation_step", "on_train_batch_end of Slow"):
        assert calls[action] == 7, action
    # 7 training and 7 validation batches
    assert calls["batch_to_device"] == 14
    assert calls["values_of_epoch"] == 1
    # one more each: to find that there is none left
    assert calls["train_batch"] == calls["validation_batch"] == 8
    assert calls["train_batch_loader_start"] == calls["validation_batch_loader_start"] == 1
    assert 0.14 <= profiler.seconds["on_train_batch_end of Slow"] <= profiler.total
    assert max(profiler.seconds, key=profiler.seconds.get) == "on_train_batch_end of Slow"


def test_profilers_simple_says_a_table_of_80_columns(tmp_path, capsys):
    class WithAnEndlesslyLongNameThatNoTerminalHasSpaceForInItsLines(Slow):
        """Slow."""

    quiet(tmp_path, "simple", WithAnEndlesslyLongNameThatNoTerminalHasSpaceForInItsLines()).fit(net(), *loaders())
    said = capsys.readouterr().err.splitlines()
    lines = said[said.index("profile of fit") + 1 :]
    assert lines[0].split() == ["action", "calls", "total", "s", "mean", "ms", "share"]
    assert re.fullmatch(r"whole run +1 +\d+\.\d{3} +\d+\.\d{3} +100\.0 ?%", lines[1])
    assert lines[2].startswith("on_train_batch_end of WithAn")
    assert "…" in lines[2]
    assert all(len(line) <= 80 for line in lines)
    assert len({len(line) for line in lines[: len(lines)]}) == 1


def test_profilers_a_part_of_a_module_is_an_action_too(tmp_path):
    profiler = SimpleProfiler()
    quiet(tmp_path, profiler).fit(Marking(), *loaders())
    assert profiler.calls["my part"] == 7
    assert 0.035 <= profiler.seconds["my part"] <= profiler.seconds["training_step"]


def test_profilers_a_report_goes_to_a_file_with_one_section_for_each_verb(tmp_path, capsys):
    trainer = quiet(tmp_path, SimpleProfiler(dirpath=tmp_path / "reports", filename="times.txt"))
    trainer.fit(net(), *loaders())
    trainer.test(dataloaders=loaders()[1])
    text = (tmp_path / "reports" / "times.txt").read_text()
    first, second = text.split("profile of test")
    assert first.startswith("profile of fit")
    assert "training_step" in first
    assert "test_step" in second
    assert "training_step" not in second
    assert "profile of" not in capsys.readouterr().err


def test_profilers_without_a_folder_the_report_is_in_the_run_folder(tmp_path):
    quiet(tmp_path, SimpleProfiler(filename="times.txt")).fit(net(), *loaders())
    assert "training_step" in (tmp_path / "run" / "times.txt").read_text()
    quiet(tmp_path, SimpleProfiler(dirpath=tmp_path / "b"), output_dir=tmp_path / "again").fit(net(), *loaders())
    assert "training_step" in (tmp_path / "b" / "profile.txt").read_text()


def test_profilers_a_folder_that_cannot_be_made_is_told_before_training(tmp_path):
    (tmp_path / "taken").write_text("")
    seen = []
    module = net()
    module.training_step = lambda *arguments: seen.append(1)
    with pytest.raises(OutputError, match="cannot make"):
        quiet(tmp_path, SimpleProfiler(dirpath=tmp_path / "taken" / "below")).fit(module, *loaders())
    assert not seen


def test_profilers_report_also_when_a_run_fails(tmp_path, capsys):
    class Failing(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        quiet(tmp_path, "simple").fit(Failing(), *loaders())
    assert re.search(r"^training_step +1 ", capsys.readouterr().err, re.MULTILINE)


def test_profilers_a_stage_in_a_hook_belongs_to_the_outer_one(tmp_path, capsys):
    class Testing(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.test(module, loaders()[1])

    profiler = SimpleProfiler()
    quiet(tmp_path, profiler, Testing()).fit(net(), *loaders())
    assert profiler.calls["test_step"] == profiler.calls["training_step"] == 7
    assert capsys.readouterr().err.count("profile of") == 1
    assert profiler.depth == 0


def test_profilers_each_stage_starts_from_nothing(tmp_path):
    profiler = SimpleProfiler()
    trainer = quiet(tmp_path, profiler)
    trainer.fit(net(), *loaders())
    trainer.validate(dataloaders=loaders()[1])
    assert "training_step" not in profiler.calls
    assert profiler.calls["validation_step"] == 7


def test_profilers_stopping_what_was_not_started_is_told():
    for profiler in (SimpleProfiler(), PyTorchProfiler()):
        with pytest.raises(UsageError, match="it was not started"):
            profiler.stop("my part")


def test_profilers_change_no_number_of_a_run(tmp_path):
    modules = {}
    for name in (None, "simple"):
        modules[name] = net()
        trainer = quiet(tmp_path / str(name), name, max_epochs=2, accumulate_grad_batches=2, precision="16-mixed")
        trainer.fit(modules[name], *loaders())
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    assert digest(modules[None]) == digest(modules["simple"])


def test_profilers_a_watched_run_resumes_in_the_middle_of_an_epoch(tmp_path):
    whole, rest = net(), net()
    quiet(tmp_path / "a", None, max_epochs=2).fit(whole, *loaders())
    quiet(tmp_path / "b", None, max_steps=3, max_epochs=None).fit(net(), *loaders())
    quiet(tmp_path / "c", "simple", max_epochs=2).fit(rest, *loaders(), ckpt_path=tmp_path / "b" / "run" / "last.ckpt")
    assert digest(rest) == digest(whole)


def test_profilers_a_hook_is_called_by_its_moment(tmp_path):
    class Ending(Net):
        def training_epoch_end(self, outputs):
            """Asks for the outputs."""

    profiler = SimpleProfiler()
    watch = LambdaCallback(on_train_start=lambda trainer, module: None)
    quiet(tmp_path, profiler, watch, enable_progress_bar=True).fit(Ending(), *loaders())
    hooks = ("training_epoch_end of Ending", "on_train_start of a function", "on_fit_end of ProgressBar")
    assert [profiler.calls[hook] for hook in hooks] == [1, 1, 1]


# ---- advanced


def test_profilers_advanced_names_functions(tmp_path, capsys):
    quiet(tmp_path, AdvancedProfiler(rows=5), Slow()).fit(net(), *loaders())
    said = capsys.readouterr().err.splitlines()
    lines = said[said.index("profile of fit") + 1 :]
    assert lines[0].split() == ["function", "calls", "own", "s", "total", "s"]
    assert "sleep" in lines[1]
    assert lines[1].split()[-3] == "7"
    assert len(lines) == 6
    assert all(len(line) <= 80 for line in lines)


# ---- pytorch


@pytest.mark.long
def test_profilers_pytorch_names_operations_and_writes_a_trace(tmp_path, capsys):
    quiet(tmp_path, PyTorchProfiler(rows=500)).fit(Marking(), *loaders())
    said = capsys.readouterr().err
    assert re.search(r"^aten::addmm +\d+ +\d+\.\d{3}$", said, re.MULTILINE)
    assert re.search(r"^my part +7 ", said, re.MULTILINE)
    assert f"trace of fit: {tmp_path / 'run' / 'profile.json'}" in said
    names = [event.get("name") for event in json.loads((tmp_path / "run" / "profile.json").read_text())["traceEvents"]]
    assert names.count("training_step") == 7
    assert "optimizer_step" in names
    assert "aten::addmm" in names


def test_profilers_pytorch_records_no_more_steps_than_it_is_told(tmp_path):
    trainer = quiet(tmp_path, PyTorchProfiler(dirpath=tmp_path / "traces", steps=3))
    trainer.fit(net(), *loaders())
    trainer.test(dataloaders=loaders()[1])
    for name, step in (("profile.json", "training_step"), ("profile-test.json", "test_step")):
        events = json.loads((tmp_path / "traces" / name).read_text())["traceEvents"]
        assert [event.get("name") for event in events].count(step) == 3


def test_profilers_pytorch_says_why_there_is_no_trace(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"output_dir": None, "logger": False, "enable_checkpointing": False}
    quiet(tmp_path, "pytorch", **options).fit(net(), *loaders())
    assert "PyTorchProfiler(dirpath=...)" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


# ---- names, and none


@pytest.mark.parametrize(
    ("name", "kind"), [("simple", SimpleProfiler), ("Advanced", AdvancedProfiler), ("pytorch", PyTorchProfiler)]
)
def test_profilers_have_names(name, kind):
    assert PROFILERS.names() == ["simple", "advanced", "pytorch"]
    assert type(resolve_profiler(name)) is kind


def test_profilers_a_wrong_one_is_told():
    with pytest.raises(UnknownNameError, match="did you mean 'simple'"):
        resolve_profiler("simpel")
    with pytest.raises(UsageError) as caught:
        resolve_profiler(SimpleProfiler)
    assert caught.value.fix == "profiler=SimpleProfiler()"
    with pytest.raises(UsageError, match="a name or a Profiler is needed"):
        resolve_profiler(True)


def test_profilers_without_one_nothing_of_a_run_is_replaced(tmp_path):
    module = Marking()
    trainer = quiet(tmp_path, None)
    trainer.fit(module, *loaders())
    assert type(trainer.profiler) is PassThrough
    run = trainer.fit_run
    assert run.training_step == module.training_step
    assert "to_device" not in vars(run)
    assert "step" not in vars(run.validation)
    assert isinstance(run.loader, torch.utils.data.DataLoader)
    assert type(run.precision).__module__ == "flashtask.trainer.devices.precision"


def test_profilers_one_of_ones_own_needs_only_start_and_stop(tmp_path):
    class Listing(Profiler):
        def __init__(self):
            self.actions = []

        def start(self, action):
            self.actions.append(action)

    profiler = Listing()
    quiet(tmp_path, profiler).fit(net(), loaders()[0])
    step = ["train_batch", "batch_to_device", "training_step", "backward"]
    start = profiler.actions.index("train_batch")
    assert profiler.actions[start : start + 4] == step


def test_a_table_cuts_its_first_column_alone():
    text = text_table(("name", "count"), [("a" * 30, "7"), ("b", "12345")], width=20)
    assert text.splitlines() == [
        "name           count",
        "aaaaaaaaaaaa…      7",
        "b              12345",
    ]
    assert text_table(("name", "n"), [("a", "7")]).splitlines() == ["name  n", "a     7"]
