"""What every type makes of weights, measured: the rows of the table in gguf3n/validation/bands.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from gguf3n.formats.gguf_layout import QType
from gguf3n.quants import QUANTIZERS
from gguf3n.quants.api import dequantize, quantize
from gguf3n.validation.bands import Band, Shown, Spread, limits
from gguf3n.validation.evidence import examine
from gguf3n.validation.yardsticks import error, misplaced

N_WEIGHTS = 1 << 17
LENGTHS = (256, 2048)
TOLERANCE = 0.02
"""Of --check."""
DIFFERENCES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of --stale."""
N_SHOWN = 1 << 16
"""Weights of each kind there; a tensor's sample is twice as large."""

Rng = np.random.Generator


def outlier(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    """One weight in 2,048 is 30 times as large: one a row, or one in every eighth row."""
    values = rng.standard_normal(shape).reshape(-1, max(LENGTHS))
    values[np.arange(len(values)), rng.integers(max(LENGTHS), size=len(values))] *= 30
    return values.reshape(shape)


ROWS: dict[str, Callable[[Rng, tuple[int, int]], np.ndarray]] = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "student t": lambda rng, shape: rng.standard_t(4, size=shape),
    "outlier": outlier,
}


def some_large(rng: Rng, n: int) -> np.ndarray:
    """One column in 256 has a thousand times the activation of the rest."""
    weights = np.exp(0.5 * rng.standard_normal(n))
    weights[rng.integers(n, size=n // 256)] *= 1000
    return weights


def some_idle(rng: Rng, n: int) -> np.ndarray:
    """A third of the columns was never active."""
    return np.where(rng.random(n) < 1 / 3, 0, np.exp(rng.standard_normal(n)))


WEIGHTS: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "squares of student t": lambda rng, n: rng.standard_t(4, size=n) ** 2,
    "lognormal": lambda rng, n: np.exp(rng.standard_normal(n)),
    "broad lognormal": lambda rng, n: np.exp(2 * rng.standard_normal(n)),
    "some large": some_large,
    "some idle": some_idle,
}


@dataclass(frozen=True)
class Sample:
    """Rows in one type: made without importances (with equal ones where the type needs them), or with some."""

    rows: str
    weights: str | None
    x: np.ndarray
    plain: np.ndarray
    q: np.ndarray

    qtype: QType

    @property
    def spread(self) -> Spread:
        """Of these rows alone."""
        before = error(self.x, self.plain)
        share = misplaced(self.x, self.q, self.qtype)
        return Spread(error(self.x, self.q) / before if before else 1.0, float(share.mean()), float(share.max()))


def in_bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to the precision of a checkpoint."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def samples(qtype: QType) -> Iterator[Sample]:
    """All kinds of rows with all kinds of importances.

    Float types are given rows in float32, as nothing is lost from BF16.
    """
    quantizer = QUANTIZERS[qtype]
    is_float = qtype in (QType.F32, QType.F16, QType.BF16)
    for n_per_row in LENGTHS:
        shape = (N_WEIGHTS // n_per_row, n_per_row)
        for kind, (rows, make_rows) in enumerate(ROWS.items()):
            rng = np.random.default_rng([n_per_row, kind])
            x = (0.02 * make_rows(rng, shape)).astype(np.float32)
            x = x if is_float else in_bf16(x)
            rng.standard_normal(shape)  # so that the importances are those of older tables
            equal = None if quantizer.plain else np.ones(n_per_row, np.float32)
            plain = dequantize(quantize(x, qtype, equal), qtype)
            if quantizer.plain:
                yield Sample(rows, None, x, plain, dequantize(quantize(x, qtype), qtype), qtype)
            if quantizer.weighted:
                for weights, make_weights in WEIGHTS.items():
                    importance = make_weights(rng, n_per_row).astype(np.float32)
                    q = dequantize(quantize(x, qtype, importance), qtype)
                    yield Sample(rows, weights, x, plain, q, qtype)


def measure(qtype: QType) -> Band:
    """The row of the table."""
    found = list(samples(qtype))
    errors = [error(sample.x, sample.q) for sample in found]
    exact = qtype in (QType.F32, QType.F16, QType.BF16)  # where the source has no more bits
    return Band(
        (0.0 if exact else down(min(errors)), up(max(errors))),
        worst([sample.spread for sample in found if sample.weights is None]),
        worst([sample.spread for sample in found if sample.weights is not None]),
    )


def shown(qtype: QType) -> Shown | None:
    """From which of DIFFERENCES on other rows are told from their source; None of a type without importances."""
    if not QUANTIZERS[qtype].weighted:
        return None
    return Shown(
        found_from(qtype, lambda x, rng, d: x + d * np.sqrt(np.mean(x * x)) * rng.standard_normal(x.shape)),
        found_from(qtype, lambda x, rng, d: (1 + d) * x),
    )


def found_from(qtype: QType, change: Callable[[np.ndarray, Rng, float], np.ndarray]) -> float | None:
    """The smallest difference that shows with every kind of rows and of importances; None where none does."""
    left = list(DIFFERENCES)
    n_per_row = max(LENGTHS)
    allowed = limits(qtype, weighted=True)
    for kind, make_rows in enumerate(ROWS.values()):
        rng = np.random.default_rng([n_per_row, kind])
        x = in_bf16((0.02 * make_rows(rng, (N_SHOWN // n_per_row, n_per_row))).astype(np.float32))
        for make_weights in WEIGHTS.values():
            importance = make_weights(rng, n_per_row).astype(np.float32)
            while left:
                blocks = quantize(in_bf16(change(x, rng, left[0]).astype(np.float32)), qtype, importance)
                q = dequantize(blocks, qtype)
                found = examine(qtype, np.arange(len(x)), x, blocks, q, None, allowed, weighted=True)
                if not found.is_sound(allowed, qtype) or not found.is_possible:
                    break
                left.pop(0)
    return left[0] if left else None


def worst(spreads: list[Spread]) -> Spread | None:
    """The largest of each figure; None of nothing."""
    if not spreads:
        return None
    columns = zip(*((s.ratio, s.misplaced, s.row_misplaced) for s in spreads), strict=True)
    return Spread(*(up(max(column)) for column in columns))


def down(value: float) -> float:
    """Three digits, rounded down."""
    return rounded(value, np.floor)


def up(value: float) -> float:
    return rounded(value, np.ceil)


def rounded(value: float, towards: Callable[[float], float]) -> float:
    if value == 0:
        return 0.0
    unit = 10.0 ** (np.floor(np.log10(value)) - 2)
    return float(f"{towards(value / unit - (1e-9 if towards is np.ceil else -1e-9)) * unit:.3g}")


def agree(one: Band | None, other: Band) -> bool:
    return one is not None and all(
        a == b if a is None or b is None else np.allclose(a, b, rtol=TOLERANCE, atol=1e-4)
        for a, b in zip(figures(one), figures(other), strict=True)
    )


def figures(band: Band) -> list[tuple[float, ...] | None]:
    spreads = (band.plain, band.weighted)
    return [band.error, *((s.ratio, s.misplaced, s.row_misplaced) if s else None for s in spreads)]
