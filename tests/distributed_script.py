"""Run by test_distribution.py in several processes: `python distributed_script.py WHAT FOLDER [STRATEGY]`."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from flashtask import Callback, Module, Trainer

WHAT, FOLDER = sys.argv[1], Path(sys.argv[2])
STRATEGY = sys.argv[3] if len(sys.argv) > 3 else "ddp"


class Small(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        rank = self.trainer.strategy.global_rank
        if WHAT == "fails" and rank == 1 and self.trainer.global_step == 3:
            raise ValueError("the third step is too much for me")
        if WHAT == "killed" and rank == 1 and self.trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if WHAT == "first is killed" and rank == 0 and self.trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stops(Callback):
    def on_train_epoch_end(self, trainer, module):
        if WHAT == "stops" and trainer.strategy.global_rank == 1 and trainer.current_epoch == 1:
            trainer.should_stop = True


def main():
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(20, 4, generator=generator), torch.randint(0, 3, (20,), generator=generator))
    module = Small()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGY,
        max_epochs=4,
        output_dir=FOLDER / "run",
        callbacks=[Stops()],
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=2, shuffle=True))
    rank = trainer.strategy.global_rank
    torch.save(torch.cat([one.detach().flatten() for one in module.parameters()]), FOLDER / f"weights-{rank}.pt")
    print(f"{rank}: epoch {trainer.current_epoch}, step {trainer.global_step}")


if __name__ == "__main__":
    main()
