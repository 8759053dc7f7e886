"""Hashes of everything that an object holds, of random generators and of files: whether something left a trace."""

from __future__ import annotations

import hashlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashtask.core.seeding import generator_states

_BY_NAME = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type)


def fingerprint(*objects: Any) -> str:
    """One hash of objects and all they refer to: tensors with strides, flags and gradients, attributes, containers."""
    return hashlib.sha256(repr([_told(held, {}) for held in objects]).encode()).hexdigest()


def of_process() -> str:
    """The states of the process's random generators."""
    return fingerprint(generator_states())


def of_files(*folders: Path) -> dict[str, str]:
    """Path -> hash of every file below some folders, and every folder."""
    found = {}
    for path in sorted(path for folder in folders for path in [folder, *folder.rglob("*")]):
        found[str(path)] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _told(held: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    if held is None or isinstance(held, (bool, int, float, complex, str, bytes, Path)):
        return repr(held)
    if id(held) in seen:
        return f"the {seen[id(held)][0]}th"
    seen[id(held)] = len(seen), held  # held, so that no later object has the same id
    kind = type(held).__qualname__
    if isinstance(held, torch.Tensor):
        content = hashlib.sha256(held.detach().contiguous().cpu().numpy().tobytes()).hexdigest()
        return kind, content, held.stride(), held.dtype, held.requires_grad, _told(held.grad, seen)
    if isinstance(held, np.ndarray):
        return kind, hashlib.sha256(held.tobytes()).hexdigest(), held.shape, held.dtype
    if isinstance(held, torch.Generator):
        return kind, _told(held.get_state(), seen)
    if isinstance(held, _BY_NAME):
        return kind, getattr(held, "__qualname__", held.__name__)
    if isinstance(held, dict):
        return kind, [(_told(key, seen), _told(value, seen)) for key, value in held.items()], _told(_vars(held), seen)
    if isinstance(held, (list, tuple, set, frozenset)):
        return kind, [_told(part, seen) for part in held]
    return kind, _told(_vars(held), seen)


def _vars(held: Any) -> Any:
    return dict(getattr(held, "__dict__", {})) or None
