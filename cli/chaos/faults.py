"""The faults: each is injected into one training run, which is then resumed and compared with a run without faults."""

from __future__ import annotations

import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flashtask.cli.chaos.subjects import FROZEN_AFTER, Flashtask, Process, Subject

__all__ = ["FAULTS", "Fault", "Injection", "NotInjectedError", "Reference", "References", "Trial"]

#: Seconds that a run may take at the most; a machine that does other work is slow.
_PATIENCE = 300.0
_STRACE = ("strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=fsync", "-o", os.devnull)
#: Damaged copies of a checkpoint that are looked at in one go.
COPIES = 32


class NotInjectedError(Exception):
    """The run ended, or had nothing to damage, before the fault could be injected: that proves nothing."""


@dataclass
class Injection:
    """One fault and what became of it.

    Args:
        fault: its name.
        subject: what it was injected into.
        number: of this fault and subject; with the seed it decides the moment.
        seed: from which the moment was drawn.
        injected: what was done.
        count: how many faults this was, for those that are injected into many copies of a file.
        survived: of these.
        codes: exit codes of the processes that were started, in their order; None for one that did not end.
        seconds: from the fault until all processes had ended.
        problems: what did not hold.
    """

    fault: str
    subject: str
    number: int
    seed: str
    injected: str = ""
    count: int = 1
    survived: int = 0
    codes: list[int | None] = field(default_factory=list)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """A run without faults.

    Args:
        folder: of the run.
        digest: of what it ended with.
        writes: how often it wrote `last.ckpt`.
        between: seconds between two of these, on average.
    """

    folder: Path
    digest: str
    writes: int
    between: float


class References:
    """Runs without faults, each made once.

    Args:
        folder: where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, str], Reference] = {}
        self._lock = threading.Lock()

    def get(self, subject: Subject, recipe: str) -> Reference:
        """The run of a subject and a recipe.

        Raises:
            RuntimeError: it fails even without a fault.
        """
        with self._lock:
            key = (subject.name, recipe)
            if key not in self._made:
                self._made[key] = self._make(subject, recipe)
            return self._made[key]

    def _make(self, subject: Subject, recipe: str) -> Reference:
        folder = self._folder / f"reference-{subject.name}-{recipe}"
        process = subject.start(folder, recipe)
        try:
            watch = _Writes(process, folder / "last.ckpt")
            times = []
            while watch.wait_for_another():
                times.append(time.monotonic())
            if (code := process.wait(_PATIENCE)) != 0 or not times:
                said = process.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{subject.name} ended with code {code} without any fault: {said}")
        finally:
            process.end()
        between = (times[-1] - times[0]) / max(1, len(times) - 1)
        return Reference(folder, subject.digest(folder), len(times), between)


class _Writes:
    """Notices each time that a file is replaced by a new one."""

    def __init__(self, process: Process, file: Path) -> None:
        self._process, self._file = process, file
        self._seen = self._stamp()

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self._file.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def wait_for_another(self) -> bool:
        """Wait for the next; False if the process ends before."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            is_over = self._process.handle.poll() is not None  # before the file: its last write counts
            if (now := self._stamp()) not in (None, self._seen):
                self._seen = now
                return True
            if is_over:
                break
            time.sleep(0.002)
        return False


@dataclass
class Trial:
    """One run into which a fault is injected.

    Args:
        subject: the program.
        references: runs without faults.
        folder: of this trial alone.
        chance: decides moments and places.
        record: what is written down of it.
        recipe: name of the material's recipe.
    """

    subject: Subject
    references: References
    folder: Path
    chance: random.Random
    record: Injection
    recipe: str = "one"

    @property
    def run(self) -> Path:
        """The run folder, which the first start makes."""
        return self.folder / "run"

    @property
    def last(self) -> Path:
        """The checkpoint that a resume begins with."""
        return self.run / "last.ckpt"

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.run / self.subject.mark).exists()

    @functools.cached_property
    def reference(self) -> Reference:
        """The run without faults, made when it is first asked for."""
        return self.references.get(self.subject, self.recipe)

    def start(self, *, resume: bool = False, before: Sequence[str] = (), options: Sequence[str] = ()) -> Process:
        """Start the run, or go on with the one that was ended."""
        return self.subject.start(self.run, self.recipe, resume=resume, before=before, options=options)

    def wait_for_writes(self, process: Process, count: int) -> None:
        """Wait until the checkpoint has been written so often.

        Raises:
            NotInjectedError: the run ended before.
        """
        watch = _Writes(process, self.last)
        for _ in range(count):
            if not watch.wait_for_another():
                raise NotInjectedError(process.log.read_text(errors="replace")[-500:])

    def wait_for_a_moment(self, process: Process, at_least: int = 0) -> str:
        """Wait for a random moment of the run; what it was."""
        writes = self.chance.randrange(at_least, max(at_least + 1, self.reference.writes - 1))
        pause = self.chance.random() * (self.reference.between if writes else 10 * self.reference.between)
        self.wait_for_writes(process, writes)
        time.sleep(pause)
        return f"{pause:.3f} s after checkpoint {writes}"

    def end_by(self, process: Process, number: signal.Signals) -> None:
        """Send a signal, wait for the end, and take down how it came."""
        if process.handle.poll() is not None:
            raise NotInjectedError("the run had ended")
        began = time.monotonic()
        os.kill(process.handle.pid, number)
        self.ended(process, began)

    def ended(self, process: Process, began: float, seconds: float = 60.0) -> int | None:
        """Wait for the end; the exit code."""
        code = process.wait(seconds)
        self.record.codes.append(code)
        self.record.seconds = round(time.monotonic() - began, 3)
        self.require(code is not None, f"still running after {seconds:g} s")
        process.end()
        return code

    def require(self, holds: bool, problem: str) -> None:
        """Write a problem down if something does not hold."""
        if not holds:
            self.record.problems.append(problem)

    def require_whole(self) -> None:
        """The checkpoint that was committed last is whole."""
        if self.last.exists():
            self.require(self.subject.is_whole(self.last), "last.ckpt is not whole")

    def resume(self, *, says: str = "") -> None:
        """Go on to the end, and compare with the run without faults."""
        process = self.start(resume=True)
        try:
            code = process.wait(_PATIENCE)
            self.record.codes.append(code)
            said = process.log.read_text(errors="replace")
            self.require(code == 0, f"the resume ended with code {code}: {said[-300:]}")
            self.require(says in said, f"the resume did not say {says!r}")
            if code == 0:
                is_equal = self.subject.digest(self.run) == self.reference.digest
                self.require(is_equal, "the resumed run ended with other bits")
        finally:
            process.end()


def _killed(trial: Trial) -> None:
    """SIGKILL at random moments, start-up included; now and then three times in a row."""
    moments = []
    for number in range(trial.chance.choice([1, 1, 1, 3])):
        process = trial.start(resume=number > 0)
        try:
            moments.append(trial.wait_for_a_moment(process))
            trial.end_by(process, signal.SIGKILL)
        except NotInjectedError:
            if not number:
                raise
            break  # a run that was resumed near its end
        finally:
            process.end()
    trial.record.injected = f"SIGKILL {', '.join(moments)}"
    trial.require_whole()
    trial.resume()


def _killed_in_a_save(trial: Trial) -> None:
    """SIGKILL while the file that is to replace a checkpoint is there."""
    process = trial.start()
    try:
        writes = trial.chance.randrange(trial.reference.writes - 1)
        trial.wait_for_writes(process, writes)
        while not any(trial.subject.partials(trial.run)):
            if process.handle.poll() is not None:
                raise NotInjectedError("no save was seen")
        time.sleep(trial.chance.random() * 0.003)
        trial.end_by(process, signal.SIGKILL)
    finally:
        process.end()
    if not (left := [path.name for path in trial.subject.partials(trial.run)]):
        raise NotInjectedError("the save was over")
    trial.record.injected = f"SIGKILL after checkpoint {writes}, with {left[0]} half written"
    trial.require_whole()
    trial.resume()
    trial.require(not any(trial.subject.partials(trial.run)), "a half-written file was left")


def _full_disk(trial: Trial) -> None:
    """No room for the next checkpoint: a limit on the size of files; every other time a failing fsync, by strace."""
    by_strace = isinstance(trial.subject, Flashtask) and trial.record.number % 2 == 1 and _can_strace()
    writes = trial.chance.randrange(1, max(2, trial.reference.writes - 1))
    when = trial.chance.randrange(4, 2 * trial.reference.writes)
    fault = ("-e", f"inject=fsync:error=ENOSPC:when={when}")
    process = trial.start(before=(*_STRACE, *fault) if by_strace else ())
    try:
        if not by_strace:
            trial.wait_for_writes(process, writes)
            limit = trial.chance.randrange(1 << 15, trial.last.stat().st_size)
            resource.prlimit(process.handle.pid, resource.RLIMIT_FSIZE, (limit, limit))
        code = trial.ended(process, time.monotonic(), _PATIENCE)
    finally:
        process.end()
    if trial.is_finished:
        raise NotInjectedError("the run had ended")
    kind = f"ENOSPC at fsync {when}" if by_strace else f"files of at most {limit} bytes after checkpoint {writes}"
    trial.record.injected = kind
    if isinstance(trial.subject, Flashtask):
        trial.require(code == 74, f"exit code {code} and not 74")
    trial.require(not any(trial.subject.partials(trial.run)), "a half-written file was left")
    trial.require_whole()
    trial.resume()


@functools.cache
def _can_strace() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run([*_STRACE, "true"], capture_output=True, check=False).returncode == 0


def _flip(content: bytearray, chance: random.Random) -> str:
    place = chance.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    return f"bit {place} flipped"


def _cut(content: bytearray, chance: random.Random) -> str:
    length = chance.randrange(len(content))
    del content[length:]
    return f"cut to {length} bytes"


Damage = Callable[[bytearray, random.Random], str]


def _read_when_damaged(damage: Damage, trial: Trial) -> None:
    """Many copies of a checkpoint, each damaged in another place; each has to be refused when it is read."""
    content, files = (trial.reference.folder / "last.ckpt").read_bytes(), []
    trial.run.mkdir()
    for number in range(COPIES):
        copy = bytearray(content)
        how = damage(copy, trial.chance)
        files.append(trial.run / f"{number} {how}.ckpt")
        files[-1].write_bytes(copy)
    found = trial.subject.damage_found(files, trial.run)
    missed = [file.stem.partition(" ")[2] for file in files if file not in found]
    trial.record.injected, trial.record.count = f"{COPIES} copies", COPIES
    trial.require(not missed, f"not found: {', '.join(missed[:4])}{' ...' if len(missed) > 4 else ''}")
    trial.record.survived = COPIES - len(missed)


def _resumed_when_damaged(damage: Damage, trial: Trial) -> None:
    """The last checkpoint of a killed run is damaged: the one before is used, and a line says so."""
    process = trial.start()
    try:
        trial.wait_for_writes(process, trial.chance.randrange(trial.reference.writes // 2, trial.reference.writes - 1))
        trial.end_by(process, signal.SIGKILL)
    finally:
        process.end()
    if not [path for path in trial.run.glob("*.ckpt") if path != trial.last]:
        raise NotInjectedError("there was no earlier checkpoint")
    content = bytearray(trial.last.read_bytes())
    trial.record.injected = f"last.ckpt: {damage(content, trial.chance)}"
    trial.last.write_bytes(content)
    trial.resume(says="last.ckpt" if isinstance(trial.subject, Flashtask) else "")


def _worker_killed(trial: Trial) -> None:
    """SIGKILL of a process that loads data."""
    process = trial.start(options=("--num-workers", "2"))
    try:
        moment = trial.wait_for_a_moment(process, at_least=1)
        workers: list[int] = []
        while not workers:
            if process.handle.poll() is not None:
                raise NotInjectedError("the run had ended")
            workers = _forked_from(process.handle.pid)
        victim = trial.chance.choice(workers)
        os.kill(victim, signal.SIGKILL)
        code = trial.ended(process, time.monotonic(), _PATIENCE)
    except ProcessLookupError:
        raise NotInjectedError("the process had ended") from None
    finally:
        process.end()
    trial.record.injected = f"SIGKILL of a data worker {moment}"
    trial.require(code == 0, f"exit code {code} and not 0")
    trial.require_whole()
    trial.resume()


def _forked_from(parent: int) -> list[int]:
    """The processes of a program that are copies of it: those that load data."""
    try:
        children = [int(pid) for task in Path(f"/proc/{parent}/task").iterdir() for pid in _words(task / "children")]
    except FileNotFoundError:
        return []
    own = _words(Path(f"/proc/{parent}/cmdline"))
    return [child for child in children if own and _words(Path(f"/proc/{child}/cmdline")) == own]


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().replace("\0", " ").split()
    except OSError:
        return []


def _diverges(trial: Trial) -> None:
    """A learning rate with which the loss becomes NaN or infinite after some steps: no file gets such weights."""
    rate = 10 ** trial.chance.uniform(10, 14)
    trial.recipe = trial.folder.name
    recipe = trial.subject.material.recipe(trial.recipe, rate=rate)
    process = trial.start()
    try:
        code = trial.ended(process, time.monotonic(), _PATIENCE)
    finally:
        process.end()
        recipe.unlink()
    trial.record.injected = f"a learning rate of {rate:.3g}"
    if trial.is_finished:
        raise NotInjectedError("the loss stayed finite")
    trial.require(code == 80, f"exit code {code} and not 80")
    for file in trial.run.glob("*.ckpt"):
        trial.require(trial.subject.is_whole(file), f"{file.name} is not whole")
        trial.require(_is_finite(file), f"{file.name} holds values that are not finite")


def _is_finite(checkpoint: Path) -> bool:
    import numpy as np
    from safetensors import safe_open

    with safe_open(checkpoint, "np") as file:
        weights = [file.get_tensor(name) for name in file.keys() if not name.startswith("@")]  # noqa: SIM118
    return all(bool(np.isfinite(value).all()) for value in weights if value.dtype.kind == "f")


def _asked_to_stop(trial: Trial) -> None:
    """SIGTERM, every other time SIGINT."""
    number, expected = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[trial.record.number % 2]
    process = trial.start()
    try:
        moment = trial.wait_for_a_moment(process, at_least=1)
        trial.end_by(process, number)
    finally:
        process.end()
    if trial.is_finished:
        raise NotInjectedError("the last step was done")
    code = trial.record.codes[-1]
    trial.record.injected = f"{number.name} {moment}"
    trial.require(code == expected, f"exit code {code} and not {expected}")
    trial.require_whole()
    trial.resume()


def _one_of_two(number: signal.Signals, limit: float, trial: Trial) -> None:
    """One of two processes is killed or stopped: all end in time, and the error names it."""
    trial.recipe = "two"
    process = trial.start()
    try:
        moment = trial.wait_for_a_moment(process, at_least=1)
        ranks = {int(environment.get("RANK", "0")): pid for pid, environment in process.alive().items()}
        if len(ranks) < 2:
            raise NotInjectedError("a process had ended")
        rank = trial.chance.randrange(2)
        began = time.monotonic()
        os.kill(ranks[rank], number)
        trial.require(process.wait_until_gone(limit), f"not all had ended after {limit:g} s")
        trial.record.seconds = round(time.monotonic() - began, 3)
        code = process.handle.poll()
        trial.record.codes.append(code)
    except ProcessLookupError:
        raise NotInjectedError("the process had ended") from None
    finally:
        process.end()
    if trial.is_finished:
        raise NotInjectedError("the run had ended")
    trial.record.injected = f"{number.name} of process {rank} {moment}"
    # The first process is what the user started: when it is killed, nobody is left to say so.
    expected = 71 if rank else -signal.SIGKILL
    trial.require(code == expected, f"exit code {code} and not {expected}")
    if rank or number == signal.SIGSTOP:
        said = process.log.read_text(errors="replace")
        trial.require(f"process {rank}" in said, f"process {rank} was not named")
    trial.require_whole()
    trial.resume()


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Args:
        name: as the table shows it.
        inject: into a trial.
        is_for_all: whether other programs than flashtask get it too.
    """

    name: str
    inject: Callable[[Trial], None]
    is_for_all: bool = True


FAULTS = (
    Fault("killed at a random moment", _killed),
    Fault("killed while it saves", _killed_in_a_save),
    Fault("disk full while it saves", _full_disk),
    Fault("one bit of a file flipped: found", functools.partial(_read_when_damaged, _flip)),
    Fault("a file cut short: found", functools.partial(_read_when_damaged, _cut)),
    Fault("last.ckpt: a bit flipped, resumed", functools.partial(_resumed_when_damaged, _flip)),
    Fault("last.ckpt: cut short, resumed", functools.partial(_resumed_when_damaged, _cut)),
    Fault("SIGTERM (143) or SIGINT (130)", _asked_to_stop),
    Fault("a data worker killed", _worker_killed, is_for_all=False),
    Fault("the loss becomes NaN", _diverges, is_for_all=False),
    Fault("one of 2 processes killed", functools.partial(_one_of_two, signal.SIGKILL, 30.0), is_for_all=False),
    Fault(
        "one of 2 processes stopped",
        functools.partial(_one_of_two, signal.SIGSTOP, FROZEN_AFTER + 30.0),
        is_for_all=False,
    ),
)
