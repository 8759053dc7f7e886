"""ONNX: the file, and ONNX Runtime, which computes it. Both libraries are imported when they are needed."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashtask.core.files import atomic_write
from flashtask.core.machine import num_cores
from flashtask.tasks.export.outputs import Arrays
from flashtask.trainer.loggers.libraries import library

__all__ = ["OPSET", "OnnxFile", "require_onnx"]

#: The version of ONNX's operators: the oldest that has all that graphs need, `GridSample` of 4-d maps among them.
OPSET = 20
_INSTALL = "pip install 'flashtask[export]'"
_MOST_THREADS = 8
#: Layers whose weights become whole numbers, with what lies between them.
_QUANTIZED = ("Conv", "Gemm", "MatMul")


def require_onnx(*, computes: bool = True) -> None:
    """The libraries are there.

    Args:
        computes: whether ONNX Runtime is needed too.

    Raises:
        UsageError: one is not, with the command that installs it.
    """
    for name in ("onnx", "onnxscript", *(["onnxruntime"] if computes else [])):
        library(name, "an export to ONNX", _INSTALL)


class OnnxFile:
    """A model in ONNX's format.

    Args:
        model: a `ModelProto`.
        layers: names of the nodes of the network whose weights can become whole numbers.
    """

    def __init__(self, model: Any, layers: Sequence[str] = ()) -> None:
        self.model, self.layers = model, tuple(layers)
        self._session: Any = None
        self._lock = threading.Lock()

    @classmethod
    def of_program(
        cls, program: torch.export.ExportedProgram, axes: Mapping[int, str], outputs: Mapping[str, Sequence[str]]
    ) -> OnnxFile:
        """The program as a model.

        Args:
            program: with one input.
            axes: names of the input's axes that may have any length.
            outputs: of each output the names of its axes after the first.
        """
        require_onnx(computes=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about each other
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=["images"],
                output_names=list(outputs),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        assert made is not None
        model = made.model_proto
        layers = [
            node.name
            for node in model.graph.node
            if node.op_type in _QUANTIZED
            and any(": network." in f"{one.value}" or "/network" in one.value for one in node.metadata_props)
        ]
        _name_axes(model, axes)
        _forget_sources(model)
        return cls(model, layers)

    @property
    def num_threads(self) -> int:
        """Threads that call `run` side by side, for each of which ONNX Runtime has one."""
        return min(num_cores(), _MOST_THREADS)

    @property
    def num_bytes(self) -> int:
        """Of the file, without its metadata."""
        return int(self.model.ByteSize())

    def run(self, images: np.ndarray[Any, Any]) -> Arrays:
        """The outputs of a batch, by ONNX Runtime on the CPU."""
        with self._lock:
            if self._session is None:
                onnxruntime = library("onnxruntime", "an export to ONNX", _INSTALL)
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 3
                options.intra_op_num_threads = 1  # in a picture there is too little work for several
                self._session = onnxruntime.InferenceSession(
                    self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
        names = [one.name for one in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, {"images": images}), strict=True))

    def quantized(self, samples: Iterable[np.ndarray[Any, Any]], as_float: Iterable[str] = ()) -> OnnxFile:
        """The same with weights and activations of the network in 8 bits, by static quantization.

        Args:
            samples: batches of the input, by which the ranges of activations are found.
            as_float: names of layers that stay as they are.
        """
        quantization = library("onnxruntime.quantization", "quantization", _INSTALL)
        onnx = library("onnx", "quantization", _INSTALL)

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]  # of a library without types
            def __init__(self) -> None:
                self.left: Iterator[np.ndarray[Any, Any]] = iter(samples)

            def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
                images = next(self.left, None)
                return None if images is None else {"images": images}

        kept = set(as_float)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _no_advice():
            warnings.simplefilter("ignore")
            before, after = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
            before.write_bytes(self.model.SerializeToString())
            quantization.quantize_static(
                before,
                after,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(_QUANTIZED),
                nodes_to_quantize=[name for name in self.layers if name not in kept],
                per_channel=True,
                # 7 bits, whose products do not overflow the 16 bits that CPUs without VNNI add them up in.
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
            return OnnxFile(onnx.load(after), self.layers)

    def write(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the file; a fact that is a text is stored as it is, anything else as JSON.

        Raises:
            StorageError: it cannot be written.
        """
        del self.model.metadata_props[:]
        for name, value in sorted(facts.items()):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
            self.model.metadata_props.add(key=name, value=text)
        content = self.model.SerializeToString(deterministic=True)
        with atomic_write(path, size=len(content)) as file:
            file.write(content)


@contextmanager
def _no_advice() -> Iterator[None]:
    """Without the library's advice, which is not for users of this package and goes to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _name_axes(model: Any, axes: Mapping[int, str]) -> None:
    """Give the axes that may have any length the names that the outputs have for them too."""
    names: dict[str, str] = {}
    for axis, name in axes.items():
        names[model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param] = name
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for one in value.type.tensor_type.shape.dim:
                if one.dim_param in names:
                    one.dim_param = names[one.dim_param]


def _forget_sources(model: Any) -> None:
    """Remove what the exporter notes about every node: lines of source files of this machine."""
    for graph in _graphs(model.graph):
        del graph.metadata_props[:]
        for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
            del part.metadata_props[:]
            part.doc_string = ""
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]
    model.doc_string = ""


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
