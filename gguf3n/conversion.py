"""The main job in one call: a source, the quantizations wanted, the files written."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import Keys, LlamaFileType

from gguf3n.errors import UsageError
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.half import fits_f16
from gguf3n.formats.imatrix import ImportanceMatrix, read_imatrix
from gguf3n.formats.rows import FLOAT_DTYPES, RowReader
from gguf3n.formats.whole_file import check_output, check_space, make_directory
from gguf3n.gemma3n.gguf_types import types_by_storage
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.gemma3n.source import GGUFSource, Source, open_gguf_source, open_source
from gguf3n.pipeline import run
from gguf3n.planning import Plan, linted, make_plan
from gguf3n.progress import OnProgress
from gguf3n.recipes import Keep, Recipe, extract_recipe, find_recipe, override


@dataclass(frozen=True)
class Conversion:
    """A file that was written. Units: seconds for the whole run, all its files together."""

    path: Path
    plan: Plan
    seconds: float


@dataclass(frozen=True)
class ConversionOptions:
    """What is wanted of a conversion, checked before a source is fetched or read; see `parse_options`."""

    recipes: tuple[Recipe, ...]
    output: Path | None = None
    imatrix: ImportanceMatrix | None = None
    threads: int | None = None
    force: bool = False


def parse_options(
    quants: str | Recipe | Sequence[str | Recipe],
    output: str | Path | None = None,
    *,
    like: Sequence[str] = (),
    ple: str | None = None,
    token_embd: str | None = None,
    tensor_types: Sequence[str] = (),
    keep: str | None = None,
    imatrix: str | Path | ImportanceMatrix | None = None,
    threads: int | None = None,
    force: bool = False,
) -> ConversionOptions:
    """The options of a command line or a call as one checked value.

    Args:
        quants: one quantization or several: a name such as "Q8_0", a recipe file ending in .toml, or a Recipe.
        output: a file name ending in .gguf (for one quantization), a directory, or None for NAME-TYPE.gguf here.
        like: GGUF files whose types are wanted too, tensor by tensor: paths, https URLs or org/repo:QUANT.
        ple: type of the per-layer embedding table, if not the quantization's own.
        token_embd: type of the token embedding table, likewise.
        tensor_types: as in "blk.*.attn_v.weight=Q8_0"; the first that matches decides.
        keep: "f16" or "bf16", type of the matrices that are never quantized.
        imatrix: an importance matrix of llama-imatrix, either form.
        threads: workers; by default two more than there are processors. Bytes do not depend on it.
        force: replace files that exist.

    Raises: UsageError for names or options that can't be used; GGUFError, HubError for a file to be like; GGUFError for
        the importance matrix.
    """
    named = [quants] if isinstance(quants, str | Recipe) else list(quants)
    recipes = [find_recipe(quant) if isinstance(quant, str) else quant for quant in named]
    recipes += map(read_recipe, like)
    if not recipes:
        raise UsageError(
            "no quantization named",
            expected="one or more, such as Q8_0, or a file to be like",
            fix="add --quant NAME or --like FILE",
        )
    recipes = [
        override(recipe, ple=ple, token_embd=token_embd, tensor_types=tensor_types, keep=keep) for recipe in recipes
    ]
    output = None if output is None else Path(output)
    output_paths([f"{recipe.name}.gguf" for recipe in recipes], output)
    matrix = read_imatrix(imatrix) if isinstance(imatrix, str | Path) else imatrix
    return ConversionOptions(tuple(recipes), output, matrix, threads, force)


def read_source(
    source: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    allow_requantize: bool = False,
    show_progress: bool = False,
) -> Source:
    """Open a source to convert it; no weights are read. What is on the Hub is fetched first.

    Args:
        source: a checkpoint directory, a Hub id such as google/gemma-3n-E4B-it, or a local GGUF file.
        revision: branch, tag or commit of a Hub id.
        weights: fetch the weights of a Hub id; without them the result is good for `plan` only.
        allow_requantize: take a GGUF file that is quantized already.
        show_progress: show huggingface_hub's progress bars.

    Raises: SourceError or a class below it; GGUFError; HubError; UsageError for a quantized GGUF file.
    """
    opened = open_source(source, revision=revision, weights=weights, show_progress=show_progress)
    return _checked(opened, allow_requantize) if isinstance(opened, GGUFSource) else opened


def read_gguf(source: str | Path, *, allow_requantize: bool = False) -> Source:
    """Open a GGUF file to convert it.

    Args:
        source: the file, or any part of a split one.
        allow_requantize: take a file that is quantized already.

    Raises: GGUFError; UsageError for a quantized file.
    """
    return _checked(open_gguf_source(Path(source)), allow_requantize)


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
) -> Plan:
    """What `convert` would write: every tensor's type and why, sizes, metadata.

    Reads no weights but the small matrices that are kept in 16 bits, to see whether F16 holds them.

    Args:
        source: as for `read_source`, or what it returned.
        quant, ple, token_embd, tensor_types, keep, imatrix: as for `parse_options`.
        revision: branch, tag or commit of a Hub id.

    Raises: UsageError, SourceError or a class below it, HubError, GGUFError and QuantizationError for the importance
        matrix.
    """
    options = parse_options(
        quant, ple=ple, token_embd=token_embd, tensor_types=tensor_types, keep=keep, imatrix=imatrix
    )
    opened = source if isinstance(source, Source) else read_source(source, revision=revision, weights=False)
    return plan_all(text_part(opened), options.recipes, options.imatrix)[0]


def plan_all(part: Part, recipes: Sequence[Recipe], imatrix: ImportanceMatrix | None = None) -> list[Plan]:
    """A plan for each recipe; errors as for `plan`."""
    importance = None if imatrix is None else match_importance(imatrix, part)
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
    return linted([make_plan(part, recipe, importance, unfit) for recipe in recipes])


def convert(
    source: str | Path | Source,
    quants: str | Recipe | Sequence[str | Recipe],
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    ple: str | None = None,
    token_embd: str | None = None,
    tensor_types: Sequence[str] = (),
    keep: str | None = None,
    imatrix: str | Path | ImportanceMatrix | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> list[Conversion]:
    """Convert a source of Gemma 3n to GGUF files, all from one read of its weights.

    Args:
        source: as for `read_source`, or what it returned.
        revision: branch, tag or commit of a Hub id.
        progress: called about ten times a second.
        quants and the others: as for `parse_options`.

    Raises: UsageError, SourceError or a class below it, HubError, GGUFError, QuantizationError, OutputError,
        Interrupted. No file stands under its final name unless all are complete.
    """
    options = parse_options(
        quants,
        output,
        ple=ple,
        token_embd=token_embd,
        tensor_types=tensor_types,
        keep=keep,
        imatrix=imatrix,
        threads=threads,
        force=force,
    )
    opened = source if isinstance(source, Source) else read_source(source, revision=revision)
    plans = plan_all(text_part(opened), options.recipes, options.imatrix)
    return write(plans, options.output, threads=options.threads, force=options.force, progress=progress)


def write(
    plans: Sequence[Plan],
    output: str | Path | None = None,
    *,
    threads: int | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> list[Conversion]:
    """Carry out plans, of one source or several; rows that several of them want are read once.

    Args:
        output, threads, force: as for `parse_options`.
        progress: called about ten times a second.

    Raises: UsageError, SourceError or a class below it, QuantizationError, OutputError, Interrupted. No file stands
        under its final name unless all are complete.
    """
    if not plans:
        raise UsageError("nothing to write", expected="one plan or more", found="none")
    paths = output_paths([plan.part.file_name(plan.recipe.name) for plan in plans], output)
    for path in paths:
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
