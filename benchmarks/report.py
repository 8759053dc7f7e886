"""What came out, as a table, a picture and numbers: medians, spread, ratios to flashtask, accuracy, versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

from setup import Setup

__all__ = ["known", "line", "write"]

_TITLES = {
    "frozen5": ("Frozen finetuning, 5 epochs", "s"),
    "frozen10": ("Frozen finetuning, 10 epochs", "s"),
    "again": ("Frozen finetuning again, 10 epochs at another rate", "s"),
    "full": ("Full finetuning, 1 epoch", "images/s"),
    "overhead": ("A step of a very small network", "us"),
    "predict": ("Prediction of a folder", "s"),
    "photos": ("Prediction of large photographs (4000 x 3000)", "s"),
    "startup": ("Start-up: the first import", "s"),
}


def value_of(result: dict[str, Any]) -> float:
    """The number of a run in the unit of its work."""
    if result["work"] == "full":
        return float(result["items"] / result["seconds"])
    if result["work"] == "overhead":
        return float(result["seconds"] / result["items"] * 1e6)
    if result["work"] == "again":
        return float(result["process_seconds"])
    return float(result["seconds"])


def line(result: dict[str, Any]) -> str:
    """A line for the terminal."""
    said = result.get("error") or f"{value_of(result):.4g} {_TITLES[result['work']][1]}"
    return f"{result['work']:<9} round {result['round'] + 1}  {result['player']:<20} {said}"


def known(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The commands and results that `write` has left in a folder."""
    content = json.loads((folder / "results.json").read_text())
    return content["commands"], content["results"]


def write(
    folder: Path, results: list[dict[str, Any]], versions: dict[str, str], setup: Setup, commands: list[str]
) -> None:
    """Write `results.json`, `table.md` and `picture.png`.

    Args:
        folder: made if it is not there.
        results: one dictionary a run.
        versions: of the players.
        setup: what they were given.
        commands: the arguments of each command that they come from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = _facts(versions, commands)
    (folder / "results.json").write_text(
        json.dumps({"facts": facts, "commands": commands, "results": results}, indent=1) + "\n"
    )
    works: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in sorted(results, key=lambda one: list(_TITLES).index(one["work"])):
        works[result["work"]][result["player"]].append(result)
    pages = ["# Measured", "", *(f"- {name}: {value}" for name, value in facts.items())]
    pages.append(f"- network: {setup.backbone}, batches of {setup.batch_size}, AdamW")
    for work, players in works.items():
        pages += ["", f"## {_TITLES[work][0]}", "", *_table(work, players)]
    (folder / "table.md").write_text("\n".join(pages) + "\n")
    _draw(folder / "picture.png", works)


def _facts(versions: dict[str, str], commands: list[str]) -> dict[str, str]:
    import torch

    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {_processor()}",
        "command": "; ".join(f"python benchmarks/run.py {given}".strip() for given in commands),
        "versions": ", ".join([f"Python {platform.python_version()}", f"torch {torch.__version__}"])
        + "".join(f", {name} {version}" for name, version in versions.items() if name != "by hand"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((text.partition(":")[2].strip() for text in lines if text.startswith("model name")), "unknown")


def _table(work: str, players: dict[str, list[dict[str, Any]]]) -> list[str]:
    unit = _TITLES[work][1]
    rows = [f"| player | median ({unit}) | least to most | to flashtask | accuracy | whole process (s) | peak memory |"]
    rows.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    good = {name: [r for r in results if "error" not in r] for name, results in players.items()}
    own = statistics.median(map(value_of, good["flashtask"])) if good.get("flashtask") else None
    for name, results in players.items():
        if not good[name]:
            rows.append(f"| {name} | failed: {results[-1]['error'][:80].replace('|', '/')} | | | | | |")
            continue
        values = sorted(map(value_of, good[name]))
        median = statistics.median(values)
        ratio = "" if own is None else f"{own / median if unit == 'images/s' else median / own:.2f}x"
        cells = [name, f"{median:.3g}", f"{values[0]:.3g} to {values[-1]:.3g}", ratio]
        rows.append(f"| {' | '.join([*cells, *_more(good[name])])} |")
    return rows


def _more(results: list[dict[str, Any]]) -> list[str]:
    accuracies = [r["accuracy"] for r in results if r.get("accuracy") is not None]
    peaks = [r["peak_bytes"] for r in results if "peak_bytes" in r]
    return [
        f"{statistics.median(accuracies):.4f}" if accuracies else "",
        f"{statistics.median(r['process_seconds'] for r in results):.3g}",
        f"{statistics.median(peaks) / 2**20:.0f} MiB" if peaks else "",
    ]


def _draw(path: Path, works: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """A panel a work that several have done: a bar a player at its median, a line from the least to the most."""
    works = {work: players for work, players in works.items() if len(players) > 1} or works
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 1.9 * len(works)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(works), 1, squeeze=False)[:, 0]
    for panel, (work, players) in zip(panels, works.items(), strict=True):
        values = {
            name: [value_of(r) for r in results if "error" not in r] for name, results in reversed(players.items())
        }
        values = {name: found for name, found in values.items() if found}
        medians = [statistics.median(found) for found in values.values()]
        colours = ["tab:orange" if name == "flashtask" else "tab:blue" for name in values]
        panel.barh(list(values), medians, color=colours)
        for place, found in enumerate(values.values()):
            panel.plot([min(found), max(found)], [place, place], color="black", linewidth=1)
        title, unit = _TITLES[work]
        panel.set_title(f"{title} ({unit}; {'more' if unit == 'images/s' else 'less'} is better)", fontsize=10)
    figure.savefig(path, dpi=100)
