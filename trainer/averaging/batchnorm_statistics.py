"""BatchNorm's running statistics, computed anew for weights that were not trained as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flashtask.core.metrics import is_metric, uncounted
from flashtask.core.seeding import generator_states, seed_generators, set_generator_states
from flashtask.trainer.signals import RunInterruptedError
from flashtask.trainer.wrapping import own_name

if TYPE_CHECKING:
    from flashtask.trainer.fit_run import FitRun

__all__ = ["layers_with_statistics", "parts_in_eval_mode", "refresh_statistics"]


def layers_with_statistics(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of a module that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


def parts_in_eval_mode(module: nn.Module) -> list[str]:
    """Names of the parts that do not train now, because they are frozen or a hook says so."""
    return [own_name(name) for name, part in module.named_modules() if not part.training]


def refresh_statistics(run: FitRun, epoch: int, in_eval_mode: Collection[str]) -> int:
    """Compute the statistics of a fit's module as means over one pass over its training data; nothing else changes.

    As `torch.optim.swa_utils.update_bn`, but through the module's own training step, so it takes any batch. The pass
    has the order and the augmentation of an epoch; the generators are seeded for it and put back.

    Args:
        run: of the fit, between two epochs.
        epoch: whose order and augmentation.
        in_eval_mode: names of the parts that stay in eval mode, with the statistics they have.

    Returns:
        The number of layers whose statistics are new.

    Raises:
        RunInterruptedError: a signal came during the pass; the statistics are not to be used.
    """
    stays = set(in_eval_mode)
    with _leaving_no_trace(run):
        for name, part in run.module.named_modules():
            part.training = own_name(name) not in stays
        layers = [layer for layer in layers_with_statistics(run.module) if layer.training]
        if layers:
            # Compiled parts would be compiled anew for this pass alone, because the momentum is another.
            with _cumulative(layers), torch.compiler.set_stance("force_eager"):
                _pass_over_training_data(run, epoch)
    return len(layers)


@contextmanager
def _cumulative(layers: list[_BatchNorm]) -> Iterator[None]:
    """Begin anew, with a mean over all batches in place of a moving one."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _pass_over_training_data(run: FitRun, epoch: int) -> None:
    """The forward half of an epoch's training steps.

    Gradients are not turned off: a training step may need some of its own (a penalty, adversarial images).
    """
    for batch_idx, batch in enumerate(_batches(run, epoch)):
        if run.interrupted_by is not None:
            raise RunInterruptedError(run.interrupted_by)
        run.forward_only(batch, batch_idx)
    for optimizer in run.optimizers:
        optimizer.zero_grad()


def _batches(run: FitRun, epoch: int) -> Iterator[Any]:
    if run.ordered is not None:
        run.ordered.set_place(epoch, frozen=run.is_frozen(epoch))
    elif hasattr(getattr(run.loader, "sampler", None), "set_epoch"):
        run.loader.sampler.set_epoch(epoch)
    return islice(iter(run.loader), run.limit)


@contextmanager
def _leaving_no_trace(run: FitRun) -> Iterator[None]:
    """Put back what a training step changes beside BatchNorm: modes, buffers, metrics, logged values, generators."""
    module = run.module
    modes = [(part, part.training) for part in module.modules()]
    buffers = _other_buffers(module)
    states = generator_states()
    # Of a loader that was left alone: its order and its transforms draw from here.
    seed_generators(run.seed)
    try:
        with run.logging_nothing(), uncounted(part for part in module.modules() if is_metric(part)):
            yield
    finally:
        set_generator_states(states)
        for part, name, buffer, before in buffers:
            buffer.copy_(before)
            part._buffers[name] = buffer
        for part, mode in modes:
            part.training = mode


def _other_buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Buffers that are no statistics of BatchNorm: whose, their names, themselves, and copies."""
    others = (part for part in module.modules() if not isinstance(part, _BatchNorm))
    found = ((part, name, buffer) for part in others for name, buffer in part._buffers.items() if buffer is not None)
    return [(part, name, buffer, buffer.clone()) for part, name, buffer in found]
