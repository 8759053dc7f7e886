"""Every work on flashtask, on a loop by hand and on every peer that is installed, in turn, several times.

    python benchmarks/run.py                      everything; an hour or more on two cores
    python benchmarks/run.py frozen --rounds 3    one work
    python benchmarks/run.py --quick              a few minutes: does it run at all

Each run is a process of its own. The players take turns within a round, so that what else the machine does meets all
of them. Writes `table.md`, `picture.png` and `results.json` into a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import material  # noqa: E402
import report  # noqa: E402
from players import PLAYERS, installed  # noqa: E402
from setup import Setup  # noqa: E402

WORKS = ("frozen5", "frozen10", "again", "full", "overhead", "predict", "photos", "startup")
#: With a small network and few images, so that all works are through in minutes.
_QUICK: dict[str, Any] = {"backbone": "timm/test_efficientnet", "pretrained": False, "steps": 50}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; all if none is given")
    parser.add_argument("--players", nargs="+", choices=list(PLAYERS), help="all that are installed if not given")
    parser.add_argument("--rounds", type=int, default=None, help="5, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="a small network and few images")
    parser.add_argument("--tuned", action="store_true", help="also peers with bfloat16, where they document it")
    parser.add_argument("--train", type=int, help="images to train on: 640")
    parser.add_argument("--val", type=int, help="images to validate on: 160")
    parser.add_argument("--predict", type=int, help="images to predict: 2624")
    parser.add_argument("--photos", type=int, help="large photographs: 100")
    parser.add_argument("--threads", type=int, default=None, help="of torch; all cores if not given")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images for the peers")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds after which a run counts as failed")
    parser.add_argument("--add", action="store_true", help="to the results that the output folder holds already")
    parser.add_argument("--output", type=Path, default=Path("demo/bench"), help="where to write")
    options = parser.parse_args(given)
    if unknown := set(options.works) - set(WORKS):
        parser.error(f"no work named {', '.join(sorted(unknown))}; there are: {', '.join(WORKS)}")
    return options


def main(given: list[str] | None = None) -> int:
    """Run, and write what came out; 1 if a run failed."""
    options = arguments(given)
    sizes = (24, 8, 40, 4) if options.quick else (640, 160, 2624, 100)
    named = (options.train, options.val, options.predict, options.photos)
    train, val, predict, photos = (own or usual for own, usual in zip(named, sizes, strict=True))
    place = options.output.resolve() / "-".join(
        ["quick" if options.quick else "data", *map(str, (train, val, predict, photos))]
    )
    quick = _QUICK if options.quick else {}
    setup = Setup(str(place), threads=options.threads or len(os.sched_getaffinity(0)), workers=options.workers, **quick)
    material.make(
        place,
        train=train,
        val=val,
        all_images=predict,
        photos=photos if "photos" in (options.works or WORKS) else 0,
        backbone=setup.backbone,
        pretrained=setup.pretrained,
    )
    versions = installed()
    names = options.players or list(versions)
    rounds = options.rounds or (1 if options.quick else 5)
    commands, results = report.known(options.output) if options.add else ([], [])
    commands.append(shlex.join(sys.argv[1:] if given is None else given))
    for work in options.works or WORKS:
        for number in range(rounds):
            # Nobody but flashtask keeps anything for a second run.
            for name, one in _settings(
                ["flashtask"] if work == "again" else names, replace(setup, seed=number), tuned=options.tuned, work=work
            ):
                result = {"work": work, "player": name, "round": number, **_measure(work, name, one, options.timeout)}
                results.append(result)
                print(report.line(result), flush=True)
                # Written after each run: what is there already is not lost when the rest is stopped.
                report.write(options.output, results, versions, setup, commands)
    return int(any("error" in result for result in results))


def _settings(names: list[str], setup: Setup, *, tuned: bool, work: str) -> Iterator[tuple[str, Setup]]:
    """Players in the order of a round; `NAME, tuned` is a peer with bfloat16 and channels-last."""
    for name in names:
        yield name, setup
        if tuned and PLAYERS[name].can_tune and work not in ("overhead", "startup"):
            yield f"{name}, tuned", replace(setup, tuned=True)


def _measure(work: str, name: str, setup: Setup, timeout: int) -> dict[str, Any]:
    """One run, with a cache of its own, so that no run finds what another left; `again` is the second of two."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "FLASHTASK_CACHE": cache}
        if work == "again":
            _run("frozen10", name, setup, timeout, environment)
            setup = replace(setup, rate=2 * setup.rate)
        return _run(work, name, setup, timeout, environment)


def _run(work: str, name: str, setup: Setup, timeout: int, environment: dict[str, str]) -> dict[str, Any]:
    """One process: what it says, and how long it took from outside."""
    player = PLAYERS[name.removesuffix(", tuned")]
    if work == "startup":
        command = [sys.executable, "-c", player.start]
    else:
        setup = replace(setup, epochs={"frozen5": 5, "frozen10": 10, "again": 10}.get(work, 1))
        setup = replace(setup, rate=1e-3) if work == "full" else setup
        kind = "frozen" if work.startswith("frozen") or work == "again" else work
        command = [sys.executable, str(HERE / "one.py"), kind, player.module, setup.to_json()]
    environment = {**environment, "OMP_NUM_THREADS": str(setup.threads), "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout} s"}
    seconds = time.perf_counter() - start
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    if work == "startup":
        return {"seconds": seconds, "items": 1, "process_seconds": seconds}
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
