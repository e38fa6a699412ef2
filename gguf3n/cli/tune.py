"""`gguf3n tune`: the recipe that loses least at a size."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, human_bytes, print_json, print_note
from gguf3n.cli.paint import filled, paint, say, say_exactly
from gguf3n.cli.progress import progress_bar
from gguf3n.conversion import read_source
from gguf3n.engines.activations import read_texts
from gguf3n.engines.reference import check_device
from gguf3n.errors import UsageError
from gguf3n.formats.imatrix import as_imatrix
from gguf3n.formats.sensitivity import read_sensitivity
from gguf3n.formats.whole_file import check_not_input, check_output, write_whole
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.runtime_memory import RUN_CTX
from gguf3n.planning import Plan
from gguf3n.plots import FileMark, check_plot, write_tradeoff_plot
from gguf3n.recipes import find_recipe, format_recipe
from gguf3n.tuning.allocate import ENGINES, REPACKED, Tuned, Tuning, TypeLimits, check_engine
from gguf3n.tuning.budget import parse_size
from gguf3n.tuning.ladder import THEIRS, Ladder, climb, same_size
from gguf3n.tuning.measure import parse_types
from gguf3n.tuning.tune import budget_of, check_sizes
from gguf3n.tuning.verify import Measured, check_engines, verify
from gguf3n.validation.options import MIN_TOKENS, N_TOKENS, ValidationOptions, parse_validation

SCHEMA = "gguf3n.tune/1"


def tune(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, a Hub id, or an unquantized GGUF file.")],
    sensitivity: Annotated[Path, typer.Option(help="What gguf3n sensitivity has measured of this model.")],
    size: Annotated[
        str | None,
        typer.Option(help="Bytes of the whole file, as in 4.2GB or 3900MiB; or fits:8GB, the memory it may take."),
    ] = None,
    bpw: Annotated[float | None, typer.Option(help="Bits a weight instead.")] = None,
    like: Annotated[str | None, typer.Option(help="As large as this quantization would be instead.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe, a .toml file.", show_default="stdout")
    ] = None,
    imatrix: Annotated[Path | None, typer.Option(help="What it will be quantized with, as when measured.")] = None,
    engine: Annotated[
        str, typer.Option(help=f"What will read it: {' or '.join(ENGINES)}, Ollama before 0.30.")
    ] = ENGINES[0],
    types: Annotated[
        str | None, typer.Option(help="Types to choose from, separated by commas.", show_default="all measured")
    ] = None,
    fast_cpu: Annotated[
        bool,
        typer.Option(
            "--fast-cpu",
            help=f"Only types that llama.cpp repacks for CPUs: {', '.join(qtype.name for qtype in REPACKED)}.",
        ),
    ] = False,
    any_table_type: Annotated[
        bool, typer.Option("--any-table-type", help="Also types of per_layer_token_embd whose rows only CPUs look up.")
    ] = False,
    ctx: Annotated[int, typer.Option(min=1, help="Tokens of context, for --size fits:.")] = RUN_CTX,
    curve: Annotated[
        Path | None, typer.Option(help="Draw size against divergence, with the stock mixtures: a .png or .svg file.")
    ] = None,
    verify_it: Annotated[
        bool, typer.Option("--verify", help="Run the file and llama.cpp's mixture of that size in llama.cpp.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="With --verify: a text that was not measured on.", show_default="a built-in one")
    ] = None,
    tokens: Annotated[int, typer.Option(min=MIN_TOKENS, help="With --verify: how many of its tokens.")] = N_TOKENS,
    device: Annotated[str, typer.Option(help="With --verify: auto, cpu or cuda, for the reference model.")] = "auto",
    dtype: Annotated[str, typer.Option(help="With --verify: float32 or bfloat16.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Write the recipe with the least expected divergence that a size allows; gguf3n convert -q takes it."""
    given = any(value is not None for value in (size, bpw, like))
    if given or curve is None:
        check_sizes(size, bpw, like)
    limits = TypeLimits(() if types is None else parse_types(types), any_table_type, fast_cpu)
    check_engine(engine, limits)
    _check_outputs(output, curve, [sensitivity, imatrix, text, like], force=force)
    if size is not None:
        parse_size(size)
    recipe = None if like is None else find_recipe(like)
    if (verify_it or output is not None) and not given:
        raise UsageError(f"{'--verify' if verify_it else '-o'} without a size", expected="--size, --bpw or --like")
    if text is not None and not verify_it:
        raise UsageError("--text without --verify")
    costs, matrix = read_sensitivity(sensitivity), as_imatrix(imatrix)
    judging = parse_validation(
        text=None if text is None else read_texts([text]), n_tokens=tokens, device=device, dtype=dtype, threads=threads
    )
    if verify_it:
        check_device(device, dtype)
    opened = read_source(source, revision=revision, show_progress=not quiet)
    tuning = Tuning(text_part(opened), costs, limits, matrix)
    for written in filter(None, (output, curve)):
        check_not_input(written, *opened.files)
    tuned: Tuned | None = None
    if given:
        budget = budget_of(tuning, size, bpw, recipe, ctx)
        tuned = tuning.tune(budget, "tuned" if output is None else _name(output))
        if not tuned.is_exact:
            said = f"too many choices to try: another may have {tuned.bound:.4g}, not less"
            print_note("note", said, quiet=quiet)
    ladder = None if curve is None else climb(tuning)
    measured: list[Measured] = []
    if verify_it and tuned is not None:
        named = None if recipe is None else tuning.plan(recipe)
        measured = _verified(tuned, named or same_size(tuning, tuned.budget.n_bytes), judging, quiet=quiet)
    if output is not None and tuned is not None:
        write_whole(output, format_recipe(tuned.recipe, _header(tuned)), force=force)
    if curve is not None and ladder is not None:
        _draw(curve, ladder, tuned, tuning.part.source.name, force=force)
    if json:
        print_json(_as_json(opened.origin, output, tuned, ladder, measured))
        return
    if tuned is not None:
        if output is None:
            say_exactly(format_recipe(tuned.recipe, _header(tuned)))
        else:
            _print(output, tuned)
    if ladder is not None:
        _print_ladder(ladder)
    if measured:
        _print_measured(measured)


def _check_outputs(output: Path | None, curve: Path | None, inputs: list[Any], *, force: bool) -> None:
    """Refuse what can't be written, before any work. Raises: UsageError, OutputError."""
    if output is not None:
        if output.suffix.lower() != ".toml":
            raise UsageError(f"{output}: not the name of a recipe", expected="a name ending in .toml")
        check_output(output, force=force)
    if curve is not None:
        check_plot(curve, force=force)
    for written in filter(None, (output, curve)):
        check_not_input(written, *inputs)


def _name(output: Path) -> str:
    """The recipe's name, which becomes a part of file names."""
    return "".join(c if c.isalnum() or c in "._+@-" else "-" for c in output.stem) or "tuned"


def _verified(tuned: Tuned, stock: Plan | None, judging: ValidationOptions, *, quiet: bool) -> list[Measured]:
    """The tuned file and a stock one of its size, in llama.cpp."""
    if stock is None:
        print_note("note", "every mixture of llama.cpp is larger: the tuned file is measured alone", quiet=quiet)
    check_engines(tuned.plan, judging)
    with progress_bar(quiet=quiet) as progress:
        return verify(
            [tuned.plan, *([] if stock is None else [stock])],
            judging,
            notice=lambda said: print_note("note", said, quiet=quiet),
            progress=progress,
        )


def _header(tuned: Tuned) -> list[str]:
    """Comments for the top of the recipe."""
    plan = tuned.plan
    counts = ", ".join(f"{count} {qtype.name}" for qtype, count in plan.type_counts.items())
    return [
        f"{plan.total_bytes:,} bytes, {plan.bits_per_weight:.3f} bits a weight: {counts}",
        "by gguf3n tune; gguf3n convert SRC -q FILE.toml writes the file, with the --imatrix that it was measured with",
    ]


def _print(output: Path, tuned: Tuned) -> None:
    plan = tuned.plan
    say(paint(str(output), "bold"))
    left = tuned.budget.n_bytes - plan.total_bytes
    say(*filled(f"{plan.total_bytes:,} bytes ({human_bytes(plan.total_bytes)}), {plan.bits_per_weight:.3f} bits a "
                f"weight; {left:,} bytes below {tuned.budget.said}"))  # fmt: skip
    say(*filled(f"expected KL divergence {tuned.divergence:.4g} nats a token"))
    say("")
    rows = [("matrices", "types")]
    kinds: dict[str, dict[str, int]] = {}
    for tensor in plan.tensors:
        if tensor.rule.startswith("rule "):
            kind = kinds.setdefault(tensor.source.name.removesuffix(".weight").rpartition(".")[2], {})
            kind[tensor.slot.qtype.name] = kind.get(tensor.slot.qtype.name, 0) + 1
    rows += [(kind, ", ".join(f"{n} {name}" for name, n in types.items())) for kind, types in kinds.items()]
    for line in columns(rows, "<<"):
        say(*filled(line))


def _print_ladder(ladder: Ladder) -> None:
    points = sorted([*ladder.tuned, *ladder.stock], key=lambda point: (point.n_bytes, point.name))
    say("", "| file | bytes | expected KL |", "|---|--:|--:|")
    for point in points:
        say(f"| {point.name} | {point.n_bytes:,} | {point.divergence:.4g} |")


def _print_measured(measured: list[Measured]) -> None:
    say("")
    rows = [("in llama.cpp", "bytes", "KL mean", "median", "99 %", "top-1")]
    for each in measured:
        found = each.divergence
        rows.append(
            (
                each.name,
                f"{each.n_bytes:,}",
                f"{found.mean:.4g}",
                f"{found.median:.4g}",
                f"{found.p99:.4g}",
                f"{found.top1_agreement:.2%}",
            )
        )
    for line in columns(rows, "<>>>>>"):
        say(line)


def _draw(path: Path, ladder: Ladder, tuned: Tuned | None, name: str, *, force: bool) -> None:
    theirs = [point for point in ladder.stock if point.name.endswith(THEIRS)]
    ours = [point for point in ladder.stock if point not in theirs]
    series = {
        label: [FileMark(point.name.removesuffix(THEIRS), point.n_bytes, point.divergence) for point in points]
        for label, points in (("tuned", ladder.tuned), ("our mixtures", ours), ("llama.cpp's mixtures", theirs))
    }
    chosen = None if tuned is None else FileMark(tuned.recipe.name, tuned.plan.total_bytes, tuned.divergence)
    write_tradeoff_plot(path, series, chosen, title=name, force=force)


def _as_json(
    source: str, output: Path | None, tuned: Tuned | None, ladder: Ladder | None, measured: list[Measured]
) -> dict[str, Any]:
    result: dict[str, Any] = {"schema": SCHEMA, "source": source}
    if tuned is not None:
        plan = tuned.plan
        result |= {
            "recipe": None if output is None else str(output),
            "budget": {"bytes": tuned.budget.n_bytes, "said": tuned.budget.said},
            "bytes": plan.total_bytes,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "expected_divergence": tuned.divergence,
            "bound": tuned.bound,
            "exact": tuned.is_exact,
            "evidence": list(tuned.recipe.evidence),
            "tensors": [
                {"name": tensor.source.name, "type": tensor.slot.qtype.name, "reason": tensor.reason}
                for tensor in plan.tensors
            ],
        }
    if ladder is not None:
        result["curve"] = {
            "tuned": [asdict(point) for point in ladder.tuned],
            "stock": [asdict(point) for point in ladder.stock],
        }
    if measured:
        result["measured"] = [
            {"name": each.name, "bytes": each.n_bytes, "divergence": asdict(each.divergence)} for each in measured
        ]
    return result
