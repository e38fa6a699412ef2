"""What each tensor of a model costs in each type, measured: a JSON file, gguf3n.sensitivity/1.

    schema     "gguf3n.sensitivity/1"
    model      name, and the fingerprint that validate knows it by
    imatrix    the name and a hash of the importances that the candidates were quantized with; null for none
    ctx        tokens of a chunk
    seed       of the labels that were drawn
    texts      name and hash of each, read as one text
    spans      [first chunk, chunks] that were measured, of that text
    engines    what computed it
    tensors    by GGUF name: shape, and by type the sums over chunks

Of each chunk, a type's figures are in nats a token: how far the model's distribution moves, as a KL divergence, where
this tensor alone is in this type (see tuning/measure.py):

    fisher     by the gradient of sampled labels, the square of the sum; `squares` are its squares, for its error
    diagonal   the same without the products of different weights: the errors taken as independent
    rows       of an embedding table: with the mean error of all its rows in place of those that the text has

They are sums over chunks, so files of one model add up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gguf3n.errors import SourceError, UsageError, shown
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.small_file import MIB, parse_json, read_small
from gguf3n.formats.whole_file import write_whole

SCHEMA = "gguf3n.sensitivity/1"
MAX_SENSITIVITY_BYTES = 16 * MIB
"""Gemma 3n E4B's, with twenty types, have one."""

AGAIN = "measure it again with gguf3n sensitivity"


@dataclass(frozen=True)
class Sums:
    """Of one tensor in one type, over chunks. Units: nats a token; `squares`, nats^2. `rows` is None outside tables."""

    fisher: float
    squares: float
    diagonal: float
    rows: float | None = None

    def __add__(self, other: Sums) -> Sums:
        rows = None if self.rows is None or other.rows is None else self.rows + other.rows
        return Sums(self.fisher + other.fisher, self.squares + other.squares, self.diagonal + other.diagonal, rows)


@dataclass(frozen=True)
class TensorSums:
    """Of one tensor. Shapes: numpy order."""

    shape: tuple[int, ...]
    types: Mapping[QType, Sums]


@dataclass(frozen=True)
class Text:
    """One of the files that were read as one text."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Sensitivity:
    """A whole file. `imatrix` is a name and a hash; `spans` are (first chunk, chunks)."""

    path: Path
    model: str
    fingerprint: str
    imatrix: Text | None
    ctx: int
    seed: int
    texts: tuple[Text, ...]
    spans: tuple[tuple[int, int], ...]
    engines: tuple[str, ...]
    tensors: Mapping[str, TensorSums]

    @property
    def n_chunks(self) -> int:
        return sum(n_chunks for _, n_chunks in self.spans)

    @property
    def types(self) -> tuple[QType, ...]:
        """Every type that some tensor was measured in."""
        measured = {qtype for tensor in self.tensors.values() for qtype in tensor.types}
        return tuple(qtype for qtype in GGML_TYPES if qtype in measured)


def merge_sensitivities(parts: Sequence[Sensitivity]) -> Sensitivity:
    """The sums of several, as if measured at once.

    Raises: UsageError: none, or such as do not add up: of other models, importances, texts, types or seeds, or of
        chunks that are in two of them.
    """
    if not parts:
        raise UsageError("no sensitivities to merge", expected="one file or more", found="none")
    first, *others = parts
    spans, tensors, engines = first.spans, dict(first.tensors), first.engines
    for other in others:
        check_same(first, other)
        for start, n_chunks in other.spans:
            twice = [span for span in spans if start < sum(span) and span[0] < start + n_chunks]
            if twice:
                raise UsageError(
                    f"{other.path}: chunks that are in another file too",
                    expected=f"chunks before {twice[0][0]} or from {sum(twice[0])} on",
                    found=f"{start} to {start + n_chunks - 1}",
                    fix="measure others with --from-chunk",
                )
        spans += other.spans
        engines += tuple(engine for engine in other.engines if engine not in engines)
        for name, tensor in other.tensors.items():
            types = tensors[name].types
            added = {qtype: types[qtype] + sums for qtype, sums in tensor.types.items()}
            tensors[name] = TensorSums(tensor.shape, added)
    return Sensitivity(
        Path("merged"), first.model, first.fingerprint, first.imatrix, first.ctx, first.seed, first.texts,
        _joined(spans), engines, tensors,
    )  # fmt: skip


def check_same(one: Sensitivity, other: Sensitivity) -> None:
    """Refuse two that do not add up. Raises: UsageError."""
    hashes = [None if each.imatrix is None else each.imatrix.sha256 for each in (one, other)]
    candidates = [
        {name: tuple(sorted(qtype.name for qtype in tensor.types)) for name, tensor in each.tensors.items()}
        for each in (one, other)
    ]
    differences = (
        ("of another model", one.fingerprint, other.fingerprint),
        ("with another importance matrix", *hashes),
        ("of another text", [text.sha256 for text in one.texts], [text.sha256 for text in other.texts]),
        ("with another --ctx", one.ctx, other.ctx),
        ("with another --seed", one.seed, other.seed),
        ("in other types", *candidates),
    )
    for what, expected, found in differences:
        if expected != found:
            raise UsageError(
                f"{other.path}: measured {what} than {one.path}", expected=shown(expected), found=shown(found),
                fix="merge only what was measured alike",
            )  # fmt: skip


def _joined(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans in order, those that follow each other as one."""
    joined: list[tuple[int, int]] = []
    for first, n_chunks in sorted(spans):
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + n_chunks)
        else:
            joined.append((first, n_chunks))
    return tuple(joined)


def as_json(sensitivity: Sensitivity) -> dict[str, Any]:
    """What a file holds."""
    return {
        "schema": SCHEMA,
        "model": {"name": sensitivity.model, "fingerprint": sensitivity.fingerprint},
        "imatrix": None if sensitivity.imatrix is None else asdict(sensitivity.imatrix),
        "ctx": sensitivity.ctx,
        "seed": sensitivity.seed,
        "texts": [asdict(text) for text in sensitivity.texts],
        "spans": [list(span) for span in sensitivity.spans],
        "engines": list(sensitivity.engines),
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "types": {
                    qtype.name: {key: value for key, value in asdict(sums).items() if value is not None}
                    for qtype, sums in tensor.types.items()
                },
            }
            for name, tensor in sensitivity.tensors.items()
        },
    }


def write_sensitivity(sensitivity: Sensitivity, path: Path, *, force: bool = False) -> None:
    """Raises: OutputError."""
    write_whole(path, json.dumps(as_json(sensitivity), indent=1) + "\n", force=force)


def read_sensitivity(path: str | Path) -> Sensitivity:
    """Raises: SourceError for a file that is none, of another version, or with values that no measurement gives."""
    path = Path(path)
    value = parse_json(read_small(path, MAX_SENSITIVITY_BYTES, SourceError), str(path), SourceError)
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise SourceError(f"{path}: not sensitivities", expected=f"schema {SCHEMA}", found=shown(schema), fix=AGAIN)
    try:
        return _parsed(path, value)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SourceError(
            f"{path}: sensitivities that can't be read", expected="what gguf3n sensitivity writes",
            found=f"{type(error).__name__} at {error}", fix=AGAIN,
        ) from error  # fmt: skip


def _parsed(path: Path, value: Mapping[str, Any]) -> Sensitivity:
    """Raises: KeyError, TypeError, ValueError, AttributeError, OverflowError: not as in the module's table."""
    imatrix = value["imatrix"]
    found = Sensitivity(
        path,
        str(value["model"]["name"]),
        str(value["model"]["fingerprint"]),
        None if imatrix is None else _text(imatrix),
        _count(value["ctx"]),
        _count(value["seed"]),
        tuple(map(_text, value["texts"])),
        tuple((_count(first), _count(n_chunks)) for first, n_chunks in value["spans"]),
        tuple(map(str, value["engines"])),
        {
            name: TensorSums(
                tuple(map(_count, tensor["shape"])),
                {_qtype(qtype): _sums(sums) for qtype, sums in tensor["types"].items()},
            )
            for name, tensor in value["tensors"].items()
        },
    )
    if not found.n_chunks or not found.tensors:
        raise ValueError("no chunk, or no tensor")
    return found


def _text(value: Mapping[str, Any]) -> Text:
    return Text(str(value["name"]), str(value["sha256"]))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(shown(value))
    return value


def _qtype(name: str) -> QType:
    if name not in QType.__members__ or QType[name] not in GGML_TYPES:
        raise ValueError(shown(name))
    return QType[name]


def _sums(value: Mapping[str, Any]) -> Sums:
    known = {field.name for field in fields(Sums)}
    numbers = {key: float(number) for key, number in value.items() if key in known and type(number) in (int, float)}
    if any(not math.isfinite(number) or number < 0 for number in numbers.values()) or numbers.keys() != value.keys():
        raise ValueError(shown(dict(value)))
    return Sums(**numbers)
