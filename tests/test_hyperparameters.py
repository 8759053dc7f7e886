"""Hyper-parameters: what is stored, what is warned of, and that a collection comes back as what it was."""

from __future__ import annotations

import argparse
import enum
import warnings
from pathlib import Path

import pytest
import torch
from small import Net, loaders, net, quiet
from torch import nn

from flashtask import DataModule, ImageClassifier, Logger, Module, Trainer, read_checkpoint
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.trainer.hyperparameters import (
    Hyperparameters,
    find_not_saved,
    hyperparameters_content,
    plain_hyperparameters,
)


class FromCollection(Module):
    """A module whose settings come as one object, and are saved as one."""

    def __init__(self, hp, extra: int = 1) -> None:
        super().__init__()
        self.given, self.head = hp, nn.Linear(4, 3)
        self.save_hyperparameters(hp)
        if extra != 1:
            self.save_hyperparameters("extra")
        self.extra = extra

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)


def saved(module, folder: Path, **options) -> Path:
    trainer = Trainer(output_dir=folder, max_steps=1, enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(module, *loaders())
    return folder / "last.ckpt"


def same(left, right) -> bool:
    return type(left) is type(right) and left == right


class Sized(Module):
    """A module of a width, with arguments of every kind of parameter."""

    def __init__(self, width, learning_rate=0.1, *, names=("a", "b"), **more) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.head = nn.Linear(4, width)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)


class Shown(Logger):
    """What a logger is told of hyper-parameters."""

    def log_hyperparameters(self, values):
        self.values = dict(values)


def test_s86_the_arguments_of_init_are_hparams_are_logged_and_come_back_from_a_checkpoint(tmp_path):
    given = {"width": 3, "learning_rate": 0.5, "names": ("x", "y"), "depth": {"blocks": [1, 2]}}
    module, shown = Sized(3, 0.5, names=("x", "y"), depth={"blocks": [1, 2]}), Shown()
    assert dict(module.hparams) == given
    assert module.hparams.names == module.hparams["names"] == ("x", "y")
    path = saved(module, tmp_path / "run", logger=shown)
    assert shown.values == given
    content = read_checkpoint(path)
    assert content["hyper_parameters"] == content["hyperparameters"] == given
    loaded = Sized.load_from_checkpoint(path)
    assert dict(loaded.hparams) == given
    assert torch.equal(loaded.head.weight, module.head.weight)


def test_s86_an_argument_that_loading_is_given_wins(tmp_path):
    path = saved(Sized(3, 0.5), tmp_path / "run")
    assert Sized.load_from_checkpoint(path, learning_rate=0.25).hparams.learning_rate == 0.25


def test_s86_hparams_that_were_changed_are_what_trains_and_what_is_saved(tmp_path):
    module = Sized(3)
    module.hparams.learning_rate = 0.75
    trained = Trainer(output_dir=tmp_path / "run", max_steps=1, enable_progress_bar=False, enable_model_summary=False)
    trained.fit(module, *loaders())
    assert trained.fit_run.optimizers[0].param_groups[0]["lr"] == 0.75
    assert Sized.load_from_checkpoint(tmp_path / "run" / "last.ckpt").hparams.learning_rate == 0.75


def test_s86_named_arguments_alone_are_kept_or_all_but_some():
    class Named(Module):
        def __init__(self, a, b=2, c=3) -> None:
            super().__init__()
            self.save_hyperparameters("a", "c")

    class AllBut(Module):
        def __init__(self, a, b=2, c=3) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=["b"])

    class Mistyped(Module):
        def __init__(self, learning_rate=1) -> None:
            super().__init__()
            self.save_hyperparameters("learning_rat")

    assert dict(Named(1).hparams) == dict(AllBut(1).hparams) == {"a": 1, "c": 3}
    with pytest.raises(UsageError, match="'learning_rat'"):
        Mistyped()
    with pytest.raises(AttributeError, match=r"no hyper-parameter 'b'; there are: a, c"):
        Named(1).hparams.b  # noqa: B018 - reading it is what fails


def test_s86_those_of_a_subclass_are_kept_beside_its_parents():
    class Deeper(Sized):
        def __init__(self, depth=7, width=5) -> None:
            super().__init__(width=width, learning_rate=0.2)

    assert dict(Deeper().hparams) == {"width": 5, "learning_rate": 0.2, "names": ("a", "b"), "depth": 7}


def test_s86_a_datamodule_keeps_its_arguments_too(tmp_path):
    class Batches(DataModule):
        def __init__(self, batch_size, shuffle=False) -> None:
            self.save_hyperparameters()

        def train_dataloader(self):
            return loaders(batch_size=self.hparams.batch_size)[0]

    data = Batches(25)
    assert dict(data.hparams) == {"batch_size": 25, "shuffle": False}
    data.hparams.batch_size = 10
    trainer = Trainer(output_dir=tmp_path, max_epochs=1, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Net(), data)
    assert trainer.global_step == 5


def test_s87_a_namespace_dictionary_and_omegaconf_come_back_as_what_they_were(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    values = {"learning_rate": 0.01, "depth": {"blocks": [1, 2]}, "twice": "${learning_rate}"}
    for given in (argparse.Namespace(**values), dict(values), omegaconf.OmegaConf.create(values)):
        path = saved(FromCollection(given), tmp_path / type(given).__name__)
        loaded = FromCollection.load_from_checkpoint(path)
        assert same(loaded.given, given)
        assert loaded.hparams.learning_rate == 0.01


class Nested(FromCollection):
    """Reads a value inside a value by attributes."""

    def __init__(self, model, sizes=(), learning_rate=0.1) -> None:
        Module.__init__(self)
        self.save_hyperparameters()
        self.head = nn.Linear(4, self.hparams.model.width)
        self.width_of_first = sizes[0].width


class NestedInWhole(FromCollection):
    def __init__(self, hp) -> None:
        Module.__init__(self)
        self.save_hyperparameters(hp)
        self.head = nn.Linear(4, self.hparams.model.width)


class NestedData(DataModule):
    def __init__(self, options) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = self.hparams.options.batch_size

    def train_dataloader(self):
        return loaders(self.batch_size)[0]


def attributes_and_omegaconf():
    return [Hyperparameters, pytest.importorskip("omegaconf").OmegaConf.create]


@pytest.mark.parametrize("number", [0, 1], ids=["attributes", "OmegaConf"])
def test_a_collection_inside_a_value_comes_back_as_what_it_was(tmp_path, number):
    make = attributes_and_omegaconf()[number]
    inner = make({"width": 3, "more": [1, 2]})
    path = saved(Nested(inner, (make({"width": 5}), 7)), tmp_path / "arguments")
    loaded = Nested.load_from_checkpoint(path)
    assert (loaded.hparams.model, type(loaded.hparams.model)) == (inner, type(inner))
    assert (loaded.width_of_first, type(loaded.hparams.sizes)) == (5, tuple)
    with pytest.raises(IntegrityError, match=r"head\.weight is"):
        Nested.load_from_checkpoint(path, model=make({"width": 6}))
    whole = {"model": make({"width": 4}), "learning_rate": 0.1}
    loaded = NestedInWhole.load_from_checkpoint(saved(NestedInWhole(whole), tmp_path / "whole"))
    assert loaded.head.out_features == 4
    assert type(loaded.hparams.model) is type(inner)


@pytest.mark.parametrize("number", [0, 1], ids=["attributes", "OmegaConf"])
def test_a_collection_inside_a_value_of_a_data_module_comes_back_too(tmp_path, number):
    data = NestedData(attributes_and_omegaconf()[number]({"batch_size": 16}))
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(net(), datamodule=data)
    loaded = NestedData.load_from_checkpoint(trainer.checkpoint_callback.last_model_path)
    assert (loaded.batch_size, type(loaded.hparams.options)) == (16, type(data.hparams.options))


def test_s87_an_argument_saved_beside_a_collection_is_not_put_into_it(tmp_path):
    path = saved(FromCollection(argparse.Namespace(learning_rate=0.01), extra=4), tmp_path / "run")
    loaded = FromCollection.load_from_checkpoint(path)
    assert loaded.given == argparse.Namespace(learning_rate=0.01)
    assert loaded.extra == 4
    changed = FromCollection.load_from_checkpoint(path, learning_rate=0.5, extra=2)
    assert (changed.given.learning_rate, changed.extra) == (0.5, 2)
    whole = FromCollection.load_from_checkpoint(path, hp={"learning_rate": 1.0})
    assert whole.given == {"learning_rate": 1.0}
    with pytest.raises(UsageError, match="learning_rat"):
        FromCollection.load_from_checkpoint(path, learning_rat=0.5)


def test_s87_what_cannot_be_stored_in_a_collection_is_asked_for_by_its_own_name(tmp_path):
    with pytest.warns(UserWarning, match=r"loss_fn of FromCollection \(function\) cannot be stored"):
        module = FromCollection({"learning_rate": 0.01, "loss_fn": nn.functional.mse_loss})
    path = saved(module, tmp_path / "run")
    with pytest.raises(UsageError, match=r"hp.loss_fn.*\n.*load_from_checkpoint\(.*loss_fn=\.\.\.\)"):
        FromCollection.load_from_checkpoint(path)
    with pytest.warns(UserWarning, match="cannot be stored"):
        loaded = FromCollection.load_from_checkpoint(path, loss_fn=nn.functional.l1_loss)
    assert loaded.given == {"learning_rate": 0.01, "loss_fn": nn.functional.l1_loss}


class Colour(enum.IntEnum):
    RED = 1


class Everything(Module):
    def __init__(self, a=None, b=None, c=None, d=None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_s86_construction_warns_once_of_each_thing_that_cannot_be_stored_at_any_depth():
    with pytest.warns(UserWarning, match="cannot be stored") as caught:
        module = Everything({"x": [1, nn.ReLU()]}, Colour.RED, {1, 2}, Path("data") / "train")
    said = [str(warning.message).split(" cannot")[0] for warning in caught]
    assert said == [
        "the hyper-parameter a.x[1] of Everything (ReLU)",
        "the hyper-parameter b of Everything (Colour)",
        "the hyper-parameter c of Everything (set)",
    ]
    assert {warning.filename for warning in caught} == {__file__}
    plain = plain_hyperparameters(module)
    assert plain["d"] == str(Path("data") / "train")
    assert dict(find_not_saved(plain)) == {"a.x[1]": "ReLU", "b": "Colour", "c": "set"}


def test_s86_nothing_is_warned_of_where_no_checkpoint_holds_it():
    class Data(DataModule):
        def __init__(self, transform) -> None:
            self.save_hyperparameters()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Data(nn.ReLU()).hparams.transform is not None


def test_the_recipe_of_a_task_names_an_object_deep_in_an_argument():
    with pytest.warns(UserWarning, match=r"head_options.act of ImageClassifier \(ReLU\)"):
        model = ImageClassifier("timm/test_resnet", pretrained=False, head_options={"act": nn.ReLU()})
    recipe = model.recipe()
    assert recipe["not_saved"]["model.head_options.act"] == "<ReLU>"
    assert "head_options" not in recipe["model"]
    assert "model.head_options.act" not in ImageClassifier("timm/test_resnet", pretrained=False).recipe()["not_saved"]


def test_s86_hyperparameters_saved_without_logging_are_not_logged():
    class Two(Module):
        def __init__(self, shown=1, hidden=2) -> None:
            super().__init__()
            self.save_hyperparameters("hidden", logger=False)
            self.save_hyperparameters("shown")

    module = Two()
    assert module.logged_hparams == {"shown": 1}
    assert dict(module.hparams) == {"hidden": 2, "shown": 1}
    assert hyperparameters_content(module)["hyper_parameters"] == {"hidden": 2, "shown": 1}


def test_s87_a_file_says_how_its_hyperparameters_were_given(tmp_path):
    content = read_checkpoint(saved(FromCollection({"learning_rate": 0.01}), tmp_path / "run"))
    assert content["hyper_parameters_form"] == {"argument": "hp", "kind": "dict", "beside": []}
    assert torch.is_tensor(next(iter(content["state_dict"].values())))
    assert hyperparameters_content(Net())["hyper_parameters_form"] is None
