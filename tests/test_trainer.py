"""The stages of the trainer, and what a run writes and tells."""

from __future__ import annotations

import csv
import json
import math
import os

import pytest
import torch
from small import Net, digest, loaders, net

from flashtask import Callback, Module, Trainer, read_checkpoint, seed_everything
from flashtask.core.errors import DivergedError, OutputError, UsageError
from flashtask.core.seeding import generator_states


def quiet(tmp_path, **options):
    options = {"output_dir": tmp_path / "run", "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(**options)


class Recorder(Callback):
    """Every hook, in order."""

    def __init__(self):
        self.hooks = []

    def __getattribute__(self, name):
        if name.startswith("on_") and name not in ("on_save_checkpoint", "on_load_checkpoint"):
            hooks = object.__getattribute__(self, "hooks")
            return lambda *arguments: hooks.append(name)
        return object.__getattribute__(self, name)


def test_moments_come_in_the_documented_order(tmp_path):
    recorder = Recorder()
    train, val = loaders(samples=4, batch_size=4)
    quiet(tmp_path, max_epochs=1, callbacks=[recorder], num_sanity_val_steps=0).fit(net(), train, val)
    assert recorder.hooks == [
        "on_fit_start",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_before_zero_grad",
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_epoch_start",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
        "on_validation_end",
        "on_train_epoch_end",
        "on_epoch_end",
        "on_train_end",
        "on_fit_end",
    ]


def test_five_frames_lie_between_fit_and_the_optimizer_step(tmp_path):
    import traceback

    depths = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            names = [frame.name for frame in traceback.extract_stack()]
            depths.append(len(names) - names.index("fit") - 1)

    class Plain(Net):
        def configure_optimizers(self):
            return Watched(self.parameters(), lr=0.1)

    quiet(tmp_path, max_steps=1).fit(Plain(), *loaders())
    # execute, fit, train, step, Precision.step; then torch's own wrapper around every optimizer's step.
    assert depths[0] == 5 + 2


def test_two_runs_with_one_seed_give_the_same_bits_and_another_seed_others(tmp_path):
    digests = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        module = net()
        quiet(tmp_path, max_epochs=2, seed=seed, output_dir=tmp_path / name).fit(module, *loaders())
        digests.append(digest(module))
    assert digests[0] == digests[1] != digests[2]


def test_losses_of_a_known_run_stay_what_they_were(tmp_path):
    """Guards refactors: order, dropout, schedule and weighting all show in these numbers."""
    trainer = quiet(tmp_path, max_epochs=3, seed=7)
    trainer.fit(net(), *loaders())
    losses = [(row["train_loss"], row["val_loss"]) for row in trainer.fit_run.history]
    # Kernels of other CPUs round otherwise: 7e-5 lie between those of AVX-512 and of SSE.
    assert sum(losses, ()) == pytest.approx(sum(KNOWN_LOSSES, ()), rel=5e-4)


KNOWN_LOSSES = [(0.954039, 0.8197404), (0.7420301, 0.6577222), (0.6336755, 0.5618621)]


def test_a_sanity_check_changes_nothing(tmp_path):
    digests = set()
    for steps in (0, 2, -1):
        module = net()
        trainer = quiet(tmp_path, max_epochs=2, num_sanity_val_steps=steps, output_dir=tmp_path / str(steps))
        trainer.fit(module, *loaders())
        digests.add(digest(module))
    assert len(digests) == 1


def test_metric_objects_start_anew_in_every_pass(tmp_path):
    """A sanity check, a validation and a stage of its own share one metric object and must not mix."""
    from torchmetrics import SumMetric

    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.seen = SumMetric()

        def validation_step(self, batch, batch_idx):
            self.seen.update(len(batch[0]))
            self.log("val_seen", self.seen)

    module, trainer = Counting(), quiet(tmp_path, max_epochs=2)
    train, val = loaders(samples=50)
    trainer.fit(module, train, val)
    assert [row["val_seen"] for row in trainer.fit_run.history] == [50, 50]
    assert trainer.validate(module, val) == [{"val_seen": 50}]


def test_several_validation_loaders_have_names_of_their_own(tmp_path):
    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("val_loss", float(dataloader_idx))

    module, trainer = Two(), quiet(tmp_path, max_epochs=1)
    train, val = loaders()
    trainer.fit(module, train, [val, val])
    assert trainer.callback_metrics["val_loss/dataloader_idx_1"] == 1.0
    assert trainer.validate(module, [val, val]) == [{"val_loss/dataloader_idx_0": 0}, {"val_loss/dataloader_idx_1": 1}]


def test_epoch_means_are_weighted_by_batch_size(tmp_path):
    class Constant(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(batch_idx))

    train, val = loaders(samples=10, batch_size=8)
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(Constant(), train, val)
    assert trainer.callback_metrics["val_loss"] == pytest.approx((8 * 0 + 2 * 1) / 10)


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    """Also the last, short group: each loss counts by its share of the samples."""

    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.backbone, self.drop = torch.nn.Linear(4, 8), torch.nn.Identity()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    results = []
    for batch_size, accumulate in ((20, 1), (5, 4)):
        torch.manual_seed(0)
        module = Plain()
        trainer = quiet(
            tmp_path, max_epochs=2, accumulate_grad_batches=accumulate, output_dir=tmp_path / str(batch_size)
        )
        trainer.fit(module, loaders(samples=52, batch_size=batch_size)[0])
        results.append((module.head.weight.detach(), trainer.global_step))
    assert results[0][1] == results[1][1] == 6
    torch.testing.assert_close(results[0][0], results[1][0])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(tmp_path, algorithm):
    norms = []

    class Watch(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
            norms.append(float(grads.norm() if algorithm == "norm" else grads.abs().max()))

    trainer = quiet(tmp_path, max_steps=3, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm, callbacks=Watch())
    trainer.fit(net(), *loaders())
    assert len(norms) == 3
    assert all(0 < norm <= 1e-3 + 1e-7 for norm in norms)


def test_max_steps_ends_in_the_middle_of_an_epoch(tmp_path):
    trainer = quiet(tmp_path, max_steps=10)
    trainer.fit(net(), *loaders(samples=50, batch_size=8))
    assert trainer.global_step == 10
    assert [row["step"] for row in trainer.fit_run.history] == [7, 10]


def test_limits_take_whole_numbers_and_shares(tmp_path):
    seen = {"train": 0, "val": 0}

    class Count(Net):
        def training_step(self, batch, batch_idx):
            seen["train"] += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen["val"] += 1
            return super().validation_step(batch, batch_idx)

    trainer = quiet(tmp_path, max_epochs=1, limit_train_batches=0.5, limit_val_batches=3, num_sanity_val_steps=0)
    trainer.fit(Count(), *loaders(samples=80, batch_size=8))
    assert seen == {"train": 5, "val": 3}


def test_a_nan_loss_stops_before_the_weights_are_touched(tmp_path):
    before = {}

    class Diverging(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 3:
                before["digest"] = digest(self)
                return loss * math.nan
            return loss

    module = Diverging()
    # BatchNorm's statistics move in every forward pass; only the weights must not.
    module.backbone = torch.nn.Linear(4, 8)
    with pytest.raises(DivergedError, match="epoch 0, batch 3, step 3"):
        quiet(tmp_path, max_epochs=2).fit(module, *loaders())
    assert digest(module) == before["digest"]


def test_a_hook_that_is_misspelled_is_reported(tmp_path):
    class Misspelled(Net):
        def on_train_epoch_ends(self):
            raise AssertionError("never called")

    with pytest.warns(UserWarning, match="did you mean on_train_epoch_end"):
        quiet(tmp_path, max_steps=1).fit(Misspelled(), *loaders())


def test_an_unknown_argument_names_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'max_epochs'"):
        Trainer(max_epoch=3)


@pytest.mark.parametrize(
    "wrong", [{"max_epochs": -2}, {"max_steps": 1.5}, {"seed": -1}, {"accumulate_grad_batches": 0}]
)
def test_a_value_that_cannot_be_meant_is_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Trainer(**wrong)


def test_a_module_that_is_no_flashtask_module_is_refused():
    with pytest.raises(UsageError, match=r"flashtask\.Module"):
        Trainer(max_epochs=1).fit(torch.nn.Linear(2, 2), *loaders())


def test_the_run_folder_holds_rows_and_a_summary(tmp_path):
    trainer = quiet(tmp_path, max_epochs=3)
    trainer.fit(net(), *loaders())
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert {"train_loss", "val_loss", "learning_rate", "seconds", "trainable_parameters"} <= set(rows[0])
    assert [float(row["learning_rate"]) for row in rows] == [0.01, 0.01, 0.005]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epochs"] == 3
    assert summary["best"]["val_loss"] == pytest.approx(min(float(row["val_loss"]) for row in rows), rel=1e-4)
    assert sorted(os.listdir(tmp_path / "run")) == [
        "best.ckpt",
        "last.ckpt",
        "metrics.csv",
        "summary.json",
        "tensorboard",
    ]


def test_a_run_is_never_overwritten(tmp_path):
    quiet(tmp_path, max_steps=1).fit(net(), *loaders())
    with pytest.raises(OutputError, match="already holds a run") as caught:
        quiet(tmp_path, max_steps=1).fit(net(), *loaders())
    assert caught.value.exit_code == 73


def test_runs_without_a_folder_are_numbered(tmp_path):
    for expected in ("000", "001"):
        trainer = Trainer(max_steps=1, default_root_dir=tmp_path, enable_progress_bar=False)
        trainer.fit(net(), *loaders())
        assert trainer.output_dir == tmp_path / "runs" / expected


def test_a_folder_in_use_is_refused(tmp_path):
    class Second(Callback):
        def on_train_start(self, trainer, module):
            (tmp_path / "run" / "last.ckpt").write_bytes(b"")
            with pytest.raises(OutputError, match="in use by process"):
                quiet(tmp_path, max_steps=1).fit(net(), *loaders(), ckpt_path=tmp_path / "run" / "last.ckpt")
            self.refused = True

    second = Second()
    quiet(tmp_path, max_steps=1, callbacks=second).fit(net(), *loaders())
    assert second.refused


def test_best_weights_come_back_after_finetune_and_save_checkpoint_writes_their_state(tmp_path):
    class Worsening(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", {0: 3.0, 1: 1.0}.get(self.current_epoch, 2.0))

    torch.manual_seed(0)
    module = Worsening()
    trainer = quiet(tmp_path, max_epochs=4)
    trainer.finetune(module, *loaders(), strategy="no_freeze")
    best = read_checkpoint(tmp_path / "run" / "best.ckpt")
    last = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert (best["epoch"], last["epoch"]) == (1, 3)
    assert torch.equal(module.head.weight, best["state_dict"]["head.weight"])
    assert not torch.equal(module.head.weight, last["state_dict"]["head.weight"])
    assert trainer.callback_metrics["val_loss"] == 1.0
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = read_checkpoint(tmp_path / "saved.ckpt")
    assert saved["epoch"] == 1
    assert torch.equal(
        saved["optimizer_states"][0]["state"][0]["exp_avg"], best["optimizer_states"][0]["state"][0]["exp_avg"]
    )


def test_restore_best_can_be_switched_off(tmp_path):
    class Worsening(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    module = Worsening()
    quiet(tmp_path, max_epochs=3).finetune(module, *loaders(), strategy="no_freeze", restore_best=False)
    last = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert torch.equal(module.head.weight, last["state_dict"]["head.weight"])


def test_a_nan_metric_is_never_best(tmp_path):
    class Sometimes(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", math.nan if self.current_epoch == 1 else 1.0 + self.current_epoch)

    trainer = quiet(tmp_path, max_epochs=3)
    trainer.fit(Sometimes(), *loaders())
    assert trainer.checkpoint_callback.best_epoch == 0


def test_evaluation_stages_do_not_replace_the_fit_run(tmp_path):
    trainer = quiet(tmp_path, max_epochs=2)
    module = net()
    trainer.fit(module, *loaders())
    metrics, step = trainer.callback_metrics, trainer.global_step
    (result,) = trainer.validate(module, loaders()[1])
    (tested,) = trainer.test(module, loaders()[1])
    assert result["val_loss"] == pytest.approx(metrics["val_loss"])
    assert tested["test_loss"] == pytest.approx(metrics["val_loss"])
    assert (trainer.fit_run.metrics, trainer.global_step) == (metrics, step)
    assert trainer.callback_metrics == {**metrics, **tested}  # the last evaluation beside the fit


def test_evaluation_leaves_modes_and_generators_alone(tmp_path):
    module = net().train()
    module.backbone[1].eval()
    modes = [part.training for part in module.modules()]
    before = generator_states()
    quiet(tmp_path).validate(module, loaders()[1])
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(before["torch"], generator_states()["torch"])


def test_predict_gives_one_output_a_batch_in_order(tmp_path):
    module = net().eval()
    loader = loaders(samples=10, batch_size=4)[1]

    class Predicting(Net):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return self(batch[0])

    predicting = Predicting()
    predicting.load_state_dict(module.state_dict())
    outputs = quiet(tmp_path).predict(predicting, loader)
    assert [len(part) for part in outputs] == [4, 4, 2]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(outputs), module(loader.dataset.tensors[0]))


def test_test_can_use_the_best_checkpoint(tmp_path):
    class Worsening(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    trainer = quiet(tmp_path, max_epochs=3)
    module = Worsening()
    trainer.fit(module, *loaders())
    trainer.test(ckpt_path="best", dataloaders=loaders()[1])
    assert torch.equal(module.head.weight, read_checkpoint(tmp_path / "run" / "best.ckpt")["state_dict"]["head.weight"])


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "auto"])
def test_precisions_train(tmp_path, precision):
    seen = []

    class Watch(Net):
        def training_step(self, batch, batch_idx):
            seen.append(self.head(self.backbone(batch[0])).dtype)
            return super().training_step(batch, batch_idx)

    trainer = quiet(tmp_path, max_steps=2, precision=precision)
    trainer.fit(Watch(), *loaders())
    assert trainer.fit_run.precision.name == ("32" if precision == "32" else trainer.fit_run.precision.name)
    assert (seen[0] == torch.bfloat16) == (trainer.fit_run.precision.name == "bf16-mixed")


def test_half_precision_scales_gradients_and_saves_the_scale(tmp_path):
    trainer = quiet(tmp_path, max_steps=2, precision="16-mixed")
    trainer.fit(net(), *loaders())
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["precision"]["state"]["scale"] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "gpuu"}, "did you mean"),
        ({"accelerator": "cuda"}, "no CUDA device"),
        ({"accelerator": "tpu"}, "no TPU support"),
        ({"devices": 4, "strategy": "single"}, "uses one device"),
        ({"precision": "bf17"}, "bf16"),
    ],
)
def test_a_device_or_format_that_is_not_there_is_an_error(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        quiet(tmp_path, max_steps=1, **options).fit(net(), *loaders())


def test_s1_seed_everything_seeds_every_generator_and_later_trainers(tmp_path, capsys):
    import random

    import numpy as np

    draws = []
    for _ in range(2):
        assert seed_everything(42) == 42
        draws.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]
    assert "seed: 42" in capsys.readouterr().out
    trainer = quiet(tmp_path, max_steps=1)
    trainer.fit(net(), *loaders())
    assert trainer.fit_run.seed == 42
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["seed"] == 42
    assert quiet(tmp_path, seed=5).seed == 5


def test_s123_freeze_turns_gradients_off_and_stays_in_eval_mode(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.features = Net().freeze()
            self.last = torch.nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            assert not self.features.training
            return torch.nn.functional.cross_entropy(self.last(self.features(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Two()
    before = digest(module.features)
    quiet(tmp_path, max_epochs=1).fit(module, loaders()[0])
    assert digest(module.features) == before
    assert not any(p.requires_grad for p in module.features.parameters())
    assert all(p.requires_grad for p in module.features.unfreeze().parameters())
    assert module.features.training
