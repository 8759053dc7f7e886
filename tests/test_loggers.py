"""Loggers: what they write, read back with the readers of those who draw it."""

from __future__ import annotations

import base64
import csv
import enum
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from small import Net, colour_folders, loaders, net

from flashtask import Callback, ImageClassificationData, ImageClassifier, Trainer, load
from flashtask.core.errors import HubError, OutputError, UnknownNameError, UsageError
from flashtask.trainer.loggers.csv_logger import CSVLogger
from flashtask.trainer.loggers.libraries import flat_values, plain_value
from flashtask.trainer.loggers.logger import Logger
from flashtask.trainer.loggers.logger_registry import LOGGERS, make_loggers
from flashtask.trainer.loggers.mlflow_logger import MLFlowLogger
from flashtask.trainer.loggers.tensorboard_logger import TensorBoardLogger, is_available
from flashtask.trainer.loggers.wandb_logger import WandbLogger

#: MLflow uses what this SQLAlchemy calls old; no other test sees it.
uses_database = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path, monkeypatch):
    """No test writes to the home folder, sends anything, or finds the user's own settings."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module", autouse=True)
def wandb_ends():
    """W&B's own process ends with these tests."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def quiet(folder, logger, *callbacks, **options):
    settings = {
        "output_dir": folder,
        "max_epochs": 2,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), logger=logger, **{**settings, **options})


class Stepping(Net):
    """Logs its loss on each step too, and two series of one chart. An epoch has 7 steps."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("step_loss", loss.detach(), on_step=True, on_epoch=False)
        self.log("cost/entropy", loss.detach() / 2, on_step=True, on_epoch=False)
        self.log("cost/loss", loss.detach(), on_step=True, on_epoch=False)
        return loss


def stepping():
    torch.manual_seed(1)
    return Stepping()


class Failing(Callback):
    """Ends a run in the middle, after some steps that no checkpoint holds."""

    def __init__(self, step, end=None):
        self.step, self.end = step, end

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.end is None:
                raise RuntimeError("the light went out")
            self.end()


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scalars(folder, tag):
    """(step, value) of each point that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in read.Scalars(tag)] if tag in read.Tags()["scalars"] else []


def scalars_of_the_older_server(folder, tag):
    """The same with the reader of `tensorboard --load_fast=false`, which finds restarts in another way."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    read = EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0}).Reload()
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in read.Tensors(tag)]


def wandb_records(folder):
    """Each part of a W&B run as W&B itself reads it: a list of records a part."""
    parts = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        parts.append([json.loads(line) for line in told.splitlines()])
    return parts


def wandb_history(part, name):
    items = [record["history"]["item"] for record in part if record["type"] == "history"]
    return [(item["global_step"], item[name]) for item in items if name in item]


def mlflow_client(folder):
    import mlflow

    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


# ---- the CSV log


def test_s45_the_csv_log_has_a_row_an_epoch_and_one_for_each_logged_step(tmp_path):
    quiet(tmp_path / "run", CSVLogger()).fit(stepping(), *loaders())
    epochs, steps = rows_of(tmp_path / "run" / "metrics.csv"), rows_of(tmp_path / "run" / "steps.csv")
    assert [(row["epoch"], row["step"]) for row in epochs] == [("0", "7"), ("1", "14")]
    assert all(float(row["val_loss"]) > 0 for row in epochs)
    assert [row["step"] for row in steps] == ["2", "4", "6", "8", "10", "12", "14"]
    assert all(float(row["cost/entropy"]) == pytest.approx(float(row["cost/loss"]) / 2, rel=1e-4) for row in steps)


def test_s45_a_column_that_appears_late_keeps_all_rows(tmp_path):
    log = CSVLogger()
    log.start(tmp_path, [], 0)
    for step in range(1, 6):
        log.log_step({"a": step / 2} | ({"b,late": 1} if step > 3 else {}), step, 0)
        log.flush()
    log.log_epoch({"epoch": 0, "step": 5})
    log.log_epoch({"epoch": 1, "step": 9, "val_loss": math.nan})
    log.close()
    assert [row["a"] for row in rows_of(tmp_path / "steps.csv")] == ["0.5", "1", "1.5", "2", "2.5"]
    assert [row["b,late"] for row in rows_of(tmp_path / "steps.csv")] == ["", "", "", "1", "1"]
    assert [row["val_loss"] for row in rows_of(tmp_path / "metrics.csv")] == ["", "nan"]


def test_s45_the_csv_log_keeps_no_more_rows_in_memory_than_it_was_not_yet_told_to_write(tmp_path):
    log = CSVLogger()
    log.start(tmp_path, [], 0)
    for step in range(1, 5001):
        log.log_step({"loss": 1.0}, step, 0)
    assert len(log._waiting) <= 1000
    assert len(rows_of(tmp_path / "steps.csv")) >= 4000
    log.close()
    assert [int(row["step"]) for row in rows_of(tmp_path / "steps.csv")] == list(range(1, 5001))


def test_s45_a_resumed_csv_log_is_cut_back_and_drops_what_a_killed_process_did_not_finish(tmp_path):
    # The last line was to be of step 150, and is not whole.
    (tmp_path / "steps.csv").write_bytes(b"epoch,step,loss\r\n0,14,0.5\r\n0,15,0.4\r\n0,16,0.3\r\n1,15")
    (tmp_path / "metrics.csv").write_text("epoch,step\n0,7\n1,14\n2,21\n")
    log = CSVLogger()
    log.start(tmp_path, [{"epoch": 0, "step": 7}, {"epoch": 1, "step": 14}], 15)
    log.log_step({"loss": 0.35}, 16, 2)
    log.close()
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path / "steps.csv")] == [
        ("14", "0.5"),
        ("15", "0.4"),
        ("16", "0.35"),
    ]
    assert [row["step"] for row in rows_of(tmp_path / "metrics.csv")] == ["7", "14"]


def test_s45_a_fit_that_starts_anew_takes_no_rows_of_an_older_one(tmp_path):
    (tmp_path / "steps.csv").write_text("epoch,step,loss\n0,1,0.5\n")
    log = CSVLogger()
    log.start(tmp_path, [], 0)
    log.close()
    assert not (tmp_path / "steps.csv").exists()


KILLED = """
import os, signal, sys
from small import loaders
from flashtask.trainer.loggers.logger_registry import make_loggers
from test_loggers import Failing, quiet, stepping
kill = Failing(12, lambda: os.kill(os.getpid(), signal.SIGKILL))
quiet(sys.argv[1], make_loggers(True), kill, log_every_n_steps=1).fit(stepping(), *loaders())
"""


def test_s45_s60_a_run_that_was_killed_loses_and_doubles_no_row(tmp_path):
    run = tmp_path / "run"
    done = warm.run(KILLED, run)
    assert done.returncode == -9, done.stderr
    resumed = quiet(run, TensorBoardLogger(), log_every_n_steps=1)
    resumed.fit(stepping(), *loaders(), ckpt_path=run / "last.ckpt")
    whole = quiet(tmp_path / "whole", make_loggers(True), log_every_n_steps=1)
    whole.fit(stepping(), *loaders())
    assert [row["step"] for row in rows_of(run / "steps.csv")] == [str(step) for step in range(1, 15)]
    assert rows_of(run / "steps.csv") == rows_of(tmp_path / "whole" / "steps.csv")
    shown = scalars(run / "tensorboard", "step_loss")
    assert [step for step, _ in shown] == list(range(1, 15))
    assert shown == scalars(tmp_path / "whole" / "tensorboard", "step_loss")


# ---- TensorBoard


def test_s44_tensorboard_is_written_by_default_where_it_is_installed(tmp_path):
    assert is_available()
    quiet(tmp_path / "run", make_loggers(True)).fit(stepping(), *loaders())
    folder = tmp_path / "run" / "tensorboard"
    assert scalars(folder, "epoch") == [(7, 0), (14, 1)]
    assert [step for step, _ in scalars(folder, "step_loss")] == [2, 4, 6, 8, 10, 12, 14]
    rows = rows_of(tmp_path / "run" / "metrics.csv")
    expected = [(int(row["step"]), pytest.approx(float(row["val_loss"]), rel=1e-5)) for row in rows]
    assert scalars(folder, "val_loss") == expected


def test_s44_without_tensorboard_the_csv_log_is_written_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert [type(one) for one in make_loggers(None)] == [CSVLogger]
    with pytest.raises(UsageError, match="pip install tensorboard"):
        make_loggers("tensorboard")


def test_s44_choosing_loggers_imports_none_of_their_libraries():
    code = (
        "import sys; from flashtask.trainer.loggers.logger_registry import make_loggers; "
        "make_loggers([*make_loggers(True), 'wandb', 'mlflow'][1:]); "
        "print(sorted({'torch', 'tensorboard', 'wandb', 'mlflow'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_s44_a_resumed_run_has_no_point_twice(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="light"):
        quiet(run, TensorBoardLogger(), Failing(13)).fit(stepping(), *loaders())
    assert [step for step, _ in scalars(run / "tensorboard", "step_loss")] == [2, 4, 6, 8, 10, 12]
    quiet(run, TensorBoardLogger()).fit(stepping(), *loaders(), ckpt_path=run / "last.ckpt")
    assert [step for step, _ in scalars(run / "tensorboard", "step_loss")] == [2, 4, 6, 8, 10, 12, 14]
    assert scalars(run / "tensorboard", "epoch") == [(7, 0), (14, 1)]
    for tag in ("step_loss", "epoch"):
        assert scalars_of_the_older_server(run / "tensorboard", tag) == scalars(run / "tensorboard", tag)


def test_s44_a_run_that_goes_on_in_another_folder_brings_its_epochs(tmp_path):
    quiet(tmp_path / "a", False, max_epochs=1).fit(stepping(), *loaders())
    trainer = quiet(tmp_path / "b", TensorBoardLogger(tmp_path / "all"))
    trainer.fit(stepping(), *loaders(), ckpt_path=tmp_path / "a" / "last.ckpt")
    assert scalars(tmp_path / "all" / "b", "epoch") == [(7, 0), (14, 1)]
    assert not (tmp_path / "b" / "tensorboard").exists()


def test_s44_one_logger_serves_several_fits(tmp_path):
    logger = TensorBoardLogger()
    for name in ("a", "b"):
        quiet(tmp_path / name, logger, max_epochs=1).fit(stepping(), *loaders())
        assert scalars(tmp_path / name / "tensorboard", "epoch") == [(7, 0)]


def test_s44_the_writer_is_there_while_a_run_is_going_on(tmp_path):
    logger = TensorBoardLogger()
    with pytest.raises(UsageError, match="on_train_start"):
        _ = logger.experiment
    logger.start(tmp_path, [], 0)
    logger.experiment.add_text("note", "hello")
    logger.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "note/text_summary" in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["tensors"]


def test_s48_s53_values_of_one_chart_are_lines_of_one_chart(tmp_path):
    logger = TensorBoardLogger()
    logger.draw_together("cost")
    quiet(tmp_path / "run", logger).fit(stepping(), *loaders())
    folder = tmp_path / "run" / "tensorboard"
    # TensorBoard draws a tag once, with a line for each folder that has it.
    lines = {path.name: scalars(path, "cost") for path in folder.iterdir() if path.is_dir()}
    assert sorted(lines) == ["cost_entropy", "cost_loss"]
    assert [step for step, _ in lines["cost_loss"]] == [2, 4, 6, 8, 10, 12, 14]
    halves = [(step, pytest.approx(value / 2)) for step, value in lines["cost_loss"]]
    assert lines["cost_entropy"] == halves
    assert scalars(folder, "cost/loss") == scalars(folder, "cost") == []
    assert len(scalars(folder, "step_loss")) == 7


def test_s48_s53_lines_of_a_chart_are_resumed_like_all_else(tmp_path):
    for start in (0, 2):
        logger = TensorBoardLogger()
        logger.start(tmp_path, [], start)
        logger.draw_together("cost")
        for step in range(start + 1, 5):
            logger.log_step({"cost/a/b": 10 * start + step, "costs": 1.0}, step, 0)
        logger.close()
    assert scalars(tmp_path / "tensorboard" / "cost_a%2Fb", "cost") == [(1, 1), (2, 2), (3, 23), (4, 24)]
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "costs")] == [1, 2, 3, 4]


def test_s60_what_was_told_before_a_flush_is_on_disk(tmp_path):
    loggers = make_loggers(True)
    for logger in loggers:
        logger.draw_together("cost")
        logger.start(tmp_path, [], 0)
        logger.log_step({"cost/a": 2.0, **dict.fromkeys(map(str, range(300)), 1.0), "loss": 0.5}, 1, 0)
        logger.flush()
    assert [row["loss"] for row in rows_of(tmp_path / "steps.csv")] == ["0.5"]
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 0.5)]
    assert scalars(tmp_path / "tensorboard" / "cost_a", "cost") == [(1, 2.0)]
    for logger in loggers:
        logger.close()


def test_s60_rows_of_steps_wait_for_the_flush_and_those_of_epochs_do_not(tmp_path):
    log = CSVLogger()
    log.start(tmp_path, [], 0)
    log.log_step({"loss": 0.5}, 1, 0)
    log.log_epoch({"epoch": 0, "step": 1})
    assert not (tmp_path / "steps.csv").exists()
    assert len(rows_of(tmp_path / "metrics.csv")) == 1
    log.flush()
    assert len(rows_of(tmp_path / "steps.csv")) == 1


def test_s86_hyper_parameters_are_where_tensorboard_looks_for_them(tmp_path):
    quiet(tmp_path / "run", TensorBoardLogger(), max_epochs=1).fit(net(), *loaders())
    shown = tensorboard_hyperparameters(tmp_path / "run" / "tensorboard")
    assert (shown["width"].number_value, shown["learning_rate"].number_value) == (8, 0.01)


def tensorboard_hyperparameters(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    read = EventAccumulator(str(folder)).Reload()
    content = read.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    return metadata.parse_session_start_info_plugin_data(content).hparams


# ---- W&B


@pytest.mark.long
def test_s46_wandb_writes_a_run_offline_without_login(tmp_path, capsys):
    logger = WandbLogger(project="cats", name="first", offline=True, tags=["small"])
    logger.draw_together("cost")
    quiet(tmp_path / "run", logger).fit(stepping(), *loaders())
    (part,) = wandb_records(tmp_path / "run")
    assert [step for step, _ in wandb_history(part, "step_loss")] == [2, 4, 6, 8, 10, 12, 14]
    assert wandb_history(part, "epoch")[-1] == (14, 1)
    assert [step for step, _ in wandb_history(part, "val_loss")] == [7, 14]
    run = next(record["run"] for record in part if record["type"] == "run")
    assert (run["project"], run["display_name"], run["tags"]) == ("cats", "first", ["small"])
    assert part[-1]["exit"]["exit_code"] == 0
    assert run["run_id"] == json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    told = capsys.readouterr()
    assert told.out == ""
    assert [line for line in told.err.splitlines() if "wandb" in line.lower()] == [
        f"the W&B run is written to files; send it with: wandb sync --id {run['run_id']} "
        f"{tmp_path}/run/wandb/offline-run-*-{run['run_id']}"
    ]


@pytest.mark.long
def test_s46_s48_wandb_draws_the_series_of_a_chart_together(tmp_path):
    for start, steps in ((0, 3), (2, 5)):
        logger = WandbLogger(offline=True)
        logger.start(tmp_path, [], start)
        logger.draw_together("cost")
        for step in range(start + 1, steps + 1):
            logger.log_step({"cost/a": step + start / 10, "cost/b": math.nan if step == 1 else 1}, step, 0)
        logger.close()
    first, second = wandb_records(tmp_path)
    assert ["_wandb.visualize.cost" in str(part) for part in (first, second)] == [True, True]
    tables = sorted(tmp_path.glob("wandb/*/files/media/table/cost_table*.json"), key=lambda p: p.stat().st_mtime_ns)
    points = json.loads(tables[-1].read_text())["data"]
    assert [point for point in points if point[1] == "a"] == [
        [1, "a", 1],
        [2, "a", 2],
        [3, "a", 3.2],
        [4, "a", 4.2],
        [5, "a", 5.2],
    ]
    assert [point[0] for point in points if point[1] == "b"] == [2, 3, 4, 5]


@pytest.mark.long
def test_s46_a_resumed_run_is_the_same_wandb_run(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="light"):
        quiet(run, WandbLogger(offline=True), Failing(13)).fit(stepping(), *loaders())
    quiet(run, WandbLogger(offline=True)).fit(stepping(), *loaders(), ckpt_path=run / "last.ckpt")
    parts = wandb_records(run)
    ids = [record["run"]["run_id"] for part in parts for record in part if record["type"] == "run"]
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert [step for step, _ in wandb_history(parts[1], "step_loss")] == [8, 10, 12, 14]
    # Parts are put together by W&B's own count, which must not begin anew.
    counts = [[r["history"]["item"]["_step"] for r in part if r["type"] == "history"] for part in parts]
    assert counts[0] + counts[1] == list(range(len(counts[0]) + len(counts[1])))


@pytest.mark.long
def test_s46_a_run_that_goes_on_in_another_folder_is_a_new_wandb_run_with_its_epochs(tmp_path):
    logger = WandbLogger(offline=True)
    logger.start(tmp_path, [{"epoch": 0, "step": 7, "val_loss": 0.5}], 7)
    logger.close()
    (part,) = wandb_records(tmp_path)
    assert wandb_history(part, "val_loss") == [(7, 0.5)]


@pytest.mark.long
def test_s46_a_wandb_run_that_is_active_already_is_used_and_left_open(tmp_path):
    import wandb

    with wandb.init(project="mine", dir=tmp_path, mode="offline", settings=wandb.Settings(silent=True)) as run:
        logger = WandbLogger(offline=True)
        logger.start(tmp_path, [], 0)
        logger.log_step({"loss": 0.5}, 1, 0)
        logger.close()
        run.log({"own": 1})
    (part,) = wandb_records(tmp_path)
    assert wandb_history(part, "loss") == [(1, 0.5)]
    assert '"own":1' in json.dumps(part, separators=(",", ":"))


def test_s46_wandb_without_login_says_how_to_log_in(tmp_path):
    with pytest.raises(UsageError, match=r"wandb login, or WandbLogger\(offline=True\)"):
        WandbLogger().start(tmp_path, [], 0)


def test_s46_wandb_without_network_says_so(tmp_path):
    import wandb

    nowhere = wandb.Settings(api_key="0" * 40, base_url="http://127.0.0.1:9", init_timeout=1, silent=True)
    with pytest.raises(HubError, match="offline=True"):
        WandbLogger(settings=nowhere).start(tmp_path, [], 0)


@pytest.mark.long
def test_s86_hyper_parameters_are_the_config_of_wandb(tmp_path):
    quiet(tmp_path / "run", WandbLogger(offline=True), max_epochs=1).fit(net(), *loaders())
    (part,) = wandb_records(tmp_path / "run")
    config = {k: v for record in part if record["type"] == "config" for k, v in record["config"]["update"].items()}
    assert (config["width"], config["learning_rate"]) == (8, 0.01)


# ---- MLflow


@pytest.mark.long
@uses_database
def test_s46_s86_mlflow_writes_a_run_to_a_database_in_the_run_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="light"):
        quiet(run, MLFlowLogger("cats"), Failing(13)).fit(stepping(), *loaders())
    quiet(run, MLFlowLogger("cats")).fit(stepping(), *loaders(), ckpt_path=run / "last.ckpt")
    client = mlflow_client(run)
    (found,) = client.search_runs([client.get_experiment_by_name("cats").experiment_id])
    assert found.info.run_id == json.loads((run / "mlflow.json").read_text())["run_id"]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.info.artifact_uri.startswith((run / "mlflow_artifacts").as_uri())
    assert found.data.params == {"width": "8", "learning_rate": "0.01"}
    # Steps 8, 10 and 12 were taken twice, with equal values, and are there once.
    points = client.get_metric_history(found.info.run_id, "step_loss")
    assert [point.step for point in points] == [2, 4, 6, 8, 10, 12, 14]
    steps = rows_of(run / "steps.csv")
    assert [format(point.value, ".6g") for point in points] == [row["step_loss"] for row in steps]
    assert [(p.step, p.value) for p in client.get_metric_history(found.info.run_id, "epoch")] == [(7, 0), (14, 1)]
    assert os.listdir() == []


@pytest.mark.long
@uses_database
def test_s46_a_task_is_stored_as_a_model_that_mlflow_loads(tmp_path, monkeypatch):
    pyfunc = pytest.importorskip("mlflow.pyfunc")
    pandas = pytest.importorskip("pandas")
    colours = colour_folders(tmp_path / "data", each=4)
    task = ImageClassifier("timm/test_resnet", pretrained=False)
    data = ImageClassificationData.from_folders(colours, batch_size=4, num_workers=0)
    quiet(tmp_path / "run", MLFlowLogger(log_model=True), max_epochs=1).finetune(task, data)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    run_id = json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    (folder,) = (tmp_path / "run" / "mlflow_artifacts").rglob("MLmodel")
    assert "pickle" not in folder.read_text().lower()
    found = pyfunc.load_model(f"runs:/{run_id}/model")
    images = sorted((colours / "red").iterdir())
    expected = load(tmp_path / "run" / "best.ckpt").predict([str(one) for one in images])
    data_address = "data:image/png;base64," + base64.b64encode(images[0].read_bytes()).decode()
    for given in (
        pandas.DataFrame({"image": [str(one) for one in images]}),
        pandas.DataFrame({"image": [one.read_bytes() for one in images]}),
        [data_address, *map(str, images[1:])],
    ):
        said = found.predict(given)
        assert said["label"].tolist() == [one.label for one in expected]
        for label in task.labels:
            assert said[f"score_{label}"].tolist() == pytest.approx([one.probabilities[label] for one in expected])


@pytest.mark.long
@uses_database
def test_s46_a_plain_module_is_not_stored_as_a_model(tmp_path):
    quiet(tmp_path / "run", MLFlowLogger(log_model=True), max_epochs=1).fit(stepping(), *loaders())
    assert not [*(tmp_path / "run").rglob("MLmodel")]
    with pytest.raises(UsageError, match="log_model='all'"):
        MLFlowLogger(log_model="all")


@pytest.fixture
def shared_store(tmp_path_factory, request):
    """One database for several tests: making one takes more than a second."""
    folder = tmp_path_factory.getbasetemp() / "mlflow"
    folder.mkdir(exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.mark.long
@uses_database
def test_s46_mlflow_takes_what_its_names_and_parameters_do_not_allow(tmp_path, shared_store):
    for step in (0, 3):
        logger = MLFlowLogger(tracking_uri=shared_store, run_name="odd", tags={"who": "me"})
        logger.start(tmp_path, [], step)
        logger.log_hyperparameters({"f(x)": "y" * 9000, "width": 8 + step, **{f"p{n}": n for n in range(150)}})
        logger.log_step({"acc@5": 0.5, "../up": 1, "/": 2.0, "a//b": True}, step + 1, 0)
        logger.close()
    run = logger._mlflow.MlflowClient(shared_store).get_run(logger.run_id_now)
    assert set(run.data.metrics) == {"acc_5", "up", "_", "a/b"}
    assert (run.data.params["f_x_"], run.data.params["width"], run.data.params["p149"]) == ("y" * 500, "8", "149")
    assert (run.data.tags["width from step 3"], run.data.tags["who"]) == ("11", "me")


@pytest.mark.long
@uses_database
def test_s60_mlflow_keeps_what_could_not_be_sent_and_says_so(tmp_path, shared_store):
    logger = MLFlowLogger(tracking_uri=shared_store)
    logger.start(tmp_path, [], 0)
    logger.log_step({"loss": 0.5}, 1, 0)
    client = logger.experiment
    client.delete_run(logger.run_id_now)
    with pytest.warns(UserWarning, match="1 values wait"):
        logger.flush()
    client.restore_run(logger.run_id_now)
    logger.log_step({"loss": 0.25}, 2, 0)
    logger.flush()  # too soon to ask again
    assert client.get_metric_history(logger.run_id_now, "loss") == []
    logger.close()
    assert [(p.step, p.value) for p in client.get_metric_history(logger.run_id_now, "loss")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.long
@uses_database
def test_s46_mlflow_begins_a_new_run_where_the_old_one_is_not_there(tmp_path, shared_store):
    (tmp_path / "mlflow.json").write_text('{"run_id":"0123456789abcdef0123456789abcdef"}')
    logger = MLFlowLogger(tracking_uri=shared_store)
    logger.start(tmp_path, [{"epoch": 0, "step": 7, "val_loss": 0.5}], 7)
    logger.close()
    points = logger._mlflow.MlflowClient(shared_store).get_metric_history(logger.run_id_now, "val_loss")
    assert [(point.step, point.value) for point in points] == [(7, 0.5)]
    with pytest.raises(OutputError, match="takes no run"):
        MLFlowLogger(tracking_uri=shared_store, run_id="0123456789abcdef0123456789abcdef").start(tmp_path, [], 0)


def test_s46_an_mlflow_server_that_does_not_answer_is_named_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(OutputError, match=r"http://127\.0\.0\.1:9 takes no run") as caught:
        MLFlowLogger().start(tmp_path, [], 0)
    assert "secret" not in str(caught.value)
    assert "sqlite:///mlflow.db" in str(caught.value)


# ---- all of them


class Colour(enum.Enum):
    RED = 1


class Odd(Net):
    """Hyper-parameters that are no numbers, and values that are no numbers either."""

    def __init__(self, width=8, path=Path("a/b"), sizes=(1, [2.5, None]), nested=None, tensor=None, loss=None):
        super().__init__(width)
        self.save_hyperparameters()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", math.nan)
        self.log("val_top", math.inf)
        self.log("val_low", -math.inf)


ODD = {
    "path": Path("a/b"),
    "nested": {"a": {"b": math.nan}, 3: {"x", "y"}, "empty": {}},
    "tensor": torch.zeros(2, 3),
    "loss": torch.nn.CrossEntropyLoss,
    "colour": Colour.RED,
}


@pytest.mark.long
@uses_database
@pytest.mark.filterwarnings("ignore:the hyper-parameter .* cannot be stored in a checkpoint:UserWarning")
def test_s47_several_loggers_at_once_take_nan_infinity_and_any_hyper_parameter(tmp_path, shared_store):
    run = tmp_path / "run"
    loggers = make_loggers(["tensorboard", ("wandb", {"offline": True}), ("mlflow", {"tracking_uri": shared_store})])
    quiet(run, loggers, max_epochs=1).fit(Odd(**{k: v for k, v in ODD.items() if k != "colour"}), *loaders())
    row = rows_of(run / "metrics.csv")[0]
    assert (row["val_loss"], row["val_top"], row["val_low"]) == ("nan", "inf", "-inf")
    assert math.isnan(scalars(run / "tensorboard", "val_loss")[0][1])
    assert scalars(run / "tensorboard", "val_top") == [(7, math.inf)]
    assert tensorboard_hyperparameters(run / "tensorboard")["tensor"].string_value == "Tensor of shape (2, 3)"
    (part,) = wandb_records(run)
    assert wandb_history(part, "val_top") == [(7, "Infinity")]
    config = {k: v for record in part if record["type"] == "config" for k, v in record["config"]["update"].items()}
    assert (config["path"], config["nested"]["3"], config["loss"]) == ("a/b", ["x", "y"], "CrossEntropyLoss")
    client = loggers[3]._mlflow.MlflowClient(shared_store)
    found = client.get_run(loggers[3].run_id_now)
    assert math.isnan(found.data.metrics["val_loss"])
    assert (found.data.params["nested.a.b"], found.data.params["sizes"]) == ("nan", "[1, [2.5, None]]")


def test_hyper_parameters_become_plain_values_that_are_the_same_each_time():
    values = {**ODD, "number": torch.tensor([2.5]), "module": torch.nn.ReLU(), "call": Path.exists, "none": None}
    assert json.loads(json.dumps(plain_value(values), allow_nan=False)) == {
        "path": "a/b",
        "nested": {"a": {"b": "nan"}, "3": ["x", "y"], "empty": {}},
        "tensor": "Tensor of shape (2, 3)",
        "loss": "CrossEntropyLoss",
        "colour": "RED",
        "number": 2.5,
        "module": "ReLU",
        "call": "Path.exists",
        "none": None,
    }
    assert flat_values(values) == {
        "path": "a/b",
        "nested.a.b": "nan",
        "nested.3": "['x', 'y']",
        "nested.empty": "{}",
        "tensor": "Tensor of shape (2, 3)",
        "loss": "CrossEntropyLoss",
        "colour": "RED",
        "number": 2.5,
        "module": "ReLU",
        "call": "Path.exists",
        "none": "None",
    }


@pytest.mark.parametrize("name", ["csv", "tensorboard", "wandb", "mlflow"])
def test_s47_a_logger_by_name_may_be_flushed_and_closed_without_a_run(name):
    (logger,) = [one for one in make_loggers(name) if one.name == name]
    assert type(logger) is LOGGERS.get(name)
    logger.draw_together("cost")
    logger.flush()
    logger.close()
    logger.close()


def test_s47_the_csv_log_is_always_there_unless_it_is_false():
    def names(given):
        return [one.name for one in make_loggers(given)]

    assert names(False) == []
    assert names(True) == names(None) == ["csv", "tensorboard"]
    assert names([]) == names("csv") == names(CSVLogger()) == ["csv"]
    assert names("wandb") == names(("wandb", {"offline": True})) == ["csv", "wandb"]
    assert names(["tensorboard", ("wandb", {"project": "cats"})]) == ["csv", "tensorboard", "wandb"]
    assert names(("tensorboard", "wandb")) == ["csv", "tensorboard", "wandb"]
    own = CSVLogger()
    assert make_loggers([WandbLogger(), own])[1] is own


def test_s47_options_reach_the_logger(tmp_path):
    _, logger = make_loggers(("wandb", {"project": "cats", "offline": True}))
    assert (logger.project, logger.offline) == ("cats", True)
    _, logger = make_loggers(("tensorboard", {"folder": tmp_path}))
    assert logger.folder == tmp_path


def test_s47_a_logger_of_ones_own_is_used_by_object_and_by_name(tmp_path):
    class Counting(Logger):
        def __init__(self):
            self.told = []

        def log_epoch(self, row):
            self.told.append(row["epoch"])

        def close(self, error=None):
            self.told.append("closed")

    own = Counting()
    assert own.name == "counting"
    quiet(tmp_path / "run", own).fit(stepping(), *loaders())
    assert own.told == [0, 1, "closed"]
    LOGGERS.register("counting", Counting, description="counts epochs")
    try:
        assert [one.name for one in make_loggers("counting")] == ["csv", "counting"]
    finally:
        LOGGERS.remove("counting")


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("tensorbord", UnknownNameError, "did you mean 'tensorboard'"),
        (("wandb", {"ofline": True}), UnknownNameError, "did you mean 'offline'"),
        (("tensorboard", {"fodler": "a"}), UnknownNameError, "did you mean 'folder'"),
        (["csv", "csv"], UsageError, "given twice"),
        ([True], UsageError, "True, False, a Logger"),
        (3, UsageError, "True, False, a Logger"),
        (WandbLogger, UsageError, r"takes no class: WandbLogger\n.*logger=\[WandbLogger\(\)\]"),
    ],
)
def test_s47_what_is_no_logger_is_refused(given, kind, message):
    with pytest.raises(kind, match=message):
        make_loggers(given)


def test_s47_one_logger_twice_is_refused():
    logger = TensorBoardLogger()
    with pytest.raises(UsageError, match="given twice"):
        make_loggers([logger, logger])


@pytest.mark.parametrize(
    ("name", "command"), [("wandb", "pip install wandb"), ("mlflow", "pip install mlflow-skinny sqlalchemy alembic")]
)
def test_s47_a_library_that_is_not_installed_is_named_with_its_command(name, command, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=command):
        make_loggers(name)


def test_s47_loggers_have_names_and_descriptions():
    assert LOGGERS.names() == ["csv", "tensorboard", "wandb", "mlflow"]
    assert all(LOGGERS.entry(name).metadata["description"] for name in LOGGERS.names())
