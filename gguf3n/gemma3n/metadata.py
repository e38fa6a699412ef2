"""GGUF keys that every file of a model has: what it is called, how it is quantized, its tokenizer.

The general.* keys come from the gguf package's reading of the model card,
generation_config.json and the name, so they are those of llama.cpp's converter.

Source: set_gguf_parameters of Gemma3NModel and its bases in llama.cpp's conversion/.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_VERSION, Keys, LlamaFileType

from gguf3n.errors import ConfigError, shown
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue
from gguf3n.formats.gguf_writer import pack_value
from gguf3n.formats.small_file import CHECKPOINT_FILES, is_there, read_checkpoint_json, read_text
from gguf3n.gemma3n.gguf_package import silenced
from gguf3n.gemma3n.tokenizer import Vocabulary

U32, F32, BOOL, STRING, ARRAY, I32 = (
    GGUFValueType.UINT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.BOOL,
    GGUFValueType.STRING,
    GGUFValueType.ARRAY,
    GGUFValueType.INT32,
)


REPLACED_KEYS = re.compile(r"general\.(alignment|file_type|quantization_version)|split\..+|quantize\.imatrix\..+")
"""Keys that say how a file is laid out, quantized or split: not taken over from a GGUF file that is a source."""

MAX_FRONT_MATTER = 1 << 17
"""Characters; Gemma's has a thousand. YAML is read by Python, a megabyte in some seconds."""

NAME_FIELDS = ("name", "organization", "basename", "finetune", "version", "size_label")
"""What the gguf package guesses from a directory's name; a Hub id says it better."""

OF_THE_BASE = ("author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
"""What the base of a merged or sliced model has, and that model does not: it was published by nobody."""


def general_keys(
    directory: Path,
    repo_id: str | None,
    arch: str,
    n_weights: int,
    kind: str = "model",
    *,
    folder: str | None = None,
    changes: Sequence[str] = (),
) -> list[KeyValue]:
    """The general.* keys, from the model card, generation_config.json, config.json and the name.

    Args:
        repo_id: the Hub id the directory was fetched from; its directory's name is a commit hash.
        arch: general.architecture.
        n_weights: of all tensors written, for the size label.
        kind: general.type.
        folder: what the directory is called, where that is another name than its own.
        changes: what was made of the directory's model, which then is the base model: names of adapters and slices.

    Raises: ConfigError if the model card's front matter or generation_config.json can't be read.
    """
    import gguf

    directory = Path(os.path.abspath(directory))  # its name is the model's, and "." has none
    generation, card = directory / "generation_config.json", directory / "README.md"
    sampling = read_checkpoint_json(generation) if is_there(generation, ConfigError) else {}
    try:
        if is_there(card, ConfigError):
            check_front_matter(read_text(card, *CHECKPOINT_FILES[card.name]))
        with silenced():
            metadata = gguf.Metadata.load(None, directory, None, n_weights)
        _check_sampling(metadata, sampling, generation)
        named = None
        if repo_id is not None:
            named = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), {}, {}, Path(repo_id), n_weights)
        elif folder is not None:
            said = gguf.Metadata.load_model_card(directory), gguf.Metadata.load_hf_parameters(directory)
            named = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), *said, Path(folder), n_weights)
        for field in NAME_FIELDS if named is not None else ():
            setattr(metadata, field, getattr(named, field))
        metadata.name = metadata.name or folder or directory.name
        if changes:
            _make_base(metadata, repo_id, changes)
        metadata.size_label = metadata.size_label or gguf.size_label(n_weights, 0, 0, 0)
        writer = gguf.GGUFWriter(None, arch)
        writer.add_type(kind)
        metadata.set_gguf_meta_model(writer)
        return [_general_key(name, value.type, value.value, generation) for name, value in writer.kv_data[0].items()]
    except ConfigError:
        raise
    except Exception as error:  # of the package's readers, which trust what YAML makes of a text
        raise ConfigError(
            f"{card}: the model card can't be read",
            found=f"{type(error).__name__}: {error}".partition("\n")[0],
            fix="correct the front matter, or remove the file",
        ) from error


def _check_sampling(metadata: Any, sampling: Mapping[str, Any], generation: Path) -> None:
    """See that the package has what the file says. Why: it takes a file that it can't read for an empty one."""
    for name, value in sampling.items():
        attribute = f"sampling_{'temp' if name == 'temperature' else name}"
        if value is not None and getattr(metadata, attribute, value) is None:
            raise ConfigError(f"{generation}: cannot be read", expected=f"{name}, as before", found="nothing")


def _make_base(metadata: Any, repo_id: str | None, changes: Sequence[str]) -> None:
    """Turn what is said of a model into what is said of one that was made of it."""
    base = {field: getattr(metadata, field) for field in ("name", *OF_THE_BASE)}
    if repo_id is not None:
        base["repo_url"] = f"https://huggingface.co/{repo_id}"
    for field in OF_THE_BASE:
        setattr(metadata, field, None)
    metadata.base_models = [{field: value for field, value in base.items() if value is not None}]
    metadata.name = " ".join([metadata.name, *changes])
    metadata.finetune = "-".join([*filter(None, [metadata.finetune]), *changes])


def check_front_matter(text: str) -> None:
    """Refuse what YAML would make too much of. Raises: ValueError, yaml.YAMLError."""
    import yaml

    lines = text.splitlines()
    if lines[:1] != ["---"]:
        return
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    front = "\n".join(lines[1:end])
    if len(front) > MAX_FRONT_MATTER:
        raise ValueError(f"front matter of {len(front):,} characters, more than {MAX_FRONT_MATTER:,}")
    if "*" in front and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(front.replace("\t", "  "))):
        raise ValueError("an alias in the front matter, which may stand for any amount of text")


def _general_key(name: str, kind: GGUFValueType, value: Any, generation: Path) -> KeyValue:
    """A key of the gguf package, whose values are of whatever type YAML and JSON made them."""
    if kind is STRING:
        return KeyValue(name, kind, str(value))
    if kind is ARRAY:  # tags and languages; YAML reads Norwegian as False
        items = [item for item in value if item is not None]
        return KeyValue(name, kind, ["no" if item is False else str(item) for item in items], STRING)
    key = KeyValue(name, kind, value)
    try:
        pack_value(key)
    except (struct.error, OverflowError) as error:
        raise ConfigError(
            f"{generation}: {name.rpartition('.')[2]} is impossible",
            expected=kind.name.lower(),
            found=shown(value),
        ) from error
    return key


def file_keys(ftype: LlamaFileType) -> list[KeyValue]:
    """The keys that say how the file is quantized."""
    return [
        KeyValue(Keys.General.QUANTIZATION_VERSION, U32, GGML_QUANT_VERSION),
        KeyValue(Keys.General.FILE_TYPE, U32, int(ftype)),
    ]


def tokenizer_keys(vocabulary: Vocabulary) -> list[KeyValue]:
    """The tokenizer.* keys."""
    names = Keys.Tokenizer
    keys = [
        KeyValue(names.MODEL, STRING, "llama"),
        KeyValue(names.PRE, STRING, "default"),
        KeyValue(names.LIST, ARRAY, vocabulary.tokens, STRING),
        KeyValue(names.SCORES, ARRAY, vocabulary.scores, F32),
        KeyValue(names.TOKEN_TYPE, ARRAY, [int(kind) for kind in vocabulary.types], I32),
    ]
    for role, name in SPECIAL_ID_KEYS.items():
        if role in vocabulary.special_ids:
            keys.append(KeyValue(name, U32, vocabulary.special_ids[role]))
    for role, name in ADD_TOKEN_KEYS.items():
        if role in vocabulary.add_tokens:
            keys.append(KeyValue(name, BOOL, vocabulary.add_tokens[role]))
    extra = sorted(name for name in vocabulary.chat_templates if name != "default")
    if extra:
        keys.append(KeyValue(names.CHAT_TEMPLATES, ARRAY, extra, STRING))
        keys += [KeyValue(names.CHAT_TEMPLATE_N.format(name=n), STRING, vocabulary.chat_templates[n]) for n in extra]
    if "default" in vocabulary.chat_templates:
        keys.append(KeyValue(names.CHAT_TEMPLATE, STRING, vocabulary.chat_templates["default"]))
    keys.append(KeyValue(names.ADD_PREFIX, BOOL, False))
    return keys


SPECIAL_ID_KEYS: Mapping[str, str] = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
}

ADD_TOKEN_KEYS: Mapping[str, str] = {
    "bos": Keys.Tokenizer.ADD_BOS,
    "eos": Keys.Tokenizer.ADD_EOS,
    "sep": Keys.Tokenizer.ADD_SEP,
}
