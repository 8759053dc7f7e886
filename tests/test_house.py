"""The numbers of `scripts/house.py` on a small made-up package, and that worse ones are refused."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "house.py"

FILES = {
    "__init__.py": '"""A package that was made up for these tests."""\n',
    "core/__init__.py": "",
    "core/errors.py": "x = 1\n" * 50,
    "core/settings.py": "import flashtask.core.errors\n",
    "trainer/__init__.py": "",
    "trainer/hooks.py": """
        from typing import TYPE_CHECKING, Any

        if TYPE_CHECKING:
            from flashtask.trainer import tuning
        else:
            import flashtask.core.errors

        def call(trainer: Any, name: str, *rest: Any) -> None:
            "Call it."
            from flashtask.trainer.run import Run

        def _call(trainer: Any, module: Any) -> None:
            "Short."
        """,
    "trainer/run.py": """
        from flashtask.trainer import hooks

        class Run:
            "What changes while a stage is carried out."

            def __init__(self, module: "Any", name: Any | None, free) -> None: ...

            def step(self, run: Any) -> None:
                "Six words are few for this."

                def inner(run: Any) -> None:
                    "Not public."

            def _step(self, batch: Any) -> None: ...

        class _Private:
            def step(self, batch: Any) -> None: ...
        """,
    "trainer/callbacks/__init__.py": "",
    "trainer/callbacks/settings.py": """
        def f():
            try:
                import flashtask.trainer.tuning.settings
            except ImportError: ...
        """,
    "trainer/tuning/__init__.py": "",
    "trainer/tuning/settings.py": "from flashtask.core import errors\n",
    "tests/test_run.py": "from flashtask.core import settings\n",
    "scripts/demo.py": "from flashtask.core import settings\n",
}

EXPECTED = {
    "lines": 1 + 50 + 1 + 13 + 17 + 4 + 1,
    "files": 11,
    "files under 50 lines": 10,
    "file names that occur twice or more": 1,
    "file names that occur twice or more inside one room": 1,
    # Of one importer: run (hooks), hooks (run), tuning.settings (callbacks.settings). core.errors has three.
    "modules imported by exactly one other": 3,
    "modules in import circles": 2,
    # hooks -> run, callbacks.settings -> tuning.settings
    "imports of a higher layer in trainer/": 2,
    "parts of trainer/ that TRAINER_LAYERS leaves out": 0,
    # call(trainer), Run(module), Run.step(run)
    "public parameters typed Any": 3,
    "parameters `trainer: Any`": 2,
    "parameters `module: Any`": 2,
    "parameters `run: Any`": 2,
    # call, Run.step
    "public docstrings of 6 words or fewer": 2,
}


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{textwrap.dedent(text).strip()}\n" if text else "")


@pytest.fixture
def package(tmp_path):
    for name, text in FILES.items():
        write(tmp_path / "package", name, text)
    return tmp_path / "package"


@pytest.fixture
def house(package, tmp_path):
    """The script on the made-up package, with Python's own modules alone: gives its exit code and what it printed."""

    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-I", "-S", str(SCRIPT), "--root", str(package)]
        command += ["--stored", str(tmp_path / "house.json"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.returncode, done.stdout

    return run


@pytest.fixture
def stored(house, tmp_path):
    assert house("--store") == (0, "")
    return tmp_path / "house.json"


def test_each_measure_has_its_number(stored):
    assert json.loads(stored.read_text()) == EXPECTED


def test_the_table_has_the_rooms_and_the_places(house):
    code, text = house("--places")
    assert code == 0
    rows = {row[:56].rstrip(): row[56:].strip() for row in text.splitlines() if not row.startswith("   ")}
    assert rows["  trainer/ lines"] == "35"
    assert rows["  trainer/ files"] == "7"
    assert rows["  core/ files"] == "3"
    assert rows["  import circles in trainer/"] == "1"
    # trainer and name of call, module, name and run of Run; *rest is not counted
    assert rows["  annotated public parameters"] == "5"
    assert rows["  share of them typed Any, percent"] == "60.0"
    assert "        trainer.hooks trainer.run\n" in text
    assert "        trainer.callbacks.settings imports trainer.tuning.settings\n" in text
    assert "        trainer/hooks.py: 1, in lines 8\n" in text


WORSE = {
    "files under 50 lines": ("data/__init__.py", ""),
    "file names that occur twice or more": ("core/run.py", "x = 1\n"),
    "file names that occur twice or more inside one room": ("trainer/callbacks/run.py", "x = 1\n"),
    "modules imported by exactly one other": ("core/names.py", "import flashtask.core.settings\n"),
    "modules in import circles": ("core/errors.py", "import flashtask.core.settings\n"),
    "imports of a higher layer in trainer/": ("trainer/data_loaders.py", "import flashtask.trainer.run\n"),
    "parts of trainer/ that TRAINER_LAYERS leaves out": ("trainer/unheard_of.py", "x = 1\n"),
    "public parameters typed Any": ("core/names.py", "class A:\n    def __init__(self, value: Any): ...\n"),
    "parameters `module: Any`": ("core/names.py", "async def _f(module: Any): ...\n"),
    "public docstrings of 6 words or fewer": ("core/names.py", '"""Names."""\n'),
}


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("name", WORSE)
def test_a_worse_number_fails_and_is_named_with_both_values(house, stored, package, name):
    write(package, *WORSE[name])
    code, text = house("--check")
    assert code == 1
    assert any(line.startswith(f"worse: {name}: {EXPECTED[name]} -> ") for line in text.splitlines())
    assert "--store --force" in text


def test_places_of_a_worse_number_are_shown(house, stored, package):
    write(package, "trainer/data_loaders.py", "import flashtask.trainer.run\n")
    assert "    trainer.data_loaders imports trainer.run\n" in house("--check")[1]


def test_of_many_places_some_are_shown(house, stored, package):
    for number in range(3):
        write(package, f"core/new_{number}.py", "x = 1\n")
    assert "    and 3 more: `python scripts/house.py --places` lists them\n" in house("--check")[1]


def test_the_same_number_passes_and_a_better_one_asks_to_be_stored(house, stored, package):
    assert house("--check") == (0, "")
    write(package, "trainer/hooks.py", "x = 1\n")
    code, text = house("--check")
    assert code == 0
    assert "--store" in text
    assert house("--store") == (0, "")
    assert json.loads(stored.read_text())["modules in import circles"] == 0


def test_sizes_may_grow_by_one_percent_once(house, stored, package):
    write(package, "core/errors.py", "x = 1\n" * 1000)
    assert house("--store", "--force") == (0, "")
    lines = json.loads(stored.read_text())["lines"]
    write(package, "core/errors.py", "x = 1\n" * 1010)
    assert house("--check") == (0, "")
    assert house("--store") == (0, "")
    assert json.loads(stored.read_text())["lines"] == lines
    write(package, "core/errors.py", "x = 1\n" * 1020)
    assert house("--check")[0] == 1


def test_worse_numbers_are_stored_only_with_force(house, stored, package):
    before = stored.read_text()
    write(package, *WORSE["modules in import circles"])
    code, text = house("--store")
    assert code == 1
    assert "worse: modules in import circles: 2 -> 4" in text
    assert stored.read_text() == before
    assert house("--store", "--force") == (0, "")
    assert json.loads(stored.read_text())["modules in import circles"] == 4
    assert house("--check") == (0, "")


def test_a_measure_without_a_stored_number_fails(house, tmp_path):
    (tmp_path / "house.json").write_text(json.dumps({name: EXPECTED[name] for name in EXPECTED if name != "files"}))
    code, text = house("--check")
    assert code == 1
    assert "files" in text
    assert house("--store") == (0, "")
    assert house("--check") == (0, "")


def test_the_numbers_of_flashtask_are_all_stored():
    # `make lint` compares them; here only that a measure of the script has its number.
    assert json.loads((ROOT / "scripts" / "house.json").read_text()).keys() == EXPECTED.keys()
