"""SHA256SUMS, as `sha256sum -c` reads it: a line for each file, its hash and its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from gguf3n.errors import GGUFError, UsageError
from gguf3n.formats.hub import file_hash
from gguf3n.formats.small_file import MIB, is_there, read_text
from gguf3n.progress import Meter, OnProgress

SUMS = "SHA256SUMS"
MAX_SUMS_BYTES = MIB
LINE = re.compile(r"(?P<hash>[0-9a-f]{64}) [ *](?P<name>[^\n\\]+)")


def parse_sums(text: str, name: str) -> dict[str, str]:
    """Name -> hash.

    Args:
        name: of the list, in messages.

    Raises: UsageError for a line that is none.
    """
    sums = {}
    for number, line in enumerate(text.splitlines(), 1):
        found = LINE.fullmatch(line)
        if found is None:
            raise UsageError(
                f"{name}: line {number} is no checksum",
                expected="64 hexadecimal digits, two spaces and a name",
                found=line[:80],
                fix=f"remove {name} to have it made again",
            )
        sums[found["name"]] = found["hash"]
    return sums


def format_sums(sums: Mapping[str, str]) -> str:
    """Sorted by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def directory_sums(directory: Path, names: Iterable[str], progress: OnProgress | None = None) -> dict[str, str]:
    """The hashes of these files, and of what else its SHA256SUMS names that is there.

    A hash in the list is taken where the list is younger than the file, so that files are not read for each card.

    Raises: UsageError for a list that is none; GGUFError for a file that can't be read.
    """
    listed = directory / SUMS
    known, written = {}, -1
    if is_there(listed, UsageError):
        known = parse_sums(read_text(listed, MAX_SUMS_BYTES, UsageError), str(listed))
        written = listed.stat().st_mtime_ns
    sums = {name: value for name, value in known.items() if (directory / name).is_file()}
    try:
        status = {name: (directory / name).stat() for name in names}
        stale = [name for name, found in status.items() if name not in sums or found.st_mtime_ns >= written]
        meter = Meter("checksums", "bytes", sum(status[name].st_size for name in stale), progress)
        for name in stale:
            sums[name] = file_hash(directory / name, is_sha256=True)
            meter.advance(status[name].st_size)
    except OSError as error:
        raise GGUFError(f"{error.filename}: cannot be read", found=error.strerror or str(error)) from error
    return sums
