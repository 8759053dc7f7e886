"""Files are whole or not there: errors, kills and odd targets of one atomic write."""

import errno
import os
import re
import shutil
import stat
import subprocess
import sys

import pytest

from flashtask.core.errors import MissingInputError, StorageError
from flashtask.core.files import atomic_write, atomic_write_text, missing_file, remove_partials, sha256_file

SAVE = """
import sys
from flashtask.core.errors import StorageError
from flashtask.core.files import atomic_write
try:
    with atomic_write(sys.argv[1]) as file:
        for _ in range(3):
            file.write(b"new" * 50_000)
except StorageError as error:
    sys.exit(f"{type(error).__name__} {error}")
"""


def run_save(target, *before):
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [*before, sys.executable, "-c", SAVE, str(target)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def hidden(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old and longer")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old and longer"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failure_in_the_block_leaves_the_old_file_and_no_partial(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_an_error_about_another_file_passes_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "a.bin"):
        (tmp_path / "source.bin").read_bytes()
    assert not isinstance(caught.value, StorageError)


def test_new_files_obey_the_umask_and_replaced_files_keep_their_mode(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "new", "x")
        atomic_write_text(tmp_path / "kept", "x")
        os.chmod(tmp_path / "kept", 0o604)
        atomic_write_text(tmp_path / "kept", "y")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o640
    assert stat.S_IMODE(os.stat(tmp_path / "kept").st_mode) == 0o604


def test_a_symlink_is_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").write_text("old")
    (tmp_path / "link").symlink_to("disk/real")
    (tmp_path / "dangling").symlink_to("disk/later")
    atomic_write_text(tmp_path / "link", "new")
    atomic_write_text(tmp_path / "dangling", "made")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real").read_text() == "new"
    assert (tmp_path / "disk" / "later").read_text() == "made"


def test_unfit_targets_are_storage_errors_that_name_the_fix(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    cases = {
        "folder": "give a file name",
        "missing/a": f"mkdir -p {tmp_path / 'missing'}",
        "file/a": "a file is in the way",
        "loop": "points at itself",
        "fifo": "regular file",
        "n" * 256: "shorter name",
    }
    for name, fix in cases.items():
        with pytest.raises(StorageError, match=re.escape(fix)) as caught:
            atomic_write_text(tmp_path / name, "x")
        assert str(tmp_path / name) in caught.value.what
        assert re.search(r"1 bytes are needed, [\d,]+ are free", caught.value.why)
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode)
    assert hidden(tmp_path) == []


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    name = "é" * 127 + "x"
    atomic_write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


def test_remove_partials_takes_only_what_dead_processes_left(tmp_path):
    with atomic_write(tmp_path / "a.ckpt"):
        (own,) = hidden(tmp_path)
        assert remove_partials(tmp_path) == []
    host, pid, _ = own.rsplit(".partial-")[1].split("-")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        "dead": f".a.ckpt.partial-{host}-{dead.pid}-00000000",
        "before a restart with our pid": f".a.ckpt.partial-{host}-{pid}-00000000",
        "alive": f".a.ckpt.partial-{host}-{os.getppid()}-00000000",
        "elsewhere": f".a.ckpt.partial-{'0' * 8}-{dead.pid}-00000000",
        "user's": ".a.ckpt.partial",
    }
    for name in names.values():
        (tmp_path / name).write_text("x")
    removed = remove_partials(tmp_path)
    assert {path.name for path in removed} == {names["dead"], names["before a restart with our pid"]}
    assert {names["alive"], names["elsewhere"], names["user's"], "a.ckpt"} == set(os.listdir(tmp_path))
    assert remove_partials(tmp_path / "none") == []


def test_sha256_file_and_missing_files(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "last.ckpt") == expected
    with pytest.raises(MissingInputError, match=r"did you mean 'last\.ckpt'"):
        sha256_file(tmp_path / "lst.ckpt")
    with pytest.raises(MissingInputError, match="is a folder"):
        sha256_file(tmp_path)
    assert "there is no folder" in missing_file(tmp_path / "no" / "a").why


def test_writing_a_file_loads_no_torch():
    code = "import sys, flashtask.core.files; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0


def test_b2_a_file_size_limit_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.ckpt"
    target.write_bytes(b"old")
    result = run_save(target, "bash", "-c", 'ulimit -f 200; exec "$@"', "bash")
    assert "StorageError" in result.stderr
    assert "ulimit -f unlimited" in result.stderr
    assert str(target) in result.stderr
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.ckpt"]


TRACED = "trace=openat,write,fsync,rename,close"


def traced_calls(target, log):
    """(call, its number in the process, line) of every system call of a save."""
    result = run_save(target, "strace", "-f", "-o", str(log), "-e", TRACED)
    if result.returncode:
        pytest.skip(f"strace cannot trace here: {result.stderr[-200:]}")
    return calls_in(log)


def calls_in(log):
    """From the first that names the partial file to the end of the folder's."""
    counts, points, began = {}, [], False
    for line in log.read_text().splitlines():
        match = re.match(r"\d+\s+(\w+)\(", line)
        if match:
            call = match[1]
            counts[call] = counts.get(call, 0) + 1
            began = began or ".partial-" in line
            if began:
                points.append((call, counts[call], line))
            if began and call == "close" and "rename" in [p[0] for p in points]:
                break
    return points


def save_with_fault(target, log, call, count, fault, index):
    """A save in which its call with that index fails or is the last.

    The system counts calls from the start of Python, which opens a file more or less where other processes compile
    modules meanwhile: what was hit is looked up, and where it was another call, the next count is tried.
    """
    for when in (number for number in (count, count - 1, count + 1, count - 2, count + 2) if number > 0):
        target.write_bytes(b"old")
        inject = f"inject={call}:{fault}:when={when}"
        result = run_save(target, "strace", "-f", "-o", str(log), "-e", TRACED, "-e", inject)
        points = calls_in(log)
        hit = [number for number, (_, _, line) in enumerate(points) if "(INJECTED)" in line]
        log.unlink()
        if result.returncode and (hit[0] if hit else len(points) - 1) == index:
            return result
        remove_partials(target.parent)
    raise AssertionError(f"no save was hit at {call} {count}")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a3_b3_each_system_call_of_a_save_may_fail_or_be_the_last(tmp_path):
    folder, log = tmp_path / "saves", tmp_path / "log"
    folder.mkdir()
    target, new = folder / "a.ckpt", b"new" * 150_000
    points = traced_calls(target, log)
    names = [name for name, _, _ in points]
    assert target.read_bytes() == new
    order = [name for name in names if name in ("fsync", "rename")]
    assert order == ["fsync", "rename", "fsync"]  # file, then name, then folder
    renamed = names.index("rename")
    codes = {"openat": "EROFS", "write": "ENOSPC", "fsync": "EIO", "rename": "EXDEV"}
    failed = killed = 0
    for index, (call, count, _) in enumerate(points):
        for fault in ("error=" + codes.get(call, ""), "signal=SIGKILL")[call not in codes :]:
            inject = f"{call}:{fault}, call {index} of the save"
            result = save_with_fault(target, log, call, count, fault, index)
            assert result.returncode != 0, inject
            allowed = [b"old"] if index < renamed else [new] if index > renamed else [b"old", new]
            assert target.read_bytes() in allowed, inject
            if "error" in fault:
                failed += 1
                assert "StorageError" in result.stderr
                assert os.strerror(getattr(errno, codes[call])) in result.stderr
                assert os.listdir(folder) == ["a.ckpt"]
            else:
                killed += 1
                remove_partials(folder)
                assert os.listdir(folder) == ["a.ckpt"], inject
    assert failed >= 7
    assert killed >= 9
