"""GGUF files on servers, good and bad ones: a loopback server for each way in which an answer can be wrong."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf3n.errors import GGUFError, HubError
from gguf3n.formats import remote
from gguf3n.formats.byte_source import is_remote
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.gguf_writer import lay_out

from .hub_server import NO_REPO, HubServer

ROOT = Path(__file__).resolve().parents[2]

U16, U32, STRING, ARRAY = (
    GGUFValueType.UINT16,
    GGUFValueType.UINT32,
    GGUFValueType.STRING,
    GGUFValueType.ARRAY,
)
TOKENS = [f"piece-{i}-{'x' * 40}" for i in range(60_000)]
"""About three megabytes, so that a header takes several blocks."""


def gguf_bytes(tokens: list[str] = TOKENS, keys: list[KeyValue] | None = None, name: str = "t") -> bytes:
    layout = lay_out(
        [KeyValue("tokens", ARRAY, tokens, STRING), KeyValue("after", U32, 7), *(keys or [])],
        [(name, (64, 32), QType.F32)],
    )
    return layout.header + np.arange(64 * 32, dtype="<f4").tobytes()


FILE = gguf_bytes()


class Answer(BaseHTTPRequestHandler):
    """One request; `behave` decides. `sent` counts the bytes of all bodies."""

    protocol_version = "HTTP/1.1"
    behave: Callable[[Answer], None]
    seen: list[tuple[str, str | None, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        try:
            type(self).behave(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def span(self) -> tuple[int, int]:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        return int(first), int(last) + 1

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def part(self, data: bytes = FILE, *, size: int | None = None, cut: int | None = None, shift: int = 0) -> None:
        start, end = self.span()
        body = data[start:end]
        size = len(data) if size is None else size
        if not body:
            self.head(416, 0)
            return
        said = f"bytes {start + shift}-{start + shift + len(body) - 1}/{size}"
        self.head(206, len(body), Content_Range=said)
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(behave: Callable[[Answer], None]) -> Iterator[tuple[str, list[tuple[str, str | None, str | None]]]]:
    handler = type("Handler", (Answer,), {"behave": behave, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/model.gguf", handler.seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 3.0)


def check(url: str) -> None:
    gguf = open_gguf(url)
    assert gguf.value("after") == 7
    assert gguf.value("tokens") == TOKENS
    assert gguf.file_bytes == len(FILE)
    assert gguf.read(gguf.tensors["t"]) == FILE[-64 * 32 * 4 :]


def test_ranges() -> None:
    with serving(Answer.part) as (url, seen):
        check(url)
    assert len(seen) <= 6
    assert all(span is not None for _, span, _ in seen)


def test_only_the_header_is_read() -> None:
    data = FILE + bytes(50_000_000)
    with serving(lambda answer: answer.part(data)) as (url, _):
        source = remote.RemoteFile(url)
        open_gguf(url)
        assert source.n_bytes == len(data)
        assert source.fetched_bytes == remote.BLOCK_BYTES


def test_a_server_that_ignores_ranges() -> None:
    def behave(answer: Answer) -> None:
        answer.head(200, len(FILE))
        answer.wfile.write(FILE)

    with serving(behave) as (url, seen):
        check(url)
    assert len(seen) == 1


def test_a_server_that_ignores_ranges_of_a_large_file() -> None:
    """The header is read and no more; the data is out of reach, and the error says so."""
    size = remote.MAX_STREAM_BYTES * 2

    def behave(answer: Answer) -> None:
        answer.head(200, size)
        answer.wfile.write(FILE)
        answer.wfile.write(bytes(8 << 20))
        time.sleep(2)

    with serving(behave) as (url, _):
        gguf = open_gguf(url)
        assert gguf.file_bytes == size
        with pytest.raises(HubError, match="ignores ranges"):
            gguf.parts[0].read_at(size - 10, 10)


def test_short_reads_are_continued() -> None:
    with serving(lambda answer: answer.part(cut=400_000)) as (url, seen):
        check(url)
    assert len(seen) > 6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_connection_that_breaks_and_heals() -> None:
    """Why the filters: urllib leaves the socket of a request without an answer to the garbage collector."""
    n = 0

    def behave(answer: Answer) -> None:
        nonlocal n
        n += 1
        if n % 2:
            answer.close_connection = True
            answer.connection.shutdown(socket.SHUT_RDWR)
        else:
            answer.part()

    with serving(behave) as (url, _):
        check(url)
    gc.collect()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status: int) -> None:
    n = 0

    def behave(answer: Answer) -> None:
        nonlocal n
        n += 1
        if n == 1:
            answer.head(status, 0)
        else:
            answer.part()

    with serving(behave) as (url, _):
        check(url)


def stalls(answer: Answer) -> None:
    time.sleep(1)


def drips(answer: Answer) -> None:
    start, _ = answer.span()
    answer.head(206, 1 << 20, Content_Range=f"bytes {start}-{start + (1 << 20) - 1}/{1 << 30}")
    for _ in range(100):
        answer.wfile.write(b"G")
        time.sleep(0.1)


def loops(answer: Answer) -> None:
    answer.head(302, 0, Location=answer.path)


def to_a_file(answer: Answer) -> None:
    answer.head(302, 0, Location="file:///etc/passwd")


def says_nothing(answer: Answer) -> None:
    start, end = answer.span()
    answer.head(206, end - start)
    answer.wfile.write(FILE[start:end])


def without_a_size(answer: Answer) -> None:
    answer.head(200, None, Connection="close")
    answer.wfile.write(FILE)
    answer.close_connection = True


def compressed(answer: Answer) -> None:
    answer.head(200, 4, Content_Encoding="gzip")
    answer.wfile.write(b"abcd")


def changes(answer: Answer) -> None:
    answer.part(size=len(FILE) + len(answer.seen))


def breaks_off(answer: Answer) -> None:
    answer.head(200, len(FILE))
    answer.wfile.write(FILE[:1_500_000])
    answer.close_connection = True


@pytest.mark.parametrize(
    ("behave", "message"),
    [
        (stalls, "does not give"),
        (drips, "does not give"),
        (loops, "redirect"),
        (to_a_file, "Redirection"),
        (says_nothing, "does not say what it gives"),
        (without_a_size, "how large"),
        (compressed, "changes the file"),
        (changes, "changed while it was read"),
        (breaks_off, "breaks off"),
        (lambda answer: answer.part(shift=1), "another range"),
        (lambda answer: answer.head(404, 0), "HTTP 404"),
        (lambda answer: answer.head(403, 0), "HTTP 403"),
        (lambda answer: answer.head(500, 0), "HTTP 500"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_server_that_does_not_give_the_file(behave: Callable[[Answer], None], message: str) -> None:
    started = time.monotonic()
    with serving(behave) as (url, _), pytest.raises(HubError, match=message):
        open_gguf(url)
    assert time.monotonic() - started < 8


def test_a_size_that_is_too_large() -> None:
    """What lies past the real end is missed when it is read, and not before: nothing is allocated for it."""
    with serving(lambda answer: answer.part(size=1 << 50)) as (url, _):
        source = remote.RemoteFile(url)
        assert source.n_bytes == 1 << 50
        with pytest.raises(HubError, match=r"lies|does not give"):
            source.read_at(len(FILE) - 10, 1000)


def test_a_size_that_is_too_small() -> None:
    with (
        serving(lambda answer: answer.part(size=len(FILE) - 5)) as (url, _),
        pytest.raises(GGUFError, match="truncated"),
    ):
        open_gguf(url)


def test_more_bytes_than_asked() -> None:
    def behave(answer: Answer) -> None:
        start, _ = answer.span()
        answer.head(206, len(FILE) - start, Content_Range=f"bytes {start}-{len(FILE) - 1}/{len(FILE)}")
        answer.wfile.write(FILE[start:])

    with serving(behave) as (url, _):
        check(url)


@pytest.mark.parametrize("body", [b"", b"<html>Please log in</html>"])
def test_what_is_no_gguf(body: bytes) -> None:
    with serving(lambda answer: answer.part(body)) as (url, _), pytest.raises(GGUFError):
        open_gguf(url)


def test_the_login_stays_with_its_host() -> None:
    with serving(Answer.part) as (target, seen):
        with serving(lambda answer: answer.head(302, 0, Location=target)) as (url, at_first):
            remote.RemoteFile(url, {"Authorization": "Bearer secret"})
        assert at_first[0][2] == "Bearer secret"
        assert seen[0][2] is None


def test_nobody_listens() -> None:
    with pytest.raises(HubError, match="refused"):
        open_gguf("http://127.0.0.1:9/x.gguf")


def split_parts() -> dict[str, bytes]:
    def keys(number: int) -> list[KeyValue]:
        total = KeyValue("split.tensors.count", GGUFValueType.INT32, 2)
        return [KeyValue("split.no", U16, number), KeyValue("split.count", U16, 2), total]

    return {f"m-0000{i + 1}-of-00002.gguf": gguf_bytes(["a"], keys(i), f"t{i}") for i in range(2)}


def test_a_split_file_is_one(tmp_path: Path) -> None:
    for name, data in split_parts().items():
        (tmp_path / name).write_bytes(data)
    for name in split_parts():
        gguf = open_gguf(tmp_path / name)
        assert [(tensor.name, tensor.part) for tensor in gguf.tensors.values()] == [("t0", 0), ("t1", 1)]
        assert gguf.read(gguf.tensors["t1"]) == split_parts()["m-00002-of-00002.gguf"][-64 * 32 * 4 :]
        assert gguf.file_bytes == sum(map(len, split_parts().values()))
        assert gguf.trailing_bytes == 0
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(GGUFError, match="00002-of-00002") as caught:
        open_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert caught.value.fix == "fetch the missing part"


def test_a_split_file_with_a_part_of_another(tmp_path: Path) -> None:
    parts = split_parts()
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(parts["m-00001-of-00002.gguf"])
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(parts["m-00001-of-00002.gguf"])
    with pytest.raises(GGUFError, match="in two parts"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")
    kinds = {problem.kind for problem in open_gguf(tmp_path / "m-00001-of-00002.gguf", strict=False).problems}
    assert kinds == {"duplicate-tensor", "parts"}


def test_a_split_file_on_a_server() -> None:
    parts = split_parts()
    with serving(lambda answer: answer.part(parts[answer.path.rpartition("/")[2]])) as (url, _):
        gguf = open_gguf(url.replace("model.gguf", "m-00001-of-00002.gguf"))
        assert list(gguf.tensors) == ["t0", "t1"]


NAMES = [
    "README.md",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-UD-Q4_K_M.gguf",
    "m-Q8_0.gguf",
    "mmproj-F16.gguf",
    "imatrix_unsloth.gguf",
    "BF16/m-BF16-00001-of-00002.gguf",
    "BF16/m-BF16-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("Q8_0", "m-Q8_0.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("UD-Q4_K_M", "m-UD-Q4_K_M.gguf"),
        ("bf16", "BF16/m-BF16-00001-of-00002.gguf"),
        ("mmproj-F16.gguf", "mmproj-F16.gguf"),
    ],
)
def test_choose_file(wanted: str, name: str) -> None:
    assert remote.choose_file("org/m", NAMES, wanted) == name


@pytest.mark.parametrize(("names", "wanted"), [(NAMES, ""), (NAMES, "Q5_0"), (["README.md"], "")])
def test_choose_file_cannot(names: list[str], wanted: str) -> None:
    with pytest.raises(HubError):
        remote.choose_file("org/m", names, wanted)
    assert remote.choose_file("org/m", ["a.gguf", "mmproj.gguf"], "") == "a.gguf"


@pytest.mark.parametrize(
    ("source", "yes"),
    [
        ("org/repo", True),
        ("org/repo:Q4_K_M", True),
        ("org/repo:a/b.gguf", True),
        ("https://h/x", True),
        ("models/x.gguf", False),
        ("x.gguf", False),
        ("./org/repo", False),
        ("C:/x.gguf", False),
        (Path("org/repo"), False),
    ],
)
def test_is_remote(source: str | Path, yes: bool) -> None:
    assert is_remote(source) is yes


CLIENT = """
import sys
from gguf3n.errors import Gguf3nError
from gguf3n.formats.gguf_reader import open_gguf
try:
    gguf = open_gguf(sys.argv[1])
    print(gguf.name, gguf.value("after"))
except Gguf3nError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    yield server
    server.close()


def ask(hub: HubServer, source: str, home: Path) -> str:
    """What a fresh process, whose Hub is the loopback server, says of a file."""
    env = {**os.environ, "HF_ENDPOINT": hub.url(), "HF_HOME": str(home), "HF_TOKEN": "secret", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", CLIENT, source]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_file_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/model-GGUF", {"README.md": b"", "m-Q8_0.gguf": FILE, "m-Q4_0.gguf": gguf_bytes(["b"])})
    for source in ("org/model-GGUF:Q8_0", "org/model-GGUF:m-Q8_0.gguf"):
        assert ask(hub, source, tmp_path) == "org/model-GGUF:m-Q8_0.gguf 7\n"
    assert {request.token for request in hub.requests if request.host == "cdn"} == {None}
    said = ask(hub, "org/model-GGUF", tmp_path)
    assert "HubError" in said and "which file" in said and "m-Q4_0.gguf" in said


def test_a_repository_that_is_not_there(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/closed", {"m.gguf": FILE}, api_refusal=NO_REPO)
    assert "no such repository" in ask(hub, "org/closed:Q8_0", tmp_path)
