"""config.json of a folder in timm's layout: what is read from it, and what is refused with the file's name."""

from __future__ import annotations

import json
import os

import pytest
import timm
import torch
from safetensors.torch import save_file

from flashtask.backbones.descriptions import read_timm_folder
from flashtask.backbones.weights import read_weights
from flashtask.core.errors import IntegrityError, MissingInputError
from flashtask.core.foreign_config import CODE_KEYS
from flashtask.core.preprocessing import Preprocessing


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    return folder


PLAIN = {"architecture": "test_vit", "num_classes": 2, "pretrained_cfg": {"input_size": [3, 64, 64]}}


@pytest.mark.long
def test_what_timm_writes_is_read_whole(tmp_path):
    model = timm.create_model("test_vit", num_classes=3, img_size=96)
    names = ["ant", "bee", "cat"]
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": names}, safe_serialization="both")
    folder = read_timm_folder(tmp_path)
    assert (folder.architecture, folder.num_classes, folder.labels) == ("test_vit", 3, tuple(names))
    assert folder.preprocessing == Preprocessing((3, 96, 96), (0.5,) * 3, (0.5,) * 3, 0.95, "bicubic", "center")
    assert folder.model_args == {"img_size": [96, 96], "global_pool": "token"}
    assert folder.weights == tmp_path / "model.safetensors"
    assert set(read_weights(folder.weights)) == set(read_weights(tmp_path / "pytorch_model.bin"))


def test_older_flat_files_are_read_too(tmp_path):
    flat = {"architecture": "resnet18", "num_classes": 2, "labels": ["a", "b"], "mean": [0.5], "std": [0.25]}
    folder = read_timm_folder(write(tmp_path, {**flat, "input_size": [1, 32, 48], "crop_pct": 1.2}))
    assert folder.labels == ("a", "b")
    assert folder.preprocessing == Preprocessing((1, 32, 48), (0.5,), (0.25,), 1.0, "bicubic")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["crane", "owl", "crane"], ("crane (0)", "owl", "crane (2)")),
        ({"0": "ant", "2": "cat"}, ("ant", "1", "cat")),
        (None, None),
    ],
)
def test_labels_are_one_different_text_for_each_output(tmp_path, names, labels):
    assert read_timm_folder(write(tmp_path, {**PLAIN, "num_classes": 3, "label_names": names})).labels == labels


REFUSED = {
    "no JSON": '{"architecture": ',
    "a list": "[]",
    "another encoding": "\udcff",
    "a key twice": '{"architecture": "resnet18", "architecture": "resnet34", "num_classes": 2}',
    "not a number": '{"architecture": "resnet18", "num_classes": NaN}',
    "a number of 5000 digits": '{"architecture": "resnet18", "num_classes": 1' + "0" * 5000 + "}",
    "very deep": "[" * 100_000,
    "deep": {**PLAIN, "x": json.loads("[" * 50 + "]" * 50)},
    "no architecture": {"num_classes": 2},
    "transformers": {"model_type": "vit", "architectures": ["ViTModel"]},
    "an unknown architecture": {**PLAIN, "architecture": "resnet1"},
    "a path as architecture": {**PLAIN, "architecture": "../../x"},
    "a source as architecture": {**PLAIN, "architecture": "hf-hub:org/name"},
    "no number of classes": {"architecture": "resnet18"},
    "too many classes": {**PLAIN, "num_classes": 10**9},
    "classes that are a truth": {**PLAIN, "num_classes": True},
    "other labels than classes": {**PLAIN, "label_names": ["a"]},
    "labels that are no text": {**PLAIN, "label_names": [1, 2]},
    "a label of no output": {**PLAIN, "label_names": {"7": "a"}},
    "code of a repository": {**PLAIN, "auto_map": {"AutoModel": "x.Y"}},
    "code allowed": {**PLAIN, "pretrained_cfg": {"trust_remote_code": True}},
    "a class path": {**PLAIN, "model_args": {"act_layer": {"class_path": "os.system"}}},
    "a checkpoint": {**PLAIN, "model_args": {"checkpoint_path": "x.pth"}},
    "a file": {**PLAIN, "model_args": {"pretrained_cfg": {"file": "/etc/passwd"}}},
    "a path": {**PLAIN, "model_args": {"act_layer": "/etc/passwd"}},
    "a dunder": {**PLAIN, "model_args": {"__class__": 1}},
    "many blocks": {**PLAIN, "model_args": {"depth": 10_000}},
    "many blocks in a list": {**PLAIN, "model_args": {"depths": [900] * 4}},
    "a huge width": {**PLAIN, "model_args": {"embed_dim": 10**9}},
    "a huge image": {**PLAIN, "pretrained_cfg": {"input_size": [3, 10**6, 10**6]}},
    "a size of texts": {**PLAIN, "pretrained_cfg": {"input_size": ["3", "2", "2"]}},
    "no such interpolation": {**PLAIN, "pretrained_cfg": {"interpolation": "guess"}},
    "a std of 0": {**PLAIN, "pretrained_cfg": {"std": [0, 0, 0]}},
    "a mean of texts": {**PLAIN, "pretrained_cfg": {"mean": ["a"] * 3}},
    "a mean of other length": {**PLAIN, "pretrained_cfg": {"mean": [0.5] * 4}},
    "a crop of text": {**PLAIN, "pretrained_cfg": {"crop_pct": "all"}},
    "a crop below 0": {**PLAIN, "pretrained_cfg": {"crop_pct": -1}},
    "a table that is a list": {**PLAIN, "pretrained_cfg": []},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_configuration_that_cannot_be_trusted_is_refused_by_name(tmp_path, kind):
    text = REFUSED[kind]
    folder = write(tmp_path, "{}")
    raw = b'{"architecture": "\xff"}' if text == "\udcff" else None
    (folder / "config.json").write_bytes(raw or (text if isinstance(text, str) else json.dumps(text)).encode())
    with pytest.raises(IntegrityError) as caught:
        read_timm_folder(folder)
    assert str(folder / "config.json") in caught.value.what


@pytest.mark.parametrize("key", sorted(CODE_KEYS))
def test_a_configuration_that_asks_for_code_is_refused_with_the_place(tmp_path, key):
    folder = write(tmp_path, {**PLAIN, "pretrained_cfg": {"deep": [{key: "os.system"}]}})
    with pytest.raises(IntegrityError, match=rf"code to be run \(`pretrained_cfg\.deep\.{key}`\)"):
        read_timm_folder(folder)


def test_a_class_may_have_the_name_of_such_a_key(tmp_path):
    folder = write(
        tmp_path, {**PLAIN, "label_names": {"0": "_target_", "1": "x"}, "label_descriptions": {"auto_map": ""}}
    )
    assert read_timm_folder(folder).labels == ("_target_", "x")


def test_a_configuration_of_more_than_8_mib_is_not_read(tmp_path):
    write(tmp_path, PLAIN)
    os.truncate(tmp_path / "config.json", 9 << 20)
    with pytest.raises(IntegrityError, match="larger than 8,388,608 bytes"):
        read_timm_folder(tmp_path)


def test_a_file_that_is_not_there_or_no_file_is_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"config\.json"):
        read_timm_folder(tmp_path / "none")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(IntegrityError, match="is a pipe or a device"):
        read_timm_folder(tmp_path)


def test_an_architecture_that_timm_has_renamed_is_the_one_it_is_now(tmp_path):
    folder = read_timm_folder(write(tmp_path, {**PLAIN, "architecture": "vit_base_patch16_224_in21k"}))
    assert folder.architecture == "vit_base_patch16_224"
