"""`Task`: a backbone and a head with a loss, metrics and preprocessing, ready for the trainer.

A task of your own is a subclass that gives a `loss` and, if it measures more than that, `make_metrics`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import nn

from flashtask.backbones import build_backbone
from flashtask.backbones.default import AUTO, default_backbone, installed_backbone
from flashtask.backbones.descriptions import check_stored_backbone, stored_arguments
from flashtask.backbones.sizes import as_image_size, build_for_size, depth_option
from flashtask.core.bounded_building import no_larger_than
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.feature_info import FEATURE_KINDS
from flashtask.core.keywords import named_arguments
from flashtask.core.metrics import is_metric
from flashtask.core.number_checks import is_number
from flashtask.core.preprocessing import Preprocessing, check_resize, resized_by, stored_preprocessing
from flashtask.core.seeding import fresh_seed, generator_states, last_seed, set_generator_states
from flashtask.data.audit import Examined
from flashtask.data.image_classification import ImageClassificationData
from flashtask.data.image_source import FILES, ImageSource, loader_of_model, source_of_files, stored_loader
from flashtask.data.inputs import Input, read_inputs
from flashtask.data.pictures import Pictures
from flashtask.data.samples import WeightedTargets
from flashtask.heads import features_taken
from flashtask.reports.judgement import Judgement, Scoring
from flashtask.tasks import TASKS
from flashtask.tasks.batches import (
    StepOutput,
    batch_row,
    describe_prediction,
    images_and_targets,
    images_of,
    preprocessing_for,
)
from flashtask.tasks.fetching import local_file
from flashtask.tasks.head_drawing import DrawnHead, building_without_weights, check_weights, fetches_weights
from flashtask.tasks.licences import STATED, checked_statements, licences_in, record_of
from flashtask.tasks.mixing import Mixing, mixed_images, rolled
from flashtask.tasks.own_class import Lack, describe_class
from flashtask.tasks.own_zoo import own_names, require_own_names
from flashtask.tasks.prediction import inference_copy, predictions_of
from flashtask.tasks.predictions import Prediction
from flashtask.tasks.recipe_source import recipe_arguments
from flashtask.trainer.batch_transfer import in_dtype
from flashtask.trainer.devices.precision import Precision
from flashtask.trainer.features import FrozenFeatures
from flashtask.trainer.finetuning.freezing import Freezing
from flashtask.trainer.finetuning.strategies import resolve_finetuning
from flashtask.trainer.fit_result import fit_result
from flashtask.trainer.hyperparameters import find_not_saved, plain_hyperparameters
from flashtask.trainer.metric_order import direction_of
from flashtask.trainer.module import Module
from flashtask.trainer.optimizers import (
    check_names,
    make_optimizer,
    make_scheduler,
    name_and_options,
    weight_decay_of,
)
from flashtask.trainer.run_record import provenance_in
from flashtask.trainer.wrapping import parameters_by_name, unwrapped_name

if TYPE_CHECKING:
    from torchmetrics import Metric

    from flashtask.core.accuracy import Accuracy
    from flashtask.tasks.export.exporting import Export
    from flashtask.tasks.export.outputs import Outputs
    from flashtask.tasks.finished_run import FinishedRun
    from flashtask.trainer.trainer import Trainer

__all__ = ["Task"]

#: Arguments that say how gradient steps train a head.
_OF_STEPS: tuple[str, ...] = ("optimizer", "optimizer_options", "learning_rate", "weight_decay")
_OF_STEPS += ("lr_scheduler", "lr_scheduler_options", "drop_path_rate", "loss_fn", "label_smoothing")


class Task(Module):
    """Base of tasks on images.

    Args:
        backbone: a registered name (`resnet18`, `timm/NAME`, `torchvision/NAME`, ...), or a module; `auto` is one whose
            weights are installed, else `resnet18`.
        head: a registered name, a module, or None for no head. Its `takes` decides what the backbone gives: one vector
            an image, maps at several scales, or tokens.
        num_outputs: of the head; None leaves the head to `connect`, when the data is known.
        head_options: arguments of the head.
        backbone_options: arguments of the backbone's builder.
        image_size: pixels of a square image, or (height, width), in place of the backbone's own size. Position
            embeddings are resampled; a size that the backbone cannot take is rounded up, and the fit says so.
        resize: `crop` (the shorter side is resized, then the centre cropped), `pad` (the longer side is resized, then
            the rest filled with the mean), `squash` (both sides), or for `SemanticSegmentation` `tile` (nothing is
            resized, and images are cut into as many tiles as cover them); None means the backbone's own way.
        tile_overlap: with `resize="tile"` the share of a tile, along each side, that the next one has too; 0.25 if not
            given.
        drop_path_rate: stochastic depth of the backbone in training, from 0 to below 1; None means its own.
        mixup_alpha: MixUp of the training batches with shares from Beta(alpha, alpha), such as 0.2; 0 for none.
        cutmix_alpha: CutMix, such as 1.0; with both, each batch gets one of the two by equal chances.
        pretrained: load the backbone's weights.
        in_chans: channels of the images.
        learning_rate: of everything outside the backbone.
        backbone_learning_rate: of the backbone; None means a tenth of `learning_rate`, or all of it where the backbone
            is not pretrained.
        optimizer: a class of `torch.optim` in any case; a name of timm's factory, such as `lamb`, or `timm/adamw` where
            torch has one of this name too; or `(name, {options})`.
        optimizer_options: its other arguments.
        weight_decay: of the weights, 0 or more; None means the optimizer's own default (`adamw`: 0.01). Biases, the
            weights of norms and whatever else has one dimension or none are never decayed, nor what the backbone names
            in timm's `no_weight_decay()`, such as position embeddings.
        lr_scheduler: `cosine`, `constant`, or a class of `torch.optim.lr_scheduler`; also `(name, {options})`.
        lr_scheduler_options: its arguments.
        monitor: the metric that decides which epoch is best, for checkpoints and early stopping, such as `val_f1_macro`
            or `val_loss`; None means the task's own.

    Raises:
        UnknownNameError: a name that nothing has.
        UsageError: a head that takes features which the task's heads do not take, or the backbone does not have.
        HubError, MissingInputError: pretrained weights cannot be had.
    """

    #: The registry key: what checkpoints and recipes call the task.
    name: ClassVar[str] = ""
    #: The data module that a recipe's `data:` section makes.
    data_class: ClassVar[type[Any]] = ImageClassificationData
    #: What `to_predictions` gives for each sample.
    prediction_class: ClassVar[type[Prediction]] = Prediction
    default_strategy = "freeze"
    default_max_epochs = 10
    default_precision = "auto"
    default_memory_format = "auto"
    #: What `resize` means where it is not given; None for the backbone's own way.
    default_resize: ClassVar[str | None] = None
    #: Whether images may be cut into tiles, whose outputs the task joins.
    takes_tiles: ClassVar[bool] = False
    libraries = ("timm", "torchvision")
    sample_noun = "images"
    #: The kinds of features that its heads may take. A task without a head gets the first from its backbone.
    heads_take: ClassVar[tuple[str, ...]] = tuple(FEATURE_KINDS)
    #: Let `validate` and `test` give the metrics of each class too, by label: `val_f1_cat`.
    per_class = False
    #: What the hub calls such models, if it has a word for them.
    pipeline_tag: ClassVar[str | None] = None
    #: Where the weights were read from: `{"repository", "commit"}` on the hub, `{"path", "sha256"}` of a file, or None.
    pretrained_from: dict[str, str] | None = None
    #: Settings of the class that the arguments of the object replace.
    _set_by_arguments: Mapping[str, Any] = MappingProxyType({})
    _target_description: dict[str, Any] | None = None
    _load_image: Any = None
    #: Licences that the user states for this model; those of the file that its weights were read from.
    _licences: Mapping[str, str] = MappingProxyType({})
    _licences_of_source: Mapping[str, Any] | None = None
    #: The targets of the data are places in the image, as masks and boxes are.
    _has_spatial_targets = False
    #: The head is not the one that came with these weights.
    _has_new_head = False
    #: The batches of the fit will tell how large its images are.
    _awaits_size = False
    _awaits_batch = False
    #: What `load` could not bring with it.
    _lack: Lack | None = None
    #: What a file said of the class that made these weights, where this is another one that only predicts with them.
    _class_of_weights: dict[str, Any] | None = None
    #: Called with what each batch that is validated or tested gave, and with what metrics are updated with.
    keep_measured: Callable[[StepOutput, tuple[Any, Any]], None] | None = None
    #: Weights were loaded since the model was made, or read from the place that `pretrained_from` names.
    _has_other_weights = False

    @named_arguments
    def __init__(
        self,
        backbone: str | nn.Module,
        head: str | nn.Module | None = "linear",
        num_outputs: int | None = None,
        *,
        head_options: Mapping[str, Any] | None = None,
        backbone_options: Mapping[str, Any] | None = None,
        image_size: int | Sequence[int] | None = None,
        resize: str | None = None,
        tile_overlap: float | None = None,
        drop_path_rate: float | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        pretrained: bool = True,
        in_chans: int = 3,
        learning_rate: float = 1e-2,
        backbone_learning_rate: float | None = None,
        optimizer: Any = "adamw",
        optimizer_options: Mapping[str, Any] | None = None,
        weight_decay: float | None = None,
        lr_scheduler: Any = "cosine",
        lr_scheduler_options: Mapping[str, Any] | None = None,
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(monitor, str | None):
            raise UsageError(f"monitor must be the name of a metric, not {monitor!r}", fix='monitor="val_loss"')
        self._asked_monitor = monitor
        if monitor is not None:
            self._set_attributes(monitor=monitor)
        for what, rate in (
            ("learning_rate", learning_rate),
            ("backbone_learning_rate", backbone_learning_rate),
        ):
            if rate is not None and not (is_number(rate) and rate > 0):
                raise UsageError(f"{what} must be a number above 0, not {rate!r}")
        if weight_decay is not None and not (is_number(weight_decay) and weight_decay >= 0):
            raise UsageError(f"weight_decay must be a number of 0 or more, not {weight_decay!r}")
        check_resize(resize)
        if tile_overlap is not None and resize != "tile":
            raise UsageError("tile_overlap is for images that are cut into tiles", fix='resize="tile"')
        self._mixing = Mixing(mixup_alpha, cutmix_alpha)
        self._optimizer, self._optimizer_options = name_and_options(optimizer, optimizer_options)
        if weight_decay is not None:
            if "weight_decay" in self._optimizer_options:
                raise UsageError("weight_decay is in optimizer_options too", fix="drop one of them")
            self._optimizer_options["weight_decay"] = weight_decay
        self._schedule, self._schedule_options = name_and_options(lr_scheduler, lr_scheduler_options)
        check_names(self._optimizer, self._schedule)
        gives = self._features_wanted(head)
        if not isinstance(pretrained, bool):
            raise UsageError(
                f"pretrained must be True or False, not {pretrained!r}",
                why="which weights a backbone has is part of its name",
                fix='backbone="resnet50.a1_in1k"; weights="FILE" in backbone_options takes a file',
            )
        fetched = fetches_weights(pretrained)
        options = dict(backbone_options or {})
        if pretrained and not fetched:
            options.pop("weights", None)  # a checkpoint brings its own
        self._drawn_from = None if pretrained else fresh_seed()
        #: The backbone that was taken because none was named; None if one was.
        self.chosen_backbone: str | None = default_backbone() if backbone == AUTO else None
        backbone = self.chosen_backbone or backbone
        options |= depth_option(backbone, drop_path_rate, options)
        self._asked_size, self._resize = None if image_size is None else as_image_size(image_size), resize
        build = build_backbone if self._asked_size is None else partial(build_for_size, image_size=self._asked_size)
        built = build(backbone, pretrained=fetched, in_chans=in_chans, gives=gives, **options)
        self._built_by = stored_arguments(backbone, built, backbone_options or {})
        if self.chosen_backbone:
            self._built_by["backbone"] = self.chosen_backbone
        self.backbone, self.num_features = built.module, built.num_features
        #: What the backbone gives: its kind, channels, reductions.
        self.feature_info = built.features
        self._preprocessing = resized_by(built.preprocessing.resolved(), resize or self.default_resize, tile_overlap)
        self._refuse_tiles(self._preprocessing)
        #: Of the backbone, of a checkpoint, or learned from batches: what the user sets in its place wins.
        self._own_preprocessing = self.preprocessing
        self._preprocessing_of_weights: Preprocessing = self.preprocessing
        self._layer_groups = built.layer_groups
        self._own_names = own_names(backbone, head)
        self._head = DrawnHead(head, head_options or {})
        self.head: nn.Module | None = None
        self.metrics = nn.ModuleDict()
        self.learning_rate = learning_rate
        self._own_backbone_rate, self._backbone_share = backbone_learning_rate, 0.1 if pretrained else 1.0
        self._is_pretrained = pretrained
        if num_outputs is not None:
            self.make_head(num_outputs)

    @classmethod
    def _features_wanted(cls, head: str | nn.Module | None) -> str:
        """The kind of features that the backbone is to give, checked before anything is built."""
        if head is None:
            return cls.heads_take[0]
        takes = features_taken(head)
        if takes not in cls.heads_take:
            shown = head if isinstance(head, str) else type(head).__name__
            raise UsageError(
                f"the head {shown!r} takes {takes}, and the heads of {cls.__name__} take {' or '.join(cls.heads_take)}",
                fix="flashtask zoo heads",
            )
        return takes

    @property
    def preprocessing(self) -> Preprocessing:
        """The images that the model takes: size, crop, normalisation. Fields left out when it is set keep their values.

        Raises:
            UsageError: when it is set to a record for another number of channels.
        """
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, value: Preprocessing) -> None:
        filled = value.filled_from(self._preprocessing)  # refuses another number of channels
        self._refuse_tiles(filled)
        self._preprocessing = value if value.is_complete else filled

    def _refuse_tiles(self, preprocessing: Preprocessing) -> None:
        if preprocessing.crop_mode == "tile" and not self.takes_tiles:
            raise UsageError(
                f"{type(self).__name__} takes whole images, which are not cut into tiles",
                fix='resize="pad", with a larger image_size for small objects',
            )

    @property
    def awaits_size(self) -> bool:
        """Whether the first batch of the fit will tell how large images are, because its loaders do not."""
        return self._awaits_size

    @property
    def target_description(self) -> dict[str, Any] | None:
        """How the targets of the training data are read, as `TargetReader.to_dict` says it; None if it is not known."""
        return self._target_description

    @property
    def load_image(self) -> Any:
        """What reads the files that are predicted on, as it read those of the training data; None for image files.

        A name in `IMAGE_LOADERS`, or a function from a path to an array (H, W) or (H, W, C), a tensor or a PIL image.
        `{"not_saved": NAME}` for a function without a registered name, once the model comes from a file.

        Raises:
            UsageError: when it is set to something else.
            UnknownNameError: when it is set to a name that is not registered.
        """
        return self._load_image

    @load_image.setter
    def load_image(self, value: Any) -> None:
        self._load_image = source_of_files(value).given

    @property
    def licences(self) -> dict[str, str]:
        """The licences that are stated for the `data` it was trained on and for its `weights`, by these words.

        They are stored with the model. Those of a model that was read from a file are its own until it is trained
        further; then they are those of what it began from.

        Raises:
            UsageError: when it is set to something else than texts under these words.
        """
        record = self.licence_record()
        return {name: record[name] for name in STATED if isinstance(record.get(name), str)}

    @licences.setter
    def licences(self, value: Mapping[str, str]) -> None:
        self._licences = checked_statements(value)

    def licence_record(self) -> dict[str, Any]:
        """The licences of all that the model is made of, as far as they are known; see docs/licences.md."""
        before = self._licences_of_source
        if before is not None and not self._is_trained_further():
            return {**before, **self._licences}
        return record_of(plain_hyperparameters(self), self._licences, before, self.pretrained_from)

    def _is_trained_further(self) -> bool:
        """Whether its weights may be other ones than those of the file that it was read from."""
        run = self.trainer.fit_run if self.trainer is not None else None
        return self.was_fitted or (run is not None and run.module is self)

    def read_inputs(self, inputs: Any) -> tuple[Sequence[Input], bool]:
        """All pictures that `predict` was given, files read by `load_image`; and whether it is one rather than a list.

        Raises:
            UsageError: something else; the message lists what is taken. Or there are files, and the function that read
                those of the training data is not here.
            MissingInputError: there is no such file.
        """
        if self._load_image is None:
            return (inputs, False) if isinstance(inputs, Pictures) else read_inputs(inputs)
        loader = cache(lambda: loader_of_model(self._load_image))  # which arrays do without
        if isinstance(inputs, Pictures):
            return inputs.read_by(loader()), False
        items, single = read_inputs(inputs, lambda name: loader().is_image(name))
        if any(one.is_file for one in items):
            items = list(map(loader().reading, items))
        return items, single

    # ---- what a task of your own defines

    def loss(self, outputs: Any, targets: Any) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """The loss of a batch: a scalar, or several by name, which are added up and logged one by one.

        Args:
            outputs: of the head, float32: a tensor, or tensors in lists, tuples and dictionaries.
            targets: as `to_targets` gives them.
        """
        raise UsageError(f"{type(self).__name__} has no loss", fix="def loss(self, outputs, targets)")

    def weighted_loss(
        self, outputs: Any, targets: Any, weights: torch.Tensor
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """The training loss where samples have weights: the mean over the batch of loss times weight.

        By default `loss` is called for each sample. A task whose loss can give one value a sample does that at once.

        Args:
            outputs: as for `loss`.
            targets: as for `loss`.
            weights: (B,) float32, 1 on average over the training samples.
        """
        size = len(weights)
        each: list[Any] = [self.loss(batch_row(outputs, row), batch_row(targets, row, size)) for row in range(size)]
        if isinstance(each[0], Mapping):
            return {name: (torch.stack([one[name] for one in each]) * weights).mean() for name in each[0]}
        return (torch.stack(each) * weights).mean()

    def to_targets(self, targets: Any) -> Any:
        """What the loss and the metrics compare the outputs with; by default the data's targets as they are."""
        return targets

    def postprocess(self, outputs: Any) -> Any:
        """What predictions and metrics are made of: probabilities, or numbers in their own unit.

        Args:
            outputs: of the head, float32; by default they are taken as they are.

        Returns:
            A tensor with a row for each sample, or a list with an element for each.
        """
        return outputs

    def metric_inputs(self, step: StepOutput) -> tuple[Any, Any]:
        """What each metric is updated with: the postprocessed outputs and the targets of a batch."""
        return self.postprocess(step.outputs), step.targets

    def make_metrics(self, num_outputs: int) -> Mapping[str, Metric | Accuracy]:
        """The metrics of validation and test by name, such as `accuracy`; they are logged as `val_accuracy`, ..."""
        return {}

    def make_class_metrics(self, num_outputs: int) -> Mapping[str, Metric]:
        """Metrics with a number for each class (`average=None` in torchmetrics), used while `per_class` is set.

        They are updated as those of `make_metrics`, and logged by the names of `output_names`: `val_f1_cat`.
        """
        return {}

    def asked_class_metrics(self, num_outputs: int) -> Mapping[str, Metric]:
        """Metrics with a number for each class that are logged in every validation and test, in a fit too."""
        return {}

    def output_names(self, num_outputs: int) -> Sequence[str]:
        """What the outputs are called, in their order: labels, or names of numbers. By default their positions."""
        return tuple(map(str, range(num_outputs)))

    @property
    def scoring(self) -> Scoring:
        """How `judge` judges, and which metric a report gives with an interval; by default the mean loss."""
        return Scoring()

    def judge(self, step: StepOutput, inputs: tuple[Any, Any]) -> list[Judgement]:
        """How good the prediction for each sample of a batch is, for reports; by default only its loss is known.

        Args:
            step: of the batch, in validation or test.
            inputs: what `metric_inputs` gives for it.
        """
        size = len(self.postprocess(step.outputs))
        rows = ((batch_row(step.outputs, row), batch_row(step.targets, row, size)) for row in range(size))
        losses = (StepOutput.of(self.loss(*row), *row).loss for row in rows)
        return [Judgement(float(loss)) for loss in losses]

    # ---- the model

    def make_head(self, num_outputs: int) -> None:
        """Build the head, once it is known how many outputs there are; the metrics follow when something is measured.

        The weights are drawn from the trainer's seed, else from that of the last `seed_everything`, else from 0:
        not from what the process has drawn before.
        """
        self.head = self._head.draw(self.feature_info, num_outputs, self._seed())
        self.metrics.clear()

    def change_classes(self, labels: Sequence[str] | None = None, num_classes: int | None = None) -> Any:
        """Give the model other classes than it was trained with.

        Raises:
            UsageError: the task has no classes.
        """
        raise UsageError(f"{type(self).__name__} has no classes that could be changed")

    def _seed(self) -> int:
        seed: int = (last_seed() or 0) if self.trainer is None else self.trainer.seed
        return seed

    def forward(self, images: torch.Tensor) -> Any:
        """Outputs of the head for images (B, C, H, W) that were preprocessed as `preprocessing` says."""
        features = self._features(images)
        if self._head.kind is None:
            return features
        if self.head is None:
            raise self._unknown_outputs()
        return self.head(features)

    def _unknown_outputs(self) -> UsageError:
        return UsageError(
            f"{type(self).__name__} does not know yet how many outputs its head has",
            fix="give num_classes, or let trainer.finetune(model, datamodule=data) find it",
        )

    def _features(self, images: Any) -> Any:
        """The backbone's features of images, or those that were computed of them before."""
        return images.values if isinstance(images, FrozenFeatures) else self.backbone(images)

    def connect(self, datamodule: Any) -> None:
        """Agree with the data on the preprocessing, and before a fit draw an untouched head from the trainer's seed.

        What the user set in the data's `preprocessing` wins, field by field, and becomes the task's. The data is given
        the task's by its method `use_preprocessing`, if it has one.

        Raises:
            UsageError: the data's own is for another number of channels.
        """
        if self._lack is not None and self.trainer is not None:
            self._lack.require_none(self.trainer.current_run.stage)
        self._agree_on_preprocessing(datamodule)
        self.agree_on_targets(datamodule)
        self._has_spatial_targets = bool(getattr(datamodule, "has_spatial_targets", False))
        self._awaits_size = False
        if self._begins_a_fit():
            self._load_image = getattr(datamodule, "load_image", None)
            takes_ours = hasattr(datamodule, "preprocessing") or hasattr(datamodule, "use_preprocessing")
            self._awaits_size = not takes_ours and self.preprocessing is self._own_preprocessing
            self._say_choices()
            self._require_that_mixing_is_possible()
            self._awaits_batch = True
            # So it makes no difference to a run whether `num_classes` was given or learned from the data.
            self._head.redraw(self.head, self._seed())
        self._add_metrics()
        self._check_monitor()

    def agree_on_targets(self, datamodule: Any) -> None:
        """Read the data's targets as those were read that the model was trained on; a first fit learns them from it.

        Raises:
            UsageError: targets of another kind.
            BadDataError: targets that the model does not know.
        """
        if not hasattr(datamodule, "use_targets"):
            return
        if self.target_description is not None:
            datamodule.use_targets(self.target_description)
        elif self._begins_a_fit():
            self._target_description = datamodule.targets

    def _begins_a_fit(self) -> bool:
        return self.trainer is not None and self.trainer.active_run is self.trainer.fit_run

    def _learn_size(self, batch: Any) -> None:
        """Take the size at which files are predicted from the first batch of a fit, where the data does not state it.

        Where it does, a transform that gives images of another size is reported.
        """
        if not self._awaits_batch:
            return
        self._awaits_batch = False
        images, _ = images_and_targets(batch)
        if not self._awaits_size:
            size = self.preprocessing.input_size[1:]
            if isinstance(images, torch.Tensor) and images.ndim == 4 and images.shape[-2:] != size:
                height, width = images.shape[-2:]
                self.trainer.say(
                    f"the transform gives training images of {height} x {width}; "
                    f"validation and prediction take {size[0]} x {size[1]}"
                )
            return
        self._awaits_size = False
        self.preprocessing = self._own_preprocessing = preprocessing_for(images, self.preprocessing)
        if self.trainer.enable_model_summary:
            self.trainer.say(describe_prediction(self.preprocessing))

    def _require_that_mixing_is_possible(self) -> None:
        """Refuse MixUp and CutMix where a loss of two targets has no meaning, or would not be computed."""
        if not self._mixing:
            return
        fix = "leave it out"
        if self._has_spatial_targets:
            raise UsageError(f"{self._mixing.described}: targets that are places in the image cannot be mixed", fix=fix)
        if getattr(self.head_to_solve(), "requires_solving", False):
            raise UsageError(f"{self._mixing.described}: the head {self._head.kind!r} is solved, not trained", fix=fix)
        if type(self).shared_step is not Task.shared_step:
            raise UsageError(f"{self._mixing.described}: {type(self).__name__} has a shared_step of its own", fix=fix)

    @property
    def choice_of_backbone(self) -> str:
        """Which backbone was taken where none was named, and why; empty where one was."""
        if not self.chosen_backbone:
            return ""
        here = "its weights are installed" if self.chosen_backbone == installed_backbone() else "small and common"
        return f"backbone {self.chosen_backbone}: none was named; {here}"

    def _say_choices(self) -> None:
        """The backbone that was taken where none was named, and the size that `image_size` was rounded up to."""
        if self.chosen_backbone and self.trainer.enable_model_summary:
            self.trainer.say(self.choice_of_backbone)
        asked, used = self._asked_size, self._own_preprocessing.input_size[1:]
        if asked is not None and asked != used and self.trainer.enable_model_summary:
            self.trainer.say(
                f"image_size: {asked[0]} x {asked[1]} is rounded up to {used[0]} x {used[1]}, the next size that the "
                "backbone takes"
            )

    def _add_metrics(self) -> None:
        """Make the metrics if the head is known; prediction has no need of them."""
        if len(self.metrics) == 0 and self._head.sizes[1]:
            for part in ("val", "test"):
                self.metrics[part] = nn.ModuleDict(dict(self.make_metrics(self._head.sizes[1]))).to(self.device)
                asked = dict(self.asked_class_metrics(self._head.sizes[1]))
                self.metrics[f"{part}_asked_by_class"] = nn.ModuleDict(asked).to(self.device)
        if self.per_class and self._head.sizes[1] and "val_by_class" not in self.metrics:
            for part in ("val_by_class", "test_by_class"):
                self.metrics[part] = nn.ModuleDict(dict(self.make_class_metrics(self._head.sizes[1]))).to(self.device)

    def _check_monitor(self) -> None:
        """The metric that `monitor` names is one that validation measures; its direction is that of the metric.

        Raises:
            UnknownNameError: it is not, with the nearest names.
        """
        name, metrics = self._asked_monitor, self.metrics
        if name is None or "val" not in metrics or not self._begins_a_fit() or self._has_own_steps("fit"):
            return
        whole: dict[str, Any] = {f"val_{one}": metric for one, metric in dict(metrics["val"].items()).items()}  # type: ignore[operator]
        for one, metric in dict(metrics["val_asked_by_class"].items()).items():  # type: ignore[operator]
            whole |= {f"val_{one}_{label}": metric for label in self.output_names(self._head.sizes[1])}
        if name not in whole and name not in ("val_loss", "train_loss"):
            raise UnknownNameError("metric to monitor", name, ["val_loss", *whole, "train_loss"])
        if direction_of(name) is None:
            is_higher = getattr(whole[name], "higher_is_better", None)
            if is_higher is not None:
                self._set_attributes(monitor_mode="max" if is_higher else "min")

    def _set_attributes(self, **values: Any) -> None:
        """Give settings of the class the values that arguments ask for; the recipe of a run has the arguments."""
        self._set_by_arguments = {**self._set_by_arguments, **values}
        vars(self).update(values)

    def data_is_set_up(self, datamodule: Any) -> None:
        """Take what the data has made of the preprocessing: with the value range of its training images."""
        used = getattr(datamodule, "used_preprocessing", None)
        if isinstance(used, Preprocessing):
            self.preprocessing = used

    def _agree_on_preprocessing(self, datamodule: Any) -> None:
        own = getattr(datamodule, "preprocessing", None)
        if isinstance(own, Preprocessing):
            self._refuse_two_sizes(own)
            self.preprocessing = own
        if hasattr(datamodule, "use_preprocessing"):
            datamodule.use_preprocessing(self.preprocessing)
        self.data_is_set_up(datamodule)

    def _refuse_two_sizes(self, of_data: Preprocessing) -> None:
        """`image_size` and `resize` are not contradicted by the preprocessing that was set on the data.

        Raises:
            UsageError: they are.
        """
        asked = {"image_size": (self._asked_size, "input_size"), "resize": (self._resize, "crop_mode")}
        for argument, (given, field) in asked.items():
            own, theirs = getattr(self._own_preprocessing, field), getattr(of_data, field)
            if given is not None and field in of_data.given and own[-2:] != theirs[-2:]:
                raise UsageError(
                    f"{argument} of the model means {field}={own}, but the preprocessing of the data has {theirs}",
                    fix="set one of them",
                )

    # ---- steps

    def shared_step(self, batch: Any) -> StepOutput:
        """The forward pass and the loss of a batch, for training, validation and test alike.

        Args:
            batch: images (B, C, H, W) and targets; in training `WeightedTargets`, if the samples have weights.
        """
        images, targets = images_and_targets(batch)
        targets, weights = self._read_targets(targets)
        outputs = in_dtype(self(images), torch.float32)
        return StepOutput.of(self._loss_of(outputs, targets, weights), outputs, targets)

    def _read_targets(self, targets: Any) -> tuple[Any, torch.Tensor | None]:
        """The targets of a batch as the loss takes them, and the weights of its samples, if they have any."""
        weights = None
        if isinstance(targets, WeightedTargets):
            targets, weights = targets
        return self.to_targets(targets), weights

    def _loss_of(
        self, outputs: Any, targets: Any, weights: torch.Tensor | None
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        return self.loss(outputs, targets) if weights is None else self.weighted_loss(outputs, targets, weights)

    def _mixed_step(self, batch: Any, batch_idx: int) -> StepOutput:
        """As `shared_step`, with images mixed two by two: the loss is that of both targets, by their shares."""
        images, targets = images_and_targets(batch)
        targets, weights = self._read_targets(targets)
        run = self.trainer.current_fit
        kept, box = self._mixing.draw(run.seed, run.epoch, batch_idx, images.shape[-2:])
        outputs = in_dtype(self(mixed_images(images, kept, box)), torch.float32)
        of_own = self._loss_of(outputs, targets, weights)
        of_others = self._loss_of(outputs, rolled(targets), None if weights is None else rolled(weights))
        if not isinstance(of_own, Mapping):
            assert isinstance(of_others, torch.Tensor)
            return StepOutput(kept * of_own + (1 - kept) * of_others, outputs, targets)
        assert isinstance(of_others, Mapping)
        parts = {name: kept * loss + (1 - kept) * of_others[name] for name, loss in of_own.items()}
        return StepOutput.of(parts, outputs, targets)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The loss of a batch, logged as `train_loss` over the epoch, and its parts as `train_loss_NAME`."""
        self._learn_size(batch)
        step = self._mixed_step(batch, batch_idx) if self._mixing else self.shared_step(batch)
        self._log_loss(step, "train", on_step=False, on_epoch=True)
        return step.loss

    def _log_loss(self, step: StepOutput, part: str, **options: Any) -> None:
        self.log(f"{part}_loss", step.loss, sync_dist=True, **options)
        for name, value in step.loss_parts.items():
            self.log(f"{part}_loss_{name}", value, sync_dist=True, **options)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log `val_loss` and the metrics."""
        self._measure(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log `test_loss` and the metrics."""
        self._measure(batch, "test")

    def _measure(self, batch: Any, part: str) -> None:
        step = self.shared_step(batch[:2] if isinstance(batch, (list, tuple)) else batch)
        self._log_loss(step, part)
        self._add_metrics()
        metrics, inputs = self.metrics[part], self.metric_inputs(step)
        if self.keep_measured is not None:
            self.keep_measured(step, inputs)
        assert isinstance(metrics, nn.ModuleDict)
        for name, metric in metrics.items():
            assert is_metric(metric)
            metric.update(*inputs)
            self.log(f"{part}_{name}", metric)
        for metric in self._class_metrics(part).values():
            metric.update(*inputs)

    def _class_metrics(self, part: str) -> Mapping[str, Any]:
        """The metrics by class that were asked for, and with `per_class` all, but not in a fit: a column each."""
        is_in_fit = getattr(self.trainer.active_run, "parent", None) is not None
        wanted = ["asked_by_class"] if is_in_fit or not self.per_class else ["asked_by_class", "by_class"]
        found: dict[str, Any] = {}
        for kind in wanted:
            metrics: Any = dict(self.metrics.items()).get(f"{part}_{kind}")  # not there before the first batch
            found |= {} if metrics is None else dict(metrics.items())
        return found

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of each class, if they were asked for."""
        self._log_class_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of each class, if they were asked for."""
        self._log_class_metrics("test")

    def _log_class_metrics(self, part: str) -> None:
        names = self.output_names(self._head.sizes[1])
        for name, metric in self._class_metrics(part).items():
            values = metric.compute().tolist()
            metric.reset()
            self.log_dict({f"{part}_{name}_{label}": value for label, value in zip(names, values, strict=True)})

    # ---- optimizers and freezing

    @property
    def backbone_learning_rate(self) -> float:
        """The backbone's rate: the user's own, or a share of `learning_rate`, which it then follows."""
        own: float | None = self._own_backbone_rate
        return self.learning_rate * self._backbone_share if own is None else own

    @backbone_learning_rate.setter
    def backbone_learning_rate(self, rate: float) -> None:
        self._own_backbone_rate = rate

    def head_to_solve(self) -> Any:
        """The head, or as long as the data has not said how large it is, what will build it."""
        return self.head if self.head is not None else self._head.builder

    def unused_by_solving(self) -> list[str]:
        """Those of optimizer, rates and loss that are not their defaults."""
        classes = [parent for parent in reversed(type(self).__mro__) if issubclass(parent, Task)]
        known = {name: p for parent in classes for name, p in inspect.signature(parent.__init__).parameters.items()}
        given = {name: self.hparams.get(name) for name in _OF_STEPS if name in known}
        return [name for name, value in given.items() if value is not None and value != known[name].default]

    def frozen_features(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The backbone's features (B, num_features), or its tokens, for a batch, and the targets.

        Raises:
            UsageError: samples have weights, and a closed-form head, which does not use them, is to be solved.
        """
        self._learn_size(batch)
        images, targets = images_and_targets(batch)
        if isinstance(targets, WeightedTargets):
            run = None if self.trainer is None else self.trainer.fit_run
            if getattr(run, "solving", None) is not None:
                raise UsageError(
                    f"the samples have weights, which the head {self._head.kind!r} does not use",
                    why="it is solved in closed form",
                    fix='head="linear", or data without weight_field',
                )
            targets = targets.values
        return self._features(images), self.to_targets(targets)

    def takes_features(self, stage: str) -> bool:
        """Unless a subclass has steps of its own, which may look at the images, or features are larger than images."""
        if self.feature_info.kind == "maps" or self._has_spatial_targets or (stage == "fit" and self._mixing):
            return False
        return not self._has_own_steps(stage)

    def _has_own_steps(self, stage: str) -> bool:
        """Whether a subclass has written steps of its own for a stage."""
        own = {"fit": ("training_step", "validation_step"), "validate": ("validation_step",), "test": ("test_step",)}
        steps = ("forward", "shared_step", "_measure", *own[stage])
        return any(getattr(type(self), name) is not getattr(Task, name) for name in steps)

    def why_no_features(self, stage: str) -> str:
        """Why the steps do not take features that are computed once."""
        if self.feature_info.kind == "maps":
            return "the maps of all images would take more memory than the images"
        if self._has_spatial_targets:
            return "the targets move with the images"
        if stage == "fit" and self._mixing:
            return f"{self._mixing.described} mixes the images of each batch"
        return super().why_no_features(stage)

    def feature_size(self) -> int:
        """Numbers in the features of an image."""
        return max(1, self.feature_info.num_tokens) * self.num_features

    def inference_copy(self, precision: Precision) -> Self:
        """A copy in eval mode, with BatchNorm folded into convolutions where that leaves the outputs as they are."""
        copied: Self = inference_copy(self, precision)
        return copied

    def describe_frozen(self) -> dict[str, Any] | None:
        """The backbone's name and options and the versions of the libraries; None for a module of the user's own."""
        given = plain_hyperparameters(self)
        name = given.get("backbone")
        if not isinstance(name, str) or any(find_not_saved(given.get("backbone_options") or {})):
            return None
        options = {"options": given.get("backbone_options") or {}, "in_chans": given.get("in_chans", 3)}
        if (kind := self.feature_info.kind) != "pooled":
            options["gives"] = kind
        return {"backbone": name, **options, **{lib: version(lib) for lib in self.libraries}}

    def examine(
        self, paths: Sequence[str], targets: Any, groups: Sequence[int], images: ImageSource = FILES
    ) -> Examined:
        """What `ImageData.audit` asks a model: features of images, and scores of classes by cross-fitted heads.

        Args:
            paths: of the images, or the names that `images` has for them.
            targets: (N,) class indices; None if there are no classes.
            groups: (N,) numbers; images with the same number are in the same fold.
            images: where the pictures are read.
        """
        from flashtask.tasks.label_errors import examine

        return examine(self, paths, targets, groups, images)

    def solve_head(self, features: torch.Tensor, targets: torch.Tensor) -> Any:
        """Solve the head, and log the loss that it has on the features it was solved on."""
        said = super().solve_head(features, targets)
        assert self.head is not None
        with torch.no_grad():
            outputs = self.head(features.to(self.device)).float()
            step = StepOutput.of(self.loss(outputs, targets.to(self.device)), outputs, targets)
        self.log("train_loss", step.loss, on_step=False, on_epoch=True, batch_size=len(features), sync_dist=True)
        return said

    def layer_groups(self) -> list[list[str]]:
        """The backbone's own layer groups, under the task's names."""
        return [[unwrapped_name(f"backbone.{name}") for name in group] for group in self._layer_groups]

    def configure_optimizers(self) -> Any:
        """The chosen optimizer, with a parameter group for the head and one for each part that trains later."""
        if self.head is None and self._head.kind is not None:
            raise self._unknown_outputs()
        run = self.trainer.current_fit
        freezing = run.freezing or Freezing(self, resolve_finetuning("no_freeze"))
        rates = {"head": self.learning_rate, "backbone": self.backbone_learning_rate}
        decays = weight_decay_of(self._optimizer, self._optimizer_options) != 0
        groups = freezing.optimizer_groups(**rates, undecayed=self._undecayed() if decays else ())
        optimizer = make_optimizer(self._optimizer, groups, self.learning_rate, **self._optimizer_options)
        schedule = make_scheduler(
            self._schedule,
            optimizer,
            run.total_steps,
            run.steps_before,
            run.first_step_of,
            **self._schedule_options,
        )
        return ([optimizer], [] if schedule is None else [vars(schedule)])

    def _undecayed(self) -> Iterator[nn.Parameter]:
        """What weight decay leaves alone, as timm's own training does."""
        patterns: Collection[str] = getattr(self.backbone, "no_weight_decay", set)()
        for name, parameter in parameters_by_name(self).items():
            inner = name.removeprefix("backbone.")
            if parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatchcase(inner, one) for one in patterns):
                yield parameter

    # ---- prediction

    @named_arguments
    def predict(self, inputs: Any, batch_size: int | None = None, num_workers: int | None = None) -> Any:
        """What the task says about images: one result for one image, a list for several.

        Every kind of input gives the result of the file with the same pixels. A PIL image is turned as its EXIF tag
        says, arrays are in RGB order, and 16-bit grey (`uint16` of shape (H, W)) is read as in a 16-bit file.

        Args:
            inputs: the path of an image file, or of a folder, which stands for all images in it and below it, sorted;
                an http(s) address; a PIL image; a NumPy array (H, W, C) or (H, W), or a tensor (C, H, W) or (H, W), of
                uint8; the bytes of an image file, or a file opened in binary mode. Also a list, tuple or generator of
                these, mixed, or a batch (N, H, W, C) or (N, C, H, W).
            batch_size: images at a time; None decides by the device.
            num_workers: processes that load images; None decides by itself.

        Raises:
            UsageError: something else; the message lists what is taken.
            MissingInputError: there is no such file.
            BadDataError: something is not a whole image.
            HubError: an address cannot be fetched.
        """
        items, single = self.read_inputs(inputs)
        results = list(self.predictions(items, batch_size, num_workers))
        return results[0] if single else results

    @named_arguments
    def predictions(self, inputs: Any, batch_size: int | None = None, num_workers: int | None = None) -> Iterator[Any]:
        """What `predict` gives for several images, one by one in the order of the inputs, as it is computed."""
        items, _ = self.read_inputs(inputs)
        yield from predictions_of(self, items, batch_size, num_workers)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Postprocessed outputs of a batch of images, float32; targets are ignored if there are any."""
        outputs = self(images_of(batch, self.preprocessing.input_size[0]))
        return self.postprocess(in_dtype(outputs, torch.float32))

    def to_predictions(self, outputs: Any, samples: Sequence[Input]) -> Sequence[Any]:
        """What `predict` returns for each image: its row of outputs, unless the task says more.

        Args:
            outputs: as `postprocess` gives them for a batch.
            samples: the images; each has its `path` (None without one), and `placed(self.preprocessing)`, by which
                positions in the outputs become positions in the user's file.
        """
        return [one.cpu() if isinstance(one, torch.Tensor) else one for one in outputs]

    def operate(self, *arguments: Any, **options: Any) -> Any:
        """Fit the temperature of the scores and choose thresholds on a part of the data: `ImageClassifier.operate`.

        Raises:
            UsageError: the task is not classification.
        """
        raise UsageError(
            f"{self.name or type(self).__name__} has no operating points",
            why="only the scores of image_classification are probabilities of labels",
        )

    def export_outputs(self) -> Outputs:
        """What an exported model of the task gives; by default `outputs`, the tensor of `postprocess`."""
        from flashtask.tasks.export.outputs import Outputs

        return Outputs("outputs")

    @named_arguments
    def export(
        self,
        path: str | os.PathLike[str],
        *,
        format: str = "onnx",
        dynamic: Sequence[str] | None = None,
        quantize: str | None = None,
        preprocessing: bool = True,
        data: Any = None,
        max_loss: float = 0.005,
        licence: str | None = None,
        overwrite: bool = False,
    ) -> Export:
        """Write the task as a file for another runtime, compared there with the task on images before it is written.

        The input is `images`, pictures (N, H, W, C) of uint8 in RGB as decoded, which the graph resizes, crops and
        normalises as the task does.

        Args:
            path: `NAME.onnx`, `NAME.pt2` or `NAME.xml`; beside an ONNX file `NAME.py` is written, which predicts with
                it and needs onnxruntime, numpy and Pillow.
            format: `onnx`, `torch` (`torch.export`) or `openvino`.
            dynamic: what may differ from call to call: `batch`, the number of pictures, and `size`, theirs; None means
                both, or without preprocessing `batch`. Without `size` all pictures have the size of the first of
                `data`, else of the model's input.
            quantize: `int8`, by static quantization of ONNX Runtime; it needs `data`. Not for `torch`.
            preprocessing: False for normalised inputs (N, C, height, width) of float32 in place of pictures.
            data: a data module with validation images to compare on; None means eight made-up pictures.
            max_loss: how much of the metric `int8` may cost, such as 0.005 of the accuracy; of an error, as a share.
                While it costs more, layers stay in float, from both ends of the network, up to half of them.
            licence: of the weights, for the metadata.
            overwrite: replace files that are there.

        Raises:
            UsageError: arguments that contradict each other, a network that torch.export cannot follow, or a library is
                missing.
            OutputError: a file is there, or its folder is not.
            IntegrityError: the exported model gives other results than the task.
            StorageError: a write failed.
        """
        from flashtask.tasks.export.exporting import export_task

        return export_task(
            self,
            path,
            form=format,
            dynamic=dynamic,
            quantize=quantize,
            preprocessing=preprocessing,
            data=data,
            max_loss=max_loss,
            licence=licence,
            overwrite=overwrite,
        )

    # ---- what came out

    def finished_run(self, trainer: Trainer, folder: Path, data: Any) -> FinishedRun:
        """The run as `flashtask.FinishedRun` opens it, with the model and the data that are in memory."""
        from flashtask.tasks.finished_run import FinishedRun

        assert trainer.fit_run is not None
        return FinishedRun(folder, task=self, data=data, trainer=trainer, result=fit_result(trainer.fit_run))

    def write_report(self, trainer: Trainer, folder: Path, data: Any) -> Path:
        """Write `report.html`; no random number that is drawn afterwards depends on it."""
        before = generator_states()
        try:
            return self.finished_run(trainer, folder, data).report().save(folder / "report.html")
        finally:
            set_generator_states(before)

    # ---- what files hold

    def describe(self) -> dict[str, Any]:
        """The registry key, the preprocessing, which names come from a zoo file of the user's, and the class.

        `own_class` stands there for a class that is not registered: its `name`, and `predicts_by`, the methods of
        prediction that it changes.
        """
        preprocessing = self.preprocessing.to_dict()
        own: dict[str, Any] = {"own_zoo": self._own_names} if self._own_names else {}
        if self.pretrained_from is not None:
            own["pretrained_from"] = dict(self.pretrained_from)
        described = self._class_of_weights or describe_class(type(self))
        if self.target_description is not None:
            own["targets"] = dict(self.target_description)
        if self._load_image is not None:
            own["load_image"] = stored_loader(self._load_image)
        own["licences"] = self.licence_record()
        return {**super().describe(), **described, "preprocessing": preprocessing, **own}

    def recipe(self) -> dict[str, Any]:
        """The recipe's `task` and `model` sections, with `not_saved` for what it cannot hold.

        That is an argument that was an object and not a name, a class that is not registered, and weights that the
        recipe does not lead to.
        """
        arguments = {**plain_hyperparameters(self), **self.resolved_hyperparameters()}
        if self._asked_size is not None:
            height, width = self._asked_size  # as it was asked for, so that the same command resumes the run
            arguments["image_size"] = height if height == width else [height, width]
        if self.pretrained_from is not None:
            arguments = recipe_arguments(self.pretrained_from, arguments, has_new_head=self._has_new_head)
        lost = {f"model.{where}": f"<{kind}>" for where, kind in find_not_saved(arguments)}
        whole = {name: value for name, value in arguments.items() if not any(find_not_saved(value))}
        found: dict[str, Any] = {"model": whole}
        if (name := TASKS.name_of(type(self))) is None:
            lost["task"] = f"<{type(self).__name__}>"
        else:
            found["task"] = name
        if self._licences:
            found["licences"] = dict(self._licences)
        if why := self._why_other_weights():
            lost["model.weights"] = f"<{why}>"
        if self.preprocessing != self._preprocessing_of_weights:
            found["data"] = {"preprocessing": self.preprocessing.to_dict()}
        return {**found, **({"not_saved": lost} if lost else {})}

    def _why_other_weights(self) -> str:
        """Why a recipe does not lead to the weights that the model has; empty if it does."""
        if self.was_fitted:
            return "trained before this run"
        if self._has_other_weights:
            return "loaded from a file"
        if self._is_pretrained or self.pretrained_from is not None or self._drawn_from == self._seed():
            return ""
        return f"random, not drawn right after seed_everything({self._seed()})"

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As of every module; the recipe of a run that begins with other weights says so."""
        self._has_other_weights = True
        return super().load_state_dict(*arguments, **options)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the preprocessing that the weights were trained with, and what is known of the run that made them."""
        self.provenance = provenance_in(checkpoint)
        self.pretrained_from = checkpoint.get("pretrained_from")  # a run that goes on began where it began
        targets = checkpoint.get("targets")
        self._target_description = dict(targets) if isinstance(targets, dict) else None
        if self.trainer is None:
            self._licences_of_source = licences_in(checkpoint)
        if self.trainer is None:  # else the data of the run has it
            self._load_image = checkpoint.get("load_image")
        if "preprocessing" in checkpoint:
            self.preprocessing = self._own_preprocessing = stored_preprocessing(checkpoint["preprocessing"])
            self._awaits_size = False
            if self.trainer is None:
                self._preprocessing_of_weights = self.preprocessing  # else it is the run's, and stands in its recipe
            else:
                self._agree_on_preprocessing(self.trainer.current_run.data)

    def resolved_hyperparameters(self) -> dict[str, Any]:
        """The learning rates, if the task has such arguments: one may follow from the other, both may be found.

        For a backbone from a place, also its pinned name, and the options that build it when the place is gone.
        """
        if "learning_rate" not in vars(self):
            return {}
        values: dict[str, Any] = {"learning_rate": self.learning_rate}
        values["backbone_learning_rate"] = self.backbone_learning_rate
        if self._asked_size is not None:
            values["image_size"] = self._preprocessing_of_weights.input_size[1:]
        return {name: value for name, value in {**values, **self._built_by}.items() if name in self.argument_names()}

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
    def check_content(cls, content: Mapping[str, Any], given: Mapping[str, Any], path: Any) -> None:
        """Names of a zoo file must come from one here too, and weights must be what a model can compute with.

        Raises:
            UsageError: a backbone or head comes from a zoo file that is not in use.
            IntegrityError: a variance is below 0, or a layer's weight and bias have two formats.

        Warns:
            UserWarning: weights are NaN, and so will be what is predicted with them.
        """
        require_own_names(content.get("own_zoo", {}), given, path)
        check_weights(content["state_dict"], path)

    @classmethod
    def rebuild(cls, arguments: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> Self:
        """A checkpoint brings its own weights, so nothing is fetched to build the module that takes them.

        Raises:
            IntegrityError: the arguments ask for a model that is much larger than the weights, or make none.
        """
        check_stored_backbone(arguments.get("backbone"), arguments.get("backbone_options") or {})
        with building_without_weights(), no_larger_than(weights):
            return cls(**arguments)

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = None, strict: bool | None = None, **given: Any
    ) -> Self:
        """As `Module.load_from_checkpoint`; an address (https) is downloaded to the cache first."""
        return super().load_from_checkpoint(local_file(checkpoint_path), map_location, strict, **given)

    # ---- folders and the hub

    @named_arguments
    def save_pretrained(
        self, folder: str | os.PathLike[str], *, licence: str | None = None, onnx: bool = False
    ) -> Path:
        """Write the task as a folder in timm's layout, with a model card: what `from_pretrained` and the hub take.

        A linear head on a timm backbone is written under timm's own names, so plain timm reads the whole:
        `timm.create_model("local-dir:FOLDER", pretrained=True)`. With another head plain timm reads the backbone.
        For a backbone of another library `config.json` says that flashtask alone reads it.

        Args:
            folder: new or empty, or one that was written so before, which is replaced.
            licence: of the weights, as the hub writes it (`apache-2.0`), for the model card.
            onnx: also write `model.onnx`, as `export` does.

        Raises:
            OutputError: the folder holds other things, or cannot be created.
            UsageError: the task has no head yet, or something that no file can hold.
            StorageError: a write failed.
        """
        from flashtask.tasks.pretrained.saving import save_pretrained

        return save_pretrained(self, folder, licence, onnx=onnx)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], revision: str | None = None, map_location: Any = None, **given: Any
    ) -> Self:
        """The task that a repository on the hub, a folder or a checkpoint holds, in eval mode.

        A plain timm repository gives an `ImageClassifier` with its own classifier and labels. `pretrained_from` says
        which commit it was, and so do the checkpoints of a run that trains it further.

        Args:
            source: `org/name`, `hf://org/name@revision`, a `.ckpt` file or a folder, which comes first; a run folder
                means its best checkpoint, else its last.
            revision: branch, tag or commit; the main branch if not given.
            map_location: device for the weights.
            given: arguments of the task to train it further with (`learning_rate=...`). Other `labels` keep the rows of
                the head whose classes remain; `num_classes`, `head` and `head_options` mean a new head.

        Raises:
            HubError: the hub cannot be reached, or refuses.
            MissingInputError: there is no such folder or file.
            IntegrityError: a file is damaged or hostile.
            UsageError: it holds another task, or an argument belongs to the weights.
        """
        from flashtask.tasks.pretrained.source import find_source
        from flashtask.tasks.stored_task import pretrained_task

        found = find_source(source, revision, bare_is_hub=True)
        return cast("Self", pretrained_task(cls, found, given, map_location))

    @named_arguments
    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        revision: str | None = None,
        message: str | None = None,
        licence: str | None = None,
        onnx: bool = False,
    ) -> str:
        """Write the folder of `save_pretrained` and put it on the hub; gives the address with the commit.

        Args:
            repository: `org/name`; it is created if there is none.
            private: whether a new repository can be seen by its owner alone.
            revision: a branch, which is created if there is none; the main branch if not given.
            message: of the commit.
            licence: as for `save_pretrained`.
            onnx: as for `save_pretrained`.

        Raises:
            HubError: the hub cannot be reached, or does not allow it.
        """
        from flashtask.tasks.pretrained.pushing import push_task

        return push_task(
            self, repository, private=private, revision=revision, message=message, licence=licence, onnx=onnx
        )
