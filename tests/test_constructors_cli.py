"""Tables, archives and addresses as DATA of the command line."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import squares
import yaml
from small import colour_folders

from flashtask import ObjectDetectionData
from flashtask.cli import run
from flashtask.core.errors import BadDataError
from flashtask.data.cached_inputs import brought_here

MODEL = ["--backbone", "timm/test_resnet", "--no-pretrained", "--epochs", "1", "--batch-size", "4", "--quiet"]


@pytest.fixture
def photos(tmp_path):
    return colour_folders(tmp_path / "photos", each=6)


@pytest.fixture
def table(tmp_path, photos):
    """Twelve rows: a label, tags, flags, a number, the part, a site and a weight; paths count from `photos`."""
    rows = [["file", "kind", "tags", "odd", "large", "size", "part", "site", "weight"]]
    for number in range(12):
        kind = ("blue", "red")[number % 2]
        tags = [name for name, on in (("odd", number % 2), ("large", number > 5)) if on]
        row = [f"{kind}/{number // 2}.png", kind, ";".join(tags) or "none", number % 2, int(number > 5), number / 4]
        rows.append([*row, "val" if number >= 8 else "train", f"s{number // 4}", 1 + number % 2])
    (tmp_path / "tables").mkdir()
    with (tmp_path / "tables" / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "tables" / "all.csv"


def finetuned(data, folder, *words):
    assert run(["finetune", str(data), *words, *MODEL, "--output-dir", str(folder)]) == 0
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def test_every_column_has_an_option_and_the_table_is_described(table, photos, tmp_path, capsys):
    words = ["--input", "file", "--target", "kind", "--part", "part", "--group", "site", "--weight", "weight"]
    recipe = finetuned(table, tmp_path / "run", *words, "--root", str(photos))
    line = "12 rows of all.csv; columns: image 'file', target 'kind', part 'part', group 'site', weight 'weight'"
    assert line in capsys.readouterr().err
    arguments = recipe["data"]["from_csv"]
    assert arguments["images_root"] == str(photos)
    assert (arguments["split_field"], arguments["group_field"], arguments["weight_field"]) == ("part", "site", "weight")
    assert run(["validate", str(tmp_path / "run"), str(table), "--root", str(photos), "--input", "file", "--json"]) == 0
    assert "val_accuracy" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "words", [["--target", "odd", "--target", "large", "--multi-label"], ["--target", "odd,large"]]
)
def test_several_targets_are_repeated_or_joined(words, table, photos, tmp_path):
    recipe = finetuned(table, tmp_path / "run", *words, "--input", "file", "--root", str(photos), "--part", "part")
    assert recipe["data"]["from_csv"]["target_fields"] == ["odd", "large"]
    assert recipe["model"]["multi_label"] is True


def test_a_delimiter_means_several_labels(table, photos, tmp_path):
    words = ["--target", "tags", "--delimiter", ";", "--input", "file", "--root", str(photos)]
    recipe = finetuned(table, tmp_path / "run", *words)
    assert recipe["model"]["multi_label"] is True
    assert recipe["data"]["from_csv"]["label_separator"] == ";"


def test_numbers_are_guessed_where_nothing_else_is_possible(table, photos, tmp_path, capsys):
    words = ["--target", "size", "--input", "file", "--root", str(photos), "--part", "part"]
    assert finetuned(table, tmp_path / "run", *words)["task"] == "image_regression"
    assert "task: image_regression (12 different numbers in the column 'size')" in capsys.readouterr().err


def test_json_lines_are_a_table(table, photos, tmp_path):
    rows = list(csv.DictReader(table.read_text().splitlines()))
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--target", "kind", "--root", str(photos), "--part", "part"]
    recipe = finetuned(tmp_path / "all.jsonl", tmp_path / "run", *words)
    assert recipe["data"]["from_csv"]["input_field"] == "file"


def packed(photos, kind):
    """The folder in an archive, with `photos/` around it."""
    if kind == "zip":
        with zipfile.ZipFile(photos.with_suffix(".zip"), "w") as archive:
            for file in sorted(photos.rglob("*.png")):
                archive.write(file, f"photos/{file.relative_to(photos)}")
        return photos.with_suffix(".zip")
    with tarfile.open(photos.with_suffix(".tar.gz"), "w:gz") as archive:
        archive.add(photos, "photos")
    return photos.with_suffix(".tar.gz")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_is_its_folder(kind, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    archive = packed(photos, kind)
    shutil.rmtree(photos)
    folder = finetuned(archive, tmp_path / "run")["data"]["from_folders"]["train_folder"]
    assert folder.startswith(str(tmp_path / "cache" / "data"))
    assert run(["validate", str(tmp_path / "run"), str(archive)]) == 0
    assert finetuned(archive, tmp_path / "again")["data"]["from_folders"]["train_folder"] == folder


def test_a_hostile_archive_is_refused_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("../outside.txt", "x")
    assert run(["finetune", str(tmp_path / "bad.zip"), "--output-dir", str(tmp_path / "run")]) == 76
    assert "refused to unpack bad.zip" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.suffix == ".txt"]


def test_files_at_addresses_are_fetched_once(table, photos, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/all.csv", table.read_bytes())
    for file in photos.rglob("*.png"):
        store.pipe(f"/bucket/{file.relative_to(photos)}", file.read_bytes())
    words = ["--target", "kind", "--input", "file", "--part", "part"]
    recipe = finetuned("memory://bucket/all.csv", tmp_path / "run", *words)
    assert recipe["data"]["from_csv"]["train_file"] == "memory://bucket/all.csv"
    store.rm("/bucket", recursive=True)
    again = finetuned("memory://bucket/all.csv", tmp_path / "again", *words)
    assert again["data"] == recipe["data"]
    left, right = (json.loads((tmp_path / name / "summary.json").read_text())["best"] for name in ("run", "again"))
    assert (left["val_loss"], left["val_accuracy"]) == (right["val_loss"], right["val_accuracy"])


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("memory://bucket/none.csv", 66, "no such file"),
        ("ftp://example.org/photos.zip", 2, "addresses begin with http://"),
        ("s3://bucket/photos.zip", 2, "pip install fsspec s3fs"),
    ],
)
def test_addresses_that_cannot_be_read(address, code, words, tmp_path, monkeypatch, capsys):
    pytest.importorskip("fsspec")
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert run(["finetune", address]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in files.items():
            archive.write(file, name)
    return path


@pytest.mark.parametrize("above", ["", "set/", "a/b/c/"])
def test_folders_around_the_data_in_an_archive_are_opened(above, photos, table, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    pictures = {f"{above}{file.relative_to(photos)}": file for file in photos.rglob("*.png")}
    archive = zipped(tmp_path / "photos.zip", pictures)
    assert sorted(entry.name for entry in Path(brought_here(str(archive))).iterdir()) == ["blue", "red"]
    with_table = {f"{above}all.csv": table} | {
        f"{above}img/{name.removeprefix(above)}": one for name, one in pictures.items()
    }
    found = Path(brought_here(str(zipped(tmp_path / "table.zip", with_table))))
    assert found.name == "all.csv"
    assert (found.parent / "img" / "red" / "0.png").is_file()


def test_a_table_beside_class_folders_or_parts_is_not_the_data(photos, table, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    pictures = {f"set/{file.relative_to(photos)}": file for file in photos.rglob("*.png")}
    archive = zipped(tmp_path / "classes.zip", {"set/all.csv": table} | pictures)
    assert Path(brought_here(str(archive))).name == "set"
    parts = {name.replace("set/", "set/train/"): file for name, file in pictures.items()}
    assert Path(brought_here(str(zipped(tmp_path / "parts.zip", {"set/all.csv": table} | parts)))).name == "set"
    one_class = {name: file for name, file in pictures.items() if "red" in name}
    assert Path(brought_here(str(zipped(tmp_path / "one.zip", one_class)))).name == "set"


def test_audit_and_show_know_the_parts_and_groups_of_a_table(table, photos, tmp_path, capsys):
    words = [str(table), "--input", "file", "--target", "kind", "--root", str(photos), "--part", "part"]
    assert run(["audit", *words, "--group", "site"]) in (0, 65)
    assert "8 train, 4 val image(s)" in capsys.readouterr().out
    assert run(["show", *words, "--of", "val", "--output", str(tmp_path / "batch.png")]) == 0
    assert (tmp_path / "batch.png").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--class-weights", "red=1,red=2"], "names 'red' twice"),
        (
            ["--image-size", "100000"],
            "image_size: 100000 x 100000 is more than 4,194,304 pixels\n  fix: --image-size 224",
        ),
        (["--sampler", "weighted"], "fix: --weight COLUMN, for a table"),
    ],
)
def test_errors_name_the_options_that_were_typed(words, said, photos, tmp_path, capsys):
    assert run(["finetune", str(photos), *words, *MODEL, "--output-dir", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validation_and_test_measure_the_rows_of_their_part(table, photos, tmp_path, capsys):
    words = ["--input", "file", "--part", "part", "--root", str(photos)]
    finetuned(table, tmp_path / "run", *words, "--target", "kind")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    capsys.readouterr()
    assert run(["validate", str(tmp_path / "run"), str(table), *words, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["val_loss"] == pytest.approx(float(row["val_loss"]), rel=1e-4)
    assert "4 validation images" in said.err
    assert run(["test", str(tmp_path / "run"), str(table), *words]) == 65
    assert "no row of" in capsys.readouterr().err


def test_a_root_is_proposed_where_images_are_not_found(table, tmp_path, capsys):
    words = ["finetune", str(table), "--input", "file", "--target", "kind", *MODEL]
    assert run([*words, "--output-dir", str(tmp_path / "run")]) == 65
    assert "fix: --root FOLDER, if paths count from another folder" in capsys.readouterr().err


def test_an_archive_that_is_not_there_is_called_a_file(tmp_path, photos, capsys):
    (tmp_path / "photos.zip").write_bytes(b"")
    for command in (["finetune"], ["validate", "model.ckpt"], ["audit"]):
        (tmp_path / "model.ckpt").write_bytes(b"")
        command = [command[0], *(str(tmp_path / word) for word in command[1:]), str(tmp_path / "photo.zip")]
        assert run(command) == 66
        said = capsys.readouterr().err
        assert f"no file {tmp_path / 'photo.zip'}" in said
        assert "did you mean 'photos.zip'" in said


def test_a_data_file_of_yolo_is_data_whatever_its_name(tmp_path, capsys):
    file = squares.yolo(tmp_path / "squares").rename(tmp_path / "squares" / "mine.yml")
    assert run(["audit", str(file), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["sizes"] == {"train": 8, "val": 8}
    assert "task: object_detection (from_yolo)" in printed.err
    assert ObjectDetectionData.for_evaluation(file, "val").sizes()["val"] == 8
    with pytest.raises(BadDataError, match=r"mine.yml' names no images for test"):
        ObjectDetectionData.for_evaluation(file, "test")
    file.write_text(file.read_text().replace("val: ../val/images\n", ""))
    assert run(["audit", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sizes"] == {"train": 6, "val": 2}
    file.write_text("names: [a\n")
    assert run(["audit", str(file)]) == 2
    assert "mine.yml" in capsys.readouterr().err
