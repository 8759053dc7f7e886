"""`download_data` against a real server on the loopback that cuts, lies, stalls and redirects."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from flashtask.core.errors import (
    HubError,
    IntegrityError,
    MissingInputError,
    OutputError,
    StorageError,
    UsageError,
)
from flashtask.data import download_resume
from flashtask.data.archive import ArchiveLimits
from flashtask.data.download import download_data


def zip_of(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


FILES = {"pets/cat.bin": os.urandom(120_000), "pets/dog.bin": os.urandom(80_000)}
BODY = zip_of(FILES)
SHA = hashlib.sha256(BODY).hexdigest()
ETAG = '"v1"'


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's `mode` says and notes every request."""

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        getattr(self, "mode_" + self.server.mode)(len(self.server.requests))

    def log_message(self, *args):
        pass

    def send(self, body, *, status=200, stop=None, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[:stop])
        self.server.sent += len(body[:stop])

    def send_part(self, *, stop=None, body=BODY, etag=ETAG):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        validators = {"ETag": etag} if etag else {}
        if asked and self.headers.get("If-Range", etag) == etag:
            start = int(asked[1])
            where = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.send(body[start:], status=206, stop=stop, Content_Range=where, **validators)
        else:
            self.send(body, stop=stop, **validators)

    def mode_good(self, number):
        self.send_part()

    def mode_cut(self, number):
        self.send_part(stop=len(BODY) // 5)

    def mode_cut_without_etag(self, number):
        self.send_part(stop=len(BODY) // 5, etag="")

    def mode_cut_then_dead(self, number):
        if number == 1:
            self.send_part(stop=len(BODY) // 5)

    def mode_cut_then_changed(self, number):
        if number == 1:
            self.send_part(stop=len(BODY) // 5)
        else:
            self.send_part(body=NEW_BODY, etag='"v2"')

    def mode_range_ignored(self, number):
        self.send(BODY, stop=len(BODY) // 2 if number == 1 else None, ETag=ETAG)

    def mode_wrong_range(self, number):
        if number == 1:
            self.send_part(stop=len(BODY) // 5)
        else:
            self.mode_unasked_part(number)

    def mode_unasked_part(self, number):
        self.send(BODY[7:], status=206, Content_Range=f"bytes 7-{len(BODY) - 1}/{len(BODY)}")

    def mode_short(self, number):
        self.send(BODY, length=len(BODY) + 1000)

    def mode_long(self, number):
        self.send(BODY + b"more", length=len(BODY))

    def mode_announced_too_short(self, number):
        self.send(BODY, length=len(BODY) - 100)

    def mode_no_length(self, number):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(BODY)

    def chunks(self, end):
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(BODY), 50_000):
            block = BODY[start : start + 50_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
        self.wfile.write(end)
        self.close_connection = True

    def mode_chunked(self, number):
        self.chunks(b"0\r\n\r\n")

    def mode_chunked_cut(self, number):
        self.chunks(b"")

    def mode_status(self, number):
        status, extra, times = self.server.status
        if number <= times:
            self.send(b"sorry", status=status, **extra)
        else:
            self.send_part()

    def mode_stall(self, number):
        self.send_part(stop=1000 if number == 1 else 0)
        self.server.released.wait(5)

    def mode_drip(self, number):
        self.send(BODY, stop=0)
        while not self.server.released.wait(0.05):
            try:
                self.wfile.write(b"x")
            except OSError:
                return

    def mode_slow(self, number):
        self.send_part(stop=0)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        for start in range(int(asked[1]) if asked else 0, len(BODY), 2048):
            try:
                self.wfile.write(BODY[start : start + 2048])
            except OSError:
                return
            time.sleep(0.01)

    def mode_redirect(self, number):
        if self.path.startswith("/final"):
            self.send_part()
        else:
            self.send(b"", status=302, Location=self.server.location)

    def mode_gzip(self, number):
        self.send(gzip.compress(BODY), Content_Encoding="gzip")

    def mode_disposition(self, number):
        self.send(b"text", Content_Disposition='attachment; filename="../../evil.txt"')

    def mode_page(self, number):
        self.send(b"<!DOCTYPE html><title>Log in</title>")


NEW_BODY = zip_of({"pets/new.bin": os.urandom(1000)})


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download_resume, "BACKOFF_SECONDS", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.mode, server.requests, server.sent, server.released = "good", [], 0, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/pets.zip"
    server.handle_error = lambda request, address: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def hidden(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def test_s2_download_data_unpacks_into_the_folder_and_a_second_call_makes_no_request(server, tmp_path, capsys):
    folder = download_data(server.url, tmp_path / "data", allow_http=True)
    assert folder == tmp_path / "data"
    assert contents(folder) == FILES
    assert os.listdir(tmp_path) == ["data"]
    assert len(server.requests) == 1
    capsys.readouterr()
    for checksum in (None, SHA, f"sha256:{SHA}"):
        download_data(server.url, folder, checksum=checksum, allow_http=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [f"pets.zip is in {folder} already: nothing to download"] * 3
    assert len(server.requests) == 1


def test_s2_download_data_loads_again_what_was_removed(server, tmp_path):
    folder = download_data(server.url, tmp_path, checksum=SHA)
    (folder / "pets").rename(tmp_path / "moved")
    download_data(server.url, tmp_path, checksum=SHA)
    assert (folder / "pets/cat.bin").read_bytes() == FILES["pets/cat.bin"]
    assert len(server.requests) == 2


def test_s2_download_data_keeps_what_is_in_the_folder_and_overwrites_nothing(server, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "pets").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        download_data(server.url, tmp_path, allow_http=True)
    assert contents(tmp_path) == {"mine": b"mine"}
    (tmp_path / "pets").rmdir()
    download_data(server.url, tmp_path, allow_http=True)
    assert contents(tmp_path) == {"mine": b"mine"} | FILES
    assert len(server.requests) == 1, "the verified file of the first call is used"
    assert len(hidden(tmp_path)) == 1, "only the marker stays"


def test_s2_download_data_takes_sha256_and_md5_and_refuses_a_wrong_sum(server, tmp_path):
    download_data(server.url, tmp_path / "a", checksum=f"SHA256:{SHA.upper()}")
    download_data(server.url, tmp_path / "b", checksum=f"md5:{hashlib.md5(BODY).hexdigest()}")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == FILES
    with pytest.raises(IntegrityError, match="is not the file") as caught:
        download_data(server.url, tmp_path / "c", checksum="0" * 64)
    assert SHA in str(caught.value)
    assert caught.value.exit_code == 76
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("text", ["", "abc", "md5:" + "0" * 64, "sha1:" + "0" * 40, "0" * 32])
def test_s2_download_data_refuses_what_is_no_checksum(server, tmp_path, text):
    with pytest.raises(UsageError, match="is not a checksum"):
        download_data(server.url, tmp_path, checksum=text)
    assert server.requests == []


def test_s2_download_data_goes_on_after_each_cut_from_the_byte_reached(server, tmp_path):
    server.mode = "cut"
    download_data(server.url, tmp_path / "data", allow_http=True)
    assert contents(tmp_path / "data") == FILES
    assert server.sent == len(BODY), "no byte is sent twice"
    starts = [headers.get("Range") for _, headers in server.requests]
    assert starts[0] is None
    assert starts[1] == f"bytes={len(BODY) // 5}-"
    assert {headers.get("If-Range") for _, headers in server.requests[1:]} == {ETAG}


def test_s2_download_data_without_validator_goes_on_only_when_a_checksum_proves_it(server, tmp_path):
    server.mode = "cut_without_etag"
    download_data(server.url, tmp_path / "data", checksum=SHA)
    assert contents(tmp_path / "data") == FILES
    assert server.sent == len(BODY)
    with pytest.raises(HubError, match="attempts in a row"):
        download_data(server.url, tmp_path / "other", allow_http=True)
    assert all("Range" not in headers for _, headers in server.requests[-3:])


def test_s2_download_data_keeps_the_part_when_the_server_dies_and_a_later_call_goes_on(server, tmp_path):
    server.mode = "cut_then_dead"
    with pytest.raises(HubError, match="cannot download") as caught:
        download_data(server.url, tmp_path / "data", allow_http=True)
    assert caught.value.exit_code == 69
    assert not (tmp_path / "data").exists()
    assert len(server.requests) == 1 + download_resume.MAX_FAILURES
    assert all(name.startswith(".flashtask-") for name in os.listdir(tmp_path))
    server.mode = "good"
    download_data(server.url, tmp_path / "data", allow_http=True)
    assert contents(tmp_path / "data") == FILES
    assert server.sent == len(BODY)
    assert os.listdir(tmp_path) == ["data"]


def test_s2_download_data_starts_again_when_the_file_changed_or_range_is_ignored(server, tmp_path):
    server.mode = "cut_then_changed"
    download_data(server.url, tmp_path / "changed", allow_http=True)
    assert list(contents(tmp_path / "changed")) == ["pets/new.bin"]
    server.requests.clear()
    server.mode = "range_ignored"
    download_data(server.url, tmp_path / "ignored", allow_http=True)
    assert contents(tmp_path / "ignored") == FILES
    assert "Range" in server.requests[1][1]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("mode", "error", "match"),
    [
        ("wrong_range", IntegrityError, "a part that was not requested"),
        ("unasked_part", IntegrityError, "a part that was not requested"),
        ("short", HubError, "the connection ended at"),
        ("announced_too_short", IntegrityError, r"pets\.zip"),
        ("no_length", HubError, "does not say how long"),
        ("chunked_cut", HubError, "cannot download"),
        ("gzip", IntegrityError, "although it was asked not to"),
        ("page", IntegrityError, r"pets\.zip.*neither zip nor tar; it starts with b'<!DOCTYPE"),
    ],
)
def test_s2_download_data_refuses_a_body_that_is_not_as_announced(server, tmp_path, mode, error, match):
    server.mode = mode
    with pytest.raises(error, match=match):
        download_data(server.url, tmp_path / "data", allow_http=True)
    assert not (tmp_path / "data").exists()
    assert not [name for name in os.listdir(tmp_path) if not name.startswith(".flashtask-download-")]


def test_s2_download_data_takes_nothing_that_comes_after_the_announced_end(server, tmp_path):
    server.mode = "long"
    assert contents(download_data(server.url, tmp_path / "data", checksum=SHA)) == FILES


def test_s2_download_data_takes_a_body_that_proves_its_end_another_way(server, tmp_path):
    server.mode = "chunked"
    assert contents(download_data(server.url, tmp_path / "chunked", allow_http=True)) == FILES
    server.mode = "no_length"
    assert contents(download_data(server.url, tmp_path / "summed", checksum=SHA)) == FILES


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "login"), (403, "access is denied"), (404, "address"), (501, "address")]
)
def test_s2_download_data_names_the_status_and_does_not_try_again(server, tmp_path, status, hint):
    server.mode, server.status = "status", (status, {}, 99)
    with pytest.raises(HubError, match=f"status {status}") as caught:
        download_data(server.url + "?token=secret", tmp_path / "data", allow_http=True)
    assert hint in caught.value.fix
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_s2_download_data_tries_again_after_a_passing_error(server, tmp_path, status):
    server.mode, server.status = "status", (status, {}, 2)
    assert contents(download_data(server.url, tmp_path / "data", allow_http=True)) == FILES
    assert len(server.requests) == 3


def test_s2_download_data_waits_as_long_as_retry_after_says_but_not_past_the_deadline(server, tmp_path):
    server.mode, server.status = "status", (429, {"Retry-After": "1"}, 1)
    started = time.monotonic()
    download_data(server.url, tmp_path / "data", allow_http=True)
    assert 1 <= time.monotonic() - started < 30
    server.status = (503, {"Retry-After": "3600"}, 99)
    started = time.monotonic()
    with pytest.raises(HubError, match="next try is due in 3600 s"):
        download_data(server.url, tmp_path / "other", allow_http=True, deadline=60)
    assert time.monotonic() - started < 30


def test_s2_download_data_gives_up_on_a_server_that_always_fails(server, tmp_path):
    server.mode, server.status = "status", (500, {}, 99)
    with pytest.raises(HubError, match="status 500; 6 attempts"):
        download_data(server.url, tmp_path / "data", allow_http=True)
    assert len(server.requests) == download_resume.MAX_FAILURES


@pytest.mark.long
def test_s2_download_data_ends_stalls_and_drips_in_time(server, tmp_path):
    server.mode = "stall"
    started = time.monotonic()
    with pytest.raises(HubError, match="stopped sending"):
        download_data(server.url, tmp_path / "data", allow_http=True, timeout=0.1)
    assert time.monotonic() - started < 30
    server.mode = "drip"
    started = time.monotonic()
    with pytest.raises(HubError, match="did not finish within 1 s"):
        download_data(server.url, tmp_path / "drip", allow_http=True, deadline=1)
    assert time.monotonic() - started < 30


def test_s2_download_data_follows_a_redirect_on_the_same_host_and_ends_a_loop(server, tmp_path):
    server.mode, server.location = "redirect", "/final.bin?x=1"
    assert contents(download_data(server.url, tmp_path / "data", allow_http=True)) == FILES
    server.location = "/pets.zip"
    server.requests.clear()
    with pytest.raises(HubError, match="more than 10 redirects"):
        download_data(server.url, tmp_path / "loop", allow_http=True)
    assert len(server.requests) == 11


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://example.com/x.zip",
        "http://example.com/x.zip",
        "http://127.0.0.2/x.zip",
        "https://127.0.0.2/x.zip",
        "https://10.0.0.1/x.zip",
        "https://192.168.1.1/x.zip",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/x.zip",
        "https://[::ffff:10.0.0.1]/x.zip",
        "https://[fe80::1]/x.zip",
        "https://0.0.0.0/x.zip",
        "https://localhost/x.zip",
        "https:///x.zip",
        "https://[::1/x.zip",
        "//127.0.0.1:99999/x.zip",
    ],
)
def test_s2_download_data_refuses_redirects_to_other_schemes_and_private_hosts(server, tmp_path, location):
    server.mode, server.location = "redirect", location
    with pytest.raises(IntegrityError, match=r"refused (a redirect|to connect)") as caught:
        download_data(server.url, tmp_path / "data", checksum=SHA)
    assert caught.value.exit_code == 76
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://example.com/a.zip", "plain http"),
        ("file:///etc/passwd", "not an https address"),
        ("ftp://example.com/a.zip", "not an https address"),
        ("https:///a.zip", "not an https address"),
        ("https://[::1/a.zip", "not an https address"),
        ("https://exa mple.com/a.zip", "not an https address"),
        ("https://example.com:99999/a.zip", "not an https address"),
        ("https://me:word@example.com/a.zip", "user name or password"),
        ("https://example.com/", "no usable file name"),
        ("https://example.com/..%2f..%2fevil.zip", "no usable file name"),
        ("https://example.com/.hidden.zip", "no usable file name"),
    ],
)
def test_s2_download_data_refuses_addresses_before_any_request(tmp_path, url, match):
    with pytest.raises(UsageError, match=match) as caught:
        download_data(url, tmp_path)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    assert os.listdir(tmp_path) == []


def test_s2_download_data_puts_a_plain_file_under_the_name_of_the_address(server, tmp_path):
    server.mode = "disposition"
    url = server.url.replace("pets.zip", "labels%20v1.csv?x=../evil")
    folder = download_data(url, tmp_path / "data", allow_http=True)
    assert contents(tmp_path) == {"data/labels v1.csv": b"text"}
    download_data(url, folder, filename="other.csv", allow_http=True)
    assert len(server.requests) == 1


def test_s2_download_data_holds_max_bytes_and_the_limits_of_the_archive(server, tmp_path):
    for mode in ("good", "chunked"):
        server.mode = mode
        with pytest.raises(IntegrityError, match="larger than 100,000 bytes"):
            download_data(server.url, tmp_path / "data", allow_http=True, max_bytes=100_000)
    with pytest.raises(IntegrityError, match="more than 1 files"):
        download_data(server.url, tmp_path / "data", allow_http=True, limits=ArchiveLimits(max_entries=1))
    assert os.listdir(tmp_path) == []


def test_s2_download_data_unpacks_a_path_and_notices_when_it_changed(tmp_path, capsys):
    archive = tmp_path / "pets.zip"
    archive.write_bytes(BODY)
    folder = download_data(archive, tmp_path / "data", checksum=SHA)
    assert contents(folder) == FILES
    assert archive.read_bytes() == BODY
    download_data(str(archive), folder)
    assert "already" in capsys.readouterr().err
    archive.write_bytes(NEW_BODY)
    with pytest.raises(OutputError, match="exists already"):
        download_data(archive, folder)
    with pytest.raises(IntegrityError, match="is not the file"):
        download_data(archive, tmp_path / "new", checksum=SHA)
    assert archive.exists()
    with pytest.raises(MissingInputError, match="no archive at"):
        download_data(tmp_path / "none.zip", folder)
    (tmp_path / "note.txt").write_text("text")
    with pytest.raises(UsageError, match="not a zip or tar"):
        download_data(tmp_path / "note.txt", folder)


def test_s2_download_data_names_a_host_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(download_resume, "BACKOFF_SECONDS", 0.01)
    with pytest.raises(HubError, match=r"cannot find the host nowhere\.invalid"):
        download_data("https://nowhere.invalid/a.zip", tmp_path / "data")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(HubError, match=r"cannot download https://127\.0\.0\.1"):
            download_data(f"https://127.0.0.1:{taken.getsockname()[1]}/a.zip", tmp_path / "data")


def test_s2_download_data_says_that_the_folder_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot"):
        download_data(server.url, tmp_path / "file" / "data", allow_http=True)
    with pytest.raises((OutputError, StorageError)):
        download_data(server.url, tmp_path / "file", allow_http=True)
    assert (tmp_path / "file").read_text() == "in the way"


CALL = """
import sys
from flashtask.data.download import download_data
download_data(*sys.argv[1:3], checksum=sys.argv[3])
"""


@pytest.mark.long
def test_s2_download_data_survives_sigkill_and_sends_nothing_twice(server, tmp_path):
    server.mode, target = "slow", tmp_path / "data"
    for number in range(4):
        child = subprocess.Popen([sys.executable, "-c", CALL, server.url, target, SHA])
        until = time.monotonic() + 30
        while len(server.requests) <= number and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not target.exists()
        assert not list(tmp_path.glob("*.data"))
    server.mode = "good"
    download_data(server.url, target, checksum=SHA)
    assert contents(target) == FILES
    assert int(server.requests[-1][1]["Range"][6:-1]) > 0
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.long
def test_s2_download_data_in_four_processes_loads_once(server, tmp_path):
    server.mode = "slow"
    children = [
        subprocess.Popen([sys.executable, "-c", CALL, server.url, tmp_path / "data", SHA], stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    said = [child.communicate()[1].decode() for child in children]
    assert [child.returncode for child in children] == [0] * 4, said
    assert len(server.requests) == 1
    assert sum("already" in text for text in said) == 3
    assert contents(tmp_path / "data") == FILES


def test_s2_download_data_shows_a_bar_when_asked_and_records_no_query(server, tmp_path, capsys):
    url = server.url + "?token=secret"
    folder = download_data(url, tmp_path / "data", allow_http=True, progress=True)
    said = capsys.readouterr()
    assert "pets.zip" in said.err
    assert said.out == ""
    marker = json.loads(Path(folder / hidden(folder)[0]).read_text())
    assert marker["entries"] == ["pets"]
    assert marker["sha256"] == SHA
    assert "secret" not in json.dumps(marker)


@pytest.fixture
def certificate(server, tmp_path_factory):
    """The server speaks TLS as 127.0.0.1 and data.example.test, with a certificate that nobody knows."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    home = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=IP:127.0.0.1,DNS:data.example.test"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext {names}"
    command += f" -keyout {home / 'key.pem'} -out {home / 'certificate.pem'}"
    subprocess.run(command.split(), capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "certificate.pem", home / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return str(home / "certificate.pem")


def test_s2_download_data_checks_certificates(server, certificate, tmp_path, monkeypatch):
    url = server.url.replace("http:", "https:")
    with pytest.raises(HubError, match=r"certificate of 127\.0\.0\.1 is not valid"):
        download_data(url, tmp_path / "data")
    assert server.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    assert contents(download_data(url, tmp_path / "data")) == FILES


def test_s2_download_data_never_goes_from_https_to_http(server, certificate, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    url = server.url.replace("http:", "https:")
    server.mode = "redirect"
    for location in (server.url, server.url.replace("http:", "HTTP:")):
        server.location = location
        with pytest.raises(IntegrityError, match="https only"):
            download_data(url, tmp_path / "data", checksum=SHA, allow_http=True)
    assert len(server.requests) == 2, "no request was made over http"
    server.location = "/final.zip"
    assert contents(download_data(url, tmp_path / "data")) == FILES


def test_s2_download_data_compares_the_address_that_a_redirect_really_connects_to(server, tmp_path, monkeypatch):
    """A name may have a public address when it is looked up first, and a private one when it is connected to."""
    look_up, answers = socket.getaddrinfo, ["93.184.215.14", "127.0.0.1"]

    def changing(host, *args, **kwargs):
        return look_up(answers.pop(0) if host == "moving.example.test" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    server.mode, server.location = "redirect", f"https://moving.example.test:{server.server_port}/final.zip"
    with pytest.raises(IntegrityError, match=r"refused to connect to moving\.example\.test \(127\.0\.0\.1\)"):
        download_data(server.url, tmp_path / "data", checksum=SHA)
    assert answers == []
    assert len(server.requests) == 1


def tunnel_once(listener, port, seen):
    """A proxy for one CONNECT: whatever it asks for, it leads to the local port."""
    with listener.accept()[0] as client, socket.create_connection(("127.0.0.1", port)) as target:
        while not seen.endswith(b"\r\n\r\n"):
            seen += client.recv(1)
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        while ready := select.select([client, target], [], [], 5)[0]:
            for source in ready:
                data = source.recv(65536)
                if not data:
                    return
                (target if source is client else client).sendall(data)


def test_s2_download_data_goes_through_the_proxy_of_the_environment(server, certificate, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=tunnel_once, args=(listener, server.server_port, seen))
        thread.start()
        monkeypatch.setenv("https_proxy", f"http://me:word@127.0.0.1:{listener.getsockname()[1]}")
        assert contents(download_data("https://data.example.test/pets.zip", tmp_path / "data")) == FILES
        thread.join()
    assert seen.startswith(b"CONNECT data.example.test:443 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic bWU6d29yZA==" in seen
    assert server.requests[0][0] == "/pets.zip"
    assert "Proxy-Authorization" not in server.requests[0][1]
    assert server.requests[0][1]["Host"] == "data.example.test"


def test_s2_download_data_asks_a_proxy_for_plain_http_and_names_one_that_refuses(server, tmp_path, monkeypatch):
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{server.server_port}")
    download_data("http://data.example.test/pets.zip", tmp_path / "data", checksum=SHA)
    assert server.requests[0][0] == "http://data.example.test/pets.zip"
    with pytest.raises(HubError, match=r"the proxy 127\.0\.0\.1 refused"):
        download_data("https://data.example.test/pets.zip", tmp_path / "other")


def test_s2_download_data_uses_no_proxy_for_this_machine_and_names_an_unusable_one(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:9")
    assert contents(download_data(server.url, tmp_path / "data", allow_http=True)) == FILES
    monkeypatch.setenv("https_proxy", "gopher://192.0.2.1:9")
    with pytest.raises(HubError, match="cannot use the proxy of the environment") as caught:
        download_data(server.url, tmp_path / "other", allow_http=True)
    assert "NO_PROXY" in caught.value.fix


def test_s2_importing_download_data_loads_no_library():
    unwanted = "{'torch', 'numpy', 'PIL', 'rich', 'httpx', 'httpx2'}"
    code = f"import sys, flashtask.data.download; print({unwanted} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
