"""A repository's card: README.md, with the Notice and SHA256SUMS that it speaks of.

What is ours stands between two marks and is written anew each time; what people wrote around it stays, and so do the
keys of the front matter that do not follow from the files. The same files give the same bytes: there is no date unless
SOURCE_DATE_EPOCH has one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf.constants import Keys

import gguf3n
from gguf3n.dates import source_date
from gguf3n.errors import OutputError, SourceError, UsageError
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, open_gguf
from gguf3n.formats.hub import REPO_ID
from gguf3n.formats.small_file import is_there, read_small, read_text
from gguf3n.formats.whole_file import check_output, write_whole
from gguf3n.gemma3n.mmproj import ARCH as ENCODERS_ARCH
from gguf3n.gemma3n.text import ARCH as TEXT_ARCH
from gguf3n.inspection.summary import architecture
from gguf3n.outside import one_line
from gguf3n.plots import SizePoint, check_matplotlib, size_svg
from gguf3n.progress import OnProgress
from gguf3n.publishing import front_matter, labels, terms
from gguf3n.publishing.checks import CARD, IMAGES, NOTICE_FILE, TEXT
from gguf3n.publishing.checksums import SUMS, directory_sums, format_sums
from gguf3n.publishing.measured import Measured, read_measured
from gguf3n.publishing.repository import MAX_SMALL_BYTES, open_repository
from gguf3n.recipes import VARIANT_LABELS, For, find_recipe
from gguf3n.validation.document import Table, markdown, markdown_block, markdown_code

PICTURE = "size-quality.svg"
BEGIN = re.compile(r"<!-- gguf3n:begin(?: repo=(?P<repo>[\w./-]+))? -->")
END = "<!-- gguf3n:end -->"
NO_MODELS = {
    "imatrix": "The importance matrix: for making other files, not for running.",
    "adapter": "An adapter: with llama-server, --lora and this file beside the model that it was made for.",
}
"""general.type of files that are not run by themselves, and what the card says of them."""
GOOD_BITS = 5.0
"""A weight: of a file to recommend where there is no Q4_K_M and no Q8_0."""
GIB = 1 << 30
LANGUAGE = re.compile(r"[a-z]{2,3}")


@dataclass(frozen=True)
class FileFacts:
    """What a card says of a file that its header tells.

    Args:
        name: of a split file, that of its first part.
        n_bytes: of all parts.
        kind: general.architecture, or one of NO_MODELS.
        calibration: the importance matrix and the texts that it was measured on, where there is one.
    """

    name: str
    n_bytes: int
    bits_per_weight: float
    kind: str
    calibration: str | None = None
    languages: tuple[str, ...] = ()

    @property
    def is_model(self) -> bool:
        return bool(self.kind == TEXT_ARCH)

    @property
    def label(self) -> str | None:
        return labels.hub_label(self.name)

    @property
    def recipe_name(self) -> str | None:
        """What it would be made with here, as "Q4_K_M" and "Q4_K_M@llama.cpp"; None without a label."""
        if self.label is None:
            return None
        words = VARIANT_LABELS.items()
        variant = next((it for it, word in words if f"-{word}-{self.label}.".lower() in self.name.lower()), None)
        return self.label if variant is None else f"{self.label}@{variant}"


@dataclass(frozen=True)
class CardRow:
    """A model on the card: what it is, how near to its source, and the tag that means it in both programs."""

    facts: FileFacts
    measured: Measured | None
    tag: str | None
    is_recommended: bool

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found = self.measured
        return {
            "name": self.facts.name,
            "bytes": self.facts.n_bytes,
            "bits_per_weight": self.facts.bits_per_weight,
            "label": self.facts.label,
            "tag": self.tag,
            "recommended": self.is_recommended,
            "verdict": None if found is None else found.verdict,
            "kl": None if found is None else found.kl,
            "top1": None if found is None else found.top1,
            "perplexity": None if found is None else found.perplexity,
        }


@dataclass(frozen=True)
class Card:
    """What was made: the texts by name, the models in the order of the card, and what a user should know."""

    directory: Path
    repo: str
    texts: Mapping[str, str]
    rows: tuple[CardRow, ...]
    notices: tuple[str, ...] = ()

    def write(self) -> list[Path]:
        """Write what is other than what is there. Raises: OutputError."""
        paths = [self.directory / name for name in self.texts]
        for path in paths:
            check_output(path, force=True)
        for path, said in zip(paths, self.texts.values(), strict=True):
            if not path.is_file() or read_small(path, MAX_SMALL_BYTES, OutputError) != said.encode():
                write_whole(path, said, force=True)
        return paths


def read_facts(path: str | Path) -> FileFacts:
    """What a card says of a file. Raises: GGUFError; SourceError for the file of another model."""
    gguf = open_gguf(path)
    said = gguf.keys.get(Keys.General.TYPE)
    kind = architecture(gguf) or "nothing"
    if said is not None and isinstance(said.value, str) and said.value in NO_MODELS:
        kind = said.value
    if kind not in (TEXT_ARCH, ENCODERS_ARCH, *NO_MODELS):
        raise SourceError(
            f"{path}: not a file of Gemma 3n",
            expected=f"general.architecture {TEXT_ARCH} or {ENCODERS_ARCH}, an importance matrix or an adapter",
            found=kind,
            fix="keep the files of other models in other directories",
        )
    name = labels.file_name(str(gguf.parts[0].name).replace("\\", "/"))
    return FileFacts(name, gguf.file_bytes, round(gguf.bits_per_weight, 4), kind, _calibration(gguf), _languages(gguf))


def _calibration(gguf: GGUFFile) -> str | None:
    values = [gguf.keys.get(f"quantize.imatrix.{name}") for name in ("file", "dataset", "chunks_count")]
    file, dataset, n_chunks = (None if key is None else str(key.value) for key in values)
    if file is None:
        return None
    parts = [labels.file_name(file.replace("\\", "/"))]
    if dataset:
        parts.append(f"measured on {labels.file_name(dataset.replace(chr(92), '/'))}")
    if n_chunks:
        parts.append(f"{n_chunks} chunks")
    return ", ".join(parts)


def _languages(gguf: GGUFFile) -> tuple[str, ...]:
    key = gguf.keys.get(Keys.General.LANGUAGES)
    values = key.value.head(1000) if key is not None and isinstance(key.value, GGUFArray) else []
    return tuple(value for value in values if isinstance(value, str) and LANGUAGE.fullmatch(value))


def make_card(
    directory: str | Path,
    *,
    repo: str | None = None,
    base_model: str | None = None,
    quantized_by: str | None = None,
    picture: bool = False,
    measured: Mapping[str, Measured] | None = None,
    elsewhere: Mapping[str, tuple[FileFacts, str]] | None = None,
    progress: OnProgress | None = None,
) -> Card:
    """Everything that a card says of a directory's files; `write` writes it.

    Args:
        repo: ORG/REPO, in its commands; by default the one that the card names already.
        base_model: ORG/NAME of the original; by default what the card says already.
        quantized_by: who made the files; by default what the card says already, or ORG.
        picture: draw size against KL divergence of the files that were measured.
        measured: what validation said, by name; by default what its reports in the directory say.
        elsewhere: of files that belong to the repository and are not here: what they are, and their SHA-256.
        progress: told of checksums.

    Raises: UsageError for a directory without models, options or a card that can't be used; GGUFError and SourceError,
        as `read_facts`.
    """
    directory = Path(directory)
    for option, value in (("--repo", repo), ("--base-model", base_model)):
        if value is not None and not REPO_ID.fullmatch(value):
            raise UsageError(f"{option} {value}: not the name of a repository", expected="ORG/NAME", found=value)
    if not directory.is_dir():
        raise UsageError(f"{directory}: not a directory", expected="one with GGUF files", fix="name the directory")
    if picture:
        check_matplotlib()
    away = elsewhere or {}
    paths = labels.listed({*open_repository(directory).sizes, *away})
    here = [path for path in paths if path.endswith(labels.SUFFIX) and path not in away]
    heads = [path for path in here if labels.is_first(path)]
    facts = [replace(read_facts(directory / path), name=path) for path in heads]
    facts += [replace(fact, name=name) for name, (fact, _) in away.items()]
    found = measured if measured is not None else read_measured(directory, [fact.name for fact in facts])
    rows = _rows(facts, paths, found)
    if not rows:
        raise UsageError(f"{directory}: no GGUF file of a text model", expected="one or more", fix="convert one first")
    old = read_text(directory / CARD, MAX_SMALL_BYTES, UsageError) if is_there(directory / CARD, UsageError) else ""
    before, marked, after = _around(old, str(directory / CARD))
    notices = []
    known = repo or marked
    repo = known or f"ORG/{_slug(directory)}"
    if known is None:
        notices.append(f"the card's commands name {repo}: give --repo ORG/REPO")
    front = _read_front(old, str(directory / CARD))
    base_model = base_model or _text(front.get("base_model"))
    if base_model is None and "base_model" not in front:
        notices.append("the card does not say of which model the files are: give --base-model ORG/NAME")
    texts: dict[str, str] = {}
    if picture:
        texts[PICTURE] = _picture(rows)
    has_picture = picture or PICTURE in paths
    block = _block(rows, facts, paths, repo, base_model, has_picture)
    title = "" if old else f"# {markdown(repo.rpartition('/')[2])}\n\n"
    begin = "<!-- gguf3n:begin -->" if known is None else f"<!-- gguf3n:begin repo={known} -->"
    new = f"{before}{title}{begin}\n{block}{END}{after}"
    by = quantized_by if quantized_by is not None or known is None else known.partition("/")[0]
    values = _values(rows, facts, front, base_model, by)
    texts[CARD] = front_matter.with_values(new, values)
    notice = read_text(directory / NOTICE_FILE, MAX_SMALL_BYTES, UsageError) if NOTICE_FILE in paths else ""
    if terms.SENTENCE not in notice:
        texts[NOTICE_FILE] = f"{notice.rstrip()}\n\n{terms.NOTICE}".lstrip()
    sums = directory_sums(directory, here, progress) | {name: hash for name, (_, hash) in away.items()}
    texts[SUMS] = format_sums(sums)
    return Card(directory, repo, texts, tuple(rows), tuple(notices))


def _slug(directory: Path) -> str:
    """A repository's name, made of the directory's."""
    return re.sub(r"[^\w.-]+", "-", directory.resolve().name).strip("-.") or "REPO"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and REPO_ID.fullmatch(value) else None


def _read_front(card: str, name: str) -> dict[str, Any]:
    try:
        return front_matter.parse(card)
    except ValueError as error:
        raise UsageError(
            f"{name}: its front matter can't be read",
            expected="keys and values in YAML between two lines ---",
            found=str(error),
            fix="correct it, or remove it to have it made again",
        ) from error


def _around(card: str, name: str) -> tuple[str, str | None, str]:
    """What people wrote before our part, the repository that it names, and what they wrote after it.

    Raises: UsageError where one of the two marks is missing, or stands twice.
    """
    begins, n_ends = list(BEGIN.finditer(card)), card.count(END)
    if not begins and not n_ends:
        return (card if not card or card.endswith("\n\n") else f"{card.rstrip()}\n\n"), None, "\n"
    end = card.find(END)
    if len(begins) != 1 or n_ends != 1 or end < begins[0].end():
        raise UsageError(
            f"{name}: the marks around gguf3n's part are not a pair",
            expected=f"<!-- gguf3n:begin --> and below it {END}, once each",
            found=f"{len(begins)} and {n_ends}",
            fix="remove both to have the part written at the end",
        )
    return card[: begins[0].start()], begins[0]["repo"], card[end + len(END) :]


def _rows(facts: Sequence[FileFacts], paths: Sequence[str], measured: Mapping[str, Measured]) -> list[CardRow]:
    """Models, the largest first, and which of them to recommend."""
    models = sorted((fact for fact in facts if fact.is_model), key=lambda fact: (-fact.n_bytes, fact.name))
    good = [fact for fact in models if fact.name not in measured or measured[fact.name].verdict != "fail"]
    plain = [fact for fact in good if labels.is_model(fact.name)]
    by_label = [fact for wanted in labels.DEFAULTS for fact in plain if _tag(fact, paths) == wanted]
    nearest = sorted(plain, key=lambda fact: abs(fact.bits_per_weight - GOOD_BITS))
    chosen = next(iter((*by_label, *nearest)), None)
    return [CardRow(fact, measured.get(fact.name), _tag(fact, paths), fact is chosen) for fact in models]


def _tag(fact: FileFacts, paths: Sequence[str]) -> str | None:
    """The label, where it means this file in llama.cpp and in Ollama."""
    label = fact.label
    if label is None or labels.ollama_candidates(paths, label) != [fact.name]:
        return None
    return label if labels.llama_cpp_file(paths, label) == fact.name else None


def _values(
    rows: Sequence[CardRow],
    facts: Sequence[FileFacts],
    front: Mapping[str, Any],
    base_model: str | None,
    by: str | None,
) -> dict[str, Any]:
    """The front matter: what follows from the files is said anew, of all else only what is missing."""
    sees = any(fact.kind == ENCODERS_ARCH for fact in facts)
    own = ["gguf", "gemma3n", "conversational", *(["imatrix"] if any(row.facts.calibration for row in rows) else [])]
    old = front.get("tags")
    tags = [str(tag) for tag in old] if isinstance(old, list) else [old] if isinstance(old, str) else []
    languages = list(dict.fromkeys(language for fact in facts for language in fact.languages))
    missing = {
        "license": terms.LICENSE,
        "base_model": base_model,
        "quantized_by": by,
        "language": languages or None,
    }
    values = {key: value for key, value in missing.items() if value is not None and key not in front}
    if base_model is not None and isinstance(front.get("base_model"), str | None):
        values["base_model"] = base_model
    values |= {
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": IMAGES if sees else TEXT,
        "tags": list(dict.fromkeys([*tags, *own])),
    }
    return values


def _block(
    rows: Sequence[CardRow],
    facts: Sequence[FileFacts],
    paths: Sequence[str],
    repo: str,
    base_model: str | None,
    has_picture: bool,
) -> str:
    """Our part of the card."""
    of = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model is not None else ""
    date = source_date()
    made = f"made with gguf3n {gguf3n.__version__}" + (f" on {date:%Y-%m-%d}" if date is not None else "")
    parts = [
        f"GGUF files{of} for llama.cpp, Ollama and LM Studio, {made}.",
        "## Files",
        markdown_block(_table(rows, facts)),
        *_how_measured(rows),
    ]
    if has_picture:
        parts.append(f"![Size against KL divergence of the files]({PICTURE})")
    parts += ["## Run", *_commands(rows, paths, repo), "## How they were made", *_how_made(rows, paths)]
    return "\n\n".join(parts) + "\n\n"


def _table(rows: Sequence[CardRow], facts: Sequence[FileFacts]) -> Table:
    headings = ["file", "tag", "bits", "GiB", "KL", "top-1", "perplexity", "for whom"]
    align = "<<>>>>><"
    cells = [_cells(row) for row in rows]
    cells += [[fact.name, "", *_size(fact), "", "", "", _advice(fact)] for fact in facts if not fact.is_model]
    is_measured = any(row.measured is not None and row.measured.kl is not None for row in rows)
    shown = [i for i in range(len(headings)) if is_measured or headings[i] not in ("KL", "top-1", "perplexity")]
    return Table(
        tuple(headings[i] for i in shown),
        "".join(align[i] for i in shown),
        tuple(tuple(line[i] for i in shown) for line in cells),
        names=tuple(shown.index(i) for i in (0, 1)),
    )


def _cells(row: CardRow) -> list[str]:
    found = row.measured or Measured("")
    numbers = [
        "" if found.kl is None else f"{found.kl:.4g}",
        "" if found.top1 is None else f"{found.top1:.1%}",
        "" if found.perplexity is None else f"{found.perplexity:.4g}",
    ]
    tag = "" if row.tag is None else f":{row.tag}"
    advice = " ".join(filter(None, ("Recommended." if row.is_recommended else "", _advice(row.facts))))
    if found.verdict == "fail":
        advice = f"Validation fails. {advice}"
    return [row.facts.name, tag, *_size(row.facts), *numbers, advice]


def _size(fact: FileFacts) -> list[str]:
    bits = "" if fact.kind in NO_MODELS else f"{fact.bits_per_weight:.2f}"
    return [bits, f"{fact.n_bytes / GIB:.2f}"]


def _advice(fact: FileFacts) -> str:
    """What our recipe of this name says of itself."""
    if fact.kind in NO_MODELS:
        return NO_MODELS[fact.kind]
    part = For.TEXT if fact.is_model else For.MMPROJ
    try:
        summary = "" if fact.recipe_name is None else find_recipe(fact.recipe_name, part).summary
    except UsageError:  # another's, or Unsloth's newest
        summary = ""
    return summary if fact.is_model else f"For images, beside any model above. {summary}".strip()


def _how_measured(rows: Sequence[CardRow]) -> Iterator[str]:
    found = [row.measured for row in rows if row.measured is not None and row.measured.kl is not None]
    if not found:
        return
    first = found[0]
    against = ""
    if first.engine is not None and first.reference is not None:
        against = f" {markdown(first.engine)} with the file against {markdown(first.reference)}"
    positions = f" at {first.n_positions:,} positions of a text" if first.n_positions is not None else ""
    theirs = (
        f" The original's perplexity there is {first.reference_perplexity:.4g}."
        if first.reference_perplexity is not None
        else ""
    )
    yield (
        f"KL: mean KL divergence of next-token distributions in nats,{against}{positions}; smaller is nearer to the "
        f"original. Top-1: how often both hold the same token likeliest.{theirs} Measured with `gguf3n validate`."
    )


def _commands(rows: Sequence[CardRow], paths: Sequence[str], repo: str) -> Iterator[str]:
    """For the recommended file, or else the first: by its tag where that means it everywhere, else by its name."""
    row = next((row for row in rows if row.is_recommended), rows[0])
    name = shlex.quote(row.facts.name)
    commands = [
        ("llama.cpp", f"llama-server -hf {repo}:{row.tag}" if row.tag else f"llama-server -hf {repo} -hff {name}"),
        ("Ollama", f"ollama run hf.co/{repo}:{row.tag}" if row.tag else f"ollama run hf.co/{repo}:{name}"),
        ("LM Studio", f"lms get {repo}@{row.tag}" if row.tag else f"lms get https://huggingface.co/{repo}"),
        ("Download", f"hf download {repo} {name} --local-dir ."),
    ]
    if labels.split_part(row.facts.name) is not None:
        commands = [command for command in commands if command[0] != "Ollama"]
    for program, command in commands:
        yield f"{program}:"
        yield f"```\n{one_line(command)}\n```"
    sees = labels.llama_cpp_mmproj(paths, row.facts.name)
    if sees is not None:
        yield (
            f"For images llama.cpp takes {markdown_code(sees)} by itself; with `-m` give it with `--mmproj`. LM Studio "
            "finds it in the same folder."
        )
    yield "The chat format is Gemma's, and stands in the files. Take temperature 1.0, top-k 64, top-p 0.95, min-p 0:"
    yield "```\n<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n```"


def _how_made(rows: Sequence[CardRow], paths: Sequence[str]) -> Iterator[str]:
    by_matrix: dict[str | None, list[str]] = {}
    for row in rows:
        by_matrix.setdefault(row.facts.calibration, []).append(row.facts.recipe_name or row.facts.name)
    for matrix, names in by_matrix.items():
        which = ", ".join(dict.fromkeys(map(markdown, names)))
        how = "without an importance matrix" if matrix is None else f"with the importance matrix {markdown(matrix)}"
        yield f"- {which}: {how}."
    if any(path.endswith(".manifest.json") for path in paths):
        yield "Beside each file stands a manifest: `gguf3n verify FILE --source SRC` makes the file again and compares."
    yield "Checksums: `sha256sum -c SHA256SUMS`."
    yield (
        f"{markdown(terms.SENTENCE)} (see [{NOTICE_FILE}]({NOTICE_FILE})). "
        "The files are modified: converted and quantized."
    )


def _picture(rows: Sequence[CardRow]) -> str:
    points = [
        SizePoint(row.facts.recipe_name or row.facts.name, row.facts.n_bytes, row.measured.kl, row.is_recommended)
        for row in rows
        if row.measured is not None and row.measured.kl is not None
    ]
    if not points:
        raise UsageError(
            "--picture: nothing was measured",
            expected="reports of `gguf3n validate --json` with the stage logits beside the files",
            fix="gguf3n validate FILE --reference SRC --json > FILE.validate.json",
        )
    return size_svg(points)
