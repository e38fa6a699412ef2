"""Every type's bytes for a mix of rows, as numba compiles for the processor that the environment names.

    python -m tests.quants.quantize_mix MIX.npz             an array a type and mode, and "registers": the kernels'
    python -m tests.quants.quantize_mix MIX.npz Q4_K IQ3_S  of these types
    python -m tests.quants.quantize_mix MIX.npz --not-huge  without the rows that gguf3n.quantize refuses

Run by test_cpu_targets and by scripts/compare_aarch64.py, in processes of its own.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.quants import descent, iq2, q4_k, q8_0
from gguf3n.quants.api import LARGEST_HALF
from gguf3n.quants.refinement import refine_rows
from gguf3n.quants.unpacked import PARTS
from tests import refining
from tests.quants import inputs
from tests.quants.test_contract import ABORTING, MODES, mode_name, quantize

N_PER_ROW = 512
KERNELS = (q4_k.quantize, q8_0.quantize, iq2.evaluate, descent.descend)


def mixed_rows(qtype: QType, *, huge: bool = True) -> np.ndarray:
    """Two rows of every family that ggml survives."""
    families = [family for family in inputs.ROWS if family != "huge" or (huge and qtype not in ABORTING)]
    return np.concatenate([inputs.rows(family, 2, N_PER_ROW) for family in families])


def mixed_weights(weighted: bool) -> list[np.ndarray | None]:
    """Every family of quant_weights, or none."""
    return [inputs.quant_weights(family, N_PER_ROW) for family in inputs.WEIGHTS] if weighted else [None]


def refined_mix(qtype: QType) -> np.ndarray:
    """Blocks of rows that the type holds, their codes refined."""
    rows = np.concatenate([rows for rows in np.split(mixed_rows(QType.Q4_0), len(inputs.ROWS)) if fits(rows)])
    sums = refining.sums_of(refining.inputs(N_PER_ROW))
    blocks = quantize(rows, qtype, None)
    refine_rows(rows, qtype, refining.of_arrays({"x": sums}).matrix("x"), blocks)
    return blocks


def fits(rows: np.ndarray) -> bool:
    return bool(np.abs(rows).max() < LARGEST_HALF)


def main(path: str, types: Sequence[str], *, huge: bool) -> None:
    made = {
        mode_name(qtype, weighted): np.stack(
            [quantize(mixed_rows(qtype, huge=huge), qtype, quant_weights) for quant_weights in mixed_weights(weighted)]
        )
        for qtype, weighted in MODES
        if not types or qtype.name in types
    }
    made |= {f"refined {qtype.name}": refined_mix(qtype) for qtype in PARTS if not types or qtype.name in types}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # kernels from a cache have none; test_cpu_targets uses new caches
        assembly = "".join(text for kernel in KERNELS for text in kernel.inspect_asm().values())
    registers = sorted({register[:3] for register in re.findall(r"%[xyz]mm\d+", assembly)})
    np.savez(path, registers=np.array(registers), **made)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("types", nargs="*")
    parser.add_argument("--not-huge", dest="huge", action="store_false")
    main(**vars(parser.parse_args()))
