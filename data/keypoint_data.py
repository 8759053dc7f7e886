"""`KeypointDetectionData`: images with boxes and keypoints, from COCO, YOLO and arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, Unpack, cast

import numpy as np

from flashtask.core.errors import BadDataError, UsageError
from flashtask.data.arguments import KeypointOptions, PathLike, takes
from flashtask.data.box_files import Annotations, KeypointNames, read_yolo_keypoints
from flashtask.data.box_layouts import Found, coco_file, layout_of, of_coco, read_folder
from flashtask.data.boxes import BoxReader, BoxTable
from flashtask.data.keypoint_reader import KeypointReader, KeypointTable
from flashtask.data.mirrored import mirrored_keypoints
from flashtask.data.object_detection import ObjectDetectionData
from flashtask.data.problems import Problems

__all__ = ["KeypointDetectionData"]

#: Text of a COCO file whose categories name keypoints.
_NAMED = re.compile(rb'"keypoints"\s*:\s*\[\s*"')
_FIX = 'categories: [{"id": 1, "name": "person", "keypoints": ["nose", ...], "skeleton": [[1, 2]]}]'


class KeypointDetectionData(ObjectDetectionData):
    """Images with any number of objects, each with a label, a box and keypoints.

    All classes have the same keypoints; one that has none is trained on as boxes. What a keypoint becomes in a mirrored
    picture follows from `left` and `right` in the names, from YOLO's `flip_idx`, or from `flip_pairs`. Where it is not
    known, images are not mirrored.
    """

    readers: ClassVar[tuple[type[BoxReader], ...]] = (KeypointReader,)
    constructors: ClassVar[tuple[str, ...]] = ("from_folders", "from_coco", "from_yolo")
    _noun = "objects"

    @classmethod
    @takes(KeypointOptions)
    def from_folders(  # type: ignore[override]  # image files alone: no `load_image`
        cls,
        train_folder: PathLike | None = None,
        val_folder: PathLike | None = None,
        test_folder: PathLike | None = None,
        predict_folder: PathLike | None = None,
        **options: Unpack[KeypointOptions],
    ) -> Self:
        """Take folders whose annotations are recognised: COCO or YOLO, as of `ObjectDetectionData.from_folders`.

        Beside COCO's own layout `annotations/person_keypoints_PART.json` comes before `instances_PART.json`.

        Args:
            train_folder: defines the classes and the keypoints.
            val_folder: as `train_folder`, to validate on.
            test_folder: as `val_folder`.
            predict_folder: images without annotations, at any depth.

        Raises:
            UsageError: an invalid value, or arguments that contradict each other.
            MissingInputError: a folder that is not there.
            BadDataError: no annotations, or some that cannot be used; all are named.
        """
        known, pairs = _without_pairs(options)
        made = super().from_folders(train_folder, val_folder, test_folder, predict_folder, **known)
        return made._with_pairs(pairs)

    @classmethod
    @takes(KeypointOptions)
    def from_coco(
        cls,
        train_folder: PathLike | None = None,
        train_ann_file: PathLike | None = None,
        val_folder: PathLike | None = None,
        val_ann_file: PathLike | None = None,
        test_folder: PathLike | None = None,
        test_ann_file: PathLike | None = None,
        predict_folder: PathLike | None = None,
        **options: Unpack[KeypointOptions],
    ) -> Self:
        """Take COCO's JSON files, whose categories name `keypoints` and a `skeleton`, and the folders of their images.

        Args:
            train_folder: of the images to train on.
            train_ann_file: their annotations; found in the folder or beside it if not given.
            val_folder: as `train_folder`, to validate on.
            val_ann_file: of `val_folder`.
            test_folder: as `val_folder`.
            test_ann_file: of `test_folder`.
            predict_folder: images without annotations.

        Raises:
            UsageError: an invalid value.
            MissingInputError: a folder or file that is not there.
            BadDataError: files that are not COCO's, or annotations that cannot be used; all are named.
        """
        known, pairs = _without_pairs(options)
        files = (train_folder, train_ann_file, val_folder, val_ann_file, test_folder, test_ann_file, predict_folder)
        return super().from_coco(*files, **known)._with_pairs(pairs)

    @classmethod
    @takes(KeypointOptions)
    def from_yolo(cls, data_file: PathLike, **options: Unpack[KeypointOptions]) -> Self:
        """Take the `data.yaml` of YOLO with `kpt_shape`; names are in `kpt_names`, else `0`, `1`, ...

        Args:
            data_file: the YAML file.

        Raises:
            UsageError: an invalid value.
            MissingInputError: the file is not there.
            BadDataError: it is not YOLO's, or annotations that cannot be used; all are named.
        """
        known, pairs = _without_pairs(options)
        return super().from_yolo(data_file, **known)._with_pairs(pairs)

    @classmethod
    def from_voc(cls, *arguments: Any, **options: Any) -> NoReturn:
        """Raise a UsageError: the XML files of Pascal VOC hold boxes."""
        _refuse("from_voc")

    @classmethod
    def _of_box_tables(cls, *arguments: Any, **options: Any) -> NoReturn:
        _refuse("a table of boxes")

    @staticmethod
    def _read_folder(folder: Path, part: str) -> Found:
        words = (folder.name, part)
        names = [folder.parent / "annotations" / f"person_keypoints_{word}.json" for word in words]
        file = next((str(one) for one in names if one.is_file()), None)
        return read_folder(folder, part) if file is None else of_coco(file, folder)

    @classmethod
    def _of_objects(cls, names: Sequence[str], targets: Any, argument: str, part: str) -> Annotations:
        """Targets in Python: mappings of `boxes` (n, 4), `labels` (n,) and `keypoints` (n, K, 3)."""
        made = super()._of_objects(names, targets, argument, part)
        rows = [] if targets is None else [row for one in targets for row in np.asarray(one.get("keypoints", ()))]
        if targets is not None and (len(rows) != len(made.boxes) or any(np.shape(row)[1:] != (3,) for row in rows)):
            raise UsageError(
                f"{part}_targets need keypoints, (n, K, 3), for each of their boxes",
                fix='[{"boxes": ..., "labels": ..., "keypoints": ...}, ...]: x, y, visibility from 0 to 2',
            )
        count = max(map(len, rows), default=0)
        made.keypoints = dict.fromkeys(made.ids, KeypointNames(tuple(map(str, range(count)))))
        for number, row in enumerate(rows):
            made.add_points(number, row.ravel().tolist(), made.names[number], made.places[number])
        return made

    @classmethod
    def _reader_of(
        cls, fields_of_table: tuple[str, ...], boxes: BoxTable, found: Mapping[str, Found], problems: Problems
    ) -> BoxReader:
        """With the keypoints of all objects; an object without some counts as one of which none is labelled.

        Raises:
            BadDataError: no class has keypoints, or two have different ones.
        """
        names: dict[tuple[str, ...], KeypointNames] = {}
        for one in found.values():
            for own in one.annotations.keypoints.values():
                names.setdefault(own.names, own)
        layouts = "; ".join(dict.fromkeys(one.layout for one in found.values()))
        if len(names) > 1:
            first, second = (", ".join(one) for one in list(names)[:2])
            raise BadDataError(f"there are classes with different keypoints ({layouts})", why=f"{first}; {second}")
        if not names and set(found) != {"predict"}:
            raise BadDataError(f"no class has keypoints ({layouts})", fix=_FIX)
        keypoints = next(iter(names.values()), KeypointNames(()))
        rows = []
        for one in found.values():
            noted = one.annotations
            problems.take(noted.keypoint_problems)
            nothing = [(0.0, 0.0, 0)] * len(keypoints.names)
            order = np.argsort(np.array(noted.images, dtype=np.int64), kind="stable").tolist()
            rows += [noted.points.get(row, nothing) for row in order]
        points = np.array(rows, dtype=np.float32).reshape(len(rows), len(keypoints.names), 3)
        keypoints = replace(keypoints, flips=keypoints.flips or mirrored_keypoints(keypoints.names))
        known = {one.name: getattr(boxes, one.name) for one in fields(BoxTable)}
        return KeypointReader(fields_of_table, table=KeypointTable(**known, points=points, keypoints=keypoints))

    # ---- mirrored pictures

    @property
    def _keypoint_reader(self) -> KeypointReader:
        return cast("KeypointReader", self._reader)

    @property
    def keypoints(self) -> tuple[str, ...]:
        """Names of the keypoints."""
        return self._keypoint_reader.keypoints

    def true_keypoints(self, part: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The path of each image of a part, and its objects as of `true_boxes`, with `keypoints` (n, K, 3) as lists.

        Args:
            part: train, val or test.
        """
        rows, table = self._table.of(part).targets, self._keypoint_reader.table
        assert table is not None
        if rows is not None:
            for (path, one), row in zip(self.true_boxes(part), rows.tolist(), strict=True):
                yield path, {**one, "keypoints": table.points[table.of(row)].tolist()}

    def _with_pairs(self, pairs: Any) -> Self:
        """This data, with what the user says of mirrored pictures.

        Raises:
            UsageError: these are not pairs of keypoints.
        """
        if pairs is None:
            return self
        self._arguments["flip_pairs"] = [list(pair) for pair in pairs]
        names = self.keypoints
        flips = list(range(len(names)))
        try:
            for one, two in pairs:
                first, second = (
                    names.index(end) if isinstance(end, str) else range(len(names))[end] for end in (one, two)
                )
                flips[first], flips[second] = second, first
            if sorted(flips) != list(range(len(names))):
                raise ValueError("a keypoint is in two pairs")
        except (TypeError, ValueError, IndexError) as error:
            raise UsageError(
                f"flip_pairs must be pairs of keypoints, not {pairs!r}",
                why=f"{error}; the keypoints are {', '.join(names)}",
                fix='flip_pairs=[("left_eye", "right_eye")]',
            ) from None
        self._reader = replace(self._keypoint_reader, flips=tuple(flips))
        return self

    def setup(self, stage: str) -> None:
        """As of all images; where it is not known what keypoints become in a mirror, nothing is mirrored.

        Raises:
            BadDataError: images that cannot be read.
            UsageError: an unknown stage, or flips that are asked for and not known.
        """
        if stage == "fit" and not self._keypoint_reader.flips:
            if self._arguments.get("flip") not in (None, "none"):
                raise UsageError(
                    f"flip={self._arguments['flip']}, but which keypoints change sides in a mirror is not known",
                    fix='flip_pairs=[("left_eye", "right_eye")]',
                )
            if self._arguments.get("flip") is None and self._augment != "none" and isinstance(self._augment, str):
                self._say(
                    "warning: the names of the keypoints do not say which change sides in a mirror, so images are not "
                    'flipped; flip_pairs=[("a", "b")] says it, and [] that none does'
                )
                self._arguments["flip"] = "none"
        super().setup(stage)

    @classmethod
    def suits(cls, constructor: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """Certain where COCO's categories or YOLO's `data.yaml` have keypoints."""
        if constructor == "from_coco":
            given = arguments.get("train_ann_file")
            return _coco_suits(given or coco_file(Path(arguments["train_folder"]), "train"))
        if constructor == "from_yolo":
            return _yolo_suits(arguments["data_file"])
        if constructor != "from_folders" or not arguments.get("train_folder"):
            return "no", ""
        folder = Path(arguments["train_folder"])
        if (file := coco_file(folder, "train")) is not None:
            return _coco_suits(file)
        layout = layout_of(folder, "train")
        return _yolo_suits(os.path.join(folder, layout)) if layout.endswith((".yaml", ".yml")) else ("no", "")


def _coco_suits(file: PathLike | None) -> tuple[str, str]:
    has_keypoints = file is not None and os.path.isfile(file) and _NAMED.search(Path(file).read_bytes()) is not None
    return ("certain", f"keypoints: {os.path.basename(file)}") if file is not None and has_keypoints else ("no", "")


def _yolo_suits(file: PathLike) -> tuple[str, str]:
    has_keypoints = read_yolo_keypoints(os.fspath(file)) is not None
    return ("certain", f"keypoints: {os.path.basename(file)}") if has_keypoints else ("no", "")


def _without_pairs(options: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    known = dict(options)
    return known, known.pop("flip_pairs", None)


def _refuse(what: str) -> NoReturn:
    raise UsageError(f"{what} gives no keypoints", fix="from_coco, from_yolo, from_folders, from_files, from_numpy")
