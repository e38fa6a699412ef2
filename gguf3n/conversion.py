"""The main job in one call: a source, the quantizations wanted, the files written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import Keys, LlamaFileType

from gguf3n.errors import UsageError
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.half import fits_f16
from gguf3n.formats.hub import fetch_checkpoint, fetch_tensor_table, is_repo_id
from gguf3n.formats.imatrix import ImportanceMatrix, read_imatrix
from gguf3n.formats.whole_file import check_output, check_space, make_directory
from gguf3n.gemma3n.gguf_source import read_gguf_source
from gguf3n.gemma3n.gguf_types import types_by_storage
from gguf3n.gemma3n.importance import Importance, match_importance
from gguf3n.gemma3n.model import Model, read_checkpoint
from gguf3n.gemma3n.tensors import MappedTensor, Storage
from gguf3n.pipeline import Progress, run
from gguf3n.planning import Plan, make_plan
from gguf3n.recipes import Keep, Recipe, extract_recipe, find_recipe, override


@dataclass(frozen=True)
class Conversion:
    """A file that was written. Units: seconds for the whole run, all its files together."""

    path: Path
    plan: Plan
    seconds: float


def read_gguf(source: str | Path, *, allow_requantize: bool = False) -> Model:
    """Everything about a GGUF file of Gemma 3n but its weights, to quantize it with `plan` and `convert`.

    Args:
        source: the file, or any part of a split one.
        allow_requantize: take a file that is quantized already.

    Raises: GGUFError; SourceError or a class below it; UsageError for a quantized file.
    """
    return read_gguf_source(Path(source), allow_requantize=allow_requantize)


def read_source(
    source: str | Path, *, revision: str | None = None, weights: bool = True, show_progress: bool = False
) -> Model:
    """Everything about a checkpoint but its weights; one of the Hub is fetched first.

    Args:
        source: a directory, or a Hub id such as google/gemma-3n-E4B-it.
        revision: branch, tag or commit of a Hub id.
        weights: fetch the weights of a Hub id; without them the result is good for `plan` only.
        show_progress: show huggingface_hub's progress bars.

    Raises: SourceError or a class below it; HubError.
    """
    if is_repo_id(str(source)):
        fetched = fetch_checkpoint(str(source), revision, progress=show_progress, weights=weights)
        model = read_checkpoint(fetched.directory, fetched.repo_id, None if weights else fetch_tensor_table(fetched))
        if fetched.from_cache:
            notice = f"the Hub was not reached; {fetched.repo_id} is the cached commit {fetched.commit[:12]}"
            model = replace(model, notices=(notice, *model.notices))
        return model
    if revision is not None:
        raise UsageError(f"--revision is for Hub ids; {source} is a local path", fix="leave --revision out")
    return read_checkpoint(Path(source))


def plan(
    source: str | Path | Model,
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
        source: a directory, a Hub id, or what `read_source` returned.
        quant: a quantization by name, such as "Q8_0"; a recipe file ending in .toml; or a Recipe.
        ple: type of the per-layer embedding table, if not the quantization's own.
        token_embd: type of the token embedding table, likewise.
        tensor_types: as in "blk.*.attn_v.weight=Q8_0"; the first that matches decides.
        keep: "f16" or "bf16", type of the matrices that are never quantized.
        imatrix: an importance matrix of llama-imatrix, either form.

    Raises: UsageError, SourceError or a class below it, HubError, GGUFError and QuantizationError for the importance
        matrix.
    """
    recipe = _recipe(quant, ple, token_embd, tensor_types, keep)
    model = source if isinstance(source, Model) else read_source(source, revision=revision, weights=False)
    return plan_all(model, [recipe], imatrix=imatrix)[0]


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


def plan_all(
    model: Model, recipes: Sequence[Recipe], *, imatrix: str | Path | ImportanceMatrix | None = None
) -> list[Plan]:
    """A plan for each recipe; arguments and errors as for `plan`."""
    importance = _importance(imatrix, model)
    unfit: set[str] = set()
    if any(recipe.keep is Keep.F16 for recipe in recipes):
        unfit = {tensor.name for tensor in model.tensors if tensor.storage is Storage.HALF and not _fits_f16(tensor)}
    return [make_plan(model, recipe, importance, unfit) for recipe in recipes]


def _fits_f16(tensor: MappedTensor) -> bool:
    return all(fits_f16(rows.source) for rows in tensor.rows if rows.source is not None)


def _recipe(
    quant: str | Recipe, ple: str | None, token_embd: str | None, tensor_types: Sequence[str], keep: str | None
) -> Recipe:
    recipe = find_recipe(quant) if isinstance(quant, str) else quant
    return override(recipe, ple=ple, token_embd=token_embd, tensor_types=tensor_types, keep=keep)


def convert(
    source: str | Path | Model,
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
    progress: Callable[[Progress], None] | None = None,
) -> list[Conversion]:
    """Convert a checkpoint of Gemma 3n to GGUF files, all from one read of its weights.

    Args:
        source: a directory, a Hub id, or what `read_source` returned.
        quants: one quantization or several, each as for `plan`.
        output: a file name ending in .gguf (for one quantization), a directory, or None for NAME-TYPE.gguf here.
        ple, token_embd, tensor_types, keep, imatrix: as for `plan`.
        threads: workers; by default two more than there are processors. Bytes do not depend on it.
        force: replace files that exist.
        progress: called about ten times a second.

    Raises: UsageError, SourceError or a class below it, HubError, QuantizationError, OutputError, Interrupted. No file
        stands under its final name unless all are complete.
    """
    wanted = [quants] if isinstance(quants, str | Recipe) else list(quants)
    if not wanted:
        raise UsageError("no quantization named", expected="one or more, such as Q8_0")
    # before a model is fetched, as a name may be wrong
    recipes = [_recipe(q, ple, token_embd, tensor_types, keep) for q in wanted]
    model = source if isinstance(source, Model) else read_source(source, revision=revision)
    plans = plan_all(model, recipes, imatrix=imatrix)
    return write(plans, output, threads=threads, force=force, progress=progress)


def write(
    plans: Sequence[Plan],
    output: str | Path | None = None,
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> list[Conversion]:
    """Carry out plans of one model, all from one read of its weights; arguments and errors as for `convert`."""
    paths = output_paths(plans[0].model.name, [plan.recipe.name for plan in plans], output)
    for path in paths:
        make_directory(path.parent)
        check_output(path, force=force)
    check_space(paths[0], sum(plan.total_bytes for plan in plans))
    started = time.monotonic()
    run(list(zip(plans, paths, strict=True)), threads=threads, force=force, progress=progress)
    seconds = time.monotonic() - started
    return [Conversion(path, plan, seconds) for path, plan in zip(paths, plans, strict=True)]


def _importance(imatrix: str | Path | ImportanceMatrix | None, model: Model) -> Importance | None:
    if imatrix is None:
        return None
    return match_importance(imatrix if isinstance(imatrix, ImportanceMatrix) else read_imatrix(imatrix), model)


def output_paths(name: str, quants: Sequence[str], output: str | Path | None) -> list[Path]:
    """The files that a conversion writes.

    Raises: UsageError for one file name and several quantizations, or the same quantization twice.
    """
    if len(set(quants)) < len(quants):
        raise UsageError("the same quantization twice", found=", ".join(quants), fix="name each once")
    if output is not None and str(output).endswith(".gguf") and not os.path.isdir(output):
        if len(quants) > 1:
            raise UsageError(
                f"one file name for {len(quants)} quantizations",
                expected="a directory",
                found=str(output),
                fix="give a directory with -o",
            )
        return [Path(output)]
    directory = Path(output) if output is not None else Path()
    return [directory / f"{name}-{quant}.gguf" for quant in quants]
