"""A checkpoint directory as one value: everything known about it before a weight is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf3n.errors import SourceError
from gguf3n.formats.checkpoint import read_tensor_table
from gguf3n.formats.gguf_layout import KeyValue
from gguf3n.formats.source import SourceTensor
from gguf3n.gemma3n.config import read_config
from gguf3n.gemma3n.metadata import general_keys, model_keys, tokenizer_keys
from gguf3n.gemma3n.tensors import MappedTensor, map_tensors
from gguf3n.gemma3n.tokenizer import read_vocabulary


@dataclass(frozen=True)
class Model:
    """What is to be written, whatever its types: tensors with the place of their rows, and metadata.

    `origin` is the source as the user named it, `path` the directory or GGUF file that it is read from. `keys` are all
    but those that say how the file is quantized; `notices` are what a user should know of this source.
    """

    origin: str
    path: Path
    name: str
    keys: tuple[KeyValue, ...]
    tensors: tuple[MappedTensor, ...]
    notices: tuple[str, ...] = ()

    @property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors)


def read_checkpoint(
    directory: Path, repo_id: str | None = None, table: Mapping[str, SourceTensor] | None = None
) -> Model:
    """Read config, tokenizer and tensor tables of a Hugging Face checkpoint of Gemma 3n; no weights.

    Args:
        repo_id: the Hub id it was fetched from, for names.
        table: its tensors, where the directory does not hold them.

    Raises: SourceError or a class below it.
    """
    if not os.path.isdir(directory):  # os.path: False for a name that is too long, too
        raise SourceError(
            f"{directory}: no such directory",
            expected="a directory with a Hugging Face checkpoint, or a Hub id like google/gemma-3n-E4B-it",
        )
    origin = repo_id or str(directory)
    if table is None:
        table = read_tensor_table(directory)
    config = read_config(directory)
    mapping = map_tensors(config, table, origin)
    vocabulary = read_vocabulary(directory, config)
    notices = [*config.concerns()]
    notices += [f"left out {count} source tensors: {reason}" for reason, count in mapping.dropped]
    if synthesized := mapping.synthesized:
        notices.append(
            f"zeros for {len(synthesized)} tensors that the checkpoint lacks ({synthesized[0]} …): keys and values "
            "of KV-shared layers, which llama.cpp loads but never evaluates"
        )
    if "default" not in vocabulary.chat_templates:
        notices.append("the checkpoint has no chat template; chat programs will fall back to one of their own")
    return Model(
        origin=origin,
        path=directory,
        name=(repo_id or os.path.abspath(directory)).replace("\\", "/").rsplit("/", 1)[-1],
        keys=(*general_keys(directory, repo_id, mapping.n_weights), *model_keys(config), *tokenizer_keys(vocabulary)),
        tensors=mapping.tensors,
        notices=tuple(notices),
    )
