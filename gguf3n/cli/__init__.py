"""The command line: each command parses, calls one function of the package and prints what it returns.

Results go to stdout, everything else to stderr. Only `main` catches errors. Here stands what every start needs, and no
more: `application.py` has the commands as typer runs them, which takes longer to load than to list them.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from gguf3n.cli.console import print_error
from gguf3n.cli.paint import say
from gguf3n.errors import MORE_HANDLES, TOO_MANY_OPEN, Gguf3nError, Interrupted, OutputError


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


HELP = "help"
"""`gguf3n help COMMAND` is `gguf3n COMMAND --help`."""
DEBUG = "GGUF3N_DEBUG"
"""The variable of the environment with which an unexpected error shows its traceback."""
MAX_FOUND = 400
"""Characters of an unexpected error's own words."""


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
        _run(sys.argv[1:])
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


def _run(words: list[str]) -> None:
    """Answer what needs no command at once; load typer for all else.

    Raises: Gguf3nError, and whatever a command has not foreseen.
    """
    from gguf3n.cli.overview import HELP_OPTIONS, overview

    if words == [HELP] or (len(words) == 1 and words[0] in HELP_OPTIONS):
        say(*overview())
        return
    if words[:1] == [HELP]:
        sys.argv[1:] = [*words[1:], HELP_OPTIONS[-1]]
    from gguf3n.cli.application import app

    app()


def _unexpected(error: Exception) -> Gguf3nError:
    """What no code of ours has foreseen, as an error of ours: the machine's where it is that, else one to report."""
    command = " ".join(["gguf3n", *(word for word in sys.argv[1:2] if word in COMMANDS)])
    found = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_FOUND]
    if isinstance(error, MemoryError):
        return Gguf3nError(f"{command}: out of memory", found=found, fix="close other programs, or use another machine")
    if isinstance(error, OSError) and error.errno in TOO_MANY_OPEN:
        return Gguf3nError(f"{command}: too many files are open", found=found, fix=MORE_HANDLES)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # files that are written have errors of their own
        _discard_output()
        return OutputError(f"{command}: what it prints can't be written", found=found, fix="make room on the disk")
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
    """Write what is left; a reader may be gone, as in `gguf3n inspect FILE | head -1`, or the disk full."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard_output()
        has_failed = bool(getattr(error.__context__, "code", 0))
        if not isinstance(error, BrokenPipeError) and not has_failed:
            _leave(_unexpected(error))


def _discard_output() -> None:
    """Why: Python complains at its end of what it can't write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
