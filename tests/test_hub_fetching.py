"""Files of the hub, fetched with the real client from a hub on the loopback that behaves well and badly."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub_server
import pytest
from hub_server import HubServer, git_hash, sha256
from huggingface_hub import constants, file_download, hf_hub_download, set_client_factory
from huggingface_hub.utils import _http

from flashtask.core.errors import HubError, IntegrityError, StorageError, UsageError
from flashtask.core.hub import client, snapshot
from flashtask.core.hub.address import HubAddress, is_hub_address
from flashtask.core.hub.client import is_safe_name
from flashtask.core.hub.snapshot import Snapshot, fetch

WEIGHTS = random.Random(0).randbytes(200_000)
CONFIG = json.dumps({"architecture": "resnet18", "note": "x" * 300}).encode()
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub/labels.json": b'["cat"]', "README.md": b"# hello"}
WANTED = ["config.json", "model.safetensors"]
ADDRESS = HubAddress("org/name")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository, asked by this process, whose client waits a twentieth of its usual time.

    The client writes blocks of 10 MB; files of a test are smaller, so their blocks are too.
    """
    with HubServer() as server:
        hub_server.use(monkeypatch, server, tmp_path)
        server.commit_id = server.add("org/name", FILES)
        real_sleep = time.sleep
        short = types.SimpleNamespace(sleep=lambda seconds: real_sleep(seconds / 20), time=time.time)
        for module in (file_download, _http, client):
            monkeypatch.setattr(module, "time", short)
        for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
            monkeypatch.setattr(constants, name, 0.3)
        monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.3)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)
        monkeypatch.setattr(snapshot, "_said_once", set())
        yield server


def held(found):
    """What the folder that was handed out holds, by name."""
    return {path.relative_to(found.folder).as_posix(): path.read_bytes() for path in found.folder.rglob("*.*")}


# what a bad server may do

OK, HUB, INTEGRITY = "ok", HubError, IntegrityError
BYTE_MODES = [
    ("good", OK),
    ("same_size", INTEGRITY),
    ("short", INTEGRITY),
    ("long", INTEGRITY),
    ("longer_than_said", INTEGRITY),
    ("cut", OK),
    ("cut_then_dead", HUB),
    ("cut_range_ignored", OK),
    ("cut_wrong_range", OK),
    ("gzip", OK),
    ("gzip_bomb", INTEGRITY),
    ("stall_bytes", OK),
    ("reset", HUB),
    ("moves", OK),
    ("hostile_names", OK),
]
ANSWER_MODES = [
    ("http_401", HUB),
    ("http_403", HUB),
    ("http_404", HUB),
    ("gated", HUB),
    ("http_429", OK),
    ("http_500_twice", OK),
    ("http_500", HUB),
    ("dead", HUB),
    ("stall", HUB),
    ("redirect_loop", HUB),
    ("redirect_http", HUB),
    ("redirect_file", HUB),
]
CASES = [
    *((mode, "bytes", outcome) for mode, outcome in BYTE_MODES),
    *((mode, where, outcome) for mode, outcome in ANSWER_MODES for where in ("api", "head", "bytes")),
    # for a file the client waits as long as the server asks
    ("http_429_long", "api", HUB),
    ("html", "api", HUB),
    ("html", "head", HUB),
    ("html", "bytes", INTEGRITY),
]


def test_every_mode_of_the_server_is_tried():
    assert {mode for mode, _, _ in CASES} == set(hub_server.MODES)


@pytest.mark.quick_cases(10)
@pytest.mark.parametrize(("mode", "where", "outcome"), CASES, ids=[f"{mode}-{where}" for mode, where, _ in CASES])
def test_a_fetched_file_has_the_right_bytes_or_is_an_error(hub, tmp_path, mode, where, outcome):
    hub.reset(mode, where)
    begin = time.monotonic()
    if outcome is OK:
        found = fetch(ADDRESS, WANTED)
        assert held(found) == {name: FILES[name] for name in WANTED}
        assert found.commit == hub.commit_id
    else:
        with pytest.raises(outcome) as failed:
            fetch(ADDRESS, WANTED)
        assert failed.value.exit_code == {HUB: 69, INTEGRITY: 76}[outcome]
        assert failed.value.fix
        assert time.monotonic() - begin < 15
    assert not list(tmp_path.rglob("outside.json"))
    # Whatever happened, nothing wrong is left in the shared cache, and the next run has all files.
    for blob in (tmp_path / "hf" / "hub").glob("models--org--name/blobs/*"):
        content = blob.read_bytes()
        assert blob.name in (sha256(content), git_hash(content))
    if mode != "moves":
        hub.reset()
        assert held(fetch(ADDRESS, WANTED)) == {name: FILES[name] for name in WANTED}


def test_after_a_cut_it_goes_on_from_the_byte_reached(hub):
    hub.reset("cut")
    fetch(ADDRESS, ["model.safetensors"])
    cuts = hub.counted("GET /lfs") - 1
    assert cuts >= 4
    assert hub.starts == sorted(set(hub.starts))
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


def test_a_wrong_file_is_removed_and_the_error_says_so(hub, tmp_path):
    hub.reset("same_size")
    with pytest.raises(IntegrityError, match=r"model\.safetensors of hf://org/name is not the file") as failed:
        fetch(ADDRESS, ["model.safetensors"])
    assert sha256(WEIGHTS) in str(failed.value)
    assert "removed from the cache" in str(failed.value)
    assert not list((tmp_path / "hf").rglob(sha256(WEIGHTS)))
    # and the client alone would have taken it
    path = hf_hub_download("org/name", "model.safetensors", endpoint=hub.url)
    assert sha256(Path(path).read_bytes()) != sha256(WEIGHTS)


def test_a_server_that_asks_for_an_hour_is_not_waited_for(hub):
    hub.reset("http_429_long", "api")
    begin = time.monotonic()
    with pytest.raises(HubError, match="429"):
        fetch(ADDRESS, WANTED)
    assert time.monotonic() - begin < 30


def test_a_download_that_makes_progress_for_too_long_is_an_error(hub, monkeypatch):
    hub.delay = 0.3
    monkeypatch.setenv("FLASHTASK_HUB_TIMEOUT", "1")
    begin = time.monotonic()
    with pytest.raises(HubError, match=r"model\.safetensors of org/name could not be fetched in time") as failed:
        fetch(ADDRESS, WANTED)
    assert time.monotonic() - begin < 3
    assert "FLASHTASK_HUB_TIMEOUT" in failed.value.fix
    hub.delay = 0
    monkeypatch.setenv("FLASHTASK_HUB_TIMEOUT", "60")
    assert held(fetch(ADDRESS, WANTED)) == {name: FILES[name] for name in WANTED}
    monkeypatch.setenv("FLASHTASK_HUB_TIMEOUT", "soon")
    hub.add("org/other", FILES)
    with pytest.raises(UsageError, match="must be a whole number of seconds"):
        fetch(HubAddress("org/other"), WANTED)


def test_tries_after_server_errors_are_bounded(hub):
    hub.reset("http_500", "api")
    with pytest.raises(HubError, match="500"):
        fetch(ADDRESS, WANTED)
    assert hub.counted("/api/models") == 5


# offline, pinned, moving


def test_a_pinned_commit_in_the_cache_makes_no_request(hub):
    pinned = HubAddress("org/name", hub.commit_id)
    first = fetch(pinned, WANTED, optional=["head.safetensors"])
    hub.reset()
    assert fetch(pinned, WANTED, optional=["head.safetensors"]) == first
    assert hub.requests == []


def test_a_branch_makes_one_request_and_none_when_offline(hub, monkeypatch):
    first = fetch(ADDRESS, WANTED, optional=["head.safetensors"])
    hub.reset()
    assert fetch(ADDRESS, WANTED, optional=["head.safetensors"]) == first
    assert hub.counted() == hub.counted("GET /api/models/org/name") == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.reset()
    assert fetch(ADDRESS, WANTED, optional=["head.safetensors"]) == first
    assert hub.requests == []


def test_a_branch_that_moved_is_followed_and_the_old_commit_stays_to_be_had(hub):
    old = fetch(ADDRESS, ["config.json"])
    hub.commit("org/name", {"config.json": b'{"new": 1}'})
    new = fetch(ADDRESS, ["config.json"])
    assert new.commit != old.commit
    assert (new.folder / "config.json").read_bytes() == b'{"new": 1}'
    assert (fetch(HubAddress("org/name", old.commit), ["config.json"]).folder / "config.json").read_bytes() == CONFIG


def test_offline_and_not_cached_is_an_error_at_once(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.reset()
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
        fetch(ADDRESS, WANTED)
    assert hub.requests == []


def test_an_unreachable_hub_gives_what_is_cached_and_says_so_once(hub, capsys):
    first = fetch(ADDRESS, WANTED)
    hub.stop()
    begin = time.monotonic()
    assert fetch(ADDRESS, WANTED) == first
    assert fetch(ADDRESS, WANTED) == first
    assert time.monotonic() - begin < 30
    assert capsys.readouterr().err.count(f"using commit {first.commit[:12]} from the cache") == 1
    with pytest.raises(HubError, match="README"):
        fetch(ADDRESS, [*WANTED, "README.md"])


def test_an_unreachable_hub_and_nothing_cached_is_an_error_soon(hub):
    hub.stop()
    begin = time.monotonic()
    with pytest.raises(HubError, match="HF_ENDPOINT") as failed:
        fetch(ADDRESS, WANTED)
    assert time.monotonic() - begin < 30
    assert "HF_HUB_OFFLINE" in failed.value.fix
    assert "local folder" in failed.value.fix


def test_a_hub_that_is_gone_before_the_files_were_fetched_is_an_error_soon(hub):
    pinned = HubAddress("org/name", hub.commit_id)
    fetch(pinned, ["config.json"])
    hub.stop()
    begin = time.monotonic()
    with pytest.raises(HubError, match=r"model\.safetensors of org/name could not be fetched"):
        fetch(pinned, WANTED)
    assert time.monotonic() - begin < 30


def test_a_hub_that_says_no_is_not_answered_from_the_cache(hub):
    fetch(ADDRESS, WANTED)
    hub.repositories["org/name"].private = True
    with pytest.raises(HubError, match="no repository org/name"):
        fetch(ADDRESS, WANTED)


# the shared cache


@pytest.mark.parametrize("is_offline", [False, True])
def test_what_another_tool_downloaded_is_used_after_a_check(hub, monkeypatch, is_offline):
    for name in WANTED:
        hf_hub_download("org/name", name, endpoint=hub.url, cache_dir=constants.HF_HUB_CACHE)
    hub.reset()
    if is_offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert held(fetch(ADDRESS, WANTED)) == {name: FILES[name] for name in WANTED}
    assert hub.counted() == (0 if is_offline else 1)


def test_what_we_downloaded_is_used_by_other_tools_offline(hub, monkeypatch):
    fetch(ADDRESS, WANTED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = hf_hub_download("org/name", "model.safetensors", cache_dir=constants.HF_HUB_CACHE)
    assert Path(path).read_bytes() == WEIGHTS


def damage(tmp_path, digest):
    """Flip a bit of a cached blob, so that size and name stay as they were."""
    (blob,) = (tmp_path / "hf" / "hub").rglob(digest)
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.write_bytes(content)
    os.utime(blob, ns=(1, 1))
    return blob


def test_a_damaged_cached_file_is_removed_and_fetched_again(hub, tmp_path, capsys):
    fetch(ADDRESS, WANTED)
    damage(tmp_path, sha256(WEIGHTS))
    assert held(fetch(ADDRESS, WANTED))["model.safetensors"] == WEIGHTS
    assert "was damaged" in capsys.readouterr().err


def test_a_damaged_cached_file_is_an_error_offline(hub, tmp_path, monkeypatch):
    found = fetch(ADDRESS, WANTED)
    blob = damage(tmp_path, sha256(WEIGHTS))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(IntegrityError, match="removed from the cache"):
        fetch(ADDRESS, WANTED)
    assert not blob.exists()
    assert "model.safetensors" not in held(found)


def test_weights_that_were_compared_before_are_not_read_again(hub, monkeypatch):
    for name in ("_SETTLED", "_TICK"):
        monkeypatch.setattr(f"flashtask.core.known_files.{name}", -10)  # files that were made a moment ago count
    fetch(ADDRESS, WANTED)
    monkeypatch.setattr("flashtask.core.known_files.sha256_file", lambda path: pytest.fail(f"{path} is read again"))
    fetch(ADDRESS, WANTED)


def test_a_listing_that_was_damaged_is_asked_for_again(hub, tmp_path):
    pinned = HubAddress("org/name", hub.commit_id)
    fetch(pinned, WANTED)
    kept = tmp_path / "cache" / "hub" / "org--name" / f"{hub.commit_id}.json"
    kept.write_text(kept.read_text().replace(sha256(WEIGHTS), "0" * 64))
    hub.reset()
    assert held(fetch(pinned, WANTED)) == {name: FILES[name] for name in WANTED}
    assert hub.counted() == 1


def test_a_cache_that_cannot_be_written_is_a_storage_error(hub, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "taken"))
    with pytest.raises(StorageError, match="HF_HUB_CACHE"):
        fetch(ADDRESS, WANTED)


def test_a_cache_of_ours_that_cannot_be_written_only_costs_time(hub, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("FLASHTASK_CACHE", str(tmp_path / "taken"))
    for _ in range(2):
        assert held(fetch(ADDRESS, WANTED)) == {name: FILES[name] for name in WANTED}


def test_a_file_whose_hash_is_unknown_is_not_used_offline(hub, monkeypatch):
    for name in WANTED:
        path = Path(hf_hub_download("org/name", name, endpoint=hub.url, cache_dir=constants.HF_HUB_CACHE))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(IntegrityError, match="cannot be compared offline"):
        fetch(ADDRESS, WANTED[:1], optional=WANTED[1:])
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert held(fetch(ADDRESS, WANTED)) == {name: FILES[name] for name in WANTED}


def test_a_blob_that_repositories_share_is_known_by_its_own_hash(hub, tmp_path, monkeypatch):
    path = Path(hf_hub_download("org/name", "model.safetensors", endpoint=hub.url, cache_dir=constants.HF_HUB_CACHE))
    blob = path.parent / os.readlink(path)
    stored = Path(constants.HF_HUB_CACHE) / "blobs" / "aa" / ("a" * 64)
    stored.parent.mkdir(parents=True)
    blob.rename(stored)
    blob.symlink_to(stored)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert held(fetch(ADDRESS, ["model.safetensors"])) == {"model.safetensors": WEIGHTS}


def test_what_killed_downloads_left_is_removed_after_a_day(hub, tmp_path):
    blobs = tmp_path / "hf" / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "dead.1234.incomplete").write_bytes(b"x")
    (blobs / "alive.1234.incomplete").write_bytes(b"x")
    os.utime(blobs / "dead.1234.incomplete", (1e9, 1e9))
    fetch(ADDRESS, ["config.json"])
    assert [path.name for path in blobs.glob("*.incomplete")] == ["alive.1234.incomplete"]


def test_a_repository_that_was_renamed_is_followed(hub):
    hub.moved["org/old"] = "org/name"
    assert held(fetch(HubAddress("org/old"), WANTED)) == {name: FILES[name] for name in WANTED}


def test_threads_fetch_at_once(hub):
    hub.delay = 0.01
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: fetch(ADDRESS, [name]), FILES))
    assert {one.commit for one in found} == {hub.commit_id}
    assert held(found[0]) == FILES


def test_the_session_that_a_user_set_up_is_used(hub, monkeypatch):
    made = []

    def own_session():
        made.append(_http.default_client_factory())
        made[-1].headers["X-Of-The-User"] = "1"
        return made[-1]

    set_client_factory(own_session)
    try:
        fetch(ADDRESS, WANTED)
    finally:
        set_client_factory(_http.default_client_factory)
    assert len(made) == 1


# what is asked for, and what is refused


def test_only_what_was_asked_for_is_fetched(hub):
    found = fetch(ADDRESS, ["sub/labels.json"], optional=["config.json", "not/there.json"])
    assert held(found) == {"sub/labels.json": b'["cat"]', "config.json": CONFIG}
    assert hub.counted("README") == hub.counted("safetensors") == 0


def test_more_than_max_bytes_is_refused_before_a_byte_is_fetched(hub):
    with pytest.raises(IntegrityError, match=r"hf download org/name config\.json"):
        fetch(ADDRESS, WANTED, max_bytes=100_000)
    assert hub.counted("resolve") == 0


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/passwd", "a/../../b", "a\\b", "a\0b", "", "C:x", "sub/", "nul.txt"]
)
def test_names_that_could_lead_outside_are_refused(hub, name):
    assert not is_safe_name(name)
    with pytest.raises(IntegrityError, match="refused the file name"):
        fetch(ADDRESS, ["config.json"], optional=[name])
    assert hub.requests == []


@pytest.mark.parametrize("name", ["model.py", "sub/Model.PY", "lib.so"])
def test_code_is_never_fetched(hub, name):
    with pytest.raises(IntegrityError, match="code from a repository"):
        fetch(ADDRESS, [name])
    assert hub.requests == []


def test_a_missing_file_names_the_nearest(hub):
    with pytest.raises(HubError, match=r"did you mean 'model\.safetensors'"):
        fetch(ADDRESS, ["model.safetensor"])


def test_a_missing_revision_names_the_nearest(hub):
    hub.commit("org/name", FILES, branch="release")
    with pytest.raises(HubError, match="did you mean 'release'"):
        fetch(HubAddress("org/name", "relaese"), WANTED)


# private, gated, tokens


def test_a_private_repository_says_to_log_in_and_opens_with_a_token(hub, monkeypatch):
    hub.add("org/secret", FILES, private=True)
    with pytest.raises(HubError, match="not logged in") as failed:
        fetch(HubAddress("org/secret"), WANTED)
    assert "hf auth login" in failed.value.fix
    hub.allow("hf_right", "org/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert held(fetch(HubAddress("org/secret"), WANTED))["model.safetensors"] == WEIGHTS


def test_a_gated_repository_says_where_to_accept_and_never_prints_the_token(hub, monkeypatch, capsys):
    hub.add("org/gated", FILES, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    with pytest.raises(HubError, match="gated") as failed:
        fetch(HubAddress("org/gated"), WANTED)
    assert f"{hub.url}/org/gated" in failed.value.fix
    assert "hf auth login" in failed.value.fix
    assert "Bearer hf_secret_token" in hub.authorizations
    said = str(failed.value) + "".join(capsys.readouterr())
    assert "is restricted" in said
    assert "hf_secret_token" not in said


class Store(http.server.BaseHTTPRequestHandler):
    """Another host, which keeps large files and notes who asks."""

    def do_GET(self):
        self.server.asked.append(dict(self.headers))
        self.send_response(200)
        self.send_header("Content-Length", str(len(WEIGHTS)))
        self.end_headers()
        self.wfile.write(WEIGHTS)

    def log_message(self, *args):
        pass


@pytest.fixture
def other_host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_redirect_elsewhere_is_followed_without_the_token(hub, other_host, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    hub.allow("hf_secret_token")
    hub.cdn = f"http://127.0.0.1:{other_host.server_address[1]}"
    assert held(fetch(ADDRESS, ["model.safetensors"]))["model.safetensors"] == WEIGHTS
    assert len(other_host.asked) == 1
    assert "Authorization" not in {name.title() for name in other_host.asked[0]}
    assert "Bearer hf_secret_token" in hub.authorizations


# several processes

PROGRAM = """
import sys
from flashtask.core.hub.address import HubAddress
from flashtask.core.hub.snapshot import fetch
found = fetch(HubAddress("org/name"), ["config.json", "model.safetensors"])
print(found.commit, found.folder)
"""


def start(hub, folder):
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "FLASHTASK_CACHE": str(folder / "cache"),
        "NO_PROXY": "*",
        "HF_HUB_OFFLINE": "0",
    }
    environment = {**os.environ, **variables}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=-1, stderr=-1, text=True)


@pytest.mark.long
def test_four_processes_at_once_fetch_the_same_repository(hub, tmp_path):
    hub.reset()
    hub.delay = 0.02
    running = [start(hub, tmp_path) for _ in range(4)]
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    folder = f"{tmp_path}/hf/hub/models--org--name/snapshots/{hub.commit_id}"
    assert {out for out, _ in said} == {f"{hub.commit_id} {folder}\n"}
    assert held(Snapshot(hub.commit_id, Path(said[0][0].split()[1]))) == {name: FILES[name] for name in WANTED}
    assert hub.counted("GET /lfs") == 1
    assert {err for _, err in said} == {""}


def killed_then_finished(hub, folder, kills, seed, *, at_once, longest):
    """Kill runs at random times; then as many again end well, and nothing but unfinished files was left."""
    random_times = random.Random(seed)
    for _ in range(kills):
        running = [start(hub, folder) for _ in range(at_once)]
        time.sleep(random_times.uniform(0.2, longest))
        for process in running:
            process.send_signal(signal.SIGKILL)
        for process in running:
            process.communicate()
    running = [start(hub, folder) for _ in range(at_once)]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * at_once, said
    assert held(Snapshot(hub.commit_id, Path(said[0][0].split()[1]))) == {name: FILES[name] for name in WANTED}
    names = {path.name for path in (folder / "hf" / "hub").glob("models--org--name/blobs/*")}
    assert {name for name in names if not name.endswith(".incomplete")} == {sha256(WEIGHTS), git_hash(CONFIG)}


@pytest.mark.long
def test_a_run_that_was_killed_is_finished_by_the_next(hub, tmp_path):
    hub.delay = 0.05
    killed_then_finished(hub, tmp_path, 4, 1, at_once=1, longest=1.2)


@pytest.mark.long
def test_four_runs_that_were_killed_thirty_times_are_finished_by_the_next(hub, tmp_path):
    for seed in range(3):
        hub.delay = 0.02 * (seed + 1)
        (tmp_path / str(seed)).mkdir()
        killed_then_finished(hub, tmp_path / str(seed), 10, seed, at_once=4, longest=3.0)


# addresses


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("hf://org/name", "org/name", None),
        ("hf://org/na.me_x-1@refs/pr/3", "org/na.me_x-1", "refs/pr/3"),
        ("hf-hub:timm/resnet18.a1_in1k@v1.0", "timm/resnet18.a1_in1k", "v1.0"),
        ("org/name@" + "a" * 40, "org/name", "a" * 40),
    ],
)
def test_addresses_are_read(text, repository, revision):
    assert HubAddress.parse(text) == HubAddress(repository, revision)
    assert is_hub_address(text) == text.startswith("hf")
    assert HubAddress.parse(str(HubAddress.parse(text))) == HubAddress.parse(text)


NO_REPOSITORIES = [
    "",
    "name",
    "org/",
    "/name",
    "org/name/more",
    "../name",
    "./name",
    "org/..",
    "org/na..me",
    "org/na--me",
]
NO_REPOSITORIES += [
    "org\\name",
    "org/name?x",
    "or%67/name",
    "org/name\nx",
    "hf://hf://org/name",
    "hf-hub:hf://org/name",
]
NO_REVISIONS = ["org/name@", "org/name@../x", "org/name@-x", "org/name@a@b", "org/name@a b", "https://hf.co/org/name"]


@pytest.mark.parametrize("text", NO_REPOSITORIES + NO_REVISIONS)
def test_what_is_no_address_is_a_usage_error(text):
    with pytest.raises(UsageError) as failed:
        HubAddress.parse(text)
    assert failed.value.fix


def test_a_hash_of_the_small_files_is_the_one_git_makes():
    assert git_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert hashlib.sha256(b"").hexdigest() == sha256(b"")
