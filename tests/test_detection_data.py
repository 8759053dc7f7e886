"""`ObjectDetectionData`: every format gives the same boxes, which move with the image; wrong ones are all named."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import squares
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from flashtask import ObjectDetectionData
from flashtask.core.errors import BadDataError, UsageError
from flashtask.core.preprocessing import Preprocessing

#: The pictures of 96 x 80 lie in it as they are, with a border above and below.
PADDED = Preprocessing(input_size=(3, 96, 96), crop_pct=1.0, crop_mode="border", mean=(0, 0, 0), std=(1, 1, 1))
OPTIONS = {"batch_size": 8, "num_workers": 0, "preprocessing": PADDED, "augment": "none"}


def own_layout(root):
    squares.coco(root / "train2017", 8)
    (root / "annotations").mkdir()
    (root / "train2017" / "annotations.json").rename(root / "annotations" / "instances_train2017.json")
    return ObjectDetectionData.from_folders(root / "train2017", **OPTIONS)


def in_memory(name, make):
    def build(root):
        drawn = squares.draw(8)
        targets = [
            {"boxes": [box for _, *box in objects], "labels": [label for label, *_ in objects]} for _, objects in drawn
        ]
        pictures = [make(picture, root / f"{number}.png") for number, (picture, _) in enumerate(drawn)]
        return getattr(ObjectDetectionData, name)(pictures, targets, **OPTIONS)

    return build


def saved(picture, path):
    picture.save(path)
    return path


def data_frame(root):
    with squares.table(root / "a").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return ObjectDetectionData.from_data_frame(train_data_frame=columns, images_root=root / "a", **OPTIONS)


LAYOUTS = {
    "COCO, in the folder": lambda root: ObjectDetectionData.from_folders(squares.coco(root / "a", 8), **OPTIONS),
    "COCO, as Roboflow names it": lambda root: ObjectDetectionData.from_folders(
        squares.coco(root / "a", 8, name="_annotations.coco.json"), **OPTIONS
    ),
    "COCO's own layout": own_layout,
    "COCO, by name": lambda root: ObjectDetectionData.from_coco(
        squares.coco(root / "a", 8, name="x.json"), root / "a" / "x.json", **OPTIONS
    ),
    "VOC": lambda root: ObjectDetectionData.from_folders(squares.voc(root / "a"), **OPTIONS),
    "YOLO": lambda root: ObjectDetectionData.from_yolo(squares.yolo(root), **OPTIONS),
    "YOLO, the folder of a part": lambda root: ObjectDetectionData.from_folders(
        squares.yolo(root).parent / "train", **OPTIONS
    ),
    "a table": lambda root: ObjectDetectionData.from_csv(train_file=squares.table(root / "a"), **OPTIONS),
    "a data frame": data_frame,
    "files": in_memory("from_files", saved),
    "pictures in memory": in_memory("from_images", lambda picture, path: picture),
    "arrays": in_memory("from_numpy", lambda picture, path: np.array(picture)),
    "tensors": in_memory("from_tensors", lambda picture, path: torch.from_numpy(np.array(picture)).permute(2, 0, 1)),
}


def batch_of(made, part="train"):
    """Images and targets in the order of the listing."""
    made.setup("fit")
    dataset = made._datasets[part]
    return zip(*(dataset[row] for row in range(len(dataset))), strict=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_format_gives_the_same_boxes(tmp_path, name, capsys):
    made = LAYOUTS[name](tmp_path)
    assert sorted(made.labels) == ["disc", "square"]
    images, targets = batch_of(made)
    for target, (_, objects) in zip(targets, squares.draw(8), strict=True):
        found = sorted(
            (made.labels[label], *(round(side, 3) for side in box))
            for label, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True)
        )
        # 8 rows of the border lie above.
        assert found == sorted((label, a, b + 8, c, d + 8) for label, a, b, c, d in objects)
    assert "8 images, " in capsys.readouterr().err
    assert len(images) == 8


def test_parts_and_layouts_of_whole_data_sets(tmp_path, capsys):
    squares.yolo(tmp_path / "yolo")
    made = ObjectDetectionData.from_root(tmp_path / "yolo", **OPTIONS)
    assert made.sizes() == {"train": 8, "val": 8}
    voc = squares.voc(tmp_path / "voc")
    lists = voc / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("000\n001\n002\n003\n004\n")
    (lists / "val.txt").write_text("005\n006\n007\n")
    made = ObjectDetectionData.from_root(voc, **OPTIONS)
    assert made.sizes() == {"train": 5, "val": 3}
    made.setup("fit")
    assert "names its own validation images, so val_split is not used" in capsys.readouterr().err
    squares.coco(tmp_path / "coco", 16)
    split = ObjectDetectionData.from_folders(tmp_path / "coco", val_split=0.25, **OPTIONS)
    assert split.sizes() == {"train": 12, "val": 4}
    assert sum(sum(part.values()) for part in split.counts().values()) == sum(
        len(objects) for _, objects in squares.draw(16)
    )


def test_classes_follow_the_ids_of_coco_and_those_without_a_box_are_no_outputs(tmp_path):
    folder = squares.coco(tmp_path / "a", 8)
    content = json.loads((folder / "annotations.json").read_text())
    content["categories"].insert(0, {"id": 0, "name": "things"})
    (folder / "annotations.json").write_text(json.dumps(content))
    made = ObjectDetectionData.from_folders(folder, **OPTIONS)
    assert made.labels == ("square", "disc")
    assert made.targets["category_ids"] == [3, 7]
    assert "table" not in made.targets


# ---- boxes move with the image


def bounds(image):
    """The box around what is bright in an image (3, H, W) from 0 to 1."""
    rows, columns = (image.amax(0) > 0.6).nonzero(as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


class Flips:
    """A flip of both axes, of image and boxes."""

    def __init__(self):
        self.change = v2.Compose([v2.RandomHorizontalFlip(1), v2.RandomVerticalFlip(1)])

    def __call__(self, image, target):
        return self.change(image, target)


@pytest.mark.parametrize("augment", ["none", Flips()])
def test_flips_and_borders_move_boxes_exactly(tmp_path, augment):
    folder = squares.coco(tmp_path / "a", 12, most=1)
    made = ObjectDetectionData.from_folders(folder, **{**OPTIONS, "augment": augment})
    images, targets = batch_of(made)
    seen = 0
    for image, target in zip(images, targets, strict=True):
        for box in target["boxes"].tolist():
            assert box == bounds(image)
            seen += 1
    assert seen > 8


def test_random_crops_keep_boxes_on_their_objects(tmp_path):
    folder = squares.coco(tmp_path / "a", 12, most=1)
    made = ObjectDetectionData.from_folders(folder, **{**OPTIONS, "augment": "light"})
    images, targets = batch_of(made)
    seen = 0
    for image, target in zip(images, targets, strict=True):
        for box in target["boxes"].tolist():
            assert box == pytest.approx(bounds(image), abs=2)
            assert 0 <= min(box) <= max(box) <= 96
            seen += 1
    assert seen > 5


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("drawn_on", ["stored", "upright"])
def test_boxes_of_pictures_that_lie_on_their_side(tmp_path, orientation, drawn_on):
    stored = Image.new("RGB", (96, 64), (20, 20, 20))
    stored.paste((250, 250, 250), (8, 16, 40, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    picture = stored if drawn_on == "stored" else upright
    left, top, right, bottom = bounds(v2.functional.to_image(picture) / 255)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": picture.width, "height": picture.height}],
        "categories": [{"id": 1, "name": "bar"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [left, top, right - left, bottom - top]}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    made = ObjectDetectionData.from_folders(tmp_path, **OPTIONS)
    (image,), (target,) = batch_of(made)
    assert target["boxes"].tolist() == [bounds(image)]


# ---- what is refused


def test_all_wrong_boxes_are_named_at_once_with_their_places(tmp_path):
    folder = squares.coco(tmp_path / "a", 4)
    content = json.loads((folder / "annotations.json").read_text())
    wrong = {"empty": [10, 10, 0, 5], "outside": [80, 10, 30, 20], "double": [1, 2, 3, 4], "broken": [1, 2, 3]}
    wrong |= {"edge": [90, 10, 6.5, 20]}
    for number, box in enumerate([*wrong.values(), wrong["double"]], 900):
        content["annotations"].append({"id": number, "image_id": 100, "category_id": 3, "bbox": box})
    content["annotations"].append({"id": 990, "image_id": 5, "category_id": 3, "bbox": [1, 1, 2, 2]})
    (folder / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(BadDataError) as caught:
        ObjectDetectionData.from_folders(folder, **OPTIONS)
    said = str(caught.value)
    assert caught.value.exit_code == 65
    for part in (
        "empty box: 1",
        "box outside of its picture: 1",
        "box that is there twice: 1",
        "box that is not four numbers: 1",
        "annotation without its image, category or bbox: 1",
        "annotations.json, annotation 900 (000.png): 10, 10, 10, 15",
        "80, 10, 110, 30 in a picture of 96 x 80",
    ):
        assert part in said
    assert "annotation 904" not in said  # half a pixel beyond the edge


def test_a_box_half_a_pixel_beyond_the_edge_is_clipped():
    picture = Image.new("RGB", (96, 80))
    target = {"boxes": [[90, -0.4, 96.5, 20]], "labels": ["cat"]}
    made = ObjectDetectionData.from_images([picture], [target], **OPTIONS)
    _, (target,) = batch_of(made)
    assert target["in_file"]["boxes"].tolist() == [[90, 0, 96, 20]]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "annotations.json").write_text("{}"), "is not an annotation file of COCO"),
        (lambda folder: (folder / "annotations.json").write_text("[1"), "is not an annotation file of COCO"),
        (lambda folder: (folder / "annotations.json").unlink(), "there are no boxes in"),
        (lambda folder: (folder / "001.png").unlink(), "missing image: 1"),
        (lambda folder: Image.new("RGB", (50, 50)).save(folder / "001.png"), "96 x 80 in the annotations, 50 x 50"),
    ],
)
def test_broken_folders_of_coco(tmp_path, break_it, message):
    folder = squares.coco(tmp_path / "a", 4)
    break_it(folder)
    with pytest.raises(BadDataError, match=message):
        ObjectDetectionData.from_folders(folder, **OPTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "file that is not XML: 1"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "it declares entities"),
        ("<annotation><filename>no.png</filename></annotation>", "there is no image 'no.png'"),
        (
            "<annotation><filename>000.png</filename><object><name>a</name></object></annotation>",
            "box that is not four numbers",
        ),
    ],
)
def test_broken_files_of_voc(tmp_path, text, message):
    folder = squares.voc(tmp_path / "a", 4)
    (folder / "Annotations" / "extra.xml").write_text(text)
    with pytest.raises(BadDataError, match=message):
        ObjectDetectionData.from_voc(folder, **OPTIONS)


def test_broken_labels_of_yolo_and_tables(tmp_path):
    file = squares.yolo(tmp_path / "yolo")
    (tmp_path / "yolo" / "train" / "labels" / "000.txt").write_text("5 0.5 0.5 0.1 0.1\n0 0.5 x\n0 0.9 0.5 0.4 0.1\n")
    with pytest.raises(BadDataError) as caught:
        ObjectDetectionData.from_yolo(file, **OPTIONS)
    for part in ("000.txt, line 1: class 5, and there are 2 names", "000.txt, line 2", "outside of its picture"):
        assert part in str(caught.value)
    table = squares.table(tmp_path / "table")
    table.write_text(table.read_text() + "000.png,1,2,3,4,\n000.png,a,2,3,4,cat\n")
    with pytest.raises(BadDataError, match="box without a label: 1") as caught:
        ObjectDetectionData.from_csv(train_file=table, **OPTIONS)
    assert "boxes.csv, line" in str(caught.value)


def test_polygons_of_yolo_mean_the_boxes_around_them(tmp_path):
    file = squares.yolo(tmp_path)
    (tmp_path / "train" / "labels" / "000.txt").write_text("1 0.25 0.25 0.5 0.125 0.75 0.5\n")
    _, targets = batch_of(ObjectDetectionData.from_yolo(file, **OPTIONS))
    assert targets[0]["in_file"]["boxes"].tolist() == [[24, 10, 72, 40]]


def test_crowds_are_kept_apart(tmp_path):
    folder = squares.coco(tmp_path / "a", 2)
    content = json.loads((folder / "annotations.json").read_text())
    content["annotations"][0]["iscrowd"] = 1
    (folder / "annotations.json").write_text(json.dumps(content))
    _, targets = batch_of(ObjectDetectionData.from_folders(folder, **OPTIONS))
    assert targets[0]["labels"][0] == -1
    assert targets[0]["in_file"]["is_crowd"].tolist()[0]
    assert all(label >= 0 for label in targets[1]["labels"].tolist())


def test_what_gives_no_boxes_is_refused():
    with pytest.raises(UsageError, match="from_datasets gives no boxes"):
        ObjectDetectionData.from_datasets([(np.zeros((8, 8, 3), np.uint8), 1)] * 4)
    with pytest.raises(UsageError, match="is not a mapping of boxes"):
        ObjectDetectionData.from_numpy(np.zeros((1, 8, 8, 3), np.uint8), [[1, 2]])


def test_the_columns_are_flat_and_a_batch_is_drawn(tmp_path):
    made = ObjectDetectionData.from_folders(squares.coco(tmp_path / "a", 8), **OPTIONS)
    table = made._box_reader.table
    assert table.offsets.tolist()[-1] == len(table.boxes) == len(table.labels)
    assert all(column.dtype != object for column in (table.offsets, table.boxes, table.labels, table.is_crowd))
    made.show_batch(output=tmp_path / "batch.png")
    plain = np.asarray(Image.open(tmp_path / "batch.png"))
    assert (plain == [255, 59, 48]).all(axis=2).sum() > 50  # the outlines of the first class


def test_batches_hold_a_list_of_targets(tmp_path):
    made = ObjectDetectionData.from_folders(squares.coco(tmp_path / "a", 8), **OPTIONS)
    made.setup("fit")
    images, targets = next(iter(made.train_dataloader()))
    assert images.shape == (8, 3, 96, 96)
    assert len(targets) == 8
    assert all(isinstance(one["boxes"], torch.Tensor) and one["boxes"].shape[1] == 4 for one in targets)


def test_columns_of_a_table_give_parts_and_groups(tmp_path):
    table = squares.table(tmp_path / "a", count=8)
    header, *rows = table.read_text().splitlines()
    names = sorted({row.partition(",")[0] for row in rows})
    place = {name: number for number, name in enumerate(names)}
    parts = [f"{row},{('train', 'Validation')[place[row.partition(',')[0]] > 5]}" for row in rows]
    table.write_text("\n".join([f"{header},part", *parts]) + "\n")
    data = ObjectDetectionData.from_csv(train_file=table, split_field="part", **OPTIONS)
    assert data.sizes() == {"train": 6, "val": len(names) - 6}
    assert ObjectDetectionData.from_csv(**data.recipe()["from_csv"]).sizes() == data.sizes()
    with pytest.raises(UsageError, match="val_split and split_field both define"):
        ObjectDetectionData.from_csv(train_file=table, split_field="part", val_split=0.5, **OPTIONS)
    table.write_text("\n".join([f"{header},part", *parts[:-1], f"{rows[-1]},later"]) + "\n")
    with pytest.raises(BadDataError, match=rf"line {len(rows) + 1}, column 'part': 'later' is not a part of the data"):
        ObjectDetectionData.from_csv(train_file=table, split_field="part", **OPTIONS)
    sites = [f"{row},s{place[row.partition(',')[0]] // 2}" for row in rows]
    table.write_text("\n".join([f"{header},site", *sites]) + "\n")
    data = ObjectDetectionData.from_csv(train_file=table, group_field="site", val_split=0.25, **OPTIONS)
    found = {part: {place[name] // 2 for name in names_of(data, part, place)} for part in ("train", "val")}
    assert found["val"]
    assert not found["train"] & found["val"]


def names_of(data, part, known):
    paths = data._table.of(part).inputs.tolist()
    return [name for name in known if any(path.endswith(name) for path in paths)]
