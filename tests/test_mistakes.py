"""Mistakes with tables and names: the fix that a message proposes is the one that works."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from flashtask import ImageClassificationData, ObjectDetectionData
from flashtask.cli import run
from flashtask.core.errors import BadDataError, UsageError


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """`photos/cat/cat0.png` to `photos/dog/dog3.png`, in the folder where the test stands."""
    monkeypatch.chdir(tmp_path)
    for kind in ("cat", "dog"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (9 * number, 0, 99)).save(tmp_path / "photos" / kind / f"{kind}{number}.png")
    return tmp_path


def table(folder, cell, head="file,kind", name="all.csv"):
    rows = [f"{cell(kind, number)},{kind}" for kind in ("cat", "dog") for number in range(4)]
    (folder / name).write_text("\n".join([*([head] if head else []), *rows]) + "\n")
    return folder / name


def fix_of(given, **options):
    with pytest.raises((BadDataError, UsageError)) as caught:
        ImageClassificationData.from_csv("file", "kind", given, **options)
    return caught.value.fix


@pytest.mark.parametrize(
    ("cell", "fix"),
    [
        (lambda kind, n: f"photos\\{kind}\\{kind}{n}.png", r"write / in place of \ in the column 'file'"),
        (lambda kind, n: f"photos/{kind}/{kind}{n}", "with their ending: 'cat0.png'"),
        (lambda kind, n: f"{kind}{n}.png", "with their folders: 'photos/cat/cat0.png'"),
        (lambda kind, n: f"/nowhere/{kind}{n}.png", "relative to .*: 'photos/cat/cat0.png'"),
        (lambda kind, n: f"/nowhere/{kind}{n}x.png", "correct the column 'file'"),
        (lambda kind, n: f"{kind}{n}x.png", 'images_root="FOLDER"'),
    ],
)
def test_paths_that_lead_nowhere_are_answered_with_what_was_found(cell, fix, photos):
    found = fix_of(table(photos, cell))
    assert fix in found or re.search(fix, found), found


def test_the_root_that_is_proposed_works(photos):
    given = table(photos, lambda kind, n: f"{kind}/{kind}{n}.png")
    assert fix_of(given) == f'images_root="{photos / "photos"}"'
    assert ImageClassificationData.from_csv("file", "kind", given, images_root=photos / "photos").sizes() == {
        "train": 8
    }


def test_single_images_that_are_missing_can_be_left_out(photos):
    given = table(photos, lambda kind, n: f"photos/{kind}/{kind}{n}.png")
    given.write_text(given.read_text() + "photos/gone.png,cat\n")
    assert 'on_bad_image="skip"' in fix_of(given)
    data = ImageClassificationData.from_csv("file", "kind", given, on_bad_image="skip")
    data.setup("fit")
    assert data.sizes() == {"train": 8}
    assert "there is no folder" in (found := fix_of(given, images_root=photos / "phtos"))
    assert f'images_root="{photos / "photos"}"' in found


def test_load_image_where_it_is_not_taken_says_what_to_do(photos):
    with pytest.raises(UsageError, match=r"convert other files to PNG, TIFF or \.npy"):
        ObjectDetectionData.from_coco(train_folder="photos", load_image="raw")


def test_exchanged_columns_are_named_in_the_words_of_the_command(photos, capsys):
    given = table(photos, lambda kind, n: f"photos/{kind}/{kind}{n}.png")
    assert run(["finetune", str(given), "--input", "kind", "--target", "file"]) == 65
    assert "--input file" in (said := capsys.readouterr().err)
    assert "--target kind" in said


def test_a_table_without_a_header_and_one_with_another_separator(photos):
    given = table(photos, lambda kind, n: f"photos/{kind}/{kind}{n}.png", head="")
    assert "write a line above it, such as file,column2" in fix_of(given)
    given.write_text("file,kind\nphotos/cat/cat0.png,a|b\nphotos/dog/dog0.png,b\n")
    assert fix_of(given, label_separator=";") == 'label_separator="|"'


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("all.xlsx", "save it as CSV"),
        ("all.txt", "cp all.txt all.csv"),
        ("a.rar", "unpack it"),
        ("x.json", "JSON lines"),
    ],
)
def test_files_of_other_kinds_are_answered_with_what_to_do_with_them(name, words, photos, capsys):
    (photos / name).write_bytes(b"x")
    assert run(["finetune", name, "--target", "kind"]) == 2
    assert words in capsys.readouterr().err


def test_an_empty_folder_is_called_empty(photos, capsys):
    (photos / "none").mkdir()
    (photos / "x.json").write_text("{}")
    assert run(["finetune", "none"]) == 65
    assert "the folder is empty" in capsys.readouterr().err
