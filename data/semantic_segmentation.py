"""`SemanticSegmentationData`: images with a mask each, which gives a class to every pixel."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import numpy as np
import torch
from PIL import Image
from torchvision.tv_tensors import Mask

from flashtask.core.errors import BadDataError, FlashtaskError, UsageError
from flashtask.core.number_checks import is_whole
from flashtask.data.arguments import (
    MaskOptions,
    PathLike,
    check_folders,
    check_split,
    checked_options,
    read_preprocessing,
    takes,
)
from flashtask.data.cached_inputs import is_address
from flashtask.data.coco_files import coco_files
from flashtask.data.folders import list_images
from flashtask.data.given_rows import Rows, TargetFormat
from flashtask.data.image_data import ImageData
from flashtask.data.image_source import FILES, ImageSource
from flashtask.data.layout import split_folders, subfolders
from flashtask.data.masks import (
    MaskContent,
    as_mask_text,
    default_colours,
    look_at_masks,
    overlay,
    read_mask,
    regions_text,
)
from flashtask.data.problems import Problems
from flashtask.data.samples import PARTS, Column, SampleTable, as_text
from flashtask.data.spatial import SpatialReader
from flashtask.data.targets import Source, TargetReader

__all__ = ["IGNORED", "MaskReader", "SemanticSegmentationData", "mask_folders", "mask_pairs"]

#: The number of pixels that belong to no class, in the masks that a model is trained on and measured with.
IGNORED = 255

_IMAGES = ("images", "image", "imgs", "img")
_MASKS = ("masks", "mask", "labels", "annotations", "segmentation", "segmentations")
#: What may follow the name of the image in that of its mask.
_ENDINGS = ("", "_mask")
#: Names of classes, a line each, in the order of their numbers.
_NAMES = "classes.txt"


@dataclass(frozen=True)
class MaskReader(SpatialReader):
    """A class for each pixel: (H, W) int64 numbers of classes, 255 where none counts.

    A target is a dictionary: `mask`, which moves with the image, and for metrics in the pixels of the file `source`
    (the text of the table) and `whole` (width and height of the picture).

    Args:
        fields: one column with paths of masks; empty for folders.
        labels: the classes in the order of the outputs.
        values: what each class is in the masks: a number, or a colour as 0xRRGGBB.
        colours: of each class in pictures, `#rrggbb`.
        ignored: the value in masks that belongs to no class; None if there is none.
        is_colour: whether the values are colours.
    """

    kind = "mask"
    fill: ClassVar[int] = IGNORED

    labels: tuple[str, ...] = ()
    values: tuple[int, ...] = ()
    colours: tuple[str, ...] = ()
    ignored: int | None = 255
    is_colour: bool = False

    def learned(self, raw: Column, source: Source) -> Self:
        """With the classes that the training masks have, or those that were given.

        Raises:
            BadDataError: there are too few or too many, or they are both numbers and colours.
        """
        looked = look_at_masks([text for text in raw.tolist() if text])
        contents = [one for one in looked.values() if isinstance(one, MaskContent)]
        where = f"{source.argument} {source.place!r}"
        if not contents:
            return self  # each is named when all are checked
        is_colour = contents[0].is_colour
        if any(one.is_colour != is_colour for one in contents):
            # A mask of nothing but grey is read as numbers.
            contents = [one if one.is_colour else _as_colours(one) for one in contents]
            is_colour = True
        found = sorted({value for one in contents for value in one.counts})
        ignored = None if is_colour else self.ignored
        if set(found) == {0, 255}:
            ignored = None  # black and white: there are no pixels that do not count
        classes = [value for value in found if value != ignored]
        if self.labels and not self.values:
            is_in_order = not is_colour and classes != [0, 255]
            classes = list(range(len(self.labels))) if is_in_order else classes
            if len(classes) != len(self.labels):
                raise BadDataError(
                    f"{where}: {len(self.labels)} labels, but the masks have {len(classes)} values: {_shown(classes)}"
                )
        if self.values:
            classes = list(self.values)
        if len(classes) < 2 and source.argument.startswith("train"):
            raise BadDataError(f"{where}: the masks have one class only: {_shown(classes)}", why="training needs two")
        if len(classes) > IGNORED:
            raise BadDataError(
                f"{where}: the masks have {len(classes):,} values, more than there can be classes",
                why="they may number objects: 1, 2, 3, ...",
                fix="write masks with a number for each class",
            )
        palette = next((one.palette for one in contents if one.palette), ())
        names = tuple(_hex(value) if is_colour else str(value) for value in classes)
        if is_colour:
            colours = names
        elif all(value < len(palette) for value in classes) and len({palette[value] for value in classes}) > 1:
            colours = tuple(_hex(palette[value]) for value in classes)
        else:
            colours = default_colours(len(classes))
        return replace(
            self,
            labels=self.labels or names,
            values=tuple(classes),
            colours=self.colours or colours,
            ignored=ignored,
            is_colour=is_colour,
        )

    def read(self, raw: Column, source: Source) -> Column:
        """The texts of the table (N,), which are read when a sample is loaded."""
        return raw

    def unknown(self, content: MaskContent) -> list[str]:
        """The values of a mask that are neither a class nor ignored."""
        content = content if content.is_colour or not self.is_colour else _as_colours(content)
        if content.is_colour != self.is_colour:
            return ["colours"]
        known = {*self.values, self.ignored}
        return [_hex(value) if self.is_colour else str(value) for value in content.counts if value not in known]

    def class_map(self, text: str) -> np.ndarray[Any, Any]:
        """The numbers of the classes (H, W) uint8 of a mask in a table, 255 where none counts.

        Raises:
            BadDataError: it cannot be read, or has an unknown value.
        """
        values, is_colour, _ = read_mask(text)
        if self.is_colour and not is_colour:
            values = values.astype(np.int32) * 0x010101
        order = np.argsort(self.values)
        known = np.array(self.values)[order]
        places = np.minimum(np.searchsorted(known, values), len(known) - 1)
        is_known = known[places] == values
        wrong = ~is_known if self.ignored is None else ~is_known & (values != self.ignored)
        if wrong.any():
            raise BadDataError(f"a mask has the unknown value {values[wrong][0]}: {text[:200]}")
        return np.where(is_known, order[places], IGNORED).astype(np.uint8)

    def target(self, value: Any, size: tuple[int, int]) -> Any:
        """The mask, with where it was read and (width, height) of the picture."""
        classes = self.class_map(str(value))
        if classes.shape != size[::-1]:
            raise BadDataError(_other_size(str(value), classes.shape[::-1], size))
        return {"mask": Mask(torch.from_numpy(classes)), "source": str(value), "whole": torch.tensor(size)}

    def strata(self, raw: Column) -> Sequence[str]:
        """The same for all: a split is by chance, or by groups."""
        return [""] * len(raw)

    def counts(self, raw: Column) -> dict[str, int]:
        """Pixels of each class."""
        found = dict.fromkeys(self.labels, 0)
        labels = dict(zip(self.values, self.labels, strict=True))
        contents = look_at_masks(raw.tolist())
        for text in raw.tolist():
            content = contents[text]
            if isinstance(content, MaskContent):
                for value, count in (_as_colours(content) if self.is_colour else content).counts.items():
                    if value in labels:
                        found[labels[value]] += count
        return found

    def summary(self, raw: Column) -> str:
        """The share of each class in the pixels, the most frequent first."""
        counts = self.counts(raw)
        total = max(1, sum(counts.values()))
        ordered = sorted(counts.items(), key=lambda one: -one[1])
        return ", ".join(f"{label} {count / total:.1%}" for label, count in ordered[:_MOST_NAMED])

    @property
    def origin(self) -> str:
        """Where the masks are from."""
        return super().origin if self.fields else "from masks"

    def describe(self) -> str:
        """The classes, how masks write them, and what does not count."""
        pairs = zip(self.labels[:_MOST_NAMED], self.values[:_MOST_NAMED], strict=True)
        named = ", ".join(
            label if label == (shown := _hex(value) if self.is_colour else str(value)) else f"{label} ({shown})"
            for label, value in pairs
        )
        more = ", ..." if len(self.labels) > _MOST_NAMED else ""
        ignored = "" if self.ignored is None else f"; {self.ignored} does not count"
        return f"{len(self.labels)} classes of pixels, {self.origin}: {named}{more}{ignored}"

    def lines(self, target: Any) -> list[str]:
        """The share of each class."""
        mask = target["mask"] if isinstance(target, Mapping) else target
        counts = torch.bincount(mask.flatten().long(), minlength=IGNORED + 1)[: len(self.labels)]
        total = max(1, int(counts.sum()))
        shares = sorted(zip(self.labels, counts.tolist(), strict=True), key=lambda one: -one[1])
        return [", ".join(f"{label} {count / total:.0%}" for label, count in shares[:4] if count)]

    def draw(self, image: Image.Image, target: Any) -> Image.Image:
        """The picture with the classes in colours."""
        mask = target["mask"] if isinstance(target, Mapping) else target
        return overlay(image, mask.numpy(), self.labels, self.colours, has_legend=False)

    def _check(self) -> None:
        super()._check()
        if not len(self.labels) == len(self.values) == len(self.colours) <= IGNORED:
            raise ValueError("labels, values and colours are not as many")
        if not all(isinstance(label, str) for label in self.labels) or len(set(self.labels)) != len(self.labels):
            raise ValueError("labels are not different texts")
        if not all(is_whole(value, 0) for value in self.values) or not isinstance(self.ignored, int | None):
            raise ValueError("values are not whole numbers")
        for colour in self.colours:
            if not isinstance(colour, str) or len(bytes.fromhex(colour.removeprefix("#"))) != 3 or colour[0] != "#":
                raise ValueError(f"{colour!r} is not a colour")


_MOST_NAMED = 12


def _hex(value: int) -> str:
    return f"#{value:06x}"


def _as_colours(content: MaskContent) -> MaskContent:
    """A mask that has nothing but grey, which is read as numbers, among masks of colours."""
    if content.is_colour:
        return content
    return replace(content, is_colour=True, counts={value * 0x010101: n for value, n in content.counts.items()})


def _shown(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")


def _other_size(text: str, mask: Sequence[int], image: Sequence[int]) -> str:
    shown = "its mask" if text.startswith(("{", "data:")) else repr(text)
    return f"{shown} has {mask[0]} x {mask[1]} pixels, and its image {image[0]} x {image[1]}"


class SemanticSegmentationData(ImageData):
    """Images with a mask each: a class for every pixel.

    Masks are files of class numbers (also with a palette), of colours, or of black and white; arrays; or the regions of
    a COCO file. All of them are looked at when the data is made: what is missing, unreadable, of another size than its
    image or of an unknown class is named in one error.
    """

    constructors = ("from_folders", "from_csv", "from_files", "from_coco")
    readers = (MaskReader,)

    @classmethod
    @takes(MaskOptions)
    def from_folders(  # type: ignore[override]  # image files alone: no `load_image`
        cls,
        train_folder: PathLike | None = None,
        val_folder: PathLike | None = None,
        test_folder: PathLike | None = None,
        predict_folder: PathLike | None = None,
        *,
        train_target_folder: PathLike | None = None,
        val_target_folder: PathLike | None = None,
        test_target_folder: PathLike | None = None,
        **options: Unpack[MaskOptions],
    ) -> Self:
        """Take folders of images beside folders of masks; a mask has the name of its image, but for the ending.

        Args:
            train_folder: images. Without `train_target_folder` it holds `images/` and `masks/`, each of which may have
                `train/`, `val/` and `test/`. Names of classes may stand in a file `classes.txt` in it, a line each.
            val_folder: as `train_folder`, to validate on.
            test_folder: as `val_folder`.
            predict_folder: images without masks, at any depth.
            train_target_folder: the masks of `train_folder`.
            val_target_folder: of `val_folder`.
            test_target_folder: of `test_folder`.

        Raises:
            UsageError: an invalid value, or arguments that contradict each other.
            MissingInputError: a folder that is not there.
            BadDataError: masks that cannot be used; all are named.
        """
        given = {"train": train_folder, "val": val_folder, "test": test_folder, "predict": predict_folder}
        targets = {"train": train_target_folder, "val": val_target_folder, "test": test_target_folder}
        folders = check_folders(given)
        masks = check_folders(targets) if any(targets.values()) else {}
        known: dict[str, Any] = dict(options)
        remarks: dict[str, list[str]] = {part: [] for part in PARTS}
        for part in [part for part in folders if part != "predict" and part not in masks]:
            root = folders[part]
            found = mask_folders(root)
            if part not in found:
                raise BadDataError(
                    f"{part}_folder {str(root)!r} has no folder of masks",
                    why="it should hold `images` and `masks`, or `images/train` and `masks/train`",
                    fix=f"{part}_target_folder=...",
                )
            folders[part], masks[part] = found[part]
            remarks[part].append(f"{part}_folder: images in {folders[part].name}/, masks in {masks[part].name}/")
            if known.get("labels") is None and (root / _NAMES).is_file():
                known["labels"] = [line for line in (root / _NAMES).read_text().splitlines() if line.strip()]
            if part == "train":  # the other parts, where they are folders inside `images`
                for other in [one for one in found if one not in folders and found[one] != found[part]]:
                    folders[other], masks[other] = found[other]
                    if other == "val" and known.pop("val_split", None):
                        remarks[part].append(f"validation images are in {found['val'][0]}: none are split off")
        check_split(known, {**dict.fromkeys(PARTS), **folders}, "folder")
        settings = checked_options(known)
        tables, problems = [], Problems()
        for part, folder in folders.items():
            images = list_images(folder, f"{part}_folder")
            pairs = None
            if part in masks:
                pairs, unused = mask_pairs(folder, images.paths, masks[part], part, problems)
                if unused:
                    remarks[part].append(f"{part}_target_folder: {unused} mask(s) without an image are not used")
            tables.append(
                SampleTable.of_part(part, images.paths, None if pairs is None else as_text(pairs), root=folder)
            )
        arguments: dict[str, Any] = {f"{part}_folder": str(folder) for part, folder in folders.items()}
        arguments |= {f"{part}_target_folder": str(folder) for part, folder in masks.items()}
        arguments |= {name: known[name] for name in ("labels", "ignore_index") if known.get(name) is not None}
        reader = MaskReader((), _labels(known.get("labels")), ignored=known.get("ignore_index", IGNORED))
        made = cls._with_problems(
            SampleTable.joined(tables), reader, ("from_folders", {**arguments, **settings}), problems
        )
        made._remarks = {part: tuple(lines) for part, lines in remarks.items()}
        made.preprocessing = read_preprocessing(known.get("preprocessing"))
        return made

    @classmethod
    @takes(MaskOptions)
    def from_coco(
        cls,
        train_folder: PathLike | None = None,
        train_ann_file: PathLike | None = None,
        val_folder: PathLike | None = None,
        val_ann_file: PathLike | None = None,
        test_folder: PathLike | None = None,
        test_ann_file: PathLike | None = None,
        predict_folder: PathLike | None = None,
        **options: Unpack[MaskOptions],
    ) -> Self:
        """Take COCO files: polygons and run lengths become a mask, in which smaller regions lie over larger ones.

        The classes are `background` and the categories of the training file, by their ids.

        Args:
            train_folder: the images.
            train_ann_file: the annotations of `train_folder`, a JSON file in COCO's form; found in the folder or beside
                it if not given.
            val_folder: as `train_folder`, to validate on.
            val_ann_file: of `val_folder`.
            test_folder: as `val_folder`.
            test_ann_file: of `test_folder`.
            predict_folder: images without annotations.

        Raises:
            UsageError: an invalid value.
            MissingInputError: a folder or file that is not there.
            BadDataError: annotations that cannot be used; all are named.
        """
        given = {"train": train_folder, "val": val_folder, "test": test_folder, "predict": predict_folder}
        files = {"train": train_ann_file, "val": val_ann_file, "test": test_ann_file}
        check_split(options, given, "folder")
        folders = check_folders(given)
        settings, problems = checked_options(options), Problems()
        found = coco_files(folders, files)
        names: dict[int, str] = {}
        tables, arguments = [], {f"{part}_folder": str(folder) for part, folder in folders.items()}
        for part, folder in folders.items():
            if part == "predict":
                tables.append(SampleTable.of_part(part, list_images(folder, "predict_folder").paths, root=folder))
                continue
            arguments[f"{part}_ann_file"] = file = found[part]
            content = _coco_content(file, f"{part}_ann_file")
            names = names or {
                one["id"]: str(one["name"]) for one in sorted(content["categories"], key=lambda c: c["id"])
            }
            paths, masks = _of_coco(content, folder, f"{part}_ann_file", list(names), problems)
            tables.append(SampleTable.of_part(part, paths, as_text(masks), root=folder))
        labels = ("background", *names.values())
        reader = MaskReader((), labels, tuple(range(len(labels))), default_colours(len(labels)), ignored=None)
        made = cls._with_problems(
            SampleTable.joined(tables), reader, ("from_coco", {**arguments, **settings}), problems
        )
        made.preprocessing = read_preprocessing(options.get("preprocessing"))
        return made

    # ---- what the constructors share

    @classmethod
    def _with_problems(
        cls, table: SampleTable, reader: MaskReader, recipe: tuple[str, Mapping[str, Any]], problems: Problems
    ) -> Self:
        """Data of a table, or an error that names what was found before together with what is wrong with masks."""
        if not len(problems):
            return cls(table, reader, recipe)
        _find_problems(table, FILES, None, problems)
        problems.refuse(" and ".join(name for name in recipe[1] if name.endswith(("_folder", "_ann_file"))))
        raise AssertionError

    @classmethod
    def _target_column(cls, targets: Any, argument: str, count: int) -> Column:
        if not hasattr(targets, "__len__") or len(targets) != count:
            raise UsageError(f"{argument} must have one mask for each of the {count:,} images")
        return as_text(map(as_mask_text, targets))

    @classmethod
    def _of_rows(
        cls,
        rows: Sequence[Rows],
        fields: tuple[str, ...],
        recipe: tuple[str, Mapping[str, Any]],
        options: dict[str, Any],
        source: ImageSource = FILES,
    ) -> Self:
        known = checked_options(options)
        if len(fields) > 1:
            raise UsageError(f"masks are in one column, not in {', '.join(map(repr, fields))}", fix="--target COLUMN")
        rows = [_checked_masks(replace(one, targets=_absolute(one)), fields) for one in rows]
        table = cls._checked_table(rows, TargetFormat("label", fields, None), known, source, "")
        labels = options.get("labels")
        said = {} if labels is None else {"labels": list(labels)}
        made = cls(
            table, MaskReader(fields, _labels(labels)), (recipe[0], {**recipe[1], **said, **known}), images=source
        )
        made.preprocessing = read_preprocessing(options.get("preprocessing"))
        return made

    @classmethod
    def suits(cls, constructor: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """Certain for COCO files and for folders of images beside masks; a table has to be asked for."""
        if constructor == "from_folders":
            folder = arguments.get("train_folder")
            return ("certain", "images beside masks") if folder and mask_folders(Path(folder)) else ("no", "")
        return ("certain", "regions of COCO") if constructor == "from_coco" else ("no", "")

    def _take_reader(self, reader: TargetReader, against: str) -> None:
        super()._take_reader(reader, against)
        assert isinstance(reader, MaskReader)
        problems = Problems()
        _find_problems(self._table, self._images, reader, problems, is_sized=not hasattr(self, "_has_known_sizes"))
        problems.refuse(" and ".join(dict.fromkeys(self._argument(p) for p in PARTS[:3] if self._table.has(p))))
        self._has_known_sizes = True

    def _mirrored_labels(self) -> Sequence[str]:
        """Without the numbers that masks have in place of names."""
        return [label for label in super()._mirrored_labels() if not label.isdigit()]

    @property
    def classes(self) -> Mapping[str, int]:
        """The labels, each with what the masks have for it: a number, or a colour as 0xRRGGBB."""
        assert isinstance(self._reader, MaskReader)
        return dict(zip(self._reader.labels, self._reader.values, strict=True))

    def true_masks(self, part: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """The path of each image of a part, and (H, W) uint8: the position of the class of each pixel, 255 for none.

        Args:
            part: train, val or test.
        """
        samples, reader = self._table.of(part), self._reader
        assert isinstance(reader, MaskReader)
        if samples.targets is not None:
            for path, text in zip(samples.inputs.tolist(), samples.targets.tolist(), strict=True):
                yield path, reader.class_map(text)

    def pixel_counts(self) -> dict[str, int]:
        """Training pixels of each class, by label."""
        raw = self._table.of("train").targets
        return {} if raw is None or not isinstance(self._reader, MaskReader) else self._reader.counts(raw)


def _labels(given: Any) -> tuple[str, ...]:
    labels = tuple(map(str, given or ()))
    if len(set(labels)) != len(labels):
        raise UsageError("a label appears twice", fix="labels must all be different")
    return labels


def _absolute(one: Rows) -> Column | None:
    """Paths of masks, which count from where those of the images do; masks in memory as they are."""
    if one.targets is None or not one.root or is_address(one.root):
        return one.targets
    return as_text(
        text if not text or text.startswith(("{", "data:")) else os.path.normpath(os.path.join(one.root, text))
        for text in one.targets.tolist()
    )


def _checked_masks(one: Rows, fields: tuple[str, ...]) -> Rows:
    """The same rows, with those noted whose masks are missing or cannot be read."""
    if one.targets is None or one.part == "predict":
        return one
    problems, field = Problems(), fields[0] if fields else ""
    if one.problems is not None:
        problems.take(one.problems)
    looked = look_at_masks([text for text in one.targets.tolist() if text])
    for row, text in enumerate(one.targets.tolist()):
        if not text:
            problems.add("empty cell", f"{one.where(row, field)} is empty: the sample has no mask")
        elif isinstance(error := looked[text], BadDataError):
            what = f"{one.where(row, field)}: {error.what}" + (f" ({error.why})" if error.why else "")
            problems.add("bad mask", what, fix=error.fix)
    return replace(one, problems=problems)


def _find_problems(
    table: SampleTable, images: ImageSource, reader: MaskReader | None, problems: Problems, *, is_sized: bool = True
) -> None:
    """Masks that are missing, cannot be read, have another size than their image, or an unknown value."""
    if table.targets is None:
        return
    has_target = table.parts != PARTS.index("predict")
    paths, texts = table.inputs[has_target].tolist(), table.targets[has_target].tolist()
    looked = look_at_masks([text for text in texts if text])
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        sizes = list(pool.map(lambda path: _size(images, path), paths)) if is_sized else [None] * len(paths)
    for path, text, size in zip(paths, texts, sizes, strict=True):
        content = looked.get(text)
        if not text:
            if reader is not None:
                problems.add("image without a mask", f"{path!r}")
        elif isinstance(content, BadDataError):
            problems.add("bad mask", content.what + (f" ({content.why})" if content.why else ""), fix=content.fix)
        elif content is not None:
            if size is not None and size != content.size:
                shown = text if not text.startswith(("{", "data:")) else ""
                problems.add("mask of another size", f"{path!r}: {_other_size(shown or '{', content.size, size)}")
            if reader is not None and (unknown := reader.unknown(content)):
                what = f"{path!r}: its mask has {', '.join(unknown[:10])}"
                known = ", ".join(reader.labels[:10])
                problems.add("mask with an unknown value", what, fix=f"the classes are {known}")


def _size(images: ImageSource, path: str) -> tuple[int, int] | None:
    """(width, height) of an image on this machine; None if it cannot be read, which is said elsewhere."""
    if is_address(path):
        return None
    try:
        return images.input(path).size()
    except FlashtaskError:
        return None


# ---- folders


def mask_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and of masks by part, where a folder holds them by their usual names.

    `images` and `masks` are the training part (or the one that is asked for: each has the same), unless they hold
    `train`, `val` or `test`.
    """
    names = {name.lower(): name for name in subfolders(root)}
    images = next((root / names[name] for name in _IMAGES if name in names), None)
    masks = next((root / names[name] for name in _MASKS if name in names), None)
    if images is None or masks is None:
        return {}
    inside, own = split_folders(images), split_folders(masks)
    if inside and own:
        return {part: (folder, own[part]) for part, folder in inside.items() if part in own}
    return dict.fromkeys(("train", "val", "test"), (images, masks))


def mask_pairs(folder: Path, paths: Sequence[str], masks: Path, part: str, problems: Problems) -> tuple[list[str], int]:
    """The mask of each image, empty where there is none, and the number of masks without an image."""
    stems: dict[str, str] = {}
    for path in list_images(masks, f"{part}_target_folder").paths:
        stem = os.path.splitext(os.path.relpath(path, masks))[0]
        if stem in stems:
            problems.add("two masks of one name", f"{stems[stem]!r} and {path!r}")
        stems[stem] = path
    found, used = [], set()
    for path in paths:
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        mask = next((stems[stem + ending] for ending in _ENDINGS if stem + ending in stems), "")
        if not mask:
            problems.add("image without a mask", f"{path!r}", fix=f"masks are named like images, in {str(masks)!r}")
        elif mask in used:
            problems.add("two images of one name", f"{path!r}")
        used.add(mask)
        found.append(mask)
    return found, len(set(stems.values()) - used)


# ---- COCO


def _coco_content(file: str, argument: str) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise BadDataError(f"{argument} {file!r} is not JSON", why=str(error)) from None
    parts = ("images", "annotations", "categories")
    if not isinstance(content, Mapping) or not all(isinstance(content.get(part), list) for part in parts):
        raise BadDataError(f"{argument} {file!r} is not a COCO file", why=f"it has no lists {', '.join(parts)}")
    return content


def _of_coco(
    content: Mapping[str, Any], folder: Path, argument: str, categories: Sequence[int], problems: Problems
) -> tuple[list[str], list[str]]:
    """The images of a COCO file, and their masks."""
    numbers = {category: number for number, category in enumerate(categories, 1)}
    regions: dict[Any, list[tuple[float, int, Any]]] = {one.get("id"): [] for one in content["images"]}
    for place, one in enumerate(content["annotations"]):
        where = f"{argument}: annotations[{place}]"
        category, shape = one.get("category_id"), one.get("segmentation")
        if one.get("image_id") not in regions:
            problems.add("annotation of an unknown image", f"{where}: image_id {one.get('image_id')!r}")
        elif category not in numbers:
            problems.add("annotation of an unknown category", f"{where}: category_id {category!r}")
        elif not shape or not (isinstance(shape, Mapping) or all(isinstance(polygon, list) for polygon in shape)):
            problems.add("annotation without a region", f"{where}: segmentation is {str(shape)[:60]!r}")
        else:
            kept = shape if isinstance(shape, Mapping) else [polygon for polygon in shape if len(polygon) >= 6]
            regions[one["image_id"]].append((-float(one.get("area") or 0), numbers[category], kept))
    paths, masks = [], []
    for one in content["images"]:
        path = os.path.normpath(folder / str(one.get("file_name")))
        if not os.path.isfile(path):
            problems.add("missing image", f"{argument}: the file does not exist: {path!r}")
            continue
        ordered = sorted(regions[one.get("id")], key=lambda region: region[0])
        paths.append(path)
        masks.append(regions_text((one["width"], one["height"]), [(number, shape) for _, number, shape in ordered]))
    return paths, masks
