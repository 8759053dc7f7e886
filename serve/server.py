"""uvicorn around the application: a socket that is open before the models are loaded, signals, and a graceful end."""

from __future__ import annotations

import signal
import socket
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from flashtask.core.errors import OutputError
from flashtask.serve.limits import Limits

__all__ = ["listen", "run"]


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve on; port 0 takes any that is free.

    Raises:
        OutputError: the address is taken or is not one of this machine.
    """
    made = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        if made is not None:
            made.close()
        raise OutputError(
            f"cannot listen on {host}:{port}", why=error.strerror or str(error), fix="another --port, such as --port 0"
        ) from error
    return made


def run(app: FastAPI, listening: socket.socket, limits: Limits) -> None:
    """Serve until a signal comes; requests in flight are answered first. SIGHUP loads every model again.

    Args:
        app: of `create_app`.
        listening: of `listen`.
        limits: those of the application; a request in flight gets its `timeout` to end.

    Raises:
        SystemExit: 143, after SIGTERM.
        KeyboardInterrupt: after SIGINT.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=round(limits.timeout) + 1,
        http="h11",
        server_header=False,
    )
    # uvicorn handles signals while it serves, and raises them again at its end for the handlers from before.
    signal.signal(signal.SIGTERM, _end)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda number, frame: app.state.models.reload_all())
    uvicorn.Server(config).run(sockets=[listening])


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)
