"""What a publication has done already, so that an interrupted one goes on and none does anything twice.

    files         name -> what was made of what (a key by content), its size and SHA-256, and its stamp on the disk
    pending       name -> the key of what is about to be written: a file of this name is ours
    validations   name -> the key of what was asked of which bytes, and what was found
    sent          repository and revision -> name -> hash of what was sent, and seen to have arrived
    pulls         repository -> the revision of its pull request

It is a JSON file that is replaced as a whole after every step, and a lock: one run at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf3n.errors import OutputError
from gguf3n.formats.byte_source import stamp
from gguf3n.formats.small_file import MIB, parse_json, read_small
from gguf3n.formats.whole_file import lock, make_directory, output_error, write_whole
from gguf3n.publishing.manifest import hash_file

SCHEMA = "gguf3n.ledger/1"
FOLDER = ".gguf3n"
MAX_BYTES = 64 * MIB


@dataclass
class Ledger:
    """The tables; see the module. Every change is on the disk before the next step begins."""

    path: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    pending: dict[str, str] = field(default_factory=dict)
    validations: dict[str, dict[str, Any]] = field(default_factory=dict)
    sent: dict[str, dict[str, str]] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """That the files are in."""
        return self.path.parent.parent

    def save(self) -> None:
        """Raises: OutputError."""
        tables = {name: value for name, value in vars(self).items() if name != "path"}
        write_whole(self.path, json.dumps({"schema": SCHEMA, **tables}, indent=1) + "\n", force=True)

    def begin(self, keys: dict[str, str]) -> None:
        """Note what is about to be written."""
        self.pending |= keys
        self.save()

    def finish(self, name: str, key: str, n_bytes: int, sha256: str) -> None:
        """Note what was written."""
        seen = list(stamp(self.directory / name))
        self.files[name] = {"key": key, "bytes": n_bytes, "sha256": sha256, "stamp": seen}
        self.pending.pop(name, None)
        self.save()

    def is_intact(self, name: str) -> bool:
        """Whether a file is on the disk as it was written. Raises: OutputError for one that can't be read."""
        entry, path = self.files.get(name), self.directory / name
        if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        if list(stamp(path)) == entry["stamp"]:
            return True
        return hash_file(path)[0] == str(entry["sha256"])

    def is_ours(self, name: str) -> bool:
        """Whether what stands under a name, if anything does, is a file of ours, which may be replaced."""
        return not os.path.lexists(self.directory / name) or name in self.pending or self.is_intact(name)

    def has_sent(self, where: str, name: str) -> bool:
        """Whether the file of the ledger, which need not be on the disk any more, has arrived there."""
        entry = self.files.get(name)
        return entry is not None and self.sent.get(where, {}).get(name) == entry["sha256"]


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[Ledger]:
    """The ledger of a directory, for one run at a time.

    Raises: OutputError: another run has it, it can't be written, or what is there is no ledger.
    """
    folder = directory / FOLDER
    make_directory(folder)
    path = folder / "ledger.json"
    try:
        with open(folder / "lock", "ab") as file:
            try:
                lock(file.fileno())
            except OSError as error:
                raise OutputError(
                    f"{directory}: another gguf3n publish is at work in it",
                    fix="wait for it, or take another directory",
                ) from error
            yield _read(path)
    except OSError as error:
        raise output_error(folder, error) from error


def _read(path: Path) -> Ledger:
    if not path.exists():
        return Ledger(path)
    raw = parse_json(read_small(path, MAX_BYTES, OutputError), str(path), OutputError)
    tables = {name: kind for name, kind in vars(Ledger(path)).items() if name != "path"}
    fine = (
        isinstance(raw, dict)
        and raw.get("schema") == SCHEMA
        and all(isinstance(raw.get(name), dict) for name in tables)
        and all(
            isinstance(entry, dict) and {"key", "bytes", "sha256", "stamp"} <= set(entry)
            for entry in raw["files"].values()
        )
    )
    if not fine:
        raise OutputError(
            f"{path}: not a ledger of this version",
            expected=SCHEMA,
            fix="remove it: files that are complete are then made again with --force",
        )
    return Ledger(path, **{name: raw[name] for name in tables})
