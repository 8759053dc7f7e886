"""`InstanceSegmentationData`: every format gives the same masks, which move with the image; broken ones are named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import squares
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from flashtask import InstanceSegmentationData, ObjectDetectionData
from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.data.instances import layers_of
from flashtask.data.masks import rle_counts, rle_mask
from flashtask.data.shapes import Block, block_counts, numbered_objects, shape_block, shape_fault, shape_text
from flashtask.tasks.choosing import choose_task

#: The pictures of 96 x 80 lie in it as they are, with a border above and below.
PADDED = Preprocessing(input_size=(3, 96, 96), crop_pct=1.0, crop_mode="border", mean=(0, 0, 0), std=(1, 1, 1))
OPTIONS = {"batch_size": 8, "num_workers": 0, "preprocessing": PADDED, "augment": "none"}


def polygons(mask):
    """The edges of a mask's pixels as one polygon: along the left side down and along the right side up."""
    rows = np.flatnonzero(mask.any(1))
    spans = [(np.flatnonzero(mask[row])[0], np.flatnonzero(mask[row])[-1] + 1, row) for row in rows]
    left = [point for start, _, row in spans for point in ((start, row), (start, row + 1))]
    right = [point for _, end, row in reversed(spans) for point in ((end, row + 1), (end, row))]
    return [float(number) for point in left + right for number in point]


def coco(folder, shape):
    """A COCO folder with the masks in another form."""
    squares.coco(folder, 8, has_masks=True)
    content = json.loads((folder / "annotations.json").read_text())
    for one in content["annotations"]:
        one["segmentation"] = shape(rle_mask(one["segmentation"]["counts"], (96, 80)))
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def uncompressed(mask):
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges.tolist(), mask.size]).tolist()}


def yolo(root):
    """YOLO's polygons, in shares of the sides."""
    file = squares.yolo(root)
    for part, seed in (("train", 0), ("val", 1)):
        for number, (picture, objects) in enumerate(squares.draw(8, seed)):
            lines = []
            for (label, *_), mask in zip(objects, squares.masks(objects), strict=True):
                points = np.array(polygons(mask)).reshape(-1, 2) / picture.size
                lines.append(f"{sorted(squares.CATEGORIES).index(label)} {' '.join(map(str, points.ravel()))}")
            if lines:
                (root / part / "labels" / f"{number:03}.txt").write_text("\n".join(lines))
    return file


def by_class(folder):
    """A folder of label images for each class."""
    squares.label_images(folder)
    for file in sorted((folder / "masks").iterdir()):
        _, objects = squares.draw(8)[int(file.stem)]
        for label in squares.CATEGORIES:
            values = np.zeros((80, 96), dtype=np.uint8)
            for number, (mask, (own, *_)) in enumerate(zip(squares.masks(objects), objects, strict=True), 1):
                values[mask & (own == label)] = number
            (folder / "masks" / label).mkdir(exist_ok=True)
            Image.fromarray(values).save(folder / "masks" / label / f"{file.stem}.tif")
        file.unlink()
    return folder


def in_memory():
    drawn = squares.draw(8)
    targets = [
        {"masks": np.array(squares.masks(objects)).reshape(-1, 80, 96), "labels": [label for label, *_ in objects]}
        for _, objects in drawn
    ]
    return InstanceSegmentationData.from_images([picture for picture, _ in drawn], targets, **OPTIONS)


def of_arrays():
    drawn = squares.draw(8)
    masks = [np.array(squares.masks(objects), dtype=bool).reshape(-1, 80, 96) for _, objects in drawn]
    numbers = [(np.arange(1, len(one) + 1)[:, None, None] * one).sum(0) for one in masks]
    pictures = np.stack([np.array(picture) for picture, _ in drawn])
    return InstanceSegmentationData.from_numpy(pictures, numbers, **OPTIONS)


LAYOUTS = {
    "run lengths": lambda root: InstanceSegmentationData.from_folders(coco(root / "a", squares.runs), **OPTIONS),
    "numbers of run lengths": lambda root: InstanceSegmentationData.from_folders(
        coco(root / "a", uncompressed), **OPTIONS
    ),
    "polygons": lambda root: InstanceSegmentationData.from_coco(
        coco(root / "a", lambda mask: [polygons(mask)]), **OPTIONS
    ),
    "YOLO": lambda root: InstanceSegmentationData.from_yolo(yolo(root), **OPTIONS),
    "YOLO, the folder of a part": lambda root: InstanceSegmentationData.from_folders(
        yolo(root).parent / "train", **OPTIONS
    ),
    "label images": lambda root: InstanceSegmentationData.from_folders(squares.label_images(root / "a"), **OPTIONS),
    "label images of each class": lambda root: InstanceSegmentationData.from_folders(by_class(root / "a"), **OPTIONS),
    "masks in memory": lambda root: in_memory(),
    "label images in memory": lambda root: of_arrays(),
}


def batch_of(made, part="train"):
    """Images and targets in the order of the listing."""
    made.setup("fit")
    dataset = made._datasets[part]
    return zip(*(dataset[row] for row in range(len(dataset))), strict=True)


def masks_of(target):
    """The mask (H, W) of each number of a target."""
    return [(target["masks"] == number).any(0).numpy() for number in target["numbers"].tolist()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_format_gives_the_same_masks(tmp_path, name, capsys):
    made = LAYOUTS[name](tmp_path)
    has_classes = made.num_classes == 2
    assert set(made.labels) == (set(squares.CATEGORIES) if has_classes else {"object"})
    _, targets = batch_of(made)
    for target, (_, objects) in zip(targets, squares.draw(8), strict=True):
        true = {
            (one[0] if has_classes else "object", *one[1:]): mask
            for one, mask in zip(objects, squares.masks(objects), strict=True)
        }
        assert len(target["labels"]) == len(true)
        for label, box, mask in zip(target["labels"].tolist(), target["boxes"].tolist(), masks_of(target), strict=True):
            left, top, right, bottom = (round(side, 3) for side in box)
            # 8 rows of the border lie above.
            assert (mask[8:88] == true[made.labels[label], left, top - 8, right, bottom - 8]).all()
            assert not mask[:8].any()
    assert "8 images, " in (said := capsys.readouterr().err)
    assert f"{sum(len(objects) for _, objects in squares.draw(8))} objects" in said


def test_shapes_keep_holes_and_parts_and_run_lengths_are_those_of_coco():
    generator = np.random.default_rng(0)
    for size in ((7, 5), (1, 9), (31, 40)):
        for share in (0.2, 0.6, 1.0):
            mask = generator.random(size[::-1]) < share
            mask[0, 0] = True
            text = shape_text(squares.runs(mask))
            block = shape_block(text, size)
            whole = np.zeros_like(mask)
            whole[block.place] = block.inside
            assert (whole == mask).all()
            assert block_counts(block, size) == squares.runs(mask)["counts"]
            (found,) = numbered_objects(mask.astype(int) * 7)
            assert found.shape == squares.runs(mask)
            assert (found.number, found.area) == (7, mask.sum())
            rows, columns = mask.nonzero()
            assert found.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    # Two polygons, one of them partly beyond the picture, are one object.
    parts = [[1.0, 1, 4, 1, 4, 3, 1, 3], [6.0, 2, 12, 2, 12, 9, 6, 9], [0.0, 0, 5, 5]]
    block = shape_block(shape_text(parts), (10, 6))
    whole = np.zeros((6, 10), dtype=bool)
    whole[block.place] = block.inside
    true = np.zeros((6, 10), dtype=bool)
    true[1:3, 1:4] = true[2:6, 6:10] = True
    assert (whole == true).all()


def test_objects_over_each_other_need_another_layer():
    blocks = [Block(0, 0, np.ones((2, 3), bool)), None, Block(2, 1, np.ones((2, 3), bool)), Block(4, 0, np.eye(2) > 0)]
    layers = layers_of(blocks, (6, 4))
    assert layers.shape == (2, 4, 6)
    for number, block in enumerate(blocks, 1):
        own = (layers == number).any(0)
        assert own.sum() == (0 if block is None else block.inside.sum())
    assert layers_of([], (6, 4)).shape == (1, 4, 6)


def bright(image):
    return (image.amax(0) > 0.6).numpy()


@pytest.mark.parametrize(
    "augment", ["light", v2.RandomHorizontalFlip(1.0), v2.RandomAffine(40, (0.1, 0.1), (0.8, 1.2))]
)
def test_masks_move_with_the_image(tmp_path, augment):
    folder = squares.coco(tmp_path / "a", 16, most=1, has_masks=True)
    made = InstanceSegmentationData.from_folders(folder, **{**OPTIONS, "augment": augment})
    seen = 0
    for image, target in zip(*batch_of(made), strict=True):
        for mask in masks_of(target):
            own = bright(image)
            share = (mask & own).sum() / (mask | own).sum()
            assert share > (0.999 if isinstance(augment, v2.RandomHorizontalFlip) else 0.8)
            seen += 1
            assert target["labels"].shape == target["numbers"].shape
    assert seen > 8


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("drawn_on", ["stored", "upright"])
@pytest.mark.parametrize("form", ["runs", "polygons", "label image"])
def test_masks_of_pictures_that_lie_on_their_side(tmp_path, orientation, drawn_on, form):
    stored = Image.new("RGB", (96, 64), (20, 20, 20))
    stored.paste((250, 250, 250), (8, 16, 40, 24))
    stored.paste((250, 250, 250), (8, 24, 16, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    stored.save(tmp_path / "images" / "a.png", exif=exif)
    picture = stored if drawn_on == "stored" else ImageOps.exif_transpose(Image.open(tmp_path / "images" / "a.png"))
    mask = bright(v2.functional.to_image(picture) / 255)
    if form == "label image":
        (tmp_path / "masks").mkdir()
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / "a.png")
    else:
        (found,) = numbered_objects(mask.astype(int))
        left, top, right, bottom = found.box
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": picture.width, "height": picture.height}],
            "categories": [{"id": 1, "name": "bar"}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": [left, top, right - left, bottom - top]}],
        }
        content["annotations"][0]["segmentation"] = squares.runs(mask) if form == "runs" else [polygons(mask)]
        (tmp_path / "annotations.json").write_text(json.dumps(content))
    made = InstanceSegmentationData.from_folders(tmp_path, **OPTIONS)
    (image,), (target,) = batch_of(made)
    (own,) = masks_of(target)
    # An outline that is not convex, row by row, is not that of the polygon; its box is.
    assert (own == bright(image)).all()
    rows, columns = own.nonzero()
    assert target["boxes"].tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]


def test_crowds_have_no_pixels_and_images_without_objects_remain(tmp_path):
    folder = squares.coco(tmp_path / "a", 8, has_masks=True)
    content = json.loads((folder / "annotations.json").read_text())
    content["annotations"][0]["iscrowd"] = 1
    (folder / "annotations.json").write_text(json.dumps(content))
    made = InstanceSegmentationData.from_folders(folder, **OPTIONS)
    _, targets = batch_of(made)
    assert targets[0]["labels"][0] == -1
    assert not masks_of(targets[0])[0].any()
    assert targets[0]["in_file"]["is_crowd"][0]
    assert len(targets[7]["labels"]) == 0
    assert targets[7]["masks"].shape == (1, 96, 96)
    # Nothing but columns: no array of pixels is kept.
    table = made._box_reader.table
    assert table.shapes.dtype == np.dtypes.StringDType()
    assert max(map(len, table.shapes.tolist())) < 500


def test_everything_that_is_wrong_is_named_at_once(tmp_path):
    folder = squares.coco(tmp_path / "a", 8, has_masks=True)
    content = json.loads((folder / "annotations.json").read_text())
    wrong = [
        None,
        [[1, 2, 3, 4]],
        {"size": [80, 96], "counts": [1, 2]},
        [[1, 2, 3, 4, 5, 6, 7]],
        "x",
        [[0, 0, 1, 1, "a", 2]],
    ]
    wrong += [{"size": [10, 10], "counts": [0, 100]}, {"size": [80, 96], "counts": [80 * 96]}]
    for one, shape in zip(content["annotations"], wrong, strict=False):
        one["segmentation"] = shape
    (folder / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(BadDataError) as raised:
        InstanceSegmentationData.from_folders(folder, **OPTIONS)
    text = str(raised.value)
    for words in (
        "8 problems (object without a usable mask: 8)",
        "annotation 1 (000.png): it has a box alone",
        "run lengths of 3 pixels do not fit",
    ):
        assert words in text
    assert shape_fault([[1, 2, 3, 4]], None)
    assert shape_fault({"size": [80, 96], "counts": [80 * 96]}, (96, 80)) == "run lengths without a pixel"
    assert "10 x 10" in shape_fault({"size": [10, 10], "counts": [0, 100]}, (96, 80))


def test_boxes_alone_and_other_sources_are_refused(tmp_path):
    with pytest.raises(BadDataError, match="there are boxes, but no masks of objects") as raised:
        InstanceSegmentationData.from_folders(squares.coco(tmp_path / "a", 8), **OPTIONS)
    assert "object_detection" in str(raised.value)
    with pytest.raises(UsageError, match="a table of boxes gives no masks"):
        InstanceSegmentationData.from_csv(train_file=squares.table(tmp_path / "b"))
    with pytest.raises(UsageError, match="from_voc gives no masks"):
        InstanceSegmentationData.from_voc(tmp_path)
    with pytest.raises(UsageError, match=r"train_targets\[0\] is neither a label image nor"):
        InstanceSegmentationData.from_numpy(np.zeros((1, 8, 8, 3), np.uint8), [{"boxes": []}])
    folder = squares.label_images(tmp_path / "c")
    (folder / "masks" / "003.png").unlink()
    Image.new("RGB", (96, 80), (1, 2, 3)).save(folder / "masks" / "004.png")
    Image.new("L", (96, 60), 1).save(folder / "masks" / "005.png")
    with pytest.raises(BadDataError) as raised:
        InstanceSegmentationData.from_folders(folder, **OPTIONS)
    for words in ("003.png", "has colours, not numbers of objects", "96 x 60 in the annotations"):
        assert words in str(raised.value)


def test_parts_in_images_and_masks_and_the_digest(tmp_path):
    for part in ("train", "val"):
        squares.label_images(tmp_path / part, seed=len(part))
        for name in ("images", "masks"):
            (tmp_path / "whole" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / part / name).rename(tmp_path / "whole" / name / part)
    made = InstanceSegmentationData.from_root(tmp_path / "whole", **OPTIONS)
    assert made.sizes() == {"train": 8, "val": 8}
    before = made._digest()
    file = tmp_path / "whole" / "masks" / "train" / "000.png"
    values = np.array(Image.open(file))
    rows, columns = values.nonzero()
    values[(rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2] = 0  # a hole; the boxes are the same
    Image.fromarray(values).save(file)
    after = InstanceSegmentationData.from_root(tmp_path / "whole", **OPTIONS)._digest()
    assert before["val"] == after["val"]
    assert before["train"] != after["train"]


def test_a_batch_is_drawn_with_colours_for_each_object(tmp_path):
    made = InstanceSegmentationData.from_folders(squares.coco(tmp_path / "a", 8, has_masks=True), **OPTIONS)
    _, targets = batch_of(made)
    target = next(one for one in targets if len(one["labels"]) > 1)
    drawn = made._reader.draw(Image.new("RGB", (96, 96)), target)
    one, two = (np.array(drawn)[mask] for mask in masks_of(target)[:2])
    assert not (np.median(one, axis=0) == np.median(two, axis=0)).all()
    assert (np.array(drawn)[~(target["masks"] > 0).any(0).numpy()].sum(1) == 0).mean() > 0.8


def test_the_task_of_a_file_with_boxes_and_masks_is_asked_for(tmp_path):
    folder = squares.coco(tmp_path / "a", 8, has_masks=True)
    with pytest.raises(UsageError, match="instance_segmentation, object_detection") as raised:
        choose_task("from_folders", {"train_folder": str(folder)})
    assert "--task instance_segmentation" in str(raised.value)
    assert choose_task("from_folders", {"train_folder": str(squares.coco(tmp_path / "b", 2))})[0] == "object_detection"
    with pytest.raises(UsageError, match="instance_segmentation, object_detection"):
        choose_task("from_yolo", {"data_file": str(yolo(tmp_path / "c"))})
    assert choose_task("from_yolo", {"data_file": str(squares.yolo(tmp_path / "d"))})[0] == "object_detection"
    label_images = {"train_folder": str(squares.label_images(tmp_path / "e"))}
    assert choose_task("from_folders", label_images)[0] == "semantic_segmentation"
    # Boxes are still read from it.
    assert ObjectDetectionData.from_folders(folder, **OPTIONS).num_classes == 2


def test_own_run_lengths_of_a_strip():
    mask = np.zeros((4, 3), dtype=bool)
    mask[1:3, 1] = True
    whole = np.pad(mask, ((0, 0), (5, 2)))
    assert rle_counts(mask, before=20, after=8) == rle_counts(whole)
    assert (rle_mask(rle_counts(whole), (10, 4)) == whole).all()
    assert rle_counts(np.zeros((4, 0), dtype=bool), 20, 20) == rle_counts(np.zeros((4, 10), dtype=bool))
    assert torch.tensor(whole).sum() == 2
