"""A llama-server's address that leads elsewhere, says too much, or never ends: one error each, and the key stays."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gguf3n.engines import llama_cpp
from gguf3n.engines.llama_cpp import LlamaServer
from gguf3n.errors import UsageError
from tests.formats.test_remote_limits import endless, sends, serving

KEY = "open-sesame-4711"
CANDIDATES = [{"id": 0, "logprob": -0.5}, {"id": 1, "logprob": -1.0}]


def answer(value: Any, status: str = "200 OK") -> bytes:
    body = json.dumps(value).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def redirect(target: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Elsewhere\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LLAMA_API_KEY", KEY)
    monkeypatch.setattr(llama_cpp, "TIMEOUT_SECONDS", 0.6)
    yield


def address(url: str) -> str:
    return url.removesuffix("/x.gguf")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_is_not_taken_to_another_origin(status: int) -> None:
    with serving(sends(answer({}))) as (elsewhere, seen), serving(sends(redirect(elsewhere, status))) as (url, first):
        with pytest.raises(UsageError, match="redirects to another origin") as error:
            LlamaServer(address(url))
        assert KEY.encode() in first[0]
        assert not seen
        assert address(elsewhere) in str(error.value.found)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "[::1]"])
def test_another_name_of_the_host_is_another_origin(host: str) -> None:
    with serving(lambda connection, _: connection.sendall(redirect(f"http://{host}:1/health"))) as (url, seen):
        with pytest.raises(UsageError, match="another origin"):
            LlamaServer(address(url))
        assert len(seen) == 1


@pytest.mark.parametrize("status", [307, 308])
def test_a_redirect_within_the_origin_is_followed(status: int) -> None:
    good = answer({"completion_probabilities": [{"top_logprobs": CANDIDATES}]})
    answers = [answer({}), redirect("/v2/completion", status), good]
    with serving(lambda connection, n: connection.sendall(answers[n - 1])) as (url, seen):
        (row,) = LlamaServer(address(url)).logprobs([2])
    assert row.tolist() == [-0.5, -1.0]
    assert seen[2].startswith(b"POST /v2/completion ") and KEY.encode() in seen[2]


@pytest.mark.parametrize(
    "said",
    [
        answer({"error": f"wrong key {KEY}"}, "401 No"),
        answer({"error": {"headers": {"Authorization": f"Bearer {KEY}"}}}, "403 No"),
        answer({"error": "x" * 490 + KEY}, "400 No"),
        answer({}, f"401 {KEY} \x1b[31mred"),
        answer({"seen": [KEY]}),
        b"HTTP/1.1 200 " + KEY.encode() + b"\r\nContent-Length: zwei\r\n\r\n",
        KEY.encode() + b"\r\n\r\n",
    ],
)
def test_what_a_server_repeats_of_the_key_is_not_shown(said: bytes) -> None:
    answers = [answer({}), said]
    with (
        serving(lambda connection, n: connection.sendall(answers[n - 1])) as (url, _),
        pytest.raises(UsageError) as error,
    ):
        list(LlamaServer(address(url)).logprobs([2]))
    for shown in (str(error.value), str(error.value.as_dict())):
        assert KEY not in shown and KEY[:10] not in shown and "\x1b" not in shown


@pytest.mark.parametrize("url", ["http://user:secret-word@127.0.0.1:1", "http://127.0.0.1:1/?token=secret-word"])
def test_the_password_of_an_address_is_not_shown(url: str) -> None:
    with pytest.raises(UsageError) as error:
        LlamaServer(url)
    assert "secret-word" not in str(error.value)


def test_the_name_of_the_engine_has_no_secret() -> None:
    with serving(sends(answer({}))) as (url, _):
        assert (
            LlamaServer(f"{address(url)}/a?api_key=secret-word").name == f"llama-server at {address(url)}/a?api_key=***"
        )


@pytest.mark.parametrize(
    "behave",
    [
        endless(b"HTTP/1.1 200 OK\r\nX: ", b"a", 0.1),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
        endless(b"HTTP/1.1 200 OK\r\n\r\n", b" ", 0.1),
        endless(b"HTTP/1.1 500 No\r\nContent-Length: 9999\r\n\r\n", b" ", 0.1),
    ],
    ids=["header", "continues", "body", "refusal"],
)
def test_an_answer_ends_with_its_limit(behave: Any) -> None:
    started = time.monotonic()
    with serving(behave) as (url, seen), pytest.raises(UsageError):
        LlamaServer(address(url))
    assert time.monotonic() - started < 3 and len(seen) == 1


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"1" * 5000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 9" + b"9" * 5000 + b"\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 3000,
        redirect("http://[::1"),
        redirect("file:///etc/passwd"),
    ],
)
def test_what_cannot_be_read_is_one_error(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "MAX_ANSWER_BYTES", 1 << 17)
    with serving(sends(said)) as (url, seen), pytest.raises(UsageError):
        list(LlamaServer(address(url)).logprobs([2]))
    assert len(seen) <= 2


@pytest.mark.parametrize("number", [2**70, -1, 10**9])
def test_candidates_that_are_no_distribution(number: int) -> None:
    step = {"top_logprobs": [{"id": number, "logprob": 0.0}]}
    answers = [answer({}), answer({"completion_probabilities": [step]})]
    with (
        serving(lambda connection, n: connection.sendall(answers[n - 1])) as (url, _),
        pytest.raises(UsageError, match="whole vocabulary"),
    ):
        list(LlamaServer(address(url)).logprobs([2]))
