"""What all providers share about pretrained weights: other channel counts, failures told as our errors."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from torch import nn

from flashtask.core.errors import FlashtaskError, HubError, UsageError, did_you_mean
from flashtask.core.hub.settings import hub_is_offline
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.zoo import load_zoo

__all__ = [
    "LAYERS_CHANGED",
    "NO_WEIGHTS",
    "Loading",
    "cache_only_without_network",
    "fix_without_network",
    "for_channels",
    "hub_is_offline",
    "pretrained_errors",
    "quiet_logs",
    "watched_loading",
]

NO_WEIGHTS = "start from random weights: pretrained=False"
LAYERS_CHANGED = f"leave out the options that change its layers, or {NO_WEIGHTS}"

_NETWORK_PACKAGES = {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


def fix_without_network() -> str:
    """What to do where weights cannot be fetched, with a backbone whose weights are in an installed package."""
    here = ""
    for name, own in load_zoo().backbones.items():
        with suppress(PackageNotFoundError):
            if own.weights is not None and distribution(own.weights.package):
                here = f'take one whose weights are installed: backbone="{name}", '
                break
    return f"connect to the network and try again, {here}or {NO_WEIGHTS}"


def for_channels(preprocessing: Preprocessing, in_chans: int) -> Preprocessing:
    """The same preprocessing for another number of channels: each channel gets the mean of the known ones."""
    channels, *size = preprocessing.input_size
    if channels == in_chans:
        return preprocessing
    mean = sum(preprocessing.mean) / channels
    std = sum(preprocessing.std) / channels
    height, width = size
    return replace(preprocessing, input_size=(in_chans, height, width), mean=(mean,) * in_chans, std=(std,) * in_chans)


@contextmanager
def cache_only_without_network() -> Iterator[None]:
    """Look for weights in the cache alone where the hub's name cannot be resolved.

    The hub's library would otherwise try six times for each of several files: most of a minute before the error.
    Behind a proxy names are resolved elsewhere, so nothing is decided here.

    Raises:
        ConnectionError: the weights are not in the cache either.
    """
    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or any(getproxies().get(scheme) for scheme in ("https", "http", "all")):
        yield
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        if constants.HF_HUB_OFFLINE and _is_about_network(error):
            raise ConnectionError(f"{host} cannot be resolved, and the weights are not in the cache") from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = False


@contextmanager
def pretrained_errors(name: str, pretrained: bool) -> Iterator[None]:
    """Tell whatever a library raises while it builds a model, or fetches its weights, as our errors.

    Raises:
        HubError: the weights could not be fetched.
        UsageError: the library refused the options.
    """
    offline = hub_is_offline()
    try:
        yield
    except FlashtaskError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip() or type(error).__name__}".splitlines()[0]
        if pretrained and _is_about_network(error):
            raise HubError(
                f"the pretrained weights of {name!r} could not be had",
                why="HF_HUB_OFFLINE is set and they are not in the cache" if offline else why,
                fix=fix_without_network(),
            ) from error
        fix = _nearest_option(error)
        raise UsageError(f"the backbone {name!r} cannot be built with these options", why=why, fix=fix) from error


def _nearest_option(error: Exception) -> str:
    """`did you mean ...?` for an option that a model's class refused, found where it was called."""
    refused = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    trace = error.__traceback__
    if refused is None or trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    seen = [*trace.tb_frame.f_locals.values(), *trace.tb_frame.f_globals.values()]
    classes = [kind for kind in seen if isinstance(kind, type) and kind.__name__ == refused[1]]
    options = {name for kind in classes for name in inspect.signature(kind).parameters}
    return did_you_mean(refused[2], sorted(options))


def _is_about_network(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return True
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & _NETWORK_PACKAGES)


@contextmanager
def quiet_logs(*loggers: str) -> Iterator[None]:
    """Print nothing of what libraries log and warn inside."""
    before = []
    for logger in map(logging.getLogger, loggers):
        before.append((logger, logger.propagate, logger.handlers))
        logger.handlers = [logging.NullHandler()]  # huggingface_hub has a handler of its own, which prints
        logger.propagate = False
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            yield
    finally:
        for logger, propagate, handlers in before:
            logger.propagate, logger.handlers = propagate, handlers


@dataclass
class Loading:
    """Which names were missing and left over when a library filled a model.

    Args:
        has_begun: whether it loaded any tensors at all.
        missing: names of the model that keep their random values.
        unexpected: names of the file that the model has not.
    """

    has_begun: bool = False
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


@contextmanager
def watched_loading() -> Iterator[Loading]:
    """Note what every `load_state_dict` of this thread inside does not fill.

    A library that loads weights into the model it builds keeps the result to itself, or only logs it, in words that
    change between its releases. So torch's method is replaced by one that notes the result, until the end of the block.
    """
    found, thread, plain = Loading(), threading.get_ident(), nn.Module.load_state_dict

    @functools.wraps(plain)
    def noting(module: nn.Module, *args: Any, **options: Any) -> Any:
        result = plain(module, *args, **options)
        if threading.get_ident() == thread:
            found.has_begun = True
            found.missing += result.missing_keys
            found.unexpected += result.unexpected_keys
        return result

    nn.Module.load_state_dict = noting  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        nn.Module.load_state_dict = plain  # type: ignore[method-assign]
