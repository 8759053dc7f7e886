"""What a second process brings, how much of a step is communication, and a model of what more of them would cost.

    python benchmarks/scaling.py [--rounds 3] [--networks NAME ...] [--output FOLDER]

One process on all cores, one on its share of them, and one process for each share, in turn; the batch of all processes
together is the same. Writes `scaling.json` and `scaling.md`; measurements and the model stand in tables of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NETWORKS = ("efficientnet_lite0", "resnet50")
#: Of the bytes of all gradients, those that are exchanged when the backward pass is over already: the last bucket of
#: DistributedDataParallel, which is filled from the output on. Its first bucket has 1 MiB, the others have 25.
BUCKET = 25 * 2**20
#: Of forward and backward, the part that is backward: it computes two products where forward computes one.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class Wire:
    """How long an exchange takes: `latency` seconds for each of the 2 (N - 1) messages of a ring, and bytes a second.

    Args:
        latency: seconds.
        bandwidth: bytes a second.
    """

    latency: float
    bandwidth: float

    def exchange(self, size: float, processes: int) -> float:
        """Seconds of a ring all-reduce of so many bytes (Patarasuk and Yuan, 2009)."""
        passes = 2 * (processes - 1)
        return passes * (self.latency + size / processes / self.bandwidth)


def fitted(exchanges: Mapping[int, float]) -> Wire:
    """Latency from the smallest exchange of two processes, bandwidth from the largest.

    Args:
        exchanges: bytes -> seconds.
    """
    sizes = sorted(exchanges)
    latency = exchanges[sizes[0]] / 2
    largest = sizes[-1]
    return Wire(latency, largest / max(exchanges[largest] - 2 * latency, 1e-9))


def modelled(compute: float, backward: float, size: int, processes: int, wire: Wire) -> float:
    """Seconds of a step: what is computed, and what of the exchange the backward pass does not cover.

    Args:
        compute: seconds of a step without an exchange.
        backward: seconds of its backward pass.
        size: bytes of all gradients.
        processes: how many.
        wire: between them.
    """
    if processes == 1:
        return compute
    whole, last = wire.exchange(size, processes), wire.exchange(min(size, BUCKET), processes)
    return compute + max(last, whole - backward)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="of timm")
    parser.add_argument("--processes", type=int, default=2, help="on this machine")
    parser.add_argument("--batch", type=int, default=32, help="of all processes together")
    parser.add_argument("--steps", type=int, default=8, help="that are measured in each run, twice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("demo/scaling"))
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Measure in turn, and write what came out."""
    options = arguments(given)
    share = max(1, len(os.sched_getaffinity(0)) // options.processes)
    kinds = [(1, share * options.processes), (1, share), (options.processes, share)]
    runs = []
    for number in range(options.rounds):
        for network in options.networks:
            for processes, threads in kinds:
                # One process on a share of the cores has a share of the batch: what one of several has to compute.
                batch = options.batch if (processes, threads) == kinds[0] else options.batch // options.processes
                runs.append(_run(network, processes, threads, batch, options.steps))
                seconds = statistics.median(runs[-1]["step"])
                print(
                    f"round {number + 1}  {network:<20} {processes} x {threads} threads  {seconds:.3f} s a step",
                    flush=True,
                )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scaling.json").write_text(json.dumps(runs) + "\n")
    text = report(runs, options.processes, share)
    (options.output / "scaling.md").write_text(text)
    print(text)
    return 0


def _run(network: str, processes: int, threads: int, batch: int, steps: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "scaling_run.py"), network, *map(str, (processes, threads, batch, steps))]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(runs: list[dict[str, Any]], processes: int, share: int) -> str:
    """Two tables: what was measured, and what the model says."""
    measured, model, checks = [], [], []
    for network in dict.fromkeys(run["network"] for run in runs):
        of_network = [run for run in runs if run["network"] == network]
        whole, alone, several = (
            [run for run in of_network if (run["processes"], run["threads"]) == kind]
            for kind in ((1, share * processes), (1, share), (processes, share))
        )
        measured += _measured(network, whole, alone, several)
        model_rows, check = _model(network, alone, several)
        model += model_rows
        checks.append(check)
    return "\n".join([_head(), *_MEASURED_HEAD, *measured, "", *_MODEL_HEAD, *checks, "", *_LARGER_HEAD, *model, ""])


def _over(runs: list[dict[str, Any]], name: str) -> float:
    """The median over the steps of all rounds."""
    return statistics.median([second for run in runs for second in run[name]])


def _exposed(several: list[dict[str, Any]]) -> float:
    return _over(several, "forward_backward_exchanging") - _over(several, "forward_backward_alone")


def _exchanges(several: list[dict[str, Any]]) -> dict[int, float]:
    sizes = several[0]["exchanges"]
    return {int(size): statistics.median([run["exchanges"][size] for run in several]) for size in sizes}


_MEASURED_HEAD = [
    "## Measured",
    "",
    "| network | processes x threads | batch of each | s/step | images/s | against 1 | exchange alone | not covered |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
]


def _measured(network: str, *kinds: list[dict[str, Any]]) -> list[str]:
    rows = []
    base = None
    for runs in kinds:
        run, step = runs[0], _over(runs, "step")
        speed = run["processes"] * run["batch"] / step
        base = base or speed
        exchange = share = ""
        if run["processes"] > 1:
            alone = _exchanges(runs)[run["gradient_bytes"]]
            exchange = f"{alone * 1e3:.1f} ms ({run['gradient_bytes'] / 1e6:.0f} MB)"
            share = f"{_exposed(runs) * 1e3:.1f} ms, {100 * _exposed(runs) / step:.1f} % of a step"
        rows.append(
            f"| {network} | {run['processes']} x {run['threads']} | {run['batch']} | {step:.3f} | {speed:.1f} "
            f"| {speed / base:.2f} | {exchange} | {share} |"
        )
    return rows


_MODEL_HEAD = [
    "## The model, and how far it is off",
    "",
    "A step of one process on its share of the cores, measured alone, and the exchange that the model adds to it,",
    "against the step of several processes that was measured.",
    "",
    "| network | step of 1 process | model of the step | measured | off by |",
    "| --- | --- | --- | --- | --- |",
]
_LARGER_HEAD = [
    "## Larger worlds: the model alone",
    "",
    "Nothing of this table was measured but the step of one process. Efficiency is the speed against as many",
    "processes that need no exchange. The wires: as measured here between two processes, and two that are assumed.",
    "",
    "| network | processes | as here | 10 Gbit/s, 50 us | 100 Gbit/s, 10 us |",
    "| --- | --- | --- | --- | --- |",
]


def _model(network: str, alone: list[dict[str, Any]], several: list[dict[str, Any]]) -> tuple[list[str], str]:
    compute, size = _over(alone, "step"), several[0]["gradient_bytes"]
    backward = _over(alone, "forward_backward_alone") * BACKWARD
    here = fitted(_exchanges(several))
    wires = (here, Wire(50e-6, 10e9 / 8), Wire(10e-6, 100e9 / 8))
    processes = several[0]["processes"]
    expected, found = modelled(compute, backward, size, processes, here), _over(several, "step")
    check = (
        f"| {network} | {compute:.3f} s | {expected:.3f} s | {found:.3f} s | {100 * (expected / found - 1):+.1f} % |"
    )
    rows = []
    for count in (4, 8, 16, 32):
        shares = (100 * compute / modelled(compute, backward, size, count, wire) for wire in wires)
        rows.append(f"| {network} | {count} | {' | '.join(f'{one:.1f} %' for one in shares)} |")
    return rows, check


def _head() -> str:
    import torch

    cores = len(os.sched_getaffinity(0))
    return (
        f"# Scaling, {date.today().isoformat()}\n\n"
        f"{cores} cores ({platform.machine()}), torch {torch.__version__}, Python {platform.python_version()}, "
        f"gloo over loopback, float32.\n`python benchmarks/scaling.py {' '.join(sys.argv[1:])}`\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
