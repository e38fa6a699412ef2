"""What the program says of itself: its commands, with examples. It loads neither a command nor typer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from gguf3n.cli import COMMANDS
from gguf3n.cli.paint import line_width

SUMMARY = "Turns Gemma 3n checkpoints into GGUF files for llama.cpp, Ollama and LM Studio."
HELP_OPTIONS = ("-h", "--help")
OPTIONS = {
    "--version": "Print the version and exit.",
    ", ".join(HELP_OPTIONS): "Show this message and exit.",
}
EXAMPLES = (
    "gguf3n recipes list --memory 8GB",
    "gguf3n convert google/gemma-3n-E4B-it -q Q4_K_M",
    "gguf3n lint gemma-3n-E4B-it-Q4_K_M.gguf",
    "gguf3n help convert",
)
MAX_WIDTH = 80
"""Of help, however wide the terminal, as of the commands' own."""


def overview() -> Iterator[str]:
    """The lines of `gguf3n --help`."""
    yield "Usage: gguf3n [OPTIONS] COMMAND [ARGS]..."
    yield from ("", *textwrap.wrap(SUMMARY, _width(), initial_indent="  ", subsequent_indent="  "), "")
    yield from ("Options:", *_listed(OPTIONS), "")
    yield from ("Commands:", *_listed({name: command.summary for name, command in COMMANDS.items()}), "")
    yield from ("Examples:", *(f"  {example}" for example in EXAMPLES))


def _listed(entries: dict[str, str]) -> Iterator[str]:
    indent = 2 + max(map(len, entries)) + 2
    for name, text in entries.items():
        first = f"  {name}".ljust(indent)
        yield from textwrap.wrap(text, _width(), initial_indent=first, subsequent_indent=" " * indent)


def _width() -> int:
    return max(min(line_width(), MAX_WIDTH), 40)
