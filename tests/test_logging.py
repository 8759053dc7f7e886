"""What `self.log` keeps and where it shows: levels, forks, charts, metric objects, frequency, the bar."""

from __future__ import annotations

import csv
import io
import re

import pytest
import torch
from small import Net, loaders, net
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from flashtask import Callback, Logger, ModelCheckpoint, ProgressBar, Trainer
from flashtask.core.errors import UsageError


def quiet(tmp_path, **options):
    options = {"output_dir": tmp_path / "run", "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(**options)


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


class Memory(Logger):
    """Everything a logger is told, in order."""

    def __init__(self):
        self.told = []

    def start(self, folder, history, step):
        self.told.append(("start",))

    def log_step(self, values, step, epoch):
        self.told.append(("step", step, dict(values)))

    def log_epoch(self, row):
        self.told.append(("epoch", row["epoch"], dict(row)))

    def draw_together(self, chart):
        self.told.append(("chart", chart))

    def flush(self):
        self.told.append(("flush",))

    def close(self, error=None):
        self.told.append(("close",))

    def steps(self):
        return [(step, values) for kind, step, values in (t for t in self.told if t[0] == "step")]


#: hook -> (on the level of steps, of epochs), as the table of the requirements has it
TABLE = {
    "on_train_start": (False, True),
    "on_train_epoch_start": (False, True),
    "on_train_epoch_end": (False, True),
    "training_epoch_end": (False, True),
    "on_before_backward": (True, False),
    "on_after_backward": (True, False),
    "on_before_optimizer_step": (True, False),
    "on_before_zero_grad": (True, False),
    "on_train_batch_start": (True, False),
    "on_train_batch_end": (True, False),
    "training_step": (True, False),
    "training_step_end": (True, False),
    "on_validation_start": (False, True),
    "on_validation_epoch_start": (False, True),
    "on_validation_epoch_end": (False, True),
    "validation_epoch_end": (False, True),
    "on_validation_batch_start": (False, True),
    "on_validation_batch_end": (False, True),
    "validation_step": (False, True),
    "validation_step_end": (False, True),
}


class Everywhere(Net):
    """Logs 1.0 in every hook of the table, under the hook's name."""

    def training_step(self, batch, batch_idx):
        self.log("training_step", 1.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("validation_step", 1.0)


def _hook(name):
    def hook(self, *arguments):
        self.log(name, 1.0)

    return hook


for _name in TABLE:
    if _name not in ("training_step", "validation_step"):
        setattr(Everywhere, _name, _hook(_name))


def test_s49_each_hook_logs_on_the_level_of_the_table(tmp_path):
    memory = Memory()
    quiet(tmp_path, max_epochs=1, logger=memory, log_every_n_steps=1).fit(Everywhere(), *loaders())
    in_steps = set().union(*(values for _, values in memory.steps()))
    (epoch,) = (told[2] for told in memory.told if told[0] == "epoch")
    assert {name: (name in in_steps, name in epoch) for name in TABLE} == TABLE


def test_s49_the_same_table_holds_for_what_callbacks_log(tmp_path):
    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.log("of_steps", batch_idx)

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            module.log("of_epochs", batch_idx)

    quiet(tmp_path, max_epochs=1, callbacks=[Watch()], log_every_n_steps=1).fit(net(), *loaders())
    assert [row["of_steps"] for row in rows(tmp_path / "run" / "steps.csv")] == ["0", "1", "2", "3", "4", "5", "6"]
    assert "of_epochs" in rows(tmp_path / "run" / "metrics.csv")[0]
    assert "of_steps" not in rows(tmp_path / "run" / "metrics.csv")[0]


def test_s50_flags_say_on_which_level_and_both_fork_the_name(tmp_path):
    class Flags(Net):
        def training_step(self, batch, batch_idx):
            self.log("epoch_only", float(batch_idx), on_step=False, on_epoch=True)
            self.log("both", float(batch_idx), on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("val_both", float(batch_idx), on_step=True, on_epoch=True)

    memory = Memory()
    trainer = quiet(tmp_path, max_epochs=1, logger=memory, log_every_n_steps=1)
    trainer.fit(Flags(), *loaders(samples=16))
    steps = [values for _, values in memory.steps()]
    assert [values["both_step"] for values in steps if "both_step" in values] == [0.0, 1.0]
    assert [values["val_both_step"] for values in steps if "val_both_step" in values] == [0.0, 1.0]
    (epoch,) = (told[2] for told in memory.told if told[0] == "epoch")
    assert (epoch["both_epoch"], epoch["epoch_only"], epoch["val_both_epoch"]) == (0.5, 0.5, 0.5)
    metrics = trainer.callback_metrics
    assert (metrics["both"], metrics["both_epoch"], metrics["both_step"], metrics["val_both"]) == (0.5, 0.5, 1.0, 0.5)


def test_s50_a_step_level_where_there_are_no_steps_is_told(tmp_path):
    class Wrong(Net):
        def on_train_epoch_end(self):
            self.log("late", 1.0, on_step=True)

    with pytest.raises(UsageError, match="once an epoch"):
        quiet(tmp_path, max_epochs=1).fit(Wrong(), *loaders())


def test_s51_values_over_an_epoch_are_weighted_by_the_size_of_their_batch(tmp_path):
    class Means(Net):
        def training_step(self, batch, batch_idx):
            self.log("first", batch[0][:, 0].mean(), on_step=False, on_epoch=True)
            for how in ("sum", "max", "min"):
                self.log(how, batch[0][:, 0].mean(), on_step=False, on_epoch=True, reduce_fx=how)
            self.log("as_told", float(batch_idx), on_step=False, on_epoch=True, batch_size=1)
            return super().training_step(batch, batch_idx)

    batches = list(loaders(samples=50, batch_size=8)[1])
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(Means(), batches)
    column = torch.cat([inputs[:, 0] for inputs, _ in batches])
    means = [float(inputs[:, 0].mean()) for inputs, _ in batches]
    metrics = trainer.callback_metrics
    assert metrics["first"] == pytest.approx(float(column.mean()), rel=1e-5)
    assert (metrics["sum"], metrics["max"], metrics["min"]) == pytest.approx((sum(means), max(means), min(means)))
    assert metrics["as_told"] == 3.0


def test_s52_a_value_is_a_number_a_tensor_or_of_another_library(tmp_path):
    import numpy as np

    class Kinds(Net):
        def validation_step(self, batch, batch_idx):
            self.log("number", 2)
            self.log("tensor", torch.tensor([2.0]))
            self.log("numpy", np.float32(2.0))

    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(Kinds(), *loaders())
    assert [trainer.callback_metrics[name] for name in ("number", "tensor", "numpy")] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("value", [torch.ones(2), "high", None, [1.0]])
def test_s52_what_is_no_number_is_told(tmp_path, value):
    class Wrong(Net):
        def validation_step(self, batch, batch_idx):
            self.log("wrong", value)

    with pytest.raises(UsageError, match="wrong"):
        quiet(tmp_path, max_epochs=1).fit(Wrong(), *loaders())


class Costs(Net):
    """Logs a dictionary: one chart with two series."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_costs", {"entropy": loss.detach(), "doubled": 2 * loss.detach()})
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("cost", {"entropy": 1.0 + self.current_epoch, "loss": 2.0})


def test_s48_s53_a_dictionary_is_one_chart_with_a_series_for_each_key(tmp_path):
    memory = Memory()
    trainer = quiet(tmp_path, max_epochs=2, logger=memory, log_every_n_steps=1)
    trainer.fit(Costs(), *loaders())
    assert [told[1] for told in memory.told if told[0] == "chart"] == ["train_costs", "cost"]
    row = rows(tmp_path / "run" / "metrics.csv")[1]
    assert (float(row["cost/entropy"]), float(row["cost/loss"])) == (2.0, 2.0)
    first = memory.steps()[0][1]
    assert first["train_costs/doubled"] == pytest.approx(2 * first["train_costs/entropy"])
    assert trainer.callback_metrics["cost/entropy"] == 2.0


def test_s39_a_value_in_a_dictionary_is_monitored_by_its_path(tmp_path):
    from flashtask import EarlyStopping, ModelCheckpoint

    stopping = EarlyStopping(monitor="cost/entropy", patience=2)
    best = ModelCheckpoint(monitor="cost/entropy", mode="max")
    trainer = quiet(tmp_path, max_epochs=9, callbacks=[stopping, best])
    trainer.fit(Costs(), *loaders())
    assert (stopping.stopped_epoch, trainer.current_epoch) == (2, 3)
    assert best.best_model_score == 3.0


def test_s54_log_dict_draws_a_chart_for_each(tmp_path):
    class Several(Net):
        def validation_step(self, batch, batch_idx):
            self.log_dict({"metric_one": 1.0, "metric_two": 2.0}, prog_bar=True)

    memory = Memory()
    trainer = quiet(tmp_path, max_epochs=1, logger=memory)
    trainer.fit(Several(), *loaders())
    assert (trainer.callback_metrics["metric_one"], trainer.callback_metrics["metric_two"]) == (1.0, 2.0)
    assert not [told for told in memory.told if told[0] == "chart"]


class Measured(Net):
    """Metric objects as the notes use them: no compute, no reset."""

    def __init__(self):
        super().__init__()
        self.acc, self.val_acc = MulticlassAccuracy(3, average="micro"), MulticlassAccuracy(3, average="micro")
        self.seen = SumMetric()

    def training_step(self, batch, batch_idx):
        outputs = self(batch[0])
        loss = torch.nn.functional.cross_entropy(outputs, batch[1])
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    def training_step_end(self, retvals):
        self.acc(retvals["outputs"], retvals["targets"])
        self.log("train_acc_step", self.acc)

    def training_epoch_end(self, outs):
        self.log("avg_train_acc", self.acc)
        self.expected = (
            (torch.cat([o["outputs"] for o in outs]).argmax(1) == torch.cat([o["targets"] for o in outs]))
            .float()
            .mean()
        )

    def validation_step(self, batch, batch_idx):
        self.val_acc.update(self(batch[0]), batch[1])
        self.seen.update(float(len(batch[1])))
        self.log("val_acc", self.val_acc)
        self.log("seen", self.seen)


def test_s55_s56_s57_s58_metric_objects_are_computed_and_begin_anew_by_themselves(tmp_path):
    torch.manual_seed(1)
    module = Measured()
    trainer = quiet(tmp_path, max_epochs=3, log_every_n_steps=1)
    trainer.fit(module, *loaders())
    metrics = trainer.callback_metrics
    assert metrics["avg_train_acc"] == pytest.approx(float(module.expected))
    assert [row["seen"] for row in rows(tmp_path / "run" / "metrics.csv")] == ["50"] * 3
    steps = [float(row["train_acc_step"]) for row in rows(tmp_path / "run" / "steps.csv")]
    assert len(steps) == 21
    assert all((value * 8) % 1 == 0 for value in steps[:6])  # of the 8 samples of one batch alone
    module.eval()
    inputs, targets = next(iter(loaders(batch_size=50)[1]))
    with torch.no_grad():
        assert metrics["val_acc"] == pytest.approx(float((module(inputs).argmax(1) == targets).float().mean()))


@pytest.mark.parametrize("kind", ["attribute", "collection"])
def test_s55_a_metric_of_a_module_moves_with_it(kind):
    module = Measured()
    if kind == "collection":
        module.several = MetricCollection({"mean": MeanMetric(), "sum": SumMetric()})
    module.to("meta")
    assert module.acc.device == torch.device("meta")
    assert kind == "attribute" or module.several["mean"].device == torch.device("meta")


def test_s56_a_collection_is_logged_by_the_names_of_its_metrics(tmp_path):
    class Collected(Net):
        def __init__(self):
            super().__init__()
            self.several = MetricCollection({"mean": MeanMetric(), "sum": SumMetric()}, prefix="val_")

        def validation_step(self, batch, batch_idx):
            self.several.update(torch.full((len(batch[1]),), 2.0))
            self.log_dict(self.several)

    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(Collected(), *loaders())
    assert (trainer.callback_metrics["val_mean"], trainer.callback_metrics["val_sum"]) == (2.0, 100.0)


def test_s56_a_metric_with_many_results_is_told_how_to_be_logged(tmp_path):
    class PerClass(Net):
        def __init__(self):
            super().__init__()
            self.acc = MulticlassAccuracy(3, average="none")

        def validation_step(self, batch, batch_idx):
            self.acc.update(self(batch[0]), batch[1])
            self.log("acc", self.acc)

    with pytest.raises(UsageError, match="no single number"):
        quiet(tmp_path, max_epochs=1).fit(PerClass(), *loaders())


@pytest.mark.long
def test_s59_step_values_are_logged_every_50_steps_unless_told_otherwise(tmp_path):
    class Steps(Net):
        def training_step(self, batch, batch_idx):
            self.log("value", float(self.global_step))
            return super().training_step(batch, batch_idx)

    for options, expected in (({}, [50, 100]), ({"log_every_n_steps": 20}, [20, 40, 60, 80, 100])):
        memory = Memory()
        folder = tmp_path / str(len(options))
        quiet(tmp_path, max_steps=105, max_epochs=99, logger=memory, output_dir=folder, **options).fit(
            Steps(), *loaders()
        )
        assert [step for step, _ in memory.steps()] == expected


def test_s60_logs_are_flushed_every_100_steps_at_the_end_of_epochs_and_before_a_checkpoint(tmp_path):
    memory = Memory()

    class Watch(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            memory.told.append(("save",))

    options = {"logger": memory, "callbacks": [Watch()], "log_every_n_steps": 1}
    quiet(tmp_path, max_epochs=1, flush_logs_every_n_steps=3, **options).fit(net(), *loaders())
    told = [told[0] for told in memory.told if told[0] in ("flush", "save", "epoch")]
    assert told[:3] == ["flush", "flush", "epoch"]
    assert told.index("save") > told.index("epoch")
    assert told[told.index("save") - 1] == "flush"


class Terminal(io.StringIO):
    """A stream that says it is a terminal, so that the bar is drawn."""

    def isatty(self):
        return True


@pytest.fixture
def unhurried(monkeypatch):
    """The bar draws as often as it may, however fast the steps are."""
    monkeypatch.setattr("flashtask.trainer.callbacks.progress._REFRESH_SECONDS", 0.0)


def drawn(tmp_path, module, **options):
    stream = Terminal()
    bar = ProgressBar(stream=stream, **options)
    quiet(tmp_path, max_epochs=1, callbacks=[bar], num_sanity_val_steps=0).fit(module, loaders()[0])
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    return [line for line in text.split("\r") if line.startswith("epoch 0  ")]


def test_s61_the_bar_is_redrawn_every_so_many_batches_and_not_at_all_at_0(tmp_path, unhurried, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for rate, expected in ((1, 7), (3, 2), (0, 0)):
        found = drawn(tmp_path / str(rate), net(), refresh_rate=rate)
        assert len([line for line in found if ("/s" in line and "left" in line) or "7/7" in line]) == expected
    with pytest.raises(UsageError, match="at least 0"):
        ProgressBar(refresh_rate=-1)


def test_s61_the_older_name_means_the_same(tmp_path):
    (bar,) = Trainer(progress_bar_refresh_rate=5).callbacks
    assert (type(bar), bar.refresh_rate) == (ProgressBar, 5)
    assert Trainer(progress_bar_refresh_rate=0).enable_progress_bar is False


def test_s62_s63_s64_the_bar_shows_the_loss_and_what_asks_for_it(tmp_path, unhurried, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    class Shown(Net):
        def training_step(self, batch, batch_idx):
            self.log("plain", 1.0)
            self.log("asked", 2.0, prog_bar=True)
            self.log("bar_only", 3.0, prog_bar=True, logger=False)
            self.log("bar_only_too", 4.0, prog_bar=True, trainer=False)
            return super().training_step(batch, batch_idx)

    line = drawn(tmp_path, Shown())[-1]
    assert "loss 0." in line or "loss 1." in line
    assert "asked 2" in line
    assert "bar_only 3" in line
    assert "bar_only_too 4" in line
    assert "plain" not in line


def test_s64_what_is_for_the_bar_alone_reaches_no_logger(tmp_path):
    class Shown(Net):
        def training_step(self, batch, batch_idx):
            self.log("kept", 1.0, on_epoch=True)
            self.log("bar_only", 3.0, prog_bar=True, logger=False, on_epoch=True)
            self.log("bar_only_too", 4.0, prog_bar=True, trainer=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = quiet(tmp_path, max_epochs=1, log_every_n_steps=1)
    trainer.fit(Shown(), loaders()[0])
    written = (tmp_path / "run" / "metrics.csv").read_text() + (tmp_path / "run" / "steps.csv").read_text()
    assert "kept" in written
    assert "bar_only" not in written
    assert trainer.callback_metrics["bar_only"] == 3.0  # it can be monitored


def test_s98_with_one_process_values_are_the_same_whatever_is_asked_of_the_others(tmp_path):
    class Synced(Net):
        def validation_step(self, batch, batch_idx):
            self.log("plain", float(batch_idx))
            self.log("synced", float(batch_idx), sync_dist=True)
            if self.trainer.is_global_zero:
                self.log("of_the_first", float(batch_idx), rank_zero_only=True)

    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(Synced(), *loaders())
    metrics = trainer.callback_metrics
    assert metrics["plain"] == metrics["synced"] == metrics["of_the_first"]


def test_values_of_several_loaders_have_names_of_their_own_unless_told_otherwise(tmp_path):
    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", 1.0 + dataloader_idx)
            self.log("together", 1.0 + dataloader_idx, add_dataloader_idx=False)

    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(Two(), loaders()[0], [loaders()[1], loaders()[1]])
    metrics = trainer.callback_metrics
    assert (metrics["val_loss/dataloader_idx_0"], metrics["val_loss/dataloader_idx_1"]) == (1.0, 2.0)
    assert metrics["together"] == 1.5


def test_the_row_of_an_epoch_says_how_many_samples_a_second_were_trained(tmp_path):
    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(net(), *loaders())
    for row in rows(tmp_path / "run" / "metrics.csv"):
        assert float(row["samples_per_second"]) >= 50 / float(row["seconds"]) * 0.99


def test_a_value_with_the_name_of_a_column_is_for_callbacks(tmp_path):
    class Counting(Net):
        def validation_step(self, batch, batch_idx):
            self.log("epoch", 10.0 * self.current_epoch)
            self.log("step", 0.5)
            super().validation_step(batch, batch_idx)

    checkpoint = ModelCheckpoint(monitor="epoch", mode="max", filename="{epoch:02d}")
    trainer = quiet(tmp_path, max_epochs=2, logger="csv", callbacks=[checkpoint])
    trainer.fit(Counting(), *loaders())
    assert trainer.callback_metrics["epoch"] == 10.0
    assert checkpoint.best_model_path.endswith("epoch=01.ckpt")
    found = rows(tmp_path / "run/metrics.csv")
    assert [row["epoch"] for row in found] == ["0", "1"]
    assert [float(row["step"]) for row in found] == [trainer.global_step / 2, trainer.global_step]
