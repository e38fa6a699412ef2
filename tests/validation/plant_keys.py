"""Faults to be planted in the keys of a sound file, and the keys that are to be named for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf3n.formats.gguf_reader import open_part
from gguf3n.inspection.edit import edit

TOKENS = "tokenizer.ggml.tokens"
SCORES = "tokenizer.ggml.scores"
TYPES = "tokenizer.ggml.token_type"
TEMPLATE = "tokenizer.chat_template"
FIRST_LEARNED = 494
"""The first id of the small vocabulary whose token is merged from letters."""


@dataclass(frozen=True)
class Fault:
    """What `plant` does to a file, and the key that each stage names; None where it is not the stage's to see.

    `warns` are the stages that warn of it; the others fail.
    """

    plant: Callable[[Path], None]
    structure: str | None
    tokens: str | None = None
    warns: tuple[str, ...] = ()


def setting(key: str, kind: str, value: Any) -> Callable[[Path], None]:
    return lambda path: set_key(path, key, kind, value)


def set_key(path: Path, key: str, kind: str, value: Any) -> None:
    edit(path, [{"op": "set", "key": key, "type": kind, "value": value}])


def unset_key(path: Path, key: str) -> None:
    edit(path, [{"op": "unset", "key": key}])


def values(path: Path, key: str) -> list[Any]:
    found = open_part(path).value(key)
    assert isinstance(found, list)
    return found


def change(key: str, kind: str, changed: Callable[[list[Any]], list[Any]]) -> Callable[[Path], None]:
    """A plant that gives an array other items."""
    return lambda path: set_key(path, key, kind, changed(values(path, key)))


def shift_up(tokens: list[str]) -> list[str]:
    """A token too much, the last one lost."""
    return [*tokens[:FIRST_LEARNED], "<new>", *tokens[FIRST_LEARNED:-1]]


def shift_down(tokens: list[str]) -> list[str]:
    """A token too few, one more at the end."""
    return [*tokens[:FIRST_LEARNED], *tokens[FIRST_LEARNED + 1 :], "<new>"]


def retext(tokens: list[str]) -> list[str]:
    """A token that most words need is another."""
    return ["qqqq" if token == "e" else token for token in tokens]


def turn_upside_down(scores: list[float]) -> list[float]:
    """What was merged first is merged last."""
    return [*scores[:FIRST_LEARNED], *(-score - 2000.0 for score in scores[FIRST_LEARNED:1016]), *scores[1016:]]


def swap(scores: list[float]) -> list[float]:
    """Two tokens that are far apart change places."""
    scores[500], scores[800] = scores[800], scores[500]
    return scores


def retype(token_id: int, kind: int) -> Callable[[list[int]], list[int]]:
    return lambda types: [kind if i == token_id else old for i, old in enumerate(types)]


def edit_template(before: str, after: str) -> Callable[[Path], None]:
    def plant(path: Path) -> None:
        template = open_part(path).value(TEMPLATE)
        assert isinstance(template, str) and before in template
        set_key(path, TEMPLATE, "string", template.replace(before, after, 1))

    return plant


FAULTS: dict[str, Fault] = {
    "wrong rope base": Fault(
        setting("gemma3n.rope.freq_base", "float32", 10_000.0), "gemma3n.rope.freq_base"
    ),
    "no rope base": Fault(lambda path: unset_key(path, "gemma3n.rope.freq_base"), "gemma3n.rope.freq_base"),
    "wrong rope base of sliding layers": Fault(
        setting("gemma3n.rope.freq_base_swa", "float32", 1e6), "gemma3n.rope.freq_base_swa"
    ),
    "rope scaling": Fault(setting("gemma3n.rope.scaling.factor", "float32", 8.0), "gemma3n.rope.scaling.factor"),
    "wrong sliding pattern": Fault(
        change("gemma3n.attention.sliding_window_pattern", "bool[]", lambda old: [*old[1:], old[0]]),
        "gemma3n.attention.sliding_window_pattern",
    ),
    "no sliding pattern": Fault(
        lambda path: unset_key(path, "gemma3n.attention.sliding_window_pattern"),
        "gemma3n.attention.sliding_window_pattern",
    ),
    "wrong sliding window": Fault(
        setting("gemma3n.attention.sliding_window", "uint32", 64), "gemma3n.attention.sliding_window"
    ),
    "shared_kv_layers off by one": Fault(
        setting("gemma3n.attention.shared_kv_layers", "uint32", 3), "gemma3n.attention.shared_kv_layers"
    ),
    "shared_kv_layers as a float": Fault(
        setting("gemma3n.attention.shared_kv_layers", "float32", 2.0), "shared-kv-type", warns=("structure",)
    ),
    "wrong sparsity": Fault(
        change("gemma3n.activation_sparsity_scale", "float32[]", lambda old: [*old[:9], 1.2815516, *old[10:]]),
        "gemma3n.activation_sparsity_scale",
    ),
    "wrong softcapping": Fault(
        setting("gemma3n.final_logit_softcapping", "float32", 50.0), "gemma3n.final_logit_softcapping"
    ),
    "wrong epsilon": Fault(
        setting("gemma3n.attention.layer_norm_rms_epsilon", "float32", 1e-5),
        "gemma3n.attention.layer_norm_rms_epsilon",
    ),
    "wrong AltUp input": Fault(setting("gemma3n.altup.active_idx", "uint32", 1), "gemma3n.altup.active_idx"),
    "another architecture": Fault(setting("general.architecture", "string", "gemma3"), "general.architecture"),
    "vocabulary shifted up": Fault(change(TOKENS, "string[]", shift_up), TOKENS, TOKENS),
    "vocabulary shifted down": Fault(change(TOKENS, "string[]", shift_down), TOKENS, TOKENS),
    "a token's text": Fault(change(TOKENS, "string[]", retext), TOKENS, TOKENS),
    "scores upside down": Fault(change(SCORES, "float32[]", turn_upside_down), SCORES, SCORES),
    "two scores swapped": Fault(change(SCORES, "float32[]", swap), SCORES, SCORES),
    "a turn mark of letters": Fault(change(TYPES, "int32[]", retype(105, 1)), TYPES, TYPES),
    "a tag of letters": Fault(change(TYPES, "int32[]", retype(168, 1)), TYPES, TYPES),
    "a hidden tag": Fault(change(TYPES, "int32[]", retype(168, 3)), TYPES, warns=("structure",)),
    "a byte of letters": Fault(change(TYPES, "int32[]", retype(300, 1)), TYPES),
    "space prefix": Fault(
        setting("tokenizer.ggml.add_space_prefix", "bool", True),
        "tokenizer.ggml.add_space_prefix",
        "tokenizer.ggml.add_space_prefix",
    ),
    "space prefix by default": Fault(
        lambda path: unset_key(path, "tokenizer.ggml.add_space_prefix"),
        "tokenizer.ggml.add_space_prefix",
        "tokenizer.ggml.add_space_prefix",
    ),
    "no begin token": Fault(
        setting("tokenizer.ggml.add_bos_token", "bool", False),
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_bos_token",
    ),
    "an end token": Fault(
        setting("tokenizer.ggml.add_eos_token", "bool", True),
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.add_eos_token",
    ),
    "another begin token": Fault(
        setting("tokenizer.ggml.bos_token_id", "uint32", 1),
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.bos_token_id",
    ),
    "another end token": Fault(setting("tokenizer.ggml.eos_token_id", "uint32", 107), "tokenizer.ggml.eos_token_id"),
    "another end of turn": Fault(setting("tokenizer.ggml.eot_token_id", "uint32", 105), "tokenizer.ggml.eot_token_id"),
    "a piece that ends a message": Fault(
        setting("tokenizer.ggml.eom_token_id", "uint32", 600), "tokenizer.ggml.eom_token_id"
    ),
    "a piece that ends generation": Fault(
        setting("tokenizer.ggml.fim_pad_token_id", "uint32", 600), "tokenizer.ggml.fim_pad_token_id"
    ),
    "a piece that fills in": Fault(
        setting("tokenizer.ggml.fim_pre_token_id", "uint32", 600),
        "tokenizer.ggml.fim_pre_token_id",
        warns=("structure",),
    ),
    "another temperature": Fault(
        setting("general.sampling.temp", "float32", 2.0), "general.sampling.temp", warns=("structure",)
    ),
    "another sampler": Fault(
        setting("general.sampling.min_p", "float32", 0.9), "general.sampling.min_p", warns=("structure",)
    ),
    "lists without their spaces cut off": Fault(
        edit_template("{{ part.text | trim }}", "{{ part.text }}"), TEMPLATE, TEMPLATE, warns=("structure",)
    ),
    "another mark for images": Fault(
        edit_template("<image_soft_token>", "<image>"), TEMPLATE, warns=("structure",)
    ),
    "a second begin token": Fault(
        edit_template("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"), TEMPLATE, TEMPLATE
    ),
    "a second begin token in the next line": Fault(
        edit_template("{{ bos_token }}", "{{ bos_token }}\n<bos>"), TEMPLATE, TEMPLATE
    ),
    "a second begin token, hidden": Fault(
        edit_template("{{ bos_token }}", "{{ bos_token ~ bos_token }}"), TEMPLATE, TEMPLATE, warns=("structure",)
    ),
    "another role": Fault(edit_template('"model"', '"assistant"'), TEMPLATE, TEMPLATE, warns=("structure",)),
    "a broken template": Fault(
        setting(TEMPLATE, "string", "{% for message in messages %}"), TEMPLATE, TEMPLATE, warns=("structure",)
    ),
    "no template": Fault(
        lambda path: unset_key(path, TEMPLATE), "chat-template", TEMPLATE, warns=("structure", "tokens")
    ),
    "a token twice": Fault(
        change(TOKENS, "string[]", lambda old: [*old[:-1], old[600]]), "duplicate-token", "vocabulary"
    ),
    "another tokenizer": Fault(
        setting("tokenizer.ggml.model", "string", "gpt2"), "tokenizer.ggml.model", "vocabulary"
    ),
    "no vocabulary": Fault(lambda path: unset_key(path, TOKENS), "missing-tokenizer", "vocabulary"),
}  # fmt: skip
