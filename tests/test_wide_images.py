"""Images of more than 8 bits a channel and arrays: every kind is read with its own values, or refused by name."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from flashtask.core.errors import BadDataError
from flashtask.data.images import image_bounds, load_image, load_scaled

TWELVE = (0, 4095)
#: 12-bit data in 16 bits: what Pillow and a division by 257 leave is 17 grey levels.
GREY = np.arange(4096, dtype=np.uint16).reshape(64, 64)
LEVELS = np.rint(GREY * (255 / 4095)).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], -1)
COLOUR_LEVELS = np.stack([LEVELS, LEVELS[::-1], LEVELS.T], -1)


def png(values, key=b""):
    """A 16-bit PNG, which Pillow can write for grey alone."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    found = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    found += chunk(b"tRNS", key) if key else b""
    return found + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiff(values, order="<", **tags):
    """An uncompressed TIFF with these tags (by number, as `t262=0`) over those of the array."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    sort = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    given = {256: width, 257: height, 258: [8 * values.itemsize] * channels, 259: 1, 262: 2 if channels > 2 else 1}
    given |= {273: 0, 277: channels, 278: height, 279: values.nbytes, 284: 1, 339: [sort] * channels}
    given |= {int(name[1:]): value for name, value in tags.items()}
    lists = {tag: value if isinstance(value, list) else [value] for tag, value in sorted(given.items())}
    at = 8 + 2 + 12 * len(lists) + 4
    entries, behind = b"", b""
    for tag, numbers in lists.items():
        if tag == 273:
            numbers = [0x7FFFFFFF]  # where the pixels begin, known at the end
        kind, size = ("I", 4) if tag in (273, 279) else ("H", 2)
        body = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(body) > 4:
            place = struct.pack(f"{order}I", at + len(behind))
            behind += body
        else:
            place = body.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, 4 if size == 4 else 3, len(numbers)) + place
    entries = entries.replace(struct.pack(f"{order}I", 0x7FFFFFFF), struct.pack(f"{order}I", at + len(behind)))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(lists))
    return head + entries + b"\0" * 4 + behind + values.astype(values.dtype.newbyteorder(order)).tobytes()


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def netpbm(values, white=65535):
    kind = b"P5" if values.ndim == 2 else b"P6"
    return kind + b" 64 64 %d\n" % white + values.astype(">u2").tobytes()


def compressed_tiff(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", compression="tiff_lzw")
    return buffer.getvalue()


GREYS = {
    "png": png(GREY),
    "tif": tiff(GREY),
    "big-endian tif": tiff(GREY, ">"),
    "tif in which 0 is white": tiff(65535 - GREY, t262=0),
    "compressed tif": compressed_tiff(GREY),
    "signed tif": tiff(GREY.astype(np.int16)),
    "32-bit tif": tiff(GREY.astype(np.int32)),
    "unsigned 32-bit tif": tiff(GREY.astype(np.uint32)),
    "float tif": tiff(GREY.astype(np.float32)),
    "pgm": netpbm(GREY),
    "uint16 npy": npy(GREY),
    "big-endian npy": npy(GREY.astype(">u2")),
    "int64 npy": npy(GREY.astype(np.int64)),
    "float16 npy": npy(GREY.astype(np.float16)),
    "float64 npy": npy(GREY.astype(np.float64)),
    "npy in Fortran's order": npy(np.asfortranarray(GREY)),
    "npy of one channel": npy(GREY[..., None]),
}
COLOURS = {
    "png": png(COLOUR),
    "tif": tiff(COLOUR),
    "big-endian tif": tiff(COLOUR, ">"),
    "tif with a fourth sample": tiff(np.dstack([COLOUR, GREY]), t338=0),
    "ppm": netpbm(COLOUR),
    "npy": npy(COLOUR),
    "float npy": npy(COLOUR.astype(np.float32)),
}


@pytest.mark.parametrize("kind", GREYS)
def test_12_bit_grey_keeps_256_levels(kind, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(GREYS[kind])
    wanted = LEVELS if "float16" not in kind else np.rint(GREY.astype(np.float16).astype(float) * (255 / 4095))
    np.testing.assert_array_equal(np.asarray(load_image(path, 1, value_range=TWELVE)), wanted)
    assert len(np.unique(wanted)) == 256
    assert load_image(path, value_range=TWELVE).mode == "RGB"
    low, high = (0, 4096) if "float16" in kind else (0, 4095)
    assert image_bounds(path) == (low, high)


@pytest.mark.parametrize("kind", COLOURS)
def test_12_bit_colour_keeps_256_levels(kind, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(COLOURS[kind])
    np.testing.assert_array_equal(np.asarray(load_image(path, value_range=TWELVE)), COLOUR_LEVELS)
    assert image_bounds(path) == TWELVE


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_transparency_lies_over_white(channels, tmp_path):
    path = tmp_path / "a.png"
    alpha = np.where(np.arange(64)[:, None] < 32, 0, 65535) + np.zeros((64, 64), int)
    path.write_bytes(png(np.dstack([GREY if channels == 1 else COLOUR, alpha])))
    found = np.asarray(load_image(path, channels, value_range=TWELVE))
    assert (found[:32] == 255).all()
    np.testing.assert_array_equal(found[32:], (LEVELS if channels == 1 else COLOUR_LEVELS)[32:])


def test_a_16_bit_colour_key_lies_over_white(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(GREY, struct.pack(">H", 256)))  # 256 and 257 have the same higher byte
    found = np.asarray(load_image(path, 1, value_range=TWELVE))
    assert (found[4, 0], found[4, 1]) == (255, LEVELS[4, 1])
    path.write_bytes(png(COLOUR, struct.pack(">HHH", *COLOUR[5, 5])))
    found = np.asarray(load_image(path, value_range=TWELVE))
    assert found[5, 5].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(found[5, 6], COLOUR_LEVELS[5, 6])


def test_values_outside_the_range_are_clipped(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[-7.0, 100.0, 160.0, 200.0, 1e9]]))
    found = np.asarray(load_image(tmp_path / "a.npy", 1, value_range=(100, 200)))
    assert found.tolist() == [[0, 0, 153, 255, 255]]


def test_bytes_are_read_as_they_are_whatever_the_range(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in ("a.npy", "a.png"):
        for value_range in (None, TWELVE, "format"):
            np.testing.assert_array_equal(np.asarray(load_image(tmp_path / name, value_range=value_range)), pixels)
        assert image_bounds(tmp_path / name) is None


@pytest.mark.parametrize("kind", ["png", "uint16 npy", "float tif"])
def test_without_a_range_the_error_gives_the_likely_one(kind, tmp_path):
    path = tmp_path / "scan"
    path.write_bytes(GREYS[kind])
    with pytest.raises(BadDataError, match="more than 8 bits a channel") as caught:
        load_image(path)
    assert repr(str(path)) in caught.value.what
    assert "values 0 to 4,095" in caught.value.why
    assert "value_range=(0, 4095)" in caught.value.fix


MISREAD = {
    "a fifth band": (tiff(np.zeros((4, 4, 5), np.uint8), t338=[0, 0]), "5 bands"),
    "alpha and a fifth band": (tiff(np.zeros((4, 4, 5), np.uint8), t338=[2, 0]), "5 bands"),
    "16-bit planes": (tiff(COLOUR, t284=2, t273=[8, 8, 8], t279=[8192] * 3), "planar TIFF"),
    "signed bytes": (tiff(np.zeros((4, 4), np.int8)), "signed 8-bit"),
    "floats in which the least is white": (tiff(GREY.astype(np.float32), t262=0), "MinIsWhite"),
    "16-bit colour times alpha": (tiff(np.dstack([COLOUR, GREY]), t338=1), "alpha is multiplied"),
    "16-bit colour as text": (b"P3 1 1 4095\n1 2 3\n", "P6"),
    "NaN": (npy(np.array([[0.0, np.nan]])), "NaN"),
    "infinity": (npy(np.array([[0.0, np.inf]])), "NaN or infinite"),
}


@pytest.mark.parametrize("kind", MISREAD)
def test_what_would_be_read_wrongly_is_refused_by_name(kind, tmp_path):
    data, reason = MISREAD[kind]
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(BadDataError) as caught:
        load_image(tmp_path / "a.tif", value_range=TWELVE)
    assert reason in caught.value.why


ARRAYS = {
    "channels first": (npy(np.zeros((3, 8, 9), np.uint8)), r"numpy.moveaxis\(array, 0, -1\)"),
    "four channels": (npy(np.zeros((8, 9, 4), np.uint8)), "1 or 3 channels"),
    "one axis": (npy(np.zeros(9, np.uint8)), "height, width"),
    "no pixels": (npy(np.zeros((0, 9), np.uint8)), "no pixels"),
    "booleans": (npy(np.zeros((8, 9), bool)), "not of integers"),
    "complex numbers": (npy(np.zeros((8, 9), complex)), "not of integers"),
    "objects": (npy(np.array([[None]])), "not of integers"),
    "fields": (npy(np.zeros((2, 2), [("a", "u2")])), "not of integers"),
    "cut": (npy(GREY)[:-3], "cut short"),
    "cut in the header": (npy(GREY)[:40], "EOF"),
    "with more behind": (npy(GREY) + b"x", "longer"),
    "another version": (b"\x93NUMPY\x02\x00" + b"\xff" * 40, "version"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_is_no_image_is_refused_by_name(kind, tmp_path):
    data, reason = ARRAYS[kind]
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(BadDataError, match=reason) as caught:
        load_image(tmp_path / "a.npy", value_range=TWELVE)
    assert caught.value.fix.startswith("replace or remove the file")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "claim", ["(9000, 9000)", "(2000000000, 1)", "(1, 99999999999999999999)", "(-1, -1)", "(9400, 9400, 3)"]
)
def test_a_header_that_claims_much_takes_no_memory(claim, tmp_path):
    """In a process that may not take as much as the header claims."""
    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {claim}, }}".encode().ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + b"\0" * 64)
    code = (
        "import resource\n"
        "from flashtask.data.images import load_image\n"
        "from flashtask.core.errors import BadDataError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)\n"
        f"try: load_image({str(tmp_path / 'a.npy')!r}, value_range=(0, 1))\n"
        "except BadDataError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "cannot read the image" in ran.stdout, ran.stderr


def test_what_is_in_memory_is_read_as_its_file_is(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    for item in (GREY, GREY[..., None], GREY.astype(np.float64), Image.fromarray(GREY), Image.open(tmp_path / "a.png")):
        np.testing.assert_array_equal(np.asarray(load_scaled(item, 1, value_range=TWELVE)[0]), LEVELS)
    np.testing.assert_array_equal(np.asarray(load_scaled(COLOUR, 3, value_range=TWELVE)[0]), COLOUR_LEVELS)
    for item in (GREY, Image.fromarray(GREY)):
        with pytest.raises(BadDataError, match=r"(?s)cannot read the image inputs\[3\].*values 0 to 4,095"):
            load_scaled(item, name="inputs[3]")


def test_a_16_bit_colour_file_that_pillow_has_opened_is_read_whole(tmp_path):
    (tmp_path / "a.png").write_bytes(png(COLOUR))
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(load_scaled(image, 3, value_range=TWELVE)[0]), COLOUR_LEVELS)


def test_large_wide_images_are_scaled_by_parts(tmp_path):
    """The floats of all rows at once would be 160 MB."""
    big = np.zeros((4000, 5000), np.int16)
    big[-1, -1] = 4095
    np.save(tmp_path / "a.npy", big)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_image(tmp_path / "a.npy", 1, value_range=TWELVE).getpixel((4999, 3999)) == 255
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 120_000  # KiB; the file is 40 MB
