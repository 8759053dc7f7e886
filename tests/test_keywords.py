"""Names of arguments that a call does not have: the nearest right one, other libraries' names, where they belong."""

from __future__ import annotations

import inspect

import pytest

import flashtask
from flashtask import ImageClassificationData, ImageClassifier, ImageEmbedder, Preprocessing, Task, Trainer
from flashtask.cli.parts import build_parts
from flashtask.cli.recipe import Recipe
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.keywords import _OTHER_NAMES, _PLACES, argument_fix, nearest_argument

from_folders, from_root = ImageClassificationData.from_folders, ImageClassificationData.from_root
TINY = {"backbone": "timm/test_resnet", "pretrained": False, "num_classes": 2}


@pytest.mark.parametrize(
    ("call", "name", "right"),
    [
        (ImageClassifier, "lr", "'learning_rate'"),
        (ImageClassifier, "LR", "'learning_rate'"),
        (ImageClassifier, "pretraind", "'pretrained'"),
        (ImageClassifier, "model", "'backbone'"),
        (ImageClassifier, "n_classes", "'num_classes'"),
        (ImageClassifier, "num_clases", "'num_classes'"),
        (ImageClassifier, "class_names", "'labels'"),
        (ImageClassifier, "wd", 'optimizer_options={"weight_decay": 0.01}'),
        (ImageClassifier, "scheduler", "'lr_scheduler'"),
        (ImageEmbedder, "arch", "'backbone'"),
        (from_folders, "bs", "'batch_size'"),
        (from_folders, "valid_pct", "'val_split'"),
        (from_folders, "train_dir", "'train_folder'"),
        (from_root, "bs", "'batch_size'"),
        (from_root, "workers", "'num_workers'"),
        (Trainer, "epochs", "'max_epochs'"),
        (Trainer, "fp16", "'precision'"),
        (Trainer, "gradient_accumulation_steps", "'accumulate_grad_batches'"),
        (Preprocessing, "size", "'input_size'"),
        (flashtask.load, "device", "'map_location'"),
        (flashtask.download_data, "chekcsum", "'checksum'"),
    ],
)
def test_the_fields_names_and_mistyped_ones_lead_to_the_right_argument(call, name, right, tmp_path):
    first = [tmp_path] if call in (from_root, flashtask.load, flashtask.download_data) else []
    with pytest.raises(UsageError, match=f"argument.*{name}") as caught:
        call(*first, **{name: 1})
    assert caught.value.fix == f"did you mean {right}?"


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("method", "name", "fix"),
    [
        ("finetune", "dm", "did you mean 'datamodule'?"),
        ("fit", "train_loader", "did you mean 'train_dataloaders'?"),
        ("validate", "loader", "did you mean 'dataloaders'?"),
        ("test", "checkpoint", "did you mean 'ckpt_path'?"),
        ("tune", "lr", "did you mean 'learning_rate'?"),
        ("plan", "stratgy", "did you mean 'strategy'?"),
        ("finetune", "epochs", "set it in Trainer(max_epochs=...)"),
        ("finetune", "lr", "set it in ImageClassifier(learning_rate=...)"),
        ("predict", "bs", "set it in ImageClassificationData.from_folders(batch_size=...)"),
        ("save_checkpoint", "weight_only", "did you mean 'weights_only'?"),
    ],
)
def test_every_method_answers_a_name_that_it_does_not_have(method, name, fix):
    with pytest.raises(UnknownNameError, match=rf"no argument of {method}\(\) named '{name}'") as caught:
        getattr(Trainer(logger=False), method)(ImageClassifier(**TINY), **{name: 1})
    assert caught.value.fix == fix


def test_arguments_of_another_call_are_answered_with_that_call():
    for call, name, place in (
        (Trainer, "lr", "ImageClassifier(learning_rate=...)"),
        (Trainer, "batch_size", "ImageClassificationData.from_folders(batch_size=...)"),
        (ImageClassifier, "epochs", "Trainer(max_epochs=...)"),
        (from_folders, "image_size", "ImageClassifier(image_size=...)"),
    ):
        with pytest.raises(UsageError) as caught:
            call(**{name: 1})
        assert caught.value.fix == f"set it in {place}"


def test_methods_of_a_task_answer_too():
    model = ImageClassifier(**TINY)
    with pytest.raises(UnknownNameError, match=r"predict\(\) named 'bs'\n  fix: did you mean 'batch_size'\?"):
        model.predict(["x.png"], bs=3)
    with pytest.raises(UnknownNameError, match=r"save_pretrained\(\) named 'license'"):
        model.save_pretrained("x", license="mit")


def test_other_names_lead_to_arguments_that_there_are():
    calls = (Task, ImageClassifier, from_folders, from_root, Trainer, Preprocessing, flashtask.load, Task.predict)
    calls += tuple(getattr(Trainer, method) for method in ("fit", "finetune", "validate", "test", "predict", "tune"))
    there = {name for call in calls for name in inspect.signature(call).parameters}
    named = {right.partition("=")[0] for rights in _OTHER_NAMES.values() for right in rights}
    assert named | set(_PLACES) <= there
    assert nearest_argument("lr", ["learning_rate"]) == argument_fix("lr", ["learning_rate"])
    assert argument_fix("zzzz", there) == ""


@pytest.mark.parametrize(
    ("section", "key", "right"),
    [("model", "lr", "learning_rate"), ("trainer", "epochs", "max_epochs"), ("data.from_folders", "bs", "batch_size")],
)
def test_a_recipe_key_by_another_name_is_answered_as_an_argument_is(section, key, right, tmp_path):
    recipe = Recipe({"data": {"from_folders": {"train_folder": str(tmp_path)}}})
    recipe.set(f"{section}.{key}", 1, "--set")
    with pytest.raises(UsageError, match=f"there is no key '{key}'") as caught:
        build_parts(recipe)
    assert caught.value.fix == f"did you mean '{right}'?"
