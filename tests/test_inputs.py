"""What `predict` takes: the same pixels give the same result in every form; a wrong thing is refused by name."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import http.server
import io
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import write_image
from PIL import Image, ImageFile, ImageOps
from torch import nn

from flashtask import ImageClassifier, ImageEmbedder
from flashtask.core.errors import BadDataError, HubError, IntegrityError, MissingInputError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.data.decoding import Fitting
from flashtask.data.images import prepare_decoders
from flashtask.data.inputs import read_inputs
from flashtask.tasks.prediction import predictions_of


def photo(width=90, height=70, seed=0):
    """Smooth and in colour, and not the same after any turn."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(path, image, orientation=1, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **options)
    return str(path)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = ImageClassifier("timm/test_efficientnet", labels=("a", "b", "c"), pretrained=False)
    made.preprocessing = Preprocessing(input_size=(3, 48, 48))
    nn.init.normal_(made.head[0].weight, std=5)
    made.default_precision = "32"
    return made.eval()


@pytest.fixture
def opened():
    """`Image.open` whose images are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda given: stack.enter_context(Image.open(given))


@pytest.fixture
def server():
    """Serves a folder on the loopback, and counts what is asked for."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=served.folder)

        def do_GET(self):
            served.requests.append(self.path)
            if self.path.startswith("/slow"):
                time.sleep(10)
                return
            if self.path.startswith("/elsewhere"):
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.2:1/secret")
                self.end_headers()
                return
            super().do_GET()

        def log_message(self, *arguments):
            pass

    with (
        tempfile.TemporaryDirectory() as folder,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served,
    ):
        served.folder, served.requests = folder, []
        served.address = f"http://127.0.0.1:{served.server_address[1]}"
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


# ---- one image, however it is given


def every_kind(path, server, opened):
    """The same picture in every form that can be given, under the name of the form."""
    shutil.copy(path, server.folder)
    name = os.path.basename(path)
    content = Path(path).read_bytes()
    upright = np.array(ImageOps.exif_transpose(opened(path)).convert("RGB"))
    loaded = opened(path)
    loaded.load()
    again = io.BytesIO(content)
    again.seek(0, os.SEEK_END)
    return {
        "Path": Path(path),
        "address": f"{server.address}/{name}",
        "PIL image": opened(path),
        "PIL image that is loaded": loaded,
        "PIL image that is converted": opened(path).convert("RGB"),
        "PIL image that is upright": ImageOps.exif_transpose(opened(path)),
        "PIL image of bytes": opened(io.BytesIO(content)),
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "open file": open(path, "rb"),
        "BytesIO, read to its end": again,
        "array": upright,
        "array that is not contiguous": np.asfortranarray(upright),
        "tensor": torch.tensor(upright).permute(2, 0, 1),
    }


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.bmp"])
def test_every_kind_of_input_gives_the_result_of_the_path(name, model, server, tmp_path, opened):
    path = str(tmp_path / name)
    photo().save(path)
    expected = model.predict(path)
    kinds = every_kind(path, server, opened)
    for kind, given in kinds.items():
        found = model.predict(given)
        assert (found.labels, found.scores) == (expected.labels, expected.scores), kind
        assert found.path == {"Path": path, "address": given}.get(kind), kind
    together = model.predict([path, *kinds.values()])
    assert [one.scores for one in together] == [pytest.approx(expected.scores, abs=1e-5)] * (len(kinds) + 1)
    kinds["open file"].close()


def test_grey_and_transparent_arrays_are_what_the_file_of_them_is(model, tmp_path):
    grey, seen = np.array(photo().convert("L")), photo().convert("RGBA")
    seen.putalpha(Image.fromarray(grey))
    for name, pixels in (("grey", grey), ("clear", np.array(seen))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        expected = model.predict(tmp_path / f"{name}.png").scores
        assert model.predict(pixels).scores == expected
        turned = torch.tensor(pixels).permute(2, 0, 1) if pixels.ndim == 3 else torch.tensor(pixels)
        assert model.predict(turned).scores == expected
    assert model.predict(grey[:, :, None]).scores == model.predict(grey).scores
    assert model.predict(torch.tensor(grey)[None]).scores == model.predict(grey).scores


def test_arrays_of_other_numbers_are_read_by_the_value_range_as_a_file_of_them_is(model, tmp_path):
    ranged = copy.copy(model)
    ranged.preprocessing = dataclasses.replace(model.preprocessing, value_range=(0, 4095))
    twelve_bit = (np.array(photo().convert("L")).astype(np.uint16) * 16) + 5
    Image.fromarray(twelve_bit).save(tmp_path / "deep.png")
    np.save(tmp_path / "deep.npy", twelve_bit.astype(np.float32))
    expected = ranged.predict(tmp_path / "deep.png").scores
    opened = Image.open(tmp_path / "deep.png")
    inputs = [tmp_path / "deep.npy", opened, opened.copy(), (tmp_path / "deep.png").read_bytes()]
    inputs += [kind(twelve_bit) for kind in (np.asarray, np.float64, np.int32, lambda given: torch.tensor(given * 1.0))]
    for given in inputs:
        assert ranged.predict(given).scores == expected
        with pytest.raises(BadDataError, match="no value range is known"):
            model.predict(given)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pil_image_is_turned_as_its_file_is(orientation, model, tmp_path, opened):
    for name in ("a.jpg", "a.png", "a.tif", "a.webp"):
        path = saved(tmp_path / name, photo(), orientation)
        expected = model.predict(path).scores
        loaded = opened(path)
        loaded.load()
        for image in (opened(path), loaded, loaded.copy(), opened(path).convert("RGB")):
            assert model.predict(image).scores == expected, name
        assert model.predict(ImageOps.exif_transpose(opened(path))).scores == expected, name


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_large_jpeg_gives_the_same_as_an_open_image_and_the_image_stays_as_it_was(kind, model, tmp_path, opened):
    several = {"save_all": True, "append_images": [photo(100, 80)]} if kind == "MPO" else {}
    path = saved(tmp_path / "large.jpg", photo(1600, 1200), 6, quality=90, format=kind, **several)
    expected = model.predict(path).scores
    image = opened(path)
    assert model.predict(image).scores == expected
    assert model.predict(Path(path).read_bytes()).scores == expected
    assert (image.size, image.mode, image.decoderconfig) == ((1600, 1200), "RGB", ())
    np.testing.assert_array_equal(np.array(image), np.array(opened(path)))
    # What has pixels already cannot be decoded at a fraction of its size: it is as if every pixel were decoded.
    loaded = opened(path)
    loaded.load()
    whole = ImageClassifier.__new__(ImageClassifier)
    whole.__dict__.update(vars(model))
    whole.preprocessing = Preprocessing(input_size=(3, 48, 48), decode="whole")
    assert model.predict(loaded).scores == whole.predict(path).scores
    assert model.predict(loaded).scores == pytest.approx(expected, abs=0.02)


def test_a_frame_or_a_draft_that_the_user_chose_is_what_counts(model, tmp_path, opened):
    first, second = photo(seed=1), photo(seed=2)
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    image = opened(tmp_path / "a.tif")
    image.seek(1)
    assert model.predict(image).scores == model.predict(second).scores
    photo(800, 600).save(tmp_path / "a.jpg")
    image = opened(tmp_path / "a.jpg")
    image.draft("L", (200, 150))
    drafted = image.copy()
    assert drafted.mode == "L"
    fresh = opened(tmp_path / "a.jpg")
    fresh.draft("L", (200, 150))
    assert model.predict(fresh).scores == model.predict(drafted).scores


# ---- several


def test_one_gives_one_result_and_several_give_a_list(model, tmp_path, opened):
    paths = [str(write_image(tmp_path / "some" / name, (50, 60))) for name in ("b.png", "a/z.png", "a/b.png")]
    assert len(model.predict([paths[0]])) == 1
    assert model.predict([]) == []
    inside = model.predict(tmp_path / "some")
    assert [one.path for one in inside] == [paths[2], paths[1], paths[0]]
    assert [one.path for one in model.predict(tmp_path / "some" / "a")] == [paths[2], paths[1]]
    Path(paths[1]).unlink()
    assert [one.path for one in model.predict(str(tmp_path / "some" / "a"))] == [paths[2]]
    batch = np.stack([np.array(opened(path)) for path in (paths[0], paths[2])])
    expected = [pytest.approx(model.predict(path).scores, abs=1e-5) for path in (paths[0], paths[2])]
    for given in (batch, torch.tensor(batch).permute(0, 3, 1, 2), tuple(batch), (one for one in batch)):
        assert [one.scores for one in model.predict(given)] == expected
    assert len(model.predict(batch[:1])) == 1
    assert [one.path for one in model.predict([batch, tmp_path / "some" / "a", paths[0]])] == [
        None,
        None,
        paths[2],
        paths[0],
    ]
    assert [one.path for one in model.predict(np.array([paths[0], paths[2]]))] == [paths[0], paths[2]]
    assert len(list(model.predictions(str(tmp_path / "some")))) == 2


def test_a_path_below_the_home_folder_is_found(model, tmp_path, monkeypatch):
    path = write_image(tmp_path / "cell.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.predict("~/cell.png").path == str(path)
    assert model.predict([Path("~/cell.png")])[0].path == str(path)


def test_a_folder_says_what_it_passed_over(model, tmp_path, capfd):
    write_image(tmp_path / "a.png")
    for name in ("1.heic", "2.HEIC", "x.svg", "notes", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    model.predict(tmp_path)
    line = f"passed over 4 of 5 files in {tmp_path}, which are not images by their names: 2 .heic, 1 "
    assert line in capfd.readouterr().err
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadDataError, match="no images below"):
        model.predict(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["a.jpg", *(pytest.param(name, marks=pytest.mark.long) for name in ("a.png", "a.webp"))]
)
def test_one_pil_image_many_times_is_never_read_by_two_threads_at_once(name, model, tmp_path, opened):
    path = tmp_path / name
    photo(400, 300).save(path)
    expected = model.predict(path).scores
    for num_threads in (0, 4):
        for image in (opened(path), opened(io.BytesIO(path.read_bytes()))):
            results = list(predictions_of(model, [image] * 64, 2, num_threads=num_threads))
            assert [one.scores for one in results] == [pytest.approx(expected, abs=1e-4)] * 64


def test_images_that_share_one_file_do_not_disturb_each_other(tmp_path, opened):
    path = tmp_path / "a.png"
    photo(300, 200).save(path)
    expected = Fitting(Preprocessing()).read(str(path))
    with path.open("rb") as file:
        inputs, _ = read_inputs([opened(file) for _ in range(24)])
        found: list[object] = []
        first = Fitting(Preprocessing())
        threads = [threading.Thread(target=lambda one=one: found.append(one.read(first))) for one in inputs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 24
    assert all(np.array_equal(one, expected) for one in found)


def test_pil_images_reach_processes_that_load(model, tmp_path, opened):
    path = tmp_path / "a.png"
    photo().save(path)
    given = [opened(path), path, np.array(opened(path)), path.read_bytes()]
    expected = model.predict(path).scores
    assert [one.scores for one in model.predict(given, num_workers=1)] == [pytest.approx(expected, abs=1e-5)] * 4


# ---- addresses


@pytest.mark.long
def test_an_address_is_fetched_once_and_leaves_nothing_behind(model, server, tmp_path, monkeypatch):
    photo().save(Path(server.folder) / "a.png")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    address = f"{server.address}/a.png?token=secret"
    result = model.predict(address)
    assert result.path == address
    assert server.requests == ["/a.png?token=secret"]
    assert list(tmp_path.iterdir()) == []
    assert result.scores == model.predict(Path(server.folder) / "a.png").scores
    assert [one.scores for one in model.predict([address] * 2, num_workers=1)] == [
        pytest.approx(result.scores, abs=1e-5)
    ] * 2
    with pytest.raises(HubError):
        model.predict([f"{server.address}/none.png"] * 2, num_workers=1)
    assert list(tmp_path.iterdir()) == []
    photo(seed=5).save(Path(server.folder) / "a.png")
    assert model.predict(address).scores != result.scores  # a camera's picture changes


def test_an_address_that_gives_no_image_is_an_error_that_names_it(model, server):
    with pytest.raises(HubError, match=r"/none\.png.*status 404"):
        model.predict(f"{server.address}/none.png")
    (Path(server.folder) / "page.png").write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(BadDataError, match=r"/page\.png") as caught:
        model.predict([f"{server.address}/page.png?token=secret"])
    assert "a web page" in caught.value.why
    assert "secret" not in str(caught.value)
    with pytest.raises(IntegrityError, match="refused a redirect"):
        model.predict(f"{server.address}/elsewhere")
    with pytest.raises(UsageError, match="user name or password"):
        model.predict("http://me:word@127.0.0.1/a.png")
    with pytest.raises(UsageError, match="only http:// and https://"):
        model.predict("s3://bucket/a.png")


def test_an_address_has_a_limit_of_bytes_and_of_time(server, tmp_path, monkeypatch):
    from flashtask.data import download_resume
    from flashtask.data.download import download_image

    monkeypatch.setattr(download_resume, "BACKOFF_SECONDS", 0.01)
    (Path(server.folder) / "large").write_bytes(bytes(5000))
    with pytest.raises(IntegrityError, match="larger than 4,999 bytes") as caught:
        download_image(f"{server.address}/large", tmp_path / "file", max_bytes=4999)
    assert "max_bytes" not in caught.value.fix
    started = time.monotonic()
    with pytest.raises(HubError, match="cannot download") as caught:
        download_image(f"{server.address}/slow", tmp_path / "file", timeout=0.2, deadline=0.5)
    assert time.monotonic() - started < 9
    assert "kept" not in str(caught.value)
    download_image(f"{server.address}/large", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- what is wrong


@pytest.mark.parametrize(
    ("make", "message", "fix"),
    [
        (lambda image: 3, "int", ""),
        (lambda image: None, "NoneType", ""),
        (lambda image: [image, 3], r"inputs\[1\], which is int", ""),
        (lambda image: [[image]], r"inputs\[0\], which is list", "one list"),
        (lambda image: {"a": image}, "dict", "list(inputs.values())"),
        (lambda image: {"a.png"}, "set", "sorted(inputs)"),
        (lambda image: torch.utils.data.DataLoader([1]), "DataLoader", "trainer.predict"),
        (lambda image: image.astype(complex), "of complex128", ""),
        (lambda image: image > 128, "of bool", '(array.astype("uint8") * 255)'),
        (lambda image: image.transpose(2, 0, 1), r"\(3, 70, 90\)", "array.transpose(1, 2, 0)"),
        (lambda image: torch.tensor(image), r"\(70, 90, 3\)", "tensor.permute(2, 0, 1)"),
        (lambda image: torch.tensor(image)[None], r"\(1, 70, 90, 3\)", "tensor.permute(0, 3, 1, 2)"),
        (lambda image: image.transpose(2, 0, 1)[None], r"\(1, 3, 70, 90\)", "array.transpose(0, 2, 3, 1)"),
        (lambda image: image[:, :, :2], r"\(70, 90, 2\)", ""),
        (lambda image: np.stack([image[:, :, 0]] * 5), r"\(5, 70, 90\)", "list(array)"),
        (lambda image: image[:0], r"\(0, 90, 3\)", ""),
        (lambda image: image[0, 0], r"\(3,\)", ""),
    ],
)
def test_what_is_not_an_image_is_refused_with_what_is_taken(make, message, fix, model):
    image = np.array(photo())
    with pytest.raises(UsageError, match=message) as caught:
        model.predict(make(image))
    assert fix in caught.value.fix
    if ".astype" in fix or ".to(" in fix or "transpose" in fix or "permute" in fix:
        code = caught.value.fix.partition(", if")[0]
        given = make(image)
        repaired = eval(code, {"array": given, "tensor": given, "torch": torch})  # noqa: S307
        assert read_inputs(repaired)[0]
    elif "which is" in message or ("array" not in message and "complex" not in message):
        assert "PIL image" in caught.value.why or "several are" in caught.value.why


def test_files_that_are_not_open_for_bytes_are_refused(model, tmp_path):
    path = write_image(tmp_path / "a.png")
    with path.open() as file, pytest.raises(UsageError, match="opened as text") as caught:
        model.predict(file)
    assert caught.value.fix == f'open({str(path)!r}, "rb")'
    with path.open("rb") as file:
        pass
    with pytest.raises(UsageError, match="closed"):
        model.predict([file])
    with pytest.raises(UsageError, match="opened as text"):
        model.predict(io.StringIO("text"))


def test_a_path_that_is_not_there_is_answered_before_anything_is_predicted(model, tmp_path, monkeypatch):
    good = write_image(tmp_path / "cells" / "a1.png")
    with pytest.raises(MissingInputError, match=r"did you mean .*a1\.png"):
        next(model.predictions([good, tmp_path / "cells" / "a2.png"]))
    with pytest.raises(MissingInputError, match="it is a pattern that matches 1 paths") as caught:
        model.predict(str(tmp_path / "cells" / "*.png"))
    assert caught.value.fix.startswith(f"sorted(glob.glob({str(tmp_path / 'cells' / '*.png')!r}))")
    with pytest.raises(MissingInputError):
        model.predict("")


def test_a_cut_or_closed_image_is_named_whatever_it_was_given_as(model, tmp_path, opened):
    photo(200, 200).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()[:-400]
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(content)
    for given, name in (
        (cut, r"cut\.jpg"),
        (content, "given as bytes"),
        ([tmp_path / "whole.jpg", content], r"inputs\[1\] \(bytes\)"),
        (opened(cut), r"a PIL image of '.*cut\.jpg'"),
        (opened(io.BytesIO(content)), "a PIL image"),
        (io.BytesIO(content), "an open file"),
    ):
        with pytest.raises(BadDataError, match=name) as caught:
            model.predict(given)
        assert "cut short" in caught.value.why
    with Image.open(tmp_path / "whole.jpg") as image:
        pass
    with pytest.raises(BadDataError, match="PIL image") as caught:
        model.predict(image)
    assert "image.load()" in caught.value.why
    with pytest.raises(BadDataError) as caught:
        model.predict(b"")
    assert caught.value.why == "the file is empty"


# ---- formats of plug-ins


@contextlib.contextmanager
def plug_in():
    """A format of nobody's: a line of text, and then one grey pixel after the other."""

    class Plain(ImageFile.ImageFile):
        format = "FLASHTEST"

        def _open(self):
            side = int(self.fp.readline().split()[1])
            self._size, self._mode = (side, side), "L"
            self.tile = [ImageFile._Tile("raw", (0, 0, side, side), self.fp.tell(), ("L", 0, 1))]

    Image.register_open("FLASHTEST", Plain, lambda prefix: prefix.startswith(b"FLASHTEST"))
    Image.register_extension("FLASHTEST", ".flash")
    try:
        yield
    finally:
        del Image.OPEN["FLASHTEST"], Image.EXTENSION[".flash"]
        Image.ID.remove("FLASHTEST")


def test_a_format_that_somebody_registered_counts_for_paths_folders_and_bytes(model, tmp_path, opened):
    pixels = np.array(photo(64, 64).convert("L"))
    path = tmp_path / "a.flash"
    path.write_bytes(b"FLASHTEST 64\n" + pixels.tobytes())
    with pytest.raises(BadDataError, match="not an image"):
        model.predict(path)
    with pytest.raises(BadDataError, match="no images below"):
        model.predict(tmp_path)
    expected = model.predict(pixels).scores
    with plug_in():
        assert "FLASHTEST" in prepare_decoders()
        assert model.predict(path).scores == expected
        assert model.predict(path.read_bytes()).scores == expected
        assert model.predict(opened(path)).scores == expected
        assert [one.path for one in model.predict(tmp_path)] == [str(path)]
    assert "FLASHTEST" not in prepare_decoders()
    assert "EPS" not in prepare_decoders()


def test_inputs_know_no_labels(tmp_path, opened):
    torch.manual_seed(0)
    embedder = ImageEmbedder("timm/test_resnet", pretrained=False)
    path = write_image(tmp_path / "a.png", (40, 40))
    features = embedder.predict(path)
    assert torch.equal(embedder.predict(np.array(opened(path))), features)
    assert torch.equal(embedder.predict(tmp_path)[0], features)


def test_text_of_numpy_is_a_list_of_paths(tmp_path):
    """As a column of pandas, or of a table, gives it."""
    paths = [str(write_image(tmp_path / name)) for name in ("a.png", "b.png")]
    for dtype in (object, str, np.dtypes.StringDType()):
        inputs, single = read_inputs(np.array(paths, dtype=dtype))
        assert ([one.path for one in inputs], single) == (paths, False)
