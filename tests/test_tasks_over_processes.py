"""An image task over two processes: weights, metrics and predictions of one process, from one image to nine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import task_runs
import torch
from small import colour_folders, made_long_ago
from task_runs import Places, classifier, data, go, trainer_of

from flashtask.data.inputs import input_of
from flashtask.data.threads import num_cores

#: Numbers of images; a step has 4.
SIZES = range(1, 10)
#: Sums are taken in another order.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of N images in two classes for each N, and the same images without classes."""
    root = tmp_path_factory.mktemp("tasks")
    whole = colour_folders(root / "whole", each=5)
    by_class = [sorted((whole / name).iterdir()) for name in task_runs.LABELS]
    files = [file for pair in zip(*by_class, strict=True) for file in pair]
    for size in SIZES:
        for file in files[:size]:
            for target in (root / str(size) / file.parent.name, root / "any" / str(size)):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / f"{file.parent.name}-{file.name}")
    made_long_ago(root.rglob("*.png"))
    return root


@pytest.fixture(scope="module")
def two(root):
    """What two processes found, by process, and what they said."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "FLASHTASK_CACHE": str(root / "cache of two"),
    }
    command = [sys.executable, "-W", "error", task_runs.__file__, str(root), *map(str, SIZES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = [torch.load(root / f"found-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return found, done.stderr


@pytest.fixture(scope="module")
def one(root):
    return go(root, 1, SIZES)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_of_every_kind_count_each_image_once(one, two, stage):
    for size in SIZES:
        for of_process in two[0]:
            assert of_process[stage, size] == pytest.approx(one[stage, size], abs=TOLERANCE)
        assert len(one[stage, size]) == 4


@pytest.mark.long
def test_training_on_images_reaches_the_weights_and_metrics_of_one_process(one, two):
    for size in SIZES[1:]:
        for of_process in two[0]:
            assert of_process["steps", size] == one["steps", size]
            torch.testing.assert_close(of_process["weights", size], one["weights", size], rtol=0, atol=TOLERANCE)
            for row, expected in zip(of_process["history", size], one["history", size], strict=True):
                names = [name for name in expected if not name.endswith("second") and name != "seconds"]
                assert {name: row[name] for name in names} == pytest.approx({n: expected[n] for n in names}, abs=1e-5)
    changed = one["weights", 9] - torch.cat([value.detach().flatten() for value in classifier().parameters()])
    assert changed.abs().max() > 1e-3


@pytest.mark.long
def test_metric_objects_of_training_do_not_count_a_sample_that_fills_a_step(two):
    """With 5 images, say, the second batch is one image: the other process takes part with one of its own."""
    for size in SIZES[1:]:
        for row in two[0][0]["history", size]:
            assert row["train_seen"] == size


class InOrder(Places):
    """Fails where a writer is told other places than those of the files."""

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        super().write_on_epoch_end(trainer, module, predictions, batch_indices)
        assert self.all == list(range(5))
        assert sorted(place for own in self.by_process for place in own) == self.all


@pytest.mark.long
def test_ddp_spawn_with_processes_that_have_no_image(root, tmp_path):
    processes, one = 4, go(root, 1, (1, 5))
    trainer = trainer_of(tmp_path, processes, strategy="ddp_spawn")
    (found,) = trainer.validate(classifier(), datamodule=data(processes, val_folder=root / "1"))
    assert found == pytest.approx(one["validate", 1], abs=TOLERANCE)
    made = data(processes, train_folder=root / "5", val_folder=root / "4")
    trainer.finetune(classifier(), datamodule=made, strategy="no_freeze", restore_best=False)
    for row, expected in zip(trainer.fit_run.history, one["history", 5], strict=True):
        for name in ("train_loss", "train_right", "train_seen", "val_loss", "val_accuracy", "val_f1", "val_median"):
            assert row[name] == pytest.approx(expected[name], abs=1e-5)
    folder = root / "any" / "5"
    trainer = trainer_of(tmp_path, processes, strategy="ddp_spawn", callbacks=[InOrder()])
    outputs = torch.cat(trainer.predict(classifier(), datamodule=data(processes, predict_folder=folder)))
    plain = torch.cat(trainer_of(tmp_path, 1).predict(classifier(), datamodule=data(1, predict_folder=folder)))
    torch.testing.assert_close(outputs, plain, rtol=0, atol=TOLERANCE)


@pytest.mark.long
def test_predictions_are_complete_and_in_the_order_of_the_files(root, one, two):
    task = classifier()
    for size in SIZES:
        files = sorted(str(file) for file in (root / "any" / str(size)).iterdir())
        by_file = [prediction.probabilities for prediction in task.predict(files)]
        for of_process in two[0]:
            outputs = of_process["predict", size]
            assert outputs.shape == (size, 2)
            assert (outputs - one["predict", size]).abs().max() <= TOLERANCE
            predictions = task.to_predictions(outputs, list(map(input_of, files)))
            assert [one.path for one in predictions] == files
            for found, expected in zip(predictions, by_file, strict=True):
                assert found.probabilities == pytest.approx(expected, abs=2e-3)  # model.predict computes in bfloat16


@pytest.mark.long
def test_a_writer_is_told_the_places_of_its_samples_among_all(two):
    for size in SIZES:
        for of_process in two[0]:
            everywhere, by_process = of_process["places", size]
            assert everywhere == list(range(size))
            assert sorted(place for own in by_process for place in own) == list(range(size))


@pytest.mark.long
def test_ddp_computes_features_once_and_the_next_run_none(one, two):
    (first, _), (second, _) = two[0][0]["counts"]
    assert sum(first) == 9 + 8
    assert min(first) >= 4 + 4
    assert second == [0, 0]
    assert one["counts"][0][0] == [9 + 8]
    assert two[1].count("computing the features of 9 training images") == 1


@pytest.mark.long
def test_one_process_of_a_machine_checks_the_images_and_cores_are_shared_out(one, two):
    """They were checked when the first run validated on them, so nobody decodes them again."""
    facts = two[0][0]["counts"][0][1]
    assert [kept for kept, _ in facts] == [0, 0]
    assert [threads for _, threads in facts] == [max(1, num_cores() // 2)] * 2
    assert one["counts"][0][1][0][1] == num_cores()


@pytest.mark.long
def test_what_is_found_in_the_data_is_said_once(two):
    assert two[1].count("are also training images") == len(SIZES[1:]) + 2
