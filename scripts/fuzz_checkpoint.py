"""Broken checkpoints, thousands of them: each must give a plan or one error of ours, soon and in little memory.

    python scripts/fuzz_checkpoint.py 10000                inputs 0 to 9,999
    python scripts/fuzz_checkpoint.py 1 --first 4711       that one again

An input is made from its number: one to three files of a small checkpoint are changed, as JSON, as safetensors, as a
model card or as bytes, or become a pipe, a directory, a device, a file with holes. Of each eighth a GGUF file is
written. Whatever is no Gguf3nError is reported, by the place where it happened; so are signals, inputs that take longer
than 20 seconds, and those that want more than 768 MB.
"""

from __future__ import annotations

import argparse
import sys

from workshop import checkpoint_fuzzing, hostile

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n_inputs", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    checkpoint_fuzzing.check(1 << 40)  # what is imported once, before processes are forked
    found = hostile.run_all(checkpoint_fuzzing.check, options.first, options.n_inputs, processes=options.processes)
    print(*found.lines(), sep="\n")
    sys.exit(bool(found.kinds))
