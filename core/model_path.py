"""What a path to a model means: a checkpoint file, a run folder, or a folder in timm's layout."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.files import missing_file

__all__ = ["model_path", "refuse_address"]

#: What a run writes, the one to use first; see trainer/run_folder.py.
_BEST, _LAST = "best.ckpt", "last.ckpt"
#: Present in every folder in timm's layout.
_CONFIG = "config.json"
_SHOWN = 4


def model_path(path: str | os.PathLike[str], *, quiet: bool = False) -> Path:
    """The checkpoint file or the pretrained folder that a path means.

    A folder in timm's layout and a file stay as they are. A run folder means its `best.ckpt`, else its `last.ckpt`,
    which a line on stderr reports.

    Args:
        path: a checkpoint file, a run folder, or a folder in timm's layout; `~` is expanded.
        quiet: print nothing.

    Raises:
        MissingInputError: there is no such path, or no model in the folder.
        UsageError: it is an address.
    """
    refuse_address(path)
    found = Path(path).expanduser()
    if found.is_file():
        return found
    if not found.is_dir():
        raise missing_file(found)
    if (found / _CONFIG).is_file():
        return found
    if (found / _BEST).is_file():
        return found / _BEST
    if (found / _LAST).is_file():
        if not quiet:
            print(f"{found} has no {_BEST}: its {_LAST} is used", file=sys.stderr)
        return found / _LAST
    raise _no_model(found)


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Refuse an address in the place of a path.

    Raises:
        UsageError: with the lines that download the file.
    """
    text = os.fspath(path)
    if text.lower().startswith(("http://", "https://")):
        raise UsageError(
            f"{text} is an address, and the path of a file is needed",
            why="a checkpoint is read from a file, and only if the checksum in it is right",
            fix=f'torch.hub.download_url_to_file("{text}", "model.ckpt"), then give "model.ckpt"',
        )


def _no_model(folder: Path) -> MissingInputError:
    why = f"there is no {_BEST} and no {_LAST} in it"
    if others := sorted(file.name for file in folder.glob("*.ckpt")):
        listed = ", ".join(others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
        return MissingInputError(
            f"no checkpoint in {folder} is named {_BEST} or {_LAST}: {listed}", fix=f"give {folder / others[-1]}"
        )
    if (folder / "recipe.yaml").is_file():
        return MissingInputError(
            f"the run in {folder} has not written a checkpoint",
            why=why,
            fix=f"flashtask finetune --output-dir {shlex.quote(str(folder))} --resume",
        )
    if runs := sorted(file.parent for file in folder.glob(f"*/{_LAST}")):
        listed = ", ".join(run.name for run in runs[-_SHOWN:])
        return MissingInputError(f"{folder} is not a run, it holds runs: {listed}", fix=f"give {runs[-1]}")
    return MissingInputError(
        f"there is no model in {folder}",
        why=f"{why}, and no {_CONFIG}",
        fix="give a run folder, a .ckpt file, or a folder that model.save_pretrained(folder) wrote",
    )
