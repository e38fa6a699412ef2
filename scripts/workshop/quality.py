"""What a recipe does to a small trained model: size, KL divergence, top-1, perplexity; ours beside llama.cpp's.

The reference is transformers, in float32 on the checkpoint's weights, run once over its held_out.txt; every file is run
over the same tokens in llama.cpp. Importances are measured on train.txt, never on the text that judges.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import platform
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gguf3n
from gguf3n.engines.activations import measure_importance
from gguf3n.engines.llama_cpp import Engine, open_llama_cpp
from gguf3n.engines.reference import Reference
from gguf3n.errors import QuantizationError
from gguf3n.formats.imatrix import ImportanceMatrix, read_imatrix
from gguf3n.recipes import preset_names
from gguf3n.recipes.library import variant_names
from gguf3n.validation.divergence import Divergence, measure
from workshop.comparison import NEEDY as REFUSED
from workshop.timing import machine
from workshop.training import HELD_OUT, TRAIN, TRAINING

THEIRS = "@llama.cpp"
WIDTH = 120
"""Of a page's lines."""
SAME = 1.02
"""Ratio of two divergences that is not worth a remark."""


@dataclass(frozen=True)
class Options:
    """What is asked for, as on the command line."""

    recipes: tuple[str, ...] = ()
    imatrix: Path | None = None
    imatrix_chunks: int = 200
    ctx: int = 256
    windows: int = 40
    threads: int = 2


@dataclass(frozen=True)
class Quality:
    """One file against the reference. Units: bytes of the file, bits of tensor data a weight."""

    file_bytes: int
    bits_per_weight: float
    divergence: Divergence


@dataclass(frozen=True)
class Row:
    """A recipe's files: without and with importances, ours and llama.cpp's; None where one can't be written."""

    name: str
    plain: Quality | None
    guided: Quality | None
    their_plain: Quality | None = None
    their_guided: Quality | None = None
    has_counterpart: bool = False
    """Whether llama.cpp has a mixture of this name."""

    @property
    def bits_per_weight(self) -> float:
        """Of the file without importances, where there is one."""
        return next(quality.bits_per_weight for quality in (self.plain, self.guided) if quality is not None)


@dataclass(frozen=True)
class Yardstick:
    """What every file is measured against.

    Shapes: rows `[n_positions, vocab]`, log-probabilities of the reference; `following` says what really follows there.
    """

    windows: Sequence[Sequence[int]]
    rows: NDArray[np.float32]
    following: Sequence[int]
    imatrix: ImportanceMatrix


class Bench:
    """A checkpoint, the reference's answers for its held-out text, and what has been measured against them."""

    def __init__(self, checkpoint: Path, options: Options, yardstick: Yardstick) -> None:
        self.options = options
        self.yardstick = yardstick
        self.model = gguf3n.read_source(checkpoint)
        self.known: dict[bytes, Divergence] = {}

    def row(self, name: str) -> Row:
        imatrix = self.yardstick.imatrix
        plain, guided = self.quality(name, None), self.quality(name, imatrix)
        if name + THEIRS not in variant_names(name):
            return Row(name, plain, guided)
        if name in REFUSED:
            return Row(name, plain, guided, has_counterpart=True)
        their_plain, their_guided = self.quality(name + THEIRS, None), self.quality(name + THEIRS, imatrix)
        return Row(name, plain, guided, their_plain, their_guided, has_counterpart=True)

    def quality(self, name: str, imatrix: ImportanceMatrix | None) -> Quality | None:
        """Writes the file, runs it, removes it."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "candidate.gguf"
            try:
                (done,) = gguf3n.convert(self.model, name, path, imatrix=imatrix, threads=1)
            except QuantizationError:
                return None
            first = min(tensor.slot.offset for tensor in done.plan.tensors)
            digest = hashlib.sha256(path.read_bytes()[first:]).digest()
            if digest not in self.known:
                self.known[digest] = self.divergence(path)
        return Quality(done.plan.total_bytes, done.plan.bits_per_weight, self.known[digest])

    def divergence(self, path: Path) -> Divergence:
        engine = open_llama_cpp(path, n_ctx=self.options.ctx, n_threads=1)
        try:
            return measure(self.yardstick.rows, scored(engine, self.yardstick.windows), self.yardstick.following)
        finally:
            engine.close()


def yardstick_of(checkpoint: Path, options: Options) -> Yardstick:
    """One run of the reference, and the importances."""
    with Reference(checkpoint, device="cpu") as reference:
        windows = windows_of(reference.tokenize((checkpoint / HELD_OUT).read_text("utf-8")), options)
        rows = np.stack(list(scored(reference, windows)))
    following = [token for window in windows for token in window[options.ctx // 2 + 1 :]]
    return Yardstick(windows, rows, following, importances(checkpoint, options))


def scored(engine: Engine, windows: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float32]]:
    """What an engine expects after each token of the second half of each window, but after the last."""
    for window in windows:
        yield from engine.logprobs(window[:-1], first=len(window) // 2)


def windows_of(tokens: Sequence[int], options: Options) -> list[list[int]]:
    """The first windows of a text, each with the begin mark before it."""
    begin, *text = tokens
    length = options.ctx - 1
    n_windows = min(options.windows, len(text) // length)
    if not n_windows:
        sys.exit(f"{HELD_OUT}: {len(text):,} tokens, too few for --ctx {options.ctx}")
    return [[begin, *text[i * length : (i + 1) * length]] for i in range(n_windows)]


def importances(checkpoint: Path, options: Options) -> ImportanceMatrix:
    """Those of the file that was named, else measured on the text that the model was trained on."""
    if options.imatrix is not None:
        return read_imatrix(options.imatrix)
    return measure_importance(
        checkpoint, [checkpoint / TRAIN], n_ctx=options.ctx, n_chunks=options.imatrix_chunks, device="cpu"
    )


def measure_all(checkpoint: Path, options: Options) -> dict[str, Any]:
    """The rows and how they came about, as in the JSON file."""
    import torch
    import transformers
    import xllamacpp

    torch.set_num_threads(options.threads)
    training = json.loads((checkpoint / TRAINING).read_text("utf-8"))
    del training["losses"]
    yardstick = yardstick_of(checkpoint, options)
    names = options.recipes or preset_names()
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.threads, _start, (checkpoint, options, yardstick)) as pool:
        rows = []
        for row in pool.imap(_row, names):
            rows.append(row)
            print(f"{len(rows)} of {len(names)}: {row.name}", file=sys.stderr, flush=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{machine()}, {options.threads} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "xllamacpp": xllamacpp.__version__,
        },
        "training": training,
        "ctx": options.ctx,
        "windows": len(yardstick.windows),
        "imatrix": {
            "from": TRAIN if options.imatrix is None else options.imatrix.name,
            "tokens": int(yardstick.imatrix.entries["blk.0.attn_q.weight"].counts.max()),
        },
        "rows": [asdict(row) for row in rows],
    }


_bench: Bench
"""Of a worker process.

Why: a model this small gains nothing from more threads in llama.cpp, so each file has one, and files take turns.
"""


def _start(checkpoint: Path, options: Options, yardstick: Yardstick) -> None:
    global _bench
    _bench = Bench(checkpoint, options, yardstick)


def _row(name: str) -> Row:
    return _bench.row(name)


def read_rows(facts: dict[str, Any]) -> list[Row]:
    """The rows of a JSON file."""

    def quality(found: dict[str, Any] | None) -> Quality | None:
        if found is None:
            return None
        return Quality(**found | {"divergence": Divergence(**found["divergence"])})

    columns = ("plain", "guided", "their_plain", "their_guided")
    return [Row(**row | {column: quality(row[column]) for column in columns}) for row in facts["rows"]]


def table(rows: Sequence[Row]) -> str:
    """Markdown, most bits first. Units: MB; 10⁻³ nats; percent."""
    lines = [
        "| | MB | bits | KL | 99 % | top-1 | PPL | im: KL | 99 % | top-1 | PPL | llama.cpp: bits | KL | im: KL |",
        "|---|" + "--:|" * 13,
    ]
    for row in sorted(rows, key=lambda row: -row.bits_per_weight):
        size = next(quality.file_bytes for quality in (row.plain, row.guided) if quality is not None)
        cells = [
            f"`{row.name}`",
            f"{size / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
            *figures(row.plain),
            *figures(row.guided),
            *counterpart(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figures(quality: Quality | None) -> tuple[str, ...]:
    """Mean, 99th percentile, top-1 agreement and perplexity."""
    if quality is None:
        return ("-",) * 4
    found = quality.divergence
    return (
        milli(found.mean),
        milli(found.p99),
        f"{100 * found.top1_agreement:.1f}",
        f"{found.candidate_perplexity:.3f}",
    )


def counterpart(row: Row) -> tuple[str, ...]:
    """Bits and mean divergences of llama.cpp's mixture; "=" for the bytes that ours has."""
    if not row.has_counterpart:
        return ("-",) * 3
    if row.their_plain is None and row.their_guided is None:
        return "refused", "-", "-"
    bits = next(f"{q.bits_per_weight:.2f}" for q in (row.their_plain, row.their_guided) if q is not None)
    pairs = ((row.their_plain, row.plain), (row.their_guided, row.guided))
    return bits, *("-" if q is None else "=" if q == ours else milli(q.divergence.mean) for q, ours in pairs)


def milli(nats: float) -> str:
    """Thousandths, to three figures; below a ten-thousandth of one, to one."""
    value = 1000 * nats
    if value < 1e-4:
        return f"{value:.0e}"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}"


def caption(facts: dict[str, Any]) -> str:
    """What the table is of, and how to read it."""
    training, versions, imatrix = facts["training"], facts["versions"], facts["imatrix"]
    found = next(q["divergence"] for row in facts["rows"] for q in (row["plain"], row["guided"]) if q is not None)
    paragraphs = (
        f"Measured on {facts['date']} ({facts['machine']}; xllamacpp {versions['xllamacpp']}, transformers "
        f"{versions['transformers']}, torch {versions['torch']}) on the model that `scripts/train_tiny.py --steps "
        f"{training['steps']} --seed {training['seed']}` made: {found['n_positions']:,} positions of its held-out "
        f"text, where the reference's perplexity is {found['reference_perplexity']:.3f}; importances (im) from "
        f"{imatrix['tokens']:,} tokens of {imatrix['from']}. A model this small is not E4B: the table ranks types, but "
        "does not predict their divergence there. The sizes are those of the small model.",
        'KL is the mean divergence from the reference in thousandths of a nat, "99 %" its 99th percentile; top-1 is in '
        'percent. The llama.cpp columns are for files with the bytes that llama-quantize writes. There "=" means the '
        'same bytes as ours, "refused" a mixture that it does not write for Gemma 3n. A dash stands where importances '
        "are needed or llama.cpp has no such mixture.",
    )
    return "\n".join(f"{textwrap.fill(paragraph, WIDTH, break_on_hyphens=False)}\n" for paragraph in paragraphs)


def surprises(rows: Sequence[Row]) -> list[str]:
    """Where the figures are not in the order that one expects."""
    found = []
    for row in rows:
        if row.plain and row.guided and worse(row.guided, row.plain):
            found.append(f"{row.name}: importances make it worse, {compared(row.guided, row.plain)}")
        pairs = (("", row.plain, row.their_plain), (" with importances", row.guided, row.their_guided))
        for label, ours, theirs in pairs:
            if ours and theirs and worse(ours, theirs) and ours.bits_per_weight >= theirs.bits_per_weight:
                found.append(f"{row.name}{label}: worse than llama.cpp's, {compared(ours, theirs)}")
    for label, files in (
        ("", [(row.name, row.plain) for row in rows if row.plain]),
        (" with importances", [(row.name, row.guided) for row in rows if row.guided]),
    ):
        for name, larger in files:
            smaller = [(other, q) for other, q in files if larger.bits_per_weight > q.bits_per_weight]
            best = min((pair for pair in smaller if worse(larger, pair[1])), key=lambda p: mean(p[1]), default=None)
            if best is not None:
                found.append(f"{name}{label}: worse than the smaller {best[0]}, {compared(larger, best[1])}")
    return found


def worse(one: Quality, other: Quality) -> bool:
    return mean(one) > mean(other) * SAME


def mean(quality: Quality) -> float:
    return quality.divergence.mean


def compared(one: Quality, other: Quality) -> str:
    return (
        f"KL {milli(mean(one))} against {milli(mean(other))} at {one.bits_per_weight:.2f} and "
        f"{other.bits_per_weight:.2f} bits"
    )
