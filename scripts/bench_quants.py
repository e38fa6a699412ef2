"""Throughput of every quantizer beside ggml's: same rows, same process, one core each.

    python scripts/bench_quants.py                        every type
    python scripts/bench_quants.py Q4_K IQ3_S             these types
    python scripts/bench_quants.py --threads 2 --compile  also: speed-up on two threads, seconds to compile
    python scripts/bench_quants.py --cpu haswell          our kernels as a processor with AVX2 gets them
    python scripts/bench_quants.py --markdown             the table of docs/speed.md

ggml is llama.cpp's ggml_quantize_chunk in the xllamacpp wheel. The two take turns, so that a busy machine slows both;
each figure is a median, in million weights a second; the ratio is the median over the turns, and most robust.

--cpu changes our kernels only: what ggml_quantize_chunk runs is compiled into the wheel, for x86-64 in general.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.engines import ggml
from gguf3n.quants import QUANTIZERS
from workshop.timing import machine, seconds

N_ROWS = 512
N_PER_ROW = 2048
SHORTEST_SAMPLE = 0.02
"""Seconds; faster calls are repeated within one sample."""

AVX2_FEATURES = "sse3 ssse3 sse4.1 sse4.2 avx avx2 f16c fma bmi bmi2 lzcnt movbe popcnt"
CPUS = {
    "generic": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    "haswell": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in AVX2_FEATURES.split()),
    },
}
"""What makes numba compile for x86-64 of 2003 (SSE2), and for AVX2 without AVX-512.

Why both variables: without features, numba adds those of the machine that it runs on, AVX-512 among them.
"""


@dataclass(frozen=True)
class Rates:
    """Million weights a second, and ours divided by ggml's."""

    ggml: float
    ours: float
    ratio: float


@dataclass(frozen=True)
class Result:
    qtype: QType
    plain: Rates | None
    weighted: Rates | None
    speed_up: float | None
    compile_seconds: float | None


def repeats(call: Callable[[], object]) -> int:
    """How many calls make a sample; runs the call once before, to compile and to warm up."""
    call()
    return max(1, round(SHORTEST_SAMPLE / seconds(call, 1)))


def compare(qtype: QType, rows: np.ndarray, quant_weights: np.ndarray | None, turns: int) -> Rates:
    """Let ggml and our kernel take turns."""
    out = np.empty((len(rows), ggml.row_bytes(qtype, rows.shape[1])), dtype=np.uint8)
    expected = np.empty_like(out)
    ours = our_call(qtype, rows, quant_weights, out)

    def theirs() -> None:
        ggml.quantize_into(rows, qtype, expected, quant_weights)

    our_repeat, their_repeat = repeats(ours), repeats(theirs)
    if not np.array_equal(out, expected):
        raise SystemExit(f"{qtype.name}: the bytes differ from ggml's; a rate would mean nothing")
    samples = [(seconds(theirs, their_repeat), seconds(ours, our_repeat)) for _ in range(turns)]
    million = rows.size / 1e6
    return Rates(
        ggml=statistics.median(million / theirs for theirs, _ in samples),
        ours=statistics.median(million / ours for _, ours in samples),
        ratio=statistics.median(theirs / ours for theirs, ours in samples),
    )


def our_call(qtype: QType, rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> Callable[[], object]:
    """Our kernel on these rows."""
    quantizer = QUANTIZERS[qtype]
    plain, weighted = quantizer.plain, quantizer.weighted
    if quant_weights is None:
        assert plain is not None
        return lambda: plain(rows, out)
    assert weighted is not None
    return lambda: weighted(rows, quant_weights, out)


def speed_up(qtype: QType, rows: np.ndarray, quant_weights: np.ndarray | None, threads: int, turns: int) -> float:
    """How much faster `threads` threads are than one, each on its share of the rows."""
    out = np.empty((len(rows), ggml.row_bytes(qtype, rows.shape[1])), dtype=np.uint8)
    bounds = [len(rows) * i // threads for i in range(threads + 1)]
    parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    calls = [our_call(qtype, rows[part], quant_weights, out[part]) for part in parts]
    alone = our_call(qtype, rows, quant_weights, out)
    repeat = repeats(alone)
    with ThreadPoolExecutor(threads) as pool:

        def together() -> None:
            list(pool.map(lambda call: seconds(call, repeat), calls))

        return statistics.median(repeat * seconds(alone, repeat) / seconds(together, 1) for _ in range(turns))


def run_as(cpu: str, arguments: list[str]) -> int:
    """Run this script anew, for another processor and with a cache of its own; the exit status."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, **CPUS[cpu], "NUMBA_CACHE_DIR": cache}
        return subprocess.run([sys.executable, __file__, *arguments], env=environment).returncode


def compile_seconds(qtype: QType) -> float:
    """Seconds of the first calls of both kernels in a new process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--first-calls", qtype.name]
        done = subprocess.run(
            command, env={**os.environ, "NUMBA_CACHE_DIR": cache}, check=True, capture_output=True, text=True
        )
    return float(json.loads(done.stdout))


def first_calls(qtype: QType) -> float:
    """Seconds of the first calls of both kernels, on two rows."""
    rows, weights = sample(2)
    out = np.empty((2, ggml.row_bytes(qtype, N_PER_ROW)), dtype=np.uint8)
    quantizer = QUANTIZERS[qtype]
    total = 0.0
    if quantizer.plain is not None:
        total += seconds(our_call(qtype, rows, None, out), 1)
    if quantizer.weighted is not None:
        total += seconds(our_call(qtype, rows, weights, out), 1)
    return total


def sample(n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a checkpoint has them, in size and precision, and importances as an imatrix has them."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n_rows, N_PER_ROW), dtype=np.float32) * np.float32(0.02)
    rows = (rows.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return rows, (rng.standard_t(4, size=N_PER_ROW) ** 2).astype(np.float32)


def number(value: float | None, digits: int = 0) -> str:
    """Three significant digits at least; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if digits or value >= 100 else f"{value:.3g}"


def table(results: list[Result], threads: int | None, with_compile: bool) -> tuple[list[str], list[list[str]]]:
    header = ["type", "ggml", "gguf3n", "ratio", "ggml weighted", "gguf3n weighted", "ratio"]
    if threads:
        header.append(f"{threads} threads")
    if with_compile:
        header.append("compile s")
    lines = []
    for result in results:
        cells = [result.qtype.name]
        for rates in (result.plain, result.weighted):
            cells += [number(rates.ggml), number(rates.ours), number(rates.ratio, 1)] if rates else ["-"] * 3
        if threads:
            cells.append(number(result.speed_up, 2))
        if with_compile:
            cells.append(number(result.compile_seconds, 1))
        lines.append(cells)
    return header, lines


def print_plain(header: list[str], lines: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *lines]) for i in range(len(header))]
    for row in [header, *lines]:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


def print_markdown(header: list[str], lines: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|---|" + "---:|" * (len(header) - 1))
    for row in lines:
        print("| " + " | ".join(row) + " |")


def measure(qtype: QType, args: argparse.Namespace) -> Result:
    rows, weights = sample(args.rows)
    quantizer = QUANTIZERS[qtype]
    scaling_weights = weights if quantizer.plain is None else None
    return Result(
        qtype,
        plain=compare(qtype, rows, None, args.turns) if quantizer.plain else None,
        weighted=compare(qtype, rows, weights, args.turns) if quantizer.weighted else None,
        speed_up=speed_up(qtype, rows, scaling_weights, args.threads, args.turns) if args.threads else None,
        compile_seconds=compile_seconds(qtype) if args.compile else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="names of types; all of them without any")
    parser.add_argument("--threads", type=int, metavar="N", help="add the speed-up on N threads")
    parser.add_argument("--compile", action="store_true", help="add the seconds to compile both kernels of a type")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/speed.md")
    parser.add_argument("--rows", type=int, default=N_ROWS, help=f"rows of {N_PER_ROW} weights (default {N_ROWS})")
    parser.add_argument("--turns", type=int, default=5, help="how often both are measured (default 5)")
    parser.add_argument("--cpu", choices=["host", *CPUS], default="host", help="what numba compiles for (default host)")
    parser.add_argument("--first-calls", metavar="TYPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_calls:
        print(json.dumps(first_calls(QType[args.first_calls])))
        return
    unknown = [name for name in args.types if name not in QType.__members__ or QType[name] not in QUANTIZERS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(qtype.name for qtype in QUANTIZERS)}")
    if args.cpu != "host" and not CPUS[args.cpu].items() <= os.environ.items():
        sys.exit(run_as(args.cpu, sys.argv[1:]))
    results = []
    for qtype in [QType[name] for name in args.types] or list(QUANTIZERS):
        print(f"{qtype.name} ...", end="\r", file=sys.stderr, flush=True)
        results.append(measure(qtype, args))
    header, lines = table(results, args.threads, args.compile)
    (print_markdown if args.markdown else print_plain)(header, lines)
    compiled_for = "" if args.cpu == "host" else f", gguf3n compiled for {args.cpu}"
    print(f"\nMillion weights a second, one core; {machine()}{compiled_for}.")


if __name__ == "__main__":
    main()
