"""Settings for the whole suite: one torch thread (15 times faster on two cores), a cache folder of its own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's own cache."""
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
