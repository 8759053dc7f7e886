"""Every bad image is named before training, all at once; files in two parts are found."""

from __future__ import annotations

import os

import PIL
import pytest
from image_trees import write_image
from small import made_long_ago

from flashtask.cli import run as flashtask
from flashtask.core import known_files
from flashtask.core.errors import BadDataError, UsageError
from flashtask.data.checks import check_policy, find_bad_images, find_leaks, refuse_bad
from flashtask.data.images import load_image


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path_factory.mktemp("cache")))


def some_images(folder, count, bad=()):
    paths = [str(write_image(folder / f"{i:03}.png")) for i in range(count)]
    for i in bad:
        with open(paths[i], "wb") as file:
            file.write(b"<html>" if i % 2 else b"")
    return paths


@pytest.mark.long
def test_all_bad_images_are_named_in_order_with_their_reasons(tmp_path):
    paths = some_images(tmp_path, 30, bad=(3, 8, 21))
    paths.append(str(tmp_path / "gone.png"))
    found = find_bad_images(paths)
    assert [image.path for image in found] == [paths[i] for i in (3, 8, 21, 30)]
    reasons = [image.reason for image in found]
    assert "web page" in reasons[0]
    assert "empty" in reasons[1]
    assert "does not exist" in reasons[3]


def test_the_error_names_all(tmp_path):
    paths = some_images(tmp_path, 30, bad=range(25))
    with pytest.raises(BadDataError, match="25 of 30 images cannot be read") as caught:
        refuse_bad(find_bad_images(paths), len(paths))
    text = str(caught.value)
    assert all(path in text for path in paths[:25])
    assert paths[25] not in text
    assert "more" not in text
    assert 'on_bad_image="skip"' in caught.value.fix
    assert len(caught.value.bad_images) == 25


def test_the_check_touches_nothing(tmp_path):
    paths = some_images(tmp_path, 4, bad=(1,))
    assert [image.path for image in find_bad_images(paths)] == [paths[1]]
    assert sorted(str(path) for path in tmp_path.iterdir()) == paths


def test_an_unknown_policy_is_answered_with_the_near_one(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'skip'"):
        check_policy("skipp")


def test_the_same_content_in_two_parts_is_found_under_any_name(tmp_path):
    train = some_images(tmp_path / "train", 6)
    val = some_images(tmp_path / "val", 4)
    for i, name in ((2, "copy.png"), (4, "other.png")):
        copy = tmp_path / "val" / name
        copy.write_bytes((tmp_path / "train" / f"{i:03}.png").read_bytes())
        val.append(str(copy))
    assert find_leaks(train, val) == [(val[4], train[2]), (val[5], train[4])]
    assert find_leaks(train, val[:4]) == []


def test_files_of_one_size_and_different_content_are_no_leak(tmp_path):
    (tmp_path / "a.bmp").write_bytes(b"1234")
    (tmp_path / "b.bmp").write_bytes(b"1235")
    assert find_leaks([str(tmp_path / "a.bmp")], [str(tmp_path / "b.bmp"), str(tmp_path / "gone.bmp")]) == []


def read_by_the_check(paths, channels=3):
    read = []

    def reading(path):
        read.append(path)
        return load_image(path, channels)

    bad = find_bad_images(paths, channels, reading)
    return sorted(read), [image.path for image in bad]


def test_a_good_image_is_read_once_until_it_changes_and_a_bad_one_each_time(tmp_path):
    paths = some_images(tmp_path, 4, bad=(1,))
    made_long_ago(paths)
    assert read_by_the_check(paths) == (paths, [paths[1]])
    assert read_by_the_check(paths) == ([paths[1]], [paths[1]])
    size = os.path.getsize(paths[2])
    with open(paths[2], "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * 20)
    made_long_ago([paths[2]], 2)
    assert os.path.getsize(paths[2]) == size
    assert read_by_the_check(paths) == (paths[1:3], paths[1:3])
    assert read_by_the_check(paths) == (paths[1:3], paths[1:3])


def test_new_content_behind_the_same_size_inode_and_time_of_modification_is_read(tmp_path):
    """As `rsync --inplace -t`, `tar` and `cp -a` over the same names leave it."""
    (path,) = some_images(tmp_path, 1)
    made_long_ago([path])
    before = os.stat(path)
    assert read_by_the_check([path]) == ([path], [])
    first = known_files.content_hashes([path])
    assert read_by_the_check([path]) == ([], [])
    with open(path, "r+b") as file:
        file.write(b"\xff" * 20)
    made_long_ago([path])
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert read_by_the_check([path]) == ([path], [path])
    assert known_files.content_hashes([path]) != first


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path):
    paths = some_images(tmp_path, 2)
    made_long_ago([paths[0]])
    read_by_the_check(paths)
    assert read_by_the_check(paths) == ([paths[1]], [])


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path):
    (path,) = some_images(tmp_path, 1)
    made_long_ago([path])

    def replaced_meanwhile(name):
        load_image(name)
        with open(name, "wb") as file:
            file.write(b"<html>")
        made_long_ago([name], 2)

    assert find_bad_images([path], 3, replaced_meanwhile) == []
    assert read_by_the_check([path]) == ([path], [path])


@pytest.mark.parametrize("other", ["channels", "pillow", "cleared"])
def test_what_was_checked_otherwise_is_checked_again(tmp_path, monkeypatch, other):
    paths = some_images(tmp_path, 2)
    made_long_ago(paths)
    read_by_the_check(paths)
    if other == "pillow":
        monkeypatch.setattr(PIL, "__version__", "0.0")
    if other == "cleared":
        assert flashtask(["cache", "clear"]) == 0
    assert read_by_the_check(paths, 1 if other == "channels" else 3) == (paths, [])


def test_leaks_are_found_again_without_reading_what_was_hashed(tmp_path, monkeypatch):
    train, val = some_images(tmp_path / "train", 3), some_images(tmp_path / "val", 3)
    (tmp_path / "val" / "001.png").write_bytes((tmp_path / "train" / "002.png").read_bytes())
    made_long_ago(train + val)
    found = find_leaks(train, val)
    assert (val[1], train[2]) in found
    monkeypatch.setattr(known_files, "sha256_file", lambda path: pytest.fail(f"{path} is read again"))
    assert find_leaks(train, val) == found


def test_without_a_place_for_notes_every_image_is_read(tmp_path, monkeypatch):
    paths = some_images(tmp_path / "images", 2)
    made_long_ago(paths)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "file" / "cache"))
    assert read_by_the_check(paths) == read_by_the_check(paths) == (paths, [])
