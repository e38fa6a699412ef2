"""A page before it is HTML or Markdown: sections of tables, texts and pictures, and how each is written.

What a file says of itself (names, problems) is only ever text in it: escaped, control characters replaced, and the
HTML page forbids itself to load anything.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from gguf3n.outside import masked, one_line
from gguf3n.validation.result import Problem, Verdict

N_PROBLEMS = 50

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


def _clean(text: str) -> str:
    """One line, without secrets and without characters that change what stands around them."""
    return one_line(masked(text))


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
    parts = [f"# {markdown(page.title)}", verdict, _markdown_table(facts)]
    for section in page.sections:
        title = section.title if section.verdict is None else f"{section.title}: {section.verdict.value}"
        parts += [f"## {title}", *(markdown_block(block) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def markdown(text: str) -> str:
    """Text that means nothing but itself: no markup, HTML, link, address or mention."""
    text = re.sub(r"([\\`*_\[\]<>#!|~&$@])", r"\\\1", _clean(text))
    return re.sub(r"(?i)(www)\.", r"\1\\.", text.replace("://", "\\://"))


def markdown_code(text: str, *, in_table: bool = False) -> str:
    """A code span. Source: CommonMark, section 6.1; tables of GFM want their bars escaped even there."""
    text = _clean(text)
    if in_table:
        text = text.replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def markdown_block(block: Block) -> str:
    """A part of a page."""
    if isinstance(block, Table):
        return _markdown_table(block)
    if isinstance(block, Command):
        return f"    {_clean(block.text)}"
    if isinstance(block, Picture):
        return _markdown_table(block.table)
    if isinstance(block, Problems):
        lines = [
            f"- **{p.verdict.value}** {markdown_code(p.where)}: {markdown(p.what)}" for p in block.problems[:N_PROBLEMS]
        ]
        more = len(block.problems) - N_PROBLEMS
        return "\n".join([*lines, *([f"- and {more} more"] if more > 0 else [])])
    return markdown(block.text)


def _markdown_table(table: Table) -> str:
    lines = [f"| {' | '.join(table.headings)} |", f"|{'|'.join('---' if s == '<' else '--:' for s in table.align)}|"]
    for row in table.rows:
        cells = (
            markdown_code(cell, in_table=True) if cell and i in table.names else markdown(cell)
            for i, cell in enumerate(row)
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
