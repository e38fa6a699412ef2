"""What each tensor costs in each type, from text: by how much the model's distributions move.

Where dW is what a quantizer makes of a tensor less the tensor, and G the gradient of log p(labels) of a sequence of T
tokens, labels drawn from the model, the KL divergence a token that dW causes is to second order

    the mean over sequences of <G, dW>^2 / 2T

One way back through the model gives G for all types. Each sequence gives one number, which varies as much as it is
large: N of them leave an error of sqrt(2/N). Where the errors of single weights are independent of each other, which
they nearly are, the mean of sum(G^2 dW^2) / 2T is the same and hardly varies; both are kept, and costs.py makes one
figure of them.

Embedding tables are looked up: a text shows what the rows that it uses cost. What a token costs whose row is as bad as
the mean row is the mean over positions of sum(g^2 e) / 2, with g the gradient by the row that is used there, and e the
mean squared error of a column over N_ROWS rows all over the table. So tokens that the text lacks count, too.

Memory: that of the engine (engines/fisher.py); of dW there are some rows at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.activations import check_chunks, read_tokens
from gguf3n.engines.fisher import Gradients, fisher_need, run_backward
from gguf3n.engines.memory import check_memory
from gguf3n.engines.reference import Reference, check_device
from gguf3n.errors import QuantizationError, UsageError
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import QType, row_bytes
from gguf3n.formats.imatrix import ImportanceMatrix
from gguf3n.formats.rows import Values, largest_magnitude
from gguf3n.formats.sensitivity import Sensitivity, Sums, TensorSums, Text
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.mapping import MappedTensor, Storage
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.gemma3n.source import Source, open_checkpoint
from gguf3n.progress import Meter, OnProgress
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD
from gguf3n.validation.fingerprint import model_fingerprint
from gguf3n.validation.weights import WeightReader, dequantize_into
from gguf3n.workers import default_threads

N_CTX = 256
N_CHUNKS = 64
BATCH = 8
"""Chunks that are run together: the candidates are quantized once for all of them."""

TYPES = (
    QType.Q8_0, QType.Q6_K, QType.Q5_K, QType.Q5_1, QType.Q5_0, QType.Q4_K, QType.Q4_1, QType.Q4_0, QType.IQ4_NL,
    QType.IQ4_XS, QType.Q3_K, QType.IQ3_S, QType.IQ3_XXS, QType.Q2_K, QType.IQ2_S, QType.IQ2_XS, QType.IQ2_XXS,
)  # fmt: skip
"""Measured unless others are named. Without importances those that need them are left out."""

N_ROWS = 1024
"""Of a table, whose mean error stands for all rows."""

TABLES = (TOKEN_EMBD, PER_LAYER_TOKEN_EMBD)


@dataclass(frozen=True)
class Measurement:
    """What is known after a number of chunks."""

    sensitivity: Sensitivity
    n_done: int
    n_chunks: int
    """To be read in all."""
    perplexity: float


def measure_sensitivity(
    source: str | Path | Source, texts: Sequence[str | Path], *, types: str | None = None, **options: Any
) -> Sensitivity:
    """Measure all chunks; other arguments and errors as for `measure_batches`.

    Args:
        types: candidates, separated by commas; by default TYPES.
    """
    *_, last = measure_batches(source, texts, types=() if types is None else parse_types(types), **options)
    return last.sensitivity


def measure_batches(
    source: str | Path | Source,
    texts: Sequence[str | Path],
    *,
    imatrix: ImportanceMatrix | None = None,
    types: Sequence[QType] = (),
    n_ctx: int = N_CTX,
    n_chunks: int | None = N_CHUNKS,
    first_chunk: int = 0,
    batch: int = BATCH,
    seed: int = 0,
    special: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    threads: int | None = None,
    notice: Callable[[str], None] | None = None,
    before: Callable[[Sensitivity], object] | None = None,
    progress: OnProgress | None = None,
) -> Iterator[Measurement]:
    """Batch by batch: what comes last is the result, what came before can be kept if the rest is interrupted.

    Args:
        source: a checkpoint directory or a Hub id, or one that is open.
        texts: UTF-8 files, read as if they were one.
        imatrix: what the candidates are quantized with, as the file will be.
        types: candidates; by default TYPES.
        n_chunks: to read at most; None for all.
        first_chunk: chunks of the text to leave out, because they have been measured before.
        batch: chunks that are run together.
        seed: of the labels; a chunk's depend on it and on the chunk's number alone.
        special: recognize special tokens in the text.
        device, dtype: as for Reference.
        notice: is told what memory this takes, before it does.
        before: is given what will be known in the end, its sums still zero, before the model is loaded.
        progress: is called in weights whose gradients were seen.

    Raises: UsageError: a text that is too short, too little memory, or an option that can't be used. SourceError: a
        text that can't be read. QuantizationError: weights or importances that a type can't hold, or gradients that
        are not finite. What Reference raises.
    """
    check_chunks(n_ctx, n_chunks)
    if batch < 1:
        raise UsageError(f"{batch} chunks at once", expected="1 or more")
    check_device(device, dtype)
    checkpoint = open_checkpoint(source)
    part = text_part(checkpoint)
    weights = {} if imatrix is None else match_importance(imatrix, part).quant_weights
    candidates = _candidates(part, types or TYPES, weights)
    hashes = tuple(Text(Path(text).name, _sha256(text)) for text in texts)
    tokens, n_chunks = read_tokens(checkpoint, texts, n_ctx, n_chunks, first_chunk, special=special)
    batch = min(batch, n_chunks)
    check_memory([fisher_need(checkpoint, dtype, n_ctx, batch)], notice=notice)
    known = Sensitivity(
        Path("measured"),
        checkpoint.name,
        model_fingerprint(part),
        None if imatrix is None else Text(imatrix.path.name, weights_hash(weights)),
        n_ctx,
        seed,
        hashes,
        ((first_chunk, n_chunks),),
        (),
        {},
    )
    with closing(_Errors(part, candidates, weights, threads or default_threads())) as errors:
        if before is not None:
            before(replace(known, tensors=errors.tensors()))
        n_batches = -(-n_chunks // batch)
        errors.meter = Meter("measuring", "weights", n_batches * errors.n_weights, progress)
        with Reference(checkpoint, device=device, dtype=dtype) as reference:
            n_done, loss = 0, 0.0
            while n_done < n_chunks:
                numbers = range(first_chunk + n_done, first_chunk + min(n_done + batch, n_chunks))
                chunks = [[tokens[0], *tokens[number * n_ctx + 1 : (number + 1) * n_ctx]] for number in numbers]
                errors.begin(len(chunks))
                loss += run_backward(reference, chunks, [_seed(seed, number) for number in numbers], errors)
                errors.end(n_ctx)
                n_done += len(chunks)
                yield Measurement(
                    replace(
                        known,
                        spans=((first_chunk, n_done),),
                        engines=(reference.name,),
                        tensors=errors.tensors(),
                    ),
                    n_done,
                    n_chunks,
                    float(np.exp(min(loss / (n_done * (n_ctx - 1)), 700.0))),
                )


def parse_types(names: str) -> tuple[QType, ...]:
    """Types by their names, separated by commas. Raises: UsageError."""
    known = {qtype.name: qtype for qtype, row in GGML_TYPES.items() if row.weights > 1}
    given = [name.strip().upper() for name in names.split(",") if name.strip()]
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise UsageError(
            f"--types: {'unknown type ' + repr(unknown[0]) if unknown else 'no type'}",
            expected=f"some of {', '.join(known)}, separated by commas",
            found=names,
        )
    return tuple(dict.fromkeys(known[name] for name in given))


def _candidates(
    part: Part, types: Sequence[QType], weights: Mapping[str, NDArray[np.float32]]
) -> dict[str, tuple[QType, ...]]:
    """The types that each tensor can have. Raises: UsageError where there is none."""
    found = {}
    for tensor in part.tensors:
        if tensor.storage is not Storage.QUANTIZABLE or not tensor.evaluated:
            continue
        found[tensor.name] = tuple(
            qtype
            for qtype in types
            if tensor.n_per_row % GGML_TYPES[qtype].weights == 0
            and (tensor.name in weights or not GGML_TYPES[qtype].needs_importances)
        )
        if not found[tensor.name]:
            raise UsageError(
                f"{tensor.name}: none of the types can be measured",
                expected="one with blocks that its rows hold, and that needs no importances without --imatrix",
                found=", ".join(qtype.name for qtype in types),
            )
    return found


def _seed(seed: int, number: int) -> int:
    """Of one chunk's labels."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:6], "little")


def _sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def weights_hash(weights: Mapping[str, NDArray[np.float32]]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(weights.items()):
        digest.update(name.encode() + values.astype("<f4").tobytes())
    return digest.hexdigest()


class _Errors:
    """Holds gradients against what quantizers do to weights. Close it.

    Shapes: of a batch, by tensor and type, [n_sequences] each.
    """

    def __init__(
        self,
        part: Part,
        candidates: Mapping[str, tuple[QType, ...]],
        weights: Mapping[str, NDArray[np.float32]],
        threads: int,
    ) -> None:
        self.tensor = {tensor.name: tensor for tensor in part.tensors if tensor.name in candidates}
        self.candidates = candidates
        self.weights = weights
        self.reader = WeightReader()
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="gguf3n")
        self.sums = {name: dict.fromkeys(types, Sums(0, 0, 0, 0 if name in TABLES else None))
                     for name, types in candidates.items()}  # fmt: skip
        self.table_errors = {name: self._mean_errors(name) for name in TABLES}
        self.n_weights = sum(tensor.n_weights for name, tensor in self.tensor.items() if name != PER_LAYER_TOKEN_EMBD)
        """Of the matrices whose gradients come whole."""
        self.meter = Meter("measuring", "weights", self.n_weights, None)
        self.begin(0)

    def close(self) -> None:
        self.pool.shutdown()
        self.reader.close()

    def begin(self, n_sequences: int) -> None:
        """Forget the last batch."""
        self.n_sequences = n_sequences
        self.products = {name: np.zeros((len(types), n_sequences)) for name, types in self.candidates.items()}
        self.diagonals = {name: np.zeros_like(products) for name, products in self.products.items()}
        self.by_row = {name: np.zeros(len(self.candidates[name])) for name in TABLES}

    def gradients(self, name: str, sequences: slice, rows: NDArray[np.int64], values: Gradients) -> None:
        """Of some rows of a tensor. Shapes: values [n_sequences, n_rows, n_per_row]. Raises: QuantizationError."""
        flat = values.reshape(len(values), -1)
        if not np.isfinite(flat).all():
            raise QuantizationError(f"{name}: gradients that are not finite", fix="use --dtype float32")
        squares = np.square(flat)
        for number, change in enumerate(self._changes(name, rows)):
            change = change.reshape(-1)
            self.products[name][number, sequences] += flat @ change
            self.diagonals[name][number, sequences] += squares @ np.square(change)
        if sequences == slice(0, self.n_sequences):
            self.meter.advance(values[0].size)

    def uses(self, name: str, values: NDArray[np.float64]) -> None:
        """Of a table. Shapes: values [n_sequences, n_per_row]."""
        self.by_row[name] += self.table_errors[name] @ values.sum(0)

    def end(self, n_ctx: int) -> None:
        """Add the batch to all before it."""
        for name, types in self.candidates.items():
            fisher = np.square(self.products[name]) / (2 * n_ctx)
            for number, qtype in enumerate(types):
                self.sums[name][qtype] += Sums(
                    float(fisher[number].sum()),
                    float(np.square(fisher[number]).sum()),
                    float(self.diagonals[name][number].sum()) / (2 * n_ctx),
                    float(self.by_row[name][number]) / (2 * n_ctx) if name in TABLES else None,
                )

    def tensors(self) -> dict[str, TensorSums]:
        """The sums so far."""
        return {name: TensorSums(self.tensor[name].shape, dict(sums)) for name, sums in self.sums.items()}

    def _changes(self, name: str, rows: NDArray[np.int64]) -> Iterator[Values]:
        """What each type makes of rows, less the rows. Raises: QuantizationError."""
        tensor = self.tensor[name]
        values = self.reader.source_rows(tensor, rows)
        largest = largest_magnitude(values)
        changed = [self.pool.submit(self._change, tensor, values, qtype, largest) for qtype in self.candidates[name]]
        return (future.result() for future in changed)

    def _change(self, tensor: MappedTensor, values: Values, qtype: QType, largest: float) -> Values:
        from gguf3n.quants.api import quantize_rows

        blocks = np.empty((len(values), row_bytes(qtype, tensor.n_per_row)), np.uint8)
        if not quantize_rows(values, qtype, self.weights.get(tensor.name), blocks, largest):
            raise QuantizationError(
                f"tensor {tensor.name!r} does not fit {qtype.name}",
                expected="magnitudes that half precision holds, at most 65504",
                found=f"a weight of magnitude {largest:g}",
                fix="leave this type out of --types",
            )
        change = np.empty_like(values)
        dequantize_into(blocks, qtype, change)
        return np.subtract(change, values, out=change)

    def _mean_errors(self, name: str) -> NDArray[np.float64]:
        """The mean squared error of each column in each type, of rows all over the table. Shapes: [n_types, n_columns].

        Why not the last rows: they are padding, and other modalities' tokens.
        """
        n_rows = self.tensor[name].n_rows
        rows = np.unique(np.linspace(0, n_rows - 1, min(N_ROWS, n_rows)).astype(np.int64))
        return np.stack([np.square(change, dtype=np.float64).mean(0) for change in self._changes(name, rows)])
