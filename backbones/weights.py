"""Pretrained weights, those that a library fetches and those in a file: paired with a model, failures as our errors."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from timm.models import adapt_input_conv, get_model_traits
from torch import Tensor, nn

from flashtask.backbones.default import installed_backbone
from flashtask.core.errors import FlashtaskError, HubError, IntegrityError, UsageError, did_you_mean
from flashtask.core.foreign_weights import read_foreign_weights
from flashtask.core.hub.address import hub_is_offline
from flashtask.core.hub.client import is_about_network
from flashtask.core.zoo import tell

__all__ = [
    "LAYERS_CHANGED",
    "NO_WEIGHTS",
    "Loading",
    "backbone_tensors",
    "cache_only_without_network",
    "classifier_paths",
    "fill",
    "find_prefix",
    "first_layers",
    "fix_without_network",
    "missing_names",
    "pretrained_errors",
    "quiet_logs",
    "read_weights",
    "shown",
    "watched_loading",
]

NO_WEIGHTS = "start from random weights: pretrained=False"
LAYERS_CHANGED = f"leave out the options that change its layers, or {NO_WEIGHTS}"


# ---- weights that a library fetches and loads


def fix_without_network() -> str:
    """What to do where weights cannot be fetched, with a backbone whose weights are in an installed package."""
    name = installed_backbone()
    here = "" if name is None else f'take one whose weights are installed: backbone="{name}", '
    return f"connect to the network and try again, {here}or {NO_WEIGHTS}"


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
        if constants.HF_HUB_OFFLINE and _cannot_be_fetched(error):
            raise ConnectionError(f"{host} cannot be resolved, and the weights are not in the cache") from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = False


@contextmanager
def pretrained_errors(name: str, pretrained: bool) -> Iterator[None]:
    """Turn whatever a library raises while it builds a model, or fetches its weights, into our errors.

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
        if pretrained and _cannot_be_fetched(error):
            raise HubError(
                f"the pretrained weights of {name!r} could not be fetched",
                why="HF_HUB_OFFLINE is set and they are not in the cache" if offline else why,
                fix=fix_without_network(),
            ) from error
        fix = _nearest_option(error)
        raise UsageError(f"the backbone {name!r} cannot be built with these options", why=why, fix=fix) from error


def _cannot_be_fetched(error: Exception) -> bool:
    """Whether a library failed at the network, the hub or the disk rather than at an option."""
    is_of_hub = type(error).__module__.startswith("huggingface_hub.")  # not all of its errors have a common base
    return is_of_hub or isinstance(error, OSError) or is_about_network(error)


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


# ---- weights in a file


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU; a pickled one is read in a process of its own.

    If a file of `torch.save` holds one state dict beside other things (an epoch, an optimizer), that one is taken.

    Args:
        path: safetensors, or a checkpoint of flashtask, or a file of `torch.save` (`.pth`, `.pt`, `.bin`).

    Raises:
        MissingInputError, IntegrityError, UsageError, StorageError: as `read_foreign_weights`.
    """
    # Names that begin so are what checkpoints of flashtask hold beside the weights: the optimizer's state, ...
    return {name: tensor for name, tensor in read_foreign_weights(path).items() if not name.startswith("@")}


def classifier_paths(whole: Iterable[str], backbone: Iterable[str]) -> tuple[str, ...]:
    """Names of the layers that a model has and its backbone has not.

    Args:
        whole: names in the state dict of the model with its classifier.
        backbone: names in the state dict of the backbone.
    """
    own = set(backbone)
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in whole if name not in own))


def find_prefix(names: Iterable[str], wanted: Iterable[str], file: str) -> str | None:
    """What a file has before all the names that a module wants (`""`, `module.`, `backbone.`, ...).

    Only a prefix under which the file has every wanted name counts, so nothing is guessed.

    Returns:
        None if there is none.

    Raises:
        UsageError: there is more than one.
    """
    found = _coverage(names, wanted)
    needed = len(set(_needed(wanted)))
    whole = [prefix for prefix, count in found.items() if count == needed]
    if len(whole) > 1:
        raise UsageError(
            f"{file} holds this model more than once: under {', '.join(map(repr, sorted(whole)))}",
            fix=f"keep one: {{name: tensor for name, tensor in state.items() if name.startswith({max(whole)!r})}}",
        )
    return whole[0] if whole else None


def backbone_tensors(
    state: Mapping[str, Tensor], wanted: Iterable[str], classifier: tuple[str, ...], file: str
) -> dict[str, Tensor]:
    """The tensors of a file that a backbone wants, under its own names; what is left aside is printed (stderr).

    Args:
        state: the tensors of the file.
        wanted: names in the backbone's state dict.
        classifier: the layers that its architecture has more, which are left aside.
        file: what messages call it.

    Raises:
        IntegrityError: names are missing, or there are others.
        UsageError: the file holds the model more than once.
    """
    wanted = list(wanted)
    prefix = find_prefix(state, wanted, file)
    if prefix is None:
        raise missing_names(state, wanted, file)
    named = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    others = [name for name in named if name not in set(wanted)]
    dropped = [name for name in others if name.startswith(tuple(f"{path}." for path in classifier))]
    unknown = [name for name in others if name not in dropped]
    if unknown and not prefix:
        raise IntegrityError(
            f"{file} does not fit: {len(unknown)} of its names are not in the model",
            why=f"unknown: {shown(unknown)}",
            fix="name the architecture that the weights belong to, or remove these from the file",
        )
    if prefix or dropped:
        outside = [name for name in state if not name.startswith(prefix)]
        aside = [*dropped, *unknown, *outside]
        said = f"the weights of {file}" + (f" are those under {prefix!r}" if prefix else " are used")
        tell(f"{said}; not used: {shown(aside)}" if aside else said)
    return {name: named[name] for name in wanted if name in named}


def missing_names(state: Mapping[str, Tensor], wanted: Iterable[str], file: str) -> IntegrityError:
    """The error for a file without some of the names, under the prefix where most of them are."""
    wanted = list(wanted)
    found = _coverage(state, wanted)
    prefix = max(found, key=lambda each: (found[each], -len(each)), default="")
    missing = [prefix + name for name in _needed(wanted) if prefix + name not in state]
    return IntegrityError(
        f"{file} does not fit: {len(missing)} names of the model are missing in it",
        why=f"missing: {shown(missing)}; it has {shown(list(state))}",
        fix="name the architecture that the weights belong to",
    )


def first_layers(module: nn.Module) -> tuple[str, ...]:
    """The layers that see the image: those that timm names for a model of its own, else the first convolution."""
    if not (config := getattr(module, "pretrained_cfg", None)):
        return next(((name,) for name, inner in module.named_modules() if isinstance(inner, nn.Conv2d)), ())
    first = get_model_traits(module).get("first_conv", config.get("first_conv")) or ()
    return (first,) if isinstance(first, str) else tuple(first)


def fill(module: nn.Module, state: Mapping[str, Tensor], classifier: tuple[str, ...], in_chans: int, file: str) -> None:
    """Load the tensors of a file into a backbone, which may take images of other channels than they are for.

    The first layers' weights are adapted as timm adapts its own: one channel gets the sum of the channels of the
    weights, so that a grey image gives what it gave in three equal channels; more get them repeated and scaled.

    Args:
        module: takes images of `in_chans` channels.
        state: the tensors of the file.
        classifier: as for `backbone_tensors`.
        in_chans: channels of the images.
        file: what messages call it.

    Raises:
        IntegrityError: names are missing, there are others, or a shape is not the module's.
        UsageError: the file holds the model more than once, or its first layer cannot be adapted.
    """
    own = module.state_dict()
    tensors = backbone_tensors(state, own, classifier, file)
    for layer in first_layers(module):
        name = f"{layer}.weight"
        tensors[name] = _for_channels(tensors[name], own[name], name, in_chans, file)
    wrong = [name for name, tensor in tensors.items() if tensor.shape != own[name].shape]
    if wrong:
        first = wrong[0]
        raise IntegrityError(
            f"{file} does not fit the model: {len(wrong)} of its tensors have other shapes",
            why=f"{first} is {tuple(tensors[first].shape)}, not {tuple(own[first].shape)}",
            fix="build the model with the options that the weights were trained with",
        )
    own.update(tensors)  # in place: it also holds the version of each layer, which some need
    module.load_state_dict(own)


def _for_channels(known: Tensor, own: Tensor, name: str, in_chans: int, file: str) -> Tensor:
    if own.shape == known.shape or own.ndim != 4 or known.ndim != 4:
        return known
    try:
        base, rest = divmod(known.shape[1] * in_chans, own.shape[1])
        if rest:
            raise NotImplementedError
        adapted: Tensor = adapt_input_conv(in_chans, known, base_chans=base)
    except NotImplementedError as error:
        raise UsageError(
            f"the weights of {file} cannot be adapted to images of {in_chans} channels",
            why=f"{name} is {tuple(known.shape)}, and the model's is {tuple(own.shape)}",
            fix="build the model with the channels of its weights, or start from random ones: pretrained=False",
        ) from error
    return adapted


def _needed(wanted: Iterable[str]) -> list[str]:
    """Old files have no count of batches; it matters only to a norm without momentum."""
    return [name for name in wanted if not name.endswith("num_batches_tracked")]


def _coverage(names: Iterable[str], wanted: Iterable[str]) -> Counter[str]:
    """How many of the wanted names each prefix has."""
    needed = set(_needed(wanted))
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[-64:]
        for start in range(len(parts)):
            if (rest := ".".join(parts[start:])) in needed:
                found[name[: len(name) - len(rest)]] += 1
    return found


def shown(names: list[str]) -> str:
    """The first four names, for a message."""
    first = ", ".join(name[:80] for name in names[:4])
    return first + (f" and {len(names) - 4} more" if len(names) > 4 else "")
