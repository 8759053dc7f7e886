"""Targets that are places in the image move with it, through every transform, and go back to the user's file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from flashtask import ImageClassificationData, ImageData, Preprocessing, SpatialReader
from flashtask.core.errors import UsageError
from flashtask.core.seeding import SampleKey, seed_everything
from flashtask.data.datasets import ImageFileDataset
from flashtask.data.decoding import Fitting
from flashtask.data.inputs import input_of
from flashtask.data.transforms import train_transform


@dataclass(frozen=True)
class SquareReader(SpatialReader):
    """The white square of a picture as mask, box and point; a box that is cut off altogether is left out."""

    kind = "square"
    fill = 9
    stacks = False

    def read(self, raw, source):
        return raw.astype(np.float64).astype(np.int64)

    def target(self, value, size):
        x, y, half = value.tolist()
        mask = torch.zeros(size[1], size[0], dtype=torch.uint8)
        mask[y - half : y + half, x - half : x + half] = 1
        box = tv_tensors.BoundingBoxes(
            [[x - half, y - half, x + half, y + half]], format="XYXY", canvas_size=size[::-1]
        )
        point = tv_tensors.KeyPoints([[float(x), float(y)]], canvas_size=size[::-1])
        return {"mask": tv_tensors.Mask(mask), "boxes": box, "labels": torch.tensor([1]), "point": point}

    def finished(self, target):
        return super().finished(v2.SanitizeBoundingBoxes()(target))


class Squares(ImageData):
    readers = (SquareReader,)


def write_squares(folder, count=12, form="png", size=(120, 80), **save):
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file,x,y,half"]
    for number, (x, y) in enumerate(np.random.default_rng(1).integers(30, [size[0] - 30, size[1] - 30], (count, 2))):
        half = size[1] // 8
        pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        pixels[y - half : y + half, x - half : x + half] = 255
        Image.fromarray(pixels).save(folder / f"{number:02}.{form}", **save)
        lines.append(f"{number:02}.{form},{x},{y},{half}")
    (folder / "squares.csv").write_text("\n".join(lines) + "\n")
    return folder / "squares.csv"


PLAIN = Preprocessing(
    input_size=(3, 64, 64), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0, crop_mode="squash"
).resolved()


def squares(table, preprocessing=PLAIN, **options):
    made = Squares.from_csv(
        "file", ("x", "y", "half"), train_file=table, preprocessing=preprocessing, **{"batch_size": 4, **options}
    )
    made.setup("fit")
    return made


def check(image, target):
    """The white of the image is where the mask, the box and the point say."""
    inside = target["mask"] == 1
    white = image[0] > 0.3
    assert (white == inside).float().mean() > 0.96
    if not inside.any():
        assert len(target["boxes"]) == 0
        return
    rows, columns = inside.nonzero(as_tuple=True)
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert target["boxes"][0].tolist() == pytest.approx([float(edge) for edge in edges], abs=2.5)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("augment", ["none", "light", "medium", "strong"])
def test_masks_boxes_and_points_move_with_the_image(tmp_path, augment):
    data = squares(write_squares(tmp_path), augment=augment)
    dataset = data.train_dataloader().dataset
    seen = set()
    for epoch in range(3):
        samples = dataset.__getitems__([SampleKey(index, epoch, 1000 * epoch + index) for index in range(len(dataset))])
        for image, target in samples:
            if augment != "strong":  # which erases
                check(image, target)
            seen.add(tuple(target["point"][0].tolist()))
    assert (len(seen) > 12) == (augment != "none")


def test_a_transform_of_the_users_own_gets_both(tmp_path):
    own = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.Resize((96, 96))])
    data = squares(write_squares(tmp_path), augment=own)
    plain = squares(tmp_path / "squares.csv", augment="none")
    for (image, target), (_, before) in zip(
        data.train_dataloader().dataset, plain.train_dataloader().dataset, strict=True
    ):
        check(image, target)
        # torchvision flips points about the middle of a pixel.
        assert target["point"][0, 0].item() == pytest.approx(64 - before["point"][0, 0].item(), abs=0.6)
    wrong = squares(tmp_path / "squares.csv", augment=lambda image, target: image)
    with pytest.raises(UsageError, match="not the image and its target"):
        wrong.train_dataloader().dataset[0]


def test_the_image_is_the_one_without_targets_to_the_bit(tmp_path):
    """`light` draws the same numbers, so images of a spatial task are those of a classifier."""
    table = write_squares(tmp_path)
    spatial = squares(table, augment="light").train_dataloader().dataset
    labels = np.arange(len(spatial)) % 2
    plain = ImageFileDataset(spatial.paths, labels, train_transform(PLAIN, "light"))
    for index in range(len(spatial)):
        place = SampleKey(index, 2, 77 + index)
        assert torch.equal(spatial[place][0], plain[place][0])


def test_workers_and_batches_change_nothing(tmp_path):
    data = squares(write_squares(tmp_path), augment="light", num_workers=0)
    dataset = data.train_dataloader().dataset
    places = [SampleKey(index, 1, 5 + index) for index in range(8)]
    alone = [dataset[place] for place in places]
    for loaded in (dataset.__getitems__(places), dataset.__getitems__(places[::-1])[::-1]):
        for (image, target), (again, other) in zip(alone, loaded, strict=True):
            assert torch.equal(image, again)
            assert all(torch.equal(target[name], other[name]) for name in target)
    state = torch.get_rng_state()
    dataset[places[0]]
    assert torch.equal(state, torch.get_rng_state())


def test_targets_of_different_sizes_are_a_list_in_the_batch(tmp_path):
    seed_everything(0, verbose=False)  # of these twelve boxes some are cut off and others are not
    data = squares(write_squares(tmp_path), augment="strong")
    counts = set()
    for images, targets in data.train_dataloader():
        assert images.shape == (4, 3, 64, 64)
        assert isinstance(targets, list)
        counts |= {len(one["boxes"]) for one in targets}
    assert counts == {0, 1}


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("share", [1.0, 0.8])
@pytest.mark.parametrize("size", [(120, 80), (75, 130), (64, 64)])
def test_the_evaluation_transform_moves_them_too_and_predictions_go_back(tmp_path, mode, share, size):
    preprocessing = replace(PLAIN, crop_mode=mode, crop_pct=share)
    table = write_squares(tmp_path, count=4, size=size)
    data = squares(table, preprocessing, augment="none")
    dataset = data.train_dataloader().dataset
    for index, (image, target) in enumerate(dataset):
        mask = target["mask"].clone()
        white = image[0] > 0.3
        assert (white == (mask == 1)).float().mean() > 0.97
        geometry = input_of(dataset.paths[index]).placed(preprocessing)
        assert geometry.whole == size
        back = geometry.points_in_file(target["point"])
        x, y, _ = dataset.targets[index].tolist()
        assert back[0].tolist() == pytest.approx([x, y], abs=0.01)
        beside = (mask == 9).any().item()
        assert beside == (mode == "border" and size[0] != size[1] and share == 1.0) or share != 1.0
        found = geometry.map_in_file((mask == 1).float()[None])[0]
        assert found.shape == (size[1], size[0])
        if (mask == 1).sum() > 20:
            rows, columns = (found > 0.5).nonzero(as_tuple=True)
            middle = [columns.float().mean() + 0.5, rows.float().mean() + 0.5]
            if mode != "center":  # which may cut a part of the square off
                assert [float(one) for one in middle] == pytest.approx([x, y], abs=1.5)


def test_a_jpeg_that_is_decoded_at_a_fraction_and_one_that_is_turned(tmp_path):
    table = write_squares(tmp_path / "large", count=2, form="jpg", size=(1200, 800), quality=95)
    for augment in ("none", "light"):
        for image, target in squares(table, augment=augment).train_dataloader().dataset:
            check(image, target)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise when it is shown
    table = write_squares(tmp_path / "turned", count=2, form="jpg", quality=95, exif=exif)
    for path in (table.parent / "00.jpg", table.parent / "01.jpg"):
        assert input_of(path).placed(PLAIN).whole == (80, 120)


def test_geometry_agrees_with_the_pixels_that_the_evaluation_transform_makes():
    generator = np.random.default_rng(3)
    for mode in ("center", "squash", "border"):
        for size in ((50, 31), (31, 50), (200, 97), (64, 64), (20, 20)):
            fitting = Fitting(replace(PLAIN, crop_mode=mode, crop_pct=0.9, interpolation="nearest"))
            pixels = generator.integers(0, 255, (size[1], size[0]), dtype=np.uint8)
            found = fitting.fit(Image.fromarray(pixels))
            mask = fitting.geometry(size).apply(tv_tensors.Mask(torch.from_numpy(pixels)), fill=0)
            inside = fitting.geometry(size).apply(tv_tensors.Mask(torch.ones(size[::-1])), fill=0) == 1
            grey = torch.from_numpy(found if found.ndim == 2 else found[:, :, 0])  # padded pictures have colours
            same = grey[inside] == mask[inside]
            assert same.float().mean() > 0.95, (mode, size)


def test_label_data_has_no_such_targets(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), "red" if name == "a" else "blue").save(tmp_path / name / f"{name}.png")
    assert not ImageClassificationData.from_folders(tmp_path).has_spatial_targets
