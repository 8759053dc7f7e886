"""Evaluation as timm does it, and augmentation that no worker can change."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import timm.data
import torch
from image_trees import write_tree
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.seeding import SampleKey, SeededDataset, sample_seeds
from flashtask.data.datasets import ImageFileDataset
from flashtask.data.images import load_image
from flashtask.data.transforms import AUGMENTATIONS, eval_transform, train_transform

SMALL = Preprocessing(input_size=(3, 32, 32))


@pytest.fixture(scope="module")
def photo():
    skimage = pytest.importorskip("skimage.data")
    return Image.fromarray(skimage.chelsea())


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 224, 224), (3, 160, 200), (3, 500, 600)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_evaluation_equals_timms_to_the_bit(photo, crop_mode, size, crop_pct):
    for interpolation in ("bilinear", "bicubic", "lanczos", "nearest"):
        given = {
            "input_size": size,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
        }
        preprocessing = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), **given)
        reference = timm.data.create_transform(
            **given, mean=preprocessing.mean, std=preprocessing.std, is_training=False
        )
        for image in (photo, photo.rotate(90, expand=True)):
            result = eval_transform(preprocessing)(image)
            assert result.dtype == torch.float32
            assert torch.equal(result, reference(image))


def test_grey_preprocessing_gives_one_channel(photo):
    grey = Preprocessing(input_size=(1, 32, 48), mean=(0.5,), std=(0.5,))
    for augment in ("none", "light", "medium", "strong"):
        for seed in range(5):
            torch.manual_seed(seed)
            assert train_transform(grey, augment).trained(photo.convert("L")).shape == (1, 32, 48)


def test_auto_is_none_while_the_backbone_is_frozen(photo):
    auto = train_transform(SMALL, "auto")
    plain = eval_transform(SMALL)(photo)
    assert torch.equal(auto.frozen(photo), plain)
    assert not torch.equal(auto.trained(photo), plain)
    torch.manual_seed(1)
    light = train_transform(SMALL, "light").trained(photo)
    torch.manual_seed(1)
    assert torch.equal(auto.trained(photo), light)


def test_every_named_augmentation_draws_only_from_the_generators_it_names(photo):
    for name in AUGMENTATIONS:
        augmentation = train_transform(SMALL, name)
        before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
        image = augmentation.trained(photo)
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert random.getstate() == before[0]
        assert np.random.get_state()[1].tobytes() == before[1]
        assert torch.equal(torch.get_rng_state(), before[2]) == ("torch" not in augmentation.generators)


def test_a_users_transform_may_return_an_image_or_a_tensor(photo):
    plain = eval_transform(SMALL)(photo)
    assert torch.equal(train_transform(SMALL, lambda image: image).trained(photo), plain)
    assert torch.equal(train_transform(SMALL, v2.Compose([v2.PILToTensor()])).trained(photo), plain)
    assert torch.equal(train_transform(SMALL, v2.ToImage()).trained(photo), plain)
    own = v2.Compose([v2.Resize((8, 8)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    result = train_transform(SMALL, own).trained(photo)
    assert type(result) is torch.Tensor
    assert result.shape == (3, 8, 8)
    with pytest.raises(UsageError, match="returned ndarray"):
        train_transform(SMALL, np.asarray).trained(photo)


def test_unknown_augmentations_are_answered_with_near_names():
    with pytest.raises(UnknownNameError, match="did you mean 'light'"):
        train_transform(SMALL, "lihgt")
    with pytest.raises(UsageError, match="a name or a callable"):
        train_transform(SMALL, 3)


def all_generators(image):
    """A user's transform that draws from all three global generators."""
    turned = image.rotate(random.uniform(-90, 90) + np.random.uniform(-5, 5))
    return turned.crop((0, 0, 6 + int(torch.randint(0, 3, ())), 8))


def batches(dataset, keys, workers):
    loader = DataLoader(
        dataset,
        batch_sampler=[keys[:5], keys[5:]],
        num_workers=workers,
        generator=torch.Generator(),
        multiprocessing_context="fork" if workers else None,
    )
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("augment", ["light", "strong", all_generators])
def test_no_number_of_workers_changes_a_pixel(augment, tmp_path):
    root = write_tree(tmp_path, {"a": 6}, (40, 40))
    paths = sorted(str(path) for path in root.rglob("*.png"))
    dataset = ImageFileDataset(paths, range(6), train_transform(SMALL, augment))
    order = [3, 1, 5, 0, 4, 2, 3]
    seeds = sample_seeds(order, 7, 2, [0] * 6 + [1])
    keys = [SampleKey(i, 2, int(seed)) for i, seed in zip(order, seeds, strict=True)]
    alone = batches(dataset, keys, 0)
    assert not torch.equal(alone[0], alone[6])  # the same sample, drawn a second time
    for workers in (1, 2):
        assert torch.equal(batches(dataset, keys, workers), alone)


def test_a_frozen_place_gets_the_plain_image_and_a_dataset_can_be_pickled(tmp_path):
    root = write_tree(tmp_path, {"a": 2}, (40, 40))
    paths = sorted(str(path) for path in root.rglob("*.png"))
    dataset = pickle.loads(pickle.dumps(ImageFileDataset(paths, [4, 9], train_transform(SMALL, "auto"))))  # noqa: S301
    assert isinstance(dataset, SeededDataset)
    plain = eval_transform(SMALL)(load_image(paths[1]))
    image, label = dataset[SampleKey(1, 0, 5, frozen=True)]
    assert torch.equal(image, plain)
    assert label == 9
    assert not torch.equal(dataset[SampleKey(1, 0, 5, frozen=False)][0], plain)
    assert torch.equal(ImageFileDataset(paths, None, eval_transform(SMALL))[1], plain)
    with pytest.raises(UsageError, match="2 paths but 1 targets"):
        ImageFileDataset(paths, [1], eval_transform(SMALL))
