"""Measure the house: size, structure and types of the package, so that no change makes them worse unnoticed.

    python scripts/house.py             a table of today's numbers
    python scripts/house.py --places    the same, and where each number comes from
    python scripts/house.py --check     compare with scripts/house.json; exit code 1 if a number got worse
    python scripts/house.py --store     write the numbers to scripts/house.json; worse ones only with --force

Only the source text is read; nothing is imported. Less is better for every number. Imports inside functions count,
those under `if TYPE_CHECKING:` do not. Indented numbers are shown and not checked.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

#: Modules and sub-packages of trainer/, lowest layer first. A file may import from its own layer and from lower ones.
TRAINER_LAYERS = (
    # knows nothing of runs
    "restarting_loader",
    "batch_transfer by_name data_loaders hooks hyperparameters metric_order module_hooks run_extension signals",
    "combined_loader step_outputs text_table wrapping",
    "finetuning",
    # where it is computed, and how a step changes weights
    "devices",
    "distribution",
    "device_plan",
    "loss_checks manual_optimization optimizers",
    "results step_overrides",
    # what a run calls, and what it leaves behind
    "callbacks",
    "loggers profiling",
    "run_folder run_record",
    "checkpoints",
    # what is trained, and on what
    "datamodule",
    "module",
    "closed_form_fit feature_cache features",
    # the run
    "given_loaders run_preparation",
    "run",
    "fit_run validation_times",
    "fit_result run_facts",
    # stages
    "loop run_lifecycle",
    "tuning",
    "budget finetuning_plan",
    "argument_checks lightning1 trainer",
)

#: Sizes may exceed the stored number by this share: a fix of three lines needs no new numbers.
GROWTH = 0.01

SHORT_FILE = 50
SHORT_DOCSTRING = 6
#: Places that `--check` prints for a number that got worse.
SHOWN = 10

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Measure:
    """A number, where it comes from (the worst places first), and how `--check` treats it."""

    name: str
    value: float
    places: list[str] = field(default_factory=list)
    is_checked: bool = True
    growth: float = 0.0

    def is_worse_than(self, stored: float) -> bool:
        """Whether this number exceeds a stored one by more than the allowed growth."""
        return self.value > stored * (1 + self.growth)


class Source(NamedTuple):
    """One file of the package: dotted name below the package, path below the root, tree, number of lines."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def room(self) -> str:
        """The top-level folder; `.` for the files at the root."""
        return self.path.parts[0] if len(self.path.parts) > 1 else "."


class Parameter(NamedTuple):
    """An annotated parameter: `name: type`, file and line, and whether its function is public."""

    text: str
    path: Path
    line: int
    is_public: bool


def sources(root: Path) -> list[Source]:
    """The files of the package: those at the root, and those of folders that are packages."""
    rooms = sorted(path.parent for path in root.glob("*/__init__.py"))
    paths = sorted(root.glob("*.py")) + [path for room in rooms for path in sorted(room.rglob("*.py"))]
    found = []
    for path in paths:
        below = path.relative_to(root)
        parts = [part for part in below.with_suffix("").parts if part != "__init__"]
        text = path.read_text(encoding="utf-8")
        found.append(Source(".".join(parts), below, ast.parse(text, str(path)), len(text.splitlines())))
    return found


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements one level below a node. Expressions, most of a tree, hold neither imports nor definitions."""
    return (
        child
        for child in ast.iter_child_nodes(node)
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
    )


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name that is taken from it) of each import that is carried out at run time."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((node.module or "", alias.name) for alias in node.names)
    children = _statements(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        children = iter(node.orelse)
    for child in children:
        yield from _imported(child)


def import_graph(files: Sequence[Source]) -> dict[str, set[str]]:
    """For each module of the package, the other modules of the package that it imports."""
    names = {file.name for file in files}
    graph: dict[str, set[str]] = {}
    for file in files:
        graph[file.name] = targets = set()
        for module, name in _imported(file.tree):
            package, _, below = module.partition(".")
            if package == "flashtask":
                within = f"{below}.{name}".strip(".")
                targets.add(within if within in names else below)
        targets &= names - {file.name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module: each member reaches every other by imports."""
    reached: dict[str, set[str]] = {}
    for name, targets in graph.items():
        reached[name] = seen = set()
        waiting = list(targets)
        while waiting:
            if (target := waiting.pop()) not in seen:
                seen.add(target)
                waiting.extend(graph[target])
    found = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted((sorted(circle) for circle in found if circle), key=len, reverse=True)


def against_the_layers(graph: dict[str, set[str]]) -> list[str]:
    """The imports inside trainer/ of something that lies in a higher layer."""
    layer_of = {name: layer for layer, names in enumerate(TRAINER_LAYERS) for name in names.split()}

    def layer(module: str) -> int | None:
        parts = module.split(".")
        return layer_of.get(parts[1]) if parts[0] == "trainer" and len(parts) > 1 else None

    wrong = []
    for name, targets in graph.items():
        for target in targets:
            low, high = layer(name), layer(target)
            if low is not None and high is not None and high > low:
                wrong.append(f"{name} imports {target}")
    return sorted(wrong)


def definitions(node: ast.AST, is_public: bool = True) -> Iterator[tuple[Definition, bool]]:
    """Every class and function, and whether it is public: its class and its name are, or the name is `__init__`."""
    for child in _statements(node):
        if isinstance(child, Definition):
            is_named = is_public and (child.name == "__init__" or not child.name.startswith("_"))
            yield child, is_named
            yield from definitions(child, is_named and isinstance(child, ast.ClassDef))
        else:
            yield from definitions(child, is_public)


def parameters(files: Sequence[Source]) -> list[Parameter]:
    """The annotated parameters of all functions, `*args` and `**options` left out."""
    found = []
    for file in files:
        for node, is_public in definitions(file.tree):
            if isinstance(node, ast.ClassDef):
                continue
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                if argument.annotation is not None:
                    type_text = ast.unparse(argument.annotation).strip("'")
                    text = f"{argument.arg}: {type_text}"
                    found.append(Parameter(text, file.path, argument.lineno, is_public))
    return found


def _by_file(places: Sequence[tuple[Path, int]]) -> list[str]:
    """Each path with its count and its line numbers, the one with most places first."""
    lines: dict[Path, list[int]] = defaultdict(list)
    for path, line in places:
        lines[path].append(line)
    ordered = sorted(lines.items(), key=lambda item: -len(item[1]))
    return [f"{path}: {len(spots)}, in lines {', '.join(map(str, sorted(set(spots))))}" for path, spots in ordered]


def sizes(files: Sequence[Source]) -> list[Measure]:
    """Lines and files, of the package and of each room."""
    longest = [f"{file.path} {file.lines}" for file in sorted(files, key=lambda file: -file.lines)]
    measures = [Measure("lines", sum(file.lines for file in files), longest, growth=GROWTH)]
    measures.append(Measure("files", len(files), growth=GROWTH))
    for room in sorted({file.room for file in files}):
        own = [file.lines for file in files if file.room == room]
        measures.append(Measure(f"  {room}/ lines", sum(own), is_checked=False))
        measures.append(Measure(f"  {room}/ files", len(own), is_checked=False))
    short = [str(file.path) for file in sorted(files, key=lambda file: file.lines) if file.lines < SHORT_FILE]
    return [*measures, Measure(f"files under {SHORT_FILE} lines", len(short), short)]


def file_names(files: Sequence[Source]) -> list[Measure]:
    """File names that say where a file is only together with their folder."""
    anywhere: dict[str, list[str]] = defaultdict(list)
    in_a_room: dict[str, list[str]] = defaultdict(list)
    for file in files:
        if file.path.stem != "__init__":
            anywhere[file.path.stem].append(str(file.path))
            in_a_room[f"{file.room}/{file.path.stem}"].append(str(file.path))
    measures = []
    for label, groups in (("", anywhere), (" inside one room", in_a_room)):
        shared = sorted((" ".join(paths) for paths in groups.values() if len(paths) > 1), key=len, reverse=True)
        measures.append(Measure(f"file names that occur twice or more{label}", len(shared), shared))
    return measures


def structure(files: Sequence[Source]) -> list[Measure]:
    """Who imports whom."""
    graph = import_graph(files)
    importers: dict[str, list[str]] = defaultdict(list)
    for name, targets in graph.items():
        for target in targets:
            importers[target].append(name)
    single = [f"{name}, by {by[0]}" for name, by in sorted(importers.items()) if len(by) == 1]
    measures = [Measure("modules imported by exactly one other", len(single), single)]
    found = circles(graph)
    for room in sorted({circle[0].partition(".")[0] for circle in found}):
        own = [" ".join(circle) for circle in found if circle[0].partition(".")[0] == room]
        measures.append(Measure(f"  import circles in {room}/", len(own), own, is_checked=False))
    # Modules are checked, not circles: cutting one large circle into two small ones is progress.
    in_circles = [" ".join(circle) for circle in found]
    measures.append(Measure("modules in import circles", sum(map(len, found)), in_circles))
    against = against_the_layers(graph)
    measures.append(Measure("imports of a higher layer in trainer/", len(against), against))
    listed = {name for layer in TRAINER_LAYERS for name in layer.split()}
    parts = {file.path.parts[1].removesuffix(".py") for file in files if file.room == "trainer"}
    unlisted = sorted(parts - listed - {"__init__"})
    return [*measures, Measure("parts of trainer/ that TRAINER_LAYERS leaves out", len(unlisted), unlisted)]


def types_and_texts(files: Sequence[Source]) -> list[Measure]:
    """Parameters whose type says nothing, and docstrings that say little."""
    annotated = parameters(files)
    public = [parameter for parameter in annotated if parameter.is_public]
    loose = [(parameter.path, parameter.line) for parameter in public if parameter.text.endswith(": Any")]
    share = round(100 * len(loose) / max(1, len(public)), 1)
    measures = [
        Measure("  annotated public parameters", len(public), is_checked=False),
        Measure("  share of them typed Any, percent", share, is_checked=False),
        Measure("public parameters typed Any", len(loose), _by_file(loose)),
    ]
    for text in ("trainer: Any", "module: Any", "run: Any"):
        places = [(parameter.path, parameter.line) for parameter in annotated if parameter.text == text]
        measures.append(Measure(f"parameters `{text}`", len(places), _by_file(places)))
    brief = []
    for file in files:
        for node in [file.tree, *(node for node, is_public in definitions(file.tree) if is_public)]:
            docstring = ast.get_docstring(node)
            if docstring is not None and len(docstring.split()) <= SHORT_DOCSTRING:
                brief.append((file.path, getattr(node, "lineno", 1)))
    return [*measures, Measure(f"public docstrings of {SHORT_DOCSTRING} words or fewer", len(brief), _by_file(brief))]


def measure(root: Path) -> list[Measure]:
    """All measures of the package at `root`."""
    files = sources(root)
    return [*sizes(files), *file_names(files), *structure(files), *types_and_texts(files)]


def report_worse(measures: Sequence[Measure], stored: dict[str, float]) -> bool:
    """Print each checked number that got worse, with the worst places; returns whether there is any."""
    worse = [one for one in measures if one.is_checked and one.is_worse_than(stored.get(one.name, one.value))]
    for one in worse:
        print(f"worse: {one.name}: {stored[one.name]:,} -> {one.value:,}")
        for place in one.places[:SHOWN]:
            print(f"    {place}")
        if len(one.places) > SHOWN:
            print(f"    and {len(one.places) - SHOWN} more: `python scripts/house.py --places` lists them")
    return bool(worse)


def main() -> int:
    """Print, check or store; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the package")
    parser.add_argument("--stored", type=Path, default=ROOT / "scripts/house.json", help="file of stored numbers")
    parser.add_argument("--places", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    stored: dict[str, float] = json.loads(options.stored.read_text()) if options.stored.exists() else {}
    measures = measure(options.root)
    checked = {one.name: one.value for one in measures if one.is_checked}
    if options.store:
        if not options.force:
            if report_worse(measures, stored):
                print(
                    "Nothing was stored. `python scripts/house.py --store --force` stores these numbers all the same."
                )
                return 1
            checked = {name: min(value, stored.get(name, value)) for name, value in checked.items()}
        options.stored.write_text(json.dumps(checked, indent=2) + "\n")
    elif options.check:
        if missing := sorted(checked.keys() - stored.keys()):
            print(f"No number is stored for: {', '.join(missing)}. `python scripts/house.py --store` adds it.")
            return 1
        if report_worse(measures, stored):
            print("Make them better, or, if the change is worth it: `python scripts/house.py --store --force`.")
            return 1
        if any(value < stored[name] for name, value in checked.items()):
            print("Better than the stored numbers. `python scripts/house.py --store` keeps it so.")
    else:
        for one in measures:
            print(f"{one.name:<56}{one.value:>8,}{f'   stored: {stored[one.name]:,}' if one.name in stored else ''}")
            for place in one.places if options.places else ():
                print(f"        {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
