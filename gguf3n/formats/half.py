"""How much a tensor loses in float16: the one question of planning that its weights must answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import Gguf3nError
from gguf3n.formats.rows import RowReader, Rows, chunks

F16_MAX = 65504.0
F16_TINY = np.float32(2.0**-14)
"""The smallest float16 of full precision; smaller ones are multiples of 2^-24."""

MAX_ROW_ERROR = 2.0**-11
"""The relative error that a row may have: what float16 costs at worst where no value is too small or too large."""

CHUNK_WEIGHTS = 1 << 21


def fits_f16(rows: Rows, reader: RowReader) -> bool:
    """Whether float16 holds some rows as well as it holds ordinary numbers.

    No value may overflow, and in no row may the root mean square error, small values flushed to zero or to multiples of
    2^-24 included, exceed MAX_ROW_ERROR of the row's own root mean square. Rows that are stored in another dtype than
    BF16 and F32 fit; so do those whose file is not there yet or can't be read: what reads it next says what is wrong.
    """
    if not rows.dtypes & {"BF16", "F32"}:
        return True
    exact = rows.dtypes == {"BF16"}
    try:
        for chunk in chunks(rows, CHUNK_WEIGHTS):
            values = np.empty((chunk.n_rows, rows.n_per_row), np.float32)
            reader.fill(rows, chunk.first, values)
            if not rows_fit(values, exact=exact):
                return False
    except Gguf3nError:
        return True
    return True


def rows_fit(rows: NDArray[np.float32], *, exact: bool) -> bool:
    """The same for rows in memory.

    Args:
        exact: values of full float16 range have no more than its 11 bits, as BF16 has, so only small ones lose.
    """
    magnitudes = np.abs(rows)
    if not (magnitudes <= F16_MAX).all():
        return False
    lossy = magnitudes < F16_TINY if exact else np.ones_like(magnitudes, bool)
    lossy &= magnitudes > 0
    where = np.flatnonzero(lossy)
    values = rows.reshape(-1)[where]
    errors = values.astype(np.float16).astype(np.float32) - values
    n_rows, n_per_row = rows.shape
    error_squares = np.bincount(where // n_per_row, errors.astype(np.float64) ** 2, minlength=n_rows)
    # float64: the squares of a row of denormals vanish in float32
    squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return bool((error_squares <= MAX_ROW_ERROR**2 * squares).all())
