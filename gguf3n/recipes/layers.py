"""Layer conditions: which layers a rule is for, in words that fit any depth.

    "5", -1          one layer; negative numbers count from the end
    "4-9"            layers 4 to 9
    "first 4"        the first four layers; also "last 4"
    "first 1/8"      the first eighth; also "last 1/8"
    "1/8 to 7/8"     from the first layer of one share to the last before another
    "every third"    the third of every three layers, counted from the end of the first eighth

A list of these means any of them. Shares round as in llama.cpp: layer i of n is in the first a/b if i < a*n // b.

Source: use_more_bits in src/llama-quant.cpp of llama.cpp is ["first 1/8", "last 1/8", "every third"].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

FORMS: tuple[tuple[str, Callable[..., bool]], ...] = (
    (r"(-?\d+)", lambda i, n, a: i == (a if a >= 0 else n + a)),
    (r"(\d+)-(\d+)", lambda i, n, a, b: a <= i <= b),
    (r"first (\d+)", lambda i, n, a: i < a),
    (r"last (\d+)", lambda i, n, a: i >= n - a),
    (r"first (\d+)/(\d+)", lambda i, n, a, b: i < a * n // b),
    (r"last (\d+)/(\d+)", lambda i, n, a, b: i >= (b - a) * n // b),
    (r"(\d+)/(\d+) to (\d+)/(\d+)", lambda i, n, a, b, c, d: a * n // b <= i < c * n // d),
    (r"every third", lambda i, n: i >= n // 8 and (i - n // 8) % 3 == 2),
)
"""Each form and whether layer i of n is in it."""

EXPECTED = '5, "4-9", "first 4", "last 1/8", "1/8 to 7/8", "every third", or a list of them'


@dataclass(frozen=True)
class Layers:
    """A set of layers, whatever the depth of the model."""

    parts: tuple[str, ...]

    def __contains__(self, layer: tuple[int, int]) -> bool:
        """Whether (bid, number of layers) is one of them."""
        return any(_contains(part, *layer) for part in self.parts)

    def __str__(self) -> str:
        return ", ".join(self.parts)


def parse_layers(value: object) -> Layers:
    """Layers from a recipe file.

    Raises: ValueError for anything that is not as in the module's table.
    """
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(item, bool) or not isinstance(item, int | str) for item in items):
        raise ValueError
    parts = tuple(str(item) for item in items)
    for part in parts:
        _contains(part, 0, 1)
    return Layers(parts)


def compress(bids: Iterable[int]) -> list[int | str]:
    """Layer numbers in the shortest form: runs as ranges."""
    runs: list[list[int]] = []
    for bid in sorted(bids):
        if runs and runs[-1][-1] == bid - 1:
            runs[-1].append(bid)
        else:
            runs.append([bid])
    return [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


@lru_cache(maxsize=1 << 12)
def _contains(part: str, bid: int, n_layers: int) -> bool:
    for pattern, test in FORMS:
        match = re.fullmatch(pattern, part)
        if match is not None:
            numbers = [int(group) for group in match.groups()]
            if "/" in part and (0 in numbers[1::2]):
                break
            return test(bid, n_layers, *numbers)
    raise ValueError
