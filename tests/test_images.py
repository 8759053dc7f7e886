"""One image file to one whole picture: odd and damaged files of every kind."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from image_trees import write_image
from PIL import Image, ImageFile

from flashtask.core.errors import BadDataError, MissingInputError, UsageError
from flashtask.data import wide_images
from flashtask.data.images import load_image

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def picture(height=24, width=16):
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(side):
    """A PNG of side x side white pixels in a few kilobytes."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def flipped_in_pixels(data):
    """A PNG with one bit of its last pixel chunk's checksum changed."""
    at = data.index(b"IEND") - 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGED = {
    "zero byte": (b"", "empty"),
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "text": (b"this is a caption", "not an image"),
    "JPEG cut at half": (encoded(picture(64, 64), "JPEG")[:1500], "cut short"),
    "JPEG without its end": (encoded(picture(64, 64), "JPEG")[:-2], "cut short"),
    "PNG cut at half": (encoded(picture(64, 64), "PNG")[:6000], "cut short"),
    "PNG with a bad header checksum": (
        encoded(picture(), "PNG")[:29] + b"\0\0\0\0" + encoded(picture(), "PNG")[33:],
        "",
    ),
    "PNG with a bad pixel checksum": (flipped_in_pixels(encoded(picture(), "PNG")), "broken PNG"),
    "GIF cut": (encoded(picture(64, 64), "GIF")[:900], ""),
    "bomb": (png_bomb(10_000), "pixels"),
    "large bomb": (png_bomb(16_000), "decompression bomb"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "not an image"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_with_its_reason(kind, tmp_path):
    data, reason = DAMAGED[kind]
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for filters in ("error", "ignore"):  # what Pillow only warns of is an error either way
        with warnings.catch_warnings():
            warnings.simplefilter(filters)
            with pytest.raises(BadDataError) as caught:
                load_image(path)
        assert repr(str(path)) in str(caught.value)
        assert reason in caught.value.why


def test_the_cap_on_pixels_is_the_callers_and_leaves_pillows_alone(tmp_path):
    path = write_image(tmp_path / "a.png", (20, 10))
    before = Image.MAX_IMAGE_PIXELS
    assert load_image(path, max_pixels=200).size == (10, 20)
    with pytest.raises(BadDataError, match="10 x 20 pixels"):
        load_image(path, max_pixels=199)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_cap_on_pixels_is_pillows_own_or_that_of_the_environment(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png", (20, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    with pytest.raises(BadDataError, match=r"199 allowed; PIL\.Image\.MAX_IMAGE_PIXELS or \$FLASHTASK_MAX_"):
        load_image(path)
    monkeypatch.setenv("FLASHTASK_MAX_IMAGE_PIXELS", "200")
    wide_images._take_variable.cache_clear()
    assert load_image(path).size == (10, 20)
    assert Image.MAX_IMAGE_PIXELS == 200
    monkeypatch.setenv("FLASHTASK_MAX_IMAGE_PIXELS", "1e9")
    wide_images._take_variable.cache_clear()
    with pytest.raises(UsageError, match="must be a number of pixels"):
        load_image(path)
    monkeypatch.delenv("FLASHTASK_MAX_IMAGE_PIXELS")
    wide_images._take_variable.cache_clear()


def test_half_images_cannot_be_asked_for_globally(tmp_path, monkeypatch):
    path = tmp_path / "half.jpg"
    path.write_bytes(encoded(picture(64, 64), "JPEG")[:1500])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UsageError, match="LOAD_TRUNCATED_IMAGES"):
        load_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_show_the_same_picture(orientation, tmp_path):
    upright = picture()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that the tag undoes
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif"):
        stored.save(tmp_path / name, exif=exif)
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / name)), np.asarray(upright))


def test_by_the_range_of_the_format_16_bit_grey_is_divided_by_257(tmp_path):
    """What checkpoints mean that were written before there were value ranges."""
    wide = RAMP.astype(np.uint16) * 257
    for name in ("a.png", "a.tif"):
        Image.fromarray(wide).save(tmp_path / name)
        image = load_image(tmp_path / name, value_range="format")
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image)[..., 1], RAMP)
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + wide.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.pgm", 1, value_range="format")), RAMP)


def test_by_the_range_of_the_format_floats_are_of_0_to_1_and_others_refused(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(RAMP.astype(np.float32) / 255).save(path)
    np.testing.assert_array_equal(np.asarray(load_image(path, 1, value_range="format")), RAMP)
    for values in (
        RAMP.astype(np.float32),
        RAMP.astype(np.float32) / 255 - 0.1,
        np.full((8, 8), np.nan, np.float32),
    ):
        Image.fromarray(values).save(path)
        with pytest.raises(BadDataError, match=r"outside 0\.\.1"):
            load_image(path, value_range="format")


def test_by_the_range_of_the_format_32_bit_integers_are_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.int32) * 1000).save(tmp_path / "a.tif")
    with pytest.raises(BadDataError, match="range is unknown"):
        load_image(tmp_path / "a.tif", value_range="format")


def test_transparency_lies_over_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    clear.putpixel((1, 1), (200, 0, 0, 255))
    clear.save(tmp_path / "rgba.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((1, 1), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    palette.save(tmp_path / "bytes.png", transparency=b"\x00\xff")
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    keyed.putpixel((1, 1), (200, 0, 0))
    keyed.save(tmp_path / "keyed.png", transparency=(1, 2, 3))
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    for name in ("rgba.png", "palette.png", "bytes.png", "keyed.png"):
        image = load_image(tmp_path / name)
        assert image.getpixel((0, 0)) == (255, 255, 255), name
        assert image.getpixel((1, 1)) == (200, 0, 0), name
    assert load_image(tmp_path / "la.png", 1).getpixel((0, 0)) == 255


def test_a_palette_without_transparency_gives_its_colours(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((2, 2)) == (10, 20, 30)


def test_cmyk_becomes_the_same_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = load_image(tmp_path / "a.jpg").getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15
    assert abs(load_image(tmp_path / "a.jpg", 1).getpixel((8, 8)) - 76) < 12  # the grey of pure red


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((4, 4)) == (255, 0, 0)


def test_one_pixel_and_a_wrong_extension_are_fine(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"))
    assert load_image(tmp_path / "a.jpg").getpixel((0, 0)) == (9, 8, 7)


def test_every_mode_gives_the_channels_asked_for(tmp_path):
    for mode in ("1", "L", "P", "RGB"):
        picture().convert(mode).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").mode == "RGB"
        assert load_image(tmp_path / "a.png", 1).mode == "L"
    with pytest.raises(UsageError, match="1 or 3 channels"):
        load_image(tmp_path / "a.png", 4)


def test_dangling_links_folders_and_pipes_are_named(tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (
        ("link.jpg", "does not exist"),
        ("folder.jpg", "a folder"),
        ("pipe.jpg", "regular file"),
    ):
        with pytest.raises(BadDataError, match=reason):
            load_image(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_file_is_named(tmp_path):
    path = write_image(tmp_path / "a.png")
    path.chmod(0)
    with pytest.raises(BadDataError, match="Permission denied"):
        load_image(path)


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    write_image(tmp_path / "photos" / "bee_01.png")
    with pytest.raises(MissingInputError, match=r"did you mean .*bee_01\.png"):
        load_image(tmp_path / "photos" / "bee_1.png")


def test_a_name_that_is_not_utf8_loads_and_prints(tmp_path):
    good = write_image(tmp_path / "a.png")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    os.rename(good, odd)
    assert load_image(odd).size == (8, 8)
    with open(odd, "wb"):
        pass
    with pytest.raises(BadDataError) as caught:
        load_image(odd)
    assert "/\\xff.png'" in str(caught.value).encode().decode()  # as the shell takes it
