"""Licences of the code, the pretrained weights, the data and the weights: stored, repeated, and what follows."""

from __future__ import annotations

import json

import pytest
from small import colour_folders

import flashtask
from flashtask import ImageClassifier
from flashtask.cli import run
from flashtask.core.checkpoint import read_checkpoint, write_checkpoint
from flashtask.core.errors import UsageError
from flashtask.core.licence_terms import Part, conclusions, terms_of
from flashtask.tasks.export.facts import facts_of
from flashtask.tasks.licences import noted_licence, parts_of

TRAIN = ["--backbone", "timm/test_resnet", "--no-pretrained", "--epochs", "1", "--quiet", "--no-report"]
CODE = {"flashtask": "Apache-2.0", "timm": "Apache-2.0"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(colour_folders(tmp_path_factory.mktemp("data"), each=4, size=32))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run whose data and weights have a licence."""
    folder = str(tmp_path_factory.mktemp("runs") / "RUN")
    stated = ["--licence", "MIT", "--data-licence", "cc-by-nc-4.0"]
    assert run(["finetune", data, *TRAIN, *stated, "--output-dir", folder]) == 0
    return folder


def model_of(**licences):
    made = ImageClassifier("timm/test_resnet", labels=("a", "b"), pretrained=False)
    made.licences = licences
    return made


# ---- what follows from one


@pytest.mark.parametrize(
    ("given", "name", "attribution", "share_alike", "commercial"),
    [
        ("MIT", "MIT", True, False, True),
        ("apache-2.0", "Apache-2.0", True, False, True),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0", True, False, False),
        ("CC-BY-SA-4.0", "CC-BY-SA-4.0", True, True, True),
        ("agpl-3.0", "AGPL-3.0-only", True, True, True),
        ("gpl-3.0", "GPL-3.0-only", True, True, True),
        ("openrail", "OpenRAIL", True, False, True),
        ("cc0-1.0", "CC0-1.0", False, False, True),
        ("unknown", "unknown", None, None, None),
        (None, "unknown", None, None, None),
        ("proprietary", "proprietary", None, None, None),
        ("https://example.org/LICENSE", "https://example.org/LICENSE", None, None, None),
        ("MIT OR GPL-3.0-only", "MIT OR GPL-3.0-only", None, None, None),
    ],
)
def test_a_licence_by_any_name(given, name, attribution, share_alike, commercial):
    terms = terms_of(given)
    assert (terms.name, terms.attribution, terms.share_alike) == (name, attribution, share_alike)
    assert terms.commercial == commercial
    assert terms.words()


def test_conclusions_name_the_parts_that_they_come_from():
    parts = [Part("backbone", "vit", "cc-by-nc-4.0"), Part("data", "photos", None), Part("weights", "this", "MIT")]
    assert conclusions(parts) == [
        "no commercial use, because of: backbone (vit)",
        "attribution, keep notices and name the authors: backbone (vit), weights (this)",
        "unknown, so nothing is certain before somebody has found out: data (photos)",
        "MIT was given to the weights, but not everything that they are made of allows as much",
    ]
    assert conclusions([Part("weights", "this", "Unlicense")]) == []


def test_what_libraries_note_of_weights():
    assert noted_licence("efficientnet_lite0") == "Apache-2.0"
    assert noted_licence("timm/resnet18.a1_in1k") == "apache-2.0"
    assert noted_licence("timm/convnextv2_atto.fcmae_ft_in1k") == "cc-by-nc-4.0"
    assert noted_licence("torchvision/resnet18") is None
    assert noted_licence("no/such.thing") is None


# ---- where they are


def test_a_run_stores_what_was_stated_and_what_is_noted(trained, capsys):
    expected = {"code": CODE, "data": "cc-by-nc-4.0", "weights": "MIT"}
    assert read_checkpoint(f"{trained}/best.ckpt")["licences"] == expected
    assert run(["licence", trained]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:3] == [
        "code     Apache-2.0    flashtask: attribution, state changes",
        "code     Apache-2.0    timm: attribution, state changes",
        "data     CC-BY-NC-4.0  training data: attribution, no commercial use, state",
    ]
    assert "- no commercial use, because of: data (training data)" in lines
    assert run(["licence", trained, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(part["part"], part["licence"], part["commercial"]) for part in found["parts"]] == [
        ("code", "Apache-2.0", True),
        ("code", "Apache-2.0", True),
        ("data", "CC-BY-NC-4.0", False),
        ("weights", "MIT", True),
    ]
    assert found["conclusions"][0] == "no commercial use, because of: data (training data)"


@pytest.mark.long
def test_a_recipe_holds_them(trained, tmp_path):
    assert run(["finetune", f"{trained}/recipe.yaml", "--output-dir", str(tmp_path / "RUN"), "--quiet"]) == 0
    assert flashtask.load(tmp_path / "RUN").licences == {"data": "cc-by-nc-4.0", "weights": "MIT"}


def test_a_model_that_is_trained_further_lists_what_it_began_from(trained, data, tmp_path):
    more = ["--from", trained, "--epochs", "1", "--quiet", "--no-report", "--data-licence", "CC0-1.0"]
    assert run(["finetune", data, *more, "--output-dir", str(tmp_path / "RUN")]) == 0
    record = read_checkpoint(tmp_path / "RUN" / "best.ckpt")["licences"]
    began = {"name": "best.ckpt", "weights": "MIT", "data": "cc-by-nc-4.0"}
    assert record == {"code": CODE, "began_from": began, "data": "CC0-1.0", "weights": None}
    assert flashtask.load(tmp_path / "RUN").licences == {"data": "CC0-1.0"}


def test_a_loaded_model_keeps_them_in_folders_and_exports(trained, tmp_path):
    model = flashtask.load(trained)
    assert model.licences == {"data": "cc-by-nc-4.0", "weights": "MIT"}
    facts = facts_of(model, model.export_outputs(), True, None)
    assert facts["licence"] == "MIT"
    assert facts["licences"]["data"] == "cc-by-nc-4.0"
    assert facts["what_follows"][0] == "no commercial use, because of: data (training data)"
    assert facts_of(model, model.export_outputs(), True, "bsd-3-clause")["licences"]["weights"] == "bsd-3-clause"
    card = (model.save_pretrained(tmp_path / "own") / "README.md").read_text()
    assert "license: MIT" in card
    assert "- Licence of the data: cc-by-nc-4.0." in card
    assert "- no commercial use, because of: data (training data)" in card
    assert flashtask.load(tmp_path / "own").licences == model.licences
    model.save_pretrained(tmp_path / "other", licence="apache-2.0")
    assert flashtask.load(tmp_path / "other").licences["weights"] == "apache-2.0"
    assert model.licences["weights"] == "MIT"


def test_files_without_a_record_and_with_a_wrong_one_say_unknown(tmp_path, capsys):
    made = model_of()
    content = {"state_dict": made.state_dict(), "hyper_parameters": dict(made.hparams), **made.describe()}
    for wrong in (None, ["MIT"], {"code": "x", "backbone": 3, "began_from": [], "data": {}, "weights": "\x1b[2J" * 90}):
        content["licences"] = wrong
        if wrong is None:
            del content["licences"]
        write_checkpoint(tmp_path / "file.ckpt", content)
        assert run(["licence", str(tmp_path / "file.ckpt")]) == 0
        out = capsys.readouterr().out
        assert "unknown     training data: ask whoever made it" in out or isinstance(wrong, dict)
        parts = parts_of(wrong if isinstance(wrong, dict) else {})
        assert all(f"{part.name}{part.licence}".isprintable() for part in parts)
        flashtask.load(tmp_path / "file.ckpt")


def test_other_words_and_values_are_refused(data, capsys):
    with pytest.raises(UsageError, match="no key 'wieghts'"):
        model_of(wieghts="MIT")
    with pytest.raises(UsageError, match="must be a licence"):
        model_of(weights=3)
    assert run(["finetune", data, *TRAIN, "--set", "licences.date=MIT"]) == 2
    assert "did you mean 'data'" in capsys.readouterr().err
