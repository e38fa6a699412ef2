"""The outer structure of sentencepiece's tokenizer.model, looked at before the library reads it.

    file     fields of ModelProto: pieces (1), trainer_spec (2), normalizer_spec (3), self_test_data (4), …
    field    key varint (number << 3 | wire type), then a varint, 8 bytes, a length and bytes, or 4 bytes
    piece    text (1), score float32 (2), type varint (3)

Why: the library is C++ and takes much on trust; a file that is none can end the process.

Source: sentencepiece_model.proto of sentencepiece; the encoding section of protobuf's documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gguf3n.errors import TokenizerError

PIECES, NORMALIZER, SELF_TEST = 1, 3, 4
TEXT, CHARSMAP = 1, 2
"""Fields: of a piece, of the normalizer."""

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
MAX_VARINT_BYTES = 10
MAX_PIECES = 1 << 22
"""As MAX_STRINGS of gguf_reader: a vocabulary has to fit a GGUF array."""
MAX_PIECE_BYTES = 1 << 12
"""Gemma's longest piece has 93."""


def check_sentencepiece(data: bytes, path: Path) -> None:
    """Make sure that it is a model with pieces, each a text. Raises: TokenizerError."""
    n_pieces = 0
    try:
        for number, kind, start, end in _fields(data, 0, len(data)):
            if number in (PIECES, NORMALIZER, SELF_TEST) and kind != LENGTH:
                raise ValueError(f"field {number} of a wrong type, before byte {end:,}")
            if number == PIECES:
                n_pieces += 1
                _check_piece(data, start, end)
            elif number == NORMALIZER and any(
                field == CHARSMAP and last > first for field, _, first, last in _fields(data, start, end)
            ):
                raise ValueError("a normalizer with rules of its own")
            elif number == SELF_TEST:
                raise ValueError("samples to test itself with")
        if not 0 < n_pieces <= MAX_PIECES:
            raise ValueError(f"{n_pieces:,} pieces")
    except ValueError as error:
        raise TokenizerError(
            f"{path}: not a sentencepiece model of a Gemma",
            expected=f"1 to {MAX_PIECES:,} pieces and a normalizer that changes nothing",
            found=str(error),
            fix="download the file again",
        ) from error


def _check_piece(data: bytes, start: int, end: int) -> None:
    for number, kind, first, last in _fields(data, start, end):
        if number == TEXT and kind == LENGTH:
            text = data[first:last]
            if not text or len(text) > MAX_PIECE_BYTES or b"\0" in text:
                raise ValueError(f"a piece of {len(text):,} bytes, or with a zero byte, at byte {first:,}")
            text.decode("utf-8")


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
