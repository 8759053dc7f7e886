"""`flashtask sweep`: trials are runs of the recipe, a killed sweep goes on, and a space is checked before anything."""

import csv
import json
import os
import signal
import time

import pytest
import yaml
from small import colour_folders
from warm import start

from flashtask.cli import run
from flashtask.cli.recipe import Recipe
from flashtask.cli.search_space import search_space
from flashtask.core.errors import UsageError

pytest.importorskip("optuna")

PROGRAM = """
import sys
from flashtask.cli import run
sys.exit(run(sys.argv[1:]))
"""


def recipe(folder, **model):
    content = {
        "data": {"from_folders": {"train_folder": str(folder / "data"), "val_split": 0.25, "batch_size": 8}},
        "model": {"backbone": "timm/test_resnet", "pretrained": False, **model},
        "trainer": {"max_epochs": 2},
        "finetune": {"strategy": "freeze"},
    }
    path = folder / "open.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def folder(tmp_path):
    colour_folders(tmp_path / "data", each=12)
    return tmp_path


def rows_of(place):
    with (place / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_trials_are_runs_and_the_best_recipe_gives_the_best_run_again(folder, capsys):
    path = recipe(folder, head={"choose": ["linear", "mlp"]}, learning_rate={"log": ["1e-4", 0.1]})
    out = folder / "out"
    assert (
        run(["sweep", str(path), "--trials", "4", "--seed", "1", "--no-pruning", "--output-dir", str(out), "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in found["trials"]] == ["complete"] * 4
    for row in found["trials"]:
        place = out / "trials" / f"{row['trial']:03}"
        own = yaml.safe_load((place / "recipe.yaml").read_text())["model"]
        assert (own["head"], own["learning_rate"]) == (row["model.head"], row["model.learning_rate"])
        assert json.loads((place / "summary.json").read_text())["best"]["val_accuracy"] == row["value"]
    assert found["best"]["value"] == max(row["value"] for row in found["trials"])
    assert len({row["model.learning_rate"] for row in found["trials"]}) == 4
    assert run(["finetune", str(out / "best.yaml"), "--output-dir", str(folder / "again"), "--quiet"]) == 0
    again = json.loads((folder / "again/summary.json").read_text())["best"]
    assert again["val_accuracy"] == found["best"]["value"]

    capsys.readouterr()
    assert run(["sweep", str(path), "--trials", "5", "--output-dir", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5 trials:")
    assert max(map(len, lines[:4])) <= 80
    assert len(rows_of(out)) == 5


def test_a_killed_sweep_goes_on_and_loses_no_trial(folder):
    path, out = recipe(folder, learning_rate={"log": [1e-4, 0.1]}), folder / "out"
    words = ["sweep", str(path), "--trials", "3", "--seed", "0", "--no-pruning", "--output-dir", str(out)]
    process = start(PROGRAM, *words)
    while not (out / "trials/001/metrics.csv").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert run(words) == 0
    rows = rows_of(out)
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert {row["state"] for row in rows} == {"complete"}
    assert sorted(place.name for place in (out / "trials").iterdir()) == ["000", "001", "002"]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"log": [0, 1]}, "two numbers above 0"),
        ({"log": [1]}, "two numbers"),
        ({"uniform": [2, 1]}, "the smaller one first"),
        ({"integer": [1, 2.5]}, "two numbers"),
        ({"choose": ["a"]}, "two values or more"),
        (0.1, "leaves nothing open"),
    ],
)
def test_a_space_is_checked(space, said):
    with pytest.raises(UsageError, match=said):
        search_space(Recipe({"model": {"learning_rate": space}}))


def test_what_cannot_be_searched_is_named(folder, capsys):
    assert run(["sweep", str(folder / "none.yaml")]) == 66
    path = recipe(folder, head={"choose": ["linear", "linaer"]}, learning_rate=0.1)
    assert run(["sweep", str(path), "--trials", "3", "--seed", "0", "--output-dir", str(folder / "out")]) == 2
    assert "did you mean 'linear'" in capsys.readouterr().err
    path.write_text(path.read_text().replace("val_split: 0.25", "val_split: 0").replace("linaer", "mlp"))
    assert run(["sweep", str(path), "--trials", "1", "--output-dir", str(folder / "other")]) == 2
    assert "no validation data" in capsys.readouterr().err
