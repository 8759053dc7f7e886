"""A small Hugging Face hub on the loopback: real HTTP, real hashes, commits and tokens; good and bad on demand.

    with HubServer() as hub:
        commit = hub.add("org/name", {"config.json": b"{}", "model.safetensors": weights})
        os.environ["HF_ENDPOINT"] = hub.url          # `use(monkeypatch, hub, tmp_path)` sets all that a test needs
        hub.mode = "same_size"                       # every bad mode: MODES
        hub.requests                                 # (method, path) of all requests so far
        hub.sent["model.safetensors"]                # bytes of the body that left the server

It speaks what huggingface_hub asks for: model info, tree, refs, paths-info, HEAD and GET of resolve with Range, LFS
redirects; and for uploads create_repo, branches, tags, preupload, LFS batch and commits. Files of more than 1000 bytes
and weights are LFS files. It offers plain LFS alone, no Xet: uploads need HF_HUB_DISABLE_XET=1, which `use` sets.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.server
import json
import re
import socket
import threading
import time
from collections import Counter
from urllib.parse import parse_qs, unquote, urlsplit

#: Modes of the transfer of a file's bytes, then of any answer; a stall lasts until the server stops.
BYTE_MODES = (
    "same_size",
    "short",
    "long",
    "longer_than_said",
    "cut",
    "cut_then_dead",
    "cut_range_ignored",
    "cut_wrong_range",
    "gzip",
    "gzip_bomb",
    "stall_bytes",
    "reset",
)
ANSWER_MODES = (
    "http_401",
    "http_403",
    "http_404",
    "gated",
    "http_429",
    "http_429_long",
    "http_500_twice",
    "http_500",
    "dead",
    "stall",
    "redirect_loop",
    "redirect_http",
    "redirect_file",
    "html",
)
MODES = ("good", *BYTE_MODES, *ANSWER_MODES, "moves", "hostile_names")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt")


def is_lfs(name, content):
    return len(content) > 1000 or name.endswith(_WEIGHTS)


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Repository:
    """Commits and where the branches and tags stand."""

    def __init__(self, *, private=False, gated=False):
        self.private, self.gated = private, gated
        self.commits, self.branches, self.tags = {}, {}, {}

    def commit(self, files, branch="main"):
        seed = repr((sorted(files), [sha256(files[name]) for name in sorted(files)], len(self.commits)))
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def find(self, revision):
        return self.branches.get(revision) or self.tags.get(revision) or (revision in self.commits and revision) or None


class HubServer:
    """Serves from its creation to the end of the `with` block.

    `where` says what a bad mode of ANSWER_MODES applies to: "api" (JSON answers), "head", "bytes", or "all".
    """

    def __init__(self):
        self.repositories = {}
        self.tokens = {}  # token -> names of the repositories it may read and write, or "*"
        self.mode, self.where = "good", "all"
        self.requests, self.authorizations, self.sent = [], [], Counter()
        self.starts = []  # first byte of every body of a file
        self.objects = {}  # LFS objects by sha256
        self.moved = {}  # old names of repositories, and their new ones
        self.other_port = 9
        self.cdn = ""  # where LFS files are redirected to, if not to this server
        self.delay = 0.0  # seconds before each piece of a body, to be killed in
        self.stopping = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        """End at once: later connections are refused."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, name, files, *, private=False, gated=False):
        """A new repository with one commit on main, whose id is given back."""
        self.repositories[name] = Repository(private=private, gated=gated)
        return self.commit(name, files)

    def commit(self, name, files, branch="main"):
        self.objects.update({sha256(content): content for content in files.values()})
        return self.repositories[name].commit(files, branch)

    def allow(self, token, *names):
        """A token that may see these private and gated repositories, or all."""
        self.tokens[token] = set(names) or "*"

    def files(self, name, revision="main"):
        repository = self.repositories[name]
        return repository.commits[repository.find(revision)]

    def reset(self, mode="good", where="all"):
        """Forget all requests and take on a mode."""
        self.mode, self.where = mode, where
        self.requests.clear()
        self.authorizations.clear()
        self.sent.clear()
        self.starts.clear()

    def counted(self, kind=""):
        """How many requests there were whose `METHOD /path` contains a text; the client's own survey is no request."""
        asked = [f"{method} {path}" for method, path in self.requests if "agent-harnesses" not in path]
        return sum(kind in one for one in asked)


def use(monkeypatch, hub, folder):
    """Have this process ask that server, with caches of its own, and without waiting long for anything."""
    from huggingface_hub import constants

    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "FLASHTASK_CACHE": str(folder / "cache"),
        "NO_PROXY": "*",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read at its import, which was before this
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "hf" / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(folder / "hf" / "agents.json"))
    return variables


class _RefusedError(Exception):
    def __init__(self, status, code="", message="", **headers):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 20

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # the names that http.server calls

    def answer(self):
        self.hub = self.server.hub
        if self.hub.stopping.is_set():
            self.close_connection = True
            return
        self.path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        length = int(self.headers.get("Content-Length") or 0)
        self.given = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        self.hub.requests.append((self.command, self.path))
        self.hub.authorizations.append(self.headers.get("Authorization"))
        try:
            for method, pattern, name in _ROUTES:
                if self.command in method.split("|") and (found := re.fullmatch(pattern, self.path)):
                    kind = "api" if not name.endswith("bytes") else "head" if self.command == "HEAD" else "bytes"
                    if not self._misbehaves(kind):
                        getattr(self, name)(*map(unquote, found.groups()))
                    return
            raise _RefusedError(404, "", f"no such page {self.path}")
        except _RefusedError as refused:
            headers = {"X-Error-Message": refused.message, **refused.headers}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.reply({"error": refused.message}, refused.status, **headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _chunked(self):
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def reply(self, value, status=200, **headers):
        body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        given = {name.replace("_", "-"): text for name, text in headers.items()}
        for name, text in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | given).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # what may be seen, and which commit is meant

    def repository(self, name, *, write=False, content=True):
        if name in self.hub.moved:
            raise _RefusedError(307, Location=self.path.replace(name, self.hub.moved[name]))
        found = self.hub.repositories.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        may = self.hub.tokens.get(token, ())
        is_known = may == "*" or name in may
        if found is None or (found.private and not is_known):
            raise _RefusedError(404 if token else 401, "RepoNotFound", "Repository not found")
        if content and found.gated and not is_known:
            raise _RefusedError(
                403 if token else 401,
                "GatedRepo",
                f"Access to model {name} is restricted, token {token} is not on the list",
            )
        if write and not is_known:
            raise _RefusedError(403 if token else 401, "", "You don't have the rights to write")
        return found

    def revision(self, repository, text):
        commit = repository.find(text)
        if commit is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {text}")
        return commit

    # reading

    def model_info(self, name, revision="main"):
        repository = self.repository(name, content=False)
        commit = self.revision(repository, revision)
        files = repository.commits[commit]
        siblings = [self._sibling(file, content) for file, content in files.items()]
        if self.hub.mode == "hostile_names":
            names = ["../../outside.json", "/etc/outside.json", "a\\..\\outside.json", "nul\0.json", "C:/outside.json"]
            siblings += [self._sibling(file, b"{}") for file in names]
        self.reply({"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings})
        if self.hub.mode == "moves":
            self.hub.commit(name, {file: content[::-1] for file, content in files.items()})

    def _sibling(self, name, content):
        found = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
        if is_lfs(name, content):
            found["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
        return found

    def tree(self, name, revision, folder=""):
        repository = self.repository(name)
        files = repository.commits[self.revision(repository, revision)]
        self.reply([self._tree_entry(file, files[file]) for file in files if file.startswith(folder)])

    def paths_info(self, name, revision):
        repository = self.repository(name)
        files = repository.commits[self.revision(repository, revision)]
        asked = self.given.decode()
        paths = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked)["paths"]
        self.reply([self._tree_entry(file, files[file]) for file in paths if file in files])

    def _tree_entry(self, name, content):
        found = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
        if is_lfs(name, content):
            found["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return found

    def refs(self, name):
        repository = self.repository(name)
        answer = {"converts": []}
        for kind, prefix, refs in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags)):
            answer[kind] = [
                {"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": commit} for name, commit in refs.items()
            ]
        self.reply(answer)

    def resolve_bytes(self, name, revision, file):
        repository = self.repository(name)
        commit = self.revision(repository, revision)
        content = repository.commits[commit].get(file)
        if content is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        if is_lfs(file, content):
            oid = sha256(content)
            linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": commit}
            self.reply(None, 302, Location=f"{self.hub.cdn}/lfs/{oid}/{commit}/{file}", **linked)
        else:
            self._file(file, content, ETag=f'"{git_hash(content)}"', X_Repo_Commit=commit)

    def lfs_bytes(self, oid, commit, file):
        content = self.hub.objects[oid]
        self._file(file, content, ETag=f'"{oid}"', X_Repo_Commit=commit, X_Linked_Size=str(len(content)))

    def _file(self, name, content, **headers):
        if self.command == "HEAD":
            self.reply(None, **{"Content_Length": str(len(content)), "Accept_Ranges": "bytes", **headers})
            return
        start, ranged = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        mode, times = self.hub.mode, self.hub.counted(f"GET {self.path}")
        if ranged and mode != "cut_range_ignored":
            start = int(ranged[1])
        body, stated, stop = content[start:], None, None
        if mode == "same_size":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif mode == "short":
            body = body[:-7]
        elif mode == "long":
            body += b"x" * 7
        elif mode == "longer_than_said":
            body, headers["Transfer_Encoding"] = body + b"x" * 2**20, "chunked"
        elif mode == "gzip":
            body, headers["Content_Encoding"] = gzip.compress(body), "gzip"
        elif mode == "gzip_bomb":
            body, headers["Content_Encoding"] = gzip.compress(bytes(2**22)), "gzip"
        elif mode == "cut_then_dead" and times > 1:
            self.close_connection = True
            return
        elif mode.startswith("cut") and len(body) > len(content) // 5 and (mode != "cut_range_ignored" or times == 1):
            stop = max(1, len(content) // 5)
        elif mode == "reset":
            stop = len(body) // 2
        stated = len(body) if stated is None else stated
        if ranged and mode != "cut_range_ignored":
            shown = start + 5 if mode == "cut_wrong_range" else start
            self._head(206, stated, Content_Range=f"bytes {shown}-{len(content) - 1}/{len(content)}", **headers)
        else:
            self._head(200, stated, **headers)
        self.hub.starts.append(start)
        self._body(name, body[:stop], cut=stop is not None)

    def _head(self, status, length, **headers):
        self.send_response(status)
        if "Transfer_Encoding" not in headers:
            self.send_header("Content-Length", str(length))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()

    def _body(self, name, body, *, cut):
        mode = self.hub.mode
        for start in range(0, len(body), 16_384):
            block = body[start : start + 16_384]
            if mode == "longer_than_said":
                block = b"%x\r\n%s\r\n" % (len(block), block)
            self.wfile.write(block)
            self.hub.sent[name] += len(block)
            if self.hub.delay:
                time.sleep(self.hub.delay)
            if mode == "stall_bytes":
                self.hub.stopping.wait(60)
        if mode == "longer_than_said":
            self.wfile.write(b"0\r\n\r\n")
        if cut:
            self.close_connection = True
            if mode == "reset":
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()

    # writing

    def create_repository(self):
        asked = json.loads(self.given)
        user = self._user()
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if asked.get("type") == "space":
            if asked.get("sdk") not in ("gradio", "docker", "static"):
                raise _RefusedError(400, "", "No sdk specified")
            name = f"spaces/{name}"
        if name in self.hub.repositories:
            said = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            self.reply(said, 409, X_Error_Message=said["error"])
            return
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.hub.repositories[name].private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.reply({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def delete_repository(self):
        asked = json.loads(self.given)
        name = f"{asked.get('organization') or self._user()}/{asked['name']}"
        self.repository(name, write=True)
        del self.hub.repositories[name]
        self.reply({})

    def _user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise _RefusedError(401, "", "Invalid credentials in Authorization header" if token else "Unauthorized")
        return "tester"

    def who(self):
        self.reply({"type": "user", "name": self._user(), "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def branch(self, name, branch):
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise _RefusedError(409, "", "Reference already exists")
        start = json.loads(self.given or b"{}").get("startingPoint") or "main"
        repository.branches[branch] = self.revision(repository, start)
        self.reply({})

    def tag(self, name, revision):
        repository = self.repository(name, write=True)
        tag = json.loads(self.given)["tag"]
        if tag in repository.tags:
            raise _RefusedError(409, "", "Tag reference exists already")
        repository.tags[tag] = self.revision(repository, revision)
        self.reply({})

    def preupload(self, name, revision):
        repository = self.repository(name, write=True)
        files = repository.commits[self.revision(repository, revision)]
        answer = []
        for file in json.loads(self.given)["files"]:
            mode = "lfs" if file["size"] > 1000 or file["path"].endswith(_WEIGHTS) else "regular"
            old = files.get(file["path"])
            oid = None if old is None else sha256(old) if mode == "lfs" else git_hash(old)
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answer})

    def lfs_batch(self, name):
        self.repository(name, write=True)
        answer = []
        for wanted in json.loads(self.given)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            answer.append(entry)
        self.reply({"transfer": "basic", "objects": answer})

    def lfs_upload(self, oid):
        if sha256(self.given) != oid:
            raise _RefusedError(400, "", "the content does not have that hash")
        self.hub.objects[oid] = self.given
        self.reply({})

    def new_commit(self, name, branch):
        repository = self.repository(name, write=True)
        parent = self.revision(repository, branch)
        files = dict(repository.commits[parent])
        for line in self.given.splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "header" and value.get("parentCommit") not in (None, parent):
                raise _RefusedError(412, "", "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {file: files[file] for file in files if not file.startswith(value["path"].rstrip("/") + "/")}
        commit = self.hub.commit(name, files, branch)
        self.reply({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def validate_yaml(self):
        self.reply({"errors": [], "warnings": []})

    def survey(self):
        self.reply({"standardEnvVars": [], "harnesses": {}})

    # misbehaviour that does not depend on what was asked

    def _misbehaves(self, kind):
        mode = self.hub.mode
        if mode not in ANSWER_MODES or self.hub.where not in ("all", kind):
            return False
        times = self.hub.counted()
        if mode == "http_500_twice" and times > 2:
            return False
        if mode == "http_429" and times > 1:
            return False
        if mode in ("stall", "dead"):
            self.hub.stopping.wait(60 if mode == "stall" else 0)
            self.close_connection = True
            return True
        if mode == "html":
            self.reply(b"<html>please log in to this network</html>", Content_Type="text/html")
        elif mode.startswith("redirect"):
            port = self.hub.other_port
            targets = {"loop": self.path, "http": f"http://127.0.0.1:{port}/x", "file": "file:///etc/passwd"}
            self.reply(None, 302, Location=targets[mode.removeprefix("redirect_")])
        elif mode == "gated":
            raise _RefusedError(403, "GatedRepo", "Access to this model is restricted")
        else:
            waits = {"http_429": {"Retry_After": "1"}, "http_429_long": {"Retry_After": "3600"}}.get(mode, {})
            raise _RefusedError(int(mode.split("_")[1]), "", "as told", **waits)
        return True


_REPO = r"/([^/]+/[^/]+)"
#: Behind /api: the repository of a model, or a Space, which is kept under `spaces/org/name`.
_ANY = r"/(?:models/)?((?:spaces/)?[^/]+/[^/]+)"
_ROUTES = (
    ("GET", rf"/api/(?:models|datasets){_REPO}", "model_info"),
    ("GET", r"/api/(spaces/[^/]+/[^/]+)", "model_info"),
    ("GET", rf"/api/(?:models|datasets){_REPO}/revision/([^/]+)", "model_info"),
    ("GET", rf"/api{_ANY}/tree/([^/]+)/?(.*)", "tree"),
    ("POST", rf"/api{_ANY}/paths-info/([^/]+)", "paths_info"),
    ("GET", rf"/api{_ANY}/refs", "refs"),
    ("GET|HEAD", rf"(?:/datasets)?{_REPO}/resolve/([^/]+)/(.+)", "resolve_bytes"),
    ("GET|HEAD", r"/lfs/([0-9a-f]{64})/([0-9a-f]{40})/(.+)", "lfs_bytes"),
    ("POST", r"/api/repos/create", "create_repository"),
    ("DELETE", r"/api/repos/delete", "delete_repository"),
    ("GET", r"/api/whoami-v2", "who"),
    ("POST", rf"/api{_ANY}/branch/([^/]+)", "branch"),
    ("POST", rf"/api{_ANY}/tag/([^/]+)", "tag"),
    ("POST", rf"/api{_ANY}/preupload/([^/]+)", "preupload"),
    ("POST", r"/((?:spaces/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_upload"),
    ("POST", rf"/api{_ANY}/commit/([^/]+)", "new_commit"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/agent-harnesses", "survey"),
)
