"""`make demo`: the photographs are laid out right, and the commands that it shows give what it says they give."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts can be imported, as they import each other."""
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.mark.long
def test_every_photograph_is_laid_out_once_by_its_probability_of_a_defect(tmp_path):
    from lay_out_elpv import lay_out, rows

    assert len(rows()) == 2624
    assert sorted({probability for _, probability in rows()}) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert lay_out(tmp_path, 30) == 30
    found = {path.name: path.parent.name for path in tmp_path.rglob("*.png")}
    expected = {path.name: "defective" if probability > 0.5 else "functional" for path, probability in rows()}
    assert found == {name: expected[name] for name in found}
    assert len(found) == 30


def test_laying_out_again_keeps_whole_files_and_repairs_half_ones(tmp_path):
    from lay_out_elpv import lay_out

    lay_out(tmp_path, 4)
    half, whole, *_ = sorted(tmp_path.rglob("*.png"))
    before, time_before = half.read_bytes(), whole.stat().st_mtime_ns
    half.write_bytes(before[:100])
    lay_out(tmp_path, 4)
    assert half.read_bytes() == before
    assert whole.stat().st_mtime_ns == time_before


@pytest.mark.long
@pytest.mark.parametrize(
    "runs", [["demo/runs/000"], pytest.param(["demo/runs/000", "demo/runs/001"], marks=pytest.mark.long)]
)
def test_the_demo_runs_and_says_the_number_of_its_own_run(tmp_path, monkeypatch, runs):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; sys.path.insert(0, sys.argv[1]); import demo; demo.NUM_IMAGES, demo.EPOCHS = 48, 1; demo.main()"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.path.abspath(path) for path in sys.path if path))
    for run in runs:
        done = warm.run(code, tmp_path / "scripts")
        assert done.returncode == 0, done.stderr
        best = json.loads((tmp_path / run / "summary.json").read_text())["best"]
        assert f"\nvalidation accuracy: {best['val_accuracy']:.4f}\n" in done.stdout
        assert f"\nrun folder: {run} " in done.stdout
        assert len(re.findall(r"^demo/elpv/\w+/cell\d+\.png .*defective +\d\.\d{4}", done.stdout, re.MULTILINE)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "scripts"]
