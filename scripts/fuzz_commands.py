"""Broken GGUF files through every command that takes one: a result or one error of ours, soon and in little memory.

    python scripts/fuzz_commands.py 10000                inputs 0 to 9,999
    python scripts/fuzz_commands.py 1 --first 4711       that one again

An input is made from its number: a small Gemma 3n with keys and tensors of other types, values and shapes, or with
other bytes; and a command of workshop/command_fuzzing.py. The bounds are those of fuzz_checkpoint.py; fuzz_gguf.py
beside it looks at the reader, lint and repair alone, guided by coverage.
"""

from __future__ import annotations

from workshop import command_fuzzing, hostile

if __name__ == "__main__":
    hostile.run_script(command_fuzzing.check, __doc__)
