"""`gguf3n quantize`: a GGUF file to others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gguf3n.cli.writing import Writing, write_or_show
from gguf3n.conversion import read_gguf
from gguf3n.gemma3n.part import PartKind


def quantize(
    source: Annotated[Path, typer.Argument(help="A GGUF file in F32, F16 or BF16, or any part of a split one.")],
    wanted: Writing,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Take a source that is quantized already; quality is lost twice.")
    ] = False,
) -> None:
    """Quantize a GGUF file of Gemma 3n to one file, or to several from one read."""
    kinds = [PartKind.TEXT] if wanted.quant or wanted.like else []
    if wanted.mmproj:
        kinds.append(PartKind.MMPROJ)
    write_or_show(lambda _: read_gguf(source, allow_requantize=allow_requantize, kinds=kinds), wanted)
