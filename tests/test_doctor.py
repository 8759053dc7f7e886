"""`flashtask doctor`: what it says of whole, damaged, unfinished and running runs, and that it changes nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from fingerprints import of_files
from small import colour_folders

from flashtask.cli import run as flashtask
from flashtask.core.checkpoint import read_checkpoint, write_checkpoint
from flashtask.trainer.run_folder import RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two epochs."""
    root = tmp_path_factory.mktemp("doctor")
    colour_folders(root / "data", each=5)
    command = ["finetune", root / "data", "--backbone", "timm/test_resnet", "--no-pretrained", "--epochs", 2]
    assert flashtask([*map(str, command), "--batch-size", "4", "--output-dir", str(root / "run"), "--quiet"]) == 0
    return root / "run"


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def report(path, capsys, code=0):
    before = of_files(path)
    assert flashtask(["doctor", str(path), "--json"]) == code
    assert of_files(path) == before
    return json.loads(capsys.readouterr().out)


def test_a_finished_run_is_whole_and_has_nothing_left_to_do(folder, capsys):
    said = report(folder, capsys)
    places = [(one["can_be_resumed"], one["problem"], one["epoch"]) for one in said["checkpoints"]]
    assert [place[:2] for place in places] == [(True, "")] * len(places)
    assert places[0][2] == 1
    assert said["problems"] == {}
    assert "nothing is left to do" in said["resume"]
    assert flashtask(["doctor", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "last.ckpt   whole  epoch 1, step 4" in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80


def test_one_changed_byte_is_named_and_another_checkpoint_is_offered_to_resume_from(folder, capsys):
    (folder / "summary.json").unlink()  # as in a run that was killed
    with (folder / "last.ckpt").open("r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)
        file.seek(-100, 2)
        file.write(bytes([byte[0] ^ 1]))
    said = report(folder, capsys, code=76)
    assert list(said["problems"]) == ["last.ckpt"]
    assert "digest" in said["problems"]["last.ckpt"]
    assert "goes on from best.ckpt" in said["resume"]


def test_weights_that_are_not_finite_are_a_problem(folder, capsys):
    content = read_checkpoint(folder / "best.ckpt")
    name, weight = next((n, w) for n, w in content["state_dict"].items() if w.is_floating_point())
    content["state_dict"][name] = torch.full_like(weight, float("nan"))
    write_checkpoint(folder / "best.ckpt", content)
    said = report(folder, capsys, code=76)
    assert said["problems"] == {"best.ckpt": f"NaN or infinite values in 1 tensors, such as {name}"}


def test_a_file_of_weights_alone_cannot_be_resumed(folder, capsys, tmp_path):
    content = read_checkpoint(folder / "best.ckpt")
    del content["progress"]
    write_checkpoint(tmp_path / "weights.ckpt", content)
    (one,) = report(tmp_path / "weights.ckpt", capsys)["checkpoints"]
    assert (one["problem"], one["can_be_resumed"]) == ("", False)


def test_a_run_without_a_checkpoint_begins_again_and_a_running_one_is_left_alone(folder, capsys):
    for file in (*folder.glob("*.ckpt"), folder / "summary.json"):
        file.unlink()
    assert "from the beginning" in report(folder, capsys)["resume"]
    owner = RunFolder(folder, resume=True)
    try:
        assert report(folder, capsys)["resume"].startswith("not now: process ")
    finally:
        owner.release()


def test_a_folder_without_a_run_and_a_wrong_path_are_errors(tmp_path, capsys):
    assert flashtask(["doctor", str(tmp_path)]) == 66
    assert "there is no run in" in capsys.readouterr().err
    assert flashtask(["doctor", str(tmp_path / "nothing.ckpt")]) == 66
