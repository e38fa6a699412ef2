"""gguf3n: Gemma 3n to GGUF, in one streaming pass.

    import gguf3n
    gguf3n.convert("google/gemma-3n-E4B-it", "Q8_0")

Names are loaded on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf3n.conversion import (
        Conversion,
        ConversionOptions,
        convert,
        parse_options,
        plan,
        read_gguf,
        read_recipe,
        read_source,
        write,
    )
    from gguf3n.engines.activations import Measurement, measure_importance
    from gguf3n.errors import (
        CheckpointError,
        ConfigError,
        FindingsError,
        Gguf3nError,
        GGUFError,
        HubError,
        Interrupted,
        MappingError,
        OutputError,
        QuantizationError,
        SourceError,
        TokenizerError,
        UsageError,
    )
    from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, GGUFKey, GGUFTensor, open_gguf
    from gguf3n.formats.imatrix import Entry, ImportanceMatrix, merge_imatrices, read_imatrix, write_imatrix
    from gguf3n.formats.rows import LowRank, RowReader, SourceTensor, Stored, View, Zeros
    from gguf3n.formats.sensitivity import (
        Sensitivity,
        merge_sensitivities,
        read_sensitivity,
        write_sensitivity,
    )
    from gguf3n.gemma3n.mapping import MappedTensor
    from gguf3n.gemma3n.part import Part, PartKind, mmproj_part, text_part
    from gguf3n.gemma3n.source import Checkpoint, GGUFSource, Source
    from gguf3n.inspection.diff import Difference, KeyChange, TensorChange, TokenChange, diff
    from gguf3n.inspection.edit import Edit, edit
    from gguf3n.inspection.lint import Check, Finding, Group, Report, Severity, lint
    from gguf3n.inspection.repair import Fix, Repair, repair
    from gguf3n.inspection.statistics import Risk, Skipped, Statistics, TensorStatistics, f16_risks, measure_statistics
    from gguf3n.planning import Plan, PlannedTensor
    from gguf3n.progress import Progress
    from gguf3n.quants.api import dequantize, quantize
    from gguf3n.recipes import Decision, For, ImageRows, Keep, Recipe, Rule, find_recipe
    from gguf3n.tuning.allocate import Tuned, Tuning, TypeLimits
    from gguf3n.tuning.measure import measure_sensitivity
    from gguf3n.tuning.tune import tune
    from gguf3n.validation.divergence import Divergence
    from gguf3n.validation.logits import Limits, LogitsResult
    from gguf3n.validation.options import ValidationOptions, parse_validation
    from gguf3n.validation.report import write_report
    from gguf3n.validation.result import Problem, Stage, StageResult, Verdict
    from gguf3n.validation.structure import StructureResult
    from gguf3n.validation.tensor_errors import TensorError, TensorsResult
    from gguf3n.validation.tokens import TokensResult
    from gguf3n.validation.validate import Validation, validate
    from gguf3n.validation.vision import VisionResult

__version__ = "0.1.0"

__all__ = [
    "Check",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Conversion",
    "ConversionOptions",
    "Decision",
    "Difference",
    "Divergence",
    "Edit",
    "Entry",
    "Finding",
    "FindingsError",
    "Fix",
    "For",
    "GGUFArray",
    "GGUFError",
    "GGUFFile",
    "GGUFKey",
    "GGUFSource",
    "GGUFTensor",
    "Gguf3nError",
    "Group",
    "HubError",
    "ImageRows",
    "ImportanceMatrix",
    "Interrupted",
    "Keep",
    "KeyChange",
    "Limits",
    "LogitsResult",
    "LowRank",
    "MappedTensor",
    "MappingError",
    "Measurement",
    "OutputError",
    "Part",
    "PartKind",
    "Plan",
    "PlannedTensor",
    "Problem",
    "Progress",
    "QuantizationError",
    "Recipe",
    "Repair",
    "Report",
    "Risk",
    "RowReader",
    "Rule",
    "Sensitivity",
    "Severity",
    "Skipped",
    "Source",
    "SourceError",
    "SourceTensor",
    "Stage",
    "StageResult",
    "Statistics",
    "Stored",
    "StructureResult",
    "TensorChange",
    "TensorError",
    "TensorStatistics",
    "TensorsResult",
    "TokenChange",
    "TokenizerError",
    "TokensResult",
    "Tuned",
    "Tuning",
    "TypeLimits",
    "UsageError",
    "Validation",
    "ValidationOptions",
    "Verdict",
    "View",
    "VisionResult",
    "Zeros",
    "convert",
    "dequantize",
    "diff",
    "edit",
    "f16_risks",
    "find_recipe",
    "lint",
    "measure_importance",
    "measure_sensitivity",
    "measure_statistics",
    "merge_imatrices",
    "merge_sensitivities",
    "mmproj_part",
    "open_gguf",
    "parse_options",
    "parse_validation",
    "plan",
    "quantize",
    "read_gguf",
    "read_imatrix",
    "read_recipe",
    "read_sensitivity",
    "read_source",
    "repair",
    "text_part",
    "tune",
    "validate",
    "write",
    "write_imatrix",
    "write_report",
    "write_sensitivity",
]

_HOMES = {
    "Check": "inspection.lint",
    "Checkpoint": "gemma3n.source",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Conversion": "conversion",
    "ConversionOptions": "conversion",
    "Decision": "recipes",
    "Difference": "inspection.diff",
    "Divergence": "validation.divergence",
    "Edit": "inspection.edit",
    "Entry": "formats.imatrix",
    "Finding": "inspection.lint",
    "FindingsError": "errors",
    "Fix": "inspection.repair",
    "For": "recipes",
    "GGUFArray": "formats.gguf_reader",
    "GGUFError": "errors",
    "GGUFFile": "formats.gguf_reader",
    "GGUFKey": "formats.gguf_reader",
    "GGUFSource": "gemma3n.source",
    "GGUFTensor": "formats.gguf_reader",
    "Gguf3nError": "errors",
    "Group": "inspection.lint",
    "HubError": "errors",
    "ImageRows": "recipes",
    "ImportanceMatrix": "formats.imatrix",
    "Interrupted": "errors",
    "Keep": "recipes",
    "KeyChange": "inspection.diff",
    "Limits": "validation.logits",
    "LogitsResult": "validation.logits",
    "LowRank": "formats.rows",
    "MappedTensor": "gemma3n.mapping",
    "MappingError": "errors",
    "Measurement": "engines.activations",
    "OutputError": "errors",
    "Part": "gemma3n.part",
    "PartKind": "gemma3n.part",
    "Plan": "planning",
    "PlannedTensor": "planning",
    "Problem": "validation.result",
    "Progress": "progress",
    "QuantizationError": "errors",
    "Recipe": "recipes",
    "Repair": "inspection.repair",
    "Report": "inspection.lint",
    "Risk": "inspection.statistics",
    "RowReader": "formats.rows",
    "Rule": "recipes",
    "Sensitivity": "formats.sensitivity",
    "Severity": "inspection.lint",
    "Skipped": "inspection.statistics",
    "Source": "gemma3n.source",
    "SourceError": "errors",
    "SourceTensor": "formats.rows",
    "Stage": "validation.result",
    "StageResult": "validation.result",
    "Statistics": "inspection.statistics",
    "Stored": "formats.rows",
    "StructureResult": "validation.structure",
    "TensorChange": "inspection.diff",
    "TensorError": "validation.tensor_errors",
    "TensorStatistics": "inspection.statistics",
    "TensorsResult": "validation.tensor_errors",
    "TokenChange": "inspection.diff",
    "TokenizerError": "errors",
    "TokensResult": "validation.tokens",
    "Tuned": "tuning.allocate",
    "Tuning": "tuning.allocate",
    "TypeLimits": "tuning.allocate",
    "UsageError": "errors",
    "Validation": "validation.validate",
    "ValidationOptions": "validation.options",
    "Verdict": "validation.result",
    "View": "formats.rows",
    "VisionResult": "validation.vision",
    "Zeros": "formats.rows",
    "convert": "conversion",
    "dequantize": "quants.api",
    "diff": "inspection.diff",
    "edit": "inspection.edit",
    "f16_risks": "inspection.statistics",
    "find_recipe": "recipes",
    "lint": "inspection.lint",
    "measure_importance": "engines.activations",
    "measure_sensitivity": "tuning.measure",
    "measure_statistics": "inspection.statistics",
    "merge_imatrices": "formats.imatrix",
    "merge_sensitivities": "formats.sensitivity",
    "mmproj_part": "gemma3n.part",
    "open_gguf": "formats.gguf_reader",
    "parse_options": "conversion",
    "parse_validation": "validation.options",
    "plan": "conversion",
    "quantize": "quants.api",
    "read_gguf": "conversion",
    "read_imatrix": "formats.imatrix",
    "read_recipe": "conversion",
    "read_sensitivity": "formats.sensitivity",
    "read_source": "conversion",
    "repair": "inspection.repair",
    "text_part": "gemma3n.part",
    "tune": "tuning.tune",
    "validate": "validation.validate",
    "write": "conversion",
    "write_imatrix": "formats.imatrix",
    "write_report": "validation.report",
    "write_sensitivity": "formats.sensitivity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
