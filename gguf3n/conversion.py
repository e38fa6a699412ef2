"""The main job in one call: a source, the quantizations wanted, the files written."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import Keys, LlamaFileType

from gguf3n.errors import UsageError, shown
from gguf3n.formats.correlations import Correlations, as_correlations
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.half import fits_f16
from gguf3n.formats.imatrix import ImportanceMatrix, as_imatrix
from gguf3n.formats.rows import FLOAT_DTYPES, RowReader
from gguf3n.formats.whole_file import check_not_input, check_output, check_space, make_directory
from gguf3n.gemma3n.adapter import read_adapter
from gguf3n.gemma3n.gguf_types import types_by_storage
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.merging import check_given, merge
from gguf3n.gemma3n.part import ENCODERS, Part, PartKind, check_kind, mmproj_part, text_part
from gguf3n.gemma3n.refinement import match_correlations
from gguf3n.gemma3n.source import GGUFSource, Source, open_gguf_source, open_source
from gguf3n.pipeline import run
from gguf3n.planning import Plan, linted, make_plan
from gguf3n.progress import OnProgress
from gguf3n.recipes import For, Keep, Recipe, extract_recipe, find_recipe, override
from gguf3n.slicing import padding_notices
from gguf3n.workers import check_threads

PART_KINDS = {For.TEXT: PartKind.TEXT, For.MMPROJ: PartKind.MMPROJ}
ENCODER_PATTERN = re.compile(r"(?:re:)?(?:v|a|mm)\\?\.")
"""How a --tensor-type begins that is for the mmproj file, where both files are written."""


@dataclass(frozen=True)
class Conversion:
    """A file that was written. Units: seconds for the whole run, all its files together."""

    path: Path
    plan: Plan
    seconds: float


@dataclass(frozen=True)
class ConversionOptions:
    """What is wanted of a conversion, checked before a source is fetched or read; see `parse_options`.

    `recipes` are those of the text model's files and then of the mmproj files. `inputs` are files that were read for
    them, beside the source.
    """

    recipes: tuple[Recipe, ...]
    output: Path | None = None
    imatrix: ImportanceMatrix | None = None
    threads: int | None = None
    force: bool = False
    vision: bool = True
    audio: bool = True
    force_types: bool = False
    inputs: tuple[str | Path, ...] = ()
    correlations: Correlations | None = None


def parse_options(
    quants: str | Recipe | Sequence[str | Recipe] = (),
    output: str | Path | None = None,
    *,
    mmproj: str | Recipe | Sequence[str | Recipe] = (),
    vision: bool = True,
    audio: bool = True,
    force_types: bool = False,
    like: Sequence[str] = (),
    ple: str | None = None,
    token_embd: str | None = None,
    tensor_types: Sequence[str] = (),
    keep: str | None = None,
    imatrix: str | Path | ImportanceMatrix | None = None,
    refine: str | Path | Correlations | None = None,
    threads: int | None = None,
    force: bool = False,
) -> ConversionOptions:
    """The options of a command line or a call as one checked value.

    Args:
        quants: one quantization or several: a name such as "Q8_0", a recipe file ending in .toml, or a Recipe. Nothing
            where only the mmproj file is wanted.
        output: a file name ending in .gguf (for one quantization), a directory, or None for NAME-TYPE.gguf here.
        mmproj: the same of the mmproj file with the vision and audio encoders; none is written without.
        vision, audio: which of the encoders to write.
        force_types: write types of the encoders that llama.cpp aborts on.
        like: GGUF files whose types are wanted too, tensor by tensor: paths, https URLs or org/repo:QUANT.
        ple: type of the per-layer embedding table, if not the quantization's own.
        token_embd: type of the token embedding table, likewise.
        tensor_types: as in "blk.*.attn_v.weight=Q8_0"; the first that matches decides. Patterns that begin with v., a.
            or mm. are for the mmproj file.
        keep: "f16" or "bf16", type of the matrices that are never quantized.
        imatrix: an importance matrix of llama-imatrix, either form.
        refine: correlations, with which codes are refined for the matrices' outputs.
        threads: workers; by default two more than there are processors. Bytes do not depend on it.
        force: replace files that exist.

    Raises: UsageError for names or options that can't be used; GGUFError, HubError for a file to be like; GGUFError for
        the importance matrix and the correlations.
    """
    check_threads(threads)
    texts = [*_recipes(quants, For.TEXT), *map(read_recipe, like)]
    encoders = _recipes(mmproj, For.MMPROJ)
    if not texts and not encoders:
        raise UsageError(
            "no quantization named",
            expected="one or more, such as Q8_0, or a file to be like",
            fix="add --quant NAME or --like FILE, or --mmproj NAME for the vision and audio encoders",
        )
    for_text = {"--ple": ple, "--token-embd": token_embd, "--keep": keep, "--imatrix": imatrix, "--refine": refine}
    for_encoders = {"--no-vision": not vision, "--no-audio": not audio, "--force-types": force_types}
    _check_needed(for_text, texts, "--quant")
    _check_needed(for_encoders, encoders, "--mmproj")
    of_encoders = [rule for rule in tensor_types if not texts or ENCODER_PATTERN.match(rule)]
    of_text = [rule for rule in tensor_types if rule not in of_encoders]
    _check_needed({f"--tensor-type {rule}": True for rule in of_encoders}, encoders, "--mmproj")
    recipes = [override(recipe, ple=ple, token_embd=token_embd, tensor_types=of_text, keep=keep) for recipe in texts]
    recipes += [override(recipe, tensor_types=of_encoders) for recipe in encoders]
    output = None if output is None else Path(output)
    output_paths([PART_KINDS[recipe.part].value.format(name="NAME", quant=recipe.name) for recipe in recipes], output)
    matrix, correlations = as_imatrix(imatrix), as_correlations(refine)
    inputs: list[str | Path] = [*like]
    inputs += [each.path for each in (matrix, correlations) if each is not None]
    return ConversionOptions(
        tuple(recipes), output, matrix, threads, force, vision, audio, force_types, tuple(inputs), correlations
    )


def _recipes(named: str | Recipe | Sequence[str | Recipe], part: For) -> list[Recipe]:
    """Recipes for one of the files. Raises: UsageError for one that is unknown or for the other."""
    each = [named] if isinstance(named, str | Recipe) or not isinstance(named, Iterable) else list(named)
    for name in each:
        if not isinstance(name, str | Recipe):
            raise UsageError("not a quantization", expected="its name, or a Recipe", found=shown(name))
    recipes = [find_recipe(name, part) if isinstance(name, str) else name for name in each]
    for recipe in recipes:
        if recipe.part is not part:
            raise UsageError(f"{recipe.name}: a recipe for the {recipe.part.value} file", expected=part.value)
    return recipes


def _check_needed(options: Mapping[str, object], recipes: Sequence[Recipe], option: str) -> None:
    """Refuse options for a file that is not wanted. Raises: UsageError."""
    given = [name for name, value in options.items() if value]
    if given and not recipes:
        raise UsageError(f"{given[0]} is for a file that is not wanted", fix=f"add {option} NAME, or leave it out")


def read_source(
    source: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    allow_requantize: bool = False,
    adapters: Sequence[str | Path] = (),
    adapter_scale: float = 1.0,
    show_progress: bool = False,
) -> Source:
    """Open a source to convert it; no weights are read. What is on the Hub is fetched first.

    Args:
        source: a checkpoint directory, a Hub id such as google/gemma-3n-E4B-it, or a local GGUF file.
        revision: branch, tag or commit of a Hub id.
        weights: fetch the weights of a Hub id; without them the result is good for `plan` only.
        allow_requantize: take a GGUF file that is quantized already.
        adapters: PEFT adapters to merge into a checkpoint, one after another: directories or Hub ids.
        adapter_scale: how much of what they add is added.
        show_progress: show huggingface_hub's progress bars.

    Raises: SourceError or a class below it; GGUFError; HubError; UsageError for a quantized GGUF file, or adapters that
        can't be merged into one.
    """
    check_given(adapters, adapter_scale)
    read = [read_adapter(adapter, show_progress=show_progress) for adapter in adapters]
    opened = open_source(source, revision=revision, weights=weights, show_progress=show_progress)
    checked = _checked(opened, allow_requantize) if isinstance(opened, GGUFSource) else opened
    return merge(checked, read, adapter_scale)


def read_gguf(source: str | Path, *, allow_requantize: bool = False, kinds: Collection[PartKind] = ()) -> Source:
    """Open a GGUF file to convert it.

    Args:
        source: the file, or any part of a split one.
        allow_requantize: take a file that is quantized already.
        kinds: what is wanted of it.

    Raises: GGUFError; SourceError for a file of another kind; UsageError for a quantized file.
    """
    opened = open_gguf_source(Path(source))
    for kind in kinds:
        check_kind(opened, kind)
    return _checked(opened, allow_requantize)


def _checked(source: GGUFSource, allow_requantize: bool) -> Source:
    quantized = ", ".join(source.quantized_types)
    if not quantized:
        return source
    if not allow_requantize:
        *most, last = FLOAT_DTYPES
        raise UsageError(
            f"{source.origin}: quantized already",
            expected=f"a file in {', '.join(most)} or {last}",
            found=quantized,
            fix="quantize from the original; or add --allow-requantize and lose quality twice",
        )
    notice = f"the source is quantized already ({quantized}): what it has lost is lost, and is rounded again"
    return replace(source, notices=(*source.notices, notice))


def plan(
    source: str | Path | Source,
    quant: str | Recipe,
    *,
    revision: str | None = None,
    ple: str | None = None,
    token_embd: str | None = None,
    tensor_types: Sequence[str] = (),
    keep: str | None = None,
    imatrix: str | Path | ImportanceMatrix | None = None,
    refine: str | Path | Correlations | None = None,
    vision: bool = True,
    audio: bool = True,
) -> Plan:
    """What `convert` would write: every tensor's type and why, sizes, metadata.

    Reads no weights but the small matrices that are kept in 16 bits, to see whether F16 holds them.

    Args:
        source: as for `read_source`, or what it returned.
        quant: a name, or a Recipe, also one for the mmproj file, as `find_recipe("F16", For.MMPROJ)` gives it.
        revision: branch, tag or commit of a Hub id.
        ple and the others: as for `parse_options`.

    Raises: UsageError, SourceError or a class below it, HubError, GGUFError and QuantizationError for the importance
        matrix and the correlations.
    """
    is_mmproj = isinstance(quant, Recipe) and quant.part is For.MMPROJ
    options = parse_options(
        () if is_mmproj else quant,
        mmproj=quant if is_mmproj else (),
        vision=vision,
        audio=audio,
        ple=ple,
        token_embd=token_embd,
        tensor_types=tensor_types,
        keep=keep,
        imatrix=imatrix,
        refine=refine,
    )
    opened = source if isinstance(source, Source) else read_source(source, revision=revision, weights=False)
    return plan_files(opened, options)[0]


def plan_files(source: Source, options: ConversionOptions) -> list[Plan]:
    """A plan for each file that is wanted; errors as for `plan`."""
    texts = [recipe for recipe in options.recipes if recipe.part is For.TEXT]
    encoders = [recipe for recipe in options.recipes if recipe.part is For.MMPROJ]
    plans: list[Plan] = []
    if texts:
        wanted = zip(ENCODERS, (options.vision, options.audio), strict=True)
        beside = [what for what, is_wanted in wanted if encoders and is_wanted]
        planned = plan_all(text_part(source, beside=beside), texts, options.imatrix, options.correlations)
        plans += [replace(each, notices=(*each.notices, *padding_notices(each))) for each in planned]
    if encoders:
        part = mmproj_part(source, vision=options.vision, audio=options.audio)
        plans += linted([make_plan(part, recipe, force_types=options.force_types) for recipe in encoders])
    return plans


def plan_all(
    part: Part,
    recipes: Sequence[Recipe],
    imatrix: ImportanceMatrix | None = None,
    correlations: Correlations | None = None,
) -> list[Plan]:
    """A plan for each recipe; errors as for `plan`."""
    importance = None if imatrix is None else match_importance(imatrix, part)
    refinement = None if correlations is None else match_correlations(correlations, part)
    unfit: set[str] = set()
    if any(recipe.keep is Keep.F16 for recipe in recipes):
        reader = RowReader()
        try:
            unfit = {
                tensor.name
                for tensor in part.tensors
                if tensor.storage is Storage.HALF and not all(fits_f16(rows, reader) for rows in tensor.rows)
            }
        finally:
            reader.close()
    return linted([make_plan(part, recipe, importance, unfit, refinement=refinement) for recipe in recipes])


def convert(
    source: str | Path | Source,
    quants: str | Recipe | Sequence[str | Recipe] = (),
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    adapters: Sequence[str | Path] = (),
    adapter_scale: float = 1.0,
    mmproj: str | Recipe | Sequence[str | Recipe] = (),
    vision: bool = True,
    audio: bool = True,
    force_types: bool = False,
    ple: str | None = None,
    token_embd: str | None = None,
    tensor_types: Sequence[str] = (),
    keep: str | None = None,
    imatrix: str | Path | ImportanceMatrix | None = None,
    refine: str | Path | Correlations | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> list[Conversion]:
    """Convert a source of Gemma 3n to GGUF files, all from one read of its weights: text model, encoders, or both.

    Args:
        source: as for `read_source`, or what it returned.
        revision, adapters, adapter_scale: as for `read_source`, of a source that is not open yet.
        progress: called about ten times a second.
        quants and the others: as for `parse_options`.

    Raises: UsageError, SourceError or a class below it, HubError, GGUFError, QuantizationError, OutputError,
        Interrupted. No file stands under its final name unless all are complete.
    """
    options = parse_options(
        quants,
        output,
        mmproj=mmproj,
        vision=vision,
        audio=audio,
        force_types=force_types,
        ple=ple,
        token_embd=token_embd,
        tensor_types=tensor_types,
        keep=keep,
        imatrix=imatrix,
        refine=refine,
        threads=threads,
        force=force,
    )
    if isinstance(source, Source):
        if adapters:
            raise UsageError(f"{source.origin}: open already", fix="give the adapters to read_source")
        opened = source
    else:
        opened = read_source(source, revision=revision, adapters=adapters, adapter_scale=adapter_scale)
    return write_files(plan_files(opened, options), options, progress)


def write_files(
    plans: Sequence[Plan], options: ConversionOptions, progress: OnProgress | None = None
) -> list[Conversion]:
    """Carry out what `plan_files` has planned; errors as for `write`."""
    return write(
        plans,
        options.output,
        inputs=options.inputs,
        threads=options.threads,
        force=options.force,
        progress=progress,
    )


def write(
    plans: Sequence[Plan],
    output: str | Path | None = None,
    *,
    inputs: Sequence[str | Path] = (),
    threads: int | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> list[Conversion]:
    """Carry out plans, of one source or several; rows that several of them want are read once.

    Args:
        output, threads, force: as for `parse_options`.
        inputs: files that are not to be replaced, beside those of the sources.
        progress: called about ten times a second.

    Raises: UsageError, SourceError or a class below it, QuantizationError, OutputError, Interrupted. No file stands
        under its final name unless all are complete.
    """
    check_threads(threads)
    if not plans:
        raise UsageError("nothing to write", expected="one plan or more", found="none")
    paths = output_paths([plan.file_name for plan in plans], output)
    sources = {file for plan in plans for file in plan.part.source.files}
    for path in paths:
        check_not_input(path, *inputs, *sources)
        make_directory(path.parent)
        check_output(path, force=force)
    check_space(paths[0], sum(plan.total_bytes for plan in plans))
    started = time.monotonic()
    run(list(zip(plans, paths, strict=True)), threads=threads, force=force, progress=progress)
    seconds = time.monotonic() - started
    return [Conversion(path, plan, seconds) for path, plan in zip(paths, plans, strict=True)]


def output_paths(names: Sequence[str], output: str | Path | None) -> list[Path]:
    """The files that a conversion writes.

    Args:
        names: of each, where `output` is a directory or not given.

    Raises: UsageError for one file name and several files, or the same file twice.
    """
    if len(set(names)) < len(names):
        raise UsageError("the same quantization twice", found=", ".join(names), fix="name each once")
    if output is not None and str(output).endswith(".gguf") and not os.path.isdir(output):
        if len(names) > 1:
            raise UsageError(
                f"one file name for {len(names)} quantizations",
                expected="a directory",
                found=str(output),
                fix="give a directory with -o",
            )
        return [Path(output)]
    directory = Path(output) if output is not None else Path()
    return [directory / name for name in names]


def read_recipe(source: str | Path) -> Recipe:
    """The recipe that gives a model the types of a GGUF file of Gemma 3n, tensor by tensor. Reads its header only.

    Args:
        source: a local file, an https URL, or a file on the Hub as org/repo:QUANT.

    Raises: GGUFError, HubError; SourceError for another model; MappingError for tensors that are missing; UsageError
        for a type that can't be written.
    """
    gguf = open_gguf(source)
    types = types_by_storage(gguf, str(source))
    key = gguf.keys.get(Keys.General.FILE_TYPE)
    ftype = next((ftype for ftype in LlamaFileType if key is not None and ftype == key.value), None)
    return extract_recipe(str(source), types[Storage.QUANTIZABLE], types[Storage.HALF], ftype)
