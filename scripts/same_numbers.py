"""How far several processes are from one: weights, metrics and predictions for data sets of 1 to 33 samples.

    python scripts/same_numbers.py [--processes 2] [--strategies ddp_spawn fsdp_spawn] [--largest 33]

A multilayer perceptron without dropout and BatchNorm, SGD with momentum, two epochs of shuffled batches, validation,
prediction. The batch of all processes together is the same as that of one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from flashtask import Module, Trainer

SHARE = 2


class Small(Module):
    """The model that is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        outputs = self.layers(batch[0])
        self.accuracy(outputs, batch[1])
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", nn.functional.cross_entropy(outputs, batch[1]), sync_dist=True)
        self.log("val_count", float(len(batch[0])), reduce_fx="sum", sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        outputs: Tensor = self.layers(batch[0])
        return outputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trained(count: int, processes: int, of_all: int, strategy: str) -> tuple[Tensor, dict[str, float], Tensor]:
    """Weights, metrics and predictions of a run; prediction is by as many processes."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator))
    module = Small()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=processes,
            strategy=strategy if processes > 1 else "single",
            output_dir=Path(folder, "run"),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        size = of_all // processes
        trainer.fit(module, DataLoader(data, batch_size=size, shuffle=True), DataLoader(data, batch_size=size))
        predictions = trainer.predict(module, DataLoader(data, batch_size=size))
    weights = torch.cat([one.detach().flatten() for one in module.parameters()])
    return weights, trainer.callback_metrics, torch.cat(predictions)


def main() -> None:
    """Print a table, a row for each group of sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=["ddp_spawn", "fsdp_spawn"])
    parser.add_argument("--largest", type=int, default=33)
    options = parser.parse_args()
    of_all = SHARE * options.processes
    print("| strategy | processes | samples | runs | weights | metrics | counts | predictions |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for strategy in options.strategies:
        for first in range(1, options.largest + 1, 11):
            sizes = range(first, min(first + 11, options.largest + 1))
            worst = {"weights": 0.0, "metrics": 0.0, "predictions": 0.0}
            counts = 0
            for count in sizes:
                one = trained(count, 1, of_all, strategy)
                several = trained(count, options.processes, of_all, strategy)
                assert one[1].keys() == several[1].keys()
                found = {
                    "weights": (one[0] - several[0]).abs().max().item(),
                    "metrics": max(abs(one[1][name] - several[1][name]) for name in one[1]),
                    "predictions": (one[2] - several[2]).abs().max().item(),
                }
                worst = {name: max(value, found[name]) for name, value in worst.items()}
                counts += several[1]["val_count"] == count == len(several[2])
            row = [strategy, options.processes, f"{sizes[0]} to {sizes[-1]}", len(sizes)]
            row += [f"{worst['weights']:.1e}", f"{worst['metrics']:.1e}", f"{counts} of {len(sizes)} exact"]
            print(f"| {' | '.join(map(str, row))} | {worst['predictions']:.1e} |", flush=True)


if __name__ == "__main__":
    main()
