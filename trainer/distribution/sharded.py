"""Weights, gradients and optimizer states shared out over the processes: `fsdp`, by torch's `fully_shard` (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from flashtask.core.errors import UsageError
from flashtask.trainer.distribution.data_parallel import TIMEOUT, DataParallel, ForkedDataParallel
from flashtask.trainer.distribution.sharded_module import Recomputing, ShardedModule, blocks_of

if TYPE_CHECKING:
    from flashtask.trainer.module import Module

__all__ = ["ForkedFullyShardedDataParallel", "FullyShardedDataParallel", "OffloadedFullyShardedDataParallel"]


#: Torch remembers how it shared out tensors of equal meshes, and by that which process this is, which a fork changes.
_FITS = count(1)


class FullyShardedDataParallel(DataParallel):
    """A process for each device, each of which keeps its share of the weights, gradients and optimizer states.

    The weights of a block are put together where the block is computed, and let go after it. The module is shared out
    once in a fit, before its optimizers are made; freezing and unfreezing turn gradients on and off and nothing else.
    When the fit is over the module is whole again in every process, and the optimizers' states are whole in the first.

    **Evaluation.** A pass of validation puts all weights together once and lets go of them after it. The processes may
    have different numbers of batches, and an exchange for each batch would wait for one that has none left; and one
    exchange is faster than one for each batch. A device must have room for all weights at that time, as it had before
    they were shared out, but for no gradients. `test`, `validate` and `predict` outside of a fit share nothing out.

    **Precision.** The trainer's `bf16-mixed` and `16-mixed` are autocast, as with every strategy: weights are
    exchanged in float32, and the numbers are those of `ddp`. A `mixed_precision` policy is applied on top of it:
    `MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)` halves the exchange, and everything
    that is computed with weights, norms too, then sees them rounded. In `bf16-true` gradients are added up in float32.

    Args:
        auto_wrap_policy: classes of the blocks. None finds them by the backbone's layer groups; an empty set makes the
            module one block.
        activation_checkpointing: keep only what goes into each block, and compute it again in the backward pass.
        cpu_offload: keep the shares in the memory of the host, where the optimizer then steps too.
        mixed_precision: torch's policy of the exchange.
        reshard_after_forward: let go of a block's weights after its forward pass. False needs more memory, and one
            exchange less in the backward pass.
        timeout: seconds that one process waits for another.
        options: accelerator and precision, as `Strategy` takes them.

    Raises:
        UsageError: when a fit is set up: what cannot be shared out, with what to do instead.
    """

    name = "fsdp"
    shares_weights = True

    def __init__(
        self,
        auto_wrap_policy: Collection[type[nn.Module]] | None = None,
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        mixed_precision: MixedPrecisionPolicy | None = None,
        reshard_after_forward: bool = True,
        timeout: float = TIMEOUT,
        **options: Any,
    ) -> None:
        super().__init__(timeout=timeout, **options)
        self.auto_wrap_policy, self.mixed_precision = auto_wrap_policy, mixed_precision
        self.activation_checkpointing, self.cpu_offload = activation_checkpointing, cpu_offload
        self.reshard_after_forward = reshard_after_forward
        #: what the fits that run now have shared out, an inner one last
        self._sharded: list[ShardedModule] = []
        self._recomputing: list[Recomputing] = []

    @contextmanager
    def launch(self) -> Iterator[None]:
        """As `ddp`; a fit that went well leaves whole modules behind. Where one failed the others do not answer."""
        with super().launch():
            sharded, recomputing = len(self._sharded), len(self._recomputing)
            try:
                yield
                for one in self._sharded[sharded:]:
                    one.make_whole(keeps_states=self.is_global_zero)
            finally:
                while len(self._sharded) > sharded:
                    self._sharded.pop().let_go()
                while len(self._recomputing) > recomputing:
                    self._recomputing.pop().end()

    def setup(self, module: Module) -> None:
        """Share the module out, if it is to be fitted; the weights are those of the first process."""
        run = module.trainer.fit_run
        if run is None or run is not module.trainer.active_run:
            return
        if self._of(module) is not None or run.solves_head:
            return
        self._check(module)
        blocks = blocks_of(module, self.auto_wrap_policy)
        if self.activation_checkpointing:
            self._recomputing.append(Recomputing(_some(blocks, module)))
        if self.world_size == 1:
            return
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._sharded.append(
            ShardedModule(
                module,
                blocks,
                mesh=init_device_mesh(self._device.type, (self.world_size,), mesh_dim_names=(f"fit_{next(_FITS)}",)),
                mp_policy=self.mixed_precision or _policy_of(module),
                offload_policy=CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
                reshard_after_forward=self.reshard_after_forward,
            )
        )

    def wrap_step(self, module: Module, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step between the hooks that put the weights together and share the gradients out."""
        sharded = self._of(module)
        return super().wrap_step(module, step) if sharded is None else partial(sharded.step, step)

    @contextmanager
    def whole_weights(self, module: nn.Module) -> Iterator[None]:
        """All weights of the module in every process, until the end of the context."""
        sharded = self._of(module)
        if sharded is None:
            yield
            return
        with sharded.whole_weights():
            yield

    def _of(self, module: nn.Module) -> ShardedModule | None:
        return next((one for one in self._sharded if one.module is module), None)

    def _check(self, module: Module) -> None:
        if self.cpu_offload and (self._device.type == "cpu" or self.world_size == 1):
            raise UsageError(
                "cpu_offload=True does nothing here",
                why="the weights are on the CPU already" if self._device.type == "cpu" else "there is one process",
                fix='strategy="fsdp"' if self._device.type == "cpu" else "devices=2 or more",
            )
        if self.world_size == 1:
            return
        if not module.automatic_optimization:
            raise UsageError(
                'strategy="fsdp" with automatic_optimization = False',
                why="gradients are shared out after the training step, and this step wants them within it",
                fix='strategy="ddp"',
            )
        if names := [name for name, parameter in module.named_parameters() if parameter.dim() == 0]:
            raise UsageError(
                f"{names[0]} is a single number without a dimension, which cannot be shared out",
                fix='give it one: nn.Parameter(torch.zeros(1)); or strategy="ddp"',
            )


class OffloadedFullyShardedDataParallel(FullyShardedDataParallel):
    """As `fsdp`, with the shares in the memory of the host."""

    name = "fsdp_cpu_offload"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"cpu_offload": True, **options})


class ForkedFullyShardedDataParallel(FullyShardedDataParallel, ForkedDataParallel):
    """As `fsdp`, by processes that are forked where the method is called: for notebooks."""

    name = "fsdp_spawn"

    @contextmanager
    def launch(self) -> Iterator[None]:
        """As `ddp_spawn`."""
        # Autograd that starts within FSDP starts threads, and cannot be used in a process that is forked later.
        torch.zeros(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
        with super().launch():
            yield


def _policy_of(module: nn.Module) -> MixedPrecisionPolicy:
    """Gradients of half precisions are added up in float32."""
    halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters())
    return MixedPrecisionPolicy(reduce_dtype=torch.float32 if halves else None)


def _some(blocks: list[nn.Module], module: nn.Module) -> list[nn.Module]:
    if not blocks:
        raise UsageError(
            f"activation_checkpointing=True, and {type(module).__name__} has no blocks",
            fix="auto_wrap_policy={MyBlock}, the classes of what is to be computed again",
        )
    return blocks
