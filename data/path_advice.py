"""What to do about paths in a table that lead nowhere, found by looking for the files that they may mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from flashtask.data.layout import IMAGE_EXTENSIONS, nearest_existing
from flashtask.data.problems import OTHER_ROOT

__all__ = ["advice_on_paths"]

#: Folders and files below the root that are looked at, at most: an error must not take minutes.
_LOOKED_AT = 20_000


def advice_on_paths(missing: Sequence[str], root: str, field: str) -> str:
    """The fix for files that do not exist; it is offered only if it was seen to hold for the first and the last.

    Args:
        missing: absolute paths, at least one.
        root: the folder that relative paths count from.
        field: the column that names them.
    """
    if root and not os.path.isdir(root):
        near = nearest_existing(Path(root), only_folders=True)
        return f"there is no folder {root!r}" + (f'; images_root="{near}"' if near is not None else "")
    first, last = missing[0], missing[-1]
    if all("\\" in path and os.path.exists(path.replace("\\", "/")) for path in (first, last)):
        return f"write / in place of \\ in the column {field!r}"
    ending = next((one for one in sorted(IMAGE_EXTENSIONS) if os.path.exists(first + one)), None)
    if ending:
        return f"write the names in the column {field!r} with their ending: {os.path.basename(first) + ending!r}"
    found = [_found_below(root, path) for path in (first, last)]
    if not all(found):
        return f"correct the column {field!r}" if _is_outside(first, root) else OTHER_ROOT
    if _is_outside(first, root):
        return f"write the paths relative to {root!r}: {os.path.relpath(found[0], root)!r}"
    starts = {place.removesuffix(os.path.relpath(path, root)) for place, path in zip(found, (first, last), strict=True)}
    if len(starts) == 1 and all(map(os.path.isdir, starts)):
        return f'images_root="{starts.pop().rstrip(os.sep)}"'
    return f"write the paths in the column {field!r} with their folders: {os.path.relpath(found[0], root)!r}"


def _is_outside(path: str, root: str) -> bool:
    return bool(root) and os.path.relpath(path, root).startswith(os.pardir)


def _found_below(root: str, path: str) -> str:
    """The file of this name below the root; empty if there is none among those that are looked at, or several."""
    name, seen = os.path.basename(path), 0
    found: list[str] = []
    for folder, folders, files in os.walk(root) if root and name else ():
        seen += len(files) + len(folders)
        if seen > _LOOKED_AT:
            break
        found += list(islice((os.path.join(folder, one) for one in files if one == name), 2))
    return found[0] if len(found) == 1 else ""
