"""Does llama.cpp with an mmproj file see what the reference model sees: the same pictures and questions to both.

Where llama.cpp shows the embeddings of a picture to nobody, what a model says next does: after each of some pictures
and each of some texts, the distribution over the next token is compared. Two things are told apart:

    the file        the reference is given what llama.cpp is: the picture padded to a square, and <end_of_image> as the
                    text file has it. What is left is the file's, and the text model's types. This is judged.
    the run time    the reference prepares the picture and embeds the mark in its own way. This is only said.

A distance alone says little of a file whose pictures hardly change what is said. So it is also asked whether the model
reacts to another picture as the reference does: by how much each token's log-probability changes, from one picture to
the next, against the same in the reference, as the cosine of the two.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gguf.constants import Keys
from numpy.typing import NDArray

from gguf3n.conversion import convert
from gguf3n.engines.distribution import log_softmax
from gguf3n.engines.llama_cpp import LlamaServer
from gguf3n.engines.llama_vision import VisionProcess
from gguf3n.engines.memory import Alternative, ModelNeed, check_memory, gigabytes, llama_cpp_need, vision_reference_need
from gguf3n.engines.pictures import PICTURES, Picture, as_png, padded
from gguf3n.engines.reference import check_device
from gguf3n.engines.vision_reference import EndRows, VisionReference, check_packages, image_tokens
from gguf3n.errors import GGUFError, SourceError, UsageError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.rows import RowReader
from gguf3n.gemma3n import mmproj
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.gemma3n.source import Checkpoint, Source
from gguf3n.gemma3n.text import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD
from gguf3n.inspection.subject import Subject
from gguf3n.progress import Meter, OnProgress
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.divergence import Divergence, kl_divergence, measure
from gguf3n.validation.document import Block, Table, Text
from gguf3n.validation.logits import Limits, base_qtype, judge, limits_for
from gguf3n.validation.options import ValidationOptions
from gguf3n.validation.result import Problem, Stage, StageResult, Verdict

BEFORE = "<start_of_turn>user\n\n\n"
"""What stands before a picture: the checkpoint's own processor puts empty lines around it, llama.cpp none."""
AFTER = ("\n\n", "\n\nWhat is this?", "\n\nWhat is this?<end_of_turn>\n<start_of_turn>model\n")
"""What stands after it; each is the beginning of the next."""

SAME, ALIKE = 0.75, 0.5
"""Cosine of two reactions from which on they are the same, and below which the model sees something else.

# measured: 2026-11-21, the small checkpoint, text model in F32: sound files of F16, lossless and Q8_0 0.999; with
# another projection -0.07, kernels of noise -0.06, one block zeroed 0.07, colours shifted 0.07, the first kernels
# transposed 0.44, layer scales of 1 0.53, the last norm left out 0.94 (its divergence warns). A sound file and a text
# model in Q4_0 0.82
"""

MADE_BYTES = 1_000_000_000
"""A text model up to this size is made for the comparison where none is named."""
MADE_AS = "F32"

N_CTX = 1024
"""Tokens of a picture and the longest text, and room for a picture in the batch."""
SMALLER = Alternative("--stages structure,tensors")

Row = NDArray[np.float32]


class Seeing(Protocol):
    """What answers for llama.cpp with the file."""

    name: str

    def logprobs_after_picture(self, before: str, png: bytes, after: str) -> Row: ...


@dataclass(frozen=True)
class VisionResult(StageResult):
    """How far what is said of pictures is from what the reference says, and why."""

    divergence: Divergence
    """From the reference that is given what llama.cpp is."""
    reaction: float
    """Cosine of what changes from one picture to the next, and what changes in the reference."""
    between_pictures: float
    """Mean divergence of the reference between pictures. Units: nats."""
    square: float
    """Mean divergence from the reference that prepares pictures in its own way, of square ones, where both agree."""
    not_square: float
    """Likewise of others, which llama.cpp pads and transformers squashes."""
    text_qtype: QType
    limits: Limits
    engine: str
    reference: str
    text: str
    """The text model's file."""
    pictures: tuple[str, ...]

    def lines(self) -> list[str]:
        found = self.divergence
        return [
            f"mean KL {found.mean:.3g} nats, at most {self.limits.good:.3g} with a text model in "
            f"{self.text_qtype.name}; max {found.maximum:.3g}",
            f"reacts to another picture as the reference does: cosine {self.reaction:.4f}, at least {SAME}",
            f"top-1 {found.top1_agreement:.1%}; two pictures are {self.between_pictures:.3g} nats apart",
            f"{len(self.pictures)} pictures, {found.n_positions} positions, text model {self.text}",
        ]

    @property
    def remarks(self) -> tuple[str, ...]:
        return (
            f"from transformers' own way with pictures: square ones {self.square:.3g} nats, others "
            f"{self.not_square:.3g}, as llama.cpp pads them and transformers squashes them",
        )

    def details(self) -> dict[str, Any]:
        return {
            "divergence": asdict(self.divergence),
            "reaction": self.reaction,
            "between_pictures": self.between_pictures,
            "own_preparation": {"square": self.square, "not_square": self.not_square},
            "text_qtype": self.text_qtype.name,
            "limits": asdict(self.limits),
            "engine": self.engine,
            "reference": self.reference,
            "text_model": self.text,
            "pictures": list(self.pictures),
        }

    def blocks(self, *, with_pictures: bool) -> Iterator[Block]:
        found = self.divergence
        yield Text(
            f"{self.engine} with this file and {self.text} against {self.reference}: {len(self.pictures)} pictures "
            f"({', '.join(self.pictures)}), each before {len(AFTER)} texts. The text model is mostly "
            f"{self.text_qtype.name}; a mean divergence of up to {self.limits.good:.3g} passes for it."
        )
        yield Table(
            ("measure (divergences in nats)", "value"),
            "<>",
            (
                ("positions compared", f"{found.n_positions:,}"),
                ("KL divergence, mean", f"{found.mean:.3g}"),
                ("KL divergence, maximum", f"{found.maximum:.3g}"),
                ("the most likely token is the same", f"{found.top1_agreement:.2%}"),
                ("reaction to another picture, cosine", f"{self.reaction:.4f}"),
                ("divergence of the reference between pictures", f"{self.between_pictures:.3g}"),
                ("from transformers' own preparation, square pictures", f"{self.square:.3g}"),
                ("from transformers' own preparation, others", f"{self.not_square:.3g}"),
            ),
        )


@dataclass(frozen=True)
class VisionRun:
    """Two models and what to show them, checked."""

    path: Path
    image_size: int
    reference: Checkpoint
    end_id: int
    """<end_of_image>'s."""
    text_file: Path | None
    """None: to be made."""
    server: LlamaServer | None
    options: ValidationOptions

    def run(self, progress: OnProgress | None = None) -> VisionResult:
        """Show the pictures to the reference, then to llama.cpp, and compare.

        Raises: GGUFError: llama.cpp does not load the file, or aborts. UsageError: the server cannot see.
            SourceError or a class below it.
        """
        started = time.monotonic()
        tick = Meter(Stage.VISION.value, "pictures", 2 * len(PICTURES), progress).advance
        with ExitStack() as stack:
            text_file = self.text_file
            if text_file is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gguf3n-")))
                (made,) = convert(
                    self.reference, MADE_AS, folder / f"text-{MADE_AS}.gguf", threads=self.options.threads
                )
                text_file = made.path
            subject = Subject(open_gguf(text_file))
            end = end_rows(subject, self.end_id)
            with VisionReference(self.reference, device=self.options.device, dtype=self.options.dtype) as reference:
                as_given, own = _reference_rows(reference, self.image_size, end, tick)
                reference_name = reference.name
            engine: Seeing = self.server or stack.enter_context(
                VisionProcess(text_file, self.path, n_ctx=N_CTX, n_threads=self.options.threads)
            )
            found = [rows for picture in PICTURES for rows in _llama_rows(engine, picture, tick)]
            engine_name = engine.name
        n_text = self.reference.config.vocab_size_per_layer_input
        as_given, own, found = ([row[:n_text] for row in rows] for rows in (as_given, own, found))
        divergence = measure(as_given, found)
        qtype = base_qtype(subject)
        limits = limits_for(qtype, self.options.dtype)
        reaction = reaction_cosine(as_given, found, len(AFTER))
        return VisionResult(
            problems=(*judge(divergence, qtype, limits), *_judge_reaction(reaction)),
            seconds=time.monotonic() - started,
            divergence=divergence,
            reaction=reaction,
            between_pictures=_mean(map(kl_divergence, as_given, as_given[len(AFTER) :])),
            square=_mean(_of(own, found, square=True)),
            not_square=_mean(_of(own, found, square=False)),
            text_qtype=qtype,
            limits=limits,
            engine=engine_name,
            reference=reference_name,
            text=str(self.text_file) if self.text_file else f"made for this, in {MADE_AS}",
            pictures=tuple(picture.name for picture in PICTURES),
        )


def _reference_rows(
    reference: VisionReference, image_size: int, end: EndRows, tick: Callable[[], None]
) -> tuple[list[Row], list[Row]]:
    """What the reference says when it is given what llama.cpp is, and when it does all in its own way.

    Raises: SourceError: texts that can't be compared in one pass; or a class below it.
    """
    prompts = reference.prompts(BEFORE, AFTER)
    longest = prompts[-1]
    positions = [len(ids) - 1 for ids in prompts]
    if not all(ids == longest[: len(ids)] for ids in prompts):
        raise SourceError(
            f"{reference.source.origin}: its tokenizer cuts a text otherwise when more text follows",
            expected="the tokens of each text of the comparison to begin those of the next",
            found=f"other ones, of {AFTER[-1]!r}",
            fix=SMALLER.option,
        )
    as_given, own = [], []
    for picture in PICTURES:
        pixels = picture.pixels()
        seen, by_itself = reference.see(padded(pixels, image_size)), reference.see(reference.squashed(pixels))
        as_given += reference.logprobs(longest, seen, positions, end)
        own += reference.logprobs(longest, by_itself, positions)
        tick()
    return as_given, own


def _llama_rows(engine: Seeing, picture: Picture, tick: Callable[[], None]) -> Iterator[Row]:
    png = as_png(picture.pixels())
    for after in AFTER:
        yield engine.logprobs_after_picture(BEFORE, png, after)
    tick()


def _of(reference: list[Row], found: list[Row], *, square: bool) -> Iterator[float]:
    for i, (p, q) in enumerate(zip(reference, found, strict=True)):
        if PICTURES[i // len(AFTER)].is_square is square:
            yield kl_divergence(p, q)


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))


def reaction_cosine(reference: list[Row], found: list[Row], n_texts: int) -> float:
    """Do log-probabilities change from one picture to the next as in the reference: the cosine of the changes.

    Shapes: rows `[vocab]`, picture by picture, `n_texts` of each.

    Why: what the types of the text model do to its answers is much the same for all pictures, and falls away here. A
    token counts by how likely it is.
    """
    dots = np.zeros(3)
    for i in range(len(reference) - n_texts):
        p, next_p = log_softmax(reference[i]), log_softmax(reference[i + n_texts])
        q, next_q = log_softmax(found[i]), log_softmax(found[i + n_texts])
        weights = np.exp(p) + np.exp(next_p)
        a, b = next_p - p, next_q - q
        a, b = a - np.average(a, weights=weights), b - np.average(b, weights=weights)
        dots += weights @ (a * b), weights @ (a * a), weights @ (b * b)
    product, own, other = dots
    return float(product / math.sqrt(own * other)) if own * other > 0 else 0.0


def _judge_reaction(reaction: float) -> Iterator[Problem]:
    if not reaction >= SAME:
        yield Problem(
            Verdict.WARN if reaction >= ALIKE else Verdict.FAIL,
            "reaction to another picture",
            f"cosine {reaction:.3f} with the reference's, expected at least {SAME}: the file shows the model something "
            "else than the picture",
        )


def prepare_vision(
    candidate: Candidate, part: Part, options: ValidationOptions, notice: Callable[[str], None] | None = None
) -> VisionRun:
    """See that both models can be shown pictures, before any work is done.

    Raises: UsageError: options that cannot be used, too little memory, packages that are not installed; GGUFError: a
        file that cannot be read, or has no vision encoder; SourceError or a class below it.
    """
    reference = part.source
    if not isinstance(reference, Checkpoint):
        raise UsageError(
            "vision is compared with a checkpoint's own model",
            expected="a checkpoint directory or a Hub id as --reference",
            found=reference.origin,
            fix=SMALLER.option,
        )
    check_packages()
    check_device(options.device, options.dtype)
    candidate.gguf.check()
    image_size = candidate.subject.integer(mmproj.IMAGE_SIZE)
    if image_size is None or image_size < 1:
        raise GGUFError(f"{candidate.path}: no vision encoder", expected=f"the key {mmproj.IMAGE_SIZE}")
    end_id = image_tokens(reference).eoi_token_id
    if options.server is not None and options.text_model is None:
        raise UsageError(
            "--server without --text-model", fix="name the text model's file that the server has loaded as well"
        )
    text_file = None if options.text_model is None else Path(options.text_model)
    needs = [vision_reference_need(reference, options.dtype, SMALLER)]
    if text_file is None:
        n_bytes = made_bytes(reference, "--text-model FILE")
        needs.append(ModelNeed(f"llama.cpp with a text model in {MADE_AS}", 2 * n_bytes, (SMALLER,)))
    else:
        subject = Subject(open_gguf(text_file))
        _check_text(subject, candidate, end_id)
        if options.server is None:
            needs.append(llama_cpp_need(subject, N_CTX, SMALLER))
    server = None if options.server is None else LlamaServer(options.server)
    if server is not None and not server.sees():
        raise UsageError(f"{server.url}: the server does not see", fix=f"start it with --mmproj {candidate.path.name}")
    check_memory(needs, notice=notice)
    return VisionRun(candidate.gguf.path, image_size, reference, end_id, text_file, server, options)


def made_bytes(reference: Source, instead: str) -> int:
    """Of the text model that is made where none is named. Raises: UsageError: it would be large."""
    n_bytes = 4 * text_part(reference).n_weights
    if n_bytes > MADE_BYTES:
        raise UsageError(
            "vision is compared through a text model, and there is none",
            expected="the text model's GGUF file of the same checkpoint",
            found=f"a checkpoint whose text model takes {gigabytes(n_bytes)} in {MADE_AS}",
            fix=f"{instead}, or {SMALLER.option}",
        )
    return n_bytes


def _check_text(subject: Subject, candidate: Candidate, end_id: int) -> None:
    """See that a text model's file fits. Raises: UsageError."""
    tokens = subject.array(Keys.Tokenizer.LIST)
    if not subject.is_gemma3n or tokens is None:
        raise UsageError(
            f"--text-model {subject.gguf.name}: not the text model of a Gemma 3n", fix="name the other of the two files"
        )
    width = subject.integer(Keys.LLM.EMBEDDING_LENGTH)
    wanted = candidate.subject.integer("clip.vision.projection_dim")
    if width != wanted or len(tokens) <= end_id:
        raise UsageError(
            f"--text-model {subject.gguf.name} does not fit {candidate.path.name}",
            expected=f"embeddings of {wanted}, more than {end_id:,} tokens",
            found=f"embeddings of {width}, {len(tokens):,} tokens",
            fix="convert the text model from the same checkpoint; files of 2025 have no <end_of_image>",
        )


def end_rows(subject: Subject, token_id: int) -> EndRows:
    """What a text file has for <end_of_image>. Raises: GGUFError."""
    gguf = subject.gguf
    found = []
    reader = RowReader()
    try:
        for name in (TOKEN_EMBD, PER_LAYER_TOKEN_EMBD):
            tensor = gguf.tensors.get(name)
            if tensor is None or tensor.shape[0] <= token_id:
                raise GGUFError(f"{gguf.name}: tensor {name!r} has no row {token_id:,}", expected="<end_of_image>'s")
            row = np.empty((1, tensor.shape[-1]), np.float32)
            reader.fill(gguf.stored(tensor), token_id, row)
            found.append(row[0])
    except SourceError as error:
        raise GGUFError(f"{gguf.name}: cannot be read", found=error.one_line) from error
    finally:
        reader.close()
    return EndRows(*found)
