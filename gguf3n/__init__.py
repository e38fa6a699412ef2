"""gguf3n: Gemma 3n to GGUF, in one streaming pass.

    import gguf3n
    gguf3n.convert("google/gemma-3n-E4B-it", "Q8_0")

Names are loaded on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf3n.conversion import Conversion, convert, plan, read_gguf, read_recipe, read_source, write
    from gguf3n.engines.activations import measure_importance
    from gguf3n.errors import Gguf3nError
    from gguf3n.formats.gguf_reader import GGUFFile, open_gguf
    from gguf3n.formats.imatrix import ImportanceMatrix, merge_imatrices, read_imatrix, write_imatrix
    from gguf3n.inspection.diff import diff
    from gguf3n.inspection.edit import edit
    from gguf3n.inspection.lint import lint
    from gguf3n.inspection.repair import repair
    from gguf3n.inspection.statistics import measure_statistics
    from gguf3n.planning import Plan
    from gguf3n.quants.api import dequantize, quantize
    from gguf3n.recipes import Recipe, find_recipe
    from gguf3n.validation.report import write_report
    from gguf3n.validation.validate import Validation, validate

__version__ = "0.1.0"

__all__ = [
    "Conversion",
    "GGUFFile",
    "Gguf3nError",
    "ImportanceMatrix",
    "Plan",
    "Recipe",
    "Validation",
    "convert",
    "dequantize",
    "diff",
    "edit",
    "find_recipe",
    "lint",
    "measure_importance",
    "measure_statistics",
    "merge_imatrices",
    "open_gguf",
    "plan",
    "quantize",
    "read_gguf",
    "read_imatrix",
    "read_recipe",
    "read_source",
    "repair",
    "validate",
    "write",
    "write_imatrix",
    "write_report",
]

_HOMES = {
    "Conversion": "conversion",
    "GGUFFile": "formats.gguf_reader",
    "Gguf3nError": "errors",
    "ImportanceMatrix": "formats.imatrix",
    "Plan": "planning",
    "Recipe": "recipes",
    "Validation": "validation.validate",
    "convert": "conversion",
    "dequantize": "quants.api",
    "diff": "inspection.diff",
    "edit": "inspection.edit",
    "find_recipe": "recipes",
    "lint": "inspection.lint",
    "measure_importance": "engines.activations",
    "measure_statistics": "inspection.statistics",
    "merge_imatrices": "formats.imatrix",
    "open_gguf": "formats.gguf_reader",
    "plan": "conversion",
    "quantize": "quants.api",
    "read_gguf": "conversion",
    "read_imatrix": "formats.imatrix",
    "read_recipe": "conversion",
    "read_source": "conversion",
    "repair": "inspection.repair",
    "validate": "validation.validate",
    "write": "conversion",
    "write_imatrix": "formats.imatrix",
    "write_report": "validation.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
