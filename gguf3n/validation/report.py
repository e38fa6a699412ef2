"""A validation as one page that a publisher can link: HTML with the plot inside, or Markdown for a model card.

The page is made once as a document of sections, tables and texts, then written in either form. What a file says of
itself (names, problems) is only ever text in it: escaped, control characters replaced, and the HTML page forbids itself
to load anything.
"""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import math
import os
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from gguf.constants import Keys

from gguf3n.errors import GGUFError, UsageError
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.hub import is_repo_id
from gguf3n.formats.whole_file import check_output, write_whole
from gguf3n.inspection.lint import Severity
from gguf3n.inspection.summary import file_type_name
from gguf3n.plots import LayerError, check_matplotlib, error_svg
from gguf3n.validation.divergence import Divergence
from gguf3n.validation.logits import LogitsResult
from gguf3n.validation.result import Problem, Stage, StageResult, Verdict
from gguf3n.validation.structure import StructureResult
from gguf3n.validation.tensors import TensorError, TensorsResult
from gguf3n.validation.tokens import TokensResult
from gguf3n.validation.validate import Validation

SUFFIXES = (".html", ".md")
N_WORST = 20
N_PROBLEMS = 50
HASH_BYTES = 1 << 22

PACKAGES: tuple[tuple[str, str], ...] = (
    ("gguf3n", "gguf3n"),
    ("xllamacpp", "llama.cpp (xllamacpp)"),
    ("transformers", "transformers"),
    ("torch", "torch"),
)
"""Distribution, what it is called on the page; those that are not installed are left out."""

COMPARES: dict[Stage, str] = {
    Stage.STRUCTURE: "keys, tensor table and layout with what the source and llama.cpp ask for",
    Stage.TENSORS: "every weight, dequantized, with the source's weights",
    Stage.TOKENS: "llama.cpp's token ids with the reference tokenizer's",
    Stage.LOGITS: "llama.cpp's next-token distributions with the reference model's",
}

VERDICTS: dict[Verdict, str] = {
    Verdict.PASS: "This file is what its source says it should be, as far as the stages below tell.",
    Verdict.WARN: "This file works; something is not quite as it should be.",
    Verdict.FAIL: "This file is not what its source says it should be.",
}


@dataclass(frozen=True)
class Table:
    """`align` has one of "<" and ">" for each column; cells of columns in `names` are names of a file."""

    headings: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    names: tuple[int, ...] = ()


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Command:
    """Something to type."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An SVG element, and the table that stands for it where there are no pictures."""

    svg: str
    caption: str
    table: Table


@dataclass(frozen=True)
class Problems:
    """What is wrong, the worst first."""

    problems: tuple[Problem, ...]


Block = Table | Text | Command | Picture | Problems


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    verdict: Verdict | None
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """The page, before it is HTML or Markdown. `facts` are label and value."""

    title: str
    verdict: Verdict
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


def check_report(path: Path, *, force: bool) -> None:
    """Refuse a report that can't be written, before any work is done.

    Raises: UsageError for another suffix, or for a page with a picture and no matplotlib; OutputError for a path that
        can't be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: no such kind of report", expected=f"a name ending in {' or '.join(SUFFIXES)}")
    if path.suffix.lower() == ".html":
        check_matplotlib()
    check_output(path, force=force)


def write_report(
    validation: Validation,
    path: Path,
    *,
    force: bool = False,
    command: str | None = None,
    now: datetime | None = None,
) -> None:
    """Write the page.

    Args:
        path: ends in .html or .md.
        command: what was typed; by default the shortest command that runs the same stages.
        now: the date on the page; by default the present one.

    Raises: as `check_report`.
    """
    check_report(path, force=force)
    is_html = path.suffix.lower() == ".html"
    page = document(validation, command=command, now=now, with_pictures=is_html)
    write_whole(path, (as_html(page) if is_html else as_markdown(page)).encode(), force=force)


def document(
    validation: Validation, *, command: str | None = None, now: datetime | None = None, with_pictures: bool = True
) -> Document:
    """Everything that stands on the page."""
    date = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    reference = _public_name(validation.reference)
    facts = [
        *_file_facts(validation.path),
        ("reference", reference),
        ("validated", f"{date:%Y-%m-%d %H:%M} UTC"),
        ("versions", ", ".join(_versions())),
    ]
    stages = validation.stages.items()
    rows = tuple(
        (stage.value, COMPARES[stage], result.verdict.value, str(len(result.problems)), f"{result.seconds:.1f} s")
        for stage, result in stages
    )
    overview = Table(("stage", "compares", "verdict", "problems", "took"), "<<<>>", rows)
    left_out = [stage.value for stage in Stage if stage not in validation.stages]
    blocks: tuple[Block, ...] = (overview,)
    if left_out:
        blocks = (overview, Text(f"Not run: {', '.join(left_out)}."))
    return Document(
        validation.path.name,
        validation.verdict,
        tuple(facts),
        (
            Section("Stages", None, blocks),
            *(_section(stage, result, with_pictures) for stage, result in stages),
            Section("To reproduce", None, (Command(command or _command(validation, reference)),)),
        ),
    )


def _public_name(reference: str) -> str:
    """Of a local path its last part. Why: where a publisher keeps files is nobody's business."""
    return reference if is_repo_id(reference) else os.path.basename(os.path.abspath(reference))


def _file_facts(path: Path) -> Iterator[tuple[str, str]]:
    """Name, size and hash of the file, or of each part of a split one, and its quantization."""
    files, quantization = [path], None
    try:
        gguf = open_gguf(path, strict=False)
        files = [Path(part.name) for part in gguf.parts]
        key = gguf.keys.get(Keys.General.FILE_TYPE)
        quantization = "not said" if key is None else file_type_name(key.value)
        quantization += f", {gguf.bits_per_weight:.2f} bits a weight"
    except GGUFError:
        pass  # what is wrong stands under its stage
    for file in files:
        yield "file", f"{file.name}, {file.stat().st_size:,} bytes"
        yield "SHA-256", _sha256(file)
    if quantization is not None:
        yield "quantization", quantization


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(HASH_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _versions() -> Iterator[str]:
    for package, name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def _command(validation: Validation, reference: str) -> str:
    words = ["gguf3n", "validate", validation.path.name, "--reference", reference]
    if len(validation.stages) < len(Stage):
        words += ["--stages", ",".join(stage.value for stage in validation.stages)]
    return shlex.join(words)


def _section(stage: Stage, result: StageResult, with_pictures: bool) -> Section:
    ordered = sorted(result.problems, key=lambda problem: -list(Verdict).index(problem.verdict))
    blocks: list[Block] = [Problems(tuple(ordered)) if ordered else Text("No problems.")]
    if isinstance(result, StructureResult):
        lint = result.lint
        counts = ", ".join(f"{lint.count(severity)} {severity.name.lower()}s" for severity in Severity)
        blocks.append(Text(f"{lint.n_checks} checks: {counts}."))
    elif isinstance(result, TensorsResult):
        blocks += _tensor_blocks(result, with_pictures)
    elif isinstance(result, TokensResult):
        blocks.append(Text(f"{result.n_texts:,} texts, {result.n_tokens:,} tokens by the reference's count."))
    elif isinstance(result, LogitsResult):
        blocks += [Text(_logits_text(result)), _divergence_table(result.divergence)]
    return Section(stage.value.capitalize(), result.verdict, tuple(blocks))


def _logits_text(result: LogitsResult) -> str:
    limits = result.limits
    return (
        f"{result.engine} with this file against {result.reference}: {result.n_chunks:,} chunks of {result.n_ctx:,} "
        f"tokens, the second half of each scored, over {result.n_vocab:,} tokens. Most weights of the layers are "
        f"{result.base_qtype.name}; a mean divergence of up to {limits.good:.3g} passes for it, one of up to "
        f"{limits.poor:.3g} warns."
    )


def _divergence_table(divergence: Divergence) -> Table:
    rows = [
        ("positions compared", f"{divergence.n_positions:,}"),
        ("KL divergence, mean", f"{divergence.mean:.3g}"),
        ("KL divergence, median", f"{divergence.median:.3g}"),
        ("KL divergence, 95th percentile", f"{divergence.p95:.3g}"),
        ("KL divergence, 99th percentile", f"{divergence.p99:.3g}"),
        ("KL divergence, maximum", f"{divergence.maximum:.3g}"),
        ("the most likely token is the same", f"{divergence.top1_agreement:.2%}"),
        ("of the five most likely are the same", f"{divergence.top5_agreement:.2%}"),
    ]
    perplexities = (("the reference", divergence.reference_perplexity), ("this file", divergence.candidate_perplexity))
    rows += [(f"perplexity of {who}", f"{value:.4f}") for who, value in perplexities if value is not None]
    return Table(("measure (divergences in nats)", "value"), "<>", tuple(rows))


def _tensor_blocks(result: TensorsResult, with_pictures: bool) -> Iterator[Block]:
    errors = result.errors
    if not errors:
        return
    wrong = {problem.where for problem in result.problems}
    yield Text(
        f"{len(errors):,} tensors; of {result.n_identical:,}, the sampled rows have the bytes that gguf3n's own "
        "quantizers make of the source."
    )
    for note in result.notes:
        yield Text(note)
    by_type: dict[str, list[TensorError]] = {}
    for error in errors:
        by_type.setdefault(error.qtype.name, []).append(error)
    rows = tuple(
        (
            name,
            str(len(group)),
            *_spread(error.rms_error for error in group),
            f"{min(error.expected[0] for error in group):.3g} to {max(error.expected[1] for error in group):.3g}",
            str(sum(error.name in wrong for error in group)),
        )
        for name, group in sorted(by_type.items(), key=lambda item: -len(item[1]))
    )
    headings = ("type", "tensors", "least error", "median", "largest", "expected", "problems")
    yield Text("Relative RMS error: the root mean square of the difference, over that of the source's weights.")
    yield Table(headings, "<>>>>>>", rows)
    layers = [LayerError(_kind(e.name), e.bid, e.rms_error, e.name in wrong) for e in errors]
    if any(0 < layer.error < math.inf for layer in layers):
        caption = "Relative RMS error of each layer's tensors"
        if with_pictures:
            yield Picture(error_svg(layers), caption, _kind_table(errors))
        else:
            yield Text(f"{caption}, by kind:")
            yield _kind_table(errors)
    worst = tuple(
        (
            error.name,
            error.qtype.name,
            f"{error.rms_error:.3g}",
            f"{error.expected[0]:.3g} to {error.expected[1]:.3g}",
            f"{error.max_error:.3g}",
            f"{error.cosine:.6f}",
            f"{error.worst_row:,} ({error.worst_row_error:.3g})",
        )
        for error in errors[:N_WORST]
    )
    yield Text(f"The worst {len(worst)} of {len(errors):,} tensors:")
    yield Table(("tensor", "type", "error", "expected", "maximum", "cosine", "worst row"), "<<>>>>>", worst, (0,))


def _kind(name: str) -> str:
    """As in "attn_q" for "blk.3.attn_q.weight"."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def _spread(values: Iterable[float]) -> tuple[str, str, str]:
    found = list(values)
    return f"{min(found):.3g}", f"{median(found):.3g}", f"{max(found):.3g}"


def _kind_table(errors: Sequence[TensorError]) -> Table:
    """Each kind of tensor and where its error is largest; without those that have none."""
    kinds: dict[str, list[TensorError]] = {}
    for error in errors:
        kinds.setdefault(_kind(error.name), []).append(error)
    rows = []
    for kind, group in sorted(kinds.items()):
        largest = max(group, key=lambda error: error.rms_error)
        if largest.rms_error != 0:
            layer = "-" if largest.bid is None else str(largest.bid)
            rows.append((kind, *_spread(error.rms_error for error in group), layer))
    return Table(("kind", "least error", "median", "largest", "in layer"), "<>>>>", tuple(rows), (0,))


def _clean(text: str) -> str:
    """One line, without characters that change what stands around them."""
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in " ".join(text.splitlines()))


STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --page: #fff; --faint: #59636e; --line: #d1d9e0; --box: #f6f8fa;
  --pass: #1a7f37; --warn: #8a5a00; --fail: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --page: #0d1117; --faint: #9198a1; --line: #3d444d;
  --box: #151b23; --pass: #3fb950; --warn: #d29922; --fail: #ff7b72; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
.pass { color: var(--pass); } .warn { color: var(--warn); } .fail { color: var(--fail); }
.verdict { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 600; } .right { text-align: right; white-space: nowrap; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; }
pre { background: var(--box); padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; }
figure { margin: 1.5rem 0; } figcaption { color: var(--faint); } svg { width: 100%; min-width: 44rem; height: auto; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
"""


def as_html(page: Document) -> str:
    """One self-contained page, for a light and a dark screen, without scripts."""
    title = _html(page.title)
    facts = "\n".join(f"<dt>{_html(label)}</dt><dd>{_html(value)}</dd>" for label, value in page.facts)
    sections = "\n".join(_html_section(section) for section in page.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}: {page.verdict.value}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="verdict {page.verdict.value}">{page.verdict.value.upper()}: {VERDICTS[page.verdict]}</p>
<dl>
{facts}
</dl>
{sections}
</body>
</html>
"""


def _html(text: str) -> str:
    return html.escape(_clean(text))


def _html_section(section: Section) -> str:
    verdict = ""
    if section.verdict is not None:
        verdict = f': <span class="{section.verdict.value}">{section.verdict.value}</span>'
    blocks = "\n".join(_html_block(block) for block in section.blocks)
    return f"<section>\n<h2>{_html(section.title)}{verdict}</h2>\n{blocks}\n</section>"


def _html_block(block: Block) -> str:
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Command):
        return f"<pre>{_html(block.text)}</pre>"
    if isinstance(block, Picture):
        caption = _html(block.caption)
        svg = re.sub(r"<metadata>.*?</metadata>", "", block.svg, flags=re.DOTALL)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
        table = f"<details>\n<summary>as a table</summary>\n{_html_table(block.table)}\n</details>"
        return f'<figure>\n<div class="wide">{svg}</div>\n<figcaption>{caption}</figcaption>\n{table}\n</figure>'
    if isinstance(block, Problems):
        items = [
            f'<li><span class="{p.verdict.value}">{p.verdict.value}</span> <code>{_html(p.where)}</code>: '
            f"{_html(p.what)}</li>"
            for p in block.problems[:N_PROBLEMS]
        ]
        more = len(block.problems) - N_PROBLEMS
        return "<ul>\n" + "\n".join([*items, *([f"<li>and {more} more</li>"] if more > 0 else [])]) + "\n</ul>"
    return f"<p>{_html(block.text)}</p>"


def _html_table(table: Table) -> str:
    marks = [' class="right"' if side == ">" else "" for side in table.align]
    lines = ['<div class="wide"><table>']
    cells = (f'<th scope="col"{mark}>{_html(text)}</th>' for text, mark in zip(table.headings, marks, strict=True))
    lines.append(f"<thead><tr>{''.join(cells)}</tr></thead>\n<tbody>")
    for row in table.rows:
        texts = (f"<code>{_html(cell)}</code>" if i in table.names else _html(cell) for i, cell in enumerate(row))
        cells = (f"<td{mark}>{text}</td>" for text, mark in zip(texts, marks, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def as_markdown(page: Document) -> str:
    """GitHub's Markdown, as the Hub's model cards have it."""
    verdict = f"**{page.verdict.value.upper()}**: {VERDICTS[page.verdict]}"
    facts = Table(("", ""), "<<", page.facts)
    parts = [f"# {_markdown(page.title)}", verdict, _markdown_table(facts)]
    for section in page.sections:
        title = section.title if section.verdict is None else f"{section.title}: {section.verdict.value}"
        parts += [f"## {title}", *(_markdown_block(block) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    """Text that means nothing but itself: no markup, HTML, link, address or mention."""
    text = re.sub(r"([\\`*_\[\]<>#!|~&$@])", r"\\\1", _clean(text))
    return re.sub(r"(?i)(www)\.", r"\1\\.", text.replace("://", "\\://"))


def _markdown_code(text: str, *, in_table: bool = False) -> str:
    """A code span. Source: CommonMark, section 6.1; tables of GFM want their bars escaped even there."""
    text = _clean(text)
    if in_table:
        text = text.replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _markdown_block(block: Block) -> str:
    if isinstance(block, Table):
        return _markdown_table(block)
    if isinstance(block, Command):
        return f"    {_clean(block.text)}"
    if isinstance(block, Picture):
        return _markdown_table(block.table)
    if isinstance(block, Problems):
        lines = [
            f"- **{p.verdict.value}** {_markdown_code(p.where)}: {_markdown(p.what)}"
            for p in block.problems[:N_PROBLEMS]
        ]
        more = len(block.problems) - N_PROBLEMS
        return "\n".join([*lines, *([f"- and {more} more"] if more > 0 else [])])
    return _markdown(block.text)


def _markdown_table(table: Table) -> str:
    lines = [f"| {' | '.join(table.headings)} |", f"|{'|'.join('---' if s == '<' else '--:' for s in table.align)}|"]
    for row in table.rows:
        cells = (
            _markdown_code(cell, in_table=True) if i in table.names else _markdown(cell) for i, cell in enumerate(row)
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
