"""What MLflow imports to load a model that `MLFlowLogger(log_model=True)` has stored; see `mlflow.pyfunc`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flashtask.core.errors import UsageError
from flashtask.tasks.loading import load
from flashtask.trainer.loggers.libraries import library

__all__ = ["MlflowModel"]

_INSTALL = "pip install pandas"


class MlflowModel:
    """A task in the form that MLflow calls.

    Args:
        path: of its checkpoint.
    """

    def __init__(self, path: str) -> None:
        self.task = load(path)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """A data frame with a row for each image: the columns of `flashtask predict --scores all`, without `path`.

        Args:
            model_input: a data frame whose first column holds paths, addresses, the bytes of image files, or these as
                base64 text after `data:image/png;base64,`; or a list or an array of them.
            params: none are known.

        Raises:
            UsageError: it is something else.
            BadDataError, MissingInputError, HubError: an image cannot be read.
        """
        pandas = library("pandas", "an MLflow model", _INSTALL)
        given = [_image(one) for one in _cells(model_input)]
        labels = getattr(self.task, "labels", None)
        rows = []
        for said in self.task.predict(given) if given else []:
            row = said.as_row(all_scores=labels if labels and "all_scores" in said.options else None)
            row.pop("path", None)
            rows.append(row)
        return pandas.DataFrame(rows)


def _cells(given: Any) -> Iterable[Any]:
    pandas = library("pandas", "an MLflow model", _INSTALL)
    if isinstance(given, pandas.DataFrame):
        return given.iloc[:, 0].tolist() if given.shape[1] else []
    if isinstance(given, pandas.Series) or (isinstance(given, np.ndarray) and given.dtype.kind in "OUS"):
        return np.asarray(given).ravel().tolist()
    if isinstance(given, Mapping) and given:
        return _cells(next(iter(given.values())))
    if isinstance(given, (str, bytes)):
        return [given]
    if isinstance(given, (list, tuple)):
        return given
    raise UsageError(
        f"the model takes paths, addresses or bytes of images, not {type(given).__name__}",
        fix='pandas.DataFrame({"image": ["cell.png"]})',
    )


def _image(given: Any) -> Any:
    if not isinstance(given, str) or not given.startswith("data:"):
        return given
    try:
        return base64.b64decode(given.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"what follows `data:` is not base64: {error}") from error


def _load_pyfunc(path: str) -> MlflowModel:
    """What `mlflow.pyfunc.load_model` calls, by this name."""
    return MlflowModel(path)
