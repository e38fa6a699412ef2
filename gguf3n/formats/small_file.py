"""Small files, read whole: regular ones only, and never more of one than it may have.

Whatever is not tensor data goes through here: what a checkpoint has beside its weights, what a user names on the
command line. A pipe would keep a command waiting for ever, a device or a file with holes would fill the memory.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf3n.errors import CheckpointError, ConfigError, Gguf3nError, SourceError, TokenizerError

MIB = 1 << 20

MAX_RECIPE_BYTES = MIB // 4
"""The largest preset has 4 KB; a tuned one has a rule and a reason for each matrix, 287 of E4B's."""
MAX_TEXT_BYTES = 256 * MIB
"""Of texts to measure on or to compare with; calibration texts have a few megabytes."""
MAX_VALUE_BYTES = 16 * MIB
"""Of a key's value from a file, as of all text of a GGUF header (see gguf_reader)."""
MAX_OPERATIONS_BYTES = 512 * MIB
"""Of the operations of an edit: an undo holds at most a GGUF header in base64."""
MAX_IMATRIX_BYTES = 256 * MIB
"""Gemma 3n's have less than ten megabytes."""
MAX_JSON_CONTAINERS = 1 << 21
"""Lists and objects in a JSON file: each takes two bytes there and sixty in memory. Gemma's tokenizer.json has half a
million."""

CHECKPOINT_FILES: Mapping[str, tuple[int, type[SourceError]]] = {
    "config.json": (MIB, ConfigError),
    "adapter_config.json": (MIB, ConfigError),
    "generation_config.json": (MIB, ConfigError),
    "preprocessor_config.json": (MIB, ConfigError),
    "processor_config.json": (MIB, ConfigError),
    "README.md": (4 * MIB, ConfigError),
    "model.safetensors.index.json": (16 * MIB, CheckpointError),
    "tokenizer.model": (64 * MIB, TokenizerError),
    "tokenizer.json": (128 * MIB, TokenizerError),
    "tokenizer_config.json": (16 * MIB, TokenizerError),
    "special_tokens_map.json": (16 * MIB, TokenizerError),
    "added_tokens.json": (16 * MIB, TokenizerError),
    "chat_template.jinja": (MIB, TokenizerError),
    "chat_template.json": (MIB, TokenizerError),
}
"""What a checkpoint has beside its weights: the bytes it may have, and the error if it is no such file. Gemma 3n's
tokenizer.json has 33 MB and its tokenizer.model 5 MB; the others have less than two."""

MORE_TEMPLATES = "additional_chat_templates"
MAX_MORE_TEMPLATES = 64

KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def is_there(path: Path, error: type[Gguf3nError]) -> bool:
    """Whether there is anything of this name. Raises: `error` where that can't be seen."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as cause:  # ValueError: a name that no file can have
        raise _unreadable(path, cause, error) from cause
    return True


def check_permission(path: Path, error: type[Gguf3nError]) -> None:
    """Tell what may not be seen from what is not there. Raises: `error`."""
    try:
        path.stat()
    except PermissionError as cause:
        fix = "look at the rights of the directories above it"
        raise error(f"{path}: no permission to look at it", found=cause.strerror, fix=fix) from cause
    except (OSError, ValueError):
        return


def check_small(path: Path, max_bytes: int, error: type[Gguf3nError]) -> int:
    """A regular file's size, which is at most `max_bytes`. Raises: `error`."""
    try:
        status = path.stat()
    except (OSError, ValueError) as cause:
        raise _unreadable(path, cause, error) from cause
    if not stat.S_ISREG(status.st_mode):
        found = next((what for is_kind, what in KINDS if is_kind(status.st_mode)), "a device")
        raise error(
            f"{path}: not a regular file",
            expected="a file",
            found=found,
            fix="name a file, or copy the contents to one",
        )
    if status.st_size > max_bytes:
        raise error(
            f"{path}: too large for what it is",
            expected=f"at most {max_bytes:,} bytes",
            found=f"{status.st_size:,} bytes",
            fix="name another file",
        )
    return status.st_size


def read_small(path: Path, max_bytes: int, error: type[Gguf3nError]) -> bytes:
    """All of a regular file. Raises: `error`."""
    n_bytes = check_small(path, max_bytes, error)
    try:
        with open(path, "rb") as file:
            data = file.read(n_bytes + 1)  # not max_bytes: Python makes room for all that is asked for
    except OSError as cause:
        raise _unreadable(path, cause, error) from cause
    if len(data) != n_bytes:
        found = "more" if len(data) > n_bytes else f"{len(data):,} bytes"
        raise error(f"{path}: changed while it was read", expected=f"{n_bytes:,} bytes", found=found)
    return data


def read_text(path: Path, max_bytes: int, error: type[Gguf3nError], *, line_ends: bool = True) -> str:
    """The same of a text in UTF-8. Raises: `error`.

    Args:
        line_ends: make them all line feeds, as Python does when it opens a text.
    """
    try:
        text = read_small(path, max_bytes, error).decode("utf-8")
        return text.replace("\r\n", "\n").replace("\r", "\n") if line_ends else text
    except UnicodeDecodeError as cause:
        raise error(f"{path}: not a text", expected="UTF-8", found=f"byte {cause.start:,} is not") from cause


def read_checkpoint_file(path: Path) -> bytes:
    """A file of CHECKPOINT_FILES. Raises: the error that the table has for it."""
    return read_small(path, *CHECKPOINT_FILES[path.name])


def read_checkpoint_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of CHECKPOINT_FILES. Raises: the error that the table has for it."""
    error = CHECKPOINT_FILES[path.name][1]
    value = parse_json(read_checkpoint_file(path), str(path), error)
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object", found=type(value).__name__)
    return value


def check_checkpoint_files(directory: Path) -> None:
    """Look at all small files of a checkpoint, before other packages open them by themselves.

    Raises: the error that CHECKPOINT_FILES has for a file that can't be read; TokenizerError for a template.
    """
    for name, (max_bytes, error) in CHECKPOINT_FILES.items():
        if is_there(directory / name, error):
            check_small(directory / name, max_bytes, error)
    templates = _more_templates(directory)
    if len(templates) > MAX_MORE_TEMPLATES:
        raise TokenizerError(
            f"{directory / MORE_TEMPLATES}: too many chat templates",
            expected=f"at most {MAX_MORE_TEMPLATES}",
            found=f"{len(templates):,}",
        )
    for path in templates:
        check_small(path, *CHECKPOINT_FILES["chat_template.jinja"])


def read_checkpoint_files(directory: Path) -> dict[str, bytes]:
    """All small files of a checkpoint, by name; what is not in the tables is not read.

    Raises: the error that CHECKPOINT_FILES has for a file that can't be read; TokenizerError for a template.
    """
    check_checkpoint_files(directory)
    files = {
        name: read_checkpoint_file(directory / name)
        for name, (_, error) in CHECKPOINT_FILES.items()
        if is_there(directory / name, error)
    }
    for path in _more_templates(directory):
        files[f"{MORE_TEMPLATES}/{path.name}"] = read_small(path, *CHECKPOINT_FILES["chat_template.jinja"])
    return files


def _more_templates(directory: Path) -> list[Path]:
    return [path for path in _entries(directory / MORE_TEMPLATES) if path.suffix == ".jinja"]


def _entries(directory: Path) -> list[Path]:
    """What a directory holds; nothing if it is none."""
    try:
        return sorted(Path(entry) for entry in os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as cause:
        raise _unreadable(directory, cause, TokenizerError) from cause


def check_containers(data: bytes, name: str, error: type[Gguf3nError]) -> None:
    """Refuse JSON that would take much memory, before it is read. Raises: `error`."""
    n_containers = data.count(b"[") + data.count(b"{")
    if n_containers > MAX_JSON_CONTAINERS:
        raise error(
            f"{name}: too many lists and objects",
            expected=f"at most {MAX_JSON_CONTAINERS:,}",
            found=f"{n_containers:,}",
        )


def parse_json(data: bytes, name: str, error: type[Gguf3nError]) -> Any:
    """The value that JSON means. Raises: `error`.

    Args:
        name: the file, in messages.
    """
    check_containers(data, name, error)
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{name}: not JSON", found=str(cause)) from cause


def _unreadable(path: Path, cause: OSError | ValueError, error: type[Gguf3nError]) -> Gguf3nError:
    return error(f"{path}: cannot be read", found=getattr(cause, "strerror", None) or str(cause))
