"""The package in every form in which people get it: sdist, wheel, editable, checkout, spawned worker."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import flashtask
from flashtask.core.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
HEAVY = ("torch", "timm", "torchvision", "numpy", "pandas", "PIL", "huggingface_hub", "httpx2", "torchmetrics")
#: Python code that says where flashtask comes from.
WHERE = "import flashtask, flashtask.core.zoo as z; z.load_zoo(); print(flashtask.__file__)"


def python(
    *arguments: str | Path, cwd: Path, path: tuple[Path, ...] = (), executable: Path | str = sys.executable
) -> str:
    """What a Python process prints that finds packages in `path` and in its own environment, and nowhere else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files of the project, so that nothing is built in the checkout itself."""
    copy = tmp_path_factory.mktemp("checkout") / "flashtask-copy"
    shutil.copytree(ROOT, copy, ignore=_not_of_the_project)
    return copy


def _not_of_the_project(folder: str, names: list[str]) -> set[str]:
    generated = shutil.ignore_patterns("__pycache__", "*.egg-info", ".git", ".*_cache", ".hypothesis")(folder, names)
    at_the_root = {".venv", ".link", "build", "dist", "demo", "runs"} if Path(folder) == ROOT else set()
    return {*generated, *(at_the_root & set(names))}


@pytest.fixture(scope="module")
def archives(checkout, tmp_path_factory):
    """The sdist, and the wheel that is built from the sdist and not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """A folder into which pip installed the wheel."""
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", target]
    python("-m", "pip", "install", *options, archives[1], cwd=target)
    return target


def test_the_list_of_packages_is_the_list_of_folders():
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    expected = ["flashtask", *sorted(f"flashtask.{'.'.join(folder.relative_to(ROOT).parts)}" for folder in folders)]
    assert PROJECT["tool"]["setuptools"]["packages"] == expected
    assert {path.parent for room in ROOMS for path in (ROOT / room).rglob("__init__.py")} == folders


def test_only_one_file_holds_the_version():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    files = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    holding = [path.name for path in files if f'"{flashtask.__version__}"' in path.read_text(encoding="utf-8")]
    assert holding == ["_version.py"]


@pytest.mark.long
def test_the_sdist_holds_what_a_wheel_needs(archives):
    with tarfile.open(archives[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    needed = {"pyproject.toml", "LICENSE", "README.md", "zoo.yaml", "py.typed", "_version.py", "cli/__init__.py"}
    assert needed <= names
    assert not [name for name in names if ".venv" in name or name.startswith(("demo", "runs", ".link"))]


def test_the_wheel_holds_every_module_and_nothing_else(archives):
    with zipfile.ZipFile(archives[1]) as file:
        names = set(file.namelist())
    info = f"flashtask-{flashtask.__version__}.dist-info"
    package = {name for name in names if not name.startswith(f"{info}/")}
    modules = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    others = {"__init__.py", "__main__.py", "_version.py", "py.typed", "serve/page.html", "zoo.yaml"}
    others.add("tasks/pretrained/space_app.txt")
    assert package == {f"flashtask/{name}" for name in modules | others}
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("place", ["elsewhere", "in the checkout"])
def test_the_installed_wheel_is_what_is_imported(place, installed, checkout, tmp_path):
    cwd = tmp_path if place == "elsewhere" else checkout
    assert Path(python("-c", WHERE, cwd=cwd, path=(installed,))) == installed / "flashtask" / "__init__.py"
    version = f"flashtask {flashtask.__version__}"
    assert python(installed / "bin" / "flashtask", "--version", cwd=cwd, path=(installed,)) == version
    assert python("-m", "flashtask", "--version", cwd=cwd, path=(installed,)) == version


@pytest.mark.long
def test_an_editable_install_is_the_checkout(checkout, tmp_path):
    python("-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    executable = tmp_path / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(python("-c", ask, cwd=tmp_path, executable=executable))
    # The libraries of this environment come after what is installed in the new one.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    python("-m", "pip", "--python", executable, "install", *options, "--editable", checkout, cwd=tmp_path)
    assert Path(python("-c", WHERE, cwd=tmp_path, executable=executable)) == checkout / "__init__.py"
    version = f"flashtask {flashtask.__version__}"
    assert python("-m", "flashtask", "--version", cwd=tmp_path, executable=executable) == version
    command = site.parents[2] / "bin" / "flashtask"
    assert python(command, "--version", cwd=checkout, executable=executable) == version


def test_building_leaves_nothing_in_the_checkout_that_git_would_see(archives, checkout):
    left = {path.name for path in checkout.iterdir()} - {path.name for path in ROOT.iterdir()}
    assert left <= {"flashtask.egg-info", "build", "__pycache__"}
    ignored = set((ROOT / ".gitignore").read_text(encoding="utf-8").split())
    assert {"*.egg-info/", "__pycache__/", "/build/", "/dist/", "/.venv/", "/.link/", "/demo/", "/runs/"} <= ignored


def test_a_spawned_process_takes_a_class_of_the_package_and_a_function_of_a_test(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing\n"
        "from image_trees import write_image\n"
        "from flashtask.core.preprocessing import Preprocessing\n"
        "def twice(preprocessing, function):\n"
        "    return preprocessing, function.__name__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        there, name = pool.apply(twice, (Preprocessing(), write_image))\n"
        "    print(there == Preprocessing(), type(there) is Preprocessing, name)\n"
    )
    paths = (Path(__file__).parent, *(Path(path).resolve() for path in sys.path if path))
    assert python(script, cwd=tmp_path, path=paths) == "True True write_image"


@pytest.mark.parametrize(
    "code",
    [
        "import flashtask; dir(flashtask)",
        "import flashtask.cli; flashtask.cli.run(['--help'])",
        "import flashtask.cli; flashtask.cli.run(['finetune', '--help'])",
        "import flashtask.cli; flashtask.cli.run(['--version'])",
        "import flashtask.cli; flashtask.cli.run(['finetune', 'missing', '--epochs', '0'])",
    ],
)
def test_importing_the_package_and_asking_for_help_load_no_library(code, tmp_path):
    code += f"; import sys; print('heavy:', sorted(set(sys.modules) & {set(HEAVY)!r}))"
    paths = tuple(Path(path).resolve() for path in sys.path if path)
    assert python("-c", code, cwd=tmp_path, path=paths).splitlines()[-1] == "heavy: []"


def test_the_package_has_one_copy_of_itself():
    copies = {module.__file__ for name, module in sys.modules.items() if name.endswith("core.preprocessing")}
    assert len(copies) == 1
    assert Preprocessing.__module__ == "flashtask.core.preprocessing"


@pytest.mark.long
def test_what_pyproject_asks_for_is_what_the_package_imports():
    wanted = {_distribution(text) for text in PROJECT["project"]["dependencies"]}
    imported = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        if path.name == "reference_script.py":
            continue  # it is copied beside exported files, and not imported
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    # Some modules are named otherwise than what pip installs.
    renamed = {"yaml": "pyyaml", "PIL": "pillow", "starlette": "fastapi"}
    libraries = imported - set(sys.stdlib_module_names) - {"flashtask"}
    found = {renamed.get(name, name.replace("_", "-")) for name in libraries}
    # What an extra brings is imported where it is used, with an error that names the pip command.
    of_users = set(PROJECT["project"]["optional-dependencies"]) - {"bench", "demo", "dev", "test"}
    optional = {
        _distribution(text) for extra in of_users for text in PROJECT["project"]["optional-dependencies"][extra]
    }
    assert wanted <= found
    assert found <= wanted | optional


def _distribution(requirement: str) -> str:
    return requirement.partition(">")[0].partition("[")[0].strip().lower()


def test_constraints_pin_every_dependency_and_tool():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    extras = [text for texts in PROJECT["project"]["optional-dependencies"].values() for text in texts]
    asked = {_distribution(text) for text in [*PROJECT["project"]["dependencies"], *extras]} - {"flashtask"}
    assert pinned == asked
