"""A plain timm repository as an image classifier: its own weights, classifier and labels, giving timm's own logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from flashtask.backbones import build_backbone
from flashtask.backbones.descriptions import TimmFolder, read_timm_folder
from flashtask.backbones.weights import quiet_logs, read_weights, shown, watched_loading
from flashtask.core.bounded_building import no_larger_than
from flashtask.core.errors import IntegrityError, UsageError
from flashtask.tasks.head_drawing import building_without_weights
from flashtask.tasks.pretrained.timm_layout import CONFIG
from flashtask.tasks.pretrained.timm_names import TimmSource, gives_the_same

__all__ = ["timm_content", "timm_labels"]

#: Of one image; the largest that timm has weights for is 3 x 1024 x 1024.
_MOST_VALUES = 3 * 2048 * 2048


def timm_content(folder: Path) -> dict[str, Any]:
    """What a checkpoint of an `ImageClassifier` with these weights would hold.

    Raises:
        MissingInputError: a file is missing.
        IntegrityError: a file is damaged or hostile, or the weights do not fit the architecture.
        UsageError: the model has no classifier, or one that is not a linear layer over its features.
    """
    found = read_timm_folder(folder)
    if not found.num_classes:
        raise UsageError(
            f"{folder} holds a backbone without a classifier",
            fix=f"ImageClassifier(backbone={_as_backbone(folder)!r}), and train a head",
        )
    channels, height, width = found.preprocessing.input_size
    if channels * height * width > _MOST_VALUES:
        raise IntegrityError(f"{folder / CONFIG} asks for images of {channels} x {height} x {width}, which is too many")
    whole = _whole_model(found)
    labels = timm_labels(found)
    arguments = {
        "backbone": f"timm/{found.architecture}",
        "backbone_options": found.model_args,
        "in_chans": found.in_chans,
        "num_classes": found.num_classes,
        "labels": labels,
        "head": "linear",
    }
    return {
        "task": "image_classification",
        "hyper_parameters": arguments,
        "hyper_parameters_form": None,
        "labels": list(labels),
        "preprocessing": found.preprocessing.to_dict(),
        "state_dict": _state(found, whole, folder),
    }


def timm_labels(found: TimmFolder) -> tuple[str, ...]:
    """The folder's own labels; else ImageNet's where the weights say they are of it; else numbers."""
    if found.labels is not None:
        return found.labels
    noted = found.config.get("pretrained_cfg")
    noted = noted if isinstance(noted, dict) else found.config
    described = found.config.get("label_descriptions") or noted.get("label_descriptions")
    if isinstance(described, dict) and len(described) == found.num_classes:
        return tuple(described)
    subset = infer_imagenet_subset({"num_classes": found.num_classes})
    if subset is not None and _is_of_imagenet(found, noted):
        return _imagenet_labels(subset)
    return tuple(str(index) for index in range(found.num_classes))


def _is_of_imagenet(found: TimmFolder, noted: Mapping[str, Any]) -> bool:
    """timm's tags end with what the weights were trained on last: `a1_in1k`, `augreg_in21k`."""
    tag = noted.get("tag")
    last = tag.rpartition("_")[2] if isinstance(tag, str) else ""
    return last in ("in1k", "in12k", "in21k", "in22k") and found.num_classes >= 1000


def _imagenet_labels(subset: str) -> tuple[str, ...]:
    """What timm calls the classes; a name that two classes have gets the class's WordNet number behind it."""
    info = ImageNetInfo(subset)
    described: list[str] = list(info.label_descriptions())
    numbers: list[str] = info.label_names()  # type: ignore[no-untyped-call]
    times = Counter(described)
    return tuple(
        name if times[name] == 1 else f"{name} ({number})" for name, number in zip(described, numbers, strict=True)
    )


def _whole_model(found: TimmFolder) -> nn.Module:
    """timm's own model with its classifier, filled by timm's own loading from tensors that we have read."""
    weights = read_weights(found.weights)
    noted = found.config.get("pretrained_cfg")
    noted = dict(noted if isinstance(noted, dict) else found.config)
    fields = set(timm.models.PretrainedCfg.__dataclass_fields__)
    safe = {key: value for key, value in noted.items() if key in fields and key not in _SOURCES}
    safe |= {"num_classes": found.num_classes, "input_size": found.preprocessing.input_size, "state_dict": weights}
    options = {**found.model_args, "num_classes": found.num_classes, "in_chans": found.in_chans}
    try:
        with no_larger_than(weights), quiet_logs("timm", "huggingface_hub"), watched_loading() as loading:
            whole: nn.Module = timm.create_model(found.architecture, pretrained=True, pretrained_cfg=safe, **options)
    except Exception as error:  # tensors of others: whatever timm raises about them is about the file
        raise IntegrityError(
            f"{found.weights} does not fit {found.architecture}",
            why=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            fix="its config.json names another architecture or other arguments than the weights were trained with",
        ) from error
    if loading.missing or not loading.has_begun:
        why = f"missing: {shown(loading.missing)}" if loading.missing else "timm took none of its weights"
        raise IntegrityError(f"{found.weights} does not fill {found.architecture}", why=why)
    return whole.eval()


#: What would have timm look for weights elsewhere, or read them in another way.
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")


def _state(found: TimmFolder, whole: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Backbone and linear head under the task's names, if together they give what timm's whole model gives."""
    size = found.preprocessing.input_size
    with building_without_weights(), no_larger_than(whole.state_dict()):
        built = build_backbone(
            f"timm/{found.architecture}", pretrained=False, in_chans=found.in_chans, **found.model_args
        )
    own, source = built.module.eval(), TimmSource(built.module, found.model_args)
    state = whole.state_dict()
    body = {name: state[name] for name in own.state_dict() if name in state}
    weights = [state.get(f"{name}.weight") for name in source.classifiers]
    biases = [state.get(f"{name}.bias") for name in source.classifiers]
    linear = None
    if len(body) == len(own.state_dict()) and weights and all(weight is not None for weight in weights):
        own.load_state_dict(body)
        linear = _linear(weights[0], biases[0])
    if linear is None or not gives_the_same(whole, nn.Sequential(own, linear), size):
        raise UsageError(
            f"the classifier of {found.architecture} in {folder} is not one linear layer over its features",
            why=f"timm has it in {', '.join(source.classifiers) or 'no layer of its own'}",
            fix=f"ImageClassifier(backbone={_as_backbone(folder)!r}), and train a head",
        )
    head = {f"head.0.{name}": tensor for name, tensor in linear.state_dict().items()}
    return {**{f"backbone.{name}": tensor for name, tensor in body.items()}, **head}


def _linear(weight: Tensor | None, bias: Tensor | None) -> nn.Linear | None:
    """A classifier, linear or a convolution of size 1, as the linear head of the same outputs."""
    if weight is None or weight.dim() < 2 or weight.flatten(1).shape[1] != weight.shape[1]:
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight.flatten(1))
        linear.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return linear.eval()


def _as_backbone(folder: Path) -> str:
    return str(folder)
