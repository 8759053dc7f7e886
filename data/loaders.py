"""Loaders of image datasets, and how many processes load."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from torch.utils.data import DataLoader

from flashtask.data.datasets import ImageFileDataset

__all__ = ["fitting_workers", "image_loader"]

# Below this number of images, starting worker processes costs more than it saves.
_SMALL = 256


def image_loader(
    dataset: ImageFileDataset, batch_size: int, num_workers: int | None = None, *, shuffle: bool = False
) -> DataLoader[Any]:
    """A plain loader of batches, the last of which may be smaller.

    Args:
        dataset: the images.
        batch_size: images in a batch.
        num_workers: processes that load; 0 loads in this one, None decides by `fitting_workers`.
        shuffle: a new order each epoch.
    """
    workers = fitting_workers(len(dataset)) if num_workers is None else num_workers
    # A generator of its own: a new iterator would otherwise draw from the stream that dropout uses.
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )


def fitting_workers(num_images: int) -> int:
    """Two worker processes where an accelerator waits for them, and they are forked and worth their start, else 0.

    Where the CPU itself trains, its cores are busy computing: with two workers on two cores a frozen
    EfficientNet-Lite0 saw 104 images/s instead of 111, and far fewer while other work ran beside it. Spawned
    workers run the user's script again, which kills one without a main guard, so they are never chosen here.
    """
    # Asked with allow_none: the plain question would fix the start method for the whole program.
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    can_fork = method == "fork" and not multiprocessing.current_process().daemon
    if not torch.accelerator.is_available() or not can_fork or num_images < _SMALL:
        return 0
    return 2
