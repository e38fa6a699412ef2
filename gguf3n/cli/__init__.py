"""The command line: each command parses, calls one function of the package and prints what it returns.

Results go to stdout, everything else to stderr. Only `main` catches errors.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperCommand, TyperGroup

import gguf3n
from gguf3n.cli.console import print_error
from gguf3n.cli.groups import flattened
from gguf3n.cli.paint import say
from gguf3n.errors import MORE_HANDLES, TOO_MANY_OPEN, Gguf3nError, Interrupted
from gguf3n.outside import inert, masked, printable


@dataclass(frozen=True)
class Command:
    """One row of the table of commands; its module has its name.

    Args:
        summary: what `gguf3n --help` says of it: the first sentence of its own help.
        functions: the words after it and the functions of a group, which has an `app`; None for a single command,
            whose function has its name.
    """

    summary: str
    functions: Mapping[str, str] | None = None


COMMANDS: Mapping[str, Command] = {
    "convert": Command("Convert a Gemma 3n checkpoint to one GGUF file, or to several from one read."),
    "quantize": Command("Quantize a GGUF file of Gemma 3n to one file, or to several from one read."),
    "adapter": Command("Write a PEFT adapter as a GGUF LoRA, which llama.cpp loads beside the model."),
    "validate": Command("Compare a GGUF file with its source, tensor by tensor, token by token."),
    "slices": Command("List the MatFormer slices of E4B: sizes, published MMLU, engines."),
    "slice": Command("Write a MatFormer slice as a checkpoint of its own."),
    "publish": Command("Make GGUF files with card, checksums and manifests, and upload them."),
    "verify": Command("Make a GGUF file again from its source and its manifest; say where it differs."),
    "imatrix": Command(
        "Measure, show and merge importance matrices.", {"measure": "measure", "show": "show", "merge": "merge"}
    ),
    "sensitivity": Command("Measure what each tensor costs in each type, by gradients over text."),
    "tune": Command("Write the recipe with the least expected divergence that a size allows."),
    "recipes": Command(
        "List, show and extract quantizations.", {"list": "list_recipes", "show": "show", "extract": "extract"}
    ),
    "inspect": Command("Show what a GGUF file holds: a summary, or the views that are asked for."),
    "lint": Command("Say what is wrong with GGUF files, for which engine, and how to fix it."),
    "repair": Command("Fix what can be fixed safely; leave every other tensor alone."),
    "edit": Command("Change keys without touching tensors: first --apply, then --unset, --rename, --set."),
    "diff": Command("Compare two GGUF files."),
    "stats": Command("Show statistics of every weight, vision and audio included."),
    "ollama": Command(
        "Write a Modelfile for Ollama, and the template, params and system files that the Hub gives to it."
    ),
    "card": Command("Write a repository's card: README.md, Notice and SHA256SUMS."),
}
"""Every command, in the order of the help. The modules are imported when a command is run, not to be listed."""


DEBUG = "GGUF3N_DEBUG"
"""The variable of the environment with which an unexpected error shows its traceback."""
MAX_FOUND = 400
"""Characters of an unexpected error's own words."""


def _interruptible(command: Callable[..., Any]) -> Callable[..., Any]:
    """Makes Ctrl-C an error of ours wherever it comes; typer's own answer is silent and differs between versions."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None

    return run


@functools.cache
def _loaded(name: str) -> Any:
    """A command as typer has it; its module is imported here."""
    functions = COMMANDS[name].functions or {name: name}
    module = importlib.import_module(f"gguf3n.cli.{name}")
    app = module.app if COMMANDS[name].functions else typer.Typer(add_completion=False)
    for word, function in functions.items():
        app.command(word)(_interruptible(flattened(getattr(module, function))))
    return typer.main.get_command(app)


class _OnDemand(Mapping[str, Any]):
    """The commands, each loaded when it is asked for: `inspect` must not wait for what `validate` imports."""

    def __getitem__(self, name: str) -> Any:
        return _interruptible(_loaded)(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""The command line library's own, which typer has from click or brings with it."""


@contextmanager
def _printable_usage() -> Iterator[None]:
    """Makes what typer says of options and arguments printable: they may come from elsewhere, as in a script."""
    try:
        yield
    except _USAGE_ERROR as error:
        said = cast(Any, error)
        said.message = inert(printable(masked(said.message or "")))
        raise


class _Commands(TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = cast(Any, _OnDemand())

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Reads the options before the command."""
        with _printable_usage():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Reads the command's own, and runs it."""
        with _printable_usage():
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Lists the commands without loading any."""
        self.commands = {name: TyperCommand(name, short_help=command.summary) for name, command in COMMANDS.items()}
        super().format_help(ctx, formatter)


app = typer.Typer(
    name="gguf3n",
    cls=_Commands,
    help="Turns Gemma 3n checkpoints into GGUF files for llama.cpp, Ollama and LM Studio.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to load than all else that this help needs
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"gguf3n {gguf3n.__version__}")
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
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names and pieces that the locale's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except Gguf3nError as error:
        _leave(error)
    except KeyboardInterrupt:
        _leave(Interrupted("interrupted"))
    except Exception as error:
        if os.environ.get(DEBUG):
            import traceback

            traceback.print_exc()
        _leave(_unexpected(error))
    finally:
        _flush()


def _unexpected(error: Exception) -> Gguf3nError:
    """What no code of ours has foreseen, as an error of ours: the machine's where it is that, else one to report."""
    command = " ".join(["gguf3n", *(word for word in sys.argv[1:2] if word in COMMANDS)])
    found = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_FOUND]
    if isinstance(error, MemoryError):
        return Gguf3nError(f"{command}: out of memory", found=found, fix="close other programs, or use another machine")
    if isinstance(error, OSError) and error.errno in TOO_MANY_OPEN:
        return Gguf3nError(f"{command}: too many files are open", found=found, fix=MORE_HANDLES)
    if isinstance(error, OSError) and error.errno is not None:
        fix = f"look at the disk and at the limits of the system; {DEBUG}=1 shows where it happened"
        return Gguf3nError(f"{command}: the system refused something", found=found, fix=fix)
    fix = f"please report it, with the whole command and what it prints when {DEBUG}=1 is set"
    return Gguf3nError(f"{command}: unexpected, which is a fault of gguf3n", found=found, fix=fix)


def _leave(error: Gguf3nError) -> NoReturn:
    """Print an error and exit, even where nothing more can be loaded to print it with."""
    try:
        print_error(error, as_json="--json" in sys.argv)
    except Exception:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _flush() -> None:
    """Write what is left to a reader that may be gone, as in `gguf3n inspect FILE | head -1`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
