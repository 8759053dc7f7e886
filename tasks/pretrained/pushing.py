"""From a task, a checkpoint, a run or a folder to a repository on the hub, and back to a folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flashtask.backbones.descriptions import WEIGHT_FILES
from flashtask.core.atomic_folders import atomic_folder, require_replaceable
from flashtask.core.errors import UsageError
from flashtask.core.hub.address import HubAddress, branch_address
from flashtask.core.hub.upload import upload_folder
from flashtask.tasks.pretrained.card import PLACE
from flashtask.tasks.pretrained.timm_layout import CARD, CONFIG, FILES, HEAD, ONNX, WEIGHTS, flashtask_part, read_config

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["prepared_folder", "pull", "push_task"]

#: The weights of older repositories, which have no others.
_PICKLED = WEIGHT_FILES[1]


def push_task(
    task: Task,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    licence: str | None = None,
    onnx: bool = False,
) -> str:
    """What `Task.push_to_hub` promises."""
    address = branch_address(repository, revision)
    with tempfile.TemporaryDirectory(prefix="flashtask-") as root:
        folder = Path(root) / address.repository.partition("/")[2]
        task.save_pretrained(folder, licence=licence, onnx=onnx)
        _fill_in_place(folder, address)
        made = upload_folder(folder, address, private=private, message=message or "")
    return f"hf://{address.repository}@{made.commit}"


@contextmanager
def prepared_folder(
    given: Path,
    address: HubAddress,
    load: Callable[[Path], Task],
    licence: str | None = None,
    *,
    onnx: bool = False,
) -> Iterator[Path]:
    """The folder that will be pushed.

    Args:
        given: a checkpoint file, or a folder of `save_pretrained`.
        address: where it will be pushed.
        load: gives the task that a checkpoint holds.
        licence: of the weights.
        onnx: whether the folder also holds the model for ONNX Runtime.

    Raises:
        MissingInputError: there is nothing of this kind.
        IntegrityError: a file is damaged.
        UsageError: a folder that flashtask did not write.
    """
    with tempfile.TemporaryDirectory(prefix="flashtask-") as root:
        folder = Path(root) / address.repository.partition("/")[2]
        if given.is_dir() and (given / CONFIG).is_file():
            _copy_own(given, folder, licence, onnx)
        else:
            load(given).save_pretrained(folder, licence=licence, onnx=onnx)
        _fill_in_place(folder, address)
        yield folder


def pull(address: HubAddress, folder: Path) -> str:
    """Fetch a pretrained model, check it, and write it as a folder; gives the commit.

    Raises:
        OutputError: the folder holds other things.
        HubError: the hub cannot be reached, or refuses.
        IntegrityError: a file is damaged or hostile.
    """
    from flashtask.tasks.pretrained.reading import folder_content
    from flashtask.tasks.pretrained.source import find_source

    require_replaceable(folder, (*FILES, _PICKLED))
    source = find_source(str(address))
    folder_content(source.path)  # so that what is written can be used
    weights = WEIGHTS if (source.path / WEIGHTS).is_file() else _PICKLED  # the other file was not compared
    with atomic_folder(folder, (*FILES, _PICKLED)) as place:
        for name in (CONFIG, weights, HEAD, CARD):
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, place / name)
    return source.record["commit"]


def _copy_own(given: Path, folder: Path, licence: str | None, onnx: bool) -> None:
    from flashtask.tasks.pretrained.reading import folder_content

    part = flashtask_part(read_config(given), given)
    if part is None:
        raise UsageError(
            f"{given} was not written by flashtask",
            fix=f"flashtask.load({str(given)!r}).save_pretrained(folder), and push that",
        )
    if licence is not None:
        raise UsageError(
            "a licence can be given for a checkpoint or a run", fix=f"write `license:` into {given / CARD}"
        )
    if onnx and not (given / ONNX).is_file():
        raise UsageError(
            f"{given} holds no {ONNX}",
            fix=f"flashtask.load({str(given)!r}).save_pretrained(folder, onnx=True), and push that",
        )
    others = sorted(file.name for file in given.iterdir() if file.name not in FILES)
    if others:
        raise UsageError(f"{given} holds other files than a model: {', '.join(others[:4])}", fix="take them out first")
    folder_content(given)  # nothing damaged is pushed
    shutil.copytree(given, folder)


def _fill_in_place(folder: Path, address: HubAddress) -> None:
    card = folder / CARD
    if card.is_file():
        card.write_text(card.read_text("utf-8").replace(PLACE, address.repository), "utf-8")
