"""`gguf3n sensitivity`: measure what each tensor costs in each type."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, print_json, print_note
from gguf3n.cli.paint import filled, say
from gguf3n.cli.progress import progress_bar
from gguf3n.conversion import read_source
from gguf3n.engines.activations import MIN_CTX, read_texts
from gguf3n.engines.reference import check_device
from gguf3n.errors import Interrupted, UsageError
from gguf3n.formats.imatrix import as_imatrix
from gguf3n.formats.sensitivity import (
    SCHEMA,
    Sensitivity,
    merge_sensitivities,
    read_sensitivity,
    write_sensitivity,
)
from gguf3n.formats.whole_file import check_not_input, check_output
from gguf3n.gemma3n.source import open_checkpoint
from gguf3n.tuning.costs import costs_of
from gguf3n.tuning.measure import BATCH, N_CHUNKS, N_CTX, TYPES, Measurement, measure_batches, parse_types

SHOWN = 8


def sensitivity(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, or a Hub id like google/gemma-3n-E4B-it.")],
    text: Annotated[list[Path], typer.Option("--text", help="A UTF-8 text file; repeatable, read as one text.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("sensitivity.json"),
    imatrix: Annotated[
        Path | None, typer.Option(help="What the file will be quantized with; some types need it.")
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(
            help=f"Types to measure, separated by commas. By default {', '.join(qtype.name for qtype in TYPES)}.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    ctx: Annotated[int, typer.Option(min=MIN_CTX, help="Tokens of a chunk.")] = N_CTX,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks to read; the error falls as their root.")] = N_CHUNKS,
    from_chunk: Annotated[int, typer.Option(min=0, help="Skip this many chunks at the start of the text.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Chunks to run together: more take memory and save time.")] = BATCH,
    seed: Annotated[int, typer.Option(min=0, help="Of the labels that are drawn.")] = 0,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read <start_of_turn> and the like in the text as control tokens.")
    ] = False,
    merge: Annotated[list[Path] | None, typer.Option(help="Add the sums of this file; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Measure what each tensor costs in each type, by gradients over text; gguf3n tune makes recipes of it.

    The file is written after every batch of chunks and on Ctrl-C.
    To go on from there, measure the rest with --from-chunk and --merge it.
    """
    if os.path.isfile(source):
        raise UsageError(
            f"{source}: a file", expected="a checkpoint directory, or a Hub id", fix="name what it was made from"
        )
    chosen = () if types is None else parse_types(types)
    check_not_input(output, *text, imatrix)  # not of --merge: to go on in one file is what is advised below
    check_output(output, force=force)
    earlier = [read_sensitivity(path) for path in merge or ()]
    read_texts(text)
    matrix = as_imatrix(imatrix)
    check_device(device, dtype)
    checkpoint = open_checkpoint(read_source(source, revision=revision, show_progress=not quiet))
    check_not_input(output, *checkpoint.files)

    def save(measured: Measurement) -> Sensitivity:
        nonlocal force
        merged = merge_sensitivities([*earlier, measured.sensitivity])
        write_sensitivity(merged, output, force=force)
        force = True
        return merged

    started = time.monotonic()
    measured = found = None
    try:
        with progress_bar(quiet=quiet) as progress:
            for measured in measure_batches(
                checkpoint,
                text,
                imatrix=matrix,
                types=chosen,
                n_ctx=ctx,
                n_chunks=chunks,
                first_chunk=from_chunk,
                batch=batch,
                seed=seed,
                special=parse_special,
                device=device,
                dtype=dtype,
                threads=threads,
                notice=lambda said: print_note("note", said, quiet=quiet),
                before=lambda planned: merge_sensitivities([*earlier, planned]),
                progress=progress,
            ):
                if found is None:
                    print_note("note", f"perplexity of the first chunks: {measured.perplexity:.4g}", quiet=quiet)
                found = save(measured)
    except KeyboardInterrupt:
        if measured is None:
            raise
        left = measured.n_chunks - measured.n_done
        raise Interrupted(
            f"interrupted after {measured.n_done:,} of {measured.n_chunks:,} chunks, which are in {output}",
            fix=f"go on with --from-chunk {from_chunk + measured.n_done} --chunks {left} --merge {output} --force",
        ) from None
    assert measured is not None and found is not None
    seconds = time.monotonic() - started
    if json:
        print_json(_as_json(found, output, measured, seconds))
        return
    say(str(output))
    together = f", {found.n_chunks:,} with those of {', '.join(map(str, merge))}" if merge else ""
    say(*filled(f"{len(found.tensors)} tensors, {measured.n_done:,} chunks of {ctx} tokens{together}"))
    say(*filled(f"perplexity {measured.perplexity:.4f}"))
    _print_kinds(found)
    say(f"{seconds:.1f} s")


def _print_kinds(found: Sensitivity) -> None:
    """What all matrices of a kind cost together in some types."""
    shown = found.types[:: max(1, -(-len(found.types) // SHOWN))]
    sums: dict[str, dict[str, float]] = {}
    for name, costs in costs_of(found).items():
        kind = sums.setdefault(name.removesuffix(".weight").rpartition(".")[2], {})
        for qtype, cost in costs.items():
            kind[qtype.name] = kind.get(qtype.name, 0.0) + cost
    say("", "cost of each kind of matrix, in thousandths of a nat a token:")
    rows = [("", *(qtype.name for qtype in shown))]
    rows += [
        (kind, *(f"{1000 * costs[qtype.name]:.3g}" if qtype.name in costs else "-" for qtype in shown))
        for kind, costs in sums.items()
    ]
    for line in columns(rows, "<" + ">" * len(shown)):
        say(line)
    say("")


def _as_json(found: Sensitivity, output: Path, measured: Measurement, seconds: float) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "path": str(output),
        "chunks": found.n_chunks,
        "chunks_measured": measured.n_done,
        "ctx": found.ctx,
        "seed": found.seed,
        "perplexity": measured.perplexity,
        "seconds": round(seconds, 3),
        "types": [qtype.name for qtype in found.types],
        "costs": {name: {qtype.name: cost for qtype, cost in costs.items()} for name, costs in costs_of(found).items()},
    }
