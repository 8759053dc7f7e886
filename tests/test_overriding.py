"""What modules, data modules and callbacks may override, and what the hooks of a run find."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from small import Net, loaders, net, quiet

from flashtask import (
    Callback,
    DataModule,
    ModelCheckpoint,
    ModelSummary,
    Module,
    ScaledPrecision,
    read_checkpoint,
)
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.trainer.batch_transfer import stacked
from flashtask.trainer.callbacks.callback import _HOOKS
from flashtask.trainer.module_hooks import ModuleHooks

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
    not_asked = {"on_exception", "on_validated", "prepare_data"}
    not_asked |= {"train_dataloader", "val_dataloader", "test_dataloader"}
    assert {name for name in of_module if not told["module"][name]} <= not_asked | {"predict_dataloader"}
    assert {name for name in _HOOKS if not told["callback"][name]} == {"on_exception", "on_validated"}
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
            super().on_before_optimizer_step(optimizer, optimizer_idx)

        def predict_step(self, batch, batch_idx):
            return len(batch[0])

        def on_predict_epoch_end(self, results):
            seen["results"] = results
            super().on_predict_epoch_end(results)

    class Watching(Callback):
        def on_train_batch_end(self, trainer, module, outputs):
            seen["outputs"] = float(outputs)

        def on_predict_epoch_end(self, trainer, module, outputs):
            seen["predictions"] = outputs
            super().on_predict_epoch_end(trainer, module, outputs)

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


# ---- parts of a step


class Plain(Net):
    """Without dropout, so that runs can be compared."""

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Identity()
        self.called = []


def trained(tmp_path, kind, **options) -> torch.nn.Module:
    torch.manual_seed(1)
    module = kind()
    quiet(tmp_path, enable_checkpointing=False, **options).fit(module, loaders(24)[0])
    return module


def same_weights(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


class Newer(Plain):
    def backward(self, loss):
        self.called.append("backward")
        super().backward(loss)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.called.append(("step", epoch, batch_idx))
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.called.append("zero_grad")
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.called.append(("clip", gradient_clip_val))
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler, metric):
        self.called.append(("schedule", metric))
        super().lr_scheduler_step(scheduler, metric)


class OlderSteps(Plain):
    def backward(self, loss, optimizer, optimizer_idx, *args, **kwargs):
        self.called.append("backward")
        loss.backward(*args, **kwargs)

    def optimizer_step(
        self,
        epoch,
        batch_idx,
        optimizer,
        optimizer_idx,
        optimizer_closure,
        on_tpu=False,
        using_native_amp=False,
        using_lbfgs=False,
    ):
        self.called.append(("step", epoch, batch_idx))
        assert (optimizer_idx, on_tpu) == (0, False)
        assert optimizer.param_groups[0]["lr"] > 0
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer, optimizer_idx):
        self.called.append("zero_grad")
        optimizer.zero_grad()

    def configure_gradient_clipping(self, optimizer, optimizer_idx, gradient_clip_val, gradient_clip_algorithm):
        self.called.append(("clip", gradient_clip_val))
        self.clip_gradients(
            optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
        )

    def lr_scheduler_step(self, scheduler, optimizer_idx, metric):
        self.called.append(("schedule", metric))
        scheduler.step()


@pytest.mark.parametrize("kind", [Newer, OlderSteps])
def test_a_module_may_write_each_part_of_a_step(tmp_path, kind):
    """What they do by default gives the same bits as the engine's own parts."""
    plain = trained(tmp_path, Plain, gradient_clip_val=0.01)
    written = trained(tmp_path, kind, gradient_clip_val=0.01)
    step = ["backward", ("clip", 0.01), ("step", 0, 0), "zero_grad"]
    assert written.called[:4] == step
    assert written.called[-2:] == ["zero_grad", ("schedule", None)]
    assert len(written.called) == 3 * len(step) + 1
    assert same_weights(plain, written)


def test_optimizer_step_may_change_the_rate_or_leave_a_step_out(tmp_path):
    class Warm(Plain):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            self.called.append(float(optimizer_closure()))
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            if batch_idx == 0:
                optimizer.step(closure=optimizer_closure)

    module = trained(tmp_path, Warm)
    torch.manual_seed(1)
    before = Warm()
    assert same_weights(module, before)  # the rate is 0, and AdamW's decay follows the rate
    assert all(loss > 0 for loss in module.called)
    assert len(module.called) == 3


class NotingLosses(Plain):
    """Notes each loss that its training step computes."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.called.append(loss.item())
        return loss


def test_a_closure_that_is_called_once_runs_the_step_once(tmp_path):
    class Closure(NotingLosses):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            assert optimizer.step(optimizer_closure).item() == self.called[-1]

    module = trained(tmp_path, Closure, gradient_clip_val=0.01)
    assert len(module.called) == 3
    assert same_weights(module, trained(tmp_path, Plain, gradient_clip_val=0.01))


def lbfgs(module):
    return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")


class Searching(NotingLosses):
    def configure_optimizers(self):
        return lbfgs(self)


class SearchingWithMethod(Searching):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def by_hand(batches, weights=()):
    """What LBFGS makes of groups of batches: the module, with all losses in `called`."""
    torch.manual_seed(1)
    module = NotingLosses().train()
    module.log = lambda *arguments, **options: None
    optimizer = lbfgs(module)
    for group in batches:

        def closure(group=group):
            optimizer.zero_grad()
            losses = [module.training_step(batch, 0) / len(group) for batch in group]
            for loss in losses:
                loss.backward()
            return torch.stack(losses).sum()

        optimizer.step(closure)
    return module


@pytest.mark.parametrize("kind", [Searching, SearchingWithMethod])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_optimizer_that_calls_its_closure_several_times_gets_the_loss_of_its_weights(tmp_path, kind, accumulate):
    batches = []

    class Noting(kind):
        def on_train_batch_start(self, batch, batch_idx):
            batches.append(batch)

    torch.manual_seed(1)
    module, trainer = Noting(), quiet(tmp_path, enable_checkpointing=False, accumulate_grad_batches=accumulate)
    trainer.fit(module, loaders(32)[0])
    expected = by_hand([batches[start : start + accumulate] for start in range(0, 4, accumulate)])
    assert trainer.global_step == 4 // accumulate
    assert len(module.called) == len(expected.called) > 4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.parameters(), expected.parameters(), strict=True))


def test_values_that_a_step_logs_when_it_is_run_again_are_dropped(tmp_path):
    first_losses = []

    class Noting(Searching):
        def on_after_backward(self):
            if len(first_losses) == self.trainer.global_step:
                first_losses.append(self.called[-1])

    torch.manual_seed(1)
    trainer = quiet(tmp_path, enable_checkpointing=False)
    trainer.fit(Noting(), loaders(32)[0])
    assert trainer.callback_metrics["train_loss"] == pytest.approx(sum(first_losses) / 4)


def test_a_closure_is_computed_again_for_weights_that_were_changed_before_its_first_call(tmp_path):
    class Moved(NotingLosses):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter += 0.1
            before = self.called[-1]
            assert optimizer.step(optimizer_closure).item() == self.called[-1] != before

    assert len(trained(tmp_path, Moved).called) == 6


def test_a_closure_whose_gradients_were_cleared_computes_them_again(tmp_path):
    class Cleared(NotingLosses):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.zero_grad()
            optimizer.step(optimizer_closure)

    module = trained(tmp_path, Cleared)
    assert len(module.called) == 6
    assert same_weights(module, trained(tmp_path, Plain))


def test_with_a_gradient_scaler_a_closure_is_called_before_the_step(tmp_path):
    module = trained(tmp_path, OlderSteps, precision="16-mixed", accelerator="cpu")
    assert same_weights(module, trained(tmp_path, Plain, precision="16-mixed", accelerator="cpu"))


def test_clipping_of_ones_own_clips(tmp_path):
    class Clipping(Plain):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="value")

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            self.called.append(max(float(p.grad.abs().max()) for p in self.parameters()))
            optimizer.step()

    assert trained(tmp_path, Clipping).called == [pytest.approx(1e-3)] * 3


def test_a_scheduler_that_wants_the_epoch_is_stepped_by_the_module(tmp_path):
    class ByEpoch(torch.optim.lr_scheduler.LambdaLR):
        def step(self, epoch=None):
            self.epochs = [*getattr(self, "epochs", []), epoch]
            super().step(epoch)

    class Own(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [ByEpoch(optimizer, lambda epoch: 1.0)]

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(epoch=self.current_epoch + 7)

    trainer = quiet(tmp_path, max_epochs=2)
    with pytest.warns(UserWarning, match="epoch"):
        trainer.fit(Own(), loaders(16)[0])
    assert trainer.lr_scheduler_configs[0].scheduler.epochs == [None, 7, 8]


def test_backward_is_called_with_manual_optimization_too(tmp_path):
    class Manual(Plain):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

        def backward(self, loss, **options):
            self.called.append("backward")
            super().backward(loss, **options)

        def on_before_optimizer_step(self, optimizer, optimizer_idx):
            self.called.append(optimizer_idx)

    assert trained(tmp_path, Manual).called == ["backward", 0] * 3


def test_scaled_losses_reach_backward(tmp_path):
    class Scaled(Plain):
        def backward(self, loss):
            self.called.append(loss.item())
            super().backward(loss)

    module = trained(tmp_path, Scaled, precision=ScaledPrecision("cpu"))
    assert min(module.called) > 1000


# ---- callbacks, checkpoints, batches


def test_callbacks_of_the_module_take_the_places_of_those_of_their_class(tmp_path):
    class Noting(Callback):
        def __init__(self, told):
            self.told = told

        def on_train_start(self, trainer, module):
            self.told.append("module")

    class Own(Net):
        def configure_callbacks(self):
            return [Noting(told), ModelCheckpoint(filename="own")]

    told, given = [], []
    trainer = quiet(tmp_path, callbacks=[Noting(given), ModelCheckpoint(filename="given")])
    trainer.fit(Own(), *loaders(16))
    assert (told, given) == (["module"], [])
    assert trainer.checkpoint_callback.best_model_path.endswith("own.ckpt")


def test_state_dict_hooks_and_checkpoint_hooks_change_what_is_stored(tmp_path):
    def hide(module, state, prefix, _):
        del state[f"{prefix}hidden"]

    class Own(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("scratch", torch.zeros(2))
            self.register_buffer("hidden", torch.zeros(2))
            self._register_state_dict_hook(hide)
            self.seen = None

        def on_save_checkpoint(self, checkpoint):
            checkpoint["own"] = {"note": 7}
            del checkpoint["state_dict"]["scratch"]

        def on_load_checkpoint(self, checkpoint):
            self.seen = checkpoint["own"]["note"]

        @property
        def strict_loading(self):
            return False

    trainer = quiet(tmp_path)
    trainer.fit(Own(), *loaders(16))
    path = trainer.checkpoint_callback.last_model_path
    assert not {"scratch", "hidden"} & read_checkpoint(path)["state_dict"].keys()
    assert Own.load_from_checkpoint(path).seen == 7
    with pytest.raises(IntegrityError, match="no scratch"):
        Own.load_from_checkpoint(path, strict=True)
    trainer.test(ckpt_path="last", dataloaders=loaders(16)[1])


def test_batches_are_changed_on_their_way(tmp_path):
    class Own(Net):
        seen = ()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"inputs": batch[0], "targets": batch[1]}

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return super().transfer_batch_to_device({**batch, "device": str(device)}, device, dataloader_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.seen = (*sorted(batch), batch["device"], dataloader_idx)
            return batch["inputs"], batch["targets"]

    module = Own()
    quiet(tmp_path).fit(module, *loaders(16))
    assert module.seen == ("device", "inputs", "targets", "cpu", 0)


# ---- logging


def test_a_callback_and_a_child_module_log_as_the_module_does(tmp_path):
    class Child(Module):
        def forward(self, inputs):
            self.log("child", 2.0)
            return inputs

    class Parent(Net):
        def __init__(self):
            super().__init__()
            self.child = Child()

        def training_step(self, batch, batch_idx):
            return super().training_step([self.child(batch[0]), batch[1]], batch_idx)

    class Logging(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.log("callback", float(batch_idx), on_epoch=True, on_step=False, reduce_fx=torch.sum)
            self.log_dict({"a": 1.0, "b": 2.0})

    callback, module = Logging(), Parent()
    trainer = quiet(tmp_path, callbacks=callback)
    trainer.fit(module, loaders(24)[0])
    assert {"callback": 3.0, "child": 2.0, "a": 1.0, "b": 2.0}.items() <= trainer.callback_metrics.items()
    for outside in (callback, module, module.child):
        with pytest.warns(UserWarning, match="outside of a run is ignored"):
            outside.log("late", 1.0)


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [(torch.mean, 1.0), ("mean", 1.0), (torch.sum, 3.0), (sum, 3.0), (torch.max, 2.0), (max, 2.0), (torch.amin, 0.0)],
)
def test_a_reduction_may_be_a_function(tmp_path, reduce_fx, expected):
    class Own(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(batch_idx), reduce_fx=reduce_fx, batch_size=1)

    assert quiet(tmp_path).validate(Own(), loaders(24)[1]) == [{"val_loss": expected}]


def test_a_reduction_that_is_not_known_is_refused(tmp_path):
    class Own(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0, reduce_fx=torch.median)

    with pytest.raises(UsageError, match=r"median.*one of mean, sum, max, min"):
        quiet(tmp_path).validate(Own(), loaders(16)[1])


# ---- what a module knows


def test_what_a_module_knows_of_its_run(tmp_path, capsys):
    seen = {}

    class Own(Net):
        def on_train_start(self):
            self.print("one", "two", sep="-")
            seen.update(ranks=(self.global_rank, self.local_rank), loggers=self.loggers)
            tensor = torch.ones(2)
            seen["gathered"] = self.all_gather({"a": tensor})["a"] is tensor

    module = Own()
    assert (module.global_rank, module.local_rank, module.loggers) == (0, 0, [])
    trainer = quiet(tmp_path, logger=True)
    trainer.fit(module, *loaders(16))
    assert seen == {"ranks": (0, 0), "loggers": trainer.loggers, "gathered": True}
    assert capsys.readouterr().out == "one-two\n"


def test_the_first_hyper_parameters_are_kept():
    module = Net(width=4)
    module.hparams.width = 9
    assert (module.hparams_initial.width, module.hparams.width) == (4, 9)
    assert Module().hparams_initial == {}


def test_structures_of_all_processes_are_stacked():
    made = stacked([{"a": (torch.ones(2), n), "b": "text"} for n in range(3)])
    assert made["a"][0].shape == (3, 2)
    assert made["a"][1].tolist() == [0, 1, 2]
    assert made["b"] == "text"


def test_the_summary_has_sizes_for_an_example(tmp_path, capsys):
    class Own(Plain):
        example_input_array = torch.zeros(2, 4)

    plain = trained(tmp_path, Plain)
    module = trained(tmp_path, Own, callbacks=ModelSummary(max_depth=2))
    shown = capsys.readouterr().err
    assert "in" in shown.splitlines()[0]
    assert "2 x 4" in next(line for line in shown.splitlines() if line.startswith("backbone.0"))
    assert "2 x 3" in next(line for line in shown.splitlines() if line.startswith("all"))
    assert same_weights(plain, module)


@pytest.mark.long
def test_a_compiled_module_is_trained_and_saved_under_its_own_names(tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(1)
    module = Plain()
    compiled = torch.compile(module, backend=backend)
    trainer = quiet(tmp_path)
    trainer.fit(compiled, loaders(24)[0])
    assert graphs
    assert same_weights(module, trained(tmp_path, Plain))
    stored = read_checkpoint(trainer.checkpoint_callback.last_model_path)["state_dict"]
    assert list(stored) == list(Plain().state_dict())
    trainer.test(compiled, loaders(16)[1])


# ---- copies


def test_a_module_is_copied_and_pickled_during_and_after_a_fit(tmp_path):
    class Copying(Net):
        def on_train_epoch_end(self):
            self.inner = copy.deepcopy(self).state_dict()

    module = Copying()
    quiet(tmp_path).fit(module, *loaders(16))
    assert module.inner.keys() == module.state_dict().keys()
    copied = copy.deepcopy(module)
    assert copied.trainer is None
    quiet(tmp_path).fit(copied, *loaders(16))


def test_a_whole_module_is_saved_by_torch(tmp_path):
    trainer, module = quiet(tmp_path), net()
    trainer.fit(module, *loaders(16))
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert same_weights(module, loaded)
    assert loaded.hparams == module.hparams
    assert same_weights(pickle.loads(pickle.dumps(module)), module)  # noqa: S301 - of this test
