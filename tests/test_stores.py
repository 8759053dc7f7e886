"""Tables, images and shards in S3, by s3fs, from a server of the loopback."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from s3_server import serving

from flashtask import ImageClassificationData
from flashtask.core.errors import IntegrityError, MissingInputError

s3fs = pytest.importorskip("s3fs")


@pytest.fixture
def store(monkeypatch, tmp_path):
    """`bucket/all.csv` and the eight photographs that it names."""
    rng, objects = np.random.default_rng(0), {}
    for number in range(8):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        objects[f"bucket/photos/{number}.png"] = buffer.getvalue()
    rows = "".join(f"photos/{number}.png,{'ab'[number % 2]}\n" for number in range(8))
    objects["bucket/all.csv"] = f"file,kind\n{rows}".encode()
    with serving(objects) as (address, asked):
        monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
        given = {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
        for name, value in {**given, "DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield objects, asked
        s3fs.S3FileSystem.clear_instance_cache()  # its connection would answer for the server of the next test


def test_a_table_and_its_images_are_fetched_once(store):
    _, asked = store
    for _ in range(2):
        data = ImageClassificationData.from_csv("file", "kind", "s3://bucket/all.csv", val_split=2)
        data.setup("fit")
        assert data.sizes() == {"train": 6, "val": 2}
    assert sorted(one for one in asked if one.startswith("GET")) == [
        "GET bucket/all.csv",
        *(f"GET bucket/photos/{number}.png" for number in range(8)),
    ]
    with pytest.raises(MissingInputError, match=r"no such file: 's3://bucket/none.csv'"):
        ImageClassificationData.from_csv("file", "kind", "s3://bucket/none.csv")


def test_a_file_that_is_uploaded_after_it_was_missed_is_found(store):
    objects, _ = store
    with pytest.raises(MissingInputError):
        ImageClassificationData.from_csv("file", "kind", "s3://bucket/more/all.csv", images_root="s3://bucket")
    objects["bucket/more/all.csv"] = objects["bucket/all.csv"]
    data = ImageClassificationData.from_csv("file", "kind", "s3://bucket/more/all.csv", images_root="s3://bucket")
    assert data.sizes() == {"train": 8}


def test_shards_are_read_and_a_changed_one_is_refused(store, tmp_path, monkeypatch):
    objects, _ = store
    data = ImageClassificationData.from_csv("file", "kind", "s3://bucket/all.csv", val_split=2)
    folder = data.save_shards(tmp_path / "shards")
    objects.update({f"bucket/shards/{file.name}": file.read_bytes() for file in folder.iterdir()})
    read = ImageClassificationData.from_shards("s3://bucket/shards/shards.json")
    read.setup("fit")
    assert sum(len(targets) for _, targets in read.train_dataloader()) == 6
    objects["bucket/shards/samples.csv"] += b" "
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "other"))
    with pytest.raises(IntegrityError, match=r"samples.csv is damaged"):
        ImageClassificationData.from_shards("s3://bucket/shards/shards.json")


def test_a_table_its_images_and_shards_are_read_from_motos_s3(store, tmp_path, monkeypatch):
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    objects, _ = store
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        bucket = boto3.resource("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="bucket")
        rows = "".join(f"s3://bucket/photos/{number}.png,{'ab'[number % 2]}\n" for number in range(8))
        for name, content in {**objects, "bucket/whole.csv": f"file,kind\n{rows}".encode()}.items():
            bucket.put_object(Key=name.partition("/")[2], Body=content)
        (tmp_path / "here.csv").write_text(f"file,kind\n{rows}")
        for place in ("s3://bucket/all.csv", "s3://bucket/whole.csv", str(tmp_path / "here.csv")):
            data = ImageClassificationData.from_csv("file", "kind", place, val_split=2)
            data.setup("fit")
            assert sum(len(targets) for _, targets in data.train_dataloader()) == 6
        for file in data.save_shards(tmp_path / "shards").iterdir():
            bucket.put_object(Key=f"shards/{file.name}", Body=file.read_bytes())
        read = ImageClassificationData.from_shards("s3://bucket/shards/shards.json")
        read.setup("fit")
        assert sum(len(targets) for _, targets in read.train_dataloader()) == 6
        with pytest.raises(MissingInputError, match=r"no such file: 's3://bucket/none.csv'"):
            ImageClassificationData.from_csv("file", "kind", "s3://bucket/none.csv")
    finally:
        server.stop()
