"""torchvision's weights in torch's cache: compared with the hash in their name each time, and read as tensors alone.

torchvision compares a file when it is downloaded and never again, and lets torch unpickle whatever it finds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashtask.core.errors import IntegrityError
from flashtask.core.files import sha256_file

__all__ = ["as_tensors_alone", "check_cached_file"]

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_HASH = re.compile(r"-([0-9a-f]{8,64})\.")


def check_cached_file(file: Path) -> None:
    """Compare a downloaded file with the beginning of its sha256 that stands in its name, if it is there.

    Raises:
        IntegrityError: it is another file.
    """
    named = _HASH.search(file.name)
    if named is None or not file.exists():
        return
    digest = sha256_file(file)
    if not digest.startswith(named[1]):
        why = f"its sha256 begins with {digest[: len(named[1])]}, not {named[1]}"
        raise IntegrityError(f"{file} is not what its name says", why=why, fix=f"rm {file}")


@contextmanager
def as_tensors_alone() -> Iterator[None]:
    """Inside, `torch.load` means `weights_only=True` whoever calls it."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
