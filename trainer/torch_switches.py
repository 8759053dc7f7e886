"""Switches of the whole process that a run sets and puts back: deterministic algorithms, cuDNN's search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["switches"]


@contextmanager
def switches(deterministic: bool | str | None, benchmark: bool | None) -> Iterator[None]:
    """Hold torch's switches as a trainer wants them.

    Args:
        deterministic: True lets torch use deterministic algorithms alone and raise where there is none, `warn` warns
            there; None leaves the switch as it is.
        benchmark: whether cuDNN tries which algorithm is fastest; None leaves the switch as it is.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.benchmark
    if deterministic is not None:
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    if benchmark is not None:
        torch.backends.cudnn.benchmark = benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = cudnn
