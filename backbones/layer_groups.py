"""Layers of a module that does not say which they are, from the way in which it is put together."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["default_layer_groups"]

_ROWS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def default_layer_groups(module: nn.Module) -> list[list[str]]:
    """One group for each block, in the order of registration; a part without blocks is one group.

    Blocks are what a `Sequential`, `ModuleList` or `ModuleDict` holds, at any depth, with two matrices or kernels at
    least. Parameters of the module itself come first; those of a norm beside blocks belong to the block before it; one
    that two parts share belongs to the first.
    """
    shapes = {name: parameter.ndim for name, parameter in module.named_parameters()}
    groups: list[list[str]] = []
    for names in _parts(module, ""):
        own = [name for name in names if name in shapes]
        if groups and own and all(shapes[name] < 2 for name in own) and "." in own[0]:
            groups[-1].extend(own)
        elif own:
            groups.append(own)
        for name in own:
            del shapes[name]
    return groups


def _parts(module: nn.Module, prefix: str) -> Iterator[list[str]]:
    yield [prefix + name for name, _ in module.named_parameters(recurse=False)]
    for name, child in module.named_children():
        if _has_blocks(child):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield [f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()]


def _has_blocks(module: nn.Module) -> bool:
    """Whether a part is a row of blocks, or a stage: something with nearly all that it has in such rows."""
    if isinstance(module, _ROWS):
        return any(_is_block(child) for child in module.children())
    whole = sum(parameter.numel() for parameter in module.parameters())
    rows = [child for child in module.children() if isinstance(child, _ROWS)]
    inside = sum(parameter.numel() for row in rows if _has_blocks(row) for parameter in row.parameters())
    return inside > whole * 0.6


def _is_block(module: nn.Module) -> bool:
    return sum(parameter.ndim > 1 for parameter in module.parameters()) > 1
