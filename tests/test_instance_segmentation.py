"""`InstanceSegmentation`: masks are trained, measured as COCO does, stored, and predicted in pixels of the file."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
import squares
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import flashtask
from flashtask import Instances, InstanceSegmentation, InstanceSegmentationData, Trainer
from flashtask.cli import run
from flashtask.data.geometry import Geometry
from flashtask.data.images import load_image
from flashtask.data.masks import read_mask, rle_mask
from flashtask.data.shapes import shape_text
from flashtask.heads.condinst import MASK_LAYERS, NUM_PARAMETERS
from flashtask.tasks.box_loss import Places, assign
from flashtask.tasks.detection_metrics import COCO_NUMBERS
from flashtask.tasks.instance_loss import FoundObjects, instance_loss, objects_of_outputs
from flashtask.tasks.instance_metrics import InstanceScores
from flashtask.tasks.instance_segmentation import _objects_in_file

OPTIONS = {"image_size": 96, "learning_rate": 4e-3, "backbone_learning_rate": 4e-3}
HEAD = {"width": 32, "depth": 1}


def data(root, **options):
    for name, count, seed in (("train", 40, 0), ("val", 12, 1)):
        if not (root / name).exists():
            squares.coco(root / name, count, seed, has_masks=True)
    return InstanceSegmentationData.from_folders(
        root / "train", root / "val", **{"batch_size": 8, "num_workers": 0, **options}
    )


def segmenter(**options):
    torch.manual_seed(0)
    return InstanceSegmentation("timm/test_resnet", pretrained=False, **{"head_options": HEAD, **OPTIONS, **options})


def trainer(folder, **options):
    options = {"max_epochs": 1, "seed": 1, "precision": "32", "enable_progress_bar": False, **options}
    return Trainer(output_dir=folder, **options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model that was trained until it finds the squares; its run, and its data."""
    root = tmp_path_factory.mktemp("squares")
    model, own = segmenter(), data(root)
    made = trainer(root / "run", max_epochs=8, check_val_every_n_epoch=8)
    made.fit(model, datamodule=own)
    return model, made, root


def coco_numbers(file, results, kind):
    """The twelve numbers of pycocotools. For masks without the boxes, whose areas it would take for those of masks."""
    if kind == "segm":
        results = [{name: value for name, value in one.items() if name != "bbox"} for one in results]
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        measured = COCOeval(truth, truth.loadRes(results), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return dict(zip(COCO_NUMBERS, measured.stats.tolist(), strict=True))


# ---- masks and their loss


def outputs_of(parameters, features, strides=(8, 16)):
    """Outputs for an input of 64 x 64 in which every place has the same weights."""
    maps = [torch.cat([torch.full((1, 4, n, n), 8.0), torch.full((1, 2, n, n), -9.0)], dim=1) for n in (8, 4)]
    controllers = [parameters.reshape(1, -1, 1, 1).expand(1, NUM_PARAMETERS, n, n) for n in (8, 4)]
    return {"maps": maps, "controllers": controllers, "features": features}


def test_masks_are_drawn_by_the_weights_of_their_place():
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(NUM_PARAMETERS, generator=generator)
    features = torch.randn(1, 8, 8, 8, generator=generator)
    outputs = outputs_of(parameters, features)
    outputs["maps"][1][0, 5, 2, 1] = 3.0  # the place at x = 24, y = 40 of the second level
    (found,) = objects_of_outputs(outputs, (8, 16))
    assert len(found.boxes) == 1
    masks = found.masks()
    assert found.boxes[0, :4].tolist() == [16, 32, 32, 48]
    assert found.stride == 8
    # By hand, pixel by pixel.
    weights, start = [], 0
    for before, after in MASK_LAYERS:
        weights.append((parameters[start : start + before * after].reshape(after, before), before * after))
        start += before * after
        weights[-1] = (weights[-1][0], parameters[start : start + after])
        start += after
    for row, column in ((0, 0), (3, 5), (7, 7)):
        away = torch.tensor([(column + 0.5) * 8 - 24, (row + 0.5) * 8 - 40]) / (8 * 16)
        now = torch.cat([away, features[0, :, row, column]])
        for number, (weight, bias) in enumerate(weights):
            now = weight @ (now.relu() if number else now) + bias
        assert masks[0, row, column] == pytest.approx(now.item(), abs=1e-4)
    assert torch.allclose(found.masks(slice(2, 6), slice(1, 4)), masks[:, 1:4, 2:6], atol=1e-4)


def test_the_loss_of_masks_is_that_of_dice_counted_by_hand():
    # The network gives the distance to the place across, times 100: the right half of the picture seen from the place.
    parameters = torch.zeros(NUM_PARAMETERS)
    parameters[0] = parameters[80 + 8] = 100.0  # x to the first channel of each hidden layer
    parameters[80 + 8 + 64 + 8] = 1.0
    outputs = outputs_of(parameters, torch.zeros(1, 8, 8, 8))
    boxes = torch.tensor([[4.0, 4, 28, 28], [0.0, 0, 9, 9], [26.0, 20, 62, 60]])
    mask = torch.zeros(3, 64, 64, dtype=torch.bool)
    mask[0, 4:28, 4:28] = mask[2, 20:60, 26:62] = True
    target = {"boxes": boxes, "labels": torch.tensor([1, -1, 0]), "masks": mask}  # the second is a crowd
    found = instance_loss(outputs, [target], (8, 16))
    places = Places(outputs["maps"], (8, 16))
    learned = assign(places, boxes[[0, 2]])
    losses = []
    for place in (learned >= 0).nonzero()[:, 0].tolist():
        true = mask[2 * learned[place], 2::4, 2::4].float()  # in steps of 4 pixels, at their middles
        x, reach = places.points[place, 0], 8 * places.strides[place]
        across = ((torch.arange(8) + 0.5) * 8 - x) / reach * 100
        drawn = (across.relu() * 100).expand(1, 1, 8, 8)
        finer = torch.nn.functional.interpolate(drawn, (16, 16), mode="bilinear")[0, 0].sigmoid()
        losses.append(1 - 2 * (finer * true).sum() / (finer.square().sum() + true.sum() + 1e-5))
    assert len(losses) > 1
    assert found["mask"].item() == pytest.approx(sum(losses).item() / len(losses), abs=1e-5)
    assert list(found) == ["cls", "box", "mask"]
    # Layers with numbers mean the same.
    layers = {"masks": (mask[:1] * 5 + mask[2:] * 7).int(), "numbers": torch.tensor([5, 6, 7])}
    layers["masks"] = torch.cat([layers["masks"].where(~(mask[:1] & mask[2:]), 5), (mask[:1] & mask[2:]).int() * 7])
    assert instance_loss(outputs, [{**target, **layers}], (8, 16))["mask"].item() == found["mask"].item()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": mask[:0]}
    assert instance_loss(outputs, [empty], (8, 16))["mask"].item() == 0
    both = instance_loss({**outputs, **{n: _twice(outputs[n]) for n in outputs}}, [target, empty], (8, 16))
    assert both["mask"].item() == pytest.approx(found["mask"].item(), abs=1e-6)


def _twice(value):
    return [torch.cat([one, one]) for one in value] if isinstance(value, list) else torch.cat([value, value])


def test_masks_in_pixels_of_the_file_are_cut_off_beside_their_box():
    # Everything is inside; the picture of 200 x 100 lies in the input of 64 x 64 below a border of 16.
    place = Geometry((200, 100), (64, 32), 0, -16, (64, 64))
    box, features = torch.tensor([[16.0, 24, 32, 40, 0.9, 1]]), torch.zeros(8, 8, 8)
    parameters = torch.zeros(1, NUM_PARAMETERS)
    parameters[0, -1] = 3  # the last bias
    found = FoundObjects(box, torch.tensor([[24.0, 32]]), torch.tensor([8.0]), parameters, features, 8)
    rows, counts = _objects_in_file(found, place)
    assert rows[0, :4].tolist() == [50, 25, 100, 75]
    mask = rle_mask(counts[0], (200, 100))
    down, across = mask.nonzero()
    assert [across.min(), down.min(), across.max() + 1, down.max() + 1] == [36, 11, 114, 89]
    assert mask[11:89, 36:114].all()
    nothing, counts = _objects_in_file(found._replace(parameters=-parameters), place)
    assert len(nothing) == len(counts) == 0
    # What is drawn around the box alone is what would be drawn over the whole picture.
    generator = torch.Generator().manual_seed(0)
    features, parameters = (
        torch.randn(8, 8, 8, generator=generator),
        torch.randn(1, NUM_PARAMETERS, generator=generator),
    )
    found = found._replace(features=features, parameters=parameters)
    rows, counts = _objects_in_file(found, place)
    whole = (place.map_in_file(found.masks())[0] > 0).numpy()
    assert 0 < whole[11:89, 36:114].mean() < 1
    assert (rle_mask(counts[0], (200, 100))[11:89, 36:114] == whole[11:89, 36:114]).all()


# ---- metrics


def random_results(seed, images=10, classes=3):
    """True masks (polygons in parts, run lengths with holes, crowds), and masks near them, in COCO's own form."""
    generator = np.random.default_rng(seed)
    annotations, results, metric_inputs = [], [], []
    for image in range(images):
        width, height = size = int(generator.integers(60, 200)), int(generator.integers(60, 200))
        found, true = [], []
        for _ in range(int(generator.integers(0, 6))):
            side = generator.integers(6, min(size) // 2, 2)
            left, top = generator.integers(0, np.array(size) - side)
            right, bottom = left + side[0], top + side[1]
            mask = np.zeros((height, width), dtype=bool)
            mask[top:bottom, left:right] = True
            if generator.random() < 0.5:
                mask[top + side[1] // 3 : top + side[1] // 2, left + side[0] // 3 : left + side[0] // 2] = False
                shape = squares.runs(mask)
            else:
                middle, end = left + side[0] / 2, right + 0.3
                shape = [
                    [float(n) for n in (left + 0.7, top, middle - 1, top, middle - 1, bottom, left, bottom)],
                    [float(n) for n in (middle, top, end, top + 0.4, end, bottom, middle, bottom)],
                ]
                drawn = coco_masks.merge(coco_masks.frPyObjects(shape, height, width))
                mask = rle_mask(drawn["counts"].decode(), size)
            label, is_crowd = int(generator.integers(classes)), bool(generator.random() < 0.15)
            bbox = [int(n) for n in (left, top, side[0], side[1])]
            true.append((bbox, label, is_crowd, float(mask.sum()), shape))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": label + 5, "bbox": bbox}
                | {"area": float(mask.sum()), "iscrowd": int(is_crowd)}
                | {"segmentation": squares.runs(mask) if is_crowd else shape}
            )
            for _ in range(2):
                shift = generator.integers(-3, 4, 2)
                near = np.roll(mask, shift, axis=(0, 1)) & (generator.random(mask.shape) < generator.random())
                near[top, left] = True
                own = [float(n) for n in (left + shift[1], top + shift[0], side[0] + 1, side[1])]
                said = label if generator.random() < 0.8 else 0
                found.append((own, float(np.float32(generator.random())), said, squares.runs(near)))
                results.append(
                    {"image_id": image, "category_id": said + 5, "bbox": own, "score": found[-1][1]}
                    | {"segmentation": found[-1][3]}
                )
        metric_inputs.append((size, found, true))
    content = {
        "images": [{"id": n, "width": one[0][0], "height": one[0][1]} for n, one in enumerate(metric_inputs)],
        "annotations": annotations,
        "categories": [{"id": n + 5, "name": str(n)} for n in range(classes)],
    }
    return metric_inputs, content, results


def as_inputs(one):
    """What the metric takes of an image."""
    size, found, true = one
    corners = [[x, y, x + w, y + h, score, label] for (x, y, w, h), score, label, _ in found]
    boxes = torch.tensor([[x, y, x + w, y + h] for (x, y, w, h), *_ in true], dtype=torch.float32).reshape(-1, 4)
    target = {
        "boxes": boxes,
        "labels": torch.tensor([label for _, label, *_ in true], dtype=torch.long),
        "is_crowd": torch.tensor([crowd for _, _, crowd, *_ in true], dtype=torch.bool),
        "areas": torch.tensor([area for *_, area, _ in true]),
        "shapes": [shape_text(shape) for *_, shape in true],
        "size": torch.tensor(size),
    }
    return (torch.tensor(corners).reshape(-1, 6), [runs["counts"] for *_, runs in found]), target


@pytest.mark.parametrize("seed", [0, 1])
def test_the_twelve_numbers_of_masks_and_boxes_are_those_of_pycocotools(tmp_path, seed):
    inputs, content, results = random_results(seed)
    metric = InstanceScores(3)
    pairs = [as_inputs(one) for one in inputs]
    for start in range(0, len(pairs), 4):
        metric.update(*map(list, zip(*pairs[start : start + 4], strict=True)))
    metric.compute()
    (tmp_path / "truth.json").write_text(json.dumps(content))
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
        expected = coco_numbers(tmp_path / "truth.json", results, kind)
        assert any(value > 0 for value in expected.values())
        for name in COCO_NUMBERS:
            if expected[name] >= 0:
                assert metric.numbers[prefix + name] == pytest.approx(expected[name], abs=1e-6), (kind, name)
    assert len(metric.numbers["average_precision"]) == len(metric.chosen) == 3


def test_thresholds_are_chosen_by_the_overlap_of_masks():
    """The box of the second is right, but not its mask."""
    whole = np.zeros((20, 20), dtype=bool)
    whole[:10, :10] = True
    frame = whole.copy()
    frame[1:10, 1:10] = False
    target = {
        "boxes": torch.tensor([[0.0, 0, 10, 10]]),
        "labels": torch.tensor([0]),
        "is_crowd": torch.tensor([False]),
        "areas": torch.tensor([0.0]),
        "shapes": [shape_text(squares.runs(whole))],
        "size": torch.tensor((20, 20)),
    }
    found = [
        (torch.tensor([[0.0, 0, 10, 10, score, 0]]), [squares.runs(mask)["counts"]])
        for score, mask in ((0.9, whole), (0.4, frame))
    ]
    metric = InstanceScores(1)
    metric.update(found, [target, target])
    assert metric.compute() < 1
    assert metric.numbers["box_map"] == 1
    assert metric.chosen == (0.5,)
    assert metric.numbers["f1"] == pytest.approx(2 / 3)
    assert metric.numbers["precision"] == 1


# ---- training


def test_masks_of_squares_and_discs_are_learned(fitted):
    _, made, _ = fitted
    history = made.fit_run.history
    assert history[-1]["val_map_50"] > 0.8
    assert history[-1]["val_map"] > 0.2  # 0.29 to 0.35, by the processor
    parts = sum(history[-1][f"train_loss_{name}"] for name in ("cls", "box", "mask"))
    assert parts == pytest.approx(history[-1]["train_loss"])
    assert history[-1]["train_loss_mask"] < history[0]["train_loss_mask"] - 0.2


def counted(found, root):
    """F1 of predicted masks, counted from COCO's file and the predictions alone; the mean over classes."""
    content = json.loads((root / "val" / "annotations.json").read_text())
    names = {one["id"]: one["file_name"] for one in content["images"]}
    f1s = []
    for number in squares.CATEGORIES.values():
        hits = said = total = 0
        for one in found:
            own = [
                rle_mask(a["segmentation"]["counts"], (96, 80))
                for a in content["annotations"]
                if names[a["image_id"]] == one.path.rpartition("/")[2] and a["category_id"] == number
            ]
            total += len(own)
            for place, category in enumerate(one.category_ids):
                if category != number:
                    continue
                said += 1
                mask = one.mask(place)
                overlaps = [(mask & other).sum() / (mask | other).sum() for other in own]
                if overlaps and max(overlaps) >= 0.5:
                    hits += 1
                    del own[int(np.argmax(overlaps))]
        f1s.append(2 * hits / (said + total))
    return sum(f1s) / len(f1s)


def test_one_number_by_every_way(fitted, tmp_path, capsys):
    model, made, root = fitted
    paths = sorted(map(str, (root / "val").glob("*.png")))
    last = made.fit_run.history[-1]
    (measured,) = trainer(tmp_path / "v").validate(model, datamodule=data(root), verbose=False)
    capsys.readouterr()
    words = ["--batch-size", "8", "--json"]
    assert run(["validate", str(root / "run" / "last.ckpt"), str(root), *words]) == 0
    of_command = json.loads(capsys.readouterr().out)
    for name in ("val_map", "val_map_50", "val_box_map", "val_f1", "val_loss", "val_loss_mask"):
        assert measured[name] == pytest.approx(last[name], abs=1e-5), name
        assert of_command[name] == pytest.approx(last[name], abs=1e-5), name
    again = flashtask.load(root / "run" / "last.ckpt")
    saved = flashtask.load(model.save_pretrained(tmp_path / "saved"))
    assert isinstance(saved, InstanceSegmentation)
    assert model.thresholds == again.thresholds == saved.thresholds
    for one in (model, again, saved):
        assert one.labels == ("square", "disc")
        assert counted(one.predict(paths), root) == pytest.approx(last["val_f1"], abs=1e-5)
    # What the command writes is what `predict` gives.
    output = tmp_path / "results.json"
    words = ["--format", "coco", "--output", str(output), "--draw", str(tmp_path / "drawn")]
    assert run(["predict", str(root / "run" / "last.ckpt"), *paths, *words]) == 0
    written, expected = json.loads(output.read_text()), again.to_coco(again.predict(paths))
    assert len(written) == len(expected) > 5
    for one, other in zip(written, expected, strict=True):
        assert (one["file_name"], one["segmentation"]) == (other["file_name"], other["segmentation"])
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 12
    # Every object, measured by pycocotools against the user's own file.
    again.score_threshold = 0
    file = root / "val" / "annotations.json"
    ids = {str(root / "val" / one["file_name"]): one["id"] for one in json.loads(file.read_text())["images"]}
    results = again.to_coco(again.predict(paths), ids)
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
        expected = coco_numbers(file, results, kind)
        for name in COCO_NUMBERS:
            if expected[name] >= 0 and f"val_{prefix}{name}" in last:
                assert last[f"val_{prefix}{name}"] == pytest.approx(expected[name], abs=1e-5), (kind, name)


@pytest.mark.long
def test_metrics_of_each_class(fitted, tmp_path):
    model, _, root = fitted
    model.per_class = True
    (measured,) = trainer(tmp_path / "v").validate(model, datamodule=data(root), verbose=False)
    each = [measured[f"val_average_precision_{name}"] for name in model.labels]
    assert sum(each) / 2 == pytest.approx(measured["val_map"], abs=1e-6)
    assert sum(measured[f"val_f1_{name}"] for name in model.labels) / 2 == pytest.approx(measured["val_f1"], abs=1e-6)


def test_predictions_as_rows_pictures_and_label_images(fitted, tmp_path):
    model, _, root = fitted
    one = next(one for one in model.predict(sorted(map(str, (root / "val").glob("*.png")))) if len(one.boxes) > 1)
    row = one.as_row()
    assert list(row) == ["path", "count", "labels", "scores", "boxes", "areas"]
    assert row["areas"] == [one.mask(number).sum() for number in range(row["count"])]
    first, masks = one.to_coco(17)[0], json.loads(json.dumps(one.to_dict()))["masks"]
    assert first["segmentation"] == masks[0]
    assert len(masks) == row["count"] > 1
    assert squares.runs(one.mask(0)) == first["segmentation"]
    picture = load_image(one.path)
    drawn = one.draw(picture)
    assert drawn.size == picture.size
    changed = (np.array(drawn) != np.array(picture)).any(-1)
    assert changed[one.mask(0)].mean() > 0.9
    assert one._repr_png_()[:4] == b"\x89PNG"
    Instances.write("png", [one], tmp_path, {one.path: "a/first"})
    values, _, _ = read_mask(str(tmp_path / "a" / "first.png"))
    assert values.shape == (80, 96)
    assert (values == 1).sum() == one.mask(0).sum()
    assert set(np.unique(values)) <= set(range(len(one.masks) + 1))
    empty = Instances(None, (), (), (), (), (), (4, 3))
    assert empty.lines() == ["no objects"]
    assert np.array(empty.as_image()).shape == (3, 4)


def test_masks_are_in_pixels_of_the_file_whatever_its_size(fitted, tmp_path):
    model, _, root = fitted
    path = next(one for one in sorted(map(str, (root / "val").glob("*.png"))) if model.predict(one).boxes)
    expected = model.predict(path)
    Image.open(path).resize((480, 400), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    found = model.predict(str(tmp_path / "large.png"))
    assert found.labels == expected.labels
    assert found.size == (480, 400)
    one, other = found.mask(0)[2::5, 2::5], expected.mask(0)
    assert (one & other).sum() / (one | other).sum() > 0.8


@pytest.mark.long
def test_batches_of_a_loader_of_ones_own(fitted, tmp_path):
    """`boxes`, `labels` and a mask of each box are enough to measure; pixels are those of the input."""
    model, made, root = fitted
    images, targets = [], []
    prepared = data(root, preprocessing=model.preprocessing)
    prepared.setup("fit")
    for image, target in (made_sample for made_sample in map(prepared._datasets["val"].__getitem__, range(12))):
        masks = (
            torch.stack([(target["masks"] == n).any(0) for n in target["numbers"]]) if len(target["numbers"]) else None
        )
        images.append(image)
        own = {"boxes": target["boxes"], "labels": target["labels"]}
        targets.append({**own, "masks": torch.zeros(0, 96, 96, dtype=torch.bool) if masks is None else masks})
    loader = [(torch.stack(images), targets)]
    (measured,) = trainer(tmp_path / "v", logger=False).validate(model, loader, verbose=False)
    last = made.fit_run.history[-1]
    assert measured["val_map_50"] == pytest.approx(last["val_map_50"], abs=0.1)
    assert measured["val_loss_mask"] > 0


@pytest.mark.long
def test_the_network_is_exported_as_it_is(fitted):
    model, _, _ = fitted
    model.eval()
    images = torch.randn(2, 3, 96, 96)
    made = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        own, theirs = model(images), made(images)
    assert list(own) == ["maps", "controllers", "features"]
    for one, other in zip(torch.utils._pytree.tree_leaves(own), torch.utils._pytree.tree_leaves(theirs), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert [tuple(one.shape) for one in own["maps"]] == [(2, 6, 12, 12), (2, 6, 6, 6), (2, 6, 3, 3), (2, 6, 2, 2)]
    assert own["features"].shape == (2, 8, 12, 12)
    assert {one.shape[1] for one in own["controllers"]} == {169}


@pytest.mark.long
def test_label_images_from_the_command_line(tmp_path, capsys):
    squares.label_images(tmp_path / "data" / "train")
    squares.label_images(tmp_path / "data" / "val", seed=1)
    words = ["--task", "instance_segmentation", "--backbone", "timm/test_resnet", "--no-pretrained", "--epochs", "1"]
    words += ["--image-size", "96", "--batch-size", "8", "--output-dir", str(tmp_path / "run"), "--num-workers", "0"]
    assert run(["finetune", str(tmp_path / "data"), *words]) == 0
    said = capsys.readouterr().err
    assert "train: label images, images/ and masks/: 8 images" in said
    model = flashtask.load(tmp_path / "run")
    assert model.labels == ("object",)
    output = ["--format", "png", "--output", str(tmp_path / "found")]
    assert run(["predict", str(tmp_path / "run"), str(tmp_path / "data" / "val" / "images"), *output]) == 0
    found = sorted((tmp_path / "found").glob("*.png"))
    assert [file.name for file in found] == [f"{number:03}.png" for number in range(8)]
    assert [read_mask(str(file))[0].shape for file in found] == [(80, 96)] * 8


@pytest.mark.long
def test_a_run_is_resumed_to_the_bit(tmp_path):
    options = {"lr_scheduler": "constant"}
    own = {"augment": "light", "batch_size": 10}
    whole, first, again = (segmenter(**options) for _ in range(3))
    trainer(tmp_path / "whole", max_epochs=2).fit(whole, datamodule=data(tmp_path, **own))
    trainer(tmp_path / "part", max_epochs=2, max_steps=3).fit(first, datamodule=data(tmp_path, **own))
    path = tmp_path / "part" / "last.ckpt"
    trainer(tmp_path / "rest", max_epochs=2).fit(again, datamodule=data(tmp_path, **own), ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert whole.thresholds == again.thresholds


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["freeze", ("freeze_unfreeze", 1), "no_freeze", ("lora", 2)])
def test_strategies_train_masks(tmp_path, strategy):
    model = segmenter()
    made = trainer(tmp_path / "run", max_epochs=2)
    made.finetune(model, datamodule=data(tmp_path), strategy=strategy, restore_best=False)
    assert len(model.predict(str(tmp_path / "val"))) == 12
    assert made.fit_run.history[-1]["train_loss"] < made.fit_run.history[0]["train_loss"]


@pytest.mark.long
def test_two_processes_measure_what_one_does(fitted):
    _, _, root = fitted
    found = []
    for more in ([], ["--distributed", "ddp", "--devices", "2"]):
        words = ["validate", str(root / "run" / "last.ckpt"), str(root), "--json", "--accelerator", "cpu", *more]
        done = subprocess.run([sys.executable, "-m", "flashtask", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    for name in ("val_map", "val_map_50", "val_box_map", "val_mar_100", "val_f1", "val_precision", "val_recall"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-6), name


@pytest.mark.long
@pytest.mark.parametrize("name", ["efficientnet_lite0", "torchvision/resnet18", "timm/test_vit"])
def test_backbones_of_all_kinds_carry_the_head(name):
    size = 160 if "vit" in name else 96
    model = InstanceSegmentation(name, num_classes=3, pretrained=False, image_size=size, head_options=HEAD).eval()
    outputs = model(torch.zeros(1, 3, size, size))
    assert [one.shape[1] for one in outputs["maps"]] == [7] * len(outputs["maps"])
    assert outputs["features"].shape[-1] == outputs["maps"][0].shape[-1]
