"""What the tensors stage finds: how far each tensor is from its source, and how that is told."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from gguf3n.formats.gguf_layout import QType
from gguf3n.plots import LayerError, error_svg
from gguf3n.validation.bands import SHOWN
from gguf3n.validation.document import Block, Picture, Table, Text
from gguf3n.validation.result import StageResult

N_WORST = 20
"""Tensors that a page lists."""


@dataclass(frozen=True)
class TensorError:
    """How far a tensor is from its source.

    `rms_error` and `worst_row_error` are relative to the root mean square of the weights, `expected` is the band of the
    first that the type reaches; `max_error` is absolute. `ratio` is the error of the sampled rows over that of our own
    quantizer without an importance matrix, `misplaced` the share of their weights that do not lie where the source's
    would (see yardsticks), `identical` whether their bytes are those of our quantizer, `refined` whether their codes
    may be refined by correlations that are not at hand.
    """

    name: str
    qtype: QType
    bid: int | None
    shape: tuple[int, ...]
    rms_error: float
    max_error: float
    cosine: float
    expected: tuple[float, float]
    worst_row: int
    worst_row_error: float
    ratio: float
    misplaced: float
    identical: bool
    refined: bool = False

    @property
    def excess(self) -> float:
        """The error over the most that is expected; 0 where there is none."""
        if self.rms_error == 0:
            return 0.0
        return self.rms_error / self.expected[1] if self.expected[1] else math.inf

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "qtype": self.qtype.name, "shape": list(self.shape), "expected": list(self.expected)}


@dataclass(frozen=True)
class TensorsResult(StageResult):
    """What was found of all tensors.

    `errors` are those of the tensors that are evaluated, worst first: those with problems, then by `excess`.
    `weighted`: the file's keys say that an importance matrix was used. `notes` are no faults.
    """

    errors: tuple[TensorError, ...]
    weighted: bool
    notes: tuple[str, ...] = ()

    @property
    def n_identical(self) -> int:
        """Tensors whose sampled rows have the bytes that our quantizer makes of the source."""
        return sum(error.identical for error in self.errors)

    @property
    def remarks(self) -> tuple[str, ...]:
        return self.notes

    def lines(self) -> list[str]:
        lines = [f"{len(self.errors):,} tensors, {self.n_identical:,} with our quantizers' bytes (sampled)"]
        if self.errors:
            worst = self.errors[0]
            low, high = worst.expected
            lines.append(f"worst: {worst.name}, {worst.qtype.name}:")
            lines.append(f"relative error {worst.rms_error:.3g}, expected {low:.3g} to {high:.3g}")
        return [*lines, *self.shows]

    @property
    def shows(self) -> list[str]:
        """What a pass means: which differences of a whole tensor would have shown, by types."""
        exact = list(dict.fromkeys(error.qtype.name for error in self.errors if error.identical))
        lines = [f"shows any other version or scale: {', '.join(exact)} (same bytes)"] if exact else []
        by_text: dict[str, list[str]] = {}
        if any(error.refined for error in self.errors):
            names = ", ".join(dict.fromkeys(error.qtype.name for error in self.errors if error.refined))
            lines.append(f"shows other tensors, rows and lengths: {names} (refined codes, without --refine FILE)")
        others = [error.qtype for error in self.errors if not error.identical and not error.refined]
        for qtype in dict.fromkeys(others):
            if qtype in SHOWN:
                text = f"another version {_from(SHOWN[qtype].version)}, another scale {_from(SHOWN[qtype].scale)}"
                by_text.setdefault(text, []).append(qtype.name)
        unknown = "without their importance matrix"
        return [*lines, *(f"shows {text}: {', '.join(names)} ({unknown})" for text, names in by_text.items())]

    def details(self) -> dict[str, Any]:
        return {
            "weighted": self.weighted,
            "n_identical": self.n_identical,
            "notes": list(self.notes),
            "shows": self.shows,
            "tensors": [error.as_dict() for error in self.errors],
        }

    def blocks(self, *, with_pictures: bool) -> Iterator[Block]:
        errors = self.errors
        if not errors:
            return
        wrong = {problem.where for problem in self.problems}
        yield Text(
            f"{len(errors):,} tensors; of {self.n_identical:,}, the sampled rows have the bytes that gguf3n's own "
            "quantizers make of the source."
        )
        for note in (*self.notes, *self.shows):
            yield Text(note)
        by_type: dict[str, list[TensorError]] = {}
        for error in errors:
            by_type.setdefault(error.qtype.name, []).append(error)
        rows = tuple(
            (
                name,
                str(len(group)),
                *_spread(error.rms_error for error in group),
                f"{min(error.expected[0] for error in group):.3g} to {max(error.expected[1] for error in group):.3g}",
                str(sum(error.name in wrong for error in group)),
            )
            for name, group in sorted(by_type.items(), key=lambda item: -len(item[1]))
        )
        headings = ("type", "tensors", "least error", "median", "largest", "expected", "problems")
        yield Text("Relative RMS error: the root mean square of the difference, over that of the source's weights.")
        yield Table(headings, "<>>>>>>", rows)
        layers = [LayerError(_kind(e.name), e.bid, e.rms_error, e.name in wrong) for e in errors]
        if any(0 < layer.error < math.inf for layer in layers):
            caption = "Relative RMS error of each layer's tensors"
            if with_pictures:
                yield Picture(error_svg(layers), caption, _kind_table(errors))
            else:
                yield Text(f"{caption}, by kind:")
                yield _kind_table(errors)
        worst = tuple(
            (
                error.name,
                error.qtype.name,
                f"{error.rms_error:.3g}",
                f"{error.expected[0]:.3g} to {error.expected[1]:.3g}",
                f"{error.max_error:.3g}",
                f"{error.cosine:.6f}",
                f"{error.worst_row:,} ({error.worst_row_error:.3g})",
            )
            for error in errors[:N_WORST]
        )
        yield Text(f"The worst {len(worst)} of {len(errors):,} tensors:")
        yield Table(("tensor", "type", "error", "expected", "maximum", "cosine", "worst row"), "<<>>>>>", worst, (0,))


def _from(difference: float | None) -> str:
    return "never" if difference is None else f"from {difference:.1%}".replace(".0%", "%")


def _kind(name: str) -> str:
    """As in "attn_q" for "blk.3.attn_q.weight"."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def _spread(values: Iterable[float]) -> tuple[str, str, str]:
    found = list(values)
    return f"{min(found):.3g}", f"{median(found):.3g}", f"{max(found):.3g}"


def _kind_table(errors: Sequence[TensorError]) -> Table:
    """Each kind of tensor and where its error is largest; without those that have none."""
    kinds: dict[str, list[TensorError]] = {}
    for error in errors:
        kinds.setdefault(_kind(error.name), []).append(error)
    rows = []
    for kind, group in sorted(kinds.items()):
        largest = max(group, key=lambda error: error.rms_error)
        if largest.rms_error != 0:
            layer = "-" if largest.bid is None else str(largest.bid)
            rows.append((kind, *_spread(error.rms_error for error in group), layer))
    return Table(("kind", "least error", "median", "largest", "in layer"), "<>>>>", tuple(rows), (0,))
