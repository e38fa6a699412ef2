"""Writes gguf3n/schemas/*.json from the types of gguf3n/schemas/outputs.py; with --check it says which are stale."""

from __future__ import annotations

import json
import sys

from gguf3n.schemas.generate import file_name, schema_of
from gguf3n.schemas.outputs import OUTPUTS
from workshop.places import ROOT

FOLDER = ROOT / "gguf3n/schemas"


def texts() -> dict[str, str]:
    """File name -> the schema in it."""
    return {
        file_name(name): json.dumps(schema_of(name, output), indent=2, ensure_ascii=False) + "\n"
        for name, output in OUTPUTS.items()
    }


def main() -> None:
    """Write, or compare."""
    found = texts()
    there = {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.json")}
    if "--check" in sys.argv[1:]:
        stale = sorted(name for name in {*found, *there} if found.get(name) != there.get(name))
        sys.exit("\n".join(stale) or 0)
    for name in there.keys() - found.keys():
        (FOLDER / name).unlink()
    for name, text in found.items():
        (FOLDER / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
