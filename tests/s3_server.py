"""A server of the loopback with as much of S3 as reading takes: HEAD, GET with ranges, ListObjectsV2."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

ERROR = b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code><Message>there is no such key</Message></Error>'
HEAD = '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'


@contextmanager
def serving(objects: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve `bucket/key` -> content; gives the address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            url, given = urlsplit(self.path), self.headers.get("Range") or ""
            key, query = unquote(url.path).strip("/"), parse_qs(url.query)
            asked.append(f"{self.command} {key}")
            if "list-type" in query:
                self._answer(200, _listing(objects, key, query.get("prefix", [""])[0]))
            elif key not in objects:
                self._answer(404, ERROR)
            elif found := re.fullmatch(r"bytes=(\d+)-(\d*)", given):
                content = objects[key]
                first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
                self._answer(206, content[first : last + 1], f"bytes {first}-{last}/{len(content)}")
            else:
                self._answer(200, objects[key])

        do_HEAD = do_GET  # noqa: N815 (the name is that of the base class)

        def _answer(self, code: int, content: bytes, content_range: str = "") -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"x"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def _listing(objects: dict[str, bytes], bucket: str, prefix: str) -> bytes:
    rows = "".join(
        f"<Contents><Key>{name.partition('/')[2]}</Key><Size>{len(content)}</Size>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for name, content in objects.items()
        if name.startswith(f"{bucket}/{prefix}")
    )
    return f"{HEAD}<Name>{bucket}</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
