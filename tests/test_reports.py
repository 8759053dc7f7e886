"""The page of a run: the same numbers as validate and predict, one file without network, in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import marked
import numpy as np
import pytest
import squares
import torch
from browser import needs_browser, opened
from PIL import Image
from small import COLOURS, colour_folders, quiet
from third_task import AngleData, AnglePredictor

from flashtask import (
    FinishedRun,
    ImageClassificationData,
    ImageClassifier,
    ImageRegressionData,
    ImageRegressor,
    InstanceSegmentation,
    InstanceSegmentationData,
    KeypointDetectionData,
    KeypointDetector,
    ObjectDetectionData,
    ObjectDetector,
    SemanticSegmentation,
    SemanticSegmentationData,
    Trainer,
)
from flashtask.cli import run
from flashtask.core.errors import FlashtaskError, UsageError
from flashtask.data.inputs import read_inputs
from flashtask.data.transforms import eval_transform
from flashtask.reports.charts import history_charts
from flashtask.reports.evaluation import Evaluation
from flashtask.reports.history import History
from flashtask.reports.judgement import Judged, Judgement, Pair, Scoring
from flashtask.reports.report import Album
from flashtask.reports.several import OneRun, SeveralRuns, mean_interval
from flashtask.reports.statistics import calibration, class_counts, mean_f1, mean_iou, precision_recall, share_right
from flashtask.tasks.explanation import heat_maps
from flashtask.tasks.judging import judged_boxes

OPTIONS = "--backbone timm/test_resnet --no-pretrained --epochs 2 --batch-size 8 --num-workers 0 --lr 0.05 --quiet"


def mixed_folders(root: Path) -> Path:
    """Three colours with some pictures in the wrong folder, so that there are mistakes; names need escaping."""
    for part, count in (("train", 12), ("val", 8)):
        colour_folders(root / part, each=count, classes=tuple(COLOURS), size=32)
        (root / part / "red" / "0.png").rename(root / part / "blue" / "<b>&amp;.png")
        (root / part / "red" / "1.png").rename(root / part / "green" / "copy of red.png")
    return root


@pytest.fixture(scope="module")
def classified(tmp_path_factory, reports):
    """A run that made some mistakes, by the command line, with its page."""
    root = mixed_folders(tmp_path_factory.mktemp("mixed"))
    assert run(["finetune", str(root), *OPTIONS.split(), "--output-dir", str(root / "RUN")]) == 0
    return root


def report_of(argv, capsys, file):
    """What `flashtask report --format json` writes."""
    assert run(["report", *map(str, argv), "--format", "json", "--output", str(file)]) == 0
    capsys.readouterr()
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def looked_at():
    """Opens a page on a phone and a desk, in the light and in the dark: no errors, no requests, nothing sticks out."""

    def look(page):
        for width in (390, 1280):
            for dark in (False, True):
                tab.errors.clear()
                tab.requests.clear()
                tab.open(page.as_uri(), width=width, dark=dark)
                assert tab.run("document.documentElement.scrollWidth") <= width
                back = tab.run("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", back))) < 200) is dark
                assert tab.errors == []
                assert [one for one in tab.requests if not one.startswith("data:")] == [page.as_uri()]
        return tab

    if shutil.which("chromium") is None:
        yield lambda page: None
        return
    with opened() as tab:
        yield look


# ---- one number everywhere


def test_the_numbers_are_those_of_validate_and_predict(classified, tmp_path, capsys):
    found = report_of([classified / "RUN"], capsys, tmp_path / "report.json")["evaluation"]
    assert run(["validate", str(classified / "RUN"), str(classified), "--json"]) == 0
    assert found["metrics"] == pytest.approx(json.loads(capsys.readouterr().out), abs=1e-6)
    assert run(["predict", str(classified / "RUN"), str(classified / "val"), "--format", "json"]) == 0
    rows = {row["path"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(found["samples"]) == len(rows) == 24
    for sample in found["samples"]:
        row = rows[sample["path"]]
        assert sample["prediction"]["label"] == row["label"]
        assert sample["prediction"]["score"] == pytest.approx(row["score"], abs=1e-5)
        assert sample["target"] == Path(sample["path"]).parent.name
    right = sum(one["prediction"]["label"] == one["target"] for one in found["samples"])
    assert found["result"]["value"] == pytest.approx(right / 24, abs=1e-6)
    assert found["result"]["low"] <= found["result"]["value"] <= found["result"]["high"]
    assert np.trace(found["confusion_matrix"]) == right


def grey_table(folder: Path) -> Path:
    draws, lines = np.random.default_rng(0), ["image,brightness,bright,dark"]
    folder.mkdir()
    for number in range(24):
        value = int(draws.integers(20, 230))
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(folder / f"{number:02}.png")
        lines.append(f"{number:02}.png,{value},{int(value > 120)},{int(value < 60)}")
    (folder / "grey.csv").write_text("\n".join(lines) + "\n")
    return folder / "grey.csv"


def painted(folder: Path) -> Path:
    draws = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(10):
        pixels, mask = np.full((48, 64, 3), 30, np.uint8), np.zeros((48, 64), np.uint8)
        x, y = draws.integers(0, 40), draws.integers(0, 24)
        pixels[y : y + 20, x : x + 24], mask[y : y + 20, x : x + 24], mask[0, :8] = 220, 1, 255
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


def several_labels(root):
    options = {"input_field": "image", "images_root": root / "t", "val_split": 0.5}
    own = ImageClassificationData.from_csv(
        train_file=grey_table(root / "t"), target_fields=["bright", "dark"], **options
    )
    return ImageClassifier("timm/test_resnet", pretrained=False, multi_label=True, learning_rate=0.02), own, "f1"


def numbers(root):
    own = ImageRegressionData.from_csv(
        train_file=grey_table(root / "t"), input_field="image", target_fields=["brightness"], val_split=0.5
    )
    return ImageRegressor("timm/test_resnet", pretrained=False), own, "mae"


def masks(root):
    own = SemanticSegmentationData.from_root(painted(root / "m"), batch_size=4, val_split=0.5, num_workers=0)
    model = SemanticSegmentation("timm/test_resnet", pretrained=False, image_size=64, learning_rate=3e-3)
    return model, own, "miou"


def boxes(root):
    for name, count, seed in (("train", 24, 0), ("val", 10, 1)):
        squares.coco(root / name, count, seed)
    own = ObjectDetectionData.from_folders(root / "train", root / "val", batch_size=8, num_workers=0)
    options = {"head_options": {"width": 32, "depth": 1}, "image_size": 96, "learning_rate": 4e-3}
    return ObjectDetector("timm/test_resnet", pretrained=False, backbone_learning_rate=4e-3, **options), own, "f1"


def instances(root):
    for name, count, seed in (("train", 40, 0), ("val", 10, 1)):
        squares.coco(root / name, count, seed, has_masks=True)
    own = InstanceSegmentationData.from_folders(root / "train", root / "val", batch_size=8, num_workers=0)
    options = {"head_options": {"width": 32, "depth": 1}, "image_size": 96, "learning_rate": 4e-3}
    model = InstanceSegmentation("timm/test_resnet", pretrained=False, backbone_learning_rate=4e-3, **options)
    return model, own, "f1"


def keypoints(root):
    for name, count, seed in (("train", 32, 0), ("val", 8, 1)):
        marked.coco(root / name, count, seed)
    own = KeypointDetectionData.from_folders(root / "train", root / "val", batch_size=8, num_workers=0)
    options = {"head_options": {"width": 32, "depth": 1}, "image_size": 96, "learning_rate": 4e-3}
    options |= {"sigmas": [0.3, 0.25, 0.2], "backbone_learning_rate": 4e-3}
    return KeypointDetector("timm/test_resnet", pretrained=False, **options), own, "f1"


#: Those that find objects train longer, so that they find some.
OBJECTS = {boxes: 4, instances: 6, keypoints: 5}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("made", [several_labels, numbers, masks, *OBJECTS])
def test_each_task_has_a_page_with_its_own_metric(made, tmp_path, reports, looked_at):
    torch.manual_seed(0)
    model, own, metric = made(tmp_path)
    epochs = OBJECTS.get(made, 2)
    trainer = Trainer(max_epochs=epochs, seed=1, output_dir=tmp_path / "RUN", enable_progress_bar=False)
    trainer.finetune(model, datamodule=own, strategy="no_freeze")
    page = (tmp_path / "RUN" / "report.html").read_text()
    assert "<title>timm/test_resnet: RUN</title>" in page
    finished = trainer.result
    found = finished.evaluation()
    (validated,) = trainer.validate(model, datamodule=own)
    assert found.metrics == pytest.approx(validated, abs=1e-6, nan_ok=True)
    result = found.interval()
    assert result.name == metric
    assert result.value == pytest.approx(validated[f"val_{metric}"], abs=1e-5)
    assert result.low <= result.value + 1e-6
    assert result.value <= result.high + 1e-6
    paths = [one.input for one in found.samples]
    rows = [one.as_row() for one in model.predict(paths)]
    for row, sample in zip(rows, found.samples, strict=True):
        for name, value in row.items():
            assert sample.row[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value) or (
                isinstance(value, list)
            )
    worst = [one.judgement.error for one in found.mistakes(5)]
    assert worst == sorted(worst, reverse=True)
    if made in OBJECTS:
        kinds = {pair.kind for one in found.samples for pair in one.judgement.pairs}
        assert kinds <= {"", "class", "localisation", "duplicate", "missed", "background"}
        assert any(kind in page for kind in kinds - {""})
    looked_at(tmp_path / "RUN" / "report.html")
    # Opened again from its folder alone it is the same.
    again = FinishedRun(tmp_path / "RUN").evaluation()
    assert again.metrics == pytest.approx(found.metrics, abs=1e-5, nan_ok=True)


def test_a_task_of_ones_own_has_a_page_by_its_loss(tmp_path, reports):
    lines, draws = ["image,angle"], np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(draws.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{30 * number}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    own = AngleData.from_csv(train_file=tmp_path / "t.csv", target_fields=["angle"], val_split=0.5)
    trainer = Trainer(max_epochs=1, output_dir=tmp_path / "RUN", enable_progress_bar=False)
    trainer.finetune(AnglePredictor(pretrained=False), datamodule=own)
    page = (tmp_path / "RUN" / "report.html").read_text()
    found = trainer.result.evaluation()
    assert found.interval().value == pytest.approx(found.metrics["val_loss"], abs=1e-5)
    assert "Worst samples" in page
    assert "degrees" in page


# ---- the page


def test_the_page_is_one_small_file_with_everything_escaped(classified):
    page = (classified / "RUN" / "report.html").read_text()
    assert len(page) < 5_000_000
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#)[^"'\s>]+""", page)
    assert "<b>&amp;" not in page
    assert "&lt;b&gt;&amp;amp;.png" in page
    for title in ("What was trained", "Curves", "Confusion matrix", "Classes", "Precision and recall", "Calibration"):
        assert f"<h2>{title}</h2>" in page
    assert "flashtask finetune" in page


@pytest.mark.long
def test_the_command_on_the_page_repeats_the_run(classified, tmp_path):
    page = (classified / "RUN" / "report.html").read_text()
    (command,) = re.findall(r"<pre>flashtask (.*?)</pre>", page)
    assert run([*command.split(), "--output-dir", str(tmp_path / "AGAIN"), "--no-report"]) == 0
    assert not (tmp_path / "AGAIN" / "report.html").exists()
    first, second = (FinishedRun(folder).history for folder in (classified / "RUN", tmp_path / "AGAIN"))
    assert first.column("val_loss") == second.column("val_loss")


@pytest.mark.long
def test_reports_of_other_data_a_checkpoint_and_as_a_picture(classified, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (classified / "RUN" / "report.html").read_bytes()
    assert run(["report", str(classified / "RUN" / "last.ckpt"), str(classified / "train"), "--of", "test"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Accuracy is ")
    assert "on 36 test samples" in out
    assert "report: report.html" in out
    assert (classified / "RUN" / "report.html").read_bytes() == before
    assert run(["report", str(classified / "RUN"), "--output", "charts.png"]) == 0
    with Image.open("charts.png") as picture:
        assert picture.width > 800


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["RUN", "--of", "test"], 0, "could not be judged: there is no test data"),
        (["RUN/last.ckpt"], 0, "a checkpoint, which does not lead to data"),
        (["RUN", "--num-workers", "0"], 2, "is about DATA"),
        (["RUN", "--output", "none/page.html"], 73, "none"),
        (["RUN", "--format", "pdf"], 2, "html, json, png"),
        (["nowhere"], 66, "nowhere"),
    ],
)
def test_what_the_command_cannot_do(classified, tmp_path, monkeypatch, capsys, argv, code, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(classified / "RUN")
    before = (classified / "RUN" / "report.html").read_bytes()
    output = [] if "--output" in argv else ["--output", "page.html"]
    assert run(["report", *argv, *output]) == code
    shown = capsys.readouterr()
    assert says in shown.out + shown.err
    assert (classified / "RUN" / "report.html").read_bytes() == before


def test_a_page_that_cannot_be_written_does_not_make_the_run_fail(tmp_path, capsys, reports, monkeypatch):
    monkeypatch.setattr(ImageClassifier, "judge", lambda self, step, inputs: 1 / 0)
    own = ImageClassificationData.from_folders(colour_folders(tmp_path / "d"), val_split=0.5)
    result = quiet(tmp_path, logger=True).finetune(
        ImageClassifier("timm/test_resnet", pretrained=False), datamodule=own
    )
    assert result.checkpoint_path.exists()
    said = capsys.readouterr().err
    assert "the report was not written: ZeroDivisionError" in said
    assert f"fix: flashtask report {result.run_folder}" in said


@needs_browser
def test_a_browser_opens_the_page_and_a_click_on_a_cell_its_pictures(classified, looked_at):
    tab = looked_at(classified / "RUN" / "report.html")
    seen = """[...document.querySelectorAll(".gallery")].filter(one => one.id &&
        getComputedStyle(one).display !== "none").map(one => one.id)"""
    assert len(tab.run(seen)) == 1  # of the first mistake, until a cell is clicked
    for cell in tab.run("[...document.querySelectorAll('.matrix a')].map(one => one.hash.slice(1))"):
        tab.run(f"document.querySelector('.matrix a[href=\"#{cell}\"]').click()")
        tab.wait_for(f"JSON.stringify({seen}) === '[\"{cell}\"]'")
        of_cell = f"[...document.querySelectorAll('#{cell} img')]"
        tab.wait_for(f"{of_cell}.length > 0 && {of_cell}.every(one => one.complete && one.naturalWidth > 0)")


# ---- a finished run in Python


def test_a_run_is_opened_from_its_folder_or_its_checkpoint(classified):
    finished = FinishedRun(classified / "RUN")
    assert finished.history.columns[:3] == ("epoch", "step", "train_loss")
    assert len(finished.history) == 2
    assert finished.recipe["model"]["backbone"] == "timm/test_resnet"
    assert finished.metrics["val_accuracy"] == pytest.approx(finished.evaluation().metrics["val_accuracy"], abs=1e-6)
    assert finished.confusion_matrix().sum() == 24
    assert [one.label for one in finished.per_class()] == ["blue", "green", "red"]
    assert len(finished.mistakes(2)) == 2
    assert finished.explain(finished.mistakes(1)[0].input).size == finished.task.preprocessing.input_size[:0:-1]
    assert "<table>" in finished._repr_html_()
    assert len(finished.plot("val").axes) == 5
    alone = FinishedRun(classified / "RUN" / "last.ckpt")
    assert [row["val_loss"] for row in alone.history] == pytest.approx(finished.history.column("val_loss"), rel=1e-4)
    assert alone.recipe == finished.recipe
    with pytest.raises(UsageError, match="did you mean 'val_loss'"):
        finished.history.column("val_los")
    with pytest.raises(FlashtaskError, match="nowhere"):
        FinishedRun(classified / "nowhere")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("backbone", ["timm/test_resnet", "timm/test_vit", "timm/test_convnext"])
def test_a_heat_map_lies_on_what_was_changed(backbone, tmp_path):
    """With a head that adds up all features the map is what each place contributes to the output."""
    torch.manual_seed(0)
    model = ImageClassifier(backbone, num_classes=2, pretrained=False)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = next(model.backbone.parameters()).requires_grad_(False)
    model.train()
    method, (heat,) = heat_maps(model, read_inputs([str(tmp_path / "a.png")])[0])
    assert method == ("rollout" if backbone == "timm/test_vit" else "hirescam")
    assert heat.ndim == 2
    assert heat.max() == pytest.approx(1)
    assert heat.min() >= 0
    assert model.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("backbone", "pooled_by"), [("timm/test_vit", "token"), ("timm/test_vit2", "avg")])
def test_the_heat_map_of_a_transformer_is_its_attention_rolled_out(backbone, pooled_by, tmp_path):
    """Computed here from queries and keys, block by block, as Abnar and Zuidema (2020) do."""
    torch.manual_seed(0)
    model = ImageClassifier(backbone, num_classes=2, pretrained=False).eval()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    ((given,), _) = read_inputs([str(tmp_path / "a.png")])
    vit = next(part for part in model.backbone.modules() if hasattr(part, "blocks"))
    assert vit.global_pool == pooled_by
    for block in vit.blocks:  # at first attention is nearly even, and the map nearly flat
        block.attn.qkv.weight.data *= 20
    before = [block.attn.fused_attn for block in vit.blocks]
    rolled, transform = None, eval_transform(model.preprocessing)
    with torch.no_grad():
        tokens = vit.norm_pre(
            vit.patch_drop(vit._pos_embed(vit.patch_embed(transform.rest(given.read(transform.first))[None])))
        )
        for block in vit.blocks:
            one, count = block.attn, tokens.shape[1]
            parts = one.qkv(block.norm1(tokens)).reshape(1, count, 3, one.num_heads, -1).permute(2, 0, 3, 1, 4)
            query, key = one.q_norm(parts[0]), one.k_norm(parts[1])
            attention = (query @ key.transpose(-2, -1) * one.scale).softmax(dim=-1).mean(dim=1)[0]
            own = 0.5 * attention + 0.5 * torch.eye(count)
            rolled = own if rolled is None else own @ rolled
            tokens = block(tokens)
    row = rolled[0, 1:] if pooled_by == "token" else rolled[1:, 1:].mean(dim=0)
    wanted = ((row - row.min()) / (row.max() - row.min())).reshape(10, 10).numpy()
    method, (heat,) = heat_maps(model, [given])
    assert method == "rollout"
    assert heat == pytest.approx(wanted, abs=1e-4)
    assert heat.std() > 0.01
    assert [block.attn.fused_attn for block in vit.blocks] == before
    assert heat_maps(model, [given], "hirescam").maps[0] != pytest.approx(heat, abs=1e-2)
    with pytest.raises(UsageError, match="auto, rollout or hirescam"):
        heat_maps(model, [given], "lime")


def test_a_network_without_attention_has_no_rollout(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    given = read_inputs([str(tmp_path / "a.png")])[0]
    for backbone in ("timm/test_resnet", "timm/test_vit3"):  # the latter pools by attention
        model = ImageClassifier(backbone, num_classes=2, pretrained=False)
        assert heat_maps(model, given, "rollout") is None


# ---- statistics


def evaluation_of(truths, said, labels, **options):
    samples = [
        Judged(f"{row}.png", f"/{row}.png", a, b, {}, Judgement(float(a != b), None, (Pair(a, b),), {}))
        for row, (a, b) in enumerate(zip(truths, said, strict=True))
    ]
    scoring = Scoring("error", "accuracy", share_right, classes_exclude=True)
    return Evaluation("val", {}, tuple(samples), labels, scoring, **options)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Of 200 data sets of which 0.8 is right on average, about 95 in 100 intervals hold 0.8."""
    draws, held = np.random.default_rng(1), 0
    for _ in range(200):
        right = draws.random(80) < 0.8
        found = evaluation_of(["a"] * 80, ["a" if one else "b" for one in right], ("a", "b")).interval(times=200)
        held += found.low <= 0.8 <= found.high
    assert 180 <= held <= 198


def test_samples_of_a_group_are_drawn_together():
    truths, said = ["a"] * 40, ["a"] * 20 + ["b"] * 20
    alone = evaluation_of(truths, said, ("a", "b")).interval()
    together = evaluation_of(truths, said, ("a", "b"), groups=[str(row // 10) for row in range(40)]).interval()
    assert (alone.low, alone.high) == (pytest.approx(0.35), pytest.approx(0.65))
    assert (together.low, together.high) == (0, 1)
    assert "4 groups" in together.method


def test_metrics_of_a_matrix_are_those_of_torchmetrics():
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_jaccard_index

    draws = torch.Generator().manual_seed(0)
    truth, said = torch.randint(0, 3, (2, 200), generator=draws)
    matrix = np.zeros((5, 5))
    np.add.at(matrix, (truth.numpy(), said.numpy()), 1)  # the fourth class neither occurs nor is predicted
    sums = (matrix.diagonal()[:-1], matrix.sum(axis=1)[:-1], matrix.sum(axis=0)[:-1])
    assert mean_f1(*sums) == pytest.approx(float(multiclass_f1_score(said, truth, 3)))
    assert mean_iou(*sums) == pytest.approx(float(multiclass_jaccard_index(said, truth, 3)))
    assert share_right(*sums) == pytest.approx(float((truth == said).float().mean()))
    counts = class_counts(matrix, ("a", "b", "c", "none"))
    assert math.isnan(counts[3].f1)
    assert np.mean([one.f1 for one in counts[:3]]) == pytest.approx(float(mean_f1(*sums)))


def test_curves_and_calibration_are_those_of_torchmetrics():
    from torchmetrics.functional.classification import binary_average_precision, binary_calibration_error

    draws = torch.Generator().manual_seed(0)
    scores = (torch.rand(300, generator=draws) * 20).round() / 20  # with many equal scores
    right = torch.rand(300, generator=draws) < scores**2
    curve = precision_recall("a", scores.numpy(), right.numpy(), float(right.sum()))
    assert curve.average_precision == pytest.approx(float(binary_average_precision(scores, right.long())), abs=1e-6)
    f1 = [2 * float((right & (scores >= t)).sum()) / float((scores >= t).sum() + right.sum()) for t in curve.thresholds]
    assert curve.best == pytest.approx(curve.thresholds[int(np.argmax(f1))])
    found = calibration(scores.double().numpy() * 0.99, right.numpy())
    wanted = binary_calibration_error(scores.double() * 0.99, right.long(), n_bins=10, norm="l1")
    assert found.error == pytest.approx(float(wanted), abs=1e-6)


def test_objects_are_told_apart_by_what_is_wrong_with_them():
    true = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10], [0, 40, 30, 70]]),
        "labels": torch.tensor([0, 0, 1, 0, 0]),
        "is_crowd": torch.tensor([False, False, False, False, True]),
    }
    rows = [
        [0, 0, 10, 10, 0.9, 0],  # right
        [0, 1, 10, 10, 0.8, 0],  # the same object again
        [24, 0, 34, 10, 0.7, 0],  # an overlap of 6 in 14
        [40, 0, 50, 10, 0.6, 0],  # the wrong class
        [80, 80, 90, 90, 0.5, 1],  # nothing is there
        [5, 45, 15, 55, 0.95, 0],  # in a crowd, which does not count
        [60, 0, 70, 10, 0.1, 0],  # below its threshold
    ]
    (found,) = judged_boxes([torch.tensor(rows)], [true], ("cat", "dog"), (0.3, 0.3))
    kinds = sorted((pair.kind, pair.truth, pair.predicted) for pair in found.pairs)
    assert kinds == [
        ("", "cat", "cat"),
        ("background", "", "dog"),
        ("class", "dog", "cat"),
        ("duplicate", "", "cat"),
        ("localisation", "", "cat"),
        ("missed", "cat", ""),
        ("missed", "cat", ""),
    ]
    assert found.error == pytest.approx(1 - 2 / (4 + 5))
    assert sorted(found.scores["cat"])[0] == (pytest.approx(0.1), True)


def test_a_learning_rate_of_zero_is_on_the_curve():
    rates = [1e-3, 1e-4, 0.0]
    history = History({"epoch": float(row), "learning_rate": rate} for row, rate in enumerate(rates))
    (chart,) = [one for one in history_charts(history, "val_loss") if one.title == "Learning rate"]
    assert [text for _, text in chart.y_ticks] == ["0", "1e-4", "1e-3"]
    heights = [float(point.split(",")[1]) for point in chart.lines[0].path.split()]
    assert heights == sorted(heights)
    assert heights[-1] == pytest.approx(chart.bottom)
    assert len(heights) == 3
    only = History([{"epoch": 0.0, "learning_rate": 0.0, "train_loss": 1.0}])
    assert [one.title for one in history_charts(only, "val_loss")] == ["Loss"]


def test_pictures_stop_where_the_page_would_be_too_large():
    album = Album(most=10)
    assert [album.add("x" * size) for size in (6, 6, 4)] == ["xxxxxx", "", "xxxx"]
    assert album.left_out == 1


# ---- slices


def test_samples_are_sliced_by_any_column_of_their_table(tmp_path, capsys):
    draws, lines = np.random.default_rng(0), ["image,label,camera,hour,note,part"]
    for number in range(48):
        label, camera = ("dark", "bright")[number % 2], ("north", "south", "")[number // 2 % 3]
        value = (40, 200)[number % 2] + int(draws.integers(0, 20))
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(tmp_path / f"{number}.png")
        # The two rows of an image agree on everything but the note.
        lines.append(f"{number}.png,{label},{camera},{number % 24},n{number},{'val' if number >= 16 else 'train'}")
        if number == 20:
            lines.append(lines[-1].replace("n20", "other"))
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    own = ImageClassificationData.from_csv(
        "image", "label", train_file=tmp_path / "t.csv", split_field="part", batch_size=8, num_workers=0
    )
    result = quiet(tmp_path, logger=True).finetune(
        ImageClassifier("timm/test_resnet", pretrained=False), datamodule=own
    )
    found = FinishedRun(result.run_folder).evaluation()
    columns = dict.fromkeys(one.column for one in found.slices())
    assert [*columns][:2] == ["camera", "hour"]
    assert not {"note", "label", "part", "image"} & set(columns)
    by_camera = {one.value: one for one in found.slices(by=["camera"])}
    assert set(by_camera) == {"north", "south", "(empty)"}
    south = [one for one in found.samples if one.columns["camera"] == "south"]
    assert by_camera["south"].size == len(south)
    assert by_camera["south"].result == pytest.approx(sum(not one.is_wrong for one in south) / len(south))
    assert len(found.slices(by=["hour"])) == 4  # numbers: four ranges
    assert {one.columns.get("note") for one in found.samples if one.name == "20.png"} == {None}
    page = tmp_path / "page.html"
    assert run(["report", str(result.run_folder), "--slices", "camera", "--output", str(page)]) == 0
    assert "camera south" in page.read_text()
    assert "brightness" not in page.read_text().partition('id="slices"')[2].partition("</section>")[0]
    assert run(["report", str(result.run_folder), "--slices", "camara", "--output", str(page)]) == 2
    assert "did you mean 'camera'" in capsys.readouterr().err


def test_an_image_with_several_boxes_has_what_all_its_rows_say(tmp_path):
    lines = ["image,label,xmin,ymin,xmax,ymax,camera,occluded"]
    for number in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
        lines += [f"{number}.png,cat,{x},2,{x + 8},9,{'ab'[number % 2]},{x > 5}" for x in (1, 12)]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    own = ObjectDetectionData.from_csv(train_file=tmp_path / "t.csv", num_workers=0)
    assert own.other_columns.of(own.samples("train").inputs.tolist()) == [
        {"camera": "a"},
        {"camera": "b"},
        {"camera": "a"},
    ]


# ---- several runs


def several_runs(root, capsys, *words):
    root.mkdir()
    out = root / "out"
    colour_folders(root / "data", each=12, classes=("blue", "green"), size=32)
    for number in range(4):  # some that no run can have right
        (root / "data/blue" / f"{number}.png").rename(root / "data/green" / f"wrong {number}.png")
    assert run(["finetune", str(root / "data"), *OPTIONS.split(), *words, "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    return out, printed, (out / "report.html").read_text()


def test_runs_with_other_seeds_have_a_page_with_an_interval_over_seeds(tmp_path, capsys, reports, looked_at):
    out, printed, page = several_runs(tmp_path / "seeds", capsys, "--repeats", "3")
    values = [FinishedRun(out / f"repeat-{n}").evaluation().interval().value for n in (1, 2, 3)]
    half = 4.303 * np.std(values, ddof=1) / math.sqrt(3)
    mean = np.mean(values)
    assert f"95 % interval {mean - half:.4f} to {mean + half:.4f}" in " ".join(printed.split())
    found = report_of([out], capsys, tmp_path / "report.json")
    assert f"is {mean:.3f}, the mean of 3 runs on the same" in found["sentence"]
    assert f"over more runs the mean would be between {mean - half:.3f} and {mean + half:.3f}" in found["sentence"]
    assert [one["result"]["value"] for one in found["runs"]] == pytest.approx(values)
    assert found["sentence"] in page
    assert FinishedRun(out).report().sentence == found["sentence"]
    looked_at(out / "report.html")
    assert "wrong in " in page
    assert all(f"<td>repeat-{n}</td>" in page for n in (1, 2, 3))
    assert len(page) < 5_000_000


@pytest.mark.long
def test_folds_have_a_page_of_all_samples_out_of_fold(tmp_path, capsys, reports):
    out, _, page = several_runs(tmp_path / "folds", capsys, "--folds", "2")
    found = report_of([out], capsys, tmp_path / "report.json")
    told = json.loads((out / "summary.json").read_text())["out_of_fold"]
    assert found["evaluation"]["result"]["value"] == pytest.approx(told["value"])
    assert len(found["evaluation"]["samples"]) == 24
    assert "out of fold on 24 samples" in page
    assert "by the run that was not trained on it" in page
    assert run(["report", str(out), "--slices", "nothing"]) == 2


def test_the_interval_of_a_mean_over_runs_covers_the_truth_as_often_as_it_says():
    for count in (3, 5, 40):
        drawn = np.random.default_rng(count).normal(0.8, 0.01, (2000, count))
        found = [mean_interval(row.tolist()) for row in drawn]
        assert 0.935 < np.mean([one.low <= 0.8 <= one.high for one in found]) < 0.965
    assert math.isnan(mean_interval([0.8]).low)


def test_other_samples_and_other_runs_both_widen_the_interval():
    labels, draws = ("a", "b"), np.random.default_rng(0)
    runs = []
    for seed in range(4):
        said = ["a" if draws.random() < 0.7 + 0.05 * seed else "b" for _ in range(100)]
        runs.append(OneRun(f"run {seed}", seed, 0, None, 1.0, History(), evaluation_of(["a"] * 100, said, labels)))
    several = SeveralRuns(runs)
    over_runs, over_samples, alone = several.over_runs, several.over_samples, several.evaluation.interval()
    assert over_samples.value == over_runs.value == pytest.approx(np.mean([one.value for one in several.intervals]))
    widths = [one.high - one.low for one in (over_runs, alone, over_samples)]
    assert widths[2] > max(widths[:2])
    wrong = [sum(run.evaluation.samples[row].is_wrong for run in runs) for row in range(100)]
    assert [one.wrong for one in several.tallies] == wrong
    assert {one.wrong for one in several.disputed(100)} == set(wrong) - {0, 4}
    assert several.disputed(1)[0].wrong == 2
