"""The kinds of hostile files: for each a door it comes through, and the exit code it must meet there.

Payloads are inert: all they would do is to create a file, the canary.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hostile.good import CONFIG, forge
from safetensors.torch import load_file, save_file

REFUSED, BAD_USAGE, MISSING = 76, 2, 66


class Kind(NamedTuple):
    """A hostile file: `make(good, folder)` writes it and gives its path."""

    name: str
    door: str
    code: int
    make: Callable[[Path, Path], Path]


KINDS: list[Kind] = []


def kind(name: str, *doors: str, code: int = REFUSED) -> Callable[[Any], Any]:
    """Registers a maker for each of its doors."""

    def register(make: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        KINDS.extend(Kind(name, door, code, make) for door in doors)
        return make

    return register


# ---- pickles


class _Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _canary(folder: Path) -> str:
    return str(folder.parent / "canary")


def _system(folder: Path) -> _Calls:
    return _Calls(os.system, f"touch {_canary(folder)}")


def _pickled(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "weights.pth", **options)
    return folder / "weights.pth"


@kind("a pickle that calls os.system", "weights", "load")
def _(good: Path, folder: Path) -> Path:
    return _pickled(folder, {"a": torch.zeros(1), "b": _system(folder)})


@kind("a pickle that calls os.system, as a folder's weights", "from_pretrained", "backbone")
def _(good: Path, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    _pickled(folder, {"a": _system(folder)}).rename(folder / "pytorch_model.bin")
    return folder


@kind("a pickle that calls eval", "weights")
def _(good: Path, folder: Path) -> Path:
    return _pickled(folder, {"b": _Calls(eval, f"open({_canary(folder)!r}, 'w')")})


@kind("a pickle inside torch.storage._load_from_bytes", "weights")
def _(good: Path, folder: Path) -> Path:
    inner = pickle.dumps(_system(folder))
    return _pickled(folder, {"b": _Calls(torch.storage._load_from_bytes, inner)})


@kind("a pickle of the older format", "weights", "load")
def _(good: Path, folder: Path) -> Path:
    return _pickled(folder, {"b": _system(folder)}, _use_new_zipfile_serialization=False)


@kind("a pickle that imports a module", "weights")
def _(good: Path, folder: Path) -> Path:
    data = b"\x80\x02chostile_canary\nrun\n)R."
    return _zip_with(folder, data)


@kind("a bare pickle", "weights", "load")
def _(good: Path, folder: Path) -> Path:
    (folder / "weights.pth").write_bytes(pickle.dumps(_system(folder)))
    return folder / "weights.pth"


@kind("a tar of the oldest format", "weights")
def _(good: Path, folder: Path) -> Path:
    with tarfile.open(folder / "weights.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(_system(folder))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder / "weights.pth"


@kind("a TorchScript program", "weights", "load")
def _(good: Path, folder: Path) -> Path:
    # As torch.jit.save lays it out; its compiler takes half a minute to load.
    with zipfile.ZipFile(folder / "weights.pth", "w") as archive:
        archive.writestr("weights/data.pkl", b"\x80\x02}.")
        archive.writestr("weights/code/__torch__.py", "def forward(self): pass")
        archive.writestr("weights/constants.pkl", b"\x80\x02).")
        archive.writestr("weights/version", "3\n")
    return folder / "weights.pth"


def _zip_with(folder: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(folder / "weights.pth", "w", compression) as archive:
        archive.writestr("weights/data.pkl", data)
        archive.writestr("weights/version", "3\n")
        archive.writestr("weights/byteorder", "little")
    return folder / "weights.pth"


@kind("a zip bomb", "weights")
def _(good: Path, folder: Path) -> Path:
    return _zip_with(folder, bytes(300_000_000), zipfile.ZIP_DEFLATED)


@kind("a zip bomb named .ckpt", "load", "fit", "predict")
def _(good: Path, folder: Path) -> Path:
    return _zip_with(folder, bytes(300_000_000), zipfile.ZIP_DEFLATED).rename(folder / "last.ckpt")


@kind("a zip whose entries are one and the same", "weights")
def _(good: Path, folder: Path) -> Path:
    path = _zip_with(folder, bytes(100_000))
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(500):
            again = copy.copy(archive.infolist()[0])
            again.filename = f"weights/data/{number}"
            archive.filelist.append(again)
        archive._didModify = True
    return path


@kind("a pickle whose tensor is expanded to 4 TB", "weights")
def _(good: Path, folder: Path) -> Path:
    return _pickled(folder, {"a": torch.zeros(1).expand(10**12)})


@kind("a pickle of tuples that double 90 times and are hashed", "weights")
def _(good: Path, folder: Path) -> Path:
    steps = b"".join(b"h" + bytes([n]) * 1 + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) + b"a" for n in range(1, 91))
    return _zip_with(folder, b"\x80\x02]q\x00K\x01K\x02\x86q\x01a" + steps + b"}h" + bytes([91]) + b"K\x01s\x86.")


# ---- safetensors of others


def _header(folder: Path, good: Path, header: str | bytes, data: bytes = b"", length: int | None = None) -> Path:
    raw = header.encode() if isinstance(header, str) else header
    shutil.copy(good / "timm" / "config.json", folder)
    size = (len(raw) if length is None else length).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(size + raw + data)
    return folder


def _entry(name: str = "a", dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


HEADERS = {
    "overlapping offsets": ("{" + _entry() + "," + _entry("b", offsets="[4,12]") + "}", bytes(12)),
    "a shape of 1e18": ("{" + _entry(shape="[1000000000,1000000000]") + "}", bytes(8)),
    "duplicate keys": ("{" + _entry() + "," + _entry() + "}", bytes(8)),
    "a dtype named NaN": ("{" + _entry(dtype="NaN") + "}", bytes(8)),
    "offsets that are NaN": ("{" + _entry(offsets="[NaN,8]") + "}", bytes(8)),
    "JSON 100,000 deep": ("[" * 100_000 + "]" * 100_000, b""),
    "a tail": ("{" + _entry() + "}", bytes(1000)),
}
for _name, (_text, _data) in HEADERS.items():

    def _make(good: Path, folder: Path, text: str = _text, data: bytes = _data) -> Path:
        return _header(folder, good, text, data)

    kind(f"safetensors with {_name}", "from_pretrained", "backbone")(_make)


@kind("safetensors with a header of 100 MB", "from_pretrained")
def _(good: Path, folder: Path) -> Path:
    return _header(folder, good, b"[" * 100_000_000)


@kind("safetensors whose header claims 2**62 bytes", "from_pretrained")
def _(good: Path, folder: Path) -> Path:
    return _header(folder, good, "{}", length=2**62)


def _changed_weights(good: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copy(good / "timm" / "config.json", folder)
    weights = load_file(good / "timm" / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@kind("a layer named ../../x", "from_pretrained", "backbone", "finetune_from")
def _(good: Path, folder: Path) -> Path:
    return _changed_weights(good, folder, lambda weights: weights.update({"../../x": torch.zeros(2)}))


@kind("a weight that is missing", "from_pretrained", "backbone")
def _(good: Path, folder: Path) -> Path:
    return _changed_weights(good, folder, lambda weights: weights.pop("conv1.0.weight", weights.popitem()))


@kind("weights of another number of classes", "from_pretrained")
def _(good: Path, folder: Path) -> Path:
    return _changed_weights(good, folder, lambda weights: weights.update({"fc.weight": torch.zeros(7, 96)}))


@kind("weights that are a link to an endless device", "from_pretrained", "backbone", code=MISSING)
def _(good: Path, folder: Path) -> Path:
    shutil.copy(good / "timm" / "config.json", folder)
    (folder / "model.safetensors").symlink_to("/dev/zero")
    return folder


@kind("a checkpoint that is a link to a pipe", "fit")
def _(good: Path, folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    (folder / "last.ckpt").symlink_to(folder / "pipe")
    return folder / "last.ckpt"


for _target in ("pytorch_model-00001.bin", "/etc/passwd", "../../x.safetensors"):

    def _make_index(good: Path, folder: Path, target: str = _target) -> Path:
        shutil.copy(good / "timm" / "config.json", folder)
        index = {"metadata": {}, "weight_map": {"conv1.0.weight": target}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        _pickled(folder, {"a": _system(folder)}).rename(folder / "pytorch_model-00001.bin")
        return folder

    kind(f"an index of shards that names {_target}", "from_pretrained", "backbone", code=MISSING)(_make_index)


# ---- configurations


def _config(good: Path, folder: Path, **changes: Any) -> Path:
    shutil.copy(good / "timm" / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


CONFIGS: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoModel": "hostile_canary.run"}},
    "trust_remote_code": {"trust_remote_code": True},
    "_target_": {"model_args": {"act_layer": {"_target_": "os.system"}}},
    "_instantiator": {"_instantiator": "hostile_canary.run"},
    "class_path": {"pretrained_cfg": {"class_path": "hostile_canary.run"}},
    "a checkpoint_path": {"model_args": {"checkpoint_path": "/etc/passwd"}},
    "an unknown architecture": {"architecture": "test_resent"},
    "an architecture that is a path": {"architecture": "../../x"},
    "an architecture on the hub": {"architecture": "hf-hub:org/name"},
    "another architecture": {"architecture": "test_vit"},
    "the largest architecture": {"architecture": "vit_giant_patch14_224"},
    "a billion classes": {"num_classes": 10**9},
    "other classes than its weights": {"num_classes": 7},
    "a million blocks": {"model_args": {"layers": [10**6] * 4}},
    "an image of 1e9 pixels a side": {"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}},
    "10 MB of labels": {"label_names": ["x" * 1000] * 10_000},
}
for _name, _changes in CONFIGS.items():

    def _make_config(good: Path, folder: Path, changes: dict[str, Any] = _changes) -> Path:
        return _config(good, folder, **changes)

    doors = ("from_pretrained", "backbone", "predict") if _name in ("auto_map", "_target_") else ("from_pretrained",)
    kind(f"a config.json with {_name}", *doors)(_make_config)

TEXTS = {
    "JSON 100,000 deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "duplicate keys": '{"architecture":"test_resnet","architecture":"test_vit","num_classes":2}',
    "NaN": '{"architecture":"test_resnet","num_classes":NaN}',
    "a list": "[]",
    "no text": "\xff\xfe",
}
for _name, _text in TEXTS.items():

    def _make_text(good: Path, folder: Path, text: str = _text) -> Path:
        shutil.copy(good / "timm" / "model.safetensors", folder)
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        return folder

    kind(f"a config.json of {_name}", "from_pretrained", "backbone")(_make_text)


def _own_config(good: Path, folder: Path, **changes: Any) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(good / "folder" / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["flashtask"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@kind("a flashtask folder that names a file as its weights", "from_pretrained", "load")
def _(good: Path, folder: Path) -> Path:
    return _own_config(good, folder, weights={"timm": "../../other"})


@kind("a flashtask folder of another task", "from_pretrained", code=BAD_USAGE)
def _(good: Path, folder: Path) -> Path:
    return _own_config(good, folder, task="image_embedding")


@kind("a flashtask folder of a later format", "from_pretrained", "load")
def _(good: Path, folder: Path) -> Path:
    return _own_config(good, folder, format=99)


# ---- checkpoints of our own with a right digest


def _forged(name: str, *doors: str, code: int = REFUSED) -> Callable[[Any], Any]:
    def register(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Any:
        kind(name, *doors, code=code)(lambda good, folder: forge(good / "last.ckpt", folder / "last.ckpt", change))
        return change

    return register


for _key in ("_instantiator", "_target_", "class_path", "trust_remote_code"):

    @_forged(f"a checkpoint with {_key} among its settings", "load", "load_from_checkpoint", code=REFUSED)
    def _(tree: Any, tensors: Any, key: str = _key) -> None:
        _arguments(tree)[key] = "hostile_canary.run"


def _arguments(tree: Any) -> dict[str, Any]:
    """The stored hyper-parameters as a plain dictionary in the tree, whatever its form was."""
    node = _value(tree, "hyper_parameters")
    plain = {key: _value(node, key) for key in _keys(node)}
    _put(tree, "hyper_parameters", plain)
    return plain


def _keys(node: Any) -> list[str]:
    return list(node["keys"]) if "$" in node else list(node)


def _value(node: Any, key: str) -> Any:
    return node["values"][node["keys"].index(key)] if "$" in node else node[key]


def _put(node: Any, key: str, value: Any) -> None:
    if "$" in node and key not in node["keys"]:
        node["keys"].append(key)
        node["values"].append(value)
    elif "$" in node:
        node["values"][node["keys"].index(key)] = value
    else:
        node[key] = value


SETTINGS: dict[str, tuple[dict[str, Any], int]] = {
    "an unknown backbone": ({"backbone": "timm/test_resent"}, REFUSED),
    "another backbone": ({"backbone": "timm/test_vit"}, REFUSED),
    "the largest backbone": ({"backbone": "timm/vit_giant_patch14_224"}, REFUSED),
    "a backbone on the hub": ({"backbone": "hf-hub:org/name"}, REFUSED),
    "a backbone in a folder": ({"backbone": "local-dir:/etc"}, REFUSED),
    "a backbone in a checkpoint": ({"backbone": "checkpoint:/etc/passwd"}, REFUSED),
    "a checkpoint_path for timm": ({"backbone_options": {"checkpoint_path": "/etc/passwd"}}, REFUSED),
    "a billion classes": ({"num_classes": 10**9, "labels": None}, REFUSED),
    "a head of a billion": ({"head": "mlp", "head_options": {"hidden_sizes": [30_000, 30_000]}}, REFUSED),
    "labels of another number": ({"labels": ["a", "b", "c"], "num_classes": 3}, BAD_USAGE),
    "labels that are numbers": ({"labels": 5}, REFUSED),
    "a backbone that is a number": ({"backbone": 5}, REFUSED),
    "an optimizer that is code": ({"optimizer": "os.system"}, REFUSED),
}
for _name, (_changes, _code) in SETTINGS.items():

    @_forged(f"a checkpoint with {_name}", "load", *(("finetune_from",) if "number" in _name else ()), code=_code)
    def _(tree: Any, tensors: Any, changes: dict[str, Any] = _changes) -> None:
        _arguments(tree).update(changes)


@_forged("a checkpoint of an unknown task", "load", "predict", code=REFUSED)
def _(tree: Any, tensors: Any) -> None:
    _put(tree, "task", "image_clasification")


@_forged("a checkpoint without weights", "load", "fit")
def _(tree: Any, tensors: Any) -> None:
    _put(tree, "state_dict", {})


@_forged("a checkpoint whose weights are text", "load", "fit")
def _(tree: Any, tensors: Any) -> None:
    _put(tree, "state_dict", {"backbone.conv1.0.weight": "x"})


@_forged("a checkpoint that asks for one list 100,000 times", "load")
def _(tree: Any, tensors: Any) -> None:
    tensors["long"] = torch.zeros(300_000, dtype=torch.uint8)
    _put(tree, "many", [{"$": "numbers", "name": "long"}] * 100_000)


@_forged("a checkpoint whose texts are a gigabyte each", "load")
def _(tree: Any, tensors: Any) -> None:
    tensors["many"] = torch.zeros(1_000_000, dtype=torch.uint8)
    _put(tree, "array", {"$": "array", "name": "many", "array": "<U300000"})


@_forged("a checkpoint nested 70 deep", "load")
def _(tree: Any, tensors: Any) -> None:
    deep: Any = 1
    for _ in range(70):
        deep = [deep]
    _put(tree, "deep", deep)


def _random(tree: Any) -> Any:
    return _value(tree, "random")


@_forged("a checkpoint with a poisoned state of torch's generator", "fit")
def _(tree: Any, tensors: Any) -> None:
    tensors[_value(_random(tree), "torch")["name"]].fill_(255)


@_forged("a checkpoint whose NumPy generator stands beside its table", "fit")
def _(tree: Any, tensors: Any) -> None:
    _put(_value(_value(_random(tree), "numpy"), "state"), "pos", 10**6)


@_forged("a checkpoint with a poisoned state of Python's generator", "fit")
def _(tree: Any, tensors: Any) -> None:
    _put(_random(tree), "random", {"$": "tuple", "items": [3, {"$": "tuple", "items": [1, 2, 3]}, None]})


@_forged("a checkpoint without progress to go on from", "fit", code=BAD_USAGE)
def _(tree: Any, tensors: Any) -> None:
    place = tree["keys"].index("progress")
    del tree["keys"][place], tree["values"][place]


@_forged("a checkpoint whose history is no JSON", "fit")
def _(tree: Any, tensors: Any) -> None:
    tensors[_value(_value(tree, "progress"), "history")["name"]].fill_(ord("["))


@kind("a checkpoint of a later format", "load", "fit", "predict")
def _(good: Path, folder: Path) -> Path:
    raw = (good / "last.ckpt").read_bytes().replace(b'{\\"format\\":1,', b'{\\"format\\":9,', 1)
    (folder / "last.ckpt").write_bytes(raw)
    return folder / "last.ckpt"


@kind("a checkpoint with one bit flipped", "load", "load_from_checkpoint", "fit", "predict", "finetune_from")
def _(good: Path, folder: Path) -> Path:
    raw = bytearray((good / "last.ckpt").read_bytes())
    raw[-1] ^= 1
    (folder / "last.ckpt").write_bytes(raw)
    return folder / "last.ckpt"


# ---- YAML and run folders

YAML = {
    "a Python object": "model: !!python/object/apply:os.system ['touch canary']\n",
    "a Python name": "model: !!python/name:hostile_canary.run\n",
    "an alias bomb": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)),
    "duplicate keys": "model: {backbone: a}\nmodel: {backbone: b}\n",
    "10 MB": "a: " + "x" * 10_000_000,
    "1,000 levels": "a: " + "[" * 1000 + "]" * 1000,
    "a number of 100,000 digits": "a: " + "9" * 100_000,
    "bytes that are no text": "\xff\xfe\x00",
}
for _name, _text in YAML.items():

    @kind(f"a recipe with {_name}", "recipe", code=BAD_USAGE)
    @kind(f"a zoo file with {_name}", "zoo", code=BAD_USAGE)
    def _(good: Path, folder: Path, text: str = _text) -> Path:
        (folder / "file.yaml").write_bytes(text.encode("latin-1"))
        return folder / "file.yaml"


@kind("a recipe that is a pipe", "recipe", code=MISSING)
@kind("a zoo file that is a pipe", "zoo", code=MISSING)
def _(good: Path, folder: Path) -> Path:
    os.mkfifo(folder / "file.yaml")
    return folder / "file.yaml"


ZOOS = {
    "weights outside of their package": "backbones: {x: {source: timm/test_resnet, "
    "weights: {package: torch, file: ../../../../etc/passwd}}}",
    "code for a source": "backbones: {x: {source: 'hostile_canary:run'}}",
    "a moving branch": "checkpoints: {x: {task: image_classification, repository: a/b, revision: main}}",
}
for _name, _text in ZOOS.items():

    @kind(f"a zoo file with {_name}", "zoo", code=BAD_USAGE)
    def _(good: Path, folder: Path, text: str = _text) -> Path:
        (folder / "file.yaml").write_text(text)
        return folder / "file.yaml"


for _name, _text in {"JSON 100,000 deep": "[" * 100_000, "a text": '"x"', "40 MB": " " * 40_000_000}.items():

    @kind(f"a run folder whose summary is {_name}", "resume")
    def _(good: Path, folder: Path, text: str = _text) -> Path:
        shutil.copytree(good / "run", folder, dirs_exist_ok=True)
        shutil.copy(good / "last.ckpt", folder)
        (folder / "summary.json").write_text(text)
        return folder


def fp16(good: Path, folder: Path) -> Path:
    """A checkpoint whose weights are in half precision: no attack, and what is loaded is what is there."""

    def change(tree: Any, tensors: Any) -> None:
        for name, tensor in tensors.items():
            if name.startswith(("backbone.", "head.")) and tensor.is_floating_point():
                tensors[name] = tensor.half()

    return forge(good / "last.ckpt", folder / "half.ckpt", change)
