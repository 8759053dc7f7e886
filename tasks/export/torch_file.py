"""A program of `torch.export`: a `.pt2` file that torch alone loads and runs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flashtask.core.files import atomic_write
from flashtask.tasks.export.outputs import Arrays

__all__ = ["FACTS", "TorchFile"]

#: The name of the metadata in the file.
FACTS = "flashtask.json"


class TorchFile:
    """A program, as `torch.export.load` gives it.

    Args:
        program: with one input.
        outputs: names of what it gives.
    """

    #: That may call `run` at the same time.
    num_threads: ClassVar[int] = 1

    def __init__(self, program: torch.export.ExportedProgram, outputs: Sequence[str]) -> None:
        self.program, self.names = program, tuple(outputs)
        self._module: Any = None

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.program.state_dict.values())

    def run(self, images: np.ndarray[Any, Any]) -> Arrays:
        """The outputs of a batch, by the program as a file gives it back."""
        if self._module is None:
            content = io.BytesIO()
            torch.export.save(self.program, content)
            content.seek(0)
            self._module = torch.export.load(content).module()
        with torch.no_grad():
            found = self._module(torch.from_numpy(np.array(images)))
        return {name: one.numpy() for name, one in zip(self.names, found, strict=True)}

    def write(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the file; the facts are in `extra_files` under `FACTS`.

        Raises:
            StorageError: it cannot be written.
        """
        content = io.BytesIO()
        text = json.dumps(dict(facts), ensure_ascii=False, sort_keys=True)
        torch.export.save(self.program, content, extra_files={FACTS: text})
        with atomic_write(path, size=content.getbuffer().nbytes) as file:
            file.write(content.getbuffer())
