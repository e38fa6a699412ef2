"""Compiles every quantizer once, so that what starts later finds them in numba's cache: for images and CI.

    python scripts/compile_quantizers.py

The cache is for this processor: on another kind the first run compiles again.
"""

from __future__ import annotations

import numpy as np

import gguf3n
from gguf3n.quants import QUANTIZERS

ROW = 256
"""Weights: one of the largest blocks."""


def main() -> None:
    rows = np.linspace(-1, 1, 16 * ROW, dtype=np.float32).reshape(16, ROW)
    importances = np.ones(ROW, np.float32)
    for qtype, quantizer in QUANTIZERS.items():
        if quantizer.plain is not None:
            gguf3n.quantize(rows, qtype)
        if quantizer.weighted is not None:
            gguf3n.quantize(rows, qtype, importances)
    print(f"{len(QUANTIZERS)} quantizers compiled")


if __name__ == "__main__":
    main()
