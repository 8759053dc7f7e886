"""`ImageData`: images with targets from folders, files, tables, arrays, pictures and datasets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import numpy as np
import torch

from flashtask.core.errors import BadDataError, UsageError
from flashtask.data.arguments import (
    ImageOptions,
    PathLike,
    TargetOptions,
    check_files,
    check_folders,
    check_split,
    checked_options,
    read_preprocessing,
    takes,
)
from flashtask.data.dataset_items import DatasetPart, Items, read_dataset
from flashtask.data.folders import ImageSet, list_class_folders, list_images
from flashtask.data.given_arguments import (
    absolute_path,
    in_recipe,
    not_none,
    opened_tables,
    paths_of,
    require_pictures,
    targets_of_names,
    where_in_list,
)
from flashtask.data.given_rows import Rows, TargetFormat, check_rows, table_of_rows, target_column, with_format
from flashtask.data.image_datamodule import ImageDataModule
from flashtask.data.image_source import FILES, ImageSource, MemoryImages, source_of_files
from flashtask.data.layout import (
    DEFAULT_VAL_SPLIT,
    has_class_folders,
    is_shards,
    is_table_name,
    resolve_layout,
    stage_folder,
)
from flashtask.data.problems import Problems
from flashtask.data.samples import PARTS, Column, SampleTable, as_text
from flashtask.data.shard_index import ShardIndex
from flashtask.data.shards import read_samples
from flashtask.data.table_columns import OtherColumns
from flashtask.data.table_rows import require_columns, rows_of_table, understood
from flashtask.data.tables import Frame, Table, open_table
from flashtask.data.targets import LabelReader, LabelsReader, NumberReader, SharesReader, TargetReader
from flashtask.trainer.datamodule import DataModule

__all__ = ["ImageData"]

Arrays = np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]]
Tensors = torch.Tensor | Sequence[torch.Tensor]


class ImageData(ImageDataModule):
    """Base of image data: each constructor makes a table of samples, and a reader of their targets.

    A kind of data is a subclass that names its `readers`.
    """

    #: What a recipe may call.
    constructors: ClassVar[tuple[str, ...]] = (
        "from_folders",
        "from_csv",
        "from_files",
        "from_hub_dataset",
        "from_shards",
    )
    #: The kinds of targets that such data may have; the first is the one of folders.
    readers: ClassVar[tuple[type[TargetReader], ...]] = ()

    # ---- folders and files

    @classmethod
    @takes(ImageOptions)
    def from_folders(
        cls,
        train_folder: PathLike | None = None,
        val_folder: PathLike | None = None,
        test_folder: PathLike | None = None,
        predict_folder: PathLike | None = None,
        *,
        load_image: str | Callable[[str], Any] | None = None,
        **options: Unpack[ImageOptions],
    ) -> Self:
        """Take folders whose names are the targets: `train_folder/cat/1.jpg` is an image of a cat.

        Args:
            train_folder: defines the classes, sorted by name as text.
            val_folder: matched to the classes by name; a class may be missing, none may be added.
            test_folder: as `val_folder`.
            predict_folder: images without targets, at any depth.
            load_image: as in `from_files`; a folder then holds the files with the suffixes of the function.

        Raises:
            UsageError: an invalid value, or arguments that contradict each other.
            MissingInputError: a folder that is not there.
            BadDataError: folders that are not class folders, or class names that do not match.
        """
        given = {"train": train_folder, "val": val_folder, "test": test_folder, "predict": predict_folder}
        known = checked_options(options)
        check_split(known, given, "folder")
        folders = check_folders(given)
        source = source_of_files(load_image)
        listed = {part: _list_part(part, folder, source.is_image) for part, folder in folders.items()}
        table = SampleTable.joined(
            [
                SampleTable.of_part(
                    part, images.paths, as_text(images.names) if images.names else None, root=images.root
                )
                for part, images in listed.items()
            ]
        )
        arguments: dict[str, Any] = {f"{part}_folder": str(folder) for part, folder in folders.items()}
        arguments |= not_none(load_image=source.given)
        remarks = {part: list(_remarks(part, images)) for part, images in listed.items()}
        made = cls(table, cls.readers[0](), ("from_folders", {**arguments, **known}), remarks, source)
        made.preprocessing = read_preprocessing(options.get("preprocessing"))
        return made

    @classmethod
    @takes(TargetOptions)
    def from_files(
        cls,
        train_files: PathLike | Sequence[PathLike] | None = None,
        train_targets: Sequence[Any] | None = None,
        val_files: PathLike | Sequence[PathLike] | None = None,
        val_targets: Sequence[Any] | None = None,
        test_files: PathLike | Sequence[PathLike] | None = None,
        test_targets: Sequence[Any] | None = None,
        predict_files: PathLike | Sequence[PathLike] | None = None,
        *,
        target: str | Callable[[str], Any] | None = None,
        load_image: str | Callable[[str], Any] | None = None,
        **options: Unpack[TargetOptions],
    ) -> Self:
        """Take image files, with a target for each, or with targets that are in their names.

        Args:
            train_files: paths; or a folder, for all images in it.
            train_targets: one for each file: a text, a number, or several.
            val_files: as `train_files`, to validate on.
            val_targets: of `val_files`.
            test_files: as `val_files`.
            test_targets: of `test_files`.
            predict_files: files without targets.
            target: in place of lists of targets: a regular expression, whose first group is the target, searched in
                each path (with forward slashes); or a function from the path to the target.
            load_image: reads a file in place of Pillow: a function from a path to an array (H, W) or (H, W, C), a
                tensor or a PIL image, or the name of one in `flashtask.IMAGE_LOADERS`.

        Raises:
            UsageError: an invalid value, or another number of targets than files.
            MissingInputError: a folder that is not there.
            BadDataError: files that are not there, or targets that cannot be read; all are named.
        """
        given = {"train": train_files, "val": val_files, "test": test_files, "predict": predict_files}
        targets = {
            part: list(own) if isinstance(own, Iterator) else own
            for part, own in {"train": train_targets, "val": val_targets, "test": test_targets}.items()
        }
        source = source_of_files(load_image)
        files = {
            part: paths_of(one, f"{part}_files", source.is_image)
            for part, one in check_files(given, "from_files", "files", '["1.png", "2.png"]').items()
        }
        arguments: dict[str, Any] = {}
        for part, paths in files.items():
            arguments[f"{part}_files"] = in_recipe(given[part], paths)
            if targets.get(part) is not None:
                arguments[f"{part}_targets"] = in_recipe(targets[part], targets[part])
        arguments |= not_none(target=target, load_image=source.given)
        folder = os.path.commonpath([os.path.dirname(path) for paths in files.values() for path in paths])
        rows, problems = [], Problems()
        for part, paths in files.items():
            where = where_in_list(f"{part}_files")
            own = targets.get(part)
            if target is not None and part != "predict":
                if own is not None:
                    raise UsageError(f"{part}_targets and target both give the targets", fix="leave one of them out")
                own = list(targets_of_names(paths, target, where, problems))
            if own is None and part != "predict":
                raise UsageError(f"{part}_files needs targets", fix=f"{part}_targets=[...], or target=r'([a-z]+)_'")
            column = None if own is None else cls._target_column(own, f"{part}_targets", len(paths))
            rows.append(Rows(part, f"{part}_files", where, as_text(paths), "", column, folder, problems=problems))
        check_split(options, given, "files")
        return cls._of_rows(rows, ("target",), ("from_files", arguments), dict(options), source)

    # ---- tables

    @classmethod
    @takes(TargetOptions)
    def from_csv(
        cls,
        input_field: str | None = None,
        target_fields: str | Sequence[str] | None = None,
        train_file: PathLike | None = None,
        val_file: PathLike | None = None,
        test_file: PathLike | None = None,
        predict_file: PathLike | None = None,
        *,
        images_root: PathLike | None = None,
        resolver: Callable[[str], PathLike] | None = None,
        split_field: str | None = None,
        group_field: str | None = None,
        weight_field: str | None = None,
        load_image: str | Callable[[str], Any] | None = None,
        **options: Unpack[TargetOptions],
    ) -> Self:
        """Take tables in files, a row an image: CSV or TSV with a header, Parquet, or JSON lines.

        Args:
            input_field: the column with the paths of the images; the only one that holds names of images if not given.
            target_fields: the column or columns with the targets; the only other column if not given.
            train_file: the table to train on: .csv, .tsv, .parquet or .jsonl.
            val_file: as `train_file`, to validate on; it has the same columns.
            test_file: as `val_file`.
            predict_file: images without targets.
            images_root: the folder that relative paths count from; that of each table if not given.
            resolver: from a cell of `input_field` to the path of the image.
            split_field: a column of `train_file` that names the part of each row (train, val, test).
            group_field: a column of `train_file`; rows with the same value (a patient, a site) are never split
                between training and validation by `val_split`.
            weight_field: a column of `train_file` with numbers of 0 or more: how much each row counts in the training
                loss, as a share of their mean. Validation and test count all rows alike.
            load_image: as in `from_files`.

        Raises:
            UsageError: an invalid value.
            MissingInputError: a file that is not there.
            BadDataError: a file that is not a table, a column that is not there, or rows that cannot be used; all are
                named.
        """
        given = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        tables = opened_tables("from_csv", "file", given, options)
        arguments = {table.argument: table.place for table in tables.values()}
        columns = {"split_field": split_field, "group_field": group_field, "weight_field": weight_field}
        source = source_of_files(load_image)
        own = not_none(images_root=absolute_path(images_root), resolver=resolver, load_image=source.given)
        recipe = ("from_csv", arguments)
        return cls._of_tables(tables, input_field, target_fields, columns, recipe, own, dict(options), source)

    @classmethod
    @takes(TargetOptions)
    def from_data_frame(
        cls,
        input_field: str | None = None,
        target_fields: str | Sequence[str] | None = None,
        train_data_frame: Frame | Mapping[str, Sequence[Any]] | None = None,
        val_data_frame: Frame | Mapping[str, Sequence[Any]] | None = None,
        test_data_frame: Frame | Mapping[str, Sequence[Any]] | None = None,
        predict_data_frame: Frame | Mapping[str, Sequence[Any]] | None = None,
        *,
        images_root: PathLike | None = None,
        resolver: Callable[[str], PathLike] | None = None,
        split_field: str | None = None,
        group_field: str | None = None,
        weight_field: str | None = None,
        load_image: str | Callable[[str], Any] | None = None,
        **options: Unpack[TargetOptions],
    ) -> Self:
        """Take data frames of pandas or polars, a row an image; a mapping from names to columns is one too.

        Args:
            input_field: the column with paths of images, or with the images; found if there is only one.
            target_fields: the column or columns with the targets; the only other column if not given.
            train_data_frame: the table to train on.
            val_data_frame: as `train_data_frame`, to validate on; it has the same columns.
            test_data_frame: as `val_data_frame`.
            predict_data_frame: images without targets.
            images_root: the folder that relative paths count from; the current one if not given.
            resolver: as in `from_csv`, and so are all that follow.
            split_field: a column of `train_data_frame`.
            group_field: a column of `train_data_frame`.
            weight_field: a column of `train_data_frame`.
            load_image: as in `from_files`.

        Raises:
            UsageError: an invalid value.
            BadDataError: a column that is not there, or rows that cannot be used; all are named.
        """
        given = {
            "train": train_data_frame,
            "val": val_data_frame,
            "test": test_data_frame,
            "predict": predict_data_frame,
        }
        tables = opened_tables("from_data_frame", "data_frame", given, options)
        arguments = {table.argument: {"not_saved": table.place} for table in tables.values()}
        columns = {"split_field": split_field, "group_field": group_field, "weight_field": weight_field}
        source = source_of_files(load_image)
        own = not_none(images_root=absolute_path(images_root), resolver=resolver, load_image=source.given)
        recipe = ("from_data_frame", arguments)
        return cls._of_tables(tables, input_field, target_fields, columns, recipe, own, dict(options), source)

    # ---- memory

    @classmethod
    @takes(TargetOptions)
    def from_numpy(
        cls,
        train_data: Arrays | None = None,
        train_targets: Sequence[Any] | None = None,
        val_data: Arrays | None = None,
        val_targets: Sequence[Any] | None = None,
        test_data: Arrays | None = None,
        test_targets: Sequence[Any] | None = None,
        predict_data: Arrays | None = None,
        **options: Unpack[TargetOptions],
    ) -> Self:
        """Take NumPy arrays: (N, H, W, C) or (N, H, W), or a list of arrays (H, W, C) or (H, W) of any sizes.

        Values of uint8 are pixels as they are; other numbers are scaled by `value_range`, which is found over the
        training images if it is not given.

        Args:
            train_data: images to train on, with 1, 3 (RGB) or 4 channels.
            train_targets: one for each: numbers of classes, names, (N, K) flags or numbers, or lists of labels.
            val_data: to validate on.
            val_targets: of `val_data`.
            test_data: as `val_data`.
            test_targets: of `test_data`.
            predict_data: images without targets.

        Raises:
            UsageError: an invalid value, or another number of targets than images.
            BadDataError: targets that cannot be read; all are named.
        """
        data = {"train": train_data, "val": val_data, "test": test_data, "predict": predict_data}
        targets = {"train": train_targets, "val": val_targets, "test": test_targets}
        return cls._of_pictures("from_numpy", "data", data, targets, dict(options))

    @classmethod
    @takes(TargetOptions)
    def from_tensors(
        cls,
        train_data: Tensors | None = None,
        train_targets: Sequence[Any] | None = None,
        val_data: Tensors | None = None,
        val_targets: Sequence[Any] | None = None,
        test_data: Tensors | None = None,
        test_targets: Sequence[Any] | None = None,
        predict_data: Tensors | None = None,
        **options: Unpack[TargetOptions],
    ) -> Self:
        """Take torch tensors: (N, C, H, W) or (N, H, W), or a list of tensors (C, H, W) or (H, W) of any sizes.

        Args:
            train_data: images to train on, as in `from_numpy` but for the order of the axes.
            train_targets: as in `from_numpy`, and so are all that follow.
            val_data: to validate on.
            val_targets: of `val_data`.
            test_data: as `val_data`.
            test_targets: of `test_data`.
            predict_data: images without targets.

        Raises:
            UsageError: an invalid value, or another number of targets than images.
            BadDataError: targets that cannot be read; all are named.
        """
        data = {"train": train_data, "val": val_data, "test": test_data, "predict": predict_data}
        targets = {"train": train_targets, "val": val_targets, "test": test_targets}
        return cls._of_pictures("from_tensors", "data", data, targets, dict(options))

    @classmethod
    @takes(TargetOptions)
    def from_images(
        cls,
        train_images: Sequence[Any] | None = None,
        train_targets: Sequence[Any] | None = None,
        val_images: Sequence[Any] | None = None,
        val_targets: Sequence[Any] | None = None,
        test_images: Sequence[Any] | None = None,
        test_targets: Sequence[Any] | None = None,
        predict_images: Sequence[Any] | None = None,
        **options: Unpack[TargetOptions],
    ) -> Self:
        """Take PIL images, or the bytes of image files.

        Args:
            train_images: to train on.
            train_targets: as in `from_numpy`, and so are all that follow.
            val_images: to validate on.
            val_targets: of `val_images`.
            test_images: as `val_images`.
            test_targets: of `test_images`.
            predict_images: images without targets.

        Raises:
            UsageError: an invalid value, or another number of targets than images.
            BadDataError: targets that cannot be read; all are named.
        """
        images = {"train": train_images, "val": val_images, "test": test_images, "predict": predict_images}
        targets = {"train": train_targets, "val": val_targets, "test": test_targets}
        return cls._of_pictures("from_images", "images", images, targets, dict(options))

    # ---- datasets

    @classmethod
    @takes(TargetOptions)
    def from_datasets(  # type: ignore[override]
        cls,
        train_dataset: Items | None = None,
        val_dataset: Items | None = None,
        test_dataset: Items | None = None,
        predict_dataset: Items | None = None,
        *,
        input_field: str | None = None,
        target_field: str | None = None,
        **options: Unpack[TargetOptions],
    ) -> Self:
        """Take datasets of torch, torchvision or Hugging Face, whose items are images with targets.

        Items are (image, target), or mappings; an image is a PIL image, an array (H, W, C) or a tensor (C, H, W),
        without random transforms: these belong to `augment`. Names of classes come from `classes` or the features.

        Args:
            train_dataset: to train on.
            val_dataset: to validate on.
            test_dataset: as `val_dataset`.
            predict_dataset: images, with or without targets, which are not used.
            input_field: the key of the image in items that are mappings, or the column; found under the usual names.
            target_field: the same of the target.

        Raises:
            UsageError: an invalid value, or a dataset without a length.
            BadDataError: items that change, or targets that cannot be read.
        """
        given = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        check_split(options, given, "dataset")
        found = {
            part: read_dataset(dataset, f"{part}_dataset", input_field, target_field, has_targets=part != "predict")
            for part, dataset in check_files(given, "from_datasets", "dataset", "dataset").items()
        }
        images = {part: one.images for part, one in found.items()}
        targets = {part: one.targets for part, one in found.items()}
        named = {**_labels_of(found), **options}
        return cls._of_pictures(
            "from_datasets",
            "dataset",
            images,
            targets,
            named,
            kinds={part: type(dataset).__name__ for part, dataset in given.items()},
            field=target_field or "target",
        )

    @classmethod
    @takes(TargetOptions)
    def from_data_module(cls, datamodule: DataModule, **options: Unpack[TargetOptions]) -> Self:
        """Take the datasets of another data module's loaders, with the preprocessing and augmentation of this class.

        Args:
            datamodule: whose loaders have datasets as in `from_datasets`; its batch size and transforms of batches are
                not used.

        Raises:
            UsageError: its loaders have no datasets, or it is data of flashtask's own.
            BadDataError: as `from_datasets`.
        """
        if not isinstance(datamodule, DataModule):
            raise UsageError(f"datamodule must be a DataModule, not {type(datamodule).__name__}")
        if isinstance(datamodule, ImageDataModule):
            raise UsageError(
                f"datamodule is {type(datamodule).__name__}, which has preprocessing and augmentation of its own",
                fix="trainer.finetune(model, datamodule=datamodule); or call its own constructor again",
            )
        datamodule.prepare_data()
        found: dict[str, Any] = {}
        for part, stage in {"train": "fit", "val": "fit", "test": "test", "predict": "predict"}.items():
            datamodule.setup(stage)
            loader = getattr(datamodule, f"{part}_dataloader")()
            if loader is not None:
                if not hasattr(loader, "dataset"):
                    raise UsageError(f"{part}_dataloader() gives {type(loader).__name__}, which has no dataset")
                found[f"{part}_dataset"] = loader.dataset
        return cls.from_datasets(**found, **options)

    @classmethod
    @takes(TargetOptions)
    def from_hub_dataset(
        cls,
        repository: str,
        *,
        revision: str | None = None,
        input_field: str | None = None,
        target_fields: str | Sequence[str] | None = None,
        **options: Unpack[TargetOptions],
    ) -> Self:
        """Take a dataset repository of the Hugging Face hub: Parquet files, other tables, or folders of images.

        Files are fetched once and compared with the hashes that the hub gives. Those whose name or folder speaks of
        `train`, `validation` or `test` are that part. Images in Parquet files are copied once into the cache.

        Args:
            repository: `org/name`, or an address such as `hf://datasets/org/name@main`.
            revision: a branch, tag or commit.
            input_field: the column of the images; found if there is only one.
            target_fields: the column or columns of the targets; the only other column if not given.

        Raises:
            UsageError: an invalid value.
            BadDataError: the repository holds no images, a column is not there, or rows cannot be used.
            HubError: the hub cannot be reached, or refuses.
            IntegrityError: a file is not the one that the hub promised.
        """
        from flashtask.data.hub_dataset import fetch_dataset  # loads huggingface_hub

        if not isinstance(repository, str):
            raise UsageError(f"repository must be a name such as 'org/name', not {repository!r}")
        found = fetch_dataset(repository, revision)
        if found.folder is not None:
            made = cls.from_root(found.folder, **options)
        else:
            tables = {part: open_table(files, f"{part}_file") for part, files in found.tables.items()}
            known = dict(options)
            if "val" not in tables and known.get("fold") is None:
                known.setdefault("val_split", DEFAULT_VAL_SPLIT)
            arguments = {table.argument: table.place for table in tables.values()}
            first = tables.get("train") or next(iter(tables.values()))
            inputs = first.input_field(input_field)
            fields = first.target_fields(target_fields, (inputs,))
            if (names := first.class_names(fields[0])) is not None:
                known.setdefault("labels", names)
            made = cls._of_tables(tables, inputs, fields, {}, ("from_csv", arguments), {}, known, FILES)
        made._instead = ("from_hub_dataset", not_none(repository=repository, revision=revision))
        return made

    # ---- shards

    @classmethod
    @takes(ImageOptions)
    def from_shards(cls, shards_folder: PathLike, **options: Unpack[ImageOptions]) -> Self:
        """Take a folder of shards that `save_shards` or `flashtask shard` wrote: its images, targets, parts and groups.

        Images are decoded when they are needed, and never kept. Each is compared with its hash in the index.

        Args:
            shards_folder: a folder, or its http(s) or fsspec address. Shards at an address are fetched one after the
                other into the cache, which keeps up to `$FLASHTASK_SHARD_CACHE_BYTES` of them (10 GB).

        Raises:
            UsageError: an invalid value, or targets of another kind.
            MissingInputError: there is no index, or a shard is not there.
            IntegrityError: a file is damaged.
            HubError: the address cannot be reached.
        """
        known = checked_options(options)
        index = ShardIndex.read(shards_folder)
        kinds = {reader.kind: reader for reader in cls.readers}
        if (kind := index.targets.get("kind")) not in kinds:
            raise UsageError(f"{cls.__name__} does not read shards with targets of the kind {kind!r}")
        if index.is_remote and known["sampler"] is not None:
            raise UsageError(
                f"sampler={known['sampler']!r} draws from all shards, which are at an address",
                fix="copy the shards to this machine, or leave it out",
            )
        table, source = read_samples(index)
        chosen = next((name for name in ("val_split", "fold") if known[name]), "")
        if chosen and table.has("val"):
            raise UsageError(f"{index.place} has validation samples, so {chosen} has no use", fix="leave it out")
        check_split(known, {part: index.place if table.has(part) else None for part in PARTS}, "shards")
        arguments = {"shards_folder": index.place, **known}
        made = cls(table, kinds[kind].from_dict(index.targets), ("from_shards", arguments), images=source)
        made.preprocessing = read_preprocessing(options.get("preprocessing"))
        return made

    # ---- what the constructors share

    @classmethod
    def _of_tables(
        cls,
        tables: Mapping[str, Table],
        input_field: str | None,
        target_fields: str | Sequence[str] | None,
        columns: Mapping[str, str | None],
        recipe: tuple[str, dict[str, Any]],
        own: Mapping[str, Any],
        options: dict[str, Any],
        source: ImageSource,
    ) -> Self:
        """Data of the rows of tables, which have the columns of the first of them."""
        first = next(iter(tables.values()))
        named = (target_fields,) if isinstance(target_fields, str) else tuple(target_fields or ())
        has_targets = set(tables) != {"predict"}
        first.require([input_field, *(named if has_targets else ()), *columns.values()])
        inputs = first.input_field(input_field)
        fields = first.target_fields(target_fields, (inputs, *columns.values())) if has_targets else ()
        if twice := [name for place, name in enumerate(fields) if name in (inputs, *fields[:place])]:
            raise UsageError(f"column {twice[0]!r} is used twice: images are in {inputs!r}, targets in {list(fields)}")
        require_columns(tables, inputs, fields)
        of_columns = {name: value for name, value in columns.items() if value is not None}
        separator = {"label_separator": options["label_separator"]} if options.get("label_separator") else {}
        images: dict[str, Sequence[Any]] = {}
        rows = []
        for part, table in tables.items():
            one, held = rows_of_table(part, table, inputs, fields, of_columns, own)
            rows.append(one)
            if held is not None:
                images[table.argument] = held
        arguments = {
            **recipe[1],
            "input_field": inputs,
            "target_fields": list(fields),
            **own,
            **of_columns,
            **separator,
        }
        made = cls._of_rows(rows, fields, (recipe[0], arguments), options, MemoryImages(images) if images else source)
        used = {*fields, *(of_columns[name] for name in ("split_field", "weight_field") if name in of_columns)}
        made.other_columns = OtherColumns(tuple(tables.values()), inputs, frozenset(used), own)
        part = next(iter(tables))
        made._remarks[part] = [understood(tables, rows, inputs, fields, of_columns), *made._remarks.get(part, ())]
        return made

    @classmethod
    def _of_pictures(
        cls,
        constructor: str,
        kind: str,
        given: Mapping[str, Any],
        targets: Mapping[str, Any],
        options: dict[str, Any],
        *,
        kinds: Mapping[str, str] | None = None,
        field: str = "target",
    ) -> Self:
        """Data of pictures in memory."""
        check_split(options, given, kind)
        pictures = check_files(given, constructor, kind, kind)
        arguments: dict[str, Any] = {}
        rows: list[Rows] = []
        fields: tuple[str, ...] = (field,)
        for part, images in pictures.items():
            argument = f"{part}_{kind}"
            require_pictures(images, argument)
            arguments[argument] = {"not_saved": (kinds or {}).get(part) or type(images).__name__}
            column = None
            if targets.get(part) is not None:
                column = cls._target_column(targets[part], f"{part}_targets", len(images))
                if column.ndim == 2:
                    fields = tuple(map(str, range(column.shape[1])))
            elif part != "predict":
                raise UsageError(f"{argument} needs targets", fix=f"{part}_targets=[...]")
            names = as_text(MemoryImages.names(argument, len(images)))
            rows.append(Rows(part, argument, where_in_list(argument), names, targets=column))
        source = MemoryImages({f"{part}_{kind}": images for part, images in pictures.items()})
        return cls._of_rows(rows, fields, (constructor, arguments), options, source)

    @classmethod
    def _target_column(cls, targets: Any, argument: str, count: int) -> Column:
        """Targets in Python as a table has them."""
        return target_column(targets, argument, count)

    @classmethod
    def _of_rows(
        cls,
        rows: Sequence[Rows],
        fields: tuple[str, ...],
        recipe: tuple[str, Mapping[str, Any]],
        options: dict[str, Any],
        source: ImageSource = FILES,
    ) -> Self:
        """Data of rows, once nothing is wrong with any of them."""
        known = checked_options(options)
        name, separator = options.get("target_format", "auto"), options.get("label_separator")
        readers = {LabelReader: "labels", LabelsReader: "labels", NumberReader: "numbers"}
        kind = next((kind for reader, kind in readers.items() if issubclass(cls.readers[0], reader)), "")
        if name == "number" and kind == "labels":
            raise UsageError(f"{cls.__name__} has labels, not numbers", fix="ImageRegressionData")
        labels = options.get("labels")
        rows, targets = with_format(rows, fields, name, separator, labels, kind=kind)
        if targets.name in ("label", "one_hot"):
            reader: TargetReader = cls.readers[0](targets.fields)
        elif targets.name == "soft":
            reader = SharesReader(targets.fields)
        else:
            reader = cls.reader_of_columns(targets.fields, targets.separator)
        table = cls._checked_table(rows, targets, known, source, kind)
        said = {} if name == "auto" else {"target_format": name}
        said |= {} if labels is None else {"labels": list(labels)}
        made = cls(table, reader, (recipe[0], {**recipe[1], **said, **known}), images=source)
        made.preprocessing = read_preprocessing(options.get("preprocessing"))
        return made

    @classmethod
    def _checked_table(
        cls, rows: Sequence[Rows], targets: TargetFormat, known: Mapping[str, Any], source: ImageSource, kind: str
    ) -> SampleTable:
        """The samples of rows, or one error that names all that is wrong with them."""
        problems = Problems()
        for noted in {id(one.problems): one.problems for one in rows if one.problems is not None}.values():
            problems.take(noted)
        table = table_of_rows(rows, problems)
        if known["val_split"] and table.has("val") and not len(problems):
            raise UsageError("val_split and split_field both define the validation data", fix="leave one of them out")
        are_files, may_be_missing = not isinstance(source, MemoryImages), known["on_bad_image"] == "skip"
        check_rows(rows, table, targets, problems, kind=kind, are_files=are_files, may_be_missing=may_be_missing)
        problems.refuse(" and ".join(dict.fromkeys(one.argument for one in rows)))
        return table

    @classmethod
    def reader_of_columns(cls, fields: tuple[str, ...], separator: str | None) -> TargetReader:
        """The reader for targets in these columns of a table.

        Raises:
            UsageError: such data cannot have them.
        """
        if separator is not None:
            raise UsageError(f"{cls.__name__} has no labels to separate", fix="leave out label_separator")
        return cls.readers[0](fields)

    @classmethod
    def suits(cls, constructor: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """Whether what a recipe describes is such data: `certain`, `possible` or `no`, and in words what was seen.

        Args:
            constructor: one of `constructors`.
            arguments: its arguments.
        """
        if constructor == "from_shards":
            kind = ShardIndex.read(arguments["shards_folder"]).targets.get("kind")
            is_ours = kind in [reader.kind for reader in cls.readers]
            return ("certain", f"shards with targets of the kind {kind!r}") if is_ours else ("no", "")
        if constructor == "from_folders":
            folder = arguments.get("train_folder")
            is_labels = cls.readers[:1] == (LabelReader,) and (folder is None or has_class_folders(folder))
            return ("certain", "class folders") if is_labels else ("no", "")
        if constructor == "from_hub_dataset":
            from flashtask.data.hub_dataset import fetch_dataset

            fetched = fetch_dataset(arguments["repository"], arguments.get("revision"))
            if fetched.folder is not None:
                return cls.suits("from_folders", {})
            table = open_table(next(iter(fetched.tables.values())), "train_file")
        elif constructor == "from_csv":
            argument = next(name for name in (f"{part}_file" for part in PARTS) if arguments.get(name))
            table = open_table(arguments[argument], argument)
        else:
            return "certain", constructor
        if arguments.get("label_separator"):
            return ("certain", "several labels in a column") if LabelsReader in cls.readers else ("no", "")
        used = (arguments.get(f"{name}_field") for name in ("split", "group", "weight"))
        inputs = table.input_field(arguments.get("input_field"))
        fields = table.target_fields(arguments.get("target_fields"), (inputs, *used))
        if table.class_names(fields[0]) is not None:
            return ("certain", f"classes in the column {fields[0]!r}") if LabelReader in cls.readers else ("no", "")
        columns = table.columns(fields)
        raw = np.stack(columns, axis=1) if len(columns) > 1 else columns[0]
        readings = [reader.suits(raw) for reader in cls.readers]
        reading, seen = min(readings, key=lambda one: ("certain", "possible", "no").index(one[0]))
        named = f"column{'s' if len(fields) > 1 else ''} {', '.join(map(repr, fields))}"
        return reading, f"{seen} in the {named}"

    @classmethod
    def from_root(cls, root: PathLike, *, val_split: float | int | None = None, **options: Any) -> Self:
        """Take one folder: of `train/` (and `val/`, `test/`, `predict/`), or of class folders.

        Without validation images of its own, `val_split` (0.2 unless given) of the training images validate.

        Args:
            root: the folder.
            val_split: as in `from_folders`.
            options: as in `from_folders`.
        """
        layout = resolve_layout(root)
        if val_split is None and options.get("fold") is None and layout.val is None:
            val_split = DEFAULT_VAL_SPLIT
        return cls.from_folders(layout.train, layout.val, layout.test, layout.predict, val_split=val_split, **options)

    @classmethod
    def for_evaluation(
        cls, source: PathLike, part: str, targets: Mapping[str, Any] | None = None, **options: Any
    ) -> Self:
        """What a trained model is measured on: a table with the columns that it was trained on, or a folder.

        Args:
            source: a table; a folder of shards that has the part; else a folder that holds one for the part, or the
                folder of the part itself.
            part: `val` or `test`.
            targets: of the model, as its reader describes them.
            options: of the constructor; with `split_field` only the rows of the part are measured.

        Raises:
            BadDataError: rows or images that cannot be used, or a table without rows of the part.
        """
        if is_shards(source):
            return cls.from_shards(source, **options)
        if not is_table_name(source):
            folders: dict[str, Any] = {f"{part}_folder": stage_folder(source, part)}
            return cls.from_folders(**folders, **options)
        known = targets or {}
        own: dict[str, Any] = {"target_fields": known.get("fields"), "label_separator": known.get("separator")}
        if known.get("kind") == LabelReader.kind and len(known.get("fields") or ()) > 1:
            own["target_format"] = "one_hot"
        elif known.get("kind") == SharesReader.kind:
            own["target_format"] = "soft"
        tables = {name: value for name, value in own.items() if value}
        if options.get("split_field") is None:
            return cls.from_csv(**{f"{part}_file": source, **tables, **options})
        made = cls.from_csv(train_file=source, **{**tables, **options})
        if part not in made.sizes():
            raise BadDataError(f"no row of {os.fspath(source)!r} is in {part}: column {options['split_field']!r}")
        return made


def _labels_of(found: Mapping[str, DatasetPart]) -> dict[str, Any]:
    labels = next((one.labels for one in found.values() if one.labels is not None), None)
    return {} if labels is None else {"labels": labels}


def _remarks(part: str, images: ImageSet) -> Iterator[str]:
    """What is worth saying of a folder that was listed."""
    if images.ignored:
        shown = ", ".join(repr(os.path.basename(file)) for file in images.ignored[:3])
        more = ", ..." if len(images.ignored) > 3 else ""
        what = f"{len(images.ignored)} file(s) without the extension of an image are not used"
        yield f"{part}_folder: {what}: {shown}{more}"
    if part == "train" and (inside := images.same_subfolders()):
        classes, folders = ", ".join(images.classes[:8]), ", ".join(inside[:8])
        yield f"warning: train_folder: every class has the same folders ({folders}); the classes are {classes}"


def _list_part(part: str, folder: Path, is_image: Callable[[str], bool]) -> ImageSet:
    argument = f"{part}_folder"
    if part == "predict":
        return list_images(folder, argument, is_image)
    return list_class_folders(folder, argument, min_classes=2 if part == "train" else 1, is_image=is_image)
