"""Refined codes in plain loops: one row, one block, one float32 operation after the other, in the kernel's order."""

from __future__ import annotations

import numpy as np

from gguf3n.quants.iq4_nl import VALUES

F = np.float32
PASSES, FIT_AFTER = 3, 1


def refine_row(
    x: np.ndarray,
    H: np.ndarray,
    points: np.ndarray,
    scales: np.ndarray,
    minima: np.ndarray,
    units: np.ndarray,
    has_minima: bool,
    point_range: tuple[int, int],
    scale_range: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, scales and minima of a row whose block is all of it."""
    n, n_sub_blocks = len(x), len(scales)
    sub_block = n // n_sub_blocks
    p, a, m = points.copy(), scales.copy(), minima.copy()

    def residual(j: int) -> F:
        s = j // sub_block
        return x[j] - ((a[s] * units[s, 0]) * p[j] + m[s] * units[s, 1])

    def total() -> F:
        found = F(0)
        for j in range(n):
            found = found + G[j] * residual(j)
        return found

    G = np.zeros(n, F)
    for j in range(n):
        G = G + residual(j) * H[j]
    before = total()
    for turn in range(PASSES):
        for j in range(n):
            s = j // sub_block
            scale = a[s] * units[s, 0]
            inverse = F(1) / scale if scale != 0 else F(0)
            if not H[j, j] > 0:
                continue
            new = nearest(p[j] + G[j] * inverse * (F(1) / H[j, j]), point_range)
            step = (p[j] - new) * scale
            if step * (F(2) * G[j] + step * H[j, j]) < 0:
                p[j] = new
                G = G + step * H[j]
        if turn == FIT_AFTER:
            for s in range(n_sub_blocks):
                here = slice(s * sub_block, (s + 1) * sub_block)
                found = fit(p[here], G[here], H[here, here], a[s], m[s], units[s], has_minima, scale_range)
                if found is None:
                    continue
                a[s], m[s], t, v = found
                for j in range(here.start, here.stop):
                    G = G + -(t * p[j] + v) * H[j]
    if total() < before * F(1 - 2.0**-7):
        return p, a, m
    return points, scales, minima


def fit(
    p: np.ndarray,
    G: np.ndarray,
    H: np.ndarray,
    a: F,
    m: F,
    units: np.ndarray,
    has_minima: bool,
    limits: tuple[int, int],
) -> tuple[F, F, F, F] | None:
    """A scale, a minimum, and how much the two change; None where nothing is better."""
    n = len(p)
    z = np.zeros(n, F)
    ee = F(0)
    for j in range(n):
        z = z + p[j] * H[j]
        for k in range(n):
            ee = ee + H[j, k]
    gp = ge = pp = pe = F(0)
    for j in range(n):
        gp, ge, pp, pe = gp + p[j] * G[j], ge + G[j], pp + p[j] * z[j], pe + z[j]
    unit, min_unit = units
    two = F(2)

    new = storable(a + gp / pp / unit, limits)
    t = (new - a) * unit
    candidates = [(t * (t * pp - two * gp), new, m, t, F(0))]
    if has_minima:
        new = storable(a + (gp * ee - ge * pe) / (pp * ee - pe * pe) / unit, limits)
        t = (new - a) * unit
        low = storable(m + (ge - t * pe) / ee / min_unit, limits)
        v = (low - m) * min_unit
        change = t * (t * pp - two * gp) + v * (v * ee - two * ge) + two * t * v * pe
        candidates.append((change, new, low, t, v))
        low = storable(m + ge / ee / min_unit, limits)
        v = (low - m) * min_unit
        candidates.append((v * (v * ee - two * ge), a, low, F(0), v))
    candidates = [each for each in candidates if not np.isnan(each[0])]
    best = min(candidates, key=lambda each: each[0], default=None)
    return best[1:] if best is not None and best[0] < 0 else None


def nearest(x: F, limits: tuple[int, int]) -> F:
    """The nearest point: a whole number, or a value of IQ4's where there are no limits."""
    if limits == (0, 0):
        return VALUES[-1] if np.isnan(x) else VALUES[int((x >= (VALUES[:-1] + VALUES[1:]) / F(2)).sum())]
    return storable(x, limits)


def storable(x: F, limits: tuple[int, int]) -> F:
    """What a block holds: a whole number within limits, or half precision."""
    if limits == (0, 0):
        return F(np.float16(x))
    bits = int((F(x) + F(12582912)).view(np.int32))
    return F(min(max((bits & 0x007FFFFF) - 0x00400000, limits[0]), limits[1]))
