"""The routes of the server: predictions, the page, the Open Inference protocol, health and metrics."""

from __future__ import annotations

import asyncio
import io
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from flashtask._version import __version__
from flashtask.core.errors import BadDataError, FlashtaskError
from flashtask.data.images import image_size
from flashtask.data.inputs import Input
from flashtask.data.wide_images import TooManyPixelsError
from flashtask.serve.corrections import Corrections
from flashtask.serve.guard import Guard
from flashtask.serve.limits import Limits
from flashtask.serve.model import ServedModel
from flashtask.serve.models import Models
from flashtask.serve.open_inference import open_inference_routes
from flashtask.serve.uploads import read_uploads, refusal

__all__ = ["create_app"]

#: What the page may do: run its own script and style, show pictures, ask this server.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'"
)
_BODY = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
        }
    },
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    "application/json": {
        "schema": {
            "type": "object",
            "properties": {"images": {"type": "array", "items": {"type": "string", "format": "byte"}}},
        }
    },
}

#: The query parameter that names a model.
ModelName = Annotated[str | None, Query(description="the name of a model; by default the first")]


def create_app(
    sources: Mapping[str, Any],
    *,
    limits: Limits | None = None,
    device: Any = "cpu",
    precision: str | None = None,
    api_key: str | None = None,
    cors: Sequence[str] = (),
    allow_urls: bool = False,
    corrections: str | None = None,
) -> FastAPI:
    """An application that serves checkpoints; it loads them in the background once it is started.

    Args:
        sources: name of a model -> what `flashtask.load` takes. The first is the one that is meant without a name.
        limits: of requests.
        device: where the models are computed.
        precision: as for `flashtask predict --precision`.
        api_key: that clients send as `Authorization: Bearer KEY` or `X-API-Key: KEY`; None lets everybody in. Health,
            readiness and the page itself are open.
        cors: origins whose pages may ask, such as "https://example.org", or "*".
        allow_urls: fetch images from addresses that clients send; never from private ones.
        corrections: the folder in which answers that a person marked as wrong are stored; None stores none.
    """
    limits = limits or Limits()
    models = Models(lambda name: ServedModel(name, sources[name], device, precision), tuple(sources))
    store = None if corrections is None else Corrections(corrections)
    desk = _Desk(models, Guard(limits), allow_urls=allow_urls)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        # In the background, so that /health answers while the models are being loaded.
        threading.Thread(target=models.load_all, name="flashtask-load", daemon=True).start()
        yield
        await asyncio.to_thread(models.close)

    app = FastAPI(
        title="flashtask",
        version=__version__,
        lifespan=running,
        docs_url=None,  # its page would load scripts from elsewhere; /openapi.json is there
        redoc_url=None,
    )
    app.state.models = models
    app.add_middleware(desk.guard.middleware)
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"], max_age=600
        )
    app.add_exception_handler(Exception, _of_a_bug)
    app.add_exception_handler(HTTPException, _of_a_refusal)
    locked = [] if api_key is None else [Depends(_requires(api_key))]
    app.include_router(_open_routes(models))
    app.include_router(_prediction_routes(desk), dependencies=locked)
    app.include_router(_routes_of_the_page(desk, store), dependencies=locked)
    app.include_router(open_inference_routes(models, desk.predicted, limits), dependencies=locked)
    if api_key is not None:
        app.include_router(_reload_route(models), dependencies=locked)
    return app


class _Desk:
    """Takes the images of requests, and gives their predictions.

    Args:
        models: by name.
        guard: whose limits hold.
        allow_urls: whether clients may send addresses.
    """

    def __init__(self, models: Models, guard: Guard, *, allow_urls: bool) -> None:
        self.models, self.guard, self.allow_urls = models, guard, allow_urls

    async def uploads(self, request: Request, name: str | None) -> list[Input]:
        """The images of a request, for a model."""
        self.models.get(name)  # an unknown name is answered before the images are read
        return await read_uploads(request, self.guard.limits, allow_urls=self.allow_urls)

    async def predicted(self, name: str | None, inputs: Sequence[Input]) -> tuple[ServedModel, list[Any]]:
        """The predictions of images, or one error that names every image that cannot be used."""
        with self.guard.admitted(len(inputs)), self.models.lease(name) as served:
            await asyncio.to_thread(_require_sizes, inputs, self.guard.limits)
            answers = [asyncio.wrap_future(served.predict(each)) for each in inputs]
            done = await asyncio.gather(*answers, return_exceptions=True)
        pairs = zip(done, inputs, strict=True)
        failed = [refusal(one, each.name) for one, each in pairs if isinstance(one, BaseException)]
        if failed:
            worst = max(failed, key=lambda one: one.status_code)
            detail = "; ".join(str(one.detail) for one in failed[:5])
            raise HTTPException(worst.status_code, detail, worst.headers)
        return served, done

    async def explained(self, name: str | None, source: Input) -> bytes:
        """A picture with its heat map, as a PNG.

        Raises:
            HTTPException: 422, the model has no heat maps, or the image cannot be used; 429, too many are waiting.
        """
        with self.guard.admitted(1), self.models.lease(name) as served:
            await asyncio.to_thread(_require_sizes, [source], self.guard.limits)
            try:
                made = await asyncio.wrap_future(served.explain(source))
            except Exception as error:
                raise refusal(error, source.name) from error
        if made is None:
            raise HTTPException(422, f"the answers of {served.name} have no heat maps")
        return await asyncio.to_thread(_as_png, made)


def _requires(api_key: str) -> Callable[[Request], None]:
    """A dependency that refuses requests without the key."""

    def known(request: Request) -> None:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not secrets.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(401, "a valid API key is needed", {"WWW-Authenticate": "Bearer"})

    return known


async def _of_a_bug(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "the server failed; its log says why"}, 500)


async def _of_a_refusal(request: Request, error: Exception) -> Response:
    """The answer to a request that is refused; clients of the Open Inference protocol look for `error`."""
    assert isinstance(error, HTTPException)
    if not request.url.path.startswith("/v2"):
        return await http_exception_handler(request, error)
    return JSONResponse({"error": error.detail, "detail": error.detail}, error.status_code, headers=error.headers)


def _open_routes(models: Models) -> APIRouter:
    """What needs no key: the page itself, and whether the server is there and ready."""
    routes = APIRouter()

    @routes.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        text = resources.files("flashtask.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """Whether every model is loaded and warm: 200, else 503 with what is missing."""
        if models.error is not None:
            return JSONResponse({"status": "failed", "detail": models.error}, 503)
        return JSONResponse({"status": "ready" if models.are_ready else "loading"}, 200 if models.are_ready else 503)

    return routes


def _prediction_routes(desk: _Desk) -> APIRouter:
    """Predictions, and the metrics of the server."""
    routes = APIRouter()
    body = {"requestBody": {"content": _BODY, "required": True}}

    @routes.post("/predict", openapi_extra=body)
    async def predict(request: Request, model: ModelName = None) -> dict[str, Any]:
        """The predictions of one or many images, in the order in which they were sent."""
        inputs = await desk.uploads(request, model)
        served, found = await desk.predicted(model, inputs)
        rows = [_described(one, each, served) for one, each in zip(found, inputs, strict=True)]
        return {"model": served.name, "predictions": rows}

    @routes.post("/draw", openapi_extra=body)
    async def draw(request: Request, model: ModelName = None) -> Response:
        """One image as a PNG with its prediction drawn into it: boxes, masks, or words below it."""
        inputs = await desk.uploads(request, model)
        if len(inputs) != 1:
            raise HTTPException(400, f"one image is drawn at a time, not {len(inputs)}")
        _, (found,) = await desk.predicted(model, inputs)
        return Response(await asyncio.to_thread(_drawn, found, inputs[0]), media_type="image/png")

    @routes.post("/explain", openapi_extra=body)
    async def explain(request: Request, model: ModelName = None) -> Response:
        """One image as a PNG with a heat map of where its label comes from, for models that have them."""
        inputs = await desk.uploads(request, model)
        if len(inputs) != 1:
            raise HTTPException(400, f"one image is explained at a time, not {len(inputs)}")
        return Response(await desk.explained(model, inputs[0]), media_type="image/png")

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Counts and seconds in the format of Prometheus."""
        return Response(generate_latest(desk.guard.registry), media_type=CONTENT_TYPE_LATEST)

    return routes


def _routes_of_the_page(desk: _Desk, store: Corrections | None) -> APIRouter:
    """What the page asks besides predictions: which models there are, and corrections."""
    routes = APIRouter()

    @routes.get("/models")
    async def list_models() -> dict[str, Any]:
        """The models with their tasks and labels, and what this server allows."""
        known = [one.about() for one in desk.models.ready()]
        return {"models": known, "allow_urls": desk.allow_urls, "corrections": store is not None}

    @routes.post("/corrections", status_code=201)
    async def correct(request: Request, label: str, model: ModelName = None) -> dict[str, Any]:
        """Store an image with the label that it should have had, for the next training."""
        if store is None:
            raise HTTPException(403, "corrections are not stored here; `flashtask serve --corrections FOLDER` does")
        asked = desk.models.get(model)
        if label not in asked.labels:
            raise HTTPException(422, f"{label!r} is not a label of {asked.name}")
        inputs = await read_uploads(request, desk.guard.limits, allow_urls=False)
        served, found = await desk.predicted(model, inputs)
        for one, each in zip(found, inputs, strict=True):
            await asyncio.to_thread(store.add, each.source, label, str(getattr(one, "label", "")), served.version)
        return {"stored": len(inputs)}

    return routes


def _reload_route(models: Models) -> APIRouter:
    """The route that loads a model again; only behind a key."""
    routes = APIRouter()

    @routes.post("/v2/repository/models/{name}/load")
    async def reload(name: str) -> dict[str, Any]:
        """Load a model again from its file; requests are answered by the old one until the new one is warm."""
        models.get(name)  # an unknown name is answered before anything is loaded
        try:
            return (await asyncio.to_thread(models.reload, name)).about()
        except FlashtaskError as error:
            raise HTTPException(422, f"{name} stays as it was: {error.what}") from error

    return routes


def _require_sizes(inputs: Sequence[Input], limits: Limits) -> None:
    """Refuse pictures with too many pixels by their headers, before anything is decoded.

    Raises:
        HTTPException: 413, which names the first of them.
    """
    for each in inputs:
        if not isinstance(each.source, bytes):
            continue
        try:
            image_size(each.source, each.name, max_pixels=limits.max_pixels)
        except BadDataError as error:
            if isinstance(error.__cause__, (TooManyPixelsError, Image.DecompressionBombError)):
                raise HTTPException(413, f"{each.name}: {error.why}") from error
            # Decoding says what else is wrong with it.


def _described(prediction: Any, source: Input, model: ServedModel) -> dict[str, Any]:
    """A prediction for JSON; the file's name in place of a path."""
    wants_all = "all_scores" in prediction.options and model.labels
    made = prediction.to_dict(all_scores=model.labels if wants_all else None)
    made.pop("path", None)
    return {"file": source.name, **made}


def _drawn(prediction: Any, source: Input) -> bytes:
    return _as_png(prediction.draw(source.thumbnail(max(source.size()))))


def _as_png(picture: Image.Image) -> bytes:
    made = io.BytesIO()
    picture.save(made, "PNG")
    return made.getvalue()
