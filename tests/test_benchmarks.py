"""The command behind `make bench` runs, and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, str(ROOT / "benchmarks" / "run.py")]


@pytest.mark.slow
def test_the_quick_benchmark_measures_flashtask_and_a_loop_by_hand(tmp_path):
    pytest.importorskip("elpv_dataset")
    works = ["frozen5", "overhead", "predict"]
    sizes = ["--train", "16", "--val", "4", "--predict", "40"]
    options = ["--quick", "--players", "flashtask", "by hand", "--threads", "1", "--output", str(tmp_path)]
    done = subprocess.run([*RUN, *works, *options, *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(one["work"], one["player"]) for one in results] == [
        (work, player) for work in works for player in ("flashtask", "by hand")
    ]
    assert all(one["seconds"] > 0 and one["peak_bytes"] > 2**26 for one in results)
    assert [one["items"] for one in results] == [80, 80, 50, 50, 40, 40]
    # The same weights on the same images find the same labels, whoever asks.
    assert results[4]["accuracy"] == pytest.approx(results[5]["accuracy"], abs=0.05)
    table = (tmp_path / "table.md").read_text()
    assert "Frozen finetuning, 5 epochs" in table
    assert "| flashtask |" in table
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_work_that_is_not_there_is_told_with_those_that_are():
    done = subprocess.run([*RUN, "frozn5"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no work named frozn5; there are: frozen5, " in done.stderr
