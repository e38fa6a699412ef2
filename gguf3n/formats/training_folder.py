"""What a training leaves behind: its newest complete model, wherever that stands below the folder.

    out/checkpoint-200/                         Hugging Face's Trainer, TRL, Unsloth
    out/epoch_1_step_200/model/                 NeMo Automodel: each rank's shards; config and tokenizer in .hf_metadata
    out/epoch_1_step_200/model/consolidated/    the same model in Hugging Face's layout

Folders that differ in the number of a step are saves of one training, and the highest is the newest. Which of two
trainings is meant can't be known: they are listed.

Source: get_last_checkpoint in transformers' trainer_utils.py; components/checkpoint/checkpointing.py and utils.py in
nemo_automodel.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf3n.errors import ConfigError, SourceError
from gguf3n.formats.checkpoint import SINGLE, foreign, has_weights, not_a_checkpoint, read_tensor_table
from gguf3n.formats.rows import SourceTensor
from gguf3n.formats.small_file import is_there

STEP = re.compile(r"(?:.*[-_])?(?:step|checkpoint|epoch)[-_]?(\d{1,18})")
"""How the folder of a save is called; a name with several numbers ends in the step's."""

HF_METADATA = ".hf_metadata"
"""Where NeMo Automodel puts config and tokenizer, beside the shards."""
CONSOLIDATED = "consolidated"
COPIES = (CONSOLIDATED, "sharded")
"""Folders with the model of the one above in another layout; the second is torch's."""
UNFINISHED = ".incomplete"
"""What NeMo Automodel puts into the folder of a save until it is complete."""
CONFIG = "config.json"
ADAPTER = "adapter_config.json"

LEFT_OUT = re.compile(r"\..*|tmp-.*|optim.*|runs|wandb")
"""Folders that hold no model: hidden ones, what is not complete yet, optimizers' states and logs."""

MAX_DEPTH = 5
"""As in TRAININGS/RUN/checkpoints/epoch_1_step_200/model/consolidated."""
MAX_FOLDERS = 10_000
SHOWN = 8
"""Folders that a message names."""


@dataclass(frozen=True)
class Model:
    """A model that was found, its headers read; `notices` say which one it is, and what was passed over."""

    directory: Path
    tensors: Mapping[str, SourceTensor]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Save:
    """A folder with weights. `training`: its path but for the step; `order`: the newest has the highest."""

    directory: Path
    training: tuple[str, ...]
    order: tuple[int, bool, int]


def settings_directory(directory: Path) -> Path:
    """Where config and tokenizer of a checkpoint are: in its directory, or where NeMo Automodel has them."""
    beside = directory / HF_METADATA
    has_own = is_there(directory / CONFIG, ConfigError)
    return beside if not has_own and is_there(beside / CONFIG, ConfigError) else directory


def find_model(directory: Path) -> Model:
    """The model in a directory, or the newest complete one of the training whose folder it is.

    Raises: SourceError where there is none, or more than one; of the only one there is, also the classes below it.
    """
    if has_weights(directory):
        return Model(directory, read_tensor_table(directory))
    folders = list(_folders(directory))
    saves = sorted(
        (_save(directory, folder) for folder in folders if has_weights(folder)),
        key=lambda save: save.order,
        reverse=True,
    )
    found: dict[tuple[str, ...], Model] = {}
    incomplete: dict[Path, SourceError] = {}
    for save in saves:
        if save.training not in found:
            try:
                found[save.training] = _complete(directory, save.directory)
            except SourceError as error:
                incomplete[save.directory] = error
    if len(found) > 1:
        raise SourceError(
            f"{directory}: several models, and which one is meant can't be known",
            expected="a checkpoint, or the folder of one training",
            found=_lines(str(model.directory) for model in found.values()),
            fix="name one of these",
        )
    if not found and len(incomplete) > 1:
        raise SourceError(
            f"{directory}: {len(incomplete)} saves of a model, and none is complete",
            expected="all weights, and config.json",
            found=_lines(error.one_line for error in incomplete.values()),
        )
    if incomplete and not found:
        raise next(iter(incomplete.values()))
    if not found:
        raise _no_model(directory, folders)
    (model,) = found.values()
    taken = f"took {model.directory}, the newest complete model in {directory}"
    passed_over = [f"passed over what is not complete: {error.what}" for error in incomplete.values()]
    return replace(model, notices=(taken, *passed_over))


def _save(directory: Path, folder: Path) -> _Save:
    parts = (folder.parent if folder.name in COPIES else folder).relative_to(directory).parts
    steps = ((at, int(match[1])) for at, match in enumerate(map(STEP.fullmatch, parts)) if match)
    at, step = next(steps, (len(parts), 0))
    return _Save(folder, (*parts[:at], "", *parts[at + 1 :]), (step, folder.name == CONSOLIDATED, -len(folder.parts)))


def _complete(root: Path, directory: Path) -> Model:
    """Raises: SourceError or a class below it for what is not complete."""
    settings = settings_directory(directory)
    above = [path for path in (directory, *directory.parents) if path.is_relative_to(root)]
    if any(is_there(path / UNFINISHED, SourceError) for path in above):
        raise SourceError(f"{directory}: the training has not finished saving it", found=UNFINISHED)
    if not is_there(settings / CONFIG, SourceError):
        raise SourceError(f"{directory}: no {CONFIG}")
    return Model(directory, read_tensor_table(directory))


def _folders(directory: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """All below, links apart. Raises: SourceError for too many, or one that can't be read."""
    n_left = MAX_FOLDERS
    level = [directory]
    for _ in range(depth):
        level = [folder for above in level for folder in _below(above)]
        n_left -= len(level)
        if n_left < 0:
            raise SourceError(
                f"{directory}: too many folders to look for a model in",
                expected=f"at most {MAX_FOLDERS:,}",
                fix="name the folder of the checkpoint",
            )
        yield from level


def _below(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise SourceError(f"{directory}: cannot be read", found=error.strerror or str(error)) from error
    return [directory / name for name in sorted(names) if not LEFT_OUT.fullmatch(name)]


def _no_model(directory: Path, folders: Sequence[Path]) -> SourceError:
    """What is there instead."""
    newest = sorted(folders, key=lambda folder: _save(directory, folder).order, reverse=True)
    adapters = [folder for folder in newest if is_there(folder / ADAPTER, SourceError)]
    if foreign(directory) is None and adapters:
        return SourceError(
            f"{directory}: only adapters, no model",
            expected=SINGLE,
            found=_lines(map(str, adapters)),
            fix=f"merge one into its base: gguf3n convert BASE --adapter {shlex.quote(str(adapters[0]))}",
        )
    errors = (foreign(folder) for folder in (directory, *newest))
    return next((error for error in errors if error is not None), not_a_checkpoint(directory))


def _lines(texts: Iterable[str]) -> str:
    """Some of them, each on a line."""
    first, rest = (all_texts := list(texts))[:SHOWN], all_texts[SHOWN:]
    return "\n".join([*first, *([f"and {len(rest):,} more"] if rest else [])])
