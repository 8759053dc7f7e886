"""What faults are injected into: programs that train a small model, seen from outside as processes and files."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import numpy as np

__all__ = ["Flashtask", "Handle", "Lightning", "Material", "Process", "Subject", "is_whole"]

#: Seconds without a heartbeat after which a process of two counts as frozen.
FROZEN_AFTER = 5
_JOB = Path(__file__).with_name("lightning_job.py")
#: Columns of metrics.csv that are times.
_TIMES = ("images_per_second", "seconds")
#: Everything that makes an exact resume hard: dropout, BatchNorm, augmentation, a schedule, averaged weights, AdamW,
#: and checkpoints in the middle of an epoch.
_RECIPE = """\
task: image_classification
data: {{from_folders: {{train_folder: data/train, val_folder: data/val, batch_size: {batch_size}, augment: light,
  num_workers: 0, preprocessing: {{input_size: 32}}}}}}
model: {{backbone: timm/test_efficientnet, pretrained: false, head: mlp, learning_rate: {rate}, optimizer: adamw,
  head_options: {{dropout: 0.2, hidden_sizes: [64]}}, lr_scheduler: cosine}}
trainer: {{max_epochs: 3, seed: {seed}, precision: 32, accelerator: cpu, logger: csv, enable_progress_bar: false,
  callbacks: [{{model_checkpoint: {{every_n_train_steps: 2}}}}, weight_averaging]}}
finetune: {{strategy: no_freeze, restore_best: false}}
"""


class Handle(Protocol):
    """A process that was started: what `subprocess.Popen` has of it."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""


@dataclass(frozen=True)
class Material:
    """What the runs train on.

    Args:
        folder: with `data/` (64 images of 32 x 32) and the recipes.
        seed: of the images and of the runs.
    """

    folder: Path
    seed: int

    def write(self) -> None:
        """Write the images, and the recipes for one and for two processes."""
        from PIL import Image

        generator = np.random.default_rng(self.seed)
        for part, count in (("train", 24), ("val", 8)):
            for name, colour in (("blue", (90, 100, 150)), ("red", (150, 100, 90))):
                place = self.folder / "data" / part / name
                place.mkdir(parents=True)
                for number in range(count):
                    pixels = np.clip(np.array(colour) + generator.normal(0, 60, (32, 32, 3)), 0, 255)
                    Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
        self.recipe("one")
        self.recipe("two", batch_size=4)

    def recipe(self, name: str, *, rate: float = 0.01, batch_size: int = 8) -> Path:
        """Write a further recipe over the same images, and return where it is."""
        path = self.folder / f"{name}.yaml"
        path.write_text(_RECIPE.format(seed=self.seed, rate=rate, batch_size=batch_size))
        return path


@dataclass
class Process:
    """A training run that was started, with a mark in its environment by which all its processes are found."""

    handle: Handle
    token: str
    log: Path

    def alive(self) -> dict[int, dict[str, str]]:
        """Its processes that have not ended, with the environment that each was started with."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self.token in environment and state not in "ZX":
                pairs = (line.partition("=") for line in environment.split("\0"))
                found[int(entry.name)] = {name: value for name, _, value in pairs}
        return found

    def wait(self, seconds: float) -> int | None:
        """Wait for the end of the process that was started; its exit code, None if it still runs."""
        deadline = time.monotonic() + seconds
        while (code := self.handle.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return code

    def wait_until_gone(self, seconds: float) -> bool:
        """Wait until none of its processes is left."""
        deadline = time.monotonic() + seconds
        while (self.handle.poll() is None or self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.handle.poll() is not None and not self.alive()

    def end(self) -> None:
        """Kill those of its processes that still run."""
        for pid in {self.handle.pid, *self.alive()} if self.handle.poll() is None else {*self.alive()}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.wait(10)


@dataclass
class Subject:
    """A program that trains the material's model into a folder, and can resume there.

    Args:
        material: what it trains on.
        command: how it is started.
    """

    material: Material
    command: Sequence[str]
    name: str = field(default="", init=False)
    #: a file that a run leaves when it has come to its end
    mark: str = field(default="", init=False)

    def arguments(self, folder: Path, recipe: str, resume: bool) -> list[str]:
        """What follows the command to train the recipe into the folder, or to go on there."""
        raise NotImplementedError

    def partials(self, folder: Path) -> Iterator[Path]:
        """Files that a save has begun and not yet put in place."""
        raise NotImplementedError

    def digest(self, folder: Path) -> str:
        """A hash of all that a finished run ended with."""
        raise NotImplementedError

    def damage_found(self, files: Sequence[Path], run: Path) -> set[Path]:
        """Those of damaged checkpoints that are refused when they are read.

        Args:
            files: in `run`.
            run: a run folder with nothing else in it.
        """
        raise NotImplementedError

    def is_whole(self, checkpoint: Path) -> bool:
        """Whether a checkpoint can be used, as far as its format can tell."""
        raise NotImplementedError

    def start(
        self,
        folder: Path,
        recipe: str,
        *,
        resume: bool = False,
        before: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> Process:
        """Start to train.

        Args:
            folder: of the run.
            recipe: name of a recipe of the material.
            resume: go on where an earlier process was ended.
            before: what the command itself is started by, such as strace.
            options: further arguments.
        """
        token, temporary = uuid.uuid4().hex, folder.parent / f"tmp-{folder.name}"
        temporary.mkdir(exist_ok=True)
        log = folder.parent / f"{folder.name}-{token[:6]}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CHAOS_TOKEN": token, "TMPDIR": str(temporary)}
        environment["FLASHTASK_FROZEN_AFTER"] = str(FROZEN_AFTER)
        command = [*before, *self.command, *self.arguments(folder, recipe, resume), *options]
        return Process(self.launch(command, environment, log), token, log)

    def launch(self, command: Sequence[str], environment: dict[str, str], log: Path) -> Handle:
        """Start a process in its own session, with its output in a file."""
        with log.open("wb") as file:
            return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


class Flashtask(Subject):
    """flashtask, by the command line that a user types."""

    name, mark = "flashtask", "summary.json"

    def arguments(self, folder: Path, recipe: str, resume: bool) -> list[str]:
        """Those of `flashtask finetune`, with or without `--resume`."""
        processes = ["--devices", "2", "--distributed", "ddp"] if recipe == "two" else []
        source = [] if resume else [str(self.material.folder / f"{recipe}.yaml")]
        return ["finetune", *source, "--output-dir", str(folder), *processes, *(["--resume"] if resume else [])]

    def partials(self, folder: Path) -> Iterator[Path]:
        """They are beside the file that they will replace."""
        return folder.glob(".*.ckpt.partial-*")

    def digest(self, folder: Path) -> str:
        """All tensors of the last checkpoint, and the rows of metrics.csv: weights, optimizer, averages, generators."""
        from safetensors import safe_open

        found = hashlib.sha256()
        with safe_open(folder / "last.ckpt", "np") as file:
            for name in sorted(file.keys()):  # it is no dictionary
                if name != "@progress/history":  # which has times in it
                    found.update(name.encode() + file.get_tensor(name).tobytes())
        with (folder / "metrics.csv").open(newline="") as table:
            for row in csv.DictReader(table):
                found.update(json.dumps({key: row[key] for key in row if key not in _TIMES}).encode())
        return found.hexdigest()

    def damage_found(self, files: Sequence[Path], run: Path) -> set[Path]:
        """Those that `flashtask doctor` reports as having a problem."""
        command = [*self.command, "doctor", str(run), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
        found = json.loads(done.stdout.splitlines()[0])
        return {Path(one["path"]) for one in found["checkpoints"] if one["problem"]}

    def is_whole(self, checkpoint: Path) -> bool:
        """Whether the digest in its header is that of its bytes."""
        return is_whole(checkpoint)


class Lightning(Subject):
    """Lightning with the same model, images and faults, as its documentation writes such a program."""

    name, mark = "lightning", "weights.safetensors"

    @staticmethod
    def version() -> str | None:
        """Of the package that is installed; None if neither name is."""
        for name in ("lightning", "pytorch-lightning"):
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return None

    @classmethod
    def of(cls, material: Material) -> Lightning:
        """The Lightning that is installed for this Python."""
        return cls(material, (sys.executable, str(_JOB)))

    def arguments(self, folder: Path, recipe: str, resume: bool) -> list[str]:
        """Those of lightning_job.py, which does the training."""
        data = str(self.material.folder / "data")
        return ["fit", data, str(folder), str(self.material.seed), *(["--resume"] if resume else [])]

    def partials(self, folder: Path) -> Iterator[Path]:
        """They are in the folder for temporary files, where fsspec writes them."""
        return (path for path in (folder.parent / f"tmp-{folder.name}").glob("tmp*") if path.is_file())

    def digest(self, folder: Path) -> str:
        """A hash of the weights alone, without the optimizer."""
        return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()

    def damage_found(self, files: Sequence[Path], run: Path) -> set[Path]:
        """Those for which `torch.load` raises an error."""
        command = [*self.command, "check", *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {Path(path) for path in json.loads(done.stdout.splitlines()[-1])}

    def is_whole(self, checkpoint: Path) -> bool:
        """Whether `torch.load` reads it without an error."""
        return not self.damage_found([checkpoint], checkpoint.parent)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint of flashtask's has the SHA-256 that its header states, computed with zeros in its place."""
    content = checkpoint.read_bytes()
    start = content.find(b"sha256")
    digits = content[start + 6 :].lstrip(b'\\":')[:64] if start >= 0 else b""
    return len(digits) == 64 and hashlib.sha256(content.replace(digits, b"0" * 64, 1)).hexdigest().encode() == digits
