"""Pictures in memory and formats of one's own: checks, caches, recipes and resuming are those of files."""

from __future__ import annotations

import inspect
import pydoc

import numpy as np
import pytest
import torch
from PIL import Image
from small import quiet
from torch.utils.data import Dataset, TensorDataset

from flashtask import (
    IMAGE_LOADERS,
    ImageClassificationData,
    ImageClassifier,
    ImageRegressionData,
    Preprocessing,
    Trainer,
    seed_everything,
)
from flashtask.core.errors import BadDataError, UnknownNameError, UsageError
from flashtask.core.seeding import SampleKey

SMALL = Preprocessing(input_size=16)
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 255, (12, 20, 20, 3), dtype=np.uint8)
KINDS = ["b", "a"] * 6


def images(count=12):
    return PIXELS[:count].copy()


def read(data, part="train"):
    data.setup("fit")
    dataset = getattr(data, f"{part}_dataloader")().dataset
    return [dataset[row] for row in range(len(dataset))]


def targets(data):
    return np.stack([np.asarray(target) for _, target in read(data)])


# ---- how targets are written

INDEX = [1, 0, 2, 1, 0, 2]
HOT = np.eye(3, dtype=np.int64)[INDEX]
FLAGS = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]])
NAMES = ("a", "b", "c")
LISTS = [[name for name, flag in zip(NAMES, row, strict=True) if flag] for row in FLAGS]


@pytest.mark.parametrize(
    ("given", "options", "labels", "expected"),
    [
        (INDEX, {}, ("0", "1", "2"), INDEX),
        (np.array(INDEX), {"labels": NAMES}, NAMES, INDEX),
        (torch.tensor(INDEX), {}, ("0", "1", "2"), INDEX),
        (["b", "a", "c", "b", "a", "c"], {}, NAMES, INDEX),
        (HOT, {"target_format": "one_hot", "labels": NAMES}, NAMES, INDEX),
        (HOT.tolist(), {"target_format": "one_hot", "labels": NAMES}, NAMES, INDEX),
        (FLAGS, {}, ("0", "1", "2"), FLAGS),
        (FLAGS.astype(float), {"labels": NAMES}, NAMES, FLAGS),
        (FLAGS.tolist(), {"labels": NAMES}, NAMES, FLAGS),
        (torch.from_numpy(FLAGS), {"target_format": "multi_hot"}, ("0", "1", "2"), FLAGS),
        (LISTS, {}, NAMES, FLAGS),
        ([set(row) for row in LISTS], {}, NAMES, FLAGS),
        ([tuple(map(NAMES.index, row)) for row in LISTS], {"labels": NAMES}, NAMES, FLAGS),
        (["; ".join(row) for row in LISTS], {"label_separator": ";"}, NAMES, FLAGS),
    ],
)
def test_every_way_to_write_labels_is_read(given, options, labels, expected):
    data = ImageClassificationData.from_numpy(images(6), given, preprocessing=SMALL, **options)
    assert data.labels == labels
    assert np.array_equal(targets(data), expected)


@pytest.mark.parametrize("given", [[0.5, 1, 2, 3, 4, 5], np.arange(6), torch.arange(6.0)[:, None]])
def test_numbers_are_read(given):
    data = ImageRegressionData.from_numpy(images(6), given, preprocessing=SMALL)
    assert np.array_equal(targets(data)[:, 0], np.asarray(given, dtype=np.float32).ravel())


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ([[0, 1], [1, 0]] * 3, {}, "can be the numbers of labels, or a flag for each label"),
        (FLAGS, {"target_format": "one_hot"}, r"train_data\[0\]: 2 of the columns 0, 1, 2 hold 1"),
        (INDEX, {"labels": ["a", "b"]}, r"train_data\[2\]: class 2, but labels has 2 names"),
        (FLAGS, {"labels": ["a", "b"]}, "3 targets for each image, and there are 2 labels"),
        (INDEX, {"target_format": "onehot"}, "did you mean 'one_hot'"),
        (INDEX, {"target_format": "separated"}, "needs a label_separator"),
        (INDEX, {"target_format": "number"}, "has labels, not numbers"),
    ],
)
def test_targets_that_can_be_read_in_two_ways_or_in_none_are_refused(given, options, words):
    with pytest.raises((UsageError, BadDataError), match=words):
        ImageClassificationData.from_numpy(images(6), given, **options)


# ---- what files have too


def test_the_same_picture_in_two_parts_is_reported(capsys):
    data = ImageClassificationData.from_numpy(images(8), KINDS[:8], images(12)[7:], KINDS[7:], preprocessing=SMALL)
    data.setup("fit")
    assert data.leaks == (("val_data[0]", "train_data[7]"),)
    assert "1 val image(s) are also training images" in capsys.readouterr().err


def test_values_beyond_bytes_are_scaled_by_the_range_that_is_found(capsys):
    floats = images().astype(np.float32) / 255
    floats[0, 0, 0], floats[0, 0, 1] = 0, 1
    data = ImageClassificationData.from_numpy(floats, KINDS, preprocessing=SMALL, augment="none")
    plain = ImageClassificationData.from_numpy((floats * 255).round(), KINDS, preprocessing=SMALL, augment="none")
    assert torch.equal(read(data)[3][0], read(plain)[3][0])
    assert "more than 8 bits a channel: values 0 to 1 are scaled" in capsys.readouterr().err


def test_a_split_is_the_same_each_time_and_augmentation_depends_on_the_seed():
    one, two = (ImageClassificationData.from_numpy(images(), KINDS, val_split=0.5, augment="strong") for _ in range(2))
    assert one.split_manifest() == two.split_manifest()
    one.setup("fit"), two.setup("fit")
    left, right = (data.train_dataloader().dataset for data in (one, two))
    assert torch.equal(left[SampleKey(0, 0, 7)][0], right[SampleKey(0, 0, 7)][0])
    assert not torch.equal(left[SampleKey(0, 0, 7)][0], left[SampleKey(0, 0, 8)][0])


def test_a_resume_is_refused_where_a_picture_or_a_target_has_changed():
    state = ImageClassificationData.from_numpy(images(), KINDS).state_dict()
    ImageClassificationData.from_numpy(images(), KINDS).load_state_dict(state)
    other = images()
    other[5, 3, 3, 0] ^= 1
    for changed in (
        ImageClassificationData.from_numpy(other, KINDS),
        ImageClassificationData.from_numpy(images(), KINDS[1:] + KINDS[:1]),
        ImageClassificationData.from_numpy(images(11), KINDS[:11]),
    ):
        with pytest.raises(BadDataError, match="not those that the run was started on"):
            changed.load_state_dict(state)


def test_features_of_a_frozen_backbone_are_kept_by_the_pixels(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "cache"))
    for number in range(2):
        seed_everything(0, verbose=False)
        model = ImageClassifier("timm/test_resnet", pretrained=False)
        data = ImageClassificationData.from_numpy(images(), KINDS, preprocessing=SMALL, batch_size=4)
        quiet(tmp_path / str(number), enable_model_summary=True).finetune(model, datamodule=data, strategy="freeze")
    assert "the features of 12 training images are in the cache" in capsys.readouterr().err


def test_a_recipe_says_what_it_cannot_hold(tmp_path, capsys):
    data = ImageClassificationData.from_numpy(images(), KINDS, preprocessing=SMALL)
    assert data.recipe()["from_numpy"]["train_data"] == {"not_saved": "ndarray"}
    model = ImageClassifier("timm/test_resnet", pretrained=False)
    Trainer(max_epochs=1, output_dir=tmp_path / "run", enable_progress_bar=False).finetune(
        model, datamodule=data, strategy="freeze"
    )
    said = capsys.readouterr().err
    assert "recipe.yaml cannot hold" in said
    assert "train_data=<ndarray>" in said


@pytest.mark.parametrize("make", [images, lambda: [Image.fromarray(one) for one in images()]])
def test_processes_that_load_see_the_same_pictures(make):
    batches = []
    for workers in (0, 2):
        data = ImageClassificationData.from_images(
            make(), KINDS, make(), KINDS, preprocessing=SMALL, batch_size=4, num_workers=workers
        )
        data.setup("fit")
        batches.append(list(data.val_dataloader()))
    assert all(torch.equal(left, right) for left, right in zip(*([b[0] for b in one] for one in batches), strict=True))


# ---- datasets


class Noisy(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, place):
        return np.random.default_rng().integers(0, 255, (8, 8, 3), dtype=np.uint8), place % 2


class Failing(Dataset):
    classes = ("cat", "dog")
    targets = (0, 1, 0, 1)

    def __len__(self):
        return 4

    def __getitem__(self, place):
        if place == 2:
            raise RuntimeError("the disk is gone")
        return Image.fromarray(PIXELS[place]), -1  # never read: `targets` says it


def test_what_a_dataset_says_of_itself_is_used():
    data = ImageClassificationData.from_datasets(Failing(), on_bad_image="skip", preprocessing=SMALL)
    assert data.labels == ("cat", "dog")
    assert targets(data).tolist() == [0, 1, 1]


def test_items_that_fail_are_named():
    data = ImageClassificationData.from_datasets(Failing(), preprocessing=SMALL)
    with pytest.raises(BadDataError, match=r"(?s)1 of 4 images.*train_dataset\[2\].*the disk is gone"):
        data.setup("fit")


def test_tensors_of_a_tensor_dataset_are_images():
    tensors = torch.from_numpy(images()).permute(0, 3, 1, 2)
    data = ImageClassificationData.from_datasets(TensorDataset(tensors, torch.arange(12) % 2), preprocessing=SMALL)
    assert targets(data).tolist() == [0, 1] * 6


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Noisy(), "the first image differs from one reading to the next"),
        (iter([]), "a dataset with a length and items"),
        ([], "is empty"),
        ([{"photo": PIXELS[0], "kind": 1}] * 3, "which one is meant by input_field"),
        ([PIXELS[0]] * 3, r"an item must be \(image, target\)"),
    ],
)
def test_datasets_that_cannot_be_used_are_refused(dataset, words):
    with pytest.raises((UsageError, BadDataError), match=words):
        ImageClassificationData.from_datasets(dataset)


def test_data_of_our_own_is_used_as_it_is():
    data = ImageClassificationData.from_numpy(images(), KINDS)
    with pytest.raises(UsageError, match=r"ImageClassificationData, which has preprocessing.*") as caught:
        ImageClassificationData.from_data_module(data)
    assert caught.value.fix.startswith("trainer.finetune(model, datamodule=datamodule)")


def test_keys_of_items_can_be_named():
    items = [{"photo": PIXELS[row], "kind": KINDS[row]} for row in range(4)]
    data = ImageClassificationData.from_datasets(items, input_field="photo", target_field="kind", preprocessing=SMALL)
    assert data.describe_targets() == "2 classes, from the column 'kind'"
    assert targets(data).tolist() == [1, 0, 1, 0]


# ---- formats of one's own, and targets in names


@pytest.fixture
def arrays(tmp_path):
    paths = []
    for row in range(6):
        path = tmp_path / f"{KINDS[row]}-{row}.dat"
        path.write_bytes(PIXELS[row].tobytes())
        paths.append(str(path))
    return paths


def load_dat(path):
    with open(path, "rb") as file:
        return np.frombuffer(file.read(), np.uint8).reshape(20, 20, 3)


def test_a_function_reads_files_of_another_format(arrays):
    plain = {"preprocessing": SMALL, "augment": "none"}
    data = ImageClassificationData.from_files(arrays, target=r"/(\w)-", load_image=load_dat, **plain)
    memory = ImageClassificationData.from_numpy(images(6), KINDS[:6], **plain)
    assert all(torch.equal(left[0], right[0]) for left, right in zip(read(data), read(memory), strict=True))
    assert data.recipe()["from_files"]["load_image"] == {"not_saved": "function"}


def test_a_registered_function_is_stored_by_its_name(arrays):
    IMAGE_LOADERS.register("dat", load_dat)
    try:
        data = ImageClassificationData.from_files(arrays, target=r"/(\w)-", load_image=load_dat)
        arguments = data.recipe()["from_files"]
        assert arguments["load_image"] == "dat"
        assert ImageClassificationData.from_files(**arguments).state_dict()["files"] == data.state_dict()["files"]
        with pytest.raises(UnknownNameError, match="did you mean 'dat'"):
            ImageClassificationData.from_files(arrays, target=r"/(\w)-", load_image="dta")
    finally:
        IMAGE_LOADERS.remove("dat")


def test_a_function_that_fails_is_named_with_the_file(arrays):
    def fails(path):
        raise ValueError("no such format")

    data = ImageClassificationData.from_files(arrays, target=r"/(\w)-", load_image=fails)
    with pytest.raises(BadDataError, match=r"(?s)6 of 6 images.*a-1.dat.*fails: ValueError: no such format"):
        data.setup("fit")


def test_names_tell_the_targets_of_a_folder(tmp_path):
    for row in range(6):
        Image.fromarray(PIXELS[row]).save(tmp_path / f"{KINDS[row]}_{row}.png")
    by_pattern = ImageClassificationData.from_files(tmp_path, target=r"([ab])_\d+\.png$")
    by_function = ImageClassificationData.from_files(tmp_path, target=lambda path: path.rpartition("/")[2][0])
    assert by_pattern.counts() == by_function.counts() == {"train": {"a": 3, "b": 3}}
    arguments = by_pattern.recipe()["from_files"]
    assert arguments["train_files"] == str(tmp_path)
    assert ImageClassificationData.from_files(**arguments).state_dict()["files"] == by_pattern.state_dict()["files"]


# ---- what people see


def test_the_table_of_parts_fits_in_80_columns():
    data = ImageClassificationData.from_numpy(images(8), KINDS[:8], images(4), KINDS[:4], predict_data=images(2))
    assert repr(data).splitlines() == [
        "ImageClassificationData: 2 classes, from the column 'target'",
        "part       samples  targets                           from",
        "train            8  b 4, a 4                          train_data",
        "val              4  b 2, a 2                          val_data",
        "predict          2                                    predict_data",
    ]
    many = ImageClassificationData.from_numpy(images(), [f"a rather long name {row}" for row in range(12)])
    assert max(map(len, repr(many).splitlines())) <= 80
    numbers = ImageRegressionData.from_numpy(images(), np.arange(12) / 4)
    assert "0 to 2.75" in repr(numbers)


@pytest.mark.parametrize("name", [*ImageClassificationData.constructors, "from_numpy", "from_datasets"])
def test_editors_and_help_show_the_options_of_every_constructor(name):
    constructor = getattr(ImageClassificationData, name)
    parameters = inspect.signature(constructor).parameters
    assert parameters["batch_size"].default == 32
    assert parameters["augment"].default == "auto"
    assert "labels" in parameters or name in ("from_folders", "from_shards")
    text = pydoc.render_doc(constructor, renderer=pydoc.plaintext)
    for option in parameters:
        assert f"{option}:" in text, option
    assert text.index("batch_size: images a step") < text.index("Raises:")


class Short(Dataset):
    def __init__(self, length=12, fails_at=12):
        self.length, self.fails_at = length, fails_at

    def __len__(self):
        return self.length

    def __getitem__(self, place):
        if place == self.fails_at:
            raise IndexError(f"no item {place}")
        return PIXELS[place], place % 2


def test_a_dataset_is_split():
    data = ImageClassificationData.from_datasets(Short(), val_split=0.25, preprocessing=SMALL)
    assert data.sizes() == {"train": 9, "val": 3}
    assert len(data.split_manifest()) == 3


@pytest.mark.parametrize("dataset", [Short(length=14), Short(fails_at=7)])
def test_a_dataset_without_targets_of_its_own_names_the_item_that_fails(dataset):
    words = rf"cannot read train_dataset\[{dataset.fails_at}\]\n  why: IndexError: no item {dataset.fails_at}"
    with pytest.raises(BadDataError, match=words):
        ImageClassificationData.from_datasets(dataset)


def test_a_path_is_not_a_dataset():
    with pytest.raises(UsageError, match="must be a dataset with a length and items, not str"):
        ImageClassificationData.from_datasets("photos")
    with pytest.raises(UsageError, match="must be a DataModule, not str"):
        ImageClassificationData.from_data_module("photos")


@pytest.mark.parametrize(
    ("constructor", "data", "words"),
    [
        (
            "from_numpy",
            images().transpose(0, 3, 1, 2),
            r"train_data \(12, 3, 20, 20\) .*\n.*\n.*transpose\(0, 2, 3, 1\)",
        ),
        ("from_tensors", torch.from_numpy(images()), r"train_data \(12, 20, 20, 3\) .*\n.*\n.*permute\(0, 3, 1, 2\)"),
        ("from_numpy", images() > 100, r"of bool cannot be read as images\n.*\n.*astype"),
        ("from_numpy", np.zeros((12, 0, 20, 3), np.uint8), r"\(12, 0, 20, 3\) of uint8 cannot be read"),
    ],
)
def test_an_array_that_is_turned_is_refused_once_with_what_turns_it(constructor, data, words):
    with pytest.raises(UsageError, match=words):
        getattr(ImageClassificationData, constructor)(data, KINDS)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["cat", "cat"], "labels has 'cat' twice"),
        ("catdog", "must be a list of names, not 'catdog'"),
        ([0, 1], r"must be a list of names, not \[0, 1\]"),
    ],
)
def test_names_of_classes_are_different_texts(labels, words):
    with pytest.raises(UsageError, match=words):
        ImageClassificationData.from_numpy(images(), [0, 1] * 6, labels=labels)


@pytest.mark.parametrize(
    ("given", "words"), [(torch.tensor(3), "not array"), (3, "not 3"), (np.zeros((12, 2, 2)), r"not \(12, 2, 2\)")]
)
def test_targets_of_another_shape(given, words):
    with pytest.raises(UsageError, match=f"train_targets must .*{words}"):
        ImageClassificationData.from_numpy(images(), given)


def test_a_column_may_be_an_array_of_images():
    options = {"augment": "none", "preprocessing": SMALL}
    data = ImageClassificationData.from_data_frame("image", "kind", {"image": images(), "kind": KINDS}, **options)
    direct = ImageClassificationData.from_numpy(images(), KINDS, **options)
    for (one, kind), (two, other) in zip(read(data), read(direct), strict=True):
        assert torch.equal(one, two)
        assert kind == other


class Lazy:
    columns = ("image", "kind")

    def collect(self):
        return {}


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (Lazy(), r"is a Lazy, whose rows are not computed yet\n.*frame.collect\(\)"),
        ({"image": iter(()), "kind": KINDS}, "column 'image' must be a list, not tuple_iterator"),
        ({"image": images(), "kind": "ab"}, "column 'kind' must be a list, not str"),
    ],
)
def test_a_frame_that_cannot_be_read(frame, words):
    with pytest.raises(UsageError, match=words):
        ImageClassificationData.from_data_frame("image", "kind", frame)


def test_what_is_no_image_is_named_in_words_of_the_data():
    data = ImageClassificationData.from_images([None, *map(Image.fromarray, PIXELS[1:])], KINDS, preprocessing=SMALL)
    with pytest.raises(BadDataError, match=r"'train_images\[0\]': not an image: NoneType"):
        data.setup("fit")


def test_targets_in_memory_are_named_without_an_empty_place():
    with pytest.raises(BadDataError) as caught:
        ImageClassificationData.from_numpy(images(), ["cat"] * 12)
    assert "train_data has one class only: 'cat'" in str(caught.value)


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (1 / 255, 1.0, "so most of them are black or white"),
        (1.0, 1 / 255, "so all of them are nearly black"),
        (1.0, 0.5, ""),
    ],
)
def test_parts_on_different_scales_are_warned_of_once(train, val, words, capsys):
    data = ImageClassificationData.from_numpy(
        (images() * train).astype(np.float32),
        KINDS,
        (images(4) * val).astype(np.float32),
        KINDS[:4],
        preprocessing=SMALL,
    )
    for _ in range(2):
        data.setup("fit")
    said = capsys.readouterr().err
    assert words in said
    assert said.count("warning: the val images have values") == bool(words)
