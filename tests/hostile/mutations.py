"""Seeded damage to good files: bytes, JSON, tensors, zip entries and YAML, and what comes of opening the result."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import resource
import shutil
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import flashtask
from flashtask.cli import run
from flashtask.cli.recipe import read_recipe
from flashtask.core.errors import FlashtaskError
from flashtask.core.foreign_weights import read_foreign_weights
from flashtask.core.tensor_file import read_tensor_file, write_tensor_file

VALUES = (None, True, -1, 0, 3, 2**31, 10**30, 1.5, 1e300, "", "x", "../../x", "resnet18", [], [0], {}, {"$": "tensor"})
PIECES = (b"9", b"-", b"[", b"]", b"null", b'"', b"\\", b"{", b"}", b",", b":", b"0", b"true", b"1e9", b"\xff")
HUNG_AFTER = 60


class Hung(BaseException):
    """A file that was not opened or refused in time."""


# ---- damage


def mutate_bytes(raw: bytes, chance: random.Random, start: int = 0, stop: int | None = None) -> bytes:
    """A bit flipped, the end cut off, two blocks swapped, zeros, or bytes of JSON put in or written over others."""
    found, stop = bytearray(raw), len(raw) if stop is None else stop
    how, place = chance.randrange(6), chance.randrange(start, stop)
    if how == 0:
        found[place] ^= 1 << chance.randrange(8)
    elif how == 1:
        del found[place:]
    elif how == 2:
        size = min(chance.choice((1, 8, 64, 512)), (stop - start) // 2)
        other = chance.randrange(start, stop - size)
        place = min(place, stop - size)
        if abs(place - other) >= size:
            found[place : place + size], found[other : other + size] = (
                found[other : other + size],
                found[place : place + size],
            )
    elif how == 3:
        found[place : place + 64] = bytes(len(found[place : place + 64]))
    elif how == 4:
        piece = chance.choice(PIECES)
        found[place : place + len(piece)] = piece
    else:
        found[place:place] = chance.choice(PIECES)
    return bytes(found)


def mutate_json(value: Any, chance: random.Random) -> Any:
    """A copy in which one value is of another kind, gone, twice there, or under another key."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    holder, key = chance.choice(places)
    how = chance.randrange(4)
    if how == 0 and isinstance(holder, dict):
        holder[chance.choice((key + "x", "_target_", "auto_map", "$"))] = holder.pop(key)
    elif how == 1:
        del holder[key]
    elif how == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[key] = copy.deepcopy(chance.choice(VALUES))
    return value


def _places(value: Any):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def with_right_digest(raw: bytes) -> bytes:
    """A damaged checkpoint whose digest is that of what it now holds, so that it reaches the parser."""
    found = bytearray(raw)
    start = found.find(b"sha256") + 11
    if start < 11 or start + 64 > len(found):
        return raw
    found[start : start + 64] = b"0" * 64
    found[start : start + 64] = hashlib.sha256(found).hexdigest().encode()
    return bytes(found)


# ---- kinds: each writes a damaged file from good ones, and gives it with the way to open it


def ckpt_bytes(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    raw = (good / "last.ckpt").read_bytes()
    (folder / "x.ckpt").write_bytes(mutate_bytes(raw, chance))
    return folder / "x.ckpt", _load_unless_same(raw)


def _load_unless_same(raw: bytes) -> Callable[[Path], Any]:
    def opened(path: Path) -> Any:
        same = path.read_bytes() == raw
        flashtask.load(path)
        assert same, "silently different"

    return opened


def ckpt_header(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    raw = (good / "last.ckpt").read_bytes()
    stop = 8 + int.from_bytes(raw[:8], "little")
    (folder / "x.ckpt").write_bytes(with_right_digest(mutate_bytes(raw, chance, 150, stop)))
    return folder / "x.ckpt", flashtask.load


def ckpt_tree(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    tree, tensors = read_tensor_file(good / "last.ckpt")
    write_tensor_file(folder / "x.ckpt", mutate_json(tree, chance), tensors)
    return folder / "x.ckpt", flashtask.load


def ckpt_tree_resumed(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    path, _ = ckpt_tree(good, folder, chance)
    return path, lambda path: _resume(good, folder, path)


def _resume(good: Path, folder: Path, path: Path) -> None:
    data = flashtask.ImageClassificationData.from_folders(train_folder=good / "images", batch_size=8, num_workers=0)
    model = flashtask.ImageClassifier("timm/test_resnet", pretrained=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    shutil.rmtree(folder / "out", ignore_errors=True)
    flashtask.Trainer(max_epochs=2, max_steps=2, output_dir=folder / "out", **quiet).fit(
        model, datamodule=data, ckpt_path=path
    )


def ckpt_tensors(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    tree, tensors = read_tensor_file(good / "last.ckpt")
    name = chance.choice(list(tensors))
    tensor = tensors.pop(name)
    how = chance.randrange(5)
    if how == 0:
        tensors[chance.choice((name + "x", "../../x", "", "@x"))] = tensor
    elif how == 1:
        tensors[name] = tensor.reshape(-1)[: tensor.numel() // 2].clone()
    elif how == 2:
        tensors[name] = tensor.to(chance.choice((torch.int64, torch.float16, torch.bool, torch.uint8)))
    elif how == 3:
        tensors[name] = torch.zeros(chance.choice(((0,), (3, 0), (1, 1, 1), (5,))))
    write_tensor_file(folder / "x.ckpt", tree, tensors)
    return folder / "x.ckpt", flashtask.load


def _folder(good: Path, folder: Path, name: str) -> Path:
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.copytree(good / name, folder / "model")
    return folder / "model"


def own_config(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    return _with_config(_folder(good, folder, "folder"), chance)


def timm_config(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    return _with_config(_folder(good, folder, "timm"), chance)


def _with_config(model: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    file = model / "config.json"
    if chance.random() < 0.3:
        file.write_bytes(mutate_bytes(file.read_bytes(), chance))
    else:
        file.write_text(json.dumps(mutate_json(json.loads(file.read_text()), chance)))
    return model, flashtask.ImageClassifier.from_pretrained


def _with_header(model: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    file = model / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(mutate_bytes(raw, chance, 0, 8 + int.from_bytes(raw[:8], "little")))
    return model, flashtask.ImageClassifier.from_pretrained


def foreign_header(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    """Only what stands before the tensors: these files have no digest, so a weight that changed is another weight."""
    return _with_header(_folder(good, folder, "timm"), chance)


def foreign_json(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    model = _folder(good, folder, "timm")
    raw = (model / "model.safetensors").read_bytes()
    stop = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(mutate_json(json.loads(raw[8:stop]), chance)).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[stop:])
    return model, flashtask.ImageClassifier.from_pretrained


def pth_bytes(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    (folder / "x.pth").write_bytes(mutate_bytes((good / "weights.pth").read_bytes(), chance))
    return folder / "x.pth", lambda path: _are_equal(read_foreign_weights(path), _read_once(good / "weights.pth"))


@cache
def _read_once(path: Path) -> dict[str, Any]:
    return read_foreign_weights(path)


def _are_equal(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """A zip has checksums, so a file of torch.save that is not refused is as it was."""
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted), "silently different"
    return True


def pth_entries(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    with zipfile.ZipFile(good / "weights.pth") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(n for n in entries if n.endswith("data.pkl")) if chance.random() < 0.7 else chance.choice(list(entries))
    how = chance.randrange(4)
    data = entries.pop(name)
    if how < 2 and data:
        entries[name] = mutate_bytes(data, chance)
    elif how == 2:
        entries[chance.choice(("x/../../y", name + "x", "archive/code/x"))] = data
    compression = chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(folder / "x.pth", "w", compression) as archive:
        for each, content in entries.items():
            archive.writestr(each, content)
    return folder / "x.pth", read_foreign_weights


def recipe_text(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    return _yaml(good / "recipe.yaml", folder, chance), read_recipe


def zoo_text(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    return _yaml(good / "zoo.yaml", folder, chance), _check_zoo


def _yaml(source: Path, folder: Path, chance: random.Random) -> Path:
    raw = source.read_bytes()
    for _ in range(chance.randrange(1, 4)):
        raw = mutate_bytes(raw, chance) or raw
    signs = (
        b"&a ",
        b"*a",
        b"!!python/name:os.system ",
        b"<<: ",
        b"? ",
        b"---\n",
        b"\t",
        b"'",
        b"\x00",
        b"- ",
        b"%YAML ",
    )
    if chance.random() < 0.5:
        place = chance.randrange(len(raw))
        raw = raw[:place] + chance.choice(signs) + raw[place:]
    (folder / "x.yaml").write_bytes(raw)
    return folder / "x.yaml"


class ToldError(FlashtaskError):
    """What the command line said in place of an exception."""


def _check_zoo(path: Path) -> None:
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = run(["zoo", "check", str(path)])
    if code == 70:
        raise RuntimeError(told.getvalue())
    if code:
        raise ToldError(told.getvalue())


def own_weights(good: Path, folder: Path, chance: random.Random) -> tuple[Path, Callable[[Path], Any]]:
    return _with_header(_folder(good, folder, "folder"), chance)


#: Kind -> how many in the short and in the long run. Those that are read by a child take a second and more each.
COUNTS = {
    ckpt_bytes: (20, 1000),
    ckpt_header: (15, 1000),
    ckpt_tree: (15, 900),
    ckpt_tree_resumed: (4, 150),
    ckpt_tensors: (8, 500),
    own_config: (6, 350),
    own_weights: (4, 100),
    timm_config: (6, 350),
    foreign_header: (6, 250),
    foreign_json: (6, 250),
    pth_bytes: (1, 60),
    pth_entries: (0, 90),
    recipe_text: (15, 500),
    zoo_text: (6, 500),
}


def open_damaged(good: Path, folder: Path, *, long: bool, seed: int = 0) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Open as many damaged files of each kind as COUNTS says: outcomes by kind, and what must not happen."""
    outcomes: Counter[tuple[str, str]] = Counter()
    defects: list[str] = []
    before = _peak()
    for make, counts in COUNTS.items():
        for number in range(counts[long]):
            chance = random.Random(f"{seed} {make.__name__} {number}")
            path, opened = make(good, folder, chance)
            start = time.process_time()
            outcome = _outcome(path, opened)
            outcomes[make.__name__, outcome.partition(":")[0]] += 1
            case = f"{make.__name__} {number}: {outcome}"
            if not outcome.startswith(("loaded", "refused")):
                defects.append(case)
            if time.process_time() - start > 10:
                defects.append(f"{case}, after {time.process_time() - start:.0f} s")
            if _peak() - before > 1000:
                defects.append(f"{case}, with {_peak() - before} MB more")
                before = _peak()
    return outcomes, defects


def _outcome(path: Path, opened: Callable[[Path], Any]) -> str:
    previous = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(HUNG_AFTER)
    try:
        opened(path)
    except FlashtaskError as error:
        return f"refused: {type(error).__name__}" if str(path) in str(error) else f"does not name the file: {error!r}"
    except Hung:
        return "hung"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return "loaded"


def _hang(*_: Any) -> None:
    raise Hung


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
