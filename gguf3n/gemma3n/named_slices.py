"""The slices of E4B that were measured when it was published, and those that a user writes down.

    wide      layers of the slice whose feed-forward network has all of its width; the others have half
    skip      layers of E4B that are left out
    MMLU      of the pretrained model, in percent
    billions  of effective parameters, as `effective_parameters` computes them; the published names count a little more

Source: google/gemma3n-slicing-configs on the Hub.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gguf3n.errors import UsageError, shown
from gguf3n.formats.small_file import MAX_RECIPE_BYTES, read_text
from gguf3n.formats.toml_text import parse_toml
from gguf3n.gemma3n.config import MAX_INT, MAX_LAYERS, N_KV_LAYERS, Config
from gguf3n.gemma3n.slices import Slice

N_LAYERS = 35
"""Of E4B."""
SUFFIX = ".toml"


class Wanted(Protocol):
    """A slice that is named before the model is known."""

    @property
    def name(self) -> str: ...

    def of(self, config: Config) -> Slice:
        """The slice of a model. Raises: UsageError where it has none such."""
        ...


@dataclass(frozen=True)
class NamedSlice:
    """A row of the table; its module says what the columns are."""

    name: str
    wide: str
    mmlu: float
    billions: float
    skip: str = ""

    def of(self, config: Config) -> Slice:
        """Full and half widths are those of the model, so that a small one of E4B's shape has the same slices."""
        widths = set(config.intermediate_size)
        if (config.num_hidden_layers, config.n_kv_layers) != (N_LAYERS, N_KV_LAYERS) or len(widths) > 1:
            raise UsageError(
                f"slice {self.name}: a slice of E4B, not of this model",
                expected=f"{N_LAYERS} layers of one FFN width, {N_KV_LAYERS} of them with keys and values of their own",
                found=f"{config.num_hidden_layers} layers, {config.n_kv_layers} with keys and values, widths "
                + ", ".join(map(str, sorted(widths))),
                fix="give E4B or a fine-tune of it, or a file with skip and widths for this model",
            )
        (full,) = widths
        skip, wide = _layers(self.skip), _layers(self.wide)
        n_left = N_LAYERS - len(skip)
        return Slice(self.name, skip, tuple(full if bid in wide else full // 2 for bid in range(n_left)))


def _layers(text: str) -> tuple[int, ...]:
    """As in "4,9-24"."""
    ends = [part.split("-") for part in text.split(",") if part]
    return tuple(bid for part in ends for bid in range(int(part[0]), int(part[-1]) + 1))


# fmt: off
NAMED_SLICES: tuple[NamedSlice, ...] = (
    NamedSlice("E4B",         "0-34",              62.3, 3.980),
    NamedSlice("E3.79B-layer", "4-34",             63.4, 3.779),
    NamedSlice("E3.79B-block", "5-34",             62.0, 3.729),
    NamedSlice("E3.59B-layer", "4-29,34",          63.4, 3.578),
    NamedSlice("E3.49B-block", "5-29",             61.4, 3.477),
    NamedSlice("E3.39B-layer", "4,9-29,34",        63.0, 3.377),
    NamedSlice("E3.24B-block", "10-29",            60.7, 3.226),
    NamedSlice("E3.18B-layer", "4,9-24,29,34",     61.8, 3.175),
    NamedSlice("E2.98B-block", "10-24",            59.5, 2.974),
    NamedSlice("E2.98B-layer", "15-24,30-34",      59.5, 2.974),
    NamedSlice("E2.73B-block", "15-24",            57.1, 2.722),
    NamedSlice("E2.69B-layer", "4,9,14,19-24",     57.7, 2.672),
    NamedSlice("E2.54B-layer", "4,20-24",          55.4, 2.521),
    NamedSlice("E2.49B-block", "20-24",            54.5, 2.471),
    NamedSlice("E1.96B-layer", "4",                53.4, 1.956, skip="20-24"),
    NamedSlice("E2B",          "",                 50.9, 1.905, skip="20-24"),
)
# fmt: on
"""From the largest to the smallest."""


@dataclass(frozen=True)
class WrittenSlice:
    """A slice from a file: `skip` may be left out, `widths` is one for all layers or one for each that is left."""

    name: str
    skip: tuple[int, ...]
    widths: int | tuple[int, ...]

    def of(self, config: Config) -> Slice:
        n_left = len(Slice(self.name, self.skip, ()).kept(config.num_hidden_layers))
        return Slice(self.name, self.skip, (self.widths,) * n_left if isinstance(self.widths, int) else self.widths)


def find_slice(named: str) -> Wanted:
    """A slice by its name, in any case, or from a file.

    Args:
        named: as in NAMED_SLICES, or a path ending in .toml.

    Raises: UsageError.
    """
    if named.lower().endswith(SUFFIX):
        path = Path(named)
        return parse_slice(read_text(path, MAX_RECIPE_BYTES, UsageError), str(path), path.stem)
    known = {each.name.lower(): each for each in NAMED_SLICES}
    if named.lower() in known:
        return known[named.lower()]
    close = difflib.get_close_matches(named.lower(), known, 3, 0.5)
    raise UsageError(
        f"unknown slice {named!r}",
        expected=", ".join(each.name for each in NAMED_SLICES) + ", or a file ending in .toml",
        fix=f"did you mean {' or '.join(known[name].name for name in close)}?" if close else "gguf3n slices lists them",
    )


def parse_slice(text: str, origin: str, name: str) -> WrittenSlice:
    """A slice in TOML:

        skip = [20, 21, 22, 23, 24]    # layers of the whole model; none where it is missing
        widths = 8192                  # of all layers, or a list with one for each that is left

    Args:
        origin: the file, for messages.

    Raises: UsageError.
    """
    raw = parse_toml(text, origin)
    if unknown := next((key for key in raw if key not in ("skip", "widths")), None):
        raise UsageError(f"{origin}: unknown key {unknown!r}", expected="skip, widths")
    skip = _integers(raw.get("skip", []), origin, "skip", 0, MAX_LAYERS - 1, "a list of layers")
    if "widths" not in raw:
        raise UsageError(f"{origin}: widths is missing", expected=WIDTHS)
    widths = raw["widths"]
    found = _integers(widths if isinstance(widths, list) else [widths], origin, "widths", 1, MAX_INT, WIDTHS)
    return WrittenSlice(name, skip, found if isinstance(widths, list) else found[0])


WIDTHS = "a width for all layers, or a list with one for each that is not skipped"


def _integers(value: Any, origin: str, key: str, least: int, most: int, expected: str) -> tuple[int, ...]:
    items: Sequence[Any] = value if isinstance(value, list) else ()
    if not isinstance(value, list) or any(type(item) is not int or not least <= item <= most for item in items):
        raise UsageError(f"{origin}: {key} is impossible", expected=expected, found=shown(value))
    return tuple(items)
