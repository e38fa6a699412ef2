"""What is wrong with a GGUF file of Gemma 3n: a table of checks, and the function that goes through it.

Source: what llama.cpp demands is in ggml/src/gguf.cpp, src/llama-model-loader.cpp, src/llama-vocab.cpp and
src/models/gemma3n.cpp; what Ollama's own engine read before version 0.30, which
runs llama.cpp, in model/models/gemma3n of its repository.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from gguf3n.errors import GGUFError, UsageError
from gguf3n.formats.byte_source import HeaderInMemory, is_remote
from gguf3n.formats.gguf_reader import GGUFFile, open_gguf, read_header
from gguf3n.gemma3n.lora import FILE_KIND
from gguf3n.gemma3n.mmproj import ARCH as ENCODER_ARCH
from gguf3n.gemma3n.text import ARCH as TEXT_ARCH
from gguf3n.inspection import checks_adapter as adapter
from gguf3n.inspection import checks_data as data
from gguf3n.inspection import checks_layout as layout
from gguf3n.inspection import checks_mmproj as mmproj
from gguf3n.inspection import checks_model as model
from gguf3n.inspection import checks_vocabulary as vocabulary
from gguf3n.inspection.found import HEADER, Found
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
    """When a check is made: of any file; of Gemma 3n's text model, its mmproj file, or both together; of an adapter, or
    of one with its base; of the data of any of them, or of one kind, when asked for; of a repository (see
    publishing/checks.py)."""

    LAYOUT = "layout"
    MODEL = "model"
    MMPROJ = "mmproj"
    PAIR = "pair"
    ADAPTER = "adapter"
    ADAPTER_PAIR = "adapter-pair"
    VALUES = "values"
    DATA = "data"
    MMPROJ_DATA = "mmproj-data"
    REPOSITORY = "repository"

    @property
    def reads_data(self) -> bool:
        return self in (Group.VALUES, Group.DATA, Group.MMPROJ_DATA)


T = TypeVar("T")


@dataclass(frozen=True)
class Check(Generic[T]):
    """One row of a table: what the fault means for which engine, and what mends it. It looks at a T, as at a file."""

    id: str
    severity: Severity
    meaning: str
    fix: str
    group: Group
    find: Callable[[T], Iterator[Found]]

    def findings(self, subject: T) -> Iterator[Finding]:
        """What it finds, however much that is."""
        for found in self.find(subject):
            yield Finding(self, found.where, found.what, str(found))

    @property
    def label(self) -> str:
        """As in "error", "warning" and "note"."""
        return self.severity.name.lower()

    def as_dict(self) -> dict[str, str]:
        """The row of the table that is not code."""
        return {"id": self.id, "severity": self.label, "meaning": self.meaning, "fix": self.fix}


@dataclass(frozen=True)
class Finding:
    """A fault that a file has: the place, what is wrong there, and the sentence that says both (see found.py)."""

    check: Check[Any]
    where: str
    what: str
    found: str

    @property
    def notice(self) -> str:
        """One line for whoever writes such a file: what is wrong, what it means, what mends it if anything does."""
        fix = "" if self.check.fix == AGAIN else f". To do: {self.check.fix}"
        return f"{self.found}: {self.check.meaning}{fix}"

    def as_dict(self) -> dict[str, str]:
        """With its check's row of the table."""
        return {**self.check.as_dict(), "where": self.where, "what": self.what, "found": self.found}


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
ENCODERS_AGAIN = "gguf3n convert SRC --mmproj F16"
MERGE = "merge it instead: gguf3n convert BASE --adapter DIR"
ADAPTER_AGAIN = "gguf3n adapter DIR"
ENDIAN = "gguf-convert-endian FILE little"
E, W, N = Severity.ERROR, Severity.WARNING, Severity.NOTE
ALL = "no engine loads it"
LLAMA = "llama.cpp, Ollama and LM Studio do not load it"


def _layout(
    id: str, severity: Severity, meaning: str, fix: str, kind: str | Callable[[Subject], Iterator[Found]]
) -> Check[Subject]:
    find = partial(layout.problems, kind) if isinstance(kind, str) else kind
    return Check(id, severity, meaning, fix, Group.LAYOUT, find)


def _model(
    id: str, severity: Severity, meaning: str, fix: str, find: Callable[[Subject], Iterator[Found]]
) -> Check[Subject]:
    return Check(id, severity, meaning, fix, Group.MODEL, find)


def _mmproj(
    id: str, severity: Severity, meaning: str, fix: str, find: Callable[[Subject], Iterator[Found]]
) -> Check[Subject]:
    return Check(id, severity, meaning, fix, Group.MMPROJ, find)


def _adapter(
    id: str, severity: Severity, meaning: str, fix: str, find: Callable[[Subject], Iterator[Found]]
) -> Check[Subject]:
    return Check(id, severity, meaning, fix, Group.ADAPTER, find)


def _values(
    id: str, severity: Severity, meaning: str, fix: str, find: Callable[[Subject], Iterator[Found]]
) -> Check[Subject]:
    return Check(id, severity, meaning, fix, Group.VALUES, find)


UNREADABLE = _layout("unreadable", E, ALL, AGAIN, "unreadable")
"""The fault of a file that can't be opened, which `lint` itself finds."""

# fmt: off
CHECKS: tuple[Check[Subject], ...] = (
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

    _model("missing-key", E, LLAMA,
           f"{REPAIR}, where the tensors tell the value", model.missing_keys),
    _model("assumed-key", W, "each engine takes a value of its own; llama.cpp a rope base of 10,000",
           f"{REPAIR}, where every Gemma 3n has the same value", model.assumed_keys),
    _model("shared-kv-type", W, "Ollama before 0.30 does not decode it; llama.cpp does not read it",
           REPAIR, model.shared_kv_type),
    _model("mistyped-key", E, "llama.cpp refuses the type, or Ollama before 0.30 reads another value",
           f"{REPAIR}, where the value fits", model.mistyped_keys),
    _model("array-length", E, "llama.cpp refuses it or takes 0; Ollama before 0.30 stops",
           f"{REPAIR}, where the tensors tell the value", model.array_lengths),
    _model("block-count", E, "llama.cpp misses tensors or finds too many",
           REPAIR, model.block_count),
    _model("size-key", E, "llama.cpp expects tensors of other shapes and does not load the file",
           REPAIR, model.size_keys),
    _model("fixed-size", E, "llama.cpp has it built in: the file does not load, or the model talks nonsense",
           "use another engine, or another slice", model.fixed_sizes),
    _model("mixed-ffn", E, "llama.cpp takes layer 0's FFN width for all layers and does not load the file",
           "convert the slice again without --no-pad, which makes one width of all", model.mixed_ffn),
    _model("missing-tensor", E, LLAMA,
           AGAIN, model.missing_tensors),
    _model("missing-shared-kv", E, "llama.cpp demands keys and values that it never evaluates",
           f"{REPAIR} adds zeros", model.missing_idle_tensors),
    _model("extra-tensor", E, "llama.cpp counts the tensors and refuses",
           AGAIN, model.extra_tensors),
    _model("wrong-shape", E, LLAMA,
           AGAIN, model.wrong_shapes),
    _model("float-tensor", E, "llama.cpp multiplies by norms and scales in F32 only, and aborts",
           AGAIN, model.float_tensors),
    _model("table-rows", E, "llama.cpp wants as many rows in both tables as there are tokens",
           f"{REPAIR} pads them", model.table_rows),
    _model("ple-type", N, "on GPUs the CPU gathers its rows; Ollama before 0.30 refuses it",
           "quantize with --ple", model.ple_type),
    _model("file-type", W, "programs show, or choose by, a wrong name",
           REPAIR, model.file_type),
    _model("quantization-version", W, "programs can't tell how the blocks are packed",
           f"{REPAIR}, where it is missing", model.quantization_version),
    _model("missing-tokenizer", E, LLAMA,
           AGAIN, vocabulary.missing_tokenizer),
    _model("tokenizer-model", E, "text is cut into wrong tokens: Gemma's tokenizer is an SPM, \"llama\"",
           AGAIN, vocabulary.tokenizer_model),
    _model("token-scores", E, "llama.cpp refuses it, or cuts text into wrong tokens",
           f"{REPAIR}: in Gemma's vocabulary the order of the ids", vocabulary.scores),
    _model("token-types", E, "llama.cpp refuses it, or knows no special token",
           f"{REPAIR}: Gemma's texts tell", vocabulary.types),
    _model("duplicate-token", E, "llama.cpp aborts",
           AGAIN, vocabulary.duplicates),
    _model("byte-token", E, "characters outside the vocabulary are lost",
           AGAIN, vocabulary.missing_bytes),
    _model("byte-type", E, "bytes come out as text such as <0x0A>",
           REPAIR, vocabulary.byte_types),
    _model("control-type", E, "chat marks are read as text, and the model answers itself",
           REPAIR, vocabulary.control_types),
    _model("special-id", E, "llama.cpp takes 1 for begin and 2 for end, the other way round than Gemma",
           REPAIR, vocabulary.special_ids),
    _model("no-bos", W, "without the begin token Gemma writes nonsense",
           REPAIR, vocabulary.no_bos),
    _model("two-bos", N, "llama.cpp drops one of the two; Ollama before 0.30 and other engines keep both",
           f"{REPAIR} --fix two-bos", vocabulary.two_bos),
    _model("space-prefix", E, "every text gets a space before it",
           REPAIR, vocabulary.space_prefix),
    _model("end-of-turn", N, "llama.cpp knows it by its text; engines that go by ids do not stop",
           f"{REPAIR} --fix end-of-turn", vocabulary.end_of_turn),
    _model("chat-template", W, "LM Studio and Ollama fall back to a template of their own",
           "gguf3n edit --chat-template FILE", vocabulary.chat_template),
    _model("sampling", N, "programs sample with defaults of their own, not Google's",
           f"{REPAIR} --fix sampling", vocabulary.sampling),

    _mmproj("mmproj-key", E, "llama.cpp does not load the encoders",
            ENCODERS_AGAIN, mmproj.missing_keys),
    _mmproj("mmproj-key-type", E, "llama.cpp aborts, or takes another value",
            ENCODERS_AGAIN, mmproj.key_types),
    _mmproj("mmproj-encoder", E, "llama.cpp does not load the file, or leaves an encoder out",
            ENCODERS_AGAIN, mmproj.claimed_encoders),
    _mmproj("mmproj-projector", E, "llama.cpp takes it for both encoders, and the audio encoder for a vision tower",
            f"{REPAIR}, where each encoder has its own", mmproj.common_projector),
    _mmproj("mmproj-image-size", E, "llama.cpp aborts at the first image, or counts other tokens than the tower makes",
            "gguf3n edit --set clip.vision.patch_size=N, image_size / 256 (Google's are 3 and 768)", mmproj.image_size),
    _mmproj("mmproj-tensor", E, "llama.cpp leaves out what it does not find, and the image is nonsense",
            ENCODERS_AGAIN, mmproj.missing_tensors),
    _mmproj("mmproj-extra-tensor", W, "nobody reads it",
            ENCODERS_AGAIN, mmproj.extra_tensors),
    _mmproj("mmproj-shape", E, "llama.cpp aborts",
            ENCODERS_AGAIN, mmproj.wrong_shapes),
    _mmproj("layer-scale", E, "llama.cpp aborts while it loads; its own converter wrote vectors in 2025",
            f"{REPAIR} writes maps", mmproj.vectors_for_maps),
    _mmproj("convolution-type", E, "llama.cpp aborts while it loads, or at the first image",
            "gguf3n quantize FILE --mmproj F16, or convert again", mmproj.convolution_types),
    _mmproj("mmproj-float-tensor", W, "norms, scales and biases are F32 wherever files are known to run",
            ENCODERS_AGAIN, mmproj.float_tensors),
    _mmproj("mmproj-width", E, "llama.cpp aborts at the first image, or refuses it beside its text model",
            ENCODERS_AGAIN, mmproj.widths),
    _mmproj("mmproj-type", W, "Ollama knows the file by it",
            "gguf3n edit --set general.type=mmproj", mmproj.general_type),
    _mmproj("mmproj-name", N, "llama.cpp and LM Studio find the file beside its model by its name",
            "name it mmproj-NAME-TYPE.gguf", mmproj.file_name),
    _mmproj("audio-alone", E, "llama.cpp does not load a file with an audio encoder alone",
            f"{ENCODERS_AGAIN}, without --no-vision", mmproj.audio_alone),
    _mmproj("idle-audio", N, "llama.cpp says that the model can hear, and does not run the audio encoder of Gemma 3n",
            "gguf3n quantize FILE --mmproj TYPE --no-audio leaves it out", mmproj.idle_audio),
    Check("fit-width", E, "llama.cpp does not load the two together",
          "take the mmproj file of the same size of model", Group.PAIR, mmproj.text_width),
    Check("fit-key", W, "programs that go by the key take them for files of two models",
          "gguf3n edit MMPROJ --set KEY=WIDTH, if the encoders are this model's", Group.PAIR, mmproj.said_width),
    Check("fit-images", E, "llama.cpp cuts the marks around an image into pieces of text",
          "convert the text model again: files of 2025 lack the tokens of images", Group.PAIR, mmproj.image_marks),

    _adapter("adapter-kind", E, "llama.cpp does not load it as an adapter of Gemma 3n",
             "gguf3n edit --set, where only the key is wrong", adapter.kinds),
    _adapter("adapter-alpha-type", E, "llama.cpp aborts", ADAPTER_AGAIN, adapter.alpha_type),
    _adapter("adapter-alpha", W, "llama.cpp takes the scale for 1, whatever the rank is", ADAPTER_AGAIN, adapter.alpha),
    _adapter("adapter-empty", E, "it changes nothing", ADAPTER_AGAIN, adapter.no_pairs),
    _adapter("adapter-half", E, "llama.cpp does not load it", ADAPTER_AGAIN, adapter.halves),
    _adapter("adapter-name", E, "llama.cpp does not load it", ADAPTER_AGAIN, adapter.names),
    _adapter("adapter-rank", E, "llama.cpp does not load it", ADAPTER_AGAIN, adapter.ranks),
    _adapter("adapter-shape", E, "llama.cpp does not load it beside the model",
             "make it of the adapter for this size of model", adapter.shapes),
    _adapter("adapter-aborts", E, "llama.cpp aborts with an adapter for the embedding table", MERGE, adapter.aborts),
    _adapter("adapter-ignored", W, "llama.cpp loads it and never applies it", MERGE, adapter.ignored),
    _adapter("adapter-idle", N, "keys and values of KV-shared layers, which nothing reads",
             "nothing: it does no harm", adapter.idle),
    Check("fit-tensor", E, "llama.cpp does not load the two together", "take the model that it was trained on",
          Group.ADAPTER_PAIR, adapter.missing_in_base),
    Check("fit-shape", E, "llama.cpp does not load the two together", "take the model that it was trained on",
          Group.ADAPTER_PAIR, adapter.shapes_in_base),

    _values("bad-value", E, "one such value spoils every output after it", AGAIN, data.bad_values),
    _values("all-zero", E, "the tensor was never written, or lost", AGAIN, data.all_zero),
    _values("f16-range", W, "values were cut off at float16's end, or will overflow",
            "convert with BF16", data.f16_range),
    Check("wrong-table", E, "an embedding table holds another's values", AGAIN, Group.DATA, data.wrong_table),
    Check("f16-input", W, "llama.cpp rounds what goes into an F16 convolution to F16, infinite above 65504; a bound "
          "from the weights, which no image has to reach",
          "convert with --mmproj lossless", Group.MMPROJ_DATA, mmproj.f16_inputs),
)
# fmt: on


def lint(
    source: str | Path | GGUFFile,
    *,
    with_data: bool = False,
    progress: OnProgress | None = None,
    beside: GGUFFile | None = None,
    base: GGUFFile | None = None,
) -> Report:
    """Check a file, local or remote.

    Args:
        source: the file, or what `open_gguf(..., strict=False)` made of it.
        beside: the mmproj file that a text model is to be used with: whether they fit.
        base: the text model that an adapter is to be used with, likewise.
        with_data: read the tensors too.
        progress: told of the bytes that are read for that.

    Raises: GGUFError for a file that is not there; HubError; UsageError where `beside` or `base` is given and one of
        the two is of another kind. A file whose header can't be read is a finding.
    """
    if isinstance(source, GGUFFile):
        return lint_file(source, with_data=with_data, progress=progress, beside=beside, base=base)
    try:
        gguf = open_gguf(source, strict=False)
    except GGUFError as error:
        if not is_remote(source) and not os.path.isfile(source):
            raise
        return unreadable(str(source), error)
    return lint_file(gguf, with_data=with_data, progress=progress, beside=beside, base=base)


def unreadable(name: str, error: GGUFError) -> Report:
    """What lint says of a file whose header can't be read."""
    finding = Finding(UNREADABLE, HEADER, error.one_line, error.one_line)
    return Report(name, (finding,), 1, "the header is unreadable")


def lint_file(
    gguf: GGUFFile,
    *,
    with_data: bool = False,
    progress: OnProgress | None = None,
    beside: GGUFFile | None = None,
    base: GGUFFile | None = None,
) -> Report:
    """Check a file that is open, as `open_gguf(..., strict=False)` gives it. Raises: UsageError, as `lint`."""
    other = None if beside is None else Subject(beside)
    model = None if base is None else Subject(base)
    subject = Subject(gguf, progress, other, base=model)
    if other is not None:
        text, encoders = (subject, subject.is_gemma3n, "the text model"), (other, other.is_mmproj, "the mmproj file")
        _check_fit(text, encoders, wanted=WITH_ENCODERS)
    if model is not None:
        adapted, text = (subject, subject.is_adapter, "an adapter"), (model, model.is_gemma3n, "the text model")
        _check_fit(adapted, text, wanted=WITH_BASE)
    return _lint(subject, with_data=with_data)


WITH_ENCODERS = (
    f"general.architecture {TEXT_ARCH}, and {ENCODER_ARCH} of the file after --mmproj",
    "gguf3n lint TEXT.gguf --mmproj MMPROJ.gguf",
)
WITH_BASE = (
    f"general.architecture {TEXT_ARCH}, and general.type {FILE_KIND} of the file before --base",
    "gguf3n lint ADAPTER.gguf --base MODEL.gguf",
)
"""What two files should be, and how they are named."""


def _check_fit(*files: tuple[Subject, bool, str], wanted: tuple[str, str]) -> None:
    """Refuse what is no pair at all, as two text models.

    Args:
        files: each, whether it is what it should be, and what that is called.

    Raises: UsageError.
    """
    expected, fix = wanted
    for subject, fits, what in files:
        if not fits:
            raise UsageError(
                f"{subject.gguf.name}: not {what} of a Gemma 3n",
                expected=expected,
                found=_architecture(subject),
                fix=fix,
            )


def _lint(subject: Subject, *, with_data: bool = False) -> Report:
    groups, skipped = _groups(subject, with_data=with_data)
    checks = [check for check in CHECKS if check.group in groups]
    findings = [finding for check in checks for finding in islice(check.findings(subject), MAX_FINDINGS)]
    return Report(subject.gguf.name, tuple(findings), len(checks), skipped)


def lint_headers(headers: Sequence[HeaderInMemory]) -> Iterator[tuple[Finding, ...]]:
    """The errors and warnings of files that are not written yet; their data is not looked at.

    Args:
        headers: of files with one vocabulary, as those of several quantizations are.
    """
    first: Subject | None = None
    for header in headers:
        subject = Subject(read_header(header, strict=False), like=first)
        first = first or subject
        yield tuple(found for found in _lint(subject).findings if found.check.severity is not Severity.NOTE)


_KINDS: tuple[tuple[Callable[[Subject], bool], tuple[Group, set[Group]]], ...] = (
    (lambda subject: subject.is_gemma3n, (Group.MODEL, {Group.VALUES, Group.DATA})),
    (lambda subject: subject.is_mmproj, (Group.MMPROJ, {Group.VALUES, Group.MMPROJ_DATA})),
    (lambda subject: subject.is_adapter, (Group.ADAPTER, {Group.VALUES})),
)
"""What a file may be, and its checks: of the header, and of the data."""


def _groups(subject: Subject, *, with_data: bool) -> tuple[Collection[Group], str | None]:
    """Which checks are made of a file, and why not all that were asked for."""
    if not subject.is_gemma3n and not subject.is_mmproj and not subject.is_adapter:
        return (Group.LAYOUT,), f"general.architecture says {_architecture(subject)}: only the layout was checked"
    kind, of_data = next(groups for is_one, groups in _KINDS if is_one(subject))
    own = {Group.LAYOUT, kind}
    if subject.mmproj is not None:
        own.add(Group.PAIR)
    if subject.base is not None:
        own.add(Group.ADAPTER_PAIR)
    skipped = None
    if with_data and subject.gguf.byte_order == "big":
        skipped = "the data of big-endian files is not checked"
    elif with_data and any(problem.kind == "truncated" for problem in subject.gguf.problems):
        skipped = "the data of a truncated file is not checked"
    elif with_data:
        return own | of_data, None
    return own, skipped


def _architecture(subject: Subject) -> str:
    """What a file says that it is."""
    if subject.architecture == ENCODER_ARCH and not subject.is_mmproj:
        return f"{ENCODER_ARCH}, and no projector is Gemma 3n's"
    return (subject.architecture or "nothing") + (", an adapter" if subject.adapter.is_adapter else "")
