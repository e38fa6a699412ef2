"""Slices as files: which one fits, what its padding costs, and the checkpoint that other engines load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf3n.deciding import estimate
from gguf3n.errors import UsageError
from gguf3n.formats.checkpoint import INDEX
from gguf3n.formats.safetensors_writer import tensor_bytes, write_checkpoint
from gguf3n.formats.small_file import read_checkpoint_files
from gguf3n.gemma3n.config import Config
from gguf3n.gemma3n.named_slices import NAMED_SLICES, NamedSlice
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.gemma3n.slices import SlicedCheckpoint, effective_parameters, slice_config
from gguf3n.planning import Plan
from gguf3n.progress import Meter, OnProgress
from gguf3n.recipes import Recipe

GIB = 1 << 30


@dataclass(frozen=True)
class SliceSizes:
    """A named slice of a model. Units: bytes of a GGUF file, with true widths and padded for llama.cpp."""

    named: NamedSlice
    n_effective: int
    true_bytes: int
    padded_bytes: int

    @property
    def is_mixed(self) -> bool:
        """Whether llama.cpp needs it padded."""
        return self.padded_bytes != self.true_bytes


def slice_sizes(recipe: Recipe, config: Config = PUBLISHED["E4B"]) -> list[SliceSizes]:
    """Every named slice of a model of E4B's shape, in the order of the table. Raises: UsageError for another model."""
    found = []
    for named in NAMED_SLICES:
        wanted = named.of(config)
        true = slice_config(config, wanted, wanted.widths)
        if recipe.n_layers not in (None, true.num_hidden_layers):
            continue
        padded = slice_config(config, wanted, (max(wanted.widths),) * len(wanted.widths))
        sizes = [estimate(recipe, each).total_bytes for each in (true, padded)]
        found.append(SliceSizes(named, effective_parameters(true), *sizes))
    return found


def choose_slice(
    config: Config,
    recipe: Recipe,
    *,
    max_bytes: float | None = None,
    max_parameters: float | None = None,
    pad: bool = True,
) -> NamedSlice:
    """The named slice that was measured to be best of those that fit; of equal ones, the smallest.

    Args:
        max_bytes: of the file, as large as it is for llama.cpp where it is padded.
        max_parameters: effective ones.

    Raises: UsageError where none fits, or for a model that has none.
    """
    known = slice_sizes(recipe, config)
    if not known:
        raise UsageError(
            f"{recipe.name}: the recipe is for another size of model", expected="one for 30 or 35 layers, or for any"
        )
    fitting = [
        each
        for each in known
        if (max_bytes is None or (each.padded_bytes if pad else each.true_bytes) <= max_bytes)
        and (max_parameters is None or each.n_effective <= max_parameters)
    ]
    if not fitting:
        least = min(known, key=lambda each: each.padded_bytes if pad else each.true_bytes)
        size = least.padded_bytes if pad else least.true_bytes
        raise UsageError(
            "no named slice fits",
            expected=f"{size / 1e9:.3g}GB or more in {recipe.name}, and {least.n_effective / 1e9:.3g}B parameters, as "
            f"{least.named.name} has",
            found=" and ".join(
                text
                for text in (
                    f"--size {max_bytes / 1e9:.3g}GB" if max_bytes is not None else "",
                    f"--params {max_parameters / 1e9:.3g}B" if max_parameters is not None else "",
                )
                if text
            ),
            fix="allow more, or choose a smaller quantization",
        )
    return max(fitting, key=lambda each: (each.named.mmlu, -each.n_effective)).named


def padding_notices(plan: Plan) -> Sequence[str]:
    """What the padding of a slice costs in a file."""
    source = plan.part.source
    if not isinstance(source, SlicedCheckpoint) or not source.is_padded:
        return ()
    padded, true = (estimate(plan.recipe, config).total_bytes for config in (source.config, source.true_config))
    weights = [effective_parameters(config) / 1e9 for config in (source.config, source.true_config)]
    n_layers = sum(one != other for one, other in zip(source.widths, source.slice.widths, strict=True))
    sizes = (plan.total_bytes / GIB, (plan.total_bytes - padded + true) / GIB)
    return (
        f"{plan.recipe.name}: {n_layers} of {len(source.widths)} layers are padded to {max(source.widths)}, as "
        f"llama.cpp takes one FFN width: {sizes[0]:.2f} GiB instead of {sizes[1]:.2f}, and {weights[0]:.2f} B weights "
        f"to compute with for each token instead of {weights[1]:.2f} B. What it says is the same. --no-pad writes the "
        "true widths, for other engines",
    )


def write_slice(source: SlicedCheckpoint, directory: str | Path, *, progress: OnProgress | None = None) -> list[Path]:
    """Write a slice as a checkpoint of its own, which transformers loads; returns its files.

    Args:
        source: as `take_slice` gives it with pad=False.
        directory: a new one, or an empty one.
        progress: called after each few megabytes.

    Raises: UsageError for padded slices and what else no file has; SourceError or a class below it; OutputError, and
        then nothing stands there.
    """
    files = read_checkpoint_files(source.path)
    files.pop(INDEX, None)
    files["config.json"] = (json.dumps(source.raw_config, indent=2) + "\n").encode()
    tensors = list(source.tensors.values())
    meter = Meter("copying", "bytes", sum(map(tensor_bytes, tensors)), progress)
    return write_checkpoint(Path(directory), tensors, files, copied=meter.advance)
