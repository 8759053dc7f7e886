"""What goes into a checkpoint, when one is written, and which is best."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashtask._version import __version__
from flashtask.core.checkpoint import write_checkpoint
from flashtask.core.errors import UnknownNameError
from flashtask.core.files import atomic_write
from flashtask.core.seeding import generator_states
from flashtask.trainer.callbacks import Callback
from flashtask.trainer.fit_run import FitRun
from flashtask.trainer.hyperparameters import hyperparameters_content
from flashtask.trainer.run_settings import settings_of

__all__ = ["ONLY_FOR_RESUMING", "ModelCheckpoint", "checkpoint_content", "environment"]


#: What a checkpoint holds for a resume alone.
ONLY_FOR_RESUMING = (
    "progress",
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "precision",
    "datamodule",
    "random",
    "seed",
    "settings",
)


def checkpoint_content(run: FitRun) -> dict[str, Any]:
    """Everything a checkpoint holds: what describes the module, its weights, and what a resume needs."""
    module = run.module
    progress = run.state_dict()
    content: dict[str, Any] = {
        **module.describe(),
        **hyperparameters_content(module),
        "epoch": run.epoch,
        "global_step": run.global_step,
        "state_dict": module.state_dict(),
        "metrics": dict(run.metrics),
        "environment": environment(run),
        "recipe": run.trainer.recipe(run),
        "progress": {**progress, "history": _as_bytes(progress["history"])},
        "optimizer_states": [optimizer.state_dict() for optimizer in run.optimizers],
        "lr_schedulers": [rate.scheduler.state_dict() for rate in run.schedulers],
        "callbacks": {callback.state_key: callback.state_dict() for callback in run.callbacks},
        "precision": {"name": run.precision.name, "state": run.precision.state_dict()},
        "datamodule": run.data.state_dict(),
        "random": generator_states(),
        "seed": run.seed,
        "settings": settings_of(run),
    }
    for callback in run.callbacks:
        callback.on_save_checkpoint(run.trainer, module, content)
    module.on_save_checkpoint(content)
    return content


def environment(run: FitRun) -> dict[str, Any]:
    """What bit-equal results depend on beside the run itself: versions, threads, device, formats."""
    return {
        "flashtask": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": run.device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "precision": run.precision.name,
        "memory_format": "channels_last" if run.memory_format is torch.channels_last else "contiguous",
    }


def _as_bytes(rows: list[dict[str, float]]) -> torch.Tensor:
    """History grows with the run, so it is a tensor and not part of the file's header."""
    text = json.dumps(rows, separators=(",", ":"))
    return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())


class ModelCheckpoint(Callback):
    """Writes `last.ckpt` after every epoch, and `best.ckpt` when the monitored metric is the best so far.

    Args:
        monitor: the metric to rank by; None means the module's own, and without validation data best is last.
        mode: `max` or `min`; None means the module's own.
        dirpath: where to write; None means the run folder.

    Ties go to the lower `val_loss`; NaN is never best.
    """

    comes_last = True

    def __init__(self, monitor: str | None = None, mode: str | None = None, dirpath: Any = None) -> None:
        self.monitor, self.mode, self.dirpath = monitor, mode, dirpath
        self._forget()

    def _forget(self) -> None:
        self.best_score: float | None = None
        self.best_tie_break = math.inf
        self.best_epoch: int | None = None
        self.best_metrics: dict[str, float] = {}
        self.best_model_path = ""
        self.last_model_path = ""

    @property
    def best_model_score(self) -> float | None:
        """The monitored value of the best checkpoint."""
        return self.best_score

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Settle where checkpoints go, and forget those of an earlier fit."""
        if stage != "fit":
            return
        self._forget()
        self._folder = Path(self.dirpath) if self.dirpath is not None else Path(trainer.output_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._resumed_from: Path | None = trainer.fit_run.resume_from
        self._say = trainer.say

    def on_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write the checkpoints of an epoch."""
        run = trainer.fit_run
        is_best = self._rank(run, module)
        if is_best:
            self.best_model_path = str(self._folder / "best.ckpt")
            self.best_epoch, self.best_metrics = run.epoch, dict(run.history[-1])
        self.last_model_path = str(self._folder / "last.ckpt")
        content = checkpoint_content(run)
        if is_best:
            write_checkpoint(self.best_model_path, content)
        write_checkpoint(self.last_model_path, content)

    def save_last(self, trainer: Any) -> str:
        """Write `last.ckpt` where the run stands now, in the middle of an epoch too."""
        self.last_model_path = str(self._folder / "last.ckpt")
        write_checkpoint(self.last_model_path, checkpoint_content(trainer.fit_run))
        return self.last_model_path

    def _rank(self, run: FitRun, module: Any) -> bool:
        """Whether this epoch is the best so far; remembers it if so."""
        name = self.monitor or module.monitor
        if run.validation is not None and not run.validates and name not in run.fresh_metrics:
            return False  # it is measured in other epochs
        score = run.metrics.get(name)
        if score is None:
            if self.monitor is not None:
                raise UnknownNameError("metric to monitor", name, run.metrics)
            return True
        sign = -1 if (self.mode or module.monitor_mode) == "min" else 1
        tie_break = run.metrics.get("val_loss", math.inf)
        if math.isnan(score):
            return False
        known = -math.inf if self.best_score is None else sign * self.best_score
        if (sign * score, -tie_break) <= (known, -self.best_tie_break):
            return False
        self.best_score, self.best_tie_break = score, tie_break
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best score so far and where the files are."""
        return {
            "best_score": self.best_score,
            "best_tie_break": self.best_tie_break,
            "best_epoch": self.best_epoch,
            "best_metrics": self.best_metrics,
            "best_model_path": Path(self.best_model_path).name,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the best so far; its file comes along where a run is continued in another folder."""
        name = state["best_model_path"]
        path = self._folder / name
        beside = self._resumed_from.parent / name if self._resumed_from is not None and name else None
        if name and not path.exists() and beside is not None and beside.exists():
            with atomic_write(path, size=beside.stat().st_size) as file:
                file.write(beside.read_bytes())
        if not name or not path.exists():
            if name:
                self._say(f"{name} of the run so far is not there; best is found anew from here")
            return
        self.best_score, self.best_tie_break = state["best_score"], state["best_tie_break"]
        self.best_epoch, self.best_metrics = state["best_epoch"], state["best_metrics"]
        self.best_model_path = str(path)
