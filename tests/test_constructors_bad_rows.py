"""Rows that cannot be used: all of them are named at once, with the file, the row and the column."""

from __future__ import annotations

import numpy as np
import pytest
from image_trees import write_image
from PIL import Image

from flashtask import ImageClassificationData, ImageRegressionData
from flashtask.cli import run
from flashtask.core.errors import BadDataError, UsageError


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        write_image(tmp_path / f"{number:02}.png")
    return tmp_path


def written(folder, lines, name="cells.csv", head="file,kind"):
    (folder / name).write_text("\n".join([head, *lines]) + "\n")
    return folder / name


def good(count=12):
    return [f"{number:02}.png,{'ab'[number % 2]}" for number in range(count)]


def refused(*arguments, data=ImageClassificationData, **options):
    with pytest.raises(BadDataError) as caught:
        data.from_csv(*arguments, **options)
    return str(caught.value)


def test_problems_of_all_kinds_are_in_one_error(folder):
    lines = [*good(8), "08.png,", "gone.png,a", ",b", "00.png,b", "09.png", "10.png,nan"]
    text = refused("file", "kind", written(folder, lines))
    for words in (
        "cells.csv, line 10, column 'kind' is empty: the sample has no target",
        f"cells.csv, line 11, column 'file': the file does not exist: '{folder / 'gone.png'}'",
        "cells.csv, line 12, column 'file' is empty",
        "cells.csv, line 13, column 'file': '00.png' has the target 'b', and 'a' in cells.csv, line 2",
        "cells.csv, line 14 has 1 cells, and the header has 2",
        "cells.csv, line 15, column 'kind': 'nan'",
        "train_file has 6 problems (row of another length: 1, missing image: 1, empty cell: 2, NaN target: 1, ",
    ):
        assert words in text
    assert text.count("\n") < 10


def test_ten_places_are_shown_and_all_are_counted(folder):
    lines = [*good(2), *(f"gone{number}.png,a" for number in range(30)), *("01.png," for _ in range(3))]
    text = refused("file", "kind", written(folder, lines))
    assert "missing image: 30" in text
    assert "empty cell: 3" in text
    assert text.count("cells.csv, line") >= 10
    assert "... and 26 more" in text


def test_targets_that_are_not_numbers(folder):
    text = refused(
        "file",
        "kind",
        written(folder, ["00.png,1.5", "01.png,x", "02.png,NaN", "03.png,inf"]),
        data=ImageRegressionData,
    )
    assert "line 3, column 'kind': 'x' is not a number" in text
    assert "line 4, column 'kind': 'NaN'" in text
    assert "line 5, column 'kind': 'inf' is not a number" in text


def test_a_label_of_one_part_only_is_named_beside_other_problems(folder):
    train = written(folder, good(6))
    val = written(folder, ["06.png,a", "07.png,c", "gone.png,b"], "val.csv")
    text = refused("file", "kind", train, val)
    assert "val.csv, line 3, column 'kind': 'c' is in val only, not in train" in text
    assert "val.csv, line 4, column 'file': the file does not exist" in text


def test_a_separator_that_never_occurs(folder):
    text = refused("file", "kind", written(folder, good()), label_separator=";")
    assert "label_separator=';' occurs in none of 12 rows" in text


def test_columns_that_another_table_lacks(folder):
    val = written(folder, ["06.png,a"], "val.csv", head="path,sort")
    text = refused("file", "kind", written(folder, good()), val)
    assert "val_file: no column 'file'; there are: 'path', 'sort'" in text
    assert "val_file: no column 'kind'" in text


@pytest.mark.parametrize(
    ("encoding", "words"),
    [("latin-1", "line 14 has the byte 0xe9, as in '00.png,caf\\xe9'"), ("utf-16", "it begins as UTF-16 does")],
)
def test_a_table_in_another_encoding(encoding, words, folder):
    text = "\n".join(["file,kind", *good(), "00.png,café"])
    (folder / "cells.csv").write_bytes(text.encode(encoding))
    message = refused("file", "kind", folder / "cells.csv")
    assert words in message.replace("é", "\\xe9")
    assert "iconv -f" in message


def test_a_line_that_is_not_json(folder):
    (folder / "cells.jsonl").write_text('{"file": "00.png", "kind": "a"}\n{"file": "01.png"\n')
    assert "line 2 is not a JSON object" in refused("file", "kind", folder / "cells.jsonl")


def test_weights_and_parts_are_named_with_their_rows(folder):
    lines = [
        f"{line},{weight},{part}"
        for line, weight, part in zip(good(4), (1, -1, "x", 2), ("train",) * 3 + ("so",), strict=True)
    ]
    path = written(folder, lines, head="file,kind,weight,part")
    text = refused("file", "kind", path, weight_field="weight", split_field="part")
    for words in ("line 3, column 'weight': '-1'", "line 4, column 'weight': 'x'", "line 5: column 'part' has 'so'"):
        assert words in text


def test_the_command_line_ends_with_65_and_writes_nothing(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    path = written(folder, [*good(), "gone.png,a", "00.png,"])
    assert run(["finetune", str(path), "--target", "kind", "--output-dir", "run"]) == 65
    text = capsys.readouterr().err
    assert "line 14, column 'file'" in text
    assert "line 15, column 'kind'" in text
    assert not (folder / "run").exists()


@pytest.mark.long
def test_missing_files_are_left_out_if_asked(folder, capsys):
    path = written(folder, [*good(), "gone.png,a"])
    data = ImageClassificationData.from_csv("file", "kind", path, on_bad_image="skip")
    data.setup("fit")
    assert data.sizes() == {"train": 12}
    assert "left out 1 image(s)" in capsys.readouterr().err


def test_every_bad_picture_in_memory_is_named():
    images = [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 7), np.uint8), "no such file.png", b"no image", None]
    data = ImageClassificationData.from_numpy(images, ["a", "b", "a", "b", "a"])
    with pytest.raises(BadDataError) as caught:
        data.setup("fit")
    text = str(caught.value)
    assert "4 of 5 images cannot be read" in text
    for place in (1, 2, 3, 4):
        assert f"train_data[{place}]" in text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ImageClassificationData.from_numpy(np.zeros((4, 8, 8, 3), np.uint8), ["a"]),
            "one target for each of the 4",
        ),
        (lambda: ImageClassificationData.from_numpy(np.zeros((4, 8, 8, 3), np.uint8)), "train_data needs targets"),
        (lambda: ImageClassificationData.from_numpy(np.zeros((4, 8), np.uint8), "abab"), "three or four axes"),
        (lambda: ImageClassificationData.from_numpy([], []), "train_data is empty"),
        (lambda: ImageClassificationData.from_numpy(), "from_numpy needs data"),
        (lambda: ImageClassificationData.from_files(["a.png"], ["a"], target="(a)"), "both give the targets"),
        (lambda: ImageClassificationData.from_files(["a.png"], target="(a"), "is not a regular expression"),
        (lambda: ImageClassificationData.from_files(["a.png"], target="a"), "has no group"),
        (lambda: ImageClassificationData.from_files(["b.png"], target="(zz)"), r"train_files\[0\]: .* does not match"),
        (
            lambda: ImageClassificationData.from_images([Image.new("L", (4, 4))] * 2, ["a", None]),
            r"train_images\[1\] is empty",
        ),
        (lambda: ImageClassificationData.from_data_frame("x", "y", 5), "must be a data frame"),
        (lambda: ImageClassificationData.from_files(["a.png"], ["a"], batchsize=3), "did you mean 'batch_size'"),
    ],
)
def test_arguments_that_cannot_be_used(make, words):
    with pytest.raises((UsageError, BadDataError), match=words):
        make()


def test_rows_of_all_tables_are_in_one_error(folder):
    train = written(folder, [*good(6), "07.png"])
    text = refused("file", "kind", train, written(folder, ["08.png,a", "09.png"], "val.csv"))
    assert "train_file and val_file have 2 problems (row of another length: 2)" in text
    assert "cells.csv, line 8 has 1 cells" in text
    assert "val.csv, line 3 has 1 cells" in text


def test_a_quotation_mark_that_is_not_closed_is_named(folder):
    text = refused("file", "kind", written(folder, [*good(6), '"07.png,a', "08.png,b"]))
    assert "fix: close the quotation mark in line 8" in text


def test_a_cell_that_is_too_long_is_not_called_another_encoding(folder):
    text = refused("file", "kind", written(folder, [*good(6), f'07.png,"{"x" * 140_000}']))
    assert "cannot be read as CSV" in text
    assert "UTF-8" not in text


def test_columns_without_a_name_are_counted(folder):
    text = refused("file", "kind", written(folder, ["00.png,a,,"], head="file,kind,,"))
    assert "has 2 columns without a name" in text


def test_a_name_in_the_header_may_hold_a_line_break(folder):
    table = written(folder, good(), head='file,"the\nkind"')
    data = ImageClassificationData.from_csv("file", "the\nkind", table)
    assert data.labels == ("a", "b")
    assert data.sizes() == {"train": 12}


def test_two_ways_to_say_what_validates_are_refused(folder):
    rows = [f"{line},{'val' if row % 4 == 3 else 'train'}" for row, line in enumerate(good())]
    table = written(folder, rows, head="file,kind,part")
    with pytest.raises(UsageError, match="val_split and split_field both define the validation data"):
        ImageClassificationData.from_csv("file", "kind", table, split_field="part", val_split=0.25)
    only_train = written(folder, [f"{line},train" for line in good()], head="file,kind,part")
    data = ImageClassificationData.from_csv("file", "kind", only_train, split_field="part", val_split=0.25)
    assert data.sizes() == {"train": 9, "val": 3}


def failing(path):
    raise KeyError(path[-6:])


def test_functions_that_fail_name_the_row(folder):
    table = written(folder, good())
    with pytest.raises(BadDataError, match=r"cells.csv, line 2, column 'file': resolver fails\n  why: KeyError"):
        ImageClassificationData.from_csv("file", "kind", table, resolver=failing)
    with pytest.raises(UsageError, match="resolver must be a function"):
        ImageClassificationData.from_csv("file", "kind", table, resolver="photos")
    with pytest.raises(BadDataError, match=r"target fails for train_files\[0\], .*00.png'\n  why: KeyError"):
        ImageClassificationData.from_files(folder, target=failing)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("00.png", "must be a list of files, or a folder"),
        ([1, 2], "must be a list of paths, not of int"),
    ],
)
def test_what_is_no_list_of_files(files, words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=words):
        ImageClassificationData.from_files(files, ["a", "b"])


def test_files_and_targets_may_be_generators(folder):
    paths, kinds = zip(*(line.split(",") for line in good()), strict=True)
    data = ImageClassificationData.from_files((folder / path for path in paths), (kind for kind in kinds))
    assert data.recipe()["from_files"]["train_targets"] == list(kinds)
    assert data.sizes() == {"train": 12}
    with pytest.raises(UsageError, match="a regular expression or a function, not 3"):
        ImageClassificationData.from_files(folder, target=3)


def test_a_path_that_no_file_can_have_is_shortened(folder):
    text = refused("file", "kind", written(folder, [*good(), f"{'y' * 10_000}.png,a"]))
    assert len(text) < 1_000
    assert "line 14, column 'file': the file does not exist" in text


@pytest.mark.parametrize("fields", ["file", ["kind", "kind"], ["kind", "file"]])
def test_a_column_is_used_once(fields, folder):
    with pytest.raises(UsageError, match="is used twice: images are in 'file'"):
        ImageClassificationData.from_csv("file", fields, written(folder, good()))
