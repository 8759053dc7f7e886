"""What a path to a model may be: a checkpoint, a run folder, a folder in timm's layout; wherever one is asked for."""

from __future__ import annotations

import shlex
import shutil

import pytest
import yaml
from small import colour_folders

import flashtask
from flashtask import ImageClassificationData, ImageClassifier, Trainer
from flashtask.cli import run
from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.model_path import model_path

QUIET = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images, and a run."""
    root = tmp_path_factory.mktemp("model paths")
    images, val = colour_folders(root / "images", each=3, size=16), colour_folders(root / "val", each=2, size=16)
    data = ImageClassificationData.from_folders(train_folder=images, val_folder=val, batch_size=6, num_workers=0)
    model = ImageClassifier("test_resnet", pretrained=False, learning_rate=0.05)
    trainer = Trainer(max_epochs=2, output_dir=root / "runs" / "000", seed=1, **QUIET)
    trainer.fit(model, datamodule=data)
    return root


@pytest.fixture
def last_alone(root, tmp_path):
    shutil.copy(root / "runs" / "000" / "last.ckpt", tmp_path / "last.ckpt")
    return tmp_path


@pytest.mark.long
def test_a_run_folder_is_its_best_checkpoint_in_python(root, capfd):
    folder, best = root / "runs" / "000", root / "runs" / "000" / "best.ckpt"
    photo = str(next((root / "images").rglob("*.png")))
    expected = flashtask.load(best).predict(photo)
    assert flashtask.load(folder).predict(photo) == expected
    assert flashtask.load(str(folder)).predict(photo) == expected
    assert ImageClassifier.load_from_checkpoint(folder).predict(photo) == expected
    assert ImageClassifier.from_pretrained(folder).predict(photo) == expected
    assert ImageClassifier.from_pretrained(folder).pretrained_from["path"] == str(best)
    assert flashtask.read_checkpoint(folder)["epoch"] == flashtask.read_checkpoint(best)["epoch"]
    assert ImageClassifier(backbone=str(folder), num_classes=2).hparams.backbone == f"checkpoint:{best}"
    assert "is used" not in capfd.readouterr().err


def test_a_run_folder_is_its_best_checkpoint_in_every_command(root, tmp_path, capsys):
    folder, images = str(root / "runs" / "000"), str(root / "images")
    for command in (["predict", images, "--format", "csv"], ["validate", images, "--json"], ["test", images, "--json"]):
        said = []
        for model in (folder, f"{folder}/best.ckpt"):
            assert run([command[0], model, *command[1:]]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]
    assert run(["push", folder, "me/model", "--dry-run"]) == 0
    begin = ["finetune", images, "--from", folder, "--epochs", "1", "--quiet", "--output-dir", str(tmp_path / "RUN")]
    assert run([*begin, "--num-workers", "0"]) == 0
    assert yaml.safe_load((tmp_path / "RUN" / "recipe.yaml").read_text())["model"]["from"] == f"{folder}/best.ckpt"
    assert run([*begin, "--resume"]) == 0


def test_where_only_the_last_checkpoint_is_there_it_is_used_and_a_line_says_so(last_alone, root, capfd):
    line = f"{last_alone} has no best.ckpt: its last.ckpt is used\n"
    assert flashtask.load(last_alone).labels == ("blue", "red")
    assert capfd.readouterr().err == line
    assert run(["validate", str(last_alone), str(root / "images"), "--json"]) == 0
    assert capfd.readouterr().err.count(line) == 1


@pytest.mark.long
def test_a_folder_in_timms_layout_still_works_and_comes_before_a_checkpoint_in_it(root, tmp_path):
    model = flashtask.load(root / "runs" / "000")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "best.ckpt").write_bytes(b"")
    photo = str(next((root / "images").rglob("*.png")))
    assert flashtask.load(tmp_path / "model").predict(photo).label == model.predict(photo).label
    assert run(["predict", str(tmp_path / "model"), photo]) == 0
    with pytest.raises(UsageError) as caught:
        ImageClassifier.load_from_checkpoint(tmp_path / "model")
    assert caught.value.fix == f"ImageClassifier.from_pretrained({str(tmp_path / 'model')!r})"


def test_a_fit_continues_a_run_folder_from_its_last_checkpoint_and_evaluation_takes_the_best(root, tmp_path):
    images, val = root / "images", root / "val"
    data = ImageClassificationData.from_folders(train_folder=images, val_folder=val, batch_size=6, num_workers=0)
    shutil.copytree(root / "runs" / "000", tmp_path / "RUN")
    (tmp_path / "RUN" / "best.ckpt").write_bytes(b"damaged")
    model = ImageClassifier("test_resnet", pretrained=False, learning_rate=0.05)
    trainer = Trainer(max_epochs=2, output_dir=tmp_path / "OTHER", seed=1, **QUIET)
    trainer.fit(model, datamodule=data, ckpt_path=tmp_path / "RUN")
    assert trainer.current_epoch == 2
    with pytest.raises(flashtask.core.errors.IntegrityError, match=r"best\.ckpt"):
        trainer.validate(model, datamodule=data, ckpt_path=tmp_path / "RUN")


def test_a_folder_without_a_model_says_what_it_is_and_what_to_give(root, tmp_path):
    def error_of(folder):
        with pytest.raises(MissingInputError) as caught:
            model_path(folder)
        return caught.value

    (tmp_path / "empty").mkdir()
    error = error_of(tmp_path / "empty")
    assert "there is no model in" in error.what
    assert "best.ckpt" in error.why
    assert "save_pretrained" in error.fix
    assert error_of(root / "runs").fix == f"give {root / 'runs' / '000'}"
    assert "runs'" in error_of(root / "rums").fix
    shutil.copy(root / "runs" / "000" / "best.ckpt", tmp_path / "empty" / "epoch=1.ckpt")
    assert error_of(tmp_path / "empty").fix == f"give {tmp_path / 'empty' / 'epoch=1.ckpt'}"


def test_a_run_without_a_checkpoint_names_the_command_that_goes_on(root, tmp_path, capsys):
    images = str(root / "images")
    (tmp_path / "RUN").mkdir()
    recipe = {
        "task": "image_classification",
        "data": {"from_folders": {"train_folder": images, "val_split": 2, "num_workers": 0}},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "trainer": {"max_epochs": 1, "enable_progress_bar": False},
    }
    (tmp_path / "RUN" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(["validate", str(tmp_path / "RUN"), images]) == 66
    told = capsys.readouterr().err
    assert "has not written a checkpoint" in told
    fix = shlex.split(told.partition("fix: flashtask ")[2])
    assert fix == ["finetune", "--output-dir", str(tmp_path / "RUN"), "--resume"]
    assert run(fix) == 0
