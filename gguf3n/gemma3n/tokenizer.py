"""Tokenizer files -> the SPM vocabulary that llama.cpp's "llama" tokenizer reads.

Two sources hold the same pieces: sentencepiece's tokenizer.model and the tokenizers library's tokenizer.json, which is
all that transformers 5 saves. An SPM merges the neighbours whose union has the highest score, a BPE those whose merge
has the lowest rank: in Gemma's vocabulary both orders are the order of the ids, so pieces from tokenizer.json get the
scores that restore it.

Source: _create_vocab_sentencepiece in llama.cpp's conversion/base.py for token types, scores of added tokens and names
of unused ids; SpecialVocab of the gguf package for special ids and chat templates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from gguf3n.errors import TokenizerError
from gguf3n.formats.sentencepiece_file import read_piece_types
from gguf3n.formats.small_file import (
    CHECKPOINT_FILES,
    check_checkpoint_files,
    check_containers,
    is_there,
    read_checkpoint_file,
    read_checkpoint_json,
    read_text,
)
from gguf3n.gemma3n.config import Config
from gguf3n.gemma3n.gguf_package import silenced

ADDED_SCORE = -1000.0
UNUSED_SCORE = -10000.0
MAX_TOKENS_PER_PIECE = 4
"""Only tokens of the other modalities have no piece, 256 of 262,400 in the published sizes."""
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
CONTROL_LOOKING = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<unused.*>", re.DOTALL)
"""Added tokens that are control tokens although Gemma's files do not mark them as special."""

GEMMA_SPECIAL = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
"""Where no file gives an id. Why: a tokenizer.model may name begin and end as sentencepiece does (<s>, </s>)."""

CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
"""Tokens of every Gemma that are read as one only where they are typed as control (or user-defined) tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """One entry a token id, as many as the embedding table has rows."""

    tokens: list[str]
    scores: list[float]
    types: list[TokenType]
    special_ids: dict[str, int]
    """By role: bos, eos, unk, pad and others that the files name."""
    add_tokens: dict[str, bool]
    """By role: whether the tokenizer adds the token."""
    chat_templates: dict[str, str]
    """By name; "default" is the model's."""
    origin: str
    """The file the pieces came from."""
    notices: tuple[str, ...] = ()
    """What is written otherwise than the files have it."""


@dataclass(frozen=True)
class _Pieces:
    """By id: text, None where there is no piece, score and type. Ids beyond the text tokens may have gaps."""

    texts: list[str | None]
    scores: list[float]
    types: list[TokenType]
    special_ids: dict[str, int]


def read_vocabulary(directory: Path, config: Config) -> Vocabulary:
    """Read the tokenizer of a checkpoint directory.

    Raises: TokenizerError where there is none, where a file is broken, or where it does not fit the config.
    """
    spm_path, json_path = directory / "tokenizer.model", directory / "tokenizer.json"
    if is_there(spm_path, TokenizerError):
        origin, pieces = spm_path, _from_sentencepiece(spm_path, config)
    elif is_there(json_path, TokenizerError):
        origin, pieces = json_path, _from_tokenizer_json(json_path, read_checkpoint_json(json_path), config)
    else:
        raise TokenizerError(
            f"{directory}: no tokenizer",
            expected="tokenizer.model or tokenizer.json",
            fix="copy the tokenizer files of the base model into the checkpoint",
        )
    n_without = config.vocab_size - len(pieces.texts)
    unnamed = [i for i, text in enumerate(pieces.texts) if text is None]
    unnamed += range(len(pieces.texts), config.vocab_size)
    tokens = [text or "" for text in pieces.texts] + [""] * n_without
    for i in unnamed:
        tokens[i] = f"[PAD{i}]"
    scores = pieces.scores + [UNUSED_SCORE] * n_without
    types = pieces.types + [TokenType.UNUSED] * n_without
    user_defined = [(i, tokens[i], False) for i, kind in enumerate(types) if kind is TokenType.USER_DEFINED]
    for token_id, text, special in user_defined + _added_tokens(directory):
        if not 0 <= token_id < config.vocab_size:
            raise _misfit(directory, config, f"added token {text!r} with id {token_id}")
        control = special or CONTROL_LOOKING.fullmatch(text) is not None
        types[token_id] = TokenType.CONTROL if control else TokenType.USER_DEFINED
        tokens[token_id] = text if control else text.replace("▁", " ")
        scores[token_id] = ADDED_SCORE
    n_text = config.vocab_size_per_layer_input
    if lost := [i for i in unnamed if i < n_text and types[i] is TokenType.UNUSED]:
        raise _misfit(origin, config, f"no piece for {len(lost):,} ids, the first {lost[0]}")
    ids = {text: tokens.index(text) for text in CONTROL_TOKENS if text in tokens}
    unmarked = [text for text, token_id in ids.items() if types[token_id] is TokenType.NORMAL]
    for text in unmarked:
        types[ids[text]], scores[ids[text]] = TokenType.CONTROL, ADDED_SCORE
    notices = [f"{origin}: {', '.join(unmarked)} are written as control tokens, which no file says"] if unmarked else []
    special_ids, add_tokens, templates = _special(directory, config)
    by_text = {
        role: ids[text] for role, text in GEMMA_SPECIAL.items() if text in ids and types[ids[text]] is TokenType.CONTROL
    }
    special_ids = {**by_text, **pieces.special_ids, **special_ids}
    return Vocabulary(tokens, scores, types, special_ids, add_tokens, templates, str(origin), tuple(notices))


def _check_size(path: Path, config: Config, n_ids: int, n_pieces: int) -> None:
    """Hold a vocabulary's size against config.json, before room is made for it. Raises: TokenizerError."""
    if n_ids > config.vocab_size:
        raise _misfit(path, config, f"a piece with id {n_ids - 1:,}")
    if config.vocab_size > MAX_TOKENS_PER_PIECE * n_pieces:
        raise _misfit(path, config, f"{n_pieces:,} pieces")


def _misfit(path: Path, config: Config, found: str) -> TokenizerError:
    return TokenizerError(
        f"{path}: the vocabulary does not fit config.json",
        expected=f"a piece for each of {config.vocab_size_per_layer_input:,} text tokens, at most "
        f"{config.vocab_size:,} with the added ones",
        found=found,
        fix="use the tokenizer files that were saved with this model",
    )


def load_sentencepiece(path: Path) -> tuple[Any, list[TokenType]]:
    """sentencepiece's processor for a tokenizer.model, and the types of its pieces. Raises: TokenizerError."""
    from sentencepiece import SentencePieceProcessor

    data = read_checkpoint_file(path)
    types = read_piece_types(data, path)
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except (OSError, RuntimeError) as error:
        raise TokenizerError(
            f"{path}: not a sentencepiece model", found=str(error).partition("\n")[0], fix="download the file again"
        ) from error
    return processor, types


def _from_sentencepiece(path: Path, config: Config) -> _Pieces:
    processor, types = load_sentencepiece(path)
    ids = list(range(processor.vocab_size()))
    _check_size(path, config, len(ids), len(ids))
    special = {
        "bos": processor.bos_id(),
        "eos": processor.eos_id(),
        "unk": processor.unk_id(),
        "pad": processor.pad_id(),
    }
    present = {role: i for role, i in special.items() if i >= 0}
    return _Pieces(processor.IdToPiece(ids), processor.GetScore(ids), types, present)


def _from_tokenizer_json(path: Path, raw: dict[str, Any], config: Config) -> _Pieces:
    """The same pieces, scores and types as tokenizer.model.

    Why: a piece's score matters only against other scores; ranks of merges give their order, ids their values.
    """
    try:
        model = raw["model"]
        architecture, vocab, merges = model["type"], dict(model["vocab"]), model["merges"]
        unknown = vocab.get(model.get("unk_token"))
        pieces = {int(i): piece for piece, i in vocab.items()}
        merged = ["".join(m) if isinstance(m, list) else m.replace(" ", "", 1) for m in merges]
        by_rank = [vocab[piece] for piece in dict.fromkeys(merged)]
        if len(pieces) < len(vocab) or min(pieces) < 0 or not all(type(i) is int for i in vocab.values()):
            raise ValueError("ids that are no integers, negative, or shared by several pieces")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TokenizerError(
            f"{path}: not the tokenizer of a Gemma",
            expected="a BPE model: a vocabulary of pieces and ids, and its merges",
            found=f"{type(error).__name__}: {error}",
        ) from error
    if architecture != "BPE" or not model.get("byte_fallback"):
        raise TokenizerError(
            f"{path}: not the tokenizer of a Gemma",
            expected="a BPE model with byte fallback",
            found=f"{architecture}, byte_fallback {model.get('byte_fallback')}",
        )
    n_ids = max(pieces) + 1
    _check_size(path, config, n_ids, len(pieces))
    ranks = dict(zip(by_rank, sorted(by_rank), strict=True))
    texts = [pieces.get(i) for i in range(n_ids)]
    scores = [UNUSED_SCORE if text is None else -float(ranks.get(i, i)) for i, text in enumerate(texts)]
    types = [
        TokenType.UNUSED if text is None else TokenType.BYTE if BYTE_PIECE.fullmatch(text) else TokenType.NORMAL
        for text in texts
    ]
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return _Pieces(texts, scores, types, {"unk": unknown} if unknown is not None else {})


def _added_tokens(directory: Path) -> list[tuple[int, str, bool]]:
    """Id, text and whether it is special, of every token the files add, later entries deciding.

    transformers 5 lists them in tokenizer.json only.
    """
    added: list[tuple[int, str, bool]] = []
    path = directory / "added_tokens.json"
    try:
        if is_there(path, TokenizerError):
            added += [(int(i), text, False) for text, i in read_checkpoint_json(path).items()]
        path = directory / "tokenizer_config.json"
        decoder = read_checkpoint_json(path).get("added_tokens_decoder") if is_there(path, TokenizerError) else None
        if decoder:
            entries = [(int(i), entry) for i, entry in decoder.items()]
        else:
            path = directory / "tokenizer.json"
            listed = read_checkpoint_json(path).get("added_tokens", []) if is_there(path, TokenizerError) else []
            entries = [(int(entry["id"]), entry) for entry in listed]
        added += [(i, str(entry["content"]), bool(entry.get("special"))) for i, entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TokenizerError(
            f"{path}: malformed added tokens", expected="ids and texts", found=f"{type(error).__name__}: {error}"
        ) from error
    return added


def _special(directory: Path, config: Config) -> tuple[dict[str, int], dict[str, bool], dict[str, str]]:
    """Special ids, what the tokenizer adds, chat templates."""
    import gguf

    check_checkpoint_files(directory)
    for path in (directory / "tokenizer.json", directory / "tokenizer_config.json"):  # the package reads them itself
        if is_there(path, TokenizerError):
            check_containers(read_checkpoint_file(path), str(path), TokenizerError)
    try:
        with silenced():
            special = gguf.SpecialVocab(directory, n_vocab=config.vocab_size)
        template = special.chat_template or _template_file(directory)
        templates: dict[str, str] = {}
        if isinstance(template, str):
            templates["default"] = template
        elif template:
            templates = {str(entry["name"]): str(entry["template"]) for entry in template}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerError(
            f"{directory}: tokenizer_config.json or tokenizer.json is malformed",
            found=f"{type(error).__name__}: {error}",
        ) from error
    return dict(special.special_token_ids), dict(special.add_special_token), templates


def _template_file(directory: Path) -> str | None:
    """A chat template in a file of its own, which SpecialVocab looks for only beside a tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if is_there(path, TokenizerError):
        return read_text(path, *CHECKPOINT_FILES[path.name])
    path = directory / "chat_template.json"
    return read_checkpoint_json(path).get("chat_template") if is_there(path, TokenizerError) else None
