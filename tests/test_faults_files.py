"""Files and folders that change under a run, and checkpoints that hold what no run writes."""

import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from small import colour_folders, loaders, net, quiet

import flashtask
from flashtask import Callback, ImageClassificationData, ImageClassifier, Trainer
from flashtask.cli import run as command
from flashtask.core.checkpoint import read_checkpoint, write_checkpoint
from flashtask.core.errors import IntegrityError, MissingInputError, StorageError, UnknownNameError, UsageError
from flashtask.core.feature_store import FeatureStore
from flashtask.trainer.devices.selection import check_devices

QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "seed": 3, "logger": "csv"}


class AtEpoch(Callback):
    """Does something at the start of the second epoch."""

    def __init__(self, act):
        self.act = act

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            self.act(trainer.output_dir)


def fit_while(act, folder, **options):
    """A fit of three epochs in a folder, to which something happens meanwhile."""
    trainer = Trainer(**{**QUIET, **options}, max_epochs=3, output_dir=folder, callbacks=[AtEpoch(act)])
    trainer.fit(net(), *loaders())
    return trainer


def replaced(folder):
    shutil.move(folder, folder.with_name("moved"))
    folder.mkdir()
    (folder / ".lock").write_text("of another run")


@pytest.mark.parametrize("act", [shutil.rmtree, replaced])
@pytest.mark.parametrize("logger", ["csv", False])
def test_a_run_folder_that_is_removed_or_replaced_is_named(act, logger, tmp_path):
    with pytest.raises(StorageError, match="was removed or replaced while the run was going on") as caught:
        fit_while(act, tmp_path / "run", logger=logger)
    assert str(tmp_path / "run") in str(caught.value)
    if act is replaced:
        assert (tmp_path / "run" / ".lock").read_text() == "of another run", "another run keeps its lock"
        assert (tmp_path / "moved" / "last.ckpt").exists()


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "metrics.csv"])
def test_a_file_of_a_run_that_becomes_a_link_is_not_followed(name, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("of the user")

    def swap(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(mine)

    with pytest.raises(StorageError, match=f"{name} in .* became a link"):
        fit_while(swap, tmp_path / "run")
    assert mine.read_text() == "of the user"


def test_a_table_that_is_removed_begins_again_with_its_header(tmp_path):
    fit_while(lambda folder: (folder / "metrics.csv").unlink(), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2"]


def test_a_row_that_cannot_be_synced_names_the_file(tmp_path, monkeypatch):
    def fail_from_now_on(folder):
        def fsync(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)

    with pytest.raises(StorageError, match=r"cannot write .*metrics\.csv") as caught:
        fit_while(fail_from_now_on, tmp_path / "run", enable_checkpointing=False)
    assert "df -h" in caught.value.fix


def test_two_fits_in_threads_of_one_process_are_told_of_each_other(tmp_path, capsys):
    """The second begins while the first waits for it in the middle of an epoch."""

    def fit_another(folder):
        other = Trainer(**QUIET, max_epochs=1, output_dir=tmp_path / "other")
        thread = threading.Thread(target=lambda: other.fit(net(), *loaders()))
        thread.start()
        thread.join()

    fit_while(lambda folder: None, tmp_path / "alone")
    assert "another fit" not in "".join(capsys.readouterr())
    fit_while(fit_another, tmp_path / "first")
    assert "".join(capsys.readouterr()).count("another fit is going on in another thread") == 1


# ---- what a checkpoint may hold


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    batches = [(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))]
    model = ImageClassifier("timm/test_efficientnet", pretrained=False, labels=["a", "b"])
    trainer = Trainer(**{**QUIET, "logger": False}, max_epochs=1, output_dir=folder)
    trainer.fit(model, batches)
    return folder / "last.ckpt"


def crafted(checkpoint, path, change):
    """The checkpoint after a change, with a whole digest."""
    content = read_checkpoint(checkpoint)
    change(content)
    write_checkpoint(path, content)
    return path


def weights(ending, value):
    """A change of the first weights whose name ends so."""

    def change(content):
        state = content["state_dict"]
        name = next(name for name in state if name.endswith(ending))
        state[name] = value(state[name])

    return change


def settings(**values):
    """A change of constructor arguments; labels are also what the file says of itself."""

    def change(content):
        content["hyper_parameters"].update(values)
        content.update({key: value for key, value in values.items() if key == "labels"})

    return change


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (weights("running_var", lambda value: -value), "running_var holds a variance below 0"),
        (weights(".bias", lambda value: value.to(torch.int32)), "holds int32, not float32"),
        (weights("running_mean", lambda value: value.to(torch.bool)), "holds bool, not float32"),
        (
            weights("head.0.bias", lambda value: value.half()),
            "weight and bias of head.0 are stored as float32 and float16",
        ),
        (settings(num_classes=10**4000), "its settings are refused: num_classes=1000"),
        (settings(learning_rate=-1), "learning_rate must be a number above 0"),
        (settings(label_smoothing=7), "label_smoothing"),
        (settings(multi_label="yes"), "multi_label must be True or False, not 'yes'"),
        (settings(labels=["a", "b", "c"]), "contradicts 3 labels"),
        (settings(labels=["a", "a"]), "a label appears twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_run_writes_is_refused_as_a_file_and_not_as_an_argument(change, words, checkpoint, tmp_path):
    path = crafted(checkpoint, tmp_path / "crafted.ckpt", change)
    with pytest.raises(IntegrityError) as caught:
        flashtask.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 800
    assert caught.value.exit_code == 76


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (settings(backbone="no_such"), "no backbone named 'no_such'"),
        (settings(head="no_such"), "no head named 'no_such'"),
        (settings(optimizer="no_such"), "no optimizer named 'no_such'"),
        (settings(loss_fn="no_such"), "no loss named 'no_such'"),
        (settings(no_such=1), "no argument of ImageClassifier named 'no_such'"),
        (lambda content: content.update(task="no_such"), "holds a task 'no_such'"),
    ],
    ids=["backbone", "head", "optimizer", "loss", "argument", "task"],
)
def test_a_name_that_is_not_registered_here_is_what_the_file_needs(change, words, checkpoint, tmp_path, capsys):
    path = crafted(checkpoint, tmp_path / "crafted.ckpt", change)
    with pytest.raises(IntegrityError) as caught:
        flashtask.load(path)
    assert isinstance(caught.value, UnknownNameError)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "import the module that registers it first" in caught.value.fix
    assert command(["predict", str(path), str(path)]) == 76
    with pytest.raises(UnknownNameError) as caught:  # the same name as an argument of the user's own
        ImageClassifier.load_from_checkpoint(checkpoint, optimizer="no_such")
    assert caught.value.exit_code == 2


def test_weights_that_are_nan_are_told(checkpoint, tmp_path):
    change = weights("conv_stem.weight", lambda value: value * torch.nan)
    with pytest.warns(UserWarning, match=r"conv_stem\.weight holds NaN"):
        flashtask.load(crafted(checkpoint, tmp_path / "crafted.ckpt", change))


def test_an_argument_of_the_users_own_is_still_a_usage_error(checkpoint):
    with pytest.raises(UsageError, match="learning_rate"):
        ImageClassifier.load_from_checkpoint(checkpoint, learning_rate=-1)


# ---- the environment, options and files that are named


@pytest.mark.parametrize("text", ["abc", "1e9", "-1", "5 GB", "9" * 40])
def test_a_size_of_the_cache_that_is_no_number_is_named(text, monkeypatch):
    monkeypatch.setenv("FLASHTASK_FEATURE_CACHE_BYTES", text)
    with pytest.raises(UsageError, match=r"FLASHTASK_FEATURE_CACHE_BYTES=.* whole number of bytes"):
        FeatureStore()


@pytest.mark.parametrize(("text", "limit"), [("", 5 * 2**30), ("0", 0), (" 1000 ", 1000)])
def test_an_empty_size_of_the_cache_is_the_default(text, limit, monkeypatch):
    monkeypatch.setenv("FLASHTASK_FEATURE_CACHE_BYTES", text)
    assert FeatureStore().limit == limit


@pytest.mark.parametrize("devices", [2147483648, "5000", [*range(600)]])
def test_more_processes_than_any_machine_runs_are_a_usage_error(devices):
    with pytest.raises(UsageError, match="512 processes of one run at the most"):
        check_devices(devices, None)
    assert check_devices("512", None) == 512


def test_a_recipe_that_names_a_file_as_its_zoo_does_not_show_what_is_in_it(tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"zoo: {secret}\ndata: {{from_folders: {{train_folder: {tmp_path}}}}}\n")
    assert command(["finetune", str(recipe)]) == 2
    said = "".join(capsys.readouterr())
    assert str(secret) in said
    assert "a mapping of keys, not a text" in said
    assert "root:" not in said


def test_best_weights_that_were_removed_during_the_run_are_named(tmp_path):
    class Removing(Callback):
        def on_train_end(self, trainer, module):
            Path(trainer.checkpoint_callback.best_model_path).unlink()

    trainer = quiet(tmp_path, callbacks=Removing(), accelerator="cpu")
    with pytest.raises(MissingInputError, match=r"best\.ckpt was removed during the run") as caught:
        trainer.finetune(net(), *loaders(16), strategy="no_freeze")
    assert "last.ckpt" in caught.value.fix
    assert caught.value.exit_code == 66


@pytest.mark.long
def test_processes_that_load_data_end_with_the_run(tmp_path):
    data = ImageClassificationData.from_folders(
        train_folder=colour_folders(tmp_path / "data", 4), val_split=0.25, batch_size=2, num_workers=1
    )
    trainer = Trainer(**{**QUIET, "logger": False}, max_epochs=1, output_dir=tmp_path / "run", feature_cache=False)
    model = ImageClassifier("timm/test_efficientnet", pretrained=False)
    trainer.finetune(model, datamodule=data, strategy="no_freeze")
    assert not multiprocessing.active_children()
    trainer.validate(model, datamodule=data)
    assert not multiprocessing.active_children()
