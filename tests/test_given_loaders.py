"""Loaders that a user brings: what is refused and with which fix, and what they tell about classes and sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import colour_folders, net
from small import loaders as numbers
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import flashtask
from flashtask import DataModule, ImageClassificationData, ImageClassifier, Phase, Trainer
from flashtask.core.errors import UsageError
from flashtask.core.preprocessing import Preprocessing

TINY = {"backbone": "timm/test_resnet", "pretrained": False}
IMAGES = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SAMPLES = TensorDataset(IMAGES, torch.tensor([0, 1] * 4))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(SAMPLES)


class Named(Dataset):
    """As torchvision's datasets are."""

    classes = ("cat", "dog")

    def __init__(self, size=32):
        self.size = size

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return IMAGES[index, :, : self.size, : self.size], index % 2


def batches_once():
    yield from DataLoader(SAMPLES, 4)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{"max_epochs": 2, "precision": "32", **quiet, **options})


def classifier(**options):
    return ImageClassifier(**{**TINY, "num_classes": 2, **options})


# ---- what is refused


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("strategy", "fix"),
    [
        ("freeze", "trainer.finetune(model, data, strategy='freeze')"),
        ("frozen", "trainer.finetune(model, data, strategy='freeze')"),
        ("freeze_unfreze:5", "trainer.finetune(model, data, strategy='freeze_unfreeze:5')"),
        (("freeze_unfreeze", 5), "trainer.finetune(model, data, strategy=('freeze_unfreeze', 5))"),
        ([Phase("head")], "trainer.finetune(model, data, strategy=...)"),
        ("ddp", "Trainer(strategy='ddp')"),
    ],
)
def test_a_strategy_in_the_place_of_a_loader_is_answered_with_the_call_that_was_meant(strategy, fix, tmp_path):
    data = ImageClassificationData.from_folders(colour_folders(tmp_path / "train", each=2))
    for given in ((data, strategy), (DataLoader(SAMPLES, 4), strategy)):
        for method in (trainer().finetune, trainer().fit):
            with pytest.raises(UsageError, match="the validation data must be a DataLoader or a DataModule") as caught:
                method(classifier(), *given)
            assert caught.value.fix.endswith(fix)
    with pytest.raises(UsageError, match="the training data must be a DataLoader or a DataModule"):
        trainer().finetune(classifier(), strategy, datamodule=data)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("given", "what", "fix"),
    [
        (SAMPLES, "a dataset (TensorDataset)", "DataLoader(dataset, batch_size=32, shuffle=True)"),
        (Stream(), "a dataset (Stream)", "DataLoader(dataset, batch_size=32)"),
        ("data/tiles", "'data/tiles'", "datamodule=ImageClassificationData.from_root('data/tiles')"),
        (Path("tiles"), "tiles", "datamodule=ImageClassificationData.from_root('tiles')"),
        (IMAGES, "a Tensor of shape (8, 3, 32, 32)", "DataLoader(TensorDataset(images, targets), batch_size=32"),
        (IMAGES.numpy(), "of shape (8, 3, 32, 32)", "DataLoader(TensorDataset(images, targets), batch_size=32"),
        (SAMPLES.tensors, "a pair of tensors", "DataLoader(TensorDataset(images, targets), batch_size=32"),
        ({"a": 1}, "a dictionary ('a')", "a dictionary of loaders"),
        (DataLoader, "the class DataLoader", "DataLoader(...)"),
        (batches_once, "the function batches_once", "call it"),
        (5, "5", "DataLoader(dataset, batch_size=32"),
    ],
)
def test_what_is_not_a_loader_is_refused_with_the_one_to_give(given, what, fix):
    with pytest.raises(UsageError) as caught:
        trainer().finetune(classifier(), given)
    assert caught.value.what.startswith("the training data must be a DataLoader or a DataModule, not ")
    assert what in caught.value.what
    assert fix in caught.value.fix
    for method in (trainer().validate, trainer().test, trainer().predict):
        with pytest.raises(UsageError, match="data must be a DataLoader or a DataModule"):
            method(classifier(), [given] if isinstance(given, (Dataset, str)) else given)


def test_what_a_method_returns_is_looked_at_too():
    class Data(DataModule):
        def train_dataloader(self):
            return SAMPLES

    with pytest.raises(UsageError, match="not a dataset"):
        trainer().finetune(classifier(), datamodule=Data())


def test_a_path_to_predict_is_answered_with_the_method_that_takes_it():
    with pytest.raises(UsageError) as caught:
        trainer().predict(classifier(), "cat.png")
    assert caught.value.fix == "model.predict('cat.png')"


def test_a_loader_as_datamodule_and_two_data_modules_are_refused():
    with pytest.raises(UsageError, match=r"not DataLoader\n  fix: give a loader without a name"):
        trainer().fit(net(), datamodule=numbers()[0])
    with pytest.raises(UsageError, match="two data modules"):
        trainer().fit(net(), DataModule(), datamodule=DataModule())


def test_batches_that_come_once_serve_one_epoch_alone():
    with pytest.raises(UsageError, match="a generator, which gives its batches only once"):
        trainer().finetune(classifier(), batches_once())
    once = trainer(max_epochs=1)
    once.fit(net(), (batch for batch in numbers()[0]))
    assert once.global_step == 7


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "given",
    [
        [SAMPLES[i] for i in range(8)],
        [(IMAGES[0], 1), (IMAGES[1], 0)],
        DataLoader(SAMPLES, batch_size=None),
    ],
)
def test_samples_in_the_place_of_batches_are_named(given):
    for method in (trainer().finetune, trainer().validate):
        with pytest.raises(UsageError, match=r"images \(B, C, H, W\).* this one is a single sample\n  fix: DataLoader"):
            method(classifier(), given)
    with pytest.raises(UsageError, match=r"this one is a single image \(3, 32, 32\)"):
        trainer().predict(classifier(), given)


def test_batches_of_another_form_are_described():
    rows = [{"image": IMAGES[i], "label": i % 2} for i in range(8)]
    with pytest.raises(UsageError, match=r"this one is a dictionary \('image', 'label'\)"):
        trainer().finetune(classifier(), DataLoader(rows, 4))
    with pytest.raises(UsageError, match="this one is a list of 3"):
        trainer().finetune(classifier(), DataLoader(TensorDataset(*SAMPLES.tensors, torch.ones(8)), 4))


def test_a_stream_is_not_asked_for_epochs_that_it_has():
    with pytest.raises(UsageError, match="needs to know how long") as caught:
        trainer().finetune(classifier(), DataLoader(Stream(), 4))
    assert caught.value.fix.startswith("max_steps=1000, ")
    trainer(max_steps=2).finetune(classifier(), DataLoader(Stream(), 4))


# ---- what loaders tell


@pytest.mark.parametrize(("head", "strategy"), [("linear", "freeze"), ("linear", "no_freeze"), ("ridge", "freeze")])
def test_loaders_without_a_number_of_classes_are_refused_before_the_optimizer(head, strategy):
    with pytest.raises(UsageError, match="the number of classes is not known") as caught:
        trainer().finetune(ImageClassifier(**TINY, head=head), DataLoader(SAMPLES, 4), strategy=strategy)
    assert "ImageClassifier(num_classes=2)" in caught.value.fix


def test_the_classes_that_a_dataset_states_become_the_labels():
    for dataset in (Named(), Subset(Named(), range(4)), flashtask.seeded(Named())):
        model = ImageClassifier(**TINY)
        trainer(max_epochs=1).finetune(model, DataLoader(dataset, 4), strategy="freeze")
        assert (model.labels, model.num_classes) == (("cat", "dog"), 2)
    own = classifier(labels=["a", "b"])
    trainer(max_epochs=1).finetune(own, DataLoader(Named(), 4), strategy="freeze")
    assert own.labels == ("a", "b")
    wider = classifier(num_classes=5)
    trainer(max_epochs=1).finetune(wider, DataLoader(Named(), 4), strategy="freeze")
    assert (wider.labels, wider.num_classes) == (None, 5)


def test_a_fit_says_the_names_of_its_classes_in_a_line(tmp_path, capsys):
    names = tuple(f"class number {i}" for i in range(40))
    folder = tmp_path / "many"
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 9, dtype=np.uint8)).save(folder / name / "0.png")
    data = ImageClassificationData.from_folders(folder, batch_size=8)
    data.preprocessing = Preprocessing(input_size=(3, 32, 32))
    trainer(max_epochs=1, max_steps=1).finetune(ImageClassifier(**TINY), datamodule=data, strategy="freeze")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "classes:" in line]
    first = sorted(names)[:3]
    assert line == f"40 classes: {', '.join(first)} and 37 more"
    assert len(line) < 80


def normalised(pictures, preprocessing):
    pixels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in pictures])
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (pixels - mean) / std


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["freeze", "no_freeze"])
def test_pictures_are_predicted_at_the_size_of_the_batches_that_were_trained_on(strategy, tmp_path, capsys):
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(8)]
    model = classifier(labels=["cat", "dog"], num_classes=None)
    before = model.preprocessing
    loader = DataLoader(TensorDataset(normalised(pictures, before), torch.tensor([0, 1] * 4)), 4)
    run = trainer(max_epochs=1)
    run.finetune(model, loader, strategy=strategy)
    expected = torch.cat(run.predict(model, loader))[:, 0]
    run.save_checkpoint(tmp_path / "x.ckpt")
    for same in (model, flashtask.load(tmp_path / "x.ckpt")):
        assert same.preprocessing.input_size == (3, 48, 64)
        assert (same.preprocessing.mean, same.preprocessing.std) == (before.mean, before.std)
        found = torch.tensor([dict(zip(one.labels, one.scores, strict=True))["cat"] for one in same.predict(pictures)])
        assert torch.allclose(found, expected, atol=0.005)
    said = [line for line in capsys.readouterr().err.splitlines() if "own preprocessing is not known" in line]
    assert len(said) == 1
    assert "predicted at 48 x 64 without a crop, with the model's mean and std" in said[0]


def test_a_preprocessing_of_the_users_own_or_of_the_data_is_left_as_it_is(tmp_path, capsys):
    model = classifier()
    model.preprocessing = Preprocessing(input_size=(3, 40, 40), crop_pct=0.5)
    own = model.preprocessing
    trainer(max_epochs=1).finetune(model, DataLoader(SAMPLES, 4), strategy="freeze")
    assert model.preprocessing is own
    assert (own.input_size, own.crop_pct) == ((3, 40, 40), 0.5)
    data = ImageClassificationData.from_folders(colour_folders(tmp_path / "train", each=2))
    fresh = classifier()
    before = fresh.preprocessing
    trainer(max_epochs=1).finetune(fresh, datamodule=data, strategy="freeze")
    assert fresh.preprocessing == before
    assert "own preprocessing is not known" not in capsys.readouterr().err


def test_a_second_fit_on_another_size_is_recorded_too():
    model = classifier()
    for size in (32, 24, 32):
        trainer(max_epochs=1).finetune(model, DataLoader(Named(size), 4), strategy="freeze")
        assert model.preprocessing.input_size == (3, size, size)
