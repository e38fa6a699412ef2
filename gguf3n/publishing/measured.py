"""What validation has said of files: the JSON of `gguf3n validate --json` that stands beside them.

    gguf3n validate m-Q4_K_M.gguf --reference SRC --json > m-Q4_K_M.validate.json

A report is known by its schema and belongs to the file that it names, whatever it is called itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gguf3n.errors import UsageError
from gguf3n.formats.small_file import MIB, parse_json, read_small

SCHEMA = "gguf3n.validate/1"
MAX_BYTES = 64 * MIB
"""Of a report, whose tensors stage has some hundred bytes for each tensor. What is larger is something else."""


@dataclass(frozen=True)
class Measured:
    """How near a file is to its source. Units: nats. None where it was not measured.

    `kl`: mean KL divergence of next-token distributions; `top1`: share of positions with the same likeliest token.
    """

    verdict: str
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    n_positions: int | None = None
    engine: str | None = None
    reference: str | None = None


def measured_in(result: Mapping[str, Any], name: str) -> Measured:
    """What a report says, as `Validation.as_dict` makes it.

    Args:
        name: of the report, in messages.

    Raises: UsageError for one that has not what it should.
    """
    try:
        verdict = result["verdict"]
        logits = result["stages"].get("logits", {})
        divergence = logits.get("divergence", {})
        numbers = {
            "kl": divergence.get("mean"),
            "top1": divergence.get("top1_agreement"),
            "perplexity": divergence.get("candidate_perplexity"),
            "reference_perplexity": divergence.get("reference_perplexity"),
        }
        values = {key: None if value is None else float(value) for key, value in numbers.items()}
        n_positions = divergence.get("n_positions")
        texts = (verdict, *(text for text in (logits.get("engine"), logits.get("reference")) if text is not None))
        if not all(isinstance(text, str) for text in texts) or not isinstance(n_positions, int | None):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{name}: not what a report of {SCHEMA} says",
            expected="verdict, stages and in logits a divergence, as `gguf3n validate --json` prints them",
            fix="make it again, or remove it",
        ) from error
    return Measured(
        verdict, **values, n_positions=n_positions, engine=logits.get("engine"), reference=logits.get("reference")
    )


def read_measured(directory: Path, names: Collection[str]) -> dict[str, Measured]:
    """Name -> what the reports in a directory say of it; of several of one file, the last by name that has numbers.

    Raises: UsageError for a report that can't be read.
    """
    found: dict[str, Measured] = {}
    for path in sorted(directory.glob("*.json")):
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            continue
        data = read_small(path, MAX_BYTES, UsageError)
        if SCHEMA.encode() not in data:
            continue
        result = parse_json(data, str(path), UsageError)
        if not isinstance(result, dict) or result.get("schema") != SCHEMA:
            continue
        name = _base_name(result.get("path"))
        if name not in names:
            continue
        measured = measured_in(result, str(path))
        if name not in found or measured.kl is not None:
            found[name] = measured
    return found


def _base_name(path: Any) -> str:
    return PureWindowsPath(PurePosixPath(path).name).name if isinstance(path, str) else ""
