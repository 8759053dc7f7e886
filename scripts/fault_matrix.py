"""Injects faults into training with two processes, from outside, and writes down what became of each run.

python scripts/fault_matrix.py --out faults [--only C1] [--count 60]; what is in faults/results.jsonl is not done again.

C1  SIGKILL of a process       all are gone in 10 s, the error names it; a resume ends with the bits of a run without it
C2  SIGSTOP of a process       the others leave their stacks, name it and end it; resume as above
C3  SIGKILL of the launcher    nobody is left after 5 s, with two data workers for each process; resume as above
A8  SIGKILL under torchrun --max-restarts=3    it finishes by itself, with the same bits
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

JOB = Path(__file__).with_name("fault_job.py")
STEPS = 44
FROZEN_AFTER = 3.0
COUNTS = {"C1": 60, "C2": 10, "C3": 20, "A8": 10}
#: what stands before the script's name
LAUNCHERS = {
    "ddp": (),
    "ddp_spawn": (),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
}


@dataclass
class Injection:
    """One fault and what became of it.

    Args:
        kind: C1, C2, C3 or A8.
        number: of this kind.
        launcher: who started the processes.
        rank: the process that was hit; -1 for torchrun's agent.
        step: of the run at that time.
        in_save: whether it was writing a checkpoint at that time; only looked at by every other C2.
        seconds: until everybody was gone.
        code: exit code of what was started.
        is_equal: whether the resumed run ended with the bits of one without faults.
        problems: what did not hold.
    """

    kind: str
    number: int
    launcher: str
    rank: int = 0
    step: int = 0
    in_save: bool = False
    seconds: float = 0.0
    code: int | None = None
    is_equal: bool = False
    problems: list[str] = field(default_factory=list)


class Run:
    """A training run as a user starts it, with a mark in the environment by which its processes are found."""

    def __init__(self, folder: Path, launcher: str, *arguments: str, restarts: int = 0) -> None:
        self.folder, self.token = folder, uuid.uuid4().hex
        before = [*LAUNCHERS[launcher], *(["--max-restarts", str(restarts)] if restarts else [])]
        strategy = ["--strategy", "ddp" if LAUNCHERS[launcher] else launcher]
        self.errors = folder / f"stderr-{self.token[:8]}.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *before, str(JOB), str(folder), *strategy, *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", "FAULT_TOKEN": self.token},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def alive(self) -> list[int]:
        """Its processes that have not ended."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = f"FAULT_TOKEN={self.token}".encode() in (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if is_ours and state not in "ZX":
                found.append(int(entry.name))
        return found

    def place(self, rank: int) -> tuple[int, int] | None:
        """Pid and step that a process wrote down last."""
        try:
            pid, step, _ = (self.folder / f"steps-{rank}.log").read_text().splitlines()[-1].split()
        except (OSError, IndexError, ValueError):
            return None
        return int(pid), int(step)

    def wait_for_step(self, step: int, rank: int) -> tuple[int, int]:
        """Wait until a process has come to a step; its pid and the step."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if (place := self.place(rank)) is not None and place[1] >= step:
                return place
            time.sleep(0.005)
        raise RuntimeError(f"no step {step} of process {rank}: {self.errors.read_text()[-2000:]}")

    def wait_until_gone(self, seconds: float) -> float:
        """Wait until none of its processes is alive, and how long that took."""
        start = time.monotonic()
        while time.monotonic() < start + seconds and (self.process.poll() is None or self.alive()):
            time.sleep(0.02)
        return time.monotonic() - start

    def end(self) -> None:
        """Leave nothing behind, whatever happened."""
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def weights(folder: Path) -> bytes:
    """What the run ended with: the bytes of the file, whose content depends on the weights alone."""
    return (folder / "weights-0.pt").read_bytes()


def finished(folder: Path, launcher: str, *arguments: str) -> bytes | None:
    """Run to the end; the weights, or None if it failed."""
    run = Run(folder, launcher, *arguments)
    try:
        run.process.wait(120)
        return weights(folder) if run.process.returncode == 0 else None
    finally:
        run.end()


def killed(one: Injection, folder: Path, chance: random.Random) -> None:
    """C1."""
    run = Run(folder, one.launcher, "--pause", "0.04")
    try:
        _hit(one, run, chance, signal.SIGKILL)
        one.seconds = run.wait_until_gone(30)
        one.code = run.process.poll()
        _require(one, one.seconds <= 10, f"not gone after {one.seconds:.1f} s")
        said = run.errors.read_text()
        if not (one.rank == 0 and one.launcher != "torchrun"):  # else it was what the user had started
            for word in (f"process {one.rank} was ended by SIGKILL", "at step", "memory"):
                _require(one, word in said, f"{word!r} was not said")
            _require(one, one.code == 1, f"exit code {one.code}")
    finally:
        run.end()


def frozen(one: Injection, folder: Path, chance: random.Random) -> None:
    """C2; every other time while a checkpoint is written."""
    run = Run(folder, one.launcher, "--pause", "0.04", "--frozen-after", str(FROZEN_AFTER))
    try:
        if one.number % 2:
            _stop_in_save(one, run, chance)
            _require(one, one.in_save, "no save was hit")
        else:
            _hit(one, run, chance, signal.SIGSTOP)
        one.seconds = run.wait_until_gone(60)
        one.code = run.process.poll()
        _require(one, one.seconds <= FROZEN_AFTER + 10, f"not gone after {one.seconds:.1f} s")
        _require(one, f"process {one.rank} of 2" in run.errors.read_text(), "the frozen process was not named")
        _require(one, (folder / "run" / f"stacks-{1 - one.rank}.txt").exists(), "no stacks")
        own = {"torchrun": 1}.get(one.launcher, 71 if one.rank else -signal.SIGKILL)
        _require(one, one.code == own, f"exit code {one.code}")
    finally:
        run.end()


def without_launcher(one: Injection, folder: Path, chance: random.Random) -> None:
    """C3."""
    memory = set(os.listdir("/dev/shm"))
    run = Run(folder, one.launcher, "--pause", "0.04", "--workers", "2")
    try:
        _, one.step = run.wait_for_step(chance.randrange(1, STEPS - 4), 0)
        one.rank = -1 if one.launcher == "torchrun" else 0
        while len(started := set(run.alive())) < 6 and run.process.poll() is None:
            time.sleep(0.005)  # between two epochs there are no data workers
        os.kill(run.process.pid, signal.SIGKILL)
        one.seconds = run.wait_until_gone(30)
        one.code = run.process.poll()
        _require(one, len(started) >= 6, f"only {len(started)} processes ran")
        _require(one, one.seconds <= 5, f"{len(run.alive())} of them after {one.seconds:.1f} s")
        left = [name for name in set(os.listdir("/dev/shm")) - memory if any(str(pid) in name for pid in started)]
        _require(one, not left, f"left in /dev/shm: {left}")
    finally:
        run.end()


def restarted(one: Injection, folder: Path, chance: random.Random) -> None:
    """A8."""
    run = Run(folder, "torchrun", "--pause", "0.04", restarts=3)
    try:
        _hit(one, run, chance, signal.SIGKILL)
        one.seconds = run.wait_until_gone(120)
        one.code = run.process.poll()
        _require(one, one.code == 0, f"exit code {one.code}")
    finally:
        run.end()


KINDS: dict[str, Callable[[Injection, Path, random.Random], None]] = {
    "C1": killed,
    "C2": frozen,
    "C3": without_launcher,
    "A8": restarted,
}


def _hit(one: Injection, run: Run, chance: random.Random, what: signal.Signals) -> None:
    """At a random step, and a random moment of it."""
    one.rank = chance.randrange(2)
    pid, _ = run.wait_for_step(chance.randrange(1, STEPS - 4), one.rank)
    time.sleep(chance.random() * 0.05)
    place = run.place(one.rank)
    assert place is not None
    one.step = place[1]
    os.kill(pid, what)


def _stop_in_save(one: Injection, run: Run, chance: random.Random) -> None:
    """While process 0 has the file of a checkpoint open beside the one that it will replace."""
    pid, _ = run.wait_for_step(chance.randrange(1, STEPS // 2), 0)
    folder = run.folder / "run"
    while run.process.poll() is None and not one.in_save:
        if _is_saved_into(folder):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.01)
            one.in_save = _is_saved_into(folder)
            if not one.in_save:  # it was done in between
                os.kill(pid, signal.SIGCONT)
    place = run.place(0)
    assert place is not None
    one.rank, one.step = 0, place[1]


def _is_saved_into(folder: Path) -> bool:
    return folder.exists() and any(".partial-" in entry.name for entry in os.scandir(folder))


def _require(one: Injection, holds: bool, problem: str) -> None:
    if not holds:
        one.problems.append(problem)


def inject(kind: str, number: int, out: Path, seed: str, expected: dict[str, bytes]) -> Injection:
    """One fault, and the resume after it.

    Args:
        kind: of the fault.
        number: of this kind; with the seed it decides process and moment.
        out: where runs are written.
        seed: of the whole matrix.
        expected: launcher -> the weights of a run without faults.
    """
    chance = random.Random(f"{seed} {kind} {number}")
    launcher = "torchrun" if kind == "A8" else list(LAUNCHERS)[number % len(LAUNCHERS)]
    one, folder = Injection(kind, number, launcher), out / f"{kind}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if launcher not in expected:
        (out / launcher).mkdir(exist_ok=True)
        shutil.rmtree(out / launcher / "run", ignore_errors=True)
        found = finished(out / launcher, launcher)
        assert found is not None, f"the run without faults failed in {out / launcher}"
        expected[launcher] = found
    try:
        KINDS[kind](one, folder, chance)
        ended = weights(folder) if kind == "A8" else finished(folder, launcher, "--resume")
        one.is_equal = ended == expected[launcher]
        _require(one, one.is_equal, "the resume failed" if ended is None else "other weights after the resume")
    except Exception as error:
        one.problems.append(f"{type(error).__name__}: {error}")
    if not one.problems:
        shutil.rmtree(folder)
    return one


def table(rows: Sequence[Injection]) -> str:
    """Counts by kind and launcher."""
    lines = ["kind  launcher    faults  held  same bits  seconds until all were gone: median, most"]
    for kind in COUNTS:
        for launcher in LAUNCHERS:
            some = [row for row in rows if (row.kind, row.launcher) == (kind, launcher)]
            if some:
                took = sorted(row.seconds for row in some)
                held, equal = sum(not row.problems for row in some), sum(row.is_equal for row in some)
                times = f"{took[len(took) // 2]:6.1f} {took[-1]:6.1f}"
                lines.append(f"{kind:5} {launcher:10} {len(some):7} {held:5} {equal:10}  {times}")
    return "\n".join(lines)


def main() -> None:
    """Go through the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("faults"))
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--count", type=int, help="faults of each kind; by default " + str(COUNTS))
    parser.add_argument("--seed", default="0", help="decides which process is hit when")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    results, expected = options.out / "results.jsonl", dict[str, bytes]()
    lines = results.read_text().splitlines() if results.exists() else []
    rows = [Injection(**json.loads(line)) for line in lines]
    for kind in options.only or KINDS:
        done = {row.number for row in rows if row.kind == kind}
        for number in range(options.count or COUNTS[kind]):
            if number in done:
                continue
            rows.append(inject(kind, number, options.out, options.seed, expected))
            with results.open("a") as file:
                file.write(json.dumps(asdict(rows[-1])) + "\n")
            print(json.dumps(asdict(rows[-1])), flush=True)
    print(table(rows))
    sys.exit(1 if any(row.problems for row in rows) else 0)


if __name__ == "__main__":
    main()
