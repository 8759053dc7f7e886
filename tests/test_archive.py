"""Hostile, damaged and interrupted archives: nothing leaves the target, and the target is whole or absent."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import resource
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest

from flashtask.core.errors import IntegrityError, MissingInputError, OutputError, StorageError
from flashtask.data.archive import ArchiveLimits, extract_archive

TARS = {"tar": bytes, "tar.gz": gzip.compress, "tar.xz": lzma.compress, "tar.bz2": bz2.compress}
GOOD = {"data/cats/1.txt": b"cat" * 50, "data/dogs/2.txt": b"dog" * 50, "data/run.sh": b"#!/bin/sh\n"}


def tar_bytes(entries, **options):
    """A tar of (name, content or a TarInfo type, mode) entries."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, content, *rest in entries:
            info = tarfile.TarInfo(name)
            info.mode = rest[0] if rest else 0o644
            info.linkname = rest[1] if len(rest) > 1 else ""
            data = b"" if len(content) == 1 and content in b"1234567S" else content
            if data is not content:
                info.type = content
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zip_bytes(entries):
    """A zip of (name, content, unix mode) entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, *rest in entries:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (rest[0] if rest else stat.S_IFREG | 0o644) << 16
            archive.NameToInfo.clear()  # no warning about a duplicate, which is what some tests want
            archive.writestr(info, content)
    return file.getvalue()


def good_bytes(kind):
    entries = [(name, data, 0o755 if name.endswith(".sh") else 0o644) for name, data in GOOD.items()]
    if kind == "zip":
        return zip_bytes([(name, data, stat.S_IFREG | mode) for name, data, mode in entries])
    return TARS[kind](tar_bytes(entries))


def tree(folder):
    """Every path below a folder with its kind, mode and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else os.path.islink(path)
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found


def refused(tmp_path, content, *, match, member=None, limits=None, name="bad.archive"):
    """Extraction is refused with exit code 76 and changes nothing anywhere."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    (home / "canary").write_text("alive")
    archive = home / name
    archive.write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(IntegrityError, match=match) as caught:
        extract_archive(archive, home / "target", limits)
    assert caught.value.exit_code == 76
    assert name in str(caught.value)
    assert member is None or member in str(caught.value)
    assert tree(tmp_path) == before
    assert not (home / "target").exists()


@pytest.mark.parametrize("kind", ["zip", *TARS])
def test_good_archives_are_unpacked_with_plain_modes(tmp_path, kind):
    archive = tmp_path / "good"
    archive.write_bytes(good_bytes(kind))
    assert extract_archive(archive, tmp_path / "deep" / "target") == ("data",)
    target = tmp_path / "deep" / "target"
    assert {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()} == GOOD
    assert stat.S_IMODE((target / "data/run.sh").stat().st_mode) == 0o755
    assert stat.S_IMODE((target / "data/cats/1.txt").stat().st_mode) == 0o644
    assert sorted(os.listdir(tmp_path / "deep")) == ["target"]


NAMES = {
    "dotdot": ("../evil", r"leads out"),
    "inner dotdot": ("a/../../evil", r"leads out"),
    "absolute": ("/tmp/evil-flashtask", "absolute"),
    "drive": ("C:evil", "absolute"),
    "backslash": ("a\\evil", "backslash"),
    "empty part": ("a//evil", "empty part"),
    "dot part": ("a/./evil", "empty part"),
    "deep": ("/".join("d" * 40), "deeper"),
    "long part": ("n" * 300, "too long"),
    "long path": ("/".join(["n" * 200] * 8), "too long"),
    "reserved": (".flashtask-download-1.json", "reserved"),
}


def zip_with_names(names, *, system=3, flags=0):
    """A zip whose members have these bytes as names, as other programs and systems write them."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for number, _ in enumerate(names):
            info = zipfile.ZipInfo("?" * len(names[number]))
            info.create_system, info.flag_bits = system, flags
            archive.writestr(info, b"content")
    found = content.getvalue()
    for name in names:
        found = found.replace(b"?" * len(name), name)
    return found


def test_backslashes_of_windows_are_slashes(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_with_names([b"data\\cats\\1.txt"], system=0))
    assert extract_archive(tmp_path / "a.zip", tmp_path / "out") == ("data",)
    assert (tmp_path / "out" / "data" / "cats" / "1.txt").read_bytes() == b"content"
    refused(tmp_path, zip_with_names([b"..\\evil"], system=0), match="leads out")


def test_names_that_are_utf_8_without_saying_so_are_read_and_others_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_with_names(["data/k\u00e4fer.txt".encode()]))
    extract_archive(tmp_path / "a.zip", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "data").iterdir()] == ["k\u00e4fer.txt"]
    refused(tmp_path, zip_with_names(["\u72d7.txt".encode("gbk")]), match="not in UTF-8")


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("kind", ["zip", *TARS])
def test_g_bad_names_are_refused(tmp_path, kind, case):
    name, reason = NAMES[case]
    entries = [("ok.txt", b"fine"), (name, b"evil")]
    content = zip_bytes(entries) if kind == "zip" else TARS[kind](tar_bytes(entries))
    member = name.replace("\\", "\\\\")
    refused(tmp_path, content, match=reason, member=member)


@pytest.mark.parametrize("kind", ["zip", *TARS])
@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("a/x", "a/x", "twice"),
        ("a/x", "A/y", "case"),
        ("Straße", "STRASSE", "case"),
        ("caf\u00e9", "cafe\u0301", "accents"),
        ("a", "a/b", "twice"),
        ("a/b", "a", "twice"),
    ],
)
def test_g_duplicate_and_clashing_names_are_refused(tmp_path, kind, first, second, reason):
    entries = [(first, b"one"), (second, b"two")]
    content = zip_bytes(entries) if kind == "zip" else TARS[kind](tar_bytes(entries))
    refused(tmp_path, content, match=reason)


@pytest.mark.parametrize("kind", TARS)
@pytest.mark.parametrize(
    ("type_", "reason"),
    [
        (b"1", "hard link"),
        (b"2", "symbolic link"),
        (b"3", "character device"),
        (b"4", "block device"),
        (b"6", "fifo"),
        (b"7", "unknown type"),
        (b"S", "sparse|damaged"),
    ],
)
def test_g_links_and_devices_in_tars_are_refused(tmp_path, kind, type_, reason):
    entries = [("ok.txt", b"fine"), ("evil", type_, 0o644, "../canary"), ("evil/x", b"through the link")]
    refused(tmp_path, TARS[kind](tar_bytes(entries, format=tarfile.USTAR_FORMAT)), match=reason, member="evil")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_g_links_and_devices_in_zips_are_refused(tmp_path, mode):
    refused(
        tmp_path,
        zip_bytes([("ok", b"fine"), ("evil", b"../canary", mode | 0o777)]),
        match="symbolic link|neither",
        member="evil",
    )


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_g_setuid_bits_are_dropped(tmp_path, kind):
    archive = tmp_path / "setuid"
    mode = 0o6777
    entries = [("tool", b"x", mode | (stat.S_IFREG if kind == "zip" else 0))]
    archive.write_bytes(zip_bytes(entries) if kind == "zip" else tar_bytes(entries))
    extract_archive(archive, tmp_path / "target")
    assert stat.S_IMODE((tmp_path / "target/tool").stat().st_mode) == 0o755


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz", "tar.bz2"])
def test_g_bombs_are_refused_early_and_in_little_memory(tmp_path, kind):
    entries = [("zeros", bytes(24 * 2**20))]
    content = zip_bytes(entries) if kind == "zip" else TARS[kind](tar_bytes(entries))
    started = time.process_time()
    refused(tmp_path, content, match="unpacks to more than")
    assert time.process_time() - started < 10


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_g_limits_on_bytes_entries_and_time_hold(tmp_path, kind):
    entries = [(f"f{i}", os.urandom(1000)) for i in range(300)]
    content = zip_bytes(entries) if kind == "zip" else tar_bytes(entries)
    refused(tmp_path, content, match="unpacks to more than 100,000 bytes", limits=ArchiveLimits(max_bytes=100_000))
    refused(tmp_path, content, match="more than 200 files", limits=ArchiveLimits(max_entries=200))
    refused(tmp_path, content, match="takes longer", limits=ArchiveLimits(max_seconds=0))


def test_g_implied_folders_count_as_entries(tmp_path):
    content = tar_bytes([(f"{i}/a/b/c/file", b"") for i in range(30)])
    refused(tmp_path, content, match="more than 100 files", limits=ArchiveLimits(max_entries=100))


def test_g_overlapping_zip_entries_are_refused(tmp_path):
    content = bytearray(zip_bytes([("a", os.urandom(500)), ("b", os.urandom(500))]))
    second = content.rindex(b"PK\1\2")
    struct.pack_into("<L", content, second + 42, 0)  # the second entry points at the first one's bytes
    refused(tmp_path, bytes(content), match="overlaps")


def test_g_encrypted_and_odd_zip_entries_are_refused(tmp_path):
    content = bytearray(zip_bytes([("a", b"secret")]))
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    refused(tmp_path, bytes(content), match="encrypted")
    content = bytearray(zip_bytes([("a", b"text")]))
    content[content.index(b"PK\1\2") + 10] = 14
    refused(tmp_path, bytes(content), match="method 14")
    content = bytearray(zip_bytes([("evilXtxt", b"text")])).replace(b"evilX", b"evil\0")
    refused(tmp_path, bytes(content), match="NUL")


def test_g_zip_size_and_checksum_lies_are_refused(tmp_path):
    content = bytearray(zip_bytes([("a", b"text" * 100)]))
    place = content.index(b"PK\1\2")
    struct.pack_into("<L", content, place + 24, 10)
    refused(tmp_path, bytes(content), match="damaged|directory says")
    content = bytearray(zip_bytes([("a", b"text" * 100)]))
    content[content.index(b"PK\1\2") + 16] ^= 1
    refused(tmp_path, bytes(content), match="damaged")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", ["zip", *TARS])
def test_g_cut_archives_and_tail_garbage_are_refused(tmp_path, kind):
    content = good_bytes(kind)
    for garbage in (b"\0\0garbage", b"garbage" * 2000):
        refused(tmp_path, content + garbage, match="garbage")
    end = len(content.rstrip(b"\0")) if kind == "tar" else len(content)
    for cut in range(600, end, max(1, end // 40)) if kind == "tar" else range(20, end, max(1, end // 40)):
        refused(tmp_path, content[:cut], match="cut short|damaged|neither zip nor tar|garbage")


def test_g_tar_header_extensions_are_bounded(tmp_path):
    big = tarfile.TarInfo("x")
    big.type, big.size = b"x", 2**40
    refused(tmp_path, big.tobuf(tarfile.GNU_FORMAT) + bytes(20480), match="extension of")
    refused(tmp_path, big.tobuf(tarfile.PAX_FORMAT) + bytes(20480), match="has no member")
    for records in (b"30 path=short\n", b"nonsense", b"13 size=-100\n", b"22 GNU.sparse.major=1\n"):
        info = tarfile.TarInfo("x")
        info.type, info.size = b"x", len(records)
        refused(tmp_path, info.tobuf() + records.ljust(512, b"\0") + bytes(10240), match="extension|sparse")


def extended(records, name="x", content=b"content"):
    """A tar of one file with a header extension of the given bytes."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = b"x", len(records)
    return info.tobuf() + records.ljust(-(-len(records) // 512) * 512, b"\0") + tar_bytes([(name, content)])


def record(key, value):
    size = len(key) + len(value) + 3
    size += len(str(size + len(str(size))))
    return b"%d %s=%s\n" % (size, key, value)


def test_g_header_extensions_cannot_lead_back_or_set_a_size_that_is_not_there(tmp_path):
    refused(tmp_path, extended(record(b"size", b"-1024")), match="size that is not a number")
    refused(tmp_path, extended(record(b"size", b"1000000")), match="cut short")
    refused(tmp_path, extended(record(b"GNU.sparse.map", b"0,1")), match="sparse")
    refused(tmp_path, extended(record(b"path", b"../x")), match="leads out")


def test_g_header_extensions_that_are_not_used_take_no_time(tmp_path):
    """Of what looks like numbers tarfile's regular expressions try every beginning and every end."""
    archive = tmp_path / "slow.tar"
    archive.write_bytes(extended(record(b"path", b"y") + record(b"comment", b"1" * 500_000)))
    started = time.process_time()
    assert extract_archive(archive, tmp_path / "target") == ("y",)
    assert time.process_time() - started < 5
    assert (tmp_path / "target/y").read_bytes() == b"content"
    refused(tmp_path, extended(record(b"path", b"1" * 500_000)), match="too long")


@pytest.mark.parametrize("kind", ["zip", *TARS])
def test_g_nothing_is_written_before_every_header_was_checked(tmp_path, kind):
    entries = [("large", os.urandom(400_000)), ("../evil", b"x")]
    archive = tmp_path / "late"
    archive.write_bytes(zip_bytes(entries) if kind == "zip" else TARS[kind](tar_bytes(entries)))
    code = (
        "import resource, signal, sys; from flashtask.data.archive import extract_archive\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try: extract_archive(sys.argv[1], sys.argv[2])\n"
        "except (OSError, ValueError) as error: print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, archive, tmp_path / "target"], capture_output=True, text=True)
    assert done.returncode == IntegrityError.exit_code, done.stderr
    assert "leads out" in done.stdout


def test_a_zip_whose_end_says_that_all_sizes_are_in_the_zip64_record_is_read(tmp_path):
    content = zip_bytes([("a", b"one"), ("b", b"two")])
    end = content.rindex(b"PK\5\6")
    count, length, start = struct.unpack("<HLL", content[end + 10 : end + 20])
    record64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    archive = tmp_path / "64.zip"
    archive.write_bytes(content[:end] + record64 + locator + last)
    assert extract_archive(archive, tmp_path / "target") == ("a", "b")


def test_long_and_unicode_names_in_every_tar_dialect_are_read(tmp_path):
    name = "/".join(["långer_name" * 8] * 3) + "/файл.txt"
    for number, dialect in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        archive = tmp_path / f"{number}.tar"
        archive.write_bytes(tar_bytes([(name, b"content")], format=dialect))
        extract_archive(archive, tmp_path / str(number))
        assert (tmp_path / str(number) / name).read_bytes() == b"content"


def test_archives_of_the_system_tools_and_of_git_style_headers_are_read(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/sub/a.txt").write_text("hello")
    for flag, name in (("z", "a.tgz"), ("J", "a.txz"), ("", "a.tar")):
        subprocess.run(["tar", f"-c{flag}f", str(tmp_path / name), "-C", str(tmp_path / "in"), "."], check=True)
        assert extract_archive(tmp_path / name, tmp_path / f"out-{name}") == ("sub",)
        assert (tmp_path / f"out-{name}/sub/a.txt").read_text() == "hello"
    info = tarfile.TarInfo("pax_global_header")
    info.type, info.size = b"g", 52
    content = info.tobuf() + b"52 comment=".ljust(51, b"0").ljust(51) + b"\n"
    (tmp_path / "git.tar").write_bytes(content.ljust(1024, b"\0") + tar_bytes([("r/a", b"x")]))
    assert extract_archive(tmp_path / "git.tar", tmp_path / "git") == ("r",)


def test_a_folder_that_exists_keeps_its_content_and_no_name_is_overwritten(tmp_path):
    archive = tmp_path / "a.zip"
    archive.write_bytes(zip_bytes([("new/a", b"one"), ("top.txt", b"two")]))
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    extract_archive(archive, target)
    assert sorted(os.listdir(target)) == ["mine", "new", "top.txt"]
    before = tree(target)
    with pytest.raises(OutputError, match="exists already"):
        extract_archive(archive, target)
    assert tree(target) == before


def test_a_missing_archive_and_other_files_are_said_to_be_so(tmp_path):
    with pytest.raises(MissingInputError, match=r"no archive at .*none\.zip"):
        extract_archive(tmp_path / "none.zip", tmp_path / "t")
    refused(tmp_path, b"<!DOCTYPE html><html>", match="neither zip nor tar.*<!DOCTYPE html>", name="page.zip")


@pytest.mark.long
def test_g_five_hundred_mutated_archives_extract_inside_or_are_refused(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "canary").write_text("alive")
    draw = random.Random(20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = {kind: good_bytes(kind) for kind in ("zip", "tar", "tar.gz", "tar.xz")}
    outcomes = {"refused": 0, "extracted": 0}
    for number in range(500):
        content = bytearray(kept[draw.choice(list(kept))])
        for _ in range(draw.choice((1, 1, 2, 8))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        archive, target = home / "mutated", home / f"target{number}"
        archive.write_bytes(content)
        try:
            extract_archive(archive, target, ArchiveLimits(max_seconds=10))
            outcomes["extracted"] += 1
            assert all(not p.is_symlink() and (p.is_dir() or p.is_file()) for p in target.rglob("*"))
            remove_tree(target)
        except IntegrityError:
            outcomes["refused"] += 1
        assert sorted(os.listdir(home)) == ["canary", "mutated"]
        assert (home / "canary").read_text() == "alive"
    assert sorted(os.listdir(tmp_path)) == ["home"]
    assert outcomes["refused"] > 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 150_000  # KiB: xz alone may take 128 MiB


def remove_tree(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.long
def test_g_sigkill_in_the_middle_leaves_the_target_absent_or_complete(tmp_path):
    archive = tmp_path / "many.tar"
    archive.write_bytes(tar_bytes([(f"d{i % 50}/f{i}", b"x" * 300) for i in range(4000)]))
    code = "import sys; from flashtask.data.archive import extract_archive; print(1, flush=True); "
    code += "extract_archive(sys.argv[1], sys.argv[2])"
    target, absent = tmp_path / "target", 0
    for number in range(6):
        child = subprocess.Popen([sys.executable, "-c", code, archive, target], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.02 + 0.03 * number)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if target.exists():
            assert len([p for p in target.rglob("f*") if p.is_file()]) == 4000
            os.rename(target, tmp_path / f"done{number}")
        else:
            absent += 1
    assert absent >= 1
    extract_archive(archive, target)
    assert len(list(target.rglob("f*"))) == 4000
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".flashtask")]


def test_g_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    archive = tmp_path / "big.tar"
    archive.write_bytes(tar_bytes([("a/small", b"small"), ("a/big", os.urandom(400_000))]))
    code = (
        "import resource, signal, sys; from flashtask.data.archive import extract_archive\n"
        "from flashtask.core.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try: extract_archive(sys.argv[1], sys.argv[2])\n"
        "except StorageError as error: print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, archive, tmp_path / "target"], capture_output=True, text=True)
    assert done.returncode == StorageError.exit_code, done.stderr
    assert "big.tar" in done.stdout
    assert "bytes free" in done.stdout
    assert os.listdir(tmp_path) == ["big.tar"]
