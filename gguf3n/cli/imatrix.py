"""`gguf3n imatrix`: measure an importance matrix, look into one, add several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gguf3n.cli import options
from gguf3n.cli.console import columns, human_bytes, print_json, print_note
from gguf3n.cli.paint import filled, line_width, paint, say
from gguf3n.cli.progress import progress_bar
from gguf3n.conversion import read_source
from gguf3n.engines.activations import (
    BLOCKS,
    MIN_CTX,
    N_CTX,
    WIDTHS,
    Measurement,
    measure_chunks,
    measuring,
    read_texts,
)
from gguf3n.engines.reference import check_device
from gguf3n.errors import Interrupted, UsageError
from gguf3n.formats.correlations import (
    Correlations,
    correlations_path,
    is_correlations,
    merge_correlations,
    read_correlations,
    write_correlations,
)
from gguf3n.formats.correlations import Entry as CorrelationsEntry
from gguf3n.formats.imatrix import LEGACY_CHUNK_SIZE, ImportanceMatrix, merge_imatrices, read_imatrix, write_imatrix
from gguf3n.formats.whole_file import check_not_input, check_output
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.refinement import match_correlations
from gguf3n.gemma3n.source import open_checkpoint
from gguf3n.inspection.imatrix_statistics import EntryStatistics, ImatrixStatistics, imatrix_statistics
from gguf3n.outside import printable
from gguf3n.progress import Meter

SCHEMA = "gguf3n.imatrix/1"
CORRELATIONS_SCHEMA = "gguf3n.correlations/1"
SAVE_EVERY = 10
"""As often as llama-imatrix saves what it has."""

MEASURE = "measure"


CORRELATIONS = "--correlations"


class Group(TyperGroup):
    """Takes `imatrix SRC …` for `imatrix measure SRC …`, and `--correlations` for `--correlations blocks`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [MEASURE, *args]
        for place, following in reversed(list(enumerate([*args[1:], ""]))):
            if args[place] == CORRELATIONS and following not in WIDTHS:
                args = [*args[: place + 1], BLOCKS, *args[place + 1 :]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="imatrix",
    cls=Group,
    help="Measure, show and merge importance matrices.",
    epilog="gguf3n imatrix SRC … is gguf3n imatrix measure SRC …; see gguf3n imatrix measure --help.",
    no_args_is_help=True,
    add_completion=False,
)

Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]


def measure(
    source: Annotated[
        str, typer.Argument(help="A checkpoint, a training's folder, or a Hub id like google/gemma-3n-E4B-it.")
    ],
    text: Annotated[list[Path], typer.Option("--text", help="A UTF-8 text file; repeatable, read as one text.")],
    output: Output = Path("imatrix.gguf"),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    adapter: options.Adapters = None,
    adapter_scale: options.AdapterScale = 1.0,
    ctx: Annotated[int, typer.Option(min=MIN_CTX, help="Tokens of a chunk.")] = N_CTX,
    chunks: Annotated[int | None, typer.Option(min=1, help="Chunks to read.", show_default="all")] = None,
    from_chunk: Annotated[int, typer.Option(min=0, help="Skip this many chunks at the start of the text.")] = 0,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read <start_of_turn> and the like in the text as control tokens.")
    ] = False,
    layers_only: Annotated[
        bool, typer.Option("--layers-only", help="Leave out the embedding tables, as llama-imatrix does.")
    ] = False,
    correlations: Annotated[
        str | None,
        typer.Option(
            metavar="[full]",
            help="Write the correlations for --refine too, beside the importances: in blocks of 256 columns, or whole.",
        ),
    ] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="Add the counts of this file; repeatable.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Write the file after every so many chunks.")] = SAVE_EVERY,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Run a checkpoint over text and record how strongly each column is used.

    The file is also written after every --save-every chunks and on Ctrl-C.
    To go on from there, measure the rest with --from-chunk and --merge it.
    """
    if os.path.isfile(source):
        raise UsageError(
            f"{source}: a file", expected="a checkpoint directory, or a Hub id", fix="for a GGUF file use llama-imatrix"
        )
    check_not_input(output, *text)  # not of --merge: to go on in one file is what is advised below
    _check_output(output, force=force)
    beside = correlations_path(output)
    if correlations is not None:
        check_not_input(beside, *text)
        check_output(beside, force=force)
    earlier = [read_imatrix(path) for path in merge or ()]
    earlier_correlations = [] if correlations is None else [_correlations_of(imatrix) for imatrix in earlier]
    _check_ctx(earlier, ctx)
    read_texts(text)
    check_device(device, dtype)
    checkpoint = open_checkpoint(
        read_source(
            source, revision=revision, adapters=adapter or (), adapter_scale=adapter_scale, show_progress=not quiet
        )
    )
    for said in checkpoint.notices:
        print_note("note", said, quiet=quiet)
    check_not_input(output, *checkpoint.files)
    if correlations is not None:
        check_not_input(beside, *checkpoint.files)
    for notice in checkpoint.notices:
        print_note("note", notice, quiet=quiet)
    if earlier:
        part = text_part(checkpoint)
        for imatrix in earlier:
            match_importance(imatrix, part)
        for each in earlier_correlations:
            match_correlations(each, part)

    def save(measured: Measurement) -> ImportanceMatrix:
        nonlocal force
        imatrix = merge_imatrices([*earlier, measured.imatrix], chunk_size=ctx)
        write_imatrix(imatrix, output, force=force)
        if measured.correlations is not None:
            write_correlations(merge_correlations([*earlier_correlations, measured.correlations]), beside, force=force)
        force = True
        return replace(imatrix, path=output)

    started = time.monotonic()
    measured = None
    try:
        with progress_bar(quiet=quiet) as progress:
            meter: Meter | None = None
            for measured in measure_chunks(
                checkpoint,
                text,
                n_ctx=ctx,
                n_chunks=chunks,
                first_chunk=from_chunk,
                special=parse_special,
                tables=not layers_only,
                correlations=correlations,
                device=device,
                dtype=dtype,
                notice=lambda text: print_note("note", text, quiet=quiet),
            ):
                if measured.n_done == 1:
                    print_note("note", f"perplexity of the first chunk: {measured.perplexity:.4g}", quiet=quiet)
                meter = meter or measuring(measured.n_chunks, progress)
                meter.advance()
                if measured.n_done % save_every == 0:
                    save(measured)
    except KeyboardInterrupt:
        if measured is None:
            raise
        save(measured)
        left = "" if chunks is None else f" --chunks {measured.n_chunks - measured.n_done}"
        raise Interrupted(
            f"interrupted after {measured.n_done:,} of {measured.n_chunks:,} chunks, which are in {output}",
            fix=f"go on with --from-chunk {from_chunk + measured.n_done}{left} --merge {output} --force"
            + ("" if correlations is None else f" {CORRELATIONS} {correlations}"),
        ) from None
    assert measured is not None
    imatrix = save(measured)
    seconds = time.monotonic() - started
    if json:
        written = None if correlations is None else str(beside)
        print_json({**_measured_json(measured, imatrix, seconds), "correlations": written})
        return
    of = f", {imatrix.n_chunks:,} with those of {_names(merge)}" if merge else ""
    say(str(output))
    say(*filled(f"{len(imatrix.entries)} entries, {measured.n_done:,} chunks of {ctx} tokens{of}"))
    if measured.correlations is not None:
        say(str(beside))
        size = human_bytes(measured.correlations.total_bytes)
        say(*filled(f"correlations of {len(measured.correlations.entries)} inputs, {size}"))
    say(*filled(f"perplexity {measured.perplexity:.4f}"))
    share = len(measured.seen) / measured.n_vocab
    say(*filled(f"{len(measured.seen):,} of {measured.n_vocab:,} tokens of the vocabulary seen ({share:.1%})"))
    say(f"{seconds:.1f} s")


def _check_output(output: Path, *, force: bool) -> None:
    """See that the file can be written, before any work. Raises: UsageError, OutputError."""
    if output.suffix == ".dat":
        raise UsageError(f"{output}: .dat is the name of the legacy form", fix="give a name in .gguf")
    check_output(output, force=force)


def _correlations_of(imatrix: ImportanceMatrix) -> Correlations:
    """Those that were measured with an importance matrix. Raises: GGUFError; UsageError for those of other chunks."""
    found = read_correlations(correlations_path(imatrix.path))
    if found.n_chunks != imatrix.n_chunks:
        raise UsageError(
            f"{found.path}: not measured together with {imatrix.path}",
            expected=f"{imatrix.n_chunks:,} chunks",
            found=f"{found.n_chunks:,}",
            fix="merge files of one measurement",
        )
    return found


def show(
    file: Annotated[Path, typer.Argument(help="An importance matrix, .gguf or .dat, or correlations.")],
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Show the statistics of each entry and layer, as llama-imatrix does.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Show what an importance matrix was measured on and what it covers."""
    if is_correlations(file):
        _show_correlations(read_correlations(file), statistics=statistics, json=json)
        return
    imatrix = read_imatrix(file)
    found = imatrix_statistics(imatrix) if statistics else None
    if json:
        print_json(_as_json(imatrix, found))
        return
    say(paint(str(file), "bold"))
    for line in columns(_facts(imatrix), "<<"):
        say(line)
    for dataset in imatrix.datasets:
        say(*filled(dataset))
    say("")
    if found is None:
        for line in columns([("matrix", "entries", "columns", "inputs"), *_kinds(imatrix)], "<>>>"):
            say(line)
        return
    wide = line_width() >= FULL_WIDTH
    shown = [column for column in COLUMNS if wide or column[3]]
    rows = [tuple(name for name, *_ in shown)]
    rows += [tuple(text(entry) for _, _, text, _ in shown) for entry in found.entries]
    for line in columns(rows, "".join(align for _, align, *_ in shown)):
        say(line)
    say("")
    layers = [("layer", "total", "zd %", "cosine")]
    layers += [(str(each.bid), _g(each.total), _share(each.zd), _cosine(each.cosine)) for each in found.layers]
    for line in columns(layers, ">>>>"):
        say(line)


def merge(
    files: Annotated[list[Path], typer.Argument(help="Importance matrices of one model, or correlations of one.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    ctx: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a chunk in .dat files.", show_default=f"the others', or {LEGACY_CHUNK_SIZE}"
        ),
    ] = None,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Add several importance matrices, as if their texts had been measured together; .dat files become GGUF."""
    check_not_input(output, *files)
    _check_output(output, force=force)
    if any(map(is_correlations, files)):
        if ctx is not None:
            raise UsageError("--ctx is for .dat files", fix="leave it out")
        added = merge_correlations([read_correlations(path) for path in files])
        write_correlations(added, output, force=force)
        added = replace(added, path=output)
        if json:
            print_json(_correlations_json(added))
            return
        say(str(output))
        say(*filled(f"{len(added.entries)} entries, {added.n_chunks:,} chunks of {added.chunk_size} tokens"))
        return
    merged = merge_imatrices([read_imatrix(path) for path in files], chunk_size=ctx)
    write_imatrix(merged, output, force=force)
    merged = replace(merged, path=output)
    if json:
        print_json(_as_json(merged, None))
        return
    say(str(output))
    say(*filled(f"{len(merged.entries)} entries, {merged.n_chunks:,} chunks of {merged.chunk_size} tokens"))


def _show_correlations(found: Correlations, *, statistics: bool, json: bool) -> None:
    if statistics:
        raise UsageError(f"{found.path}: correlations", expected="an importance matrix, to show statistics of")
    if json:
        print_json(_correlations_json(found))
        return
    size = f" of {found.chunk_size} tokens" if found.chunk_size else ""
    say(paint(str(found.path), "bold"))
    facts = (
        ("form", "correlations"),
        ("entries", str(len(found.entries))),
        ("chunks", f"{found.n_chunks:,}{size}" if found.n_chunks else "not known"),
        ("texts", str(len(found.datasets))),
        ("size", human_bytes(found.total_bytes)),
    )
    for line in columns(facts, "<<"):
        say(line)
    for dataset in found.datasets:
        say(*filled(dataset))
    say("")
    kinds: dict[str, list[CorrelationsEntry]] = {}
    for name, entry in sorted(found.entries.items()):
        kinds.setdefault(_kind(name), []).append(entry)
    rows = [("input of", "entries", "columns", "block", "inputs")]
    for kind, entries in kinds.items():
        n_columns, widths = _span({each.n_columns for each in entries}), _span({each.width for each in entries})
        counts = _span({int(each.count) for each in entries})
        rows.append((printable(kind), str(len(entries)), n_columns, widths, counts))
    for line in columns(rows, "<>>>>"):
        say(line)


def _kind(name: str) -> str:
    """As in "attn_q" for "blk.3.attn_q.weight"."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _correlations_json(found: Correlations) -> dict[str, Any]:
    return {
        "schema": CORRELATIONS_SCHEMA,
        "path": str(found.path),
        "datasets": list(found.datasets),
        "chunks": found.n_chunks,
        "chunk_size": found.chunk_size,
        "bytes": found.total_bytes,
        "entries": [
            {"name": name, "columns": entry.n_columns, "width": entry.width, "count": int(entry.count)}
            for name, entry in sorted(found.entries.items())
        ],
    }


def _check_ctx(earlier: Sequence[ImportanceMatrix], ctx: int) -> None:
    """Refuse what could not be merged, before any work is done."""
    for imatrix in earlier:
        if imatrix.chunk_size not in (0, ctx):
            raise UsageError(
                f"--merge {imatrix.path}: measured with chunks of another size",
                expected=f"--ctx {imatrix.chunk_size}",
                found=f"--ctx {ctx}",
            )


def _names(paths: Sequence[Path] | None) -> str:
    return ", ".join(map(str, paths or ()))


def _facts(imatrix: ImportanceMatrix) -> list[tuple[str, str]]:
    form = "legacy .dat" if imatrix.is_legacy else "GGUF"
    size = f" of {imatrix.chunk_size} tokens" if imatrix.chunk_size else ""
    return [
        ("form", form),
        ("entries", str(len(imatrix.entries))),
        ("chunks", f"{imatrix.n_chunks:,}{size}" if imatrix.n_chunks else "not known"),
        ("texts", str(len(imatrix.datasets))),
    ]


def _kinds(imatrix: ImportanceMatrix) -> list[tuple[str, str, str, str]]:
    """A row for each matrix of a layer: how many entries, their columns, how many inputs were summed."""
    kinds: dict[str, list[Any]] = {}
    for name, entry in sorted(imatrix.entries.items()):
        kinds.setdefault(_kind(name), []).append(entry)
    return [
        (
            printable(kind),
            str(len(entries)),
            _span({entry.sums.shape[-1] for entry in entries}),
            _span({int(count) for entry in entries for count in entry.counts}),
        )
        for kind, entries in kinds.items()
    ]


def _span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _g(value: float) -> str:
    return f"{value:.3g}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


COLUMNS: tuple[tuple[str, str, Callable[[EntryStatistics], str], bool], ...] = (
    ("layer", ">", lambda each: "-" if each.bid is None else str(each.bid), True),
    ("matrix", "<", lambda each: printable(each.tensor), True),
    ("total", ">", lambda each: _g(each.total), True),
    ("min", ">", lambda each: _g(each.minimum), False),
    ("max", ">", lambda each: _g(each.maximum), True),
    ("mean", ">", lambda each: _g(each.mean), True),
    ("dev", ">", lambda each: _g(each.deviation), False),
    ("active %", ">", lambda each: _share(each.active), False),
    ("n", ">", lambda each: str(each.n), False),
    ("entropy", ">", lambda each: f"{each.entropy:.4f}", False),
    ("even %", ">", lambda each: _share(each.evenness), True),
    ("zd %", ">", lambda each: _share(each.zd), True),
    ("cosine", ">", lambda each: _cosine(each.cosine), True),
)
"""Heading, alignment, text, and whether a narrow terminal has it too."""

FULL_WIDTH = 120


def _measured_json(measured: Measurement, imatrix: ImportanceMatrix, seconds: float) -> dict[str, Any]:
    return {
        **_as_json(imatrix, None),
        "n_ctx": measured.n_ctx,
        "first_chunk": measured.first_chunk,
        "chunks_measured": measured.n_done,
        "perplexity": measured.perplexity,
        "vocabulary": {"seen": len(measured.seen), "total": measured.n_vocab},
        "seconds": round(seconds, 3),
    }


def _as_json(imatrix: ImportanceMatrix, statistics: ImatrixStatistics | None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "path": str(imatrix.path),
        "legacy": imatrix.is_legacy,
        "datasets": list(imatrix.datasets),
        "chunks": imatrix.n_chunks,
        "chunk_count": imatrix.chunk_count,
        "chunk_size": imatrix.chunk_size,
        "entries": [
            {"name": name, "columns": entry.sums.shape[-1], "counts": [int(count) for count in entry.counts]}
            for name, entry in sorted(imatrix.entries.items())
        ],
    }
    if statistics is not None:
        result["statistics"] = asdict(statistics)
    return result
