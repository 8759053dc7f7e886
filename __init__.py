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
    from flashtask.trainer.accelerators import ACCELERATORS as ACCELERATORS
    from flashtask.trainer.accelerators import Accelerator as Accelerator
    from flashtask.trainer.accelerators import CPUAccelerator as CPUAccelerator
    from flashtask.trainer.accelerators import CUDAAccelerator as CUDAAccelerator
    from flashtask.trainer.accelerators import MPSAccelerator as MPSAccelerator
    from flashtask.trainer.accumulation import GradientAccumulationScheduler as GradientAccumulationScheduler
    from flashtask.trainer.batch_size_search import BatchSizeSearch as BatchSizeSearch
    from flashtask.trainer.callback_names import CALLBACKS as CALLBACKS
    from flashtask.trainer.callbacks import Callback as Callback
    from flashtask.trainer.custom_loops import EvaluationEpochLoop as EvaluationEpochLoop
    from flashtask.trainer.custom_loops import EvaluationLoop as EvaluationLoop
    from flashtask.trainer.custom_loops import FitLoop as FitLoop
    from flashtask.trainer.custom_loops import Loop as Loop
    from flashtask.trainer.custom_loops import ManualOptimization as ManualOptimization
    from flashtask.trainer.custom_loops import OptimizerLoop as OptimizerLoop
    from flashtask.trainer.custom_loops import PredictionLoop as PredictionLoop
    from flashtask.trainer.custom_loops import TrainingBatchLoop as TrainingBatchLoop
    from flashtask.trainer.custom_loops import TrainingEpochLoop as TrainingEpochLoop
    from flashtask.trainer.datamodule import DataModule as DataModule
    from flashtask.trainer.datamodule import DataModule as LightningDataModule  # noqa: F401
    from flashtask.trainer.early_stopping import EarlyStopping as EarlyStopping
    from flashtask.trainer.lambda_callback import LambdaCallback as LambdaCallback
    from flashtask.trainer.learning_rate_curve import LearningRateCurve as LearningRateCurve
    from flashtask.trainer.loggers import LOGGERS as LOGGERS
    from flashtask.trainer.loggers import CSVLogger as CSVLogger
    from flashtask.trainer.loggers import Logger as Logger
    from flashtask.trainer.loop import Loops as Loops
    from flashtask.trainer.mlflow_logger import MLFlowLogger as MLFlowLogger
    from flashtask.trainer.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from flashtask.trainer.model_summary import ModelSummary as ModelSummary
    from flashtask.trainer.module import Module as LightningModule  # noqa: F401
    from flashtask.trainer.module import Module as Module
    from flashtask.trainer.monitors import DeviceStatsMonitor as DeviceStatsMonitor
    from flashtask.trainer.monitors import GradientNormMonitor as GradientNormMonitor
    from flashtask.trainer.monitors import LearningRateMonitor as LearningRateMonitor
    from flashtask.trainer.precision import MixedPrecision as MixedPrecision
    from flashtask.trainer.precision import Precision as Precision
    from flashtask.trainer.precision import ScaledPrecision as ScaledPrecision
    from flashtask.trainer.precision import TruePrecision as TruePrecision
    from flashtask.trainer.prediction_writer import BasePredictionWriter as BasePredictionWriter
    from flashtask.trainer.profilers import PROFILERS as PROFILERS
    from flashtask.trainer.profilers import AdvancedProfiler as AdvancedProfiler
    from flashtask.trainer.profilers import PassThrough as PassThrough
    from flashtask.trainer.profilers import Profiler as Profiler
    from flashtask.trainer.profilers import PyTorchProfiler as PyTorchProfiler
    from flashtask.trainer.profilers import SimpleProfiler as SimpleProfiler
    from flashtask.trainer.progress import ProgressBar as ProgressBar
    from flashtask.trainer.stages import FINETUNING as FINETUNING
    from flashtask.trainer.stages import Finetuning as Finetuning
    from flashtask.trainer.stages import Stage as Stage
    from flashtask.trainer.stochastic_weight_averaging import StochasticWeightAveraging as StochasticWeightAveraging
    from flashtask.trainer.strategies import STRATEGIES as STRATEGIES
    from flashtask.trainer.strategies import STRATEGIES as StrategyRegistry  # noqa: F401
    from flashtask.trainer.strategies import STRATEGIES as TrainingTypePluginsRegistry
    from flashtask.trainer.strategies import SingleDevice as SingleDevice
    from flashtask.trainer.strategies import Strategy as Strategy
    from flashtask.trainer.tensorboard_logger import TensorBoardLogger as TensorBoardLogger
    from flashtask.trainer.timing import Timer as Timer
    from flashtask.trainer.trainer import Trainer as Trainer
    from flashtask.trainer.tuning import TuningResult as TuningResult
    from flashtask.trainer.wandb_logger import WandbLogger as WandbLogger
    from flashtask.trainer.weight_averaging import EMAWeightAveraging as EMAWeightAveraging
    from flashtask.trainer.weight_averaging import WeightAveraging as WeightAveraging

#: public name -> the module that defines it
_HOMES = {
    "ACCELERATORS": "flashtask.trainer.accelerators",
    "Accelerator": "flashtask.trainer.accelerators",
    "AdvancedProfiler": "flashtask.trainer.profilers",
    "BACKBONES": "flashtask.backbones",
    "Backbone": "flashtask.backbones.backbone",
    "BasePredictionWriter": "flashtask.trainer.prediction_writer",
    "BatchSizeSearch": "flashtask.trainer.batch_size_search",
    "CALLBACKS": "flashtask.trainer.callback_names",
    "CPUAccelerator": "flashtask.trainer.accelerators",
    "CSVLogger": "flashtask.trainer.loggers",
    "CUDAAccelerator": "flashtask.trainer.accelerators",
    "Callback": "flashtask.trainer.callbacks",
    "DataModule": "flashtask.trainer.datamodule",
    "DeviceStatsMonitor": "flashtask.trainer.monitors",
    "EMAWeightAveraging": "flashtask.trainer.weight_averaging",
    "EarlyStopping": "flashtask.trainer.early_stopping",
    "EvaluationEpochLoop": "flashtask.trainer.custom_loops",
    "EvaluationLoop": "flashtask.trainer.custom_loops",
    "FINETUNING": "flashtask.trainer.stages",
    "Finetuning": "flashtask.trainer.stages",
    "FitLoop": "flashtask.trainer.custom_loops",
    "FlashtaskError": "flashtask.core.errors",
    "GradientAccumulationScheduler": "flashtask.trainer.accumulation",
    "GradientNormMonitor": "flashtask.trainer.monitors",
    "HEADS": "flashtask.heads",
    "ImageClassificationData": "flashtask.data.image_classification",
    "ImageClassifier": "flashtask.tasks.image_classification",
    "ImageEmbedder": "flashtask.tasks.image_embedding",
    "LOGGERS": "flashtask.trainer.loggers",
    "LambdaCallback": "flashtask.trainer.lambda_callback",
    "LearningRateCurve": "flashtask.trainer.learning_rate_curve",
    "LearningRateMonitor": "flashtask.trainer.monitors",
    "LightningDataModule": "flashtask.trainer.datamodule:DataModule",
    "LightningModule": "flashtask.trainer.module:Module",
    "Logger": "flashtask.trainer.loggers",
    "Loop": "flashtask.trainer.custom_loops",
    "Loops": "flashtask.trainer.loop",
    "MLFlowLogger": "flashtask.trainer.mlflow_logger",
    "MPSAccelerator": "flashtask.trainer.accelerators",
    "ManualOptimization": "flashtask.trainer.custom_loops",
    "MixedPrecision": "flashtask.trainer.precision",
    "ModelCheckpoint": "flashtask.trainer.model_checkpoint",
    "ModelSummary": "flashtask.trainer.model_summary",
    "Module": "flashtask.trainer.module",
    "OptimizerLoop": "flashtask.trainer.custom_loops",
    "PROFILERS": "flashtask.trainer.profilers",
    "PassThrough": "flashtask.trainer.profilers",
    "Precision": "flashtask.trainer.precision",
    "Prediction": "flashtask.tasks.prediction",
    "PredictionLoop": "flashtask.trainer.custom_loops",
    "Preprocessing": "flashtask.core.preprocessing",
    "Profiler": "flashtask.trainer.profilers",
    "ProgressBar": "flashtask.trainer.progress",
    "PyTorchProfiler": "flashtask.trainer.profilers",
    "STRATEGIES": "flashtask.trainer.strategies",
    "ScaledPrecision": "flashtask.trainer.precision",
    "SimpleProfiler": "flashtask.trainer.profilers",
    "SingleDevice": "flashtask.trainer.strategies",
    "Stage": "flashtask.trainer.stages",
    "StochasticWeightAveraging": "flashtask.trainer.stochastic_weight_averaging",
    "Strategy": "flashtask.trainer.strategies",
    "StrategyRegistry": "flashtask.trainer.strategies:STRATEGIES",
    "TASKS": "flashtask.tasks",
    "Task": "flashtask.tasks.task",
    "TensorBoardLogger": "flashtask.trainer.tensorboard_logger",
    "Timer": "flashtask.trainer.timing",
    "Trainer": "flashtask.trainer.trainer",
    "TrainingBatchLoop": "flashtask.trainer.custom_loops",
    "TrainingEpochLoop": "flashtask.trainer.custom_loops",
    "TrainingTypePluginsRegistry": "flashtask.trainer.strategies:STRATEGIES",
    "TruePrecision": "flashtask.trainer.precision",
    "TuningResult": "flashtask.trainer.tuning",
    "WandbLogger": "flashtask.trainer.wandb_logger",
    "WeightAveraging": "flashtask.trainer.weight_averaging",
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
