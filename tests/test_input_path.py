"""The way from files to batches: threads, a cache and scaled decoding, none of which changes what a run sees."""

from __future__ import annotations

import os
import pickle
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import write_tree
from PIL import Image
from torch.utils.data import DataLoader, Subset

from flashtask import ImageClassificationData, ImageClassifier
from flashtask.core.errors import BadDataError, MissingInputError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.seeding import SampleKey, sample_seeds
from flashtask.data import threads
from flashtask.data.datasets import ImageFileDataset, collate
from flashtask.data.decoded_cache import DecodedCache, fitting_cache_bytes
from flashtask.data.decoding import Decoding, Fitting
from flashtask.data.images import load_image, load_scaled
from flashtask.data.transforms import eval_transform, train_transform

SMALL = Preprocessing(input_size=(3, 32, 32))


@pytest.fixture
def paths(tmp_path):
    return sorted(str(path) for path in write_tree(tmp_path, {"a": 7}, (40, 48)).rglob("*.png"))


@pytest.fixture
def several_threads(monkeypatch):
    """As on a machine with four cores, wherever the test runs."""
    threads._pool.cache_clear()
    monkeypatch.setattr(threads, "num_cores", lambda: 4)
    yield
    threads._pool(4).shutdown()
    threads._pool.cache_clear()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A photograph of 1600 x 1200 pixels, as a JPEG."""
    skimage = pytest.importorskip("skimage.data")
    path = tmp_path_factory.mktemp("photo") / "cat.jpg"
    Image.fromarray(skimage.chelsea()).resize((1600, 1200), Image.Resampling.LANCZOS).save(path, quality=90)
    return path


def keys(frozen: bool = False) -> list[SampleKey]:
    order = [3, 1, 5, 0, 4, 2, 6, 3]
    seeds = sample_seeds(order, 7, 2, [0] * 7 + [1])
    return [SampleKey(i, 2, int(seed), frozen) for i, seed in zip(order, seeds, strict=True)]


def draws_from_everything(image):
    turned = image.rotate(random.uniform(-90, 90) + np.random.uniform(-5, 5))
    return turned.crop((0, 0, 6 + int(torch.randint(0, 3, ())), 8))


@pytest.mark.parametrize("augment", ["none", "light", "strong", draws_from_everything])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_from_threads_and_cache_is_the_samples_one_by_one(augment, frozen, paths, several_threads):
    alone = ImageFileDataset(paths, range(7), train_transform(SMALL, augment))
    together = ImageFileDataset(paths, range(7), train_transform(SMALL, augment), cache=DecodedCache(2**24))
    state = torch.get_rng_state()
    for _ in range(2):  # the second time from the cache
        images, labels = collate(together.__getitems__(keys(frozen)))
        assert labels.tolist() == [key.index for key in keys()]
        for image, key in zip(images, keys(frozen), strict=True):
            assert torch.equal(image, alone[key][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_files_are_decoded_in_threads_and_random_steps_are_drawn_in_the_callers(paths, several_threads, monkeypatch):
    decoding, drawing = set(), set()
    read = Decoding.read
    monkeypatch.setattr(Decoding, "read", lambda *a, **o: (decoding.add(threading.get_ident()), read(*a, **o))[1])
    data = ImageFileDataset(paths, None, train_transform(SMALL, lambda i: (drawing.add(threading.get_ident()), i)[1]))
    collate(data.__getitems__(keys()))
    assert threading.get_ident() not in decoding
    assert drawing == {threading.get_ident()}


def test_images_of_an_evaluation_batch_are_laid_together_once(paths):
    samples = ImageFileDataset(paths, None, eval_transform(SMALL)).__getitems__(list(range(7)))
    assert collate(samples).data_ptr() == samples[0].data_ptr()
    assert collate([torch.ones(2), torch.zeros(2)]).tolist() == [[1, 1], [0, 0]]


def test_a_subset_in_a_plain_loader_still_gives_whole_samples(paths):
    data = ImageFileDataset(paths, range(7), eval_transform(SMALL))
    ((images, labels),) = DataLoader(Subset(data, [5, 2]), batch_size=2, generator=torch.Generator())
    assert labels.tolist() == [5, 2]
    assert torch.equal(images[1], data[2][0])


def test_the_cache_reads_a_file_once_until_it_changes(paths, monkeypatch):
    reads = []
    read = Fitting.read
    monkeypatch.setattr(Fitting, "read", lambda self, path, *a, **o: (reads.append(path), read(self, path, *a, **o))[1])
    cache, first = DecodedCache(2**24), Fitting(SMALL)
    before = cache.read(first, paths[0])
    assert cache.read(first, paths[0]) is before
    assert cache.read(Fitting(replace(SMALL, crop_pct=1.0)), paths[0]) is not before
    assert len(reads) == 2
    Image.new("RGB", (50, 40), "red").save(paths[0])
    assert cache.read(first, paths[0]).reshape(-1, 3).tolist() == [[255, 0, 0]] * 32 * 32
    with pytest.raises(MissingInputError):
        cache.read(first, paths[0] + "x")
    bitmaps = [paths[0] + ".bmp", paths[0] + ".new.bmp"]  # of one size whatever they show
    for bitmap, colour in zip(bitmaps, ("red", "blue"), strict=True):
        Image.new("RGB", (50, 40), colour).save(bitmap)
        os.utime(bitmap, (1, 1))
    assert cache.read(first, bitmaps[0])[0, 0].tolist() == [255, 0, 0]
    time.sleep(0.05)  # a tick of the file system's clock
    Path(bitmaps[0]).write_bytes(Path(bitmaps[1]).read_bytes())
    os.utime(bitmaps[0], (1, 1))
    assert cache.read(first, bitmaps[0])[0, 0].tolist() == [0, 0, 255]


def test_the_cache_keeps_to_its_limit_and_gives_the_rest_all_the_same(paths):
    one = 32 * 32 * 3
    cache, first = DecodedCache(2 * one + 10), Fitting(SMALL)
    found = [cache.read(first, path) for path in paths]
    assert (len(cache), cache.num_bytes) == (2, 2 * one)
    assert all(np.array_equal(a, first.read(path)) for a, path in zip(found, paths, strict=True))
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301
    assert (len(copy), copy.limit) == (0, cache.limit)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say how much memory is free")
def test_the_cache_takes_a_share_of_the_memory_that_is_free():
    with open("/proc/meminfo") as file:
        total = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemTotal"))
    assert 0 < fitting_cache_bytes() < 0.25 * total


def test_what_was_decoded_to_be_checked_is_not_decoded_again(tmp_path, monkeypatch):
    write_tree(tmp_path / "train", {"a": 3, "b": 3}, (40, 40))
    write_tree(tmp_path / "val", {"a": 2, "b": 2}, (40, 40))
    data = ImageClassificationData.from_folders(tmp_path / "train", tmp_path / "val", augment="none")
    data.use_preprocessing(SMALL)
    data.setup("fit")
    monkeypatch.setattr(Fitting, "read", None)
    assert [len(images) for images, _ in data.train_dataloader()] == [6]
    assert [len(images) for images, _ in data.val_dataloader()] == [4]


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_grey_file_gives_the_bits_of_the_colour_image(crop_mode, tmp_path):
    path = tmp_path / "grey.png"
    noise = np.random.default_rng(0).integers(0, 256, (90, 70), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    transform = eval_transform(replace(SMALL, crop_mode=crop_mode, interpolation="bicubic"))
    pixels = transform.first.read(str(path))
    assert pixels.ndim == (3 if crop_mode == "border" else 2)
    assert torch.equal(transform.rest(pixels), transform(load_image(path)))


def test_a_photograph_is_decoded_at_the_fraction_that_leaves_twice_what_the_resize_makes(photo):
    whole = (1600, 1200)
    for side, wanted in ((32, (200, 150)), (70, (400, 300)), (140, (800, 600)), (300, whole)):
        fitting = Fitting(replace(SMALL, input_size=(3, side, side)))
        image, size = load_scaled(photo, 3, fitting._least)
        assert (image.size, size) == (wanted, whole)
        assert min(image.size) >= 2 * side / 0.875 - 1 or image.size == whole


def test_scaled_decoding_changes_little_and_whole_decoding_nothing(photo):
    whole = replace(SMALL, input_size=(3, 112, 112), decode="whole")
    exact = eval_transform(whole)(load_image(photo)) * 0.229 * 255  # in levels of 0..255
    assert torch.equal(exact, eval_transform(whole).rest(Fitting(whole).read(str(photo))) * 0.229 * 255)
    scaled = replace(whole, decode="scaled")
    levels = (eval_transform(scaled).rest(Fitting(scaled).read(str(photo))) * 0.229 * 255 - exact).abs()
    assert 0 < levels.mean() < 1
    assert levels.max() < 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_turns_a_picture_as_whole_decoding_does(orientation, photo, tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(photo) as image:
        image.crop((0, 0, 1600, 600)).save(path, quality=90, exif=exif)
    wide = replace(SMALL, input_size=(3, 40, 60), crop_mode="squash")
    image, size = load_scaled(path, 3, Fitting(wide)._least)
    assert size == load_image(path).size
    assert image.size < size
    exact = Fitting(replace(wide, decode="whole")).read(str(path)).astype(int)
    assert np.abs(Fitting(wide).read(str(path)) - exact).mean() < 1.5


def test_every_named_augmentation_leaves_its_smallest_crop_twice_as_large_as_needed(photo):
    for name, at_least in (("light", 2 * 32 / (0.7 * 0.75) ** 0.5), ("strong", 2 * 32 / (0.08 * 0.75) ** 0.5)):
        first = train_transform(SMALL, name).trained.first
        pixels = first.read(str(photo))
        assert min(pixels.shape[:2]) >= at_least
        assert pixels.shape[:2] != (1200, 1600)
    assert train_transform(replace(SMALL, decode="whole"), "light").trained.first.read(str(photo)).shape[0] == 1200


def test_a_users_own_transform_gets_every_pixel(photo):
    seen = []
    data = ImageFileDataset([str(photo)], None, train_transform(SMALL, lambda image: seen.append(image.size) or image))
    data.__getitems__([0])
    assert seen == [(1600, 1200)]


def test_a_cut_photograph_is_refused_at_any_scale(photo, tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(photo.read_bytes()[:-20_000])
    with pytest.raises(BadDataError, match="cut short"):
        Fitting(SMALL).read(str(path))


def test_the_preprocessing_says_how_images_are_decoded():
    whole = Preprocessing().resolved().to_dict()
    assert whole["decode"] == "scaled"
    old = {name: value for name, value in whole.items() if name != "decode"}
    assert Preprocessing.from_dict(old).decode == "whole"
    with pytest.raises(UsageError, match="decode must be scaled or whole, not 'half'"):
        Preprocessing(decode="half")


def test_a_thread_pool_does_not_outlive_a_fork(paths, several_threads):
    data = ImageFileDataset(paths, None, eval_transform(SMALL))
    here = collate(data.__getitems__(list(range(7))))
    loader = DataLoader(
        data, 7, num_workers=1, collate_fn=collate, multiprocessing_context="fork", generator=torch.Generator()
    )
    (there,) = loader
    assert torch.equal(here, there)


def test_a_preprocessing_that_is_set_on_a_model_is_filled_from_the_one_it_had(tmp_path):
    model = ImageClassifier("timm/test_resnet", num_classes=2, pretrained=False)
    before = model.preprocessing
    model.preprocessing = Preprocessing(input_size=48)
    assert model.preprocessing.input_size == (3, 48, 48)
    assert model.preprocessing.is_complete
    assert (model.preprocessing.mean, model.preprocessing.interpolation) == (before.mean, before.interpolation)
    read = ImageClassifier.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert read.preprocessing == model.preprocessing
    with pytest.raises(UsageError, match=r"for 1 channel\(s\), but the model takes 3"):
        model.preprocessing = Preprocessing((1, 48, 48), (0.5,), (0.2,), 0.9, "bilinear", "center")
    assert model.preprocessing.input_size == (3, 48, 48)
