"""How much a tensor loses in float16: the one question of planning that its weights must answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.offset_files import OffsetFiles
from gguf3n.formats.source import SourceTensor

F16_MAX = 65504.0
F16_TINY = np.float32(2.0**-14)
"""The smallest float16 of full precision; smaller ones are multiples of 2^-24."""

MAX_ROW_ERROR = 2.0**-11
"""The relative error that a row may have: what float16 costs at worst where no value is too small or too large."""

CHUNK_WEIGHTS = 1 << 21


def fits_f16(tensor: SourceTensor) -> bool:
    """Whether float16 holds a tensor as well as it holds ordinary numbers.

    No value may overflow, and in no row may the root mean square error, small values flushed to zero or to multiples of
    2^-24 included, exceed MAX_ROW_ERROR of the row's own root mean square. Tensors of other dtypes than BF16 and F32
    fit; so do those whose file is not there yet.
    """
    if tensor.dtype not in ("BF16", "F32") or not tensor.path.is_file():
        return True
    n_per_row = tensor.shape[-1]
    n_rows = tensor.n_bytes // tensor.row_bytes
    step = max(1, CHUNK_WEIGHTS // n_per_row)
    files = OffsetFiles("r")
    try:
        for first in range(0, n_rows, step):
            count = min(step, n_rows - first)
            raw = np.empty(count * tensor.row_bytes, np.uint8)
            n_read = files.read_into(tensor.path, tensor.offset + first * tensor.row_bytes, raw)
            if n_read < len(raw):
                return True  # the pipeline says what is wrong with the file
            if not rows_fit(widened(raw, tensor.dtype).reshape(count, n_per_row), exact=tensor.dtype == "BF16"):
                return False
    except OSError:
        return True
    finally:
        files.close()
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


def widened(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Bytes of a dtype of FLOAT_DTYPES as float32 values."""
    match dtype:
        case "F32":
            return raw.view("<f4")
        case "F16":
            return raw.view("<f2").astype(np.float32)
        case _:
            return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
