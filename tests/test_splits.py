"""Folds and grouped splits: shares, classes that must train, suspected groups, and what a run writes of its split."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_trees import write_image

from flashtask import ImageClassificationData, ImageClassifier, ImageRegressionData, Trainer
from flashtask.cli import run
from flashtask.core.errors import BadDataError, UsageError
from flashtask.data.groups import groups_of_names, suspected_groups
from flashtask.data.splits import ALWAYS_TRAINS, grouped_folds, grouped_split, stratified_folds, stratified_split
from flashtask.data.targets import LabelsReader, NumberReader


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Two classes of twenty images each, five of every patient, and one class with a single image."""
    root = tmp_path_factory.mktemp("patients")
    for label, first in (("ill", 0), ("well", 4)):
        for number in range(20):
            write_image(root / label / f"patient{first + number // 5}_{number % 5:02}.png")
    write_image(root / "rare" / "one.png")
    return root


# ---- folds


@given(st.lists(st.sampled_from("abcdef"), min_size=12, max_size=80), st.integers(2, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_over_the_folds_each_sample_validates_once_and_classes_are_spread(classes, count, seed):
    names = [f"{name}/{number}" for number, name in enumerate(classes)]
    try:
        folds = stratified_folds(names, classes, count, seed)
    except BadDataError:
        return
    for name, size in Counter(classes).items():
        own = folds[[one == name for one in classes]]
        if size == 1:
            assert own.tolist() == [ALWAYS_TRAINS]
            continue
        sizes = np.bincount(own, minlength=count)
        assert sizes.sum() == size  # none is left out
        assert sizes.max() - sizes.min() <= 1
        assert sizes.max() < size  # each fold trains on the class


def test_a_new_file_moves_few_between_folds():
    names = [f"{name}/{number}" for name in "ab" for number in range(100)]
    before = stratified_folds(names, [name[0] for name in names], 5)
    after = stratified_folds([*names, "a/new"], [*(name[0] for name in names), "a"], 5)
    assert (before != after[:-1]).sum() <= 4
    assert (before[100:] == after[100:-1]).all()  # the other class has not changed


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abcd")), min_size=8, max_size=80),
    st.integers(2, 4),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_grouped_folds_keep_groups_whole_and_train_on_every_class(samples, count, seed):
    groups, classes = [f"g{group}" for group, _ in samples], [(name,) for _, name in samples]
    try:
        folds = grouped_folds(groups, count, seed, classes)
    except BadDataError:
        return
    for group in set(groups):
        assert len({int(fold) for fold, one in zip(folds, groups, strict=True) if one == group}) == 1
    for fold in range(count):
        trains = {own[0] for own, of in zip(classes, folds, strict=True) if of != fold}
        assert trains == {own[0] for own in classes}


def test_grouped_splits_keep_the_shares_of_classes():
    rng = np.random.default_rng(0)
    groups = [f"p{number}" for number in rng.integers(0, 120, 2000)]
    classes = [("rare",) if int(group[1:]) % 10 == 0 else ("common",) for group in groups]
    val = grouped_split(groups, 0.2, 0, classes)
    shares = Counter(classes[row][0] for row in val)
    whole = Counter(own[0] for own in classes)
    for name in whole:
        assert abs(shares[name] / whole[name] - 0.2) < 0.06
    folds = grouped_folds(groups, 5, 0, classes)
    for name in whole:
        own = np.bincount(folds[[one == (name,) for one in classes]], minlength=5) / whole[name]
        assert abs(own - 0.2).max() < 0.08


def test_a_group_with_all_images_of_a_class_trains():
    groups = ["a", "a", "b", "b", "c", "c", "d"]
    classes = [("x",), ("only",), ("x",), ("x",), ("x",), ("x",), ("x",)]
    for seed in range(6):
        assert 1 not in grouped_split(groups, 0.4, seed, classes)
        assert (grouped_folds(groups, 3, seed, classes)[:2] == ALWAYS_TRAINS).all()
    with pytest.raises(BadDataError, match="every group has all images of a class"):
        grouped_split(["a", "b"], 0.5, 0, [("x",), ("y",)])
    with pytest.raises(BadDataError, match="do not fill 5 folds"):
        grouped_folds(["a", "b", "c"], 5)


def test_strata_that_need_not_validate_leave_the_share_as_it_is():
    names = [f"{number}" for number in range(40)]
    strata = [f"{number // 2}" for number in range(40)]
    assert len(stratified_split(names, strata, 0.1, each=False)[1]) == 4
    assert len(stratified_split(names, strata, 0.1)[1]) == 20


# ---- targets of other kinds


def test_numbers_are_split_by_ranges():
    numbers = np.array([f"{value}" for value in np.random.default_rng(1).lognormal(size=200)])
    strata = NumberReader().strata(numbers)
    assert sorted(Counter(strata).values()) == [20] * 10
    _, val = stratified_split([f"{row}" for row in range(200)], strata, 0.2, each=False)
    assert Counter(strata[row] for row in val) == dict.fromkeys(set(strata), 4)
    assert set(NumberReader().strata(numbers[:15])) == {"0"}


def test_rare_labels_are_split_where_combinations_are_rarer_still():
    rng = np.random.default_rng(2)
    rows = ["|".join(sorted({f"l{n}" for n in rng.integers(0, 12, 3)} | ({"rare"} if row % 30 == 0 else set())))
            for row in range(300)]  # fmt: skip
    reader = LabelsReader(("tags",), separator="|")
    raw = np.array([*rows, "single"])
    strata = reader.strata(raw)
    names = [f"{row}" for row in range(301)]
    _, val = stratified_split(names, strata, 0.2, each=False)
    found = Counter(name for row in val for name in reader.classes(raw)[row])
    assert len(val) == 60
    assert found["rare"] == 2
    assert found["single"] == 0
    folds = stratified_folds(names, strata, 5)
    assert folds[-1] == ALWAYS_TRAINS
    assert (folds[:-1] >= 0).all()


# ---- data


def from_folders(root, **options):
    return ImageClassificationData.from_folders(root, augment="none", **options)


def test_the_folds_of_data_are_its_training_images(patients, capsys):
    parts = [from_folders(patients, fold=(number, 4)) for number in range(1, 5)]
    held = [name for data in parts for name in data.split_manifest()]
    assert len(held) == len(set(held)) == 40
    assert from_folders(patients, fold="2/4").split_manifest() == parts[1].split_manifest()
    assert parts[1].recipe()["from_folders"]["fold"] == "2/4"
    parts[0].setup("fit")
    said = capsys.readouterr().err
    assert "1 of 3 classes are not validated, as all of their images train: 'rare' (1 image)" in said
    assert "names suggest 8 groups of images that the split separates" in said


@pytest.mark.parametrize("options", [{"val_split": 0.25}, {"fold": "1/4"}])
def test_patterns_of_names_make_groups(patients, options, capsys):
    data = from_folders(patients, group_pattern=r"(patient\d+)_", **options)
    held = Counter(name.rpartition("_")[0] for name in data.split_manifest())
    assert held
    assert set(held.values()) == {5}
    assert {name.partition("/")[0] for name in held} == {"ill", "well"}
    data.setup("fit")
    assert "suggest" not in capsys.readouterr().err


def test_wrong_folds_and_patterns_are_refused(patients):
    for fold in ("5/4", "0/4", "1/1", "2", (1, 2, 3), 0.5, (True, 2)):
        with pytest.raises(UsageError, match="fold must be"):
            from_folders(patients, fold=fold)
    with pytest.raises(UsageError, match="val_split and fold both define"):
        from_folders(patients, fold="1/4", val_split=0.2)
    with pytest.raises(UsageError, match="fold and val_folder both define"):
        from_folders(patients, val_folder=patients / "ill", fold="1/4")
    with pytest.raises(UsageError, match="is not a regular expression"):
        from_folders(patients, val_split=0.2, group_pattern="(")
    with pytest.raises(UsageError, match="has no group"):
        from_folders(patients, val_split=0.2, group_pattern="x")
    with pytest.raises(UsageError, match="matches none of 41 names"):
        from_folders(patients, val_split=0.2, group_pattern="(zebra)")


def test_groups_of_a_column_and_of_names_exclude_each_other(patients, tmp_path, capsys):
    table = tmp_path / "t.csv"
    files = sorted(patients.glob("*/patient*.png"))
    table.write_text("file,kind,who\n" + "".join(f"{f},{f.parent.name},{f.name[:8]}\n" for f in files))
    read = ImageClassificationData.from_csv
    plain = read("file", "kind", train_file=table, val_split=0.2, preprocessing={"input_size": [3, 32, 32]})
    plain.setup("fit")
    said = capsys.readouterr().err
    assert "names suggest 8 groups" in said
    assert "40 rows of t.csv" in said
    data = read("file", "kind", train_file=table, group_field="who", fold="1/4")
    assert len(data.split_manifest()) == 10
    with pytest.raises(UsageError, match="group_field and group_pattern"):
        read("file", "kind", train_file=table, group_field="who", group_pattern="(a)", val_split=0.2)


def test_regression_and_multi_label_data_have_folds(patients, tmp_path):
    files = sorted(patients.glob("*/patient*.png"))
    (tmp_path / "n.csv").write_text("file,n\n" + "".join(f"{file},{row}\n" for row, file in enumerate(files)))
    numbers = [ImageRegressionData.from_csv("file", "n", tmp_path / "n.csv", fold=(k, 4)) for k in range(1, 5)]
    assert sum(len(data.split_manifest()) for data in numbers) == 40
    assert all(6 <= len(data.split_manifest()) <= 14 for data in numbers)
    (tmp_path / "m.csv").write_text(
        "file,t\n" + "".join(f"{f},{'a;b' if r % 3 else 'a'}\n" for r, f in enumerate(files))
    )
    held = [
        name
        for k in range(1, 4)
        for name in ImageClassificationData.from_csv(
            "file", "t", tmp_path / "m.csv", label_separator=";", fold=(k, 3)
        ).split_manifest()
    ]
    assert len(held) == len(set(held)) == 40


# ---- suspected groups


def test_names_and_times_suggest_groups_only_where_there_are_some(tmp_path):
    def warned(names, val, files=None, classes=2, skips=False):
        return suspected_groups(names, files or [""] * len(names), val, classes, skips_folder=skips)

    numbered = [f"patient{row // 4}_{row % 4}.png" for row in range(40)]
    assert "names suggest 10 groups" in warned(numbered, [1, 2])
    assert not warned(numbered, range(4))  # the split separates none
    assert not warned([f"cell{row:04}.png" for row in range(40)], [1, 2])
    assert not warned([f"class{row % 2}/class{row % 2}_{row}.png" for row in range(40)], [1, 2], skips=True)
    assert "dog/video0/frame_01.png" in warned(
        [f"dog/video{row // 4}/frame_{row:02}.png" for row in range(40)], [1, 14]
    )
    files = [tmp_path / f"{name}.png" for name in "abcdefghijklmnopqrstuvwxyzABCD"]
    for row, file in enumerate(files):
        file.touch()
        os.utime(file, (1e9 + 3600 * (row // 3) + row, 1e9 + 3600 * (row // 3) + row))
    names = [file.name for file in files]
    assert "times of files suggest 10 series" in warned(names, [0], [str(file) for file in files])
    for file in files:
        os.utime(file, (1e9, 1e9))
    assert not warned(names, [0], [str(file) for file in files])


def test_names_that_do_not_match_are_groups_of_their_own():
    assert groups_of_names(["p1_a", "p1_b", "other", "more"], r"(p\d)_") == ["p1", "p1", "other", "more"]


# ---- runs


def test_a_run_writes_its_split_and_a_resumed_run_must_have_the_same(patients, tmp_path):
    def finetune(fold, epochs, **options):
        data = from_folders(
            patients, fold=fold, group_pattern=r"(patient\d+)_", preprocessing={"input_size": [3, 32, 32]}
        )
        trainer = Trainer(max_epochs=epochs, output_dir=tmp_path, enable_progress_bar=False, accelerator="cpu")
        trainer.finetune(
            ImageClassifier(backbone="mobilenetv3_small_050", pretrained=False), datamodule=data, **options
        )
        return data

    data = finetune("1/4", 1)
    with (tmp_path / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["name"] for row in rows if row["part"] == "val") == sorted(data.split_manifest())
    assert len(rows) == 41
    text = (tmp_path / "recipe.yaml").read_text()
    assert "fold: 1/4" in text
    assert "group_pattern: (patient\\d+)_" in text
    with pytest.raises(BadDataError, match="the images are not those"):
        finetune("2/4", 2, ckpt_path="last")
    assert finetune("1/4", 2, ckpt_path="last").split_manifest() == data.split_manifest()


def test_the_command_line_takes_folds_and_patterns(patients, capsys):
    assert run(["finetune", str(patients), "--fold", "5/4"]) == 2
    assert "must be from 1/N to N/N" in capsys.readouterr().err
    assert run(["finetune", str(patients), "--fold", "1/4", "--val-split", "0.2"]) == 2
    assert "both define the validation data" in capsys.readouterr().err
    code = run(["audit", str(patients), "--fold", "1/4", "--group-pattern", r"(patient\d+)_", "--json"])
    told = capsys.readouterr()
    assert json.loads(told.out)["sizes"] == {"train": 31, "val": 10}
    assert code in (0, 65)
