"""Programs in processes of their own, forked from one that has imported torch and flashtask: an import takes seconds.

For programs that train or compute; what concerns imports, the command line or the start of Python needs a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["flashtask.tasks", "flashtask.trainer.trainer", "small", "timm", "torch"])


def run(code: str, *arguments: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, "-c", code, ...], capture_output=True, text=True)`."""
    ends = [_CONTEXT.Pipe(duplex=False) for _ in range(2)]
    process = start(code, *arguments, outputs=tuple(there for _, there in ends))
    with ThreadPoolExecutor() as pool:
        for _, there in ends:
            there.close()
        texts = [pool.submit(_read, here) for here, _ in ends]
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(code, timeout)
        return subprocess.CompletedProcess([code, *arguments], process.exitcode, *(text.result() for text in texts))


def start(code: str, *arguments: object, outputs: tuple[Connection, ...] = ()) -> BaseProcess:
    """Begin a program, whose `sys.argv[1:]` are the arguments; outputs take the place of stdout and stderr."""
    argv = [str(argument) for argument in arguments]
    process = _CONTEXT.Process(target=_execute, args=(code, argv, os.getcwd(), dict(os.environ), outputs))
    process.start()
    return process


def _read(end: Connection) -> str:
    with open(end.fileno(), closefd=False) as file:
        return file.read()


def _execute(code: str, argv: list[str], folder: str, environment: dict[str, str], outputs: tuple[Connection, ...]):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *argv]
    for number, end in enumerate(outputs, start=1):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    status = None
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code
    except BaseException:
        status = traceback.format_exc()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(1 if isinstance(status, str) else status)
