"""gguf3n: Gemma 3n to GGUF, in one streaming pass.

    import gguf3n
    gguf3n.convert("google/gemma-3n-E4B-it", "Q8_0")

Names are loaded on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as type checkers read it; typing takes long enough to load that a Ctrl-C comes in between
if TYPE_CHECKING:
    import typing

    from gguf3n.adapter_file import convert_adapter, plan_adapter
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
    from gguf3n.formats.correlations import (
        Correlations,
        merge_correlations,
        read_correlations,
        write_correlations,
    )
    from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, GGUFKey, GGUFTensor, open_gguf
    from gguf3n.formats.imatrix import Entry, ImportanceMatrix, merge_imatrices, read_imatrix, write_imatrix
    from gguf3n.formats.rows import (
        LowRank,
        OfLength,
        Padded,
        RowReader,
        Scaled,
        SideBySide,
        SourceTensor,
        Stored,
        Transposed,
        View,
        Zeros,
    )
    from gguf3n.formats.sensitivity import (
        Sensitivity,
        merge_sensitivities,
        read_sensitivity,
        write_sensitivity,
    )
    from gguf3n.gemma3n.mapping import MappedTensor
    from gguf3n.gemma3n.named_slices import find_slice
    from gguf3n.gemma3n.part import Part, PartKind, mmproj_part, text_part
    from gguf3n.gemma3n.slices import Slice, SlicedCheckpoint, take_slice
    from gguf3n.gemma3n.source import Checkpoint, GGUFSource, Source
    from gguf3n.inspection.diff import Difference, KeyChange, TensorChange, TokenChange, diff
    from gguf3n.inspection.edit import Edit, edit
    from gguf3n.inspection.lint import Check, Finding, Group, Report, Severity, lint
    from gguf3n.inspection.repair import Fix, Repair, repair
    from gguf3n.inspection.statistics import Risk, Skipped, Statistics, TensorStatistics, f16_risks, measure_statistics
    from gguf3n.planning import Plan, PlannedTensor
    from gguf3n.progress import Progress
    from gguf3n.publishing.card import Card, CardRow, FileFacts, make_card, read_facts
    from gguf3n.publishing.checks import RepositoryReport, Tag, lint_repository
    from gguf3n.publishing.manifest import Manifest, make_manifest, read_manifest, record_source, write_manifest
    from gguf3n.publishing.measured import Measured
    from gguf3n.publishing.ollama import OllamaFiles, ollama_files
    from gguf3n.publishing.publish import Publication, PublishedFile, publish
    from gguf3n.publishing.verify import Verification, verify
    from gguf3n.quants.api import dequantize, quantize
    from gguf3n.recipes import Decision, For, ImageRows, Keep, Recipe, Rule, find_recipe
    from gguf3n.slicing import write_slice
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
    "Card",
    "CardRow",
    "Check",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Conversion",
    "ConversionOptions",
    "Correlations",
    "Decision",
    "Difference",
    "Divergence",
    "Edit",
    "Entry",
    "FileFacts",
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
    "Manifest",
    "MappedTensor",
    "MappingError",
    "Measured",
    "Measurement",
    "OfLength",
    "OllamaFiles",
    "OutputError",
    "Padded",
    "Part",
    "PartKind",
    "Plan",
    "PlannedTensor",
    "Problem",
    "Progress",
    "Publication",
    "PublishedFile",
    "QuantizationError",
    "Recipe",
    "Repair",
    "Report",
    "RepositoryReport",
    "Risk",
    "RowReader",
    "Rule",
    "Scaled",
    "Sensitivity",
    "Severity",
    "SideBySide",
    "Skipped",
    "Slice",
    "SlicedCheckpoint",
    "Source",
    "SourceError",
    "SourceTensor",
    "Stage",
    "StageResult",
    "Statistics",
    "Stored",
    "StructureResult",
    "Tag",
    "TensorChange",
    "TensorError",
    "TensorStatistics",
    "TensorsResult",
    "TokenChange",
    "TokenizerError",
    "TokensResult",
    "Transposed",
    "Tuned",
    "Tuning",
    "TypeLimits",
    "UsageError",
    "Validation",
    "ValidationOptions",
    "Verdict",
    "Verification",
    "View",
    "VisionResult",
    "Zeros",
    "convert",
    "convert_adapter",
    "dequantize",
    "diff",
    "edit",
    "f16_risks",
    "find_recipe",
    "find_slice",
    "lint",
    "lint_repository",
    "make_card",
    "make_manifest",
    "measure_importance",
    "measure_sensitivity",
    "measure_statistics",
    "merge_correlations",
    "merge_imatrices",
    "merge_sensitivities",
    "mmproj_part",
    "ollama_files",
    "open_gguf",
    "parse_options",
    "parse_validation",
    "plan",
    "plan_adapter",
    "publish",
    "quantize",
    "read_correlations",
    "read_facts",
    "read_gguf",
    "read_imatrix",
    "read_manifest",
    "read_recipe",
    "read_sensitivity",
    "read_source",
    "record_source",
    "repair",
    "take_slice",
    "text_part",
    "tune",
    "validate",
    "verify",
    "write",
    "write_correlations",
    "write_imatrix",
    "write_manifest",
    "write_report",
    "write_sensitivity",
    "write_slice",
]

_HOMES = {
    "Card": "publishing.card",
    "CardRow": "publishing.card",
    "Check": "inspection.lint",
    "Checkpoint": "gemma3n.source",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Conversion": "conversion",
    "ConversionOptions": "conversion",
    "Correlations": "formats.correlations",
    "Decision": "recipes",
    "Difference": "inspection.diff",
    "Divergence": "validation.divergence",
    "Edit": "inspection.edit",
    "Entry": "formats.imatrix",
    "FileFacts": "publishing.card",
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
    "Manifest": "publishing.manifest",
    "MappedTensor": "gemma3n.mapping",
    "MappingError": "errors",
    "Measured": "publishing.measured",
    "Measurement": "engines.activations",
    "OfLength": "formats.rows",
    "OllamaFiles": "publishing.ollama",
    "OutputError": "errors",
    "Padded": "formats.rows",
    "Part": "gemma3n.part",
    "PartKind": "gemma3n.part",
    "Plan": "planning",
    "PlannedTensor": "planning",
    "Problem": "validation.result",
    "Progress": "progress",
    "Publication": "publishing.publish",
    "PublishedFile": "publishing.publish",
    "QuantizationError": "errors",
    "Recipe": "recipes",
    "Repair": "inspection.repair",
    "Report": "inspection.lint",
    "RepositoryReport": "publishing.checks",
    "Risk": "inspection.statistics",
    "RowReader": "formats.rows",
    "Rule": "recipes",
    "Scaled": "formats.rows",
    "Sensitivity": "formats.sensitivity",
    "Severity": "inspection.lint",
    "SideBySide": "formats.rows",
    "Skipped": "inspection.statistics",
    "Slice": "gemma3n.slices",
    "SlicedCheckpoint": "gemma3n.slices",
    "Source": "gemma3n.source",
    "SourceError": "errors",
    "SourceTensor": "formats.rows",
    "Stage": "validation.result",
    "StageResult": "validation.result",
    "Statistics": "inspection.statistics",
    "Stored": "formats.rows",
    "StructureResult": "validation.structure",
    "Tag": "publishing.checks",
    "TensorChange": "inspection.diff",
    "TensorError": "validation.tensor_errors",
    "TensorStatistics": "inspection.statistics",
    "TensorsResult": "validation.tensor_errors",
    "TokenChange": "inspection.diff",
    "TokenizerError": "errors",
    "TokensResult": "validation.tokens",
    "Transposed": "formats.rows",
    "Tuned": "tuning.allocate",
    "Tuning": "tuning.allocate",
    "TypeLimits": "tuning.allocate",
    "UsageError": "errors",
    "Validation": "validation.validate",
    "ValidationOptions": "validation.options",
    "Verdict": "validation.result",
    "Verification": "publishing.verify",
    "View": "formats.rows",
    "VisionResult": "validation.vision",
    "Zeros": "formats.rows",
    "convert": "conversion",
    "convert_adapter": "adapter_file",
    "dequantize": "quants.api",
    "diff": "inspection.diff",
    "edit": "inspection.edit",
    "f16_risks": "inspection.statistics",
    "find_recipe": "recipes",
    "find_slice": "gemma3n.named_slices",
    "lint": "inspection.lint",
    "lint_repository": "publishing.checks",
    "make_card": "publishing.card",
    "make_manifest": "publishing.manifest",
    "measure_importance": "engines.activations",
    "measure_sensitivity": "tuning.measure",
    "measure_statistics": "inspection.statistics",
    "merge_correlations": "formats.correlations",
    "merge_imatrices": "formats.imatrix",
    "merge_sensitivities": "formats.sensitivity",
    "mmproj_part": "gemma3n.part",
    "ollama_files": "publishing.ollama",
    "open_gguf": "formats.gguf_reader",
    "parse_options": "conversion",
    "parse_validation": "validation.options",
    "plan": "conversion",
    "plan_adapter": "adapter_file",
    "publish": "publishing.publish",
    "quantize": "quants.api",
    "read_correlations": "formats.correlations",
    "read_facts": "publishing.card",
    "read_gguf": "conversion",
    "read_imatrix": "formats.imatrix",
    "read_manifest": "publishing.manifest",
    "read_recipe": "conversion",
    "read_sensitivity": "formats.sensitivity",
    "read_source": "conversion",
    "record_source": "publishing.manifest",
    "repair": "inspection.repair",
    "take_slice": "gemma3n.slices",
    "text_part": "gemma3n.part",
    "tune": "tuning.tune",
    "validate": "validation.validate",
    "verify": "publishing.verify",
    "write": "conversion",
    "write_correlations": "formats.correlations",
    "write_imatrix": "formats.imatrix",
    "write_manifest": "publishing.manifest",
    "write_report": "validation.report",
    "write_slice": "slicing",
    "write_sensitivity": "formats.sensitivity",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
