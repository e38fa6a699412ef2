"""What can be made of llama.cpp's mixtures at their bytes: stock, the best single flag for a table, tuned.

Each variant's file is not larger than the mixture's, is quantized with the same importances, and is run in llama.cpp
over the same texts: the held-out text, Python programs, and the validation's text in twenty languages. Intervals are
those of a paired bootstrap over windows: in what share of resampled texts the ratio of mean divergences is how large.

The flag is chosen on the judging text itself, by measurement, among the two that the measured costs say are best: so
the comparison favours it.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gguf3n
from gguf3n.engines.activations import measure_importance
from gguf3n.engines.llama_cpp import Engine, open_llama_cpp
from gguf3n.engines.reference import Reference
from gguf3n.errors import QuantizationError
from gguf3n.formats.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from gguf3n.formats.sensitivity import Sensitivity, read_sensitivity, write_sensitivity
from gguf3n.gemma3n.part import text_part
from gguf3n.planning import Plan
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD, find_recipe, override
from gguf3n.tuning.allocate import Tuning, TypeLimits
from gguf3n.tuning.budget import Budget
from gguf3n.tuning.ladder import THEIRS, stock_plans
from gguf3n.tuning.measure import measure_sensitivity
from gguf3n.validation.divergence import Divergence, measure
from gguf3n.validation.texts import built_in_text
from workshop.quality import WIDTH, milli, scored
from workshop.timing import machine
from workshop.training import HELD_OUT, TRAIN, TRAINING

PROGRAMS = ("heapq.py", "textwrap.py", "fractions.py", "statistics.py")
"""Modules of the standard library whose code, without documentation strings, is the text of another kind."""
N_RESAMPLED = 2000
TYPES = "Q8_0,Q6_K,Q5_K,Q5_1,Q5_0,Q4_K,Q4_1,Q4_0,IQ4_NL,IQ4_XS,Q3_K,IQ3_S,Q2_K"
"""That are measured: those that no table needs importances for."""
N_FLAGS = 2
"""Single flags that are measured, the best by the measured costs."""

NamedPlan = tuple[str, Plan]


@dataclass(frozen=True)
class Options:
    """What is asked for, as on the command line."""

    mixtures: tuple[str, ...] = ("Q3_K_M", "Q4_K_M", "Q5_K_M")
    ctx: int = 256
    windows: int = 16
    imatrix_chunks: int = 100
    sensitivity_chunks: int = 64
    calibrations: int = 2
    threads: int = 2
    work: Path | None = None


@dataclass(frozen=True)
class Text:
    """What is judged on. Shapes: rows [n_windows, n_scored, vocab], log-probabilities of the reference."""

    name: str
    windows: list[list[int]]
    rows: NDArray[np.float32]


@dataclass(frozen=True)
class Calibration:
    """What is known of the model before files are made, from one part of the training text."""

    number: int
    imatrix: ImportanceMatrix
    sensitivity: Sensitivity


@dataclass(frozen=True)
class Result:
    """One file on one text. `divergences` are the windows' means; `interval` of the ratio to the stock file's, 95 %."""

    mixture: str
    calibration: int
    variant: str
    what: str
    text: str
    file_bytes: int
    expected: float | None
    divergence: Divergence
    divergences: tuple[float, ...]
    ratio: float
    interval: tuple[float, float]


Chooser = Callable[[Tuning, Plan], Iterator[NamedPlan]]


def stock(_tuning: Tuning, plan: Plan) -> Iterator[NamedPlan]:
    """The mixture itself."""
    yield plan.recipe.name, plan


def flagged(tuning: Tuning, plan: Plan) -> Iterator[NamedPlan]:
    """Every mixture of llama.cpp with one table in another type, within the bytes: those of the least expected cost."""
    found: list[tuple[float, str, Plan]] = []
    for recipe, _ in list(stock_plans(tuning)):
        if not recipe.name.endswith(THEIRS):
            continue
        for table in (PER_LAYER_TOKEN_EMBD, TOKEN_EMBD):
            for qtype in tuning.sensitivity.tensors[table].types:
                flag = f"{table}={qtype.name}"
                try:
                    changed = tuning.plan(override(recipe, tensor_types=[flag]))
                except QuantizationError:
                    continue
                expected = tuning.divergence(changed)
                if changed.total_bytes <= plan.total_bytes and expected is not None:
                    found.append((expected, f"{recipe.name} {flag.replace('.weight', '')}", changed))
    for _, name, changed in sorted(found, key=lambda each: each[0])[:N_FLAGS]:
        yield name, changed


def tuned(tuning: Tuning, plan: Plan) -> Iterator[NamedPlan]:
    """The recipe of gguf3n tune, of types that every engine looks tables up in."""
    yield "tuned", tuning.tune(Budget(plan.total_bytes, plan.recipe.name), "tuned").plan


STOCK, FLAG = "stock", "one flag"
VARIANTS: Mapping[str, Chooser] = {STOCK: stock, FLAG: flagged, "tuned": tuned}
"""What is compared, the first with all others. Of several files the best is taken, text by text."""


class Bench:
    """A checkpoint, the texts that judge, and files run over them."""

    def __init__(self, checkpoint: Path, options: Options) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.source = gguf3n.read_source(checkpoint)
        self.part = text_part(self.source)
        with Reference(checkpoint, device="cpu") as reference:
            self.texts = [
                self.text(reference, name, text)
                for name, text in (
                    ("held out", (checkpoint / HELD_OUT).read_text("utf-8")),
                    ("programs", programs()),
                    ("languages", built_in_text()),
                )
            ]

    def text(self, reference: Reference, name: str, text: str) -> Text:
        begin, *tokens = reference.tokenize(text)
        length = self.options.ctx - 1
        n_windows = min(self.options.windows, len(tokens) // length)
        windows = [[begin, *tokens[i * length : (i + 1) * length]] for i in range(n_windows)]
        rows = np.stack([np.stack(list(scored(reference, [window]))) for window in windows])
        return Text(name, windows, rows)

    def calibration(self, number: int) -> Calibration:
        """Importances, then sensitivities with them, each from chunks of the training text that nothing else reads."""
        options = self.options
        text = self.checkpoint / TRAIN
        work = options.work or Path(tempfile.mkdtemp(prefix="gguf3n-"))
        matrix, costs = work / f"imatrix-{number}.gguf", work / f"sensitivity-{number}.json"
        if not matrix.exists():
            first = number * options.imatrix_chunks
            write_imatrix(
                measure_importance(
                    self.source, [text], n_ctx=options.ctx, first_chunk=first, n_chunks=options.imatrix_chunks,
                    device="cpu",
                ),
                matrix,
            )  # fmt: skip
        imatrix = read_imatrix(matrix)
        if not costs.exists():
            first = options.calibrations * options.imatrix_chunks + number * options.sensitivity_chunks
            found = measure_sensitivity(
                self.source, [text], types=TYPES, imatrix=imatrix, n_ctx=options.ctx, first_chunk=first,
                n_chunks=options.sensitivity_chunks, seed=number, batch=16, device="cpu", threads=options.threads,
            )  # fmt: skip
            write_sensitivity(found, costs)
        return Calibration(number, imatrix, read_sensitivity(costs))

    def results(self, calibration: Calibration, mixture: str) -> Iterator[Result]:
        """All variants of one mixture on all texts."""
        tuning = Tuning(self.part, calibration.sensitivity, TypeLimits(), calibration.imatrix)
        plan = tuning.plan(find_recipe(mixture + THEIRS))
        base: dict[str, NDArray[np.float64]] = {}
        for variant, choose in VARIANTS.items():
            files = []
            for what, made in choose(tuning, plan):
                print(f"calibration {calibration.number}: {mixture}: {what}", file=sys.stderr, flush=True)
                files.append((what, made, self.run(made)))
            for number, text in enumerate(self.texts):
                what, made, found = min(files, key=lambda file: file[2][number][0].mean)
                divergence, windows = found[number]
                base.setdefault(text.name, windows)
                yield Result(
                    mixture, calibration.number, variant, what, text.name, made.total_bytes, tuning.divergence(made),
                    divergence, tuple(windows.tolist()), float(windows.mean() / base[text.name].mean()),
                    bootstrap(windows, base[text.name]),
                )  # fmt: skip

    def run(self, plan: Plan) -> list[tuple[Divergence, NDArray[np.float64]]]:
        """Writes the file, runs it over every text, removes it: all positions, and the mean of each window."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "candidate.gguf"
            gguf3n.write([plan], path, threads=self.options.threads)
            engine: Engine = open_llama_cpp(path, n_ctx=self.options.ctx, n_threads=self.options.threads)
            try:
                return [self.judged(engine, text) for text in self.texts]
            finally:
                engine.close()

    def judged(self, engine: Engine, text: Text) -> tuple[Divergence, NDArray[np.float64]]:
        rows = np.stack([np.stack(list(scored(engine, [window]))) for window in text.windows])
        following = [token for window in text.windows for token in window[len(window) // 2 + 1 :]]
        whole = measure(text.rows.reshape(-1, rows.shape[2]), rows.reshape(-1, rows.shape[2]), following)
        return whole, np.array([measure(*pair).mean for pair in zip(text.rows, rows, strict=True)])


def programs() -> str:
    """Code of the standard library without comments and documentation strings, which the model was trained on."""
    found = []
    for name in PROGRAMS:
        tree = ast.parse((Path(sysconfig.get_path("stdlib")) / name).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        found.append(ast.unparse(tree))
    return "\n\n".join(found)


def bootstrap(windows: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the ratio of two means, by windows drawn with replacement, the same for both."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(windows), (N_RESAMPLED, len(windows)))
    low, high = np.quantile(windows[drawn].mean(1) / base[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def compare_all(checkpoint: Path, options: Options) -> Iterator[dict[str, Any]]:
    """The results and how they came about, as in the JSON file: after each mixture those so far."""
    import torch
    import transformers
    import xllamacpp

    torch.set_num_threads(options.threads)
    training = json.loads((checkpoint / TRAINING).read_text("utf-8"))
    del training["losses"]
    bench = Bench(checkpoint, options)
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{machine()}, {options.threads} threads",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "xllamacpp": xllamacpp.__version__,
        },
        "training": training,
        "options": {key: value for key, value in asdict(options).items() if key != "work"},
        "texts": {text.name: [len(text.windows), int(text.rows.shape[0] * text.rows.shape[1])] for text in bench.texts},
    }
    results: list[Result] = []
    for number in range(options.calibrations):
        calibration = bench.calibration(number)
        for mixture in options.mixtures:
            results += bench.results(calibration, mixture)
            yield facts | {"results": [asdict(result) for result in results]}


def read_results(facts: dict[str, Any]) -> list[Result]:
    """The results of a JSON file."""
    return [
        Result(
            **result
            | {
                "divergence": Divergence(**result["divergence"]),
                "divergences": tuple(result["divergences"]),
                "interval": tuple(result["interval"]),
            }
        )
        for result in facts["results"]
    ]


def table(results: Sequence[Result]) -> str:
    """Markdown. Units: MB; 10⁻³ nats; percent."""
    calibrations = sorted({result.calibration for result in results})
    changes = [*(f"change {number}" for number in calibrations), "against a flag"]
    lines = [
        f"| | | text | MB | KL | median | 99 % | top-1 | PPL ratio | expected | {' | '.join(changes)} |",
        "|---|---|---|" + "--:|" * (7 + len(changes)),
    ]
    by_key = {(each.mixture, each.variant, each.text, each.calibration): each for each in results}
    for result in results:
        if result.calibration != calibrations[0]:
            continue
        found = result.divergence
        assert found.candidate_perplexity is not None and found.reference_perplexity is not None
        flag = by_key[result.mixture, FLAG, result.text, result.calibration]
        others = [by_key.get((result.mixture, result.variant, result.text, number)) for number in calibrations]
        cells = [
            f"`{result.mixture}`",
            result.variant,
            result.text,
            f"{result.file_bytes / 1e6:.2f}",
            milli(found.mean),
            milli(found.median),
            milli(found.p99),
            f"{100 * found.top1_agreement:.1f}",
            f"{found.candidate_perplexity / found.reference_perplexity:.4f}",
            "-" if result.expected is None else milli(result.expected),
            *("" if result.variant == STOCK else change(other) for other in others),
            "" if result.variant in (STOCK, FLAG) else against(result, flag),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def against(result: Result, other: Result) -> str:
    """The change from another than the stock file."""
    windows, base = np.array(result.divergences), np.array(other.divergences)
    return change(replace(result, ratio=float(windows.mean() / base.mean()), interval=bootstrap(windows, base)))


def change(result: Result | None) -> str:
    """As in "-77 % (-80 to -73)"; a dash of what was not measured."""
    if result is None:
        return "-"
    low, high = (100 * (ratio - 1) for ratio in result.interval)
    return f"{100 * (result.ratio - 1):+.0f} % ({low:+.0f} to {high:+.0f})"


def caption(facts: dict[str, Any]) -> str:
    """What the table is of, and how to read it."""
    training, versions, options = facts["training"], facts["versions"], facts["options"]
    texts = ", ".join(f"{name} ({n:,} positions)" for name, (_, n) in facts["texts"].items())
    flags = sorted({each["what"] for each in facts["results"] if each["variant"] == "one flag"})
    paragraphs = (
        f"Measured on {facts['date']} ({facts['machine']}; xllamacpp {versions['xllamacpp']}, transformers "
        f"{versions['transformers']}, torch {versions['torch']}) on the model that `scripts/train_tiny.py --steps "
        f"{training['steps']} --ctx {training['ctx']} --seed {training['seed']}` made, perplexity "
        f"{training['perplexity_after']:.1f} on its held-out text. Texts: {texts}, in windows of {options['ctx']} "
        "tokens whose second halves are scored. No published Gemma 3n was measured: a model this small ranks methods "
        "and does not foretell the size of a gain.",
        f"Each calibration has importances from {options['imatrix_chunks']} chunks and sensitivities from "
        f"{options['sensitivity_chunks']} chunks of {options['ctx']} tokens of the training text, none of them in "
        "another, and its own seed. KL is the mean divergence in llama.cpp from the reference, in thousandths of a "
        'nat, "expected" what was predicted of the file. All figures are the first calibration\'s; "change" is that of '
        "the mean against stock, with the 95 % interval of a paired bootstrap over windows, for each calibration; "
        "the last column is that against the file with one flag.",
        f"The single flags that were best by measurement: {'; '.join(flags)}.",
    )
    return "\n".join(f"{textwrap.fill(paragraph, WIDTH, break_on_hyphens=False)}\n" for paragraph in paragraphs)
