"""`ImageClassificationData`: folders in, loaders out, labels by name."""

from __future__ import annotations

import random

import pytest
import torch
from image_trees import write_image, write_tree
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from flashtask.core.errors import BadDataError, MissingInputError, UnknownNameError, UsageError
from flashtask.core.library_internals import let_workers_go
from flashtask.core.preprocessing import Preprocessing
from flashtask.data.image_classification import ImageClassificationData
from flashtask.data.loaders import fitting_workers

SMALL = Preprocessing(input_size=(3, 16, 16))
from_folders = ImageClassificationData.from_folders


@pytest.fixture
def root(tmp_path):
    write_tree(tmp_path, {"train/ants": 5, "train/bees": 6, "val/ants": 2, "val/bees": 3, "test/bees": 2})
    return tmp_path


def test_s3_from_folders_gives_loaders_of_all_parts(root):
    write_image(root / "new" / "x.png")
    data = from_folders(
        train_folder=f"{root}/train/",
        val_folder=f"{root}/val/",
        test_folder=f"{root}/test",
        predict_folder=root / "new",
        batch_size=4,
    )
    data.preprocessing = SMALL
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 11
    assert torch.cat([labels for _, labels in data.val_dataloader()]).tolist() == [0, 0, 1, 1, 1]
    assert torch.cat([labels for _, labels in data.test_dataloader()]).tolist() == [1, 1]
    assert [images.shape for images in data.predict_dataloader()] == [(1, 3, 16, 16)]
    assert data.missing_classes == {"train": (), "val": (), "test": ("ants",)}


def test_s3_loaders_are_plain_so_that_the_engine_can_seed_them(root):
    data = from_folders(root / "train", root / "val", batch_size=4)
    data.setup("fit")
    assert type(data.train_dataloader()) is DataLoader
    assert type(data.train_dataloader().sampler) is RandomSampler
    assert type(data.val_dataloader().sampler) is SequentialSampler
    assert not data.train_dataloader().drop_last
    assert data.test_dataloader() is None
    data.batch_size = 2
    assert data.train_dataloader().batch_size == 2


def test_s4_num_classes_and_labels_are_known_before_an_image_is_read(root):
    (root / "train" / "ants" / "broken.png").write_bytes(b"")
    data = from_folders(train_folder=root / "train")
    assert data.num_classes == 2
    assert data.labels == ("ants", "bees")


def test_the_mistyped_path_of_an_argument_is_mended(tmp_path):
    write_tree(tmp_path / "hymenoptera", {"train/ants": 1, "train/bees": 1, "val/ants": 1})
    with pytest.raises(MissingInputError) as caught:
        from_folders(tmp_path / "hymenoptera" / "train", tmp_path / "hymeoptera" / "val")
    assert caught.value.fix == f'did you mean val_folder="{tmp_path}/hymenoptera/val"?'


def test_all_bad_images_of_training_and_validation_are_named_at_once(root):
    bad = [
        root / "train" / "ants" / "1.png",
        root / "train" / "bees" / "0.png",
        root / "val" / "bees" / "2.png",
    ]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    data = from_folders(root / "train", root / "val")
    with pytest.raises(BadDataError, match="3 of 16 images cannot be read") as caught:
        data.setup("fit")
    assert all(str(path) in str(caught.value) for path in bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_after_the_check_is_still_named(workers, root):
    data = from_folders(root / "train", num_workers=workers)
    data.preprocessing = SMALL
    data.setup("fit")
    path = root / "train" / "ants" / "1.png"
    path.write_bytes(b"")
    loader = data.train_dataloader()
    with pytest.raises(BadDataError, match=f"cannot read the image '{path}'\n  why: the file is empty"):
        list(loader)
    let_workers_go(loader)


@pytest.mark.long
def test_skip_leaves_bad_images_out_and_says_so(root, capsys):
    bad = root / "train" / "ants" / "1.png"
    bad.write_bytes(b"")
    data = from_folders(root / "train", root / "val", on_bad_image="skip")
    data.preprocessing = SMALL
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 10
    assert [image.path for image in data.skipped] == [str(bad)]
    captured = capsys.readouterr()
    assert str(bad) in captured.err
    assert captured.out == ""
    data.setup("fit")
    assert capsys.readouterr().err == ""  # once is enough


@pytest.mark.long
def test_a_link_to_itself_is_a_bad_image_and_obeys_skip(root, capsys):
    link = root / "train" / "ants" / "x.png"
    link.symlink_to("x.png")
    with pytest.raises(BadDataError, match=f"'{link}': a link that leads back to itself"):
        from_folders(root / "train").setup("fit")
    data = from_folders(root / "train", on_bad_image="skip")
    data.setup("fit")
    assert [image.path for image in data.skipped] == [str(link)]


def test_the_same_folders_in_every_class_are_warned_of(tmp_path, capsys):
    write_tree(tmp_path, {f"{c}/{s}": 1 for c in ("part1", "part2") for s in ("cat", "dog")})
    from_folders(tmp_path).setup("fit")
    assert "every class has the same folders (cat, dog); the classes are part1, part2" in capsys.readouterr().err


@pytest.mark.long
def test_a_class_that_skip_empties_is_an_error(root):
    for path in (root / "train" / "ants").iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadDataError, match="no image of class 'ants' can be read"):
        from_folders(root / "train", on_bad_image="skip").setup("fit")


def test_the_same_file_in_training_and_validation_is_reported(root, capsys):
    (root / "val" / "ants" / "9.png").write_bytes((root / "train" / "ants" / "3.png").read_bytes())
    data = from_folders(root / "train", root / "val")
    data.setup("fit")
    pair = (str(root / "val" / "ants" / "9.png"), str(root / "train" / "ants" / "3.png"))
    assert data.leaks == (pair,)
    assert "warning: 1 val image(s) are also training images" in capsys.readouterr().err


def test_files_that_are_no_images_are_reported(root, capsys):
    (root / "train" / "ants" / "labels.csv").write_text("x")
    from_folders(root / "train").setup("fit")
    assert "labels.csv" in capsys.readouterr().err


def test_a_validation_class_that_training_lacks_is_an_error(root):
    write_tree(root / "val", {"wasps": 1})
    with pytest.raises(BadDataError, match=r"\+ only in val_folder: wasps"):
        from_folders(root / "train", root / "val")


def test_val_split_takes_from_training_by_its_own_seed(root):
    data = from_folders(root / "train", val_split=0.3)
    data.setup("fit")
    train, val = (list(loader.dataset.paths) for loader in (data.train_dataloader(), data.val_dataloader()))
    assert (len(train), len(val)) == (8, 3)
    assert not set(train) & set(val)
    assert [f"{root}/train/{name}" for name in data.split_manifest()] == val
    assert from_folders(root / "train", val_split=0.3).split_manifest() == data.split_manifest()
    assert from_folders(root / "train", val_split=0.3, split_seed=1).split_manifest() != data.split_manifest()
    assert from_folders(root / "train").split_manifest() == ()
    assert from_folders(root / "train", val_split=0).split_manifest() == ()
    assert from_folders(root / "train", root / "val", val_split=0).split_manifest() == ()


def test_a_test_folder_alone_is_matched_to_the_labels_of_a_model(root):
    write_tree(root / "test", {"cows": 1})
    data = from_folders(test_folder=root / "test")
    assert data.labels == ("bees", "cows")
    data.set_labels(["cows", "ants", "bees"])
    assert data.labels == ("cows", "ants", "bees")
    assert data.num_classes == 3
    assert data.missing_classes["test"] == ("ants",)
    data.setup("test")
    assert data.test_dataloader().dataset.targets.tolist() == [2, 2, 0]
    with pytest.raises(BadDataError, match=r"\+ only in test_folder: cows\n.*- only in the model: ants"):
        data.set_labels(["bees", "ants"])
    for labels, text in (("ab", "list of names"), ([1, 2], "list of names"), (["a", "a"], "twice: 'a'")):
        with pytest.raises(UsageError, match=text):
            data.set_labels(labels)


def test_targets_equal_a_name_keyed_oracle_for_random_trees(tmp_path):
    rng = random.Random(0)
    pool = ["10", "2", "Zebra", "ant", "bee", "ünder", "a b", "_x"]
    for trial in range(40):
        classes = rng.sample(pool, rng.randint(2, len(pool)))
        folder = tmp_path / str(trial)
        write_tree(folder / "train", dict.fromkeys(classes, 1))
        write_tree(folder / "val", dict.fromkeys(rng.sample(classes, rng.randint(1, len(classes))), 2))
        data = from_folders(folder / "train", folder / "val")
        order = rng.sample(classes, len(classes))
        data.set_labels(order)
        for part in ("train", "val"):
            dataset = data._dataset(part)
            assert [order[target] for target in dataset.targets] == [p.split("/")[-2] for p in dataset.paths]


def test_training_alone_is_augmented(root):
    data = from_folders(root / "train", root / "val", augment="strong")
    data.preprocessing = SMALL
    data.setup("fit")
    assert data.train_dataloader().dataset.generators == ("torch",)
    assert data.val_dataloader().dataset.generators == ()


def test_a_recipe_makes_the_same_data_again(root, monkeypatch):
    monkeypatch.chdir(root)
    data = from_folders("train", batch_size=7, val_split=0.25, split_seed=3, augment="light")
    recipe = data.recipe()
    assert list(recipe) == ["from_folders"]
    assert set(recipe) <= set(ImageClassificationData.constructors)
    assert recipe["from_folders"]["train_folder"] == str(root / "train")
    again = from_folders(**recipe["from_folders"])
    assert again.recipe() == recipe
    assert again.split_manifest() == data.split_manifest()
    own = from_folders("train", transform=lambda image: image).recipe()["from_folders"]["augment"]
    assert own == {"not_saved": "function"}


def test_a_root_is_read_as_parts_or_split(root):
    parts = ImageClassificationData.from_root(root, batch_size=4)
    assert parts.recipe()["from_folders"]["val_folder"] == str(root / "val")
    assert parts.split_manifest() == ()
    classes = ImageClassificationData.from_root(root / "train")
    assert len(classes.split_manifest()) == 2
    assert len(ImageClassificationData.from_root(root / "train", val_split=4).split_manifest()) == 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"batch_size": -1}, "batch_size"),
        ({"batch_size": 2.0}, "not 2.0"),
        ({"batch_size": True}, "not True"),
        ({"num_workers": -1}, "num_workers"),
        ({"split_seed": 1.5}, "split_seed"),
        ({"val_split": 1.0}, "a share between 0 and 1"),
        ({"val_split": 0.2, "val_folder": "val"}, "both define the validation data"),
        ({"val_split": 0.2, "train_folder": None, "test_folder": "test"}, "there is none"),
        ({"train_folder": None}, "needs a folder"),
        ({"val_folder": "train"}, "the same folder"),
        ({"on_bad_image": "ignore"}, "error or skip"),
        ({"transform": "light"}, "a callable"),
        ({"transform": len, "augment": "light"}, "leave one of them out"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, text, root, monkeypatch):
    monkeypatch.chdir(root)
    with pytest.raises(UsageError, match=text):
        from_folders(**{"train_folder": "train", **options})


def test_near_names_are_given_for_augment(root):
    with pytest.raises(UnknownNameError, match="did you mean 'medium'"):
        from_folders(root / "train", augment="meduim")


def test_loaders_and_stages_that_are_not_there_are_refused(root):
    data = from_folders(root / "train")
    with pytest.raises(UsageError, match=r'data\.setup\("fit"\)'):
        data.train_dataloader()
    with pytest.raises(UsageError, match="no stage 'train'"):
        data.setup("train")


def test_small_data_is_loaded_without_processes():
    assert fitting_workers(100) == 0
    assert 0 <= fitting_workers(10_000) <= 8
