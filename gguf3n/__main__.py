"""`python -m gguf3n` is the command `gguf3n`."""

from __future__ import annotations

from gguf3n.cli import main

if __name__ == "__main__":
    main()
