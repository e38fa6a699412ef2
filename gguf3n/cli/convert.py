"""`gguf3n convert`: a checkpoint to GGUF files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from gguf3n.cli import options
from gguf3n.cli.sizes import parse_bytes, parse_count
from gguf3n.cli.writing import Writing, write_or_show
from gguf3n.conversion import ConversionOptions, read_source
from gguf3n.errors import UsageError
from gguf3n.gemma3n.named_slices import Wanted, find_slice
from gguf3n.gemma3n.slices import take_slice
from gguf3n.gemma3n.source import Source, open_checkpoint
from gguf3n.recipes import For, Recipe
from gguf3n.slicing import choose_slice

AUTO = "auto"


@dataclass(frozen=True)
class Slicing:
    """Which slice of the model is wanted, if any."""

    slice: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|auto",
            help="Take a MatFormer slice of E4B: a name as `gguf3n slices` lists them, a .toml file with skip and "
            "widths, or auto.",
        ),
    ] = None
    size: Annotated[
        str | None, typer.Option(help="With --slice auto: the largest file that is wanted, as in 2.5GB or 2.5GiB.")
    ] = None
    params: Annotated[
        str | None, typer.Option(help="With --slice auto: the most effective parameters, as in 2.5B.")
    ] = None
    no_pad: Annotated[
        bool, typer.Option("--no-pad", help="With --slice: write true FFN widths, which llama.cpp does not load yet.")
    ] = False

    def parse(self) -> Callable[[Source, Recipe], Source] | None:
        """How a source is sliced for a recipe; None where it is not. Raises: UsageError."""
        for option, value in (("--size", self.size), ("--params", self.params)):
            if value is not None and self.slice != AUTO:
                raise UsageError(f"{option} without --slice auto", fix=f"add --slice auto, or leave {option} out")
        if self.slice is None:
            if self.no_pad:
                raise UsageError("--no-pad without --slice", fix="add --slice NAME, or leave --no-pad out")
            return None
        pad = not self.no_pad
        if self.slice != AUTO:
            named = find_slice(self.slice)
            return lambda source, _: _take(source, named, pad=pad)
        if self.size is None and self.params is None:
            raise UsageError("--slice auto: how large may it be?", fix="add --size 2.5GB or --params 2.5B")
        max_bytes = parse_bytes(self.size, "--size")
        most = parse_count(self.params, "--params")

        def take_best(source: Source, recipe: Recipe) -> Source:
            config = open_checkpoint(source).config
            best = choose_slice(config, recipe, max_bytes=max_bytes, max_parameters=most, pad=pad)
            return _take(source, best, pad=pad)

        return take_best


def _take(source: Source, named: Wanted, *, pad: bool) -> Source:
    whole = open_checkpoint(source)
    return take_slice(whole, named.of(whole.config), pad=pad)


def convert(
    source: Annotated[
        str, typer.Argument(help="A checkpoint, a training's folder, or a Hub id like google/gemma-3n-E4B-it.")
    ],
    wanted: Writing,
    slicing: Slicing,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    adapter: options.Adapters = None,
    adapter_scale: options.AdapterScale = 1.0,
) -> None:
    """Convert a Gemma 3n checkpoint to one GGUF file, or to several from one read."""
    if os.path.isfile(source):
        raise UsageError(
            f"{source}: a file",
            expected="a checkpoint directory, or a Hub id",
            fix="gguf3n quantize, if it is a GGUF file; else name the directory that it is in",
        )
    take = slicing.parse()

    def read(conversion: ConversionOptions) -> Source:
        texts = [recipe for recipe in conversion.recipes if recipe.part is For.TEXT]
        if take is not None and not texts:
            raise UsageError("--slice is for the text model, which is not wanted", fix="add --quant NAME")
        if slicing.size is not None and len(texts) > 1:
            raise UsageError(f"--size for {len(texts)} quantizations", fix="name one, or use --params")
        opened = read_source(
            source,
            revision=revision,
            weights=not wanted.dry_run,
            adapters=adapter or (),
            adapter_scale=adapter_scale,
            show_progress=not wanted.quiet,
        )
        return opened if take is None else take(opened, texts[0])

    write_or_show(read, wanted)
