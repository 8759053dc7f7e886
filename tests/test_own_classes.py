"""A loss, metrics or a task of the user's own: what the file of a model says, and what it can do without the code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import warm
from small import colour_folders
from torch import nn
from torchmetrics.classification import MulticlassF1Score

import flashtask
from flashtask import TASKS, ImageClassificationData, ImageClassifier, Task, Trainer, read_checkpoint, seed_everything
from flashtask.cli import run
from flashtask.core.errors import IntegrityError, UnknownNameError, UsageError

SIZE = {"preprocessing": {"input_size": [3, 32, 32]}}


class Weighted(ImageClassifier):
    """Another loss with weights in a buffer, other metrics, another argument: nothing that a prediction needs."""

    def __init__(self, red: float = 1.0, **options):
        super().__init__(**options)
        self.save_hyperparameters()
        self.register_buffer("class_weights", torch.tensor([1.0, red]))
        self.f1 = MulticlassF1Score(2)

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, self.class_weights)

    def make_metrics(self, num_outputs):
        return {**super().make_metrics(num_outputs), "f1": self.f1}


class Sharpened(ImageClassifier):
    """It predicts otherwise than its parent."""

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return super().predict_step(batch, batch_idx).square()


class Deeper(ImageClassifier):
    """It has a part that its parent lacks, within the backbone."""

    def __init__(self, **options):
        super().__init__(**options)
        self.backbone.register_buffer("scale", torch.ones(1))


class Brightness(Task):
    """A task under a name of its own."""

    name = "own_brightness"
    monitor, monitor_mode = "val_loss", "min"

    def __init__(self, backbone="timm/test_resnet", **options):
        super().__init__(backbone, num_outputs=1, **options)
        self.save_hyperparameters()

    def loss(self, outputs, targets):
        return (outputs.squeeze(1) - targets).square().mean()


class WithObjects(ImageClassifier):
    """Its loss is an object, which no file can hold."""

    def __init__(self, loss_fn, **options):
        super().__init__(**options)
        self.save_hyperparameters()
        self.loss_fn = loss_fn

    def loss(self, outputs, targets):
        return self.loss_fn(outputs, targets)


class WithActivation(ImageClassifier):
    """The object is a part of the network, so a prediction needs it."""

    def __init__(self, act, **options):
        super().__init__(**options)
        self.save_hyperparameters()
        self.act = nn.Sequential(act)


class FocalLoss(nn.Module):
    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets).square()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return colour_folders(tmp_path_factory.mktemp("images") / "train", each=8, size=40)


def trained(kind, images, folder, **options) -> Path:
    seed_everything(3, verbose=False)
    data = ImageClassificationData.from_folders(images, val_split=0.25, batch_size=4, num_workers=0, **SIZE)
    model = kind(backbone="timm/test_resnet", pretrained=False, **options)
    trainer = Trainer(output_dir=folder, max_epochs=1, precision="32", enable_progress_bar=False, logger=False)
    trainer.finetune(model, datamodule=data, strategy="no_freeze")
    return folder / "best.ckpt"


def scores(model, images):
    return [model.predict(path).scores for path in sorted(images.rglob("*.png"))[:3]]


def test_a_model_with_its_own_loss_and_metrics_predicts_without_its_class(images, tmp_path, capsys):
    path = trained(Weighted, images, tmp_path / "run", red=3.0)
    own = Weighted.load_from_checkpoint(path)
    content = read_checkpoint(path)
    assert content["task"] == "image_classification"
    assert content["own_class"] == {"name": "Weighted", "predicts_by": []}
    assert "test_own_classes" not in repr({k: v for k, v in content.items() if k != "state_dict"})
    capsys.readouterr()
    model = flashtask.load(path)
    assert type(model) is ImageClassifier
    assert scores(model, images) == scores(own, images)
    fix = f"flashtask.load({str(path)!r}, task=Weighted)"
    lacks = "the loss and metrics of the class Weighted"
    told = f"{path} predicts without {lacks}; to validate, test or train: {fix}\n"
    assert capsys.readouterr().err == told
    data = ImageClassificationData.from_folders(images, val_split=0.25, batch_size=4, num_workers=0)
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    trainer = Trainer(**quiet)
    with pytest.raises(UsageError, match="validation needs the loss and metrics of the class Weighted") as raised:
        trainer.validate(model, datamodule=data)
    assert raised.value.fix == fix
    with pytest.raises(UsageError, match="training needs the loss and metrics of the class Weighted"):
        trainer.finetune(model, datamodule=data, strategy="freeze")
    predicted = ImageClassificationData.from_folders(predict_folder=images, num_workers=0)
    assert len(trainer.predict(model, datamodule=predicted)) == 1
    with_class = flashtask.load(path, task=Weighted)
    assert (type(with_class), with_class.hparams.red) == (Weighted, 3.0)
    (metrics,) = Trainer(**quiet).validate(with_class, datamodule=data)
    assert {"val_loss", "val_accuracy", "val_f1"} <= metrics.keys()


def test_what_is_saved_of_it_again_still_says_whose_it_is(images, tmp_path, capsys):
    path = trained(Weighted, images, tmp_path / "run")
    flashtask.load(path).save_pretrained(tmp_path / "folder")
    capsys.readouterr()
    again = flashtask.load(tmp_path / "folder")
    assert "without the loss and metrics of the class Weighted" in capsys.readouterr().err
    assert scores(again, images) == scores(flashtask.load(path), images)
    # To go on from its weights with the plain loss is a choice that names the class.
    further = ImageClassifier.from_pretrained(path, learning_rate=0.5)
    assert (type(further), further.learning_rate, "own_class" in further.describe()) == (ImageClassifier, 0.5, False)


@pytest.mark.parametrize(("kind", "names"), [(Sharpened, "predict_step")])
def test_a_class_that_predicts_in_its_own_way_is_not_replaced_by_its_parent(images, tmp_path, kind, names):
    path = trained(kind, images, tmp_path / "run")
    with pytest.raises(UsageError, match=f"was written by {kind.__name__}, a custom class") as raised:
        flashtask.load(path)
    assert names in raised.value.why
    assert raised.value.fix == f"flashtask.load({str(path)!r}, task={kind.__name__})"
    assert scores(flashtask.load(path, task=kind), images) == scores(kind.load_from_checkpoint(path), images)


def test_a_class_with_other_parts_is_refused_by_name(images, tmp_path):
    path = trained(Deeper, images, tmp_path / "run")
    with pytest.raises(IntegrityError, match="its weights do not fit ImageClassifier") as raised:
        flashtask.load(path)
    assert "task=Deeper" in raised.value.fix


@pytest.mark.long
def test_a_task_that_is_not_registered_here_is_named_with_what_to_import(images, tmp_path, capsys):
    TASKS.register("own_brightness", Brightness)
    try:
        path = trained(Brightness, images, tmp_path / "run")
        assert type(flashtask.load(path)) is Brightness
    finally:
        TASKS.remove("own_brightness")
    content = read_checkpoint(path)
    assert (content["task"], content.get("own_class")) == ("own_brightness", None)
    with pytest.raises(UnknownNameError, match="holds a task 'own_brightness', but no task of this name is registered"):
        flashtask.load(path)
    assert run(["predict", str(path), str(images)]) == 76
    error = capsys.readouterr().err
    assert "import the module that registers it first (TASKS.register('own_brightness', MyTask))" in error
    assert f"flashtask.load({str(path)!r}, task=MyTask)" in error
    assert float(flashtask.load(path, task=Brightness).predict(next(images.rglob("*.png")))) < 10
    assert type(Brightness.load_from_checkpoint(path)) is Brightness
    with pytest.raises(UsageError, match="ImageClassifier is 'image_classification'"):
        flashtask.load(path, task=ImageClassifier)
    with pytest.raises(UsageError, match="a subclass of flashtask"):
        flashtask.load(path, task="own_brightness")


@pytest.mark.long
def test_a_task_that_was_never_registered_is_named_by_its_class(images, tmp_path):
    path = trained(Brightness, images, tmp_path / "run")
    with pytest.raises(UnknownNameError, match="task 'own_brightness'") as raised:
        flashtask.load(path)
    assert "TASKS.register('own_brightness', Brightness)" in raised.value.fix
    assert type(flashtask.load(path, task=Brightness)) is Brightness


@pytest.mark.filterwarnings("ignore:the hyper-parameter:UserWarning")
def test_a_loss_that_no_file_can_hold_is_not_needed_to_predict(images, tmp_path, capsys):
    path = trained(WithObjects, images, tmp_path / "run", loss_fn=FocalLoss())
    own = WithObjects.load_from_checkpoint(path, loss_fn=FocalLoss())
    capsys.readouterr()
    fix = f"WithObjects.load_from_checkpoint({str(path)!r}, loss_fn=...)"
    model = flashtask.load(path, task=WithObjects)
    assert type(model) is WithObjects
    assert scores(model, images) == scores(own, images)
    assert f"predicts without loss_fn (FocalLoss); to validate, test or train: {fix}" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"loss_fn \(FocalLoss\) could not be stored") as raised:
        model.loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    assert raised.value.fix == fix
    data = ImageClassificationData.from_folders(images, val_split=0.25, batch_size=4, num_workers=0)
    with pytest.raises(UsageError, match=r"validation needs loss_fn \(FocalLoss\)"):
        Trainer(enable_progress_bar=False, logger=False).validate(model, datamodule=data)
    assert scores(flashtask.load(path), images) == scores(own, images)  # without the class too
    with pytest.raises(UsageError, match="'loss_fn' of WithObjects"):
        WithObjects.load_from_checkpoint(path)


@pytest.mark.filterwarnings("ignore:the hyper-parameter:UserWarning")
def test_an_optimizer_that_no_file_can_hold_is_only_needed_to_train(images, tmp_path, capsys):
    from functools import partial

    options = {"optimizer_options": {"foreach": partial(bool)}}
    seed_everything(3, verbose=False)
    model = ImageClassifier("timm/test_resnet", labels=["blue", "red"], pretrained=False, **options)
    model.save_pretrained(tmp_path / "folder")
    loaded = flashtask.load(tmp_path / "folder")
    assert "predicts without optimizer_options (partial); to train: ImageClassifier" in capsys.readouterr().err
    data = ImageClassificationData.from_folders(images, val_split=0.25, batch_size=4, num_workers=0, **SIZE)
    trainer = Trainer(enable_progress_bar=False, logger=False, max_epochs=1)
    assert "val_accuracy" in trainer.validate(loaded, datamodule=data)[0]
    with pytest.raises(UsageError, match=r"training needs optimizer_options \(partial\)"):
        trainer.finetune(loaded, datamodule=data, strategy="freeze")


@pytest.mark.filterwarnings("ignore:the hyper-parameter:UserWarning")
def test_an_object_that_the_network_is_built_of_is_asked_for(images, tmp_path):
    path = trained(WithActivation, images, tmp_path / "run", act=nn.ReLU())
    with pytest.raises(UsageError, match=r"'act' of WithActivation \(ReLU\) could not be stored"):
        flashtask.load(path, task=WithActivation)


@pytest.mark.long
def test_the_command_line_predicts_with_it_and_says_why_it_cannot_validate(images, tmp_path, capsys):
    """In a process that has never seen the class."""
    path = trained(Weighted, images, tmp_path / "run")
    code = "import sys\nfrom flashtask.cli import run\nsys.exit(run(['predict', *sys.argv[1:], '--format', 'csv']))"
    done = warm.run(code, path, images)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 17
    assert "predicts without the loss and metrics of the class Weighted" in done.stderr
    assert run(["validate", str(path), str(images)]) == 2
    assert "error: validation needs the loss and metrics of the class Weighted\n" in capsys.readouterr().err
