"""Finding out which process is frozen or gone, while the main thread waits for it in an exchange.

Every process writes a heartbeat each second, from a thread: it goes on through a long step, and stops with the process.
The first process listens to all, the others to it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashtask.core.errors import ProcessLostError
from flashtask.trainer.distribution.environment import ProcessInfo
from flashtask.trainer.distribution.heartbeat import Endings, Heartbeat, is_gone, read_heartbeat, start_of, this_machine
from flashtask.trainer.distribution.launching import Others
from flashtask.trainer.distribution.reports import CONTINUE, error_in, how_it_ended

__all__ = ["Watchdog"]

#: Seconds in which the main thread may find out by itself, with a better message.
_GRACE = 5.0
#: Seconds to look for the process whose end broke an exchange.
_LOOK = 3.0


class Watchdog:
    """Watches over the processes of a group from threads of this one.

    Args:
        process: this one.
        store: through which they communicate.
        patience: seconds without a heartbeat after which a process counts as frozen.
        where: gives the step of the run and its folder, or None.
        others: the processes that this one started, if it did.
    """

    def __init__(
        self,
        process: ProcessInfo,
        store: Any,
        patience: float,
        where: Callable[[], tuple[int, Path | None]],
        others: Others | None = None,
    ) -> None:
        self._process, self._store, self._patience, self.where = process, store, patience, where
        self._others = others
        self._interval = min(1.0, patience / 5)
        #: stages that run, one in another: only then does it matter what the others do
        self._running = 0
        #: how many have run, in all processes alike; what ended one of them does not end the next
        self._stage = 0
        #: this process is about to be ended from here
        self.has_found = threading.Event()
        self._parent = os.getppid()
        self._seen: dict[int, Heartbeat] = {}
        self._endings = Endings()
        self._silence = dict.fromkeys(self._listens_to, 0.0)
        self._is_reached = True
        self._without_answer = 0.0
        self._reports: dict[str, Any] = {}
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"flashtask-{work.__name__.strip('_')}", daemon=True)
            for work in (self._send_heartbeats, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def _listens_to(self) -> list[int]:
        others = [rank for rank in range(self._process.world_size) if rank != self._process.rank]
        return others if self._process.rank == 0 else [0]

    def close(self) -> None:
        """Part from the others; the threads end."""
        self._over.set()
        for thread in self._threads:
            thread.join(2.0)
        self._endings.close()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a stage, which may run inside of another."""
        if not self._running:
            self._stage += 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    # ---- heartbeats

    def _send_heartbeats(self) -> None:
        """The store can be silent with the process that keeps it, so nothing else waits for it."""
        own: dict[str, Any] = {"pid": os.getpid(), "started": start_of(os.getpid())}
        own |= {"host": platform.node(), "machine": this_machine()}
        count = 0
        try:
            store = self._store.clone()
            while True:
                count += 1
                is_last = self._over.wait(self._interval if count > 1 else 0)
                heartbeat = Heartbeat(count, self.where()[0], is_last=is_last, **own)
                store.set(f"heartbeat/{self._process.rank}", json.dumps(asdict(heartbeat)))
                if is_last:
                    return
                self._listen(store)
                self._without_answer = 0.0
        except Exception:  # the process with the store is gone: the exchange that needs it will fail
            self._is_reached = False

    def _listen(self, store: Any) -> None:
        for rank in self._listens_to:
            heartbeat = read_heartbeat(store, rank)
            if heartbeat is not None and heartbeat != self._seen.get(rank):
                self._endings.watch(rank, heartbeat)
                self._seen[rank], self._silence[rank] = heartbeat, 0.0
        for key in ("frozen", self._failed):
            if key not in self._reports and store.check([key]):
                self._reports[key] = json.loads(store.get(key))

    # ---- what is made of them

    def _watch(self) -> None:
        before, overdue = time.monotonic(), 0.0
        while not self._over.wait(self._interval):
            # Where this process itself was stopped for a while, the others are not silent.
            passed = min(time.monotonic() - before, 2 * self._interval)
            before = time.monotonic()
            self._look_for_the_launcher()
            if not self._running:
                self._silence = dict.fromkeys(self._silence, 0.0)
                self._without_answer = overdue = 0.0
                continue
            self._silence = {rank: silence + passed for rank, silence in self._silence.items()}
            self._without_answer += passed
            if (found := self._frozen()) is not None:
                self._leave_the_frozen(*found)
            ended = None if self._others is None else self._others.ended()
            found_out = ""
            if (report := self._reports.get(self._failed)) is not None:
                found_out = _what(report)
            elif ended is not None and ended[1]:
                found_out = how_it_ended(*ended, self._at(0))
            overdue = overdue + passed if found_out else 0.0
            if overdue > _GRACE:
                self._leave(found_out)

    def _look_for_the_launcher(self) -> None:
        """Torchrun's agent cannot end its processes any more when it was killed itself."""
        if self._process.launcher == "torchrun" and os.getppid() != self._parent:
            self.has_found.set()
            _write_to_stderr(f"process {self._process.rank}: torchrun, which started it, is gone\n")
            os._exit(ProcessLostError.exit_code)

    def _frozen(self) -> tuple[int, str] | None:
        """The rank of a process that is frozen, and the message about it."""
        if "frozen" in self._reports:
            return self._reports["frozen"]["rank"], self._reports["frozen"]["text"]
        if not self._is_reached:
            return None
        for rank, silence in self._silence.items():
            heartbeat = self._seen.get(rank)
            if heartbeat is not None and not heartbeat.is_last and silence > self._patience and not is_gone(heartbeat):
                return rank, self._text(rank, heartbeat)
        if self._without_answer > self._patience and self._process.launcher == "torchrun":
            return -1, f"no answer from torchrun's agent for {self._patience:g} s: it is frozen, or its machine is"
        return None

    def _text(self, rank: int, heartbeat: Heartbeat) -> str:
        who = f"process {rank} of {self._process.world_size} (pid {heartbeat.pid} on {heartbeat.host}) is frozen"
        return f"{who}: no heartbeat for {self._patience:g} s, {self._at(heartbeat.step)}"

    def _at(self, step: int) -> str:
        """Processes advance together, and a heartbeat may be a second old."""
        return f"at step {max(step, self.where()[0])}"

    def _leave_the_frozen(self, rank: int, text: str) -> None:
        """One of the others prints the message, all write their stacks; the frozen process is killed on its machine."""
        finds_it_first = "frozen" not in self._reports
        prints = self._process.rank == (1 if rank == 0 else 0)
        self.has_found.set()
        if prints:
            self._say(text)
        self._dump(text)
        if finds_it_first and rank > 0:
            found = json.dumps({"rank": rank, "text": text})
            threading.Thread(target=lambda: self._store.set("frozen", found), daemon=True).start()
        if finds_it_first:
            time.sleep(3 * self._interval)  # the others are to find it too, and dump their stacks
        heartbeat = self._seen.get(rank)
        if heartbeat is not None and heartbeat.machine == this_machine() and not is_gone(heartbeat):
            with suppress(OSError):
                os.kill(heartbeat.pid, signal.SIGKILL)
        self._end_the_others()
        os._exit(ProcessLostError.exit_code)

    def _leave(self, text: str) -> None:
        """The main thread did not notice by itself; on each machine one process prints the message."""
        self.has_found.set()
        if self._process.local_rank == 0:
            self._say(text)
        self._dump(text)
        self._end_the_others()
        os._exit(ProcessLostError.exit_code)

    def _end_the_others(self) -> None:
        if self._others is not None:
            self._others.end()

    def _say(self, text: str) -> None:
        folder = self.where()[1]
        where = f"\n  why: the stacks of the others are in {folder}/stacks-*.txt" if folder else ""
        _write_to_stderr(f"error: {text}{where}\n  fix: {CONTINUE}\n")

    def _dump(self, text: str) -> None:
        folder = self.where()[1]
        try:
            if folder is None:
                raise OSError
            with (folder / f"stacks-{self._process.rank}.txt").open("w", encoding="utf-8") as file:
                file.write(f"{text}\nprocess {self._process.rank}, step {self.where()[0]}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            with suppress(Exception):
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    # ---- asked by the main thread, when an exchange broke

    def lost(self) -> tuple[int, str] | None:
        """The rank of a process that is gone, and how it ended; None if none is found in a few seconds."""
        first: dict[int, Heartbeat] = {}
        deadline = time.monotonic() + _LOOK
        while time.monotonic() < deadline:
            for rank in range(self._process.world_size):
                if rank == self._process.rank:
                    continue
                try:
                    heartbeat = read_heartbeat(self._store, rank)
                except Exception:  # the store is gone with the process that kept it
                    return 0, self._ended(0, self._seen.get(0))
                if heartbeat is None:
                    continue
                if is_gone(heartbeat):
                    return rank, self._ended(rank, heartbeat)
                first.setdefault(rank, heartbeat)
            time.sleep(0.05)
        try:
            silent = [rank for rank, heartbeat in first.items() if read_heartbeat(self._store, rank) == heartbeat]
        except Exception:
            return 0, self._ended(0, self._seen.get(0))
        return (silent[0], f"process {silent[0]} is silent, {self._at(first[silent[0]].step)}") if silent else None

    def _ended(self, rank: int, heartbeat: Heartbeat | None) -> str:
        where = self._at(0 if heartbeat is None else heartbeat.step)
        code = None if heartbeat is None else self._endings.code(rank, heartbeat)
        return f"process {rank} ended {where}" if code is None else how_it_ended(rank, code, where)

    @property
    def _failed(self) -> str:
        return f"failed/{self._stage}"

    def report_failure(self, report: dict[str, Any]) -> None:
        """Let the others know what ended the stage here."""
        with suppress(Exception):
            self._store.compare_set(self._failed, "", json.dumps(report))
            process = self._process
            if process.rank == 0 and process.launcher != "torchrun" and process.world_size > process.local_world_size:
                # The store ends with this process, and other machines are to read it first.
                time.sleep(1.5 * self._interval)

    def reported_failure(self) -> dict[str, Any] | None:
        """The report of another process on why the stage failed, if there is one."""
        if (heard := self._reports.get(self._failed)) is not None:
            return dict(heard)
        with suppress(Exception):
            if self._store.check([self._failed]):
                found: dict[str, Any] = json.loads(self._store.get(self._failed))
                return found
        return None


def _what(report: dict[str, Any]) -> str:
    return getattr(error_in(report), "what", "") or f"process {report['rank']} was stopped"


def _write_to_stderr(text: str) -> None:
    """Past Python's buffers: their locks may be held by the thread that waits."""
    with suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))
