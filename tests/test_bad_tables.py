"""What can be wrong with a table, for every task that reads one: file, row and column are named, all at once."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from flashtask import ImageClassificationData, ImageRegressionData, ObjectDetectionData, SemanticSegmentationData
from flashtask.cli import run
from flashtask.core.errors import BadDataError


class Task:
    """A task with good rows for it: `target` is the column that the faults are in."""

    def __init__(self, data, head, row, options, words):
        self.data, self.head, self.row, self.options, self.words = data, head.split(","), row, options, words
        self.target = self.head[-1]

    def rows(self):
        return [self.row(number) for number in range(8)]


def _box(number):
    return [f"{number}.png", "1", "1", "8", "9", "ab"[number % 2]]


TASKS = {
    "classification": Task(
        ImageClassificationData,
        "file,kind",
        lambda number: [f"{number}.png", "ab"[number % 2]],
        {"target_fields": "kind"},
        ["--target", "kind"],
    ),
    "multi-label": Task(
        ImageClassificationData,
        "file,kind",
        lambda number: [f"{number}.png", ["a;b", "b", "a"][number % 3]],
        {"target_fields": "kind", "label_separator": ";"},
        ["--target", "kind", "--delimiter", ";"],
    ),
    "regression": Task(
        ImageRegressionData,
        "file,kind",
        lambda number: [f"{number}.png", str(number / 4)],
        {"target_fields": "kind"},
        ["--target", "kind", "--task", "image_regression"],
    ),
    "segmentation": Task(
        SemanticSegmentationData,
        "file,kind",
        lambda number: [f"{number}.png", f"mask{number}.png"],
        {"target_fields": "kind"},
        ["--target", "kind", "--task", "semantic_segmentation"],
    ),
    "detection": Task(ObjectDetectionData, "file,x1,y1,x2,y2,label", _box, {}, ["--task", "object_detection"]),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 2, (16, 16), dtype=np.uint8)).save(folder / f"mask{number}.png")
    return folder


def written(folder, head, rows, encoding="utf-8"):
    table = folder / "all.csv"
    table.write_bytes("".join(f"{','.join(row)}\n" for row in [head, *rows]).encode(encoding))
    return table


def with_cell(task, row, column, value):
    rows = task.rows()
    rows[row][task.head.index(column)] = value
    return task.head, rows


def with_part(task, row, column, value):
    head, rows = with_cell(task, row, column, value)
    return [*head, "part"], [[*cells, "val" if number > 5 else "train"] for number, cells in enumerate(rows)]


#: Name -> the table, with a function of the task; further options; and what is named, by task or for all.
FAULTS = {
    "a missing column": (
        lambda task: (task.head[:-1], [row[:-1] for row in task.rows()]),
        {},
        {
            "": "no column 'kind'; there are: 'file'",
            "detection": "columns of boxes are not known; there are: 'file', 'x1'",
        },
    ),
    "two missing columns": (
        lambda task: (task.head, task.rows()),
        {"input_field": "fil", "group_field": "sit"},
        {"": r"no columns 'fil', 'sit'; there are: 'file', .*did you mean 'file'"},
    ),
    "an empty cell for the image": (
        lambda task: with_cell(task, 3, "file", ""),
        {},
        {"": "all.csv, line 5, column 'file' is empty"},
    ),
    "an empty cell for the target": (
        lambda task: with_cell(task, 3, task.target, ""),
        {},
        {"": "all.csv, line 5, column '(kind|label)' is empty", "multi-label": None},
    ),
    "a path that leads nowhere": (
        lambda task: with_cell(task, 3, "file", "gone.png"),
        {},
        {"": "all.csv, line 5, column 'file': the file does not exist: '.*gone.png'.*(images_root|on_bad_image)="},
    ),
    "a NaN target": (
        lambda task: with_cell(task, 3, task.head[1], "NaN"),
        {},
        {"": "all.csv, line 5, column '(kind|x1)': '?(NaN'|the mask does not exist: .*NaN')"},
    ),
    "a duplicate row with another label": (
        lambda task: (task.head, [*task.rows(), [task.row(0)[0], *task.row(1)[1:]]]),
        {},
        {
            "": "all.csv, line 10, column 'file': '0.png' has the target '.*', and '.*' in all.csv, line 2",
            "detection": "all.csv, line 10: 1, 1, 8, 9 is 'b', and 'a' in all.csv, line 2",
        },
    ),
    "a label in one part only": (
        lambda task: with_part(task, 7, task.target, "zz"),
        {"split_field": "part"},
        {
            "": "all.csv, line 9, column 'kind': 'zz' is in val only, not in train",
            "regression": "all.csv, line 9, column 'kind': 'zz' is not a number",
            "segmentation": "all.csv, line 9, column 'kind': the mask does not exist: '.*zz'",
            "detection": "'zz'",
        },
    ),
    "a delimiter that never occurs": (
        lambda task: (task.head, task.rows()),
        {"label_separator": "|"},
        {
            "classification": r"label_separator='\|' occurs in none of 8 rows",
            "multi-label": r"label_separator='\|' occurs in none of 8 rows",
        },
    ),
    "another encoding": (
        lambda task: (task.head, [*task.rows(), ["caf\xe9.png", *task.row(0)[1:]]]),
        {"encoding": "latin-1"},
        {"": "all.csv' is not a table in UTF-8.*line 10 has the byte 0xe9.*iconv -f LATIN1"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", TASKS)
def test_the_place_is_named(name, fault, pictures):
    make, options, words = FAULTS[fault]
    expected = words.get(name, words.get(""))
    if expected is None:
        return  # the task allows it, or has no such option
    task = TASKS[name]
    head, rows = make(task)
    options = dict(options)
    table = written(pictures, head, rows, options.pop("encoding", "utf-8"))
    given = {"input_field": "file", "train_file": table, **task.options, **options}
    with pytest.raises(BadDataError) as caught:
        task.data.from_csv(**given)
    assert re.search(expected, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("name", TASKS)
def test_all_faults_are_in_one_error_of_the_command_that_writes_nothing(name, pictures, monkeypatch, capsys):
    task = TASKS[name]
    rows = task.rows()
    rows[3][0], rows[4][0], rows[6][1] = "gone.png", "", "NaN"
    table = written(pictures, task.head, rows)
    monkeypatch.chdir(pictures)
    before = sorted(path.name for path in pictures.iterdir())
    assert run(["finetune", str(table), "--input", "file", *task.words, "--output-dir", "run"]) == 65
    said = capsys.readouterr().err
    for line, column in ((5, "file"), (6, "file"), (8, task.head[1])):
        assert f"all.csv, line {line}, column '{column}'" in said
    assert re.search(r"fix: .*(--root FOLDER|--on-bad-image skip)", said)
    assert sorted(path.name for path in pictures.iterdir()) == before
