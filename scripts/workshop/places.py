"""Where the files of this repository are. Standard library only: it is read before there is a virtual environment."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FIXTURES = ROOT / "fixtures"
