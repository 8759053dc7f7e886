"""A task outside the package is trained, measured, stored and asked like those inside it, without a change to them."""

from __future__ import annotations

import csv
import json

import pytest
from third_task import Angle, AnglePredictor, write_bars

import flashtask
from flashtask import TASKS
from flashtask.cli import run


@pytest.fixture
def registered():
    TASKS.register("angle", AnglePredictor)
    yield
    TASKS.remove("angle")


def test_a_task_in_one_file_goes_through_every_command(registered, tmp_path, capsys):
    table = write_bars(tmp_path / "bars")
    folder = tmp_path / "run"
    words = ["--task", "angle", "--no-pretrained", "--strategy", "no_freeze", "--epochs", "3", "--batch-size", "8"]
    size = ["--set", "data.from_csv.preprocessing={input_size: 32}", "--lr", "0.003", "--quiet"]
    assert run(["finetune", str(table), *words, *size, "--output-dir", str(folder)]) == 0
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert {"train_loss", "train_loss_direction", "train_loss_length", "val_degrees"} <= set(rows[0])
    for row in rows:
        parts = float(row["train_loss_direction"]) + float(row["train_loss_length"])
        assert float(row["train_loss"]) == pytest.approx(parts, rel=1e-5)

    capsys.readouterr()
    assert run(["validate", str(folder), str(table), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    paths = sorted(map(str, (tmp_path / "bars").glob("*.png")))
    model = flashtask.load(folder)
    predicted = model.predict(paths)
    assert all(isinstance(one, Angle) for one in predicted)
    away = [abs((one.degrees - 15 * number + 180) % 360 - 180) for number, one in enumerate(predicted)]
    assert sum(away) / len(away) == pytest.approx(measured["val_degrees"], abs=0.05)

    assert run(["predict", str(folder), *paths, "--output", str(tmp_path / "angles.csv")]) == 0
    written = list(csv.DictReader((tmp_path / "angles.csv").read_text().splitlines()))
    assert list(written[0]) == ["path", "degrees"]
    assert [float(row["degrees"]) for row in written] == pytest.approx([one.degrees for one in predicted], abs=1e-3)
    assert run(["predict", str(folder), paths[0], "--top-k", "2"]) == 2
    assert "the predictions of angle have no such scores" in capsys.readouterr().err

    again = flashtask.load(model.save_pretrained(tmp_path / "saved"))
    assert again.target_description == model.target_description == {"kind": "angle", "fields": ["direction"]}
    assert again.predict(paths[0]).degrees == pytest.approx(predicted[0].degrees, abs=1e-3)
