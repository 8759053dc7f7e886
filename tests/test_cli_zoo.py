"""`flashtask zoo`: lists, filters, and shows what there is to build with."""

from __future__ import annotations

import json

import pytest

from flashtask.backbones import BACKBONES
from flashtask.cli import run
from flashtask.core.zoo import load_zoo
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
    assert all(entry["kind"] in ("task", "head", "recipe", "checkpoint", "backbone") for entry in entries)
    assert [entry["name"] for entry in entries if entry["kind"] == "recipe"] == list(load_zoo().recipes)


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
    # More names are near where the extra `segmentation` is installed.
    assert "did you mean 'linear'" in error
    assert "`flashtask zoo --kind head` lists all" in error


def test_a_query_with_signs_is_an_expression_for_the_whole_name(capsys):
    names = [str(entry["name"]) for entry in listed(capsys, "resnet(18|34)")]
    assert names == ["timm/resnet18", "timm/resnet34", "torchvision/resnet18", "torchvision/resnet34"]
    assert run(["zoo", "resnt*"]) == 2
    error = capsys.readouterr().err
    assert "no entry matches 'resnt*'" in error
    assert "'.*resnt.*'" in error
    assert run(["zoo", "resnet("]) == 2
    assert "is not a regular expression" in capsys.readouterr().err


def test_filters_ask_for_backbones(capsys):
    options = "--max-params 12M --input-size 224 --licence apache-2.0 --source timm --pretrained"
    names = [str(entry["name"]) for entry in listed(capsys, "resnet(18|34)d?", *options.split())]
    assert names == ["timm/resnet18", "timm/resnet18d"]
    found = listed(capsys, "--cached", "--source", "zoo")
    assert "efficientnet_lite0" in [entry["name"] for entry in found]
    assert all(entry["kind"] == "backbone" for entry in found)
    assert [entry["name"] for entry in listed(capsys, "heads", "--source", "flashtask")] == [
        name
        for name in HEADS.names()
        if "/" not in name  # those of segmentation-models-pytorch
    ]


def test_filters_that_nothing_passes_say_so_and_list_nothing(capsys):
    assert run(["zoo", "resnet18", "--input-size", "999x3", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == []
    assert printed.err == "no backbone passes these filters\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-params", "10Q"], "'10Q' is not a number above 0 such as 500k or 10M"),
        (["--input-size", "2x2x2"], "'2x2x2' is not a number of pixels such as 224, or 224x192"),
        pytest.param(["--licence", "apach-2.0"], "did you mean 'apache-2.0'", marks=pytest.mark.long),
        pytest.param(["--source", "tim"], "did you mean 'timm'", marks=pytest.mark.long),
        (["heads", "--max-params", "1M"], "--max-params cannot filter heads"),
        pytest.param(["recipes", "--licence", "mit"], "--licence cannot filter recipes", marks=pytest.mark.long),
        pytest.param(["resnte18", "--cached"], "did you mean 'resnet18'", marks=pytest.mark.long),
        (["--max-parms", "3"], "did you mean --max-params"),
        (["check"], "`flashtask zoo check` needs one file"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(argv, message, capsys):
    assert run(["zoo", *argv]) == 2
    assert message in capsys.readouterr().err


def test_show_tells_size_licence_and_who_made_it(capsys):
    assert run(["zoo", "show", "test_resnet.r160_in1k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "credit: PyTorch Image Models by Ross Wightman and contributors" in lines
    assert "licence: apache-2.0" in lines
    assert "input_size: [3, 160, 160]" in lines
    assert "repository: timm/test_resnet.r160_in1k" in lines
    assert any(line.startswith("num_params: ") and "," in line for line in lines)
    assert run(["zoo", "show", "torchvision/resnet18", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["credit"] == "torchvision by the PyTorch contributors"
    assert (entry["num_params"], entry["parameters_with_classifier"]) == (11_176_512, 11_689_512)
    assert run(["zoo", "show", "resnet18.a1_in2k"]) == 2
    assert "did you mean 'a1_in1k'" in capsys.readouterr().err


def test_show_prints_a_recipe(capsys):
    assert run(["zoo", "show", "linear_probe", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["recipe"]["finetune"] == {"strategy": "freeze"}
    assert "expected" not in entry, "it was not measured"
