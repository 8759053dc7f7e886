"""Every row of the tables in docs/from-lightning.md is true of the package."""

from __future__ import annotations

import ast
import builtins
import inspect
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.onnx

import flashtask
from flashtask import Callback, DataModule, Module, Trainer
from flashtask.core.errors import UsageError
from flashtask.trainer.lightning1.older_arguments import UNDERSTOOD
from flashtask.trainer.lightning1.trainer_base import NOT_THERE

PAGE = (Path(__file__).parent.parent / "docs" / "from-lightning.md").read_text()
STATUSES = ("same", "renamed", "instead", "absent")
TRAINER = Trainer(logger=False, enable_progress_bar=False)
ARGUMENTS = {*inspect.signature(Trainer).parameters} - {"older"}
#: methods of a module that are there only to say what does it instead
EXPORTS = ("to_onnx", "to_tensorrt", "to_torchscript")
#: section -> the names that are there
NAMES = {
    "Trainer arguments": ARGUMENTS | {"auto_select_gpus"},
    "Trainer attributes": {*dir(TRAINER)},
    "Module": {*dir(Module())} - {*EXPORTS},
    "DataModule": {*dir(DataModule())},
    "Callback": {*dir(Callback())},
    "Callback classes": {*dir(flashtask)},
    "Tuner and plugins": {*dir(flashtask)},
    "Loggers": {*dir(flashtask)},
}
#: what the beginnings of expressions in the last column mean
KNOWN: dict[str, Any] = {"trainer": TRAINER, "self": Module(), "torch": torch, "os": os, "inspect": inspect}


class Row(NamedTuple):
    section: str
    name: str
    versions: str
    status: str
    text: str

    @property
    def expressions(self) -> list[str]:
        return re.findall(r"`([^`]+)`", self.text)


def rows_of(page: str) -> list[Row]:
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    found = [(part.split("\n", 1)[0], line) for part in sections for line in part.splitlines() if line[:3] == "| `"]
    cells = [(section, [cell.strip() for cell in line.strip("|").split(" | ")]) for section, line in found]
    return [Row(section, name.strip("`"), *rest) for section, (name, *rest) in cells]


ROWS = rows_of(PAGE)


def with_status(*statuses: str) -> Any:
    chosen = [row for row in ROWS if row.status in statuses]
    return pytest.mark.parametrize("row", chosen, ids=[f"{row.section}: {row.name}" for row in chosen])


def test_the_counts_at_the_beginning_are_those_of_the_tables():
    counts = re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE.split("\n## ")[0], flags=re.MULTILINE)
    assert [(status, int(count)) for status, count in counts] == [
        (status, sum(row.status == status for row in ROWS)) for status in STATUSES
    ]


def test_every_row_has_one_name_known_versions_and_a_known_status():
    assert {row.section for row in ROWS} == set(NAMES)
    assert len({(row.section, row.name) for row in ROWS}) == len(ROWS)
    assert {row.versions for row in ROWS} == {"1.6", "2.6", "both"}
    assert {row.status for row in ROWS} == set(STATUSES)
    assert [row.name for row in ROWS if row.status == "absent" and not row.text] == []


@with_status("same")
def test_what_is_the_same_is_there(row):
    assert row.name in NAMES[row.section]


@with_status("renamed", "instead", "absent")
def test_what_is_not_the_same_is_not_there(row):
    assert row.name not in NAMES[row.section]


@with_status("renamed", "instead")
def test_what_takes_the_place_of_a_name_is_written_down(row):
    assert row.expressions


@pytest.mark.parametrize("row", [r for r in ROWS if r.expressions], ids=lambda row: f"{row.section}: {row.name}")
def test_what_the_last_column_says_exists(row):
    assert [wrong for text in row.expressions for wrong in unknown_names(text, NAMES[row.section])] == []


@pytest.mark.parametrize("row", [r for r in ROWS if r.section == "Trainer arguments"], ids=lambda row: row.name)
def test_arguments_are_accepted_or_answered_with_what_to_write(row):
    if row.status in ("same", "renamed"):
        assert row.name in ARGUMENTS or row.name in UNDERSTOOD
    else:
        with pytest.raises(UsageError, match=f"no argument '{row.name}'") as caught:
            Trainer(**{row.name: 1})
        assert caught.value.fix
        assert "help(Trainer)" not in caught.value.fix


def test_the_errors_for_attributes_of_the_trainer_are_the_texts_of_the_table():
    rows = [row for row in ROWS if row.section == "Trainer attributes" and row.status != "same"]
    texts = {row.name: re.sub(r"\[([^]]+)\]\([^)]+\)", r"docs/\1", row.text).replace("`", "") for row in rows}
    assert texts == NOT_THERE


@pytest.mark.parametrize("name", EXPORTS)
def test_what_exports_a_module_is_named_as_in_the_table(name):
    (row,) = [row for row in ROWS if row.section == "Module" and row.name == name]
    with pytest.raises(UsageError, match=f"Module has no {name}") as caught:
        getattr(Module(), name)("model.onnx", input_sample=torch.zeros(1, 4))
    assert caught.value.fix in row.expressions


def test_the_other_names_of_module_and_data_module_are_there():
    assert flashtask.LightningModule is Module
    assert flashtask.LightningDataModule is DataModule


# ---- what code in the last column names


def unknown_names(text: str, local: set[str]) -> list[str]:
    """Names in a piece of code that are not there, and arguments that a call does not have.

    Args:
        text: an expression or an assignment. Bare arguments of calls, such as `model`, are not looked up.
        local: names that may be written without anything before them.
    """
    tree = ast.parse(text)
    given = {id(one) for call in ast.walk(tree) if isinstance(call, ast.Call) for one in call.args}
    given |= {id(one.value) for call in ast.walk(tree) if isinstance(call, ast.Call) for one in call.keywords}
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and id(node) not in given and resolved(node, local) is None:
            wrong.append(node.id)
        elif isinstance(node, ast.Attribute) and not has_attribute(node, local):
            wrong.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            wrong += [f"{ast.unparse(node.func)}({name}=)" for name in unknown_arguments(node, local)]
    return wrong


def resolved(node: ast.expr, local: set[str]) -> Any:
    """What a name or `a.b` stands for: the object, True for something there that has no value yet, or None."""
    if isinstance(node, ast.Name):
        if node.id in KNOWN:
            return KNOWN[node.id]
        if node.id in dir(flashtask):
            return getattr(flashtask, node.id)
        return getattr(builtins, node.id, None) or (True if node.id in local else None)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, local)
        return None if owner is None or owner is True else inspect.getattr_static(owner, node.attr, None) or True
    return None


def has_attribute(node: ast.Attribute, local: set[str]) -> bool:
    owner = resolved(node.value, local)
    if owner is None or owner is True or isinstance(owner, property):  # its value is known only in a run
        return True
    return node.attr in dir(owner)


def unknown_arguments(call: ast.Call, local: set[str]) -> list[str]:
    called = resolved(call.func, local)
    called = getattr(called, "__func__", called)
    if called is Trainer:
        return [one.arg for one in call.keywords if one.arg not in ARGUMENTS | {*UNDERSTOOD}]
    try:
        parameters = inspect.signature(called).parameters
    except (TypeError, ValueError):
        return []
    return [one.arg for one in call.keywords if one.arg not in parameters]


@pytest.mark.parametrize(
    "text",
    [
        "Trainer(max_epoch=1)",
        "Trainner()",
        "trainer.fitt(model)",
        "trainer.fit(model, checkpoint=path)",
        "ModelCheckpoint(folder=path)",
        "Trainer(callbacks=[ModelSummary(depth=1)])",
        "torch.jit.tracing(model)",
        "on_nothing",
        "self.on_nothing()",
    ],
)
def test_a_name_that_is_not_there_is_found(text):
    assert unknown_names(text, NAMES["Module"])
