"""Tasks: the three lines, labels by name, prediction, checkpoints that need neither data nor code."""

from __future__ import annotations

import csv
import http.server
import json
import shutil
import ssl
import subprocess
import threading
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from small import Net, colour_folders, digest, loaders
from timm.optim import param_groups_weight_decay
from torch import nn

import flashtask
from flashtask import (
    Callback,
    DataModule,
    ImageClassificationData,
    ImageClassifier,
    ImageEmbedder,
    Trainer,
    read_checkpoint,
)
from flashtask.core.errors import BadDataError, IntegrityError, MissingInputError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.tasks.head_drawing import building_without_weights
from flashtask.trainer.checkpoints.restoring import load_checkpoint_into
from flashtask.trainer.finetuning.freezing import Freezing
from flashtask.trainer.finetuning.strategies import resolve_finetuning

TINY = "timm/test_resnet"
OPTIONS = {"backbone": TINY, "pretrained": False, "learning_rate": 0.02}


def small_data(root, **options):
    options = {"batch_size": 8, "num_workers": 0, **options}
    return ImageClassificationData.from_folders(
        train_folder=colour_folders(root / "train"), val_folder=colour_folders(root / "val", each=3), **options
    )


def quiet(folder, **options):
    return Trainer(output_dir=folder, enable_progress_bar=False, enable_model_summary=False, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, its folder, its model and its data."""
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    data = small_data(root)
    model = ImageClassifier(**OPTIONS)
    trainer = quiet(root / "run", max_epochs=4, seed=1)
    trainer.finetune(model, datamodule=data, strategy="no_freeze")
    trainer.save_checkpoint(root / "classifier.ckpt")
    return root, trainer, model, data


def test_s5_the_head_is_sized_by_the_classes(tmp_path):
    given = ImageClassifier(num_classes=7, **OPTIONS)
    assert given.head(torch.zeros(2, given.num_features)).shape == (2, 7)
    learned = ImageClassifier(**OPTIONS)
    assert learned.head is None
    quiet(tmp_path / "run", max_steps=1).finetune(learned, datamodule=small_data(tmp_path), strategy="freeze")
    assert learned.num_classes == 2
    assert learned.labels == ("blue", "red")
    with pytest.raises(UsageError, match="contradicts 2 labels"):
        ImageClassifier(num_classes=3, labels=["a", "b"], **OPTIONS)


@pytest.mark.long
def test_s7_a_trainer_with_epochs_and_a_device_trains_a_task(trained):
    root, trainer, _, _ = trained
    assert trainer.fit_run.device.type == "cpu"
    assert [row["epoch"] for row in trainer.fit_run.history] == [0, 1, 2, 3]
    assert trainer.callback_metrics["val_accuracy"] == 1.0
    summary = json.loads((root / "run" / "summary.json").read_text())
    assert (summary["task"], summary["backbone"], summary["strategy"]) == ("image_classification", TINY, "no_freeze")
    assert summary["best"]["val_accuracy"] == 1.0
    assert summary["images_per_second"] > 0
    assert {"torch", "timm", "torchvision"} <= set(summary["versions"])
    with (root / "run" / "metrics.csv").open() as file:
        assert {"epoch", "train_loss", "val_loss", "val_accuracy", "learning_rate", "seconds"} <= set(
            next(csv.reader(file))
        )


@pytest.mark.long
def test_s8_a_saved_checkpoint_predicts_alike_without_data_or_task_name(trained):
    root, _, model, _ = trained
    images = sorted((root / "val").rglob("*.png"))
    loaded = flashtask.load(root / "classifier.ckpt")
    assert type(loaded) is ImageClassifier
    assert not loaded.training
    assert loaded.predict(images) == model.predict(images)
    again = ImageClassifier.load_from_checkpoint(root / "classifier.ckpt", map_location="cpu")
    assert again.labels == ("blue", "red")


def test_s9_an_embedder_needs_no_training(tmp_path):
    root = colour_folders(tmp_path / "images", each=2)
    embedder = ImageEmbedder(backbone=TINY, pretrained=False)
    one = embedder.predict(root / "red" / "0.png")
    several = embedder.predict(sorted(root.rglob("*.png")))
    assert one.shape == (embedder.num_features,)
    assert one.dtype == torch.float32
    assert len(several) == 4
    with pytest.raises(UsageError, match="not trained"):
        quiet(tmp_path / "run", max_steps=1).fit(embedder, datamodule=small_data(tmp_path))


def test_predict_takes_paths_pil_images_and_lists(trained):
    root, _, model, _ = trained
    path = root / "val" / "red" / "0.png"
    from_path, from_text, from_image = model.predict(path), model.predict(str(path)), model.predict(Image.open(path))
    assert from_path.label == from_text.label == from_image.label == "red"
    assert from_path.scores == from_image.scores
    assert (from_path.path, from_image.path) == (str(path), None)
    assert sum(from_path.probabilities.values()) == pytest.approx(1)
    assert from_path.score == max(from_path.scores) == from_path.probabilities["red"]
    mixed = model.predict([path, Image.open(root / "val" / "blue" / "0.png")])
    assert [prediction.label for prediction in mixed] == ["red", "blue"]
    assert model.predict([]) == []
    with pytest.raises(UsageError, match=r"inputs\[0\], which is int"):
        model.predict([3])
    with pytest.raises(MissingInputError):
        model.predict(root / "no.png")


def test_predictions_do_not_depend_on_the_batch(trained):
    root, _, model, _ = trained
    images = sorted((root / "train").rglob("*.png"))
    alone, together = model.predict(images, batch_size=1), model.predict(images, batch_size=16)
    assert [p.label for p in alone] == [p.label for p in together]
    assert [p.score for p in alone] == pytest.approx([p.score for p in together], abs=0.02)


def test_predict_leaves_the_training_mode(trained):
    root, _, model, _ = trained
    model.train()
    model.predict(root / "val" / "red" / "0.png")
    assert model.training


def test_the_checkpoint_describes_itself(trained):
    root, _, model, _ = trained
    content = read_checkpoint(root / "classifier.ckpt")
    assert content["task"] == "image_classification"
    assert content["labels"] == ["blue", "red"]
    assert content["preprocessing"] == model.preprocessing.to_dict()
    assert content["hyper_parameters"]["backbone"] == TINY
    assert content["hyperparameters"] == content["hyper_parameters"]
    assert {key.split(".")[0] for key in content["state_dict"]} == {"backbone", "head"}
    assert content["recipe"]["finetune"] == {"strategy": "no_freeze", "restore_best": True}


def test_validate_and_test_of_a_loaded_task_match_folders_by_name(trained, tmp_path):
    """The folder has its classes in another order and lacks one: names decide."""
    root, _, _model, _ = trained
    folder = colour_folders(tmp_path / "only_red", each=3, classes=("red",))
    data = ImageClassificationData.from_folders(val_folder=folder, test_folder=root / "val", num_workers=0)
    loaded = flashtask.load(root / "classifier.ckpt")
    trainer = Trainer(enable_progress_bar=False)
    assert trainer.validate(loaded, datamodule=data)[0]["val_accuracy"] == 1.0
    assert trainer.test(loaded, datamodule=data)[0]["test_accuracy"] == 1.0


def test_a_class_that_the_model_does_not_know_is_an_error_with_a_diff(trained, tmp_path):
    root, _, _, _ = trained
    folder = colour_folders(tmp_path / "more", each=2, classes=("red", "green"))
    data = ImageClassificationData.from_folders(val_folder=folder, num_workers=0)
    with pytest.raises(BadDataError, match="green"):
        Trainer(enable_progress_bar=False).validate(flashtask.load(root / "classifier.ckpt"), datamodule=data)


def test_a_class_count_that_contradicts_the_data_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="num_classes=5, but the data has 2"):
        quiet(tmp_path / "run", max_steps=1).fit(
            ImageClassifier(num_classes=5, **OPTIONS), datamodule=small_data(tmp_path)
        )


def test_training_goes_on_from_a_loaded_task(trained, tmp_path):
    root, _, _, data = trained
    loaded = ImageClassifier.load_from_checkpoint(root / "classifier.ckpt")
    trainer = quiet(tmp_path / "run", max_epochs=1)
    trainer.finetune(loaded, datamodule=data, strategy="freeze")
    assert trainer.callback_metrics["val_accuracy"] == 1.0


@pytest.mark.long
def test_a_full_run_resumes_from_its_checkpoint(trained, tmp_path):
    root, _, _, data = trained
    model = ImageClassifier(**OPTIONS)
    trainer = quiet(tmp_path / "run", max_epochs=5, seed=1)
    trainer.finetune(model, datamodule=data, strategy="no_freeze", ckpt_path=root / "run" / "last.ckpt")
    assert [row["epoch"] for row in trainer.fit_run.history] == [0, 1, 2, 3, 4]


def test_an_image_that_is_cut_in_half_stops_before_training(tmp_path):
    data = small_data(tmp_path)
    for name in ("0.png", "1.png"):
        path = tmp_path / "train" / "red" / name
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadDataError) as caught:
        quiet(tmp_path / "run", max_steps=1).fit(ImageClassifier(**OPTIONS), datamodule=data)
    assert "red/0.png" in str(caught.value)
    assert "red/1.png" in str(caught.value)
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_a_module_that_is_no_task_is_loaded_by_its_class(tmp_path):
    from small import net

    trainer = quiet(tmp_path / "run", max_steps=1)
    trainer.fit(net(), *loaders())
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    with pytest.raises(IntegrityError, match="which task"):
        flashtask.load(tmp_path / "net.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "net.ckpt")
    assert torch.equal(loaded.head.weight, trainer.fit_run.module.head.weight)
    assert (loaded.hparams.width, loaded.training) == (8, False)


def test_an_argument_that_could_not_be_stored_is_asked_for_by_name(tmp_path):
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.warns(UserWarning, match=r"backbone of ImageClassifier \(Sequential\) cannot be stored"):
        model = ImageClassifier(backbone=backbone, num_classes=2)
    trainer = quiet(tmp_path / "run", max_steps=1)
    trainer.fit(model, datamodule=small_data(tmp_path))
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["not_saved"]["model.backbone"] == "<Sequential>"
    path = tmp_path / "run" / "last.ckpt"
    with pytest.raises(UsageError, match=r"'backbone' of ImageClassifier \(Sequential\) could not be stored"):
        ImageClassifier.load_from_checkpoint(path)
    again = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.warns(UserWarning, match="cannot be stored"):
        loaded = ImageClassifier.load_from_checkpoint(path, backbone=again)
    assert torch.equal(loaded.backbone[0].weight, model.backbone[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet81"}, "did you mean"),
        ({"head": "linaer"}, "did you mean 'linear'"),
        ({"learning_rate": 0}, "above 0"),
        ({"head_options": {"droput": 0.1}}, "did you mean 'dropout'"),
        ({"labels": ["a", "a"]}, "appears twice"),
    ],
)
def test_a_wrong_argument_is_an_error_with_the_nearest_right_one(options, message):
    with pytest.raises(UsageError, match=message):
        ImageClassifier(**{**OPTIONS, "num_classes": None if "labels" in options else 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"optimizer": "adamm"}, "did you mean 'adam"), ({"lr_scheduler": "cosin"}, "did you mean 'cosine'")],
)
def test_a_wrong_optimizer_or_schedule_is_an_error_at_construction(options, message):
    with pytest.raises(UsageError, match=message):
        ImageClassifier(num_classes=2, **OPTIONS, **options)


@pytest.mark.long
def test_augmentation_starts_when_the_backbone_trains(tmp_path):
    """`augment="auto"`: frozen epochs see the plain images, the others do not."""
    seen = {}

    class Watching(ImageClassifier):
        def training_step(self, batch, batch_idx):
            seen.setdefault(self.current_epoch, []).append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    data = small_data(tmp_path, batch_size=16)
    quiet(tmp_path / "run", max_epochs=3).finetune(Watching(**OPTIONS), datamodule=data, strategy="freeze_unfreeze:2")
    sums = {epoch: sorted(float(image.sum()) for image in batches[0]) for epoch, batches in seen.items()}
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert sums[1] != pytest.approx(sums[2], rel=1e-3)


def test_worker_counts_give_the_same_weights(tmp_path):
    train = colour_folders(tmp_path / "train", each=10)
    digests = set()
    for workers in (0, 2):
        torch.manual_seed(0)
        data = ImageClassificationData.from_folders(
            train_folder=train, val_split=4, batch_size=4, num_workers=workers, augment="strong"
        )
        model = ImageClassifier(**OPTIONS)
        quiet(tmp_path / str(workers), max_steps=6).fit(model, datamodule=data)
        digests.add(digest(model))
    assert len(digests) == 1


def test_a_task_stopped_in_the_middle_of_an_epoch_ends_with_the_same_bits(tmp_path):
    """With everything that makes it hard: bfloat16, channels_last, augmentation, unfreezing, a cosine schedule."""
    import signal

    from test_resume import SignalAt

    train = colour_folders(tmp_path / "train", each=12)
    digests = []
    for name in ("whole", "stopped"):
        folder = tmp_path / name

        def finetune(ckpt_path=None, callbacks=(), folder=folder):
            torch.manual_seed(0)
            data = ImageClassificationData.from_folders(train_folder=train, val_split=4, batch_size=4, num_workers=0)
            model = ImageClassifier(**OPTIONS)
            trainer = quiet(folder, max_epochs=3, callbacks=list(callbacks))
            trainer.finetune(model, datamodule=data, strategy="freeze_unfreeze:1", ckpt_path=ckpt_path)
            return model

        if name == "stopped":
            with pytest.raises(SystemExit):
                finetune(callbacks=[SignalAt("train_batch_end", 8, signal.SIGTERM)])
            model = finetune(ckpt_path=folder / "last.ckpt")
        else:
            model = finetune()
        digests.append(digest(model))
    assert digests[0] == digests[1]


def test_a_run_is_not_resumed_on_other_images(trained, tmp_path):
    root, _, _, _ = trained
    data = ImageClassificationData.from_folders(
        train_folder=root / "train", val_folder=colour_folders(tmp_path / "val", each=4), batch_size=8, num_workers=0
    )
    with pytest.raises(BadDataError, match="not those that the run was started on"):
        quiet(tmp_path / "run", max_epochs=5).finetune(
            ImageClassifier(**OPTIONS), datamodule=data, strategy="no_freeze", ckpt_path=root / "run" / "last.ckpt"
        )


def test_an_image_that_goes_bad_while_training_is_named_without_a_workers_traceback(tmp_path):
    data = small_data(tmp_path, num_workers=1)
    data.preprocessing = ImageClassifier(**OPTIONS, num_classes=2).preprocessing
    data.setup("fit")
    (tmp_path / "train" / "red" / "3.png").write_bytes(b"")
    with pytest.raises(BadDataError) as caught:
        quiet(tmp_path / "run", max_steps=3).fit(ImageClassifier(**OPTIONS), datamodule=data)
    assert "red/3.png" in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.long
def test_data_that_meets_a_second_model_takes_its_preprocessing(tmp_path):
    data = small_data(tmp_path)
    for size in (32, 64):
        model = ImageClassifier(**OPTIONS)
        model.preprocessing = Preprocessing(input_size=(3, size, size))
        quiet(tmp_path / str(size), max_steps=1).fit(model, datamodule=data)
        assert next(iter(data.val_dataloader()))[0].shape[2:] == (size, size)
    assert data.preprocessing is None


@pytest.mark.long
def test_the_users_own_preprocessing_of_the_data_wins_and_becomes_the_tasks(tmp_path):
    data = small_data(tmp_path)
    data.preprocessing = Preprocessing(input_size=(3, 48, 48))
    model = ImageClassifier(**OPTIONS)
    backbones = model.preprocessing
    quiet(tmp_path / "run", max_steps=1).fit(model, datamodule=data)
    assert model.preprocessing == replace(backbones, input_size=(3, 48, 48))
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["preprocessing"]["input_size"] == [3, 48, 48]
    other = ImageClassifier(**OPTIONS)
    with pytest.raises(UsageError, match=r"another preprocessing: input_size \[3, 48, 48\] -> "):
        quiet(tmp_path / "run", max_steps=2).fit(
            other, datamodule=small_data(tmp_path / "again"), ckpt_path=tmp_path / "run" / "last.ckpt"
        )


def test_validation_of_a_checkpoint_uses_the_checkpoints_preprocessing(trained, tmp_path):
    root, _, _, _ = trained
    data = ImageClassificationData.from_folders(val_folder=root / "val", num_workers=0)
    model = ImageClassifier(**OPTIONS)
    expected = model.preprocessing
    model.preprocessing = Preprocessing(input_size=(3, 48, 48))
    (metrics,) = Trainer(enable_progress_bar=False).validate(model, datamodule=data, ckpt_path=root / "classifier.ckpt")
    assert (model.preprocessing, metrics["val_accuracy"]) == (expected, 1.0)
    assert next(iter(data.val_dataloader()))[0].shape[1:] == expected.input_size


def test_a_loaded_model_keeps_the_arguments_and_rates_it_was_trained_with(tmp_path):
    """Its backbone is pretrained, whatever it was built from; nothing is fetched (there is no network)."""
    with building_without_weights():
        model = ImageClassifier(TINY, pretrained=True, learning_rate=0.02)
    assert model.hparams.backbone_learning_rate == model.backbone_learning_rate == pytest.approx(0.002)
    first = quiet(tmp_path / "first", max_steps=1)
    first.fit(model, datamodule=small_data(tmp_path))
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "first" / "last.ckpt")
    assert dict(loaded.hparams) == dict(model.hparams)
    assert (loaded.hparams.pretrained, loaded.backbone_learning_rate) == (True, model.backbone_learning_rate)
    assert loaded.recipe()["model"] == model.recipe()["model"]
    explicit = ImageClassifier(TINY, pretrained=False, learning_rate=0.02, backbone_learning_rate=None)
    assert explicit.hparams.backbone_learning_rate == 0.02


def test_a_task_without_the_argument_has_no_backbone_rate_in_its_recipe():
    class Plain(ImageClassifier):
        name = "plain"

        def __init__(self, learning_rate: float = 0.1) -> None:
            super().__init__(TINY, pretrained=False, learning_rate=learning_rate)
            self.save_hyperparameters()

    assert Plain.argument_names() == ["learning_rate"]
    assert "backbone_learning_rate" not in Plain().resolved_hyperparameters()


class HeadAtStart(Callback):
    """Remembers the head before the first step."""

    def setup(self, trainer, module, stage):
        self.digest = digest(module.head)


@pytest.mark.long
def test_it_makes_no_difference_to_the_head_whether_the_classes_were_given(tmp_path):
    heads = {}
    data = small_data(tmp_path)
    for seed in (5, 6):
        for given in (None, 2):
            start = HeadAtStart()
            trainer = quiet(tmp_path / f"{seed}-{given}", max_steps=1, seed=seed, callbacks=start)
            trainer.fit(ImageClassifier(num_classes=given, **OPTIONS), datamodule=data)
            heads[seed, given] = start.digest
    assert heads[5, None] == heads[5, 2]
    assert heads[6, None] == heads[6, 2]
    assert heads[5, 2] != heads[6, 2]


@pytest.mark.long
def test_a_head_that_was_changed_or_trained_is_not_drawn_again(tmp_path):
    data, start = small_data(tmp_path), HeadAtStart()
    model = ImageClassifier(num_classes=2, **OPTIONS)
    with torch.no_grad():
        next(model.head.parameters()).add_(1)
    for seed in (5, 6):
        before = digest(model.head)
        quiet(tmp_path / str(seed), max_steps=1, seed=seed, callbacks=start).fit(model, datamodule=data)
        assert start.digest == before != digest(model.head)


def test_weights_are_not_loaded_into_a_model_with_other_labels(trained):
    root, _, _, _ = trained
    val = ImageClassificationData.from_folders(val_folder=root / "val", num_workers=0)
    trainer = Trainer(enable_progress_bar=False)
    for labels in (("red", "blue"), ("blue", "green")):
        content = read_checkpoint(root / "classifier.ckpt")
        with pytest.raises(UsageError, match=f"the checkpoint has 'blue', 'red'; the model has {labels[0]!r}"):
            load_checkpoint_into(ImageClassifier(labels=labels, **OPTIONS), content, root / "classifier.ckpt")
    with pytest.raises(UsageError, match="labels of the checkpoint"):
        trainer.validate(
            ImageClassifier(labels=("red", "blue"), **OPTIONS), datamodule=val, ckpt_path=root / "classifier.ckpt"
        )


def test_a_model_without_labels_takes_those_of_the_weights(trained):
    root, _, model, _ = trained
    empty = ImageClassifier(**OPTIONS)
    load_checkpoint_into(empty, read_checkpoint(root / "classifier.ckpt"), "classifier.ckpt")
    assert (empty.labels, empty.num_classes, empty.hparams.labels) == (("blue", "red"), 2, ("blue", "red"))
    image = root / "val" / "red" / "0.png"
    assert empty.eval().predict(image) == model.predict(image)


def test_data_of_ones_own_with_labels_in_another_order_is_an_error(tmp_path):
    class Own(DataModule):
        labels = ("red", "blue")

    with pytest.raises(UsageError, match="labels of Own are not the model's") as caught:
        ImageClassifier(labels=("blue", "red"), **OPTIONS).connect(Own())
    assert "set_labels" in str(caught.value)


def test_predicted_features_can_be_trained_on(tmp_path):
    root = colour_folders(tmp_path / "images", each=1)
    features = ImageEmbedder(backbone=TINY, pretrained=False).predict(root / "red" / "0.png")
    layer = torch.nn.Linear(features.shape[0], 1)
    layer(features).sum().backward()
    assert not features.requires_grad
    assert layer.weight.grad is not None


@pytest.mark.long
def test_a_compiled_backbone_is_frozen_and_saved_under_its_own_names(tmp_path):
    data = small_data(tmp_path)
    model, plain = ImageClassifier(**OPTIONS), ImageClassifier(**OPTIONS)
    plain.backbone.load_state_dict(model.backbone.state_dict())
    names = list(model.state_dict())
    model.backbone = torch.compile(model.backbone, backend="eager")
    assert list(model.state_dict()) == names
    for each, folder in ((model, "compiled"), (plain, "plain")):
        quiet(tmp_path / folder, max_epochs=2).finetune(each, datamodule=data, strategy="freeze_unfreeze:1")
    assert not any("_orig_mod" in name for name in read_checkpoint(tmp_path / "compiled" / "last.ckpt")["state_dict"])
    assert digest(model) == digest(plain)
    loaded = flashtask.load(tmp_path / "compiled" / "last.ckpt")
    load_checkpoint_into(model, read_checkpoint(tmp_path / "plain" / "last.ckpt"), "last.ckpt")
    assert digest(model) == digest(loaded) == digest(plain)


def test_a_compiled_backbone_inside_another_module_loads_its_own_names():
    model = ImageClassifier(num_classes=2, **OPTIONS)
    state = {f"0.{name}": value.clone() for name, value in model.state_dict().items()}
    again = ImageClassifier(num_classes=2, **OPTIONS)
    again.backbone = torch.compile(again.backbone, backend="eager")
    holder = torch.nn.Sequential(again)
    holder.load_state_dict(state)
    assert list(holder.state_dict()) == list(state)
    assert digest(holder[0]) == digest(model)


def test_a_parameter_with_two_names_is_frozen_and_trained_once(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.backbone[3] = torch.nn.Linear(8, 8)
            self.backbone.append(torch.nn.Linear(8, 8))
            self.backbone[4].weight = self.backbone[3].weight

        def layer_groups(self):
            return [["backbone.0.weight", "backbone.0.bias"], ["backbone.3.weight"], ["backbone.4.weight"]]

    module = Tied()
    freezing = Freezing(module, resolve_finetuning(("unfreeze_milestones", ((1, 2), 1))))
    freezing.apply(0)
    assert not module.backbone[3].weight.requires_grad
    freezing.apply(1)
    assert module.backbone[3].weight.requires_grad
    held = [id(p) for group in freezing.parameter_groups() for p in group.parameters]
    assert len(held) == len(set(held))
    assert id(module.backbone[4].weight) in held
    quiet(tmp_path / "run", max_epochs=1).finetune(Tied(), *loaders(), strategy="freeze")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_checkpoint_is_loaded_from_an_https_address_once(trained, tmp_path, monkeypatch):
    root, _, model, _ = trained
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(root))

        def log_message(self, *arguments):
            asked.append(self.path)

    names = "subjectAltName=IP:127.0.0.1"
    made = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext {names}"
    made += f" -keyout {tmp_path / 'key.pem'} -out {tmp_path / 'certificate.pem'}"
    subprocess.run(made.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"https://127.0.0.1:{server.server_address[1]}/classifier.ckpt"
        first, second = flashtask.load(address), ImageClassifier.load_from_checkpoint(address)
        server.shutdown()
    assert first.labels == second.labels == ("blue", "red")
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    assert len(asked) == 1


@pytest.mark.long
@pytest.mark.parametrize("form", [tuple, list])
def test_an_optimizer_and_a_schedule_may_be_names_with_options(tmp_path, form):
    colour_folders(tmp_path / "train")
    data = ImageClassificationData.from_folders(train_folder=tmp_path / "train", batch_size=8, val_split=0.5)
    optimizer, schedule = form(("sgd", {"momentum": 0.5})), form(("steplr", {"step_size": 1, "gamma": 0.5}))
    model = ImageClassifier("timm/test_resnet", pretrained=False, optimizer=optimizer, lr_scheduler=schedule)
    trainer = Trainer(max_epochs=1, output_dir=tmp_path / "run", enable_progress_bar=False)
    trainer.fit(model, datamodule=data)
    (made,) = trainer.optimizers
    assert (type(made), made.defaults["momentum"]) == (torch.optim.SGD, 0.5)
    assert made.param_groups[0]["lr"] == pytest.approx(0.005)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model"]["optimizer"] == list(optimizer)
    assert type(flashtask.load(tmp_path / "run" / "last.ckpt")) is ImageClassifier
    with pytest.raises(UsageError, match="did you mean 'sgd'"):
        ImageClassifier("timm/test_resnet", pretrained=False, optimizer=("sdg", {}))


# ---- the loss and the optimizer


def fitted(folder, strategy="no_freeze", **options):
    """One step of a classifier; the trainer."""
    model = ImageClassifier(**{**OPTIONS, **options})
    data = ImageClassificationData.from_folders(train_folder=folder / "train", batch_size=8, num_workers=0)
    trainer = quiet(folder / "run", max_steps=1)
    trainer.finetune(model, datamodule=data, strategy=strategy)
    return trainer


@pytest.mark.long
@pytest.mark.parametrize("backbone", ["timm/test_resnet", "timm/test_vit"])
def test_weight_decay_spares_what_timm_spares(tmp_path, backbone):
    colour_folders(tmp_path / "train")
    trainer = fitted(tmp_path, backbone=backbone)
    (optimizer,) = trainer.optimizers
    model = trainer.fit_run.module
    spared = getattr(model.backbone, "no_weight_decay", set)()
    _, decayed = param_groups_weight_decay(model.backbone, 0.01, no_weight_decay_list=spared)
    expected = {id(p) for p in decayed["params"]} | {id(model.head[0].weight)}
    assert {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]} == expected
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.01}
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rates = [name for name in next(csv.reader(file)) if name.startswith("learning_rate")]
    assert rates == ["learning_rate", "learning_rate_backbone"]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("options", "decays"),
    [
        ({"weight_decay": 0.3}, [0.3, 0.0]),
        ({"weight_decay": 0}, [0]),
        ({"optimizer": "sgd"}, [0]),
        ({"optimizer": ("sgd", {"weight_decay": 1e-4})}, [1e-4, 0.0]),
        ({"optimizer": "adagrad", "weight_decay": 0.1}, [0.1, 0.0]),
    ],
    ids=str,
)
def test_weight_decay_is_the_one_that_was_given_or_the_optimizers_own(tmp_path, options, decays):
    colour_folders(tmp_path / "train")
    (optimizer,) = fitted(tmp_path, "freeze", **options).optimizers
    assert [(g["name"], g["weight_decay"]) for g in optimizer.param_groups] == [("head", decay) for decay in decays]
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model"]
    assert recipe.get("weight_decay") == options.get("weight_decay")


def test_a_weight_decay_that_is_wrong_or_given_twice_is_refused():
    for decay in (-0.1, "0.1", float("nan")):
        with pytest.raises(UsageError, match="weight_decay must be a number of 0 or more"):
            ImageClassifier(**OPTIONS, weight_decay=decay)
    with pytest.raises(UsageError, match="optimizer_options too"):
        ImageClassifier(**OPTIONS, weight_decay=0.1, optimizer=("adamw", {"weight_decay": 0.1}))


@pytest.mark.long
def test_a_run_that_decayed_norms_and_biases_is_not_resumed_as_one_that_does_not(tmp_path):
    class Earlier(ImageClassifier):
        def configure_optimizers(self):
            groups = self.trainer.fit_run.freezing.optimizer_groups(head=0.02, backbone=0.02)
            optimizer = torch.optim.AdamW(groups)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]

    data = small_data(tmp_path)
    quiet(tmp_path / "run", max_epochs=1).finetune(Earlier(**OPTIONS), datamodule=data, strategy="freeze")
    again = quiet(tmp_path / "run", max_epochs=2)
    with pytest.raises(UsageError, match="decayed the weights of norms and the biases too") as caught:
        again.finetune(ImageClassifier(**OPTIONS), datamodule=data, ckpt_path=tmp_path / "run" / "last.ckpt")
    assert "flashtask.load(path)" in caught.value.fix
    assert flashtask.load(tmp_path / "run" / "last.ckpt").labels == ("blue", "red")


def test_labels_are_smoothed_in_training_and_not_in_validation(tmp_path):
    outputs, targets = torch.tensor([[2.0, 0.0], [0.5, 1.0]]), torch.tensor([0, 1])
    model = ImageClassifier(**OPTIONS, label_smoothing=0.2)
    plain = nn.functional.cross_entropy(outputs, targets)
    assert model.train().loss(outputs, targets) == nn.functional.cross_entropy(outputs, targets, label_smoothing=0.2)
    assert model.eval().loss(outputs, targets) == plain
    assert ImageClassifier(**OPTIONS).train().loss(outputs, targets) == plain
    colour_folders(tmp_path / "train")
    fitted(tmp_path, "freeze", label_smoothing=0.2)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model"]["label_smoothing"] == 0.2
    assert flashtask.load(tmp_path / "run" / "last.ckpt").label_smoothing == 0.2
    for wrong in (1, -0.1, "0.1"):
        with pytest.raises(UsageError, match="label_smoothing must be from 0 to below 1"):
            ImageClassifier(**OPTIONS, label_smoothing=wrong)


@pytest.mark.parametrize(
    ("arguments", "words", "fix"),
    [
        ({"pretrained": "swav"}, "pretrained must be True or False, not 'swav'", "resnet50.a1_in1k"),
        ({"backbone": 2}, "a backbone must be a name, a module or a function, not 2", "num_classes=2"),
    ],
)
def test_arguments_of_other_libraries_are_answered_with_what_to_write(arguments, words, fix):
    with pytest.raises(UsageError, match=words) as caught:
        ImageClassifier(**{**OPTIONS, **arguments})
    assert fix in caught.value.fix
