"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gguf3n.errors import UsageError
from gguf3n.recipes import PLE_TYPES, For, preset_names
from gguf3n.validation.result import Stage

TYPE_NAMES = ", ".join(preset_names())
MMPROJ_NAMES = ", ".join(preset_names(For.MMPROJ))
PLE_NAMES = ", ".join(qtype.name for qtype in PLE_TYPES)

Quants = Annotated[
    list[str] | None,
    typer.Option(
        "--quant", "-q", help=f"Quantization: a name or a recipe file; repeat for several files. {TYPE_NAMES}."
    ),
]


def _types(names: list[str] | None) -> list[str] | None:
    """Refuse an option where a type is to be, before it is missed elsewhere. Raises: UsageError."""
    for name in names or ():
        if name.startswith("-"):
            raise UsageError("--mmproj without a type", expected=MMPROJ_NAMES, found=name, fix="--mmproj F16")
    return names


Mmproj = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TYPE",
        callback=_types,
        help=f"Write the mmproj file, vision and audio, too; without --quant alone. Repeatable. {MMPROJ_NAMES}.",
    ),
]
NoVision = Annotated[bool, typer.Option("--no-vision", help="With --mmproj: leave the vision encoder out.")]
NoAudio = Annotated[
    bool,
    typer.Option("--no-audio", help="With --mmproj: leave the audio encoder out; llama.cpp does not run it."),
]
ForceTypes = Annotated[bool, typer.Option("--force-types", help="With --mmproj: write types that llama.cpp aborts on.")]
Like = Annotated[
    list[str] | None,
    typer.Option(
        help="Give each tensor the type it has in this GGUF file: a path, https URL or org/repo:QUANT; repeatable."
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(help="A PEFT adapter to merge into the checkpoint: a directory or a Hub id; repeatable, in order."),
]
AdapterScale = Annotated[float, typer.Option(metavar="X", help="How much of what adapters add is added.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A .gguf file or a directory.", show_default="./NAME-TYPE.gguf"),
]
Imatrix = Annotated[Path | None, typer.Option(help="Importance matrix of llama-imatrix (.gguf or .dat).")]
Refine = Annotated[
    Path | None,
    typer.Option(help="Correlations of gguf3n imatrix --correlations: choose codes for the matrices' outputs."),
]
Ple = Annotated[str | None, typer.Option(help=f"Type of per_layer_token_embd. {PLE_NAMES}.")]
TokenEmbd = Annotated[str | None, typer.Option(help="Type of token_embd.")]
TensorTypes = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type", help="PATTERN=TYPE, as in 'blk.*.attn_v.weight=Q8_0'; repeatable, the first match decides."
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Type of the matrices that are never quantized: f16 or bf16.", show_default="f16 where it holds them"
    ),
]
Against = Annotated[str | None, typer.Option(help="With --dry-run: show what differs from this quantization.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Workers.", show_default="processors + 2")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON result on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors and results.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Manifest = Annotated[
    bool,
    typer.Option("--manifest", help="Write a manifest beside each file: what it was made of, for `gguf3n verify`."),
]
Validate = Annotated[bool, typer.Option("--validate", help="Compare what was written with its source.")]
Stages = Annotated[
    str | None,
    typer.Option(
        help=f"What to validate, separated by commas: {', '.join(stage.value for stage in Stage)}.", show_default="all"
    ),
]
Report = Annotated[Path | None, typer.Option(help="Write a page with all numbers: FILE.html or FILE.md.")]
