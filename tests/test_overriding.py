"""What modules, data modules and callbacks may override, and what the hooks of a run find."""

from __future__ import annotations

import inspect
from collections import Counter

import numpy as np
import pytest
import torch
from small import Net, loaders, net

from flashtask import Callback, DataModule, ModelCheckpoint, Module, Trainer, read_checkpoint
from flashtask.trainer.callbacks.callback import _HOOKS
from flashtask.trainer.module_hooks import ModuleHooks


def quiet(tmp_path, **options) -> Trainer:
    given = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False, **options}
    return Trainer(default_root_dir=tmp_path, **given)


# ---- every hook has one of the base class behind it


def overriding_all(kind: type, names: list[str], told: Counter[str]) -> type:
    """A subclass in which each of the methods notes that it was called, and calls the one of the base class."""

    def written(name):
        def method(self, *arguments):
            told[name] += 1
            return getattr(super(made, self), name)(*arguments)

        return method

    made = type(f"Own{kind.__name__}", (kind,), {name: written(name) for name in names})
    return made


def test_super_can_be_called_in_every_hook(tmp_path):
    """Each hook of a module, a callback and a data module calls the one of its base class and is called by a run."""
    told = {"module": Counter(), "callback": Counter(), "data": Counter()}
    of_module = [n for n, m in vars(ModuleHooks).items() if inspect.isfunction(m)]
    of_data = [n for n, m in vars(DataModule).items() if inspect.isfunction(m)]
    of_data += ["transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer"]

    class Data(DataModule):
        def train_dataloader(self):
            return loaders(16)[0]

        def val_dataloader(self):
            return loaders(16)[1]

        test_dataloader = predict_dataloader = val_dataloader

    class Seeing(Net):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    module = overriding_all(Seeing, of_module, told["module"])()
    callback = overriding_all(Callback, list(_HOOKS), told["callback"])()
    data = overriding_all(Data, of_data, told["data"])()
    trainer = quiet(tmp_path, callbacks=callback)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data)
    trainer.predict(module, datamodule=data, ckpt_path="last")
    trainer.fit(module, datamodule=data, ckpt_path="last")  # its hook of loading is called
    trainer.predict(overriding_all(Seeing, ["prepare_data", "predict_dataloader"], told["module"])(), loaders(8)[1])
    assert told["module"]["prepare_data"] == 1
    not_asked = {"on_exception", "prepare_data", "train_dataloader", "val_dataloader", "test_dataloader"}
    assert {name for name in of_module if not told["module"][name]} <= not_asked | {"predict_dataloader"}
    assert {name for name in _HOOKS if not told["callback"][name]} == {"on_exception"}
    assert {name for name in of_data if not told["data"][name]} == {"on_exception"}


def test_hooks_that_are_not_written_are_not_called(tmp_path):
    trainer, module = quiet(tmp_path, enable_checkpointing=False), net()
    trainer.fit(module, *loaders(16))
    run = trainer.fit_run
    assert not run.keeps_outputs
    assert not run.validation.keeps_outputs
    assert set(run.listeners) == {"train_batch_end"}  # the engine's own


def test_an_error_calls_on_exception_of_the_module_and_its_base(tmp_path):
    seen = []

    class Failing(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no step today")

        def on_exception(self, exception):
            super().on_exception(exception)
            seen.append(str(exception))

    with pytest.raises(RuntimeError, match="no step today"):
        quiet(tmp_path).fit(Failing(), *loaders(16))
    assert seen == ["no step today"]


def test_a_hook_may_take_fewer_arguments_or_those_of_older_versions(tmp_path):
    seen = {}

    class Older(Net):
        def on_train_batch_start(self, batch, batch_idx, unused=0):
            seen["unused"] = unused

        def on_validation_batch_start(self, batch, batch_idx):
            seen["validation"] = batch_idx

        def on_before_optimizer_step(self, optimizer, optimizer_idx):
            seen["optimizer_idx"] = optimizer_idx

        def predict_step(self, batch, batch_idx):
            return len(batch[0])

        def on_predict_epoch_end(self, results):
            seen["results"] = results

    class Watching(Callback):
        def on_train_batch_end(self, trainer, module, outputs):
            seen["outputs"] = float(outputs)

        def on_predict_epoch_end(self, trainer, module, outputs):
            seen["predictions"] = outputs

        def on_test_batch_end(self, trainer, module, *arguments):
            seen["test"] = len(arguments)

    trainer = quiet(tmp_path, callbacks=Watching())
    trainer.fit(Older(), *loaders(16))
    trainer.test(dataloaders=loaders(16)[1])
    assert trainer.predict(dataloaders=loaders(20)[1]) == [8, 8, 4]
    assert seen.pop("outputs") > 0
    assert seen == {
        "unused": 0,
        "validation": 1,
        "optimizer_idx": 0,
        "results": [8, 8, 4],
        "predictions": [8, 8, 4],
        "test": 4,
    }


# ---- what hooks find in `callback_metrics`


class Counting(Module):
    """Logs the number of the epoch, so that a value of another epoch is seen."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.log("train_epoch", float(self.current_epoch), on_step=False, on_epoch=True)
        self.log("both", float(batch_idx), on_step=True, on_epoch=True)
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", 7.0)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        metrics = self.trainer.callback_metrics
        self.seen.append(("batch", self.current_epoch, metrics["both"], metrics["both_step"]))

    def on_validation_epoch_end(self):
        self.seen.append(("validation", self.current_epoch, self.trainer.callback_metrics["val_loss"]))

    def on_train_epoch_end(self):
        metrics = self.trainer.callback_metrics
        self.seen.append(("train", self.current_epoch, metrics["train_epoch"], metrics["both"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_hooks_of_the_end_of_an_epoch_find_its_values(tmp_path):
    """Also in the sanity check, whose values are then forgotten."""
    module = Counting()
    trainer = quiet(tmp_path, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, *loaders(16))
    epoch = [("batch", 0, 0.0, 0.0), ("batch", 0, 1.0, 1.0), ("validation", 0, 0.0), ("train", 0, 0.0, 0.5)]
    following = [("batch", 1, 0.0, 0.0), ("batch", 1, 1.0, 1.0), ("validation", 1, 1.0), ("train", 1, 1.0, 0.5)]
    assert module.seen == [("validation", 0, 0.0), *epoch, *following]
    assert trainer.callback_metrics == {"val_loss": 1.0, "train_epoch": 1.0, "both_epoch": 0.5, "both": 0.5} | {
        "both_step": 1.0
    }


def test_after_a_test_its_values_are_beside_those_of_the_fit(tmp_path):
    trainer, module = quiet(tmp_path), Counting()
    trainer.fit(module, *loaders(16))
    trainer.test(module, loaders(16)[1])
    assert {"val_loss", "test_loss"} <= trainer.callback_metrics.keys()
    assert trainer.callback_metrics["test_loss"].item() == 7.0
    trainer.fit(module, *loaders(16))
    assert "test_loss" not in trainer.callback_metrics


def test_a_test_in_a_hook_of_a_fit_leaves_the_values_of_the_fit(tmp_path):
    class Testing(Counting):
        def on_train_end(self):
            self.trainer.validate(self, loaders(16)[1])

        def on_fit_end(self):
            self.seen = dict(self.trainer.callback_metrics)

    trainer, module = quiet(tmp_path), Testing()
    trainer.fit(module, *loaders(16))
    assert module.seen == trainer.callback_metrics


def test_a_metric_is_a_number_and_a_tensor(tmp_path):
    trainer = quiet(tmp_path)
    trainer.fit(net(), *loaders(16))
    value = trainer.callback_metrics["val_loss"]
    assert isinstance(value, float)
    assert value.item() == float(value) == value
    assert f"{value:.3f}" == f"{float(value):.3f}"
    assert value.cpu().numpy() == pytest.approx(value)
    assert value.detach().dtype is torch.float32
    assert torch.stack([value, torch.tensor(1.0)]).shape == (2,)
    assert torch.isclose(value, torch.tensor(float(value)))
    assert np.asarray(value).dtype == np.float64
    best = trainer.checkpoint_callback.best_model_score
    assert best.item() == value
    with pytest.raises(AttributeError):
        value.no_such_method()


def test_values_of_several_loaders_keep_their_names(tmp_path):
    class Several(Counting):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("own", float(dataloader_idx))
            self.log("both", float(dataloader_idx), on_step=True, on_epoch=True)
            self.log("shared", 1.0, add_dataloader_idx=False)

        def on_validation_epoch_end(self):
            self.log("val_loss", 3.0)

    first, second = quiet(tmp_path).validate(Several(), [loaders(16)[1], loaders(16)[1]])
    assert first == {"own/dataloader_idx_0": 0, "both_epoch/dataloader_idx_0": 0, "shared": 1, "val_loss": 3}
    assert second == {"own/dataloader_idx_1": 1, "both_epoch/dataloader_idx_1": 1, "shared": 1, "val_loss": 3}


# ---- what hooks are given of a step


def test_a_loss_that_is_returned_by_itself_reads_as_tensor_and_as_dictionary(tmp_path):
    seen = {}

    class Collecting(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen["batch"] = outputs

        def training_epoch_end(self, outputs):
            seen["epoch"] = outputs

    quiet(tmp_path).fit(Collecting(), *loaders(16))
    assert len(seen["epoch"]) == 2
    assert torch.stack(seen["epoch"]).mean() == torch.stack([one["loss"] for one in seen["epoch"]]).mean()
    for loss in (seen["batch"], seen["epoch"][-1]):
        assert torch.equal(loss["loss"], loss)
        assert type(loss["loss"]) is type(loss * 2) is torch.Tensor
        assert "loss" in loss
        assert loss.get("other", 3) == 3
        assert dict(loss) == {"loss": loss["loss"]}
        assert not loss.requires_grad
        with pytest.raises(KeyError):
            loss["other"]


def test_the_outputs_of_several_optimizers_reach_the_hooks(tmp_path):
    class Two(Net):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return {"loss": super().training_step(batch, batch_idx), "number": optimizer_idx}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.of_batch = [one["number"] for one in outputs]

        def training_epoch_end(self, outputs):
            self.of_epoch = [[one["number"] for one in batch] for batch in outputs]

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.backbone, self.head)]

    module = Two()
    quiet(tmp_path).fit(module, *loaders(16))
    assert module.of_batch == [0, 1]
    assert module.of_epoch == [[0, 1], [0, 1]]


# ---- freezing, formats


@pytest.mark.parametrize("strategy", ["freeze", ("freeze_unfreeze", 1)])
def test_what_never_trains_is_frozen_before_the_optimizers_are_made(tmp_path, strategy):
    class Filtering(Net):
        def configure_optimizers(self):
            self.given = [name for name, p in self.named_parameters() if p.requires_grad]
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Filtering()
    quiet(tmp_path, max_epochs=2).finetune(module, loaders(16)[0], strategy=strategy)
    head = ["head.weight", "head.bias"]
    assert (module.given == head) == (strategy == "freeze")
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("given", [None, "module", "tuple"])
def test_modules_to_freeze_may_be_nothing_one_module_or_several(tmp_path, given):
    class Own(Net):
        def modules_to_freeze(self):
            return {None: None, "module": self.backbone[0], "tuple": (self.backbone[0], self.backbone[3])}[given]

        def on_train_epoch_end(self):
            self.frozen = [name for name, p in self.named_parameters() if not p.requires_grad]

    module = Own()
    quiet(tmp_path).finetune(module, loaders(16)[0], strategy="freeze")
    first, last = ["backbone.0.weight", "backbone.0.bias"], ["backbone.3.weight", "backbone.3.bias"]
    assert module.frozen == {None: [], "module": first, "tuple": [*first, *last]}[given]


def test_double_precision_is_the_default_format_during_the_run(tmp_path):
    class Double(Net):
        def training_step(self, batch, batch_idx):
            self.made = torch.ones(1).dtype
            return super().training_step(batch, batch_idx)

    module = Double()
    quiet(tmp_path, precision=64).fit(module, *loaders(16))
    assert module.made is torch.float64
    assert torch.get_default_dtype() is torch.float32


def test_a_model_that_is_made_late_is_saved_and_loaded(tmp_path):
    class Late(Net):
        def configure_model(self):
            if not hasattr(self, "late"):
                self.late = torch.nn.Linear(3, 3)

        def forward(self, inputs):
            return self.late(super().forward(inputs))

    trainer, module = quiet(tmp_path, callbacks=ModelCheckpoint()), Late()
    trainer.fit(module, *loaders(16))
    loaded = Late.load_from_checkpoint(trainer.checkpoint_callback.last_model_path)
    assert torch.equal(loaded.late.weight, module.late.weight)


def test_metrics_that_a_callback_keeps_are_stored(tmp_path):
    class Keeping(Callback):
        last = None

        def on_train_epoch_end(self, trainer, module):
            self.last = trainer.callback_metrics["val_loss"]

        def state_dict(self):
            return {"last": self.last}

    trainer = quiet(tmp_path, callbacks=Keeping())
    trainer.fit(net(), *loaders(16))
    stored = read_checkpoint(trainer.checkpoint_callback.last_model_path)["callbacks"]["Keeping"]
    assert stored == {"last": trainer.callback_metrics["val_loss"]}
    assert type(stored["last"]) is float
