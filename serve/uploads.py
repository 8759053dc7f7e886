"""The images of a request, in each of the forms that clients send."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as BaseHTTPException
from starlette.formparsers import MultiPartException

from flashtask.core.errors import BadDataError, FlashtaskError, UsageError
from flashtask.data.download import check_address
from flashtask.data.inputs import Address, Input
from flashtask.serve.limits import Limits

__all__ = ["base64_bytes", "read_json", "read_uploads", "refusal"]

_FORMS = (
    "multipart/form-data with the field `files`, an image (image/*, application/octet-stream), "
    'or JSON: {"images": ["<base64>", ...]}'
)


async def read_uploads(request: Request, limits: Limits, *, allow_urls: bool) -> list[Input]:
    """The images of a request in the order in which they were sent, not decoded yet.

    Args:
        request: its body has passed the limits of bytes and time.
        limits: those on images.
        allow_urls: whether JSON may name addresses; private ones are refused when they are fetched.

    Raises:
        HTTPException: 400 for a body that is not what it says, 413 for too many images, 415 for another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        found = await _files_of(request, limits)
    elif kind == "application/json":
        found = _of_json(read_json(await request.body()), allow_urls)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        body = await request.body()
        found = [Input("the image", body)] if body else []
    else:
        raise HTTPException(415, f"the type {kind or 'of the body'!r} is not read here; send {_FORMS}")
    if not found:
        raise HTTPException(400, f"there is no image in the request; send {_FORMS}")
    if len(found) > limits.max_images:
        raise HTTPException(413, f"{len(found)} images in a request; at most {limits.max_images}")
    return found


async def _files_of(request: Request, limits: Limits) -> list[Input]:
    try:
        # One more is let through, so that the count is refused with 413.
        form = await request.form(max_files=limits.max_images + 1, max_fields=20, max_part_size=limits.max_bytes)
    except HTTPException:
        raise  # a limit of bytes was met while the body was received
    except (MultiPartException, BaseHTTPException) as error:
        text = str(getattr(error, "detail", None) or getattr(error, "message", None) or error)
        is_count = "many files" in text
        raise HTTPException(413 if is_count else 400, f"the multipart body cannot be read: {text}") from error
    try:
        found = []
        for number, one in enumerate([*form.getlist("files"), *form.getlist("file")]):
            if not isinstance(one, UploadFile):
                raise HTTPException(400, "the field `files` holds text, not a file")
            found.append(Input(one.filename or f"file {number}", await one.read()))
        return found
    finally:
        await form.close()


def read_json(body: bytes) -> Any:
    """The JSON in a body.

    Raises:
        HTTPException: 400, it is not JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error


def _of_json(content: Any, allow_urls: bool) -> list[Input]:
    if not isinstance(content, dict):
        raise HTTPException(400, 'JSON has to be an object: {"images": ["<base64>", ...]}')
    given = content.get("images", content.get("image"))
    if given is None:
        given = [{"url": one} for one in _as_list(content.get("urls", content.get("url", [])))]
    return [_of_value(number, one, allow_urls) for number, one in enumerate(_as_list(given))]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _of_value(number: int, value: Any, allow_urls: bool) -> Input:
    """One element of `images`: base64 text, or {"b64": ...}, or {"url": ...}."""
    if isinstance(value, dict) and isinstance(value.get("url"), str):
        return _of_address(value["url"], allow_urls)
    text = value.get("b64") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise HTTPException(400, f"image {number} is neither base64 text nor an object with `b64` or `url`")
    return Input(f"image {number}", base64_bytes(text, f"image {number}"))


def base64_bytes(text: str, name: str) -> bytes:
    """What base64 text stands for; the head of a data: address may precede it.

    Raises:
        HTTPException: 400, it is not base64.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(400, f"{name} is not base64: {error}") from error


def _of_address(url: str, allow_urls: bool) -> Input:
    if not allow_urls:
        raise HTTPException(403, "this server fetches no addresses; `flashtask serve --allow-urls` does")
    try:
        check_address(url)
    except UsageError as error:
        raise HTTPException(400, error.what) from error
    return Input(url, Address(url, public_only=True), url)


def refusal(error: BaseException, name: str) -> HTTPException:
    """The answer about an image that cannot be predicted.

    Args:
        error: what reading it ended with.
        name: of the image.
    """
    from PIL import UnidentifiedImageError

    if isinstance(error, MemoryError):
        return HTTPException(503, "not enough memory at the moment", {"Retry-After": "1"})
    if not isinstance(error, FlashtaskError):
        return HTTPException(500, "the prediction failed; the server's log says why")
    is_unknown = isinstance(error, BadDataError) and isinstance(error.__cause__, UnidentifiedImageError)
    why = f": {error.why}" if error.why and error.why not in error.what else ""
    return HTTPException(415 if is_unknown else 422, f"{name} cannot be used: {error.what}{why}")
