"""Makes a Gemma 3n checkpoint of random weights: tiny ones for the tests, E2B or E4B for realistic conversions.

    python scripts/make_checkpoint.py --size tiny -o /tmp/tiny
    python scripts/make_checkpoint.py --size e2b  -o /tmp/e2b --shards 3

What it makes and why stands in workshop/checkpoints.py. Same options, same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from workshop.checkpoints import DTYPES, LAYOUTS, SMALL, Options, make


def parse(arguments: list[str] | None = None) -> tuple[Path, Options]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", choices=(*SMALL, "e2b", "e4b"), default="tiny")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="published", help="how the tensors are named")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--shards", type=int, default=1, metavar="N")
    parser.add_argument(
        "--no-shared-kv",
        dest="shared_kv",
        action="store_false",
        help="as transformers 5 saves it: without k_proj, v_proj, k_norm of the KV-shared layers, with rope_parameters",
    )
    parser.add_argument("--tokenizer", choices=("model", "json", "both"), default="both", help="which tokenizer files")
    parser.add_argument("--multimodal", action="store_true", help="the vision and audio tensors too")
    parser.add_argument("--seed", type=int, default=0)
    values = vars(parser.parse_args(arguments))
    return values.pop("output"), Options(**values)


if __name__ == "__main__":
    make(*parse())
