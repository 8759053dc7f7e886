"""`ObjectDetector`: boxes are trained, measured as COCO measures them, stored, and predicted in pixels of the file."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import squares
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import flashtask
from flashtask import Boxes, ObjectDetectionData, ObjectDetector, Trainer
from flashtask.cli import run
from flashtask.core.errors import FlashtaskError, UsageError
from flashtask.tasks.box_loss import Places, assign, boxes_of_outputs, detection_loss
from flashtask.tasks.detection_metrics import COCO_NUMBERS, DetectionScores

OPTIONS = {"image_size": 96, "learning_rate": 4e-3, "backbone_learning_rate": 4e-3}
HEAD = {"width": 32, "depth": 1}


def data(root, **options):
    for name, count, seed in (("train", 40, 0), ("val", 12, 1)):
        if not (root / name).exists():
            squares.coco(root / name, count, seed)
    return ObjectDetectionData.from_folders(
        root / "train", root / "val", **{"batch_size": 8, "num_workers": 0, **options}
    )


def detector(**options):
    torch.manual_seed(0)
    return ObjectDetector("timm/test_resnet", pretrained=False, **{"head_options": HEAD, **OPTIONS, **options})


def trainer(folder, **options):
    options = {"max_epochs": 1, "seed": 1, "precision": "32", "enable_progress_bar": False, **options}
    return Trainer(output_dir=folder, **options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A detector that was trained until it finds the squares; its run, and its data."""
    root = tmp_path_factory.mktemp("squares")
    model, own = detector(), data(root)
    made = trainer(root / "run", max_epochs=6)
    made.fit(model, datamodule=own)
    return model, made, root


def coco_numbers(file, results):
    """The twelve numbers of pycocotools."""
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        measured = COCOeval(truth, truth.loadRes(results), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return dict(zip(COCO_NUMBERS, measured.stats.tolist(), strict=True))


# ---- assignment and loss


def by_hand(points, strides, counts, boxes):
    """ATSS, one place and one box after the other."""
    learned, most = [-1] * len(points), [-1.0] * len(points)
    for number, (left, top, right, bottom) in enumerate(boxes):
        x, y = (left + right) / 2, (top + bottom) / 2
        candidates, start = [], 0
        for count in counts:
            level = sorted(range(start, start + count), key=lambda p: (points[p][0] - x) ** 2 + (points[p][1] - y) ** 2)
            candidates += level[:9]
            start += count
        overlaps = []
        for place in candidates:
            (px, py), half = points[place], 4 * strides[place]
            wide = max(0, min(right, px + half) - max(left, px - half))
            high = max(0, min(bottom, py + half) - max(top, py - half))
            area = (right - left) * (bottom - top) + 4 * half**2 - wide * high
            overlaps.append(wide * high / area)
        mean = sum(overlaps) / len(overlaps)
        least = mean + (sum((one - mean) ** 2 for one in overlaps) / (len(overlaps) - 1)) ** 0.5
        for place, overlap in zip(candidates, overlaps, strict=True):
            px, py = points[place]
            if overlap >= least and left < px < right and top < py < bottom and overlap > most[place]:
                learned[place], most[place] = number, overlap
    return learned


def places(size=128, strides=(8, 16, 32)):
    return Places([torch.zeros(1, 1, size // stride, size // stride) for stride in strides], strides)


def test_places_are_assigned_as_by_a_loop_by_hand():
    found = places()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        corners = torch.rand(4, 2, generator=generator) * 80
        # Not on a grid, so no two places are equally far from a middle.
        boxes = torch.cat([corners, corners + 21 + torch.rand(4, 2, generator=generator) * 40], dim=1)
        expected = by_hand(found.points.tolist(), found.strides.tolist(), found.counts, boxes.tolist())
        assert assign(found, boxes).tolist() == expected
        assert len(set(expected)) > 1


def test_a_box_smaller_than_the_distance_of_places_is_learned_by_the_nearest():
    found = places()
    learned = assign(found, torch.tensor([[17.5, 17.5, 19.0, 19.0]]))
    (place,) = (learned >= 0).nonzero()[:, 0].tolist()
    assert found.points[place].tolist() == [20.0, 20.0]
    assert assign(found, torch.zeros(0, 4)).tolist() == [-1] * len(learned)


def test_nothing_is_learned_in_a_crowd_and_images_without_objects_teach_that_there_is_none():
    torch.manual_seed(0)
    outputs = [torch.randn(1, 6, 8, 8), torch.randn(1, 6, 4, 4)]
    outputs = [torch.cat([one[:, :4].exp() * 8, one[:, 4:]], dim=1) for one in outputs]
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    crowd = {"boxes": torch.tensor([[0.0, 0.0, 64.0, 64.0]]), "labels": torch.tensor([-1])}
    losses = detection_loss(outputs, [empty], (8, 16))
    assert losses["cls"] > 0
    assert losses["box"] == 0
    assert detection_loss(outputs, [crowd], (8, 16))["cls"] == 0
    half = {"boxes": torch.tensor([[0.0, 0.0, 32.0, 64.0]]), "labels": torch.tensor([-1])}
    assert 0 < detection_loss(outputs, [half], (8, 16))["cls"] < losses["cls"]


def test_perfect_outputs_lose_nothing_and_give_the_boxes_back():
    strides, boxes = (8, 16), torch.tensor([[5.0, 7.0, 33.0, 30.0], [30.0, 20.0, 60.0, 62.0]])
    found = places(64, strides)
    learned = assign(found, boxes)
    distances = torch.full((len(found.points), 4), 4.0)
    logits = torch.full((len(found.points), 2), -20.0)
    for place in (learned >= 0).nonzero()[:, 0].tolist():
        box = boxes[learned[place]]
        distances[place] = torch.cat([found.points[place] - box[:2], box[2:] - found.points[place]])
        logits[place, learned[place]] = 20.0
    flat = torch.cat([distances, logits], dim=1).T
    outputs = [flat[:, :64].reshape(1, 6, 8, 8), flat[:, 64:].reshape(1, 6, 4, 4)]
    losses = detection_loss(outputs, [{"boxes": boxes, "labels": torch.tensor([0, 1])}], strides)
    assert sum(losses.values()) < 1e-4
    (rows,) = boxes_of_outputs(outputs, strides)
    assert torch.allclose(rows[rows[:, 5].argsort(), :4], boxes, atol=1e-4)


# ---- metrics


def random_results(seed, images=12, classes=3):
    """True boxes with crowds, and boxes that were found near them, for COCO's file and for the metric."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.rand(*size, generator=generator)

    truth, found, annotations, results = [], [], [], []
    for image in range(images):
        count = int(draw(1) * 6)
        corners = (draw(count, 2) * 300).round()
        boxes = torch.cat([corners, corners + 4 + (draw(count, 2) ** 2 * 200).round()], dim=1)
        labels, is_crowd = (draw(count) * classes).long(), draw(count) < 0.15
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) * 0.8
        truth.append({"boxes": boxes, "labels": labels, "is_crowd": is_crowd, "areas": areas})
        near = boxes.repeat(3, 1) + (draw(3 * count, 4) * 16 - 8).round()
        near[:, 2:] = near[:, 2:].maximum(near[:, :2] + 1)
        scores, said = draw(len(near)), torch.where(draw(len(near)) < 0.8, labels.repeat(3), 0)
        found.append(torch.cat([near, scores[:, None], said[:, None].float()], dim=1))
        for box, label, crowd, area in zip(
            boxes.tolist(), labels.tolist(), is_crowd.tolist(), areas.tolist(), strict=True
        ):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": label + 5, "bbox": bbox, "area": area}
                | {"iscrowd": int(crowd)}
            )
        for box, score, label in zip(near.tolist(), scores.tolist(), said.tolist(), strict=True):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": image, "category_id": label + 5, "bbox": bbox, "score": score})
    content = {"images": [{"id": n} for n in range(images)], "annotations": annotations}
    content["categories"] = [{"id": n + 5, "name": str(n)} for n in range(classes)]
    return found, truth, content, results


@pytest.mark.parametrize("seed", [0, 1])
def test_the_twelve_numbers_are_those_of_pycocotools(tmp_path, seed):
    found, truth, content, results = random_results(seed)
    metric = DetectionScores(3)
    for start in (0, 5):
        metric.update(found[start : start + 5], truth[start : start + 5])
    metric.update(found[10:], truth[10:])
    metric.compute()
    (tmp_path / "truth.json").write_text(json.dumps(content))
    expected = coco_numbers(tmp_path / "truth.json", results)
    for name in COCO_NUMBERS:
        assert metric.numbers[name] == pytest.approx(expected[name], abs=1e-6), name


def test_thresholds_are_those_with_the_best_f1_counted_by_hand():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    truth = {
        "boxes": box,
        "labels": torch.tensor([0]),
        "is_crowd": torch.tensor([False]),
        "areas": torch.tensor([100.0]),
    }
    away = [20.0, 20.0, 30.0, 30.0]
    found = [
        torch.tensor([[0, 0, 10, 10, 0.9, 0], [0, 0, 10, 9, 0.35, 0]]),  # the second finds nothing that is left
        torch.tensor([[0, 0, 10, 10, 0.6, 0], [*away, 0.45, 0]]),
        torch.tensor([[0, 0, 10, 10, 0.2, 0], [*away, 0.21, 0], [*away, 0.22, 1]]),
    ]
    metric = DetectionScores(2)
    metric.update(found, [truth] * 3)
    metric.compute()
    assert metric.chosen[0] == 0.5  # 2 of 3 are found, and nothing else
    assert metric.numbers["f1_by_class"][0] == pytest.approx(2 * 2 / (2 + 3))
    fixed = DetectionScores(2, (0.1, 0.9))
    fixed.update(found, [truth] * 3)
    fixed.compute()
    assert fixed.numbers["f1_by_class"][0] == pytest.approx(2 * 3 / (6 + 3))


# ---- training


def test_a_detector_learns_squares_and_discs(fitted):
    _, made, _ = fitted
    history = made.fit_run.history
    assert history[-1]["val_map_50"] > 0.8
    assert history[-1]["train_loss_cls"] + history[-1]["train_loss_box"] == pytest.approx(history[-1]["train_loss"])
    assert history[-1]["train_loss_box"] < history[0]["train_loss_box"]


def counted(found, root):
    """F1 of predicted boxes, counted from COCO's file and the predictions alone; the mean over classes."""
    content = json.loads((root / "val" / "annotations.json").read_text())
    names = {one["id"]: one["file_name"] for one in content["images"]}
    f1s = []
    for number in squares.CATEGORIES.values():
        hits = said = total = 0
        for one in found:
            own = [
                [x, y, x + w, y + h]
                for a in content["annotations"]
                if names[a["image_id"]] == one.path.rpartition("/")[2] and a["category_id"] == number
                for x, y, w, h in [a["bbox"]]
            ]
            total += len(own)
            for box, category in zip(one.boxes, one.category_ids, strict=True):
                if category != number:
                    continue
                said += 1
                overlaps = [_iou(box, other) for other in own]
                if overlaps and max(overlaps) >= 0.5:
                    hits += 1
                    del own[overlaps.index(max(overlaps))]
        f1s.append(2 * hits / (said + total))
    return sum(f1s) / len(f1s)


def _iou(one, two):
    wide = min(one[2], two[2]) - max(one[0], two[0])
    high = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(0, wide) * max(0, high)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return shared / (sum(areas) - shared)


def test_one_number_by_every_way(fitted, tmp_path, capsys):
    model, made, root = fitted
    paths = sorted(map(str, (root / "val").glob("*.png")))
    last = made.fit_run.history[-1]
    (measured,) = trainer(tmp_path / "v").validate(model, datamodule=data(root), verbose=False)
    capsys.readouterr()
    words = ["--batch-size", "8", "--json"]  # the loss of a batch is a mean over its places, not over its images
    assert run(["validate", str(root / "run" / "last.ckpt"), str(root), *words]) == 0
    of_command = json.loads(capsys.readouterr().out)
    for name in ("val_map", "val_map_50", "val_f1", "val_loss"):
        assert measured[name] == pytest.approx(last[name], abs=1e-5), name
        assert of_command[name] == pytest.approx(last[name], abs=1e-5), name
    again = flashtask.load(root / "run" / "last.ckpt")
    saved = flashtask.load(model.save_pretrained(tmp_path / "saved"))
    assert model.thresholds == again.thresholds == saved.thresholds
    for one in (model, again, saved):
        assert one.labels == ("square", "disc")  # in the order of COCO's ids
        assert counted(one.predict(paths), root) == pytest.approx(last["val_f1"], abs=1e-5)
    # Every box, as COCO's list of results, measured by pycocotools against the user's own file.
    again.score_threshold = 0
    found = again.predict(paths)
    file = root / "val" / "annotations.json"
    ids = {str(root / "val" / one["file_name"]): one["id"] for one in json.loads(file.read_text())["images"]}
    expected = coco_numbers(file, again.to_coco(found, ids))
    for name in COCO_NUMBERS:
        if expected[name] >= 0:
            assert last[f"val_{name}"] == pytest.approx(expected[name], abs=1e-5), name


def test_metrics_of_each_class(fitted, tmp_path):
    model, _, root = fitted
    model.per_class = True
    (measured,) = trainer(tmp_path / "v").validate(model, datamodule=data(root), verbose=False)
    each = [measured[f"val_average_precision_{name}"] for name in model.labels]
    assert sum(each) / 2 == pytest.approx(measured["val_map"], abs=1e-6)
    assert sum(measured[f"val_f1_{name}"] for name in model.labels) / 2 == pytest.approx(measured["val_f1"], abs=1e-6)


def test_predictions_as_rows_pictures_and_results(fitted):
    model, _, root = fitted
    one = next(one for one in model.predict(sorted(map(str, (root / "val").glob("*.png")))) if len(one.boxes) > 1)
    row = one.as_row()
    assert list(row) == ["path", "count", "labels", "scores", "boxes"]
    assert row["count"] == len(row["boxes"]) == len(row["scores"]) > 1
    assert json.loads(json.dumps(one.to_dict()))["boxes"] == [list(box) for box in one.boxes]
    picture = Image.open(one.path)
    drawn = one.draw(picture)
    assert drawn.size == picture.size
    left, top, right, _ = one.boxes[0]
    line = [drawn.getpixel((x, int(top))) for x in range(int(left) + 1, int(right) - 1)]
    assert any(pixel == line[-1] for pixel in line[:-1])
    assert one._repr_png_()[:4] == b"\x89PNG"
    first = one.to_coco(17)[0]
    assert first["image_id"] == 17
    assert first["category_id"] == squares.CATEGORIES[one.labels[0]]
    assert first["bbox"][2:] == pytest.approx([one.boxes[0][2] - left, one.boxes[0][3] - top])
    assert Boxes(None, (), (), (), ()).lines() == ["no objects"]


def test_boxes_are_in_pixels_of_the_file_whatever_its_size(fitted, tmp_path):
    model, _, root = fitted
    predicted = [model.predict(str(one)) for one in sorted((root / "val").glob("*.png"))]
    expected = max((one for one in predicted if one.boxes), key=lambda one: min(one.scores))  # far above thresholds
    path = expected.path
    Image.open(path).resize((960, 800), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    found = model.predict(str(tmp_path / "large.png"))
    assert found.labels == expected.labels
    for one, other in zip(found.boxes, expected.boxes, strict=True):
        assert [side / 10 for side in one] == pytest.approx(other, abs=2)


@pytest.mark.long
def test_the_network_is_exported_as_it_is(fitted):
    model, _, _ = fitted
    model.eval()
    images = torch.randn(2, 3, 96, 96)
    made = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        for one, other in zip(made(images), model(images), strict=True):
            assert torch.allclose(one, other, atol=1e-4)
    assert [tuple(one.shape) for one in model(images)] == [(2, 6, 12, 12), (2, 6, 6, 6), (2, 6, 3, 3), (2, 6, 2, 2)]


@pytest.mark.long
def test_a_run_is_resumed_to_the_bit(tmp_path):
    options = {"lr_scheduler": "constant"}
    own = {"augment": "light", "batch_size": 10}
    whole, first, again = (detector(**options) for _ in range(3))
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
    before = model.head
    assert before is None
    made = trainer(tmp_path / "run", max_epochs=2)
    made.finetune(model, datamodule=data(tmp_path), strategy=strategy, restore_best=False)
    assert len(model.predict(str(tmp_path / "val"))) == 12
    assert made.fit_run.history[-1]["train_loss"] < made.fit_run.history[0]["train_loss"]


@pytest.mark.long
def test_two_processes_measure_what_one_does(fitted, capsys):
    _, _, root = fitted
    words = ["validate", str(root / "run" / "last.ckpt"), str(root), "--json", "--accelerator", "cpu"]
    assert run(words) == 0
    one = json.loads(capsys.readouterr().out)
    command = [sys.executable, "-m", "flashtask", *words, "--distributed", "ddp", "--devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    for name in ("val_map", "val_map_50", "val_mar_100", "val_f1", "val_precision", "val_recall"):
        assert two[name] == pytest.approx(one[name], abs=1e-6), name


@pytest.mark.long
@pytest.mark.parametrize("name", ["efficientnet_lite0", "torchvision/resnet18", "timm/test_vit", "timm/test_convnext"])
def test_backbones_of_all_kinds_carry_the_head(name):
    size = 160 if "vit" in name else 96
    model = ObjectDetector(name, num_classes=3, pretrained=False, image_size=size, head_options=HEAD).eval()
    outputs = model(torch.zeros(1, 3, size, size))
    assert [one.shape[1] for one in outputs] == [7] * len(outputs)
    assert model.head.strides[-1] == 64
    for one, stride in zip(outputs, model.head.strides, strict=True):
        assert one.shape[-1] == -(-size // stride)


# ---- other classes


def test_other_classes_keep_what_is_known_of_those_that_remain(fitted):
    _, _, root = fitted
    known = flashtask.load(root / "run" / "last.ckpt")
    model = ObjectDetector.from_pretrained(root / "run" / "last.ckpt", labels=["disc", "star"])
    assert str(flashtask.load(root / "run" / "last.ckpt").change_labels(["disc", "star"])) == (
        "kept 1 of 2 classes (disc); new: star; dropped: square"
    )
    assert (model.labels, model.num_classes, model.thresholds) == (("disc", "star"), 2, None)
    assert model.category_ids[0] == squares.CATEGORIES["disc"]
    assert model.category_ids[1] not in squares.CATEGORIES.values()
    assert torch.equal(model.head.classes.weight[0], known.head.classes.weight[1])
    assert torch.equal(model.head.boxes.weight, known.head.boxes.weight)
    assert model.head.classes.bias[1].item() == pytest.approx(-4.595, abs=1e-3)  # a new class begins with the prior
    path = sorted(map(str, (root / "val").glob("*.png")))[0]
    model.score_threshold = known.thresholds[1]

    def discs(one):
        found = one.predict(path)
        return [box for box, name in zip(found.boxes, found.labels, strict=True) if name == "disc"]

    assert discs(model) == discs(known)


def test_a_fit_on_other_classes_changes_them(fitted, tmp_path, capsys):
    _, _, root = fitted
    content = json.loads((root / "train" / "annotations.json").read_text())
    next(one for one in content["categories"] if one["name"] == "square")["name"] = "ring"
    (tmp_path / "ring.json").write_text(json.dumps(content))
    other = ObjectDetectionData.from_coco(root / "train", tmp_path / "ring.json", batch_size=8, num_workers=0)
    model = flashtask.load(root / "run" / "last.ckpt")
    trainer(tmp_path / "run", max_steps=1).finetune(model, datamodule=other)
    assert "kept 1 of 2 classes (disc); new: ring; dropped: square" in capsys.readouterr().err
    again = flashtask.load(tmp_path / "run" / "last.ckpt")
    assert again.labels == model.labels == ("ring", "disc")
    assert again.category_ids == (squares.CATEGORIES["square"], squares.CATEGORIES["disc"])
    with pytest.raises(UsageError, match="the classes need names"):
        again.change_classes(num_classes=3)


# ---- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: detector(score_threshold=2), "score_threshold must be from 0 to 1"),
        (lambda: detector(head="linear"), "the head 'linear' takes pooled"),
        (lambda: detector(num_classes=2, head_options={"width": 30}), "a multiple of 16"),
        (lambda: detector(num_classes=2, head_options={"least_stride": 128}), "none from 128 to 64"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_other_numbers_of_classes_and_other_classes_are_refused(fitted, tmp_path):
    _, _, root = fitted
    with pytest.raises(UsageError, match="num_classes=3, but the data has 2 classes: square, disc"):
        trainer(tmp_path / "run").fit(detector(num_classes=3), datamodule=data(root))
    content = json.loads((root / "val" / "annotations.json").read_text())
    content["categories"][0]["name"] = "ring"
    (tmp_path / "ring.json").write_text(json.dumps(content))
    other = ObjectDetectionData.from_coco(val_folder=root / "val", val_ann_file=tmp_path / "ring.json")
    with pytest.raises(FlashtaskError, match="unknown to the model"):
        trainer(tmp_path / "v").validate(flashtask.load(root / "run" / "last.ckpt"), datamodule=other)
