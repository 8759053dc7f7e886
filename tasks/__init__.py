"""What a user asks for: a backbone, a head, a loss, metrics and preprocessing. Importing this loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashtask.core.registry import Registry
from flashtask.core.zoo import ShippedSource

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["TASKS"]

TASKS: Registry[type[Task]] = Registry("task", group="flashtask.tasks")
TASKS.add_source(
    ShippedSource(
        "task",
        {
            "image_classification": "flashtask.tasks.image_classification:ImageClassifier",
            "image_embedding": "flashtask.tasks.image_embedding:ImageEmbedder",
            "image_regression": "flashtask.tasks.image_regression:ImageRegressor",
            "instance_segmentation": "flashtask.tasks.instance_segmentation:InstanceSegmentation",
            "keypoint_detection": "flashtask.tasks.keypoint_detection:KeypointDetector",
            "object_detection": "flashtask.tasks.object_detection:ObjectDetector",
            "semantic_segmentation": "flashtask.tasks.semantic_segmentation:SemanticSegmentation",
        },
    )
)
