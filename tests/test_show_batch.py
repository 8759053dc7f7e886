"""`data.show_batch()` and `flashtask show`: what is drawn is what a model gets."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from dense_task import PointData
from image_trees import picture, picture_tree
from PIL import Image, ImageDraw

from flashtask import ImageClassificationData, ImageRegressionData, Preprocessing
from flashtask.cli import run as flashtask
from flashtask.core.errors import UsageError
from flashtask.core.seeding import SampleKey, permutation, sample_seeds
from flashtask.data.batch_picture import BatchPicture, denormalised
from flashtask.data.transforms import eval_transform

SIZE = 48


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return picture_tree(tmp_path_factory.mktemp("pictures"), {"train": 6, "val": 3})


def pixels_of(file):
    """The pixels of an image file, which is closed again."""
    with Image.open(file) as image:
        return np.asarray(image)


def data_of(root, **options):
    return ImageClassificationData.from_root(root, preprocessing={"input_size": [3, SIZE, SIZE]}, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalising_is_undone(channels):
    wanted = Preprocessing(input_size=(channels, 48, 64), crop_pct=1.0).resolved()
    image = picture(3)
    drawn = denormalised(eval_transform(wanted)(image if channels == 3 else image.convert("L")), wanted)
    expected = image if channels == 3 else image.convert("L").convert("RGB")
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_pictures_and_words_are_those_of_the_batch_of_a_run(root):
    data = data_of(root, augment="strong")
    made = data.show_batch("train", num_samples=5, epoch=2, seed=7)
    data.setup("fit")
    rows = permutation(12, 7, 2)[:5]
    keys = [SampleKey(int(row), 2, int(seed)) for row, seed in zip(rows, sample_seeds(rows, 7, 2), strict=True)]
    samples = data.train_dataloader().dataset.__getitems__(keys)
    for drawn, lines, (values, target) in zip(made.pictures, made.lines, samples, strict=True):
        assert np.array_equal(drawn, denormalised(values, data.used_preprocessing))
        assert lines == [("cat", "dog")[target]]
    assert made.title == "train: 5 of 12, 48x48 pixels, augment strong"
    again = data.show_batch("train", num_samples=5, epoch=2, seed=8)
    assert not all(map(np.array_equal, made.pictures, again.pictures))


def test_evaluation_is_drawn_in_the_order_of_the_listing_without_augmentation(root):
    data = data_of(root, augment="strong")
    made = data.show_batch("val")
    assert [lines[0] for lines in made.lines] == ["cat"] * 3 + ["dog"] * 3
    with Image.open(root / "val" / "cat" / "000.png") as first:
        values = eval_transform(data.used_preprocessing)(first)
    assert np.array_equal(made.pictures[0], denormalised(values, data.used_preprocessing))
    assert made.title.endswith("augment none")


def test_global_generators_stay_as_they_are(root):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data_of(root, augment="strong").show_batch()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_picture_goes_to_a_file_and_to_a_notebook(root, tmp_path):
    made = data_of(root).show_batch("train", num_samples=3, output=tmp_path / "batch.png")
    assert np.array_equal(pixels_of(tmp_path / "batch.png"), made.image)
    assert np.array_equal(pixels_of(io.BytesIO(made._repr_png_())), made.image)
    made.save(tmp_path / "batch.jpg")
    assert pixels_of(tmp_path / "batch.jpg").shape == np.asarray(made.image).shape
    with pytest.raises(UsageError, match=r"'.*batch.txt' does not end like"):
        made.save(tmp_path / "batch.txt")


def test_long_words_are_broken_and_cut():
    words = " ".join(f"label{number}" for number in range(60))
    made = BatchPicture([Image.new("RGB", (200, 200))] * 2, [[words], ["a" * 300]])
    assert made.image.size[1] < 300
    wide = np.asarray(BatchPicture([Image.new("RGB", (200, 200), "white")], [["a" * 300]]).image.convert("L"))
    assert wide[:, -8:].min() == 255  # nothing is drawn over the edge


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (2000, 1000)])
def test_pictures_of_any_size_fit(size):
    made = BatchPicture([Image.new("RGB", size, "red")], [["one"]]).image
    assert max(made.size) <= 320
    assert (np.asarray(made) == (255, 0, 0)).all(axis=2).any()


def test_several_labels_and_numbers_are_written_below(tmp_path):
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    table = tmp_path / "several.csv"
    table.write_text("file,sun,sea\n0.png,1,1\n1.png,0,1\n2.png,0,0\n3.png,1,0\n")
    data = ImageClassificationData.from_csv("file", ["sun", "sea"], val_file=table)
    assert data.show_batch("val").lines == [["sun, sea"], ["sea"], ["no label"], ["sun"]]
    table.write_text("file,weight\n0.png,1.5\n1.png,2\n2.png,1200.25\n3.png,-1\n")
    data = ImageRegressionData.from_csv("file", "weight", val_file=table)
    assert [lines[0] for lines in data.show_batch("val").lines] == [
        "weight 1.5",
        "weight 2",
        "weight 1200",
        "weight -1",
    ]
    data = ImageRegressionData.from_csv("file", predict_file=table)
    assert data.show_batch("predict").lines[0] == ["0.png"]


def test_a_reader_draws_targets_that_lie_in_the_picture(tmp_path, monkeypatch):
    reader = PointData.readers[0]

    def draw(self, image, target):
        drawn = image.copy()
        ImageDraw.Draw(drawn).point(tuple(target.tolist()), "red")
        return drawn

    monkeypatch.setattr(reader, "draw", draw)
    monkeypatch.setattr(reader, "lines", lambda self, target: [f"at {target.tolist()}"])
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    (tmp_path / "points.csv").write_text("file,x,y\na.png,48,24\n")
    wanted = {"input_size": [3, SIZE, SIZE], "crop_pct": 1.0}
    data = PointData.from_csv("file", ["x", "y"], val_file=tmp_path / "points.csv", preprocessing=wanted)
    made = data.show_batch("val")
    assert made.pictures[0].getpixel((24, 12)) == (255, 0, 0)
    assert made.lines == [["at [24.0, 12.0]"]]


def test_16_bit_images_are_drawn_with_the_range_of_training(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        values = np.asarray(picture(ord(name)).convert("L")).astype(np.uint16) * 16
        Image.fromarray(values).save(tmp_path / name / "0.png")
    data = ImageClassificationData.from_folders(tmp_path, preprocessing={"input_size": [3, SIZE, SIZE]})
    assert np.asarray(data.show_batch().pictures[0]).std() > 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"part": "trian"}, "no part 'trian'"),
        ({"part": "test"}, "there is no test data"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1"),
        ({"epoch": -1}, "epoch must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused(root, options, said):
    with pytest.raises(UsageError, match=said):
        data_of(root).show_batch(**options)


def test_the_command_writes_the_same_picture(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert flashtask(["show", str(root), "--augment", "strong", "--num", "5", "--seed", "7", "--epoch", "2"]) == 0
    assert capsys.readouterr().out == "batch.png\n"
    made = ImageClassificationData.from_root(root, augment="strong").show_batch(num_samples=5, epoch=2, seed=7)
    assert np.array_equal(pixels_of("batch.png"), made.image)
    assert flashtask(["show", str(root), "--of", "val", "--output", "val.webp"]) == 0
    assert flashtask(["show", str(root), "--backbone", "timm/test_resnet", "--output", "small.png"]) == 0
    assert pixels_of("small.png").shape != pixels_of("batch.png").shape
    assert flashtask(["show", str(root), "--output", "none/batch.png"]) == 73
    assert flashtask(["show", str(root), "--of", "trian"]) == 2
