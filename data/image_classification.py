"""`ImageClassificationData`: images with one label each, or with several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from flashtask.core.errors import UsageError
from flashtask.data.image_data import ImageData
from flashtask.data.samples import PARTS, SampleTable
from flashtask.data.targets import LabelReader, LabelsReader, SharesReader, TargetReader, match_labels

__all__ = ["ImageClassificationData"]


class ImageClassificationData(ImageData):
    """Images with one label each, from class folders or a column of a table; or with any number of labels.

    Several `target_fields` of a table, or a `label_separator`, mean any number of labels an image, for
    `ImageClassifier(multi_label=True)`; columns whose numbers sum to 1 are soft labels, the shares of classes.
    """

    readers = (LabelReader, LabelsReader, SharesReader)

    @classmethod
    def reader_of_columns(cls, fields: tuple[str, ...], separator: str | None) -> TargetReader:
        """One label in one column; several columns, or a separator, mean several labels."""
        if separator is not None and len(fields) > 1:
            raise UsageError(
                f"label_separator={separator!r} and {len(fields)} target_fields contradict each other",
                why="several columns hold 0 or 1 for one label each; one column holds the names of all",
                fix="leave out label_separator, or give one target field",
            )
        if separator is not None or len(fields) > 1:
            return LabelsReader(fields, separator=separator)
        return LabelReader(fields)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names; a position is a class index. Empty if there are only images to predict."""
        return self._label_reader.labels

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of labels."""
        return isinstance(self._reader, LabelsReader)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.labels)

    @property
    def _label_reader(self) -> LabelReader | LabelsReader | SharesReader:
        return cast("LabelReader | LabelsReader | SharesReader", self._reader)

    def set_labels(self, labels: Sequence[str]) -> None:
        """Take the classes of a model that is already trained; those of the data are matched to them by name.

        Raises:
            UsageError: labels that are not different strings.
            BadDataError: the data has a label that is not among them.
        """
        if isinstance(labels, str) or not all(isinstance(name, str) for name in labels):
            raise UsageError(f"labels must be a list of names, not {labels!r}")
        if len(set(labels)) != len(labels):
            raise UsageError(f"labels has a name twice: {sorted(n for n in labels if labels.count(n) > 1)[0]!r}")
        self._take_reader(replace(self._label_reader, labels=tuple(labels)), "the model")

    @property
    def missing_classes(self) -> dict[str, tuple[str, ...]]:
        """Labels that no image of a part has, by part; for data with one label an image."""
        if not isinstance(self._reader, LabelReader):
            return {}
        return {
            part: match_labels(sorted(set(found)), self.labels, self._source(part))
            for part, found in self._labels_by_part().items()
        }

    def counts(self) -> dict[str, dict[str, int]]:
        """Images of each class (of soft labels the rounded sum), by part, without those that were left out."""
        if not isinstance(self._reader, LabelReader):
            read = {part: self._read_targets(part) for part in ("train", "val", "test") if self._table.has(part)}
            sums = {part: np.rint(targets.sum(axis=0)).astype(int).tolist() for part, targets in read.items()}
            return {part: dict(zip(self.labels, counts, strict=True)) for part, counts in sums.items()}
        found = {part: Counter(names) for part, names in self._labels_by_part().items()}
        return {part: {label: count[label] for label in self.labels} for part, count in found.items()}

    def _labels_by_part(self) -> dict[str, list[str]]:
        tables = {part: self._table.of(part) for part in PARTS[:3] if self._table.has(part)}
        return {part: [] if table.targets is None else table.targets.tolist() for part, table in tables.items()}

    def _lost_targets(self, before: SampleTable, after: SampleTable) -> str:
        if not isinstance(self._reader, LabelReader) or before.targets is None or after.targets is None:
            return ""
        lost = sorted(set(before.targets.tolist()) - set(after.targets.tolist()))
        return f"class {lost[0]!r}" if lost else ""
