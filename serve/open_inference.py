"""The Open Inference Protocol, version 2, over HTTP and JSON.

Source: https://github.com/kserve/open-inference-protocol. Images are the input `images`: BYTES with an image file in
base64 each, or UINT8 of shape (N, H, W, 3). Both may follow the JSON as bytes, by the extension for binary tensors that
Triton's clients use; answers are JSON, which they read too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException, Request

from flashtask._version import __version__
from flashtask.data.inputs import Input
from flashtask.serve.limits import Limits
from flashtask.serve.model import ServedModel
from flashtask.serve.models import Models
from flashtask.serve.uploads import base64_bytes, read_json

__all__ = ["open_inference_routes"]

#: The header of a request whose JSON is followed by binary tensors.
_JSON_LENGTH = "Inference-Header-Content-Length"

Predicted = Callable[[str | None, Sequence[Input]], Awaitable[tuple[ServedModel, list[Any]]]]


def open_inference_routes(models: Models, predicted: Predicted, limits: Limits) -> APIRouter:
    """The routes below /v2.

    Args:
        models: by name.
        predicted: the model of a name and its predictions of images.
        limits: on images in a request.
    """
    routes = APIRouter(prefix="/v2")

    @routes.get("")
    async def server() -> dict[str, Any]:
        """Name and version of the server."""
        return {"name": "flashtask", "version": __version__, "extensions": ["binary_tensor_data"]}

    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        """Whether the process answers."""
        return {"live": True}

    @routes.get("/health/ready")
    async def ready() -> dict[str, bool]:
        """Whether every model is warm; 503 if not."""
        if not models.are_ready:
            raise HTTPException(503, "the models are being loaded")
        return {"ready": True}

    @routes.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """Inputs and outputs of a model."""
        served = models.get(name)
        return {
            "name": name,
            "versions": [served.version],
            "platform": "flashtask",
            "inputs": [{"name": "images", "datatype": "BYTES", "shape": [-1]}],
            "outputs": _outputs_of(served),
        }

    @routes.get("/models/{name}/ready")
    async def model_ready(name: str) -> dict[str, Any]:
        """Whether a model is warm; 503 if not."""
        models.get(name)
        return {"name": name, "ready": True}

    @routes.post("/models/{name}/infer")
    async def infer(name: str, request: Request) -> dict[str, Any]:
        """Predict images."""
        models.get(name)  # an unknown name is answered before the images are read
        content, rest = _split(await request.body(), request.headers.get(_JSON_LENGTH))
        inputs = _images_of(content, rest)
        if len(inputs) > limits.max_images:
            raise HTTPException(413, f"{len(inputs)} images in a request; at most {limits.max_images}")
        served, found = await predicted(name, inputs)
        answer = {"model_name": name, "model_version": served.version, "outputs": _tensors(served, found)}
        return answer | ({"id": content["id"]} if "id" in content else {})

    return routes


def _split(body: bytes, length: str | None) -> tuple[Any, bytes]:
    """The JSON of a request, and the bytes that follow it.

    Args:
        body: of the request.
        length: of the JSON, as the request's header says it; None if there is nothing else.

    Raises:
        HTTPException: 400, the length is none, or what it ends at is not JSON.
    """
    if length is None:
        return read_json(body), b""
    if not (length.isascii() and length.isdigit()) or int(length) > len(body):
        raise HTTPException(400, f"{_JSON_LENGTH} is {length[:20]!r}, and the body has {len(body)} bytes")
    return read_json(body[: int(length)]), body[int(length) :]


def _binary_size(tensor: dict[str, Any]) -> int | None:
    """How many bytes of a tensor follow the JSON; None if its data is in the JSON."""
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    return size if type(size) is int else None


def _texts_of(rest: bytes) -> list[bytes]:
    """The elements of a binary BYTES tensor: the length of each in four bytes, the lowest first, then the element.

    Raises:
        HTTPException: 400, the lengths do not add up.
    """
    found, place = [], 0
    while place < len(rest):
        length = int.from_bytes(rest[place : place + 4], "little")
        if place + 4 + length > len(rest):
            raise HTTPException(400, "the elements of the binary tensor are longer than the tensor")
        found.append(rest[place + 4 : place + 4 + length])
        place += 4 + length
    return found


def _images_of(content: Any, rest: bytes) -> list[Input]:
    """The pictures of an inference request.

    Args:
        content: the JSON.
        rest: what follows it.

    Raises:
        HTTPException: 400, it is not one.
    """
    tensors = content.get("inputs") if isinstance(content, dict) else None
    if not isinstance(tensors, list) or len(tensors) != 1 or not isinstance(tensors[0], dict):
        raise HTTPException(400, "one input is needed: `images`")
    tensor = tensors[0]
    data, shape, kind = tensor.get("data"), tensor.get("shape"), tensor.get("datatype")
    if tensor.get("name") != "images":
        raise HTTPException(400, f"the input is called `images`, not {tensor.get('name')!r}")
    is_binary = _binary_size(tensor) is not None
    if is_binary and _binary_size(tensor) != len(rest):
        raise HTTPException(400, f"{len(rest)} bytes follow the JSON, not {_binary_size(tensor)}")
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise HTTPException(400, "the input `images` needs `shape`, a list of integers")
    if is_binary and kind == "BYTES":
        files = _texts_of(rest)
        if shape != [len(files)]:
            raise HTTPException(400, f"BYTES of shape {shape} need as many elements, not {len(files)}")
        return [Input(f"image {n}", file) for n, file in enumerate(files)]
    if is_binary:
        data = np.frombuffer(rest, np.uint8)
    elif not isinstance(data, list):
        raise HTTPException(400, "the input `images` needs `data`, a list")
    if kind == "BYTES":
        if shape != [len(data)] or not all(isinstance(text, str) for text in data):
            raise HTTPException(400, f"BYTES of shape {shape} need as many base64 texts in `data`")
        return [Input(f"image {n}", base64_bytes(text, f"image {n}")) for n, text in enumerate(data)]
    if kind == "UINT8":
        try:
            values = np.asarray(data, dtype=np.int64).reshape(-1)
        except (TypeError, ValueError, OverflowError) as error:
            raise HTTPException(400, "`data` does not hold integers alone") from error
        if len(shape) != 4 or shape[3] != 3 or math.prod(shape) != values.size or not values.size:
            raise HTTPException(400, f"UINT8 needs the shape (N, H, W, 3) and as many values, not {shape}")
        if values.min() < 0 or values.max() > 255:
            raise HTTPException(400, "UINT8 values are from 0 to 255")
        pictures = values.astype(np.uint8).reshape(shape)
        return [Input(f"image {n}", pictures[n]) for n in range(len(pictures))]
    raise HTTPException(400, f"the datatype of `images` is BYTES or UINT8, not {kind!r}")


def _outputs_of(served: ServedModel) -> list[dict[str, Any]]:
    if _has_scores(served):
        decision = {"name": "decision", "datatype": "BYTES", "shape": [-1]}
        return [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, len(served.labels)]},
            *([decision] if served.about().get("decides") else []),
        ]
    return [{"name": "predictions", "datatype": "BYTES", "shape": [-1]}]


def _has_scores(served: ServedModel) -> bool:
    options = served.task.prediction_class.options
    return bool(served.labels) and "all_scores" in options and "top_k" in options


def _tensors(served: ServedModel, found: list[Any]) -> list[dict[str, Any]]:
    """Labels and scores in the order of the model's labels; for other tasks each prediction as JSON text."""
    count = len(found)
    if not _has_scores(served):
        rows = [{name: value for name, value in one.to_dict().items() if name != "path"} for one in found]
        texts = [json.dumps(row, allow_nan=False) for row in rows]
        return [{"name": "predictions", "datatype": "BYTES", "shape": [count], "data": texts}]
    scores = [one.probabilities[label] for one in found for label in served.labels]
    tensors = [
        {"name": "label", "datatype": "BYTES", "shape": [count], "data": [one.label for one in found]},
        {"name": "scores", "datatype": "FP32", "shape": [count, len(served.labels)], "data": scores},
    ]
    decisions = [one.decision for one in found]
    if count and decisions[0] is not None:
        tensors.append({"name": "decision", "datatype": "BYTES", "shape": [count], "data": decisions})
    return tensors
