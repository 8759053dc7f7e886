"""Augmentation presets, flips, erasing and transforms by name: what they do to pixels, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_trees import write_tree
from PIL import Image
from torchvision.transforms import v2

from flashtask import ImageClassificationData
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.data.mirrored import changed_by_mirroring
from flashtask.data.transforms import AUGMENTATIONS, train_transform

SMALL = Preprocessing((3, 24, 24), (0.5,) * 3, (0.25,) * 3, 1.0, "bilinear")


@pytest.fixture
def corner():
    """A picture whose left upper quarter alone is white."""
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[:24, :24] = 255
    return Image.fromarray(pixels)


def brightest_quarters(transform, image, draws=40):
    """Where the bright quarter is after each of some draws: (lower half, right half)."""
    found = set()
    for seed in range(draws):
        torch.manual_seed(seed)
        values = transform(image).mean(dim=0)
        quarters = torch.nn.functional.adaptive_avg_pool2d(values[None], 2).flatten()
        found.add(divmod(int(quarters.argmax()), 2))
    return found


@pytest.mark.parametrize(
    ("flip", "places"),
    [
        ("none", {(0, 0)}),
        (None, {(0, 0), (0, 1)}),
        ("horizontal", {(0, 0), (0, 1)}),
        ("vertical", {(0, 0), (1, 0)}),
        ("both", {(0, 0), (0, 1), (1, 0), (1, 1)}),
    ],
)
def test_flip_mirrors_the_ways_it_names(corner, flip, places):
    assert brightest_quarters(train_transform(SMALL, "light", flip).trained, corner) == places


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name not in ("auto", "none")])
def test_every_preset_goes_with_and_without_flips_and_erasing(corner, name):
    kinds = {
        flip: [type(step).__name__ for step in train_transform(SMALL, name, flip).trained.change.transforms]
        for flip in ("none", "horizontal", "vertical", "both")
    }
    for flip, steps in kinds.items():
        assert ("RandomHorizontalFlip" in steps) == (flip in ("horizontal", "both"))
        assert ("RandomVerticalFlip" in steps) == (flip in ("vertical", "both"))
    without, always = (train_transform(SMALL, name, None, p).trained for p in (0.0, 1.0))
    for seed in range(3):
        torch.manual_seed(seed)
        plain = without(corner)
        torch.manual_seed(seed)
        erased = always(corner)
        different = (plain != erased).any(dim=0)
        assert 0 < different.sum() < 0.4 * different.numel()
        assert (erased[:, different] == 0).all()


@pytest.mark.parametrize(
    ("name", "policy"),
    [("trivial_augment", v2.TrivialAugmentWide), ("rand_augment", v2.RandAugment), ("aug_mix", v2.AugMix)],
)
def test_a_policy_is_that_of_torchvision(corner, name, policy):
    torch.manual_seed(3)
    found = train_transform(SMALL, name, "none").trained(corner)
    torch.manual_seed(3)
    crop = v2.RandomResizedCrop((24, 24), scale=(0.08, 1.0), interpolation=v2.InterpolationMode.BILINEAR)
    values = np.array(policy()(crop(corner)), dtype=np.float32) / 255
    expected = (torch.from_numpy(values).permute(2, 0, 1) - 0.5) / 0.25
    torch.testing.assert_close(found, expected)


def test_transforms_by_name_are_the_compose_of_torchvision(corner):
    listed = [
        {"RandomResizedCrop": {"scale": [0.5, 1.0], "interpolation": "bicubic"}},
        "RandomHorizontalFlip",
        ["RandomApply", {"transforms": [{"GaussianBlur": {"kernel_size": 3}}], "p": 0.5}],
    ]
    own = v2.Compose(
        [
            v2.RandomResizedCrop((24, 24), scale=(0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.GaussianBlur(3)], p=0.5),
        ]
    )
    by_name, by_hand = train_transform(SMALL, listed).trained, train_transform(SMALL, own).trained
    for seed in range(4):
        torch.manual_seed(seed)
        found = by_name(corner)
        torch.manual_seed(seed)
        assert torch.equal(found, by_hand(corner))


@pytest.mark.parametrize(
    ("augment", "options", "says"),
    [
        ("rand_augmnet", {}, "did you mean 'rand_augment'"),
        (["RandomHorizontalFlop"], {}, "did you mean 'RandomHorizontalFlip'"),
        ([{"RandomRotation": {"degree": 3}}], {}, "did you mean 'degrees'"),
        ([{"RandomRotation": {"degrees": -3}}], {}, "RandomRotation cannot be made with {'degrees': -3}"),
        (["MixUp"], {}, "mixup_alpha=0.2"),
        ([3], {}, "a transform in a list is a name"),
        ([], {}, "the list of transforms is empty"),
        ("light", {"flip": "horizontl"}, "did you mean 'horizontal'"),
        ("none", {"flip": "vertical"}, "flip='vertical' is for named augmentations, not for augment='none'"),
        (["RandomGrayscale"], {"flip": "both"}, "not for transforms of your own"),
        ("light", {"random_erasing": 2}, "random_erasing must be a probability"),
        ("none", {"random_erasing": 0.5}, "random_erasing changes images"),
    ],
)
def test_what_is_no_augmentation_is_refused_before_anything_is_read(tmp_path, augment, options, says):
    root = write_tree(tmp_path, {"a": 2, "b": 2})
    with pytest.raises(UsageError) as caught:
        ImageClassificationData.from_folders(root, augment=augment, **options)
    assert says in f"{caught.value.what} {caught.value.fix}"
    assert isinstance(caught.value, UnknownNameError) == ("did you mean" in says)


def test_the_recipe_of_the_data_holds_switches_and_named_transforms(tmp_path):
    root = write_tree(tmp_path, {"a": 2, "b": 2})
    listed = [{"RandomRotation": {"degrees": 10}}, "RandomGrayscale"]
    data = ImageClassificationData.from_folders(root, augment=listed, random_erasing=0.5, sampler="balanced")
    written = data.recipe()["from_folders"]
    assert (written["augment"], written["random_erasing"], written["sampler"]) == (listed, 0.5, "balanced")
    again = ImageClassificationData.from_folders(**written)
    assert again.recipe() == data.recipe()
    own = ImageClassificationData.from_folders(root, augment=v2.RandomGrayscale())
    assert own.recipe()["from_folders"]["augment"] == {"not_saved": "RandomGrayscale"}


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (("left_hand", "right_hand"), "'left_hand' and 'right_hand'"),
        (("turn-Right", "straight", "turn-Left"), "'turn-Left' and 'turn-Right'"),
        (tuple("0123456789"), "digits"),
        (("one", "two", "three"), "digits"),
        (("b", "d", "p"), "letters"),
        (("0", "1"), ""),
        (("bright", "cleft", "10"), ""),
        (("left", "middle"), ""),
    ],
)
def test_names_that_speak_against_mirroring(labels, says):
    found = changed_by_mirroring(labels)
    assert says in found
    assert bool(found) == bool(says)


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({}, "augment=auto flips images horizontally while the backbone trains"),
        ({"augment": "strong"}, "augment=strong flips images horizontally, but"),
        ({"augment": "none"}, ""),
        ({"flip": "none"}, ""),
        ({"flip": "horizontal"}, ""),
        ({"augment": ["RandomGrayscale"]}, ""),
    ],
)
def test_mirroring_left_and_right_is_warned_of_once(tmp_path, capsys, options, warns):
    data = ImageClassificationData.from_folders(write_tree(tmp_path, {"left": 2, "right": 2}), **options)
    data.setup("fit")
    data.setup("fit")
    said = capsys.readouterr().err
    assert said.count("warning: augment=") == bool(warns)
    assert warns in said
