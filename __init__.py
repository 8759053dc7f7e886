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
    from flashtask.backbones import build_pyramid as build_pyramid
    from flashtask.backbones.backbone import Backbone as Backbone
    from flashtask.core.checkpoint import read_checkpoint as read_checkpoint
    from flashtask.core.errors import FlashtaskError as FlashtaskError
    from flashtask.core.feature_info import FeatureInfo as FeatureInfo
    from flashtask.core.preprocessing import Preprocessing as Preprocessing
    from flashtask.core.seeding import seed_everything as seed_everything
    from flashtask.core.seeding import seeded as seeded
    from flashtask.data.conversion import Conversion as Conversion
    from flashtask.data.conversion import convert_annotations as convert_annotations
    from flashtask.data.download import download_data as download_data
    from flashtask.data.image_classification import ImageClassificationData as ImageClassificationData
    from flashtask.data.image_data import ImageData as ImageData
    from flashtask.data.image_regression import ImageRegressionData as ImageRegressionData
    from flashtask.data.image_source import IMAGE_LOADERS as IMAGE_LOADERS
    from flashtask.data.instance_segmentation import InstanceSegmentationData as InstanceSegmentationData
    from flashtask.data.keypoint_data import KeypointDetectionData as KeypointDetectionData
    from flashtask.data.object_detection import ObjectDetectionData as ObjectDetectionData
    from flashtask.data.samples import SampleTable as SampleTable
    from flashtask.data.semantic_segmentation import SemanticSegmentationData as SemanticSegmentationData
    from flashtask.data.spatial import SpatialReader as SpatialReader
    from flashtask.data.targets import TargetReader as TargetReader
    from flashtask.heads import HEADS as HEADS
    from flashtask.heads import build_head as build_head
    from flashtask.tasks import TASKS as TASKS
    from flashtask.tasks.batches import StepOutput as StepOutput
    from flashtask.tasks.finished_run import FinishedRun as FinishedRun
    from flashtask.tasks.image_classification import ImageClassifier as ImageClassifier
    from flashtask.tasks.image_embedding import ImageEmbedder as ImageEmbedder
    from flashtask.tasks.image_regression import ImageRegressor as ImageRegressor
    from flashtask.tasks.instance_predictions import Instances as Instances
    from flashtask.tasks.instance_segmentation import InstanceSegmentation as InstanceSegmentation
    from flashtask.tasks.keypoint_detection import KeypointDetector as KeypointDetector
    from flashtask.tasks.keypoint_predictions import Keypoints as Keypoints
    from flashtask.tasks.learning_curve import LearningCurve as LearningCurve
    from flashtask.tasks.learning_curve import learning_curve as learning_curve
    from flashtask.tasks.loading import load as load
    from flashtask.tasks.masks import Mask as Mask
    from flashtask.tasks.object_detection import ObjectDetector as ObjectDetector
    from flashtask.tasks.own_zoo import use_zoo as use_zoo
    from flashtask.tasks.predictions import Boxes as Boxes
    from flashtask.tasks.predictions import Label as Label
    from flashtask.tasks.predictions import Labels as Labels
    from flashtask.tasks.predictions import Number as Number
    from flashtask.tasks.predictions import Prediction as Prediction
    from flashtask.tasks.repeats import PlannedRun as PlannedRun
    from flashtask.tasks.repeats import RepeatedRuns as RepeatedRuns
    from flashtask.tasks.repeats import repeat_runs as repeat_runs
    from flashtask.tasks.semantic_segmentation import SemanticSegmentation as SemanticSegmentation
    from flashtask.tasks.task import Task as Task
    from flashtask.trainer.callbacks.accumulation import GradientAccumulationScheduler as GradientAccumulationScheduler
    from flashtask.trainer.callbacks.callback import Callback as Callback
    from flashtask.trainer.callbacks.callback import LambdaCallback as LambdaCallback
    from flashtask.trainer.callbacks.callback_registry import CALLBACKS as CALLBACKS
    from flashtask.trainer.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from flashtask.trainer.callbacks.finetuning_callbacks import BackboneFinetuning as BackboneFinetuning
    from flashtask.trainer.callbacks.finetuning_callbacks import BaseFinetuning as BaseFinetuning
    from flashtask.trainer.callbacks.model_summary import ModelSummary as ModelSummary
    from flashtask.trainer.callbacks.monitors import DeviceStatsMonitor as DeviceStatsMonitor
    from flashtask.trainer.callbacks.monitors import GradientNormMonitor as GradientNormMonitor
    from flashtask.trainer.callbacks.monitors import LearningRateMonitor as LearningRateMonitor
    from flashtask.trainer.callbacks.prediction_writer import BasePredictionWriter as BasePredictionWriter
    from flashtask.trainer.callbacks.progress import ProgressBar as ProgressBar
    from flashtask.trainer.callbacks.progress_libraries import RichProgressBar as RichProgressBar
    from flashtask.trainer.callbacks.progress_libraries import RichProgressBarTheme as RichProgressBarTheme
    from flashtask.trainer.callbacks.progress_libraries import TQDMProgressBar as TQDMProgressBar
    from flashtask.trainer.callbacks.stochastic_weight_averaging import (
        StochasticWeightAveraging as StochasticWeightAveraging,
    )
    from flashtask.trainer.callbacks.timing import Timer as Timer
    from flashtask.trainer.callbacks.weight_averaging import EMAWeightAveraging as EMAWeightAveraging
    from flashtask.trainer.callbacks.weight_averaging import WeightAveraging as WeightAveraging
    from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from flashtask.trainer.combined_loader import CombinedLoader as CombinedLoader
    from flashtask.trainer.datamodule import DataModule as DataModule
    from flashtask.trainer.datamodule import DataModule as LightningDataModule  # noqa: F401
    from flashtask.trainer.devices.accelerators import ACCELERATORS as ACCELERATORS
    from flashtask.trainer.devices.accelerators import Accelerator as Accelerator
    from flashtask.trainer.devices.accelerators import CPUAccelerator as CPUAccelerator
    from flashtask.trainer.devices.accelerators import CUDAAccelerator as CUDAAccelerator
    from flashtask.trainer.devices.accelerators import MPSAccelerator as MPSAccelerator
    from flashtask.trainer.devices.precision import MixedPrecision as MixedPrecision
    from flashtask.trainer.devices.precision import Precision as Precision
    from flashtask.trainer.devices.precision import ScaledPrecision as ScaledPrecision
    from flashtask.trainer.devices.precision import TruePrecision as TruePrecision
    from flashtask.trainer.distribution.process_strategies import STRATEGIES as STRATEGIES
    from flashtask.trainer.distribution.process_strategies import STRATEGIES as StrategyRegistry  # noqa: F401, N811
    from flashtask.trainer.distribution.process_strategies import STRATEGIES as TrainingTypePluginsRegistry  # noqa: F401, N811
    from flashtask.trainer.distribution.process_strategies import SingleDevice as SingleDevice
    from flashtask.trainer.distribution.process_strategies import Strategy as Strategy
    from flashtask.trainer.finetuning.phase import LowRank as LowRank
    from flashtask.trainer.finetuning.phase import Phase as Phase
    from flashtask.trainer.finetuning.phase import Plateau as Plateau
    from flashtask.trainer.finetuning.strategies import FINETUNING as FINETUNING
    from flashtask.trainer.finetuning.strategies import Finetuning as Finetuning
    from flashtask.trainer.finetuning.strategies import Stage as Stage
    from flashtask.trainer.finetuning_plan import Plan as Plan
    from flashtask.trainer.fit_result import FitResult as FitResult
    from flashtask.trainer.lightning1.loops import EvaluationEpochLoop as EvaluationEpochLoop
    from flashtask.trainer.lightning1.loops import EvaluationLoop as EvaluationLoop
    from flashtask.trainer.lightning1.loops import FitLoop as FitLoop
    from flashtask.trainer.lightning1.loops import Loop as Loop
    from flashtask.trainer.lightning1.loops import ManualOptimization as ManualOptimization
    from flashtask.trainer.lightning1.loops import OptimizerLoop as OptimizerLoop
    from flashtask.trainer.lightning1.loops import PredictionLoop as PredictionLoop
    from flashtask.trainer.lightning1.loops import TrainingBatchLoop as TrainingBatchLoop
    from flashtask.trainer.lightning1.loops import TrainingEpochLoop as TrainingEpochLoop
    from flashtask.trainer.loggers.csv_logger import CSVLogger as CSVLogger
    from flashtask.trainer.loggers.logger import Logger as Logger
    from flashtask.trainer.loggers.logger_registry import LOGGERS as LOGGERS
    from flashtask.trainer.loggers.mlflow_logger import MLFlowLogger as MLFlowLogger
    from flashtask.trainer.loggers.tensorboard_logger import TensorBoardLogger as TensorBoardLogger
    from flashtask.trainer.loggers.wandb_logger import WandbLogger as WandbLogger
    from flashtask.trainer.loop import Loops as Loops
    from flashtask.trainer.module import Module as LightningModule  # noqa: F401
    from flashtask.trainer.module import Module as Module
    from flashtask.trainer.profiling.profilers import PROFILERS as PROFILERS
    from flashtask.trainer.profiling.profilers import AdvancedProfiler as AdvancedProfiler
    from flashtask.trainer.profiling.profilers import PassThrough as PassThrough
    from flashtask.trainer.profiling.profilers import Profiler as Profiler
    from flashtask.trainer.profiling.profilers import PyTorchProfiler as PyTorchProfiler
    from flashtask.trainer.profiling.profilers import SimpleProfiler as SimpleProfiler
    from flashtask.trainer.trainer import Trainer as Trainer
    from flashtask.trainer.tuning.batch_size_search import BatchSizeSearch as BatchSizeSearch
    from flashtask.trainer.tuning.learning_rate_curve import LearningRateCurve as LearningRateCurve
    from flashtask.trainer.tuning.tune import TuningResult as TuningResult
    from flashtask.trainer.tuning.tuner import Tuner as Tuner

#: public name -> the module that defines it
_HOMES = {
    "ACCELERATORS": "flashtask.trainer.devices.accelerators",
    "Accelerator": "flashtask.trainer.devices.accelerators",
    "AdvancedProfiler": "flashtask.trainer.profiling.profilers",
    "BACKBONES": "flashtask.backbones",
    "Backbone": "flashtask.backbones.backbone",
    "Boxes": "flashtask.tasks.predictions",
    "BackboneFinetuning": "flashtask.trainer.callbacks.finetuning_callbacks",
    "BaseFinetuning": "flashtask.trainer.callbacks.finetuning_callbacks",
    "BasePredictionWriter": "flashtask.trainer.callbacks.prediction_writer",
    "BatchSizeSearch": "flashtask.trainer.tuning.batch_size_search",
    "CALLBACKS": "flashtask.trainer.callbacks.callback_registry",
    "CPUAccelerator": "flashtask.trainer.devices.accelerators",
    "CSVLogger": "flashtask.trainer.loggers.csv_logger",
    "CUDAAccelerator": "flashtask.trainer.devices.accelerators",
    "Callback": "flashtask.trainer.callbacks.callback",
    "CombinedLoader": "flashtask.trainer.combined_loader",
    "DataModule": "flashtask.trainer.datamodule",
    "DeviceStatsMonitor": "flashtask.trainer.callbacks.monitors",
    "EMAWeightAveraging": "flashtask.trainer.callbacks.weight_averaging",
    "EarlyStopping": "flashtask.trainer.callbacks.early_stopping",
    "EvaluationEpochLoop": "flashtask.trainer.lightning1.loops",
    "EvaluationLoop": "flashtask.trainer.lightning1.loops",
    "FeatureInfo": "flashtask.core.feature_info",
    "FINETUNING": "flashtask.trainer.finetuning.strategies",
    "Finetuning": "flashtask.trainer.finetuning.strategies",
    "FinishedRun": "flashtask.tasks.finished_run",
    "FitLoop": "flashtask.trainer.lightning1.loops",
    "FitResult": "flashtask.trainer.fit_result",
    "FlashtaskError": "flashtask.core.errors",
    "GradientAccumulationScheduler": "flashtask.trainer.callbacks.accumulation",
    "GradientNormMonitor": "flashtask.trainer.callbacks.monitors",
    "HEADS": "flashtask.heads",
    "IMAGE_LOADERS": "flashtask.data.image_source",
    "ImageClassificationData": "flashtask.data.image_classification",
    "ImageClassifier": "flashtask.tasks.image_classification",
    "ImageData": "flashtask.data.image_data",
    "ImageEmbedder": "flashtask.tasks.image_embedding",
    "LearningCurve": "flashtask.tasks.learning_curve",
    "learning_curve": "flashtask.tasks.learning_curve",
    "ImageRegressionData": "flashtask.data.image_regression",
    "ImageRegressor": "flashtask.tasks.image_regression",
    "InstanceSegmentation": "flashtask.tasks.instance_segmentation",
    "InstanceSegmentationData": "flashtask.data.instance_segmentation",
    "Instances": "flashtask.tasks.instance_predictions",
    "KeypointDetectionData": "flashtask.data.keypoint_data",
    "KeypointDetector": "flashtask.tasks.keypoint_detection",
    "Keypoints": "flashtask.tasks.keypoint_predictions",
    "LOGGERS": "flashtask.trainer.loggers.logger_registry",
    "Label": "flashtask.tasks.predictions",
    "Labels": "flashtask.tasks.predictions",
    "LambdaCallback": "flashtask.trainer.callbacks.callback",
    "LearningRateCurve": "flashtask.trainer.tuning.learning_rate_curve",
    "LearningRateMonitor": "flashtask.trainer.callbacks.monitors",
    "LightningDataModule": "flashtask.trainer.datamodule:DataModule",
    "LightningModule": "flashtask.trainer.module:Module",
    "Logger": "flashtask.trainer.loggers.logger",
    "Loop": "flashtask.trainer.lightning1.loops",
    "Loops": "flashtask.trainer.loop",
    "LowRank": "flashtask.trainer.finetuning.phase",
    "MLFlowLogger": "flashtask.trainer.loggers.mlflow_logger",
    "MPSAccelerator": "flashtask.trainer.devices.accelerators",
    "ManualOptimization": "flashtask.trainer.lightning1.loops",
    "MixedPrecision": "flashtask.trainer.devices.precision",
    "Mask": "flashtask.tasks.masks",
    "ModelCheckpoint": "flashtask.trainer.checkpoints.model_checkpoint",
    "ModelSummary": "flashtask.trainer.callbacks.model_summary",
    "Module": "flashtask.trainer.module",
    "Number": "flashtask.tasks.predictions",
    "Conversion": "flashtask.data.conversion",
    "convert_annotations": "flashtask.data.conversion",
    "ObjectDetectionData": "flashtask.data.object_detection",
    "ObjectDetector": "flashtask.tasks.object_detection",
    "OptimizerLoop": "flashtask.trainer.lightning1.loops",
    "PROFILERS": "flashtask.trainer.profiling.profilers",
    "PassThrough": "flashtask.trainer.profiling.profilers",
    "Phase": "flashtask.trainer.finetuning.phase",
    "Plan": "flashtask.trainer.finetuning_plan",
    "Plateau": "flashtask.trainer.finetuning.phase",
    "Precision": "flashtask.trainer.devices.precision",
    "PlannedRun": "flashtask.tasks.repeats",
    "Prediction": "flashtask.tasks.predictions",
    "PredictionLoop": "flashtask.trainer.lightning1.loops",
    "Preprocessing": "flashtask.core.preprocessing",
    "Profiler": "flashtask.trainer.profiling.profilers",
    "ProgressBar": "flashtask.trainer.callbacks.progress",
    "PyTorchProfiler": "flashtask.trainer.profiling.profilers",
    "RepeatedRuns": "flashtask.tasks.repeats",
    "RichProgressBar": "flashtask.trainer.callbacks.progress_libraries",
    "RichProgressBarTheme": "flashtask.trainer.callbacks.progress_libraries",
    "STRATEGIES": "flashtask.trainer.distribution.process_strategies",
    "ScaledPrecision": "flashtask.trainer.devices.precision",
    "SimpleProfiler": "flashtask.trainer.profiling.profilers",
    "SingleDevice": "flashtask.trainer.distribution.process_strategies",
    "Stage": "flashtask.trainer.finetuning.strategies",
    "StochasticWeightAveraging": "flashtask.trainer.callbacks.stochastic_weight_averaging",
    "Strategy": "flashtask.trainer.distribution.process_strategies",
    "StrategyRegistry": "flashtask.trainer.distribution.process_strategies:STRATEGIES",
    "TASKS": "flashtask.tasks",
    "SampleTable": "flashtask.data.samples",
    "StepOutput": "flashtask.tasks.batches",
    "SemanticSegmentation": "flashtask.tasks.semantic_segmentation",
    "SemanticSegmentationData": "flashtask.data.semantic_segmentation",
    "SpatialReader": "flashtask.data.spatial",
    "TQDMProgressBar": "flashtask.trainer.callbacks.progress_libraries",
    "TargetReader": "flashtask.data.targets",
    "Task": "flashtask.tasks.task",
    "TensorBoardLogger": "flashtask.trainer.loggers.tensorboard_logger",
    "Timer": "flashtask.trainer.callbacks.timing",
    "Trainer": "flashtask.trainer.trainer",
    "TrainingBatchLoop": "flashtask.trainer.lightning1.loops",
    "TrainingEpochLoop": "flashtask.trainer.lightning1.loops",
    "TrainingTypePluginsRegistry": "flashtask.trainer.distribution.process_strategies:STRATEGIES",
    "TruePrecision": "flashtask.trainer.devices.precision",
    "Tuner": "flashtask.trainer.tuning.tuner",
    "TuningResult": "flashtask.trainer.tuning.tune",
    "WandbLogger": "flashtask.trainer.loggers.wandb_logger",
    "WeightAveraging": "flashtask.trainer.callbacks.weight_averaging",
    "build_backbone": "flashtask.backbones",
    "build_pyramid": "flashtask.backbones",
    "build_head": "flashtask.heads",
    "download_data": "flashtask.data.download",
    "load": "flashtask.tasks.loading",
    "read_checkpoint": "flashtask.core.checkpoint",
    "repeat_runs": "flashtask.tasks.repeats",
    "seed_everything": "flashtask.core.seeding",
    "seeded": "flashtask.core.seeding",
    "use_zoo": "flashtask.tasks.own_zoo",
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
