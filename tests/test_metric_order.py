"""Which value of a metric is better, wherever one is monitored: by `mode`, by its name, and between equal values."""

from __future__ import annotations

import pytest
import torch
from small import loaders

from flashtask import EarlyStopping, ModelCheckpoint, Module, Phase, Plateau, Trainer, read_checkpoint
from flashtask.core.errors import UsageError
from flashtask.trainer.metric_order import direction_of
from flashtask.trainer.optimizers import make_scheduler


class Scripted(Module):
    """Logs `{name: [a value an epoch]}` in validation."""

    def __init__(self, **values):
        super().__init__()
        self.values = values
        self.layer = torch.nn.Linear(4, 1)
        self.backbone = torch.nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        return self.layer(self.backbone(batch[0])).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log_dict({name: values[self.current_epoch] for name, values in self.values.items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Accurate(Scripted):
    monitor, monitor_mode = "val_accuracy", "max"


def fit(folder, module, *callbacks, ckpt_path=None, epochs=6, strategy=None):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(output_dir=folder, max_epochs=epochs, callbacks=list(callbacks), **quiet)
    trainer.fit(module, *loaders(), ckpt_path=ckpt_path, strategy=strategy)
    return trainer


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *((name, "max") for name in ("val_acc", "val_accuracy", "val_f1", "f1_score", "val_f1_macro", "val_auroc")),
        *((name, "max") for name in ("val_map", "val_map_50", "val_map50", "mIoU", "val_dice", "val/precision", "r2")),
        *((name, "max") for name in ("val_recall", "val_accuracy_top5", "accuracy/dataloader_idx_1", "val_f1_epoch")),
        *(
            (name, "min")
            for name in ("val_loss", "loss", "cost/entropy", "val_loss/dataloader_idx_0", "train_loss_step")
        ),
        *(
            (name, "min")
            for name in ("val_error", "error_rate", "val_mae", "rmse", "mean_absolute_error", "brier_score")
        ),
        *(
            (name, None)
            for name in ("val_gap", "accuracy_gap", "learning_rate", "val", "grad_norm", "val_loss_std", "")
        ),
    ],
)
def test_the_last_word_of_a_name_says_which_value_is_better(name, direction):
    assert direction_of(name) == direction


def test_a_score_is_maximised_wherever_it_is_monitored(tmp_path):
    f1 = [0.1, 0.3, 0.2, 0.1, 0.1, 0.1]
    checkpoint, stopping = ModelCheckpoint(monitor="val_f1"), EarlyStopping("val_f1", patience=2)
    trainer = fit(tmp_path / "a", Scripted(val_f1=f1), checkpoint, stopping)
    assert (checkpoint.best_epoch, stopping.best_score, len(trainer.fit_run.history)) == (1, 0.3, 4)
    phases = [Phase("head", plateau=Plateau("val_f1", patience=1)), Phase("all")]
    trainer = fit(tmp_path / "b", Scripted(val_f1=f1), strategy=phases)
    assert trainer.fit_run.phases.ends == {0: 3}
    scheduler = make_scheduler(
        "ReduceLROnPlateau", torch.optim.SGD([torch.zeros(1)], lr=1.0), 9, lambda epoch: epoch, monitor="val_f1"
    )
    assert scheduler.scheduler.mode == "max"


def test_mode_wins_over_the_name(tmp_path):
    checkpoint, stopping = ModelCheckpoint(monitor="val_f1", mode="min"), EarlyStopping("val_f1", mode="min")
    fit(tmp_path, Scripted(val_f1=[0.1, 0.3, 0.05, 0.2, 0.2, 0.2]), checkpoint, stopping)
    assert (checkpoint.best_epoch, stopping.best_score) == (2, 0.05)


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_name_without_a_known_direction_asks_for_a_mode_before_anything_is_trained(tmp_path, kind):
    with pytest.raises(UsageError, match="does not say whether more or less is better") as raised:
        fit(tmp_path / "run", Scripted(val_gap=[1.0]), kind(monitor="val_gap"))
    assert f"fix: {kind.__name__}(monitor='val_gap', mode=\"max\")" in str(raised.value)
    assert not (tmp_path / "run").exists()
    fit(tmp_path / "run", Scripted(val_gap=[1.0]), kind(monitor="val_gap", mode="max"), epochs=1)


def test_plateaus_and_their_schedulers_ask_too(tmp_path):
    with pytest.raises(UsageError, match="needs a mode"):
        fit(tmp_path, Scripted(val_gap=[1.0]), strategy=[Phase("head", plateau="val_gap"), Phase("all")])
    with pytest.raises(UsageError, match="more or less"):
        make_scheduler("reducelronplateau", torch.optim.SGD([torch.zeros(1)], lr=1.0), 9, int, monitor="val_gap")


def test_a_class_that_changes_its_monitor_alone_does_not_inherit_the_mode_of_another_metric(tmp_path):
    class ByAccuracy(Scripted):
        monitor = "val_acc"

    class ByLoss(Accurate):
        monitor = "val_loss"

    class ByGap(Scripted):
        monitor = "val_gap"

    for kind, name, best in ((ByAccuracy, "val_acc", 1), (ByLoss, "val_loss", 0)):
        trainer = fit(tmp_path / name, kind(**{name: [0.1, 0.3]}), epochs=2)
        assert trainer.checkpoint_callback.best_epoch == best
    with pytest.raises(UsageError, match=r"ByGap\.monitor is 'val_gap'.*\n  fix: monitor_mode"):
        fit(tmp_path / "gap", ByGap(val_gap=[1.0]))
    own = Scripted(val_gap=[1.0, 2.0])
    own.monitor, own.monitor_mode = "val_gap", "max"
    assert fit(tmp_path / "own", own, epochs=2).checkpoint_callback.best_epoch == 1


@pytest.mark.parametrize(
    ("accuracy", "loss", "good"),
    [
        ([0.5] * 6, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [0]),  # what used to go on for ever
        ([0.5] * 6, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5], [0, 1, 2, 3, 4, 5]),
        ([0.5] * 6, [1.0] * 6, [0]),
        ([0.5, 0.4, 0.5, 0.6, 0.6, 0.6], [1.0, 0.1, 0.9, 5.0, 6.0, 4.0], [0, 2, 3, 5]),
        ([0.5] * 6, [float("nan"), 1.0, 1.0, 0.9, float("nan"), 1.0], [0, 1, 3]),
    ],
)
def test_for_a_tasks_own_metric_an_epoch_is_good_exactly_if_it_is_the_new_best_checkpoint(
    tmp_path, accuracy, loss, good
):
    looks = []

    class Watched(EarlyStopping):
        def on_epoch_end(self, trainer, module):
            super().on_epoch_end(trainer, module)
            looks.append(self.wait_count == 0)

    stopping, best = Watched(patience=9), []

    class Best(ModelCheckpoint):
        def on_epoch_end(self, trainer, module):
            super().on_epoch_end(trainer, module)
            best.append(self.best_epoch == trainer.current_epoch)

    fit(tmp_path, Accurate(val_accuracy=accuracy, val_loss=loss), stopping, Best())
    assert [epoch for epoch, is_good in enumerate(looks) if is_good] == good
    assert looks == best


def test_a_flat_accuracy_with_a_rising_loss_stops_and_says_what_it_compared(tmp_path):
    stopping = EarlyStopping(patience=2)
    trainer = fit(tmp_path, Accurate(val_accuracy=[0.5] * 6, val_loss=[1.0, 1.25, 1.5, 2, 3, 4]), stopping)
    assert len(trainer.fit_run.history) == 3
    assert trainer.fit_run.stop_reason == ("val_accuracy did not improve in 2 epochs; the best was 0.5 with val_loss 1")


def test_for_any_other_metric_an_equal_value_is_good(tmp_path):
    losses = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    f1 = Accurate(val_accuracy=[0.5] * 6, val_f1=[0.5] * 6, val_loss=losses)
    for number, (module, stopping) in enumerate(
        [
            (f1, EarlyStopping("val_f1", patience=1)),
            (Scripted(val_loss=[0.5] * 6), EarlyStopping(patience=1)),
            (Accurate(val_accuracy=[0.5] * 6), EarlyStopping(patience=1)),  # no val_loss that could decide
        ]
    ):
        assert len(fit(tmp_path / str(number), module, stopping).fit_run.history) == 6


def test_the_loss_that_decides_survives_a_resume(tmp_path):
    values = {"val_accuracy": [0.5] * 6, "val_loss": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]}
    fit(tmp_path, Accurate(**values), EarlyStopping(patience=3), epochs=2)
    state = read_checkpoint(tmp_path / "last.ckpt")["callbacks"]["EarlyStopping()"]
    assert (state["wait_count"], state["best_loss"]) == (1, 1.0)
    trainer = fit(tmp_path, Accurate(**values), EarlyStopping(patience=3), ckpt_path=tmp_path / "last.ckpt")
    assert len(trainer.fit_run.history) == 4
