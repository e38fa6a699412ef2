"""An adapter to a GGUF file that llama.cpp loads beside the model, all in one call."""

from __future__ import annotations

from pathlib import Path

from gguf.constants import LlamaFileType

from gguf3n.conversion import Conversion, write
from gguf3n.errors import UsageError
from gguf3n.gemma3n.adapter import read_adapter
from gguf3n.gemma3n.lora import QTYPES
from gguf3n.gemma3n.lora_part import lora_part
from gguf3n.gemma3n.source import Source, open_source
from gguf3n.planning import Plan, linted, make_plan
from gguf3n.progress import OnProgress
from gguf3n.recipes import Recipe

TYPES = tuple(qtype.name for qtype in QTYPES)


def plan_adapter(
    adapter: str | Path,
    qtype: str = "F32",
    *,
    base: str | Path | Source | None = None,
    scale: float = 1.0,
    drop_unsupported: bool = False,
    show_progress: bool = False,
) -> Plan:
    """What `convert_adapter` would write; reads no weights.

    Args:
        adapter: a directory with a PEFT adapter, or a Hub id.
        qtype: F32, F16, BF16 or Q8_0; rows that hold no blocks of Q8_0 are F16.
        base: the model that it is for, to hold names and shapes against: a checkpoint, a Hub id or a GGUF file.
        scale: how much of what it adds is added.
        drop_unsupported: leave out what llama.cpp does not apply, instead of refusing the adapter.
        show_progress: show huggingface_hub's progress bars.

    Raises: UsageError; SourceError or a class below it, also for an adapter that llama.cpp does not apply all of;
        HubError; GGUFError for the base.
    """
    if qtype.upper() not in TYPES:
        raise UsageError(f"--type {qtype}: adapters are not written in it", expected=", ".join(TYPES))
    read = read_adapter(adapter, show_progress=show_progress)
    opened = None if base is None else open_source(base, weights=False, show_progress=show_progress)
    part = lora_part(read, opened, scale=scale, drop_unsupported=drop_unsupported)
    chosen = QTYPES[TYPES.index(qtype.upper())]
    recipe = Recipe(chosen.name, chosen, LlamaFileType.GUESSED)
    return linted([make_plan(part, recipe)])[0]


def convert_adapter(
    adapter: str | Path,
    qtype: str = "F32",
    output: str | Path | None = None,
    *,
    base: str | Path | Source | None = None,
    scale: float = 1.0,
    drop_unsupported: bool = False,
    threads: int | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> Conversion:
    """Write a PEFT adapter as a GGUF file that llama.cpp loads with --lora, with the scale that it was trained with.

    Args:
        output: a file name ending in .gguf, a directory, or None for NAME-TYPE-LoRA.gguf here.
        threads, force: as for `parse_options`.
        progress: called about ten times a second.
        adapter and the others: as for `plan_adapter`.

    Raises: as `plan_adapter`; QuantizationError, OutputError, Interrupted. No file stands under its final name unless
        it is complete.
    """
    plan = plan_adapter(adapter, qtype, base=base, scale=scale, drop_unsupported=drop_unsupported)
    return write([plan], output, threads=threads, force=force, progress=progress)[0]
