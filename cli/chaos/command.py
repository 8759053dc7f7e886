"""The command: rounds of all faults until the time is over, a table of what survived, a file with every injection."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from flashtask._version import __version__
from flashtask.cli.chaos.faults import FAULTS, Fault, Injection, NotInjectedError, References, Trial
from flashtask.cli.chaos.subjects import Flashtask, Lightning, Material, Subject
from flashtask.cli.output import require_creatable
from flashtask.core.errors import OutputError, UsageError
from flashtask.trainer.text_table import text_table, wrapped

__all__ = ["Chaos", "at_least", "chaos"]

MINUTES = 10.0
#: A survival rate below the bound would give so few failures in fewer than one of 40 such experiments.
CONFIDENCE = 0.975
#: Times that a fault is tried which came too late.
_TRIES = 5
_LOG = "injections.jsonl"


def chaos(params: Mapping[str, Any]) -> None:
    """Run the command; on Ctrl-C what has been found is shown before it ends.

    Args:
        params: its options.

    Raises:
        UsageError: this is no Linux.
        OutputError: the folder is taken, or cannot be created.
        click.exceptions.Exit: with 1, if flashtask did not survive a fault.
    """
    if not Path("/proc/self/environ").exists():
        raise UsageError(
            "`flashtask chaos` needs Linux", why="it finds processes in /proc and limits their files with prlimit"
        )
    seed = random.SystemRandom().randrange(10**9) if params["seed"] is None else params["seed"]
    folder = Path(params["output_dir"] or f"chaos-{seed}").absolute()
    require_creatable(folder)
    if (folder / _LOG).exists():
        raise OutputError(f"{folder} already holds injections", fix="another --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    material = Material(folder / "material", seed)
    material.write()
    subjects: list[Subject] = [Flashtask(material, (sys.executable, "-m", "flashtask"))]
    if Lightning.version() is not None:
        subjects.append(Lightning.of(material))
    found = Chaos(folder, seed, subjects)
    click.echo(f"seed {seed}; every injection is written to {folder / _LOG}", err=True)
    interrupted: KeyboardInterrupt | None = None
    try:
        found.run_for(60 * (params["minutes"] or MINUTES))
    except KeyboardInterrupt as interrupt:
        interrupted = interrupt
    click.echo(json.dumps(_as_json(found)) if params["json"] else "\n".join(_lines(found)))
    if interrupted is not None:
        raise interrupted
    if any(one.problems for one in found.injections if one.subject == Flashtask.name):
        raise click.exceptions.Exit(1)


class Chaos:
    """Faults into subjects, and what became of them.

    Args:
        folder: what is written goes there; of a fault that was survived only its line in `injections.jsonl` stays.
        seed: decides the moment and place of every fault.
        subjects: programs into which they are injected.
        faults: which.
    """

    def __init__(self, folder: Path, seed: int, subjects: Sequence[Subject], faults: Sequence[Fault] = FAULTS) -> None:
        self.folder, self.seed, self.subjects, self.faults = folder, seed, subjects, faults
        self.injections: list[Injection] = []
        self._references = References(folder)
        self._lock = threading.Lock()

    def run_for(self, seconds: float) -> None:
        """One round of all faults, then further ones until the time is over; side by side, one for each core."""
        deadline, is_over = time.monotonic() + seconds, threading.Event()

        def work(number: int, fault: Fault, subject: Subject) -> None:
            if not is_over.is_set() and (number == 0 or time.monotonic() < deadline):
                self.inject(number, fault, subject)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            try:
                number = 0
                while number == 0 or time.monotonic() < deadline:
                    for done in [pool.submit(work, number, *pair) for pair in self._pairs()]:
                        done.result()
                    number += 1
            except BaseException:
                is_over.set()
                raise

    def _pairs(self) -> Iterator[tuple[Fault, Subject]]:
        for fault in self.faults:
            for subject in self.subjects:
                if fault.is_for_all or isinstance(subject, Flashtask):
                    yield fault, subject

    def inject(self, number: int, fault: Fault, subject: Subject) -> Injection | None:
        """One fault.

        Args:
            number: of this fault and subject; with the seed it decides the moment.
            fault: what is injected.
            subject: into which program.

        Returns:
            What became of it; None if the run was over too early, again and again.
        """
        for attempt in range(_TRIES):
            name = f"{subject.name} {self.faults.index(fault)} {number} {attempt}"
            seed = f"{self.seed} {name}"
            record = Injection(fault.name, subject.name, number, seed)
            folder = self.folder / name.replace(" ", "-")
            folder.mkdir()
            try:
                fault.inject(Trial(subject, self._references, folder, random.Random(seed), record))
            except NotInjectedError:
                shutil.rmtree(folder)
                continue
            except Exception as error:
                record.problems.append(f"{type(error).__name__}: {error}")
            if not record.problems:
                record.survived = record.count
                shutil.rmtree(folder)
            self._write_down(record)
            return record
        return None

    def _write_down(self, record: Injection) -> None:
        with self._lock:
            self.injections.append(record)
            with (self.folder / _LOG).open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")

    def counts(self, fault: Fault, subject: str) -> tuple[int, int]:
        """How many of a fault were injected into a subject, and how many of these it survived."""
        some = [one for one in self.injections if (one.fault, one.subject) == (fault.name, subject)]
        return sum(one.count for one in some), sum(one.survived for one in some)


def at_least(survived: int, injected: int, confidence: float = CONFIDENCE) -> float:
    """The rate that is survived at the least (Clopper and Pearson, one-sided).

    Args:
        survived: of the faults.
        injected: number of faults.
        confidence: probability that the true rate is not below.
    """
    if survived == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(survived, injected, middle) < 1 - confidence else (low, middle)
    return low


def _probability(at_least: int, count: int, rate: float) -> float:
    """Of at least so many successes."""
    ways = (
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(at_least, count + 1)
    )
    return math.fsum(
        math.exp(way + k * math.log(rate) + (count - k) * math.log1p(-rate))
        for k, way in enumerate(ways, start=at_least)
    )


def _lines(found: Chaos) -> Iterator[str]:
    peer = Lightning.version()
    yield f"flashtask {__version__}, torch {version('torch')}, lightning {peer or '(not installed)'}, seed {found.seed}"
    yield ""
    rows = []
    for fault in found.faults:
        injected, survived = found.counts(fault, Flashtask.name)
        bound = f"{100 * at_least(survived, injected):.1f} %" if injected else ""
        rows.append((fault.name, str(injected), str(survived), bound, _of_peer(found, fault, peer)))
    yield from text_table(("fault", "injected", "survived", "at least", "lightning"), rows).splitlines()
    yield ""
    yield from wrapped(
        "survived: the run ended as documented, no file was lost or half written, and the resumed run has the same "
        f"bits as one without faults; at least: of such faults, with {100 * CONFIDENCE:g} % confidence"
    )
    if missed := [fault.name for fault in found.faults if not found.counts(fault, Flashtask.name)[0]]:
        yield from wrapped(f"not injected, as the runs came too soon to their end: {'; '.join(missed)}")
    for one in found.injections:
        if one.problems and one.subject == Flashtask.name:
            yield from wrapped(f"{one.fault} ({one.injected}; {one.seed}): {'; '.join(one.problems)}")


def _of_peer(found: Chaos, fault: Fault, peer: str | None) -> str:
    if not fault.is_for_all:
        return "not tried"
    if peer is None:
        return "not installed"
    injected, survived = found.counts(fault, Lightning.name)
    return f"{survived} of {injected}"


def _as_json(found: Chaos) -> dict[str, Any]:
    rows = []
    for fault in found.faults:
        for subject in found.subjects:
            injected, survived = found.counts(fault, subject.name)
            row = {"fault": fault.name, "subject": subject.name, "injected": injected, "survived": survived}
            rows.append(row | {"at_least": round(at_least(survived, injected), 4)})
    return {
        "seed": found.seed,
        "versions": {"flashtask": __version__, "torch": version("torch"), "lightning": Lightning.version()},
        "confidence": CONFIDENCE,
        "rows": [row for row in rows if row["injected"]],
        "problems": [asdict(one) for one in found.injections if one.problems],
        "log": str(found.folder / _LOG),
    }
