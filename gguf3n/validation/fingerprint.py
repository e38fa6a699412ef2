"""What a saved reference was made of, so that it is not taken for another's: hashes in the metadata of its file.

    model         sizes and settings, and some weights of each tensor that is evaluated
    vocabulary    the tokens
    text          as it was given
    n_tokens      of it, as was asked for; n_ctx of them at a time

A checkpoint and its unquantized GGUF file have the same hashes where the file holds the weights exactly. A file of
llama-perplexity has none of this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from gguf.constants import Keys

from gguf3n.errors import UsageError
from gguf3n.formats.logprobs import SavedLogprobs
from gguf3n.formats.rows import RowReader, Rows
from gguf3n.gemma3n.mapping import MappedTensor
from gguf3n.gemma3n.part import Part
from gguf3n.gemma3n.text import ARCH
from gguf3n.validation.options import N_CTX, N_TOKENS, ValidationOptions
from gguf3n.validation.texts import built_in_text

N_WEIGHTS = 256
"""Of each tensor, from its middle row."""

AGAIN = "leave --use-reference out, or save the reference again with --save-reference"


def fingerprint(part: Part, options: ValidationOptions) -> dict[str, str]:
    """Of a reference and of what is read by it. Raises: SourceError or a class below it; GGUFError."""
    return {
        "model": model_fingerprint(part),
        "vocabulary": _hash(_vocabulary(part)),
        "text": _text_hash(options.text),
        "n_tokens": str(options.n_tokens),
        "n_ctx": str(options.n_ctx),
    }


def model_fingerprint(part: Part) -> str:
    """Of its sizes, settings and weights. Raises: SourceError or a class below it; GGUFError."""
    return _hash(_model(part))


def check_saved(
    saved: SavedLogprobs, part: Part, options: ValidationOptions, notice: Callable[[str], None] | None = None
) -> None:
    """Refuse a saved reference that is of another model, of other tokens or of another text than asked for.

    Args:
        notice: told of a file that does not say what it was made of.

    Raises: UsageError; SourceError or a class below it; GGUFError.
    """
    if saved.is_kld:
        made = {"n_tokens": str(saved.token_ids.size), "n_ctx": str(saved.n_ctx)}
        if options.text is not None:
            raise UsageError(
                f"--text with {saved.path}, which does not say what text it was made of", fix="leave --text out"
            )
        if notice is not None:
            notice(f"{saved.path} does not say of which model and text it was made; it is taken as the reference's")
        _check_counts(saved, made, options)
        return
    wanted = fingerprint(part, options)
    if not wanted.keys() <= saved.metadata.keys():
        raise UsageError(
            f"{saved.path} does not say of which model and text it was made", expected="what it says now", fix=AGAIN
        )
    for name, what in (("model", "another model"), ("vocabulary", "a model with other tokens")):
        if saved.metadata[name] != wanted[name]:
            raise UsageError(
                f"{saved.path} was made of {what}",
                expected=part.source.read_from,
                found=saved.metadata.get("reference", "unknown"),
                fix=AGAIN,
            )
    if options.text is not None and saved.metadata["text"] != wanted["text"]:
        raise UsageError(f"{saved.path} was made of another text than --text", fix=AGAIN)
    _check_counts(saved, saved.metadata, options)


def _check_counts(saved: SavedLogprobs, made: Mapping[str, str], options: ValidationOptions) -> None:
    """Hold what was asked for against what the file has; the usual numbers stand for whatever it has."""
    counts = (("tokens", options.n_tokens, N_TOKENS), ("ctx", options.n_ctx, N_CTX))
    for name, wanted, usual in counts:
        found = made[f"n_{name}"]
        if wanted != usual and str(wanted) != found:
            raise UsageError(
                f"{saved.path} was made with another --{name}", expected=str(wanted), found=found, fix=AGAIN
            )


def _model(part: Part) -> Iterator[bytes]:
    for key in part.keys:
        if key.name.startswith(f"{ARCH}."):
            yield key.name.encode()
            yield np.asarray(key.value, np.float32).tobytes()  # numbers all, and float32 at most in a GGUF file
    reader = RowReader()
    try:
        for tensor in part.tensors:
            if tensor.evaluated:
                yield f"{tensor.name} {tensor.shape}".encode()
                rows, first = _middle(tensor)
                values = np.empty((1, rows.n_per_row), np.float32)
                reader.fill(rows, first, values)
                yield values[0, :N_WEIGHTS].tobytes()
    finally:
        reader.close()


def _middle(tensor: MappedTensor) -> tuple[Rows, int]:
    """Where the middle row of a tensor is, however many rows of the source it is made of."""
    first = tensor.n_rows // 2
    for rows in tensor.rows:
        if first < rows.n_rows:
            break
        first -= rows.n_rows
    return rows, first


def _vocabulary(part: Part) -> Iterator[bytes]:
    for key in part.keys:
        if key.name == Keys.Tokenizer.LIST and isinstance(key.value, list):
            yield from (str(token).encode(errors="replace") for token in key.value)


def _text_hash(text: str | None) -> str:
    return _hash([(built_in_text() if text is None else text).encode(errors="replace")])


def _hash(pieces: Iterator[bytes] | list[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()
