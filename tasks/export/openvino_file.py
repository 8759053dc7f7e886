"""OpenVINO: its two files, made from ONNX, and its runtime."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flashtask.core.files import atomic_write, staging_folder
from flashtask.tasks.export.onnx_file import OnnxFile
from flashtask.tasks.export.outputs import Arrays
from flashtask.trainer.loggers.libraries import library

__all__ = ["OpenVinoFile", "require_openvino"]

_INSTALL = "pip install 'flashtask[openvino]'"


def require_openvino() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed, with the command that installs it.
    """
    return library("openvino", "an export to OpenVINO", _INSTALL)


class OpenVinoFile:
    """A model in OpenVINO's format.

    Args:
        source: the same model in ONNX.
    """

    #: That may call `run` at the same time.
    num_threads: ClassVar[int] = 1

    def __init__(self, source: OnnxFile) -> None:
        self._openvino, self._source = require_openvino(), source
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, "model.onnx")
            source.write(place, {})
            self.model = self._openvino.convert_model(place)
        self.names = [one.name for one in source.model.graph.output]
        self._compiled: Any = None

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return sum(one.data.nbytes for one in self.model.get_ops() if one.get_type_name() == "Constant")

    def run(self, images: np.ndarray[Any, Any]) -> Arrays:
        """The outputs of a batch, on the CPU in float32."""
        if self._compiled is None:
            settings = {"INFERENCE_PRECISION_HINT": "f32"}
            self._compiled = self._openvino.Core().compile_model(self.model, "CPU", settings)
        found = self._compiled([images])
        return {name: np.asarray(found[place]) for place, name in enumerate(self.names)}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose weights can become whole numbers."""
        return self._source.layers

    def quantized(self, samples: Iterable[np.ndarray[Any, Any]], as_float: Iterable[str] = ()) -> OpenVinoFile:
        """As `OnnxFile.quantized`, which finds the ranges; OpenVINO takes them over and computes in 8 bits."""
        return OpenVinoFile(self._source.quantized(samples, as_float))

    def write(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write `NAME.bin` and then `NAME.xml`, which holds the facts as runtime information below `flashtask`.

        Raises:
            StorageError: one of them cannot be written.
        """
        for name, value in sorted(facts.items()):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
            self.model.set_rt_info(text, ["flashtask", name])
        with staging_folder(path.parent, path.name) as folder:
            self._openvino.save_model(self.model, folder / path.name, compress_to_fp16=False)
            for place in (path.with_suffix(".bin"), path):
                with atomic_write(place) as file:
                    file.write((folder / place.name).read_bytes())
