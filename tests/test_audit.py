"""`data.audit()` and `flashtask audit`: every kind of planted fault is found, and nothing on clean data."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_trees import picture, picture_tree
from PIL import Image, ImageFilter

from flashtask import ImageClassificationData, ImageClassifier, ImageEmbedder, ImageRegressionData, Trainer
from flashtask.cli import run as flashtask
from flashtask.core.errors import MissingInputError, UsageError
from flashtask.core.feature_store import FeatureStore
from flashtask.data.copies import find_copies
from flashtask.data.findings import KINDS, read_ignored
from flashtask.data.fingerprint import Fingerprint, fingerprint, near_pairs
from flashtask.tasks.label_errors import cross_fitted_scores, features_of

SMALL = "timm/test_resnet"


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """`train` and `val` with two classes of pictures, no two alike."""
    return picture_tree(tmp_path_factory.mktemp("clean"), {"train": 12, "val": 5})


@pytest.fixture
def data(clean, tmp_path):
    """A copy of it to plant faults in."""
    return Path(shutil.copytree(clean, tmp_path / "data"))


def audit(folder, **options):
    return ImageClassificationData.from_root(folder).audit(**options)


def names(found, kind):
    """For each finding of a kind, the names of its samples."""
    return [[f"{sample.part}/{sample.name}" for sample in one.samples] for one in found.by_kind.get(kind, ())]


def test_nothing_is_reported_about_clean_data(clean):
    found = audit(clean)
    assert found.findings == ()
    assert not found.spoils
    assert str(found).startswith("24 train, 10 val image(s): nothing suspicious")
    assert flashtask(["audit", str(clean)]) == 0


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (64, 48)])
def test_small_pictures_are_fine_where_all_are_small(tmp_path, size):
    root = picture_tree(tmp_path, {"train": 6}, size=size)
    assert audit(root / "train").findings == ()


def dark(image):
    return Image.eval(image, lambda value: value // 20)


def bright(image):
    return Image.eval(image, lambda value: value // 16 + 240)


@pytest.mark.parametrize(
    ("kind", "made", "said"),
    [
        ("blank", lambda image: Image.new("RGB", image.size, (70, 70, 70)), "grey level 70 of 255 everywhere"),
        ("dark", dark, "mean grey level"),
        ("bright", bright, "mean grey level"),
        ("blurred", lambda image: image.filter(ImageFilter.GaussianBlur(6)), "sharpness"),
        ("size", lambda image: image.resize((12, 12)), "12 x 12 pixels"),
        ("size", lambda image: image.resize((900, 20)), "900 x 20 pixels, 45 to 1"),
    ],
)
def test_an_odd_picture_is_found(data, kind, made, said):
    made(picture(999)).save(data / "train" / "cat" / "odd.png")
    found = audit(data)
    assert {finding.kind for finding in found.findings} == {kind}
    assert names(found, kind) == [["train/cat/odd.png"]]
    assert said in found.findings[0].detail
    assert not found.spoils


@pytest.mark.parametrize("radius", [4, 12])
def test_a_blurred_picture_is_found_among_soft_ones_of_little_contrast(tmp_path, radius):
    def soft(number):
        image = picture(number, (200, 200)).filter(ImageFilter.GaussianBlur(1.2))
        return Image.blend(image, Image.new("RGB", image.size, (90, 90, 90)), 0.4)

    for number in range(12):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        soft(number).save(tmp_path / "ab"[number % 2] / f"{number}.png")
    soft(50).filter(ImageFilter.GaussianBlur(radius)).save(tmp_path / "a" / "odd.png")
    assert names(audit(tmp_path), "blurred") in ([["train/a/odd.png"]], [["val/a/odd.png"]])


def test_a_picture_of_one_pixel_is_small_and_blank(data):
    Image.new("RGB", (1, 1)).save(data / "val" / "dog" / "one.png")
    found = audit(data)
    assert set(found.by_kind) == {"size", "blank"}
    assert names(found, "size") == [["val/dog/one.png"]]


def test_unreadable_files_are_found_with_their_reasons(data):
    whole = (data / "train" / "cat" / "000.png").read_bytes()
    (data / "train" / "cat" / "cut.png").write_bytes(whole[:900])
    (data / "val" / "cat" / "page.png").write_text("<html>")
    found = audit(data)
    assert names(found, "unreadable") == [["train/cat/cut.png"], ["val/cat/page.png"]]
    assert "cut short" in found.findings[0].detail
    assert "web page" in found.findings[1].detail
    assert found.spoils


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("same.png", lambda path, to: shutil.copy(path, to), "files with the same content"),
        ("same.bmp", lambda path, to: Image.open(path).save(to), "the same pixels in different files"),
        ("low.jpg", lambda path, to: Image.open(path).save(to, quality=50), "of another size, quality or brightness"),
        ("half.png", lambda path, to: Image.open(path).reduce(2).save(to), "of another size, quality or brightness"),
        ("light.png", lambda path, to: Image.eval(Image.open(path), lambda v: v // 2 + 90).save(to), "brightness"),
    ],
)
def test_a_copy_is_found_whatever_was_done_to_it(data, name, how, said):
    first = data / "train" / "cat" / "003.png"
    for target in (data / "val" / "cat" / name, data / "train" / "dog" / name):
        how(first, target)
    found = audit(data)
    assert set(found.by_kind) == {"leak", "conflict"}
    assert sorted(names(found, "leak")[0]) == ["train/cat/003.png", f"train/dog/{name}", f"val/cat/{name}"]
    assert "in train and val" in found.by_kind["leak"][0].detail
    assert "as 'cat' and 'dog'" in found.by_kind["conflict"][0].detail
    assert found.spoils
    for target in (data / "val" / "cat" / name, data / "train" / "dog" / name):
        target.unlink()
    how(first, data / "train" / "cat" / name)
    found = audit(data)
    assert set(found.by_kind) == {"duplicate"}
    assert said in found.findings[0].detail
    assert not found.spoils


def test_blank_pictures_are_copies_only_if_their_files_are_equal(data):
    for number, (part, grey) in enumerate([("train", 10), ("val", 10), ("val", 200)]):
        Image.new("RGB", (64, 48), (grey,) * 3).save(data / part / "cat" / f"blank{number}.png")
    found = audit(data)
    assert names(found, "leak") == [["train/cat/blank0.png", "val/cat/blank1.png"]]
    assert len(found.by_kind["blank"]) == 3


def test_pictures_of_more_than_8_bits_are_compared_too(tmp_path):
    root = tmp_path / "wide"
    for number, (part, name) in enumerate([("train", "a"), ("train", "b"), ("val", "a")] * 2):
        folder = root / part / name
        folder.mkdir(parents=True, exist_ok=True)
        values = np.asarray(picture(0 if number in (0, 5) else number).convert("L")).astype(np.uint16) * 37
        Image.fromarray(values).save(folder / f"{number}.png")
    assert names(audit(root), "leak") == [["train/a/0.png", "val/a/5.png"]]
    found = audit(root, model=ImageEmbedder(SMALL, pretrained=False))
    assert names(found, "leak") == [["train/a/0.png", "val/a/5.png"]]
    assert not found.by_kind.keys() & {"label", "neighbour"}


def test_classes_are_counted(tmp_path):
    root = picture_tree(tmp_path, {"train": 0}, classes=())
    counts = {"train": {"cat": 40, "dog": 4, "owl": 6}, "val": {"cat": 3, "dog": 2}}
    number = 0
    for part, sizes in counts.items():
        for name, size in sizes.items():
            (root / part / name).mkdir(parents=True)
            for _ in range(size):
                picture(number := number + 1, (32, 24)).save(root / part / name / f"{number}.png")
    found = audit(root)
    assert [(f.kind, f.subject) for f in found.findings] == [
        ("missing_class", "owl"),
        ("few", "dog"),
        ("imbalance", "dog"),
    ]
    assert "no image of class 'owl' in val" in str(found)
    assert "'cat' has 40 images, 'dog' 4: 10 to 1" in str(found)


def table_of(folder, rows):
    """A table with a picture for each row of file, label, part and group."""
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "part", "site"))
        writer.writerows(rows)
    for number, (name, *_) in enumerate(rows):
        picture(number).save(folder / name)
    return folder / "table.csv"


def test_a_group_in_two_parts_is_found(tmp_path):
    rows = [(f"{n}.png", "ab"[n % 2], "val" if n > 13 else "train", f"s{n // 4}") for n in range(20)]
    table = table_of(tmp_path, rows)
    options = {"train_file": table, "split_field": "part", "group_field": "site"}
    found = ImageClassificationData.from_csv("file", "label", **options).audit()
    assert [(finding.kind, finding.subject) for finding in found.findings] == [("group_leak", "s3")]
    assert found.spoils


def test_one_picture_with_two_numbers_is_a_conflict(tmp_path):
    table = table_of(tmp_path, [(f"{n}.png", n / 3, "train", "") for n in range(12)])
    shutil.copy(tmp_path / "4.png", tmp_path / "7.png")
    found = ImageRegressionData.from_csv("file", "label", train_file=table).audit()
    assert names(found, "conflict") == [["train/4.png", "train/7.png"]]


def test_a_file_that_is_in_a_table_twice_is_found(tmp_path):
    table = table_of(tmp_path, [(f"{n}.png", "ab"[n % 2], "train", "") for n in range(12)])
    table.write_text(table.read_text() + "3.png,b,val,\n")
    found = ImageClassificationData.from_csv("file", "label", train_file=table, split_field="part").audit()
    assert names(found, "leak") == [["train/3.png", "val/3.png"]]
    assert "the same file" in found.findings[0].detail


# ---- with a model


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Pictures whose class is their colour, with three labels that are wrong."""
    root, rng = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for number in range(80):
        colour = ("blue", "red")[number % 2]
        label = {"blue": "red", "red": "blue"}[colour] if number in (7, 30, 61) else colour
        shade = np.array({"blue": (40, 60, 200), "red": (200, 60, 40)}[colour])
        pixels = (
            np.asarray(picture(number, (48, 48)), dtype=np.float64) * 0.3 + shade * 0.7 + rng.normal(0, 5, (48, 48, 3))
        )
        (root / label).mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / label / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def model():
    return ImageEmbedder(SMALL, pretrained=False)


def test_labels_that_others_contradict_come_first(coloured, model):
    data = ImageClassificationData.from_folders(coloured, val_split=0.2)
    found = data.audit(model)
    assert {one[0].partition("/")[2] for one in names(found, "label")[:3]} == {
        "red/30.png",
        "blue/07.png",
        "blue/61.png",
    }
    assert len(found.by_kind["label"]) <= 6
    scores = [finding.score for finding in found.by_kind["label"]]
    assert scores == sorted(scores)
    assert not found.spoils
    assert "no label errors were looked for" not in str(found)


def test_copies_do_not_confirm_each_others_labels():
    features, targets = np.eye(40, dtype=np.float32), np.arange(40) % 2
    features[1::2] += 1
    features[20:22], targets[20:22] = features[1], 0  # a picture of class 1 and two copies of it, labelled 0
    groups = np.arange(40)
    groups[20:22] = 20
    scores = cross_fitted_scores(features, targets, groups)
    assert (scores[20:22, 1] > 0.5).all()
    assert np.allclose(scores.sum(axis=1), 1)


def test_features_are_those_of_a_run_and_come_from_its_cache(coloured, tmp_path):
    classifier = ImageClassifier(SMALL, pretrained=False)
    data = ImageClassificationData.from_folders(coloured, val_split=0.25, num_workers=0)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=1, **options).finetune(classifier, datamodule=data, strategy="freeze")
    entries = FeatureStore().entries()
    paths = data.train_dataloader().dataset.paths.tolist()
    stored = next(FeatureStore().open(entry.key) for entry in entries if entry.about["samples"] == len(paths))
    assert np.array_equal(features_of(classifier, paths), stored)
    assert len(FeatureStore().entries()) == len(entries)
    for entry in entries:
        FeatureStore().remove(entry.key)
    assert np.array_equal(features_of(classifier, paths), stored)
    assert len(FeatureStore().entries()) == 1


def test_neighbours_in_two_parts_are_found(clean, model, tmp_path):
    data = Path(shutil.copytree(clean, tmp_path / "data"))
    mirrored = Image.open(data / "train" / "cat" / "002.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(data / "val" / "cat" / "mirrored.png")
    assert audit(data).findings == ()
    found = audit(data, model=model)
    assert ["train/cat/002.png", "val/cat/mirrored.png"] in names(found, "neighbour")


def test_numbers_have_no_label_errors_but_neighbours(tmp_path, model):
    table = table_of(tmp_path, [(f"{n}.png", n / 3, "train", "") for n in range(12)])
    found = ImageRegressionData.from_csv("file", "label", train_file=table).audit(model)
    assert "the targets are not classes" in str(found)


# ---- what becomes of the findings


def test_a_run_warns_of_copies_before_it_begins(data, capsys):
    Image.open(data / "train" / "cat" / "003.png").save(data / "val" / "cat" / "low.jpg", quality=60)
    shutil.copy(data / "train" / "cat" / "004.png", data / "train" / "dog" / "other.png")
    made = ImageClassificationData.from_root(data)
    made.setup("fit")
    said = capsys.readouterr().err
    assert re.search(r"1 picture\(s\) are in two parts as different files: .*003.png.*low.jpg", said)
    assert re.search(r"1 picture\(s\) have two different targets: .*004.png.*other.png", said)
    assert made.leaks == ()
    made.setup("fit")
    assert capsys.readouterr().err == ""


def test_a_run_on_clean_data_says_nothing_of_it(clean, capsys):
    ImageClassificationData.from_root(clean).setup("fit")
    assert "picture(s)" not in capsys.readouterr().err


def test_the_command_gives_a_code_a_page_and_json_and_changes_nothing(data, tmp_path, capsys):
    Image.open(data / "train" / "cat" / "003.png").save(data / "val" / "cat" / "<b>&.jpg", quality=60)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    page = tmp_path / "page.html"
    assert flashtask(["audit", str(data), "--json", "--html", str(page)]) == 65
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {"leak": 1}
    assert told["findings"][0]["samples"][1]["name"] == "cat/<b>&.jpg"
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 2
    assert "<b>&.jpg" not in html
    assert "cat/&lt;b&gt;&amp;.jpg" in html
    assert not re.search(r"https?://|<script|src=\"(?!data:)", html)
    assert flashtask(["audit", str(data)]) == 65
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert flashtask(["audit", str(data), "--html", str(tmp_path / "none" / "page.html")]) == 73


def test_findings_that_were_looked_at_are_left_out(data, tmp_path, capsys):
    shutil.copy(data / "train" / "cat" / "003.png", data / "val" / "cat" / "same.png")
    Image.new("RGB", (64, 48)).save(data / "val" / "dog" / "blank.png")
    ignored = tmp_path / "ignored"
    ignored.write_text(
        "# looked at\nleak: val/cat/same.*\n\nval/dog/blank.png # a test of the camera\nblurred: train/*\n"
    )
    assert flashtask(["audit", str(data), "--ignore", str(ignored), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["findings"], told["ignored"]) == ([], 2)
    found = audit(data, ignore=ignored)
    assert found.unused == ("blurred: train/*",)
    assert "nothing matches 'blurred: train/*'" in str(found)
    assert audit(data, ignore=["leak:"]).by_kind.keys() == {"blank"}


def test_an_ignore_file_that_cannot_be_used(tmp_path):
    file = tmp_path / "ignored"
    with pytest.raises(MissingInputError):
        read_ignored(file)
    file.write_text("blured: train/*\n")
    with pytest.raises(UsageError, match="line 1: no findings of the kind 'blured'") as caught:
        read_ignored(file)
    assert "'blurred'" in caught.value.fix
    file.write_text("a/b:c.png\n")
    assert read_ignored(file) == ["a/b:c.png"]


def test_every_kind_of_finding_is_tested():
    text = Path(__file__).read_text()
    assert [kind for kind in KINDS if f'"{kind}"' not in text] == []


# ---- fingerprints


def test_a_fingerprint_is_the_same_after_it_was_written_down():
    made = fingerprint(picture(5), (640, 480))
    again = Fingerprint.from_note(made.to_note())
    assert again[:3] == made[:3] == (640, 480, made.hash)
    assert np.allclose(again[3:], made[3:], atol=0.01)


def test_near_pairs_are_those_of_a_comparison_of_all_with_all():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (300, 32), dtype=np.uint8)
    bits[100:200] = bits[:100]
    for row in range(100, 200):
        places = rng.choice(256, row % 16, replace=False)
        bits[row] ^= np.packbits(np.isin(np.arange(256), places))
    bits[250] = bits[0]
    found = near_pairs([row.tobytes().hex() for row in bits])
    expected = {(row, row + 100) for row in range(100)} | {(0, 250)}
    alike = {tuple(pair) for pair in found.tolist()}
    assert {pair for pair in expected if (pair[1] - 100) % 16} | {(0, 250)} <= alike
    assert alike <= expected | {(100, 250)}
    assert near_pairs([]).shape == (0, 2)


@pytest.mark.long
def test_files_without_a_fingerprint_are_no_copies(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    made = fingerprint(picture(1), (64, 48))
    assert find_copies(paths, [None, made]).groups == []
    assert find_copies(paths, [made, made]).groups == []  # neither can be read


def test_a_model_of_an_audit_is_a_task(clean):
    data = ImageClassificationData.from_root(clean)
    assert list(data.audit().sizes) == [part for part in ("train", "val", "test", "predict") if part in data.sizes()]
    with pytest.raises(UsageError, match="model must be a task, not 'resnet18'"):
        data.audit("resnet18")
