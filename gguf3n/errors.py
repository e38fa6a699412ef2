"""Every error that gguf3n raises on purpose, and the exit code of each class.

    Gguf3nError                  1   anything below
    ├── UsageError               2   an option or argument that cannot be used
    ├── SourceError              3   the source is not a checkpoint we can convert
    │   ├── ConfigError          4   config.json: another model, a missing or impossible value
    │   ├── CheckpointError      5   safetensors files: missing, truncated, overlapping, unreadable
    │   ├── MappingError         6   tensors: unknown name, missing, wrong shape or dtype
    │   └── TokenizerError       7   no tokenizer, or one that does not fit the config
    ├── HubError                 8   Hugging Face Hub or another server: unknown, gated, offline, interrupted
    ├── QuantizationError        9   values or importances that a type cannot hold
    ├── OutputError             10   exists, no permission, no space
    ├── GGUFError               11   a GGUF file that breaks the format
    ├── FindingsError           12   lint or validate found faults, or diff differences
    └── Interrupted            130   Ctrl-C or SIGTERM

A message has up to four parts: what is wrong and where, what was expected, what was found, what to do.
"""

from __future__ import annotations

import errno
import json
from typing import Any

from gguf3n.outside import masked, printable

CONTINUED = " " * 12
"""Before each further line of a part, so that it is seen to be one."""

SHOWN = 80
"""Characters of a value in a message."""

TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
"""What the system says where a process, or all together, may open no more files."""
MORE_HANDLES = "raise the limit of open files, as with `ulimit -n 1024`"


def shown(value: Any) -> str:
    """A value from a file, on one short line, whatever it is."""
    try:
        return json.dumps(value)[:SHOWN]
    except (TypeError, ValueError, RecursionError):  # no JSON, too many digits, too deep
        return type(value).__name__


class Gguf3nError(Exception):
    """An error with a cause that a user can act on; no part of it holds a password, a token or a key.

    Args:
        what: one sentence naming the file, and the tensor or key, where there is one.
        expected: what would have been right.
        found: what was there instead.
        fix: what the user can do.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, expected: str | None = None, found: str | None = None, fix: str | None = None
    ) -> None:
        self.what = masked(what)
        self.expected, self.found, self.fix = (
            None if text is None else masked(text) for text in (expected, found, fix)
        )
        super().__init__(str(self))

    def __str__(self) -> str:
        """All parts, in characters that do nothing to a terminal."""
        parts = [_lines(self.what)]
        for label, text in (("expected", self.expected), ("found", self.found), ("to do", self.fix)):
            if text is not None:
                parts.append(f"  {label + ':':<10}{_lines(text)}")
        return "\n".join(parts)

    @property
    def one_line(self) -> str:
        """The same where it is a part of something else."""
        return "; ".join(" ".join(line.split()) for line in str(self).splitlines())

    def as_dict(self) -> dict[str, str | int | None]:
        """The same parts for `--json`."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "what": self.what,
            "expected": self.expected,
            "found": self.found,
            "fix": self.fix,
        }


def _lines(text: str) -> str:
    first, *others = map(printable, text.split("\n"))
    return "\n".join([first, *(line if line.startswith(CONTINUED) else CONTINUED + line for line in others)])


class UsageError(Gguf3nError):
    """An option or argument that cannot be used."""

    exit_code = 2


class SourceError(Gguf3nError):
    """The source is not a checkpoint that can be converted."""

    exit_code = 3


class ConfigError(SourceError):
    """config.json: another model, a missing or impossible value."""

    exit_code = 4


class CheckpointError(SourceError):
    """Safetensors files: missing, truncated, overlapping, unreadable."""

    exit_code = 5


class MappingError(SourceError):
    """Tensors: an unknown name, one that is missing, a wrong shape or dtype."""

    exit_code = 6


class TokenizerError(SourceError):
    """No tokenizer, or one that does not fit the config."""

    exit_code = 7


class HubError(Gguf3nError):
    """The Hugging Face Hub or another server: unknown, gated, offline, interrupted."""

    exit_code = 8


class QuantizationError(Gguf3nError):
    """Values or importances that a type cannot hold."""

    exit_code = 9


class OutputError(Gguf3nError):
    """The output: it exists, there is no permission, or no space."""

    exit_code = 10


class GGUFError(Gguf3nError):
    """A GGUF file that breaks the format."""

    exit_code = 11


class FindingsError(Gguf3nError):
    """Only its exit code is used: what was found is the command's result."""

    exit_code = 12


class Interrupted(Gguf3nError):
    """Ctrl-C or SIGTERM."""

    exit_code = 130
