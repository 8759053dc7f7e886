"""Loaders of image datasets, and how many processes load."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from flashtask.core.seeded_sampler import EpochSampler
from flashtask.data.datasets import ImageFileDataset, collate
from flashtask.data.threads import num_cores

__all__ = ["fitting_workers", "image_loader"]

# Below this number of images, starting worker processes costs more than it saves.
_SMALL = 256
_IMAGES_EACH = 128
_MOST = 8


def image_loader(
    dataset: ImageFileDataset,
    batch_size: int,
    num_workers: int | None = None,
    *,
    shuffle: bool = False,
    sampler: Sampler[int] | None = None,
) -> DataLoader[Any]:
    """A plain loader of batches, the last of which may be smaller.

    Args:
        dataset: the images.
        batch_size: images in a batch.
        num_workers: processes that load; 0 loads in this one, None decides by `fitting_workers`.
        shuffle: a new order each epoch.
        sampler: draws the samples of each epoch, in place of `shuffle`.
    """
    workers = fitting_workers(len(dataset)) if num_workers is None else num_workers
    # A generator of its own: a new iterator would otherwise draw from the stream that dropout uses.
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle and sampler is None,
        sampler=None if sampler is None else EpochSampler(sampler),
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        # Copies to the accelerator then run beside its computing. Where there is none, torch would warn.
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def fitting_workers(num_images: int) -> int:
    """Worker processes where an accelerator waits for them and they are forked and worth their start, else 0.

    One for each core but the one that feeds the accelerator, up to eight, and no more than one for each 128 images.
    Where the CPU itself computes, its cores are busy: threads of this process decode a batch between two steps, and
    keep what they decoded. Two workers on two cores saw 104 images/s of a frozen EfficientNet-Lite0 instead of 111.
    Spawned workers run the user's script again, which kills one without a main guard, so they are never chosen here.
    """
    # Asked with allow_none: the plain question would fix the start method for the whole program.
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    can_fork = method == "fork" and not multiprocessing.current_process().daemon
    if not torch.accelerator.is_available() or not can_fork or num_images < _SMALL:
        return 0
    return max(1, min(num_cores() - 1, _MOST, num_images // _IMAGES_EACH))
