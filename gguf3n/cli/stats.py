"""`gguf3n stats`: statistics of every weight of a checkpoint or a GGUF file."""

from __future__ import annotations

import enum
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, print_json, print_note, shape_text
from gguf3n.cli.paint import cut, filled, line_width, paint, say
from gguf3n.cli.progress import progress_bar
from gguf3n.errors import UsageError
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.half import F16_MAX
from gguf3n.inspection.network import Section, short_name
from gguf3n.inspection.statistics import (
    ACTIVATION_MAX,
    Risk,
    Statistics,
    TensorStatistics,
    f16_risks,
    measure_statistics,
)
from gguf3n.outside import printable
from gguf3n.plots import LayerError, Magnitude, check_plot, write_statistics_plot

if TYPE_CHECKING:
    from gguf3n.validation.tensor_errors import TensorError, TensorsResult

SCHEMA = "gguf3n.stats/1"
SHOWN = 20
WIDE = 110
"""Columns that a line must have for types and shapes."""
LEAST_NAME = 16
"""Columns that names have at least."""


class Sort(str, enum.Enum):
    """What the table is sorted by."""

    MAX = "max"
    STD = "std"
    KURTOSIS = "kurtosis"
    ZEROS = "zeros"
    NAME = "name"


KEYS: dict[Sort, Callable[[TensorStatistics], float | None]] = {
    Sort.MAX: lambda tensor: tensor.largest,
    Sort.STD: lambda tensor: tensor.std,
    Sort.KURTOSIS: lambda tensor: tensor.kurtosis,
    Sort.ZEROS: lambda tensor: tensor.share(tensor.part.n_zero),
}
"""The largest first; by name means in network order."""


def stats(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, a Hub id, or a local GGUF file.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the maximum magnitude over the network: a .png or .svg file.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The source of a GGUF file: the error of each tensor, and of each layer in the plot."),
    ] = None,
    f16_risk: Annotated[
        bool, typer.Option("--f16-risk", help="List the convolutions whose sums can exceed 65504, the largest float16.")
    ] = False,
    activation_max: Annotated[
        float, typer.Option(help="With --f16-risk: the largest activation to assume.")
    ] = ACTIVATION_MAX,
    sort: Annotated[Sort, typer.Option(help="What to sort by.")] = Sort.MAX,
    show_all: Annotated[bool, typer.Option("--all", help=f"Show all tensors, not the first {SHOWN}.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Show statistics of every weight, vision and audio included: magnitudes, moments, zeros, what float16 loses.

    Quantized tensors are dequantized. A GGUF file on a server must be downloaded first, as every byte is read.
    """
    if not 0 < activation_max < math.inf:
        raise UsageError("--activation-max is a magnitude", expected="a number above 0", found=f"{activation_max:g}")
    if plot is not None:
        check_plot(plot, force=force)
    if against is not None and not os.path.isfile(source):
        raise UsageError("--against holds a GGUF file against its source", expected="a local GGUF file", found=source)
    with progress_bar(quiet=quiet) as progress:
        result = measure_statistics(
            source, revision=revision, threads=threads, show_progress=not quiet, progress=progress
        )
    compared = None if against is None else _compare(source, against, threads, quiet)
    if plot is not None:
        _draw(plot, result, compared, force)
        print_note("plot", str(plot), quiet=quiet)
    risks = f16_risks(result)
    if json:
        print_json(_as_json(result, risks, activation_max, compared))
        return
    say(paint(result.origin, "bold"))
    _print_sections(result)
    if f16_risk:
        _print_risks(risks, activation_max, show_all)
    else:
        _print_tensors(result, sort, show_all)
    if compared is not None:
        _print_errors(compared, show_all)
    if result.skipped:
        _print_skipped(result, show_all)


def _compare(file: str, source: str, threads: int | None, quiet: bool) -> TensorsResult:
    from gguf3n.validation.tensors import check_tensors
    from gguf3n.validation.validate import part_for, read_reference

    part = part_for(Path(file), read_reference(source, show_progress=not quiet))
    gguf = open_gguf(file, strict=False)
    with progress_bar(quiet=quiet) as progress:
        return check_tensors(gguf, part, threads=threads, progress=progress)


def _draw(path: Path, result: Statistics, compared: TensorsResult | None, force: bool) -> None:
    magnitudes = [
        Magnitude(
            short_name(tensor.name),
            tensor.place.section.value,
            tensor.place.numbers,
            tensor.kind.value,
            tensor.largest or 0.0,
        )
        for tensor in result.tensors
    ]
    errors = []
    if compared is not None:
        wrong = {problem.where for problem in compared.problems}
        errors = [_layer_error(error, flagged=error.name in wrong) for error in compared.errors]
    write_statistics_plot(path, magnitudes, errors, title=Path(result.origin).name, force=force)


def _layer_error(error: TensorError, *, flagged: bool) -> LayerError:
    name = short_name(error.name)
    kind = name if error.bid is None else name.removeprefix(f"blk.{error.bid}.")
    return LayerError(kind, error.bid, error.rms_error, flagged)


def _print_sections(result: Statistics) -> None:
    rows = []
    for section in Section:
        tensors = [tensor for tensor in result.tensors if tensor.place.section is section]
        if tensors:
            types = Counter(tensor.dtype for tensor in tensors)
            counts = ", ".join(f"{n}\xa0{name}" for name, n in types.most_common())  # no break between the two
            n_weights = sum(tensor.n_weights for tensor in tensors)
            rows.append((f"  {section.value}", f"{len(tensors)} tensors", f"{n_weights:,} weights", counts))
    for line in columns(rows, "<>><") if rows else ():
        say(*(part.replace("\xa0", " ") for part in filled(line.removeprefix("  "))))
    lost = [sum(getattr(tensor.part, field) for tensor in result.tensors) for field in F16_FIELDS]
    say(*filled(f"in float16: {lost[0]:,} weights overflow, {lost[1]:,} become zero, {lost[2]:,} subnormal"))
    broken = [tensor for tensor in result.tensors if tensor.part.n_nan + tensor.part.n_infinite]
    for tensor in broken[:SHOWN]:
        what = f"{tensor.name}: {tensor.part.n_nan:,} NaN, {tensor.part.n_infinite:,} infinite; left out below"
        say(*filled(what))
    if len(broken) > SHOWN:
        say(f"  and {len(broken) - SHOWN} more with NaN or infinity")
    say("")


F16_FIELDS = ("f16_overflow", "f16_zero", "f16_subnormal")


def _print_tensors(result: Statistics, sort: Sort, show_all: bool) -> None:
    tensors = list(result.tensors)
    if sort in KEYS:
        tensors.sort(key=lambda tensor: -_or_least(KEYS[sort](tensor)))
    shown = tensors if show_all else tensors[:SHOWN]
    wide = line_width() >= WIDE
    rows = [("tensor", *(("type", "shape") if wide else ()), "max", "mean", "std", "kurt", "zeros", "f16")]
    for tensor in shown:
        rows.append(
            (
                short_name(tensor.name),
                *((tensor.dtype, shape_text(tensor.shape)) if wide else ()),
                _number(tensor.largest, 3),
                _number(tensor.mean, 2),
                _number(tensor.std, 2),
                _number(tensor.kurtosis, 2),
                _share(tensor.share(tensor.part.n_zero)),
                _f16(tensor),
            )
        )
    _print_table(rows, "<" + ("<<" if wide else "") + ">>>>>>")
    order = "in network order" if sort is Sort.NAME else f"by {sort.value}"
    if len(shown) < len(tensors):
        say(*filled(f"{len(shown)} of {len(tensors)} tensors, {order}; --all shows all", 0))
    say(
        *filled(
            "kurt: excess kurtosis, 0 for a normal distribution. f16: the worst that float16 does: n inf, so many "
            "weights overflow; % 0, that share becomes zero; % sub, that share becomes subnormal and loses digits.",
            0,
        )
    )


def _or_least(value: float | None) -> float:
    return -math.inf if value is None else value


def _f16(tensor: TensorStatistics) -> str:
    part = tensor.part
    if part.f16_overflow:
        return f"{part.f16_overflow:,} inf"
    if part.f16_zero:
        return f"{_share(tensor.share(part.f16_zero))} 0"
    return f"{_share(tensor.share(part.f16_subnormal))} sub" if part.f16_subnormal else "-"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e+")


def _share(share: float) -> str:
    if 0 < share < 5e-4:
        return "<.1%"
    return "-" if share == 0 else f"{share:.1%}" if share < 0.9995 else f"{share:.0%}"


def _activation(risk: Risk) -> str:
    return "never" if math.isinf(risk.activation) else f"{risk.activation:,.{0 if risk.activation >= 100 else 2}f}"


def _middle_cut(text: str, width: int) -> str:
    """Without its middle where it is long: what differs is at both ends."""
    text = printable(text)
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - half]}…{text[-half:]}"


def _print_table(rows: Sequence[tuple[str, ...]], align: str) -> None:
    """Names, the first column, have the room that the others leave."""
    others = sum(2 + max(map(len, column)) for column in list(zip(*rows, strict=True))[1:])
    room = max(line_width() - others, LEAST_NAME)
    fitted = [(_middle_cut(row[0], room), *row[1:]) for row in rows]
    for number, line in enumerate(columns(fitted, align)):
        say(paint(cut(line, line_width()), "bold") if number == 0 else cut(line, line_width()))


def _print_risks(risks: Sequence[Risk], activation_max: float, show_all: bool) -> None:
    if not risks:
        what = (
            "no convolutions: text has none; they are in the vision and audio towers of a checkpoint or an mmproj file"
        )
        say(*filled(what, 0))
        return
    listed = [risk for risk in risks if risk.activation < activation_max]
    shown = listed if show_all else listed[:SHOWN]
    rows = [("convolution", "shape", "max", "sum", "overflows at")]
    for risk in shown:
        tensor = risk.tensor
        rows.append(
            (
                short_name(tensor.name),
                "x".join(map(str, tensor.shape)),
                _number(tensor.largest, 3),
                f"{tensor.part.largest_sum:,.1f}",
                _activation(risk),
            )
        )
    if shown:
        _print_table(rows, "<<>>>")
    if len(shown) < len(listed):
        say(*filled(f"{len(shown)} of {len(listed)}; --all shows all", 0))
    limit = f"{activation_max:g}"
    count = f"{len(listed)} of {len(risks)} convolutions can exceed {F16_MAX:.0f} with activations of at most {limit}"
    meaning = (
        ": sum is the largest sum of an output channel's magnitudes, and activations from 'overflows at' on, of the "
        "right signs, carry it there."
    )
    say(*filled(count + (meaning if shown else "."), 0))
    rest = risks[len(listed) :]
    if rest:
        safe = f"The other {len(rest)} cannot; the first of them from {_activation(rest[0])}"
        say(*filled(f"{safe} ({short_name(rest[0].tensor.name)}).", 0))


def _print_errors(compared: TensorsResult, show_all: bool) -> None:
    errors = compared.errors
    shown = errors if show_all else errors[:SHOWN]
    rows = [("tensor, worst first", "type", "error", "expected")]
    for error in shown:
        low, high = error.expected
        rows.append((short_name(error.name), error.qtype.name, f"{error.rms_error:.3g}", f"{low:.2g} to {high:.2g}"))
    say("")
    _print_table(rows, "<<><")
    if len(shown) < len(errors):
        say(*filled(f"{len(shown)} of {len(errors)} tensors; --all shows all", 0))
    if compared.problems:
        say(*filled(f"{len(compared.problems)} problems: gguf3n validate --stages tensors says what they are", 0))


def _print_skipped(result: Statistics, show_all: bool) -> None:
    say("", f"{len(result.skipped)} tensors were not read:")
    for tensor in result.skipped if show_all else result.skipped[:SHOWN]:
        say(*filled(f"{tensor.name} ({tensor.dtype}): {tensor.reason}"))
    if len(result.skipped) > SHOWN and not show_all:
        say(f"  and {len(result.skipped) - SHOWN} more")


def _as_json(
    result: Statistics, risks: Sequence[Risk], activation_max: float, compared: TensorsResult | None
) -> dict[str, Any]:
    """The documented schema; tensors in network order."""
    errors = {} if compared is None else {error.name: error for error in compared.errors}
    return {
        "schema": SCHEMA,
        "source": result.origin,
        "activation_max": activation_max,
        "tensors": [_tensor_json(tensor, errors.get(tensor.name)) for tensor in result.tensors],
        "f16_risk": [
            {
                "name": risk.tensor.name,
                "shape": list(risk.tensor.shape),
                "largest_sum": risk.tensor.part.largest_sum,
                "overflows_at": risk.activation,
                "listed": risk.activation < activation_max,
            }
            for risk in risks
        ],
        "skipped": [
            {"name": tensor.name, "type": tensor.dtype, "shape": list(tensor.shape), "reason": tensor.reason}
            for tensor in result.skipped
        ],
    }


def _tensor_json(tensor: TensorStatistics, error: TensorError | None) -> dict[str, Any]:
    part = tensor.part
    entry = {
        "name": tensor.name,
        "section": tensor.place.section.value,
        "place": tensor.place.label,
        "kind": tensor.kind.value,
        "type": tensor.dtype,
        "shape": list(tensor.shape),
        "n_weights": tensor.n_weights,
        "max_magnitude": tensor.largest,
        "mean": tensor.mean,
        "std": tensor.std,
        "excess_kurtosis": tensor.kurtosis,
        "zeros": part.n_zero,
        "nan": part.n_nan,
        "infinite": part.n_infinite,
        **{field: getattr(part, field) for field in F16_FIELDS},
    }
    if error is not None:
        entry |= {"rms_error": error.rms_error, "expected_error": list(error.expected)}
    return entry
