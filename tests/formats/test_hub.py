"""The real huggingface_hub client in a subprocess against a server on the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from gguf3n.formats import hub
from gguf3n.formats.checkpoint import INDEX, read_tensor_table
from gguf3n.formats.checkpoint import SINGLE as SINGLE_FILE
from tests.formats import hub_server
from tests.formats.hub_server import HubServer, Refusal

ROOT = Path(__file__).parents[2]
NAME = "org/gemma-3n-tiny"

CLIENT = """
import dataclasses, json, sys, time
from gguf3n.errors import Gguf3nError
from gguf3n.formats import hub

for options in json.loads(sys.argv[1]):
    table = options.pop("table", False)
    exec(options.pop("before", ""))
    is_adapter = options.pop("adapter", False)
    try:
        if is_adapter:
            print(json.dumps({"directory": str(hub.fetch_adapter(**options))}))
            continue
        fetched = hub.fetch_checkpoint(**options)
        result = dataclasses.asdict(fetched)
        if table:
            result["table"] = [
                (t.name, t.dtype, t.shape, t.file, t.offset, t.error)
                for tensor in hub.fetch_tensor_table(fetched).values()
                for t in tensor.stored
            ]
    except Gguf3nError as error:
        result = error.as_dict() | {"text": str(error)}
    except KeyboardInterrupt:
        result = {"error": "KeyboardInterrupt"}
    print(json.dumps(result, default=str))
"""
"""Prints what each `fetch_checkpoint` gives or raises; `before`: code to run first, `table`: with the tensor table,
`adapter`: of `fetch_adapter` instead."""


@dataclass
class Client:
    """Runs gguf3n.formats.hub in a fresh process, with a cache of its own."""

    home: Path
    endpoint: str
    env: dict[str, str] = field(default_factory=dict)
    stderr: str = ""

    def start(self, *calls: dict[str, Any]) -> subprocess.Popen[str]:
        ours = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
        env = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "PYTHONPATH": str(ROOT)} | self.env
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, json.dumps([{"repo_id": NAME} | call for call in calls])],
            env=kept | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def fetch_each(self, *calls: dict[str, Any]) -> list[dict[str, Any]]:
        out, self.stderr = (process := self.start(*calls)).communicate(timeout=30)
        assert process.returncode == 0, self.stderr
        return [json.loads(line) for line in out.splitlines()]

    def fetch(self, **options: Any) -> dict[str, Any]:
        return self.fetch_each(options)[0]

    def offline(self) -> Client:
        return Client(self.home, self.endpoint, self.env | {"HF_HUB_OFFLINE": "1"})


@pytest.fixture
def server() -> Iterator[HubServer]:
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def client(server: HubServer, tmp_path: Path) -> Client:
    return Client(tmp_path / "hf", server.url())


@dataclass
class Batch:
    """A server, and what one client process made of several repositories; cheaper than a process a test."""

    server: HubServer
    client: Client
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def fetch(self, *names: str, **options: Any) -> None:
        calls = [{"repo_id": f"org/{name}"} | options for name in names]
        self.results |= dict(zip(names, self.client.fetch_each(*calls), strict=True))


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Batch]]:
    batches: list[Batch] = []

    def start() -> Batch:
        server = HubServer()
        batches.append(Batch(server, Client(tmp_path_factory.mktemp("batch") / "hf", server.url())))
        return batches[-1]

    yield start
    for each in batches:
        each.server.close()


def safetensors(**sizes: int) -> bytes:
    """A safetensors file of BF16 vectors; each size in elements."""
    header, position = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [size], "data_offsets": [position, position + 2 * size]}
        position += 2 * size
    text = json.dumps(header).encode()
    pattern = bytes(range(251))  # a prime length, so that shifted bytes are noticed
    return struct.pack("<Q", len(text)) + text + (pattern * (position // 251 + 1))[:position]


def index(**shards: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": shards}).encode()


SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SMALL = {"config.json": b"{}", "tokenizer.model": b"spm", "tokenizer.json": b'{"model": {}}', "README.md": b"# tiny"}
SHARDS = {SHARD_1: safetensors(a=1000), SHARD_2: safetensors(b=2000)}
SHARDED = SMALL | SHARDS | {INDEX: index(a=SHARD_1, b=SHARD_2)}
SINGLE = SMALL | {SINGLE_FILE: safetensors(a=1000, b=2000)}
DUPLICATES = dict.fromkeys(
    (
        "consolidated.safetensors",
        "original/model.safetensors",
        "original/config.json",
        "onnx/model.onnx",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "gemma-Q4_K_M.gguf",
        "teaser.png",
    ),
    b"not this one",
)


def stored(result: dict[str, Any]) -> dict[str, bytes]:
    """The files of a fetched snapshot."""
    directory = Path(result["directory"])
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("google/gemma-3n-E2B-it", True),
        ("a/b", True),
        ("org_1/name.v2", True),
        ("gemma", False),
        ("a/b/c", False),
        ("./a", False),
        ("../a", False),
        ("/a/b", False),
        ("~/a", False),
        ("a/", False),
        ("a/b/", False),
        ("a/b--c", False),
        ("a/b..c", False),
        ("a/b.git", False),
        ("a/-b", False),
        ("a/b c", False),
        (r"C:\a", False),
        ("a/" + "b" * 97, False),
        ("", False),
    ],
)
def test_is_repo_id(source: str, expected: bool) -> None:
    assert hub.is_repo_id(source) is expected


def test_existing_path_is_not_a_repo_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not hub.is_repo_id("org/name")
    assert hub.is_repo_id("org/other")


def test_import_is_light() -> None:
    code = "import sys, gguf3n.formats.hub; print('huggingface_hub' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


LAYOUTS: dict[str, tuple[dict[str, bytes], dict[str, bytes]]] = {
    "shards": (SHARDED, SHARDED),
    "shards-and-duplicates": (DUPLICATES | SHARDED | {"model-00003-of-00002.safetensors": b"no"}, SHARDED),
    "shards-without-index": (DUPLICATES | SMALL | SHARDS, SMALL | SHARDS),
    "single": (DUPLICATES | SINGLE, SINGLE),
    "single-and-leftover-index": (SHARDED | SINGLE, SINGLE),
    "with-adapter-config": (SINGLE | {"adapter_config.json": b"{}"}, SINGLE | {"adapter_config.json": b"{}"}),
}
"""Repository name -> its files, and those that are fetched."""


@pytest.fixture(scope="module")
def layouts(batch: Callable[[], Batch]) -> Batch:
    each = batch()
    for name, (files, _) in LAYOUTS.items():
        each.server.add(f"org/{name}", files)
    each.fetch(*LAYOUTS)
    return each


class TestFetch:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_exactly_the_checkpoint(self, layouts: Batch, name: str) -> None:
        _, expected = LAYOUTS[name]
        result = layouts.results[name]
        assert stored(result) == expected
        assert result["weights"] == sorted(file for file in expected if file.endswith(".safetensors"))
        assert result["commit"] == layouts.server.repos[f"org/{name}"].revisions["main"]
        assert (result["repo_id"], result["revision"], result["from_cache"]) == (f"org/{name}", "main", False)

    def test_order_and_token(self, server: HubServer, client: Client) -> None:
        """Weights last, a second run fetches nothing, and the token stays with the Hub."""
        server.add(NAME, SHARDED)
        first, second = client.fetch_each({"token": "hf_secret"}, {"token": "hf_secret"})
        assert second == first
        fetched = server.fetched()
        assert sorted(fetched) == sorted(SHARDED) and fetched[-2:] == [SHARD_1, SHARD_2]
        assert {r.token for r in server.requests if r.host == "hub" and NAME in r.path} == {"Bearer hf_secret"}
        assert {r.token for r in server.requests if r.host == "cdn"} == {None}

    def test_revision(self, server: HubServer, client: Client) -> None:
        server.add(NAME, SINGLE)
        branch = server.add(NAME, SINGLE | {"config.json": b'{"v": 2}'}, revision="refs/pr/1")
        by_name, by_commit = client.fetch_each({"revision": "refs/pr/1"}, {"revision": branch})
        assert by_name["revision"] == "refs/pr/1" and by_name["commit"] == branch
        assert stored(by_name)["config.json"] == b'{"v": 2}'
        assert by_commit == by_name | {"revision": branch}

    def test_without_weights(self, server: HubServer, client: Client) -> None:
        server.add(NAME, SHARDED)
        result = client.fetch(weights=False)
        assert set(stored(result)) == set(SHARDED) - set(SHARDS)
        assert result["weights"] == [SHARD_1, SHARD_2]

    @pytest.mark.parametrize("show", [True, False])
    def test_progress_bars(self, server: HubServer, client: Client, show: bool) -> None:
        server.add(NAME, SINGLE)
        client.env = {"TQDM_POSITION": "-1"}  # bars although this is no terminal
        client.fetch(progress=show)
        assert (SINGLE_FILE in client.stderr) is show
        assert show or not client.stderr


@pytest.fixture(scope="module")
def cached(batch: Callable[[], Batch]) -> Batch:
    """A cache with complete and incomplete copies."""
    each = batch()
    for name in ("single", "headers"):
        each.server.add(f"org/{name}", SINGLE)
    for name in ("sharded", "lost", "index"):
        each.server.add(f"org/{name}", SHARDED)
    each.fetch("single", "sharded", "lost")
    each.fetch("headers", "index", weights=False)
    Path(each.results["lost"]["directory"], SHARD_2).unlink()
    return each


class TestOffline:
    def test_offline(self, cached: Batch) -> None:
        cached.server.requests.clear()
        names = ("single", "sharded", "lost", "headers", "index", "never-seen")
        single, sharded, *errors = cached.client.offline().fetch_each(*({"repo_id": f"org/{name}"} for name in names))
        assert not cached.server.requests
        assert single == cached.results["single"] | {"from_cache": True}
        assert sharded == cached.results["sharded"] | {"from_cache": True}
        for error in errors:
            assert error["error"] == "HubError" and error["exit_code"] == 8
            assert "is not complete in the cache, and HF_HUB_OFFLINE forbids" in error["what"]
            assert "HF_HUB_OFFLINE=0" in error["fix"]

    def test_no_network(self, cached: Batch) -> None:
        client = replace(cached.client, endpoint=closed_port())
        names = ("sharded", "lost", "never-seen")
        sharded, *errors = client.fetch_each(*({"repo_id": f"org/{name}"} for name in names))
        assert sharded == cached.results["sharded"] | {"from_cache": True}
        for error in errors:
            assert error["error"] == "HubError" and "cannot be reached" in error["what"]
            assert client.endpoint in error["expected"] and "Connect" in error["found"]

    def test_hub_down(self, cached: Batch) -> None:
        repo = cached.server.repos["org/single"]
        repo.api_refusal = Refusal(503, None, "maintenance")
        try:
            result = cached.client.fetch(repo_id="org/single")
        finally:
            repo.api_refusal = None
        assert result == cached.results["single"] | {"from_cache": True}


REFUSALS: dict[str, tuple[dict[str, Refusal], str, str]] = {
    "unknown": ({"api_refusal": hub_server.NO_REPO}, "no such repository", "check the name at https://huggingface.co/org/unknown"),
    "private": ({"api_refusal": hub_server.NO_REPO_FOR_TOKEN}, "no such repository", "`hf auth login` or set HF_TOKEN"),
    "gated-login": ({"file_refusal": hub_server.GATED_LOGIN}, "gated", "license at https://huggingface.co/org/gated-login"),
    "gated-license": ({"file_refusal": hub_server.GATED_LICENSE}, "gated", "`hf auth login` or set HF_TOKEN"),
    "gated-listing": ({"api_refusal": hub_server.GATED_LOGIN}, "gated", "`hf auth login` or set HF_TOKEN"),
    "bad-token": ({"api_refusal": hub_server.BAD_TOKEN}, "does not accept the token", "hf auth login"),
    "forbidden": ({"api_refusal": Refusal(403, None, "no scope")}, "refuses access", "whether the token may read"),
    "too-many": ({"api_refusal": Refusal(429, None, "slow down")}, "too many requests", "wait"),
    "down": ({"api_refusal": Refusal(503, None, "maintenance")}, "answers with an error", "again"),
    "files-down": ({"file_refusal": Refusal(404, None, "lost")}, "answers with an error for the small files", "again"),
}  # fmt: skip
"""Repository name -> how it refuses, and what the message and its remedy must say."""


@pytest.fixture(scope="module")
def refused(batch: Callable[[], Batch]) -> Batch:
    each = batch()
    for name, (refusals, _, _) in REFUSALS.items():
        each.server.add(f"org/{name}", SINGLE, **refusals)
    each.fetch(*REFUSALS)
    return each


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSALS)
    def test_refusal(self, refused: Batch, name: str) -> None:
        refusals, what, fix = REFUSALS[name]
        (refusal,) = refusals.values()
        error = refused.results[name]
        assert error["error"] == "HubError" and error["exit_code"] == 8
        assert error["what"].startswith(f"org/{name}") and what in error["what"] and fix in error["fix"]
        assert error["found"].startswith(f"HTTP {refusal.status}: ") and refusal.message in error["found"]
        assert error["text"].count("\n") == 2

    def test_nothing_large_is_fetched(self, refused: Batch) -> None:
        assert not [name for name in refused.server.fetched() if hub_server.is_large(name)]
        assert "Traceback" not in refused.client.stderr

    def test_missing_revision(self, server: HubServer, client: Client) -> None:
        server.add(NAME, SINGLE)
        error = client.fetch(revision="v9")
        assert error["error"] == "HubError" and error["what"] == f"{NAME} has no revision 'v9'"
        assert not server.fetched()


WRITE_ERRORS = {
    "no space left": "OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))",
    "no space left for model.safetensors": "OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))",
    ": no space left": "RuntimeError('IO Error: No space left on device (os error 28)')",  # hf_xet
    "/cache/blobs: cannot be written": "PermissionError(errno.EACCES, os.strerror(errno.EACCES), '/cache/blobs')",
}
"""What the message must say -> what huggingface_hub raises."""


class TestBrokenDownloads:
    def test_resumes_where_it_broke(self, server: HubServer, client: Client) -> None:
        files = SMALL | {SINGLE_FILE: safetensors(a=8_000_000)}
        server.add(NAME, files)
        server.cuts[SINGLE_FILE] = [12_000_000]  # the client writes pieces of 10 MiB
        result = client.fetch()
        if "error" in result:  # huggingface_hub before 2 only resumes in the next run
            assert result["what"] == f"{NAME}: the download of {SINGLE_FILE} broke off"
            result = client.fetch()
        assert stored(result) == files
        ranges = [request.range for request in server.requests if request.host == "cdn" and request.method == "GET"]
        assert ranges == [None, f"bytes={10 * 2**20}-"]

    def test_gives_up_and_continues_next_time(self, server: HubServer, client: Client) -> None:
        server.add(NAME, SHARDED)
        server.cuts[SHARD_2] = [100] + [0] * 20
        error = client.fetch(before="time.sleep = lambda seconds: None")
        assert error["error"] == "HubError" and error["what"] == f"{NAME}: the download of {SHARD_2} broke off"
        assert "run the same command again" in error["fix"]
        server.cuts.clear()
        server.requests.clear()
        assert stored(client.fetch()) == SHARDED
        assert server.fetched() == [SHARD_2]

    def test_ctrl_c_stops_at_once(self, server: HubServer, client: Client) -> None:
        server.add(NAME, SINGLE)
        server.stalls.add(SINGLE_FILE)
        process = client.start({})
        while SINGLE_FILE not in server.fetched():
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=5)
        assert json.loads(out) == {"error": "KeyboardInterrupt"}

    def test_cache_that_cannot_be_written(self, server: HubServer, client: Client) -> None:
        server.add(NAME, SINGLE)
        client.fetch(weights=False)
        errors = client.fetch_each(*({"before": fail_writing(error)} for error in WRITE_ERRORS.values()))
        for expected, error in zip(WRITE_ERRORS, errors, strict=True):
            assert error["error"] == "OutputError" and error["exit_code"] == 10
            assert expected in error["what"] and "HF_HOME" in error["fix"]

    def test_cache_that_is_no_directory(self, server: HubServer, client: Client) -> None:
        server.add(NAME, SINGLE)
        client.home.write_text("a file where the cache should be")
        error = client.fetch()
        assert error["error"] == "OutputError" and str(client.home) in error["what"]


ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": safetensors(a=10)}


def test_an_adapter(server: HubServer, client: Client) -> None:
    """Its two files and no other, from the Hub and then from the cache; an incomplete one is an error."""
    server.add("org/adapter", ADAPTER | {"optimizer.pt": b"large", "README.md": b"#"})
    server.add("org/inside", {f"checkpoint-1/{name}": data for name, data in ADAPTER.items()})
    adapter = {"adapter": True, "repo_id": "org/adapter"}
    found, inside = client.fetch_each(adapter, {"adapter": True, "repo_id": "org/inside"})
    assert stored(found) == ADAPTER
    assert inside["error"] == "HubError" and "no adapter at the top" in inside["what"]
    assert "checkpoint-1/adapter_config.json" in inside["found"]
    cached, missing = client.offline().fetch_each(adapter, {"adapter": True, "repo_id": "org/other"})
    assert cached == found
    assert missing["error"] == "HubError" and "HF_HUB_OFFLINE" in missing["what"]


UNUSABLE: dict[str, tuple[dict[str, bytes], str, str]] = {
    "pickle": ({"config.json": b"{}", "pytorch_model.bin": b""}, "PyTorch's pickle format", "pytorch_model.bin"),
    "gguf": ({f"m-{i}.gguf": b"" for i in range(9)}, "GGUF files, already converted", "and 4 more"),
    "adapter": ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "PEFT adapter", "adapter_config"),
    "elsewhere": ({"README.md": b"", "original/model.safetensors": b""}, "no safetensors checkpoint", "original/model"),
    "empty": ({".gitattributes": b""}, "no safetensors checkpoint", "no files"),
    "shard": ({INDEX: index(a=SHARD_1, b=SHARD_2), SHARD_1: b""}, f"{SHARD_2} is not in the repository", "1 of them"),
}
"""Repository name -> its files, and what the message must say is wrong and was found."""


@pytest.fixture(scope="module")
def unusable(batch: Callable[[], Batch]) -> Batch:
    each = batch()
    for name, (files, _, _) in UNUSABLE.items():
        each.server.add(f"org/{name}", files)
    each.fetch(*UNUSABLE)
    return each


class TestUnusableRepositories:
    @pytest.mark.parametrize("name", UNUSABLE)
    def test_named(self, unusable: Batch, name: str) -> None:
        _, what, found = UNUSABLE[name]
        error = unusable.results[name]
        assert error["error"] == "HubError" and error["fix"] and error["expected"]
        assert error["what"].startswith(f"org/{name}: ") and what in error["what"] and found in error["found"]

    def test_nothing_large_is_fetched(self, unusable: Batch) -> None:
        assert not [name for name in unusable.server.fetched() if hub_server.is_large(name)]

    @pytest.mark.parametrize("broken", [b"<html>", b'{"weight_map": {"a": "../../etc/passwd"}}'])
    def test_broken_index(self, server: HubServer, client: Client, broken: bytes) -> None:
        server.add(NAME, SHARDED | {INDEX: broken})
        error = client.fetch()
        assert error["error"] == "CheckpointError" and INDEX in error["what"]


class TestTensorTable:
    @pytest.mark.parametrize("files", [SINGLE, SHARDED])
    def test_equals_the_local_table(self, server: HubServer, client: Client, files: dict[str, bytes]) -> None:
        server.add(NAME, files)
        from_headers, complete = client.fetch_each({"weights": False, "table": True}, {})
        whole = [request.range is None for request in server.requests if request.host == "cdn"]
        assert whole == [False] * len(complete["weights"]) + [True] * len(complete["weights"])
        local = read_tensor_table(Path(complete["directory"]))
        assert from_headers["table"] == [
            [t.name, t.dtype, list(t.shape), str(t.file), t.offset, str(t.error)]
            for tensor in local.values()
            for t in tensor.stored
        ]
        assert client.offline().fetch(table=True)["table"] == from_headers["table"]

    def test_fetches_only_the_header(self, server: HubServer, client: Client) -> None:
        """A header above the first request's size costs one more request."""
        names = {f"layer.{i:05d}.{'x' * 100}": 8 for i in range(2000)}
        files = SMALL | {SINGLE_FILE: safetensors(**names, big=5_000_000)}
        server.add(NAME, files)
        client.env = {"HF_TOKEN": "hf_secret"}
        result = client.fetch(weights=False, table=True)
        assert len(result["table"]) == 2001
        assert {request.token for request in server.requests if request.host == "cdn"} == {None}
        (header_bytes,) = struct.unpack("<Q", files[SINGLE_FILE][:8])
        assert header_bytes > hub.HEADER_REQUEST_BYTES
        ranges = [request.range for request in server.requests if request.host == "cdn"]
        first = hub.HEADER_REQUEST_BYTES
        assert ranges == [f"bytes=0-{first - 1}", f"bytes={first}-{2 * first - 1}"]
        assert header_bytes + 8 <= 2 * first

    def test_a_server_that_sends_the_whole_file(self, server: HubServer, client: Client) -> None:
        """It is read as far as the header goes, and no further."""
        large = safetensors(big=50_000_000)
        server.add(NAME, SMALL | {SINGLE_FILE: large})
        server.ranges = False
        assert len(client.fetch(weights=False, table=True)["table"]) == 1
        assert server.n_sent[SINGLE_FILE] < 20_000_000

    def test_broken_header(self, server: HubServer, client: Client) -> None:
        server.add(NAME, SMALL | {SINGLE_FILE: b"version https://git-lfs.github.com/spec/v1\noid sha256:00"})
        error = client.fetch(weights=False, table=True)
        assert error["error"] == "CheckpointError"
        assert error["what"].startswith(f"{NAME}/{SINGLE_FILE}: not a safetensors file")

    def test_gated(self, server: HubServer, client: Client) -> None:
        server.add(NAME, SINGLE)
        client.fetch(weights=False)
        server.repos[NAME].file_refusal = hub_server.GATED_LICENSE
        assert "gated" in client.fetch(weights=False, table=True)["what"]


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def fail_writing(error: str) -> str:
    """Code that makes every download of huggingface_hub raise an error."""
    return f"""
import errno, os
import huggingface_hub.file_download

def http_get(*args, **kwargs):
    raise {error}

huggingface_hub.file_download.http_get = http_get
"""
