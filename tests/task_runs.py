"""The whole path of an image task, for data of some images: what test_tasks_over_processes.py compares.

`python task_runs.py FOLDER SIZE...` goes it in two processes that `ddp` starts, and leaves what came of it in FOLDER.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import MulticlassF1Score

from flashtask import BasePredictionWriter, Callback, ImageClassificationData, ImageClassifier, Trainer
from flashtask.core.accuracy import Accuracy
from flashtask.core.preprocessing import Preprocessing
from flashtask.data.threads import num_cores

#: Samples of a step, of all processes together.
BATCH = 4
LABELS = ("blue", "red")


class Median(Metric):
    """Of the largest output of each image: it needs all of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("largest", [], dist_reduce_fx="cat")

    def update(self, outputs, targets):
        """Keep a batch's."""
        self.largest.append(outputs.amax(dim=1))

    def compute(self):
        """The one in the middle."""
        return (torch.cat(self.largest) if isinstance(self.largest, list) else self.largest).median()


class Classifier(ImageClassifier):
    """With metric objects of both kinds, in training too; one of them keeps every sample."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.right, self.seen = Accuracy(2), SumMetric()

    def make_metrics(self, num_outputs):
        """Counts, counts by class, and samples."""
        return {**super().make_metrics(num_outputs), "f1": MulticlassF1Score(num_outputs), "median": Median()}

    def training_step(self, batch, batch_idx):
        """Metric objects are given every batch; what they count is logged over the epoch."""
        images, targets = batch
        self.right.update(self(images).float(), targets)
        self.seen.update(torch.ones(len(targets)))
        self.log("train_right", self.right, on_step=False, on_epoch=True)
        self.log("train_seen", self.seen, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Places(BasePredictionWriter):
    """The places of all samples, as a writer is told of them at the end."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.own: list[int] = []

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        """Of this process."""
        assert len(prediction) == len(batch_indices)
        self.own += batch_indices

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        """Of all, with the sizes of the batches that they belong to."""
        assert [len(one) for one in predictions] == [len(one) for one in batch_indices]
        self.all = [place for places in batch_indices for place in places]
        self.by_process = trainer.strategy.gather(self.own)


class Counted(Callback):
    """What each process did: images through the backbone, pictures that it keeps decoded, threads that decode."""

    def setup(self, trainer, module, stage):
        """Before the first batch."""
        self.images = 0
        module.backbone.register_forward_pre_hook(self.count)
        self.facts = trainer.strategy.gather((len(trainer.active_run.data._cache), num_cores()))

    def count(self, module, inputs):
        """Each pass of the backbone."""
        self.images += len(inputs[0])

    def on_fit_end(self, trainer, module):
        """Tell each other."""
        self.by_process = trainer.strategy.gather(self.images)


def classifier(**options: Any) -> Classifier:
    """The same weights each time."""
    torch.manual_seed(7)
    settings = {"backbone": "timm/test_vit", "pretrained": False, "learning_rate": 1e-2, "optimizer": "sgd"}
    made = Classifier(**settings, labels=LABELS, **options)
    made.preprocessing = Preprocessing(input_size=(3, 32, 32))
    return made


def data(processes: int, **folders: Path) -> ImageClassificationData:
    """As many images a step as one process has."""
    return ImageClassificationData.from_folders(**folders, batch_size=BATCH // processes, num_workers=0)


def trainer_of(folder: Path, processes: int, **options: Any) -> Trainer:
    """Quiet, and never the first that was there."""
    several = {"devices": processes, "strategy": "ddp"} if processes > 1 else {}
    quiet = {"enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    run = {"accelerator": "cpu", "precision": "32", "seed": 3, "max_epochs": 2, "output_dir": folder}
    return Trainer(**{**quiet, **run, **several, **options})


def go(root: Path, processes: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Every stage, for every number of images; `root/N` is a folder of N, `root/any/N` the same without classes."""
    found: dict[str, Any] = {"counts": []}
    out = root / f"runs of {processes}"
    for size in sizes:
        folder, module, places = root / str(size), classifier(), Places()
        (found["validate", size],) = trainer_of(out, processes).validate(
            module, datamodule=data(processes, val_folder=folder)
        )
        (found["test", size],) = trainer_of(out, processes).test(module, datamodule=data(processes, test_folder=folder))
        outputs = trainer_of(out, processes, callbacks=[places]).predict(
            module, datamodule=data(processes, predict_folder=root / "any" / str(size))
        )
        found["predict", size] = torch.cat(outputs)
        found["places", size] = (places.all, places.by_process)
        if size > 1:  # a class needs an image
            trainer = trainer_of(out, processes)
            made = data(processes, train_folder=folder, val_folder=root / str(size - 1))
            trainer.finetune(module, datamodule=made, strategy="no_freeze", restore_best=False)
            found["history", size] = trainer.fit_run.history
            found["weights", size] = torch.cat([value.detach().flatten() for value in module.parameters()])
            found["steps", size] = trainer.global_step
    for _ in range(2):
        counted = Counted()
        trainer = trainer_of(out, processes, callbacks=[counted])
        made = data(processes, train_folder=root / "9", val_folder=root / "8")
        torch.manual_seed(7)
        module = ImageClassifier("timm/test_vit", pretrained=False)
        module.preprocessing = Preprocessing(input_size=(3, 32, 32))
        trainer.finetune(module, datamodule=made, strategy="freeze", restore_best=False)
        found["counts"].append((counted.by_process, counted.facts))
    return found


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    result = go(FOLDER, 2, [int(size) for size in sys.argv[2:]])
    torch.save(result, FOLDER / f"found-{os.environ['RANK']}.pt")
