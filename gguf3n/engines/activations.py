"""An importance matrix from the reference model: how large each input column of each matrix is over a text.

    text     joined, tokenized once, cut into chunks of n_ctx tokens; what is left over at the end is not read
    chunk    read alone, its first token replaced by the begin mark
    entry    of a matrix: for each input column the sum of its squared values, and how many inputs were summed

Every matrix of a layer that is evaluated has an entry: these are llama-imatrix's. AltUp's router is evaluated twice a
token, so its count is twice the others'. The two embedding tables have entries that llama-imatrix does not make:

    token_embd             the output of the last norm, which this table multiplies as the output matrix
    per_layer_token_embd   the gate of each layer, which multiplies what is gathered from this table, column by column

Correlations, where they are wanted, are of the same inputs: the sums of the products of columns, in float32, for the
matrices that are quantized. For per_layer_token_embd they are those of the gate, each product weighed by that of the
two columns of per_layer_projection, which multiplies what comes out: E[g g^T] * (P^T P), layer by layer.

How often the text uses a token has no place in a file: an entry weighs columns, and every row of a table is quantized
on its own.

Memory is that of the model and of one chunk's activations, and twice the correlations.

Source: tools/imatrix/imatrix.cpp of llama.cpp (collect_imatrix, compute_imatrix).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.memory import Alternative, check_memory, reference_need
from gguf3n.engines.reference import HEAD_POSITIONS, Reference, check_device
from gguf3n.engines.reference_tokenizers import open_reference
from gguf3n.errors import QuantizationError, SourceError, UsageError
from gguf3n.formats.correlations import BLOCK, Correlations, block_width
from gguf3n.formats.correlations import Entry as CorrelationsEntry
from gguf3n.formats.imatrix import Entry, ImportanceMatrix, chunk_count
from gguf3n.formats.small_file import MAX_TEXT_BYTES, read_text
from gguf3n.gemma3n.refinement import has_own_entry, measured_bytes
from gguf3n.gemma3n.source import Source, open_checkpoint
from gguf3n.gemma3n.text import PER_LAYER_INP_GATE, written_order
from gguf3n.progress import Meter, OnProgress
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD

BLOCKS, FULL = WIDTHS = ("blocks", "full")
"""What correlations may be of."""

N_CTX = 512
MIN_CTX = 16

# measured: 2026-11-21, the model of scripts/train_tiny.py, 40 chunks of its training text; change of the mean KL
# divergence on 4,096 held-out tokens where only that table is quantized, with its entry against without:
#                         Q2_K  Q3_K  Q4_0  Q4_1  Q4_K  Q5_0  Q5_1  Q5_K  Q6_K  IQ3_S  IQ4_NL
#   token_embd            -5 %   -10    -9   -18   -15   -19   -35   -11   -16    -44      -5
#   per_layer_token_embd  -9 %    -4    -8   -20    -8   -10   -16    -8    -1    -37      -1
# Mean squares of the rows, weighted by how often the text uses them (usage counts), in place of the entry:
#   token_embd           -13 %    -4    -8   -14    -6   -16   -26     0   -11    -36      +2
# The input of each layer's projection, in place of the gate: -7 % to +12 % against weights that are all one. Not kept.


@dataclass(frozen=True)
class Measurement:
    """What is known after a number of chunks.

    Shapes: sums float64[n_per_row], by GGUF name; `counts` by the same names.
    `perplexity` is that of the second half of each chunk, as llama-imatrix prints it.
    """

    datasets: tuple[str, ...]
    n_ctx: int
    n_vocab: int
    first_chunk: int
    n_chunks: int
    """To be read in all."""
    n_done: int
    perplexity: float
    seen: frozenset[int]
    """The tokens that were read."""
    sums: Mapping[str, NDArray[np.float64]]
    counts: Mapping[str, int]
    correlations: Correlations | None = None

    @property
    def imatrix(self) -> ImportanceMatrix:
        """What a file holds."""
        entries = {
            name: Entry(sums.astype(np.float32).reshape(1, -1), np.array([self.counts[name]], np.float32))
            for name, sums in self.sums.items()
        }
        return ImportanceMatrix(
            Path("measured"), entries, self.datasets, chunk_count(entries.values(), self.n_ctx), self.n_ctx
        )


def measure_importance(
    source: str | Path | Source,
    texts: Sequence[str | Path],
    *,
    n_ctx: int = N_CTX,
    n_chunks: int | None = None,
    first_chunk: int = 0,
    special: bool = False,
    tables: bool = True,
    device: str = "auto",
    dtype: str = "float32",
    progress: OnProgress | None = None,
) -> ImportanceMatrix:
    """Run the reference model over texts; arguments and errors as for `measure_chunks`.

    Args:
        progress: is called after each chunk.
    """
    meter: Meter | None = None
    for measurement in measure_chunks(
        source,
        texts,
        n_ctx=n_ctx,
        n_chunks=n_chunks,
        first_chunk=first_chunk,
        special=special,
        tables=tables,
        device=device,
        dtype=dtype,
    ):
        meter = meter or measuring(measurement.n_chunks, progress)
        meter.advance()
    return measurement.imatrix


def measuring(n_chunks: int, progress: OnProgress | None) -> Meter:
    """What counts the chunks that are done."""
    return Meter("measuring", "chunks", n_chunks, progress)


def measure_chunks(
    source: str | Path | Source,
    texts: Sequence[str | Path],
    *,
    n_ctx: int = N_CTX,
    n_chunks: int | None = None,
    first_chunk: int = 0,
    special: bool = False,
    tables: bool = True,
    correlations: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    notice: Callable[[str], None] | None = None,
) -> Iterator[Measurement]:
    """The same chunk by chunk: what comes last is the result, what came before can be kept if the rest is interrupted.

    Args:
        source: a checkpoint directory or a Hub id, or one that is open.
        texts: UTF-8 files, read as if they were one.
        n_chunks: to read at most; all by default.
        first_chunk: chunks of the text to leave out, because they have been measured before.
        special: recognize special tokens in the text, such as <start_of_turn>.
        tables: make entries for the embedding tables too.
        correlations: measure them too, in "blocks" of 256 columns or in "full".
        device, dtype: as for Reference.
        notice: is told what memory this takes, before it does.

    Raises: UsageError: a text that is too short, too little memory, or an option that can't be used. SourceError: a
        text that can't be read. QuantizationError: activations that are not finite. What Reference raises.
    """
    check_chunks(n_ctx, n_chunks)
    if correlations not in (None, *WIDTHS):
        raise UsageError(f"correlations {correlations!r}", expected=" or ".join(WIDTHS))
    check_device(device, dtype)
    checkpoint = open_checkpoint(source)
    tokens, n_chunks = read_tokens(checkpoint, texts, n_ctx, n_chunks, first_chunk, special=special)
    whole = correlations == FULL
    need = reference_need(checkpoint, dtype, n_ctx)
    if correlations is not None:
        n_bytes = need.n_bytes + 2 * measured_bytes(checkpoint.config, whole=whole)
        smaller = (Alternative(f"--correlations {BLOCKS}"),) if whole else ()
        need = replace(need, what=f"{need.what} and correlations", n_bytes=n_bytes, alternatives=smaller)
    check_memory([need], notice=notice)
    with Reference(checkpoint, device=device, dtype=dtype) as reference:
        total: dict[str, NDArray[np.float64]] = {}
        counts: dict[str, int] = {}
        products: dict[str, NDArray[np.float32]] = {}
        loss, n_scored, seen = 0.0, 0, frozenset[int]()
        for n_done in range(1, n_chunks + 1):
            start = (first_chunk + n_done - 1) * n_ctx
            chunk = tokens[start : start + n_ctx]
            multiplied = None if correlations is None else _Products(whole)
            hidden, heard = _run(reference, [tokens[0], *chunk[1:]], multiplied, tables=tables)
            chunk_loss = _loss(reference, hidden, chunk)
            total = {name: total.get(name, 0.0) + _finite(name, sums, dtype) for name, sums in heard.sums.items()}
            counts = {name: counts.get(name, 0) + n for name, n in heard.counts.items()}
            if multiplied is not None:
                products = multiplied.added_to(products, dtype)
            loss, n_scored, seen = loss + sum(chunk_loss), n_scored + len(chunk_loss), seen | {tokens[0], *chunk[1:]}
            yield Measurement(
                datasets=tuple(map(str, texts)),
                n_ctx=n_ctx,
                n_vocab=reference.n_vocab,
                first_chunk=first_chunk,
                n_chunks=n_chunks,
                n_done=n_done,
                perplexity=math.exp(min(loss / n_scored, 700.0)),
                seen=seen,
                sums=total,
                counts=counts,
                correlations=None if correlations is None else _correlations(products, counts, texts, n_ctx),
            )


def check_chunks(n_ctx: int, n_chunks: int | None) -> None:
    """Raises: UsageError for chunks that there can't be."""
    if n_ctx < MIN_CTX:
        raise UsageError(f"chunks of {n_ctx} tokens", expected=f"{MIN_CTX} or more")
    if n_chunks is not None and n_chunks < 1:
        raise UsageError(f"{n_chunks} chunks", expected="1 or more")


def read_tokens(
    source: Source, texts: Sequence[str | Path], n_ctx: int, n_chunks: int | None, first_chunk: int, *, special: bool
) -> tuple[list[int], int]:
    """All tokens of texts, and how many chunks of them are to be read.

    Raises: UsageError for too little text; SourceError for a text that can't be read.
    """
    with closing(open_reference(source)) as tokenizer:
        tokens = tokenizer.encode(read_texts(texts), special=special)
    available = len(tokens) // n_ctx - first_chunk
    if available < 1:
        raise UsageError(
            f"{', '.join(map(str, texts))}: not enough text",
            expected=f"{(first_chunk + 1) * n_ctx:,} tokens or more, for chunk {first_chunk} of {n_ctx}",
            found=f"{len(tokens):,} tokens",
            fix="give more text, or smaller chunks with --ctx",
        )
    return tokens, available if n_chunks is None else min(n_chunks, available)


def read_texts(texts: Sequence[str | Path]) -> str:
    """Files as one text, each without the line feed at its end. Source: `-f` of llama.cpp (common/arg.cpp)."""
    return "\n".join(
        read_text(Path(path), MAX_TEXT_BYTES, SourceError, line_ends=False).removesuffix("\n") for path in texts
    )


def _correlations(
    products: Mapping[str, NDArray[np.float32]], counts: Mapping[str, int], texts: Sequence[str | Path], n_ctx: int
) -> Correlations:
    entries = {name: CorrelationsEntry(sums.shape[0], sums.shape[1], counts[name]) for name, sums in products.items()}
    return Correlations(Path("measured"), entries, products.__getitem__, tuple(map(str, texts)), n_ctx)


class _Sums:
    """Sums of squares a column, float64 on the model's device, and how many inputs they are of; by GGUF name."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, activations: Any) -> None:
        rows = activations.detach().flatten(0, -2)
        squares = rows.float().square().double().sum(0)
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares
        self.counts[name] = self.counts.get(name, 0) + len(rows)


class _Products:
    """Sums of products of columns, in blocks as a file has them, float32 on the model's device; by GGUF name."""

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.sums: dict[str, Any] = {}

    def add(self, name: str, activations: Any) -> None:
        import torch

        rows = activations.detach().flatten(0, -2).float()
        n = rows.shape[1]
        width = block_width(n, whole=self.whole)
        sums = torch.zeros(n, width, device=rows.device)
        for start in range(0, n, width):
            part = rows[:, start : start + width]
            square = part.T @ part
            # Why: both halves alike, in whatever order they were added
            sums[start : start + width, : part.shape[1]] = (square + square.T) / 2
        self.sums[name] = sums

    def add_gates(self, gates: Any, projection: Any) -> None:
        """Of one layer's columns of the per-layer table, after those of the layers before it."""
        import torch

        rows, weights = gates.detach().flatten(0, -2).float(), projection.detach().float()
        products = (rows.T @ rows) * (weights.T @ weights)
        layers = [self.sums[PER_LAYER_TOKEN_EMBD]] if PER_LAYER_TOKEN_EMBD in self.sums else []
        self.sums[PER_LAYER_TOKEN_EMBD] = torch.cat([*layers, (products + products.T) / 2])

    def added_to(self, total: Mapping[str, NDArray[np.float32]], dtype: str) -> dict[str, NDArray[np.float32]]:
        """New sums. Why new: what was known before stays as it was, if this is interrupted."""
        found: dict[str, NDArray[np.float32]] = {}
        while self.sums:
            name, sums = self.sums.popitem()
            values = _finite(name, sums, dtype)
            found[name] = total[name] + values if name in total else values
        return found


def _run(
    reference: Reference, token_ids: Sequence[int], products: _Products | None, *, tables: bool
) -> tuple[Any, _Sums]:
    """What the text model returns for one chunk, and what went into each matrix on the way."""
    import torch

    text = reference.model.model
    modules = dict(text.named_modules())
    heard, gates, handles = _Sums(), _Sums(), []
    for rule, bid in written_order(text.config.num_hidden_layers):
        if bid is None or len(rule.shape) < 2:
            continue
        module = modules.get(rule.source.format(bid=bid).removesuffix(".weight"))
        if module is None:  # keys and values of KV-shared layers
            continue
        handles.append(module.register_forward_pre_hook(_input_hook(heard, rule.name(bid))))
        if products is not None and has_own_entry(rule, bid):
            handles.append(module.register_forward_pre_hook(_input_hook(products, rule.name(bid))))
        if tables and rule.target == PER_LAYER_INP_GATE:
            hook = _gate_hook(gates, products, rule.name(bid), text.layers[bid])
            handles.append(module.register_forward_hook(hook))
    try:
        hidden = reference.run(token_ids)
    finally:
        for handle in handles:
            handle.remove()
    if tables:
        heard.add(TOKEN_EMBD, hidden)
        if products is not None:
            products.add(TOKEN_EMBD, hidden)
        heard.sums[PER_LAYER_TOKEN_EMBD] = torch.cat(list(gates.sums.values()))
        heard.counts[PER_LAYER_TOKEN_EMBD] = len(hidden)
    return hidden, heard


def _input_hook(heard: _Sums | _Products, name: str) -> Callable[..., None]:
    return lambda _module, inputs: heard.add(name, inputs[0])


def _gate_hook(gates: _Sums, products: _Products | None, name: str, layer: Any) -> Callable[..., None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        gate = layer.act_fn(output)
        gates.add(name, gate)
        if products is not None and gate.shape[-1] == BLOCK:
            products.add_gates(gate, layer.per_layer_projection.weight)

    return hook


def _finite(name: str, sums: Any, dtype: str) -> NDArray[Any]:
    values: NDArray[Any] = sums.cpu().numpy()
    if not np.isfinite(values).all():
        raise QuantizationError(
            f"{name}: activations that are not finite, computed in {dtype}",
            fix="check the checkpoint's weights: gguf3n stats" if dtype == "float32" else "use --dtype float32",
        )
    return values


def _loss(reference: Reference, hidden: Any, chunk: Sequence[int]) -> list[float]:
    """Minus the log-probability of each token of the second half. Units: nats. Source: compute_imatrix."""
    first = len(chunk) // 2
    losses: list[float] = []
    for start in range(first, len(chunk) - 1, HEAD_POSITIONS):
        end = min(start + HEAD_POSITIONS, len(chunk) - 1)
        logprobs = reference.logits(hidden[start:end]).double().log_softmax(-1)
        losses += (-logprobs[range(end - start), chunk[start + 1 : end + 1]]).tolist()
    return losses
