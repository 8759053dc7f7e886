"""Tasks: the three lines, labels by name, prediction, checkpoints that need neither data nor code."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from PIL import Image
from small import colour_folders

import flashtask
from flashtask import ImageClassificationData, ImageClassifier, ImageEmbedder, Trainer, read_checkpoint
from flashtask.core.errors import BadDataError, IntegrityError, MissingInputError, UsageError

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


def test_s7_a_trainer_with_epochs_and_a_device_trains_a_task(trained):
    root, trainer, _, _ = trained
    assert trainer.fit_run.device.type == "cpu"
    assert [row["epoch"] for row in trainer.fit_run.history] == [0, 1, 2, 3]
    assert trainer.callback_metrics["val_accuracy"] == 1.0
    summary = json.loads((root / "run" / "summary.json").read_text())
    assert (summary["task"], summary["backbone"], summary["strategy"]) == ("image_classification", TINY, "no_freeze")
    assert summary["best"]["val_accuracy"] == 1.0
    assert summary["images_per_second"] > 0
    with (root / "run" / "metrics.csv").open() as file:
        assert {"epoch", "train_loss", "val_loss", "val_accuracy", "learning_rate", "seconds"} <= set(
            next(csv.reader(file))
        )


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
    with pytest.raises(UsageError, match="paths and PIL images"):
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
    from small import Net, loaders, net

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
    model = ImageClassifier(backbone=backbone, num_classes=2)
    trainer = quiet(tmp_path / "run", max_steps=1)
    trainer.fit(model, datamodule=small_data(tmp_path))
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    path = tmp_path / "run" / "last.ckpt"
    with pytest.raises(UsageError, match=r"'backbone' of ImageClassifier \(Sequential\) could not be stored"):
        ImageClassifier.load_from_checkpoint(path)
    again = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    loaded = ImageClassifier.load_from_checkpoint(path, backbone=again)
    assert torch.equal(loaded.backbone[0].weight, model.backbone[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet81"}, "did you mean"),
        ({"head": "linaer"}, "did you mean 'linear'"),
        ({"learning_rate": 0}, "above 0"),
        ({"head_options": {"droput": 0.1}}, "did you mean 'dropout'"),
        ({"labels": ["a", "a"]}, "stands twice"),
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
    from small import digest

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

    from small import digest
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
