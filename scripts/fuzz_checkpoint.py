"""Broken checkpoints, thousands of them: each must give a plan or one error of ours, soon and in little memory.

    python scripts/fuzz_checkpoint.py 10000                inputs 0 to 9,999
    python scripts/fuzz_checkpoint.py 1 --first 4711       that one again

An input is made from its number: one to three files of a small checkpoint are changed, as JSON, as safetensors, as a
model card or as bytes, or become a pipe, a directory, a device, a file with holes. Of each eighth a GGUF file is
written. Whatever is no Gguf3nError is reported, by the place where it happened; so are signals, inputs that take longer
than 20 seconds of the processor, and those that want more than 768 MB.
"""

from __future__ import annotations

from workshop import checkpoint_fuzzing, hostile

if __name__ == "__main__":
    hostile.run_script(checkpoint_fuzzing.check, __doc__)
