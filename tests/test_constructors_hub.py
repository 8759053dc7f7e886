"""Dataset repositories of the hub, on a server of the loopback: folders of images and tables."""

from __future__ import annotations

import io
import json

import hub_server
import pytest
import yaml
from small import colour_folders

from flashtask import ImageClassificationData
from flashtask.cli import run
from flashtask.core.errors import BadDataError, HubError, IntegrityError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.HubServer() as server:
        hub_server.use(monkeypatch, server, tmp_path)
        yield server


def files_of(folder, prefix):
    found = sorted(folder.rglob("*.png"))
    return {f"{prefix}{file.relative_to(folder).as_posix()}": file.read_bytes() for file in found}


@pytest.fixture
def folders(tmp_path):
    train, val = colour_folders(tmp_path / "train", each=4), colour_folders(tmp_path / "val", each=2)
    return files_of(train, "data/train/") | files_of(val, "data/validation/") | {"README.md": b"# data\n"}


def test_an_image_folder_with_parts(hub, folders):
    hub.add("org/photos", folders)
    data = ImageClassificationData.from_hub_dataset("org/photos", batch_size=4)
    assert data.sizes() == {"train": 8, "val": 4}
    assert data.labels == ("blue", "red")
    assert data.recipe()["from_hub_dataset"]["repository"] == "org/photos"
    assert not any(name.endswith("_folder") for name in data.recipe()["from_hub_dataset"])
    data.setup("fit")
    hub.reset()
    again = ImageClassificationData.from_hub_dataset(**data.recipe()["from_hub_dataset"])
    again.load_state_dict(data.state_dict())
    assert hub.counted() == 1  # which commit the branch is at


def test_class_folders_without_parts_are_split(hub, tmp_path):
    hub.add("org/photos", files_of(colour_folders(tmp_path / "all", each=5), ""))
    assert ImageClassificationData.from_hub_dataset("org/photos").sizes() == {"train": 8, "val": 2}


def test_a_table_with_images_beside_it(hub, tmp_path):
    images = files_of(colour_folders(tmp_path / "all", each=4), "images/")
    lines = [json.dumps({"file_name": name, "colour": name.split("/")[1]}) for name in images]
    hub.add("org/photos", images | {"metadata.jsonl": "\n".join(lines).encode()})
    data = ImageClassificationData.from_hub_dataset("hf://datasets/org/photos@main", val_split=0.25)
    assert data.sizes() == {"train": 6, "val": 2}
    data.setup("fit")


def test_parquet_files_hold_their_images_and_names_of_classes(hub, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = files_of(colour_folders(tmp_path / "all", each=4), "")
    about = {"info": {"features": {"label": {"names": ["blue", "red"], "_type": "ClassLabel"}}}}
    files = {}
    for number in range(2):
        rows = list(images.items())[number::2]
        cells = [{"bytes": content, "path": name} for name, content in rows]
        labels = [int(name.startswith("red")) for name, _ in rows]
        table = pyarrow.table({"image": cells, "label": labels}).replace_schema_metadata(
            {"huggingface": json.dumps(about)}
        )
        buffer = io.BytesIO()
        parquet.write_table(table, buffer)
        files[f"data/train-0000{number}-of-00002.parquet"] = buffer.getvalue()
    hub.add("org/photos", files)
    data = ImageClassificationData.from_hub_dataset("org/photos", val_split=0.25)
    assert data.labels == ("blue", "red")
    data.setup("fit")
    assert data.sizes() == {"train": 6, "val": 2}


def test_what_cannot_be_used_is_refused(hub, folders):
    hub.add("org/text", {"README.md": b"# data\n"})
    with pytest.raises(BadDataError, match="holds neither images nor tables"):
        ImageClassificationData.from_hub_dataset("org/text")
    with pytest.raises(HubError, match="no repository org/none"):
        ImageClassificationData.from_hub_dataset("org/none")
    hub.add("org/photos", folders)
    hub.reset("same_size")
    with pytest.raises(IntegrityError, match="is not the file that the hub promised"):
        ImageClassificationData.from_hub_dataset("org/photos")


def test_the_command_line_takes_the_address(hub, folders, tmp_path):
    hub.add("org/photos", folders)
    words = ["--backbone", "timm/test_resnet", "--no-pretrained", "--epochs", "1", "--batch-size", "4", "--quiet"]
    assert run(["finetune", "hf://datasets/org/photos", *words, "--output-dir", str(tmp_path / "run")]) == 0
    arguments = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"]["from_hub_dataset"]
    assert (arguments["repository"], arguments["batch_size"]) == ("hf://datasets/org/photos", 4)
