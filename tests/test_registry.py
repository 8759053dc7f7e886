"""The registry: names, near matches, overriding, sources, and entry points of installed packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.registry import Registry, RegistryEntry


class Fruits:
    """A source with one name and an abbreviation, which counts how often it is loaded."""

    def __init__(self) -> None:
        self.loads = 0

    def names(self):
        return ["orchard/apple"]

    def spellings(self):
        return ["apple"]

    def find(self, name):
        if name not in ("apple", "orchard/apple"):
            return None
        return RegistryEntry("orchard/apple", "fruit", {"provider": "orchard"}, self.load)

    def load(self):
        self.loads += 1
        return "an apple"


def test_each_form_of_registering_gives_the_object_back_under_its_name():
    registry = Registry("thing")

    @registry.register
    def plain():
        """What it does.

        More.
        """

    @registry.register("renamed", licence="MIT")
    class Other:
        pass

    registry.register("direct", print)
    assert registry.names() == ["plain", "renamed", "direct"]
    assert registry.get("plain") is plain
    assert registry.get("renamed") is Other
    assert registry.get("direct") is print
    assert registry.entry("plain").metadata == {"provider": "user", "description": "What it does."}
    assert registry.entry("renamed").metadata["licence"] == "MIT"


def test_a_taken_name_is_an_error_unless_overridden():
    registry = Registry("thing")
    registry.register("a", print)
    with pytest.raises(UsageError, match="there is a thing named 'a' already") as caught:
        registry.register("a", len)
    assert "override=True" in caught.value.fix
    assert registry.get("a") is print
    registry.register("a", len, override=True)
    assert registry.get("a") is len


def test_a_name_of_a_source_is_taken_too_in_every_spelling():
    registry = Registry("fruit")
    registry.add_source(Fruits())
    with pytest.raises(UsageError, match="from orchard"):
        registry.register("apple", print)
    registry.register("apple", print, override=True)
    assert registry.get("apple") is print
    assert registry.get("orchard/apple") == "an apple"


@pytest.mark.parametrize("name", ["", " a", 3])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UsageError, match="must be a text"):
        Registry("thing").register(name, print)


def test_an_unknown_name_gives_near_matches_and_the_command_that_lists_all():
    registry = Registry("fruit", group="flashtask.no_such_group")
    registry.add_source(Fruits())
    with pytest.raises(UnknownNameError) as caught:
        registry.get("aple")
    message = str(caught.value)
    assert "no fruit named 'aple'" in message
    assert "did you mean 'apple'?" in message
    assert "`flashtask zoo --kind fruit` lists all 1" in message
    with pytest.raises(UnknownNameError) as caught:
        Registry("thing").get("apple")
    assert "flashtask zoo" not in str(caught.value)


def test_a_source_is_loaded_once_and_only_by_get():
    registry, fruits = Registry("fruit"), Fruits()
    registry.add_source(fruits)
    assert "apple" in registry
    assert registry.entry("apple").name == "orchard/apple"
    assert fruits.loads == 0
    assert registry.get("apple") == registry.get("orchard/apple") == "an apple"
    assert fruits.loads == 1


def test_a_removed_name_is_gone_until_it_is_registered_again():
    registry = Registry("fruit")
    registry.add_source(Fruits())
    registry.remove("apple")
    assert "apple" not in registry
    assert registry.names() == []
    with pytest.raises(UnknownNameError):
        registry.remove("apple")
    registry.register("orchard/apple", print)
    assert registry.get("orchard/apple") is print


@pytest.mark.long
def test_listing_and_describing_load_no_library():
    code = (
        "import sys, flashtask.heads; from flashtask.backbones import BACKBONES;"
        "early = 'pydantic' in sys.modules; n = len(BACKBONES.names()); BACKBONES.entry('resnet18.a1_in1k');"
        "flashtask.heads.HEADS.entry('mlp');"
        "heavy = {'torch', 'timm', 'torchvision', 'numpy'} & set(sys.modules); print(early, n > 1000, heavy)"
    )
    assert run_python(code, []) == "False True set()"


@pytest.mark.long
def test_an_installed_package_adds_a_backbone_and_a_head_by_entry_points(third_party):
    code = (
        "import sys, torch; from flashtask.backbones import BACKBONES, build_backbone;"
        "from flashtask.heads import HEADS, build_head;"
        "listed = 'example_tiny' in BACKBONES.names() and 'example_scaled' in HEADS.names();"
        "who = BACKBONES.entry('example_tiny').metadata['provider'];"
        "early = 'flashtask_example_zoo' in sys.modules;"
        "b = build_backbone('example_tiny', pretrained=False, width=4);"
        "h = build_head('example_scaled', b.num_features, 3, temperature=2.0);"
        "print(listed, who, early, b.name, tuple(h(b.module(torch.zeros(2, 3, 64, 64))).shape))"
    )
    assert forked(code, third_party) == "True flashtask-example-zoo 0.1.0 False example_tiny (2, 3)"


@pytest.mark.long
def test_an_installed_package_is_found_by_filters_and_by_the_command(third_party):
    code = (
        "import json, os; from flashtask.cli import run; from flashtask import BACKBONES, HEADS, TASKS;"
        "names = lambda registry, **f: [e.name for e in registry.search(source='flashtask-example-zoo', **f)];"
        "print(names(BACKBONES), names(BACKBONES, max_params=1e4), names(HEADS), names(TASKS));"
        "run(['zoo', '--source', 'flashtask-example-zoo', '--max-params', '10k']);"
        "run(['zoo', 'show', 'example_tiny'])"
    )
    found, listed, *shown = run_python(code, [third_party]).splitlines()
    assert "credit: The example authors" in shown
    assert "library_licence: MIT" in shown
    assert "url: https://example.org/zoo" in shown
    assert "num_features: 16" in shown
    assert found == "['example_broken', 'example_tiny'] ['example_tiny'] ['example_scaled'] ['example_brightness']"
    assert listed.split() == ["example_tiny", "backbone", "flashtask-example-zoo", "0.1.0"]


@pytest.mark.long
def test_a_broken_package_is_an_error_that_names_it_only_when_it_is_asked_for(third_party):
    code = (
        "from flashtask.backbones import BACKBONES\n"
        "assert 'example_broken' in BACKBONES.names()\n"
        "assert BACKBONES.get('timm/resnet18')\n"
        "try: BACKBONES.get('example_broken')\n"
        "except Exception as error: print(type(error).__name__, str(error).replace(chr(10), ' '))"
    )
    printed = forked(code, third_party)
    assert printed.startswith("UsageError the backbone 'example_broken' of the installed package")
    assert "flashtask-example-zoo 0.1.0" in printed
    assert "No module named 'flashtask_example_zoo.missing'" in printed


def test_a_package_that_promises_a_shipped_name_is_an_error_for_that_name(tmp_path):
    info = tmp_path / "rival-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flashtask.heads]\nlinear = os:getcwd\n")
    code = (
        "from flashtask.heads import HEADS\n"
        "assert HEADS.get('mlp')\n"
        "try: HEADS.get('linear')\n"
        "except Exception as error: print(type(error).__name__, error.what)"
    )
    assert forked(code, tmp_path) == "UsageError the head 'linear' is provided by rival 1.0 and flashtask"


def forked(code, folder):
    """What a program prints that finds packages in a folder too, and has torch already."""
    done = warm.run(f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_python(code, folders):
    """The same of a new Python."""
    package = [str(Path(path).resolve()) for path in sys.path if path]
    path = os.pathsep.join([*map(str, folders), *package])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
