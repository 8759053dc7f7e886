"""What is exported: the whole way from pictures to outputs as one module, which `torch.export` turns into a graph."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashtask.core.folding import folded_copy
from flashtask.core.library_internals import give_own_part_table
from flashtask.tasks.export.resize import Resize
from flashtask.trainer.batch_transfer import in_dtype

if TYPE_CHECKING:
    from flashtask.tasks.export.outputs import Outputs
    from flashtask.tasks.task import Task

__all__ = ["ExportGraph"]


class ExportGraph(nn.Module):
    """Preprocessing, network and decoding of a task, float32 on the CPU.

    Args:
        task: is not changed.
        outputs: what it gives.
        has_preprocessing: whether it begins with pictures, else with normalised inputs.
        may_branch: as for `Resize`.

    Shape: pictures (N, H, W, C) uint8, or inputs (N, C, h, w) float32, to a tuple of tensors, one for each output.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, task: Task, outputs: Outputs, has_preprocessing: bool, *, may_branch: bool = True) -> None:
        super().__init__()
        preprocessing = task.preprocessing
        self.resize = Resize(preprocessing, may_branch=may_branch) if has_preprocessing else None
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocessing, name))[:, None, None])
        self.network = _network(task)
        self._outputs = outputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs of a batch."""
        place = None
        if self.resize is not None:
            images, place = self.resize(images.permute(0, 3, 1, 2).float())
            images = (images / 255 - self.mean) / self.std
        found: Any = in_dtype(self.network(images), torch.float32)
        return self._outputs.in_graph(self.network, found, place)


def _network(task: Task) -> Any:
    """A copy of the task in eval mode, with BatchNorm folded into convolutions where that is exact."""
    made = copy.copy(task)
    made.training = False
    parts = give_own_part_table(made)
    parts.pop("metrics", None)
    if isinstance(head := parts.get("head"), nn.Module):
        parts["head"] = copy.deepcopy(head).cpu().float().eval()
    backbone = copy.deepcopy(task.backbone).cpu().float().eval()
    example = torch.randn(2, *task.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    parts["backbone"] = folded_copy(backbone, example, fuses=False) or backbone
    return made.to(memory_format=torch.contiguous_format)
