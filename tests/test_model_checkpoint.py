"""Which checkpoint files a fit writes, how they are called, which of them stay, and which is best."""

from __future__ import annotations

import math
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from small import loaders

from flashtask import Callback, EarlyStopping, ModelCheckpoint, Module, Trainer, read_checkpoint
from flashtask.core.errors import OutputError, UnknownNameError, UsageError
from flashtask.trainer.checkpoints.kept_files import NameTemplate
from flashtask.trainer.checkpoints.model_checkpoint import Frequency


class Scripted(Module):
    """Logs the values it was given, one an epoch; each weight is the number of steps that were taken."""

    def __init__(self, values=(), name="val_loss"):
        super().__init__()
        self.values, self.name = values, name
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.log("train_loss", float(self.current_epoch))
        return -self.weight

    def validation_step(self, batch, batch_idx):
        self.log(self.name, self.values[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def quiet(folder, **options):
    settings = {"output_dir": folder, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{**settings, "num_sanity_val_steps": 0, "logger": False, **options})


def fit(folder, values, *checkpoints, ckpt_path=None, name="val_loss", batch_size=25, **options):
    """A fit with two steps an epoch, and an epoch for each value."""
    options = {"max_epochs": len(values), **options}
    trainer = quiet(folder, callbacks=list(checkpoints) or None, **options)
    trainer.fit(Scripted(values, name), *loaders(samples=50, batch_size=batch_size), ckpt_path=ckpt_path)
    return trainer


def files(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".ckpt"))


def epoch_in(path):
    return read_checkpoint(path)["epoch"]


# ---- what is written by default


def test_s65_last_and_best_are_written_by_themselves(tmp_path):
    trainer = fit(tmp_path, [3.0, 1.0, 2.0])
    assert files(tmp_path) == ["best.ckpt", "last.ckpt"]
    assert epoch_in(tmp_path / "best.ckpt") == 1
    assert epoch_in(tmp_path / "last.ckpt") == 2
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)


def test_s65_without_validation_the_newest_is_best(tmp_path):
    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(Scripted(), loaders()[0])
    assert epoch_in(tmp_path / "best.ckpt") == epoch_in(tmp_path / "last.ckpt") == 1
    assert trainer.checkpoint_callback.best_model_score is None


def test_the_newest_are_kept_where_nothing_ranks_them(tmp_path):
    quiet(tmp_path, max_epochs=4, callbacks=ModelCheckpoint(save_top_k=2)).fit(Scripted(), loaders(batch_size=50)[0])
    assert files(tmp_path) == ["epoch=2-step=3.ckpt", "epoch=3-step=4.ckpt", "last.ckpt"]


def test_s72_nothing_is_written_with_checkpointing_switched_off(tmp_path):
    trainer = fit(tmp_path, [1.0], enable_checkpointing=False, logger=True)
    assert files(tmp_path) == []
    assert (tmp_path / "metrics.csv").exists()
    assert trainer.checkpoint_callback is None
    with pytest.raises(UsageError, match="contradicts a ModelCheckpoint"):
        fit(tmp_path / "b", [1.0], ModelCheckpoint(), enable_checkpointing=False)


# ---- names


def test_s68_files_are_called_by_the_template(tmp_path):
    checkpoint = ModelCheckpoint(
        monitor="val_loss",
        dirpath="my/path",
        filename="sample-mnist-{epoch:02d}-{val_loss:.2f}",
        every_n_epochs=2,
        mode="min",
    )
    trainer = Trainer(
        default_root_dir=tmp_path, callbacks=[checkpoint], max_epochs=4, logger=False, enable_progress_bar=False
    )
    trainer.fit(Scripted([0.1, 0.324, 0.1, 0.5]), *loaders())
    best = tmp_path / "my" / "path" / "sample-mnist-epoch=01-val_loss=0.32.ckpt"
    assert checkpoint.best_model_path == str(best)
    assert files(best.parent) == ["last.ckpt", best.name]
    assert epoch_in(best) == 1


@pytest.mark.parametrize(
    ("template", "insert_names", "expected"),
    [
        ("{epoch:02d}-{val_loss:.2f}", True, "epoch=03-val_loss=0.25"),
        ("{epoch:02d}-{val_loss:.2f}", False, "03-0.25"),
        ("{step}", True, "step=40"),
        ("{epoch:.1f}", True, "epoch=3.0"),
        ("plain", True, "plain"),
        ("given.ckpt", True, "given"),
        ("{{x}}-{cost/entropy:.1f}", True, "{x}-cost_entropy=1.5"),
        ("{../../etc/passwd}", True, ".._.._etc_passwd=1.0"),
        ("{val_loss:/>6}", True, "val_loss=__0.25"),
    ],
)
def test_s68_templates_are_filled_in_and_never_become_paths(template, insert_names, expected):
    values = {"epoch": 3, "step": 40, "val_loss": 0.25, "cost/entropy": 1.5, "../../etc/passwd": 1.0}
    assert NameTemplate(template, insert_names).fill(values) == expected


@pytest.mark.parametrize(
    "template",
    [
        *("", "..", ".hidden", "a/b", "a\\b", "a\0b", "{epoch", "epoch}", "{}", "{epoch!r}", "{epoch:{width}}"),
        *("{epoch:x!}", "{val_loss:d}", "{epoch:0500d}", "x" * 300, "last", "last-v2", "last.ckpt", 3),
    ],
)
def test_s68_a_template_that_names_no_file_is_an_error_at_once(template):
    with pytest.raises(UsageError, match="filename="):
        ModelCheckpoint(filename=template)


def test_s68_a_name_in_the_template_that_nothing_logs_is_an_error_that_loses_nothing(tmp_path):
    checkpoint = ModelCheckpoint(filename="{epoch}-{val_los:.2f}")
    with pytest.raises(UnknownNameError, match="did you mean 'val_loss'"):
        fit(tmp_path, [1.0, 2.0], checkpoint)
    assert files(tmp_path) == ["last.ckpt"]
    assert checkpoint.best_k_models == {}
    again = ModelCheckpoint(filename="{epoch}-{val_loss:.2f}")
    fit(tmp_path, [1.0, 2.0], again, ckpt_path=tmp_path / "last.ckpt")
    assert files(tmp_path) == ["epoch=1-val_loss=2.00.ckpt", "last.ckpt"]


def test_s68_what_validation_will_measure_is_nan_in_a_name_before_it_has_run(tmp_path):
    checkpoint = ModelCheckpoint(
        monitor="train_loss", filename="{epoch}-{step}-{val_loss:.1f}", save_top_k=-1, every_n_steps=1, every_n_epochs=1
    )
    fit(tmp_path, [7.0], checkpoint)
    assert files(tmp_path) == ["epoch=0-step=1-val_loss=nan.ckpt", "epoch=0-step=2-val_loss=7.0.ckpt", "last.ckpt"]


def test_s68_names_that_are_taken_get_a_version(tmp_path):
    checkpoint = ModelCheckpoint(filename="{val_loss:.0f}", auto_insert_metric_name=False, save_top_k=-1)
    fit(tmp_path, [1.1, 1.2, 1.3], checkpoint)
    assert files(tmp_path) == ["1-v1.ckpt", "1-v2.ckpt", "1.ckpt", "last.ckpt"]
    assert [epoch_in(path) for path in checkpoint.best_k_models] == [0, 1, 2]


def test_files_of_another_run_in_the_same_folder_are_not_touched(tmp_path, capsys):
    for run, values in (("a", [1.0]), ("b", [2.0])):
        checkpoint = ModelCheckpoint(dirpath=tmp_path / "shared")
        fit(tmp_path / run, values, checkpoint)
    assert files(tmp_path / "shared") == ["best-v1.ckpt", "best.ckpt", "last-v1.ckpt", "last.ckpt"]
    assert read_checkpoint(tmp_path / "shared" / "best.ckpt")["metrics"]["val_loss"] == 1.0
    assert checkpoint.last_model_path == str(tmp_path / "shared" / "last-v1.ckpt")
    assert "the newest of this one is last-v1.ckpt" in capsys.readouterr().err
    fit(tmp_path / "c", [2.0, 1.5], ModelCheckpoint(dirpath=tmp_path / "shared"), ckpt_path=checkpoint.last_model_path)
    assert files(tmp_path / "shared") == ["best-v1.ckpt", "best.ckpt", "last-v1.ckpt", "last.ckpt"]
    assert epoch_in(checkpoint.last_model_path) == epoch_in(tmp_path / "shared" / "best-v1.ckpt") == 1


def test_s69_dirpath_is_relative_to_the_root_folder(tmp_path):
    checkpoint = ModelCheckpoint(dirpath="some/where")
    trainer = quiet(None, default_root_dir=tmp_path, callbacks=checkpoint, max_epochs=1)
    trainer.fit(Scripted([1.0]), *loaders())
    assert files(tmp_path / "some" / "where") == ["best.ckpt", "last.ckpt"]
    assert files(trainer.output_dir) == []
    assert Path(checkpoint.best_model_path).is_absolute()


def test_a_folder_that_cannot_be_made_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the folder"):
        fit(tmp_path / "run", [1.0], ModelCheckpoint(dirpath=tmp_path / "file" / "below"))


# ---- which are kept


def test_s68_the_best_k_are_kept_and_the_worst_goes(tmp_path):
    checkpoint = ModelCheckpoint(save_top_k=2, filename="{epoch}")
    fit(tmp_path, [3.0, 1.0, 2.0, 4.0, 0.5], checkpoint)
    assert files(tmp_path) == ["epoch=1.ckpt", "epoch=4.ckpt", "last.ckpt"]
    best, second = str(tmp_path / "epoch=4.ckpt"), str(tmp_path / "epoch=1.ckpt")
    assert list(checkpoint.best_k_models.items()) == [(best, 0.5), (second, 1.0)]
    assert (checkpoint.best_model_path, checkpoint.kth_best_model_path) == (best, second)
    assert (checkpoint.best_model_score, checkpoint.current_score) == (0.5, 0.5)


def test_s68_all_or_none_may_be_kept(tmp_path):
    every = ModelCheckpoint(save_top_k=-1)
    fit(tmp_path / "all", [1.0, 2.0, math.nan], every)
    assert files(tmp_path / "all") == [
        *("epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt", "epoch=2-step=6.ckpt", "last.ckpt")
    ]
    assert every.best_model_path.endswith("epoch=0-step=2.ckpt")
    assert every.kth_best_model_path == ""
    none = ModelCheckpoint(save_top_k=0)
    fit(tmp_path / "none", [1.0, 2.0], none)
    assert files(tmp_path / "none") == ["last.ckpt"]
    assert none.best_model_path == ""


def test_s68_mode_says_whether_more_is_better(tmp_path):
    checkpoint = ModelCheckpoint(monitor="val_accuracy", mode="max")
    fit(tmp_path, [0.1, 0.9, 0.5], checkpoint, name="val_accuracy")
    assert checkpoint.best_epoch == 1


def test_less_is_better_for_a_metric_that_is_not_the_modules_own(tmp_path):
    class Accurate(Scripted):
        monitor, monitor_mode = "val_accuracy", "max"

    for metric, expected in ((None, 1), ("val_accuracy", 1), ("val_loss", 0)):
        checkpoint = ModelCheckpoint(monitor=metric)
        trainer = quiet(tmp_path / str(metric), callbacks=checkpoint, max_epochs=2)
        trainer.fit(Accurate([0.1, 0.2], metric or "val_accuracy"), *loaders())
        assert checkpoint.best_epoch == expected


def test_s68_a_metric_with_a_slash_can_be_monitored(tmp_path):
    checkpoint = ModelCheckpoint(monitor="cost/entropy", filename="{epoch}-{cost/entropy:.1f}")
    fit(tmp_path, [2.0, 1.0], checkpoint, name="cost/entropy")
    assert files(tmp_path) == ["epoch=1-cost_entropy=1.0.ckpt", "last.ckpt"]


def test_a_monitored_metric_that_nothing_logs_is_an_error_with_the_nearest(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'val_loss'"):
        fit(tmp_path, [1.0], ModelCheckpoint(monitor="val_los", mode="min"))
    assert files(tmp_path) == ["last.ckpt"]


def test_of_equal_scores_the_lower_loss_is_best_and_then_the_older(tmp_path):
    class Tied(Scripted):
        monitor, monitor_mode = "accuracy", "max"

        def validation_step(self, batch, batch_idx):
            self.log_dict({"accuracy": 1.0, "val_loss": self.values[self.current_epoch]})

    trainer = quiet(tmp_path, max_epochs=4)
    trainer.fit(Tied([3.0, 1.0, 1.0, 2.0]), *loaders())
    assert trainer.checkpoint_callback.best_epoch == 1


def test_epochs_in_which_the_metric_is_not_measured_are_not_ranked(tmp_path):
    checkpoint = ModelCheckpoint(save_top_k=4, filename="{epoch}")
    fit(tmp_path, [1.0, 2.0, 3.0, 4.0], checkpoint, check_val_every_n_epoch=2)
    assert files(tmp_path) == ["epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_best_and_said_once(tmp_path, capsys, bad):
    checkpoint = ModelCheckpoint()
    fit(tmp_path, [bad, 2.0, bad, bad], checkpoint)
    assert checkpoint.best_epoch == 1
    assert capsys.readouterr().err.count("is never the best") == 1
    fit(tmp_path / "only", [bad], checkpoint)
    assert files(tmp_path / "only") == ["last.ckpt"]
    every = ModelCheckpoint(save_top_k=-1, filename="{epoch}", mode="max")
    fit(tmp_path / "all", [bad, 2.0], every)
    assert [Path(path).name for path in every.best_k_models] == ["epoch=1.ckpt", "epoch=0.ckpt"]


def test_s70_the_callback_knows_the_best_and_the_last_file(tmp_path):
    checkpoint = ModelCheckpoint(monitor="val_loss")
    assert (checkpoint.best_model_path, checkpoint.last_model_path) == ("", "")
    fit(tmp_path, [3.0, 1.0, 2.0], checkpoint)
    assert checkpoint.best_model_path == str(tmp_path / "best.ckpt")
    assert checkpoint.last_model_path == str(tmp_path / "last.ckpt")
    assert (checkpoint.best_model_score, checkpoint.best_epoch, checkpoint.current_score) == (1.0, 1, 2.0)
    assert checkpoint.best_metrics["val_loss"] == 1.0


def test_s71_epochs_that_are_not_looked_at_cannot_be_best(tmp_path):
    checkpoint = ModelCheckpoint(every_n_epochs=2, save_top_k=-1, filename="{epoch}")
    fit(tmp_path, [0.1, 2.0, 0.2, 3.0, 0.3], checkpoint)
    assert files(tmp_path) == ["epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt"]
    assert checkpoint.best_epoch == 1


def test_last_is_where_the_fit_ended_even_in_an_epoch_that_is_not_looked_at(tmp_path):
    fit(tmp_path / "a", [1.0] * 5, ModelCheckpoint(every_n_epochs=2))
    assert epoch_in(tmp_path / "a" / "last.ckpt") == 4
    stopping = EarlyStopping(patience=1, min_delta=0.1)
    fit(tmp_path / "b", [1.0] * 9, ModelCheckpoint(every_n_epochs=7), stopping)
    assert epoch_in(tmp_path / "b" / "last.ckpt") == 1
    fit(tmp_path / "c", [1.0] * 9, ModelCheckpoint(every_n_epochs=7), max_steps=5)
    assert read_checkpoint(tmp_path / "c" / "last.ckpt")["global_step"] == 5


def test_save_on_train_epoch_end_false_looks_only_at_validated_epochs(tmp_path):
    checkpoint = ModelCheckpoint(monitor="train_loss", save_on_train_epoch_end=False, save_top_k=-1, filename="{epoch}")
    fit(tmp_path, [1.0] * 4, checkpoint, check_val_every_n_epoch=2)
    assert files(tmp_path) == ["epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt"]


# ---- by steps and by time


def test_s68_checkpoints_are_written_every_n_steps_and_know_their_place(tmp_path):
    checkpoint = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, [1.0, 1.0, 1.0], checkpoint)
    assert files(tmp_path) == ["epoch=1-step=3.ckpt", "epoch=2-step=6.ckpt", "last.ckpt"]
    content = read_checkpoint(tmp_path / "epoch=1-step=3.ckpt")
    assert content["state_dict"]["weight"] == 3
    assert (content["progress"]["batch_idx"], content["progress"]["samples"]) == (1, 25)


def test_s68_a_step_ranks_by_the_values_that_are_known_then(tmp_path):
    checkpoint = ModelCheckpoint(
        monitor="val_loss", every_n_train_steps=1, filename="{step}-{val_loss:.0f}", save_top_k=2
    )
    fit(tmp_path, [3.0, 1.0, 2.0], checkpoint)
    # The first epoch has no value before its end; the second has that of the first, the third that of the second.
    assert list(map(os.path.basename, checkpoint.best_k_models)) == ["step=5-val_loss=1.ckpt", "step=6-val_loss=1.ckpt"]


def test_s68_accumulated_batches_are_never_cut_apart(tmp_path):
    checkpoint = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)
    fit(tmp_path, [1.0, 1.0], checkpoint, batch_size=5, accumulate_grad_batches=3)
    places = [read_checkpoint(path)["progress"]["batch_idx"] for path in sorted(checkpoint.best_k_models)]
    assert places == [6, 10, 6, 10]


def test_s68_checkpoints_are_written_after_a_time(tmp_path):
    rare = ModelCheckpoint(train_time_interval="01:00:00:00", save_top_k=-1, filename="rare-{step}")
    often = ModelCheckpoint(train_time_interval={"seconds": 1e-6}, save_top_k=-1)
    fit(tmp_path, [1.0, 1.0], rare, often)
    assert len(often.best_k_models) == 4
    assert rare.best_k_models == {}


def test_the_clock_starts_again_at_each_look():
    frequency = Frequency(None, {"hours": 1}, None, False)
    frequency.start()
    assert not frequency.is_due_after_step(None)
    frequency._last_due_at -= 3601
    assert frequency.is_due_after_step(None)
    assert not frequency.is_due_after_step(None)


def test_steps_and_epochs_together_keep_one_file_of_a_step(tmp_path):
    checkpoint = ModelCheckpoint(every_n_train_steps=1, every_n_epochs=1, save_top_k=-1)
    fit(tmp_path, [3.0, 1.0], checkpoint)
    assert files(tmp_path) == [*(f"epoch={n // 2}-step={n + 1}.ckpt" for n in range(4)), "last.ckpt"]
    assert checkpoint.best_k_models[str(tmp_path / "epoch=1-step=4.ckpt")] == 1.0


# ---- what is in them


def test_s67_the_best_may_hold_weights_only_and_the_last_can_still_be_resumed(tmp_path):
    checkpoint = ModelCheckpoint(save_weights_only=True)
    trainer = fit(tmp_path, [1.0], checkpoint)
    best = read_checkpoint(checkpoint.best_model_path)
    assert "optimizer_states" not in best
    assert best["state_dict"]["weight"] == 2
    assert Scripted.load_from_checkpoint(checkpoint.best_model_path).weight == 2
    with pytest.raises(UsageError, match="weights only"):
        trainer.fit(Scripted([1.0, 1.0]), *loaders(), ckpt_path="best")
    fit(tmp_path, [1.0, 1.0], ModelCheckpoint(), ckpt_path=tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["state_dict"]["weight"] == 4


def test_save_last_false_writes_it_only_when_a_signal_stops_the_run(tmp_path):
    checkpoint = ModelCheckpoint(save_last=False)
    fit(tmp_path / "a", [1.0, 1.0], checkpoint)
    assert files(tmp_path / "a") == ["best.ckpt"]

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        fit(tmp_path / "b", [1.0, 1.0], checkpoint, Stop())
    assert read_checkpoint(tmp_path / "b" / "last.ckpt")["global_step"] == 3


def test_a_linked_last_is_a_name_of_the_newest_file_and_safe_from_what_comes_later(tmp_path):
    checkpoint = ModelCheckpoint(save_last="link", filename="{epoch}")
    fit(tmp_path, [3.0, 1.0], checkpoint)
    assert os.path.samefile(tmp_path / "epoch=1.ckpt", tmp_path / "last.ckpt")
    fit(
        tmp_path,
        [3.0, 1.0, 2.0],
        ModelCheckpoint(save_last="link", filename="{epoch}"),
        ckpt_path=tmp_path / "last.ckpt",
    )
    assert [epoch_in(tmp_path / name) for name in ("epoch=1.ckpt", "last.ckpt")] == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["epoch=1.ckpt", "last.ckpt", "summary.json"]


def test_what_cannot_be_linked_is_written_whole_and_said_once(tmp_path, capsys):
    (tmp_path / ".last.ckpt.link").mkdir()
    fit(tmp_path, [3.0, 2.0], ModelCheckpoint(save_last="link"))
    assert not os.path.samefile(tmp_path / "best.ckpt", tmp_path / "last.ckpt")
    assert epoch_in(tmp_path / "last.ckpt") == 1
    assert capsys.readouterr().err.count("cannot be a link") == 1


def test_a_file_that_cannot_be_removed_is_said_and_training_goes_on(tmp_path, capsys):
    class InTheWay(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                (tmp_path / "epoch=0.ckpt").unlink()
                (tmp_path / "epoch=0.ckpt").mkdir()

    fit(tmp_path, [3.0, 2.0, 1.0], ModelCheckpoint(filename="{epoch}"), InTheWay())
    assert f"cannot remove {tmp_path / 'epoch=0.ckpt'}" in capsys.readouterr().err
    assert files(tmp_path) == ["epoch=0.ckpt", "epoch=2.ckpt", "last.ckpt"]


def test_verbose_says_what_was_written(tmp_path, capsys):
    fit(tmp_path, [1.0, 2.0], ModelCheckpoint(verbose=True))
    said = capsys.readouterr().err
    assert f"epoch 0, step 2: wrote {tmp_path / 'best.ckpt'}, val_loss 1\n" in said
    assert "epoch 1, step 4: not among the best 1\n" in said


# ---- several at once


def test_s68_several_callbacks_write_their_own_files_and_know_of_each_other(tmp_path):
    loss = ModelCheckpoint(monitor="val_loss", filename="loss-{epoch}")
    step = ModelCheckpoint(monitor="train_loss", mode="max", filename="train-{epoch}", dirpath=tmp_path / "more")
    trainer = fit(tmp_path / "run", [1.0, 2.0], loss, step)
    assert trainer.checkpoint_callback is loss
    assert files(tmp_path / "run") == ["last.ckpt", "loss-epoch=0.ckpt"]
    assert files(tmp_path / "more") == ["last.ckpt", "train-epoch=1.ckpt"]
    # The file that the first callback writes holds the newest news of the second.
    stored = read_checkpoint(tmp_path / "run" / "last.ckpt")["callbacks"]
    assert stored[step.state_key]["files"][0]["name"] == "train-epoch=1.ckpt"
    assert loss.state_key != step.state_key


def test_all_files_of_a_moment_are_written_from_one_look_at_the_run(tmp_path):
    class Counting(Callback):
        count = 0

        def on_save_checkpoint(self, trainer, module, checkpoint):
            self.count += 1

    counting = Counting()
    fit(
        tmp_path,
        [1.0, 2.0],
        counting,
        *(ModelCheckpoint(filename=name, save_top_k=-1) for name in ("{epoch}", "{step}")),
    )
    assert counting.count == 2
    assert len(files(tmp_path)) == 5


def test_callbacks_whose_names_are_the_same_do_not_write_over_each_other(tmp_path):
    fit(tmp_path, [1.0], *(ModelCheckpoint(filename=name) for name in ("{epoch}", "{epoch:d}")))
    assert files(tmp_path) == ["epoch=0-v1.ckpt", "epoch=0.ckpt", "last.ckpt"]


def test_an_error_of_one_callback_leaves_the_others_as_they_were(tmp_path):
    good, bad = ModelCheckpoint(), ModelCheckpoint(filename="{nothing}")
    with pytest.raises(UnknownNameError, match="nothing"):
        fit(tmp_path, [1.0], good, bad)
    assert (good.best_k_models, files(tmp_path)) == ({}, ["last.ckpt"])


def test_callbacks_with_the_same_arguments_but_for_the_folder_have_states_of_their_own(tmp_path):
    checkpoints = [ModelCheckpoint(dirpath=tmp_path / name) for name in "ab"]
    fit(tmp_path / "run", [1.0, 2.0], *checkpoints)
    again = [ModelCheckpoint(dirpath=tmp_path / name) for name in "ab"]
    fit(tmp_path / "more", [1.0, 2.0, 3.0], *again, ckpt_path=tmp_path / "a" / "last.ckpt")
    assert [one.best_model_path for one in again] == [str(tmp_path / name / "best.ckpt") for name in "ab"]
    assert files(tmp_path / "b") == ["best.ckpt", "last.ckpt"]


def test_two_callbacks_that_would_write_the_same_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"two ModelCheckpoints write best\.ckpt"):
        fit(tmp_path / "a", [1.0], ModelCheckpoint(), ModelCheckpoint(monitor="train_loss", filename="best"))
    both = ModelCheckpoint()
    with pytest.raises(UsageError, match="twice"):
        fit(tmp_path / "b", [1.0], both, both)


# ---- arguments


def test_a_callback_can_be_given_to_another_process():
    checkpoint = pickle.loads(pickle.dumps(ModelCheckpoint(filename="{epoch}", train_time_interval={"hours": 1})))  # noqa: S301
    assert checkpoint.template.text == "{epoch}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "lowest"}, 'None, "min" or "max"'),
        ({"save_top_k": -2}, "-1 for all"),
        ({"save_top_k": True}, "-1 for all"),
        ({"save_last": "copy"}, "link"),
        ({"every_n_epochs": -1}, "at least 0"),
        ({"every_n_train_steps": 1.5}, "at least 0"),
        ({"every_n_steps": 5, "every_n_train_steps": 5}, "one argument"),
        ({"train_time_interval": "tomorrow"}, "not a length of time"),
        ({"dirpath": 3}, "None or a path"),
        ({"monitor": 3}, "name of a metric"),
        ({"save_weights_only": "yes"}, "True or False"),
        ({"save_weights_only": True, "save_last": "link"}, "contradicts"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        ModelCheckpoint(**wrong)
