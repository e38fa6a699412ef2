"""Sizes as people write them, and what is left for a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import KeyValue
from gguf3n.gemma3n.part import Part, PartKind
from gguf3n.gemma3n.published import PUBLISHED, outline
from gguf3n.gemma3n.runtime_memory import runtime_of
from gguf3n.gemma3n.source import Source
from gguf3n.gemma3n.text import model_keys
from gguf3n.tuning.budget import bits_budget, parse_size, size_budget


def published(size: str) -> Part:
    """A part of this size, without a checkpoint."""
    source = Source(origin=size, path=Path(size), name=size, tensors={})
    return Part(PartKind.TEXT, source, tuple(model_keys(PUBLISHED[size])), outline(PUBLISHED[size]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4.2GB", (False, 4_200_000_000)),
        ("4.2 gb", (False, 4_200_000_000)),
        (" .5GiB ", (False, 1 << 29)),
        ("3900MiB", (False, 3900 << 20)),
        ("17b", (False, 17)),
        ("1.5KB", (False, 1500)),
        ("0.0000015MB", (False, 1)),
        ("fits:8GB", (True, 8_000_000_000)),
        ("Fits: 7.5 GiB", (True, 15 << 29)),
    ],
)
def test_sizes(text: str, expected: tuple[bool, int]) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "4.2", "GB", "-1GB", "4,2GB", "4.2.1GB", "1e9B", "4G", "4Gb/s", "nanGB", "fits:", "fits:4", "٤GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0GB", "0.4B", "fits:0MB"])
def test_no_room(text: str) -> None:
    with pytest.raises(UsageError, match="nothing fits"):
        parse_size(text)


def test_bits() -> None:
    assert bits_budget(4.5, 1000, 77).n_bytes == 562 + 77
    for bits in (0, -1.0, 33, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="not bits a weight"):
            bits_budget(bits, 1000, 0)


def test_what_fits() -> None:
    part = published("E2B")
    beside = runtime_of(part, 4096).total_bytes
    budget = size_budget("fits:8GB", part, 4096)
    assert budget.n_bytes == 8_000_000_000 - beside and "4,096 tokens" in budget.said
    assert size_budget("8GB", part, 4096).n_bytes == 8_000_000_000
    with pytest.raises(UsageError, match="nothing is left"):
        size_budget("fits:500MB", part, 4096)
    for n_ctx in (0, 32_769):
        with pytest.raises(UsageError, match="not a context of this model"):
            size_budget("fits:8GB", part, n_ctx)


def test_a_source_that_does_not_say_its_sizes() -> None:
    part = published("E2B")
    keys: tuple[KeyValue, ...] = tuple(key for key in part.keys if "head_count_kv" not in key.name)
    with pytest.raises(UsageError, match="is not known"):
        size_budget("fits:8GB", replace(part, keys=keys), 4096)
