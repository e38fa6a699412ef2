"""`python -m gguf3n` and the command `gguf3n`: an interrupt is one line, from the first import on."""

from __future__ import annotations

import sys

import gguf3n


def main() -> None:
    """Run the command line; the version is said before anything is loaded."""
    try:
        if sys.argv[1:] == ["--version"]:
            print(f"gguf3n {gguf3n.__version__}")
            return
        from gguf3n.cli import main as run

        run()
    except KeyboardInterrupt:  # while modules are imported, or while an error is printed
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # the modules can't be read: too few file handles, a broken installation
        print(f"error: gguf3n can't be loaded: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
