"""Recipe files.

inherit = "Q4_K_M"            # what this file does not say is taken from there; its rules come after
name = "mine"                 # else the file's name
summary = "one line"
note = "what else to know"
for = "text"                  # or "mmproj": the vision and audio encoders
ftype = "Q4_K_M"              # general.file_type; else guessed from the type
type = "Q4_K"                 # of every matrix that no rule decides
token_embd = "Q6_K"           # of the token embeddings, where no rule decides
ple = "Q5_1"                  # of the per-layer embeddings, likewise; "base": the base type
unevaluated = "Q2_K"          # of weights that are never used; "rules": as all others
keep = "f16"                  # of matrices that are never quantized: f16, bf16, source, f32
image_rows = "model"          # of <end_of_image> in the embedding tables: the model's, or padding as "llama.cpp" has it
evidence = ["line", "line"]   # what the types were chosen by, where gguf3n tune has chosen them; not inherited

[[rule]]                      # the first that matches decides
tensor = "blk.*.attn_v.weight"    # a pattern of the whole name, or a list; or regex = '...'
layers = ["first 1/8", 9]     # conditions, all optional: layers (see layers.py), imatrix, quant_weights,
imatrix = true                # evaluated, row_multiple_of, row_not_multiple_of, min_gqa
type = "Q6_K"
reason = "why"

[variant."2025"]              # NAME@2025: the same rules, some of the settings above different
ple = "Q4_K"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf.constants import GGMLQuantizationType as QType
from gguf.constants import LlamaFileType

from gguf3n.errors import UsageError, shown
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.toml_text import QUOTED, logical_lines, parse_toml
from gguf3n.recipes.layers import EXPECTED as LAYERS_EXPECTED
from gguf3n.recipes.layers import parse_layers
from gguf3n.recipes.model import For, ImageRows, Keep, Rule
from gguf3n.regexes import check_regex

RULES = "rules"
"""The value of `unevaluated` that means no type of its own."""
NAME_PART = QUOTED + r"|[^.\s]+"
"""Of a dotted key."""
MAX_NUMBER = 1 << 31
"""Of layers or weights."""
BASE = "base"
"""The value of `token_embd` and `ple` that means the base type."""

WRITABLE = {qtype.name: qtype for qtype in GGML_TYPES}
"""The types that a recipe may name."""


@dataclass(frozen=True)
class RecipeFile:
    """A file as it stands, before inheritance.

    Args:
        origin: its name, for messages.
        variants: what NAME@VARIANT says otherwise.
    """

    origin: str
    settings: Mapping[str, Any]
    rules: tuple[Rule, ...]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def parse_type(value: Any) -> QType:
    """A type by its name, in any case. Raises: ValueError."""
    if not isinstance(value, str) or value.upper() not in WRITABLE:
        raise ValueError
    return WRITABLE[value.upper()]


def parse_ftype(value: Any) -> LlamaFileType:
    """A file type by its name, as in "Q4_K_M". Raises: ValueError."""
    if isinstance(value, str):
        for ftype in LlamaFileType:
            if ftype.name in (f"MOSTLY_{value.upper()}", f"ALL_{value.upper()}"):
                return ftype
    raise ValueError


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return " ".join(value.split())


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.+@-]+", value):
        raise ValueError
    return value


def _lines(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError
    return tuple(map(_text, value))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _positive(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_NUMBER:
        raise ValueError
    return value


def _patterns(value: Any) -> tuple[str, ...]:
    patterns = value if isinstance(value, list) else [value]
    return tuple(map(_text, patterns)) or _text(None)  # type: ignore[return-value]


def _regexes(value: Any) -> tuple[str, ...]:
    patterns = _patterns(value)
    for pattern in patterns:
        check_regex(pattern)
    return patterns


def _unevaluated(value: Any) -> QType | None:
    return None if value == RULES else parse_type(value)


def _table_type(value: Any) -> QType | None:
    return None if value == BASE else parse_type(value)


A_TYPE = "one of " + ", ".join(WRITABLE)

SETTINGS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "inherit": (_text, "the name of a recipe"),
    "name": (_name, "letters, digits and any of . _ + @ -, as it becomes part of a file's name"),
    "summary": (_text, "a line of text"),
    "note": (_text, "some text"),
    "evidence": (_lines, "a list of lines"),
    "ftype": (parse_ftype, "a file type of llama.cpp, such as Q4_K_M"),
    "type": (parse_type, A_TYPE),
    "token_embd": (_table_type, f'"{BASE}", or {A_TYPE}'),
    "ple": (_table_type, f'"{BASE}", or {A_TYPE}'),
    "unevaluated": (_unevaluated, f'"{RULES}", or {A_TYPE}'),
    "keep": (Keep, ", ".join(keep.value for keep in Keep)),
    "image_rows": (ImageRows, " or ".join(f'"{rows.value}"' for rows in ImageRows)),
    "n_layers": (_positive, "a number of layers"),
    "for": (For, " or ".join(f'"{part.value}"' for part in For)),
}
"""Keys at the top of a file and in a variant: parser, what it takes."""

CONDITIONS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "layers": (parse_layers, LAYERS_EXPECTED),
    "imatrix": (_flag, "true or false"),
    "quant_weights": (_flag, "true or false"),
    "evaluated": (_flag, "true or false"),
    "row_multiple_of": (_positive, "a number of weights"),
    "row_not_multiple_of": (_positive, "a number of weights"),
    "min_gqa": (_positive, "a number of query heads"),
}
RULE_KEYS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "tensor": (_patterns, "a pattern of tensor names, or a list of them"),
    "regex": (
        _regexes,
        "a regular expression of tensor names whose repeats are few and not nested, or a list of them",
    ),
    "type": (parse_type, A_TYPE),
    "reason": (_text, "a line of text"),
    **CONDITIONS,
}
"""Keys of a rule: parser, what it takes."""


def parse(text: str, origin: str, *, strict: bool) -> RecipeFile:
    """The content of a recipe file.

    Args:
        origin: the file's name, for messages.
        strict: whether a type that rows do not fit is an error.

    Raises: UsageError with the line.
    """
    raw = parse_toml(text, origin)
    lines = _Lines(text, origin)
    settings, rules, variants = dict(raw), raw.pop("rule", []), raw.pop("variant", {})
    settings = _parse_table(raw, SETTINGS, lines, "", ("rule", "variant"))
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise UsageError(f"{lines.place('', 'rule')}: rules are not a list of tables", expected="[[rule]]")
    parsed = tuple(_parse_rule(rule, number, lines, strict) for number, rule in enumerate(rules, 1))
    if not isinstance(variants, dict) or not all(isinstance(table, dict) for table in variants.values()):
        raise UsageError(f"{lines.place('', 'variant')}: variants are not tables", expected="[variant.NAME]")
    return RecipeFile(
        origin,
        settings,
        parsed,
        {name: _parse_table(table, SETTINGS, lines, f"variant.{name}") for name, table in variants.items()},
    )


def _parse_table(
    raw: Mapping[str, Any],
    keys: Mapping[str, tuple[Callable[[Any], Any], str]],
    lines: _Lines,
    table: str,
    more: tuple[str, ...] = (),
) -> dict[str, Any]:
    parsed = {}
    for key, value in raw.items():
        if key not in keys:
            raise UsageError(
                f"{lines.place(table, key)}: unknown key {key!r}", expected=", ".join((*keys, *more)), found=key
            )
        parser, expected = keys[key]
        try:
            parsed[key] = parser(value)
        except ValueError:
            raise UsageError(
                f"{lines.place(table, key)}: impossible value of {key!r}", expected=expected, found=shown(value)
            ) from None
    return parsed


def _parse_rule(raw: Mapping[str, Any], number: int, lines: _Lines, strict: bool) -> Rule:
    table = f"rule {number}"
    values = _parse_table(raw, RULE_KEYS, lines, table)
    place = lines.place(table)
    if ("tensor" in values) == ("regex" in values):
        raise UsageError(f"{place}: a rule needs tensor or regex, one of them", expected='tensor = "blk.*.ffn_down.*"')
    for key in ("type", "reason"):
        if key not in values:
            raise UsageError(f"{place}: the rule has no {key}", expected=f"{key} = {RULE_KEYS[key][1]}")
    is_regex = "regex" in values
    return Rule(
        patterns=values["regex" if is_regex else "tensor"],
        qtype=values["type"],
        reason=values["reason"],
        is_regex=is_regex,
        place=place,
        strict=strict,
        **{key: values[key] for key in CONDITIONS if key in values},
    )


class _Lines:
    """Where tables and keys stand in a file. Why: tomllib does not tell."""

    def __init__(self, text: str, origin: str) -> None:
        self.origin = origin
        self.numbers: dict[tuple[str, str], int] = {}
        table, n_rules = "", 0
        for number, line in logical_lines(text):
            key, equals, _ = line.strip().partition("=")
            if key.startswith("["):
                table = re.sub(r"[\"' ]", "", key.lstrip("[").partition("]")[0])
                if key.startswith("[[") and table == "rule":
                    n_rules += 1
                    table = f"rule {n_rules}"
                self.numbers.setdefault((table, ""), number)
            elif equals and re.fullmatch(r"[\w\"'. -]+", key) and (names := re.findall(NAME_PART, key)):
                path = [table] if table else []
                *parents, name = names
                inner = ".".join([*path, *(part.strip("\"'") for part in parents)])
                self.numbers.setdefault((inner, name.strip("\"'")), number)
                if parents:
                    self.numbers.setdefault((inner, ""), number)

    def place(self, table: str, key: str = "") -> str:
        """As in "mine.toml, line 12"."""
        number = self.numbers.get((table, key)) or self.numbers.get((table, "")) or self.numbers.get(("", key))
        return self.origin if number is None else f"{self.origin}, line {number}"
