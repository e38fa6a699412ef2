"""A PEFT adapter as it stands in its directory: what it has for each weight, and by how much its products count.

    adapter_config.json           its kind, alpha, which rows of an embedding were trained
    adapter_model.safetensors     base_model.model.<path of a module><suffix>

`SUFFIXES` is the table of what the tensors are; what has none of them replaces the weight of its name. `REFUSED` and
`INITIALIZED` list what can't be merged into the weights of a base, with the reason. Which modules were trained is read
from the tensors: target_modules may be a list, an expression or a word.

Source: get_peft_model_state_dict in peft's utils/save_and_load.py; LoraConfig in tuners/lora/config.py.
"""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf3n.errors import CheckpointError, ConfigError, MappingError, SourceError, shown
from gguf3n.formats.checkpoint import read_header
from gguf3n.formats.hub import ADAPTER_FILES, fetch_adapter, is_repo_id
from gguf3n.formats.rows import FLOAT_DTYPES, Stored
from gguf3n.formats.small_file import is_there, read_checkpoint_json
from gguf3n.gemma3n.names import bare_name
from gguf3n.regexes import check_regex

CONFIG, WEIGHTS = ADAPTER_FILES
PICKLE = "adapter_model.bin"
ROOT = "base_model.model."
"""What PEFT puts before the path of a module."""


class Piece(enum.Enum):
    """What an adapter may have for a weight."""

    A = "lora_A"
    B = "lora_B"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    LENGTHS = "lora_magnitude_vector"
    TOKENS = "trainable_tokens_delta"
    WHOLE = "the weight itself"
    BASE = "the base's weight"


SUFFIXES: tuple[tuple[str, Piece], ...] = (
    (".lora_A.weight", Piece.A),  # [rank, inputs]
    (".lora_B.weight", Piece.B),  # [outputs, rank]
    (".lora_embedding_A", Piece.EMBEDDING_A),  # [rank, tokens]
    (".lora_embedding_B", Piece.EMBEDDING_B),  # [width, rank]
    (".lora_magnitude_vector", Piece.LENGTHS),  # [outputs]
    (".token_adapter.trainable_tokens_delta", Piece.TOKENS),  # [trained tokens, width]: the rows themselves
    (".trainable_tokens_delta", Piece.TOKENS),
    (".token_adapter.base_layer.weight", Piece.BASE),
    (".base_layer.weight", Piece.BASE),
)
"""How the tensors' names end; the first that fits counts. Shapes: numpy order."""

FACTORS = (Piece.A, Piece.B, Piece.EMBEDDING_A, Piece.EMBEDDING_B)

LORA, TRAINABLE_TOKENS = "LORA", "TRAINABLE_TOKENS"
KINDS = (LORA, TRAINABLE_TOKENS)
"""peft_type of what can be merged here."""

REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "it works only after certain words of a text (aLoRA)",
    "arrow_config": "it chooses among adapters for every token (Arrow)",
    "kasa_config": "it has a third matrix between the two (KaSA)",
    "layer_replication": "it makes layers that the base does not have",
    "lora_bias": "it adds biases to layers that have none",
    "megatron_config": "it was trained on Megatron's layers, which are parts of those of the base",
    "monteclora_config": "its matrices are drawn at random around a mean (MonteCLoRA)",
    "target_parameters": "it changes parameters that are not the weight of a layer",
    "use_bdlora": "its matrices are blocks on a diagonal (BD-LoRA)",
    "use_qalora": "it belongs to a base that is quantized in groups (QA-LoRA)",
}
"""Settings with which an adapter is more than a sum, where they are set, and why."""

INITIALIZED: Mapping[str, str] = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}
"""Beginnings of init_lora_weights with which the base was changed before the training; the adapter is relative to that.
"""

MERGE_IT = "merge it where it was trained: model.merge_and_unload().save_pretrained(DIR); then convert DIR"
SAVE_IT = "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it, or " + MERGE_IT

DEFAULT_ALPHA = 8
"""LoraConfig's own, for a configuration that does not name it."""
MAX_PATTERNS = 4096
"""Of alpha_pattern; Gemma 3n has less than a thousand matrices."""
MAX_PATH = 100
"""Characters of a module's path; the longest of Gemma 3n has 95."""


@dataclass(frozen=True)
class Adapter:
    """What is known of an adapter before the base is: nothing of it is read but its configuration and the header.

    Args:
        origin: as the user named it.
        path: its directory.
        name: for new file names.
        trained_on: what it says that its base was called.
        pieces: of each weight, by the name that it has without the prefix of a layout.
        paths: each weight's module, as PEFT has it.
        notices: what a user should know of it.
    """

    origin: str
    path: Path
    name: str
    trained_on: str | None
    pieces: Mapping[str, Mapping[Piece, Stored]]
    paths: Mapping[str, str]
    alpha: float
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]
    use_rslora: bool
    tokens: Mapping[str, tuple[int, ...]]
    """Numbers of trained tokens, by how the paths of their embedding end."""
    notices: tuple[str, ...] = ()

    def alpha_of(self, weight: str) -> float:
        """A weight's own alpha. Source: get_pattern_key in peft."""
        alphas = (alpha for pattern, alpha in self.alpha_pattern if pattern.match(self.paths[weight]))
        return next(alphas, self.alpha)

    def scale(self, weight: str, rank: int) -> float:
        """What a product counts. Source: LoraLayer.update_layer in peft."""
        return self.alpha_of(weight) / (math.sqrt(rank) if self.use_rslora else rank)

    def tokens_of(self, weight: str) -> tuple[int, ...] | None:
        """Numbers of the trained tokens of an embedding; None where the configuration has none for it."""
        return next((ids for end, ids in self.tokens.items() if self.paths[weight].endswith(end)), None)

    def error(
        self, what: str, *, expected: str | None = None, found: str | None = None, fix: str | None = None
    ) -> MappingError:
        """One that names the adapter, and what it was trained on."""
        if self.trained_on is not None:
            found = f"{found}; " if found else ""
            found += f"trained on {self.trained_on}"
        return MappingError(f"{self.origin}: {what}", expected=expected, found=found, fix=fix)


def read_adapter(given: str | Path, *, show_progress: bool = False) -> Adapter:
    """Read what says what an adapter changes; no weights. What is on the Hub is fetched first.

    Args:
        given: a directory, or a Hub id.
        show_progress: show huggingface_hub's progress bars.

    Raises: HubError. SourceError: no adapter is there. ConfigError: one that can't be merged. CheckpointError,
        MappingError: tensors that no adapter has.
    """
    is_on_hub = is_repo_id(str(given))
    path = fetch_adapter(str(given), progress=show_progress) if is_on_hub else Path(given)
    _check_directory(path)
    config = path / CONFIG
    raw = read_checkpoint_json(config)
    _check_kind(raw, config)
    pieces, paths = _pieces(path / WEIGHTS)
    trained_on = raw.get("base_model_name_or_path")
    return Adapter(
        origin=str(given),
        path=path,
        name=str(given).rpartition("/")[2] if is_on_hub else os.path.basename(os.path.abspath(path)),
        trained_on=trained_on if isinstance(trained_on, str) and trained_on else None,
        pieces=pieces,
        paths=paths,
        alpha=DEFAULT_ALPHA if raw.get("lora_alpha") is None else _number(raw["lora_alpha"], "lora_alpha", config),
        alpha_pattern=_alpha_pattern(raw.get("alpha_pattern") or {}, config),
        use_rslora=bool(raw.get("use_rslora")),
        tokens=_tokens(raw, config),
        notices=tuple(_concerns(raw)),
    )


def _check_directory(path: Path) -> None:
    """Raises: SourceError."""
    if not path.is_dir():
        raise SourceError(f"{path}: no such directory", expected="the directory of a PEFT adapter")
    if is_there(path / CONFIG, SourceError) and is_there(path / WEIGHTS, SourceError):
        return
    expected = f"{CONFIG} and {WEIGHTS}"
    if is_there(path / PICKLE, SourceError):
        raise SourceError(
            f"{path / PICKLE}: an adapter in PyTorch's pickle format, which can run any program when it is read",
            expected=expected,
            fix="save it as safetensors: model.save_pretrained(DIR)",
        )
    inside = sorted(each.parent.name for each in path.glob(f"*/{CONFIG}"))
    raise SourceError(
        f"{path}: no adapter here",
        expected=expected,
        found=f"adapters in {', '.join(inside[:5])}" + (", …" if len(inside) > 5 else "") if inside else None,
        fix=f"name one of them, as in {path / inside[0]}" if inside else None,
    )


def _check_kind(raw: Mapping[str, Any], path: Path) -> None:
    """Raises: ConfigError for what is no sum of the base and matrices."""
    kind = raw.get("peft_type")
    if kind not in KINDS:
        raise ConfigError(
            f"{path}: an adapter of a kind that is not merged here",
            expected=f"peft_type {' or '.join(KINDS)}",
            found=f"peft_type {shown(kind)}",
            fix=MERGE_IT,
        )
    for key, why in REFUSED.items():
        if raw.get(key):
            raise ConfigError(
                f"{path}: {why}, so it can't be merged into the weights", found=f"{key} {shown(raw[key])}", fix=MERGE_IT
            )
    start = raw.get("init_lora_weights")
    name = next((name for word, name in INITIALIZED.items() if str(start).lower().startswith(word)), None)
    if name is not None:
        raise ConfigError(
            f"{path}: {name} changed the base before the training, and this adapter is relative to that",
            expected="an adapter of the published base",
            found=f"init_lora_weights {shown(start)}",
            fix=SAVE_IT,
        )


def _concerns(raw: Mapping[str, Any]) -> list[str]:
    if str(raw.get("init_lora_weights")).lower() == "loftq":
        return [
            "the adapter was begun with LoftQ, which makes up for the errors of a quantized base: merged into the "
            "16-bit weights it is a little off"
        ]
    return []


def _pieces(path: Path) -> tuple[dict[str, dict[Piece, Stored]], dict[str, str]]:
    """What there is of each weight, and each weight's module. Raises: CheckpointError, MappingError."""
    pieces: dict[str, dict[Piece, Stored]] = {}
    paths: dict[str, str] = {}
    for tensor in read_header(path):
        if tensor.dtype not in FLOAT_DTYPES:
            raise MappingError(
                f"{tensor.origin} has a dtype that weights can't have",
                expected=", ".join(FLOAT_DTYPES),
                found=tensor.dtype,
            )
        end, piece = next((each for each in SUFFIXES if tensor.name.endswith(each[0])), ("", Piece.WHOLE))
        module = tensor.name.removeprefix(ROOT).removesuffix(end)
        if len(module) > MAX_PATH:
            raise MappingError(f"{tensor.origin} is no tensor of a Gemma 3n", expected=f"at most {MAX_PATH} characters")
        if 0 in tensor.shape or (piece in FACTORS and len(tensor.shape) < 2):
            raise CheckpointError(
                f"{tensor.origin} is a shard, or empty",
                expected="a matrix",
                found=str(list(tensor.shape)),
                fix="save the adapter again, with its parts gathered: deepspeed.zero.GatheredParameters for ZeRO-3, "
                "FullyShardedDataParallel.summon_full_params for FSDP",
            )
        weight = bare_name(module) + (".weight" if end else "")
        there = pieces.setdefault(weight, {})
        if piece in there:
            raise MappingError(f"{path}: tensors {there[piece].name!r} and {tensor.name!r} are the same piece")
        there[piece] = tensor
        paths[weight] = module
    if not pieces:
        raise CheckpointError(f"{path}: no tensors", expected="those of an adapter")
    return pieces, paths


def _number(value: Any, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        raise ConfigError(f"{path}: {name} is impossible", expected="a number", found=shown(value))
    return float(value)


def _alpha_pattern(value: Any, path: Path) -> tuple[tuple[re.Pattern[str], float], ...]:
    """What a module's path is held against, in the order of the file. Raises: ConfigError also for an expression that
    may take for ever."""
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise ConfigError(
            f"{path}: alpha_pattern is impossible", expected=f"at most {MAX_PATTERNS:,} names", found=shown(value)
        )
    patterns = {key: rf"(.*\.)?({key})$" for key in value}
    for key, pattern in patterns.items():
        try:
            check_regex(pattern, MAX_PATH)
        except ValueError as error:
            raise ConfigError(
                f"{path}: a name of alpha_pattern can't be used",
                expected="a regular expression without nested repeats",
                found=f"{shown(key)}: {error}",
            ) from error
    return tuple((re.compile(patterns[key]), _number(alpha, "alpha_pattern", path)) for key, alpha in value.items())


def _tokens(raw: Mapping[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """Numbers of trained tokens by the end of their module's path; an empty end fits every one."""
    name = "token_indices" if raw["peft_type"] == TRAINABLE_TOKENS else "trainable_token_indices"
    value = raw.get(name) or {}
    by_end = value if isinstance(value, dict) else {"": value}
    for ids in by_end.values():
        is_list = isinstance(ids, list) and all(type(number) is int and number >= 0 for number in ids)
        if not is_list or len(set(ids)) < len(ids):
            raise ConfigError(
                f"{path}: {name} is impossible", expected="numbers of tokens, each once", found=shown(value)
            )
    return {end: tuple(ids) for end, ids in by_end.items()}
