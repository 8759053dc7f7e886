"""Training goes on bit for bit after a checkpoint: every optimizer and scheduler that torch has."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler

from flashtask.core.checkpoint import read_checkpoint, write_checkpoint


def network(sparse=False):
    torch.manual_seed(7)
    first = torch.nn.Embedding(5, 4, sparse=True) if sparse else torch.nn.Linear(5, 4, bias=False)
    return first if sparse else torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.Linear(4, 3, bias=False))


def train(model, optimizer, steps, scheduler=None):
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(6, 5, generator=generator)
        if isinstance(model, torch.nn.Embedding):
            inputs = inputs.argmax(1)

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = model(inputs).square().sum()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(step % 3)
        elif scheduler is not None:
            scheduler.step()
    return losses


def resumed(tmp_path, build):
    """Losses and weights after 5 + 5 steps: straight through, and with a file and new objects in between."""
    model, optimizer, scheduler = build()
    train(model, optimizer, range(5), scheduler)
    states = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    states["lr_schedulers"] = [scheduler.state_dict()] if scheduler else []
    write_checkpoint(tmp_path / "a.ckpt", states)
    straight = train(model, optimizer, range(5, 10), scheduler)
    fresh, fresh_optimizer, fresh_scheduler = build()
    content = read_checkpoint(tmp_path / "a.ckpt")
    fresh.load_state_dict(content["state_dict"])
    fresh_optimizer.load_state_dict(content["optimizer_states"][0])
    if fresh_scheduler is not None:
        fresh_scheduler.load_state_dict(content["lr_schedulers"][0])
    again = train(fresh, fresh_optimizer, range(5, 10), fresh_scheduler)
    return straight + bits(model), again + bits(fresh)


def bits(model):
    return [value.numpy().tobytes() for value in model.state_dict().values()]


def subclasses(module, base):
    found = {name: kind for name, kind in vars(module).items() if isinstance(kind, type) and issubclass(kind, base)}
    return {name: kind for name, kind in found.items() if kind is not base and not name.startswith("_")}


OPTIMIZERS = [(name, {}) for name in sorted(subclasses(torch.optim, torch.optim.Optimizer))] + [
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adam", {"amsgrad": True, "lr": torch.tensor(0.01)}),
    ("AdamW", {"foreach": True, "maximize": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("LBFGS", {"line_search_fn": "strong_wolfe", "history_size": 3}),
]


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=str)
def test_every_optimizer_goes_on_bit_for_bit(tmp_path, name, options):
    def build():
        model = network(sparse=name == "SparseAdam")
        return model, getattr(torch.optim, name)(model.parameters(), **copy.deepcopy(options)), None

    straight, again = resumed(tmp_path, build)
    assert straight == again


def sequence(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5), lr_scheduler.MultiStepLR(optimizer, [1, 3])]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.MultiStepLR(o, [3, 7]), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=7),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="triangular2"),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 7, 7, 9]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "SequentialLR": sequence,
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
}


@pytest.mark.parametrize("name", sorted(subclasses(lr_scheduler, lr_scheduler.LRScheduler)))
def test_every_scheduler_goes_on_bit_for_bit(tmp_path, name):
    optimizers = []

    def build():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizers.append(optimizer)
        return model, optimizer, SCHEDULERS[name](optimizer)

    straight, again = resumed(tmp_path, build)
    assert straight == again
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
