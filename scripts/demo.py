"""The demo: lay out photographs of solar cells, fine-tune and predict from the command line, show what came out.

Every start is a run of its own in demo/runs/NNN. Made by `make demo`; it needs no network once that has installed it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from lay_out_elpv import lay_out

from flashtask import ImageClassificationData

IMAGES = Path("demo/elpv")
RUNS = Path("demo/runs")
# Few enough that two slow cores are done within three minutes; `flashtask finetune` takes all 2,624 as well.
NUM_IMAGES = 1200
EPOCHS = 5


def flashtask(*arguments: object) -> None:
    """Show a command and run it; a command that fails ends the demo with its exit code."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(['flashtask', *words])}", flush=True)
    done = subprocess.run([sys.executable, "-m", "flashtask", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def next_run() -> Path:
    """The first free demo/runs/NNN after those that are taken."""
    taken = [int(folder.name) for folder in RUNS.glob("[0-9]*") if folder.name.isdigit()]
    return RUNS / f"{max(taken, default=-1) + 1:03}"


def held_out(each: int) -> list[Path]:
    """Some images of each class that the run validates on and does not learn from."""
    names = sorted(ImageClassificationData.from_root(IMAGES).split_manifest())
    classes = sorted({Path(name).parts[0] for name in names})
    return [IMAGES / name for label in classes for name in [n for n in names if Path(n).parts[0] == label][:each]]


def main() -> None:
    os.chdir(Path(__file__).resolve().parents[1])
    print(f"{lay_out(IMAGES, NUM_IMAGES)} images in {IMAGES}, in the class folders `defective` and `functional`")
    run = next_run()
    options = ["--backbone", "efficientnet_lite0", "--strategy", "freeze", "--epochs", EPOCHS]
    flashtask("finetune", IMAGES, *options, "--output-dir", run)
    flashtask("predict", run / "best.ckpt", *held_out(each=3), "--top-k", 2)
    best = json.loads((run / "summary.json").read_text())["best"]
    print(f"\nvalidation accuracy: {best['val_accuracy']:.4f}")
    print(f"run folder: {run} (recipe.yaml, metrics.csv, best.ckpt, ...)")


if __name__ == "__main__":
    main()
