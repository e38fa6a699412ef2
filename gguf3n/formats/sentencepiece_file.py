"""The outer structure of sentencepiece's tokenizer.model, looked at before the library reads it.

    file     fields of ModelProto: pieces (1), trainer_spec (2), normalizer_spec (3), …
    field    key varint (number << 3 | wire type), then a varint, 8 bytes, a length and bytes, or 4 bytes
    piece    text (1), score float32 (2), type varint (3): the numbers of TokenType

Why: the library is C++ and takes much on trust; a file that is none can end the process.

Source: sentencepiece_model.proto of sentencepiece; the encoding section of protobuf's documentation.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf.constants import TokenType

from gguf3n.errors import TokenizerError

PIECES, NORMALIZER = 1, 3
TEXT, TYPE, CHARSMAP = 1, 3, 2
"""Fields: of a piece, of a piece, of the normalizer."""

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
MAX_VARINT_BYTES = 10
MAX_PIECES = 1 << 22
"""As MAX_STRINGS of gguf_reader: a vocabulary has to fit a GGUF array."""
MAX_PIECE_BYTES = 1 << 12
"""Gemma's longest piece has 93."""
PIECES_AT_ONCE = 1 << 13
"""Why: the texts of a whole vocabulary take thirty megabytes as objects."""


def read_piece_types(data: bytes, path: Path) -> list[TokenType]:
    """Each piece's type, by id, once it is sure that the file is a model with pieces, each a text.

    Why: the library does not say which pieces are user-defined.

    Raises: TokenizerError.
    """
    try:
        numbers, at = _usual_pieces(data)
        texts = []
        for number, kind, start, end in _fields(data, at, len(data)):
            if number in (PIECES, NORMALIZER) and kind != LENGTH:
                raise ValueError(f"field {number} of a wrong type, before byte {end:,}")
            if number == PIECES:
                text, kind = _piece(data, start, end)
                texts.append(text)
                numbers.append(kind)
            elif number == NORMALIZER and any(
                field == CHARSMAP and last > first for field, _, first, last in _fields(data, start, end)
            ):
                raise ValueError("a normalizer with rules of its own")
        if not 0 < len(numbers) <= MAX_PIECES:
            raise ValueError(f"{len(numbers):,} pieces")
        _check_texts(texts)
        types = {number: TokenType(number) for number in set(numbers)}
        return [types[number] for number in numbers]
    except ValueError as error:
        raise TokenizerError(
            f"{path}: not a sentencepiece model of a Gemma",
            expected=f"1 to {MAX_PIECES:,} pieces and a normalizer that changes nothing",
            found=str(error),
            fix="download the file again",
        ) from error


def _usual_pieces(data: bytes) -> tuple[list[int], int]:
    """Types of the first pieces, as far as each has less than 128 bytes: a text, a score, perhaps a type.

    Returns: these, and where the last of these pieces ends. Raises: ValueError for texts that are none.
    Why: a vocabulary has 262,144 of them, and only of others every field need be looked at.
    """
    starts, at = array("q", [0]), 0
    while at + 1 < len(data) and data[at] == 0x0A and data[at + 1] < 128:
        at += 2 + data[at + 1]
        starts.append(at)
    raw = np.frombuffer(data + bytes(4), np.uint8)  # the last may claim more than there is
    first, ends = np.array(starts[:-1], np.int64), np.array(starts[1:], np.int64)
    first, ends = first[ends <= len(data)], ends[ends <= len(data)]
    text_ends = np.minimum(first + 4 + raw[first + 3], ends)
    left = ends - text_ends
    typed = (left == 7) & (raw[ends - 2] == 0x18) & (raw[ends - 1] < 128)
    usual = (raw[first + 2] == 0x0A) & (raw[first + 3] > 0) & (raw[text_ends] == 0x15) & (typed | (left == 5))
    n_usual = len(usual) if usual.all() else int(usual.argmin())
    for some in range(0, n_usual, PIECES_AT_ONCE):
        bounds = zip(
            (first[some : min(some + PIECES_AT_ONCE, n_usual)] + 4).tolist(),
            text_ends[some : min(some + PIECES_AT_ONCE, n_usual)].tolist(),
            strict=True,
        )
        _check_texts([data[start:end] for start, end in bounds])
    types = np.where(typed, raw[ends - 1], TokenType.NORMAL)[:n_usual]
    return types.tolist(), starts[n_usual]


def _check_texts(texts: list[bytes]) -> None:
    """Raises: ValueError."""
    if not all(texts) or max(map(len, texts), default=0) > MAX_PIECE_BYTES:
        raise ValueError("a piece without a text, or with a very long one")
    if "\0" in b"\n".join(texts).decode("utf-8"):
        raise ValueError("a piece with a zero byte")


def _piece(data: bytes, start: int, end: int) -> tuple[bytes, int]:
    """A piece's text, empty where it has none, and its type. Raises: ValueError."""
    text, number = b"", int(TokenType.NORMAL)
    for field, kind, first, last in _fields(data, start, end):
        if field == TEXT:
            if kind != LENGTH:
                raise ValueError(f"a piece whose text is a number, before byte {last:,}")
            text = data[first:last]
        elif field == TYPE and kind == VARINT:
            number, _ = _varint(data, first, last)
    return text, number


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, start and end of the content of each field. Raises: ValueError."""
    while at < end:
        key, at = _varint(data, at, end)
        number, kind = key >> 3, key & 7
        start = at
        if kind == LENGTH:
            length, start = _varint(data, at, end)
            at = start + length
        elif kind == VARINT:
            _, at = _varint(data, at, end)
        elif kind == FOUR_BYTES:
            at += 4
        elif kind == EIGHT_BYTES:
            at += 8
        else:
            raise ValueError(f"no field at byte {start:,}")
        if number == 0 or at > end:
            raise ValueError(f"a field that does not fit, at byte {start:,}")
        yield number, kind, start, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number and where it ends. Raises: ValueError."""
    if at < end and data[at] < 128:  # most have one byte
        return data[at], at + 1
    value = 0
    for i in range(MAX_VARINT_BYTES):
        if at + i >= end:
            break
        value |= (data[at + i] & 127) << (7 * i)
        if data[at + i] < 128:
            return value, at + i + 1
    raise ValueError(f"no number at byte {at:,}")
