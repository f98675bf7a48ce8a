"""A small Hub on the loopback for the real client: two origins, LFS redirects, gates, revisions, uploads, faults.

`Hub` serves repositories from memory. ``hub`` answers the API and /resolve/, ``cdn`` the contents of large
files, on another port and so another origin. No answer names a host outside the loopback.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest
import yaml

LARGE = (".safetensors", ".bin", ".pt")
_WHEN = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """Contents, and the two hashes the Hub goes by."""

    path: str
    data: bytes

    @property
    def large(self) -> bool:
        return self.path.endswith(LARGE)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        body = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    def lfs(self, key: str) -> dict[str, Any]:
        facts = {key: self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return {"lfs": facts} if self.large else {}


@dataclass
class Repo:
    """A model repository. `gated` is False, "auto" or "manual"; `refs` maps branches and tags to commits."""

    id: str
    gated: str | bool = False
    private: bool = False
    disabled: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    downloads: int = 0
    likes: int = 0
    created: str = _WHEN
    modified: str = _WHEN
    pulls: int = 0
    cards: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Add a commit that holds exactly `files`, point `ref` at it, and return its sha."""
        sha = hashlib.sha1(f"{self.id} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = {path: File(path, data) for path, data in files.items()}
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def card(self, sha: str) -> dict[str, Any]:
        if sha not in self.cards:  # a list looks at every repository's, for every page
            readme = self.commits[sha].get("README.md")
            head = re.match(rb"---\n(.*?)\n---", readme.data, re.DOTALL) if readme else None
            self.cards[sha] = dict(yaml.safe_load(head[1])) if head else {}
        return self.cards[sha]

    def tags(self, sha: str) -> list[str]:
        card = self.card(sha)
        tags = [*card.get("tags", []), "region:us"]
        if base := card.get("base_model"):
            tags += [f"base_model:{base}", f"base_model:adapter:{base}"]
        if "license" in card:
            tags.append(f"license:{card['license']}")
        return tags + ([card["library_name"]] if "library_name" in card else [])

    def info(self, sha: str, blobs: bool) -> dict[str, Any]:
        siblings = []
        for file in self.commits[sha].values():
            more = {"size": len(file.data), "blobId": file.oid, **file.lfs("sha256")} if blobs else {}
            siblings.append({"rfilename": file.path, **more})
        known = {"id": self.id, "private": self.private, "gated": self.gated, "disabled": self.disabled}
        counts = {
            "likes": self.likes,
            "downloads": self.downloads,
            "createdAt": self.created,
            "lastModified": self.modified,
            "library_name": self.card(sha).get("library_name"),
        }
        content = {"sha": sha, "tags": self.tags(sha), "cardData": self.card(sha), "siblings": siblings}
        return {
            "_id": self.id,
            "modelId": self.id,
            "author": self.id.split("/")[0],
            **known,
            **counts,
            **content,
        }


@dataclass
class Fault:
    """What goes wrong with a request whose "METHOD /path?query" matches `pattern`, `times` times.

    `kind` is "status" (answer `status` with `headers`), "reset" (TCP RST), "flip" (the last byte is changed),
    "cut" (the body ends after `keep` bytes), "body" (answer 200 with `body`), "header" (as it would be, but with `headers`),
    "stall" (nothing, or with `keep` that many bytes of the body, and then silence), "break" (a reset after `keep` bytes of the
    body) or "drip" (`keep` bytes of the body every `seconds`).
    """

    pattern: str
    kind: str
    times: int = 1
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    keep: int = 0
    body: bytes = b""
    seconds: float = 30.0


@dataclass(frozen=True)
class Request:
    """One line of the log."""

    origin: str
    method: str
    path: str
    headers: Mapping[str, str]
    at: float = field(default_factory=time.monotonic)

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


class Hub:
    """Two servers, their data, their log and their faults."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.certificate = certificate  # with its key: both origins speak TLS, and errors are those of the real Hub
        self.closed = threading.Event()
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {}  # token → private and gated repositories it may read
        self.writers: dict[str, set[str]] = {}  # token → users and organisations it may write for
        self.uploads: dict[str, bytes] = {}  # sha256 → contents that were sent and wait for a commit
        self.push: Callable[[], None] = lambda: None  # what happens just before a commit, such as somebody else's
        self.renamed: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.page = 100
        self.xet: dict[str, str] = {}  # sha256 of a large file → its hash in the Xet store at `xet_store`
        self.xet_store = ""
        self.link: Callable[[str], str] = lambda following: following  # what the lists' Link header says in place of it
        self.collections: dict[str, list[tuple[str, str]]] = {}  # slug → (type, id)
        self.budgets: dict[str, int] = {}  # "api" or "resolvers" → requests left; then 429
        self.window = 300  # seconds until the budgets are full again, as answers say
        self._lock = threading.Lock()
        self._servers = [_serve(self, _HubHandler), _serve(self, _CdnHandler)]
        scheme = "https" if certificate else "http"
        self.url, self.cdn = (f"{scheme}://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def add(self, repo: str, files: Mapping[str, bytes] | Path, **options: Any) -> Repo:
        """A new repository with one commit, from contents or from a folder."""
        made = self.repos[repo] = Repo(repo, **options)
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        made.commit(files)
        return made

    def fill(self, count: int, files: Mapping[str, bytes], base: str = "org/base") -> list[Repo]:
        """`count` adapters of `base` that share their files, the first with the most downloads. Cheap: no folders, no YAML."""
        made = []
        for number in range(count):
            repo = self.add(f"org/adapter-{number:04}", files, downloads=count - number)
            card = {"base_model": base, "library_name": "peft", "license": "mit", "tags": ["lora"]}
            repo.cards[repo.refs["main"]] = card
            made.append(repo)
        return made

    def fault(self, pattern: str, kind: str, **options: Any) -> None:
        self.faults.append(Fault(pattern, kind, **options))

    def spend(self, bucket: str) -> int | None:
        """Take a request off a budget and return what is left; None where it was used up."""
        with self._lock:
            left = self.budgets.get(bucket, 500) - 1
            if bucket in self.budgets:
                self.budgets[bucket] = max(left, 0)
        return left if left >= 0 else None

    def lines(self, pattern: str = "") -> list[str]:
        """The logged "METHOD /path" that match."""
        return [request.line for request in self.log if re.search(pattern, request.line)]

    def take_fault(self, request: Request) -> Fault | None:
        with self._lock:
            self.log.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request.line):
                    fault.times -= 1
                    return fault
        return None

    def close(self) -> None:
        self.closed.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()


@contextmanager
def running(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A Hub for the time of a with statement, a fresh cache for its client, and no waiting between tries."""
    from huggingface_hub import constants

    assert constants.ENDPOINT == "http://127.0.0.1:9", "a call that forgets its endpoint must fail"
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr("time.sleep", lambda seconds: None)
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


def _serve(hub: Hub, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    bound = type(handler.__name__, (handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    server.daemon_threads = True
    if hub.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(hub.certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _Answer(Exception):
    def __init__(self, status: int, body: bytes | Any = b"", code: str = "", error: str = "", **headers: str) -> None:
        self.status = status
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}
        if error:
            self.headers["X-Error-Message"] = error
            body = {"error": error}
        if code:
            self.headers["X-Error-Code"] = code
        if status == 401:
            self.headers["WWW-Authenticate"] = 'Bearer realm="Authentication required", charset="UTF-8"'
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if not isinstance(body, bytes):
            self.headers["Content-Type"] = "application/json"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    origin = ""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        self.body = self.received()
        request = Request(self.origin, self.command, self.path, dict(self.headers.items()))
        fault = self.hub.take_fault(request)
        bucket = "resolvers" if "/resolve/" in self.path else "api"
        counted = self.origin == "hub" and "/resolve-cache/" not in self.path
        self.left = self.hub.spend(bucket) if counted else 499
        try:
            if self.left is None:
                raise _Answer(429, error="Too many requests")
            if fault and fault.kind == "status":
                raise _Answer(fault.status, error="fault", **dict(fault.headers))
            if fault and fault.kind == "body":
                raise _Answer(200, fault.body)
            if fault and fault.kind == "reset":
                return self.reset()
            if fault and fault.kind == "stall" and not fault.keep:
                self.hub.closed.wait(fault.seconds)
                self.close_connection = True
                return
            self.route()
        except _Answer as answer:
            try:
                self.send(answer, fault)
            except (ConnectionError, ssl.SSLError):
                self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def received(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ssl.SSLError):  # clients that were killed, or lost patience
            self.close_connection = True

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def route(self) -> None:
        """Raises the answer; each origin has its own."""
        raise _Answer(404, error="Not Found")

    def send(self, answer: _Answer, fault: Fault | None) -> None:
        body = answer.body
        if fault and fault.kind == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(answer.status)
        kind = "resolvers" if "/resolve/" in self.path else "api"
        headers = {
            "Content-Length": str(len(body)),
            "X-Request-Id": "test",
            "RateLimit": f'"{kind}";r={self.left or 0};t={self.hub.window}',
            "RateLimit-Policy": f'"fixed window";"{kind}";q=500;w=300',
        }
        forged = fault.headers if fault and fault.kind == "header" else {}
        for key, value in {**headers, **answer.headers, **forged}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or fault.kind not in ("cut", "stall", "break", "drip"):
            self.wfile.write(body)
            return
        pieces = [body[: fault.keep]]
        if fault.kind == "drip":
            pieces = [body[at : at + fault.keep] for at in range(0, len(body), fault.keep)]
        for piece in pieces:
            self.wfile.write(piece)
            if fault.kind in ("drip", "stall") and self.hub.closed.wait(fault.seconds):
                break
        if fault.kind == "break":
            return self.reset()
        self.close_connection = self.close_connection or fault.kind != "drip"

    def ranged(self, data: bytes, **headers: str) -> _Answer:
        headers = {"Accept_Ranges": "bytes", **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return _Answer(200, data, **headers)
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if start >= len(data):
            return _Answer(416, b"", Content_Range=f"bytes */{len(data)}")
        span = f"bytes {start}-{end}/{len(data)}"
        return _Answer(206, data[start : end + 1], Content_Range=span, **headers)


class _CdnHandler(_Handler):
    origin = "cdn"

    def route(self) -> None:
        if self.headers.get("Authorization"):
            raise _Answer(400, error="A token must not reach another origin.")
        wanted = urlsplit(self.path).path.rsplit("/", 1)[-1]
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != wanted:
                raise _Answer(400, error="BadDigest")
            self.hub.uploads[wanted] = self.body
            raise _Answer(200)
        for repo in self.hub.repos.values():
            for files in repo.commits.values():
                for file in files.values():
                    if file.large and file.sha256 == wanted:
                        raise self.ranged(file.data, ETag='"not-the-sha256"')
        raise _Answer(403, error="Expired")


class _HubHandler(_Handler):
    origin = "hub"

    def route(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        repo_id = r"(?P<id>[^/]+/[^/]+)"
        routes = {
            r"/api/models": self.models,
            r"/api/repos/create": self.create,
            r"/api/validate-yaml": self.validate,
            rf"/api/models/{repo_id}/preupload/(?P<rev>[^/]+)": self.preupload,
            rf"/api/models/{repo_id}/commit/(?P<rev>[^/]+)": self.commit,
            rf"/api/models/{repo_id}/branch/(?P<rev>[^/]+)": self.branch,
            rf"/{repo_id}\.git/info/lfs/objects/batch": self.batch,
            rf"/{repo_id}\.git/info/lfs/objects/verify": self.verify,
            r"/api/collections/(?P<slug>[^/]+/[^/]+)": self.collection,
            rf"/api/models/{repo_id}(?:/revision/(?P<rev>[^/]+))?": self.info,
            rf"/api/models/{repo_id}/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?": self.tree,
            rf"/api/models/{repo_id}/paths-info/(?P<rev>[^/]+)": self.paths_info,
            rf"/api/models/{repo_id}/refs": self.refs,
            rf"/api/models/{repo_id}/xet-read-token/(?P<rev>[^/]+)": self.xet_token,
            rf"/api/models/{repo_id}/auth-check": self.auth_check,
            rf"/api/resolve-cache/models/{repo_id}/(?P<rev>[^/]+)/(?P<path>.+)": self.small,
            rf"/{repo_id}/resolve/(?P<rev>[^/]+)/(?P<path>.+)": self.resolve,
        }
        for pattern, handler in routes.items():
            if found := re.fullmatch(pattern, url.path):
                handler({k: unquote(v or "") for k, v in found.groupdict().items()}, query)
        raise _Answer(404, error="Not Found")

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def repo(self, at: Mapping[str, str]) -> Repo:
        """The repository, or the answer that the real Hub gives (over plain http with an error code)."""
        if at["id"] in self.hub.renamed:
            target = self.path.replace(at["id"], self.hub.renamed[at["id"]], 1)
            raise _Answer(307, Location=target)
        if self.token and self.token not in self.hub.tokens:
            raise _Answer(401, error="Invalid credentials in Authorization header")
        repo = self.hub.repos.get(at["id"])
        allowed = self.hub.tokens.get(self.token or "", set())
        if repo is None or (repo.private and repo.id not in allowed):
            if self.token:
                raise _Answer(404, code="RepoNotFound", error="Repository not found")
            code = "" if self.hub.certificate else "RepoNotFound"  # the client takes a bare 401 for what it is over TLS only
            raise _Answer(401, code=code, error="Invalid username or password.")
        if repo.disabled:
            raise _Answer(403, error="Access to this resource is disabled.")
        return repo

    def at(self, at: Mapping[str, str]) -> tuple[Repo, str]:
        repo = self.repo(at)
        revision = at.get("rev") or "main"
        sha = repo.resolve(revision)
        if sha is None:
            raise _Answer(404, code="RevisionNotFound", error=f"Invalid rev id: {revision}")
        return repo, sha

    def open(self, repo: Repo) -> None:
        """Refuse the contents of a gated repository."""
        if repo.gated and repo.id not in self.hub.tokens.get(self.token or "", set()):
            start = f"Access to model {repo.id} is restricted"
            if self.token:
                text = f"{start} and you are not in the authorized list. Visit its page to ask for access."
                raise _Answer(403, code="GatedRepo", error=text)
            text = f"{start}. You must have access to it and be authenticated to access it. Please log in."
            raise _Answer(401, code="GatedRepo", error=text)

    def models(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        def fits(repo: Repo) -> bool:
            tags = set(repo.tags(repo.refs["main"]))
            author, search = query.get("author"), query.get("search", [""])[0].lower()
            gated = query.get("gated")
            return (
                not repo.private
                and set(query.get("filter", [])) <= tags
                and (not author or repo.id.startswith(author[0] + "/"))
                and search in repo.id.lower()
                and (not gated or (gated[0] == "true") == bool(repo.gated))
            )

        found = [repo for _, repo in sorted(self.hub.repos.items()) if fits(repo)]
        attribute = {"downloads": "downloads", "likes": "likes", "lastModified": "modified", "createdAt": "created"}
        if wanted := query.get("sort"):
            found.sort(key=lambda repo: getattr(repo, attribute[wanted[0]]), reverse=True)
        start = int(query.get("cursor", ["0"])[0])
        size = min(int(query.get("limit", [str(self.hub.page)])[0]), self.hub.page)
        page = [repo.info(repo.refs["main"], False) for repo in found[start : start + size]]
        if asked := query.get("expand"):
            page = [{key: one[key] for key in ("_id", "id", *asked) if key in one} for one in page]
        more = {}
        if start + size < len(found):
            following = urlencode({**query, "cursor": [str(start + size)]}, doseq=True)
            more["Link"] = f'<{self.hub.link(f"{self.hub.url}/api/models?{following}")}>; rel="next"'
        raise _Answer(200, page, **more)

    def collection(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        items = self.hub.collections.get(at["slug"])
        if items is None:
            raise _Answer(404, error="Collection not found")
        listed = [{"_id": str(n), "position": n, "type": kind, "id": name} for n, (kind, name) in enumerate(items)]
        about = {"slug": at["slug"], "title": "t", "owner": {}, "position": 0, "private": False, "theme": "blue", "upvotes": 0}
        raise _Answer(200, {**about, "lastUpdated": _WHEN, "items": listed})

    def info(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repo, sha = self.at(at)
        raise _Answer(200, repo.info(sha, bool(query.get("blobs"))))

    def tree(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repo, sha = self.at(at)
        prefix = at["path"] + "/" if at.get("path") else ""
        deep = query.get("recursive", ["false"])[0] == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, file in repo.commits[sha].items():
            if not path.startswith(prefix):
                continue
            parents = path.removeprefix(prefix).split("/")[:-1]
            for depth in range(len(parents) if deep else min(1, len(parents))):
                folder = prefix + "/".join(parents[: depth + 1])
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            if deep or not parents:
                entries[path] = _entry(file)
        raise _Answer(200, list(entries.values()))

    def paths_info(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repo, sha = self.at(at)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        raise _Answer(200, [_entry(f) for path, f in repo.commits[sha].items() if path in wanted])

    # -- uploads

    def writing(self, repo_id: str) -> None:
        """Refuse whoever may not write to a repository of this name."""
        if not self.token:
            raise _Answer(401, error="Invalid username or password.")
        if self.token not in self.hub.tokens:
            raise _Answer(401, error="Invalid credentials in Authorization header")
        if repo_id.split("/")[0] not in self.hub.writers.get(self.token, set()):
            raise _Answer(403, error=f"You don't have the rights to write to {repo_id}")

    def create(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        self.writing(repo_id)
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise _Answer(409, {"error": "You already created this model repo", "url": url})
        self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=asked.get("visibility") == "private")
        self.hub.tokens[self.token or ""].add(repo_id)
        raise _Answer(200, {"url": url, "name": repo_id})

    def validate(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        text = json.loads(self.body)["content"]
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            known = yaml.safe_load(head[1]) if head else {}
            errors = [] if isinstance(known, dict) else ["it is no mapping"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        warnings = [] if head else [{"message": "empty or missing yaml metadata in repo card"}]
        raise _Answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": warnings})

    def preupload(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repo, sha = self.at(at)
        if not query.get("create_pr"):
            self.writing(repo.id)
        ignored = repo.commits[sha].get(".gitignore", File("", b"")).data.decode().split()
        answers = []
        for one in json.loads(self.body)["files"]:
            held = repo.commits[sha].get(one["path"])
            oid = None if held is None else held.sha256 if held.large else held.oid
            mode = "lfs" if one["path"].endswith(LARGE) else "regular"
            answers.append({"path": one["path"], "uploadMode": mode, "oid": oid})
            answers[-1]["shouldIgnore"] = any(fnmatch(one["path"], pattern) for pattern in ignored)
        raise _Answer(200, {"files": answers})

    def held(self, sha256: str) -> bytes | None:
        files = (f for repo in self.hub.repos.values() for files in repo.commits.values() for f in files.values())
        known = next((f.data for f in files if f.large and f.sha256 == sha256), None)
        return self.hub.uploads.get(sha256, known)

    def batch(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        self.repo(at)
        verify = {"href": f"{self.hub.url}/{at['id']}.git/info/lfs/objects/verify"}
        objects = []
        for one in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.cdn}/upload/{one['oid']}", "header": {}}, "verify": verify}
            objects.append({**one, **({} if self.held(one["oid"]) is not None else {"actions": actions})})
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def verify(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        asked = json.loads(self.body)
        if len(self.hub.uploads.get(asked["oid"], b"")) != asked["size"]:
            raise _Answer(422, error="The size differs")
        raise _Answer(200, {"message": "Success"})

    def branch(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repo = self.repo(at)
        self.writing(repo.id)
        if at["rev"] in repo.refs:
            raise _Answer(409, error="This branch exists")
        repo.refs[at["rev"]] = repo.refs["main"]
        raise _Answer(200, {})

    def commit(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        self.hub.push()
        repo, sha = self.at(at)
        pull = bool(query.get("create_pr"))
        if not pull:
            self.writing(repo.id)
        files = {path: file.data for path, file in repo.commits[sha].items()}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                if value.get("parentCommit", sha) != sha:
                    raise _Answer(412, error="A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                data = self.held(value["oid"])
                if data is None:
                    raise _Answer(400, error=f"{value['path']} was not uploaded")
                files[value["path"]] = data
            elif files.pop(value["path"], None) is None:
                raise _Answer(404, error="A file with this name doesn't exist")
        repo.pulls += pull
        made = repo.commit(files, f"refs/pr/{repo.pulls}" if pull else at["rev"])
        page = f"{self.hub.url}/{repo.id}"
        more = {"pullRequestUrl": f"{page}/discussions/{repo.pulls}"} if pull else {}
        raise _Answer(200, {"success": True, "commitOid": made, "commitUrl": f"{page}/commit/{made}", **more})

    # -- contents

    def refs(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repo = self.repo(at)
        branches = [{"name": r, "ref": f"refs/heads/{r}", "targetCommit": s} for r, s in repo.refs.items()]
        raise _Answer(200, {"branches": branches, "tags": [], "converts": []})

    def auth_check(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        self.open(self.repo(at))
        raise _Answer(200, {})

    def xet_token(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        self.open(self.at(at)[0])
        expires = str(int(time.time()) + 3600)
        raise _Answer(200, {}, X_Xet_Cas_Url=self.hub.xet_store, X_Xet_Access_Token="t", X_Xet_Token_Expiration=expires)

    def file(self, at: Mapping[str, str]) -> tuple[Repo, str, File]:
        repo, sha = self.at(at)
        self.open(repo)
        file = repo.commits[sha].get(at["path"])
        if file is None:
            raise _Answer(404, b"Entry not found", code="EntryNotFound", X_Repo_Commit=sha)
        return repo, sha, file

    def small(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        _, sha, file = self.file(at)
        raise self.ranged(file.data, ETag=f'"{file.oid}"', X_Repo_Commit=sha)

    def resolve(self, at: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repo, sha, file = self.file(at)
        if file.large:
            location = f"{self.hub.cdn}/repos/{repo.id}/{file.sha256}?Expires=1&Signature=s"
            linked = {"X_Linked_Etag": f'"{file.sha256}"', "X_Linked_Size": str(len(file.data))}
            if file.sha256 in self.hub.xet:
                linked["X_Xet_Hash"] = self.hub.xet[file.sha256]
                linked["Link"] = f'<{self.hub.url}/api/models/{repo.id}/xet-read-token/{sha}>; rel="xet-auth"'
            raise _Answer(302, b"Found. Redirecting", Location=location, X_Repo_Commit=sha, **linked)
        location = f"/api/resolve-cache/models/{repo.id}/{sha}/{quote(file.path)}?etag={file.oid}"
        raise _Answer(307, Location=location, X_Repo_Commit=sha, X_Linked_Etag=f'"{file.oid}"')


def _entry(file: File) -> dict[str, Any]:
    return {"type": "file", "oid": file.oid, "size": len(file.data), "path": file.path, **file.lfs("oid")}
