"""`flashtask convert`: what is written in another format reads back as the same samples; losses are named first."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import squares
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

import flashtask
from flashtask import ObjectDetectionData, SemanticSegmentationData
from flashtask.cli import run
from flashtask.core.errors import BadDataError, OutputError, UnknownNameError
from flashtask.data.annotated import Region, read_annotated
from flashtask.data.annotation_writers import losses
from flashtask.data.masks import read_mask, regions_text, rle_counts
from flashtask.data.mirrored import mirrored_keypoints
from flashtask.data.outlines import area_of, outlines_of

BOXES = {
    "coco": lambda root: [squares.coco(root / part, 8, seed) for seed, part in enumerate(("train", "val"))] and root,
    "voc": lambda root: [squares.voc(root / part, 8, seed) for seed, part in enumerate(("train", "val"))] and root,
    "yolo": lambda root: squares.yolo(root).parent,
    "csv": lambda root: squares.table(root),
}


def samples(data, part):
    """The boxes of each image in their order, by the image's name."""
    if data.is_dir() and (tables := sorted(data.glob("*.csv"))):
        names = {path.stem: path for path in tables}
        made = ObjectDetectionData.from_csv(train_file=names.get(part, tables[0]))
    elif data.is_file():
        made = ObjectDetectionData.from_csv(train_file=data)
    elif (data / "data.yaml").exists():
        made = ObjectDetectionData.from_yolo(data / "data.yaml")
        return _sorted(made, part)
    else:
        made = ObjectDetectionData.from_folders(data / part if (data / part).exists() else data)
    return _sorted(made, "train")


def _sorted(made, part):
    found = {}
    for path, one in made.true_boxes(part):
        rows = zip(one["labels"], one["boxes"], strict=True)
        found[os.path.basename(path)] = [(label, *(round(side, 3) for side in box)) for label, box in rows]
    return found


@pytest.mark.parametrize("target", BOXES)
@pytest.mark.parametrize("source", BOXES)
def test_boxes_of_every_format_read_back_from_every_other(tmp_path, source, target):
    data = BOXES[source](tmp_path / "data")
    made = flashtask.convert_annotations(data, tmp_path / "out", target)
    parts = ("train",) if source == "csv" else ("train", "val")
    assert sum(made.images.values()) == 8 * len(parts)
    assert made.lost == {}
    for part in parts:
        expected = samples(data, part)
        assert samples(tmp_path / "out", part) == expected
        assert len(expected) == 8
        assert sum(map(len, expected.values())) > 5
        assert [] in expected.values()


# ---- outlines


def test_outlines_are_exactly_the_pixels_and_parts_touch_nowhere():
    generator = np.random.default_rng(0)
    for _ in range(100):
        region = generator.random(generator.integers(1, 10, 2)) < generator.random()
        parts, holes = outlines_of(region)
        assert sum(map(area_of, parts)) + sum(map(area_of, holes)) == region.sum()
        assert all(area_of(one) > 0 for one in parts)
        if parts:
            shapes = [(1, [one.ravel().tolist() for one in parts]), (0, [one.ravel().tolist() for one in holes])]
            drawn, _, _ = read_mask(regions_text(region.shape[::-1], shapes))
            assert (drawn == region).all()


def test_a_ring_has_one_part_and_one_hole_and_pixels_at_a_corner_are_two_parts():
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    (part,), (hole,) = outlines_of(ring)
    assert part.tolist() == [[0, 0], [3, 0], [3, 3], [0, 3]]
    assert area_of(hole) == -1
    assert [len(one) for one in outlines_of(np.eye(2, dtype=bool)).parts] == [4, 4]
    region = Region((3, 3), counts=rle_counts(ring))
    assert (region.area, region.box) == (8, (0, 0, 3, 3))


# ---- everything that COCO holds


def everything(folder):
    """One picture with an object of each kind that some format cannot hold."""
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    ring = np.zeros((30, 40), dtype=bool)
    ring[2:9, 2:9] = True
    ring[4:6, 4:6] = False
    counts = coco_masks.encode(np.asfortranarray(ring.astype(np.uint8)))["counts"].decode()
    shapes = {
        "plain": ([[10, 2, 15, 2, 15, 8]], [10, 2, 5, 6]),
        "upright": ([[20, 2, 25, 2, 25, 8, 20, 8]], [20, 2, 5, 6]),
        "rotated": ([[30, 2, 33, 5, 30, 8, 27, 5]], [27, 2, 6, 6]),
        "two parts": ([[2, 12, 6, 12, 6, 15], [8, 12, 12, 12, 12, 18]], [2, 12, 10, 6]),
        "another box": ([[20, 12, 25, 12, 25, 18]], [18, 12, 9, 6]),
        "ring": ({"size": [30, 40], "counts": counts}, [2, 2, 7, 7]),
    }
    annotations = [{"segmentation": shape, "bbox": box, "area": 12.5, "iscrowd": 0} for shape, box in shapes.values()]
    crowd = {"size": [30, 40], "counts": [600, 30, 570]}
    annotations.append({"segmentation": crowd, "bbox": [20, 0, 1, 30], "area": 30, "iscrowd": 1})
    annotations.append({"bbox": [30, 12, 4, 4], "area": 3, "iscrowd": 0})
    annotations.append({"bbox": [30, 20, 4, 4], "area": 16, "iscrowd": 0, "keypoints": [31, 21, 2, 0, 0, 0]})
    annotations = [{"id": n, "image_id": 7, "category_id": 4, **one} for n, one in enumerate(annotations, 1)]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": annotations,
        "categories": [{"id": 4, "name": "it", "keypoints": ["left", "right"], "skeleton": [[1, 2]]}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


LOST = {
    "coco": {},
    "voc": {"crowd": 1, "region": 4, "rotated": 1, "area": 1, "points": 1},
    "csv": {"crowd": 1, "region": 4, "rotated": 1, "area": 1, "points": 1},
    "yolo": {"crowd": 1, "region": 4, "rotated": 1, "area": 1},  # keypoints leave no room for outlines
    "png": {"crowd": 1, "points": 1, "alone": 2, "instances": 6},
}


@pytest.mark.parametrize("form", LOST)
def test_what_a_format_cannot_hold_is_counted(tmp_path, form):
    data = read_annotated(everything(tmp_path / "data"))
    assert losses(data, form) == LOST[form]


def test_yolo_without_keypoints_counts_holes_parts_and_boxes(tmp_path):
    folder = everything(tmp_path / "data")
    content = json.loads((folder / "annotations.json").read_text())
    del content["categories"][0]["keypoints"]
    (folder / "annotations.json").write_text(json.dumps(content))
    assert losses(read_annotated(folder), "yolo") == {"crowd": 1, "holes": 1, "parts": 1, "box": 1, "area": 1}
    made = flashtask.convert_annotations(folder, tmp_path / "out", "yolo", lossy=True)
    assert made.lost["objects of several parts"] == 1
    lines = (tmp_path / "out" / "train" / "labels" / "a.txt").read_text().splitlines()
    assert [len(line.split()) for line in lines] == [7, 9, 9, 7, 7, 9, 5, 5]
    largest = np.array(lines[3].split()[1:], dtype=float).reshape(-1, 2) * (40, 30)
    assert np.allclose(largest, [[8, 12], [12, 12], [12, 18]])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
def test_coco_to_coco_loses_nothing(tmp_path):
    folder = everything(tmp_path / "data")
    flashtask.convert_annotations(folder, tmp_path / "out", "coco")
    before, after = (json.loads((one / "annotations.json").read_text()) for one in (folder, tmp_path / "out"))
    for one, two in zip(before["annotations"], after["annotations"], strict=True):
        one, two = dict(one), dict(two)
        assert two.pop("image_id") == 1
        del one["image_id"]
        two.pop("num_keypoints", None)
        assert two == one
    assert after["categories"] == before["categories"]
    assert after["images"][0]["file_name"] == "../data/a.png"
    known = COCO(str(tmp_path / "out" / "annotations.json"))
    assert all(known.annToMask(one).any() for one in known.loadAnns(known.getAnnIds()) if "segmentation" in one)


def test_keypoints_go_to_yolo_and_back(tmp_path):
    folder = everything(tmp_path / "data")
    content = json.loads((folder / "annotations.json").read_text())
    content["annotations"] = content["annotations"][-1:]
    (folder / "annotations.json").write_text(json.dumps(content))
    flashtask.convert_annotations(folder, tmp_path / "yolo", "yolo")
    text = (tmp_path / "yolo" / "data.yaml").read_text()
    assert "kpt_shape: [2, 3]" in text
    assert "flip_idx: [1, 0]" in text
    flashtask.convert_annotations(tmp_path / "yolo" / "data.yaml", tmp_path / "coco", "coco")
    found = json.loads((tmp_path / "coco" / "train" / "annotations.json").read_text())
    assert found["annotations"][0]["keypoints"] == pytest.approx([31, 21, 2, 0, 0, 0])
    assert found["categories"] == [{"id": 1, "name": "it", "keypoints": ["left", "right"], "skeleton": [[1, 2]]}]


# ---- masks


def masked(folder, parts=("train", "val")):
    for seed, part in enumerate(parts):
        generator = np.random.default_rng(seed)
        for kind in ("images", "masks"):
            (folder / kind / part).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (24, 16)).save(folder / "images" / part / f"{number}.jpg")
            values = np.zeros((16, 24), dtype=np.uint8)
            values[2:9, 3:12], values[10:14, 5:20] = 1, 2
            values[generator.random((16, 24)) < 0.1] = 2
            Image.fromarray(values).save(folder / "masks" / part / f"{number}.png")
    (folder / "classes.txt").write_text("background\ncat\ndog\n")
    return folder


def pixels(made, part):
    return {os.path.splitext(os.path.basename(path))[0]: classes.tolist() for path, classes in made.true_masks(part)}


def test_masks_go_to_coco_and_back_with_every_pixel(tmp_path):
    data = masked(tmp_path / "data")
    flashtask.convert_annotations(data, tmp_path / "coco", "coco")
    of_masks = SemanticSegmentationData.from_folders(data)
    of_coco = SemanticSegmentationData.from_coco(tmp_path / "coco" / "train", val_folder=tmp_path / "coco" / "val")
    flashtask.convert_annotations(tmp_path / "coco", tmp_path / "back", "png", copy_images=True)
    back = SemanticSegmentationData.from_folders(tmp_path / "back")
    assert list(of_masks.classes) == list(of_coco.classes) == list(back.classes) == ["background", "cat", "dog"]
    for part in ("train", "val"):
        assert pixels(of_masks, part) == pixels(of_coco, part) == pixels(back, part)
    assert not (tmp_path / "back" / "images" / "train" / "0.jpg").is_symlink()


def test_pixels_that_do_not_count_are_a_loss(tmp_path):
    data = masked(tmp_path / "data", ("train",))
    values = np.array(Image.open(data / "masks" / "train" / "0.png"))
    values[0, 0] = 255
    Image.fromarray(values).save(data / "masks" / "train" / "0.png")
    with pytest.raises(BadDataError, match="1 masks with pixels that belong to no class"):
        flashtask.convert_annotations(data, tmp_path / "coco", "coco")


# ---- files


def test_pictures_on_their_side_are_written_as_they_are_seen(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[2:8, 4:14] = 255
    Image.fromarray(pixels).save(folder / "a.jpg", exif=exif, quality=100)
    mask = pixels[..., 0] > 0
    annotations = [
        {"bbox": [4, 2, 10, 6], "segmentation": [[4, 2, 14, 2, 14, 8, 4, 8]], "keypoints": [4, 2, 2]},
        {"bbox": [4, 2, 10, 7], "segmentation": {"size": [20, 30], "counts": rle_counts(mask)}},
    ]
    annotations = [{"id": n, "image_id": 1, "category_id": 1, "area": 60, **one} for n, one in enumerate(annotations)]
    content = {"images": [{"id": 1, "file_name": "a.jpg", "width": 30, "height": 20}], "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "it", "keypoints": ["corner"]}]
    (folder / "annotations.json").write_text(json.dumps(content))
    (part,) = read_annotated(folder).parts
    upright = np.rot90(mask, -1)
    rows, columns = upright.any(1).nonzero()[0], upright.any(0).nonzero()[0]
    around = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    one, two = part.pictures[0].objects
    assert part.pictures[0].size == (20, 30)
    assert one.box == one.region.box == two.region.box == around
    assert one.points == [(18, 4, 2)]


def test_nothing_is_overwritten_and_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    data = squares.coco(tmp_path / "data", 2)
    (tmp_path / "out").mkdir()
    flashtask.convert_annotations(data, tmp_path / "out", "voc")
    before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(OutputError, match="never overwritten"):
        flashtask.convert_annotations(data, tmp_path / "out", "voc")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        flashtask.convert_annotations(data, tmp_path / "other", "yolo", copy_images=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_images_of_one_name_are_refused_where_files_are_named_after_them(tmp_path):
    data = squares.coco(tmp_path / "data", 2)
    content = json.loads((data / "annotations.json").read_text())
    shutil.copy(data / "000.png", data / "001.bmp")
    content["images"][0]["file_name"] = "001.bmp"
    (data / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(BadDataError, match="would have one file of annotations"):
        flashtask.convert_annotations(data, tmp_path / "out", "yolo")
    assert flashtask.convert_annotations(data, tmp_path / "out", "csv").images == {"": 2}


def test_the_command_says_what_is_lost_and_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    everything(tmp_path / "data")
    assert run(["convert", "data", "out", "--format", "voc"]) == 65
    said = capsys.readouterr().err
    assert "1 crowd regions, 4 segmentations, 1 rotated boxes" in said
    assert "fix: --lossy" in said
    assert not (tmp_path / "out").exists()
    assert run(["convert", "data", "out", "--format", "voc", "--lossy", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["lost"]["crowd regions"] == 1
    assert about["images"] == {"": 1}
    assert len(samples(tmp_path / "out", "train")["a.png"]) == 8
    assert run(["convert", "data", "whole"]) == 0
    assert (tmp_path / "whole" / "annotations.json").exists()
    assert run(["convert", "nothing", "other", "--format", "voc"]) == 66
    assert run(["convert", "data", "out", "--format", "coco"]) == 73
    with pytest.raises(UnknownNameError, match="did you mean 'yolo'"):
        flashtask.convert_annotations("data", "other", "yola")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["nose", "left_eye", "right_eye"], (0, 2, 1)),
        (["leftHip", "rightHip"], (1, 0)),
        (["hand.l", "hand.r", "head"], (1, 0, 2)),
        (["left_eye", "nose"], ()),
        (["top", "bottom"], ()),
        (["center"], (0,)),
    ],
)
def test_keypoints_change_sides_by_their_names(names, expected):
    assert mirrored_keypoints(names) == expected
