"""The commands as typer has them, each loaded when it is asked for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

import gguf3n
from gguf3n.cli import COMMANDS
from gguf3n.cli.groups import flattened
from gguf3n.cli.overview import HELP_OPTIONS, OPTIONS, SUMMARY, overview
from gguf3n.cli.paint import say
from gguf3n.errors import Interrupted
from gguf3n.outside import inert, masked, printable


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
        say(*overview())


app = typer.Typer(
    name="gguf3n",
    cls=_Commands,
    help=SUMMARY,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to load than all else that this help needs
    context_settings={"help_option_names": list(HELP_OPTIONS)},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"gguf3n {gguf3n.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help=OPTIONS["--version"], callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass
