"""Trains the small Gemma 3n of scripts/make_checkpoint.py on text, so that perplexity and KL divergence mean something.

    python scripts/train_tiny.py -o /tmp/trained                 some minutes on two cores
    python scripts/train_tiny.py -o /tmp/trained --steps 1500    better trained
    python scripts/train_tiny.py -o /tmp/trained --text a.txt b.txt

It starts from make_checkpoint's well-conditioned random weights, trains them in float32 with transformers' own model
(activation sparsity included), and writes them in BF16 in the published layout, tokenizer files beside them. Whole
passages of the text are held out: the checkpoint's held_out.txt is for measuring, its train.txt for importance
matrices, and training.json says how it was made.

Without --text it reads what every machine has: the texts in fixtures and the English of the Python that runs it, which
is the reference in pydoc_data and the documentation strings of the standard library. On one machine the same Python,
options and number of threads give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from workshop.training import Options, train


def parse(arguments: list[str] | None = None) -> tuple[Path, Options]:
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--text", dest="texts", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 text")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, default=default.threads, help="the weights' last bits depend on it")
    parser.add_argument("--ctx", type=int, default=default.ctx, help="tokens a window")
    parser.add_argument("--batch", type=int, default=default.batch, help="windows a step")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    values = vars(parser.parse_args(arguments))
    output = values.pop("output")
    return output, Options(**values | {"texts": tuple(values["texts"])})


def main() -> None:
    directory, options = parse()
    done = train(directory, options)
    print(f"{directory}: {options.steps} steps in {done.seconds:.0f} s")


if __name__ == "__main__":
    main()
