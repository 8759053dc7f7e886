"""The command behind `make bench` runs, and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, str(ROOT / "benchmarks" / "run.py")]


@pytest.mark.long
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


@pytest.mark.long
def test_a_work_that_is_not_there_is_told_with_those_that_are():
    done = subprocess.run([*RUN, "frozn5"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no work named frozn5; there are: frozen5, " in done.stderr


@pytest.mark.long
def test_the_scaling_work_measures_and_keeps_its_model_apart(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--networks", "test_resnet", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--batch", "4", "--steps", "2", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "scaling.json").read_text())
    assert [(run["processes"], run["batch"]) for run in runs] == [(1, 4), (1, 2), (2, 2)]
    assert all(second > 0 for run in runs for second in run["step"])
    assert runs[2]["exchanges"][str(runs[2]["gradient_bytes"])] > 0
    text = (tmp_path / "scaling.md").read_text()
    assert text.index("## Measured") < text.index("## The model") < text.index("## Larger worlds: the model alone")


@pytest.mark.long
def test_the_loaders_take_turns(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "loading.py"), "--images", "8", "--side", "48"]
    subprocess.run([*command, "--rounds", "1", "--output", str(tmp_path / "loading.md")], check=True, timeout=1500)
    rows = [line for line in (tmp_path / "loading.md").read_text().splitlines() if line.startswith(("| fl", "| to"))]
    assert [row.split(" | ")[0].lstrip("| ") for row in rows] == [
        "flashtask, folders",
        "flashtask, table",
        "flashtask, shards",
        "torchvision ImageFolder, DataLoader",
    ]


def test_a_ring_passes_what_it_should():
    """Each of n processes sends 2 (n - 1) parts of an nth of the bytes."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from scaling import Wire, fitted, modelled

    wire = Wire(latency=0.001, bandwidth=1e6)
    assert wire.exchange(1e6, 2) == pytest.approx(2 * 0.001 + 1.0)
    assert wire.exchange(1e6, 4) == pytest.approx(6 * 0.001 + 1.5)
    again = fitted({4: wire.exchange(4, 2), 10**6: wire.exchange(10**6, 2)})
    assert (again.latency, again.bandwidth) == pytest.approx((wire.latency, wire.bandwidth), rel=0.01)
    assert modelled(1.0, 0.6, 10**6, 1, wire) == 1.0
    assert modelled(1.0, 0.6, 10**6, 2, wire) == pytest.approx(1.0 + wire.exchange(10**6, 2))  # one bucket: the last
    assert modelled(5.0, 3.0, 10**8, 2, Wire(0, 1e9)) == pytest.approx(5.0 + 25 * 2**20 / 1e9)  # all but it is covered
