"""Recipes by name: the presets that come with gguf3n, and files of the user's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType as QType

from gguf3n.errors import UsageError
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.small_file import MAX_RECIPE_BYTES, read_text
from gguf3n.recipes.model import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD, For, ImageRows, Keep, Recipe, Rule
from gguf3n.recipes.toml import A_TYPE, RecipeFile, parse, parse_type
from gguf3n.regexes import check_regex

SUFFIX = ".toml"
SHARED = "_"
"""How the names of files begin that are only inherited."""
MAX_DEPTH = 8
"""Of inheritance; more is a circle."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""As llama-quantize has them."""

TEXT_ONLY = ("token_embd", "ple", "unevaluated", "keep", "image_rows", "n_layers")
"""Settings that mean nothing for the encoders."""

OPTION = {For.TEXT: "--quant", For.MMPROJ: "--mmproj"}
"""What a recipe is given with."""

Settings = Mapping[str, Any]


def preset_names(part: For = For.TEXT) -> tuple[str, ...]:
    """The names of all presets for a file, without their variants."""
    return tuple(sorted(name for name in _presets(part) if not name.startswith(SHARED)))


def variant_names(name: str) -> tuple[str, ...]:
    """The full names of a preset's variants, as in Q4_K_M@2025."""
    return tuple(f"{name}@{variant}" for variant in _inherited(_preset(name, For.TEXT), None, For.TEXT).variants)


def find_recipe(name: str, part: For = For.TEXT) -> Recipe:
    """A recipe by its name or file.

    Args:
        name: a preset, in any case, or a path ending in .toml.
        part: the file that it is for.

    Raises: UsageError for an unknown name, a file that is no recipe, or one that is for the other file.
    """
    if name.lower().endswith(SUFFIX):
        path = Path(name)
        chain = _inherited(read_file(path), path.parent, part)
        return _build(chain, str(chain.settings[0].get("name", path.stem)), part)
    base, _, variant = _preset_name(name, part).partition("@")
    return _build(_chain(base, variant or None, part), f"{base}@{variant}" if variant else base, part)


def parse_recipe(text: str, origin: str, part: For) -> Recipe:
    """A recipe from what `format_recipe` made of it: it decides as the one before, however its rules came to be.

    Args:
        origin: where the text stands, for messages.

    Raises: UsageError.
    """
    chain = _inherited(parse(text, origin, strict=False), None, part)
    return _build(chain, str(chain.settings[0].get("name", "recipe")), part)


def override(
    recipe: Recipe,
    *,
    ple: str | None = None,
    token_embd: str | None = None,
    tensor_types: Sequence[str] = (),
    keep: str | None = None,
) -> Recipe:
    """A recipe with what the command line wants otherwise.

    Args:
        ple, token_embd: types of the two embedding tables.
        tensor_types: as in "blk.*.attn_v.weight=Q8_0", or "re:" and a regular expression; the first that matches
            decides, before ple and token_embd.
        keep: "f16" or "bf16", the type of the matrices that are never quantized.

    Raises: UsageError for an unusable option.
    """
    overrides = [_override(text) for text in tensor_types]
    for table, option, value in ((PER_LAYER_TOKEN_EMBD, "--ple", ple), (TOKEN_EMBD, "--token-embd", token_embd)):
        if value is not None:
            qtype = _option_type(value, option)
            overrides.append(Rule((table,), qtype, f"{option} {qtype.name}", place="command line", strict=True))
    if keep is not None:
        if keep.lower() not in (Keep.F16.value, Keep.BF16.value):
            raise UsageError(f"--keep: unusable type {keep!r}", expected="f16 or bf16", found=keep)
        recipe = replace(recipe, keep=Keep(keep.lower()))
    return replace(recipe, overrides=(*overrides, *recipe.overrides))


def read_file(path: Path) -> RecipeFile:
    """A user's recipe file. Raises: UsageError."""
    return parse(read_text(path, MAX_RECIPE_BYTES, UsageError), str(path), strict=True)


@dataclass(frozen=True)
class _Chain:
    """A file and all it inherits: settings and rules in the order in which they are looked up."""

    origin: str
    settings: tuple[Settings, ...]
    variants: Mapping[str, tuple[Settings, ...]]
    rules: tuple[Rule, ...]


def _inherited(file: RecipeFile, directory: Path | None, part: For, depth: int = 0) -> _Chain:
    """Put a file's ancestors behind it. Raises: UsageError for one that is for another file."""
    _check_for(file, part)
    own = _Chain(file.origin, (file.settings,), {name: (table,) for name, table in file.variants.items()}, file.rules)
    parent = file.settings.get("inherit")
    if parent is None:
        return own
    if depth == MAX_DEPTH:
        raise UsageError(f"{file.origin}: inherits from itself", expected="recipes that inherit in one direction")
    above = _parent(parent, file.origin, directory, part, depth + 1)
    names = dict.fromkeys([*own.variants, *above.variants])
    return _Chain(
        file.origin,
        own.settings + above.settings,
        {name: own.variants.get(name, ()) + above.variants.get(name, ()) for name in names},
        own.rules + above.rules,
    )


def _check_for(file: RecipeFile, part: For) -> None:
    found = file.settings.get("for", For.TEXT)
    if found is not part:
        raise UsageError(
            f"{file.origin}: a recipe for the {found.value} file",
            expected=f'one with for = "{part.value}"',
            fix=f"give it with {OPTION[found]}, or choose another",
        )
    if part is For.MMPROJ and (useless := [key for key in TEXT_ONLY if key in file.settings]):
        raise UsageError(
            f"{file.origin}: {useless[0]} in a recipe for the mmproj file", expected="a rule", fix="remove it"
        )


def _parent(name: str, origin: str, directory: Path | None, part: For, depth: int) -> _Chain:
    if directory is not None and name.lower().endswith(SUFFIX):
        path = directory / name
        return _inherited(read_file(path), path.parent, part, depth)
    if name.startswith(SHARED) and name in _presets(part):
        return _inherited(_preset(name, part), None, part, depth)
    try:
        base, _, variant = _preset_name(name, part).partition("@")
    except UsageError as error:
        raise UsageError(f"{origin}: inherits from {name!r}, which is no recipe", expected=error.expected) from error
    return _selected(_inherited(_preset(base, part), None, part, depth), variant)


def _chain(base: str, variant: str | None, part: For) -> _Chain:
    return _selected(_inherited(_preset(base, part), None, part), variant)


def _selected(chain: _Chain, variant: str | None) -> _Chain:
    """The chain with a variant's settings before all others, for a recipe that is used or inherited from by name."""
    return replace(chain, settings=chain.variants.get(variant or "", ()) + chain.settings, variants={})


def _preset_name(name: str, part: For) -> str:
    """A preset's name in its own case, aliases resolved. Raises: UsageError for an unknown one."""
    base, at, variant = name.partition("@")
    known = {preset.upper(): preset for preset in preset_names(part)}
    found = known.get(ALIASES.get(base.upper(), base.upper()))
    if found is not None:
        variants = _inherited(_preset(found, part), None, part).variants
        if not at or variant in variants:
            return found + at + variant
        expected = " or ".join(f"{found}@{one}" for one in variants) or f"{found}, which has no variants"
        raise UsageError(f"unknown variant {name!r}", expected=expected, found=name)
    other = For.TEXT if part is For.MMPROJ else For.MMPROJ
    if base.upper() in map(str.upper, preset_names(other)):
        fix = f"it is for the {other.value} file: give it with {OPTION[other]}, or choose another"
    else:
        close = difflib.get_close_matches(base.upper(), known, n=1)
        fix = f"did you mean {known[close[0]]}? " if close else ""
        fix += f"`gguf3n recipes list{' --mmproj' if part is For.MMPROJ else ''}` tells them all"
    raise UsageError(
        f"unknown quantization {name!r}" + (" of the mmproj file" if part is For.MMPROJ else ""),
        expected=", ".join(preset_names(part)) + ", or a recipe file ending in .toml",
        found=name,
        fix=fix,
    )


@lru_cache(maxsize=len(For))
def _presets(part: For) -> Mapping[str, Any]:
    """Name -> file of everything in presets/, or in its folder for the encoders."""
    folder = files("gguf3n.recipes") / "presets"
    entries = (folder if part is For.TEXT else folder / part.value).iterdir()
    return {entry.name.removesuffix(SUFFIX): entry for entry in entries if entry.name.endswith(SUFFIX)}


@lru_cache(maxsize=256)
def _preset(name: str, part: For) -> RecipeFile:
    return parse(_presets(part)[name].read_text(encoding="utf-8"), name, strict=False)


def _build(chain: _Chain, name: str, part: For) -> Recipe:
    def setting(key: str, default: Any = None) -> Any:
        return next((table[key] for table in chain.settings if key in table), default)

    qtype: QType | None = setting("type")
    if qtype is None:
        raise UsageError(f"{chain.origin}: no base type", expected='type = "Q4_K", or a recipe to inherit from')
    return Recipe(
        name=name,
        qtype=qtype,
        ftype=setting("ftype", GGML_TYPES[qtype].ftype),
        rules=chain.rules,
        token_embd=setting("token_embd"),
        ple=setting("ple"),
        unevaluated=setting("unevaluated"),
        keep=setting("keep", Keep.F16),
        image_rows=setting("image_rows", ImageRows.MODEL),
        n_layers=setting("n_layers"),
        summary=setting("summary", ""),
        note=setting("note", ""),
        part=part,
        evidence=chain.settings[0].get("evidence", ()),
    )


def _override(text: str) -> Rule:
    """A rule of the command line, as in "blk.*.attn_v.weight=Q8_0"."""
    option = f"--tensor-type {text}"
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"{option}: not PATTERN=TYPE", expected="--tensor-type 'blk.*.attn_v.weight=Q8_0'", found=text)
    is_regex = pattern.startswith("re:")
    pattern = pattern.removeprefix("re:")
    if is_regex:
        try:
            check_regex(pattern)
        except ValueError as error:
            raise UsageError(f"{option}: not a regular expression that can be used", found=str(error)) from error
    return Rule((pattern,), _option_type(name, option), option, is_regex=is_regex, place=option, strict=True)


def _option_type(name: str, option: str) -> QType:
    try:
        return parse_type(name)
    except ValueError:
        raise UsageError(f"{option}: unusable type {name!r}", expected=A_TYPE, found=name) from None
