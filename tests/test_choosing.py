"""Where nobody names the task, it is taken from the data if one reading is possible, else asked for with candidates."""

from __future__ import annotations

import pytest
from dense_task import PointFinder

from flashtask import TASKS
from flashtask.cli import run
from flashtask.core.errors import UsageError
from flashtask.tasks.choosing import choose_task


def table(folder, columns, count=60):
    """A table of images that need not be there: only its cells are looked at."""
    lines = [",".join(["file", *columns])]
    lines += [",".join([f"{row}.png", *(str(make(row)) for make in columns.values())]) for row in range(count)]
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def chosen(path, **arguments):
    return choose_task("from_csv", {"train_file": str(path), **arguments})


@pytest.mark.parametrize(
    ("columns", "task", "words"),
    [
        ({"kind": lambda row: "ab"[row % 2]}, "image_classification", "2 different labels in the column 'kind'"),
        ({"kind": lambda row: ["3", "b"][row % 2]}, "image_classification", "2 different labels"),
        ({"weight": lambda row: row * 1.37}, "image_regression", "60 different numbers in the column 'weight'"),
        ({"age": lambda row: row + 20}, "image_regression", "60 different numbers"),
        ({"share": lambda row: (row % 25) / 25}, "image_regression", "25 different numbers"),
        (
            {"x": lambda row: row % 5, "y": lambda row: row * 0.5},
            "image_regression",
            "5, 60 different numbers in the col",
        ),
        ({"a": lambda row: row % 2, "b": lambda row: row % 3 % 2}, "image_classification", "2 columns of 0 and 1"),
    ],
)
def test_data_with_one_reading_needs_no_task(tmp_path, columns, task, words):
    name, why = chosen(table(tmp_path, columns), target_fields=list(columns))
    assert name == task
    assert words in why


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "make", [lambda row: row % 5, lambda row: row % 4 / 3, lambda row: row % 2, lambda row: row % 30]
)
def test_numbers_that_may_be_classes_are_asked_about(tmp_path, make):
    path = table(tmp_path, {"stage": make})
    with pytest.raises(UsageError, match="Possible are image_classification, image_regression") as caught:
        chosen(path)
    assert "--task image_classification" in str(caught.value)
    assert "different numbers in the column 'stage'" in str(caught.value)


def test_columns_that_serve_another_purpose_are_no_targets(tmp_path):
    path = table(tmp_path, {"kind": lambda row: "ab"[row % 2], "site": lambda row: row, "w": lambda row: row})
    assert chosen(path, group_field="site", weight_field="w")[0] == "image_classification"
    with pytest.raises(UsageError, match="which column holds the targets"):
        chosen(path, group_field="site")


def test_a_task_of_another_package_is_not_taken_by_itself(tmp_path):
    TASKS.register("a_point", PointFinder)
    try:
        name, _ = chosen(table(tmp_path, {"x": lambda row: row * 1.5, "y": lambda row: row}), target_fields=["x", "y"])
        assert name == "image_regression"
    finally:
        TASKS.remove("a_point")


def test_a_column_that_nothing_reads_names_the_tasks(tmp_path):
    path = table(tmp_path, {"a": lambda row: "x", "b": lambda row: row})
    with pytest.raises(UsageError, match="None of those that were found reads it"):
        chosen(path, target_fields=["a", "b"])


def test_the_command_line_asks_before_anything_is_built(tmp_path, capsys):
    path = table(tmp_path, {"stage": lambda row: row % 5})
    assert run(["finetune", str(path), "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "which task is the data for? Possible are image_classification, image_regression" in error
    assert "fix: --task image_classification" in error
    assert not (tmp_path / "run").exists()
