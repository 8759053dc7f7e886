"""Which tensor of a weights file is which parameter of a model: prefixes, classifiers, other channel counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from timm.models import adapt_input_conv
from torch import Tensor, nn

from flashtask.core.errors import IntegrityError, UsageError
from flashtask.core.zoo import tell

__all__ = ["adapt_channels", "backbone_tensors", "classifier_paths", "find_prefix", "load_tensors", "shown"]


def classifier_paths(whole: Iterable[str], backbone: Iterable[str]) -> tuple[str, ...]:
    """Names of the layers that a model has and its backbone has not.

    Args:
        whole: names in the state dict of the model with its classifier.
        backbone: names in the state dict of the backbone.
    """
    own = set(backbone)
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in whole if name not in own))


def find_prefix(names: Iterable[str], wanted: Iterable[str], file: str) -> str | None:
    """What stands in a file before all the names that a module wants (`""`, `module.`, `backbone.`, ...).

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
    """The tensors of a file that a backbone wants, under its own names. What is left aside is told on standard error.

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
            f"{file} does not fit: {len(unknown)} of its names are not the model's",
            why=f"unknown: {shown(unknown)}",
            fix="name the architecture that the weights are of, or leave these out of the file",
        )
    if prefix or dropped:
        outside = [name for name in state if not name.startswith(prefix)]
        aside = [*dropped, *unknown, *outside]
        said = f"the weights of {file}" + (f" are those under {prefix!r}" if prefix else " are used")
        tell(f"{said}; left aside: {shown(aside)}" if aside else said)
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
        fix="name the architecture that the weights are of",
    )


def adapt_channels(state: dict[str, Tensor], module: nn.Module, first: Iterable[str], in_chans: int, file: str) -> None:
    """Give the first layers' weights the module's number of input channels, as timm does for its own.

    One channel gets the sum of the channels of the weights, so that a grey image gives what it gave in three equal
    channels; more get them repeated and scaled.

    Args:
        state: changed in place.
        module: takes images of `in_chans` channels.
        first: names of the layers that see the image.
        in_chans: channels of the images.
        file: what messages call it.

    Raises:
        UsageError: the layer is of a kind that cannot be adapted.
    """
    for layer in first:
        name = f"{layer}.weight"
        own, known = module.get_parameter(name), state[name]
        if own.shape == known.shape or own.ndim != 4 or known.ndim != 4:
            continue
        inputs = own.shape[1]
        try:
            base, rest = divmod(known.shape[1] * in_chans, inputs)
            if rest:
                raise NotImplementedError
            state[name] = adapt_input_conv(in_chans, known, base_chans=base)
        except NotImplementedError as error:
            raise UsageError(
                f"the weights of {file} cannot be adapted to images of {in_chans} channels",
                why=f"{name} is {tuple(known.shape)}, and the model's is {tuple(own.shape)}",
                fix="build the model with the channels of its weights, or start from random ones: pretrained=False",
            ) from error


def load_tensors(module: nn.Module, state: Mapping[str, Tensor], file: str) -> None:
    """Load tensors whose names fit, after a check of their shapes.

    Raises:
        IntegrityError: a shape is not the module's.
    """
    own = module.state_dict()
    wrong = [name for name, tensor in state.items() if tensor.shape != own[name].shape]
    if wrong:
        first = wrong[0]
        raise IntegrityError(
            f"{file} does not fit the model: {len(wrong)} of its tensors have other shapes",
            why=f"{first} is {tuple(state[first].shape)}, not {tuple(own[first].shape)}",
            fix="build the model with the options that the weights were trained with",
        )
    own.update(state)  # in place: it also holds the version of each layer, which some need
    module.load_state_dict(own)


def _needed(wanted: Iterable[str]) -> list[str]:
    """Old files have no count of batches; it matters only to a norm without momentum."""
    return [name for name in wanted if not name.endswith("num_batches_tracked")]


def _coverage(names: Iterable[str], wanted: Iterable[str]) -> Counter[str]:
    """How many of the wanted names stand behind each prefix."""
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
