"""What is known of each ggml type that can be written: one row a type.

    weights      in a block; 1 where there are no blocks
    block        its bytes: fields in order, with numpy's codes; a scale is a float16 (`scales`)
    ftypes       file types whose files are mostly of this type, the usual one first
    importances  what they are to it, from an importance matrix
    rounding     the rule that its levels follow, and how many weights in a row share their levels or bits
    fallback     the type with blocks of 32 to take where rows hold no whole blocks
    refinable    whether its codes and scales can be chosen one by one, for the matrix's output (quants/unpacked.py)
    gathered     whether every engine and backend looks up rows of it fast, as in per_layer_token_embd

How weights are packed into a block is told by the type's module in quants/; what was measured of each type stands where
it is used: BANDS and LIMITS of validation/.

Source: ggml-common.h for blocks; llama_model_quantize_impl, tensor_type_fallback and tensor_requires_imatrix of
llama-quant.cpp for file types, fallbacks and importances; ggml_quantize_requires_imatrix for REQUIRED.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType as QType
from gguf.constants import LlamaFileType as Ftype


class Importances(enum.Enum):
    """What a type makes of the importances of columns."""

    IGNORED = "its bytes do not depend on them"
    USED = "better with them"
    NEEDED = "garbage without them, but for embedding tables: llama-quantize refuses"
    REQUIRED = "ggml does not quantize without them"


class Rounding(enum.Enum):
    """The rule that a type's levels follow."""

    NEAREST = "nearest level"
    SIGN = "same sign"
    PARITY = "one sign in eight"


@dataclass(frozen=True)
class GgmlType:
    """One row of the table; its module says what the columns are."""

    weights: int
    block: np.dtype[np.void]
    ftypes: tuple[Ftype, ...]
    importances: Importances
    rounding: tuple[Rounding, int] | None = None
    fallback: QType | None = None
    gathered: bool = False
    refinable: bool = False

    @property
    def block_bytes(self) -> int:
        return self.block.itemsize

    @property
    def scales(self) -> tuple[str, ...]:
        """The fields of a block that are float16 scales.

        # ggml quirk: IQ1_M has none; its scale is spread over the upper four bits of its four words.
        """
        kinds = {name: self.block[name] for name in self.block.names or ()}
        return tuple(name for name, kind in kinds.items() if kind == np.float16 and self.weights > 1)

    @property
    def ftype(self) -> Ftype:
        """The file type of a file that is mostly of this type."""
        return self.ftypes[0]

    @property
    def needs_importances(self) -> bool:
        """Whether it is garbage without them, but for embedding tables."""
        return self.importances in (Importances.NEEDED, Importances.REQUIRED)


def _block(**fields: str) -> np.dtype[np.void]:
    return np.dtype(list(fields.items()))


NO, USED, NEEDED, REQUIRED = Importances
NEAREST, SIGN, PARITY = Rounding
Q4_0, Q5_0, Q5_1, Q8_0, IQ4_NL = QType.Q4_0, QType.Q5_0, QType.Q5_1, QType.Q8_0, QType.IQ4_NL

# fmt: off
GGML_TYPES: Mapping[QType, GgmlType] = {
    QType.F32: GgmlType(1, _block(x="<f4"), (Ftype.ALL_F32,), NO, gathered=True),
    QType.F16: GgmlType(1, _block(x="<f2"), (Ftype.MOSTLY_F16,), NO, gathered=True),
    QType.BF16: GgmlType(1, _block(x="<u2"), (Ftype.MOSTLY_BF16,), NO, gathered=True),
    QType.Q8_0: GgmlType(32, _block(d="<f2", qs="32i1"),
                         (Ftype.MOSTLY_Q8_0,), NO, (NEAREST, 32), gathered=True),
    QType.Q6_K: GgmlType(256, _block(ql="128u1", qh="64u1", scales="16i1", d="<f2"),
                         (Ftype.MOSTLY_Q6_K,), USED, (NEAREST, 16), Q8_0, refinable=True),
    QType.Q5_K: GgmlType(256, _block(d="<f2", dmin="<f2", scales="12u1", qh="32u1", qs="128u1"),
                         (Ftype.MOSTLY_Q5_K_M, Ftype.MOSTLY_Q5_K_S), USED, (NEAREST, 32), Q5_1, refinable=True),
    QType.Q5_1: GgmlType(32, _block(d="<f2", m="<f2", qh="4u1", qs="16u1"),
                         (Ftype.MOSTLY_Q5_1,), USED, (NEAREST, 32), gathered=True, refinable=True),
    QType.Q5_0: GgmlType(32, _block(d="<f2", qh="4u1", qs="16u1"),
                         (Ftype.MOSTLY_Q5_0,), USED, (NEAREST, 32), gathered=True, refinable=True),
    QType.Q4_K: GgmlType(256, _block(d="<f2", dmin="<f2", scales="12u1", qs="128u1"),
                         (Ftype.MOSTLY_Q4_K_M, Ftype.MOSTLY_Q4_K_S), USED, (NEAREST, 32), Q5_0, refinable=True),
    QType.Q4_1: GgmlType(32, _block(d="<f2", m="<f2", qs="16u1"),
                         (Ftype.MOSTLY_Q4_1,), USED, (NEAREST, 32), gathered=True, refinable=True),
    QType.Q4_0: GgmlType(32, _block(d="<f2", qs="16u1"),
                         (Ftype.MOSTLY_Q4_0,), USED, (NEAREST, 32), gathered=True, refinable=True),
    QType.IQ4_NL: GgmlType(32, _block(d="<f2", qs="16u1"),
                           (Ftype.MOSTLY_IQ4_NL,), USED, (NEAREST, 32), refinable=True),
    QType.IQ4_XS: GgmlType(256, _block(d="<f2", scales_h="<u2", scales_l="4u1", qs="128u1"),
                           (Ftype.MOSTLY_IQ4_XS,), USED, (NEAREST, 32), IQ4_NL, refinable=True),
    QType.Q3_K: GgmlType(256, _block(hmask="32u1", qs="64u1", scales="12u1", d="<f2"),
                         (Ftype.MOSTLY_Q3_K_M, Ftype.MOSTLY_Q3_K_S, Ftype.MOSTLY_Q3_K_L), USED, (NEAREST, 16), Q4_0,
                         refinable=True),
    QType.IQ3_S: GgmlType(256, _block(d="<f2", qs="64u1", qh="8u1", signs="32u1", scales="4u1"),
                          (Ftype.MOSTLY_IQ3_S, Ftype.MOSTLY_IQ3_XS, Ftype.MOSTLY_IQ3_M), USED, (SIGN, 1), IQ4_NL),
    QType.IQ3_XXS: GgmlType(256, _block(d="<f2", qs="64u1", scales_and_signs="8<u4"),
                            (Ftype.MOSTLY_IQ3_XXS,), NEEDED, (PARITY, 8), IQ4_NL),
    QType.Q2_K: GgmlType(256, _block(scales="16u1", qs="64u1", d="<f2", dmin="<f2"),
                         (Ftype.MOSTLY_Q2_K, Ftype.MOSTLY_Q2_K_S), USED, (NEAREST, 16), Q4_0, refinable=True),
    # ggml quirk: files of the file type IQ2_S are mostly IQ2_XS, those of IQ2_M are IQ2_S.
    QType.IQ2_S: GgmlType(256, _block(d="<f2", qs="32u1", signs="32u1", qh="8u1", scales="8u1"),
                          (Ftype.MOSTLY_IQ2_M,), NEEDED, (SIGN, 1), IQ4_NL),
    QType.IQ2_XS: GgmlType(256, _block(d="<f2", qs="32<u2", scales="8u1"),
                           (Ftype.MOSTLY_IQ2_XS, Ftype.MOSTLY_IQ2_S), REQUIRED, (PARITY, 8), IQ4_NL),
    QType.IQ2_XXS: GgmlType(256, _block(d="<f2", qs="16<u4"),
                            (Ftype.MOSTLY_IQ2_XXS,), REQUIRED, (PARITY, 8), IQ4_NL),
    QType.IQ1_M: GgmlType(256, _block(qs="32u1", qh="16u1", scales="4<u2"),
                          (Ftype.MOSTLY_IQ1_M,), NEEDED, None, IQ4_NL),
    QType.IQ1_S: GgmlType(256, _block(d="<f2", qs="32u1", qh="8<u2"),
                          (Ftype.MOSTLY_IQ1_S,), REQUIRED, None, IQ4_NL),
    QType.TQ2_0: GgmlType(256, _block(qs="64u1", d="<f2"),
                          (Ftype.MOSTLY_TQ2_0,), NO, (NEAREST, 32), Q4_0),
    QType.TQ1_0: GgmlType(256, _block(qs="48u1", qh="4u1", d="<f2"),
                          (Ftype.MOSTLY_TQ1_0,), NO, (NEAREST, 32), Q4_0),
}
# fmt: on
"""The types that can be written, in the order in which they are told."""

TYPE_OF_FTYPE: Mapping[Ftype, QType] = {ftype: qtype for qtype, row in GGML_TYPES.items() for ftype in row.ftypes}
"""The type that a file of each file type is mostly of."""
