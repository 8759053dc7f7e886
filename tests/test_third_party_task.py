"""A task that another package promises by an entry point: installed, trained by a command, loaded and used."""

from __future__ import annotations

import json

import numpy as np
import pytest
import warm
from PIL import Image

import flashtask
from flashtask import FlashtaskError

MODEL = "--task example_brightness --backbone example_tiny --no-pretrained --strategy no_freeze --lr 0.01"


@pytest.fixture(scope="module")
def run_folder(third_party, tmp_path_factory):
    """A run of the command line on dark and bright images."""
    root = tmp_path_factory.mktemp("brightness")
    for brightness in (0.1, 0.9):
        (root / "data" / str(brightness)).mkdir(parents=True)
        for index in range(16):
            pixels = np.random.default_rng(index).integers(0, 20, (32, 32, 3)) + int(brightness * 235)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "data" / str(brightness) / f"{index}.png")
    options = [*MODEL.split(), "--epochs", "12", "--batch-size", "4", "--num-workers", "0", "--quiet"]
    code = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nfrom flashtask.cli import run\n"
        "sys.exit(run(['finetune', *sys.argv[2:]]))"
    )
    done = warm.run(code, third_party, root / "data", *options, "--output-dir", root / "run")
    assert done.returncode == 0, done.stderr
    return root / "run"


@pytest.mark.long
def test_a_task_of_another_package_trains_from_the_command_line_with_its_own_loss_and_metric(run_folder):
    best = json.loads((run_folder / "summary.json").read_text())["best"]
    assert best["val_mean_error"] < 0.2, "a constant is wrong by 0.4"
    assert "task: example_brightness" in (run_folder / "recipe.yaml").read_text()


@pytest.mark.long
def test_its_checkpoint_is_loaded_by_name_predicts_numbers_and_is_validated_with_its_own_metric(
    third_party, run_folder
):
    images = [run_folder.parent / "data" / name / "0.png" for name in ("0.1", "0.9")]
    code = (
        "import sys, flashtask\n"
        "from flashtask.cli import run\n"
        "site, path, data, *images = sys.argv[1:]\n"
        "sys.path.insert(0, site)\n"
        "early = 'flashtask_example_task' in sys.modules\n"
        "task = flashtask.load(path)\n"
        "dark, bright = (float(number) for number in task.predict(images))\n"
        "print(early, type(task).__name__, task.training, dark < 0.5 < bright, flush=True)\n"
        "sys.exit(run(['validate', path, data, '--json', '--quiet']))"
    )
    paths = [run_folder / "best.ckpt", run_folder.parent / "data", *images]
    done = warm.run(code, third_party, *paths)
    assert done.returncode == 0, done.stderr
    printed, metrics = done.stdout.splitlines()
    assert printed.split() == ["False", "BrightnessRegressor", "False", "True"]
    assert json.loads(metrics)["val_mean_error"] < 0.2


@pytest.mark.long
def test_without_the_package_the_error_names_the_missing_task(run_folder):
    with pytest.raises(FlashtaskError, match="example_brightness"):
        flashtask.load(run_folder / "best.ckpt")
