"""llama.cpp's own quantizers, called through ctypes in the shared object of the `xllamacpp` wheel.

The wheel exports ggml's C symbols and is built without FMA contraction, so its bytes are the reference for ours.
xllamacpp is imported on first use; nothing else in the package needs it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.errors import UsageError


@functools.cache
def library() -> ctypes.CDLL:
    """The wheel's shared object, with the signatures of the functions below.

    Raises: UsageError where xllamacpp is not installed; OSError or AttributeError where the wheel exports nothing, as
        on Windows.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise UsageError(
            "llama.cpp cannot be called: no module xllamacpp", fix="pip install 'gguf3n[validate]'"
        ) from error
    path = next(Path(str(xllamacpp.__file__)).parent.glob("xllamacpp*.so"), None)
    if path is None:
        raise OSError("the xllamacpp wheel has no shared object that can be called")
    lib = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return lib


def row_bytes(qtype: QType, n_per_row: int) -> int:
    """Bytes of one quantized row."""
    block_size, block_bytes = GGML_QUANT_SIZES[qtype]
    return int(n_per_row // block_size * block_bytes)


def requires_quant_weights(qtype: QType) -> bool:
    """Whether ggml refuses (aborts, in fact) to write this type without quant_weights."""
    return bool(library().ggml_quantize_requires_imatrix(int(qtype)))


def quantize_into(rows: np.ndarray, qtype: QType, out: np.ndarray, quant_weights: np.ndarray | None = None) -> None:
    """ggml_quantize_chunk without any checks; the call to time.

    Shapes: rows float32[n_rows, n_per_row], quant_weights float32[n_per_row], out uint8[n_rows, row_bytes]; contiguous.
    """
    n_rows, n_per_row = rows.shape
    weights = None if quant_weights is None else quant_weights.ctypes.data
    library().ggml_quantize_chunk(int(qtype), rows.ctypes.data, out.ctypes.data, 0, n_rows, n_per_row, weights)


def quantize(rows: np.ndarray, qtype: QType, quant_weights: np.ndarray | None = None) -> np.ndarray:
    """Quantize with ggml: float32[n_rows, n_per_row] -> uint8[n_rows, row_bytes]."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    n_rows, n_per_row = rows.shape
    if quant_weights is not None:
        quant_weights = np.ascontiguousarray(quant_weights, dtype=np.float32)
        if quant_weights.shape != (n_per_row,):
            raise ValueError(f"quant_weights of shape {quant_weights.shape} for rows of {n_per_row}")
    elif requires_quant_weights(qtype):
        raise ValueError(f"ggml writes {qtype.name} only with quant_weights")
    out = np.zeros((n_rows, row_bytes(qtype, n_per_row)), dtype=np.uint8)
    quantize_into(rows, qtype, out, quant_weights)
    return out


def dequantize_into(blocks: np.ndarray, qtype: QType, out: np.ndarray) -> None:
    """ggml's dequantize_row without any checks; not for F32.

    Shapes: blocks uint8, out float32, contiguous, both of the same weights.
    """
    names = {QType.F16: "ggml_fp16_to_fp32_row", QType.BF16: "ggml_bf16_to_fp32_row"}
    spelled = qtype.name if qtype.name.endswith("_K") else qtype.name.lower()
    function = getattr(library(), names.get(qtype, f"dequantize_row_{spelled.replace('Q', 'q', 1)}"))
    function(ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))


def dequantize(blocks: np.ndarray, qtype: QType) -> np.ndarray:
    """Dequantize with ggml: uint8[n_rows, row_bytes] -> float32[n_rows, n_per_row]; not for F32."""
    blocks = np.ascontiguousarray(blocks, dtype=np.uint8)
    block_size, block_bytes = GGML_QUANT_SIZES[qtype]
    out = np.empty((blocks.shape[0], blocks.shape[1] // block_bytes * block_size), dtype=np.float32)
    dequantize_into(blocks, qtype, out)
    return out
