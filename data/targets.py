"""Target readers: what the targets of a table mean, learned from the training samples and kept with the model.

A reader is a small frozen record. `learned` takes from the training samples what must be the same for all data that the
model ever meets: the classes, the scale. It is stored in checkpoints, so new data is read as the training data was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from flashtask.core.errors import BadDataError, IntegrityError, did_you_mean
from flashtask.data.samples import Column

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LabelReader", "LabelsReader", "NumberReader", "SharesReader", "Source", "TargetReader", "match_labels"]
__all__ += ["are_shares", "number_or_nan"]

_YES, _NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "")
_SHOWN = 20
#: Samples that are enough for a stratum of their own, and ranges of numbers that are strata.
_MANY = 10
#: Numbers with decimals that may be classes.
_MOST_CLASSES = 20


@dataclass(frozen=True)
class Source:
    """Where targets were read, for messages.

    Args:
        argument: that gave them, such as `train_folder` or `val_file`.
        place: the folder or the file.
        noun: what holds a target there: `class folder(s)`, `label(s)`.
        against: what they are compared with: `train_folder`, `the model`.
    """

    argument: str
    place: str
    noun: str = "label(s)"
    against: str = "the model"

    @property
    def called(self) -> str:
        """The argument, and the folder or file if there is one."""
        return f"{self.argument} {self.place!r}" if self.place else self.argument


@dataclass(frozen=True)
class TargetReader:
    """Base of target readers.

    Args:
        fields: the columns of a table that hold the targets; empty where the names of folders do.
    """

    #: What checkpoints call it.
    kind: ClassVar[str] = ""

    fields: tuple[str, ...] = ()

    @classmethod
    def suits(cls, raw: Column) -> tuple[str, str]:
        """Whether targets are likely to be of this kind, for data of which nobody says what task it is for.

        Args:
            raw: (N,) or (N, K), as a table has them.

        Returns:
            `certain` if nothing else can be meant, `possible`, or `no` (so it has to be asked for); and in words what
            was seen.
        """
        return "no", ""

    def learned(self, raw: Column, source: Source) -> Self:
        """The reader that knows what the training samples show.

        Args:
            raw: (N,) or (N, K), as the table has them.
            source: where they were read.
        """
        return self

    def read(self, raw: Column, source: Source) -> Column:
        """Targets as a model takes them, one row each.

        Raises:
            BadDataError: a value that cannot be read, or one that the training samples did not have.
        """
        raise NotImplementedError

    #: Whether each stratum of two samples or more has one in validation.
    validates_each: ClassVar[bool] = False

    def reading(self, other: TargetReader) -> Self:
        """This reader, which a model was trained with, for the data that another one reads."""
        return replace(self, fields=other.fields)

    def strata(self, raw: Column) -> Sequence[str]:
        """For each sample what a validation split should keep the shares of; by default nothing."""
        return [""] * len(raw)

    def classes(self, raw: Column) -> list[tuple[str, ...]] | None:
        """The classes of each sample, of which training needs all; None if targets are not classes."""
        return None

    def describe(self) -> str:
        """What was understood, in words: `3 classes, from the column 'species'`."""
        return self.origin

    def summary(self, raw: Column) -> str:
        """The targets of some samples in a few words: `cat 12, dog 9`."""
        return ""

    def lines(self, target: Any) -> list[str]:
        """The target of one sample, as a batch has it, in words: what stands below its picture."""
        return [str(target)]

    def draw(self, image: Image, target: Any) -> Image:
        """The picture of a sample with what of its target lies in it; by default the picture as it is.

        Args:
            image: as the model gets it, in mode RGB.
            target: as a batch has it, in the pixels of this picture.
        """
        return image

    @property
    def origin(self) -> str:
        """Where the targets come from, in words."""
        if not self.fields:
            return "from the names of the folders"
        return f"from the column{'s' if len(self.fields) > 1 else ''} {', '.join(map(repr, self.fields))}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"kind": self.kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reader that `to_dict` wrote; the file it is from need not be one of ours.

        Raises:
            IntegrityError: it cannot be used.
        """
        try:
            given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name != "kind"}
            made = cls(**given)
            made._check()
        except (TypeError, ValueError) as error:
            raise IntegrityError("its description of the targets cannot be used", why=str(error)) from error
        return made

    def _check(self) -> None:
        """Raises:
        TypeError, ValueError: a value of another kind than the reader writes.
        """
        _require_texts(self.fields)


@dataclass(frozen=True)
class LabelReader(TargetReader):
    """One label a sample, as the index of its class: (N,) int64.

    Args:
        fields: one column, or empty for the names of folders.
        labels: the classes in the order of the outputs; those of the training samples, sorted as text, if learned.
    """

    kind = "label"
    validates_each = True

    labels: tuple[str, ...] = ()

    @classmethod
    def suits(cls, raw: Column) -> tuple[str, str]:
        """Certain for text that repeats itself; numbers may be classes if they are few."""
        if raw.ndim != 1:
            return "no", ""
        numbers, different = _as_numbers(raw), len(set(raw.tolist()))
        if not np.isfinite(numbers).all():
            return "certain", f"{different} different labels"
        return ("no" if _are_measured(numbers) else "possible"), f"{different} classes that are called by numbers"

    def learned(self, raw: Column, source: Source) -> Self:
        """With the classes of the training samples.

        Raises:
            BadDataError: fewer than two to train on, or a sample without a label.
        """
        found = sorted(set(raw.tolist()))
        if "" in found:
            row = raw.tolist().index("")
            raise BadDataError(f"{source.called}: sample {row + 1} has no label ({self.origin})")
        if len(found) < 2 and source.argument.startswith("train"):
            raise BadDataError(
                f"{source.called} has one class only: {', '.join(map(repr, found))} ({self.origin})",
                why="training needs at least two",
                fix="add samples of a second class, or choose other targets",
            )
        return replace(self, labels=tuple(found))

    def read(self, raw: Column, source: Source) -> Column:
        """Class indices (N,) int64."""
        match_labels(sorted(set(raw.tolist())), self.labels, source)
        index = {name: i for i, name in enumerate(self.labels)}
        return np.fromiter((index[name] for name in raw), dtype=np.int64, count=len(raw))

    def strata(self, raw: Column) -> Sequence[str]:
        """The labels."""
        return raw.tolist()  # type: ignore[no-any-return]

    def classes(self, raw: Column) -> list[tuple[str, ...]]:
        """The label of each sample, which training needs to have seen."""
        return [(label,) for label in raw.tolist()]

    def summary(self, raw: Column) -> str:
        """How many samples each label has, the most frequent first."""
        return _counted(raw.tolist())

    def lines(self, target: Any) -> list[str]:
        """The name of the class."""
        return [self.labels[int(target)]]

    def describe(self) -> str:
        """The number of classes, and where they are from."""
        return f"{len(self.labels)} classes" + (f", {self.origin}" if self.fields else "")

    def _check(self) -> None:
        super()._check()
        _require_texts(self.labels)


@dataclass(frozen=True)
class LabelsReader(TargetReader):
    """Any number of labels a sample, as zeros and ones: (N, labels) float32.

    Args:
        fields: several columns of 0 and 1 (or true and false, yes and no), one a label; or one column with names.
        labels: in the order of the outputs. The names of several columns, or the names found in one, sorted.
        separator: between the names in one column.
    """

    kind = "labels"

    labels: tuple[str, ...] = ()
    separator: str | None = None

    @classmethod
    def suits(cls, raw: Column) -> tuple[str, str]:
        """Certain for several columns of 0 and 1."""
        flags = {str(value).strip().lower() for value in raw.ravel()}
        are_flags = raw.ndim == 2 and flags <= {*_YES, *_NO}
        return ("certain", f"{raw.shape[1]} columns of 0 and 1") if are_flags else ("no", "")

    def learned(self, raw: Column, source: Source) -> Self:
        """With the labels that occur in the training samples.

        Raises:
            BadDataError: there is none.
        """
        if raw.ndim == 2:
            return replace(self, labels=self.fields)
        found = sorted({name for names in raw for name in self._names(names)})
        if not found:
            raise BadDataError(f"{source.called} has no label ({self.origin})")
        return replace(self, labels=tuple(found))

    def read(self, raw: Column, source: Source) -> Column:
        """Zeros and ones (N, labels) float32."""
        if raw.ndim == 2:
            return self._flags(raw, source)
        named = [self._names(names) for names in raw]
        match_labels(sorted({name for names in named for name in names}), self.labels, source)
        index = {name: i for i, name in enumerate(self.labels)}
        found = np.zeros((len(raw), len(self.labels)), dtype=np.float32)
        for row, names in enumerate(named):
            found[row, [index[name] for name in names]] = 1
        return found

    def _flags(self, raw: Column, source: Source) -> Column:
        if tuple(self.fields) != self.labels:
            match_labels(self.fields, self.labels, source)
        known = {**dict.fromkeys(_YES, 1.0), **dict.fromkeys(_NO, 0.0)}
        found = np.zeros(raw.shape, dtype=np.float32)
        for place, value in np.ndenumerate(raw):
            try:
                found[place] = known[str(value).strip().lower()]
            except KeyError:
                raise BadDataError(
                    f"{source.called}: sample {place[0] + 1} has {value!r} in column {self.fields[place[1]]!r}",
                    why="the columns of several labels hold 0 or 1, true or false, yes or no",
                ) from None
        return found[:, [self.fields.index(label) for label in self.labels]]

    def strata(self, raw: Column) -> Sequence[str]:
        """The labels of a sample if enough others have the same; else the rarest of them."""
        named = self.classes(raw)
        of_label = Counter(name for names in named for name in names)
        of_all = Counter(named)
        rarest = [min(names, key=lambda name: (of_label[name], name), default="") for names in named]
        found = ["\0".join(names) if of_all[names] >= _MANY else one for names, one in zip(named, rarest, strict=True)]
        sizes = Counter(found)
        # A stratum of one sample always trains, which only the single sample of a label has to.
        return [
            "" if sizes[one] == 1 and of_label[label] > 1 else one for one, label in zip(found, rarest, strict=True)
        ]

    def classes(self, raw: Column) -> list[tuple[str, ...]]:
        """The labels that apply to each sample, sorted by name."""
        if raw.ndim == 1:
            return [tuple(sorted(self._names(names))) for names in raw]
        return [
            tuple(
                sorted(name for name, flag in zip(self.fields, row, strict=True) if str(flag).strip().lower() in _YES)
            )
            for row in raw
        ]

    def _names(self, names: str) -> list[str]:
        parts = names.split(self.separator) if self.separator else [names]
        return list(dict.fromkeys(name.strip() for name in parts if name.strip()))

    def summary(self, raw: Column) -> str:
        """How many samples have each label, the most frequent first."""
        if raw.ndim == 2:
            return _counted(self.fields[place] for row in raw for place, flag in enumerate(row) if flag.lower() in _YES)
        return _counted(name for names in raw for name in self._names(names))

    def lines(self, target: Any) -> list[str]:
        """The names of the labels that apply."""
        return [", ".join(name for name, flag in zip(self.labels, target, strict=True) if flag) or "no label"]

    def describe(self) -> str:
        """The number of labels, and where they are from."""
        return f"{len(self.labels)} labels, any number of them per sample, {self.origin}"

    def _check(self) -> None:
        super()._check()
        _require_texts(self.labels)
        if self.separator is not None:
            _require_texts((self.separator,))


@dataclass(frozen=True)
class SharesReader(TargetReader):
    """Soft labels: the share of each class, which sum to 1 in each sample: (N, classes) float32.

    Args:
        fields: a column for each class.
        labels: the names of the columns.
    """

    kind = "shares"

    labels: tuple[str, ...] = ()

    @classmethod
    def suits(cls, raw: Column) -> tuple[str, str]:
        """Certain for columns of numbers that sum to 1 in each row, some of which are neither 0 nor 1."""
        return ("certain", f"{raw.shape[1]} columns of shares that sum to 1") if are_shares(raw) else ("no", "")

    def learned(self, raw: Column, source: Source) -> Self:
        """With the columns as classes."""
        return replace(self, labels=self.fields)

    def read(self, raw: Column, source: Source) -> Column:
        """Shares (N, classes) float32, in the order of the labels.

        Raises:
            BadDataError: a value below 0, one that is not a number, or a row that does not sum to 1.
        """
        if tuple(self.fields) != self.labels:
            match_labels(self.fields, self.labels, source)
        numbers = _as_numbers(raw.ravel()).reshape(raw.shape)
        wrong = np.flatnonzero(~_sum_to_one(numbers))
        if len(wrong):
            row = int(wrong[0])
            raise BadDataError(
                f"{source.argument} {source.place!r}: sample {row + 1} has the shares {', '.join(raw[row])}",
                why=f"shares of classes are 0 or more and sum to 1; those of {len(wrong):,} sample(s) do not",
            )
        shares: Column = numbers / numbers.sum(axis=1, keepdims=True)
        ordered: Column = shares[:, [self.fields.index(label) for label in self.labels]].astype(np.float32)
        return ordered

    def strata(self, raw: Column) -> Sequence[str]:
        """The class with the largest share."""
        largest = _as_numbers(raw.ravel()).reshape(raw.shape).argmax(axis=1)
        return [self.fields[place] for place in largest.tolist()]

    def summary(self, raw: Column) -> str:
        """How many samples each class has the largest share of, the most frequent first."""
        return _counted(self.strata(raw))

    def lines(self, target: Any) -> list[str]:
        """The classes with a share, the largest first."""
        found = sorted(zip(map(float, target), self.labels, strict=True), reverse=True)
        return [", ".join(f"{label} {share:.2f}" for share, label in found if share > 0)]

    def describe(self) -> str:
        """The number of classes, and where their shares are from."""
        return f"{len(self.labels)} classes, the share of each {self.origin}"

    def _check(self) -> None:
        super()._check()
        _require_texts(self.labels)


@dataclass(frozen=True)
class NumberReader(TargetReader):
    """One number or several a sample: (N, numbers) float32, in their own unit.

    Args:
        fields: a column for each number, or empty for folders that are named by a number.
        mean: of each over the training samples.
        std: their standard deviation, 1 where all are equal. What a model is trained on is (number - mean) / std.
    """

    kind = "number"

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def suits(cls, raw: Column) -> tuple[str, str]:
        """Certain for numbers that cannot be classes: most samples have another, or there are many with decimals."""
        columns = raw if raw.ndim == 2 else raw[:, None]
        numbers = _as_numbers(columns.ravel()).reshape(columns.shape)
        if not np.isfinite(numbers).all():
            return "no", ""
        different = [len(np.unique(column)) for column in numbers.T]
        # Several columns are numbers unless they are flags.
        is_certain = LabelsReader.suits(raw)[0] == "no" if raw.ndim == 2 else _are_measured(numbers[:, 0])
        return "certain" if is_certain else "possible", f"{', '.join(map(str, different))} different numbers"

    def learned(self, raw: Column, source: Source) -> Self:
        """With mean and standard deviation of the training samples."""
        numbers = self._numbers(raw, source)
        mean, std = numbers.mean(axis=0), numbers.std(axis=0)
        std = np.where(std > 0, std, 1.0)
        return replace(self, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def read(self, raw: Column, source: Source) -> Column:
        """The numbers (N, numbers) float32."""
        return self._numbers(raw, source).astype(np.float32)

    def strata(self, raw: Column) -> Sequence[str]:
        """Ranges of the first number with as many samples each: a tenth of the samples, and ten at least."""
        numbers = _as_numbers(raw if raw.ndim == 1 else raw[:, 0])
        known = np.sort(numbers[np.isfinite(numbers)])
        count = min(_MANY, len(known) // _MANY)
        bounds = [known[len(known) * part // count] for part in range(1, count)]
        return np.searchsorted(bounds, numbers, side="right").astype(str).tolist()  # type: ignore[no-any-return]

    def _numbers(self, raw: Column, source: Source) -> Column:
        columns = raw if raw.ndim == 2 else raw[:, None]
        try:
            numbers = columns.astype(np.float64)
        except ValueError:
            numbers = np.vectorize(number_or_nan, otypes=[np.float64])(columns)
        bad = np.argwhere(~np.isfinite(numbers))
        if len(bad):
            row, column = bad[0]
            value = columns[row, column]
            where = f"column {self.fields[column]!r}" if self.fields else "the name of its folder"
            raise BadDataError(
                f"{source.called}: sample {row + 1} has {value!r} in {where}, which is not a number",
                why=f"{len(bad)} of {numbers.size} values are not finite numbers",
            )
        return numbers

    def lines(self, target: Any) -> list[str]:
        """Each number with its name."""
        return [f"{name} {float(value):.4g}" for name, value in zip(self.names, target, strict=True)]

    @property
    def names(self) -> tuple[str, ...]:
        """What predictions call the numbers."""
        return self.fields or ("number",)

    def summary(self, raw: Column) -> str:
        """The least and the greatest number of each column."""
        columns = _as_numbers(raw.ravel()).reshape(len(raw), -1).T
        return ", ".join(f"{column.min():.4g} to {column.max():.4g}" for column in columns)

    def describe(self) -> str:
        """Mean and deviation, and where the numbers are from."""
        shown = ", ".join(f"{mean:.4g} ± {std:.4g}" for mean, std in zip(self.mean[:4], self.std[:4], strict=True))
        return f"{len(self.mean)} number{'s' if len(self.mean) > 1 else ''} per sample, {self.origin}: {shown}"

    def _check(self) -> None:
        super()._check()
        if len(self.mean) != len(self.std) or not all(
            isinstance(value, float) and math.isfinite(value) for value in (*self.mean, *self.std)
        ):
            raise ValueError("mean and std are not as many finite numbers")
        if any(value <= 0 for value in self.std):
            raise ValueError("a standard deviation is not above 0")


def match_labels(found: Sequence[str], labels: Sequence[str], source: Source) -> tuple[str, ...]:
    """Require that every label that was found is known; gives the known ones that were not found.

    Raises:
        BadDataError: one is unknown; the message is a diff of the names.
    """
    known, there = set(labels), set(found)
    unknown = [name for name in found if name not in known]
    missing = tuple(name for name in labels if name not in there)
    if unknown:
        diff = [f"+ only in {source.argument}: {name}" for name in unknown[:_SHOWN]]
        diff += [f"- only in {source.against}: {name}" for name in missing[:_SHOWN]]
        guess = did_you_mean(unknown[0], missing or labels)
        what = "folder" if "folder" in source.noun else "label"
        raise BadDataError(
            f"{source.called} has {len(unknown)} {source.noun} unknown to {source.against}",
            why="classes are matched by name\n    " + "\n    ".join(diff),
            fix=f"rename or remove the {what} {unknown[0]!r}" + (f" ({guess})" if guess else ""),
        )
    return missing


def _counted(labels: Iterable[str]) -> str:
    return ", ".join(f"{label} {count:,}" for label, count in Counter(labels).most_common(_SHOWN))


def _as_numbers(raw: Column) -> Column:
    return np.array([number_or_nan(value) for value in raw.tolist()], dtype=np.float64)


def _are_measured(numbers: Column) -> bool:
    """Whether numbers (N,) can be no classes: more than half of them differ, or more than 20 and not all are whole."""
    different = len(np.unique(numbers))
    return different > max(2, len(numbers) / 2) or (different > _MOST_CLASSES and bool((numbers % 1 != 0).any()))


def are_shares(raw: Column) -> bool:
    """Whether targets are soft labels: rows of two or more numbers that sum to 1, and not only zeros and ones."""
    if raw.ndim != 2 or raw.shape[1] < 2 or not len(raw):
        return False
    numbers = _as_numbers(raw.ravel()).reshape(raw.shape)
    return bool(_sum_to_one(numbers).all()) and bool(((numbers > 0) & (numbers < 1)).any())


def _sum_to_one(numbers: Column) -> Column:
    """For each row whether it holds shares; they may be rounded to three decimals."""
    is_share: Column = (numbers >= 0).all(axis=1) & (np.abs(numbers.sum(axis=1) - 1) <= 1e-3 * numbers.shape[1])
    return is_share


def number_or_nan(value: Any) -> float:
    """The number that a cell holds; NaN if it holds none."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def _require_texts(values: Any) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"names are not a list of texts: {values!r}"[:200])
