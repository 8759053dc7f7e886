"""The rooms know each other only in one direction, and nothing in the package reads pickles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: room -> the rooms that it may import, besides itself
KNOWS = {
    "core": set(),
    "trainer": {"core"},
    "data": {"core", "trainer"},
    "backbones": {"core"},
    "heads": {"core"},
    "reports": {"core", "trainer", "data"},
    "tasks": {"core", "trainer", "data", "backbones", "heads", "reports"},
    "serve": {"core", "trainer", "data", "tasks"},
    "cli": {"core", "trainer", "data", "backbones", "heads", "reports", "tasks", "serve"},  # and the public names
}

ROOM_FILES = sorted(path for room in KNOWS for path in (ROOT / room).rglob("*.py"))
ROOT_FILES = [ROOT / "__init__.py", ROOT / "__main__.py", ROOT / "_version.py"]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that is imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def wrong_imports(room: str, tree: ast.AST) -> list[str]:
    """What a file of a room imports although it may not."""
    wrong = []
    for line, name in imported(tree):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first in KNOWS or name.startswith("."):
            wrong.append(f"line {line}: {name} is relative or bare: it makes a second copy of the package")
        # The command line may use the public names too: nothing knows it, so there is no circle.
        elif first == "flashtask" and room != "cli" and target not in {room, "_version", *KNOWS[room]}:
            wrong.append(f"line {line}: {room}/ may not know {name}")
    return wrong


def imported_files(path: Path) -> set[Path]:
    """The files of the package that a file imports, inside functions too; imports for types alone do not count."""
    tree = parse(path)
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    bodies = [part for node in tests if node.test.id == "TYPE_CHECKING" for part in node.body]
    found = set(imported(tree)) - {one for part in bodies for one in imported(part)}
    names = [name.split(".")[1:] for _, name in found if name.startswith("flashtask.")]
    places = [ROOT.joinpath(*name[:end]) for name in names for end in (len(name), len(name) - 1)]
    return {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("room", ["backbones", "cli", "core", "data"])
def test_the_files_of_a_room_have_one_order_from_top_to_bottom(room):
    """No file imports one that imports it, directly or through others."""
    left = {path: imported_files(path) - {path} for path in sorted((ROOT / room).rglob("*.py"))}
    while bottom := [path for path, below in left.items() if not below & left.keys()]:
        for path in bottom:
            del left[path]
    assert {name_of(path): sorted(map(name_of, below & left.keys())) for path, below in left.items()} == {}


@pytest.mark.quick_cases(52)
@pytest.mark.parametrize("path", ROOM_FILES, ids=name_of)
def test_imports_go_only_in_the_direction_of_the_rooms(path):
    assert wrong_imports(path.relative_to(ROOT).parts[0], parse(path)) == []


@pytest.mark.parametrize(
    ("room", "code", "is_allowed"),
    [
        ("trainer", "from flashtask.core.errors import UsageError", True),
        ("trainer", "import flashtask.core.errors", True),
        ("core", "from flashtask._version import __version__", True),
        ("core", "def f():\n    from flashtask.trainer.run import Run", False),
        ("data", "if TYPE_CHECKING:\n    from flashtask.tasks import TASKS", False),
        ("backbones", "import flashtask.heads.linear", False),
        ("tasks", "from flashtask import cli", False),
        ("tasks", "from flashtask import Trainer", False),
        ("cli", "from flashtask import load", True),
        ("cli", "from cli import usage", False),
        ("core", "from .errors import UsageError", False),
        ("core", "from core.errors import UsageError", False),
        ("heads", "import core.errors", False),
    ],
)
def test_the_check_of_imports_sees_every_form(room, code, is_allowed):
    assert (wrong_imports(room, ast.parse(code)) == []) == is_allowed


#: Libraries of images and models, which the engine has no need of.
_OF_IMAGES = {"timm", "torchvision", "PIL"}


@pytest.mark.parametrize("path", sorted((ROOT / "trainer").rglob("*.py")), ids=name_of)
def test_the_engine_knows_no_library_of_images(path):
    tree = parse(path)
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert {name.partition(".")[0] for _, name in imported(tree)} & _OF_IMAGES == set()
    assert {text.partition(".")[0] for text in texts} & _OF_IMAGES == set()


@pytest.mark.parametrize("path", sorted((ROOT / "data").rglob("*.py")), ids=name_of)
def test_of_the_engine_the_data_room_knows_the_base_of_data_modules_alone(path):
    of_the_engine = [name for _, name in imported(parse(path)) if name.startswith("flashtask.trainer")]
    assert [name for name in of_the_engine if not name.startswith("flashtask.trainer.datamodule.")] == []


@pytest.mark.long
def test_only_trainer_data_module_and_the_public_names_know_what_is_here_for_scripts_from_lightning():
    folder = ROOT / "trainer" / "lightning1"
    outside = [path for path in ROOM_FILES if folder not in path.parents]
    users = [name_of(p) for p in outside if any("trainer.lightning1" in name for _, name in imported(parse(p)))]
    assert users == ["trainer/datamodule.py", "trainer/trainer.py"]


def test_the_root_holds_only_the_three_files_of_a_package():
    # A root file named copy.py or inspect.py would stand in for Python's own wherever the root is on the path.
    assert sorted(ROOT.glob("*.py")) == sorted(ROOT_FILES)


def test_every_folder_with_python_files_is_a_known_room_or_no_part_of_the_package():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(KNOWS)


_PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}
_SAFE_ONLY_WITH = {"torch.load", "torch.hub.load_state_dict_from_url"}


def dangers(tree: ast.AST) -> list[str]:
    """Everything in a file that could run code from a file that it reads."""
    found = []
    for line, name in imported(tree):
        if name.partition(".")[0] in _PICKLES:
            found.append(f"line {line}: imports {name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"eval", "exec"}:
            found.append(f"line {node.lineno}: {called}()")
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in _SAFE_ONLY_WITH and options.get("weights_only") != "True":
            found.append(f"line {node.lineno}: {called}() without weights_only=True")
        if options.get("allow_pickle", "False") != "False":
            found.append(f"line {node.lineno}: {called}() with allow_pickle")
    return found


@pytest.mark.quick_cases(52)
@pytest.mark.parametrize("path", [*ROOM_FILES, *ROOT_FILES], ids=name_of)
def test_nothing_in_the_package_unpickles_or_evaluates(path):
    assert dangers(parse(path)) == []


@pytest.mark.parametrize(
    ("code", "is_safe"),
    [
        ("torch.load(path, weights_only=True)", True),
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("np.load(path)", True),
        ("np.load(path, allow_pickle=True)", False),
        ("import pickle", False),
        ("def f():\n    from pickle import loads", False),
        ("model.eval()", True),
        ("eval(text)", False),
    ],
)
def test_the_check_for_pickles_sees_every_form(code, is_safe):
    assert (dangers(ast.parse(code)) == []) == is_safe


@pytest.mark.parametrize("path", [*ROOM_FILES, *ROOT_FILES], ids=name_of)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(parse(path))
