"""`save_pretrained`: a trained task as a folder that flashtask reads, and plain timm as far as it can.

What plain timm makes of the folder is tried before the folder is given its name, and `config.json` says what came out.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flashtask._version import __version__
from flashtask.backbones.weights import quiet_logs
from flashtask.core.atomic_folders import atomic_folder
from flashtask.core.errors import UsageError
from flashtask.core.zoo import own_file_of
from flashtask.tasks.pretrained.card import model_card
from flashtask.tasks.pretrained.paths import without_places
from flashtask.tasks.pretrained.timm_layout import CARD, CONFIG, FILES, FORMAT, HEAD, ONNX, WEIGHTS, config_text, plain
from flashtask.tasks.pretrained.timm_names import TimmSource, gives_the_same, join_classifier, linear_layer
from flashtask.trainer.finetuning.lora import merged_state_dict
from flashtask.trainer.hyperparameters import hyperparameters_content
from flashtask.trainer.run_record import provenance_of
from flashtask.trainer.wrapping import unwrapped

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["save_pretrained"]

#: Names of the registry: `resnet18`, `resnet18.a1_in1k`, `timm/resnet18`.
_BARE = re.compile(r"((timm|torchvision)/)?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")


def save_pretrained(
    task: Task, folder: str | os.PathLike[str], licence: str | None = None, *, onnx: bool = False
) -> Path:
    """What `Task.save_pretrained` promises."""
    if not task.name:
        raise UsageError(
            f"{type(task).__name__} has no registry name, so a folder could not record which task it holds",
            fix='give the class a name, and register it: TASKS.register("my_task", MyTask)',
        )
    if task.head is None and task._head.kind is not None:
        raise UsageError(
            f"{type(task).__name__} has no head yet, so there is nothing to save",
            fix="train it first, or give num_classes",
        )
    stated = task._licences
    if licence is not None:
        task.licences = {**stated, "weights": licence}
    try:
        with atomic_folder(folder, FILES) as place:
            config = _write(task, place)
            if onnx:
                made = task.export(place / ONNX)
                assert made.script is not None
                made.script.unlink()  # the hub's clients refuse code beside weights
            card = model_card(config, task.licences.get("weights"), has_onnx=onnx)
            (place / CARD).write_text(card, encoding="utf-8")
    finally:
        task._licences = stated
    return Path(folder)


def _write(task: Task, place: Path) -> dict[str, Any]:
    """Fill a folder: in the first of three layouts that plain timm reads as it should, else in flashtask's own."""
    state = {name: tensor.detach().cpu() for name, tensor in merged_state_dict(task).items()}
    backbone = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    head = {name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")}
    rest = len(state) - len(backbone) - len(head)
    source = TimmSource.of(unwrapped(task.backbone), task.hparams.get("backbone_options") or {})
    if source is not None and not rest and (config := _for_timm(task, source, backbone, head, place)):
        return config
    # Every weight under flashtask's own name: nobody else can put it together.
    _write_tensors(place / WEIGHTS, state)
    return _write_config(task, place, {"timm": "none"}, {"architecture": _backbone_name(task)})


def _for_timm(
    task: Task, source: TimmSource, backbone: dict[str, Tensor], head: dict[str, Tensor], place: Path
) -> dict[str, Any] | None:
    """Write what plain timm can read, and see whether it does; gives the config, None if it does not."""
    with _on_the_cpu(task) as (own_backbone, own_head):
        linear, names = linear_layer(own_head), source.classifiers
        shape = source.classifier_shape(linear[1].out_features) if linear and names else None
        if own_head is not None and linear and shape is not None and shape.numel() == linear[1].weight.numel():
            layer, prefix = linear[1], f"{linear[0]}." if linear[0] else ""
            joined = join_classifier(head[f"{prefix}weight"], head.get(f"{prefix}bias"), names, shape)
            _write_tensors(place / WEIGHTS, {**backbone, **joined})
            for_timm = _timm_config(task, source, layer.out_features)
            config = _write_config(task, place, _whole(names, prefix, layer), for_timm, source)
            if _timm_agrees(place, nn.Sequential(own_backbone, own_head), task):
                return config
        _write_tensors(place / WEIGHTS, backbone)
        if head:
            _write_tensors(place / HEAD, head)
        weights = {"timm": "backbone", "head": HEAD if head else None}
        config = _write_config(task, place, weights, _timm_config(task, source, 0), source)
        if _timm_agrees(place, own_backbone, task):
            return config
        (place / HEAD).unlink(missing_ok=True)
        return None


def _whole(names: tuple[str, ...], prefix: str, layer: nn.Linear) -> dict[str, Any]:
    return {"timm": "whole", "classifiers": list(names), "head_prefix": prefix, "head_bias": layer.bias is not None}


def _timm_config(task: Task, source: TimmSource, num_classes: int) -> dict[str, Any]:
    """The keys of `config.json` that timm reads."""
    config: dict[str, Any] = {
        "architecture": source.architecture,
        "num_classes": num_classes,
        "num_features": task.num_features,
    }
    if num_classes and (labels := getattr(task, "labels", None)):
        config["label_names"] = list(labels)
        if getattr(task, "multi_label", False):
            config["problem_type"] = "multi_label_classification"  # transformers' pipelines take sigmoids then
    noted = source.pretrained_cfg(task.preprocessing, num_classes)
    arguments = dict(source.arguments)
    if noted.get("fixed_input_size") and "img_size" not in arguments:
        # The model's own size, which need not be that of the images it was trained on last.
        arguments["img_size"] = plain(source.config["input_size"][1:])
    return (
        {**config, "model_args": arguments, "pretrained_cfg": noted}
        if arguments
        else {**config, "pretrained_cfg": noted}
    )


def _write_config(
    task: Task, place: Path, weights: dict[str, Any], for_timm: dict[str, Any], source: TimmSource | None = None
) -> dict[str, Any]:
    hyperparameters = hyperparameters_content(task)
    if source is not None:
        hyperparameters["hyper_parameters"] = _portable(hyperparameters["hyper_parameters"], source)
    described = plain(task.describe(), "describe()")
    described.pop("pretrained_from", None)  # stands in the provenance
    if source is not None and "own_zoo" in described:
        described["own_zoo"].pop("backbone", None)  # timm's own name stands for it now
    part = {
        "format": FORMAT,
        "version": __version__,
        "task": described.pop("task"),
        "labels": described.pop("labels", None),
        "preprocessing": described.pop("preprocessing"),
        "more": described,
        **plain(hyperparameters),
        "weights": weights,
        "provenance": _provenance(task),
    }
    config = {**for_timm, "flashtask": part}
    (place / CONFIG).write_text(config_text(config), encoding="utf-8")
    return config


def _portable(arguments: dict[str, Any], source: TimmSource) -> dict[str, Any]:
    """A backbone that was named by a path, an address or a module, by its name in timm: that is known everywhere."""
    named = arguments.get("backbone")
    if named is None or (isinstance(named, str) and _BARE.fullmatch(named) and own_file_of("backbones", named) is None):
        return arguments
    options = {name: value for name, value in source.arguments.items() if name != "in_chans"}
    channels = {"in_chans": source.arguments["in_chans"]} if source.arguments.get("in_chans", 3) != 3 else {}
    return {**arguments, "backbone": f"timm/{source.architecture}", "backbone_options": options, **channels}


def _provenance(task: Task) -> dict[str, Any] | None:
    """Of the run that the task is in or was in last, else of the file it was read from; without places on this disk."""
    run = task.trainer.fit_run if task.trainer is not None else None
    known = task.provenance if run is None or run.module is not task else provenance_of(run)
    if known is None:
        return {"pretrained_from": without_places(task.pretrained_from)} if task.pretrained_from else None
    # A number that there was nothing to measure for, such as the precision of large boxes, is left out.
    if metrics := known.get("metrics"):
        known = {**known, "metrics": {name: value for name, value in metrics.items() if not _is_nan(value)}}
    found: dict[str, Any] = plain(without_places(known), "provenance")
    return found


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _backbone_name(task: Task) -> str:
    named = task.hparams.get("backbone")
    return named if isinstance(named, str) else type(unwrapped(task.backbone)).__name__


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor with memory of its own, as the format wants it."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    save_file(own, path, metadata={"format": "pt"})


@contextmanager
def _on_the_cpu(task: Task) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Backbone and head in eval mode and on the CPU: themselves if they are there, else copies."""
    parts = [unwrapped(task.backbone), task.head]
    if task.device.type != "cpu" or any(name.endswith("lora_down") for name in task.state_dict()):
        parts = [None if part is None else copy.deepcopy(part).cpu() for part in parts]
    modes = [(module, module.training) for part in parts if part is not None for module in part.modules()]
    for module, _ in modes:
        module.training = False
    try:
        assert parts[0] is not None
        yield parts[0], parts[1]
    finally:
        for module, mode in modes:
            module.training = mode


def _timm_agrees(place: Path, own: nn.Module, task: Task) -> bool:
    """Whether what plain timm builds from the folder gives the outputs of our own module."""
    state = torch.get_rng_state()
    try:
        with quiet_logs("timm", "huggingface_hub"):
            theirs = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
            return gives_the_same(own, theirs, task.preprocessing.input_size)
    except Exception:  # whatever it is that timm cannot do with the folder, it is not promised then
        return False
    finally:
        torch.set_rng_state(state)  # the user's own run goes on with the numbers it would have had
