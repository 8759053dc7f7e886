"""Image files as they are found, through every constructor: good ones give the same pixels, bad ones are all named."""

from __future__ import annotations

import hashlib
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import DAMAGED, encoded, picture

from flashtask import ImageClassificationData, ImageRegressionData, ObjectDetectionData, Preprocessing
from flashtask.core.errors import BadDataError
from flashtask.data.images import load_image
from flashtask.data.transforms import eval_transform

SMALL = Preprocessing(input_size=16, crop_pct=1.0)
TWELVE = (0, 4095)
OPTIONS = {"preprocessing": SMALL, "augment": "none", "value_range": TWELVE, "batch_size": 4}


def _with_orientation(number):
    exif = Image.Exif()
    exif[274] = number
    return encoded(picture(), "JPEG", quality=95, exif=exif)


def _transparent():
    pixels = np.asarray(picture().convert("RGBA")).copy()
    pixels[:12, :, 3] = 0
    return encoded(Image.fromarray(pixels), "PNG")


def _palette():
    return encoded(picture().quantize(8), "PNG", transparency=0)


def _wide(kind):
    values = np.arange(24 * 16).reshape(24, 16) * 10
    return encoded(Image.fromarray(values.astype(np.uint16 if kind == "PNG" else np.float32)), kind)


def _animated():
    return encoded(picture(), "GIF", save_all=True, append_images=[Image.new("RGB", (16, 24))])


#: What is read, by the name of the file.
GOOD = {
    **{f"orientation{number}.jpg": _with_orientation(number) for number in range(1, 9)},
    "cmyk.jpg": encoded(picture().convert("CMYK"), "JPEG"),
    "grey16.png": _wide("PNG"),
    "float32.tif": _wide("TIFF"),
    "palette.png": _palette(),
    "alpha.png": _transparent(),
    "animated.gif": _animated(),
    "one.png": encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
    "a PNG.jpg": encoded(picture(), "PNG"),
    os.fsdecode(b"caf\xe9.png"): encoded(picture(8, 8), "PNG"),
}
#: What is refused; a dangling link besides.
BAD = {f"{kind}.jpg": content for kind, (content, _) in DAMAGED.items() if kind != "large bomb"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`good/a`, `good/b`, and the same with the bad ones in `all`."""
    root = tmp_path_factory.mktemp("images")
    for part, files in (("good", GOOD), ("all", GOOD | BAD)):
        for place, (name, content) in enumerate(files.items()):
            own = root / part / "ab"[place % 2]
            own.mkdir(parents=True, exist_ok=True)
            (own / name).write_bytes(content)
    (root / "all" / "a" / "dangling.png").symlink_to(root / "nowhere.png")
    return root


def files_in(place):
    return sorted(map(str, place.rglob("*.*")))


def by_folders(place):
    return ImageClassificationData.from_folders(place, **OPTIONS)


def by_files(place):
    return ImageClassificationData.from_files(files_in(place), target=r"/([ab])/[^/]+$", **OPTIONS)


def by_a_data_frame(place):
    files = files_in(place)
    frame = {"file": files, "kind": [os.path.dirname(file)[-1] for file in files]}
    return ImageClassificationData.from_data_frame("file", "kind", frame, **OPTIONS)


def by_json_lines(place):  # CSV holds no names that are not UTF-8
    import json

    table = place.parent / f"{place.name}.jsonl"
    rows = [{"file": file, "size": number} for number, file in enumerate(files_in(place))]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return ImageRegressionData.from_csv("file", "size", table, **OPTIONS)


def by_bytes(place):
    return ImageClassificationData.from_images(*_contents(place), **OPTIONS)


def by_a_dataset(place):
    return ImageClassificationData.from_datasets(list(zip(*_contents(place), strict=True)), **OPTIONS)


def by_parquet(place):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    contents, kinds = _contents(place)
    cells = [{"bytes": content, "path": None} for content in contents]
    parquet.write_table(pyarrow.table({"image": cells, "kind": kinds}), place.parent / f"{place.name}.parquet")
    table = place.parent / f"{place.name}.parquet"
    return ImageClassificationData.from_csv("image", "kind", table, **OPTIONS)


def by_boxes(place):
    objects = [{"boxes": [], "labels": []} for _ in files_in(place)]
    objects[0] = {"boxes": [[1, 1, 9, 9]], "labels": ["a"]}
    return ObjectDetectionData.from_files(files_in(place), objects, **OPTIONS)


def _contents(place):
    found = [file for file in files_in(place) if os.path.exists(file)]
    contents = []
    for file in found:
        with open(file, "rb") as opened:
            contents.append(opened.read())
    return contents, [os.path.dirname(file)[-1] for file in found]


FILES = {one.__name__: one for one in (by_folders, by_files, by_a_data_frame, by_json_lines, by_boxes)}
MEMORY = {one.__name__: one for one in (by_bytes, by_a_dataset, by_parquet)}


def pixels(data):
    """A hash of each training picture as a model gets it."""
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    return sorted(hashlib.sha256(dataset[row][0].numpy().tobytes()).hexdigest() for row in range(len(dataset)))


@pytest.fixture(scope="module")
def expected(folder):
    """By the functions that read and transform one file."""
    transform = eval_transform(Preprocessing(input_size=16, crop_pct=1.0).resolved())
    images = (transform(load_image(file, value_range=TWELVE)) for file in files_in(folder / "good"))
    return sorted(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images)


@pytest.mark.parametrize("name", [*FILES, *MEMORY])
def test_good_images_give_the_same_pixels(name, folder, expected):
    data = (FILES | MEMORY)[name](folder / "good")
    assert len(expected) == len(GOOD) == 17
    if name == "by_boxes":
        data.preprocessing = SMALL
    assert pixels(data) == expected


def test_pixels_in_memory_and_pictures_that_are_open_are_those_of_the_files(folder, expected):
    files = files_in(folder / "good")
    kinds = [os.path.dirname(file)[-1] for file in files]
    arrays = [np.asarray(load_image(file, value_range=TWELVE)) for file in files]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    assert pixels(ImageClassificationData.from_numpy(arrays, kinds, **OPTIONS)) == expected
    assert pixels(ImageClassificationData.from_tensors(tensors, kinds, **OPTIONS)) == expected
    opened = [Image.open(io.BytesIO(content)) for content in _contents(folder / "good")[0]]
    assert pixels(ImageClassificationData.from_images(opened, kinds, **OPTIONS)) == expected


def test_shards_keep_the_pixels_and_refuse_bad_images(folder, expected, tmp_path):
    by_folders(folder / "good").save_shards(tmp_path / "shards")
    assert pixels(ImageClassificationData.from_shards(tmp_path / "shards", **OPTIONS)) == expected
    with pytest.raises(BadDataError, match=f"{len(BAD) + 1} of {len(GOOD | BAD) + 1} images cannot be read"):
        by_folders(folder / "all").save_shards(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", [*FILES, *MEMORY])
def test_all_bad_images_are_named_or_left_out(name, folder, monkeypatch):
    make, is_of_files = (FILES | MEMORY)[name], name in FILES
    count = len(BAD) + is_of_files
    with pytest.raises(BadDataError) as caught:  # a link that leads nowhere is a missing image of a table
        make(folder / "all").setup("fit")
    if len(getattr(caught.value, "bad_images", ())) == count:
        assert f"{count} of {len(GOOD) + count} images cannot be read" in str(caught.value)
        assert all(kind in str(caught.value) for kind in BAD if is_of_files)
    else:
        assert "missing image: 1" in str(caught.value)
        assert "dangling.png" in str(caught.value)
    monkeypatch.setitem(OPTIONS, "on_bad_image", "skip")
    data = make(folder / "all")
    data.setup("fit")
    assert data.sizes() == {"train": len(GOOD)}
    assert len(data.skipped) == count
