"""`ObjectDetectionData`: images with boxes, from COCO, Pascal VOC, YOLO, tables and arrays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, Unpack, cast

import numpy as np

from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.files import missing_file
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
from flashtask.data.box_checks import tables_of
from flashtask.data.box_files import Annotations, columns_of_boxes, read_boxes_table, read_yolo_file
from flashtask.data.box_layouts import (
    Found,
    layout_of,
    of_coco,
    of_images,
    of_yolo,
    own_part,
    read_folder,
    voc_folders,
)
from flashtask.data.boxes import BoxReader, BoxTable
from flashtask.data.coco_files import coco_files
from flashtask.data.folders import list_images
from flashtask.data.given_arguments import absolute_path, opened_tables
from flashtask.data.image_data import ImageData
from flashtask.data.image_source import FILES, ImageSource, MemoryImages
from flashtask.data.layout import is_yolo_file
from flashtask.data.problems import Problems
from flashtask.data.samples import PARTS, SampleTable
from flashtask.data.table_columns import OtherColumns
from flashtask.data.tables import Table, open_table

__all__ = ["ObjectDetectionData"]

_TARGETS_FIX = '[{"boxes": [[10, 20, 50, 60]], "labels": ["cat"]}, ...], left, top, right, bottom in pixels'


class ObjectDetectionData(ImageData):
    """Images with any number of boxes, each with a label; images without objects are trained on too.

    Boxes are kept in pixels of the upright picture, as left, top, right, bottom, where 0 is the left or upper edge.
    They move with the image through every augmentation. A transform of your own takes image and target, as those of
    `torchvision.transforms.v2` do.
    """

    readers: ClassVar[tuple[type[BoxReader], ...]] = (BoxReader,)
    constructors: ClassVar[tuple[str, ...]] = ("from_folders", "from_coco", "from_voc", "from_yolo", "from_csv")
    #: What the start of a run counts.
    _noun = "boxes"
    #: Where the annotations of one part are, and those of a part that the training folder names itself.
    _read_folder = staticmethod(read_folder)
    _own_part = staticmethod(own_part)

    # ---- folders

    @classmethod
    @takes(ImageOptions)
    def from_folders(  # type: ignore[override]  # image files alone: no `load_image`
        cls,
        train_folder: PathLike | None = None,
        val_folder: PathLike | None = None,
        test_folder: PathLike | None = None,
        predict_folder: PathLike | None = None,
        **options: Unpack[ImageOptions],
    ) -> Self:
        """Take folders whose annotations are recognised: COCO, Pascal VOC or YOLO.

        A part is COCO's if its folder holds `annotations.json` or `_annotations.coco.json`, or lies beside
        `annotations/instances_PART.json`; Pascal VOC's if there are `Annotations/` and `JPEGImages/` in it, or XML
        files beside the images; YOLO's if it, or the folder that it lies in, holds `data.yaml`. If a whole data set of
        VOC or YOLO is given as `train_folder`, its own lists of validation and test images count.

        Args:
            train_folder: defines the classes, those that have a box, in the order of their ids or their names.
            val_folder: as `train_folder`, to validate on.
            test_folder: as `val_folder`.
            predict_folder: images without boxes, at any depth.

        Raises:
            UsageError: an invalid value, or arguments that contradict each other.
            MissingInputError: a folder that is not there.
            BadDataError: no annotations, or boxes that cannot be used; all are named.
        """
        given = {"train": train_folder, "val": val_folder, "test": test_folder, "predict": predict_folder}
        check_split(options, given, "folder")
        folders = check_folders(given)
        found: dict[str, Found] = {}
        for part, folder in folders.items():
            found[part] = of_images(folder) if part == "predict" else cls._read_folder(folder, part)
        remarks = []
        if "train" in folders:
            for part in ("val", "test"):
                if part not in folders and (own := cls._own_part(folders["train"], part)) is not None:
                    found[part] = own
            if "val" in found and options.get("val_split"):
                remarks.append("the data set names its own validation images, so val_split is not used")
                options["val_split"] = None
            if "val" in found and options.get("fold") is not None:
                raise UsageError("the data set names its own validation images, so fold has no use", fix="leave it out")
        arguments = {f"{part}_folder": str(folder) for part, folder in folders.items()}
        return cls._of_found(found, ("from_folders", arguments), dict(options), remarks=remarks)

    @classmethod
    @takes(ImageOptions)
    def from_coco(
        cls,
        train_folder: PathLike | None = None,
        train_ann_file: PathLike | None = None,
        val_folder: PathLike | None = None,
        val_ann_file: PathLike | None = None,
        test_folder: PathLike | None = None,
        test_ann_file: PathLike | None = None,
        predict_folder: PathLike | None = None,
        **options: Unpack[ImageOptions],
    ) -> Self:
        """Take COCO's JSON files and the folders of their images.

        Regions with `iscrowd` are neither trained on nor counted, as in COCO's own metrics.

        Args:
            train_folder: of the images to train on.
            train_ann_file: their annotations; found in the folder or beside it if not given.
            val_folder: as `train_folder`, to validate on.
            val_ann_file: of `val_folder`.
            test_folder: as `val_folder`.
            test_ann_file: of `test_folder`.
            predict_folder: images without boxes.

        Raises:
            UsageError: an invalid value.
            MissingInputError: a folder or file that is not there.
            BadDataError: files that are not COCO's, or boxes that cannot be used; all are named.
        """
        given = {"train": train_folder, "val": val_folder, "test": test_folder, "predict": predict_folder}
        files = {"train": train_ann_file, "val": val_ann_file, "test": test_ann_file}
        check_split(options, given, "folder")
        folders = check_folders(given)
        written = coco_files(folders, files)
        arguments = {f"{part}_folder": str(folder) for part, folder in folders.items()}
        arguments |= {f"{part}_ann_file": file for part, file in written.items()}
        found = {
            part: of_images(folder) if part == "predict" else of_coco(written[part], folder)
            for part, folder in folders.items()
        }
        return cls._of_found(found, ("from_coco", arguments), dict(options))

    @classmethod
    @takes(ImageOptions)
    def from_voc(
        cls,
        train_folder: PathLike | None = None,
        val_folder: PathLike | None = None,
        test_folder: PathLike | None = None,
        predict_folder: PathLike | None = None,
        **options: Unpack[ImageOptions],
    ) -> Self:
        """Take folders of Pascal VOC: `Annotations/` and `JPEGImages/`, or XML files beside the images.

        Args:
            train_folder: to train on; one with `ImageSets/Main/val.txt` has its own validation images.
            val_folder: as `train_folder`, to validate on.
            test_folder: as `val_folder`.
            predict_folder: images without boxes.

        Raises:
            UsageError: an invalid value.
            MissingInputError: a folder that is not there.
            BadDataError: files that are not VOC's, or boxes that cannot be used; all are named.
        """
        folders = {"train_folder": train_folder, "val_folder": val_folder, "test_folder": test_folder}
        for argument, folder in folders.items():
            if folder is not None and Path(folder).is_dir() and voc_folders(Path(folder)) is None:
                raise BadDataError(f"{argument}: there are no XML files of Pascal VOC in {os.fspath(folder)!r}")
        made = cls.from_folders(**folders, predict_folder=predict_folder, **options)
        made._constructor = "from_voc"
        return made

    @classmethod
    @takes(ImageOptions)
    def from_yolo(cls, data_file: PathLike, **options: Unpack[ImageOptions]) -> Self:
        """Take the `data.yaml` of YOLO, which names the classes and the folders of images and, by these, of labels.

        Args:
            data_file: the YAML file.

        Raises:
            UsageError: an invalid value.
            MissingInputError: the file is not there.
            BadDataError: it is not YOLO's, or boxes that cannot be used; all are named.
        """
        file = os.path.abspath(os.path.expanduser(os.fspath(data_file)))
        if not os.path.isfile(file):
            raise missing_file(file)
        _, parts = read_yolo_file(file)
        found = {part: of_yolo(file, part) for part in parts}
        if "val" in found and options.get("val_split"):
            raise UsageError(f"val_split and `val` in {file!r} both define the validation data", fix="drop val_split")
        return cls._of_found(found, ("from_yolo", {"data_file": file}), dict(options))

    # ---- tables

    @classmethod
    @takes(ImageOptions)
    def from_csv(  # type: ignore[override]
        cls,
        input_field: str | None = None,
        target_fields: str | Sequence[str] | None = None,
        train_file: PathLike | None = None,
        val_file: PathLike | None = None,
        test_file: PathLike | None = None,
        predict_file: PathLike | None = None,
        *,
        images_root: PathLike | None = None,
        split_field: str | None = None,
        group_field: str | None = None,
        **options: Unpack[ImageOptions],
    ) -> Self:
        """Take tables with a row a box: the path of the image, x1, y1, x2, y2 in pixels, and the label.

        A row with a path alone is an image without objects.

        Args:
            input_field: the column with the paths of the images; found if not given.
            target_fields: the five columns x1, y1, x2, y2 and label; found by their usual names (`xmin`, `left`, ...,
                `class`) if not given.
            train_file: the table to train on: .csv, .tsv, .parquet or .jsonl.
            val_file: as `train_file`, to validate on.
            test_file: as `val_file`.
            predict_file: a column of images.
            images_root: the folder that relative paths count from; that of each table if not given.
            split_field: a column of `train_file` that names the part of each row (train, val, test).
            group_field: a column of `train_file`; images with the same value (a site, a video) are never split between
                training and validation by `val_split`.

        Raises:
            UsageError: an invalid value.
            MissingInputError: a file that is not there.
            BadDataError: a column that is not there, or rows that cannot be used; all are named.
        """
        given = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        tables, root = opened_tables("from_csv", "file", given, options), absolute_path(images_root)
        arguments: dict[str, Any] = {table.argument: table.place for table in tables.values()}
        columns = {"split_field": split_field, "group_field": group_field}
        recipe = ("from_csv", arguments)
        return cls._of_box_tables(tables, input_field, target_fields, columns, root, recipe, dict(options))

    @classmethod
    @takes(ImageOptions)
    def from_data_frame(  # type: ignore[override]
        cls,
        input_field: str | None = None,
        target_fields: str | Sequence[str] | None = None,
        train_data_frame: Any = None,
        val_data_frame: Any = None,
        test_data_frame: Any = None,
        predict_data_frame: Any = None,
        *,
        images_root: PathLike | None = None,
        split_field: str | None = None,
        group_field: str | None = None,
        **options: Unpack[ImageOptions],
    ) -> Self:
        """Take data frames of pandas or polars, or mappings from names to columns, with a row a box as in `from_csv`.

        Args:
            input_field: as in `from_csv`.
            target_fields: as in `from_csv`.
            train_data_frame: the table to train on.
            val_data_frame: to validate on.
            test_data_frame: as `val_data_frame`.
            predict_data_frame: a column of images.
            images_root: the folder that relative paths count from; the current one if not given.
            split_field: a column of `train_data_frame`, as in `from_csv`.
            group_field: a column of `train_data_frame`, as in `from_csv`.

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
        tables, root = opened_tables("from_data_frame", "data_frame", given, options), absolute_path(images_root)
        arguments: dict[str, Any] = {table.argument: {"not_saved": table.place} for table in tables.values()}
        columns = {"split_field": split_field, "group_field": group_field}
        recipe = ("from_data_frame", arguments)
        return cls._of_box_tables(tables, input_field, target_fields, columns, root, recipe, dict(options))

    @classmethod
    def _of_box_tables(
        cls,
        tables: Mapping[str, Table],
        input_field: str | None,
        target_fields: str | Sequence[str] | None,
        columns: Mapping[str, str | None],
        root: str | None,
        recipe: tuple[str, dict[str, Any]],
        options: dict[str, Any],
    ) -> Self:
        first = next(iter(tables.values()))
        first.require([input_field, *columns.values()])
        inputs = first.input_field(input_field)
        fields = () if set(tables) == {"predict"} else _box_fields(first, inputs, target_fields)
        found: dict[str, Found] = {}
        for part, table in tables.items():
            folder = table.folder if root is None else root
            if part == "predict":
                (names,) = table.columns([inputs])
                made = Annotations()
                for name in names.tolist():
                    made.add_image(os.path.normpath(os.path.join(folder, name)))
                read = {part: made}
            else:
                own = columns if part == "train" else {}
                read = read_boxes_table(table, inputs, fields, folder, part, **own)
            layout = f"{os.path.basename(table.place)}, a row a box"
            if twice := [name for name in read if name in found]:
                raise UsageError(
                    f"split_field and {table.argument} both define the {twice[0]} data", fix="leave one of them out"
                )
            found |= {name: Found(layout, made, folder) for name, made in read.items()}
        if "val" in found and (options.get("val_split") is not None or options.get("fold") is not None):
            raise UsageError("val_split and split_field both define the validation data", fix="leave one of them out")
        used = {name: value for name, value in (*columns.items(), ("images_root", root)) if value is not None}
        arguments = {**recipe[1], "input_field": inputs, "target_fields": list(fields), **used}
        data = cls._of_found(found, (recipe[0], arguments), options, fields=fields)
        used_up = frozenset([*fields, *filter(None, [columns.get("split_field")])])
        data.other_columns = OtherColumns(tuple(tables.values()), inputs, used_up, {"images_root": root})
        return data

    # ---- memory

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
        """Data of pictures in memory; a target is a mapping with `boxes` (n, 4) and `labels` (n,)."""
        if constructor == "from_datasets":
            _refuse("from_datasets")
        check_split(options, given, kind)
        pictures = check_files(given, constructor, kind, kind)
        arguments: dict[str, Any] = {f"{p}_{kind}": {"not_saved": type(one).__name__} for p, one in pictures.items()}
        found = {}
        for part, images in pictures.items():
            argument = f"{part}_{kind}"
            names = MemoryImages.names(argument, len(images))
            own = None if part == "predict" else targets.get(part)
            found[part] = Found("in memory", cls._of_objects(names, own, argument, part), "")
        source = MemoryImages({f"{part}_{kind}": images for part, images in pictures.items()})
        return cls._of_found(found, (constructor, arguments), options, source)

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
        """Take image files, with the boxes of each as a mapping of `boxes` (n, 4) and `labels` (n,).

        Args:
            train_files: paths.
            train_targets: a mapping for each file.
            val_files: as `train_files`, to validate on.
            val_targets: of `val_files`.
            test_files: as `val_files`.
            test_targets: of `test_files`.
            predict_files: files without targets.
            target: not used for boxes.
            load_image: not used for boxes.

        Raises:
            UsageError: an invalid value, or another number of targets than files.
            BadDataError: files that are not there, or boxes that cannot be used; all are named.
        """
        if target is not None or load_image is not None:
            raise UsageError(f"{cls.__name__}.from_files takes neither target nor load_image", fix="leave them out")
        given = {"train": train_files, "val": val_files, "test": test_files, "predict": predict_files}
        targets = {"train": train_targets, "val": val_targets, "test": test_targets}
        check_split(options, given, "files")
        found, arguments = {}, {}
        for part, one in check_files(given, "from_files", "files", '["1.png", "2.png"]').items():
            is_folder = isinstance(one, (str, os.PathLike))
            paths = list_images(Path(one), f"{part}_files").paths if is_folder else [os.path.abspath(p) for p in one]
            own = None if part == "predict" else targets.get(part)
            found[part] = Found("files", cls._of_objects(list(paths), own, f"{part}_files", part), "")
            arguments[f"{part}_files"] = {"not_saved": f"{len(paths):,} values"}
        return cls._of_found(found, ("from_files", arguments), dict(options))

    @classmethod
    def _of_rows(cls, *arguments: Any, **options: Any) -> Self:
        _refuse("this constructor")

    @classmethod
    def _of_tables(cls, *arguments: Any, **options: Any) -> Self:
        _refuse("from_hub_dataset")

    @classmethod
    def for_evaluation(
        cls, source: PathLike, part: str, targets: Mapping[str, Any] | None = None, **options: Any
    ) -> Self:
        """As `ImageData.for_evaluation`; or the part of a data set that a `data.yaml` of YOLO describes."""
        if not is_yolo_file(source):
            return super().for_evaluation(source, part, targets, **options)
        made = cls.from_yolo(source, **options)
        if part not in made.sizes():
            raise BadDataError(f"{os.fspath(source)!r} names no images for {part}")
        return made

    # ---- what the constructors share

    @classmethod
    def _of_found(
        cls,
        found: Mapping[str, Found],
        recipe: tuple[str, Mapping[str, Any]],
        options: dict[str, Any],
        images: ImageSource = FILES,
        *,
        fields: tuple[str, ...] = (),
        remarks: Sequence[str] = (),
    ) -> Self:
        """Data of annotations, once nothing is wrong with any box."""
        for name in ("label_separator", "target_format", "labels"):
            if options.pop(name, None) not in (None, "auto"):
                raise UsageError(f"{cls.__name__} takes no {name}", fix="leave it out")
        known = checked_options(options)
        ordered = {part: found[part] for part in PARTS if part in found}
        for part, one in ordered.items():
            if not one.annotations.paths and not len(one.annotations.problems):
                raise BadDataError(f"the {part} data has no images ({one.layout})")
        table, boxes, problems = tables_of(
            {part: one.annotations for part, one in ordered.items()},
            {part: one.root for part, one in ordered.items()},
            images,
            may_be_missing=known["on_bad_image"] == "skip",
        )
        reader = cls._reader_of(fields, boxes, ordered, problems)
        problems.refuse("; ".join(dict.fromkeys(one.layout for one in ordered.values())))
        said = {part: [_understood(part, one, cls._noun), *one.annotations.remarks] for part, one in ordered.items()}
        said[next(iter(ordered))] += remarks
        made = cls(table, reader, (recipe[0], {**recipe[1], **known}), said, images)
        made.preprocessing = read_preprocessing(options.get("preprocessing"))
        return made

    @classmethod
    def _reader_of(
        cls, fields: tuple[str, ...], boxes: BoxTable, found: Mapping[str, Found], problems: Problems
    ) -> BoxReader:
        """The reader of what was found; what else is wrong with it is added to the problems."""
        return BoxReader(fields, table=boxes)

    @classmethod
    def _of_objects(cls, names: Sequence[str], targets: Any, argument: str, part: str) -> Annotations:
        """Targets that are given in Python."""
        return _of_objects(names, targets, argument, part)

    @property
    def _box_reader(self) -> BoxReader:
        return cast("BoxReader", self._reader)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes; a position is the number of an output. Empty if there are only images to predict."""
        return self._box_reader.labels

    @property
    def num_classes(self) -> int:
        """How many classes there are; the background is not one."""
        return len(self.labels)

    def counts(self) -> dict[str, dict[str, int]]:
        """Boxes of each class, by part of the data, without those of images that were left out."""
        found = {part: self._table.of(part).targets for part in PARTS[:3] if self._table.has(part)}
        table = self._box_reader.table
        assert table is not None
        counted = {part: table.counts(rows) for part, rows in found.items() if rows is not None}
        return {part: {label: count.get(label, 0) for label in self.labels} for part, count in counted.items()}

    def true_boxes(self, part: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The path of each image of a part, and its boxes: `labels`, `boxes` in pixels of the upright file, `crowds`.

        Args:
            part: train, val or test.
        """
        samples, table = self._table.of(part), self._box_reader.table
        assert table is not None
        if samples.targets is None:
            return
        for path, row in zip(samples.inputs.tolist(), samples.targets.tolist(), strict=True):
            own = table.of(row)
            labels = [table.names[label] for label in table.labels[own].tolist()]
            yield path, {"labels": labels, "boxes": table.boxes[own].tolist(), "crowds": table.is_crowd[own].tolist()}

    def _digest(self) -> dict[str, str]:
        """For each part a digest of the names of its images and of their boxes."""
        found = {}
        boxes = self._box_reader.table
        assert boxes is not None
        for part in ("train", "val"):
            if self._table.has(part):
                table: SampleTable = self._table.of(part)
                told = [*table.names(), *self._images.fingerprint(table.inputs.tolist())]
                digest = hashlib.sha256("\0".join(told).encode())
                for row in cast("np.ndarray[Any, Any]", table.targets).tolist():
                    own = boxes.of(row)
                    digest.update(repr([boxes.names[label] for label in boxes.labels[own]]).encode())
                    digest.update(boxes.told(row))
                found[part] = digest.hexdigest()
        return found

    @classmethod
    def suits(cls, constructor: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """Certain for COCO, VOC and YOLO by name, and for a table with columns of corners and labels."""
        if constructor in ("from_coco", "from_voc", "from_yolo"):
            return "certain", constructor
        if constructor == "from_folders" and arguments.get("train_folder"):
            layout = layout_of(Path(arguments["train_folder"]), "train")
            return ("certain", f"boxes: {layout}") if layout else ("no", "")
        if constructor == "from_csv" and arguments.get("target_fields") is None:
            argument = next(name for name in (f"{part}_file" for part in PARTS) if arguments.get(name))
            if columns_of_boxes(open_table(arguments[argument], argument).fields) is not None:
                return "certain", "corners of boxes with labels"
        return "no", ""


def _understood(part: str, one: Found, noun: str) -> str:
    """One line on what was read."""
    found = one.annotations
    if part == "predict":
        return f"predict: {len(found.paths):,} images"
    empty = len(found.paths) - len(set(found.images))
    crowds = sum(found.crowds)
    more = [f"{empty:,} without objects"] if empty else []
    more += [f"{crowds:,} of the {noun} are crowds"] if crowds else []
    said = f"{part}: {one.layout}: {len(found.paths):,} images, {len(found.boxes):,} {noun}"
    return said + (f" ({', '.join(more)})" if more else "")


def _refuse(what: str) -> NoReturn:
    raise UsageError(f"{what} gives no boxes", fix="from_coco, from_voc, from_yolo, from_csv, from_files, from_numpy")


def _box_fields(table: Table, inputs: str, given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The five columns of boxes.

    Raises:
        BadDataError: they are not found, or not five are given.
    """
    if given is not None and not isinstance(given, str):
        if len(given) == 5:
            table.require(given)
            return tuple(given)
    elif given is None and (found := columns_of_boxes([f for f in table.fields if f != inputs])) is not None:
        return found
    raise BadDataError(
        f"{table.argument} {table.place!r}: the columns of boxes are not known; "
        f"there are: {', '.join(map(repr, table.fields[:20]))}",
        why="a table of boxes has a row a box with x1, y1, x2, y2 in pixels and a label",
        fix='target_fields=("x1", "y1", "x2", "y2", "label")',
    )


def _of_objects(names: Sequence[str], targets: Any, argument: str, part: str) -> Annotations:
    """Boxes that are given in Python.

    Raises:
        UsageError: their number is another one than that of the images, or they are not such mappings.
    """
    made = Annotations()
    if targets is None and part != "predict":
        raise UsageError(f"{argument} needs targets", fix=f"{part}_targets={_TARGETS_FIX}")
    if targets is not None and len(targets) != len(names):
        raise UsageError(f"{part}_targets must have one mapping for each of the {len(names):,} images")
    for row, name in enumerate(names):
        image = made.add_image(name)
        if targets is None:
            continue
        own = targets[row]
        if (
            not isinstance(own, Mapping)
            or not {"boxes", "labels"} <= set(own)
            or len(own["boxes"]) != len(own["labels"])
        ):
            raise UsageError(f"{part}_targets[{row}] is not a mapping of boxes and as many labels", fix=_TARGETS_FIX)
        boxes = own["boxes"].tolist() if hasattr(own["boxes"], "tolist") else own["boxes"]
        labels = own["labels"].tolist() if hasattr(own["labels"], "tolist") else own["labels"]
        for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            made.add_box(image, box, str(label), f"{part}_targets[{row}], box {number}")
    names_of = set(made.names)
    are_numbers = all(one.isdigit() for one in names_of)
    made.number_classes(sorted(names_of, key=int) if are_numbers else None)
    return made
