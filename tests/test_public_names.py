"""What `flashtask` hands out: one list for people, one for type checkers, one for the imports, all the same."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import flashtask

INIT = Path(flashtask.__file__)


def names_for_type_checkers() -> dict[str, str]:
    """Public name -> `module:name`, as `if TYPE_CHECKING:` imports it."""
    block = next(
        node
        for node in ast.parse(INIT.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or "": f"{node.module}:{alias.name}" for node in imports for alias in node.names}


def test_the_list_for_type_checkers_is_the_list_of_public_names():
    assert sorted([*names_for_type_checkers(), "__version__"]) == sorted(flashtask.__all__)
    assert len(set(flashtask.__all__)) == len(flashtask.__all__)


@pytest.mark.parametrize("name", flashtask.__all__)
def test_every_public_name_is_what_type_checkers_think_it_is(name):
    value = getattr(flashtask, name)
    if name != "__version__":
        module, _, attribute = names_for_type_checkers()[name].partition(":")
        assert value is getattr(importlib.import_module(module), attribute)


def test_dir_lists_the_public_names():
    assert set(flashtask.__all__) <= set(dir(flashtask))


def test_a_star_import_gives_the_public_names():
    namespace: dict[str, object] = {}
    exec("from flashtask import *", namespace)
    assert set(flashtask.__all__) <= set(namespace)


@pytest.mark.parametrize("name", ["Trainr", "ImageClassifer", "_missing"])
def test_a_wrong_name_is_an_attribute_error_and_an_import_error(name):
    with pytest.raises(AttributeError, match=f"module 'flashtask' has no attribute '{name}'"):
        getattr(flashtask, name)
    with pytest.raises(ImportError, match=name):
        exec(f"from flashtask import {name}")
