"""Names of files that are written for images, and pictures of predictions."""

from __future__ import annotations

import pytest
from PIL import Image
from small import colour_folders

from flashtask import ImageClassifier
from flashtask.cli import run
from flashtask.core.errors import UsageError
from flashtask.tasks.prediction_files import output_names


def test_files_are_named_by_their_path_below_the_folder_of_all():
    assert output_names(["/data/a/1.png", "/data/b/1.jpg"]) == {"/data/a/1.png": "a/1", "/data/b/1.jpg": "b/1"}
    assert output_names(["/data/a/1.png"]) == {"/data/a/1.png": "1"}
    assert output_names(["https://example.org/x/2.png", "/data/1.png"])["https://example.org/x/2.png"] == "2"


def test_two_images_of_one_name_are_refused():
    with pytest.raises(UsageError, match="would be written to one file"):
        output_names(["/data/1.png", "/data/1.jpg"])


def test_predict_draws_what_every_task_predicts(tmp_path, capsys):
    folder = colour_folders(tmp_path / "images", each=1)
    model = ImageClassifier("timm/test_resnet", labels=["a", "b"], pretrained=False)
    saved = model.save_pretrained(tmp_path / "model")
    assert run(["predict", str(saved), str(folder), "--draw", str(tmp_path / "drawn")]) == 0
    images = sorted(path.relative_to(folder).with_suffix("") for path in folder.rglob("*.*"))
    written = sorted(
        path.relative_to(tmp_path / "drawn").with_suffix("") for path in (tmp_path / "drawn").rglob("*.png")
    )
    assert written == images
    with Image.open(next((tmp_path / "drawn").rglob("*.png"))) as picture:
        assert picture.height > picture.width  # the words stand below the image


def test_files_of_another_task_are_refused(tmp_path, capsys):
    folder = colour_folders(tmp_path / "images", each=1)
    saved = ImageClassifier("timm/test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(tmp_path / "model")
    assert run(["predict", str(saved), str(folder), "--format", "png", "--output", str(tmp_path / "masks")]) == 2
    assert "table, csv, json, jsonl" in capsys.readouterr().err
    assert run(["predict", str(saved), str(folder), "--format", "png"]) == 2
    assert "--output" in capsys.readouterr().err
