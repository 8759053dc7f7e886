"""`ImageDataModule`: a table of images and a reader of their targets, as the data of a run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import DataLoader, Sampler

from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.html_table import table_html
from flashtask.core.preprocessing import Preprocessing, ValueRange, as_value_range
from flashtask.core.seeding import SampleKey, permutation, sample_seeds
from flashtask.data.arguments import PathLike
from flashtask.data.audit import Examiner, audit_table
from flashtask.data.batch_picture import BatchPicture, check_shown, picture_of_samples
from flashtask.data.checks import BadImage, Looked, describe, find_leaks, look_at_images, refuse_bad
from flashtask.data.copies import warnings_of_copies
from flashtask.data.datasets import ImageFileDataset
from flashtask.data.decoded_cache import DecodedCache
from flashtask.data.decoding import FirstSteps
from flashtask.data.findings import Audit, read_ignored
from flashtask.data.groups import groups_of_names
from flashtask.data.image_source import FILES, ImageSource
from flashtask.data.loaders import image_loader
from flashtask.data.mirrored import changed_by_mirroring
from flashtask.data.samplers import SamplerLike, balanced_sampler, weighted_sampler
from flashtask.data.samples import PARTS, Column, SampleTable, as_text
from flashtask.data.shard_writer import DEFAULT_SHARD_BYTES, require_new_folder, write_shards
from flashtask.data.spatial import SpatialReader
from flashtask.data.table_columns import OtherColumns
from flashtask.data.targets import Source, TargetReader
from flashtask.data.transforms import Augmentation, AugmentLike, eval_transform, first_steps, train_transform
from flashtask.data.validation_split import split_off_validation
from flashtask.data.value_range import (
    Bounds,
    about_another_scale,
    about_range,
    joined_bounds,
    range_of_bounds,
    unknown_range,
)
from flashtask.trainer.datamodule import DataModule

__all__ = ["ImageDataModule"]

#: What the arguments that give a part may end with.
_KINDS_OF_ARGUMENTS = ("folder", "file", "files", "data_frame", "images", "data", "dataset")

#: Columns of the table that shows the data.
_COLUMNS = ("part", "samples", "targets", "from")
#: Arguments that are paths of this machine.
_PLACES = ("_folder", "_file")
_PARTS_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ImageDataModule(DataModule):
    """A table of samples, and a reader that makes targets of what the table has.

    Targets are read when the data is made, before any image.
    `setup` reads every image of the stage once until it changes, and names all bad ones; validation, test and
    prediction images see the model's own preprocessing, whatever training does.

    Args:
        table: all samples.
        reader: of the targets. If there are training samples, it learns from them; else it knows already, or a model
            gives its own to `use_targets`.
        recipe: the constructor's name and its arguments, for the recipe.
        remarks: what to say of each part when it is set up.
        images: where the pictures of the table are read.
    """

    #: The kinds of targets that such data may have; the first is the one of folders.
    readers: ClassVar[tuple[type[TargetReader], ...]] = ()
    #: What to write for arguments that some constructors have and others do not, and for those of a task.
    instead: ClassVar[Mapping[str, str]] = {
        "load_image": "this constructor reads image files and .npy alone; convert other files to PNG, TIFF or .npy",
        "num_classes": "it is an argument of the task, or taken from the data",
    }

    def __init__(
        self,
        table: SampleTable,
        reader: TargetReader,
        recipe: tuple[str, Mapping[str, Any]],
        remarks: Mapping[str, Sequence[str]] | None = None,
        images: ImageSource = FILES,
    ) -> None:
        self._constructor, arguments = recipe
        self._table = table
        self._images = images
        self._arguments = dict(arguments)
        # Of data that was fetched first: the constructor that fetches it, and its arguments in place of the paths.
        self._instead: tuple[str, dict[str, Any]] | None = None
        self._remarks = dict(remarks or {})
        self.batch_size: int = arguments["batch_size"]
        self.num_workers: int | None = arguments["num_workers"]
        #: The user's own preprocessing: what it gives wins over that of any model. None leaves all to the model.
        self.preprocessing: Preprocessing | None = None
        self._of_model: Preprocessing | None = None
        #: Images that `on_bad_image="skip"` left out.
        self.skipped: tuple[BadImage, ...] = ()
        #: Files whose content is also in the training part: (the file, the training file).
        self.leaks: tuple[tuple[str, str], ...] = ()
        self._checked: set[str] = set()
        # Of the images with more than 8 bits a channel: the bounds of each, by part and path.
        self._wide: dict[str, dict[str, Bounds]] = {}
        self._said_of_range = self._said_of_flips = ""
        self._said_of_scales: set[str] = set()
        self._cache = DecodedCache()
        self._datasets: dict[str, ImageFileDataset] = {}
        #: What tables say of the samples beside images and targets; None if the data is not of tables.
        self.other_columns: OtherColumns | None = None
        self._manifest: tuple[str, ...] = ()
        self._digested: tuple[SampleTable, dict[str, str]] | None = None
        self._against = "the model"
        self._reader = reader
        if arguments.get("group_pattern"):
            self._take_groups(arguments["group_pattern"])
        if arguments["val_split"] or arguments.get("fold") is not None:
            self._table, self._manifest, said = split_off_validation(
                self._table, reader, arguments, is_of_folders=self._constructor == "from_folders"
            )
            self._remarks["train"] = [*self._remarks.get("train", ()), *said]
        self._learn()

    def _learn(self) -> None:
        """Learn from the training samples what targets there are; without any, from all others that have targets."""
        parts = ["train"] if self._table.has("train") else [p for p in ("val", "test") if self._table.has(p)]
        if not parts or self._table.targets is None:
            return
        raw = np.concatenate([self._table.of(part).targets for part in parts])
        where = " and ".join(dict.fromkeys(self._argument(part) for part in parts))
        self._take_reader(self._reader.learned(raw, replace(self._source(parts[0]), argument=where)), where)

    # ---- targets

    @property
    def targets(self) -> dict[str, Any]:
        """How the targets are read, as plain values that a checkpoint keeps."""
        return self._reader.to_dict()

    def describe_targets(self) -> str:
        """What was understood of the targets, in words."""
        return self._reader.describe()

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        """For each part how many samples it has, their targets, and where they are from."""
        for part, count in self.sizes().items():
            raw = self._table.of(part).targets
            source = self._source(part)
            origin = f"{source.argument} {_shortened(os.path.basename(source.place), 40)}".strip()
            targets = "" if raw is None or part == "predict" else self._reader.summary(raw)
            yield part, f"{count:,}", targets, origin

    def _repr_html_(self) -> str:
        """The same as `repr`, as a table for notebooks."""
        return f"<p>{escape(self.describe_targets())}</p>{table_html(_COLUMNS, self._rows())}"

    def __repr__(self) -> str:
        """A row for each part: how many samples, their targets, and where they are from; 80 columns."""
        rows = [_COLUMNS, *self._rows()]
        lines = [_shortened(f"{type(self).__name__}: {self.describe_targets()}", 80)]
        for part, count_text, targets, origin in rows:
            lines.append(
                f"{part:<7} {count_text:>10}  {_shortened(targets, 32):<32}  {_shortened(origin, 27)}".rstrip()
            )
        return "\n".join(lines)

    @property
    def load_image(self) -> str | Callable[[str], Any] | None:
        """The name of the function that reads the files, else the function itself; None for image files."""
        return self._images.given

    def sizes(self) -> dict[str, int]:
        """How many samples each part has, without those that were left out."""
        return {part: len(self._table.of(part)) for part in PARTS if self._table.has(part)}

    @property
    def images(self) -> ImageSource:
        """Where the pictures of the table are read."""
        return self._images

    @property
    def channels(self) -> int:
        """Of the pictures, as the model takes them."""
        return self._channels()

    def samples(self, part: str) -> SampleTable:
        """The samples of a part, without those that were left out, in the order of its loader."""
        return self._table.of(part)

    def drawn_samples(self, part: str, rows: Sequence[int]) -> BatchPicture:
        """Samples of a part that is set up, at some places, as a model gets them in evaluation, with their targets."""
        keys = [SampleKey(row, 0, 0) for row in rows]
        return picture_of_samples(self._datasets[part], keys, self._reader, self.used_preprocessing, "")

    def target_words(self, part: str) -> list[str]:
        """The target of each sample of a part in words; empty where it is a place in the image."""
        table = self._table.of(part)
        if table.targets is None or self.has_spatial_targets:
            return [""] * len(table)
        return [", ".join(self._reader.lines(value)) for value in self._read_targets(part)]

    def use_targets(self, targets: Mapping[str, Any]) -> None:
        """Read the targets as those were read that a model was trained on.

        Args:
            targets: as the property `targets` of that data gave them.

        Raises:
            BadDataError: targets that the model does not know.
            UsageError: targets of another kind.
        """
        kinds = {reader.kind: reader for reader in self.readers}
        if (kind := targets.get("kind")) not in kinds or type(self._reader) is not kinds[kind]:
            raise UsageError(
                f"the model was trained on targets of the kind {kind!r}, but this data has {self._reader.kind!r}"
            )
        self._take_reader(kinds[kind].from_dict(targets).reading(self._reader), "the model")

    def _take_reader(self, reader: TargetReader, against: str) -> None:
        self._reader, self._against = reader, against
        for part in ("train", "val", "test"):
            if self._table.has(part):
                self._read_targets(part)
        self._datasets.clear()

    def _read_targets(self, part: str) -> Any:
        raw = self._table.of(part).targets
        return None if raw is None else self._reader.read(raw, self._source(part))

    def _argument(self, part: str) -> str:
        """The argument that a part came from."""
        found = (*(f"{one}_{kind}" for one in (part, "train") for kind in _KINDS_OF_ARGUMENTS), "shards_folder")
        return next((name for name in found if name in self._arguments), f"train_{_KINDS_OF_ARGUMENTS[0]}")

    def _source(self, part: str) -> Source:
        argument = self._argument(part)
        noun = "class folder(s)" if argument.endswith("folder") else "label(s)"
        place = self._arguments.get(argument, "")
        return Source(argument, place if isinstance(place, str) else "", noun, self._against)

    # ---- preprocessing

    def use_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Take the preprocessing of the model that the data is connected to now; what the user gave still wins.

        Raises:
            UsageError: the user's own is for another number of channels.
        """
        before, self._of_model = self._of_model, preprocessing
        if preprocessing != before:
            # Those that were made for another model are made again.
            self._datasets = {part: self._dataset(part) for part in self._datasets}

    @property
    def used_preprocessing(self) -> Preprocessing:
        """What is used: the user's own fields, the others of the model, and after `setup` the range of the values.

        Raises:
            UsageError: the user's own is for another number of channels, or gives another range than `value_range`.
        """
        # A module that names no preprocessing gets the defaults: 224 x 224, ImageNet's mean and deviation.
        known = (self._of_model or Preprocessing()).resolved()
        if self.preprocessing is not None:
            known = self.preprocessing.filled_from(known)
        own = self._own_range()
        return known if own is None else replace(known, value_range=own)

    @property
    def augments_while_frozen(self) -> bool:
        """Whether `augment` is anything but `auto` and `none`."""
        return self._arguments["augment"] not in ("auto", "none")

    def split_manifest(self) -> tuple[str, ...]:
        """The images that `val_split` or `fold` chose, relative to the training folder; empty without a split."""
        return self._manifest

    def split_rows(self) -> Iterator[tuple[str, str]]:
        """Part and name of each training and validation image, if `val_split` or `fold` chose them."""
        for part in ("train", "val") if self._manifest else ():
            for name in self._table.of(part).names():
                yield part, name

    def state_dict(self) -> dict[str, Any]:
        """Which images the run trains and validates on, as a digest, and the split; a resume compares them.

        The digest is of the names of files, or of the pixels of up to 256 pictures of a part that is in memory.
        """
        manifest = np.frombuffer(json.dumps(self._manifest).encode(), dtype=np.uint8)
        return {"targets": self.targets, "files": self._digest_of_table(), "split": manifest.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with what the run was started on.

        Raises:
            BadDataError: files or labels are other ones.
        """
        if not self._are_the_targets_of(state) or state["files"] != self._digest():
            raise BadDataError(
                "the images are not those that the run was started on",
                why="a resumed run sees the same samples in the same order; files or classes were added or removed",
                fix="start a new run, or put the folders back as they were",
            )

    def _digest_of_table(self) -> dict[str, str]:
        """`_digest`, worked out once for a table: each checkpoint of a run holds it."""
        if self._digested is None or self._digested[0] is not self._table:
            self._digested = self._table, self._digest()
        return self._digested[1]

    def _digest(self) -> dict[str, str]:
        """For each part a digest of the names of its images, and of pixels and targets that the names do not tell."""
        found = {}
        for part in ("train", "val"):
            if self._table.has(part):
                table = self._table.of(part)
                told = self._images.fingerprint(table.inputs.tolist())
                if self._constructor != "from_folders" and table.targets is not None:
                    told += table.targets.ravel().tolist()
                if part == "train" and table.weights is not None:
                    told += map(str, table.weights.tolist())
                found[part] = hashlib.sha256("\0".join([*table.names(), *told]).encode()).hexdigest()
        return found

    def _are_the_targets_of(self, state: Mapping[str, Any]) -> bool:
        if "targets" not in state:  # written when labels were all that targets could be
            return tuple(state["labels"]) == getattr(self._reader, "labels", ())
        return bool(state["targets"] == self.targets)

    def recipe(self) -> dict[str, Any]:
        """The call that makes this data again, as a recipe holds it: absolute paths, plain values.

        What a recipe cannot hold is `{"not_saved": "<its type>"}`: functions, and images in memory.
        """
        arguments = {**self._arguments, "batch_size": self.batch_size, "num_workers": self.num_workers}
        for name in ("augment", "sampler", "load_image", "resolver", "target"):
            if not isinstance(arguments.get(name), str | list | tuple | dict | None):
                arguments[name] = {"not_saved": type(arguments[name]).__name__}
        if self.preprocessing is not None:
            arguments["preprocessing"] = self.preprocessing.to_dict()
        if self._instead is None:
            return {self._constructor: arguments}
        constructor, own = self._instead
        return {constructor: own | {name: one for name, one in arguments.items() if not name.endswith(_PLACES)}}

    def setup(self, stage: str) -> None:
        """Read every image of the stage that was not read before, and make its datasets.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            BadDataError: images that cannot be read (with `on_bad_image="error"`), or a class that has none
                left.
            UsageError: an unknown stage.
        """
        if stage not in _PARTS_OF_STAGE:
            raise UsageError(f"no stage {stage!r}; there are: {', '.join(_PARTS_OF_STAGE)}")
        parts = [part for part in _PARTS_OF_STAGE[stage] if self._table.has(part)]
        self._check_in_turn([part for part in parts if part not in self._checked])
        self._settle_range(parts)
        for part in parts:
            self._datasets[part] = self._dataset(part)
        if "train" in parts:
            self._warn_of_flips()

    def _mirrored_labels(self) -> Sequence[str]:
        """The names of classes that may say what a mirrored image would contradict."""
        labels: Sequence[str] = getattr(self._reader, "labels", ())
        return labels

    def _warn_of_flips(self) -> None:
        """Say so once if images are mirrored by default, and the names of the classes speak against it."""
        why = "" if self._arguments.get("flip") else changed_by_mirroring(self._mirrored_labels())
        if why and why != self._said_of_flips and self._augment != "none" and isinstance(self._augment, str):
            frozen = " while the backbone trains" if self._augment == "auto" else ""
            self._say(
                f"warning: augment={self._augment} flips images horizontally{frozen}, but {why}; flip=none leaves that "
                "out, flip=horizontal accepts it"
            )
            self._said_of_flips = why

    @property
    def _augment(self) -> AugmentLike:
        augment: AugmentLike = self._arguments["augment"]
        return augment

    def train_dataloader(self) -> DataLoader[Any] | None:
        """Batches of (images, targets), shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | None:
        """Batches of (images, targets), in the order of the listing."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any] | None:
        """Batches of (images, targets), in the order of the listing."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any] | None:
        """Batches of images, in the order of the listing."""
        return self._loader("predict")

    def _take_groups(self, pattern: str) -> None:
        if self._table.groups is not None:
            raise UsageError("group_field and group_pattern both define the groups", fix="leave one of them out")
        self._table = replace(self._table, groups=as_text(groups_of_names(self._table.names(), pattern)))

    def save_shards(self, folder: PathLike, *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Path:
        """Write all parts as shards for `from_shards`: tar files in the WebDataset layout, and an index.

        Every image is decoded once before it is written. The folder appears when it is whole.

        Args:
            folder: new or empty.
            shard_bytes: a tar file ends before it has more, at least 1024.

        Returns:
            The folder as an absolute path.

        Raises:
            BadDataError: images that cannot be read (with `on_bad_image="error"`).
            OutputError: the folder is not empty, or cannot be made.
            StorageError: a write failed.
            UsageError: an invalid size, or targets that shards cannot hold.
        """
        require_new_folder(folder)
        parts = [part for part in PARTS if self._table.has(part)]
        self._check([part for part in parts if part not in self._checked])
        bounds = {name: ends for part in parts for name, ends in self._wide.get(part, {}).items()}
        seed: int = self._arguments["split_seed"]
        return write_shards(
            folder, self._table, self._images, self._reader, bounds, seed=seed, shard_bytes=shard_bytes, says=self._say
        )

    def _check_in_turn(self, parts: list[str]) -> None:
        """Of the processes of a run, one on each machine reads all files; the others then find its notes."""
        strategy = None if self.trainer is None else self.trainer.strategy
        if strategy is None or not parts:
            self._check(parts)
            return
        if strategy.local_rank:
            strategy.barrier("images are checked")
        self._check(parts)
        if not strategy.local_rank:
            strategy.barrier("images are checked")

    def audit(self, model: Examiner | None = None, *, ignore: PathLike | Sequence[str] = ()) -> Audit:
        """Look for what is suspicious: unreadable files, copies, wrong labels, odd pictures. Nothing is changed.

        Args:
            model: a task such as `ImageEmbedder("efficientnet_lite0")`, which also finds suspected label errors and
                neighbours in its features; None looks only at files, pictures and the table.
            ignore: an ignore file, or its lines: findings that were looked at and are left out.

        Raises:
            MissingInputError, BadDataError, UsageError: an ignore file that cannot be used, or no model.
        """
        if model is not None and not callable(getattr(model, "examine", None)):
            raise UsageError(f"model must be a task, not {model!r}", fix='ImageEmbedder("efficientnet_lite0")')
        looked = look_at_images(
            self._table.inputs.tolist(), self._channels(), value_range=self._own_range(), images=self._images
        )
        ignored = read_ignored(ignore) if isinstance(ignore, (str, os.PathLike)) else list(ignore)
        return audit_table(
            self._table, looked, self._reader, self._comparable_targets(), model, ignored, images=self._images
        )

    def _comparable_targets(self) -> Column | None:
        """The targets of all samples as a model takes them, -1 where there is none; None if they are in the image."""
        if self._table.targets is None or self.has_spatial_targets:
            return None
        found: Column | None = None
        for part in PARTS[:3]:
            if self._table.has(part):
                values = np.asarray(self._read_targets(part))
                if found is None:
                    found = np.full((len(self._table), *values.shape[1:]), -1, dtype=values.dtype)
                found[self._table.parts == PARTS.index(part)] = values
        return found

    def show_batch(
        self,
        part: str = "train",
        *,
        num_samples: int = 12,
        epoch: int = 0,
        seed: int = 0,
        output: PathLike | None = None,
    ) -> BatchPicture:
        """Draw samples as a model gets them, after augmentation, with their targets.

        Args:
            part: train, val, test or predict.
            num_samples: how many, at least 1. Of training they are the first of an epoch, else the first of the part.
            epoch: whose order and augmentation is drawn, from 0, as if the backbone trained in it.
            seed: of the run.
            output: the name of an image file, which is written too.

        Returns:
            A picture that a notebook shows; its `image` is a PIL image.

        Raises:
            UsageError: there is no such part, or an invalid number or name of a file.
            BadDataError: an image cannot be read.
        """
        check_shown(part, self._table, num_samples=num_samples, epoch=epoch, seed=seed)
        paths = self._table.of(part).inputs.tolist()
        order = permutation(len(paths), seed, epoch) if part == "train" else np.arange(len(paths))
        rows = order[:num_samples]
        if self.used_preprocessing.value_range is None and any(self._images.input(paths[row]).bounds() for row in rows):
            self.setup(next(stage for stage, parts in _PARTS_OF_STAGE.items() if part in parts))
        dataset = self._datasets.get(part) or self._dataset(part)
        seeds = sample_seeds(rows, seed, epoch).tolist()
        keys = [SampleKey(row, epoch, own) for row, own in zip(rows.tolist(), seeds, strict=True)]
        size = "x".join(map(str, self.used_preprocessing.input_size[:0:-1]))
        augment = self._arguments["augment"] if part == "train" else "none"
        how = augment if isinstance(augment, str) else type(augment).__name__
        title = f"{part}: {len(rows)} of {len(paths):,}, {size} pixels, augment {how}"
        made = picture_of_samples(dataset, keys, self._reader, self.used_preprocessing, title)
        if output is not None:
            made.save(output)
        return made

    def _check(self, parts: list[str]) -> None:
        # What is decoded to be checked is kept: the first epoch has it already.
        steps = {part: self._first_steps(part) for part in parts}
        inputs = {part: self._table.of(part).inputs.tolist() for part in parts}
        reads = {path: steps[part] for part in reversed(parts) for path in inputs[part]}
        paths = [path for part in parts for path in inputs[part]]
        # A training set is measured, whatever the model says: only the user knows better.
        known = self._own_range() if "train" in parts else self.used_preprocessing.value_range
        if (known_bounds := self._images.known_bounds(paths)) is not None:
            looked = Looked([], known_bounds if known != "format" else {}, {})
        else:
            looked = look_at_images(
                paths,
                self._channels(),
                lambda path, seen: self._cache.read(reads[path], path, self._images, seen),
                known,
                self._images,
            )
        if self._arguments["on_bad_image"] == "error":
            refuse_bad(looked.bad, len(paths))
        if looked.bad:
            self._leave_out(parts, looked.bad)
        for part in parts:
            self._wide[part] = {path: looked.bounds[path] for path in inputs[part] if path in looked.bounds}
        for part in parts:
            for line in self._remarks.get(part, ()):
                self._say(line)
        for part in ("val", "test"):
            if part in parts and self._table.has("train"):
                self._report_leaks(part)
        self._report_copies(parts, looked)
        self._checked.update(parts)

    def _leave_out(self, parts: list[str], bad: list[BadImage]) -> None:
        names = {image.path for image in bad}
        before = {part: self._table.of(part) for part in parts}
        of_parts = np.isin(self._table.parts, [PARTS.index(part) for part in parts])
        is_bad = np.fromiter((path in names for path in self._table.inputs), dtype=bool, count=len(self._table))
        self._table = self._table.at(~(is_bad & of_parts))
        for part in parts:
            lost = self._lost_targets(before[part], self._table.of(part)) if part == "train" else ""
            if lost or not self._table.has(part):
                what = lost or f"the {part} part"
                raise BadDataError(f"no image of {what} can be read", why="\n    ".join(describe(bad)))
        self.skipped += tuple(bad)
        self._say(f"left out {len(bad)} image(s) that cannot be read: {'; '.join(describe(bad, 20))}")

    def _lost_targets(self, before: SampleTable, after: SampleTable) -> str:
        """Which targets no training sample has any more, now that some are left out; empty if a model needs none."""
        return ""

    def _report_leaks(self, part: str) -> None:
        train, other = (self._table.of(name).inputs.tolist() for name in ("train", part))
        found = find_leaks(train, other, self._images)
        if found:
            self.leaks += tuple(found)
            pairs = "; ".join(f"{ours!r} is {theirs!r}" for ours, theirs in found[:3])
            self._say(f"warning: {len(found)} {part} image(s) are also training images: {pairs}")

    def _report_copies(self, parts: list[str], looked: Looked) -> None:
        """Warn of pictures in two parts that are not equal files, and of those with two targets."""
        is_looked_at = np.isin(self._table.parts, [PARTS.index(part) for part in parts])
        values = self._comparable_targets()
        own = None if values is None else values[is_looked_at]
        for line in warnings_of_copies(
            self._table.at(is_looked_at), looked.fingerprints, own, self.leaks, self._images
        ):
            is_split = "in two parts" in line and self._manifest and self._table.groups is None
            self._say(f"{line}; group_pattern or group_field keeps pictures together" if is_split else line)

    def _say(self, line: str) -> None:
        # On stderr: stdout may be read by a program. Only the first process of several speaks.
        if self.trainer is not None:
            self.trainer.say(line)
        elif os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr)

    def _settle_range(self, parts: Sequence[str]) -> None:
        """Find the range of values over the training images, unless it is known, and say which it is."""
        wide = self._wide.get("train", {}) if "train" in parts else {}
        if wide and self._own_range() is None:
            found = joined_bounds(wide.values())
            known = self.used_preprocessing.value_range
            used = known if isinstance(known, tuple) else range_of_bounds(found, next(iter(wide)))
            self._of_model = replace((self._of_model or Preprocessing()).resolved(), value_range=used)
            said = about_range(found, used, len(wide), int((self._table.parts == PARTS.index("train")).sum()))
            if said != self._said_of_range:
                self._say(said)
                self._said_of_range = said
        of_all = {path: bounds for part in parts for path, bounds in self._wide.get(part, {}).items()}
        if of_all and self.used_preprocessing.value_range is None:
            path = next(iter(of_all))
            raise unknown_range(f"the image {path!r}", of_all[path])
        for part in parts:
            if part != "train" and (bounds := self._wide.get(part)):
                said = about_another_scale(part, joined_bounds(bounds.values()), self.used_preprocessing.value_range)
                if said and said not in self._said_of_scales:
                    self._say(said)
                    self._said_of_scales.add(said)

    def _own_range(self) -> ValueRange | None:
        """The value range that the user gave.

        Raises:
            UsageError: two that differ.
        """
        given = as_value_range(self._arguments.get("value_range"))
        own = None if self.preprocessing is None else self.preprocessing.value_range
        if given is not None and own is not None and given != own:
            raise UsageError(f"value_range={given} and preprocessing.value_range={own} differ", fix="give one of them")
        return own if given is None else given

    def _channels(self) -> int:
        return self.used_preprocessing.input_size[0]

    def _dataset(self, part: str) -> ImageFileDataset:
        preprocessing = self.used_preprocessing
        inputs = self._table.of(part).inputs
        targets = None if part == "predict" else self._read_targets(part)
        is_training = part == "train"
        transform = self._train_transform(preprocessing) if is_training else eval_transform(preprocessing)
        spatial = self._reader if isinstance(self._reader, SpatialReader) else None
        weights = self._weights() if is_training else None
        return ImageFileDataset(
            inputs,
            targets,
            transform,
            self._channels(),
            self._cache,
            spatial=spatial,
            weights=weights,
            images=self._images,
        )

    def _weights(self) -> Any:
        """Of the training samples, 1 on average; None if all count alike.

        Raises:
            BadDataError: all are 0.
        """
        weights = self._table.of("train").weights
        if weights is None or self._arguments.get("sampler") == "weighted":
            return None
        if not (mean := float(weights.mean(dtype=np.float64))):
            raise BadDataError("the weights of all training samples are 0")
        return (weights / mean).astype(np.float32)

    @property
    def has_spatial_targets(self) -> bool:
        """Whether targets are places in the image, which move with it."""
        return isinstance(self._reader, SpatialReader)

    def _first_steps(self, part: str) -> FirstSteps:
        """What happens first to an image of a part; in training as if the backbone is frozen: that is not known yet."""
        preprocessing = self.used_preprocessing
        if part != "train":
            return eval_transform(preprocessing).first
        return first_steps(self._train_transform(preprocessing).frozen, self._channels())

    def _train_transform(self, preprocessing: Preprocessing) -> Augmentation:
        changes = {name: self._arguments.get(name) for name in ("flip", "random_erasing")}
        return train_transform(preprocessing, self._augment, **changes)

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Any] | None:
        if not self._table.has(part):
            return None
        if part not in self._datasets:
            stage = next(stage for stage, parts in _PARTS_OF_STAGE.items() if part in parts)
            raise UsageError(f"the {part} data is not set up", fix=f'data.setup("{stage}")')
        sampler = self._sampler() if part == "train" else None
        # The tiles of a picture are a batch.
        is_tiled = part != "train" and self.used_preprocessing.crop_mode == "tile"
        batch_size = 1 if is_tiled else self.batch_size
        return image_loader(self._datasets[part], batch_size, self.num_workers, shuffle=shuffle, sampler=sampler)

    def _sampler(self) -> Sampler[int] | None:
        """What draws the training samples of an epoch; None for each of them once."""
        given: SamplerLike | None = self._arguments.get("sampler")
        if given is None:
            return self._images.sampler(self._table.of("train").inputs.tolist())
        if not isinstance(given, str):
            return given
        dataset, table = self._datasets["train"], self._table.of("train")
        if given == "weighted":
            return weighted_sampler(table.weights)
        return balanced_sampler(dataset.targets if self._reader.kind == "label" else None)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
