"""Checkpoint files: exact round trips, and no damaged, hostile or foreign file is ever loaded."""

import hashlib
import json
import os
import random
import re
import time

import pytest
import safetensors.torch
import torch
import warm
from safetensors import safe_open

import flashtask.core.tensor_file as tensor_file
from flashtask.core.checkpoint import read_checkpoint, read_header, write_checkpoint
from flashtask.core.errors import IntegrityError, MissingInputError, StorageError, UsageError
from flashtask.core.files import remove_partials


@pytest.fixture(scope="module")
def content():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4))
    model = model.to(memory_format=torch.channels_last)
    model.tied = torch.nn.Linear(4, 4)
    model.tied.weight = model[2].weight
    state = model.state_dict()
    return {
        "epoch": 3,
        "state_dict": {f"backbone.{name}": value for name, value in reversed(state.items())},
        "callbacks": {"EarlyStopping": {"best": float("-inf"), "wait": 2, "history": [0.5] * 1000}},
        "hyper_parameters": {"lr": 1e-3, "betas": (0.9, 0.999)},
        "labels": ("cat", "dög"),
        "rng": {"torch": torch.get_rng_state(), "python": random.Random(3).getstate()},
    }


@pytest.fixture
def saved(tmp_path, content):
    write_checkpoint(tmp_path / "last.ckpt", content)
    return tmp_path / "last.ckpt"


def test_content_comes_back_with_its_order_ties_and_memory_format(saved, content):
    found = read_checkpoint(saved)
    assert found["format"] == 1
    assert found["hyperparameters"] is found["hyper_parameters"]
    assert found["hyper_parameters"] == content["hyper_parameters"]
    assert found["labels"] == ("cat", "dög")
    assert found["callbacks"] == content["callbacks"]
    assert found["rng"]["python"] == content["rng"]["python"]
    assert list(found["state_dict"]) == list(content["state_dict"])
    for name, value in content["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)
        assert found["state_dict"][name].stride() == value.stride()
    tied = found["state_dict"]["backbone.tied.weight"], found["state_dict"]["backbone.2.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_the_file_is_a_safetensors_file_with_the_weights_under_their_names(saved, content):
    with safe_open(saved, "pt") as file:
        assert set(file.metadata()) == {"flashtask"}
        names = set(file.keys())
        assert names >= set(content["state_dict"]) - {"backbone.2.weight"}
        assert all(name.startswith(("backbone.", "@")) for name in names)
        for name in names & set(content["state_dict"]):
            assert torch.equal(file.get_tensor(name), content["state_dict"][name])
        text = file.metadata()["flashtask"]
    document = json.loads(text)
    assert text == json.dumps(document, sort_keys=True, separators=(",", ":"))
    raw = saved.read_bytes()
    zeroed = raw.replace(document["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == document["sha256"]
    assert (8 + int.from_bytes(raw[:8], "little")) % 8 == 0


def test_equal_content_gives_equal_bytes_and_what_was_read_can_be_written(saved, tmp_path):
    found = read_checkpoint(saved)
    write_checkpoint(tmp_path / "again.ckpt", found)
    write_checkpoint(tmp_path / "third.ckpt", read_checkpoint(tmp_path / "again.ckpt"))
    assert (tmp_path / "again.ckpt").read_bytes() == (tmp_path / "third.ckpt").read_bytes()
    assert set(read_checkpoint(tmp_path / "third.ckpt")) == set(found)


def test_names_that_look_like_paths_or_metadata_do_not_clash(tmp_path):
    state = {
        "@x": torch.ones(1),
        "__metadata__": torch.ones(2),
        "$keys": torch.ones(3),
        "../../x": torch.ones(4),
    }
    write_checkpoint(tmp_path / "a", {"x": torch.zeros(1), "state_dict": state, "sha256": "0" * 64})
    found = read_checkpoint(tmp_path / "a")
    assert {name: len(value) for name, value in found["state_dict"].items()} == {
        name: len(value) for name, value in state.items()
    }
    assert torch.equal(found["x"], torch.zeros(1))
    with safe_open(tmp_path / "a", "pt") as file:
        assert len(list(file.keys())) == 5


def test_map_location_means_what_it_means_in_torch_load(saved):
    for where in ("cpu", torch.device("cpu"), {"cuda:1": "cpu"}, {"cpu": "cpu"}, lambda storage, _: storage):
        assert read_checkpoint(saved, where)["rng"]["torch"].device.type == "cpu"
    for where in (
        "meta",
        {"cpu": "meta"},
        lambda storage, _: torch.empty(0, device="meta").untyped_storage(),
    ):
        found = read_checkpoint(saved, where)
        assert found["state_dict"]["backbone.0.weight"].device.type == "meta"
        assert found["callbacks"]["EarlyStopping"]["history"] == [0.5] * 1000
    for where in ("cdua", 3):
        with pytest.raises(UsageError, match="map_location"):
            read_checkpoint(saved, where)


def test_read_header_gives_shapes_and_settings_without_values(saved, content):
    found = read_header(saved)
    weight = found["state_dict"]["backbone.0.weight"]
    assert (weight.device.type, tuple(weight.shape), weight.dtype) == ("meta", (4, 3, 3, 3), torch.float32)
    assert found["callbacks"] == content["callbacks"]
    assert found["rng"]["python"] == content["rng"]["python"]
    flipped = bytearray(saved.read_bytes())
    flipped[-1] ^= 1
    saved.write_bytes(flipped)
    with pytest.raises(IntegrityError, match="digest"):
        read_header(saved)


def test_tensors_do_not_depend_on_the_file(saved, content):
    found = read_checkpoint(saved)
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert torch.equal(found["state_dict"]["backbone.0.bias"], content["state_dict"]["backbone.0.bias"])
    assert all(value.data_ptr() % 16 == 0 for value in found["state_dict"].values())


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        read_checkpoint(path)
    assert str(path) in caught.value.what
    assert caught.value.fix
    return str(caught.value)


def test_b5_300_random_flipped_bits_are_all_detected(saved, tmp_path):
    raw = saved.read_bytes()
    positions = random.Random(5).sample(range(len(raw) * 8), 300)
    for position in [*positions, *range(0, 64, 3)]:
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        refused(tmp_path / "x.ckpt", damaged)


def test_b6_files_cut_at_50_points_are_all_detected(saved, tmp_path):
    raw = saved.read_bytes()
    for length in [*range(12), *random.Random(6).sample(range(12, len(raw)), 37), len(raw) - 1]:
        refused(tmp_path / "x.ckpt", raw[:length])
    refused(tmp_path / "x.ckpt", raw + b"\0")


def test_b6_zeroed_pages_are_all_detected(saved, tmp_path):
    raw = saved.read_bytes()
    for start in range(0, len(raw) - 4096, 1024):
        page = raw[start : start + 4096]
        assert page != bytes(4096)
        refused(tmp_path / "x.ckpt", raw[:start] + bytes(4096) + raw[start + 4096 :])


ZEROS = "0" * 64


def forged(header, data=b"", tree="{}", number=1):
    """A file with a right digest around a header of our making; `header` is the JSON after the metadata."""
    text = json.dumps(f'{{"format":{number},"sha256":"{ZEROS}","tree":{tree}}}')
    raw = f'{{"__metadata__":{{"flashtask":{text}}}{header}}}'.encode()
    whole = len(raw).to_bytes(8, "little") + raw + data
    return whole.replace(ZEROS.encode(), hashlib.sha256(whole).hexdigest().encode(), 1)


def tensor(name="a", dtype="F32", shape="[2]", offsets="[0,8]"):
    return f',"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


LEAF = '{"w":{"$":"tensor","name":"a"}}'
HOSTILE = {
    "overlapping tensors": (tensor() + tensor("b", offsets="[4,12]"), bytes(12)),
    "same bytes twice": (tensor() + tensor("b"), bytes(8)),
    "a hole": (tensor() + tensor("b", offsets="[12,20]"), bytes(20)),
    "a tail": (tensor(), bytes(9)),
    "a shape bomb": (tensor(shape="[1000000000,1000000000]"), bytes(8)),
    "a wrapping shape": (tensor(shape="[4611686018427387904,4,2]"), bytes(8)),
    "an empty bomb": (tensor(shape="[0,4611686018427387904,4611686018427387904]", offsets="[0,0]"), b""),
    "offsets beyond the file": (tensor(shape="[2000]", offsets="[0,8000]"), bytes(8)),
    "a negative size": (tensor(shape="[-1,-2]"), bytes(8)),
    "a fractional size": (tensor(shape="[2.0]"), bytes(8)),
    "a true size": (tensor(shape="[true,2]"), bytes(8)),
    "backward offsets": (tensor(shape="[0]", offsets="[8,0]"), bytes(8)),
    "an unknown dtype": (tensor(dtype="NaN"), bytes(8)),
    "many dimensions": (tensor(shape=str([1] * 65 + [2])), bytes(8)),
    "a duplicate name": (tensor() + tensor(), bytes(8)),
    "a NaN": (tensor(offsets="[NaN,8]"), bytes(8)),
    "a missing field": (',"a":{"dtype":"F32","shape":[2]}', bytes(8)),
    "a list as a tensor": (',"a":[]', b""),
    "a second metadata": (',"__metadata__":{}', b""),
    "a bool of 2": (tensor(dtype="BOOL", shape="[8]"), b"\2" * 8),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_h_hostile_headers_with_a_right_digest_are_refused(tmp_path, kind):
    refused(tmp_path / "x.ckpt", forged(*HOSTILE[kind], tree=LEAF))


DOCUMENTS = [
    "",
    "[]",
    '"text"',
    "NaN",
    '{"a":1,"a":2}',
    '{"a":1e999}',
    '{"a":' + "9" * 5000 + "}",
    '{"a":{"$":"tensor","name":"missing"}}',
    '{"a":{"$":"eval","code":"1"}}',
    "[" * 70 + "]" * 70,
    "[" * 10**6 + "]" * 10**6,
]


@pytest.mark.parametrize("tree", DOCUMENTS, ids=lambda tree: tree[:30])
def test_h_hostile_documents_with_a_right_digest_are_refused(tmp_path, tree):
    refused(tmp_path / "x.ckpt", forged("", tree=tree))


def test_the_forger_of_these_tests_makes_files_that_are_otherwise_good(tmp_path):
    (tmp_path / "x").write_bytes(forged(tensor(), bytes(8), tree=LEAF))
    assert torch.equal(read_checkpoint(tmp_path / "x")["w"], torch.zeros(2))
    (tmp_path / "x").write_bytes(forged(tensor(shape="[0,3]", offsets="[0,0]"), tree=LEAF))
    assert read_checkpoint(tmp_path / "x")["w"].shape == (0, 3)


def test_h_header_bombs_are_refused_at_once(tmp_path):
    for length in (2**63, 10**12, tensor_file.MAX_HEADER + 1, 2000):
        start = time.process_time()
        refused(tmp_path / "x.ckpt", length.to_bytes(8, "little") + b'{"__metadata__":' + b"[" * 900)
        assert time.process_time() - start < 1


def test_h_mutated_files_with_a_right_digest_load_or_are_refused(saved, tmp_path):
    raw = saved.read_bytes()
    start, end = raw.index(b"sha256") + 11, 8 + int.from_bytes(raw[:8], "little")
    stock = [b"9", b"-", b"[", b"]", b"null", b'"', b"\\", b"{", b"}", b",", b"0", b"true", b"1e9", b"tensor"]
    chance = random.Random(8)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(800):
        place = chance.randrange(start + 64, end)
        mutated = bytearray(raw)
        piece = chance.choice([*stock, bytes([chance.randrange(256)])])
        mutated[place : place + len(piece)] = piece
        mutated[start : start + 64] = ZEROS.encode()
        mutated[start : start + 64] = hashlib.sha256(mutated).hexdigest().encode()
        (tmp_path / "x").write_bytes(mutated)
        try:
            read_checkpoint(tmp_path / "x")
            outcomes["loaded"] += 1
        except IntegrityError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 300
    assert outcomes["loaded"] > 25  # a changed label or name is a good file again: the digest was right


def test_a_newer_format_says_to_upgrade(tmp_path):
    message = refused(tmp_path / "x.ckpt", forged("", number=2))
    assert "newer" in message
    assert "pip install --upgrade flashtask" in message


def test_foreign_files_are_refused_with_the_way_to_use_them(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors", {"format": "pt"})
    for name in ("zip.pt", "old.pt"):
        message = refused(tmp_path / name, (tmp_path / name).read_bytes())
        assert "pickled" in message
        assert "weights_only=True" in message
    message = refused(tmp_path / "weights.safetensors", (tmp_path / "weights.safetensors").read_bytes())
    assert "not a flashtask checkpoint" in message
    assert "load_file" in message
    for data in (b"", bytes(100)):
        assert "damaged" in refused(tmp_path / "x", data)
    for data in (b"hello", b"<html>" * 100):
        assert "is not a checkpoint" in refused(tmp_path / "x", data)


def test_a_missing_file_names_the_nearest_one_and_a_folder_means_its_checkpoint(saved, tmp_path):
    with pytest.raises(MissingInputError, match=r"did you mean 'last\.ckpt'"):
        read_checkpoint(saved.with_name("lats.ckpt"))
    assert read_checkpoint(saved.parent).keys() == read_checkpoint(saved).keys()
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingInputError, match="there is no model in"):
        read_checkpoint(tmp_path / "none")


def test_what_cannot_be_saved_is_named_and_the_old_file_stays(saved, monkeypatch):
    before = saved.read_bytes()
    with pytest.raises(UsageError, match="callback 'EarlyStopping' key 'best'"):
        write_checkpoint(saved, {"callbacks": {"EarlyStopping": {"best": object()}}})
    with pytest.raises(StorageError, match=re.escape(f"mkdir -p {saved.parent / 'no'}")):
        write_checkpoint(saved.parent / "no" / "a.ckpt", {"epoch": 1})
    many = {f"{n}" * 300: [torch.zeros(0)] for n in range(50)}
    monkeypatch.setattr(tensor_file, "MAX_HEADER", 20_000)
    with pytest.raises(UsageError, match="the limit is 20,000"):
        write_checkpoint(saved, many)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


KILLED = """
import os, signal, sys
import torch
import warm
from flashtask.core.checkpoint import read_checkpoint, write_checkpoint
torch.set_num_threads(1)
target, outcomes = sys.argv[1], []
write_checkpoint(target, {"step": 0, "w": torch.zeros(3_000_000)})

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def save(name, count):
    real, calls = getattr(os, name), []
    def counted(*args, **kwargs):
        calls.append(1)
        return die() if len(calls) == count else real(*args, **kwargs)
    setattr(os, name, counted)
    write_checkpoint(target, {"step": 1, "w": torch.ones(3_000_000)})
    os._exit(0)

for name, count in [("open", 1), ("fsync", 1), ("replace", 1), ("open", 2), ("fsync", 2)]:
    child = os.fork()
    if child == 0:
        save(name, count)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    found = read_checkpoint(target)
    assert bool((found["w"] == found["step"]).all())
    outcomes.append(found["step"])
print(outcomes)
"""


def test_a3_a_save_killed_at_any_step_leaves_a_checkpoint_that_verifies(tmp_path):
    result = warm.run(KILLED, tmp_path / "a.ckpt")
    assert result.stdout == "[0, 0, 0, 1, 1]\n", result.stderr
    assert len(remove_partials(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["a.ckpt"]


LIMITED = """
import resource, sys, torch
from flashtask.core.checkpoint import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
write_checkpoint(sys.argv[1], {"w": torch.ones(1_000_000)})
"""


def test_b2_a_file_size_limit_names_path_and_bytes_and_keeps_the_old_file(saved):
    before = saved.read_bytes()
    result = warm.run(LIMITED, saved)
    assert "StorageError" in result.stderr
    assert re.search(r"4,000,\d{3} bytes are needed, [\d,]+ are free", result.stderr)
    assert str(saved) in result.stderr
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


MEMORY = """
import resource, sys, torch
from flashtask.core.checkpoint import read_checkpoint, read_header, write_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
size = 100_000_000
state = {str(n): torch.zeros(size // 16) for n in range(4)}
start = peak()
write_checkpoint(sys.argv[1], {"state_dict": state})
written = peak() - start
del state
read_header(sys.argv[1])
listed = peak() - start
content = read_checkpoint(sys.argv[1])
print(written, listed, peak() - start)
"""


def test_writing_and_reading_need_no_second_copy_of_the_tensors(tmp_path):
    result = warm.run(MEMORY, tmp_path / "a.ckpt")
    written, listed, read = map(int, result.stdout.split())
    assert written < 30, result.stdout
    assert listed < 40, result.stdout
    assert read < 50, result.stdout


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("recipe.yaml", b"task: image_classification\nmodel: {backbone: resnet18}\n", "a recipe"),
        ("settings.yml", b"a: 1\n", "a YAML file"),
        ("a.csv", b"file,label\na.png,cat\n", "a CSV table"),
        ("b.ckpt", "Größe: 3".encode(), "a text file"),
        ("c.ckpt", b"<!DOCTYPE html><html>", "a web page"),
        ("d.ckpt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        ("e.png", b"\x89PNG\r\n\x1a\n" + bytes(60), "a PNG image"),
        ("f.jpg", b"\xff\xd8\xff\xe0" + bytes(60), "a JPEG image"),
        ("g.zip", b"PK\x03\x04" + bytes(26) + b"photos/a.png", "a zip archive"),
        ("h.npy", b"\x93NUMPY\x01\x00v\x00{'descr'", "a NumPy array"),
        ("i.h5", b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file"),
        ("j.tar.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "a gzip archive"),
    ],
)
def test_a_file_of_another_kind_is_named_and_the_checkpoint_beside_it(name, content, what, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path} is not a checkpoint, but {what}")
    assert "bytes" not in str(caught.value)
    assert caught.value.fix
    for other in ("best.ckpt", "a.ckpt"):
        (tmp_path / other).write_bytes(b"")
    with pytest.raises(IntegrityError) as caught:
        read_checkpoint(path)
    assert caught.value.fix.startswith(f"did you mean '{tmp_path}/best.ckpt'?") or "LFS" in what or "page" in what
