"""Looking for mistakes: brief runs, limits, sanity checks, overfitting, norms of gradients, anomalies."""

from __future__ import annotations

import csv
import math
from collections import Counter

import pytest
import torch
from small import Net, digest, loaders, net

from flashtask import Callback, DataModule, EarlyStopping, Logger, ModelCheckpoint, Trainer
from flashtask.core.errors import DivergedError, UsageError


def quiet(tmp_path, **options):
    options = {"output_dir": tmp_path / "run", "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(**options)


class Watched(Net):
    """Which batches each step was given, by the sums of their numbers."""

    def __init__(self):
        super().__init__()
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def note(self, word, batch):
        self.seen[word].append(round(float(batch[0].sum()), 4))

    def training_step(self, batch, batch_idx):
        self.note("train", batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.note("val", batch)
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.note("test", batch)
        super().test_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self.note("predict", batch)
        return self(batch[0])

    @property
    def counts(self):
        return {word: len(batches) for word, batches in self.seen.items()}


class Data(DataModule):
    """Ten batches for each stage, of other samples in each; those of training are shuffled."""

    def setup(self, stage):
        self.shuffled, self.plain = loaders(samples=80)

    def train_dataloader(self):
        return self.shuffled

    def val_dataloader(self):
        return _shifted(self.plain, 10)

    def test_dataloader(self):
        return _shifted(self.plain, 20)

    def predict_dataloader(self):
        return _shifted(self.plain, 30)


def _shifted(loader, by):
    inputs, targets = loader.dataset.tensors
    shifted = torch.utils.data.TensorDataset(inputs + by, targets)
    return torch.utils.data.DataLoader(shifted, batch_size=8)


def all_verbs(trainer, module, data):
    for method in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        method(module, datamodule=data)
    return module


class Told(Logger):
    """The names of the methods that were called."""

    def __init__(self):
        self.calls = Counter()

    def start(self, folder, history, step):
        self.calls["start"] += 1

    def log_hyperparameters(self, values):
        self.calls["log_hyperparameters"] += 1

    def log_step(self, values, step, epoch):
        self.calls["log_step"] += 1

    def log_epoch(self, row):
        self.calls["log_epoch"] += 1


# ---- fast_dev_run


@pytest.mark.parametrize(("given", "batches"), [(True, 1), (1, 1), (3, 3), (100, 10)])
def test_s89_fast_dev_run_takes_so_many_batches_of_everything_once(tmp_path, given, batches):
    trainer = quiet(tmp_path, fast_dev_run=given, max_epochs=4)
    module = Watched()
    trainer.fit(module, Data())
    assert module.counts == {"train": batches, "val": batches, "test": 0, "predict": 0}  # so no sanity check either
    assert (trainer.global_step, len(trainer.fit_run.history)) == (batches, 1)
    all_verbs(trainer, module, Data())
    assert module.counts == {"train": 2 * batches, "val": 3 * batches, "test": batches, "predict": batches}


@pytest.mark.parametrize("off", [False, 0])
def test_s89_without_fast_dev_run_everything_runs(tmp_path, off):
    module = all_verbs(quiet(tmp_path, fast_dev_run=off, max_epochs=1, num_sanity_val_steps=0), Watched(), Data())
    assert module.counts == {"train": 10, "val": 20, "test": 10, "predict": 10}


def test_s89_fast_dev_run_writes_nothing_stops_nothing_early_and_keeps_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = [Told(), Told()]
    trainer = quiet(
        tmp_path,
        fast_dev_run=2,
        logger=told,
        log_every_n_steps=1,
        # Each of the two would ask for a metric that nobody logs, and the second would write.
        callbacks=[EarlyStopping(monitor="nothing"), ModelCheckpoint(monitor="nothing", dirpath=tmp_path / "best")],
    )
    all_verbs(trainer, Watched(), Data())
    assert list(tmp_path.iterdir()) == []
    assert not told[0].calls
    assert not told[1].calls
    assert trainer.checkpoint_callback is None
    assert trainer.callback_metrics.keys() == {"train_loss", "val_loss", "test_loss"}


def test_s89_fast_dev_run_keeps_callbacks_that_do_not_stop_or_write(tmp_path):
    class Count(Callback):
        batches = 0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.batches += 1

    count = Count()
    quiet(tmp_path, fast_dev_run=2, callbacks=[count, EarlyStopping(monitor="nothing")]).fit(net(), Data())
    assert count.batches == 2


def test_s89_fast_dev_run_wins_over_limits(tmp_path):
    limits = {f"limit_{word}_batches": 0.5 for word in ("train", "val", "test", "predict")}
    trainer = quiet(tmp_path, fast_dev_run=2, num_sanity_val_steps=5, min_epochs=3, **limits)
    assert all_verbs(trainer, Watched(), Data()).counts == {"train": 2, "val": 4, "test": 2, "predict": 2}


@pytest.mark.parametrize("wrong", [-1, 1.5, "yes", None])
def test_s89_what_fast_dev_run_cannot_mean_is_refused(wrong):
    with pytest.raises(UsageError, match="True, False or a whole number of batches"):
        Trainer(fast_dev_run=wrong)


# ---- limits


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize(("limit", "batches"), [(3, 3), (0.25, 2), (0.01, 1), (1, 1), (1.0, 10), (99, 10), (None, 10)])
@pytest.mark.parametrize("word", ["train", "val", "test", "predict"])
def test_s90_a_limit_is_a_number_of_batches_or_a_share_of_them(tmp_path, word, limit, batches):
    options = {f"limit_{word}_batches": limit}
    trainer = quiet(tmp_path, max_epochs=1, num_sanity_val_steps=0, enable_checkpointing=False, **options)
    expected = {"train": 10, "val": 20, "test": 10, "predict": 10}
    expected[word] = batches * (2 if word == "val" else 1)  # in the fit and in `validate`
    assert all_verbs(trainer, Watched(), Data()).counts == expected


def test_s90_the_full_training_is_exercised_over_a_share_of_the_data(tmp_path):
    trainer = quiet(tmp_path, max_epochs=3, limit_train_batches=0.2, limit_val_batches=0.1)
    trainer.fit(module := Watched(), Data())
    assert module.counts["train"] == 3 * 2
    assert [row["step"] for row in trainer.fit_run.history] == [2, 4, 6]
    assert (tmp_path / "run" / "best.ckpt").exists()
    assert len(set(module.seen["train"])) > 2  # another share in each epoch


@pytest.mark.parametrize(("limit", "batches"), [(1, [1, 1]), (0.5, [5, 1])])
def test_s90_each_of_several_loaders_has_the_limit_of_its_own(tmp_path, limit, batches):
    seen = []

    class Numbered(Net):
        def test_step(self, batch, batch_idx, dataloader_idx):
            seen.append(dataloader_idx)

    quiet(tmp_path, limit_test_batches=limit).test(Numbered(), [loaders(samples=80)[1], loaders(samples=16)[1]])
    assert [seen.count(0), seen.count(1)] == batches


def test_s90_zero_turns_a_stage_off(tmp_path):
    trainer = quiet(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(module := Watched(), Data())
    assert module.counts["val"] == 0
    with pytest.raises(UsageError, match="limit_train_batches above 0"):
        quiet(tmp_path / "other", limit_train_batches=0).fit(net(), Data())


def test_s90_a_share_of_a_loader_without_length_is_refused(tmp_path):
    def batches():
        yield from loaders()[1]

    with pytest.raises(UsageError, match=r"a share of batches \(0.5\) needs a loader with a length") as caught:
        quiet(tmp_path, limit_test_batches=0.5).test(net(), batches())
    assert "a whole number" in caught.value.fix


# ---- sanity check


class BeforeTraining(Callback):
    """What had happened when training began, and whether each validation batch was known as part of the check."""

    def __init__(self):
        self.checking = []

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.checking.append(trainer.sanity_checking)

    def on_train_start(self, trainer, module):
        self.batches, self.metrics = module.counts["val"], trainer.callback_metrics


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({}, 2),
        ({"num_sanity_val_steps": 5}, 5),
        ({"num_sanity_val_steps": 0}, 0),
        ({"num_sanity_val_steps": -1}, 10),
        ({"num_sanity_val_steps": 99}, 10),
        ({"num_sanity_val_steps": 5, "limit_val_batches": 3}, 3),
        ({"num_sanity_val_steps": -1, "limit_val_batches": 3}, 3),
    ],
)
def test_s91_two_validation_batches_run_before_training_or_as_many_as_asked_for(tmp_path, options, batches):
    watch = BeforeTraining()
    quiet(tmp_path, max_steps=1, callbacks=watch, **options).fit(Watched(), Data())
    assert watch.batches == batches
    assert watch.metrics == {}
    assert watch.checking[: batches + 1] == [True] * batches + [False]


def test_s91_a_sanity_check_leaves_no_trace(tmp_path):
    """Weights, metrics, logs and the order of a loader that shuffles are those of a run without it."""

    class Rolling(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.rand(()), on_step=True)  # also draws from the generators

    found = []
    for steps in (0, 2, -1):
        torch.manual_seed(1)
        module, told = Rolling(), Told()
        trainer = quiet(
            tmp_path, output_dir=tmp_path / str(steps), max_epochs=2, num_sanity_val_steps=steps, logger=told
        )
        trainer.fit(module, Data())
        rows = [(row["train_loss"], row["val_loss_epoch"]) for row in trainer.fit_run.history]
        found.append((digest(module), rows, told.calls, trainer.checkpoint_callback.best_score))
    assert found[0] == found[1] == found[2]


def test_s91_a_mistake_in_validation_is_found_before_the_first_epoch(tmp_path):
    class Broken(Watched):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        quiet(tmp_path).fit(module := Broken(), Data())
    assert module.counts["train"] == 0


# ---- overfitting


@pytest.mark.parametrize(("few", "batches"), [(2, 2), (0.3, 3), (0.01, 1), (1, 1), (1.0, 10)])
def test_s92_the_same_first_batches_serve_training_validation_and_test(tmp_path, few, batches):
    trainer = quiet(tmp_path, max_epochs=3, overfit_batches=few)
    trainer.fit(module := Watched(), Data())
    first = [round(float(inputs.sum()), 4) for inputs, _ in loaders(samples=80)[1]][:batches]
    assert module.seen["train"] == first * 3
    assert module.seen["val"] == []  # validation is off while fitting
    trainer.validate(module, datamodule=Data())
    trainer.test()
    assert module.seen["val"] == module.seen["test"] == first
    trainer.predict()
    assert module.counts["predict"] == 10
    assert not set(module.seen["predict"]) & set(first)


def test_s92_loaders_without_a_datamodule_serve_alike(tmp_path):
    train, val = loaders(samples=80)
    trainer = quiet(tmp_path, max_epochs=1, overfit_batches=2)
    trainer.fit(module := Watched(), train, _shifted(val, 10))
    trainer.validate()
    trainer.test(module)
    assert module.seen["train"] == module.seen["val"] == module.seen["test"]


@pytest.mark.parametrize("wrong", [True, -1, 1.5, "2", None])
def test_s92_what_overfit_batches_cannot_mean_is_refused(wrong):
    with pytest.raises(UsageError, match=r"overfit_batches=.*from 0.0 to 1.0"):
        Trainer(overfit_batches=wrong)


# ---- gradients


def norm_of(gradients, order):
    values = torch.cat([gradient.flatten() for gradient in gradients]).abs().double()
    return float(values.max() if order == "inf" else values.pow(order).sum() ** (1 / order))


class ByHand(Net):
    """Computes the norm of each batch's gradients by itself, and notes that of the gradients after they were used."""

    def __init__(self, order):
        super().__init__()
        self.order, self.norms, self.clipped = order, [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        gradients = torch.autograd.grad(loss, list(self.parameters()), retain_graph=True)
        self.norms.append(norm_of(gradients, self.order))
        return loss

    def on_before_zero_grad(self, optimizer):
        self.clipped.append(norm_of([parameter.grad for parameter in self.parameters()], self.order))


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(("order", "name"), [(2, "2.0"), (1, "1.0"), ("inf", "inf")])
def test_s93_the_norm_of_all_gradients_before_clipping_is_logged(tmp_path, order, name, precision):
    """It is that of the true gradients where the loss is scaled; a step that overflows shows as inf."""
    torch.manual_seed(1)
    module = ByHand(order)
    options = {"log_every_n_steps": 1, "gradient_clip_val": 1e-3, "precision": precision}
    quiet(tmp_path, max_steps=4, track_grad_norm=order, **options).fit(module, Data())
    rows = list(csv.DictReader((tmp_path / "run" / "steps.csv").read_text().splitlines()))
    logged = [float(row[f"grad_{name}_norm_total"]) for row in rows]
    taken = [index for index, norm in enumerate(logged) if math.isfinite(norm)]
    assert len(logged) == 4
    assert len(taken) >= (3 if precision == "16-mixed" else 4)
    exactness = 1e-4 if precision == "32" else 0.02
    assert [logged[index] for index in taken] == pytest.approx([module.norms[index] for index in taken], rel=exactness)
    assert all(module.clipped[index] < logged[index] / 2 for index in taken)


def test_s93_with_accumulation_it_is_the_norm_of_the_whole_group(tmp_path):
    logged = []
    for batch_size, accumulate in ((24, 1), (8, 3)):
        torch.manual_seed(0)
        module = Net()
        module.backbone, module.drop = torch.nn.Linear(4, 8), torch.nn.Identity()
        options = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 1, "track_grad_norm": 2}
        trainer = quiet(tmp_path, output_dir=tmp_path / str(batch_size), max_epochs=1, **options)
        trainer.fit(module, loaders(samples=24, batch_size=batch_size)[1])
        logged.append(trainer.callback_metrics["grad_2.0_norm_total"])
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_s93_without_being_asked_no_norm_is_logged(tmp_path):
    trainer = quiet(tmp_path, max_steps=2, log_every_n_steps=1)
    trainer.fit(net(), loaders()[0])
    assert not any("grad" in name for name in trainer.callback_metrics)


@pytest.mark.parametrize("wrong", [0, -2, True, None, "2", "nan", float("nan")])
def test_s93_what_is_no_norm_is_refused(wrong):
    with pytest.raises(UsageError, match="track_grad_norm"):
        Trainer(track_grad_norm=wrong)


class Rooted(Net):
    """The gradient of its third batch is infinity times zero."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + torch.sqrt(self(batch[0]).sum() * 0) if batch_idx == 2 else loss


def test_detect_anomaly_names_the_operation_that_made_a_gradient_nan(tmp_path):
    torch.manual_seed(0)
    module = Rooted()
    with (
        pytest.warns(UserWarning, match="Error detected in MulBackward0"),
        pytest.raises(DivergedError, match="a gradient became NaN in MulBackward0"),
    ):
        quiet(tmp_path, max_epochs=1, detect_anomaly=True).fit(module, loaders()[0])
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    assert not torch.is_anomaly_enabled()


def test_detect_anomaly_changes_no_bit_of_a_healthy_run(tmp_path):
    digests, enabled = [], []

    class Noting(Net):
        def training_step(self, batch, batch_idx):
            enabled.append(torch.is_anomaly_enabled())
            return super().training_step(batch, batch_idx)

    for detect in (False, True):
        torch.manual_seed(0)
        module = Noting()
        trainer = quiet(tmp_path, output_dir=tmp_path / str(detect), max_steps=2, detect_anomaly=detect)
        trainer.fit(module, loaders()[0])
        digests.append(digest(module))
    assert enabled == [False, False, True, True]
    assert digests[0] == digests[1]
