"""A Hub that gives other bytes than it says, and commits and hashes that are no hashes: nothing of it is kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import pytest

from gguf3n.errors import HubError
from gguf3n.formats import hub
from gguf3n.formats.checkpoint import SINGLE as SINGLE_FILE
from tests.formats.hub_server import HubServer
from tests.formats.test_hub import NAME, SHARD_2, SHARDED, SINGLE, Client, client, server, stored

__all__ = ["client", "server"]


def other(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


WRONG: dict[str, tuple[str, bytes]] = {
    "one bit of the weights": (SINGLE_FILE, other(SINGLE[SINGLE_FILE])),
    "one bit of a small file": ("tokenizer.json", other(SINGLE["tokenizer.json"])),
    "the first small file": ("config.json", b"[]"),
    "too short": (SINGLE_FILE, SINGLE[SINGLE_FILE][:-8]),
    "too long": ("README.md", SINGLE["README.md"] + b"more"),
    "nothing": ("tokenizer.model", b""),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_bytes_are_refused_and_not_kept(case: str, server: HubServer, client: Client) -> None:
    name, data = WRONG[case]
    server.add(NAME, SINGLE)
    server.sent[name] = data
    # twice: what was refused must not be found in the cache
    for error in client.fetch_each({}, {}):
        assert error["error"] == "HubError", error
        assert "again" in error["fix"]
    server.sent.clear()
    assert stored(client.fetch()) == SINGLE


def test_other_bytes_are_named(server: HubServer, client: Client) -> None:
    server.add(NAME, SHARDED)
    server.sent[SHARD_2] = other(SHARDED[SHARD_2])
    error = client.fetch()
    assert error["what"] == f"{NAME}: {SHARD_2} is not what the Hub says it is"
    assert hashlib.sha256(SHARDED[SHARD_2]).hexdigest() in error["expected"]
    assert hashlib.sha256(server.sent[SHARD_2]).hexdigest() in error["found"]
    assert "HF_ENDPOINT" in error["fix"]


def test_what_was_checked_is_not_read_again(server: HubServer, client: Client) -> None:
    server.add(NAME, SINGLE)
    count = "hub.file_hash = (lambda path, **o: sys.stderr.write(f'hashed {path.name}\\n') and DIGEST(path, **o))"
    client.fetch_each({"before": f"DIGEST = hub.file_hash; {count}"}, {})
    assert sorted(line.split()[1] for line in client.stderr.splitlines() if line.startswith("hashed")) == sorted(SINGLE)


def test_ctrl_c_while_it_is_checked_leaves_it_unchecked(server: HubServer, client: Client) -> None:
    server.add(NAME, SINGLE)
    stop = """
DIGEST = hub.file_hash
def interrupted(path, **options):
    if path.name == "model.safetensors":
        raise KeyboardInterrupt
    return DIGEST(path, **options)
hub.file_hash = interrupted
"""
    first, second = client.fetch_each({"before": stop}, {"before": "hub.file_hash = DIGEST"})
    assert first == {"error": "KeyboardInterrupt"}
    assert stored(second) == SINGLE


@pytest.mark.parametrize("said", ["", "a/b", "..", "abc", "A" * 40, "0" * 41, "0" * 40 + "\n", "/" + "0" * 39])
def test_what_is_no_hash(said: str) -> None:
    with pytest.raises(HubError, match="not a commit"):
        hub._check_hash(NAME, "a commit", said)


def everything_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize("where", ["etag of a small file", "etag of the weights", "api_commit", "file_commit"])
def test_what_is_no_hash_makes_no_path(where: str, server: HubServer, client: Client, tmp_path: Path) -> None:
    server.add(NAME, SINGLE)
    said = "../../../../outside"
    if where.startswith("etag"):
        server.etags["config.json" if "small" in where else SINGLE_FILE] = said
    else:
        setattr(server, where, said)
    error = client.fetch()
    assert error["error"] == "HubError", error
    assert "40 or 64 hexadecimal digits" in error["expected"] and said[:80] in error["found"]
    assert not [path for path in everything_in(tmp_path) if "outside" in path]


def test_a_missing_file_makes_no_path_of_a_commit(server: HubServer, client: Client, tmp_path: Path) -> None:
    """huggingface_hub notes which files a commit has not."""
    server.add(NAME, SINGLE)
    server.file_commit = "../../../../outside"
    server.lost.add("config.json")
    error = client.fetch()
    assert error["error"] == "HubError" and "not a commit" in error["what"]
    assert not [path for path in everything_in(tmp_path) if "outside" in path]


def test_a_repository_that_changes_meanwhile(server: HubServer, client: Client) -> None:
    server.add(NAME, SINGLE)
    server.file_commit = "f" * 40
    error = client.fetch()
    assert error["error"] == "HubError" and "changed while it was fetched" in error["what"]


def test_the_hubs_warnings_steer_nothing(server: HubServer, client: Client) -> None:
    server.add(NAME, SINGLE)
    server.warning = "gguf3n; ::error::mind \x1b[31m this hf_abcdefghijklmnop"
    client.fetch(progress=False)
    assert "mind" in client.stderr or huggingface_hub.__version__ < "1"  # which shows none
    assert "\x1b" not in client.stderr and "hf_abcdefghijklmnop" not in client.stderr
    assert not [line for line in client.stderr.splitlines() if line.lstrip().startswith("::")]
