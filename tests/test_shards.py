"""Shards: what is in the tar files, the order in which they are read, damage, servers, and memory."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from image_trees import picture, picture_tree
from PIL import Image

from flashtask import (
    Callback,
    ImageClassificationData,
    ImageClassifier,
    ImageRegressionData,
    Trainer,
    load,
    seed_everything,
)
from flashtask.cli import run
from flashtask.cli.commands import finetune as finetune_command
from flashtask.cli.parts import build_parts
from flashtask.cli.request import requested_recipe
from flashtask.core.errors import IntegrityError, MissingInputError, OutputError, UsageError
from flashtask.data import shards
from flashtask.data.image_source import MemoryImages
from flashtask.data.samples import SampleTable, as_text
from flashtask.data.shard_writer import write_shards
from flashtask.data.shards import ShardSampler
from flashtask.data.targets import LabelReader
from flashtask.trainer.data_loaders import order_of, rebuild_loader

SMALL = {"preprocessing": {"input_size": [3, 32, 32]}, "augment": "none"}
#: The files of a sample have this name, then a dot and a key (webdataset.tariterators.base_plus_ext).
KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return picture_tree(tmp_path_factory.mktemp("folders"), {"train": 20, "val": 5}, size=(40, 32))


def from_folders(folders, **options):
    return ImageClassificationData.from_folders(folders / "train", folders / "val", **{**SMALL, **options})


@pytest.fixture(scope="module")
def place(folders, tmp_path_factory):
    """Eight shards or so of training images, and some of validation."""
    return from_folders(folders).save_shards(tmp_path_factory.mktemp("shards") / "out", shard_bytes=60_000)


def samples_as_webdataset_reads_them(folder, part):
    """Consecutive files with one key are a sample."""
    found = []
    for path in sorted(folder.glob(f"{part}-*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, ending = KEY.match(member.name).groups()
                if not found or found[-1]["__key__"] != key or ending in found[-1]:
                    found.append({"__key__": key})
                found[-1][ending] = archive.extractfile(member).read()
    return found


def keys_of(loader, epoch=0, start=0):
    order_of(loader).set_position(epoch, start=start)
    return [key for batch in order_of(loader) for key in batch]


def loader_of(data, process=(0, 1), batch_size=4, seed=3):
    data.setup("fit")
    data.batch_size = batch_size
    return rebuild_loader(data.train_dataloader(), seed=seed, training=True, process=process)


# ---- what is written


def test_the_tar_files_are_samples_for_webdataset(folders, place):
    files = {path.relative_to(folders / "train").as_posix() for path in (folders / "train").rglob("*.png")}
    found = samples_as_webdataset_reads_them(place, "train")
    assert len(found) == 40
    assert {set(sample) == {"__key__", "png", "cls", "json"} for sample in found} == {True}
    for sample in found:
        about = json.loads(sample["json"])
        assert sample["png"] == (folders / "train" / about["name"]).read_bytes()
        assert about["label"] == ["cat", "dog"][int(sample["cls"])] == about["name"].partition("/")[0]
    assert {json.loads(sample["json"])["name"] for sample in found} == files
    sizes = [path.stat().st_size for path in place.glob("train-*.tar")]
    assert len(sizes) > 3
    assert max(sizes) < 80_000
    # Each shard is a sample of all, not one class.
    first = samples_as_webdataset_reads_them(place, "train")[:8]
    assert {sample["cls"] for sample in first} == {b"0", b"1"}


def test_names_with_dots_and_other_letters_become_keys_that_differ(tmp_path):
    images = [picture(number) for number in range(6)]
    files = [tmp_path / name for name in ("a.b.png", "a_b.png", "ä b.png", "x.tar.png", "-.png", "cls.png")]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    data = ImageClassificationData.from_files(files, ["u", "v"] * 3, **SMALL)
    found = samples_as_webdataset_reads_them(data.save_shards(tmp_path / "out"), "train")
    assert len({sample["__key__"] for sample in found}) == 6
    assert Counter(sample["cls"] for sample in found) == {b"0": 3, b"1": 3}
    assert {json.loads(sample["json"])["name"] for sample in found} == {file.name for file in files}


def test_shards_give_the_pixels_and_targets_of_their_source(folders, place):
    ours, theirs = ImageClassificationData.from_shards(place, **SMALL), from_folders(folders)
    assert ours.sizes() == theirs.sizes()
    assert ours.labels == theirs.labels
    for data in (ours, theirs):
        data.setup("fit")
    for part in ("train", "val"):
        found = [
            {(image.numpy().tobytes(), target) for image, target in map(data._datasets[part].__getitem__, range(count))}
            for data, count in ((ours, ours.sizes()[part]), (theirs, ours.sizes()[part]))
        ]
        assert found[0] == found[1]
    assert ours.recipe()["from_shards"]["shards_folder"] == str(place)


def test_numbers_several_labels_groups_weights_and_wide_images_are_kept(tmp_path):
    wide = [(np.random.default_rng(row).integers(0, 4096, (24, 24))).astype(np.uint16) for row in range(8)]
    plain = [picture(row) for row in range(8)]
    columns = {"image": wide, "n": np.arange(8) / 4, "w": [1, 2, 3, 4, 1, 2, 3, 4], "who": list("aabbccdd")}
    data = ImageRegressionData.from_data_frame(
        "image", "n", columns, group_field="who", weight_field="w", val_split=0.25, **SMALL
    )
    data.save_shards(tmp_path / "numbers")
    again = ImageRegressionData.from_shards(tmp_path / "numbers", **SMALL)
    for one in (data, again):
        one.setup("fit")
    assert again.sizes() == data.sizes() == {"train": 6, "val": 2}
    assert again.targets == data.targets
    assert set(again._table.groups.tolist()) == set("abcd")
    assert sorted(again._table.weights.tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert again.used_preprocessing.value_range == data.used_preprocessing.value_range
    pixels = [
        {x.numpy().tobytes() for x, _ in map(one._datasets["train"].__getitem__, range(6))} for one in (data, again)
    ]
    assert pixels[0] == pixels[1]

    several = ImageClassificationData.from_images(plain, ["a;b", "a", "", "b"] * 2, label_separator=";", **SMALL)
    several.save_shards(tmp_path / "labels")
    again = ImageClassificationData.from_shards(tmp_path / "labels", **SMALL)
    assert again.is_multi_label
    assert again.counts() == several.counts()
    with pytest.raises(UsageError, match="does not read shards with targets of the kind 'labels'"):
        ImageRegressionData.from_shards(tmp_path / "labels")
    words = [str(tmp_path / "labels"), "--backbone", "timm/test_vit", "--no-pretrained"]
    params = finetune_command.make_context("finetune", words).params
    assert build_parts(requested_recipe(params.pop("data"), params)).model.hparams["multi_label"] is True


# ---- order


def test_local_shards_are_read_in_a_permutation_of_all_samples(place):
    data = ImageClassificationData.from_shards(place, **SMALL)
    whole = [key.index for key in keys_of(loader_of(data))]
    assert sorted(whole) == list(range(40))
    assert whole != sorted(whole)
    assert whole == [key.index for key in keys_of(loader_of(data))]
    assert whole != [key.index for key in keys_of(loader_of(data), epoch=1)]
    assert whole[12:] == [key.index for key in keys_of(loader_of(data), start=12)]
    shares = [keys_of(loader_of(data, (rank, 2))) for rank in range(2)]
    assert Counter(key.index for share in shares for key in share) == Counter(range(40))


def test_workers_do_not_change_a_batch(place):
    data = ImageClassificationData.from_shards(place, num_workers=0, **{**SMALL, "augment": "light"})
    data.setup("fit")
    plain = [images for images, _ in loader_of(data)]
    data.num_workers = 2
    loader = loader_of(data)
    order_of(loader).set_position(0)
    assert all(torch.equal(one, other) for one, (other, _) in zip(plain, loader, strict=True))


def test_shards_at_an_address_are_read_one_after_the_other():
    numbers = np.repeat(np.arange(5), 20)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(list(ShardSampler(numbers)))
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == list(range(100))
    turns = [
        shard for place, shard in enumerate(numbers[drawn[0]]) if not place or shard != numbers[drawn[0]][place - 1]
    ]
    assert len(turns) == 5


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_on_shards_goes_on_in_the_middle_of_an_epoch(place, tmp_path):
    def train(folder, ckpt_path=None, **options):
        data = ImageClassificationData.from_shards(place, batch_size=8, **{**SMALL, "augment": "light"})
        trainer = Trainer(output_dir=folder, enable_progress_bar=False, accelerator="cpu", max_epochs=2, **options)
        seed_everything(0, verbose=False)
        model = ImageClassifier(backbone="timm/test_resnet", pretrained=False)
        trainer.finetune(model, datamodule=data, strategy="no_freeze", ckpt_path=ckpt_path)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", callbacks=StopAt(3))
    resumed = train(tmp_path / "cut", ckpt_path="last")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# ---- damage


def copied(place, folder):
    return Path(shutil.copytree(place, folder))


@pytest.mark.long
def test_damaged_shards_end_with_their_names(place, tmp_path, capsys):
    cut = copied(place, tmp_path / "cut")
    os.truncate(cut / "train-000001.tar", 9000)
    with pytest.raises(IntegrityError, match=r"train-000001\.tar is damaged: it has 9,000 bytes"):
        ImageClassificationData.from_shards(cut)
    assert run(["finetune", str(cut)]) == 76
    assert "train-000001.tar" in capsys.readouterr().err

    changed = copied(place, tmp_path / "changed")
    content = bytearray((changed / "train-000002.tar").read_bytes())
    content[700] ^= 1
    (changed / "train-000002.tar").write_bytes(content)
    options = ["--epochs", "1", "--backbone", "mobilenetv3_small_050", "--no-pretrained"]
    assert run(["finetune", str(changed), *options, "--output-dir", str(tmp_path / "run")]) == 76
    assert "train-000002.tar is damaged" in capsys.readouterr().err

    (cut / "train-000001.tar").unlink()
    with pytest.raises(MissingInputError, match="train-000001"):
        ImageClassificationData.from_shards(cut)


def test_a_damaged_or_hostile_index_is_refused(place, tmp_path):
    folder = copied(place, tmp_path / "out")
    samples = folder / "samples.csv"
    before = samples.read_text()
    samples.write_text(before.replace("cat", "dog", 1))
    with pytest.raises(IntegrityError, match=r"samples\.csv is damaged"):
        ImageClassificationData.from_shards(folder)
    index = json.loads((folder / "shards.json").read_text())
    for change in (
        {"shardlist": [{**index["shardlist"][0], "url": "../secret.tar"}]},
        {"shardlist": []},
        {"shardlist": 5},
        {"flashtask_shards": 2},
        {"target_columns": -1},
        {"samples": {"sha256": "x"}},
        {"targets": []},
    ):
        (folder / "shards.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(IntegrityError, match="is not an index of shards"):
            ImageClassificationData.from_shards(folder)
    (folder / "shards.json").write_text("{")
    with pytest.raises(IntegrityError):
        ImageClassificationData.from_shards(folder)
    for wrong in (before.replace('"512"', '"-512"', 1), before.replace('"512"', '"99999999"', 1), "a,b\n1,2\n", ""):
        samples.write_text(wrong)
        digest = hashlib.sha256(wrong.encode()).hexdigest()
        (folder / "shards.json").write_text(json.dumps({**index, "samples": {"sha256": digest}}))
        with pytest.raises(IntegrityError, match="is not a list of samples"):
            ImageClassificationData.from_shards(folder)


def test_nothing_is_overwritten(folders, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="never overwritten"):
        from_folders(folders).save_shards(tmp_path / "taken")
    assert run(["shard", str(folders), str(tmp_path / "taken")]) == 73
    assert os.listdir(tmp_path / "taken") == ["mine.txt"]
    with pytest.raises(UsageError, match="shard_bytes"):
        from_folders(folders).save_shards(tmp_path / "new", shard_bytes=10)
    assert not (tmp_path / "new").exists()


def test_a_killed_shard_leaves_nothing_under_a_final_name(folders, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from flashtask import ImageClassificationData\n"
        "from flashtask.data import shard_writer\n"
        "whole, calls = shard_writer._content, []\n"
        "def killed(given):\n"
        "    calls.append(given)\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 4 else whole(given)\n"
        "shard_writer._content = killed\n"
        "ImageClassificationData.from_folders(sys.argv[1]).save_shards(sys.argv[2], shard_bytes=5000)\n"
    )
    assert warm.run(script, folders / "train", tmp_path / "out").returncode == -signal.SIGKILL
    assert os.listdir(tmp_path)
    assert all(name.startswith(".") for name in os.listdir(tmp_path))
    from_folders(folders).save_shards(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


# ---- servers


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges; the first answer of each shard is cut in the middle."""

    def __init__(self, *arguments, log, cuts, **options):
        self.log, self.cuts = log, cuts
        super().__init__(*arguments, **options)

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content, name = path.read_bytes(), path.name
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        self.log.append((name, first))
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        body = content[first:]
        if name in self.cuts and self.cuts.pop(name):
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(place, tmp_path, monkeypatch):
    """The address of a copy of the shards, the folder that it serves, and the requests."""
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    folder, log = copied(place, tmp_path / "served" / "out"), []
    cuts = dict.fromkeys(["train-000001.tar"], True)
    handler = functools.partial(Handler, directory=str(folder.parent), log=log, cuts=cuts)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/out", folder, log
        server.shutdown()
        thread.join()


def test_shards_on_a_server_are_fetched_whole_and_one_after_the_other(served, place, monkeypatch):
    address, _, log = served
    largest = max(path.stat().st_size for path in place.glob("*.tar"))
    monkeypatch.setenv("FLASHTASK_SHARD_CACHE_BYTES", str(3 * largest))
    data = ImageClassificationData.from_shards(address, **SMALL)
    assert data.sizes() == {"train": 40, "val": 10}
    assert [name for name, _ in log] == ["shards.json", "samples.csv"]
    loader = loader_of(data)
    keys = [key.index for key in keys_of(loader)]
    assert keys == [key.index for key in keys_of(loader)]
    assert keys != [key.index for key in keys_of(loader, epoch=1)]
    assert [key.index for key in keys_of(loader, start=8)] == keys[8:]
    order_of(loader).set_position(0)
    local = ImageClassificationData.from_shards(place, **SMALL)
    local.setup("fit")
    seen = 0
    for images, targets in loader:
        for image, target in zip(images, targets, strict=True):
            wanted, label = local._datasets["train"][keys[seen]]
            assert torch.equal(image, wanted)
            assert int(target) == label
            seen += 1
    assert seen == 40
    fetched = Counter(name for name, first in log if not first)
    num_shards = len(list(place.glob("train-*.tar")))
    assert fetched.total() == 2 + num_shards  # each once
    assert any(first for name, first in log if name == "train-000001.tar")  # went on after the cut
    kept = sum(path.stat().st_size for path in (shards.shard_cache()).glob("*.tar"))
    assert kept <= 3 * largest


def test_processes_share_the_samples_of_a_server(served):
    data = ImageClassificationData.from_shards(served[0], **SMALL)
    shares = [keys_of(loader_of(data, (rank, 2))) for rank in range(2)]
    assert Counter(key.index for share in shares for key in share) == Counter(range(40))


def test_a_changed_shard_on_a_server_is_refused(served):
    address, folder, _ = served
    data = ImageClassificationData.from_shards(address, **SMALL)
    content = bytearray((folder / "val-000000.tar").read_bytes())
    content[-1] ^= 1
    (folder / "val-000000.tar").write_bytes(content)
    data.setup("fit")
    with pytest.raises(IntegrityError, match=r"val-000000\.tar is damaged"):
        next(iter(data.val_dataloader()))
    with pytest.raises(UsageError, match="has validation samples, so val_split has no use"):
        ImageClassificationData.from_shards(folder, val_split=0.2)
    with pytest.raises(UsageError, match="draws from all shards"):
        ImageClassificationData.from_shards(address, sampler="balanced")


@pytest.mark.long
def test_shards_are_read_from_stores_that_fsspec_knows(place, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for path in place.iterdir():
        store.pipe(f"/bucket/out/{path.name}", path.read_bytes())
    data = ImageClassificationData.from_shards("memory://bucket/out/shards.json", **SMALL)
    data.setup("fit")
    assert sum(len(targets) for _, targets in loader_of(data)) == 40


# ---- the command line


@pytest.mark.long
def test_shards_are_written_trained_on_and_evaluated_from_the_command_line(folders, tmp_path, capsys):
    out, small = tmp_path / "out", ["--set", "data.from_shards.preprocessing={input_size: [3, 32, 32]}"]
    assert run(["shard", str(folders / "train"), str(out), "--fold", "1/4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sizes"] == {"train": 30, "val": 10}
    assert told["shards"] == 2
    options = ["--epochs", "1", "--backbone", "mobilenetv3_small_050", "--no-pretrained", *small]
    assert run(["finetune", str(out), *options, "--output-dir", str(tmp_path / "run")]) == 0
    assert "shards_folder" in (tmp_path / "run" / "recipe.yaml").read_text()
    capsys.readouterr()
    assert run(["validate", str(tmp_path / "run"), str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]
    assert found["val_loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    assert load(tmp_path / "run" / "best.ckpt").labels == ("cat", "dog")
    assert run(["audit", str(out), "--json"]) in (0, 65)
    assert run(["shard", str(folders), str(out)]) == 73


# ---- memory

MEASURE = """
import resource, sys
import numpy as np
from flashtask import ImageClassificationData
from flashtask.trainer.data_loaders import rebuild_loader
data = ImageClassificationData.from_shards(sys.argv[1], batch_size=256, num_workers=0, augment="none",
                                           preprocessing={"input_size": [3, 16, 16]})
data.setup("fit")
count = sum(len(targets) for _, targets in rebuild_loader(data.train_dataloader(), seed=0, training=True))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
def test_memory_is_flat_over_100_000_samples(tmp_path):
    rng, peaks = np.random.default_rng(0), {}
    pictures = [_jpeg(pixels) for pixels in rng.integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)]
    for count in (10_000, 100_000):
        names = MemoryImages.names("train_images", count)
        table = SampleTable.of_part("train", names, as_text(str(row % 2) for row in range(count)))
        images, reader = MemoryImages({"train_images": _Many(pictures, count)}), LabelReader(labels=("0", "1"))
        folder = write_shards(tmp_path / f"{count}", table, images, reader, {}, shard_bytes=10**7)
        command = [sys.executable, "-c", MEASURE, str(folder)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert int(told[0]) == count
        peaks[count] = int(told[1]) / 1024
    print(f"peak memory in MiB: {peaks}")
    assert peaks[100_000] - peaks[10_000] < 80


class _Many:
    """A few files many times over, each with a number behind its end, so that all differ."""

    def __init__(self, contents, count):
        self.contents, self.count = contents, count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return self.contents[row % len(self.contents)] + f"{row}".encode()


def _jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()
