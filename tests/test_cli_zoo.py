"""`flashtask zoo`: lists, filters, and shows what there is to build with."""

from __future__ import annotations

import json

import pytest

from flashtask.backbones import BACKBONES
from flashtask.cli import run
from flashtask.heads import HEADS
from flashtask.tasks import TASKS


def listed(capsys, *argv: str) -> list[dict[str, object]]:
    assert run(["zoo", *argv, "--json"]) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return found


def test_everything_is_listed_with_name_and_kind(capsys):
    entries = listed(capsys)
    names = {kind: [e["name"] for e in entries if e["kind"] == kind] for kind in ("task", "head", "backbone")}
    assert names["backbone"] == BACKBONES.names()
    assert names["head"] == HEADS.names()
    assert names["task"] == TASKS.names()
    assert all(entry["kind"] in ("task", "head", "checkpoint", "backbone") for entry in entries)


@pytest.mark.parametrize("argv", [["--kind", "head"], ["heads"], ["head"]])
def test_one_kind_can_be_asked_for(argv, capsys):
    assert [entry["name"] for entry in listed(capsys, *argv)] == HEADS.names()


def test_a_query_is_a_part_of_the_name_in_any_case(capsys):
    names = [str(entry["name"]) for entry in listed(capsys, "ResNet18")]
    assert "timm/resnet18" in names
    assert "torchvision/resnet18" in names
    assert all("resnet18" in name for name in names)


def test_the_table_has_a_line_an_entry(capsys):
    assert run(["zoo", "heads"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "head"] for name in HEADS.names()]


def test_the_table_is_cut_at_the_width_that_is_given(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert run(["zoo"]) == 0
    whole = capsys.readouterr().out.splitlines()
    assert max(map(len, whole)) > 80
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["zoo"]) == 0
    cut = capsys.readouterr().out.splitlines()
    assert max(map(len, cut)) <= 80
    assert [line.split()[0] for line in cut] == [line.split()[0] for line in whole]
    assert any(line.endswith("...") for line in cut)


def test_show_tells_what_is_known_of_one_name(capsys):
    assert run(["zoo", "show", "resnet18"]) == 0
    text = capsys.readouterr().out
    assert "name: timm/resnet18\n" in text
    assert "kind: backbone\n" in text
    assert run(["zoo", "show", "efficientnet_lite0", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["licence"] == "Apache-2.0"
    assert entry["kind"] == "backbone"


def test_an_unknown_name_is_answered_with_the_nearest(capsys):
    assert run(["zoo", "show", "resnte18"]) == 2
    assert "did you mean 'resnet18'" in capsys.readouterr().err
    assert run(["zoo", "lineer", "--kind", "head"]) == 2
    error = capsys.readouterr().err
    assert "no head named 'lineer'" in error
    assert "did you mean 'linear'? `flashtask zoo --kind head` lists all" in error
