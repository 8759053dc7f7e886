"""Validation inside epochs (`val_check_interval`), and everything that looks at its values."""

from __future__ import annotations

import csv
import io
import signal

import pytest
import torch
from small import Net, digest, loaders, net
from test_resume import SignalAt, state_digest
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from flashtask import Callback, EarlyStopping, FitLoop, ModelCheckpoint, ProgressBar, Trainer
from flashtask.core.errors import UsageError


class Course(Callback):
    """The places of validations, as (epoch, steps), and what was in `callback_metrics` after each."""

    def __init__(self):
        self.places, self.values, self.hooks = [], [], []

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.places.append((trainer.current_epoch, trainer.global_step))
            self.values.append(trainer.callback_metrics["val_loss"])
            self.hooks.append("validation_end")

    def on_validated(self, trainer, module):
        assert module.training
        self.hooks.append("validated")

    def on_epoch_end(self, trainer, module):
        self.hooks.append("epoch_end")


class Falling(Net):
    """`val_loss` takes the values that are given, one after the other."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values, self.at = values, 0

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.values[min(self.at, len(self.values) - 1)])

    def on_validation_epoch_end(self):
        self.at += not self.trainer.sanity_checking


def quiet(folder, **options) -> Trainer:
    options = {"max_epochs": 2, "seed": 3, "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(output_dir=folder, **options)


def places(folder, data=None, **options):
    course = Course()
    trainer = quiet(folder, callbacks=[course], **options)
    trainer.fit(net(), *(data or loaders()))  # 7 batches an epoch
    return course.places


@pytest.mark.long
def test_a_share_of_an_epoch_and_a_number_of_batches(tmp_path):
    assert places(tmp_path / "a", val_check_interval=1.0) == [(0, 7), (1, 14)]
    assert places(tmp_path / "b", val_check_interval=0.5) == [(0, 3), (0, 6), (1, 10), (1, 13)]
    assert places(tmp_path / "c", val_check_interval=4) == [(0, 4), (1, 11)]
    assert places(tmp_path / "d", val_check_interval=7) == [(0, 7), (1, 14)]
    assert places(tmp_path / "e", val_check_interval=4, check_val_every_n_epoch=2) == [(1, 11)]
    assert places(tmp_path / "f", val_check_interval=0.5, limit_train_batches=4) == [(0, 2), (0, 4), (1, 6), (1, 8)]


def test_a_number_of_batches_across_epochs(tmp_path):
    options = {"check_val_every_n_epoch": None, "max_epochs": 3}
    assert places(tmp_path / "a", val_check_interval=5, **options) == [(0, 5), (1, 10), (2, 15), (2, 20)]
    assert places(tmp_path / "b", val_check_interval=10, **options) == [(1, 10), (2, 20)]
    assert places(tmp_path / "c", val_check_interval=7, **options) == [(0, 7), (1, 14), (2, 21)]


def test_a_validation_comes_after_whole_accumulation_groups(tmp_path):
    course = Course()
    trainer = quiet(tmp_path, callbacks=[course], val_check_interval=3, accumulate_grad_batches=2, max_epochs=1)
    trainer.fit(net(), *loaders())
    assert course.places == [(0, 2), (0, 3)]  # after batches 4 and 6


def test_intervals_that_cannot_be(tmp_path):
    for wrong in (0, 0.0, 1.5, -1, True, "0.5", None):
        with pytest.raises(UsageError, match="val_check_interval"):
            Trainer(val_check_interval=wrong)
    with pytest.raises(UsageError, match="check_val_every_n_epoch=None needs"):
        Trainer(check_val_every_n_epoch=None)
    with pytest.raises(UsageError, match="an epoch has 7 batches") as caught:
        quiet(tmp_path / "a", val_check_interval=8).fit(net(), *loaders())
    assert "check_val_every_n_epoch=None" in caught.value.fix


class Stream(IterableDataset):
    def __init__(self, samples: float = float("inf")):
        self.samples = samples

    def __iter__(self):
        generator, made = torch.Generator().manual_seed(0), 0
        while made < self.samples:
            inputs = torch.randn(4, generator=generator)
            yield inputs, (inputs.sum() > 0).long()
            made += 1


def test_streams_of_unknown_and_of_endless_length(tmp_path):
    val = loaders()[1]
    short, endless = (DataLoader(Stream(*length), batch_size=8) for length in ((48,), ()))
    assert places(tmp_path / "a", (short, val)) == [(0, 6), (1, 12)]
    assert places(tmp_path / "b", (short, val), val_check_interval=4) == [(0, 4), (0, 6), (1, 10), (1, 12)]
    assert places(tmp_path / "c", (short, val), val_check_interval=3) == [(0, 3), (0, 6), (1, 9), (1, 12)]
    assert places(tmp_path / "d", (endless, val), val_check_interval=4, max_steps=10) == [(0, 4), (0, 8), (0, 10)]
    with pytest.raises(UsageError, match="needs a training loader with a length"):
        places(tmp_path / "e", (endless, val), val_check_interval=0.5, max_steps=10)


def test_the_bar_of_an_endless_stream_has_no_end(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    endless = DataLoader(Stream(), batch_size=8)
    bar = ProgressBar(stream=out)
    trainer = quiet(tmp_path, callbacks=[bar], val_check_interval=4, max_steps=10, max_epochs=-1)
    trainer.fit(net(), endless, loaders()[1])
    assert trainer.global_step == 10
    assert "epoch 0 step 4  val_loss" in out.getvalue()


def test_rows_hooks_and_metrics(tmp_path):
    course = Course()
    trainer = quiet(tmp_path, callbacks=[course], val_check_interval=3, max_epochs=2)
    trainer.fit(net(), *loaders())
    assert course.hooks == ["validation_end", "validated"] * 2 + ["epoch_end"] + [
        *["validation_end", "validated"] * 2,
        "epoch_end",
    ]
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [
        *[("0", "3"), ("0", "6"), ("0", "7")],
        *[("1", "10"), ("1", "13"), ("1", "14")],
    ]
    assert [bool(row["val_loss"]) for row in rows] == [True, True, False] * 2
    assert [bool(row["train_loss"]) for row in rows] == [False, False, True] * 2
    assert [float(row["val_loss"]) for row in rows if row["val_loss"]] == pytest.approx(course.values, abs=1e-5)
    assert len(set(course.values)) == 4
    assert trainer.callback_metrics["val_loss"] == course.values[-1]
    assert len(trainer.fit_run.history) == 2


def test_a_validation_where_the_epoch_ends_belongs_to_the_row_of_the_epoch(tmp_path):
    course = Course()
    quiet(tmp_path, callbacks=[course], val_check_interval=0.5, limit_train_batches=4, max_epochs=1).fit(
        net(), *loaders()
    )
    assert course.hooks == ["validation_end", "validated", "validation_end", "epoch_end"]
    with (tmp_path / "metrics.csv").open() as file:
        assert [(row["step"], bool(row["val_loss"])) for row in csv.DictReader(file)] == [("2", True), ("4", True)]


def test_training_does_not_depend_on_validation_in_between(tmp_path):
    found = set()
    for name, interval in (("a", 1.0), ("b", 2)):
        module = net()
        quiet(tmp_path / name, val_check_interval=interval).fit(module, *loaders())
        found.add(digest(module))
    assert len(found) == 1


def test_checkpoints_rank_each_validation_and_nothing_else(tmp_path):
    checkpoint = ModelCheckpoint(monitor="val_loss", save_top_k=3, filename="{step}-{val_loss:.1f}")
    quiet(tmp_path, callbacks=[checkpoint], val_check_interval=3).fit(Falling(3.0, 1.0, 2.0, 4.0), *loaders())
    assert [(path.rsplit("/", 1)[1], score) for path, score in checkpoint.best_k_models.items()] == [
        *[("step=6-val_loss=1.0.ckpt", 1.0), ("step=10-val_loss=2.0.ckpt", 2.0)],
        ("step=3-val_loss=3.0.ckpt", 3.0),
    ]
    assert checkpoint.best_metrics["step"] == 6


def test_the_best_weights_are_those_of_a_validation_inside_an_epoch(tmp_path):
    class Kept(Callback):
        def on_validated(self, trainer, module):
            kept.append(digest(module))

    kept, module = [], Falling(3.0, 1.0, 2.0)
    module.monitor, module.monitor_mode = "val_loss", "min"
    trainer = quiet(tmp_path, callbacks=[Kept()], val_check_interval=3)
    trainer.finetune(module, *loaders(), strategy="no_freeze")
    assert digest(module) == kept[1]
    assert trainer.callback_metrics["val_loss"] == 1.0


def test_checkpoints_only_at_the_ends_of_epochs_or_only_where_validation_was(tmp_path):
    written = {}
    for at_end in (True, False, None):
        options = {"save_on_train_epoch_end": at_end, "monitor": "step", "mode": "max", "save_top_k": -1}
        checkpoint = ModelCheckpoint(filename="{step}", **options)
        quiet(tmp_path / str(at_end), callbacks=[checkpoint], val_check_interval=3, max_epochs=1).fit(net(), *loaders())
        written[at_end] = sorted(int(path[:-5].rsplit("=", 1)[1]) for path in checkpoint.best_k_models)
    assert written == {True: [7], False: [3, 6], None: [3, 6, 7]}


def test_early_stopping_counts_validations_and_ends_inside_the_epoch(tmp_path):
    stopping = EarlyStopping(monitor="val_loss", patience=2)
    trainer = quiet(tmp_path, callbacks=[stopping], val_check_interval=2, max_epochs=5)
    result = trainer.fit(Falling(1.0, 2.0, 3.0, 4.0), *loaders())
    assert trainer.global_step == 6
    assert stopping.stopped_epoch == 0
    assert "in 2 validations" in result.stop_reason
    trainer = quiet(tmp_path / "least", callbacks=[stopping], val_check_interval=2, max_epochs=5, min_epochs=2)
    trainer.fit(Falling(1.0, 2.0, 3.0, 4.0), *loaders())
    assert trainer.global_step == 14


def test_early_stopping_at_the_ends_of_epochs_alone(tmp_path):
    stopping = EarlyStopping(monitor="val_loss", patience=1, check_on_train_epoch_end=True)
    trainer = quiet(tmp_path, callbacks=[stopping], val_check_interval=2, max_epochs=5)
    trainer.fit(Falling(1.0, 2.0, 3.0, 4.0), *loaders())
    assert trainer.global_step == 14


def test_a_metric_that_is_never_logged_is_an_error_at_the_end_of_the_first_epoch(tmp_path):
    trainer = quiet(tmp_path, callbacks=[EarlyStopping(monitor="val_accuracy")], val_check_interval=3)
    with pytest.raises(LookupError, match="val_accuracy"):
        trainer.fit(net(), *loaders())
    assert trainer.current_epoch == 1


def test_a_plateau_schedule_by_steps_takes_the_validation_of_its_step(tmp_path):
    class Plateau(Falling):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            rate = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": rate, "monitor": "val_loss", "interval": "step", "frequency": 3},
            }

    class Rates(Callback):
        def on_validated(self, trainer, module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = []
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    quiet(tmp_path, callbacks=[Rates()], **options).fit(Plateau(1.0, 2.0, 0.5, 3.0), *loaders())
    assert rates == [1.0, 0.5, 0.5, 0.25]


def test_a_plateau_schedule_by_epochs_takes_the_last_validation(tmp_path):
    class Plateau(Falling):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return {"optimizer": optimizer, "lr_scheduler": ("ReduceLROnPlateau", {"factor": 0.5, "patience": 0})}

    trainer = quiet(tmp_path, val_check_interval=3)
    trainer.fit(Plateau(1.0, 2.0, 0.5, 3.0), *loaders())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_should_stop_ends_after_the_batch(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.should_stop or batch_idx == 2

    assert places_with(Stop(), tmp_path / "a") == ([(0, 3)], 3)
    assert places_with(Stop(), tmp_path / "b", accumulate_grad_batches=2) == ([(0, 2)], 2)
    assert places_with(Stop(), tmp_path / "c", min_steps=5) == ([(0, 5)], 5)
    assert places_with(Stop(), tmp_path / "d", min_epochs=1) == ([(0, 7)], 7)


def places_with(callback, folder, **options):
    course = Course()
    trainer = quiet(folder, callbacks=[course, callback], **options)
    trainer.fit(net(), *loaders())
    return course.places, trainer.global_step


RESUMED = {"val_check_interval": 3, "max_epochs": 3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    found = {}
    for every in (1, None):
        folder = tmp_path_factory.mktemp("undisturbed")
        course = Course()
        trainer = quiet(folder, callbacks=[course], check_val_every_n_epoch=every, **RESUMED)
        trainer.fit(net(), *loaders())
        found[every] = state_digest(folder / "last.ckpt"), course, (folder / "metrics.csv").read_text()
    return found


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize(
    ("hook", "count"),
    [
        *[("train_batch_end", 2), ("train_batch_end", 3), ("train_batch_end", 5), ("train_batch_end", 13)],
        *[("validation_start", 2), ("validation_batch_end", 9), ("validated", 1), ("epoch_end", 1)],
    ],
)
def test_a_run_that_is_stopped_anywhere_ends_with_the_same_bits(tmp_path, undisturbed, every, hook, count):
    first, rest = Course(), Course()
    options = {"check_val_every_n_epoch": every, **RESUMED}
    with pytest.raises(SystemExit):
        quiet(tmp_path, callbacks=[first, SignalAt(hook, count, signal.SIGTERM)], **options).fit(net(), *loaders())
    quiet(tmp_path, callbacks=[rest], **options).fit(net(9), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    bits, course, table = undisturbed[every]
    assert state_digest(tmp_path / "last.ckpt") == bits
    assert first.places + rest.places == course.places
    assert first.values + rest.values == course.values
    assert without_times((tmp_path / "metrics.csv").read_text()) == without_times(table)


def without_times(table: str) -> list[dict[str, str]]:
    rows = csv.DictReader(io.StringIO(table))
    return [{name: row[name] for name in ("epoch", "step", "train_loss", "val_loss")} for row in rows]


def test_a_run_continued_from_the_file_of_a_validation_has_the_same_bits(tmp_path, undisturbed):
    keep = ModelCheckpoint(monitor="step", mode="max", save_top_k=-1, filename="{step}")
    quiet(tmp_path / "a", callbacks=[keep], **RESUMED).fit(net(), *loaders())
    rest = Course()
    trainer = quiet(tmp_path / "b", callbacks=[rest], **RESUMED)
    trainer.fit(net(9), *loaders(), ckpt_path=tmp_path / "a" / "step=10.ckpt")
    assert state_digest(tmp_path / "b" / "last.ckpt") == undisturbed[1][0]
    assert rest.places == [(1, 13), (2, 17), (2, 20)]


def test_early_stopping_counts_on_after_a_kill(tmp_path):
    def stopping():
        return EarlyStopping(monitor="val_loss", patience=3)

    values, options = (1.0, 2.0, 3.0, 4.0, 5.0), {"val_check_interval": 3, "max_epochs": 5}
    stop = SignalAt("train_batch_end", 8, signal.SIGTERM)
    with pytest.raises(SystemExit):
        quiet(tmp_path, callbacks=[stopping(), stop], **options).fit(Falling(*values), *loaders())
    module = Falling(*values)
    module.at = 2
    trainer = quiet(tmp_path, callbacks=[stopping()], **options)
    trainer.fit(module, *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 13


def test_loops_as_objects_validate_at_the_same_places(tmp_path, undisturbed):
    class Mine(FitLoop):
        pass

    course = Course()
    trainer = quiet(tmp_path, callbacks=[course], **RESUMED)
    trainer.fit_loop = Mine()
    trainer.fit(net(), *loaders())
    assert course.places == undisturbed[1][1].places
    assert state_digest(tmp_path / "last.ckpt") == undisturbed[1][0]


def test_fast_dev_run_validates_once(tmp_path):
    assert places(tmp_path, val_check_interval=2, fast_dev_run=5) == [(0, 5)]
