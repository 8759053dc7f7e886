"""Every bad image is named before training, all at once; files in two parts are found."""

from __future__ import annotations

import pytest
from image_trees import write_image

from flashtask.core.errors import BadDataError, UsageError
from flashtask.data.checks import check_images, find_bad_images, find_leaks


def some_images(folder, count, bad=()):
    paths = [str(write_image(folder / f"{i:03}.png")) for i in range(count)]
    for i in bad:
        with open(paths[i], "wb") as file:
            file.write(b"<html>" if i % 2 else b"")
    return paths


def test_all_bad_images_are_named_in_order_with_their_reasons(tmp_path):
    paths = some_images(tmp_path, 30, bad=(3, 8, 21))
    paths.append(str(tmp_path / "gone.png"))
    found = find_bad_images(paths)
    assert [image.path for image in found] == [paths[i] for i in (3, 8, 21, 30)]
    reasons = [image.reason for image in found]
    assert "web page" in reasons[0]
    assert "empty" in reasons[1]
    assert "does not exist" in reasons[3]


def test_the_error_shows_the_first_twenty_and_the_number_of_all(tmp_path):
    paths = some_images(tmp_path, 30, bad=range(25))
    with pytest.raises(BadDataError, match="25 of 30 images cannot be read") as caught:
        check_images(paths)
    text = str(caught.value)
    assert all(path in text for path in paths[:20])
    assert paths[20] not in text
    assert "... and 5 more" in text
    assert 'on_bad_image="skip"' in caught.value.fix
    assert len(caught.value.bad_images) == 25


def test_skip_returns_the_bad_images_and_touches_nothing(tmp_path):
    paths = some_images(tmp_path, 4, bad=(1,))
    assert [image.path for image in check_images(paths, "skip")] == [paths[1]]
    assert sorted(str(path) for path in tmp_path.iterdir()) == paths


def test_an_unknown_policy_is_answered_with_the_near_one(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'skip'"):
        check_images([], "skipp")


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
