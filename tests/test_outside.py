"""What comes from outside, before a person or a log has it: no secret, no character and no line that does something."""

from __future__ import annotations

import time

import pytest

from gguf3n.errors import Gguf3nError, MappingError, UsageError
from gguf3n.outside import inert, masked, one_line, printable

SECRET = "Zx9qS3cr3tV4lu3LongEnough"

LEAKS = [
    f"https://user:{SECRET}@host/x.gguf",
    f"https://{SECRET}@host/x.gguf",
    f"https://user:p@{SECRET}@host/x",
    f"https://user:a/{SECRET}@host/x",
    f"user:{SECRET}@host:8080",
    f"nonnumeric port: 'user:{SECRET}@host'",
    f"https://host/x?token={SECRET}",
    f"https://host/x?download=true&access_token={SECRET}#top",
    f"https://host/x?{SECRET}",
    f"https://host/x#access_token={SECRET}",
    f"https://s3.host/x?X-Amz-Algorithm=AWS4&X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}&response=a",
    f"https://cdn.host/x?Policy={SECRET}&Signature={SECRET}&Key-Pair-Id={SECRET}",
    f"https://blob.host/x?sv=2024&sig={SECRET}%3D",
    f"https://host/x?unheard-of={SECRET}",
    f"/cdn/x?X-Amz-Signature={SECRET} is gone",
    f"X-Amz-Security-Token={SECRET}",
    f"Authorization: Bearer {SECRET}",
    f"authorization: Basic {SECRET}==",
    f'{{"Authorization": "Bearer {SECRET}"}}',
    f"{{'authorization': 'token {SECRET}'}}",
    f"invalid key: Bearer {SECRET}",
    f'{{"error": "no", "api_key": "{SECRET}"}}',
    f'{{\\"token\\":\\"{SECRET}\\"}}',
    f"password={SECRET}",
    f"X-Api-Key: {SECRET}",
    f"hf_{SECRET}",
    f"Incorrect API key provided: sk-proj-{SECRET}",
    f"ghp_{SECRET}",
    f"eyJhbGciOiJIUzI1NiJ9.{SECRET}.{SECRET}",
]

KEPT = [
    "https://host:8080/a@b/x.gguf",
    "https://huggingface.co/org/repo/resolve/main/x.gguf?download=true",
    "http://127.0.0.1:8080/health",
    "org/repo:Q4_K_M",
    "tokenizer_config.json: bos_token: '<bos>', eos_token: '<eos>'",
    "config.json: bos_token_id=2, token: 5 of 7, key=general.name",
    "Invalid credentials in Authorization header",
    "log in with `hf auth login` or set HF_TOKEN",
    "hf_xet and hf_transfer",
    "model/.hf_metadata/config.json",
    "C:/models/x.gguf: 12:30 @ noon",
    "a Bearer of news; basic ASCII",
    "found: 5 signatures",
]


@pytest.mark.parametrize("text", LEAKS)
def test_secrets_are_masked(text: str) -> None:
    said = masked(text)
    assert SECRET not in said and "***" in said
    assert masked(said) == said


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_the_host_and_the_path_stay() -> None:
    assert masked(f"https://u:{SECRET}@host/a/x.gguf?download=true&sig={SECRET}") == (
        "https://***@host/a/x.gguf?download=true&sig=***"
    )


@pytest.mark.parametrize("name", ["LLAMA_API_KEY", "HF_TOKEN"])
def test_what_the_environment_knows_is_masked_wherever_it_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "sesame")
    assert masked("you said sesame, which is wrong") == "you said ***, which is wrong"
    monkeypatch.setenv(name, "a")
    assert masked("a key") == "a key"


def test_no_text_takes_long() -> None:
    for text in ("a.a-" * 20_000, "://" * 20_000, "a:" * 30_000, "token=" * 10_000, "?&" * 30_000, "x://y?" * 10_000):
        started = time.process_time()
        masked(text)
        assert time.process_time() - started < 5


def test_every_part_of_an_error_is_masked() -> None:
    texts = {part: f"{part}: https://u:{SECRET}@host?sig={SECRET}" for part in ("what", "expected", "found", "fix")}
    error = Gguf3nError(texts.pop("what"), **texts)
    for said in (str(error), repr(error), error.one_line, str(error.as_dict()), *map(str, error.args)):
        assert SECRET not in said


STEERING = ["\x1b[2J", "\x9b2J", "\r", "\b", "\x07", "\x00", "\u202e", "\u2066", "\u200b", "\ufeff", "\u2028", "\x85",
            "\U000e0041", "\ud800"]  # fmt: skip


@pytest.mark.parametrize("text", STEERING)
def test_nothing_steers_a_terminal(text: str) -> None:
    for said in (printable(f"a{text}b"), one_line(f"a{text}b"), str(UsageError(f"a{text}b", found=text))):
        assert not set(text.replace("[2J", "").replace("2J", "")) & set(said)


def test_text_that_does_nothing_stays() -> None:
    for text in ("blk.0.attn_q", "naïve ↔ 日本語 👍", "a  b\u00a0c", "::error:: in the middle"):
        assert printable(text) == one_line(text) == text


def test_lines_of_a_message_stay_and_are_seen_to_belong_to_it() -> None:
    error = UsageError("two lines\n              own indent", found="a\nerror: b\n::error::c", fix="x")
    assert str(error).split("\n") == [
        "two lines",
        "              own indent",
        "  found:    a",
        "            error: b",
        "            ::error::c",
        "  to do:    x",
    ]
    assert error.as_dict()["found"] == "a\nerror: b\n::error::c"
    assert "\x1b" not in str(MappingError("\x1b[31m"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("::error::x", ": :error::x"),
        ("  \t::set-output name=a::b", "  \t: :set-output name=a::b"),
        ("\u00a0::add-mask::x", "\u00a0: :add-mask::x"),
        ("name ##[error]x", "name # #[error]x"),
        ("##vso[task.setvariable variable=a]b", "# #vso[task.setvariable variable=a]b"),
        ("##teamcity[buildStop]", "# #teamcity[buildStop]"),
        ("a ::b:: ## [c]", "a ::b:: ## [c]"),
    ],
)
def test_no_line_is_a_command(line: str, said: str) -> None:
    assert inert(line) == said
    assert inert(said) == said
