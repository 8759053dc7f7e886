"""`flashtask compare`, `runs` and `rerun`: counted by hand from the rows of `predict`, and down to the bit."""

import json
import shutil

import pytest
from browser import needs_browser, opened
from small import colour_folders

from flashtask.cli import run
from flashtask.reports.comparison import data_that_differ, mcnemar, settings_that_differ


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs on the same split that differ in their learning rate."""
    root = tmp_path_factory.mktemp("compared")
    colour_folders(root / "data", each=20)
    words = ["--backbone", "timm/test_resnet", "--no-pretrained", "--quiet", "--no-report", "--val-split", "0.5"]
    for name, rate in (("one", "0.05"), ("two", "0.00001")):
        options = [*words, "--lr", rate, "--epochs", "2", "--output-dir", str(root / "runs" / name)]
        assert run(["finetune", str(root / "data"), *options]) == 0
    return root


def wrong_names(folder, name, capsys):
    """The validation images that a run gets wrong, by the rows of `predict`."""
    rows = (line.split(",") for line in (folder / "runs" / name / "split.csv").read_text().splitlines())
    images = [file for part, file in rows if part == "val"]
    capsys.readouterr()
    paths = [str(folder / "data" / image) for image in images]
    assert run(["predict", str(folder / "runs" / name), *paths, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return {image for image, row in zip(images, found, strict=True) if row["label"] != image.split("/")[0]}


def test_flips_and_accuracy_are_those_of_the_rows_of_predict(folder, capsys):
    one, two = (wrong_names(folder, name, capsys) for name in ("one", "two"))
    assert run(["compare", str(folder / "runs/one"), str(folder / "runs/two"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["one", "two"]
    assert found["samples"] == [20, 20]
    (difference,) = found["differences"]
    assert set(difference["became_right"]) == one - two
    assert set(difference["became_wrong"]) == two - one
    assert difference["difference"]["value"] == pytest.approx((len(one) - len(two)) / 20, abs=1e-6)
    assert difference["mcnemar_p"] == pytest.approx(mcnemar(len(one - two), len(two - one)))
    accuracy = found["metrics"]["val_accuracy"]
    assert accuracy == pytest.approx([1 - len(one) / 20, 1 - len(two) / 20], abs=1e-6)
    assert found["settings"]["model.learning_rate"] == [0.05, 0.00001]
    assert "trainer.max_epochs" not in found["settings"]


def test_the_table_fits_80_columns_and_the_page_opens(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run(["compare", str(folder / "runs/one"), str(folder / "runs/two"), "--output", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert any("McNemar p = " in line for line in lines)
    assert page.stat().st_size < 5e6
    text = page.read_text()
    assert "model.learning_rate" in text
    assert "<script" not in text


@needs_browser
def test_the_page_in_a_browser(folder, tmp_path):
    page = tmp_path / "page.html"
    assert run(["compare", str(folder / "runs/one"), str(folder / "runs/two"), "--output", str(page)]) == 0
    with opened() as tab:
        tab.open(page.as_uri(), width=390)
        assert tab.run("document.documentElement.scrollWidth") <= 390
        assert tab.errors == []
        assert all(one.startswith(("file:", "data:")) for one in tab.requests)


def test_runs_that_were_validated_on_other_samples_are_told_apart(folder, tmp_path, capsys):
    words = ["--backbone", "timm/test_resnet", "--no-pretrained", "--quiet", "--no-report"]
    words += ["--set", "data.from_folders.split_seed=3"]
    assert (
        run(["finetune", str(folder / "data"), *words, "--epochs", "1", "--output-dir", str(tmp_path / "other")]) == 0
    )
    capsys.readouterr()
    assert run(["compare", str(folder / "runs/one"), str(tmp_path / "other")]) == 0
    assert "they were validated on different samples: 20 and 8" in " ".join(capsys.readouterr().out.split())
    options = ["--data", str(folder / "data"), "--json"]
    assert run(["compare", str(folder / "runs/one"), str(tmp_path / "other"), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == [40, 40]
    assert found["data"]["train samples"] == [20, 32]
    assert found["data"]["val samples"] == [20, 8]
    common = found["data"]["train samples of the first"]
    assert common[0] == 20
    assert 12 <= common[1] <= 20
    assert found["data"]["train samples of the first, with its target"] == common


def test_runs_are_listed_as_a_page(folder, tmp_path, capsys):
    page = tmp_path / "runs.html"
    assert run(["runs", str(folder), "--output", str(page)]) == 0
    assert f"page: {page}" in capsys.readouterr().out
    assert run(["runs", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    text = page.read_text()
    assert all(f">{row['run']}<" in text for row in rows)
    assert f"<b>{min(row['val_loss'] for row in rows):.4f}</b>" in text
    assert f"<b>{max(row['val_loss'] for row in rows):.4f}</b>" not in text
    assert "<script" not in text


def test_runs_are_listed_sorted_and_filtered(folder, capsys):
    assert run(["runs", str(folder), "--sort", "-val_loss", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["run"] for row in rows} == {"runs/one", "runs/two"}
    assert rows[0]["val_loss"] > rows[1]["val_loss"]
    limit = (rows[0]["val_loss"] + rows[1]["val_loss"]) / 2
    assert run(["runs", str(folder), "--where", f"val_loss<{limit}", "--where", "strategy=fre*", "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == [rows[1]["run"]]
    assert run(["runs", str(folder), "--where", "seed=7"]) == 0
    assert "no run fits" in capsys.readouterr().out
    assert run(["runs", str(folder), "--sort", "val_los"]) == 2
    assert "did you mean 'val_loss'" in capsys.readouterr().err
    assert run(["runs", str(folder), "--where", "nothing=1"]) == 2
    assert run(["runs", str(folder), "--where", "val_loss<x"]) == 2
    assert run(["runs", str(folder / "data")]) == 66


def test_a_run_is_repeated_to_the_bit_and_a_changed_one_is_not(folder, tmp_path, capsys):
    assert run(["rerun", str(folder / "runs/one"), "--output-dir", str(tmp_path / "again"), "--quiet"]) == 0
    assert "has the same bits" in capsys.readouterr().out
    changed = tmp_path / "changed"
    shutil.copytree(folder / "runs/one", changed)
    recipe = changed / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.05", "learning_rate: 0.04"))
    assert run(["rerun", str(changed), "--quiet", "--json"]) == 1
    out, err = capsys.readouterr()
    assert "train_loss of epoch 1" in err
    assert any("tensors differ" in line for line in json.loads(out)["differences"])


def test_mcnemars_test():
    # By hand: 2 * (1 + 9 + 36 + 84) / 2**9, and all of five on one side: 2 / 2**5.
    assert mcnemar(3, 6) == pytest.approx(260 / 512)
    assert mcnemar(0, 5) == pytest.approx(1 / 16)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1


def test_data_is_compared_by_names_and_targets():
    one = {"train": {"a": "cat", "b": "dog"}, "val": {"c": "cat"}}
    two = {"train": {"a": "cat", "b": "cat", "d": "dog"}, "val": {"c": "cat"}}
    assert data_that_differ([one, two, None]) == {
        "train samples": (2, 3, None),
        "train samples of the first": (2, 2, None),
        "train samples of the first, with its target": (2, 1, None),
    }
    assert data_that_differ([one, one]) == {}


def test_settings_are_compared_by_their_dotted_keys():
    one, two = {"a": {"b": 1, "c": {}}, "d": 2}, {"a": {"b": 3, "c": {}}, "e": None}
    assert settings_that_differ([one, two]) == {"a.b": [1, 3], "d": [2, None]}


def test_what_cannot_be_compared_is_refused(folder, tmp_path, capsys):
    assert run(["compare", str(folder / "runs/one")]) == 2
    assert run(["compare", str(folder / "runs/one"), str(tmp_path / "none")]) == 66
