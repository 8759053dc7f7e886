"""Finetuning as a callback, as in Lightning: `BackboneFinetuning`, and `BaseFinetuning` for other schedules.

Frozen means what it means for the strategies of `Trainer.finetune`: no gradient, eval mode, statistics untouched. Those
need no callback, and no parameter groups that are added during a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from flashtask.core.errors import UsageError
from flashtask.core.library_internals import batch_norm_class
from flashtask.trainer.callbacks.callback import Callback, state_name
from flashtask.trainer.hooks import arguments_taken
from flashtask.trainer.wrapping import parameters_by_name

if TYPE_CHECKING:
    from flashtask.trainer.module import Module
    from flashtask.trainer.trainer import Trainer

__all__ = ["BackboneFinetuning", "BaseFinetuning"]

Modules: TypeAlias = "nn.Module | Iterable[Modules]"


class BaseFinetuning(Callback):
    """Freezes layers before the optimizers are made, and unfreezes them in epochs that a subclass chooses.

    Write `freeze_before_training(module)` and `finetune_function(module, epoch, optimizer)`, with the methods below.
    The module's `configure_optimizers` leaves out what is frozen:
    `Adam(p for p in self.parameters() if p.requires_grad)`. After the fit the parameters want gradients as before it. A
    resumed run has the parameter groups that were added.
    """

    #: what each parameter wanted before the fit
    _wanted: dict[nn.Parameter, bool]
    #: how many groups each optimizer was made with; empty until that is known
    _first_groups: list[int]
    _state: dict[str, Any]

    def freeze_before_training(self, module: Module) -> None:
        """Freeze what does not train at first; called before the optimizers are made."""
        raise UsageError(
            f"{type(self).__name__} has no freeze_before_training",
            fix="def freeze_before_training(self, module): self.freeze(module.backbone)",
        )

    def finetune_function(self, module: Module, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze what trains from an epoch on; called before each epoch for each optimizer.

        A method with a fourth argument is given the number of the optimizer too.
        """
        raise UsageError(
            f"{type(self).__name__} has no finetune_function",
            fix="def finetune_function(self, module, epoch, optimizer): ...",
        )

    # ---- what a subclass calls

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """Every part of modules that has no parts, or parameters of its own."""
        if isinstance(modules, nn.ModuleDict):
            modules = list(modules.values())
        if not isinstance(modules, nn.Module):
            return [part for one in modules for part in BaseFinetuning.flatten_modules(one)]
        return [part for part in modules.modules() if not list(part.children()) or list(part.parameters(recurse=False))]

    @staticmethod
    def filter_params(modules: Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of modules that want gradients, or that do not; BatchNorm's only with `train_bn`."""
        for part in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(part, batch_norm_class()):
                yield from (p for p in part.parameters(recurse=False) if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Let all parameters of modules want gradients."""
        for part in BaseFinetuning.flatten_modules(modules):
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(True)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Let no parameter of modules want gradients; with `train_bn`, BatchNorm layers train all the same."""
        for part in BaseFinetuning.flatten_modules(modules):
            is_spared = train_bn and isinstance(part, batch_norm_class())
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(is_spared)

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that an optimizer does not have yet."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [p for p in params if id(p) not in known]

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreeze modules, and let an optimizer have a parameter group of what it does not hold yet.

        Args:
            modules: to unfreeze.
            optimizer: that trains them.
            lr: of the group; None means that of the first group divided by `initial_denom_lr`.
            initial_denom_lr: see `lr`.
            train_bn: whether the parameters of BatchNorm layers are among those of the group.
        """
        BaseFinetuning.make_trainable(modules)
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
        added = BaseFinetuning.filter_on_optimizer(optimizer, BaseFinetuning.filter_params(modules, train_bn=train_bn))
        if added:
            optimizer.add_param_group({"params": added, "lr": rate})

    # ---- in a run

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Freeze, before a fit makes its optimizers."""
        if stage == "fit":
            self._wanted = {p: p.requires_grad for p in module.parameters()}
            self._first_groups, self._state = [], {}
            self.freeze_before_training(module)

    def teardown(self, trainer: Trainer, module: Module, stage: str) -> None:
        """Let the parameters want gradients as before the fit."""
        if stage == "fit":
            for parameter, wanted in self._wanted.items():
                parameter.requires_grad_(wanted)

    def on_load_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """Add the parameter groups that the run had, before the states of its optimizers are restored."""
        state = checkpoint["callbacks"].get(state_name(self), {})
        by_name = parameters_by_name(module)
        self._note_first_groups(trainer)
        for optimizer, groups in zip(trainer.optimizers, state.get("groups", []), strict=False):
            for names in groups:
                optimizer.add_param_group({"params": [by_name[name] for name in names]})
        for name in state.get("trains", []):
            by_name[name].requires_grad_(True)

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """Unfreeze what trains from this epoch on; what is frozen is in eval mode."""
        self._note_first_groups(trainer)
        takes_number = arguments_taken(self.finetune_function) in (None, 4)
        for number, optimizer in enumerate(trainer.optimizers):
            further = (number,) if takes_number else ()
            self.finetune_function(module, trainer.current_epoch, optimizer, *further)
        for part in module.modules():
            own = list(part.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own) and any(self._wanted.get(p, False) for p in own):
                part.training = False
        names = {id(parameter): name for name, parameter in parameters_by_name(module).items()}
        self._state = {
            "groups": [
                [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups[first:]]
                for optimizer, first in zip(trainer.optimizers, self._first_groups, strict=True)
            ],
            "trains": [names[id(p)] for p in module.parameters() if p.requires_grad],
        }

    def _note_first_groups(self, trainer: Trainer) -> None:
        if not self._first_groups:
            self._first_groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]

    def state_dict(self) -> dict[str, Any]:
        """The names of the parameters in groups that were added, by optimizer, and of all that train."""
        return dict(self._state)


class BackboneFinetuning(BaseFinetuning):
    """Trains everything but `module.backbone` at first, then the backbone too, at a rate that grows by epochs.

    Args:
        unfreeze_backbone_at_epoch: the first epoch in which the backbone trains, counted from 0.
        lambda_func: epoch -> the factor by which the backbone's rate grows in it.
        backbone_initial_ratio_lr: the backbone's first rate, as a share of the rate of the first parameter group.
        backbone_initial_lr: its first rate, instead of the share.
        should_align: the backbone's rate is not above that of the first parameter group.
        initial_denom_lr: of no effect, as the first rate is always known; for scripts that pass it.
        train_bn: train BatchNorm layers of the backbone, from the beginning.
        verbose: print both rates at the start of an epoch.
        rounding: digits of a printed rate.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = lambda epoch: 2.0,
        backbone_initial_ratio_lr: float = 0.1,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        self.unfreeze_backbone_at_epoch, self.lambda_func = unfreeze_backbone_at_epoch, lambda_func
        self.backbone_initial_ratio_lr, self.backbone_initial_lr = backbone_initial_ratio_lr, backbone_initial_lr
        self.should_align, self.initial_denom_lr = should_align, initial_denom_lr
        self.train_bn, self.verbose, self.rounding = train_bn, verbose, rounding
        self.previous_backbone_lr: float | None = None
        self._epoch: int | None = None

    def freeze_before_training(self, module: Module) -> None:
        """Freeze the backbone."""
        self.previous_backbone_lr = self._epoch = None
        self.freeze(module.parts_to_freeze(), train_bn=self.train_bn)

    def finetune_function(self, module: Module, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze the backbone in its epoch, and let its rate grow after it."""
        head = float(optimizer.param_groups[0]["lr"])
        if epoch < self.unfreeze_backbone_at_epoch or epoch == self._epoch:
            return  # an epoch that is continued has its rate already
        if self.previous_backbone_lr is None:
            initial = self.backbone_initial_lr
            rate = head * self.backbone_initial_ratio_lr if initial is None else initial
            self.unfreeze_and_add_param_group(module.parts_to_freeze(), optimizer, rate, train_bn=self.train_bn)
        else:
            rate = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            rate = min(rate, head) if self.should_align else rate
            optimizer.param_groups[-1]["lr"] = rate
        self.previous_backbone_lr, self._epoch = rate, epoch
        if self.verbose and module.trainer is not None:
            shown = f"{round(head, self.rounding)}, of the backbone {round(rate, self.rounding)}"
            module.trainer.say(f"epoch {epoch}: learning rate {shown}")

    def state_dict(self) -> dict[str, Any]:
        """That of the base, and the rate of the backbone with its epoch."""
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called when a run is resumed."""
        self.previous_backbone_lr, self._epoch = state["previous_backbone_lr"], state["epoch"]
