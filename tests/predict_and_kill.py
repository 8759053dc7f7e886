"""Runs `flashtask predict` and kills it at random moments: `predict_and_kill.py KILLS SEED ARGUMENT...`.

The commands are forked from one process that has imported everything, so that most of each is prediction. Parts are of
ten images. Moments are drawn between the first part of an undisturbed run and its end. A job that ends is looked at by
its output, which is renamed to `OUTPUT.N`, and the next one begins.
"""

import os
import random
import signal
import sys
import time

from flashtask import load
from flashtask.cli import finished_rows, run


def command(arguments):
    """The process id of a command that has begun."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(run(arguments))
    return child


def main(kills, seed, arguments):
    finished_rows._IMAGES = 10
    load(arguments[1])  # imports what the model needs; nothing is computed, so there are no threads to lose
    output, generator = arguments[arguments.index("--output") + 1], random.Random(seed)
    folder, begun, first = f"{output}.parts", time.monotonic(), None
    child = command(arguments)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if first is None and os.path.isdir(folder):
            first = time.monotonic() - begun
        time.sleep(0.005)
    whole = time.monotonic() - begun
    os.rename(output, f"{output}.0")
    killed, ended, moments = 0, 0, []
    while killed < kills or not ended:
        child = command(arguments)
        time.sleep(generator.uniform(0.9 * first, whole))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            moments.append(len(os.listdir(folder)) if os.path.isdir(folder) else 0)
            if killed < kills:
                continue
            assert os.waitpid(command(arguments), 0)[1] == 0
        else:
            assert os.waitstatus_to_exitcode(status) == 0
        ended += 1
        os.rename(output, f"{output}.{ended}")
    print(killed, ended, *moments)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
