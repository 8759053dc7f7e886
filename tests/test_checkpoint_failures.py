"""What becomes of checkpoint files when a run fails, is killed, or is continued."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import warm
from small import Net, loaders, net
from test_model_checkpoint import Scripted, epoch_in, files, fit, quiet
from test_resume import state_digest

from flashtask import Callback, ModelCheckpoint, read_checkpoint
from flashtask.core.errors import DivergedError, UnknownNameError

# ---- errors while it runs


class FailAt(Callback):
    """Raises an error in a hook of the run."""

    def __init__(self, hook, count, error):
        self.count, self.error = count, error
        setattr(self, f"on_{hook}", self._hook)

    def _hook(self, *arguments):
        self.count -= 1
        if self.count == 0:
            raise self.error


@pytest.mark.parametrize(
    ("hook", "count", "error", "step"),
    [
        ("validation_batch_end", 4, RuntimeError("broken"), 4),
        ("train_epoch_start", 2, RuntimeError("broken"), None),
        ("before_backward", 4, RuntimeError("broken"), None),
        ("train_epoch_end", 2, RuntimeError("broken"), None),
        ("validation_batch_end", 4, DivergedError("the loss became nan"), None),
    ],
)
def test_an_error_between_two_steps_keeps_the_place_if_that_is_wanted(tmp_path, hook, count, error, step):
    for wanted in (False, True):
        checkpoint = ModelCheckpoint(every_n_train_steps=99, save_on_exception=wanted)
        with pytest.raises(type(error)):
            fit(tmp_path / str(wanted), [1.0] * 3, checkpoint, FailAt(hook, count, error))
    assert not (tmp_path / "False" / "last.ckpt").exists()
    assert (tmp_path / "True" / "last.ckpt").exists() == (step is not None)
    if step is not None:
        fit(tmp_path / "True", [1.0] * 3, ckpt_path=tmp_path / "True" / "last.ckpt")
        assert read_checkpoint(tmp_path / "True" / "last.ckpt")["state_dict"]["weight"] == 6


def test_a_sample_that_cannot_be_read_costs_no_step_if_that_is_wanted(tmp_path):
    train, val = loaders()

    class Broken(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return 50

        def __getitem__(self, index):
            Broken.reads += 1
            if Broken.reads == 70:
                raise RuntimeError("broken image")
            return train.dataset[index]

    broken = torch.utils.data.DataLoader(Broken(), batch_size=8, shuffle=True)
    quiet(tmp_path / "whole", max_epochs=3).fit(net(), train, val)
    with pytest.raises(RuntimeError, match="broken image"):
        quiet(tmp_path, max_epochs=3, callbacks=ModelCheckpoint(save_on_exception=True)).fit(net(), broken, val)
    assert read_checkpoint(tmp_path / "last.ckpt")["progress"]["samples"] == 16
    again = quiet(tmp_path, max_epochs=3, callbacks=ModelCheckpoint(save_on_exception=True))
    again.fit(net(seed=9), broken, val, ckpt_path=tmp_path / "last.ckpt")
    assert state_digest(tmp_path / "last.ckpt") == state_digest(tmp_path / "whole" / "last.ckpt")


def test_what_a_failed_validation_drew_is_not_part_of_the_run_that_is_continued(tmp_path):
    class Drawing(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.rand(()))

    def train(folder, *callbacks, ckpt_path=None):
        torch.manual_seed(1)
        trainer = quiet(folder, max_epochs=3, callbacks=[ModelCheckpoint(save_on_exception=True), *callbacks])
        trainer.fit(Drawing(), *loaders(), ckpt_path=ckpt_path)

    train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, FailAt("validation_batch_end", 10, RuntimeError("broken")))
    train(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert state_digest(tmp_path / "last.ckpt") == state_digest(tmp_path / "whole" / "last.ckpt")


def test_an_error_while_an_epoch_is_closed_leaves_the_last_file_as_it_was(tmp_path):
    class Plateau(Scripted):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_los"}

    trainer = quiet(tmp_path, max_epochs=1, callbacks=ModelCheckpoint(save_on_exception=True))
    with pytest.raises(UnknownNameError, match="val_los"):
        trainer.fit(Plateau([1.0]), *loaders())
    assert not (tmp_path / "last.ckpt").exists()


def test_an_error_in_the_middle_of_a_step_leaves_the_last_file_as_it_was_and_says_so(tmp_path, capsys):
    checkpoint = ModelCheckpoint(every_n_train_steps=1, save_on_exception=True)
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, [1.0] * 3, checkpoint, FailAt("before_backward", 4, RuntimeError("broken")))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3
    assert "last.ckpt stays as it was: the error came in the middle of a step or" in capsys.readouterr().err


FULL_DISK = """
import resource, signal
from pathlib import Path
from flashtask import Callback, ModelCheckpoint
from flashtask.core.errors import StorageError
from test_model_checkpoint import fit

class FullDisk(Callback):
    def on_epoch_end(self, trainer, module):
        if trainer.current_epoch == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

checkpoint = ModelCheckpoint(save_top_k={k}, filename={filename!r})
try:
    fit(Path({folder!r}), [3.0, 2.0, 1.0], checkpoint, FullDisk())
except StorageError as error:
    print(error.what)
    print(*(Path(path).name for path in checkpoint.best_k_models))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("k", "filename", "kept"), [(2, "{epoch}", ["epoch=1.ckpt", "epoch=0.ckpt"]), (1, "best", ["best.ckpt"])]
)
def test_a_full_disk_leaves_the_files_that_were_there_and_counts_no_other(tmp_path, k, filename, kept):
    script = FULL_DISK.format(folder=str(tmp_path / "run"), k=k, filename=filename)
    done = warm.run(script)
    assert done.returncode == 0, done.stderr
    what, counted = done.stdout.splitlines()
    assert "File too large" in what
    assert counted.split() == kept
    assert sorted(os.listdir(tmp_path / "run")) == sorted([*kept, "last.ckpt"])
    assert epoch_in(tmp_path / "run" / kept[0]) == epoch_in(tmp_path / "run" / "last.ckpt") == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from flashtask import ModelCheckpoint
from test_model_checkpoint import fit

def run(folder, last=None):
    checkpoint = ModelCheckpoint(save_top_k=2, filename="{{epoch}}", {options})
    fit(folder, [4.0, 3.0, 5.0, 2.0, 1.0], checkpoint, ckpt_path=last)

def in_a_child(work):
    if (child := os.fork()) == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def killed(folder, at):
    count = 0
    def watch(event, arguments):
        nonlocal count
        if event in ("os.rename", "os.remove", "os.link") and ".ckpt" in str(arguments[0]):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    run(folder)

number = 0
run(Path({folder!r}, "0"))  # what is imported on first use is imported once, not in every child
while True:
    number += 1
    folder = Path({folder!r}, str(number))
    code = in_a_child(lambda: killed(folder, number))
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    last = folder / "last.ckpt"
    if last.exists():
        assert in_a_child(lambda: run(folder, last)) == 0
        print(*sorted(os.listdir(folder)))
"""


@pytest.mark.long
@pytest.mark.parametrize("options", ["", pytest.param('save_last="link"', marks=pytest.mark.long)])
def test_a_kill_between_any_two_files_leaves_none_too_few_and_none_too_many(tmp_path, options):
    script = KILLED.format(folder=str(tmp_path), options=options)
    done = warm.run(script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 8
    assert set(lines) == {"epoch=3.ckpt epoch=4.ckpt last.ckpt summary.json"}


# ---- resuming


def test_the_best_so_far_survive_a_resume(tmp_path):
    first = ModelCheckpoint(save_top_k=2, filename="{epoch}")
    fit(tmp_path, [1.0, 3.0], first)
    again = ModelCheckpoint(save_top_k=2, filename="{epoch}")
    fit(tmp_path, [1.0, 3.0, 2.0, 4.0], again, ckpt_path=tmp_path / "last.ckpt")
    assert files(tmp_path) == ["epoch=0.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert list(again.best_k_models.values()) == [1.0, 2.0]


def test_a_finished_run_that_is_resumed_knows_its_last_file(tmp_path):
    fit(tmp_path, [1.0], ModelCheckpoint())
    again = ModelCheckpoint()
    fit(tmp_path, [1.0], again, ckpt_path=tmp_path / "last.ckpt")
    assert again.last_model_path == str(tmp_path / "last.ckpt")
    assert again.best_model_path == str(tmp_path / "best.ckpt")


def test_no_file_that_is_kept_or_of_another_place_is_overwritten_after_a_resume(tmp_path):
    for name in ("model", "{epoch}"):
        folder = tmp_path / name
        fit(folder, [3.0], ModelCheckpoint(save_top_k=3, filename=name))
        (folder / "epoch=1.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
        again = ModelCheckpoint(save_top_k=3, filename=name)
        fit(folder, [3.0, 2.0], again, ckpt_path=folder / "last.ckpt")
        assert [epoch_in(path) for path in again.best_k_models] == [1, 0]
        assert epoch_in(folder / "epoch=1.ckpt") == 0


def test_files_that_are_gone_or_changed_at_a_resume_are_said_and_not_counted(tmp_path, capsys):
    fit(tmp_path, [1.0, 2.0, 3.0], ModelCheckpoint(save_top_k=3, filename="{epoch}"))
    (tmp_path / "epoch=0.ckpt").unlink()
    (tmp_path / "epoch=1.ckpt").write_bytes((tmp_path / "epoch=2.ckpt").read_bytes())
    again = ModelCheckpoint(save_top_k=3, filename="{epoch}")
    fit(tmp_path, [1.0, 2.0, 3.0, 4.0], again, ckpt_path=tmp_path / "last.ckpt")
    assert "no longer among the best: epoch=0.ckpt, epoch=1.ckpt\n" in capsys.readouterr().err
    assert [Path(path).name for path in again.best_k_models] == ["epoch=2.ckpt", "epoch=3.ckpt"]


def test_the_best_come_along_into_another_folder_and_the_old_one_stays_as_it_is(tmp_path):
    fit(tmp_path / "a", [1.0, 3.0], ModelCheckpoint(save_top_k=2, filename="{epoch}"))
    again = ModelCheckpoint(save_top_k=2, filename="{epoch}")
    fit(tmp_path / "b", [1.0, 3.0, 2.0], again, ckpt_path=tmp_path / "a" / "last.ckpt")
    assert files(tmp_path / "a") == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]
    assert files(tmp_path / "b") == ["epoch=0.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert again.best_model_path == str(tmp_path / "b" / "epoch=0.ckpt")


def test_a_run_that_is_continued_from_an_older_file_writes_its_later_files_again(tmp_path):
    fit(tmp_path, [1.0, 2.0, 3.0], ModelCheckpoint(save_top_k=-1, filename="{epoch}"))
    again = ModelCheckpoint(save_top_k=-1, filename="{epoch}")
    fit(tmp_path, [1.0, 5.0, 4.0], again, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert files(tmp_path) == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert read_checkpoint(tmp_path / "epoch=1.ckpt")["metrics"]["val_loss"] == 5.0


def test_a_callback_that_the_run_so_far_did_not_have_says_so(tmp_path, capsys):
    fit(tmp_path, [1.0], ModelCheckpoint())
    fit(tmp_path, [1.0, 2.0], ModelCheckpoint(monitor="train_loss"), ckpt_path=tmp_path / "last.ckpt")
    assert "the best so far is unknown to ModelCheckpoint(monitor=train_loss" in capsys.readouterr().err
    assert files(tmp_path) == ["best.ckpt", "last.ckpt"]


def test_fewer_are_kept_after_a_resume_that_asks_for_fewer(tmp_path):
    fit(tmp_path, [3.0, 2.0, 1.0], ModelCheckpoint(save_top_k=3, filename="{epoch}"))
    fit(tmp_path, [3.0, 2.0, 1.0, 0.5], ModelCheckpoint(filename="{epoch}"), ckpt_path=tmp_path / "last.ckpt")
    assert files(tmp_path) == ["epoch=3.ckpt", "last.ckpt"]


def test_a_real_module_resumes_with_its_callbacks_state(tmp_path):
    quiet(tmp_path, max_epochs=1, callbacks=ModelCheckpoint(save_top_k=2)).fit(net(), *loaders())
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert [row["name"] for row in content["callbacks"]["ModelCheckpoint(every_n_epochs=1)"]["files"]] == [
        "epoch=0-step=7.ckpt"
    ]
    assert isinstance(Net.load_from_checkpoint(tmp_path / "epoch=0-step=7.ckpt"), Net)
