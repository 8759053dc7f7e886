"""`KeypointDetector`: keypoints are read, mirrored, trained, measured as COCO does, stored, and predicted."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from contextlib import redirect_stdout

import marked
import numpy as np
import pytest
import squares
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms import v2

import flashtask
from flashtask import KeypointDetectionData, KeypointDetector, Keypoints, ObjectDetectionData, Trainer
from flashtask.cli import run
from flashtask.core.errors import BadDataError, FlashtaskError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.tasks.box_loss import Places, assign
from flashtask.tasks.keypoint_loss import COCO_PERSON, COCO_SIGMAS, keypoint_loss, keypoints_of_outputs, similarity
from flashtask.tasks.keypoint_metrics import KEYPOINT_NUMBERS, KeypointScores

OPTIONS = {"image_size": 96, "learning_rate": 4e-3, "backbone_learning_rate": 4e-3, "sigmas": [0.3, 0.25, 0.2]}
HEAD = {"width": 32, "depth": 1}
#: The pictures of 96 x 80 lie in it as they are, with 8 rows of border above and below.
PADDED = Preprocessing(input_size=(3, 96, 96), crop_pct=1.0, crop_mode="border", mean=(0, 0, 0), std=(1, 1, 1))


def data(root, **options):
    for name, count, seed in (("train", 32, 0), ("val", 8, 1)):
        if not (root / name).exists():
            marked.coco(root / name, count, seed)
    own = {"batch_size": 8, "num_workers": 0, "augment": "none", **options}
    return KeypointDetectionData.from_folders(root / "train", root / "val", **own)


def detector(**options):
    torch.manual_seed(0)
    return KeypointDetector("timm/test_resnet", pretrained=False, **{"head_options": HEAD, **OPTIONS, **options})


def trainer(folder, **options):
    options = {"max_epochs": 1, "seed": 1, "precision": "32", "enable_progress_bar": False, **options}
    return Trainer(output_dir=folder, **options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A detector that was trained until it finds some keypoints; its run, and its data."""
    root = tmp_path_factory.mktemp("marked")
    model, own = detector(), data(root)
    made = trainer(root / "run", max_epochs=5)
    made.fit(model, datamodule=own)
    return model, made, root


# ---- data


def targets_of(made, part="train"):
    made.setup("fit")
    dataset = made._datasets[part]
    return [dataset[row][1] for row in range(len(dataset))]


def in_memory():
    drawn = squares.draw(8)
    targets = [
        {
            "boxes": [box for _, *box in objects],
            "labels": [label for label, *_ in objects],
            "keypoints": np.array([marked.points_of(box) for _, *box in objects]).reshape(-1, 3, 3),
        }
        for _, objects in drawn
    ]
    pictures = [picture for picture, _ in drawn]
    return KeypointDetectionData.from_images(pictures, targets, augment="none", preprocessing=PADDED)


@pytest.mark.parametrize(
    "make",
    [
        lambda root, **own: KeypointDetectionData.from_folders(marked.coco(root / "a", 8), **own),
        lambda root, **own: KeypointDetectionData.from_coco(
            marked.coco(root / "a", 8), root / "a" / "annotations.json", **own
        ),
        lambda root, **own: KeypointDetectionData.from_yolo(marked.yolo(root), **own),
        lambda root, **own: in_memory(),
    ],
    ids=["folders", "coco", "yolo", "memory"],
)
def test_every_format_gives_the_same_keypoints(tmp_path, make):
    made = make(tmp_path, preprocessing=PADDED, augment="none")
    for target, (_, objects) in zip(targets_of(made), squares.draw(8), strict=True):
        expected = [
            [(x, y + 8, seen) for x, y, seen in np.reshape(marked.points_of(box), (3, 3)).tolist()]
            for _, *box in objects
        ]
        assert np.allclose(target["keypoints"], np.reshape(expected, (-1, 3, 3)), atol=1e-3)
        assert np.allclose(target["in_file"]["keypoints"][..., 1] + 8, target["keypoints"][..., 1], atol=1e-3)


def test_a_mirror_swaps_left_and_right(tmp_path):
    flipped = {"preprocessing": PADDED, "transform": v2.RandomHorizontalFlip(p=1)}
    plain = targets_of(data(tmp_path, preprocessing=PADDED))
    found = targets_of(data(tmp_path, **flipped, augment="auto"))
    for one, other in zip(plain, found, strict=True):
        expected = one["keypoints"][:, [0, 2, 1]]
        expected[..., 0] = 96 - expected[..., 0]
        assert torch.allclose(other["keypoints"], expected, atol=1e-3)
        if len(expected):  # the left corner is still that of the mirrored object
            assert torch.allclose(other["keypoints"][:, 1, 0], other["boxes"][:, 0], atol=1e-3)


def test_keypoints_beside_a_crop_are_not_labelled_and_boxes_that_are_dropped_take_theirs_along(tmp_path):
    crop = v2.CenterCrop((40, 48))
    dropped = hidden = 0
    plain = targets_of(data(tmp_path, preprocessing=PADDED))
    cropped = targets_of(data(tmp_path, transform=crop, augment="auto", preprocessing=PADDED))
    # Boxes that are not whole are left out by the transform, with their keypoints.
    own = v2.Compose([crop, v2.SanitizeBoundingBoxes()])
    whole = targets_of(data(tmp_path, transform=own, augment="auto", preprocessing=PADDED))
    assert 0 < sum(len(one["boxes"]) for one in whole) < sum(len(one["boxes"]) for one in cropped)
    for before, after in zip([*plain, *plain], [*cropped, *whole], strict=True):
        assert len(after["keypoints"]) == len(after["boxes"]) == len(after["labels"])
        dropped += len(before["boxes"]) - len(after["boxes"])
        points = after["keypoints"]
        hidden += int((points[..., 2] == 0).sum())
        assert (points[..., :2][points[..., 2] == 0] == 0).all()
        assert ((points[..., :2] >= 0) & (points[..., :2] <= 96)).all()
        seen = points[:, 0][points[:, 0, 2] > 0]
        for x, y, _ in seen.tolist():  # the middle lies in its own box
            assert any(a - 1 <= x <= c + 1 and b - 1 <= y <= d + 1 for a, b, c, d in after["boxes"].tolist())
    assert dropped > 0
    assert hidden > 0


def test_without_known_pairs_nothing_is_mirrored_and_a_warning_says_so(tmp_path, capsys):
    marked.coco(tmp_path / "train", 8, names=("a", "b", "c"))
    made = KeypointDetectionData.from_folders(tmp_path / "train", preprocessing=PADDED, augment="light")
    made.setup("fit")
    assert "images are not flipped" in capsys.readouterr().err
    assert made._arguments["flip"] == "none"
    targets_of(made)
    own = {"preprocessing": PADDED, "augment": "light"}
    with pytest.raises(UsageError, match="flip=horizontal, but which keypoints change sides"):
        KeypointDetectionData.from_folders(tmp_path / "train", flip="horizontal", **own).setup("fit")
    named = KeypointDetectionData.from_folders(tmp_path / "train", flip_pairs=[("b", 2)], **own)
    named.setup("fit")
    assert named._reader.flips == (0, 2, 1)
    assert "not flipped" not in capsys.readouterr().err
    with pytest.raises(UsageError, match="flip_pairs must be pairs of keypoints"):
        KeypointDetectionData.from_folders(tmp_path / "train", flip_pairs=[("b", "d")], **own)
    mirror = v2.RandomHorizontalFlip(p=1)
    with pytest.raises(UsageError, match="a transform mirrors pictures"):
        targets_of(KeypointDetectionData.from_folders(tmp_path / "train", transform=mirror, preprocessing=PADDED))


def test_annotations_that_cannot_be_used_are_named(tmp_path):
    file = marked.coco(tmp_path / "train", 8) / "annotations.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["keypoints"] = [1, 2]
    content["annotations"][1]["keypoints"][0] = 500
    content["annotations"][2]["keypoints"][2] = 3
    file.write_text(json.dumps(content))
    with pytest.raises(BadDataError) as raised:
        KeypointDetectionData.from_folders(tmp_path / "train")
    assert "keypoints that are not x, y and a visibility of 0, 1 or 2: 2" in str(raised.value)
    assert "keypoint outside of its picture: 1" in str(raised.value)
    assert ObjectDetectionData.from_folders(tmp_path / "train").num_classes == 2  # boxes alone do not need them
    content["categories"][1] |= {"keypoints": ["x"], "skeleton": []}
    content["annotations"] = []
    file.write_text(json.dumps(content))
    with pytest.raises(BadDataError, match="classes with different keypoints"):
        KeypointDetectionData.from_folders(tmp_path / "train")
    with pytest.raises(BadDataError, match="no class has keypoints"):
        KeypointDetectionData.from_folders(squares.coco(tmp_path / "boxes", 8))
    with pytest.raises(UsageError, match="from_voc gives no keypoints"):
        KeypointDetectionData.from_voc(tmp_path)


# ---- loss and metrics


def test_similarity_is_that_of_the_formula():
    true = torch.tensor([[[10.0, 10.0, 2], [20.0, 10.0, 1], [0.0, 0.0, 0]]])
    found = torch.tensor([[[13.0, 14.0], [20.0, 10.0], [99.0, 99.0]]])
    sigmas, area = (0.1, 0.05, 0.1), 400.0
    expected = (math.exp(-25 / (2 * area * 0.2**2)) + 1) / 2
    assert similarity(found, true, torch.tensor([area]), torch.tensor(sigmas)).item() == pytest.approx(expected)


def perfect(boxes, points, strides=(8, 16), size=64):
    """Outputs of a head that finds the boxes and keypoints exactly."""
    places = Places([torch.zeros(1, 1, size // stride, size // stride) for stride in strides], strides)
    learned = assign(places, boxes)
    maps = torch.cat([torch.full((len(learned), 4), 4.0), torch.full((len(learned), 2), -20.0)], dim=1)
    of_points = torch.zeros(len(learned), 3 * points.shape[1])
    for place in (learned >= 0).nonzero()[:, 0].tolist():
        box, own = boxes[learned[place]], points[learned[place]]
        maps[place, :4] = torch.cat([places.points[place] - box[:2], box[2:] - places.points[place]])
        maps[place, 4 + learned[place]] = 20.0
        of_points[place, : 2 * len(own)] = (own[:, :2] - places.points[place]).flatten()
        of_points[place, 2 * len(own) :] = torch.where(own[:, 2] > 0, 20.0, -20.0)
    ends = [(size // stride) ** 2 for stride in strides]

    def as_maps(flat):
        return [
            part.T.reshape(1, -1, size // stride, size // stride)
            for part, stride in zip(flat.split(ends), strides, strict=True)
        ]

    return {"maps": as_maps(maps), "points": as_maps(of_points)}


def test_perfect_outputs_lose_nothing_and_give_the_keypoints_back():
    boxes = torch.tensor([[5.0, 7.0, 33.0, 30.0], [30.0, 20.0, 60.0, 62.0]])
    points = torch.tensor([[[6.0, 8, 2], [30, 29, 1]], [[31, 21, 2], [0, 0, 0]]])
    outputs = perfect(boxes, points)
    target = {"boxes": boxes, "labels": torch.tensor([0, 1]), "keypoints": points}
    losses = keypoint_loss(outputs, [target], (8, 16), (0.05, 0.05))
    assert list(losses) == ["cls", "box", "point", "visible"]
    assert sum(losses.values()) < 1e-4
    (rows,) = keypoints_of_outputs(outputs, (8, 16))
    found = rows[rows[:, 5].argsort()]
    assert torch.allclose(found[:, :4], boxes, atol=1e-3)
    is_labelled = points[..., 2] > 0
    own = found[:, 6:].reshape(2, 2, 3)
    assert torch.allclose(own[..., :2][is_labelled], points[..., :2][is_labelled], atol=1e-3)
    assert torch.allclose(own[..., 2], is_labelled.float(), atol=1e-3)
    away = {**target, "keypoints": points + torch.tensor([3.0, 0, 0])}
    assert keypoint_loss(outputs, [away], (8, 16), (0.05, 0.05))["point"] > 0.1
    nothing = {**target, "keypoints": torch.zeros_like(points)}
    lost = keypoint_loss(outputs, [nothing], (8, 16), (0.05, 0.05))
    assert lost["point"] == 0
    assert lost["visible"] > 1


def random_results(seed, images=10, classes=2, count=5):
    """True objects, some crowds and some without a labelled keypoint, and what was found near them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.rand(*size, generator=generator)

    truth, found, annotations, results = [], [], [], []
    for image in range(images):
        number = int(draw(1) * 5)
        corners = (draw(number, 2) * 200).round()
        boxes = torch.cat([corners, corners + 20 + (draw(number, 2) * 150).round()], dim=1)
        places = boxes[:, None, :2] + draw(number, count, 2) * (boxes[:, 2:] - boxes[:, :2])[:, None]
        seen = (draw(number, count) * 3).floor() * (draw(number, 1) > 0.2)
        points = torch.cat([places * (seen > 0)[..., None], seen[..., None]], dim=-1)
        labels, is_crowd = (draw(number) * classes).long(), draw(number) < 0.1
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) * 0.7
        truth.append({"boxes": boxes, "labels": labels, "is_crowd": is_crowd, "areas": areas, "keypoints": points})
        near = places.repeat(3, 1, 1) + draw(3 * number, count, 2) * draw(3 * number, 1, 1) * 40
        rows = torch.cat([boxes.repeat(3, 1), draw(3 * number, 1), labels.repeat(3)[:, None].float()], dim=1)
        own = torch.cat([near, torch.ones(3 * number, count, 1)], dim=-1)
        found.append(torch.cat([rows, own.flatten(1)], dim=1))
        for place in range(number):
            left, top, right, bottom = boxes[place].tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(labels[place]) + 3,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(areas[place]),
                    "iscrowd": int(is_crowd[place]),
                    "keypoints": points[place].flatten().tolist(),
                    "num_keypoints": int((seen[place] > 0).sum()),
                }
            )
        for left, top, right, bottom, score, label, *keypoints in found[-1].tolist():
            results.append(
                {
                    "image_id": image,
                    "category_id": int(label) + 3,
                    "bbox": [left, top, right - left, bottom - top],
                    "score": score,
                    "keypoints": keypoints,
                }
            )
    content = {"images": [{"id": n} for n in range(images)], "annotations": annotations}
    content["categories"] = [{"id": n + 3, "name": str(n)} for n in range(classes)]
    return found, truth, content, results


def coco_numbers(file, results, sigmas):
    """The ten numbers of pycocotools."""
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        measured = COCOeval(truth, truth.loadRes(results), "keypoints")
        measured.params.kpt_oks_sigmas = np.array(sigmas)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return dict(zip(KEYPOINT_NUMBERS, measured.stats.tolist(), strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_ten_numbers_are_those_of_pycocotools(tmp_path, seed):
    found, truth, content, results = random_results(seed)
    sigmas = (0.03, 0.05, 0.08, 0.1, 0.05)
    metric = KeypointScores(2, sigmas)
    metric.update(found[:4], truth[:4])
    metric.update(found[4:], truth[4:])
    metric.compute()
    (tmp_path / "truth.json").write_text(json.dumps(content))
    expected = coco_numbers(tmp_path / "truth.json", results, sigmas)
    for name in KEYPOINT_NUMBERS:
        assert metric.numbers[name] == pytest.approx(expected[name], abs=1e-6), name
    assert 0.05 < metric.numbers["map"] < 0.95


def test_pck_counted_by_hand_and_nothing_to_measure_is_nan():
    def one(*points):
        return torch.tensor([[0.0, 0, 50, 100, 0.9, 0, *points]])

    truth = {
        "boxes": torch.tensor([[0.0, 0.0, 50.0, 100.0]]),
        "labels": torch.tensor([0]),
        "is_crowd": torch.tensor([False]),
        "areas": torch.tensor([5000.0]),
        "keypoints": torch.tensor([[[10.0, 10, 2], [20, 20, 2], [0, 0, 0]]]),
    }
    metric = KeypointScores(1, (0.1,) * 3, (0.5,))
    found = [one(10, 19, 1, 20, 31, 1, 0, 0, 0), one(10, 10, 1, 20, 20, 1, 0, 0, 0), torch.zeros(0, 15)]
    metric.update(found, [truth] * 3)
    metric.compute()
    assert metric.numbers["pck"] == pytest.approx(3 / 6)  # 10 pixels are near; the third image misses both
    empty = KeypointScores(1, (0.1,) * 3)
    nobody = {name: value[:0] for name, value in truth.items()}
    empty.update([torch.zeros(0, 15)], [nobody])
    assert math.isnan(empty.compute())


def test_keypoints_of_a_person_have_the_sigmas_of_coco():
    assert detector(num_classes=1, num_keypoints=17, sigmas=None).sigmas == (0.05,) * 17
    made = COCOeval(iouType="keypoints").params.kpt_oks_sigmas
    assert made.tolist() == pytest.approx(COCO_SIGMAS)
    assert len(COCO_PERSON) == 17


# ---- training


def test_a_detector_learns_the_keypoints(fitted):
    _, made, _ = fitted
    first, last = made.fit_run.history[0], made.fit_run.history[-1]
    assert last["val_map_50"] > 0.1
    assert last["train_loss_point"] < 0.85 * first["train_loss_point"]
    parts = sum(last[f"train_loss_{name}"] for name in ("cls", "box", "point", "visible"))
    assert parts == pytest.approx(last["train_loss"])


def counted(found, root, sigmas):
    """F1 at a similarity of 0.5, from COCO's file and the predictions alone; the mean over classes."""
    content = json.loads((root / "val" / "annotations.json").read_text())
    names = {one["id"]: one["file_name"] for one in content["images"]}
    f1s = []
    for number in squares.CATEGORIES.values():
        hits = said = total = 0
        for one in found:
            own = [
                a
                for a in content["annotations"]
                if names[a["image_id"]] == one.path.rpartition("/")[2] and a["category_id"] == number
            ]
            total += len(own)
            for points, category in zip(one.keypoints, one.category_ids, strict=True):
                if category != number:
                    continue
                said += 1
                alike = [_similarity(points, other, sigmas) for other in own]
                if alike and max(alike) >= 0.5:
                    hits += 1
                    del own[alike.index(max(alike))]
        f1s.append(2 * hits / (said + total))
    return sum(f1s) / len(f1s)


def _similarity(points, other, sigmas):
    values = []
    for (x, y, _), place, sigma in zip(points, range(0, 9, 3), sigmas, strict=True):
        dx, dy = x - other["keypoints"][place], y - other["keypoints"][place + 1]
        values.append(math.exp(-(dx**2 + dy**2) / (2 * other["area"] * (2 * sigma) ** 2)))
    return sum(values) / len(values)


def test_one_number_by_every_way(fitted, tmp_path, capsys):
    model, made, root = fitted
    paths = sorted(map(str, (root / "val").glob("*.png")))
    last = made.fit_run.history[-1]
    (measured,) = trainer(tmp_path / "v").validate(model, datamodule=data(root), verbose=False)
    capsys.readouterr()
    assert run(["validate", str(root / "run" / "last.ckpt"), str(root), "--batch-size", "8", "--json"]) == 0
    of_command = json.loads(capsys.readouterr().out)
    for name in ("val_map", "val_map_50", "val_f1", "val_pck", "val_box_map", "val_loss"):
        assert measured[name] == pytest.approx(last[name], abs=1e-5), name
        assert of_command[name] == pytest.approx(last[name], abs=1e-5), name
    again = flashtask.load(root / "run" / "last.ckpt")
    saved = flashtask.load(model.save_pretrained(tmp_path / "saved"))
    assert model.thresholds == again.thresholds == saved.thresholds
    for one in (model, again, saved):
        assert (one.keypoints, one.sigmas) == (marked.NAMES, (0.3, 0.25, 0.2))
        assert counted(one.predict(paths), root, one.sigmas) == pytest.approx(last["val_f1"], abs=1e-5)
    again.score_threshold = 0
    file = root / "val" / "annotations.json"
    ids = {str(root / "val" / one["file_name"]): one["id"] for one in json.loads(file.read_text())["images"]}
    results = json.loads(json.dumps(again.to_coco(again.predict(paths), ids)))
    expected = coco_numbers(file, results, again.sigmas)
    for name in KEYPOINT_NUMBERS:
        if expected[name] >= 0:
            assert last[f"val_{name}"] == pytest.approx(expected[name], abs=1e-5), name


def test_predictions_as_rows_pictures_and_results(fitted, tmp_path, capsys):
    model, _, root = fitted
    model.score_threshold = 0.05
    one = next(one for one in model.predict(sorted(map(str, (root / "val").glob("*.png")))) if one.boxes)
    model.score_threshold = None
    row = one.as_row()
    assert list(row) == ["path", "count", "labels", "scores", "boxes", "keypoints"]
    assert list(row["keypoints"][0]) == list(marked.NAMES)
    assert json.loads(json.dumps(one.to_dict()))["keypoints"][0]["middle"] == list(one.keypoints[0][0])
    picture = Image.open(one.path).convert("RGB")
    point = ((30.0, 40.0, 0.9), (50.0, 60.0, 0.9), (70.0, 10.0, 0.1))
    record = Keypoints(one.path, ("it",), (0.9,), ((5, 5, 90, 75),), (3,), (point,), marked.NAMES, ((0, 1), (0, 2)))
    drawn = record.draw(picture)
    changed = (np.array(drawn) != np.array(picture)).any(-1)
    assert changed[40, 30]
    assert changed[60, 50]
    assert changed[50, 40]  # the line between them
    assert not changed[8:13, 68:73].any()
    first = record.to_coco(17)[0]
    assert (first["image_id"], first["keypoints"]) == (17, [30, 40, 0.9, 50, 60, 0.9, 70, 10, 0.1])
    output = tmp_path / "found.json"
    words = ["predict", str(root / "run" / "last.ckpt"), str(root / "val"), "--format", "coco", "--output", str(output)]
    assert run([*words, "--draw", str(tmp_path / "drawn")]) == 0
    assert all(len(found["keypoints"]) == 9 for found in json.loads(output.read_text()))
    assert len(list((tmp_path / "drawn").iterdir())) == 8


def test_keypoints_are_in_pixels_of_the_file_whatever_its_size(fitted, tmp_path):
    model, _, root = fitted
    model.score_threshold = 0.05
    path = next(one for one in sorted(map(str, (root / "val").glob("*.png"))) if model.predict(one).boxes)
    expected = model.predict(path)
    Image.open(path).resize((960, 800), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    found = model.predict(str(tmp_path / "large.png"))
    model.score_threshold = None
    for one, other in zip(found.keypoints[0], expected.keypoints[0], strict=True):
        assert [side / 10 for side in one[:2]] == pytest.approx(other[:2], abs=3)


@pytest.mark.long
def test_the_network_is_exported_as_it_is(fitted):
    model, _, _ = fitted
    model.eval()
    images = torch.randn(2, 3, 96, 96)
    made = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        for name, levels in made(images).items():
            for one, other in zip(levels, model(images)[name], strict=True):
                assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.long
def test_a_run_is_resumed_to_the_bit(tmp_path):
    own = {"augment": "light", "batch_size": 10}
    whole, first, again = (detector(lr_scheduler="constant") for _ in range(3))
    trainer(tmp_path / "whole", max_epochs=2).fit(whole, datamodule=data(tmp_path, **own))
    trainer(tmp_path / "part", max_epochs=2, max_steps=3).fit(first, datamodule=data(tmp_path, **own))
    path = tmp_path / "part" / "last.ckpt"
    trainer(tmp_path / "rest", max_epochs=2).fit(again, datamodule=data(tmp_path, **own), ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert whole.thresholds == again.thresholds


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["freeze", ("freeze_unfreeze", 1), ("lora", 2), ("layer_decay", 0.5)])
def test_strategies_train_detectors(tmp_path, strategy):
    model = detector()
    made = trainer(tmp_path / "run", max_epochs=2)
    made.finetune(model, datamodule=data(tmp_path), strategy=strategy, restore_best=False)
    assert len(model.predict(str(tmp_path / "val"))) == 8
    assert made.fit_run.history[-1]["train_loss"] < made.fit_run.history[0]["train_loss"]


@pytest.mark.long
def test_two_processes_train_and_measure_what_one_does(fitted, tmp_path):
    _, _, root = fitted
    found, rows = [], []
    for name, more, size in (("one", [], "8"), ("two", ["--distributed", "ddp", "--devices", "2"], "4")):
        words = ["validate", str(root / "run" / "last.ckpt"), str(root), "--json", "--accelerator", "cpu", *more]
        done = subprocess.run([sys.executable, "-m", "flashtask", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
        words = ["finetune", str(root), "--task", "keypoint_detection", "--backbone", "timm/test_resnet"]
        words += ["--no-pretrained", "--image-size", "96", "--epochs", "1", "--batch-size", size, "--augment", "none"]
        words += ["--set", "model.head_options.width=32", "--accelerator", "cpu", "--output-dir", str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, "-m", "flashtask", *words, "--precision", "32", *more],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        rows.append((tmp_path / name / "metrics.csv").read_text().splitlines())
    for name in ("val_map", "val_map_50", "val_mar", "val_f1", "val_pck", "val_box_map"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-6), name
    assert rows[0][0].split(",") == rows[1][0].split(",")
    assert len(rows[1]) == 2


# ---- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: detector(num_keypoints=0), "num_keypoints must be a whole number"),
        (lambda: detector(sigmas=[0]), "sigmas must be numbers above 0"),
        (lambda: detector(head="linear"), "the head 'linear' takes pooled"),
        (lambda: detector(num_classes=2, num_keypoints=3, head_options={"width": 30}), "a multiple of 16"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_other_keypoints_than_those_of_the_model_are_refused(fitted, tmp_path):
    _, _, root = fitted
    with pytest.raises(UsageError, match="num_keypoints is for 2 keypoints, but the data has 3"):
        trainer(tmp_path / "run").fit(detector(num_keypoints=2), datamodule=data(root))
    marked.coco(tmp_path / "val", 8, names=("a", "b", "c"))
    other = KeypointDetectionData.from_folders(val_folder=tmp_path / "val")
    with pytest.raises(FlashtaskError, match="the keypoints are a, b, c"):
        trainer(tmp_path / "v").validate(flashtask.load(root / "run" / "last.ckpt"), datamodule=other)


def test_the_task_is_asked_for_where_boxes_may_be_meant_too(tmp_path, capsys):
    marked.coco(tmp_path / "train", 8)
    assert run(["plan", str(tmp_path), "--backbone", "timm/test_resnet", "--no-pretrained"]) == 2
    assert "keypoint_detection" in capsys.readouterr().err
