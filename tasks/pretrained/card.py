"""The model card of a folder, written from what `config.json` holds: what is not known is said to be not known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import yaml

from flashtask.core.licence_terms import conclusions
from flashtask.core.zoo import load_zoo
from flashtask.tasks import TASKS
from flashtask.tasks.licences import noted_licence, parts_of

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["PLACE", "model_card"]

#: Stands for the repository until the folder is pushed to one.
PLACE = "ORG/NAME"

_MOST_LABELS = 100


def model_card(config: Mapping[str, Any], licence: str | None = None, *, has_onnx: bool = False) -> str:
    """The text of README.md.

    Args:
        config: of `config.json`, with its part `flashtask`.
        licence: of the weights, as the hub writes it (`apache-2.0`); None if nobody has said.
        has_onnx: whether the model is in the folder for ONNX Runtime too.
    """
    part = config["flashtask"]
    front = yaml.safe_dump(_front_matter(config, part, licence), sort_keys=False, allow_unicode=True)
    sections = [
        _title(config, part),
        *_use(part, has_onnx),
        *_labels(part),
        *_data(part),
        *_metrics(part),
        *_recipe(part),
    ]
    sections += [*_limits(part), *_weights(config, part, licence), *_versions(part)]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(config: Mapping[str, Any], part: Mapping[str, Any], licence: str | None) -> dict[str, Any]:
    layout, pipeline = part["weights"]["timm"], getattr(_class_of(part), "pipeline_tag", None)
    provenance = part["provenance"] or {}
    front: dict[str, Any] = {"library_name": "timm" if layout == "whole" else "flashtask"}
    front |= {"license": licence} if licence else {}
    front |= {"pipeline_tag": pipeline} if pipeline else {}
    front["tags"] = ["flashtask", *(["timm"] if layout != "none" else []), *([pipeline] if pipeline else [])]
    measured = sorted({name.removeprefix("val_") for name in provenance.get("metrics") or {} if name[:4] == "val_"})
    front |= {"metrics": measured} if (measured := [name for name in measured if name != "loss"]) else {}
    source = provenance.get("pretrained_from") or {}
    return {**front, "base_model": source["repository"]} if "repository" in source else front


def _title(config: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    """The kind of model in words, its architecture, and what it gives for an image."""
    labels, targets = part["labels"], _targets(part)
    what = f"{config.get('num_features', 'its')} features an image"
    if targets.get("kind") == "number":
        what = ", ".join(map(_one_line, targets.get("fields") or ["a number"]))
    elif labels:
        what = f"{len(labels)} {'labels' if targets.get('kind') == 'labels' else 'classes'}"
    words = re.findall("[A-Z][a-z]*", _class_name(part))
    return f"# {' '.join(words).capitalize()}: {config['architecture']}, {what}"


def _class_of(part: Mapping[str, Any]) -> type[Task] | None:
    """The class of the task, None where none is registered."""
    return TASKS.get(part["task"]) if part["task"] in TASKS else None


def _class_name(part: Mapping[str, Any]) -> str:
    kind = _class_of(part)
    return "Task" if kind is None else kind.__name__


def _targets(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the targets were read; empty if the file does not say."""
    found = part["more"].get("targets")
    return found if isinstance(found, Mapping) else {}


def _use(part: Mapping[str, Any], has_onnx: bool) -> Iterator[str]:
    yield "## Use"
    name = _class_name(part)
    lines = [f"from flashtask import {name}", f'model = {name}.from_pretrained("{PLACE}")']
    yield "\n".join(["```python", *lines, 'print(model.predict("image.jpg"))', "```"])
    build = f'timm.create_model("hf-hub:{PLACE}", pretrained=True'
    yield {
        "whole": f"Plain timm reads all of it: `{build})`.",
        "backbone": f"Plain timm reads the backbone, without the head: `{build}, num_classes=0)`.",
        "none": "flashtask alone reads it: timm has no model with these weights.",
    }[part["weights"]["timm"]]
    if part["weights"]["timm"] == "whole" and (outputs := _outputs_of_timm(part)):
        yield outputs
    if part["weights"]["timm"] == "whole" and _class_name(part) == "ImageClassifier":
        read = f'AutoModelForImageClassification.from_pretrained("{PLACE}")'
        yield f"So does transformers, where timm is installed: `{read}`."
    if has_onnx:
        yield (
            "`model.onnx` is the whole model with its preprocessing, for ONNX Runtime: `images`, pictures "
            "(N, H, W, C) of uint8, are the input, and labels and thresholds are in its metadata."
        )
    size = part["preprocessing"]["input_size"]
    yield (
        f"Images are {size[0]} x {size[1]} x {size[2]} (channels, height, width); how they are resized, cropped and "
        "normalised is in `config.json`, and flashtask does it automatically."
    )


def _outputs_of_timm(part: Mapping[str, Any]) -> str:
    """What plain timm's outputs mean where they are not logits of classes."""
    targets = _targets(part)
    if targets.get("kind") == "number":
        mean, std = (", ".join(f"{value:.6g}" for value in targets[name]) for name in ("mean", "std"))
        return f"Its outputs are scaled: a number is `output * std + mean`, with mean {mean} and std {std}."
    points = part["more"].get("operating")
    if isinstance(points, dict) and targets.get("kind") != "labels":
        return (
            f"Its outputs are logits without temperature: the scores of flashtask are "
            f"`softmax(output / {points['temperature']:.6g})`."
        )
    thresholds = part["more"].get("thresholds")
    if targets.get("kind") == "labels" and isinstance(thresholds, list):
        shown = ", ".join(f"{value:.2f}" for value in thresholds[:_MOST_LABELS])
        return f"Its outputs are logits: a label applies where `sigmoid(output)` reaches its threshold ({shown})."
    return ""


def _labels(part: Mapping[str, Any]) -> Iterator[str]:
    if labels := part["labels"]:
        more = f", and {len(labels) - _MOST_LABELS} more in `config.json`" if len(labels) > _MOST_LABELS else ""
        yield "## Labels"
        yield ", ".join(f"`{_one_line(label)}`" for label in labels[:_MOST_LABELS]) + more


def _data(part: Mapping[str, Any]) -> Iterator[str]:
    yield "## Data"
    provenance = part["provenance"] or {}
    counts = provenance.get("data_counts") or {}
    if not counts:
        yield "It is not known what these weights were trained on: the file they come from does not say."
        return
    parts = list(counts)
    head = f"| images | {' | '.join(parts)} |\n| --- |{' ---: |' * len(parts)}"
    names = list(dict.fromkeys(name for part in parts for name in counts[part]))
    rows = [_row(_one_line(name), [counts[part].get(name, 0) for part in parts]) for name in names[:_MOST_LABELS]]
    rows.append(_row("all", [sum(counts[part].values()) for part in parts]))
    yield "\n".join([head, *rows])
    folders: dict[str, Any] = next(iter(((provenance.get("recipe") or {}).get("data") or {}).values()), {})
    if folders.get("val_split"):
        yield (
            f"The validation images were set apart from the training images (`val_split: {folders['val_split']}`, "
            f"`split_seed: {folders.get('split_seed', 0)}`), class by class."
        )


def _metrics(part: Mapping[str, Any]) -> Iterator[str]:
    yield "## Metrics"
    provenance = part["provenance"] or {}
    measured = {name: value for name, value in (provenance.get("metrics") or {}).items() if _is_number(value)}
    if not measured:
        yield "No measurements are known."
        return
    rows = [f"| {name} | {value:.4g} |" for name, value in measured.items()]
    yield "\n".join(["| metric | value |", "| --- | ---: |", *rows])
    when = f"Epoch {provenance['epoch']} (counted from 0), step {provenance['global_step']}."
    if any(name.startswith("val_") for name in measured):
        yield (
            f"{when} `val_` values are of the validation images above, which may also have been used to choose the "
            "epoch: on other images of the same kind, expect somewhat less."
        )
    else:
        yield f"{when} There were no validation images, so its accuracy is unknown."


def _recipe(part: Mapping[str, Any]) -> Iterator[str]:
    yield "## Recipe"
    recipe = (part["provenance"] or {}).get("recipe")
    if recipe is None:
        yield "It is not known how these weights were trained."
        return
    yield f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"
    if recipe.get("not_saved"):
        yield "What `not_saved` lists was made in Python, so the recipe alone does not repeat the run."
        return
    yield (
        "Folders are cut to their last names: put in your own, and `flashtask finetune recipe.yaml` repeats the run."
    )


def _limits(part: Mapping[str, Any]) -> Iterator[str]:
    yield "## Limits"
    is_known = bool((part["provenance"] or {}).get("data_counts"))
    calibrated = "whether the probabilities are calibrated: a score of 0.9 need not mean that nine of ten are right"
    lines = [
        "images from another source than the data above" if is_known else "anything, as far as is known here",
        *([] if "operating" in part["more"] else [calibrated]),
        "differences between groups of people, places or cameras, and robustness against manipulated images",
    ]
    shown = "\n".join(f"- Not measured: {line}." for line in lines)
    more = "\n- Every image gets one of the labels, even if it shows none of them." if part["labels"] else ""
    yield shown + more


def _weights(config: Mapping[str, Any], part: Mapping[str, Any], licence: str | None) -> Iterator[str]:
    yield "## Origin and licence"
    architecture = str(config["architecture"])
    provider = "timm" if part["weights"]["timm"] != "none" else architecture.partition("/")[0]
    lines = [_beginning(part)]
    if (known := load_zoo().providers.get(provider)) is not None:
        lines.append(f"The network is `{architecture}` of {known.credit} ({known.url}), code under {known.licence}.")
    lines.append(f"Licence of these weights: {licence}." if licence else "No licence has been given for these weights.")
    record = {**part["more"].get("licences", {}), "weights": licence}
    if isinstance(data := record.get("data"), str):
        lines.append(f"Licence of the data: {_one_line(data)}.")
    yield "\n".join(f"- {line}" for line in lines)
    yield "What follows, as a summary:"
    yield "\n".join(f"- {_one_line(line)}" for line in conclusions(parts_of(record)))


def _beginning(part: Mapping[str, Any]) -> str:
    """What the training began from, with the licence of that where timm or the zoo notes one."""
    provenance = part["provenance"] or {}
    source = provenance.get("pretrained_from")
    if source and "repository" in source:
        repository, commit = source["repository"], source["commit"]
        return f"Training began from `{repository}` on the hub, commit `{commit}`; its licence applies."
    if source:
        return f"Training began from the file `{source.get('path')}` (sha256 `{source.get('sha256')}`)."
    arguments = ((provenance.get("recipe") or {}).get("model")) or part["hyper_parameters"]
    named = arguments.get("backbone")
    if arguments.get("pretrained") is False:
        return "Training began from random weights."
    if not isinstance(named, str):
        return "It is not known what the training began from."
    licence = noted_licence(named)
    noted = f", whose licence is noted as {licence}" if licence else ", whose licence is not noted"
    return f"The backbone began from the pretrained weights of `{_one_line(named)}`{noted}."


def _versions(part: Mapping[str, Any]) -> Iterator[str]:
    yield "## Versions"
    environment = (part["provenance"] or {}).get("environment") or {}
    known = [name for name in ("flashtask", "torch", "python") if name in environment]
    trained = ", ".join(f"{name} {environment[name]}" for name in known)
    written = ", ".join(f"{name} {metadata.version(name)}" for name in ("timm", "torch", "torchvision"))
    where = f"on {environment.get('device')} in {environment.get('precision')}"
    lines = [f"- trained with {trained}, {where}"] if trained else []
    yield "\n".join([*lines, f"- written with flashtask {part['version']}, {written}"])


def _row(name: str, values: Sequence[int]) -> str:
    return f"| {name} | {' | '.join(str(value) for value in values)} |"


def _one_line(text: str) -> str:
    """A label cannot begin a table, a heading or a link of its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")[:200]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
