"""Measures what every type makes of weights: the table in gguf3n/validation/bands.py.

    python scripts/measure_bands.py            print the table
    python scripts/measure_bands.py --check    compare it with the one that is there
    python scripts/measure_bands.py --stale    print from which difference on other weights are told: the table SHOWN

Rows of four kinds (Gaussian, Laplace, Student t with 4 degrees of freedom, Gaussian with single outliers), of 256 and
2,048 weights, in the precision of a checkpoint, are quantized with our own quantizers, which give llama.cpp's bytes:
without importances, and with those of five kinds (see WEIGHTS). Each figure is the smallest or the largest of all. The
rows are always the same, so are the figures, but for the last digit on other machines.
"""

from __future__ import annotations

import argparse
import sys

from gguf3n.formats.gguf_layout import QType
from gguf3n.quants import QUANTIZERS
from gguf3n.validation.bands import BANDS, Band, Spread
from workshop.bands import agree, measure, shown


def literal(qtype: QType, band: Band) -> str:
    """The row as it stands in bands.py."""
    spreads = ", ".join("None" if spread is None else call(spread) for spread in (band.plain, band.weighted))
    return f"    QType.{qtype.name}: Band(({band.error[0]:g}, {band.error[1]:g}), {spreads}),"


def call(spread: Spread) -> str:
    return f"Spread({spread.ratio:g}, {spread.misplaced:g}, {spread.row_misplaced:g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="names of types; all of them without any")
    parser.add_argument("--check", action="store_true", help="compare with bands.py")
    parser.add_argument("--stale", action="store_true", help="measure other versions of the weights")
    args = parser.parse_args()
    qtypes = [QType[name] for name in args.types] or list(QUANTIZERS)
    if args.stale:
        for qtype in qtypes:
            if (row := shown(qtype)) is not None:
                print(f"    QType.{qtype.name}: Shown({row.version}, {row.scale}),", flush=True)
        return
    wrong = []
    for qtype in qtypes:
        band = measure(qtype)
        print(literal(qtype, band), flush=True)
        if args.check and not agree(BANDS.get(qtype), band):
            wrong.append(qtype.name)
    if wrong:
        sys.exit(f"bands.py says something else: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
