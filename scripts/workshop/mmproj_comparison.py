"""Holds our mmproj files against those of llama.cpp's converter, whose faults are mended (see mended_converter.py).

Asked for the converter's types, which llama.cpp can't all run, we write the same file to the byte. Our own recipes
differ in the types of some tensors, by what llama.cpp runs.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import gguf3n
from workshop import llama_cpp_tools
from workshop.places import FIXTURES

GOLDEN = FIXTURES / "llama_cpp" / "mmproj.json"

DEPTHWISE = ("v.blk.*.dw_*.conv.weight", "v.blk.*.down_conv.weight")
CONVOLUTIONS = (
    "v.blk.*.conv_*.weight",
    "v.blk.*.pw_*.conv.weight",
    "v.blk.*.attn.*.proj.weight",
    "v.msfa.*.conv.weight",
)
ALWAYS_F16 = "a.pre_encode.out.weight=F16"


def _types(depthwise: str, convolutions: str) -> tuple[str, ...]:
    kinds = ((DEPTHWISE, depthwise), (CONVOLUTIONS, convolutions))
    return (*(f"{pattern}={qtype}" for patterns, qtype in kinds for pattern in patterns), ALWAYS_F16)


THEIR_TYPES = {
    "F32": _types("F32", "F32"),
    "F16": _types("F16", "F16"),
    "BF16": _types("BF16", "BF16"),
    "Q8_0": _types("F16", "F16"),
}
"""Type of the converter -> what makes our recipe of that name choose as it does, tensor by tensor."""


def convert_ours(source: Path, quant: str, output: Path) -> None:
    """Write our file with the converter's types."""
    types = THEIR_TYPES[quant]
    gguf3n.convert(source, output=output, mmproj=quant, tensor_types=types, force_types=True, force=True)


def convert_theirs(source: Path, quant: str, output: Path) -> None:
    """Write the file of llama.cpp's converter, its faults mended."""
    mended = Path(__file__).with_name("mended_converter.py")
    command = [sys.executable, str(mended), str(llama_cpp_tools.converter()), str(source), "--mmproj"]
    llama_cpp_tools.run([*command, "--outfile", str(output), "--outtype", quant.lower()])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
