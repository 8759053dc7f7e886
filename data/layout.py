"""Where the folders of a data set are: mistyped paths, the split folders below a root, and what counts as an
image.

Nothing here imports torch or Pillow, so that the command line can check paths before it loads them.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flashtask.core.errors import BadDataError, FlashtaskError, MissingInputError, UsageError, nearest
from flashtask.core.yaml_reader import read_yaml

__all__ = [
    "ARCHIVE_ENDINGS",
    "DEFAULT_VAL_SPLIT",
    "IMAGE_EXTENSIONS",
    "SHARD_INDEX",
    "SPLIT_NAMES",
    "Layout",
    "entries_of",
    "existing_folder",
    "has_annotations",
    "has_class_folders",
    "holds_images",
    "is_folder",
    "is_hidden",
    "is_image_name",
    "is_registered",
    "is_shards",
    "is_table_name",
    "is_yolo_file",
    "nearest_existing",
    "part_in_name",
    "resolve_layout",
    "split_folders",
    "stage_folder",
    "subfolders",
]

# fmt: off
IMAGE_EXTENSIONS = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".npy", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
))
# fmt: on

#: Of files that hold a table of samples.
TABLE_ENDINGS = (".csv", ".tsv", ".parquet", ".pq", ".jsonl", ".ndjson")

#: The folder names that mean a part of the data rather than a class.
SPLIT_NAMES = {
    "train": ("train",),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
    "predict": ("predict",),
}

#: Words that mean a part where two folders have them: `Training` and `Testing`, `seg_train` and `seg_test`.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
    "predict": ("predict", "pred"),
}

#: Folders that operating systems, file servers and notebooks leave among data, in lower case.
#: Names of folders with annotations.
_ANNOTATION_FOLDERS = frozenset({"annotations", "labels", "masks"})
_SYSTEM_FOLDERS = frozenset(
    (
        *("__macosx", "__pycache__", "lost+found", "$recycle.bin", "recycler", "system volume information"),
        *("@eadir", "@recycle", "#recycle", "#snapshot", "@tmp", "found.000"),
    )
)

#: Of archives that may hold data.
ARCHIVE_ENDINGS = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


#: The share of the training images that validates where a root has no validation images of its own.
DEFAULT_VAL_SPLIT = 0.2
#: The file that tells a folder of shards from others.
SHARD_INDEX = "shards.json"


@dataclass(frozen=True)
class Layout:
    """The folders that `resolve_layout` found below a root; None where there is none."""

    train: Path
    val: Path | None = None
    test: Path | None = None
    predict: Path | None = None


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken as an image (by its extension, in any case).

    Besides IMAGE_EXTENSIONS those count that a plug-in has registered with Pillow, such as `.heic` by pillow-heif.
    """
    ending = os.path.splitext(name)[1].lower()
    if ending in IMAGE_EXTENSIONS:
        return True
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and is_registered(pillow.EXTENSION.get(ending, ""))


def is_registered(image_format: str) -> bool:
    """Whether Pillow reads a format by a plug-in that is not its own.

    Args:
        image_format: as Pillow calls it, such as `HEIF`.
    """
    pillow = sys.modules.get("PIL.Image")
    factory = None if pillow is None else pillow.OPEN.get(image_format, (None,))[0]
    return factory is not None and not (getattr(factory, "__module__", "") or "").startswith("PIL.")


def is_hidden(name: str) -> bool:
    """Whether an entry is not data: dot files, and folders of the system such as `@eaDir` or `lost+found`."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one. A link that points at itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def entries_of(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What lies directly in a folder, sorted by name.

    Raises:
        BadDataError: the folder cannot be read.
    """
    try:
        with os.scandir(os.fspath(folder)) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise BadDataError(f"cannot list the folder {os.fspath(folder)!r}", why=error.strerror or "") from error


def subfolders(folder: Path) -> list[str]:
    """The names of the folders directly in a folder, sorted; hidden ones are left out."""
    return [entry.name for entry in entries_of(folder) if is_folder(entry) and not is_hidden(entry.name)]


def existing_folder(path: str | os.PathLike[str], argument: str) -> Path:
    """The absolute path of a folder that is there.

    Args:
        path: as the user wrote it; `~` is expanded.
        argument: the name of the argument, for the message.

    Raises:
        MissingInputError: it does not exist; the message has the nearest folder that does.
        UsageError: it is empty, an address, or a file.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"{argument} must be the path of a folder, not {_kind(path)}", fix=f'{argument}="data/train"')
    text = os.fspath(path)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{argument} must be the path of a folder, not {path!r}")
    folder = Path(os.path.abspath(os.path.expanduser(text)))
    if folder.is_dir():
        return folder
    if address := _ADDRESS.match(text):
        raise _is_an_address(argument, text, address[1].lower())
    if folder.exists():
        raise _is_a_file(argument, text, folder)
    close = nearest_existing(folder, only_folders=True)
    raise MissingInputError(
        f"{argument}: no such folder: {text!r}",
        why=f"{str(_deepest_existing(folder))!r} exists, but nothing of that name below it",
        fix=f'did you mean {argument}="{close}"?' if close else "",
    )


def _kind(value: object) -> str:
    return "a list of them" if isinstance(value, (list, tuple)) else f"{value!r} ({type(value).__name__})"


def _is_an_address(argument: str, text: str, scheme: str) -> UsageError:
    """The error for an address; the fix is the command that copies what is there to this machine."""
    rest = re.sub(r"^[^:]+:/+", "", text)
    address = shlex.quote(f"{scheme}://{rest}")
    name = next(filter(None, reversed(re.split(r"[/?#]", rest.rstrip("/")))), "data")
    is_file = bool(Path(name).suffix)
    repository = "/".join(rest.removeprefix("datasets/").split("/")[:2]).partition("@")[0]
    target = "data/" + (repository.rpartition("/")[2] if scheme == "hf" else name)
    copy = {
        "http": f'flashtask.download_data({text!r}, "data", allow_http=True)',
        "https": f'flashtask.download_data({text!r}, "data")',
        "s3": f"aws s3 {'cp' if is_file else 'sync'} {address} {target}",
        "gs": f"gcloud storage {'cp' if is_file else 'rsync -r'} {address} {target}",
        "hf": f"hf download --repo-type dataset {shlex.quote(repository)} --local-dir {target}",
        "file": "",
    }.get(scheme, f"copy it to this machine, to {target}")
    if not copy:
        path = "/" + rest.partition("/")[2] if text.lower().startswith("file://localhost/") else "/" + rest
        return UsageError(f"{argument} is an address, not a folder: {text!r}", fix=f'give the path alone: "{path}"')
    if copy.startswith("flashtask."):
        copy, target = f"in Python: {copy}", "data"
    return UsageError(
        f"{argument} is an address, not a folder: {text!r}",
        why="images are read from folders on this machine",
        fix=f'{copy}; then give the folder "{target}"' + (", or the one in it" if target == "data" else ""),
    )


def _is_a_file(argument: str, text: str, file: Path) -> UsageError:
    """The error for a file where a folder is needed, with what to do with a file of its kind."""
    what, fix, suffix = "a file", "", file.suffix.lower()
    if file.name.lower().endswith(ARCHIVE_ENDINGS):
        what = "an archive"
        fix = f'in Python: flashtask.download_data({text!r}, "data") unpacks it into the folder "data"'
    elif suffix in (".xlsx", ".xls", ".ods"):
        what, fix = "a spreadsheet", f"save it as CSV, and give that: {file.stem}.csv"
    elif suffix == ".json":
        what, fix = (
            "a JSON file",
            "give the folder of a COCO data set, or JSON lines, one object a row, in a .jsonl file",
        )
    elif suffix in (".txt", ".dat"):
        what, fix = (
            "a text file",
            f"if it is a table: cp {shlex.quote(text)} {shlex.quote(file.stem + '.csv')}, and give that",
        )
    elif suffix in (".rar", ".7z", ".gz", ".bz2", ".xz", ".zst"):
        what, fix = "a packed file", "unpack it, and give the folder; zip and tar files are read as they are"
    elif suffix in TABLE_ENDINGS:
        what, fix = "a table", "labels are read from the names of folders: data/cat/1.jpg, data/dog/2.jpg"
    elif is_image_name(file.name):
        what, fix = "an image", "give the folder that holds a folder of images for each class"
    elif file.name.endswith((".ckpt", ".safetensors")):
        what, fix = "a checkpoint", "give the folder of the images"
    return UsageError(f"{argument} must be a folder, and {text!r} is {what}", fix=fix)


def nearest_existing(path: Path, *, only_folders: bool = False) -> Path | None:
    """The path that exists and differs from `path` by the fewest mistyped parts, or None.

    Args:
        path: a path that does not exist.
        only_folders: whether a file is no answer.
    """
    parts = path.absolute().parts
    return _repair(Path(parts[0]), parts[1:], only_folders)


def _repair(start: Path, parts: tuple[str, ...], only_folders: bool) -> Path | None:
    if not parts:
        return start
    if os.path.lexists(start / parts[0]):
        found = _repair(start / parts[0], parts[1:], only_folders)
        if found is not None:
            return found
    if not os.access(start, os.R_OK | os.X_OK) or not start.is_dir():
        return None
    files_count = len(parts) == 1 and not only_folders
    here = [entry.name for entry in entries_of(start) if is_folder(entry) or files_count]
    for name in nearest(parts[0], here):
        if name != parts[0] and (found := _repair(start / name, parts[1:], only_folders)) is not None:
            return found
    return None


def _deepest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def part_in_name(name: str) -> str | None:
    """The part of the data that a folder's name speaks of: `val` for `Validation` and for `set_dev`, else None."""
    words = re.findall(r"[a-z]+", name.lower())
    found = {part for part, known in _SPLIT_WORDS.items() if any(word in known for word in words)}
    return found.pop() if len(found) == 1 else None


def split_folders(root: Path) -> dict[str, Path]:
    """The folders directly below `root` that hold a part of the data (train, val, test, predict).

    A folder is one by its name in `SPLIT_NAMES`. A name that only contains such a word, like `Training` or `seg_test`,
    counts where another folder is named for another part, and the two have subfolders in common or there are no others.
    Where `train` or `test` holds images and lies beside other folders of images, it is a class as they are.

    Raises:
        BadDataError: two folders claim the same part, such as `val` and `validation`.
    """
    named = {name: part for name in subfolders(root) if (part := part_in_name(name)) is not None}
    if not named:
        return {}
    exact = [name for name, part in named.items() if name.lower() in SPLIT_NAMES[part]]
    others = [name for name in subfolders(root) if name not in named]
    if others and not any(_holds_class_folders(root / name) for name in named) and _any_images(root, others):
        return {}
    inside = {name: set(subfolders(root / name)) for name in named}
    loose = [one for one in named for two in named if named[one] != named[two] and inside[one] & inside[two]]
    if len(set(named.values())) > 1 and not _any_images(root, others):
        loose = list(named)
    found: dict[str, Path] = {}
    for name in sorted({*exact, *loose}):
        part = named[name]
        if part in found:
            raise BadDataError(
                f"{str(root)!r} has two folders for {part} data: {found[part].name!r} and {name!r}",
                fix=f'name the one you mean: from_folders({part}_folder="{root / name}", ...)',
            )
        found[part] = root / name
    return found


def _holds_class_folders(folder: Path) -> bool:
    return _any_images(folder, subfolders(folder))


def _any_images(root: Path, names: Iterable[str]) -> bool:
    return any(holds_images(root / name) for name in names)


def resolve_layout(path: str | os.PathLike[str]) -> Layout:
    """Find the parts of a data set below one root.

    A root that holds `train/` (and `val/`, `valid/` or `validation/`, `test/`, `predict/`) means those
    folders, and so do names such as `Training` and `Testing` (see `split_folders`); a root without any of
    them is itself the folder of class folders.

    Raises:
        MissingInputError: there is no such folder.
        BadDataError: the layout can be read in two ways, or has no training part.
    """
    root = existing_folder(path, "the data folder")
    found = split_folders(root)
    if not found:
        return Layout(root)
    others = [name for name in subfolders(root) if root / name not in found.values()]
    strangers = [name for name in others if holds_images(root / name)]
    names = ", ".join(folder.name + "/" for folder in found.values())
    if strangers:
        raise BadDataError(
            f"{str(root)!r} holds both {names} and other folders with images: {', '.join(strangers[:5])}",
            why="it could be a data set in parts, or a folder of classes",
            fix=f'say which: from_folders(train_folder="{found.get("train", root)}", ...)',
        )
    if "train" not in found:
        raise BadDataError(
            f"{str(root)!r} holds {names} but no train/",
            fix=f'name the training folder: from_folders(train_folder="{root}/...", ...)',
        )
    return Layout(found["train"], found.get("val"), found.get("test"), found.get("predict"))


def stage_folder(path: str | os.PathLike[str], part: str) -> Path:
    """The folder that evaluation on `path` means: its own `val/` (or `test/`) if there is one, else `path`.

    Args:
        path: the data folder that the user named.
        part: `val`, `test` or `predict`.
    """
    root = existing_folder(path, "the data folder")
    return split_folders(root).get(part, root)


def is_shards(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of shards, or a path or address of the index in one."""
    text = os.fspath(path)
    if "://" in text:
        return text.endswith(f"/{SHARD_INDEX}")
    return os.path.isfile(os.path.join(text, SHARD_INDEX)) or (
        os.path.basename(text) == SHARD_INDEX and os.path.isfile(text)
    )


def has_annotations(folder: object) -> bool:
    """Whether files or folders in a training folder, or beside it, may describe boxes or masks. No file is read."""
    if not isinstance(folder, (str, os.PathLike)):
        return False
    here = Path(folder)
    if here.is_dir() and not os.listdir(here):
        return False  # what lies beside an empty folder is not about it
    names = [name for place in (here, here.parent) if place.is_dir() for name in os.listdir(place)]
    return any(
        name.lower() in _ANNOTATION_FOLDERS or name.lower().endswith((".json", ".xml", ".yaml", ".yml"))
        for name in names
    )


def has_class_folders(folder: str | os.PathLike[str]) -> bool:
    """Whether a training folder has folders other than those of images and annotations."""
    with os.scandir(folder) as entries:
        folders = {entry.name.lower() for entry in entries if entry.is_dir()}
    return not folders <= {"images", *_ANNOTATION_FOLDERS}


def is_yolo_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is YOLO's `data.yaml`, whatever it is called: YAML with names of classes, as no recipe has."""
    if not os.fspath(path).lower().endswith((".yaml", ".yml")) or not os.path.isfile(path):
        return False
    try:
        content = read_yaml(Path(path)).content
    except FlashtaskError:
        return False  # whoever reads it says why
    return isinstance(content, dict) and "names" in content


def is_table_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file is a table by the ending of its name."""
    return os.fspath(name).lower().endswith(TABLE_ENDINGS)


def holds_images(folder: Path) -> bool:
    """Whether there is an image below a folder, at any depth; by name, and without those in hidden folders."""
    for _, below, files in os.walk(folder):
        below[:] = [name for name in below if not is_hidden(name)]
        if any(is_image_name(name) and not is_hidden(name) for name in files):
            return True
    return False
