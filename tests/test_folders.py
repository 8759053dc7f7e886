"""Class folders, layouts below one root, and stratified splits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_trees import write_image, write_tree

from flashtask.core.errors import BadDataError, MissingInputError, UsageError
from flashtask.data.folders import list_class_folders, list_images
from flashtask.data.layout import existing_folder, resolve_layout, stage_folder
from flashtask.data.samples import as_text
from flashtask.data.splits import stratified_split
from flashtask.data.targets import LabelReader, Source, match_labels


def listed(root, **options):
    return list_class_folders(root, "train_folder", **options)


def test_classes_are_sorted_as_text_and_files_below_them(tmp_path):
    write_tree(tmp_path, {"10": 2, "2": 1, "b": 1, "B2": 1})
    images = listed(tmp_path)
    assert images.classes == ("10", "2", "B2", "b")
    assert images.relative_paths() == ("10/0.png", "10/1.png", "2/0.png", "B2/0.png", "b/0.png")
    assert images.names == ("10", "10", "2", "B2", "b")


def test_the_listing_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    write_tree(tmp_path, {"a": 5, "b": 5, "c/deep": 3, "c": 2})
    expected = listed(tmp_path)
    real = os.scandir

    class Shuffled(list):
        def __enter__(self):
            return self

        def __exit__(self, *details):
            return None

    for seed in range(5):
        monkeypatch.setattr(
            os, "scandir", lambda p, s=seed: Shuffled(random.Random(s).sample(x := list(real(p)), len(x)))
        )
        assert listed(tmp_path) == expected


def test_hidden_entries_are_no_data(tmp_path):
    hidden = (".ipynb_checkpoints", "a/.ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "a/@eaDir", "$RECYCLE.BIN")
    hidden += ("lost+found", "System Volume Information", "#recycle", "a/__pycache__")
    write_tree(tmp_path, dict.fromkeys(("a", "b", *hidden), 1))
    write_image(tmp_path / "a" / ".hidden.png")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert listed(tmp_path).relative_paths() == ("a/0.png", "b/0.png")


def test_nested_images_belong_to_the_class_above(tmp_path):
    write_tree(tmp_path, {"a/2023/may": 2, "b": 1})
    assert listed(tmp_path).names == ("a", "a", "b")


def test_files_that_are_no_images_are_left_out_and_named(tmp_path):
    write_tree(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "README.md").write_text("x")
    images = listed(tmp_path)
    assert len(images) == 2
    assert images.ignored == (str(tmp_path / "a" / "notes.txt"),)


def test_images_beside_class_folders_are_an_error(tmp_path):
    write_tree(tmp_path, {"a": 1, "b": 1})
    write_image(tmp_path / "lost.PNG")
    with pytest.raises(BadDataError, match=r"outside class folders: lost\.PNG\n.*'a', 'b'\n  fix: move the images"):
        listed(tmp_path)


@pytest.mark.parametrize(
    "others",
    [{}, {"music/covers": 1}, {"music/covers": 1, "more": 2}, {"": 1, "more": 2}, {"train": 2}, {"x/a": 1, "x": 1}],
)
def test_a_flat_folder_is_never_answered_with_a_parent_that_holds_other_things(others, tmp_path):
    write_tree(tmp_path, {"pics": 2, **others})
    with pytest.raises(BadDataError, match=r"has no class folders, only images: 0\.png, 1\.png") as caught:
        listed(tmp_path / "pics")
    assert f'"{tmp_path}"' not in str(caught.value)
    assert caught.value.fix.endswith(f"mkdir {tmp_path}/pics/cat {tmp_path}/pics/dog")


def test_one_class_of_several_is_answered_with_their_names_and_the_parent_as_a_question(tmp_path):
    write_tree(tmp_path, {"ants": 2, "bees": 1, ".cache": 1, "@eaDir": 1})
    with pytest.raises(BadDataError) as caught:
        listed(tmp_path / "ants")
    fix = f"if the classes are 'ants', 'bees': train_folder=\"{tmp_path}\"; otherwise move"
    assert caught.value.fix.startswith(fix)


def test_labels_in_a_table_beside_flat_images_are_named(tmp_path):
    write_tree(tmp_path, {"train": 2, "test": 2})
    (tmp_path / "train.csv").write_text("id,label")
    with pytest.raises(BadDataError, match=r"labels in a table \(train.csv\) are not read"):
        listed(resolve_layout(tmp_path).train)


@pytest.mark.parametrize("argument", ["train_folder", "val_folder"])
def test_a_single_folder_around_the_data_is_answered_with_the_one_that_holds_it(argument, tmp_path):
    write_tree(tmp_path / "classes" / "deep" / "er", {"a": 1, "b": 1})
    write_tree(tmp_path / "parts" / "zipped", {"train/a": 1, "train/b": 1, "val/a": 1})
    for name, right in (("classes", "deep/er"), ("parts", f"zipped/{argument[:-7]}")):
        with pytest.raises(BadDataError, match="has only one folder") as caught:
            list_class_folders(tmp_path / name, argument, min_classes=2)
        assert f'{argument}="{tmp_path}/{name}/{right}"' in caught.value.fix


def test_an_empty_folder_and_one_with_an_archive_are_told_apart(tmp_path):
    with pytest.raises(BadDataError, match="why: the folder is empty"):
        listed(tmp_path)
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(BadDataError, match=r"download_data.*photos\.zip.*unpacks"):
        listed(tmp_path)


def test_the_parent_of_train_and_val_is_an_error_that_names_the_argument(tmp_path):
    write_tree(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1})
    with pytest.raises(BadDataError, match=f'train_folder="{tmp_path}/train"'):
        listed(tmp_path)
    with pytest.raises(BadDataError, match=f'val_folder="{tmp_path}/val"'):
        list_class_folders(tmp_path, "val_folder")


def test_a_class_may_be_called_test(tmp_path):
    write_tree(tmp_path, {"test": 1, "control": 1})
    assert listed(tmp_path).classes == ("control", "test")
    assert resolve_layout(tmp_path).train == tmp_path


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("Training", "Testing"), {"train": "Training", "test": "Testing"}),
        (("seg_train", "seg_test"), {"train": "seg_train", "test": "seg_test"}),
        (("train", "dev"), {"train": "train", "val": "dev"}),
        (("train_set", "valid_set", "test_set"), {"train": "train_set", "val": "valid_set", "test": "test_set"}),
    ],
)
def test_folders_named_for_parts_are_parts_and_never_classes(folders, found, tmp_path):
    write_tree(tmp_path, {f"{part}/{name}": 1 for part in folders for name in ("cat", "dog")})
    layout = resolve_layout(tmp_path)
    assert {part: path.name for part, path in vars(layout).items() if path} == found
    with pytest.raises(BadDataError, match=f'these would become the classes\n  fix: train_folder="{layout.train}"'):
        listed(tmp_path)


def test_names_that_contain_a_word_for_a_part_may_still_be_classes(tmp_path):
    write_tree(tmp_path / "stations", {"train_station": 2, "bus stop": 1, "test rig/2021": 1})
    assert resolve_layout(tmp_path / "stations").train == tmp_path / "stations"
    assert listed(tmp_path / "stations").classes == ("bus stop", "test rig", "train_station")
    write_tree(tmp_path / "vehicles", {"bus": 1, "car": 1, "train": 1})
    assert resolve_layout(tmp_path / "vehicles").train == tmp_path / "vehicles"


def test_flat_parts_do_not_become_classes(tmp_path):
    write_tree(tmp_path, {"train_images": 2, "test_images": 2})
    assert resolve_layout(tmp_path).train == tmp_path / "train_images"
    with pytest.raises(BadDataError, match="these would become the classes"):
        listed(tmp_path)


def test_classes_that_hold_train_and_test_are_refused_and_the_fix_works(tmp_path):
    root = write_tree(tmp_path / "my data", {f"{c}/{p}": 2 for c in ("cat", "the dog") for p in ("train", "test")})
    with pytest.raises(BadDataError, match="classes that hold parts of the data: 'test', 'train'") as caught:
        listed(root)
    subprocess.run(caught.value.fix.split("\n", 1)[1], shell=True, check=True)
    layout = resolve_layout(f"{root}_parts")
    for part in (layout.train, layout.test):
        assert listed(part).relative_paths() == ("cat/0.png", "cat/1.png", "the dog/0.png", "the dog/1.png")


def test_the_same_folders_in_every_class_are_known(tmp_path):
    write_tree(tmp_path / "a", {f"{c}/{s}": 1 for c in ("part1", "part2") for s in ("cat", "dog")})
    assert listed(tmp_path / "a").same_subfolders() == ("cat", "dog")
    write_tree(tmp_path / "b", {"n1/images": 1, "n2/images": 1})
    write_tree(tmp_path / "c", {"x/1": 1, "x/2": 1, "x": 1, "y/1": 1, "y/2": 1})
    assert listed(tmp_path / "b").same_subfolders() == listed(tmp_path / "c").same_subfolders() == ()


def test_too_few_classes_are_an_error(tmp_path):
    with pytest.raises(BadDataError, match="no class folders"):
        listed(tmp_path)
    write_tree(tmp_path, {"only": 3})
    assert len(listed(tmp_path)) == 3
    with pytest.raises(BadDataError, match="only one class: 'only'"):
        listed(tmp_path, min_classes=2)


def test_all_classes_without_images_are_named(tmp_path):
    write_tree(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    with pytest.raises(BadDataError, match=r"2 class folder\(s\) without images: 'empty', 'text'\n.*'a.txt'"):
        listed(tmp_path, min_classes=2)
    assert listed(tmp_path).classes == ("a", "b", "empty", "text")  # a validation folder may lack a class


def test_classes_that_differ_only_by_case_are_an_error(tmp_path):
    write_tree(tmp_path, {"Cat": 1, "cat": 1, "dog": 1})
    with pytest.raises(BadDataError, match="'Cat' and 'cat'"):
        listed(tmp_path)


def test_accents_have_one_spelling(tmp_path):
    apart = unicodedata.normalize("NFD", "é")
    write_tree(tmp_path, {apart: 1, "b": 1})
    assert listed(tmp_path).classes == ("b", "é")
    write_tree(tmp_path, {"é": 1})
    with pytest.raises(BadDataError, match="how an accent is encoded"):
        listed(tmp_path)


def test_a_class_name_that_is_not_utf8_is_an_error(tmp_path):
    write_tree(tmp_path, {"a": 1})
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(BadDataError, match="not valid UTF-8"):
        listed(tmp_path)


def test_links_are_followed_and_loops_are_an_error(tmp_path):
    write_tree(tmp_path / "elsewhere", {"pictures": 2})
    write_tree(tmp_path / "data", {"a": 1})
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere" / "pictures")
    assert listed(tmp_path / "data").names == ("a", "b", "b")
    (tmp_path / "data" / "a" / "again").symlink_to(tmp_path / "data" / "a")
    with pytest.raises(BadDataError, match=r"again' points to a folder that contains it"):
        listed(tmp_path / "data")


@pytest.mark.parametrize(("place", "target"), [("a/way up", "../.."), ("way up", ".."), ("a/self", ".")])
def test_a_loop_is_answered_with_the_link_and_the_fix_leaves_all_images(place, target, tmp_path):
    write_tree(tmp_path, {"up/imgs/a": 2, "up/imgs/b": 1})
    link = tmp_path / "up" / "imgs" / place
    link.symlink_to(target)
    with pytest.raises(BadDataError, match=f"the link '{link}' points to a folder that contains it") as caught:
        listed(tmp_path / "up" / "imgs")
    subprocess.run(caught.value.fix.split(": ")[1], shell=True, check=True)
    assert len(listed(tmp_path / "up" / "imgs")) == 3


def test_a_link_to_itself_is_a_bad_image_or_an_error_that_names_it(tmp_path):
    write_tree(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "x.png").symlink_to("x.png")
    assert "a/x.png" in listed(tmp_path).relative_paths()
    (tmp_path / "a" / "x").symlink_to("x")
    assert len(listed(tmp_path)) == 3
    for target in ("c", "gone"):
        (tmp_path / "c").symlink_to(target)
        with pytest.raises(BadDataError, match=rf"the link '{tmp_path}/c' leads nowhere"):
            listed(tmp_path)
        (tmp_path / "c").unlink()


def test_a_dangling_link_is_listed_so_that_the_check_names_it(tmp_path):
    write_tree(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "x.png").symlink_to(tmp_path / "gone.png")
    assert "a/x.png" in listed(tmp_path).relative_paths()


def test_images_to_predict_need_no_classes(tmp_path):
    write_tree(tmp_path, {"any": 1})
    write_image(tmp_path / "top.jpg")
    assert list_images(tmp_path, "predict_folder").relative_paths() == ("any/0.png", "top.jpg")
    (tmp_path / "none").mkdir()
    with pytest.raises(BadDataError, match="no images below"):
        list_images(tmp_path / "none", "predict_folder")


def test_unknown_classes_are_a_diff_of_names(tmp_path):
    images = listed(write_tree(tmp_path, {"ants": 1, "bee": 1, "wasps": 1}))
    source = Source("val_folder", str(tmp_path), "class folder(s)", "train_folder")
    with pytest.raises(BadDataError) as caught:
        match_labels(images.classes, ("ants", "bees", "flies"), source)
    text = str(caught.value)
    assert "+ only in val_folder: bee\n" in text
    assert "+ only in val_folder: wasps\n" in text
    assert "- only in train_folder: bees\n" in text
    assert "did you mean 'bees'?" in text


names = st.lists(st.text("abcXYZ019_é", min_size=1, max_size=4), min_size=2, max_size=8, unique=True)


@pytest.mark.long
@settings(max_examples=100, deadline=None)
@given(names, st.data())
def test_labels_go_by_name_whatever_classes_a_part_has(labels, data):
    kept = data.draw(st.lists(st.sampled_from(labels), min_size=1, unique=True))
    sample_names = tuple(data.draw(st.lists(st.sampled_from(kept), min_size=1, max_size=12)))
    order = data.draw(st.permutations(labels))
    source = Source("val_folder", "/r", "class folder(s)", "train_folder")
    targets = LabelReader(labels=tuple(order)).read(as_text(sample_names), source)
    assert tuple(order[target] for target in targets) == sample_names
    assert set(match_labels(kept, order, source)) == set(labels) - set(kept)


@pytest.mark.long
def test_a_mistyped_path_is_answered_with_the_one_that_exists(tmp_path):
    write_tree(tmp_path / "mldata" / "hymenoptera" / "val", {"ants": 1})
    good = f'{tmp_path}/mldata/hymenoptera/val"'
    for wrong in ("mldata/hymeoptera/val/", "mldat/hymenoptera/vla", "mldata/hymenoptera/valid"):
        with pytest.raises(MissingInputError) as caught:
            existing_folder(f"{tmp_path}/{wrong}", "val_folder")
        assert f'did you mean val_folder="{good}' in caught.value.fix
    with pytest.raises(MissingInputError, match="mldata' exists, but nothing of that name below") as caught:
        existing_folder(tmp_path / "mldata" / "zzz", "val_folder")
    assert caught.value.fix == ""


def test_what_is_not_a_folder_is_refused(tmp_path):
    file = write_image(tmp_path / "a.png")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "labels.csv").write_text("")
    for path, text in (
        ("", "must be the path"),
        (5, r"must be the path of a folder, not 5 \(int\)"),
        (["a", "b"], "not a list of them"),
        (file, "is an image"),
        (tmp_path / "a.tar.gz", "is an archive\n  fix: .*download_data"),
        (tmp_path / "labels.csv", "is a table\n  fix: labels are read from the names of folders"),
    ):
        with pytest.raises(UsageError, match=text):
            existing_folder(path, "train_folder")


@pytest.mark.parametrize(
    ("address", "fix"),
    [
        ("https://x.org/a.zip", "flashtask.download_data('https://x.org/a.zip', \"data\")"),
        ("http://x.org/a.zip", "allow_http=True"),
        ("s3://bucket/some/cats", 'aws s3 sync s3://bucket/some/cats data/cats; then give the folder "data/cats"'),
        (Path("s3://bucket/cats"), "aws s3 sync s3://bucket/cats data/cats"),
        ("gs://bucket/cats/", "gcloud storage rsync -r gs://bucket/cats/ data/cats"),
        ("hf://datasets/org/cats@main/train", "hf download --repo-type dataset org/cats --local-dir data/cats"),
        ("hf://org/cats", "hf download --repo-type dataset org/cats --local-dir data/cats"),
        ("file:///data/cats", 'give the path alone: "/data/cats"'),
        ("azure://x/cats", "copy it to this machine, to data/cats"),
    ],
)
def test_an_address_is_answered_with_what_copies_it(address, fix):
    with pytest.raises(UsageError, match="train_folder is an address, not a folder") as caught:
        existing_folder(address, "train_folder")
    assert fix in caught.value.fix
    assert ("download_data" in caught.value.fix) == str(address).startswith("http")


def test_a_root_is_read_as_parts_or_as_classes(tmp_path):
    write_tree(
        tmp_path,
        {"parts/train/a": 1, "parts/Validation/a": 1, "parts/test/a": 1, "classes/a": 1, "classes/b": 1},
    )
    parts = resolve_layout(tmp_path / "parts")
    assert (parts.train.name, parts.val.name, parts.test.name) == ("train", "Validation", "test")
    classes = resolve_layout(tmp_path / "classes")
    assert (classes.train, classes.val, classes.test) == (tmp_path / "classes", None, None)
    assert stage_folder(tmp_path / "parts", "val") == tmp_path / "parts" / "Validation"
    assert stage_folder(tmp_path / "classes", "val") == tmp_path / "classes"


@pytest.mark.parametrize(
    ("folders", "text"),
    [
        (("train/a", "train/b", "cats"), "other folders with images: cats"),
        (("val/a", "val/b"), "no train/"),
        (("train/a", "val/a", "valid/a"), "two folders for val data: 'val' and 'valid'"),
    ],
)
def test_contradictory_layouts_are_errors(folders, text, tmp_path):
    write_tree(tmp_path, dict.fromkeys(folders, 1))
    with pytest.raises(BadDataError, match=text):
        resolve_layout(tmp_path)


def test_folders_are_read_without_torch(tmp_path):
    code = "import sys, flashtask.data.folders; print(sorted({'torch', 'PIL', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


class_names = st.lists(st.sampled_from("abcdef"), min_size=2, max_size=60)


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(class_names, st.floats(0.01, 0.99), st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_split_is_complete_stratified_and_free_of_the_order(classes, share, seed, rng):
    sizes = Counter(classes)
    files = [f"{name}/{i}.png" for i, name in enumerate(classes)]
    if max(sizes.values()) < 2:
        with pytest.raises(BadDataError, match="no class has two images"):
            stratified_split(files, classes, share, seed)
        return
    train, val = stratified_split(files, classes, share, seed)
    assert sorted(train + val) == list(range(len(files)))
    held = Counter(classes[i] for i in val)
    for name, size in sizes.items():
        assert (1 <= held[name] <= size - 1) if size > 1 else held[name] == 0
    order = rng.sample(range(len(files)), len(files))
    again = stratified_split([files[i] for i in order], [classes[i] for i in order], share, seed)[1]
    assert {files[order[i]] for i in again} == {files[i] for i in val}


def test_a_split_keeps_the_proportions():
    classes = ["a"] * 100 + ["b"] * 50 + ["c"] * 10
    files = [f"{name}/{i}" for i, name in enumerate(classes)]
    for share in (0.2, 32):
        assert Counter(classes[i] for i in stratified_split(files, classes, share)[1]) == {
            "a": 20,
            "b": 10,
            "c": 2,
        }
    splits = {tuple(stratified_split(files, classes, 0.2, seed)[1]) for seed in range(10)}
    assert len(splits) == 10


def test_a_new_file_leaves_the_others_where_they_are():
    files = [f"{name}/{i}" for name in "ab" for i in range(50)]
    before = {files[i] for i in stratified_split(files, [f[0] for f in files], 0.2)[1]}
    files.append("a/new")
    after = {files[i] for i in stratified_split(files, [f[0] for f in files], 0.2)[1]}
    assert len(before - after) <= 1


def test_impossible_splits_are_errors():
    files = ["a/1", "a/2", "a/3", "b/1", "b/2"]
    classes = [file[0] for file in files]
    for share in (1.0, 0.0, -0.5, True, "0.2", None, float("nan")):
        with pytest.raises(UsageError, match="val_split must be"):
            stratified_split(files, classes, share)
    for share, possible in ((0, 2), (1, 2), (4, 3)):
        with pytest.raises(UsageError, match=f"fix: val_split={possible}"):
            stratified_split(files, classes, share)
    assert len(stratified_split(files, classes, 3)[1]) == 3
