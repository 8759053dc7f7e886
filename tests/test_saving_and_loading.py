"""Checkpoints as the trainer's stages and `load_from_checkpoint` use them."""

from __future__ import annotations

import os

import pytest
import torch
from small import Net, digest, loaders, net
from test_resume import state_digest

from flashtask import Callback, CSVLogger, DataModule, ModelCheckpoint, Trainer, read_checkpoint
from flashtask.core.errors import OutputError, UsageError
from flashtask.trainer.distribution.process_strategies import Strategy


class Worsening(Net):
    """Its first epoch is its best."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch))


def quiet(folder, **options):
    return Trainer(**{"output_dir": folder, "enable_progress_bar": False, "enable_model_summary": False, **options})


@pytest.fixture
def fitted(tmp_path):
    """(trainer, module, folder) after three epochs, the first of which was the best."""
    torch.manual_seed(1)
    module = Worsening()
    trainer = quiet(tmp_path / "run", max_epochs=3)
    trainer.fit(module, *loaders())
    return trainer, module, tmp_path / "run"


def weights_of(path):
    module = Worsening()
    module.load_state_dict(read_checkpoint(path)["state_dict"])
    return digest(module)


# ---- testing


@pytest.mark.parametrize("which", ["best", "last"])
def test_s21_test_takes_the_best_or_the_last_checkpoint(fitted, which):
    trainer, module, folder = fitted
    (result,) = trainer.test(ckpt_path=which, dataloaders=loaders()[1])
    assert digest(module) == weights_of(folder / f"{which}.ckpt")
    again = Worsening.load_from_checkpoint(folder / f"{which}.ckpt")
    assert quiet(folder.parent / "b").test(again, loaders()[1]) == [result]
    assert weights_of(folder / "best.ckpt") != weights_of(folder / "last.ckpt")


def test_s21_best_is_an_error_where_no_file_was_written(tmp_path):
    trainer = quiet(tmp_path, max_epochs=1, callbacks=ModelCheckpoint(save_top_k=0))
    trainer.fit(net(), *loaders())
    with pytest.raises(UsageError, match="no checkpoint has been written"):
        trainer.test(ckpt_path="best", dataloaders=loaders()[1])


def test_s22_test_takes_the_path_of_any_checkpoint(tmp_path):
    trainer = quiet(tmp_path, max_epochs=3, callbacks=ModelCheckpoint(save_top_k=-1, filename="{epoch}"))
    module = Worsening()
    trainer.fit(module, *loaders())
    for path in (tmp_path / "epoch=1.ckpt", str(tmp_path / "epoch=0.ckpt")):
        trainer.test(ckpt_path=path, dataloaders=loaders()[1])
        assert digest(module) == weights_of(path)


def test_s23_a_loaded_module_is_tested_by_a_trainer_of_its_own(fitted, tmp_path):
    trainer, module, folder = fitted
    loaded = Worsening.load_from_checkpoint(checkpoint_path=str(folder / "last.ckpt"))
    expected = trainer.test(module, loaders()[1])
    assert Trainer(default_root_dir=tmp_path, enable_progress_bar=False).test(loaded, loaders()[1]) == expected


class TestData(DataModule):
    __test__ = False

    def test_dataloader(self):
        return loaders(samples=16)[1]


def test_s24_test_takes_loaders_or_a_data_module_of_its_own(fitted):
    trainer, _, _ = fitted
    (with_loader,) = trainer.test(dataloaders=loaders(samples=16)[1])
    (with_module,) = trainer.test(datamodule=TestData())
    (with_more,) = trainer.test(dataloaders=loaders()[1])
    assert with_loader == with_module != with_more
    with pytest.raises(UsageError, match="either a datamodule or loaders"):
        trainer.test(dataloaders=loaders()[1], datamodule=TestData())


# ---- contents


def test_s66_a_checkpoint_holds_all_that_a_run_consists_of(tmp_path):
    class Counting(Callback):
        def state_dict(self):
            return {"count": 7}

    module = net()
    quiet(tmp_path, max_epochs=2, callbacks=Counting()).fit(module, *loaders())
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert (content["epoch"], content["global_step"]) == (1, 14)
    assert all(torch.equal(content["state_dict"][name], value) for name, value in module.state_dict().items())
    (optimizer,) = content["optimizer_states"]
    assert optimizer["state"][0]["step"] == 14
    (schedule,) = content["lr_schedulers"]
    assert schedule["last_epoch"] == 2
    assert content["callbacks"]["Counting"] == {"count": 7}
    assert content["hyper_parameters"] == {"width": 8, "learning_rate": 1e-2}
    assert {"random", "seed", "precision", "metrics", "progress"} <= set(content)


def test_s67_save_checkpoint_writes_weights_only_if_asked_to(fitted, tmp_path):
    trainer, module, _ = fitted
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    whole, weights = read_checkpoint(tmp_path / "whole.ckpt"), read_checkpoint(tmp_path / "weights.ckpt")
    assert {"optimizer_states", "lr_schedulers", "callbacks", "random"} <= set(whole) - set(weights)
    assert {"state_dict", "hyper_parameters", "epoch", "global_step"} <= set(weights)
    assert os.path.getsize(tmp_path / "weights.ckpt") < os.path.getsize(tmp_path / "whole.ckpt") / 2
    assert digest(Worsening.load_from_checkpoint(tmp_path / "weights.ckpt")) == digest(module)


def test_s74_hyper_parameters_are_in_the_file_under_both_names(tmp_path):
    trainer = quiet(tmp_path, max_steps=1)
    trainer.fit(Net(width=5, learning_rate=0.2), *loaders())
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert content["hyperparameters"] == content["hyper_parameters"] == {"width": 5, "learning_rate": 0.2}


def test_s75_save_checkpoint_writes_what_can_be_resumed(fitted, tmp_path):
    trainer, module, _ = fitted
    trainer.save_checkpoint(str(tmp_path / "example.ckpt"))
    assert weights_of(tmp_path / "example.ckpt") == digest(module)
    longer = quiet(tmp_path / "more", max_epochs=4)
    longer.fit(Worsening(), *loaders(), ckpt_path=tmp_path / "example.ckpt")
    assert [row["epoch"] for row in longer.fit_run.history] == [0, 1, 2, 3]


# ---- resuming


def test_s76_fit_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path):
    quiet(tmp_path / "whole", max_epochs=4, seed=3).fit(net(), *loaders())
    quiet(tmp_path / "part", max_epochs=2, seed=3).fit(net(), *loaders())
    again = quiet(tmp_path / "more", max_epochs=4, seed=3)
    again.fit(net(seed=9), *loaders(), ckpt_path=str(tmp_path / "part" / "last.ckpt"))
    assert state_digest(tmp_path / "more" / "last.ckpt") == state_digest(tmp_path / "whole" / "last.ckpt")
    assert [row["epoch"] for row in again.fit_run.history] == [0, 1, 2, 3]


@pytest.mark.long
def test_s76_fit_goes_on_from_the_middle_of_an_epoch_with_the_same_bits(tmp_path):
    """From every file that was written after a step: dropout, BatchNorm, schedule, order, accumulation."""
    options = {"max_epochs": 3, "seed": 3, "accumulate_grad_batches": 2}
    by_steps = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    quiet(tmp_path / "whole", callbacks=by_steps, **options).fit(net(), *loaders())
    expected = state_digest(tmp_path / "whole" / "last.ckpt")
    assert len(by_steps.best_k_models) == 12
    for step in (1, 3, 4, 6, 11):
        again = quiet(tmp_path / str(step), **options)
        again.fit(net(seed=9), *loaders(), ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
        assert state_digest(tmp_path / str(step) / "last.ckpt") == expected
        assert [row["step"] for row in again.fit_run.history] == [4, 8, 12]


def test_s76_fit_goes_on_from_the_best_or_the_last_of_the_same_trainer(fitted):
    trainer, _, folder = fitted
    last = state_digest(folder / "last.ckpt")
    trainer.fit(Worsening(), *loaders(), ckpt_path="best")
    assert state_digest(folder / "last.ckpt") == last
    trainer.fit(Worsening(), *loaders(), ckpt_path="last")
    assert state_digest(folder / "last.ckpt") == last


# ---- loading without a trainer


def test_s77_a_module_is_loaded_to_predict(fitted):
    _, module, folder = fitted
    inputs = torch.randn(5, 4)
    loaded = Worsening.load_from_checkpoint(str(folder / "last.ckpt"))
    loaded.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs), module.eval()(inputs), rtol=0, atol=0)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "location",
    [
        *("meta", torch.device("meta"), {"cpu": "meta"}),
        lambda storage, place: torch.empty(0, device="meta").untyped_storage(),
    ],
    ids=["name", "device", "dictionary", "function"],
)
def test_s78_map_location_says_where_the_module_is(fitted, location):
    _, _, folder = fitted
    module = Worsening.load_from_checkpoint(folder / "last.ckpt", map_location=location)
    assert {value.device.type for value in module.state_dict().values()} == {"meta"}
    assert read_checkpoint(folder / "last.ckpt", map_location=location)["state_dict"]["head.bias"].device.type == "meta"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "location",
    [None, "cpu", torch.device("cpu"), {"cuda:1": "cuda:0"}, lambda storage, place: storage],
    ids=["none", "name", "device", "dictionary", "function"],
)
def test_s78_what_maps_nothing_leaves_the_module_on_the_cpu(fitted, location):
    _, module, folder = fitted
    loaded = Worsening.load_from_checkpoint(folder / "last.ckpt", map_location=location)
    assert digest(loaded) == digest(module)


def test_s78_a_device_that_is_not_here_is_an_error(fitted):
    with pytest.raises(UsageError, match="no device 'cuda:7' here"):
        Worsening.load_from_checkpoint(fitted[2] / "last.ckpt", map_location="cuda:7")


def test_a_checkpoint_by_name_in_a_recipe_is_a_model_checkpoint(tmp_path):
    trainer = quiet(tmp_path, max_epochs=2, callbacks=[{"model_checkpoint": {"save_top_k": -1, "filename": "{epoch}"}}])
    trainer.fit(net(), *loaders())
    assert {"epoch=0.ckpt", "epoch=1.ckpt"} <= set(os.listdir(tmp_path))


def test_a_run_with_a_folder_for_checkpoints_elsewhere_is_continued_by_a_new_trainer(tmp_path):
    def trainer(epochs):
        checkpoint = ModelCheckpoint(dirpath="elsewhere")
        options = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
        return Trainer(max_epochs=epochs, callbacks=[checkpoint], output_dir=tmp_path / "run", **options)

    trainer(1).fit(net(), *loaders())
    module, continued = net(), trainer(3)
    continued.fit(module, *loaders(), ckpt_path="last")
    assert continued.current_epoch == 3
    assert [one.best.folder for one in continued.checkpoint_callbacks] == [tmp_path / "elsewhere"]
    whole = net()
    Trainer(max_epochs=3, default_root_dir=tmp_path / "whole", enable_progress_bar=False).fit(whole, *loaders())
    assert digest(module) == digest(whole)


def test_any_checkpoint_makes_a_folder_taken(tmp_path):
    options = {"enable_progress_bar": False, "output_dir": tmp_path, "max_epochs": 1, "logger": False}
    checkpoint = ModelCheckpoint(filename="{epoch}", save_last=False)
    Trainer(callbacks=[checkpoint], **options).fit(net(), *loaders())
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".ckpt"] == ["epoch=0.ckpt"]
    (tmp_path / "summary.json").unlink()
    with pytest.raises(OutputError, match=r"epoch=0\.ckpt"):
        Trainer(**options).fit(net(), *loaders())


class Second(Strategy):
    """The second of two processes, as a strategy of distribution tells it."""

    world_size, global_rank = 2, 1

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def gather(self, value):
        # The first process has claimed the run folder, and goes on from nothing.
        return [(self.folder, None) if value == (None, None) else value, value]


def test_s73_only_the_first_process_writes(tmp_path, capsys):
    options = {"max_epochs": 1, "output_dir": tmp_path / "run", "logger": [CSVLogger(), "tensorboard"]}
    trainer = Trainer(strategy=Second(tmp_path / "run"), callbacks=[ModelCheckpoint(every_n_train_steps=2)], **options)
    trainer.fit(net(), *loaders())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert not trainer.is_global_zero
    assert list(tmp_path.rglob("*")) == []
    assert capsys.readouterr().err == ""
    Trainer(**options).fit(net(), *loaders())
    assert {"last.ckpt", "best.ckpt", "metrics.csv"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("address", ["https://example.org/a/model.ckpt", "HTTP://example.org/model.ckpt"])
def test_an_address_in_the_place_of_a_checkpoint_names_what_downloads_it(tmp_path, address):
    calls = [
        lambda: Net.load_from_checkpoint(address),
        lambda: DataModule.load_from_checkpoint(address),
        lambda: quiet(tmp_path).fit(Net(), loaders(8)[0], ckpt_path=address),
        lambda: quiet(tmp_path).validate(Net(), loaders(8)[1], ckpt_path=address),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="is an address") as caught:
            call()
        assert f'torch.hub.download_url_to_file("{address}", "model.ckpt")' in caught.value.fix
