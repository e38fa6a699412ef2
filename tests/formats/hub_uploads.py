"""The half of the loopback Hub that is written to: repositories, branches, pull requests, large files, commits.

    POST  /api/repos/create, /api/models/R/branch/B, /api/models/R/discussions
    POST  /api/models/R/preupload/REV       which files are large; the hash of what is there
    POST  /R.git/info/lfs/objects/batch     where the large ones go that are not there
    PUT   /lfs/OID on the CDN               one of them
    POST  /api/models/R/commit/REV          lines of JSON
    POST  /api/models/R/paths-info/REV      sizes and hashes

Source: the requests that huggingface_hub 0.34 and 2.4 make.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.formats import hub_server
from tests.formats.hub_server import NO_REPO, NO_REVISION, HubServer, Refusal, git_hash, is_large

ROUTES: dict[str, str] = {
    "create": r"/api/repos/create",
    "yaml": r"/api/validate-yaml",
    "branch": r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)",
    "discussions": r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions",
    "discussion": r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions/(?P<revision>\d+)",
    "preupload": r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)",
    "paths-info": r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)",
    "commit": r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)",
    "batch": r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "jobs": r"/api/jobs/(?P<revision>[^/]+)",
    "put": r"/lfs/(?P<revision>[0-9a-f]{64})",
}
NEW = "0" * 40
"""The commit of a repository that has just been made."""


@dataclass
class UploadHub(HubServer):
    """A Hub that can be written to.

    Args:
        answers: route -> what the next requests for it are answered with, and for how long to come back.
        broken: how many of the next large files are cut off in the middle.
        seconds: that each large file takes.
        swapped: file name -> what the Hub keeps instead of what it was sent.
        before: called with the route before each request is answered.
        blobs: large files by SHA-256; `puts` how often each was sent.
        messages: of the commits; `operations` their kinds.
        pulls: titles of the pull requests; `jobs`: what was to be run.
    """

    answers: dict[str, list[tuple[Refusal, str | None]]] = field(default_factory=dict)
    broken: int = 0
    seconds: float = 0.0
    swapped: dict[str, bytes] = field(default_factory=dict)
    before: Callable[[str], None] = lambda route: None
    blobs: dict[str, bytes] = field(default_factory=dict)
    puts: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    pulls: list[str] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    jobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def handler(self) -> type[hub_server.Handler]:
        return _Handler

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision has."""
        repo = self.repos[repo_id]
        return repo.commits[repo.revisions[revision]]


class _Handler(hub_server.Handler):
    hub: UploadHub

    def do_POST(self) -> None:
        self.write()

    def do_PUT(self) -> None:
        self.write()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        for route in ("discussions", "discussion"):
            if match := re.fullmatch(ROUTES[route], path):
                return self.pulls(match["repo"], b"") if route == "discussions" else self.pull(match)
        self.answer()

    def write(self) -> None:
        path = urlsplit(self.path).path
        matches = {route: re.fullmatch(pattern, path) for route, pattern in ROUTES.items()}
        route, match = next(((route, match) for route, match in matches.items() if match), ("", None))
        if match is None:
            return self.refuse(Refusal(404, None, f"no such path: {path}"))
        self.hub.requests.append(
            hub_server.Request(self.host, self.command, path, None, self.headers.get("Authorization"))
        )
        self.hub.before(route)
        if route == "put" and self.hub.broken > 0:
            self.hub.broken -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if route == "put":
            time.sleep(self.hub.seconds)
        n_bytes = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(n_bytes)
        if len(body) < n_bytes:  # whoever sent it is gone
            self.close_connection = True
            return
        if self.hub.answers.get(route):
            refusal, after = self.hub.answers[route].pop(0)
            return self.refuse(refusal, {} if after is None else {"Retry-After": after})
        fields = match.groupdict()
        revision = unquote(fields.get("revision") or "main")
        repo_id = fields.get("repo") or ""
        if route not in ("create", "yaml", "put", "jobs") and repo_id not in self.hub.repos:
            return self.refuse(NO_REPO)
        if route in ("preupload", "paths-info", "commit") and revision not in self.hub.repos[repo_id].revisions:
            return self.refuse(NO_REVISION)
        match route:
            case "create":
                self.create(json.loads(body))
            case "yaml":
                self.send_json({"errors": [], "warnings": []})
            case "branch":
                repo = self.hub.repos[repo_id]
                if revision in repo.revisions:
                    return self.refuse(Refusal(409, None, "Reference already exists"))
                repo.revisions[revision] = repo.revisions["main"]
                self.send_json({})
            case "discussions":
                self.pulls(repo_id, body)
            case "preupload":
                self.send_json({"files": [self.mode(repo_id, revision, each) for each in json.loads(body)["files"]]})
            case "batch":
                self.send_json({"transfer": "basic", "objects": [self.object(e) for e in json.loads(body)["objects"]]})
            case "jobs":
                self.hub.jobs.append({"namespace": revision, **json.loads(body)})
                owner = {"id": "1", "name": revision, "type": "org"}
                self.send_json({"id": "job1", "status": {"stage": "SCHEDULING"}, "owner": owner})
            case "put":
                self.hub.blobs[revision] = body
                self.hub.puts[revision] += 1
                self.send_json({})
            case "paths-info":
                files = self.hub.files(repo_id, revision)
                named = parse_qs(body.decode())["paths"]
                self.send_json([self.tree_entry(name, files[name]) for name in named if name in files])
            case "commit":
                self.commit(repo_id, revision, [json.loads(line) for line in body.splitlines()])

    def create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.hub.repos:
            said = {"error": "You already created this model repo", "url": f"{self.hub.url()}/{repo_id}"}
            return self.send_json(said, 409)
        self.hub.repos[repo_id] = hub_server.Repo({NEW: {}}, {"main": NEW, NEW: NEW})
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(repo_id)
        self.send_json({"url": f"{self.hub.url()}/{repo_id}"})

    def pulls(self, repo_id: str, body: bytes) -> None:
        if not body:
            found = [self.details(repo_id, n) for n in range(1, len(self.hub.pulls) + 1)]
            return self.send_json({"count": len(found), "start": 0, "discussions": found})
        self.hub.pulls.append(json.loads(body)["title"])
        n = len(self.hub.pulls)
        repo = self.hub.repos[repo_id]
        repo.revisions[f"refs/pr/{n}"] = repo.revisions["main"]
        self.send_json({"num": n})

    def pull(self, match: re.Match[str]) -> None:
        self.send_json(self.details(match["repo"], int(match["revision"])))

    def details(self, repo_id: str, n: int) -> dict[str, Any]:
        return {
            "title": self.hub.pulls[n - 1],
            "num": n,
            "createdAt": "2026-11-22T00:00:00.000Z",
            "status": "draft",
            "repo": {"name": repo_id, "type": "model"},
            "isPullRequest": True,
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "events": [],
        }

    def mode(self, repo_id: str, revision: str, file: dict[str, Any]) -> dict[str, Any]:
        name = file["path"]
        there = self.hub.files(repo_id, revision).get(name)
        large = is_large(name)
        oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_hash(there)
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def object(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.hub.blobs:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.hub.url('cdn')}/lfs/{asked['oid']}"}}}

    def commit(self, repo_id: str, revision: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.files(repo_id, revision))
        for line in lines:
            value = line["value"]
            self.hub.operations[line["key"]] += 1
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.swapped.get(value["path"], self.hub.blobs[value["oid"]])
        commit = hashlib.sha1(f"{len(self.hub.messages)}".encode()).hexdigest()
        repo = self.hub.repos[repo_id]
        repo.commits[commit] = files
        repo.revisions[revision] = repo.revisions[commit] = commit
        self.send_json(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url()}/{repo_id}/commit/{commit}"}
        )
