"""Checks of the file's layout: names, offsets, sizes. Each yields what is wrong, and where."""

from __future__ import annotations

from collections.abc import Iterator

from gguf3n.formats.gguf_layout import aligned
from gguf3n.inspection.found import FILE, HEADER, Found, said
from gguf3n.inspection.subject import Subject

MAX_TENSOR_NAME_BYTES = 63
"""GGML_MAX_NAME of ggml.h, less the zero."""


def problems(kind: str, subject: Subject) -> Iterator[Found]:
    """What the reader collected of one kind."""
    for problem in subject.gguf.problems:
        if problem.kind == kind:
            found = f": {problem.found}" if problem.found else ""
            expected = f", not {problem.expected}" if problem.expected else ""
            yield said(problem.where, f"{problem.what}{found}{expected}")


def big_endian(subject: Subject) -> Iterator[Found]:
    if subject.gguf.byte_order == "big":
        yield Found(FILE, "is big-endian")


def empty_key(subject: Subject) -> Iterator[Found]:
    if "" in subject.gguf.keys:
        yield said(HEADER, "a key without a name")


def long_names(subject: Subject) -> Iterator[Found]:
    for name in subject.gguf.tensors:
        n_bytes = len(name.encode())
        if n_bytes > MAX_TENSOR_NAME_BYTES:
            what = f"{n_bytes} bytes, at most {MAX_TENSOR_NAME_BYTES}"
            yield Found(name, what, f"{name[:40]}…: {what}")


def gaps(subject: Subject) -> Iterator[Found]:
    """Tensors must follow each other in the order of the table. Source: gguf_init_from_reader in ggml's gguf.cpp."""
    gguf = subject.gguf
    if any(problem.kind in ("misaligned", "overlap", "alignment-key") for problem in gguf.problems):
        return
    end: dict[int, int] = {}
    for tensor in gguf.all_tensors:
        expected = end.get(tensor.part)
        if expected is None and len(gguf.parts) == 1:
            expected = gguf.header_bytes
        if expected is not None and tensor.offset != expected:
            yield Found(tensor.name, f"at byte {tensor.offset:,}, not {expected:,}")
        end[tensor.part] = tensor.offset + aligned(tensor.n_bytes, gguf.alignment)


def trailing(subject: Subject) -> Iterator[Found]:
    if n_bytes := subject.gguf.trailing_bytes:
        yield said(FILE, f"{n_bytes:,} bytes after the last tensor")


def lone_part(subject: Subject) -> Iterator[Found]:
    name = "split.count"
    count = subject.integer(name)
    if count is not None and count > 1 and len(subject.gguf.parts) == 1:
        yield said(name, f"one of {count} parts, and its name does not say which")
