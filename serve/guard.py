"""What keeps requests within the limits, and counts them for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashtask.serve.limits import Limits

__all__ = ["Guard"]

#: Bytes of a request's headers.
_MOST_HEADERS = 32 * 1024
_RETRY = {"Retry-After": "1"}
_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class Guard:
    """The limits of one server, and how much of them is used.

    Args:
        limits: of requests.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.registry = CollectorRegistry()
        self._bytes_held = self._images = 0
        self._requests = Counter(
            "flashtask_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "flashtask_request_seconds", "Seconds from a request to its answer.", ["route"], registry=self.registry
        )
        self._predicted = Counter("flashtask_images", "Images that were accepted.", registry=self.registry)
        waiting = Gauge(
            "flashtask_images_waiting", "Images that are being decoded or computed.", registry=self.registry
        )
        waiting.set_function(lambda: self._images)

    @contextmanager
    def admitted(self, images: int) -> Iterator[None]:
        """Count images while they are worked on.

        Raises:
            HTTPException: 429, there are too many already.
        """
        if self._images + images > self.limits.max_waiting:
            raise HTTPException(429, "too many images are waiting; try again soon", _RETRY)
        self._images += images
        self._predicted.inc(images)
        try:
            yield
        finally:
            self._images -= images

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """The application within the limits of bytes and time."""

        async def within(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            await _Request(self, app, scope, receive, send).run()

        return within

    def hold(self, size: int) -> None:
        """Count bytes of a body that are held.

        Raises:
            HTTPException: 429, the bodies of all requests together are too large.
        """
        if self._bytes_held + size > self.limits.max_bytes_held:
            raise HTTPException(429, "too many bytes are being received; try again soon", _RETRY)
        self._bytes_held += size

    def release(self, size: int) -> None:
        """Count bytes no longer."""
        self._bytes_held -= size

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        # By the route, not the path: clients may ask for any number of paths.
        route = getattr(scope.get("route"), "path", "other")
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class _Request:
    """One request on its way through the application."""

    def __init__(self, guard: Guard, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.app, self.scope = guard, app, scope
        self._receive_next, self._send_next = receive, send
        self._bytes = self._status = 0
        self._is_received = False

    async def run(self) -> None:
        """Answer it, and give back what it held."""
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self.guard.limits.timeout):
                refusal = self._refusal_of_headers()
                await (self.app if refusal is None else refusal)(self.scope, self._receive, self._send)
        except TimeoutError:
            if not self._status:
                await self._too_late()(self.scope, self._receive_next, self._send)
        except Exception:
            self._status = self._status or 500  # the answer comes from outside this middleware
            raise
        finally:
            self.guard.release(self._bytes)
            self.guard.count(self.scope, self._status, time.perf_counter() - start)

    def _refusal_of_headers(self) -> JSONResponse | None:
        """The answer to headers that are too long, or that announce a body that is; it need not be received."""
        if sum(len(name) + len(value) for name, value in self.scope["headers"]) > _MOST_HEADERS:
            return _json(431, f"the headers are larger than {_MOST_HEADERS:,} bytes")
        length = dict(self.scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self.guard.limits.max_bytes:
            return _json(413, self._too_long())
        return None

    def _too_long(self) -> str:
        return f"the body is larger than {self.guard.limits.max_bytes:,} bytes"

    def _too_late(self) -> JSONResponse:
        limit = f"{self.guard.limits.timeout:g} s"
        if self._is_received:
            return _json(503, f"there was no answer within {limit}; try again", _RETRY)
        return _json(408, f"the request was not received within {limit}", {"Connection": "close"})

    async def _receive(self) -> Message:
        message = await self._receive_next()
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.guard.hold(size)
            self._bytes += size
            if self._bytes > self.guard.limits.max_bytes:
                raise HTTPException(413, self._too_long())
            self._is_received = not message.get("more_body", False)
        return message

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
        await self._send_next(message)


def _json(status: int, detail: str, headers: dict[str, Any] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers=headers)
