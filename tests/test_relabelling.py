"""Head surgery: a trained model goes on with other classes, and keeps what it knows of those that remain."""

from __future__ import annotations

import pytest
import torch
from small import colour_folders
from torch import nn

import flashtask
from flashtask import HEADS, DataModule, ImageClassificationData, ImageClassifier, Trainer, read_checkpoint
from flashtask.core.errors import BadDataError, UsageError
from flashtask.heads import build_head
from flashtask.tasks.relabelling import LabelChange, keep_rows, rows_of_classes

TINY = "timm/test_resnet"


def data(root, *classes, **options):
    parts = [root / f"{part}-{'-'.join(classes)}" for part in ("train", "val", "test")]
    for folder in parts:
        if not folder.exists():
            colour_folders(folder, each=4, classes=classes)
    return ImageClassificationData.from_folders(*parts, batch_size=4, num_workers=0, **options)


def quiet(folder, **options):
    return Trainer(output_dir=folder, enable_progress_bar=False, **{"max_epochs": 1, "seed": 5, **options})


def model(**options):
    return ImageClassifier(TINY, pretrained=False, learning_rate=1e-3, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a classifier of blue and red things."""
    root = tmp_path_factory.mktemp("trained")
    quiet(root / "run").finetune(model(), datamodule=data(root, "blue", "red"), strategy="freeze")
    return root / "run" / "last.ckpt"


class Start(flashtask.Callback):
    """Remembers the head before the first step."""

    def on_train_start(self, trainer, module):
        self.head = {name: value.clone() for name, value in module.head.state_dict().items()}


@pytest.mark.long
def test_a_new_fit_keeps_the_rows_of_the_classes_that_remain_and_says_so(tmp_path, trained, capsys):
    loaded = flashtask.load(trained)
    before = {name: value.clone() for name, value in loaded.head.state_dict().items()}
    start = Start()
    trainer = quiet(tmp_path / "run", callbacks=[start])
    trainer.finetune(loaded, datamodule=data(tmp_path, "green", "red"), strategy="freeze")
    assert "kept 1 of 2 classes (red); new: green; dropped: blue" in capsys.readouterr().err
    for name in ("0.weight", "0.bias"):
        assert torch.equal(start.head[name][1], before[name][1])
        assert not torch.equal(start.head[name][0], before[name][0])
    fresh = model(labels=["green", "red"])
    fresh.trainer = trainer
    fresh.make_head(2)
    assert torch.equal(start.head["0.weight"][0], fresh.head[0].weight[0])  # drawn from the run's seed
    assert loaded.labels == loaded.hparams.labels == ("green", "red")
    assert loaded.num_classes == loaded.hparams.num_classes == 2


def test_classes_are_added_and_put_in_their_new_places(tmp_path, trained):
    loaded = flashtask.load(trained)
    before = loaded.head[0].weight.clone()
    quiet(tmp_path / "run", max_steps=1).finetune(loaded, datamodule=data(tmp_path, "blue", "green", "red"))
    again = flashtask.load(trained)
    change = again.change_labels(["red", "green", "blue"])
    assert change == LabelChange(kept=("red", "blue"), new=("green",), dropped=(), had=2)
    assert str(change) == "kept 2 of 2 classes (red, blue); new: green"
    assert torch.equal(again.head[0].weight[[2, 0]], before)
    assert loaded.head[0].weight.shape == again.head[0].weight.shape == (3, again.num_features)
    assert not again.head.training
    for part in ("val", "test"):
        assert loaded.metrics[part]["accuracy"].num_classes == 3


@pytest.mark.long
def test_what_was_changed_goes_into_the_checkpoint_and_comes_back(tmp_path, trained):
    loaded = flashtask.load(trained)
    trainer = quiet(tmp_path / "run")
    trainer.finetune(loaded, datamodule=data(tmp_path, "blue", "green", "red"), strategy="freeze")
    content = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert content["labels"] == ["blue", "green", "red"]
    assert (content["hyper_parameters"]["num_classes"], len(content["hyper_parameters"]["labels"])) == (3, 3)
    again = flashtask.load(tmp_path / "run" / "best.ckpt")
    path = tmp_path / "val-blue-green-red" / "green" / "0.png"
    assert again.predict(path) == loaded.predict(path)
    # Resumed with a model that was made for the first classes, the run goes on with its own.
    longer = quiet(tmp_path / "run", max_epochs=2)
    longer.finetune(again, datamodule=data(tmp_path, "blue", "green", "red"), strategy="freeze", ckpt_path="last")
    assert len(longer.fit_run.history) == 2


@pytest.mark.long
def test_a_resumed_run_validation_test_and_prediction_are_strict(tmp_path, trained):
    other = data(tmp_path, "green", "red")
    for stage in ("validate", "test"):
        with pytest.raises(BadDataError, match="green"):
            getattr(quiet(tmp_path / "run"), stage)(flashtask.load(trained), datamodule=other)
    with pytest.raises(BadDataError, match="green"):
        quiet(tmp_path / "run").finetune(flashtask.load(trained), datamodule=other, ckpt_path=trained)


@pytest.mark.long
def test_labels_that_the_user_named_are_not_changed_by_data(tmp_path):
    named = model(labels=["blue", "red"])
    with pytest.raises(BadDataError, match="green"):
        quiet(tmp_path / "run").finetune(named, datamodule=data(tmp_path, "green", "red"))
    superset = model(labels=["blue", "green", "red"])
    quiet(tmp_path / "other", max_steps=1).finetune(superset, datamodule=data(tmp_path, "green", "red"))
    assert superset.labels == ("blue", "green", "red")
    counted = model(num_classes=3)
    with pytest.raises(UsageError, match="num_classes=3, but the data has 2 classes"):
        quiet(tmp_path / "third").finetune(counted, datamodule=data(tmp_path, "green", "red"))


@pytest.mark.long
def test_labels_that_change_labels_was_given_count_as_named(tmp_path, trained):
    loaded = flashtask.load(trained)
    loaded.change_labels(["blue", "green", "red"])
    quiet(tmp_path / "run", max_steps=1).finetune(loaded, datamodule=data(tmp_path, "green", "red"))
    assert loaded.labels == ("blue", "green", "red")


@pytest.mark.long
def test_a_model_that_was_fitted_before_goes_on_with_other_data_too(tmp_path, capsys):
    once = model()
    quiet(tmp_path / "one", max_steps=1).finetune(once, datamodule=data(tmp_path, "blue", "red"))
    assert "kept" not in capsys.readouterr().err
    quiet(tmp_path / "two", max_steps=1).finetune(once, datamodule=data(tmp_path, "green", "red"))
    assert "kept 1 of 2 classes (red); new: green; dropped: blue" in capsys.readouterr().err


class Ordered(DataModule):
    """Data of the user's that has labels and cannot take others."""

    def __init__(self, inner, labels):
        self.inner, self.labels = inner, labels

    def setup(self, stage):
        self.inner.set_labels(self.labels)
        self.inner.setup(stage)

    def train_dataloader(self):
        return self.inner.train_dataloader()


@pytest.mark.long
def test_the_same_classes_in_another_order_move_the_data_or_else_the_rows(tmp_path, trained):
    loaded = flashtask.load(trained)
    rows, moved = loaded.head[0].weight.clone(), data(tmp_path, "blue", "red")
    moved.set_labels(["red", "blue"])
    start = Start()
    quiet(tmp_path / "one", callbacks=[start]).finetune(loaded, datamodule=moved)
    assert (loaded.labels, moved.labels) == (("blue", "red"), ("blue", "red"))
    assert torch.equal(start.head["0.weight"], rows)
    loaded = flashtask.load(trained)
    quiet(tmp_path / "two", callbacks=[start]).finetune(loaded, Ordered(data(tmp_path, "blue", "red"), ("red", "blue")))
    assert loaded.labels == ("red", "blue")
    assert torch.equal(start.head["0.weight"], rows.flip(0))


@pytest.mark.parametrize(
    ("head", "options", "rows"),
    [
        ("linear", {"dropout": 0.1}, {"1.weight", "1.bias"}),
        ("linear", {"bias": False}, {"0.weight"}),
        ("mlp", {"hidden_sizes": [6, 4], "layer_norm": True}, {"6.weight", "6.bias"}),
        ("cosine", {}, {"weight"}),
        ("prototype", {}, {"prototypes", "seen"}),
        ("ridge", {}, {"0.weight", "0.bias"}),
        ("logistic", {}, {"0.weight", "0.bias"}),
    ],
)
def test_every_head_tells_which_of_its_weights_are_rows_and_keeps_the_others_whole(head, options, rows):
    old, wider, new = (build_head(head, 5, count, **options) for count in (3, 4, 4))
    for index, value in enumerate(old.state_dict().values()):
        value.fill_(1) if value.dtype == torch.bool else value.normal_(index)
    assert rows_of_classes(old, wider, 3) == rows
    drawn = {name: value.clone() for name, value in new.state_dict().items()}
    keep_rows(new, old.state_dict(), rows, ("a", "b", "c"), ("d", "c", "a", "e"))
    for name, value in new.state_dict().items():
        if name not in rows:
            assert torch.equal(value, old.state_dict()[name])
            continue
        assert torch.equal(value[[1, 2]], old.state_dict()[name][[2, 0]])
        assert torch.equal(value[[0, 3]], drawn[name][[0, 3]])


@pytest.mark.long
@pytest.mark.parametrize("head", ["prototype", "ridge"])
def test_a_solved_head_is_solved_anew_for_the_new_classes(tmp_path, head, capsys):
    first = model(head=head)
    quiet(tmp_path / "one").finetune(first, datamodule=data(tmp_path, "blue", "red"), strategy="freeze")
    loaded = flashtask.load(tmp_path / "one" / "best.ckpt")
    quiet(tmp_path / "two").finetune(loaded, datamodule=data(tmp_path, "blue", "green", "red"), strategy="freeze")
    said = capsys.readouterr().err
    assert "kept 2 of 2 classes (blue, red); new: green; the head is solved again" in said
    assert loaded.predict(tmp_path / "val-blue-green-red" / "green" / "0.png").label == "green"


@pytest.mark.long
def test_a_head_without_rows_by_class_is_drawn_anew_and_that_is_said(tmp_path, capsys):
    @HEADS.register("test_no_rows")
    class Columns(nn.Module):
        """Its weights have a column for each class."""

        def __init__(self, num_features, num_outputs):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(num_features, num_outputs))

        def forward(self, features):
            return features @ self.weight

    try:
        one = model(head="test_no_rows")
        quiet(tmp_path / "one", max_steps=1).finetune(one, datamodule=data(tmp_path, "blue", "red"))
        quiet(tmp_path / "two", max_steps=1).finetune(one, datamodule=data(tmp_path, "blue", "green", "red"))
        assert "the head is initialised again: it has no rows for each class" in capsys.readouterr().err
        assert one.head.weight.shape[1] == 3
    finally:
        HEADS.remove("test_no_rows")


@pytest.mark.long
def test_a_head_that_is_a_module_cannot_be_changed(tmp_path):
    with pytest.warns(UserWarning, match="head of ImageClassifier"):
        own = model(head=nn.Linear(model().num_features, 2))
    quiet(tmp_path / "one", max_steps=1).finetune(own, datamodule=data(tmp_path, "blue", "red"))
    with pytest.raises(UsageError, match="your own module for 2 classes"):
        own.change_labels(["a", "b", "c"])
    assert (own.labels, own.num_classes) == (("blue", "red"), 2)


@pytest.mark.long
def test_classes_without_names_are_all_new(tmp_path, trained, capsys):
    loaded = flashtask.load(trained)
    change = loaded.change_classes(num_classes=5)
    assert (loaded.labels, loaded.num_classes) == (None, 5)
    assert str(change) == "kept 0 of 2 classes; dropped: blue, red; the head is initialised again"
    loaded._classes_are_given = False  # as a model is that was loaded so
    quiet(tmp_path / "run", max_steps=1).finetune(loaded, datamodule=data(tmp_path, "green", "red"))
    assert "kept 0 of 5 classes; new: green, red; the head is initialised again: the old classes had no names" in (
        capsys.readouterr().err
    )


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["a", "a"]}, "appears twice"),
        ({"labels": "cat"}, "must be a list of names"),
        ({"labels": []}, "must be a list of names"),
        ({"labels": ["a", "b"], "num_classes": 3}, "contradicts 2 labels"),
        ({}, "no classes are given"),
    ],
)
def test_classes_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        model(labels=["a", "b"]).change_classes(**arguments)


def test_a_change_names_a_few_classes_and_counts_the_rest():
    many = [f"c{number}" for number in range(20)]
    change = LabelChange.between(many, [*many[5:], "d"], 20)
    kept = "kept 15 of 20 classes (c5, c6, c7, c8, c9, c10, c11, c12 and 7 more)"
    assert str(change) == f"{kept}; new: d; dropped: c0, c1, c2, c3, c4"
