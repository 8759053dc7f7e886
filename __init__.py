"""flashtask: fine-tune image models in three lines, into a file that anyone can load safely.

Public names are imported when they are first used, so `import flashtask` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flashtask._version import __version__

if TYPE_CHECKING:
    from flashtask.backbones import BACKBONES as BACKBONES
    from flashtask.backbones import build_backbone as build_backbone
    from flashtask.backbones.backbone import Backbone as Backbone
    from flashtask.core.checkpoint import read_checkpoint as read_checkpoint
    from flashtask.core.errors import FlashtaskError as FlashtaskError
    from flashtask.core.preprocessing import Preprocessing as Preprocessing
    from flashtask.core.seeding import seed_everything as seed_everything
    from flashtask.core.seeding import seeded as seeded
    from flashtask.data.download import download_data as download_data
    from flashtask.data.image_classification import ImageClassificationData as ImageClassificationData
    from flashtask.heads import HEADS as HEADS
    from flashtask.heads import build_head as build_head
    from flashtask.tasks import TASKS as TASKS
    from flashtask.tasks.image_classification import ImageClassifier as ImageClassifier
    from flashtask.tasks.image_embedding import ImageEmbedder as ImageEmbedder
    from flashtask.tasks.loading import load as load
    from flashtask.tasks.prediction import Prediction as Prediction
    from flashtask.tasks.task import Task as Task
    from flashtask.trainer.accumulation import GradientAccumulationScheduler as GradientAccumulationScheduler
    from flashtask.trainer.callbacks import Callback as Callback
    from flashtask.trainer.datamodule import DataModule as DataModule
    from flashtask.trainer.datamodule import DataModule as LightningDataModule  # noqa: F401
    from flashtask.trainer.early_stopping import EarlyStopping as EarlyStopping
    from flashtask.trainer.lambda_callback import LambdaCallback as LambdaCallback
    from flashtask.trainer.loggers import CSVLogger as CSVLogger
    from flashtask.trainer.loggers import Logger as Logger
    from flashtask.trainer.loop import Loops as Loops
    from flashtask.trainer.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from flashtask.trainer.model_summary import ModelSummary as ModelSummary
    from flashtask.trainer.module import Module as LightningModule  # noqa: F401
    from flashtask.trainer.module import Module as Module
    from flashtask.trainer.monitors import DeviceStatsMonitor as DeviceStatsMonitor
    from flashtask.trainer.monitors import LearningRateMonitor as LearningRateMonitor
    from flashtask.trainer.precision import Precision as Precision
    from flashtask.trainer.prediction_writer import BasePredictionWriter as BasePredictionWriter
    from flashtask.trainer.progress import ProgressBar as ProgressBar
    from flashtask.trainer.stages import FINETUNING as FINETUNING
    from flashtask.trainer.stages import Finetuning as Finetuning
    from flashtask.trainer.stages import Stage as Stage
    from flashtask.trainer.timing import Timer as Timer
    from flashtask.trainer.trainer import Trainer as Trainer

#: public name -> the module that defines it
_HOMES = {
    "BACKBONES": "flashtask.backbones",
    "Backbone": "flashtask.backbones.backbone",
    "BasePredictionWriter": "flashtask.trainer.prediction_writer",
    "CSVLogger": "flashtask.trainer.loggers",
    "Callback": "flashtask.trainer.callbacks",
    "DataModule": "flashtask.trainer.datamodule",
    "DeviceStatsMonitor": "flashtask.trainer.monitors",
    "EarlyStopping": "flashtask.trainer.early_stopping",
    "FINETUNING": "flashtask.trainer.stages",
    "Finetuning": "flashtask.trainer.stages",
    "FlashtaskError": "flashtask.core.errors",
    "GradientAccumulationScheduler": "flashtask.trainer.accumulation",
    "HEADS": "flashtask.heads",
    "ImageClassificationData": "flashtask.data.image_classification",
    "ImageClassifier": "flashtask.tasks.image_classification",
    "ImageEmbedder": "flashtask.tasks.image_embedding",
    "LambdaCallback": "flashtask.trainer.lambda_callback",
    "LearningRateMonitor": "flashtask.trainer.monitors",
    "LightningDataModule": "flashtask.trainer.datamodule:DataModule",
    "LightningModule": "flashtask.trainer.module:Module",
    "Logger": "flashtask.trainer.loggers",
    "Loops": "flashtask.trainer.loop",
    "ModelCheckpoint": "flashtask.trainer.model_checkpoint",
    "ModelSummary": "flashtask.trainer.model_summary",
    "Module": "flashtask.trainer.module",
    "Precision": "flashtask.trainer.precision",
    "Prediction": "flashtask.tasks.prediction",
    "Preprocessing": "flashtask.core.preprocessing",
    "ProgressBar": "flashtask.trainer.progress",
    "Stage": "flashtask.trainer.stages",
    "TASKS": "flashtask.tasks",
    "Task": "flashtask.tasks.task",
    "Timer": "flashtask.trainer.timing",
    "Trainer": "flashtask.trainer.trainer",
    "build_backbone": "flashtask.backbones",
    "build_head": "flashtask.heads",
    "download_data": "flashtask.data.download",
    "load": "flashtask.tasks.loading",
    "read_checkpoint": "flashtask.core.checkpoint",
    "seed_everything": "flashtask.core.seeding",
    "seeded": "flashtask.core.seeding",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flashtask' has no attribute {name!r}")
    home, _, renamed = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(home), renamed or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
