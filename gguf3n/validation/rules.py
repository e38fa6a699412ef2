"""What no importance matrix explains: rules that every block keeps, whatever its weights and whatever the importances.

An importance matrix chooses scales. Of what follows from the scales, and of how they are chosen, this much is certain:

    order    a weight that is larger has no lower level: each type with free levels rounds by a rising function
    nearest  no weight stands at a level while another level is nearer; only where ggml rounds with the scale as stored:
             K types; IQ4 to the precision of a scale in half precision
    sign     signs are stored: each weight keeps its own, or of eight one at most changes (`misplaced` of yardsticks)
    scale    it is fitted by least squares: the importances w make the sum of w q (x - q) vanish. None of them is
             negative, so of the weights of a scale some are at least as large as their levels, and some at most
    columns  importances are the same in all rows, so the same holds of the columns' sums over rows

Nothing of this was fitted to weights. What is left is the rounding of scales. That to half precision is in `slack`.
That of a sub-block's to few bits spares the largest of a block, which is exact: so one sub-block that keeps to the rule
of the scale is enough.

    type                   order or sign    nearest    scale
    Q4_0, Q5_0             order            -          each block
    Q4_1, Q5_1             order            -          - (with a minimum; float32 loses it where one weight counts)
    K types                -                as stored  (follows)
    IQ4_NL, IQ4_XS         -                slack      (follows)
    IQ2, IQ3               sign             -          a sub-block of each block; columns
    IQ1                    -                -          a sub-block of each block

Source: make_qx_quants, make_qkx3_quants and the quantize_row_*_impl of ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.ggml_types import GGML_TYPES, Rounding
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.rows import Values
from gguf3n.validation.yardsticks import CLEARLY, PerRow, misplaced, nearest_other

Blocks = NDArray[np.uint8]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Rules:
    """Which rules a type keeps, by its sub-blocks.

    Args:
        rounding: of "order", "nearest", "sign" and "slack", as in the table above.
        scale: how far a scale may be from least squares, relative: ggml multiplies some by a constant, and fits 1, 3
            and 5 where it stores 8, 25 and 43; None where the rule of the scale says nothing.
        alive: whether a block is all zero only where its importances are, or where weights of it are too small for half
            precision: no level is zero ("levels"), or the first scale needs no importances ("scales").
    """

    rounding: str | None
    sub_block: int
    scale: float | None = None
    alive: str = ""

    @property
    def tells_scales(self) -> bool:
        """Whether a block of another scale breaks a rule, as good as always."""
        return self.rounding in (NEAREST, SLACK) or (self.rounding == ORDER and self.scale is not None)


ORDER, NEAREST, SLACK, SIGN = "order", "nearest", "slack", "sign"

RULES: Mapping[QType, Rules] = {
    QType.Q4_0: Rules(ORDER, 32, 0.0),
    QType.Q4_1: Rules(ORDER, 32),
    QType.Q5_0: Rules(ORDER, 32, 0.0),
    QType.Q5_1: Rules(ORDER, 32),
    QType.Q2_K: Rules(NEAREST, 16, alive="scales"),
    QType.Q3_K: Rules(NEAREST, 16),
    QType.Q4_K: Rules(NEAREST, 32, alive="scales"),
    QType.Q5_K: Rules(NEAREST, 32, alive="scales"),
    QType.Q6_K: Rules(NEAREST, 16),
    QType.IQ4_NL: Rules(SLACK, 32, alive="levels"),
    QType.IQ4_XS: Rules(SLACK, 32, alive="levels"),
    QType.IQ3_S: Rules(SIGN, 32, 0.06, alive="levels"),
    QType.IQ3_XXS: Rules(SIGN, 32, 0.06, alive="levels"),
    QType.IQ2_XXS: Rules(SIGN, 32, 0.1),
    QType.IQ2_XS: Rules(SIGN, 16, 0.1, alive="levels"),
    QType.IQ2_S: Rules(SIGN, 16, 0.1, alive="levels"),
    QType.IQ1_S: Rules(None, 32, 0.2),
    QType.IQ1_M: Rules(None, 16, 0.2),
}
"""Of each type that importances change."""

REACH: Mapping[QType, int] = {
    QType.F32: 0, QType.F16: 0, QType.BF16: 0, QType.Q8_0: 127,
    QType.Q4_0: 8, QType.Q4_1: 15, QType.Q5_0: 16, QType.Q5_1: 31,
    QType.Q2_K: 45, QType.Q3_K: 128, QType.Q4_K: 945, QType.Q5_K: 1953, QType.Q6_K: 4096,
    QType.IQ4_NL: 127, QType.IQ4_XS: 4064, QType.IQ3_S: 465, QType.IQ3_XXS: 481,
    QType.IQ2_XXS: 167, QType.IQ2_XS: 167, QType.IQ2_S: 167, QType.IQ1_S: 17, QType.IQ1_M: 17,
    QType.TQ1_0: 1, QType.TQ2_0: 1,
}  # fmt: skip
"""The largest level with its sub-block's scale: a weight over the scale of its block."""

HALF_STEP = 2.0**-24
"""Between the smallest numbers of half precision."""
SOME = 0.05
"""Of a block's weights that break a rule. Why: a corrupted block has most, and ties may be rounded in another way."""
ENERGY = 0.75
"""Of q^2 in columns that break the rule. Why: those of little weight have scales of few bits."""
MANY_ROWS = 64
AGREE = 0.35
"""Surplus of equal signs of the best of 32 columns: 1 if it counts most. Of strangers it is 2.1 over the root of the
rows, 0.26 of 64."""
COLUMNS = 0.3
"""How far the scales of columns may be off. Why: those of sub-blocks have few bits."""


def floor(qtype: QType, unit: int) -> float:
    """Sum of the squares of a unit of weights so small that a scale of half precision is far off."""
    return float(unit * (REACH[qtype] * HALF_STEP) ** 2)


def unruly(x: Values, q: Values, blocks: Blocks, qtype: QType) -> NDArray[np.float64]:
    """Share of each block's weights (of its groups of eight, where eight share a sign) that break the rounding's rule.

    Shapes: [n_rows, n_blocks].
    """
    n_blocks = x.shape[1] // GGML_TYPES[qtype].weights
    rules = RULES.get(qtype)
    if rules is None or rules.rounding is None or not x.size:
        return np.zeros((len(x), n_blocks))
    a, b = x.reshape(-1, rules.sub_block), q.reshape(-1, rules.sub_block)
    broken: Flags
    match rules.rounding:
        case "order":
            broken = _out_of_order(a, b)
        case "slack":
            slack = np.repeat(_slack(blocks, qtype), len(a) // (len(x) * n_blocks))
            broken = _not_nearest(a, b, slack.astype(np.float32)[:, None])
        case "sign":
            broken = _other_signs(x, q, qtype)
        case _:
            broken = nearest_other(a, b) < np.abs(a - b) * np.float32(CLEARLY)
    share: NDArray[np.float64] = broken.reshape(len(x), n_blocks, -1).mean(axis=2)
    return share


def impossible(x: Values, q: Values, blocks: Blocks, qtype: QType, alive: Flags | None = None) -> Flags:
    """The blocks that break a rule.

    Args:
        alive: by blocks of a row, whether any other row's is not all zero.

    Shapes: [n_rows, n_blocks].
    """
    broken: Flags = unruly(x, q, blocks, qtype) > SOME
    rules = RULES.get(qtype)
    if rules is None or not x.size:
        return broken
    if rules.scale is not None:
        broken |= _off_scale(x, q, blocks, qtype, rules)
    if rules.alive and alive is not None:
        a = x.reshape(len(x), broken.shape[1], -1, rules.sub_block)
        span = np.abs(a) if rules.alive == "levels" else np.ptp(a, axis=3, keepdims=True) / 16
        vanished = ~q.reshape(len(x), broken.shape[1], -1).any(axis=2)
        broken |= vanished & alive & (span.min(axis=(2, 3)) > REACH[qtype] * HALF_STEP)
    return broken


def off_columns(x: Values, q: Values, qtype: QType) -> float:
    """The factor between columns and their source, of rows together, where no importances explain it; 1 where some do.

    Why: of the columns of each sub-block one at least must be as large as its source, and one at most.
    """
    rules = RULES.get(qtype)
    if rules is None or rules.rounding != SIGN or not x.size:
        return 1.0
    a, b = x.astype(np.float64), q.astype(np.float64)
    product, found = ((a * b).sum(axis=0), (b * b).sum(axis=0))
    groups = found.reshape(-1, 32)
    factors = np.divide(product, found, out=np.full(len(found), np.nan), where=found > 0).reshape(-1, 32)
    filled = ~np.isnan(factors)
    too_small = np.where(filled, factors, np.inf).min(axis=1) > 1 + COLUMNS
    too_large = np.where(filled, factors, -np.inf).max(axis=1) < 1 / (1 + COLUMNS)
    energy = groups.sum(axis=1)
    for off in (too_small & filled.any(axis=1), too_large & filled.any(axis=1)):
        if energy[off].sum() > ENERGY * energy.sum():
            return float(product.sum() / found.sum())
    return 1.0


def are_strangers(x: Values, q: Values, qtype: QType) -> bool:
    """Whether rows of a type whose rounding keeps no rule have nothing in common with their source.

    Why: of each sub-block, the sign of the weight that counts most is right; the column is the same in all rows.
    """
    rules = RULES.get(qtype)
    if rules is None or rules.rounding is not None or len(x) < MANY_ROWS:
        return False
    agreement = (np.sign(x) * np.sign(q)).mean(axis=0)
    return float(agreement.reshape(-1, 32).max(axis=1).mean()) < AGREE


# the rules


def _out_of_order(x: Values, q: Values) -> Flags:
    """Weights that are not smaller than another and stand lower; or higher, if those are fewer. Shapes: [n, 32].

    Why: where few weights count, the scale of Q4_1 and Q5_1 may turn out negative.
    """
    in_order = np.take_along_axis(q, np.argsort(x, axis=1), axis=1)
    steps = np.diff(in_order, axis=1, prepend=in_order[:, :1])
    lower, higher = steps < 0, steps > 0
    broken: Flags = np.where((lower.sum(axis=1) <= higher.sum(axis=1))[:, None], lower, higher)
    return broken


def _slack(blocks: Blocks, qtype: QType) -> NDArray[np.float64]:
    """How far the scale of each block may be from what was rounded with, relative."""
    d = np.abs(blocks.reshape(-1).view(GGML_TYPES[qtype].block)["d"].astype(np.float64))
    slack: NDArray[np.float64] = np.clip(HALF_STEP / 2 / np.maximum(d, HALF_STEP / 2), 2.0**-11, 1.0)
    return slack


def _not_nearest(x: Values, q: Values, slack: Values) -> Flags:
    """Whether another level of the sub-block is nearer, even if all are a little longer or shorter."""
    distance = np.abs(x - q) * np.float32(CLEARLY) - slack * np.abs(q)
    broken = np.zeros(x.shape, np.bool_)
    with np.errstate(invalid="ignore"):
        for level in range(q.shape[1]):
            other = q[:, level, None]
            broken |= np.abs(x - other) + slack * np.abs(other) < distance
    return broken


def _other_signs(x: Values, q: Values, qtype: QType) -> Flags:
    """Weights, or groups of eight, whose signs are not the source's; not those of empty groups, which are all alike."""
    rule, _ = GGML_TYPES[qtype].rounding or (Rounding.SIGN, 1)
    turned: Flags = np.signbit(x) != np.signbit(q)
    turned &= (x != 0) & (q != 0)
    turned = turned.reshape(-1, 8)
    levels = q.reshape(-1, 8)
    turned &= (levels != levels[:, :1]).any(axis=1, keepdims=True)
    # ggml quirk: IQ3_S may lose the sign of a weight that stands alone
    turned &= (x.reshape(-1, 8) != 0).sum(axis=1, keepdims=True) > 1
    return turned.sum(axis=1) > 1 if rule is Rounding.PARITY else turned


def _off_scale(x: Values, q: Values, blocks: Blocks, qtype: QType, rules: Rules) -> Flags:
    """Blocks all of whose sub-blocks have a scale that no importances give. Shapes: [n_rows, n_blocks].

    Why alike: a sub-block whose weights count for nothing gets one level.
    """
    n = GGML_TYPES[qtype].weights
    a, b = (values.astype(np.float64).reshape(len(x), -1, n // rules.sub_block, rules.sub_block) for values in (x, q))
    has_scale = "d" in (GGML_TYPES[qtype].block.names or ())
    slack = _slack(blocks, qtype).reshape(len(x), -1, 1, 1) if has_scale else 0.0
    difference = b * (a - b)
    within = np.maximum(rules.scale or 0.0, 2 * slack) * b * b
    some_more = ((b != 0) & (difference >= -within)).any(axis=3)
    some_less = ((b != 0) & (difference <= within)).any(axis=3)
    alike = (np.abs(b) == np.abs(b[..., :1])).all(axis=3)
    keeps = (some_more & some_less) | (alike if rules.rounding != ORDER else ~b.any(axis=3))
    off: Flags = ~keeps.any(axis=2)
    return off


def rule_breakers(x: Values, q: Values, blocks: Blocks, qtype: QType) -> PerRow:
    """Share of each row's weights that break the rounding's rule; as `misplaced`, for unknown importances."""
    if qtype not in RULES:
        return misplaced(x, q, qtype)
    share: PerRow = unruly(x, q, blocks, qtype).mean(axis=1)
    return share
