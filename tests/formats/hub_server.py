"""A Hugging Face Hub on the loopback interface, small enough to read and strict enough for the real client.

    GET  /api/models/ORG/NAME/revision/REV     commit and file names
    GET  /api/models/ORG/NAME/tree/COMMIT      files with sizes
    HEAD, GET  /ORG/NAME/resolve/REV/FILE      small files at once; weights as a redirect to the CDN, as on the Hub
    GET  /cdn/ORG/NAME/COMMIT/FILE             on a second port, so that the client sees a foreign host; ranges

Source: the requests that huggingface_hub 0.34 and 2.4 make; the error codes of `hf_raise_for_status`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/]+)")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
CDN = re.compile(r"/cdn/(?P<repo>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<file>.+)")


PIECE_BYTES = 1 << 16


@dataclass
class Refusal:
    """An answer that is not a file: status, the Hub's error code, its message."""

    status: int
    code: str | None
    message: str


NO_REPO = Refusal(401, "RepoNotFound", "Invalid username or password.")
NO_REPO_FOR_TOKEN = Refusal(404, "RepoNotFound", "Repository not found")
GATED_LOGIN = Refusal(401, "GatedRepo", "Access to model is restricted. You must be authenticated to access it.")
GATED_LICENSE = Refusal(403, "GatedRepo", "Access to model is restricted and you are not in the authorized list.")
BAD_TOKEN = Refusal(401, None, "Invalid credentials in Authorization header")
NO_REVISION = Refusal(404, "RevisionNotFound", "Invalid rev id.")
NO_FILE = Refusal(404, "EntryNotFound", "Entry not found")


@dataclass
class Repo:
    """One repository: the files of each commit, the commit of each revision, and how its API and its files refuse."""

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    api_refusal: Refusal | None = None
    file_refusal: Refusal | None = None


@dataclass
class Request:
    """What the server was asked: "hub" or "cdn", method, path and the headers that tests look at."""

    host: str
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class HubServer:
    """Serves `repos` until closed.

    Args:
        cuts: file name -> after how many bytes each next request for it is cut off, -1 for no cut.
        stalls: file names that never arrive.
        sent: file name -> what is sent instead of the file.
        lost: file names that the API lists and that are not there.
        etags: file name -> what is said to be its hash.
        api_commit, file_commit: what the API, and the answers for files, say that the commit is.
        warning: what the Hub wants its users to read.
        ranges: whether it knows ranges.
        n_sent: bytes of each file that were taken from it.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    stalls: set[str] = field(default_factory=set)
    sent: dict[str, bytes] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    etags: dict[str, str] = field(default_factory=dict)
    api_commit: str | None = None
    file_commit: str | None = None
    warning: str | None = None
    ranges: bool = True
    n_sent: Counter[str] = field(default_factory=Counter)
    requests: list[Request] = field(default_factory=list)

    @property
    def handler(self) -> type[Handler]:
        """What answers; a Hub that can be written to has another (see hub_uploads.py)."""
        return Handler

    def __post_init__(self) -> None:
        self._servers = {host: _listen(self, host) for host in ("hub", "cdn")}

    def add(
        self,
        repo_id: str,
        files: dict[str, bytes],
        *,
        revision: str = "main",
        api_refusal: Refusal | None = None,
        file_refusal: Refusal | None = None,
    ) -> str:
        """Adds a commit and points a revision to it; gives its hash."""
        commit = hashlib.sha1(f"{repo_id} {revision} {sorted(files)}".encode()).hexdigest()
        repo = self.repos.setdefault(repo_id, Repo({}, {}, api_refusal, file_refusal))
        repo.commits[commit] = files
        repo.revisions[revision] = repo.revisions[commit] = commit
        return commit

    def url(self, host: str = "hub") -> str:
        return f"http://127.0.0.1:{self._servers[host].server_address[1]}"

    def fetched(self) -> list[str]:
        """The names of the files that were sent, in order, without HEAD requests and redirects."""
        paths = [CDN.fullmatch(r.path) or RESOLVE.fullmatch(r.path) for r in self.requests if r.method == "GET"]
        names = [match["file"] for match in paths if match]
        return [name for i, name in enumerate(names) if name not in names[:i]]

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()


def _listen(hub: HubServer, host: str) -> ThreadingHTTPServer:
    handler = type("Handler", (hub.handler,), {"hub": hub, "host": host})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for a delayed acknowledgement
    hub: HubServer
    host: str

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(
            Request(self.host, self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if self.host == "cdn" and (match := CDN.fullmatch(path)):
            self.send_file(match["file"], self.hub.repos[match["repo"]].commits[match["revision"]][match["file"]])
        elif match := API.fullmatch(path):
            self.send_api(match["repo"], match["what"], unquote(match["revision"]))
        elif match := RESOLVE.fullmatch(path):
            self.send_resolved(match["repo"], unquote(match["revision"]), unquote(match["file"]))
        else:
            self.refuse(Refusal(404, None, f"no such path: {path}"))

    def send_api(self, repo_id: str, what: str, revision: str) -> None:
        repo = self.hub.repos.get(repo_id)
        refusal = NO_REPO if repo is None else repo.api_refusal
        if refusal is None and repo is not None and revision not in repo.revisions:
            refusal = NO_REVISION
        if refusal is not None or repo is None:
            return self.refuse(refusal or NO_REPO)
        commit = repo.revisions[revision]
        files = repo.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            sha = self.hub.api_commit or commit
            return self.send_json({"id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings, "tags": []})
        self.send_json([self.tree_entry(name, data) for name, data in files.items()])

    def tree_entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
        if is_large(name):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def send_resolved(self, repo_id: str, revision: str, name: str) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self.refuse(NO_REPO)
        if repo.file_refusal is not None:
            return self.refuse(repo.file_refusal)
        if revision not in repo.revisions:
            return self.refuse(NO_REVISION)
        commit = repo.revisions[revision]
        if name not in repo.commits[commit] or name in self.hub.lost:
            return self.refuse(NO_FILE, {"X-Repo-Commit": self.hub.file_commit or commit})
        data = repo.commits[commit][name]
        if not is_large(name):
            said = {"X-Repo-Commit": self.hub.file_commit or commit, "ETag": self.etag(name, data)}
            return self.send_file(name, data, said)
        self.send_response(302)
        self.send_header("Location", f"{self.hub.url('cdn')}/cdn/{repo_id}/{commit}/{name}")
        self.send_header("X-Repo-Commit", self.hub.file_commit or commit)
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Linked-ETag", self.etag(name, data))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def etag(self, name: str, data: bytes) -> str:
        found = hashlib.sha256(data).hexdigest() if is_large(name) else git_hash(data)
        return f'"{self.hub.etags.get(name, found)}"'

    def send_file(self, name: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        data = self.hub.sent.get(name, data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "") if self.hub.ranges else "")
        begin = int(asked[1]) if asked else 0
        end = min(int(asked[2]) + 1, len(data)) if asked and asked[2] else len(data)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - begin))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cuts.get(name)
        cut = cuts.pop(0) if cuts else -1
        if name in self.hub.stalls:
            time.sleep(60)
        if cut < 0:
            for at in range(begin, end, PIECE_BYTES):
                piece = data[at : min(at + PIECE_BYTES, end)]
                try:
                    self.wfile.write(piece)
                except OSError:  # enough was read
                    self.close_connection = True
                    return
                self.hub.n_sent[name] += len(piece)
        else:
            self.wfile.write(data[begin : begin + cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def send_json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.hub.warning is not None:
            self.send_header("X-HF-Warning", self.hub.warning)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, refusal: Refusal, headers: dict[str, str] | None = None) -> None:
        body = b"" if self.command == "HEAD" else json.dumps({"error": refusal.message}).encode()
        self.send_response(refusal.status)
        if refusal.code is not None:
            self.send_header("X-Error-Code", refusal.code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("X-Error-Message", refusal.message)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def git_hash(data: bytes) -> str:
    """How git, and so the Hub, names a file that is not large."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(name: str) -> bool:
    """Whether a file is stored behind the CDN."""
    return name.endswith((".safetensors", ".bin", ".gguf"))
