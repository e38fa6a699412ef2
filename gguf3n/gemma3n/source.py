"""What was given, read once: a checkpoint directory, a repository of the Hub, or a GGUF file.

Everything that needs to know of the model (conversion, validation, engines, memory, statistics) takes a Source and
never opens its files again but for weights. Its parts are read when they are first asked for, and kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf3n.errors import CheckpointError, SourceError, UsageError
from gguf3n.formats.checkpoint import INDEX, SINGLE, read_tensor_table
from gguf3n.formats.gguf_reader import SPLIT_NAME, GGUFFile, open_gguf
from gguf3n.formats.hub import fetch_checkpoint, fetch_tensor_table, is_repo_id
from gguf3n.formats.rows import FLOAT_DTYPES, SourceTensor, stored_tensors
from gguf3n.formats.small_file import check_checkpoint_files, check_permission, is_there
from gguf3n.formats.training_folder import find_model, settings_directory
from gguf3n.gemma3n.config import Config, load_config, parse_config
from gguf3n.gemma3n.tokenizer import Vocabulary, read_vocabulary


@dataclass(frozen=True, kw_only=True)
class Source:
    """What every source has.

    Args:
        origin: as the user named it.
        path: the directory or file that it is read from.
        name: the model's, for new file names.
        tensors: its tensors by their names there, each with the place of its rows.
        notices: what a user should know of it.
    """

    origin: str
    path: Path
    name: str
    tensors: Mapping[str, SourceTensor]
    notices: tuple[str, ...] = ()

    @property
    def files(self) -> set[Path]:
        """Those that its weights are in."""
        return {self.path, *(Path(each.file_name) for tensor in self.tensors.values() for each in tensor.stored)}

    @property
    def read_from(self) -> str:
        """Where its weights are from, for what is kept of them."""
        return str(self.path)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Source):
    """A directory in Hugging Face's layout, or in that of a training.

    Args:
        path: where config and tokenizer are.
        folder: what the directory is called by its user, where that is another name than `path` has.
        repo_id, commit: the Hub's, where it was fetched from there.
        changes: names of what was made of it, in order: of the adapters merged into it, and of the slice that it is.
        as_it_stands: whether the directory's files hold these tensors as they are, for who reads them by themselves.
    """

    folder: str | None = None
    repo_id: str | None = None
    commit: str | None = None
    changes: tuple[str, ...] = ()
    as_it_stands: bool = True

    @property
    def read_from(self) -> str:
        """The directory, and what was made of it."""
        return " with ".join([str(self.path), *self.changes])

    @property
    def unpadded(self) -> Checkpoint:
        """The model without what llama.cpp needs beside it."""
        return self

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """The content of config.json. Raises: SourceError, ConfigError."""
        return load_config(self.path)

    @cached_property
    def config(self) -> Config:
        """Raises: SourceError, ConfigError."""
        return parse_config(self.raw_config, self.path / "config.json")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Raises: TokenizerError; SourceError, ConfigError."""
        return read_vocabulary(self.path, self.config)


MODEL_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]{1,96}/[\w.-]{1,96})(?:[/?#].*)?")
"""What a browser shows of a model on the Hub."""


@dataclass(frozen=True, kw_only=True)
class GGUFSource(Source):
    """A GGUF file, all parts of a split one together."""

    gguf: GGUFFile

    @property
    def quantized_types(self) -> tuple[str, ...]:
        """The types of its tensors that are not plain floats."""
        found = {dtype for tensor in self.tensors.values() for dtype in tensor.dtypes}
        return tuple(sorted(found.difference(FLOAT_DTYPES)))


def open_source(
    source: str | Path | Source, *, revision: str | None = None, weights: bool = True, show_progress: bool = False
) -> Source:
    """Read everything about a source that its first use needs; no weights. What is on the Hub is fetched first.

    Args:
        source: a checkpoint directory, or the folder of a training with one in it; a Hub id such as
            google/gemma-3n-E4B-it; a local GGUF file or any part of a split one; or a Source, which is returned.
        revision: branch, tag or commit of a Hub id.
        weights: fetch the weights of a Hub id too; without them only the table of its tensors is there.
        show_progress: show huggingface_hub's progress bars.

    Raises: SourceError or a class below it; GGUFError; HubError; UsageError for a revision of what is not on the Hub.
    """
    if isinstance(source, Source):
        return source
    if is_repo_id(str(source)):
        return _fetched(str(source), revision, weights=weights, show_progress=show_progress)
    if revision is not None:
        raise UsageError(f"--revision is for Hub ids; {source} is a local path", fix="leave --revision out")
    path = Path(source)
    if os.path.isfile(path) or (path.suffix == ".gguf" and not os.path.isdir(path)):  # False for names too long, too
        return open_gguf_source(path)
    if not os.path.isdir(path):
        if page := MODEL_PAGE.fullmatch(str(source)):
            raise SourceError(
                f"{source}: the address of a model's page", expected="its id", fix=f"name it as {page[1]}"
            )
        check_permission(path, SourceError)
        raise SourceError(
            f"{path}: not a directory" if os.path.lexists(path) else f"{path}: no such directory",
            expected="a directory with a Hugging Face checkpoint, or a Hub id like google/gemma-3n-E4B-it",
        )
    model = find_model(path)
    settings = settings_directory(model.directory)
    check_checkpoint_files(settings)
    name = _last_part(os.path.abspath(path))
    return Checkpoint(
        origin=str(model.directory),
        path=settings,
        name=name,
        tensors=model.tensors,
        notices=model.notices,
        folder=None if settings == path else name,
        as_it_stands=any(is_there(settings / file, CheckpointError) for file in (SINGLE, INDEX)),
    )


def open_checkpoint(source: str | Path | Source) -> Checkpoint:
    """The same of a checkpoint only. Raises: as `open_source`; SourceError for a GGUF file."""
    opened = open_source(source)
    if not isinstance(opened, Checkpoint):
        raise SourceError(
            f"{opened.origin}: a GGUF file", expected="a directory with a Hugging Face checkpoint, or a Hub id"
        )
    return opened


def _fetched(repo_id: str, revision: str | None, *, weights: bool, show_progress: bool) -> Checkpoint:
    fetched = fetch_checkpoint(repo_id, revision, progress=show_progress, weights=weights)
    table = read_tensor_table(fetched.directory) if weights else fetch_tensor_table(fetched)
    cached = f"the Hub was not reached; {fetched.repo_id} is the cached commit {fetched.commit[:12]}"
    return Checkpoint(
        origin=fetched.repo_id,
        path=fetched.directory,
        name=_last_part(fetched.repo_id),
        tensors=table,
        notices=(cached,) if fetched.from_cache else (),
        repo_id=fetched.repo_id,
        commit=fetched.commit,
    )


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def open_gguf_source(path: Path) -> GGUFSource:
    """A local GGUF file, or all parts of a split one. Raises: GGUFError."""
    gguf = open_gguf(path)
    table = stored_tensors(map(gguf.stored, gguf.tensors.values()))
    return GGUFSource(origin=str(path), path=path, name=_model_name(path), tensors=table, gguf=gguf)


def _model_name(path: Path) -> str:
    """The model's name in new file names: without what its part is called, numbers of parts, and the type."""
    match = SPLIT_NAME.fullmatch(path.name)
    stem = match[1] if match else path.stem
    return re.sub(r"^mmproj-|[-.](B?F16|F32|lossless)$", "", stem, flags=re.IGNORECASE)
