"""The command line: each command parses, calls one function of the package and prints what it returns.

Results go to stdout, everything else to stderr. Only `main` catches errors.
"""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer

import gguf3n
from gguf3n.cli import convert, diff, edit, inspect, lint, quantize, recipes, repair
from gguf3n.cli.console import print_error
from gguf3n.errors import Gguf3nError, Interrupted

app = typer.Typer(
    name="gguf3n",
    help="Turns Gemma 3n checkpoints into GGUF files for llama.cpp, Ollama and LM Studio.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Makes Ctrl-C an error of ours wherever it comes; typer's own answer is silent and differs between versions."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None

    return run


for _command in (
    convert.convert,
    quantize.quantize,
    inspect.inspect,
    lint.lint,
    repair.repair,
    edit.edit,
    diff.diff,
):
    app.command(_command.__name__)(_interruptible(_command))
for _name, _subcommand in (("list", recipes.list_recipes), ("show", recipes.show), ("extract", recipes.extract)):
    recipes.app.command(_name)(_interruptible(_subcommand))
app.add_typer(recipes.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gguf3n {gguf3n.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; the exit code is that of the error's class (see gguf3n.errors)."""
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names and pieces that the locale's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except Gguf3nError as error:
        print_error(error, as_json="--json" in sys.argv)
        sys.exit(error.exit_code)
    finally:
        _flush()


def _flush() -> None:
    """Write what is left to a reader that may be gone, as in `gguf3n inspect FILE | head -1`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
