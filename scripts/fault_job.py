"""A small training script that can be made to fail, for `fault_matrix.py` and the tests of faults.

python scripts/fault_job.py FOLDER [--fault KIND:RANK:STEP] trains in two processes and writes FOLDER/weights-RANK.pt.
"""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from flashtask import Callback, Module, Trainer
from flashtask.core.errors import BadDataError
from flashtask.trainer.checkpoints.model_checkpoint import ModelCheckpoint
from flashtask.trainer.distribution.data_parallel import DataParallel, ForkedDataParallel

STRATEGIES = {"ddp": DataParallel, "ddp_spawn": ForkedDataParallel}


class Small(Module):
    """Dropout, momentum and a schedule: much that has to come back after a resume."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(width, 3)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The loss of a batch."""
        return torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """SGD with momentum, and a rate that falls with every epoch."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class Fault(Callback):
    """Tells where the run stands, step by step, and fails where it is told to."""

    def __init__(self, folder: Path, fault: str, pause: float) -> None:
        kind, rank, step = (fault or "none:-1:-1").split(":")
        self.kind, self.rank, self.step = kind, int(rank), int(step)
        self.folder, self.pause = folder, pause

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Wait, tell, and fail."""
        rank = trainer.strategy.global_rank
        time.sleep(self.pause)
        with (self.folder / f"steps-{rank}.log").open("a") as file:
            file.write(f"{os.getpid()} {trainer.global_step} {time.time()}\n")
        if rank == self.rank and trainer.global_step == self.step and not (self.folder / "failed").exists():
            (self.folder / "failed").write_text(f"{time.time()}")
            self.fail(batch)

    def fail(self, batch: Any) -> None:
        """Do what is to be survived."""
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.kind == "hang":
            time.sleep(1000)
        elif self.kind == "raise":
            raise ValueError("this step is too much for me")
        elif self.kind == "data":
            raise BadDataError("cat.jpg cannot be read", why="it is empty", fix="rm cat.jpg")
        elif self.kind == "nan":
            batch[0].fill_(float("nan"))
        elif self.kind == "exit":
            raise SystemExit(7)


def samples(count: int) -> TensorDataset:
    """The same for every process."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator))


def tell_threads(folder: Path) -> None:
    """Write down which threads there are at the very end of Python."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    (folder / f"threads-{os.getpid()}.txt").write_text("\n".join(names))


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    parser.add_argument("--fault", default="", help="kill|freeze|hang|raise|data|nan|exit : rank : step")
    parser.add_argument("--differ", default="", help="what process 1 has of its own")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each step")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--frozen-after", type=float, default=120.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    atexit.register(tell_threads, options.folder)  # the first to be registered is the last to be called

    differ = options.differ if os.environ.get("RANK") == "1" else ""
    trainer = Trainer(
        accelerator="cpu",
        devices=options.processes,
        strategy=STRATEGIES[options.strategy](frozen_after=options.frozen_after),
        max_epochs=options.epochs + (differ == "epochs"),
        output_dir=options.folder / "run",
        callbacks=[
            Fault(options.folder, options.fault, options.pause),
            ModelCheckpoint(every_n_train_steps=options.every, save_top_k=0),
        ],
        enable_progress_bar=False,
    )
    module = Small(17 if differ == "width" else 16)
    data = samples(43 if differ == "data" else 44)
    loader = DataLoader(data, batch_size=2, shuffle=True, num_workers=options.workers)
    last = options.folder / "run" / "last.ckpt"
    resumes = options.resume and last.exists() and differ != "resume"
    trainer.fit(module, loader, ckpt_path=last if resumes else None)
    weights = torch.cat([one.detach().flatten() for one in module.parameters()])
    torch.save(weights, options.folder / f"weights-{trainer.strategy.global_rank}.pt")
    print(f"{trainer.strategy.global_rank}: epoch {trainer.current_epoch}, step {trainer.global_step}", flush=True)


if __name__ == "__main__":
    main()
