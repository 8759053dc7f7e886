"""The score of an image depends on the image and the checkpoint alone, however it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from small import colour_folders
from timm.data import create_transform, resolve_data_config

import flashtask
from flashtask import ImageClassificationData, ImageClassifier, Trainer, read_checkpoint
from flashtask.cli import run
from flashtask.core.checkpoint import write_checkpoint
from flashtask.core.errors import IntegrityError
from flashtask.core.preprocessing import Preprocessing
from flashtask.trainer.devices.accelerators import CPUAccelerator

#: Of each class: enough that a folder is predicted in worker threads, and a group of them is not.
EACH = 20


@pytest.fixture(autouse=True)
def _a_processor_with_bfloat16(monkeypatch, tmp_path_factory):
    """`auto` takes bfloat16 for training steps on any machine; torch computes it everywhere."""
    monkeypatch.setattr(CPUAccelerator, "computes_bfloat16", lambda self, device: True)
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return colour_folders(root / "train", each=EACH), colour_folders(root / "val", each=EACH)


def fitted(folder, images, strategy="freeze", precision=None, **options):
    torch.manual_seed(1)
    model = ImageClassifier(
        "timm/test_efficientnet", pretrained=False, learning_rate=0.05 if strategy == "freeze" else 0.002
    )
    data = ImageClassificationData.from_folders(*images, batch_size=8, num_workers=0)
    data.preprocessing = Preprocessing(input_size=(3, 48, 48))
    trainer = Trainer(max_epochs=2, output_dir=folder, precision=precision, enable_progress_bar=False, **options)
    trainer.finetune(model, datamodule=data, strategy=strategy)
    return trainer, model, data


def scores_of(predictions, model):
    return torch.tensor([[one.probabilities[label] for label in model.labels] for one in predictions])


def scores_by_command(checkpoint, paths, output, *options):
    words = ["--format", "jsonl", "--output", str(output), "--top-k", "2", *options]
    assert run(["predict", str(checkpoint), *paths, *words]) == 0
    rows = {row["path"]: row for row in map(json.loads, output.read_text().splitlines())}
    pairs = [dict(zip(rows[path]["labels"], rows[path]["scores"], strict=True)) for path in paths]
    return torch.tensor([[pair[label] for label in ("blue", "red")] for pair in pairs])


def scores_by_timm(folder, paths):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    with torch.no_grad():
        rows = [model(transform(Image.open(path).convert("RGB"))[None]).softmax(dim=1) for path in paths]
    return torch.cat(rows)


def ways_to_a_score(trainer, data, checkpoint, paths, tmp_path):
    """Scores (N, classes) of the same images, by the name of the way."""
    model = flashtask.load(checkpoint)
    groups = [paths[start : start + 7] for start in range(0, len(paths), 7)]
    backwards = scores_of(model.predict(paths[::-1]), model).flip(0)
    return {
        "model.predict": scores_of(model.predict(paths), model),
        "in groups of seven": torch.cat([scores_of(model.predict(group), model) for group in groups]),
        "one by one": torch.cat([scores_of([model.predict(path)], model) for path in paths]),
        "backwards": backwards,
        "in batches of five": scores_of(model.predict(paths, batch_size=5), model),
        "with a worker": scores_of(model.predict(paths, num_workers=1), model),
        "trainer.predict": torch.cat(trainer.predict(model, dataloaders=data.val_dataloader())),
        "flashtask predict": scores_by_command(checkpoint, paths, tmp_path / "all.jsonl"),
        "flashtask predict, with a worker": scores_by_command(
            checkpoint, paths, tmp_path / "w.jsonl", "--num-workers", "1"
        ),
        "plain timm": scores_by_timm(model.save_pretrained(tmp_path / "folder"), paths),
    }


@pytest.mark.parametrize("strategy", [pytest.param("freeze", marks=pytest.mark.long), "no_freeze"])
def test_every_way_to_a_score_gives_the_same_one(strategy, images, tmp_path):
    trainer, _, data = fitted(tmp_path / "run", images, strategy)
    checkpoint = tmp_path / "run" / "best.ckpt"
    paths = data.val_dataloader().dataset.paths
    targets = torch.tensor(data.val_dataloader().dataset.targets)
    found = ways_to_a_score(trainer, data, checkpoint, paths, tmp_path)
    first = found["model.predict"]
    assert first.std() > 1e-3  # images are told apart
    for way, scores in found.items():
        assert (scores - first).abs().max() < 1e-5, way
        assert torch.equal(scores.argmax(dim=1), first.argmax(dim=1)), way
    accuracy = (first.argmax(dim=1) == targets).double().mean().item()
    loss = torch.nn.functional.nll_loss(first.log(), targets).item()
    stored = read_checkpoint(checkpoint)["metrics"]
    loaded = flashtask.load(checkpoint)
    (validated,) = trainer.validate(loaded, datamodule=data)
    (tested,) = trainer.test(loaded, dataloaders=data.val_dataloader())
    for metrics, part in ((stored, "val"), (validated, "val"), (tested, "test")):
        assert metrics[f"{part}_accuracy"] == pytest.approx(accuracy, abs=1e-9)
        assert metrics[f"{part}_loss"] == pytest.approx(loss, rel=1e-5)


def test_validate_without_data_gives_the_number_of_the_run_and_data_that_was_trained_on_is_named(tmp_path, capsys):
    folder = str(colour_folders(tmp_path / "colours", each=10))
    words = ["--backbone", "timm/test_resnet", "--no-pretrained", "--image-size", "32", "--epochs", "1", "--no-report"]
    assert run(["finetune", folder, *words, "--output-dir", str(tmp_path / "run")]) == 0
    best = json.loads((tmp_path / "run/summary.json").read_text())["best"]
    capsys.readouterr()
    assert run(["validate", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {name: pytest.approx(best[name], abs=1e-6) for name in found}
    assert "val_accuracy" in found
    assert run(["validate", str(tmp_path / "run"), folder, "--json"]) == 0
    assert "is what the model was trained on, so training images count too" in capsys.readouterr().err
    other = str(colour_folders(tmp_path / "other", each=3))
    assert run(["validate", str(tmp_path / "run"), other, "--json"]) == 0
    assert "trained on" not in capsys.readouterr().err
    assert run(["validate", str(tmp_path / "run/best.ckpt")]) == 2
    assert "give the run folder" in capsys.readouterr().err
    assert run(["validate", str(tmp_path / "run"), "--batch-size", "4"]) == 2
    assert "no DATA is given" in capsys.readouterr().err


@pytest.mark.long
def test_training_steps_round_only_while_the_backbone_trains(images, tmp_path):
    with_cache = fitted(tmp_path / "a", images)[1]
    without = fitted(tmp_path / "b", images, feature_cache=False)[1]
    in_float32 = fitted(tmp_path / "c", images, precision="32")[1]
    trained = fitted(tmp_path / "d", images, "no_freeze")[1]
    trained_in_float32 = fitted(tmp_path / "e", images, "no_freeze", "32")[1]

    def weights(model):
        return torch.cat([value.flatten().double() for value in model.head.state_dict().values()])

    assert (weights(with_cache) - weights(without)).abs().max() < 1e-5
    assert (weights(with_cache) - weights(in_float32)).abs().max() < 1e-7
    assert (weights(trained) - weights(trained_in_float32)).abs().max() > 1e-4


@pytest.mark.long
def test_a_format_that_was_asked_for_counts_for_every_stage_and_is_recorded(images, tmp_path):
    _, model, data = fitted(tmp_path / "run", images, precision="bf16-mixed")
    checkpoint = tmp_path / "run" / "best.ckpt"
    assert read_checkpoint(checkpoint)["inference_precision"] == "bf16-mixed"
    loaded = flashtask.load(checkpoint)
    again = flashtask.load(model.save_pretrained(tmp_path / "folder"))
    assert [one.default_precision for one in (model, loaded, again)] == ["bf16-mixed"] * 3
    paths = data.val_dataloader().dataset.paths
    rounded = scores_of(loaded.predict(paths[:8]), loaded)
    assert torch.equal(scores_of(again.predict(paths[:8]), again), rounded)
    assert torch.equal(scores_by_command(checkpoint, paths[:8], tmp_path / "own.jsonl"), rounded)
    exact = scores_by_command(checkpoint, paths[:8], tmp_path / "32.jsonl", "--precision", "32")
    assert 0 < (exact - rounded).abs().max() < 0.05
    other = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (validated,) = other.validate(loaded, datamodule=data)
    stored = read_checkpoint(checkpoint)["metrics"]
    assert validated["val_loss"] == pytest.approx(stored["val_loss"], abs=1e-6)
    (in_float32,) = Trainer(logger=False, enable_checkpointing=False, precision="32").validate(loaded, datamodule=data)
    assert in_float32["val_loss"] != pytest.approx(stored["val_loss"], abs=1e-7)


@pytest.mark.long
def test_auto_and_32_record_nothing_and_a_later_fit_in_32_forgets_what_was_recorded(images, tmp_path):
    _, model, data = fitted(tmp_path / "first", images, precision="bf16-mixed")
    assert "inference_precision" not in read_checkpoint(fitted(tmp_path / "auto", images)[0].output_dir / "best.ckpt")
    Trainer(max_epochs=1, precision="32", output_dir=tmp_path / "second").finetune(
        model, datamodule=data, strategy="freeze"
    )
    assert "inference_precision" not in read_checkpoint(tmp_path / "second" / "best.ckpt")
    assert model.default_precision == "auto"


@pytest.mark.long
def test_a_checkpoint_that_asks_for_an_unknown_format_is_refused(images, tmp_path):
    fitted(tmp_path / "run", images)
    content = read_checkpoint(tmp_path / "run" / "best.ckpt")
    content.pop("hyperparameters", None)
    for name in ("float8", 16, ["bf16-mixed"], "auto"):
        write_checkpoint(tmp_path / "hostile.ckpt", {**content, "inference_precision": name})
        with pytest.raises(IntegrityError, match=r"hostile\.ckpt.*inference_precision"):
            flashtask.load(tmp_path / "hostile.ckpt")


@pytest.mark.long
def test_the_script_that_compares_all_ways_finds_no_difference(images, tmp_path):
    fitted(tmp_path / "run", images)
    script = Path(__file__).parents[1] / "scripts" / "one_number.py"
    words = [sys.executable, str(script), str(tmp_path / "run" / "best.ckpt"), str(images[1]), "--sample", "5"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 28  # the pairs of eight ways
    assert {flips for *_, flips, _ in rows} == {"0"}
    assert max(float(largest) for *_, largest in rows) < 1e-5
