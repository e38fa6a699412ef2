"""Saved log-probabilities: both formats by a slow oracle, and files that are broken."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from gguf3n.errors import CheckpointError, OutputError, UsageError
from gguf3n.formats.logprobs import (
    open_logprobs,
    pack_kld_row,
    rows_bytes,
    scored_positions,
    unpack_kld_row,
    write_logprobs,
)

TOKENS = np.array([[2, 7, 1, 8, 2, 8], [2, 8, 4, 5, 9, 0]], np.int32)
N_VOCAB = 11


def rows(n_vocab: int = N_VOCAB, n: int = 4, spread: float = 8.0) -> list[np.ndarray]:
    """Log-probabilities, some of them far below the maximum."""
    logits = np.random.default_rng(n_vocab).standard_normal((n, n_vocab)) * spread
    return list((logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32))


def save(path: Path, written: list[np.ndarray], **options: bool) -> Path:
    with write_logprobs(path, TOKENS, N_VOCAB, metadata={"engine": "by hand"}, **options) as writer:
        for row in written:
            writer.add(row)
    return path


def test_scored_positions() -> None:
    """As llama-perplexity: from the middle on, but for the last, of which nothing is known."""
    assert list(scored_positions(6)) == [3, 4]
    assert list(scored_positions(7)) == [3, 4, 5]
    assert len(scored_positions(512)) == 512 - 1 - 512 // 2


@pytest.mark.parametrize("name", ["saved.safetensors", "saved.kld"])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / name, rows())
    saved = open_logprobs(path)
    assert (saved.token_ids == TOKENS).all()
    assert (saved.n_vocab, saved.n_ctx) == (N_VOCAB, 6)
    assert path.stat().st_size == saved.offset + rows_bytes(path, TOKENS, N_VOCAB)
    found = list(saved.rows())
    assert len(found) == 4
    n_far = 0
    for row, expected in zip(found, rows(), strict=True):
        if saved.is_kld:
            near = expected > expected.max() - 16
            n_far += int((~near).sum())
            assert np.abs(row - expected)[near].max() < 16 / 65535
            assert (row[~near] <= -16).all()
        else:
            assert (row == expected).all()
    assert n_far or not saved.is_kld
    assert saved.floor == (-16 if saved.is_kld else None)
    assert list(tmp_path.iterdir()) == [path]


def test_other_readers_read_ours(tmp_path: Path) -> None:
    with safe_open(save(tmp_path / "saved.safetensors", rows()), "numpy") as file:
        assert file.metadata() == {"format": "gguf3n.logprobs/1", "engine": "by hand"}
        assert (file.get_tensor("token_ids") == TOKENS).all()
        assert (file.get_tensor("logprobs") == np.array(rows()).reshape(2, 2, N_VOCAB)).all()


def oracle_row(logprobs: np.ndarray) -> bytes:
    """A row of llama-perplexity's format, one number at a time, each rounded to float32 where C has a float."""
    single = np.float32
    largest, smallest = max(logprobs), max(min(logprobs), max(logprobs) - single(16))
    total = math.fsum(float(np.exp(value - largest)) for value in logprobs)
    scale = single((largest - smallest) / single(65535))
    minimum = single(single(smallest - largest) - single(math.log(total)))
    levels = []
    for value in logprobs:
        level = 0
        if scale and value > smallest:
            exact = float(single(single(single(1) / scale) * single(value - smallest)))
            level = math.floor(exact)
            if exact - level > 0.5 or (exact - level == 0.5 and level % 2):  # halves to even
                level += 1
        levels.append(level)
    levels += [0] * (len(levels) % 2)
    return struct.pack(f"<2f{len(levels)}H", scale, minimum, *levels)


@pytest.mark.parametrize("n_vocab", [2, 11, 1000])
@pytest.mark.parametrize("spread", [0.0, 0.5, 8.0])
def test_kld_rows_by_a_slow_oracle(n_vocab: int, spread: float) -> None:
    for row in rows(n_vocab, spread=spread):
        assert pack_kld_row(row) == oracle_row(row)
        assert len(oracle_row(row)) == 2 * (2 * ((n_vocab + 1) // 2) + 4)
        scale, minimum, *levels = struct.unpack(f"<2f{n_vocab}H", oracle_row(row)[: 8 + 2 * n_vocab])
        assert unpack_kld_row(oracle_row(row), n_vocab) == pytest.approx(
            [scale * n + minimum for n in levels], abs=2e-6
        )


def test_kld_file_byte_by_byte(tmp_path: Path) -> None:
    """One row of two tokens, at a quarter and at three quarters: their distance is ln 3."""
    halves, quarters = np.log(np.array([[0.5, 0.5], [0.25, 0.75]], np.float32))
    path = tmp_path / "two.kld"
    with write_logprobs(path, np.array([[2, 1, 0, 1]], np.int32), 2) as writer:
        writer.add(quarters)
    data = path.read_bytes()
    assert data[:36].hex(" ") == (
        "5f 6c 6f 67 69 74 73 5f "  # "_logits_"
        "04 00 00 00 02 00 00 00 01 00 00 00 "  # n_ctx, n_vocab, n_chunks
        "02 00 00 00 01 00 00 00 00 00 00 00 01 00 00 00"  # the token ids
    )
    scale, minimum = struct.unpack("<2f", data[36:44])
    assert scale == pytest.approx(math.log(3) / 65535)
    assert minimum == pytest.approx(math.log(0.25))
    assert data[44:].hex(" ") == "00 00 ff ff"
    assert pack_kld_row(halves)[:4].hex() == "00000000"
    assert unpack_kld_row(pack_kld_row(halves), 2) == pytest.approx(halves)


def test_a_file_is_complete_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    with pytest.raises(ValueError, match="rows are missing"):
        save(path, rows()[:3])
    with pytest.raises(RuntimeError), write_logprobs(path, TOKENS, N_VOCAB):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_if_told(tmp_path: Path) -> None:
    path = save(tmp_path / "saved.kld", rows())
    with pytest.raises(OutputError, match="exists already"):
        save(path, rows())
    before = path.read_bytes()
    save(path, rows()[::-1], force=True)
    assert path.read_bytes() != before


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a directory"):
        save(tmp_path, rows())
    huge = np.zeros((1, 1 << 20), np.int32)
    with pytest.raises(OutputError, match="not enough space"), write_logprobs(tmp_path / "x.kld", huge, 1 << 30):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def edited_header(path: Path, edit: Callable[[dict[str, dict[str, object]]], object]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header["__metadata__"].update(format="another"),
        lambda header: header.pop("__metadata__"),
        lambda header: header["token_ids"].update(shape=[3, 4]),
        lambda header: header["token_ids"].update(dtype="U32"),
        lambda header: header["logprobs"].update(shape=[2, 22]),
    ],
)
def test_safetensors_that_are_something_else(edit: Callable[[object], object], tmp_path: Path) -> None:
    path = save(tmp_path / "saved.safetensors", rows())
    edited_header(path, edit)
    with pytest.raises(UsageError, match="not a file of log-probabilities"):
        open_logprobs(path)


@pytest.mark.parametrize("name", ["saved.safetensors", "saved.kld"])
@pytest.mark.parametrize("token_id", [-1, N_VOCAB])
def test_token_ids_outside_the_vocabulary(name: str, token_id: int, tmp_path: Path) -> None:
    path = save(tmp_path / name, rows())
    first = open_logprobs(path).offset - TOKENS.nbytes
    data = path.read_bytes()
    path.write_bytes(data[:first] + struct.pack("<i", token_id) + data[first + 4 :])
    with pytest.raises(CheckpointError, match=rf"(?s)token ids below 11.*{token_id}"):
        open_logprobs(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="not a file of log-probabilities"):
        open_logprobs(tmp_path / "model.safetensors")
    (tmp_path / "text.txt").write_text("Nothing of the kind, and long enough.")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_logprobs(tmp_path / "text.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        open_logprobs(tmp_path / "nowhere")


@pytest.mark.parametrize("n_bytes", [8, 19, 20, 60, -1])
def test_cut_kld_files(n_bytes: int, tmp_path: Path) -> None:
    path = save(tmp_path / "saved.kld", rows())
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        open_logprobs(path)


@pytest.mark.parametrize("header", [(0, 11, 2), (2, 11, 2), (6, 0, 2), (6, 11, -1), (1 << 30, 1 << 30, 1 << 30)])
def test_kld_files_with_impossible_headers(header: tuple[int, int, int], tmp_path: Path) -> None:
    path = save(tmp_path / "saved.kld", rows())
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<3i", *header) + data[20:])
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        open_logprobs(path)
