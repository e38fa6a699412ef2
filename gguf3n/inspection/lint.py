"""What is wrong with a GGUF file of Gemma 3n: a table of checks, and the function that goes through it.

Source: what llama.cpp demands is in ggml/src/gguf.cpp, src/llama-model-loader.cpp, src/llama-vocab.cpp and
src/models/gemma3n.cpp; what Ollama's own engine reads, in model/models/gemma3n of its repository.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from gguf3n.errors import GGUFError
from gguf3n.formats.byte_source import is_remote
from gguf3n.formats.gguf_reader import GGUFFile, open_gguf
from gguf3n.inspection import checks_layout as layout
from gguf3n.inspection import checks_model as model
from gguf3n.inspection import checks_vocabulary as vocabulary
from gguf3n.inspection import deep
from gguf3n.inspection.subject import Subject
from gguf3n.progress import OnProgress

MAX_FINDINGS = 1000
"""Of one check: a file can have as many faults as it has tensors."""


class Severity(enum.Enum):
    """How bad a fault is; the word is that of GitHub's annotations."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "notice"


class Group(enum.Enum):
    """When a check is made: of any file, of Gemma 3n's, or of the data of Gemma 3n's when asked for."""

    LAYOUT = "layout"
    MODEL = "model"
    DATA = "data"


@dataclass(frozen=True)
class Check:
    """One row of the table: what the fault means for which engine, and what mends it."""

    id: str
    severity: Severity
    meaning: str
    fix: str
    group: Group
    find: Callable[[Subject], Iterator[str]]

    @property
    def label(self) -> str:
        """As in "error", "warning" and "note"."""
        return self.severity.name.lower()

    def as_dict(self) -> dict[str, str]:
        """The row of the table that is not code."""
        return {"id": self.id, "severity": self.label, "meaning": self.meaning, "fix": self.fix}


@dataclass(frozen=True)
class Finding:
    """A fault that a file has."""

    check: Check
    found: str

    def as_dict(self) -> dict[str, str]:
        """With its check's row of the table."""
        return {**self.check.as_dict(), "found": self.found}


@dataclass(frozen=True)
class Report:
    """What lint says of a file. `n_checks` were made; `skipped` says why others were not."""

    name: str
    findings: tuple[Finding, ...]
    n_checks: int
    skipped: str | None = None

    def count(self, severity: Severity) -> int:
        return sum(finding.check.severity is severity for finding in self.findings)


REPAIR = "gguf3n repair"
AGAIN = "convert or download the file again"
ENDIAN = "gguf-convert-endian FILE little"
E, W, N = Severity.ERROR, Severity.WARNING, Severity.NOTE
ALL = "no engine loads it"
LLAMA = "llama.cpp, Ollama and LM Studio do not load it"


def _nothing(_: Subject) -> Iterator[str]:
    return iter(())


def _row(id: str, severity: Severity, meaning: str, fix: str, find: Callable[[Subject], Iterator[str]]) -> Check:
    return Check(id, severity, meaning, fix, Group.MODEL, find)


def _layout(
    id: str, severity: Severity, meaning: str, fix: str, kind: str | Callable[[Subject], Iterator[str]]
) -> Check:
    find = partial(layout.problems, kind) if isinstance(kind, str) else kind
    return Check(id, severity, meaning, fix, Group.LAYOUT, find)


UNREADABLE = _layout("unreadable", E, ALL, AGAIN, _nothing)

# fmt: off
LAYOUT_CHECKS: tuple[Check, ...] = (
    UNREADABLE,
    _layout("duplicate-key", E, LLAMA, f"{REPAIR}, where both are the same", "duplicate-key"),
    _layout("empty-key", E, LLAMA, REPAIR, layout.empty_key),
    _layout("alignment-key", E, LLAMA, f"{REPAIR} removes it", "alignment-key"),
    _layout("misaligned", E, LLAMA, f"{REPAIR} places the tensors anew", "misaligned"),
    _layout("gaps", E, "llama.cpp wants each tensor right after the one before", REPAIR, layout.gaps),
    _layout("overlap", E, "two tensors share bytes: one of them is destroyed", AGAIN, "overlap"),
    _layout("truncated", E, f"the file is not complete; {ALL}", AGAIN, "truncated"),
    _layout("trailing-bytes", W, "engines ignore them; a sign of a damaged or joined file", REPAIR, layout.trailing),
    _layout("duplicate-tensor", E, LLAMA, f"{REPAIR}, where both are the same", "duplicate-tensor"),
    _layout("long-name", E, "llama.cpp takes names of 63 bytes at most", AGAIN, layout.long_names),
    _layout("big-endian", E, "engines on x86 and ARM do not load it", ENDIAN, layout.big_endian),
    _layout("split-parts", E, LLAMA, "fetch all parts of one model", "parts"),
    _layout("lone-part", E, LLAMA, "give the parts their names back", layout.lone_part),
)

MODEL_CHECKS: tuple[Check, ...] = (
    _row("missing-key", E, LLAMA,
         f"{REPAIR}, where the tensors tell the value", model.missing_keys),
    _row("assumed-key", W, "each engine takes a value of its own; llama.cpp a rope base of 10,000",
         f"{REPAIR}, where every Gemma 3n has the same value", model.assumed_keys),
    _row("shared-kv-type", E, "Ollama's engine does not decode it; llama.cpp does not read it",
         REPAIR, model.shared_kv_type),
    _row("mistyped-key", E, "llama.cpp refuses the type, or Ollama's engine reads another value",
         f"{REPAIR}, where the value fits", model.mistyped_keys),
    _row("array-length", E, "llama.cpp refuses it or takes 0; Ollama's engine stops",
         f"{REPAIR}, where the tensors tell the value", model.array_lengths),
    _row("block-count", E, "llama.cpp misses tensors or finds too many",
         REPAIR, model.block_count),
    _row("size-key", E, "llama.cpp expects tensors of other shapes and does not load the file",
         REPAIR, model.size_keys),
    _row("fixed-size", E, "llama.cpp has it built in: the file does not load, or the model talks nonsense",
         "use another engine, or another slice", model.fixed_sizes),
    _row("mixed-ffn", E, "llama.cpp takes layer 0's FFN width for all layers and does not load the file",
         "slice the model to one width", model.mixed_ffn),
    _row("missing-tensor", E, LLAMA,
         AGAIN, model.missing_tensors),
    _row("missing-shared-kv", E, "llama.cpp demands keys and values that it never evaluates",
         f"{REPAIR} adds zeros", model.missing_idle_tensors),
    _row("extra-tensor", E, "llama.cpp counts the tensors and refuses",
         AGAIN, model.extra_tensors),
    _row("wrong-shape", E, LLAMA,
         AGAIN, model.wrong_shapes),
    _row("float-tensor", E, "llama.cpp multiplies by norms and scales in F32 only, and aborts",
         AGAIN, model.float_tensors),
    _row("table-rows", E, "llama.cpp wants as many rows in both tables as there are tokens",
         f"{REPAIR} pads them", model.table_rows),
    _row("ple-type", W, "Ollama's engine refuses it; on GPUs the CPU gathers its rows",
         "quantize with --ple", model.ple_type),
    _row("file-type", W, "programs show, or choose by, a wrong name",
         REPAIR, model.file_type),
    _row("quantization-version", W, "programs can't tell how the blocks are packed",
         f"{REPAIR}, where it is missing", model.quantization_version),
    _row("missing-tokenizer", E, LLAMA,
         AGAIN, vocabulary.missing_tokenizer),
    _row("tokenizer-model", E, "text is cut into wrong tokens: Gemma's tokenizer is an SPM, \"llama\"",
         AGAIN, vocabulary.tokenizer_model),
    _row("token-scores", E, "llama.cpp refuses it, or cuts text into wrong tokens",
         f"{REPAIR}: in Gemma's vocabulary the order of the ids", vocabulary.scores),
    _row("token-types", E, "llama.cpp refuses it, or knows no special token",
         f"{REPAIR}: Gemma's texts tell", vocabulary.types),
    _row("duplicate-token", E, "llama.cpp aborts",
         AGAIN, vocabulary.duplicates),
    _row("byte-token", E, "characters outside the vocabulary are lost",
         AGAIN, vocabulary.missing_bytes),
    _row("byte-type", E, "bytes come out as text such as <0x0A>",
         REPAIR, vocabulary.byte_types),
    _row("control-type", E, "chat marks are read as text, and the model answers itself",
         REPAIR, vocabulary.control_types),
    _row("special-id", E, "llama.cpp takes 1 for begin and 2 for end, the other way round than Gemma",
         REPAIR, vocabulary.special_ids),
    _row("no-bos", W, "without the begin token Gemma writes nonsense",
         REPAIR, vocabulary.no_bos),
    _row("two-bos", N, "llama.cpp drops one of the two; Ollama's engine and others keep both",
         f"{REPAIR} --fix two-bos", vocabulary.two_bos),
    _row("space-prefix", E, "every text gets a space before it",
         REPAIR, vocabulary.space_prefix),
    _row("end-of-turn", N, "llama.cpp knows it by its text; engines that go by ids do not stop",
         f"{REPAIR} --fix end-of-turn", vocabulary.end_of_turn),
    _row("chat-template", W, "LM Studio and Ollama fall back to a template of their own",
         "gguf3n edit --chat-template FILE", vocabulary.chat_template),
    _row("sampling", N, "programs sample with defaults of their own, not Google's",
         f"{REPAIR} --fix sampling", vocabulary.sampling),
)
# fmt: on

DATA_FINDERS: tuple[tuple[str, Severity, str, str, Callable[..., Iterator[str]]], ...] = (
    ("bad-value", E, "one such value spoils every output after it", AGAIN, deep.bad_values),
    ("all-zero", E, "the tensor was never written, or lost", AGAIN, deep.all_zero),
    ("f16-range", W, "values were cut off at float16's end, or will overflow", "convert with BF16", deep.f16_range),
    ("wrong-table", E, "an embedding table holds another's values", AGAIN, deep.wrong_table),
)

DATA_CHECKS: tuple[Check, ...] = tuple(
    Check(id, severity, meaning, fix, Group.DATA, _nothing) for id, severity, meaning, fix, _ in DATA_FINDERS
)

CHECKS: tuple[Check, ...] = (*LAYOUT_CHECKS, *MODEL_CHECKS, *DATA_CHECKS)


def lint(source: str | Path, *, with_data: bool = False, progress: OnProgress | None = None) -> Report:
    """Check a file, local or remote.

    Args:
        with_data: read the tensors too.
        progress: called with the bytes read and to be read.

    Raises: GGUFError for a file that is not there; HubError. A file whose header can't be read is a finding.
    """
    try:
        gguf = open_gguf(source, strict=False)
    except GGUFError as error:
        if not is_remote(source) and not Path(source).is_file():
            raise
        return unreadable(str(source), error)
    return lint_file(gguf, with_data=with_data, progress=progress)


def unreadable(name: str, error: GGUFError) -> Report:
    """What lint says of a file whose header can't be read."""
    return Report(name, (Finding(UNREADABLE, error.one_line),), 1, "the header is unreadable")


def lint_file(gguf: GGUFFile, *, with_data: bool = False, progress: OnProgress | None = None) -> Report:
    """Check a file that is open, as `open_gguf(..., strict=False)` gives it."""
    subject = Subject(gguf)
    findings = _run(LAYOUT_CHECKS, subject)
    if not subject.is_gemma3n:
        said = subject.architecture or "nothing"
        why = f"general.architecture says {said}: only the layout was checked"
        return Report(gguf.name, tuple(findings), len(LAYOUT_CHECKS), why)
    findings += _run(MODEL_CHECKS, subject)
    n_checks = len(LAYOUT_CHECKS) + len(MODEL_CHECKS)
    skipped = None
    if with_data and gguf.byte_order == "big":
        skipped = "the data of big-endian files is not checked"
    elif with_data and any(problem.kind == "truncated" for problem in gguf.problems):
        skipped = "the data of a truncated file is not checked"
    elif with_data:
        facts = deep.scan(subject, progress)
        for check, (*_, find) in zip(DATA_CHECKS, DATA_FINDERS, strict=True):
            findings += _found(check, find(facts, subject))
        n_checks += len(DATA_CHECKS)
    return Report(gguf.name, tuple(findings), n_checks, skipped)


def _run(checks: Iterable[Check], subject: Subject) -> list[Finding]:
    return [finding for check in checks for finding in _found(check, check.find(subject))]


def _found(check: Check, found: Iterator[str]) -> list[Finding]:
    return [Finding(check, text) for text in islice(found, MAX_FINDINGS)]
