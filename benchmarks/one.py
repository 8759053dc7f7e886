"""One work by one player in a process of its own; the last line of its output is what came out, as JSON.

Run by `run.py`: `python one.py WORK PLAYER SETUP`, where SETUP is the JSON of a `Setup`.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from setup import Setup
from works import WORKS


def main(work: str, player: str, setup: Setup) -> None:
    torch.set_num_threads(setup.threads)
    module = importlib.import_module(player)
    if work != "overhead":
        # Everybody builds the network with timm; its import is part of no work but `startup`.
        importlib.import_module("timm")
        importlib.import_module("torchvision.transforms.v2")
    outcome = WORKS[work][0](module, setup)
    print(json.dumps({**asdict(outcome), "peak_bytes": _peak()}))


def _peak() -> int:
    """The most memory that this process has had; `getrusage` would tell of the one that started it as well."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Setup.from_json(sys.argv[3]))
