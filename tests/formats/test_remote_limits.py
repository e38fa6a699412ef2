"""Servers on the loopback interface that drip, that never come to the point, and that say what cannot be read."""

from __future__ import annotations

import email.utils
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from gguf3n.errors import HubError
from gguf3n.formats import remote, transport
from gguf3n.formats.transport import checked_address, is_malformed, origin

LIMIT = 0.6
"""For one read here; every test ends soon after."""

OK = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\nContent-Range: bytes 0-3/4\r\n\r\nGGUF"


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(remote, "REQUEST_SECONDS", LIMIT)


Behave = Callable[[socket.socket, int], None]


@contextmanager
def serving(behave: Behave) -> Iterator[tuple[str, list[bytes]]]:
    """A server of raw bytes: one connection after another, each with its number; and the requests that came."""
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(10)
                seen.append(connection.recv(65_536))
                behave(connection, len(seen))
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/x.gguf", seen
        listening.shutdown(socket.SHUT_RDWR)


def sends(answer: bytes) -> Behave:
    return lambda connection, _: connection.sendall(answer)


def endless(first: bytes, again: bytes, pause: float) -> Behave:
    def behave(connection: socket.socket, _: int) -> None:
        end = time.monotonic() + 6 * LIMIT
        connection.sendall(first)
        while time.monotonic() < end:
            connection.sendall(again)
            time.sleep(pause)

    return behave


@pytest.mark.parametrize(
    "behave",
    [
        endless(b"HTTP/1.1 206 Partial Content\r\nX-Long: ", b"a", 0.1),
        endless(b"HTTP/1.1", b" ", 0.1),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, 0.0),
        endless(b"HTTP/1.1 100 Continue\r\n", b"X: y\r\n", 0.1),
        endless(OK.replace(b"4\r\n", b"400\r\n").replace(b"-3/", b"-399/").replace(b"/4", b"/400"), b"a", 0.1),
        endless(b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n", b"a", 0.1),
        endless(b"HTTP/1.1 404 ", b"a", 0.1),
        endless(b"HTTP/1.1 302 Found\r\nLocation: /", b"a", 0.1),
    ],
    ids=["header", "status", "continues", "flood", "headers of continue", "body", "stream", "reason", "location"],
)
def test_a_request_ends_with_its_limit(behave: Behave) -> None:
    started = time.monotonic()
    with serving(behave) as (url, _), pytest.raises(HubError) as error:
        remote.RemoteFile(url)
    assert time.monotonic() - started < LIMIT + 1
    assert "x.gguf: the server" in error.value.what and "Traceback" not in str(error.value)


def test_an_endless_answer_that_redirects_is_not_read() -> None:
    flood = endless(b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 1000000000\r\n\r\n", bytes(1 << 20), 0.0)
    with serving(lambda connection, n: flood(connection, n) if n == 1 else connection.sendall(OK)) as (url, seen):
        assert remote.RemoteFile(url).n_bytes == 4
        assert len(seen) == 2


def test_dns_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [] if answered.wait(30) else None)
    started = time.monotonic()
    with pytest.raises(HubError, match=r"x\.gguf: the server does not give"):
        remote.RemoteFile("http://nowhere.example/x.gguf")
    answered.set()
    assert time.monotonic() - started < LIMIT + 1


def test_a_name_of_many_dead_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes its time; all together no more than a read may."""
    tried: list[object] = []

    class Dead(socket.socket):
        def connect(self, place: object) -> None:
            tried.append(place)
            time.sleep(self.gettimeout() or 30)
            raise TimeoutError("timed out")

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{i}", 80)) for i in range(200)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(transport.socket, "socket", Dead)
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", LIMIT / 4)
    started = time.monotonic()
    with pytest.raises(HubError, match=r"x\.gguf: the server does not give"):
        remote.RemoteFile("http://nowhere.example/x.gguf")
    assert time.monotonic() - started < LIMIT + 1
    assert 2 <= len(tried) < 10


def test_the_second_address_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(sends(OK)) as (url, _):
        port = int(url.split(":")[2].partition("/")[0])
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            dead = closed.getsockname()
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in (dead, ("127.0.0.1", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert remote.RemoteFile(f"http://name.example:{port}/x.gguf").n_bytes == 4


def redirect(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")


@pytest.mark.parametrize(
    "answer",
    [
        redirect("http://[::1/x"),
        redirect("http://[zz]/x"),
        redirect("http:///x"),
        redirect("http://host:port/x"),
        redirect("http://host:99999/x"),
        redirect("http://host:0/x"),
        redirect(f"http://{'a' * 70}.example/x"),
        redirect("http://a..b/x"),
        redirect("http://user:secret-word@127.0.0.1/x"),
        redirect("ftp://127.0.0.1/x"),
        redirect("file:///etc/passwd"),
        redirect("gopher:x"),
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        OK.replace(b"h: 4", b"h: -4"),
        OK.replace(b"h: 4", b"h: four"),
        OK.replace(b"h: 4", b"h: \xb2"),
        OK.replace(b"h: 4", b"h: 4, 5"),
        OK.replace(b"h: 4", b"h: 4\r\nContent-Length: 5"),
        OK.replace(b"h: 4", b"h: " + b"9" * 5000),
        OK.replace(b"206 Partial Content", b"200 OK").replace(b"h: 4", b"h: \xb2"),
        OK.replace(b"206 Partial Content", b"200 OK").replace(b"h: 4", b"h: " + b"9" * 5000),
        OK.replace(b"0-3/4", b"0-3/" + b"9" * 5000),
        OK.replace(b"0-3/4", b"3-0/4"),
        OK.replace(b"0-3/4", b"0-4/4"),
        OK.replace(b"0-3/4", b"-1-3/4"),
        OK.replace(b"Content-Length: 4", b"Transfer-Encoding: chunked").replace(b"GGUF", b"zz\r\nGGUF\r\n"),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 206 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 206 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
    ],
)
def test_what_is_malformed_is_one_error_without_another_try(answer: bytes) -> None:
    with serving(sends(answer)) as (url, seen), pytest.raises(HubError) as error:
        remote.RemoteFile(url)
    assert len(seen) == 1
    assert error.value.found is not None and len(error.value.found) < 1000
    assert "secret-word" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/x.gguf",
        "http://",
        "http:///x.gguf",
        "https://host:port/x.gguf",
        "https://host:99999/x.gguf",
        "http://ho st/x.gguf",
        "http://host/x\r\nHost: y",
        "http://user:secret-word@127.0.0.1:1/x.gguf",
        f"http://{'a' * 70}/x.gguf",
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(HubError, match="not an address") as error:
        remote.RemoteFile(url)
    assert "secret-word" not in str(error.value)


def test_what_is_not_ascii_is_encoded() -> None:
    assert checked_address("http://host/modèle q".replace(" ", "%20")) == "http://host/mod%C3%A8le%20q"
    assert checked_address("http://host/a%2Fb?c=d&e=%41") == "http://host/a%2Fb?c=d&e=%41"
    with serving(sends(OK)) as (url, seen):
        assert remote.RemoteFile(url.replace("x.gguf", "modèle.gguf")).n_bytes == 4
    assert seen[0].startswith(b"GET /mod%C3%A8le.gguf ")


def test_redirects_that_are_followed() -> None:
    answers = [redirect("/é a"), redirect("//127.0.0.1:{port}/b?c=d"), OK]

    def behave(connection: socket.socket, number: int) -> None:
        port = connection.getsockname()[1]
        connection.sendall(answers[number - 1].replace(b"{port}", str(port).encode()))

    with serving(behave) as (url, seen):
        assert remote.RemoteFile(url, {"Authorization": "Bearer secret"}).n_bytes == 4
    assert [request.split(b" ")[1] for request in seen] == [b"/x.gguf", b"/%E9%20a", b"/b?c=d"]
    assert all(b"secret" in request for request in seen)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://host/a", "http://HOST:80/b", True),
        ("https://host", "https://host:443/", True),
        ("http://host", "https://host", False),
        ("http://host", "http://host:8080", False),
        ("http://host", "http://host.evil.example", False),
        ("http://host", "http://sub.host", False),
    ],
)
def test_origin(one: str, other: str, same: bool) -> None:
    assert (origin(one) == origin(other)) is same


def test_another_port_is_another_origin() -> None:
    with serving(sends(OK)) as (target, seen), serving(sends(redirect(target))) as (url, _):
        remote.RemoteFile(url, {"Authorization": "Bearer secret", "authorization": "Bearer secret"})
    assert b"secret" not in seen[0]


def busy(wait: str, status: str = "429 Too Many") -> bytes:
    return f"HTTP/1.1 {status}\r\nRetry-After: {wait}\r\nContent-Length: 0\r\n\r\n".encode()


def in_seconds(seconds: float) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize("status", ["429 Too Many", "503 Busy"])
@pytest.mark.parametrize("wait", ["1", in_seconds])
def test_a_server_is_left_alone_as_long_as_it_wants(
    wait: str | Callable[[float], str], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 10.0)
    said = wait if isinstance(wait, str) else wait(2.0)
    with serving(lambda connection, n: connection.sendall(busy(said, status) if n == 1 else OK)) as (url, seen):
        started = time.monotonic()
        remote.RemoteFile(url)
        assert 0.9 < time.monotonic() - started < 5
    assert len(seen) == 2


@pytest.mark.parametrize("wait", ["3600", "9" * 400, in_seconds(7200)], ids=["an-hour", "digits", "a-date"])
def test_a_server_that_wants_more_than_that(wait: str) -> None:
    started = time.monotonic()
    with serving(sends(busy(wait))) as (url, seen), pytest.raises(HubError, match="left alone") as error:
        remote.RemoteFile(url)
    assert time.monotonic() - started < 1 and len(seen) == 1
    assert str(error.value.fix).startswith("try again in")


def test_a_wait_that_the_limit_has_no_room_for() -> None:
    started = time.monotonic()
    with serving(sends(busy("20"))) as (url, seen), pytest.raises(HubError, match="HTTP 429"):
        remote.RemoteFile(url)
    assert time.monotonic() - started < 1 and len(seen) == 1


@pytest.mark.parametrize("wait", ["soon", "-5", "0", "Fri, 99 Foo 2026", "", "1.5e3"])
def test_a_wait_that_says_nothing(wait: str) -> None:
    with serving(lambda connection, n: connection.sendall(busy(wait) if n == 1 else OK)) as (url, seen):
        started = time.monotonic()
        remote.RemoteFile(url)
        assert time.monotonic() - started < 1
    assert len(seen) == 2


def test_secrets_of_addresses_and_answers_are_not_shown() -> None:
    answer = b"HTTP/1.1 403 token=secret-word-1 \x1b[31m\r\nContent-Length: 0\r\n\r\n"
    with serving(sends(answer)) as (url, _), pytest.raises(HubError) as error:
        remote.RemoteFile(f"{url}?X-Amz-Signature=secret-word-2&token=secret-word-3")
    assert "secret-word" not in str(error.value) and "\x1b" not in str(error.value)
    assert "secret-word" not in str(error.value.as_dict())
    with serving(sends(OK)) as (url, seen):
        file = remote.RemoteFile(f"{url}?token=secret-word")
    assert file.name == f"{url}?token=***" and b"?token=secret-word" in seen[0]


def test_which_errors_are_worth_another_try() -> None:
    assert not is_malformed(ConnectionResetError())
    assert not is_malformed(TimeoutError())
    assert is_malformed(UnicodeError())
    assert transport.retry_after({"Retry-After": "7"}) == 7  # type: ignore[arg-type]
