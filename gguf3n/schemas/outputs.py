"""Every `gguf3n.X/1` as a type: what the commands print with `--json`, and the files for programs.

A field with a default may be missing. What a part of the code says in a dataclass of its own stands here as that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from gguf3n.inspection.imatrix_statistics import ImatrixStatistics
from gguf3n.inspection.lint import Group
from gguf3n.inspection.summary import Token
from gguf3n.publishing.checks import Tag
from gguf3n.publishing.hf_jobs import HubJob
from gguf3n.recipes import For
from gguf3n.tuning.ladder import Point
from gguf3n.validation.divergence import Divergence
from gguf3n.validation.logits import Limits
from gguf3n.validation.result import Problem, Stage, Verdict
from gguf3n.validation.tensor_errors import TensorError

LEFT_OUT: Any = None
"""The default of a field that is not there at all where it is not wanted."""
Hashes: TypeAlias = Mapping[str, str]
"""SHA-256 by name."""
Severity: TypeAlias = Literal["error", "warning", "note"]
How: TypeAlias = str
"""What was done with the file: see `gguf3n edit` and `gguf3n repair`."""


@dataclass(frozen=True)
class TypeCount:
    """Tensors of one type. Units: bytes."""

    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True)
class Key:
    """A key's type, as in "uint32" and "array of string", and its value."""

    type: str
    value: Any


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file; the row length is the last of its shape. Units: bytes."""

    name: str
    shape: Sequence[int]
    type: str
    part: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class LayerRun:
    """Equal layers that follow one another, with the type of each of their tensors."""

    first: int
    last: int
    types: Mapping[str, str | None]


@dataclass(frozen=True)
class Inspection:
    """`gguf3n inspect`; the last five are views, of which those are there that were asked for."""

    schema: Literal["gguf3n.inspect/1"]
    path: str
    parts: int
    version: int
    byte_order: Literal["little", "big"]
    alignment: int
    file_bytes: int
    header_bytes: int
    architecture: str | None
    encoders: Mapping[str, str] | None
    adapter: Mapping[str, str] | None
    n_weights: int
    bits_per_weight: float
    types: Mapping[str, TypeCount]
    keys: Mapping[str, Key] = LEFT_OUT
    tensors: Sequence[TensorEntry] = ()
    layers: Sequence[LayerRun] = ()
    tokens: Sequence[Token] = ()
    chat_template: str | None = None


@dataclass(frozen=True)
class CheckRow:
    """A row of the table of checks."""

    id: str
    severity: Severity
    meaning: str
    fix: str
    group: Group


@dataclass(frozen=True)
class FindingRow:
    """A fault, with its check's row of the table: `found` says where and what in one sentence."""

    id: str
    severity: Severity
    meaning: str
    fix: str
    where: str
    what: str
    found: str


@dataclass(frozen=True)
class LintReport:
    """`gguf3n lint` of a file, or of a repository, which has tags. `skipped`: why not all checks were made."""

    schema: Literal["gguf3n.lint/1"]
    path: str
    ok: bool
    n_checks: int
    skipped: str | None
    counts: Mapping[str, int]
    findings: Sequence[FindingRow]
    tags: Sequence[Tag] = ()
    mmproj: LintReport | None = None


@dataclass(frozen=True)
class LintReports:
    """`gguf3n lint` of several."""

    schema: Literal["gguf3n.lint/1"]
    ok: bool
    reports: Sequence[LintReport]


@dataclass(frozen=True)
class Checks:
    """`gguf3n lint --checks`."""

    schema: Literal["gguf3n.lint/1"]
    checks: Sequence[CheckRow]
    repository_checks: Sequence[CheckRow] = ()


@dataclass(frozen=True)
class FixRow:
    """A repair that was made."""

    id: str
    what: str


@dataclass(frozen=True)
class RepairResult:
    """`gguf3n repair`; `left` is what lint still says."""

    schema: Literal["gguf3n.repair/1"]
    path: str
    dry_run: bool
    how: How
    fixes: Sequence[FixRow]
    left: Sequence[FindingRow]


@dataclass(frozen=True)
class EditResult:
    """`gguf3n edit`; `undo` are operations for `--apply`."""

    schema: Literal["gguf3n.edit/1"]
    path: str
    dry_run: bool
    how: How
    changes: Sequence[str]
    undo: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChangedKey:
    """A key in both files; null in one that lacks it. Of an array, so many items differ."""

    name: str
    types: tuple[str | None, str | None]
    values: tuple[Any, Any]
    different_items: int | None


@dataclass(frozen=True)
class ChangedToken:
    """A token's text, score and type in both files."""

    id: int
    before: Sequence[Any]
    after: Sequence[Any]


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor in both files; null in one that lacks it."""

    name: str
    types: tuple[str | None, str | None]
    shapes: tuple[Sequence[int] | None, Sequence[int] | None]
    relative_error: float | None


@dataclass(frozen=True)
class DiffResult:
    """`gguf3n diff`."""

    schema: Literal["gguf3n.diff/1"]
    paths: tuple[str, str]
    equal: bool
    same_content: bool
    with_data: bool
    n_tensors: int
    keys: Sequence[ChangedKey]
    tokens: Sequence[ChangedToken]
    tensors: Sequence[ChangedTensor]
    layout: Sequence[str]


@dataclass(frozen=True)
class OwnPreparation:
    """How far llama.cpp's own preparation of pictures is from the model's. Units: nats."""

    square: float
    not_square: float | None


@dataclass(frozen=True)
class StageReport:
    """A stage of validation: every stage has the first three, the others belong to one or two of them."""

    verdict: Verdict
    seconds: float
    problems: Sequence[Problem]
    findings: Sequence[FindingRow] = ()
    weighted: bool = False
    n_identical: int = 0
    notes: Sequence[str] = ()
    shows: Sequence[str] = ()
    tensors: Sequence[TensorError] = ()
    n_texts: int = 0
    n_tokens: int = 0
    divergence: Divergence = LEFT_OUT
    limits: Limits = LEFT_OUT
    base_qtype: str = ""
    text_qtype: str = ""
    engine: str = ""
    reference: str = ""
    n_ctx: int = 0
    n_chunks: int = 0
    n_vocab: int = 0
    noise: Divergence | None = None
    noise_said: str = ""
    reaction: float | None = None
    between_pictures: float | None = None
    own_preparation: OwnPreparation = LEFT_OUT
    text_model: str = ""
    pictures: Sequence[str] = ()


@dataclass(frozen=True)
class ValidationResult:
    """`gguf3n validate`, and `validation` of the files of other commands."""

    path: str
    reference: str
    verdict: Verdict
    stages: Mapping[str, StageReport]
    schema: Literal["gguf3n.validate/1"] = "gguf3n.validate/1"


@dataclass(frozen=True)
class PlannedRow:
    """A tensor of a plan, with the rule that gave its type. Units: bytes."""

    name: str
    shape: Sequence[int]
    type: str
    bytes: int
    offset: int
    rule: str
    reason: str
    refined: bool


@dataclass(frozen=True)
class RefinedCount:
    """How much of a file has refined codes."""

    tensors: int
    rows: int


@dataclass(frozen=True)
class Against:
    """The same file by another recipe: its size, and the types that are others."""

    quant: str
    bytes: int
    types: Mapping[str, str]


@dataclass(frozen=True)
class ConvertedFile:
    """A file that was written, or with `--dry-run` would be."""

    path: str
    quant: str
    bytes: int
    bits_per_weight: float
    n_weights: int
    types: Mapping[str, int]
    refined: RefinedCount
    findings: Sequence[FindingRow]
    tensors: Sequence[PlannedRow] = ()
    against: Against = LEFT_OUT
    manifest: str = ""
    validation: ValidationResult = LEFT_OUT


@dataclass(frozen=True)
class ConvertResult:
    """`gguf3n convert` and `gguf3n quantize`."""

    schema: Literal["gguf3n.convert/1"]
    source: str
    notices: Sequence[str]
    outputs: Sequence[ConvertedFile]
    seconds: float = 0.0


@dataclass(frozen=True)
class TensorNumbers:
    """The statistics of one tensor's weights; the last two with `--against`."""

    name: str
    section: str
    place: str | None
    kind: str
    type: str
    shape: Sequence[int]
    n_weights: int
    max_magnitude: float
    mean: float | None
    std: float | None
    excess_kurtosis: float | None
    zeros: int
    nan: int
    infinite: int
    f16_overflow: int
    f16_zero: int
    f16_subnormal: int
    rms_error: float = 0.0
    expected_error: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class RiskRow:
    """A convolution that float16 can't sum, from activations of `overflows_at` on."""

    name: str
    shape: Sequence[int]
    largest_sum: float
    overflows_at: float
    listed: bool


@dataclass(frozen=True)
class SkippedRow:
    """A tensor that was not read."""

    name: str
    type: str
    shape: Sequence[int]
    reason: str


@dataclass(frozen=True)
class StatsResult:
    """`gguf3n stats`."""

    schema: Literal["gguf3n.stats/1"]
    source: str
    activation_max: float
    tensors: Sequence[TensorNumbers]
    f16_risk: Sequence[RiskRow]
    skipped: Sequence[SkippedRow]


@dataclass(frozen=True)
class ImatrixEntry:
    """An entry of an importance matrix."""

    name: str
    columns: int
    counts: Sequence[int]


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of the texts that were measured on."""

    seen: int
    total: int


@dataclass(frozen=True)
class ImatrixResult:
    """`gguf3n imatrix`: all of them have the first eight, `show` statistics, `measure` the others."""

    schema: Literal["gguf3n.imatrix/1"]
    path: str
    legacy: bool
    datasets: Sequence[str]
    chunks: int
    chunk_count: int
    chunk_size: int
    entries: Sequence[ImatrixEntry]
    statistics: ImatrixStatistics = LEFT_OUT
    n_ctx: int = 0
    first_chunk: int = 0
    chunks_measured: int = 0
    perplexity: float | None = None
    vocabulary: Vocabulary = LEFT_OUT
    seconds: float = 0.0
    correlations: str | None = None


@dataclass(frozen=True)
class CorrelationsEntry:
    """What is known of the inputs of a matrix: in blocks of `width` columns, or whole."""

    name: str
    columns: int
    width: int
    count: int


@dataclass(frozen=True)
class CorrelationsResult:
    """`gguf3n imatrix show` and `merge` of correlations. Units: bytes."""

    schema: Literal["gguf3n.correlations/1"]
    path: str
    datasets: Sequence[str]
    chunks: int
    chunk_size: int
    bytes: int
    entries: Sequence[CorrelationsEntry]


@dataclass(frozen=True)
class FileHash:
    """A file. Units: bytes."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ManifestSource:
    """What a file was made from; `files` are hashes by name."""

    directory: str
    repo: str | None
    commit: str | None
    files: Hashes
    sha256: str


@dataclass(frozen=True)
class OverrideRow:
    """A rule of the command line."""

    patterns: Sequence[str]
    is_regex: bool
    type: str
    reason: str


@dataclass(frozen=True)
class ManifestRecipe:
    """Which types."""

    name: str
    for_: For
    sha256: str
    text: str
    overrides: Sequence[OverrideRow]


@dataclass(frozen=True)
class ManifestEncoders:
    """Of an mmproj file."""

    vision: bool
    audio: bool
    force_types: bool


@dataclass(frozen=True)
class ManifestImportance:
    """The importance matrix, as it was named."""

    file: str
    sha256: str


@dataclass(frozen=True)
class ManifestFile:
    """A manifest beside a file; see gguf3n/publishing/manifest.py."""

    schema: Literal["gguf3n.manifest/1"]
    file: FileHash
    source: ManifestSource
    recipe: ManifestRecipe
    encoders: ManifestEncoders
    importance: ManifestImportance | None
    versions: Mapping[str, str]
    command: Sequence[str]
    tensors: Hashes


@dataclass(frozen=True)
class VerifyResult:
    """`gguf3n verify`; `first` is the first of the differences."""

    schema: Literal["gguf3n.verify/1"]
    path: str
    source: str
    recipe: str
    ok: bool
    same: bool
    first: str | None
    differences: Sequence[str]
    claims: Sequence[str]
    notes: Sequence[str]


@dataclass(frozen=True)
class PublishedRow:
    """A file of a publication. Units: bytes."""

    name: str
    quant: str
    bytes: int
    sha256: str
    state: Literal["made", "kept", "on the Hub"]
    findings: Sequence[str]
    validation: ValidationResult | None


@dataclass(frozen=True)
class PublishResult:
    """`gguf3n publish`; `stopped`: why nothing was uploaded; `sent`: what was in this run."""

    schema: Literal["gguf3n.publish/1"]
    source: str
    repo: str
    revision: str | None
    directory: str
    ok: bool
    files: Sequence[PublishedRow]
    beside: Sequence[str]
    sent: Sequence[str]
    stopped: Sequence[str]


@dataclass(frozen=True)
class PublishPlanRow:
    """A file of a plan, and the read of the source that it is made in. Units: bytes."""

    name: str
    quant: str
    bytes: int
    batch: int
    findings: Sequence[FindingRow]


@dataclass(frozen=True)
class PublishPlan:
    """`gguf3n publish --dry-run`."""

    schema: Literal["gguf3n.publish-plan/1"]
    source: str
    repo: str | None
    directory: str
    files: Sequence[PublishPlanRow]
    batches: int
    validate: Sequence[Stage]
    notices: Sequence[str]


@dataclass(frozen=True)
class StepRow:
    """A step of jobs; `number` is that of a piece of the calibration."""

    id: str
    kind: Literal["measure", "merge", "convert", "publish"]
    model: str
    needs: Sequence[str]
    number: int
    quants: Sequence[str]
    mmproj: Sequence[str]


@dataclass(frozen=True)
class JobsPlan:
    """`gguf3n publish JOBS.toml --dry-run`."""

    schema: Literal["gguf3n.jobs-plan/1"]
    directory: str
    steps: Sequence[StepRow]


@dataclass(frozen=True)
class PublicationRow:
    """What `gguf3n.publish/1` says of one of several."""

    source: str
    repo: str
    revision: str | None
    directory: str
    ok: bool
    files: Sequence[PublishedRow]
    beside: Sequence[str]
    sent: Sequence[str]
    stopped: Sequence[str]


@dataclass(frozen=True)
class JobsResult:
    """`gguf3n publish JOBS.toml`: the steps that were done, and what came of each model."""

    schema: Literal["gguf3n.jobs/1"]
    directory: str
    ok: bool
    steps: Sequence[str]
    publications: Sequence[PublicationRow]


@dataclass(frozen=True)
class HubJobsResult:
    """`gguf3n publish JOBS.toml --executor hf-jobs`; with `--dry-run` no scripts and no addresses."""

    schema: Literal["gguf3n.hf-jobs/1"]
    jobs: Sequence[HubJob]
    scripts: Sequence[str]
    addresses: Sequence[str]


@dataclass(frozen=True)
class CardRow:
    """A model on a card."""

    name: str
    bytes: int
    bits_per_weight: float
    label: str | None
    tag: str | None
    recommended: bool
    verdict: str | None
    kl: float | None
    top1: float | None
    perplexity: float | None


@dataclass(frozen=True)
class CardResult:
    """`gguf3n card`."""

    schema: Literal["gguf3n.card/1"]
    path: str
    repo: str
    outputs: Sequence[str]
    files: Sequence[CardRow]
    notices: Sequence[str]


@dataclass(frozen=True)
class OllamaResult:
    """`gguf3n ollama`."""

    schema: Literal["gguf3n.ollama/1"]
    path: str
    outputs: Sequence[str]
    params: Mapping[str, Any]
    notices: Sequence[str]


@dataclass(frozen=True)
class SliceRow:
    """A MatFormer slice: with its true widths, and padded as llama.cpp loads it."""

    name: str
    effective_parameters: int
    mmlu: float
    bytes: int
    padded_bytes: int
    loads_unpadded: Sequence[str]


@dataclass(frozen=True)
class SlicesResult:
    """`gguf3n slices`."""

    schema: Literal["gguf3n.slices/1"]
    quant: str
    slices: Sequence[SliceRow]


@dataclass(frozen=True)
class WrittenFile:
    """A file of a checkpoint that was written."""

    path: str
    bytes: int


@dataclass(frozen=True)
class SliceResult:
    """`gguf3n slice`."""

    schema: Literal["gguf3n.slice/1"]
    source: str
    output: str
    notices: Sequence[str]
    files: Sequence[WrittenFile]


@dataclass(frozen=True)
class SensitivityResult:
    """`gguf3n sensitivity`: `costs` in nats a token, by tensor and type."""

    schema: Literal["gguf3n.sensitivity/1"]
    path: str
    chunks: int
    chunks_measured: int
    ctx: int
    seed: int
    perplexity: float
    seconds: float
    types: Sequence[str]
    costs: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class TuneBudget:
    """What a file may take, and how that was said. Units: bytes."""

    bytes: int
    said: str


@dataclass(frozen=True)
class TunedRow:
    """A tensor's type, and why."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Curve:
    """Files that can be written: tuned ones for a ladder of budgets, and stock mixtures."""

    tuned: Sequence[Point]
    stock: Sequence[Point]


@dataclass(frozen=True)
class MeasuredRow:
    """A file in llama.cpp."""

    name: str
    bytes: int
    divergence: Divergence


@dataclass(frozen=True)
class TuneResult:
    """`gguf3n tune`; with `--curve` alone there is no recipe."""

    schema: Literal["gguf3n.tune/1"]
    source: str
    recipe: str | None = LEFT_OUT
    budget: TuneBudget = LEFT_OUT
    bytes: int = LEFT_OUT
    bits_per_weight: float = LEFT_OUT
    expected_divergence: float = LEFT_OUT
    bound: float = LEFT_OUT
    exact: bool = LEFT_OUT
    evidence: Sequence[str] = LEFT_OUT
    tensors: Sequence[TunedRow] = LEFT_OUT
    curve: Curve = LEFT_OUT
    measured: Sequence[MeasuredRow] = LEFT_OUT


OUTPUTS: Mapping[str, Any] = {
    "gguf3n.inspect/1": Inspection,
    "gguf3n.lint/1": LintReport | LintReports | Checks,
    "gguf3n.repair/1": RepairResult,
    "gguf3n.edit/1": EditResult,
    "gguf3n.diff/1": DiffResult,
    "gguf3n.validate/1": ValidationResult,
    "gguf3n.convert/1": ConvertResult,
    "gguf3n.stats/1": StatsResult,
    "gguf3n.imatrix/1": ImatrixResult,
    "gguf3n.correlations/1": CorrelationsResult,
    "gguf3n.slices/1": SlicesResult,
    "gguf3n.slice/1": SliceResult,
    "gguf3n.sensitivity/1": SensitivityResult,
    "gguf3n.tune/1": TuneResult,
    "gguf3n.manifest/1": ManifestFile,
    "gguf3n.verify/1": VerifyResult,
    "gguf3n.publish/1": PublishResult,
    "gguf3n.publish-plan/1": PublishPlan,
    "gguf3n.jobs-plan/1": JobsPlan,
    "gguf3n.jobs/1": JobsResult,
    "gguf3n.hf-jobs/1": HubJobsResult,
    "gguf3n.card/1": CardResult,
    "gguf3n.ollama/1": OllamaResult,
}
"""Schema -> what it is the schema of."""
