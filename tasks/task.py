"""`Task`: a backbone and a head with a loss, metrics and preprocessing, ready for the trainer.

A task of your own is a subclass that gives a `loss` and, if it measures more than that, `make_metrics`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from flashtask.backbones import build_backbone
from flashtask.core.errors import UsageError
from flashtask.core.keywords import named_arguments
from flashtask.core.metrics import is_metric
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.seeding import last_seed
from flashtask.data.image_classification import ImageClassificationData
from flashtask.tasks.building import DrawnHead, building_without_weights, fetches_weights
from flashtask.tasks.fetching import local_file
from flashtask.tasks.prediction import as_items, predictions_of
from flashtask.trainer.finetuning import Freezing
from flashtask.trainer.hyperparameters import find_not_saved, plain_hyperparameters
from flashtask.trainer.module import Module
from flashtask.trainer.optimizers import check_names, make_optimizer, make_scheduler, name_and_options
from flashtask.trainer.stages import resolve_finetuning
from flashtask.trainer.wrapping import own_name

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["Task"]


class Task(Module):
    """Base of tasks on images.

    Args:
        backbone: a registered name (`resnet18`, `timm/NAME`, `torchvision/NAME`, ...), or a module.
        head: a registered name, a module, or None for no head.
        num_outputs: of the head; None leaves the head to `connect`, when the data is known.
        head_options: arguments of the head.
        backbone_options: arguments of the backbone's builder.
        pretrained: load the backbone's weights.
        in_chans: channels of the images.
        learning_rate: of everything outside the backbone.
        backbone_learning_rate: of the backbone; None means a tenth of `learning_rate`, or all of it where the backbone
            is not pretrained.
        optimizer: a class of `torch.optim` in any case, or `(name, {options})`.
        optimizer_options: its other arguments.
        lr_scheduler: `cosine`, `constant`, or a class of `torch.optim.lr_scheduler`; also `(name, {options})`.
        lr_scheduler_options: its arguments.

    Raises:
        UnknownNameError: a name that nothing has.
        HubError, MissingInputError: pretrained weights cannot be had.
    """

    #: The registry key: what checkpoints and recipes call the task.
    name: ClassVar[str] = ""
    #: The data module that a recipe's `data:` section makes.
    data_class: ClassVar[type[Any]] = ImageClassificationData
    default_precision = "auto"
    default_memory_format = "auto"
    sample_noun = "images"

    @named_arguments
    def __init__(
        self,
        backbone: str | nn.Module,
        head: str | nn.Module | None = "linear",
        num_outputs: int | None = None,
        *,
        head_options: Mapping[str, Any] | None = None,
        backbone_options: Mapping[str, Any] | None = None,
        pretrained: bool = True,
        in_chans: int = 3,
        learning_rate: float = 1e-2,
        backbone_learning_rate: float | None = None,
        optimizer: Any = "adamw",
        optimizer_options: Mapping[str, Any] | None = None,
        lr_scheduler: Any = "cosine",
        lr_scheduler_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for what, rate in (
            ("learning_rate", learning_rate),
            ("backbone_learning_rate", backbone_learning_rate),
        ):
            if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0):
                raise UsageError(f"{what} must be a number above 0, not {rate!r}")
        self._optimizer, self._optimizer_options = name_and_options(optimizer, optimizer_options)
        self._schedule, self._schedule_options = name_and_options(lr_scheduler, lr_scheduler_options)
        check_names(self._optimizer, self._schedule)
        fetched = fetches_weights(pretrained)
        built = build_backbone(backbone, pretrained=fetched, in_chans=in_chans, **dict(backbone_options or {}))
        self.backbone, self.num_features = built.module, built.num_features
        self.preprocessing: Preprocessing = built.preprocessing
        self._layer_groups = built.layer_groups
        self._head = DrawnHead(head, head_options or {})
        self.head: nn.Module | None = None
        self.metrics = nn.ModuleDict()
        self.learning_rate = learning_rate
        self._own_backbone_rate, self._backbone_share = backbone_learning_rate, 0.1 if pretrained else 1.0
        if num_outputs is not None:
            self.make_head(num_outputs)

    # ---- what a task of your own defines

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a batch: a scalar.

        Args:
            outputs: of the head, float32.
            targets: as the data gives them.
        """
        raise UsageError(f"{type(self).__name__} has no loss", fix="def loss(self, outputs, targets)")

    def to_targets(self, targets: torch.Tensor) -> torch.Tensor:
        """What the loss and the metrics compare the outputs with; by default the data's targets as they are."""
        return targets

    def make_metrics(self, num_outputs: int) -> dict[str, Metric]:
        """The metrics of validation and test by name, such as `accuracy`; they are logged as `val_accuracy`, ..."""
        return {}

    # ---- the model

    def make_head(self, num_outputs: int) -> None:
        """Build the head, once it is known how many outputs there are; the metrics follow when something is measured.

        The weights are drawn from the trainer's seed, else from that of the last `seed_everything`, else from 0:
        not from what the process has drawn before.
        """
        self.head = self._head.draw(self.num_features, num_outputs, self._seed())
        self.metrics.clear()

    def _seed(self) -> int:
        seed: int = (last_seed() or 0) if self.trainer is None else self.trainer.seed
        return seed

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Outputs of the head for images (B, C, H, W) that were preprocessed as `preprocessing` says."""
        features: torch.Tensor = self.backbone(images)
        if self._head.kind is None:
            return features
        if self.head is None:
            raise UsageError(
                f"{type(self).__name__} does not know yet how many outputs its head has",
                fix="give num_classes, or let trainer.finetune(model, datamodule=data) find it",
            )
        outputs: torch.Tensor = self.head(features)
        return outputs

    def connect(self, datamodule: Any) -> None:
        """Agree with the data on the preprocessing, and before a fit draw an untouched head from the trainer's seed.

        A `preprocessing` that the user set on the data wins, and becomes the task's; else the data is given the
        task's by its method `use_preprocessing`, if it has one.
        """
        self._agree_on_preprocessing(datamodule)
        if self.trainer is not None and self.trainer.active_run is self.trainer.fit_run:
            # So it makes no difference to a run whether `num_classes` was given or learned from the data.
            self._head.redraw(self.head, self._seed())
        self._add_metrics()

    def _add_metrics(self) -> None:
        """Make the metrics if the head is known; prediction has no need of them, nor of torchmetrics."""
        if len(self.metrics) == 0 and self._head.sizes[1]:
            for part in ("val", "test"):
                self.metrics[part] = nn.ModuleDict(self.make_metrics(self._head.sizes[1])).to(self.device)

    def _agree_on_preprocessing(self, datamodule: Any) -> None:
        own = getattr(datamodule, "preprocessing", None)
        if isinstance(own, Preprocessing):
            self.preprocessing = own
        elif hasattr(datamodule, "use_preprocessing"):
            datamodule.use_preprocessing(self.preprocessing)

    # ---- steps

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The loss of a batch, logged as `train_loss` over the epoch."""
        images, targets = batch
        loss = self.loss(self(images).float(), self.to_targets(targets))
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log `val_loss` and the metrics."""
        self._measure(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log `test_loss` and the metrics."""
        self._measure(batch, "test")

    def _measure(self, batch: Any, part: str) -> None:
        images, targets = batch[0], self.to_targets(batch[1])
        outputs = self(images).float()
        self.log(f"{part}_loss", self.loss(outputs, targets))
        self._add_metrics()
        metrics = self.metrics[part]
        assert isinstance(metrics, nn.ModuleDict)
        for name, metric in metrics.items():
            assert is_metric(metric)
            metric.update(outputs, targets)
            self.log(f"{part}_{name}", metric)

    # ---- optimizers and freezing

    @property
    def backbone_learning_rate(self) -> float:
        """The backbone's rate: the user's own, or a share of `learning_rate`, which it then follows."""
        own: float | None = self._own_backbone_rate
        return self.learning_rate * self._backbone_share if own is None else own

    @backbone_learning_rate.setter
    def backbone_learning_rate(self, rate: float) -> None:
        self._own_backbone_rate = rate

    def layer_groups(self) -> list[list[str]]:
        """The backbone's own layer groups, under the task's names."""
        return [[own_name(f"backbone.{name}") for name in group] for group in self._layer_groups]

    def configure_optimizers(self) -> Any:
        """The chosen optimizer, with a parameter group for the head and one for each part that trains later."""
        run = self.trainer.fit_run
        freezing = run.freezing or Freezing(self, resolve_finetuning("no_freeze"))
        rates = {"head": self.learning_rate}
        groups = [
            {
                "params": g.parameters,
                "name": g.name,
                "lr": rates.get(g.name, self.backbone_learning_rate),
                "start": g.start,
            }
            for g in freezing.parameter_groups()
        ]
        optimizer = make_optimizer(self._optimizer, groups, self.learning_rate, **self._optimizer_options)
        schedule = make_scheduler(
            self._schedule, optimizer, run.total_steps, run.steps_before, **self._schedule_options
        )
        return ([optimizer], [] if schedule is None else [vars(schedule)])

    # ---- prediction

    def predict(self, inputs: Any, batch_size: int | None = None, num_workers: int | None = None) -> Any:
        """What the task says about images: one result for one input, a list for a list.

        Args:
            inputs: the path of an image or a PIL image, or a list of them.
            batch_size: images at a time; None decides by the device.
            num_workers: processes that load images; None decides by itself.

        Raises:
            MissingInputError: there is no such file.
            BadDataError: a file is not a whole image.
        """
        items, single = as_items(inputs)
        results = list(self.predictions(items, batch_size, num_workers))
        return results[0] if single else results

    def predictions(
        self, inputs: Sequence[Any], batch_size: int | None = None, num_workers: int | None = None
    ) -> Iterator[Any]:
        """Results one by one, in the order of the inputs, as they are computed."""
        items, _ = as_items(inputs)
        yield from predictions_of(self, items, batch_size, num_workers)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        """Outputs of a batch of images, float32; targets are ignored if there are any."""
        images = batch[0] if isinstance(batch, (list, tuple)) else batch
        outputs: torch.Tensor = self(images).float()
        return outputs

    def to_predictions(self, outputs: torch.Tensor, paths: Sequence[str | None]) -> Sequence[Any]:
        """What `predict` returns for each image: its row of outputs, unless the task says more."""
        return list(outputs.cpu())

    # ---- what files hold

    def describe(self) -> dict[str, Any]:
        """The registry key and the preprocessing."""
        return {"task": self.name, "preprocessing": self.preprocessing.to_dict()}

    def recipe(self) -> dict[str, Any] | None:
        """The recipe's `task` and `model` sections; None if an argument was an object and not a name."""
        arguments = plain_hyperparameters(self)
        if not self.name or any(find_not_saved(arguments)):
            return None
        return {"task": self.name, "model": arguments}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the preprocessing that the weights were trained with."""
        if "preprocessing" in checkpoint:
            self.preprocessing = Preprocessing.from_dict(checkpoint["preprocessing"])
            if self.trainer is not None:
                self._agree_on_preprocessing(self.trainer.active_run.data)

    def resolved_hyperparameters(self) -> dict[str, Any]:
        """The learning rates, if the task has such arguments: one may follow from the other, both may be found."""
        if "learning_rate" not in vars(self):
            return {}
        names = ("learning_rate", "backbone_learning_rate")
        return {name: getattr(self, name) for name in names if name in self.argument_names()}

    @classmethod
    def argument_names(cls) -> list[str]:
        """Every argument that the task can be made with, those of its parents included: what a recipe may name."""
        names: dict[str, None] = {}
        for parent in cls.__mro__:
            if issubclass(parent, Task):
                parameters = inspect.signature(parent.__init__).parameters.values()
                names |= {p.name: None for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
                if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                    break
        return [name for name in names if name not in ("self", "num_outputs")]

    @classmethod
    def rebuild(cls, arguments: dict[str, Any]) -> Self:
        """A checkpoint brings its own weights, so nothing is fetched to build the module that takes them."""
        with building_without_weights():
            return cls(**arguments)

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = None, strict: bool = True, **given: Any
    ) -> Self:
        """As `Module.load_from_checkpoint`; an address (https) is downloaded to the cache first."""
        return super().load_from_checkpoint(local_file(checkpoint_path), map_location, strict, **given)
