"""zoo.yaml: what it holds is true and complete, and a mistake in a zoo file is said with its place."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import pytest

from flashtask.backbones import BACKBONES
from flashtask.backbones.sources import library_names
from flashtask.core.errors import UsageError
from flashtask.core.zoo import load_zoo, read_zoo
from flashtask.heads import HEADS


def test_the_shipped_zoo_is_read_once_and_names_only_what_there_is():
    zoo = load_zoo()
    assert load_zoo() is zoo
    assert set(zoo.providers) == {"timm", "torchvision"}
    assert set(zoo.heads) == {"linear", "mlp"}
    for own in zoo.backbones.values():
        assert own.source in BACKBONES
    for task in zoo.tasks.values():
        assert task.defaults["backbone"] in BACKBONES
        assert task.defaults.get("head", "linear") in HEADS
    for name, provider in zoo.providers.items():
        assert provider.url.startswith("https://")
        assert library_names(name)


def test_sizes_and_hashes_in_the_zoo_are_those_of_the_files():
    for own in load_zoo().backbones.values():
        if own.weights is not None:
            path = Path(str(distribution(own.weights.package).locate_file(own.weights.file)))
            assert path.stat().st_size == own.weights.size
            assert own.weights.sha256 is not None


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
        ("backbones: {b: {source: resnet18}}", "backbones.b.source: string should match", ""),
        (
            "backbones:\n  b:\n    source: timm/x\n    preprocessing: {meen: [0.5]}\n",
            "line 4, column 21: there is no key 'backbones.b.preprocessing.meen'",
            "did you mean 'mean'?",
        ),
        ("heads: {}\nheads: {}\n", "line 2, column 1: the key 'heads' stands twice", "remove one"),
        ("- a", "this must be a mapping of keys, not a list", ""),
        ("", "this must be a mapping of keys, not empty", ""),
    ],
)
def test_a_mistake_is_said_with_line_column_and_the_nearest_key(text, message, fix):
    with pytest.raises(UsageError) as caught:
        read_zoo(text, name="my_zoo.yaml")
    assert "my_zoo.yaml, line" in caught.value.what
    assert message in caught.value.what
    assert fix in caught.value.fix


def test_the_first_of_several_mistakes_is_told_with_how_many_follow():
    with pytest.raises(UsageError, match="line 1, column 1: there is no key 'a'") as caught:
        read_zoo("a: 1\nb: 2\nc: 3\n")
    assert "2 more below" in caught.value.why


def test_checkpoints_and_recipes_have_their_sections():
    zoo = read_zoo(
        "checkpoints: {c: {task: image_classification, repository: a/b, revision: main}}\n"
        "recipes: {r: {recipe: {task: image_classification}, expected: {val_accuracy: 0.9}}}\n"
    )
    assert zoo.checkpoints["c"].revision == "main"
    assert zoo.recipes["r"].expected == {"val_accuracy": 0.9}
