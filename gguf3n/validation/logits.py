"""Does llama.cpp with a file say what the reference model says: the same tokens through both, position by position.

As llama-perplexity does it, so that the numbers compare: the text is cut into chunks of n_ctx tokens, each is read for
itself with the begin mark in place of its first token, and the distributions in its second half are scored.

    checkpoint directory    transformers    ->  log-probabilities  ->  llama.cpp with the file  ->  divergence
    unquantized GGUF file   llama.cpp           of all scored
    --use-reference         (not run)           positions, in a file

The reference is freed before llama.cpp is started, and one position at a time is in memory. Where the vocabularies are
of different length, one of them is padded (262,144 tokens, or 262,400): the tokens that both have are compared, and
each distribution is normalized over them.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import Keys
from numpy.typing import NDArray

from gguf3n.engines.llama_cpp import Engine, LlamaServer
from gguf3n.engines.llama_process import LlamaProcess
from gguf3n.engines.memory import SMALLER_STAGES, Alternative, check_memory, gigabytes, models_needs, source_need
from gguf3n.engines.reference import Reference, check_device
from gguf3n.engines.reference_tokenizers import open_reference
from gguf3n.errors import GGUFError, UsageError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.logprobs import SavedLogprobs, open_logprobs, rows_bytes, scored_positions, write_logprobs
from gguf3n.formats.whole_file import check_not_input, check_output, check_space
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.part import Part
from gguf3n.gemma3n.source import Checkpoint, GGUFSource, Source
from gguf3n.inspection.subject import Subject
from gguf3n.progress import Meter, OnProgress
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.divergence import Divergence, measure
from gguf3n.validation.document import Block, Table, Text
from gguf3n.validation.fingerprint import check_saved, fingerprint
from gguf3n.validation.options import N_CTX, ValidationOptions
from gguf3n.validation.result import Problem, Stage, StageResult, Verdict
from gguf3n.validation.texts import built_in_text

MIN_CTX = 4
"""A chunk that has a second half."""

MAX_TOKEN_CHARACTERS = 64
"""More than a text has a token; of a longer text only as much is tokenized as can be needed."""


@dataclass(frozen=True)
class Limits:
    """What is expected of a file. Units: nats.

    A mean KL divergence up to `good` passes, up to `poor` warns; below `top1` agreement on the likeliest token fails.
    """

    good: float
    poor: float
    top1: float


# fmt: off
LIMITS: Mapping[QType, Limits] = {
    #                       good  poor  top1     small   8B       same
    QType.F32:       Limits(1e-3, 5e-3, 0.97),  # 5e-7
    QType.F16:       Limits(1e-3, 5e-3, 0.97),  # 7e-7   2.5e-5   99.7 %
    QType.BF16:      Limits(2e-3, 8e-3, 0.96),  # 1.1e-5
    QType.Q8_0:      Limits(3e-3, 1e-2, 0.93),  # 2.6e-4 0.0014   97.7 %
    QType.Q6_K:      Limits(.015, 0.04, 0.90),  # 0.0018 0.0055   96.0 %
    QType.Q5_K:      Limits(0.04, 0.10, 0.85),  # 0.0040 0.011
    QType.Q5_1:      Limits(0.04, 0.10, 0.85),  # 0.0039 0.018
    QType.Q5_0:      Limits(0.05, 0.15, 0.85),  # 0.0050 0.022
    QType.Q4_K:      Limits(0.10, 0.30, 0.80),  # 0.012  0.031    91.9 %
    QType.IQ4_NL:    Limits(0.10, 0.30, 0.80),  # 0.013  0.036
    QType.IQ4_XS:    Limits(0.10, 0.30, 0.80),  # 0.013  0.036
    QType.Q4_1:      Limits(0.18, 0.50, 0.75),  # 0.012  0.072
    QType.Q4_0:      Limits(0.18, 0.50, 0.75),  # 0.015  0.072
    QType.IQ3_S:     Limits(0.30, 0.80, 0.65),  # 0.030  0.11
    QType.Q3_K:      Limits(0.50, 1.20, 0.60),  # 0.031  0.10, 0.23 for Q3_K_S
    QType.IQ3_XXS:   Limits(0.45, 1.20, 0.60),  # 0.057  0.18
    QType.Q2_K:      Limits(1.00, 2.00, 0.40),  # 0.075  0.45     71.1 %
    QType.IQ2_S:     Limits(1.00, 2.00, 0.40),  # 0.088  0.44
    QType.IQ2_XS:    Limits(1.20, 2.50, 0.35),  # 0.091  0.55
    QType.IQ2_XXS:   Limits(1.60, 3.00, 0.30),  # 0.11   0.81
    QType.IQ1_M:     Limits(2.50, 5.00, 0.20),  # 0.14   1.4
    QType.IQ1_S:     Limits(4.00, 7.00, 0.10),  # 0.16   2.3
    QType.TQ2_0:     Limits(4.00, 8.00, 0.10),
    QType.TQ1_0:     Limits(4.00, 8.00, 0.10),
}
# fmt: on
"""Of a file by the type of most of its layers' weights.

Why: the columns behind them are mean KL divergences, measured on the small random checkpoint of
scripts/make_checkpoint.py (2 x 512 tokens of the built-in text, against float32) and by llama.cpp's authors on Llama 3
8B, with the share of positions with the same likeliest token. Trained models of real size are further from their
reference than the small one, so `good` is two to three times the larger of both.

Faults of structure, planted in the small one, give: another rope base 0.014 to 0.056, another sliding pattern 0.020,
half the window 0.047, AltUp matrices in another order 0.13, two neighbouring layers swapped 0.011 to 0.029, one norm
+ 1 0.0023, all norms + 1 2.1. All of these but one norm fail in a file of F32, F16, BF16 or Q8_0; in coarser types the
structure and tensors stages find them. What llama.cpp has built in changes nothing here, whatever the keys say:
shared_kv_layers, final_logit_softcapping.

Source: tools/perplexity/README.md of llama.cpp, "LLaMA 3 8b Scoreboard" and the comparisons after it.
"""

UNKNOWN_TYPE = Limits(4.0, 8.0, 0.1)
"""For types that no recipe of ours writes."""

BFLOAT16_NOISE = 3e-3
"""Added to both limits where the reference is computed in bfloat16.

# measured: 3.4e-4 between bfloat16 and float32 in torch on the small checkpoint
"""


ROUNDING: Mapping[str, float] = {"float32": 2**-11, "bfloat16": 2**-6}
"""By the reference's dtype, the share by which other engines' linear layers are taken to differ.

# measured: 2^-11 gives a mean KL divergence of 4.7e-7 on the small checkpoint, where llama.cpp with an F32 file gives
5.0e-7. With four of its norms 1.5, 2 and 2.3 times as large: 1.9e-5, 0.0027 and 0.020 against 2.0e-5, 0.0033 and 0.021
(2026-11-21). Disturbances half as large give a quarter; that of bfloat16 follows from BFLOAT16_NOISE by this rule.
"""

NOISE_FACTOR = 3
"""Times what the disturbed reference shows is allowed. Why: the engines differ in more than their linear layers."""

PASSED = "not measured, as the file passes without"
NOT_RUN = "not measured, as a saved reference was used"
ONE_ENGINE = "not measured, as llama.cpp runs both"


@dataclass(frozen=True)
class LogitsResult(StageResult):
    """How far the file is from its reference, on which text, by which engines."""

    divergence: Divergence
    base_qtype: QType
    """Of most weights of the layers; `limits` are that type's."""
    limits: Limits
    engine: str
    reference: str
    n_ctx: int
    n_chunks: int
    n_vocab: int
    """Tokens that are compared."""
    noise: Divergence | str
    """Of the unquantized reference from itself, where it is disturbed as another engine's rounding does; or why this
    was not measured."""

    @property
    def noise_said(self) -> str:
        if isinstance(self.noise, str):
            return self.noise
        return f"mean {self.noise.mean:.3g} nats, top-1 {self.noise.top1_agreement:.1%}"

    def lines(self) -> list[str]:
        found = self.divergence
        return [
            f"mean KL {found.mean:.3g} nats, at most {self.limits.good:.3g} for {self.base_qtype.name}",
            f"median {found.median:.3g}, 95th {found.p95:.3g}, 99th {found.p99:.3g}, max {found.maximum:.3g}",
            f"top-1 {found.top1_agreement:.1%}, top-5 {found.top5_agreement:.1%}",
            f"perplexity {found.candidate_perplexity:.4g}, reference {found.reference_perplexity:.4g}",
            f"{found.n_positions:,} positions, tokens {self.n_chunks} x {self.n_ctx}",
            f"engines' noise: {self.noise_said}",
        ]

    def details(self) -> dict[str, Any]:
        return {
            "divergence": asdict(self.divergence),
            "limits": asdict(self.limits),
            "base_qtype": self.base_qtype.name,
            "engine": self.engine,
            "reference": self.reference,
            "n_ctx": self.n_ctx,
            "n_chunks": self.n_chunks,
            "n_vocab": self.n_vocab,
            "noise": None if isinstance(self.noise, str) else asdict(self.noise),
            "noise_said": self.noise_said,
        }

    def blocks(self, *, with_pictures: bool) -> Iterator[Block]:
        yield Text(
            f"{self.engine} with this file against {self.reference}: {self.n_chunks:,} chunks of {self.n_ctx:,} "
            f"tokens, the second half of each scored, over {self.n_vocab:,} tokens. Most weights of the layers are "
            f"{self.base_qtype.name}; a mean divergence of up to {self.limits.good:.3g} passes for it, one of up to "
            f"{self.limits.poor:.3g} warns."
        )
        yield _divergence_table(self.divergence)
        yield Text(
            "The engines' own noise, by the unquantized reference and the same with other rounding: "
            f"{self.noise_said}. A model for which it is large is chaotic; its distributions say little of a file."
        )


def _divergence_table(divergence: Divergence) -> Table:
    rows = [
        ("positions compared", f"{divergence.n_positions:,}"),
        ("KL divergence, mean", f"{divergence.mean:.3g}"),
        ("KL divergence, median", f"{divergence.median:.3g}"),
        ("KL divergence, 95th percentile", f"{divergence.p95:.3g}"),
        ("KL divergence, 99th percentile", f"{divergence.p99:.3g}"),
        ("KL divergence, maximum", f"{divergence.maximum:.3g}"),
        ("the most likely token is the same", f"{divergence.top1_agreement:.2%}"),
        ("of the five most likely are the same", f"{divergence.top5_agreement:.2%}"),
    ]
    perplexities = (("the reference", divergence.reference_perplexity), ("this file", divergence.candidate_perplexity))
    rows += [(f"perplexity of {who}", f"{value:.4f}") for who, value in perplexities if value is not None]
    return Table(("measure (divergences in nats)", "value"), "<>", tuple(rows))


def prepare_logits(
    candidate: Candidate,
    part: Part,
    options: ValidationOptions,
    notice: Callable[[str], None] | None = None,
    *,
    n_compared: int | None = None,
) -> LogitsRun:
    """See that both models can be run over a text, before any work is done.

    Args:
        part: of the reference, a checkpoint or an unquantized GGUF file.
        notice: called with a line that says what memory it takes.
        n_compared: tokens that are compared, where the text has no others; by default all that both have.

    Raises: UsageError: options that cannot be used, too little memory, packages that are not installed. GGUFError: a
        file that cannot be read, or lacks tokens of the text. SourceError or a class below it. OutputError.
    """
    reference = part.source
    saved = None if options.use_reference is None else open_logprobs(options.use_reference)
    if saved is None and isinstance(reference, Checkpoint):
        check_device(options.device, options.dtype)
    if options.save_reference is not None:
        read = [each.path for each in (options.imatrix, options.correlations) if each is not None]
        check_not_input(options.save_reference, candidate.path, *reference.files, options.text_model, *read)
        check_output(options.save_reference, force=options.force)
    running = None if options.server is None else LlamaServer(options.server)
    candidate.gguf.check()
    subject = candidate.subject
    if saved is not None:
        check_saved(saved, part, options, notice)
    qtype, n_vocab = base_qtype(subject), _n_tokens(subject)
    context = subject.integer(Keys.LLM.CONTEXT_LENGTH)
    if saved is None and context is not None and options.n_ctx > context:
        raise UsageError(
            "--ctx is more than the model reads", expected=f"at most {context:,}", found=f"{options.n_ctx:,}"
        )
    disk = ""
    if saved is None:
        n_reference_tokens = _n_reference_tokens(reference)
        chunks = read_chunks(reference, options.text, options.n_ctx, options.n_tokens)
        target = options.save_reference or Path(tempfile.gettempdir(), "reference.safetensors")
        n_bytes = rows_bytes(target, chunks, n_reference_tokens)
        check_space(target, n_bytes)
        disk = f"{gigabytes(n_bytes)} on the disk in {target.parent}"
    else:
        n_reference_tokens = saved.n_vocab
        chunks = _with_begin_mark(saved, subject)
    n_common = min(n_reference_tokens, n_vocab)
    if chunks.max() >= n_common:
        raise GGUFError(
            f"{candidate.path}: its vocabulary lacks tokens of the text",
            expected=f"more than {chunks.max():,} tokens",
            found=f"{n_common:,}",
        )
    if n_compared is not None and chunks.max() < n_compared:
        n_common = min(n_common, n_compared)
    needs = models_needs(None if saved else reference, subject, chunks.shape[1], options.dtype, options.server)
    check_memory(needs, disk=disk, notice=notice)
    return LogitsRun(candidate.gguf.path, part, chunks, qtype, n_vocab, n_common, running, saved, options)


def check_fits(reference: Source) -> None:
    """See that the reference fits as it is run by default, before a file is written to be held against it.

    Raises: UsageError.
    """
    check_memory([source_need(reference, ValidationOptions().dtype, N_CTX, LATER)])


LATER = Alternative(f"{SMALLER_STAGES}, and for the logits gguf3n validate, with --dtype bfloat16")
"""Where a file is still to be written and validated."""


@dataclass(frozen=True)
class LogitsRun:
    """Two models and a text, checked. Shapes: chunks int32[n_chunks, n_ctx]."""

    path: Path
    part: Part
    """Of the reference."""
    chunks: NDArray[np.int32]
    qtype: QType
    n_vocab: int
    """Tokens of the file."""
    n_common: int
    """Those that are compared."""
    server: LlamaServer | None
    saved: SavedLogprobs | None
    """The reference's log-probabilities, where they are there already."""
    options: ValidationOptions

    def run(self, progress: OnProgress | None = None) -> LogitsResult:
        """Run the reference, then llama.cpp, and compare.

        Args:
            progress: called in scored positions of both models.

        Raises: GGUFError: llama.cpp does not load the file, or aborts. UsageError: the server or the device cannot.
            SourceError or a class below it. OutputError.
        """
        started = time.monotonic()
        n_ctx, options = self.chunks.shape[1], self.options
        n_positions = (1 if self.saved else 2) * _n_scored(self.chunks)
        tick = Meter(Stage.LOGITS.value, "positions", n_positions, progress).advance
        with tempfile.TemporaryDirectory(prefix="gguf3n-") as temporary:
            saved = self.saved or run_reference(
                self.part,
                self.chunks,
                options.save_reference or Path(temporary) / "reference.safetensors",
                options,
                tick,
            )
            n_common = self.n_common
            with closing(self.server or LlamaProcess(self.path, n_ctx=n_ctx, n_threads=options.threads)) as engine:
                divergence = measure(
                    (row[:n_common] for row in saved.rows()),
                    (row[:n_common] for row in _rows(engine, self.chunks, self.n_vocab, tick)),
                    [int(token) for chunk in self.chunks for token in chunk[scored_positions(n_ctx).start + 1 :]],
                    floor=saved.floor,
                )
                engine_name = engine.name
            limits = limits_for(self.qtype, saved.metadata.get("dtype", "float32"))
            problems = tuple(judge(divergence, self.qtype, limits))
            noise: Divergence | str = PASSED
            if problems:
                noise = self._noise(saved, progress)
            if isinstance(noise, Divergence):
                problems = tuple(judge(divergence, self.qtype, limits, noise))
        return LogitsResult(
            problems=problems,
            seconds=time.monotonic() - started,
            divergence=divergence,
            base_qtype=self.qtype,
            limits=limits,
            engine=engine_name,
            reference=saved.metadata.get("engine", saved.path.name),
            n_ctx=n_ctx,
            n_chunks=len(self.chunks),
            n_vocab=n_common,
            noise=noise,
        )

    def _noise(self, saved: SavedLogprobs, progress: OnProgress | None) -> Divergence | str:
        """How far the reference is from itself with other rounding, or why that is not known."""
        if self.saved is not None:
            return NOT_RUN
        if not isinstance(self.part.source, Checkpoint):
            return ONE_ENGINE
        tick = Meter(Stage.LOGITS.value, "positions", _n_scored(self.chunks), progress).advance
        with closing(Reference(self.part.source, device=self.options.device, dtype=self.options.dtype)) as engine:
            engine.disturb(ROUNDING[self.options.dtype])
            rows = _rows(engine, self.chunks, saved.n_vocab, tick)
            n_common = self.n_common
            return measure(
                (row[:n_common] for row in saved.rows()), (row[:n_common] for row in rows), floor=saved.floor
            )


def read_chunks(reference: Source, text: str | None, n_ctx: int, n_tokens: int) -> NDArray[np.int32]:
    """A text in chunks, by the reference's tokenizer.

    Shapes: `[n_chunks, n_ctx]`; n_ctx is less where there is less text, or less is wanted, than one chunk.

    Raises: UsageError: the text is too short.
    """
    text = built_in_text() if text is None else text
    with closing(open_reference(reference)) as tokenizer:
        ids = tokenizer.encode(text[: n_tokens * MAX_TOKEN_CHARACTERS])
        begin = tokenizer.bos_id if ids[:1] == [tokenizer.bos_id] else None
    n_ctx = min(n_ctx, n_tokens, len(ids))
    if n_ctx < MIN_CTX:
        raise UsageError(
            "the text is too short", expected=f"at least {MIN_CTX} tokens", found=f"{n_ctx}", fix="give another --text"
        )
    n_chunks = min(n_tokens, len(ids)) // n_ctx
    chunks = np.array(ids[: n_chunks * n_ctx], np.int32).reshape(n_chunks, n_ctx)
    if begin is not None:
        chunks[:, 0] = begin
    return chunks


def run_reference(
    part: Part,
    chunks: NDArray[np.int32],
    target: Path,
    options: ValidationOptions,
    tick: Callable[[], None] = lambda: None,
) -> SavedLogprobs:
    """Run the reference over chunks into a file.

    Shapes: chunks `[n_chunks, n_ctx]`.
    """
    reference = part.source
    n_vocab = _n_reference_tokens(reference)
    engine: Reference | LlamaProcess
    dtype = options.dtype
    if isinstance(reference, GGUFSource):
        path, dtype = reference.gguf.path, "float32"
        engine = LlamaProcess(path, n_ctx=chunks.shape[1], n_threads=options.threads)
    else:
        engine = Reference(reference, device=options.device, dtype=dtype)
    with closing(engine):
        metadata = {"reference": reference.read_from, "engine": engine.name, "dtype": dtype}
        metadata |= fingerprint(part, options)
        with write_logprobs(target, chunks, n_vocab, metadata=metadata, force=options.force) as writer:
            for row in _rows(engine, chunks, n_vocab, tick):
                writer.add(row)
    return open_logprobs(target)


def base_qtype(subject: Subject) -> QType:
    """The type of most weights of the layers' matrices that are evaluated.

    Raises: GGUFError: there is none.
    """
    counts: Counter[QType] = Counter()
    for tensor, rule, bid in subject.known_tensors():
        if bid is not None and rule.storage is Storage.QUANTIZABLE and not subject.is_idle(tensor.name):
            counts[tensor.qtype] += tensor.n_weights
    if not counts:
        raise GGUFError(f"{subject.gguf.name}: no matrices of a Gemma 3n", expected="blk.0.attn_q.weight and others")
    return counts.most_common(1)[0][0]


def limits_for(qtype: QType, dtype: str = "float32") -> Limits:
    """What is expected of a file of this type against a reference that is computed in `dtype`."""
    limits = LIMITS.get(qtype, UNKNOWN_TYPE)
    noise = BFLOAT16_NOISE if dtype == "bfloat16" else 0.0
    return Limits(limits.good + noise, limits.poor + noise, limits.top1)


def judge(divergence: Divergence, qtype: QType, limits: Limits, noise: Divergence | None = None) -> Iterator[Problem]:
    """What is not as it should be; what is not a number is not.

    Args:
        noise: of the engines on the unquantized weights, where it was measured: what it explains is no fault of the
            file, and no proof of it either.
    """
    too_far, too_different = _beyond(divergence, limits)
    if noise is not None and (too_far or too_different) and not any(_beyond(divergence, _widened(limits, noise))):
        yield Problem(
            Verdict.WARN,
            "chaotic model",
            f"mean {divergence.mean:.3g} nats, expected at most {limits.good:.3g} for {qtype.name}, but the "
            f"unquantized model alone differs by {noise.mean:.3g} where it is rounded otherwise: this says little",
        )
        return
    if too_far:
        yield Problem(
            Verdict.WARN if divergence.mean <= limits.poor else Verdict.FAIL,
            "KL divergence",
            f"mean {divergence.mean:.3g} nats, expected at most {limits.good:.3g} for {qtype.name}",
        )
    if too_different:
        yield Problem(
            Verdict.FAIL,
            "most likely token",
            f"the same at {divergence.top1_agreement:.1%} of positions, expected at least {limits.top1:.0%} "
            f"for {qtype.name}",
        )


def _beyond(divergence: Divergence, limits: Limits) -> tuple[bool, bool]:
    """Whether a file is too far from its reference, and whether it holds another token likeliest too often."""
    n_different = round((1 - divergence.top1_agreement) * divergence.n_positions)
    too_different = divergence.top1_agreement < limits.top1 and n_different > 1  # one is chance, however few there are
    return not divergence.mean <= limits.good, too_different


def _widened(limits: Limits, noise: Divergence) -> Limits:
    """What a good file may reach in engines that differ so much."""
    top1 = limits.top1 - NOISE_FACTOR * (1 - noise.top1_agreement)
    return Limits(limits.good + NOISE_FACTOR * noise.mean, limits.poor, top1)


def _rows(
    engine: Engine, chunks: NDArray[np.int32], n_vocab: int, tick: Callable[[], None]
) -> Iterator[NDArray[np.float32]]:
    """The log-probabilities at the scored positions, chunk by chunk. Raises: UsageError: of another vocabulary."""
    for chunk in chunks:
        # the last token is never read: nothing is known of what follows it
        for row in engine.logprobs(chunk[:-1].tolist(), first=scored_positions(len(chunk)).start):
            if len(row) != n_vocab:
                raise UsageError(
                    f"{engine.name}: another vocabulary than the file's",
                    expected=f"{n_vocab:,} tokens",
                    found=f"{len(row):,}",
                    fix="start llama-server with this file",
                )
            yield row
            tick()


def _n_scored(chunks: NDArray[np.int32]) -> int:
    return len(chunks) * len(scored_positions(chunks.shape[1]))


def _n_tokens(subject: Subject) -> int:
    tokens = subject.array(Keys.Tokenizer.LIST)
    if tokens is None:
        raise GGUFError(f"{subject.gguf.name}: no vocabulary", expected=f"the key {Keys.Tokenizer.LIST}")
    return len(tokens)


def _n_reference_tokens(reference: Source) -> int:
    if isinstance(reference, GGUFSource):
        return _n_tokens(Subject(reference.gguf))
    assert isinstance(reference, Checkpoint), reference
    return reference.config.vocab_size


def _with_begin_mark(saved: SavedLogprobs, subject: Subject) -> NDArray[np.int32]:
    """The chunks as they were read: llama-perplexity puts the begin mark in their first place, but not in its file."""
    chunks = saved.token_ids.copy()
    begin = subject.integer(Keys.Tokenizer.BOS_ID)
    if saved.is_kld and begin is not None:
        chunks[:, 0] = begin
    return chunks
