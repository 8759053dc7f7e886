"""A trained backbone and head under the names of one whole timm model, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import filter_pretrained_cfg
from torch import Tensor, nn

from flashtask.backbones.inspection import built_without_values
from flashtask.core.errors import IntegrityError
from flashtask.core.library_internals import timm_arguments
from flashtask.core.preprocessing import TIMM_FIELDS, Preprocessing
from flashtask.tasks.pretrained.timm_layout import plain

__all__ = ["TimmSource", "gives_the_same", "join_classifier", "linear_layer", "split_classifier"]

#: Arguments of `timm.create_model` that are not about the architecture.
_NOT_ABOUT_THE_MODEL = ("num_classes", "pretrained", "cache_dir", "checkpoint_path", "device", "dtype")


class TimmSource:
    """What timm needs to build a backbone again: the architecture, its arguments, and its own notes on it.

    Args:
        module: a backbone that timm has built.
        options: the arguments it was built with, where timm itself has kept none.
    """

    def __init__(self, module: nn.Module, options: Mapping[str, Any]) -> None:
        self.config: dict[str, Any] = dict(vars(module)["pretrained_cfg"])
        self.architecture: str = self.config["architecture"]
        kept: Mapping[str, Any] = timm_arguments(module) or options
        self.arguments = {
            name: plain(value, f"backbone_options.{name}")
            for name, value in kept.items()
            if name not in _NOT_ABOUT_THE_MODEL and value is not None
        }

    @classmethod
    def of(cls, module: nn.Module, options: Mapping[str, Any]) -> TimmSource | None:
        """The source of a module, None if timm cannot build it from names and numbers."""
        config = getattr(module, "pretrained_cfg", None)
        architecture = config.get("architecture") if isinstance(config, dict) else None
        if not isinstance(architecture, str) or not timm.is_model(architecture):
            return None
        try:
            return cls(module, options)
        except ValueError:  # an argument is an object
            return None

    @property
    def classifiers(self) -> tuple[str, ...]:
        """The names of timm's own classifier layers: one, several (distilled models), or none."""
        named = self.config.get("classifier") or ()
        return (named,) if isinstance(named, str) else tuple(named)

    def classifier_shape(self, num_outputs: int) -> torch.Size | None:
        """The shape of a classifier's weight in timm's whole model; None if it is no single layer of that name."""
        whole: nn.Module = built_without_values(
            lambda: timm.create_model(self.architecture, num_classes=num_outputs, **self.arguments)
        )
        shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
        found = {shapes.get(f"{name}.weight") for name in self.classifiers}
        return found.pop() if len(found) == 1 else None

    def pretrained_cfg(self, preprocessing: Preprocessing, num_classes: int) -> dict[str, Any]:
        """timm's notes on the weights that are written: where they came from first is left out, what is read stays."""
        known: dict[str, Any] = filter_pretrained_cfg(self.config, remove_source=True)  # type: ignore[no-untyped-call]
        left_out = {"architecture", "state_dict", "custom_load", "label_offset", "label_names", "label_descriptions"}
        left_out |= {"tag", "license", "description", "notes"}  # of other weights than these
        left_out |= {"test_input_size", "test_crop_pct", "test_pool_size", "min_input_size"}
        kept = {key: value for key, value in known.items() if key not in left_out}
        if tuple(kept.get("input_size", ())) != preprocessing.input_size:
            kept["pool_size"] = None
        wanted = preprocessing.to_dict()
        wanted = {key: wanted[key] for key in TIMM_FIELDS}
        return {**plain(kept, "pretrained_cfg"), **wanted, "num_classes": num_classes}


def linear_layer(head: nn.Module | None) -> tuple[str, nn.Linear] | None:
    """The one linear layer that a head consists of, with its name; None if the head is something else."""
    if head is None:
        return None
    layers = [(name, layer) for name, layer in head.named_modules() if type(layer) is nn.Linear]
    if len(layers) != 1:
        return None
    name = f"{layers[0][0]}." if layers[0][0] else ""
    own = {f"{name}{part}" for part in ("weight", "bias")}
    return layers[0] if set(head.state_dict()) <= own else None


def join_classifier(weight: Tensor, bias: Tensor | None, names: Sequence[str], shape: torch.Size) -> dict[str, Tensor]:
    """A linear layer as the classifiers of timm's whole model: each gets the same weights.

    Args:
        weight: (outputs, features).
        bias: (outputs,), or None, which timm's models do not know and which is written as zeros.
        names: of the classifiers.
        shape: of their weights: (outputs, features), or with two axes of size 1 more for a convolution.
    """
    bias = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias
    return {
        f"{name}.{part}": tensor
        for name in names
        for part, tensor in (("weight", weight.reshape(shape)), ("bias", bias))
    }


def split_classifier(
    state: dict[str, Tensor], names: Sequence[str], path: Path
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """The tensors of the backbone, and weight (outputs, features) and bias of the classifier.

    Raises:
        IntegrityError: a classifier is missing, is no linear layer, or several differ.
    """
    weights = [state.pop(f"{name}.weight", None) for name in names]
    biases = [state.pop(f"{name}.bias", None) for name in names]
    if not weights or any(weight is None for weight in weights):
        raise IntegrityError(f"{path} holds no classifier {', '.join(names)}")
    for found in (weights, biases):
        if any(not _equal(found[0], other) for other in found[1:]):
            raise IntegrityError(
                f"{path}: the classifiers {', '.join(names)} differ, so they are no longer one linear head",
                why="the folder was changed after flashtask wrote it",
            )
    weight = weights[0]
    assert weight is not None
    if weight.dim() < 2 or weight.flatten(1).shape[1] != weight.shape[1]:
        raise IntegrityError(f"{path}: the classifier {names[0]} has the shape {tuple(weight.shape)}")
    return state, weight.flatten(1), biases[0]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


@torch.no_grad()
def gives_the_same(one: nn.Module, other: nn.Module, input_size: tuple[int, int, int]) -> bool:
    """Whether two modules in eval mode give the same outputs for images, up to rounding.

    Args:
        one: the module to compare with; its own dtype decides what counts as rounding.
        other: on the CPU, as `one`.
        input_size: (C, H, W) of the images.
    """
    dtype = next((p.dtype for p in one.parameters()), torch.float32)
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    expected = one(images.to(dtype)).float()
    found = other(images).float()
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    allowed = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    return bool((found - expected).abs().max() <= allowed * (1 + expected.abs().max()))
