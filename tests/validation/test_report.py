"""The page about a validation: all numbers on it, nothing that a file says but as text, whole in itself."""

from __future__ import annotations

import hashlib
import html.parser
import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import gguf3n
from gguf3n.errors import OutputError, UsageError
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType
from gguf3n.formats.gguf_writer import lay_out
from gguf3n.formats.whole_file import WholeFile
from gguf3n.inspection import lint
from gguf3n.validation import document as pages
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.divergence import Divergence
from gguf3n.validation.document import as_html, as_markdown
from gguf3n.validation.logits import Limits, LogitsResult
from gguf3n.validation.report import check_report, document, write_report
from gguf3n.validation.result import Problem, Stage, StageResult, Verdict
from gguf3n.validation.structure import StructureResult
from gguf3n.validation.tensor_errors import TensorError, TensorsResult
from gguf3n.validation.tokens import TokensResult
from gguf3n.validation.validate import Validation

NOW = datetime(2026, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=2)))
HOSTILE = '</code><script>alert(1)</script> & "q" | `x` *b* [a](https://e.x) ![i](u) @you www.e.x \u202e\x07\n# x'
CLEANED = HOSTILE.replace("\n", " ").replace("\u202e", "\ufffd").replace("\x07", "\ufffd")


def error(name: str, qtype: QType, rms_error: float, bid: int | None = None) -> TensorError:
    return TensorError(
        name=name, qtype=qtype, bid=bid, shape=(4, 256), rms_error=rms_error, max_error=0.125, cosine=0.987654,
        expected=(0.06, 0.08), worst_row=1234, worst_row_error=0.5, ratio=1.0, misplaced=0.0, identical=rms_error < 1,
    )  # fmt: skip


ERRORS = (
    error("blk.1.attn_q.weight", QType.Q4_K, 1.41, 1),
    *(error(f"blk.{bid}.ffn_down.weight", QType.Q6_K, 0.021 + bid / 1000, bid) for bid in range(30)),
    error("token_embd.weight", QType.Q6_K, 0.02),
    error("blk.0.attn_norm.weight", QType.F32, 0.0, 0),
)
DIVERGENCE = Divergence(
    n_positions=1023, mean=0.0123, median=0.00456, p95=0.0789, p99=0.0987, maximum=1.5, top1_agreement=0.9512,
    top5_agreement=0.9321, reference_perplexity=12.3456, candidate_perplexity=12.6543,
)  # fmt: skip


def stages(problems: tuple[Problem, ...] = ()) -> Mapping[Stage, StageResult]:
    return {
        Stage.STRUCTURE: StructureResult((), 0.25, lint.Report("x", (), 47)),
        Stage.TENSORS: TensorsResult(problems, 3.75, ERRORS, weighted=False, notes=("a note",)),
        Stage.TOKENS: TokensResult((), 1.5, 62, 8123),
        Stage.LOGITS: LogitsResult(
            (),
            71.25,
            DIVERGENCE,
            QType.Q4_K,
            Limits(0.011, 0.099, 0.5),
            "llama.cpp",
            "transformers",
            512,
            2,
            1088,
            replace(DIVERGENCE, mean=0.000321, top1_agreement=0.9876),
        ),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model-Q4_K_M.gguf"
    keys = [KeyValue("general.file_type", GGUFValueType.UINT32, 15)]
    layout = lay_out(keys, [("token_embd.weight", (4, 256), QType.Q8_0)])
    path.write_bytes(layout.header + bytes(layout.total_bytes - len(layout.header)))
    return path


def validation(
    file: Path, results: Mapping[Stage, StageResult] | None = None, reference: str = "google/gemma-3n-E2B-it"
) -> Validation:
    return Validation(Candidate(file), reference, stages() if results is None else results)


class Page(html.parser.HTMLParser):
    """The elements, attributes and text of a page; fails where elements are not closed in order."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


NUMBERS = (
    "1,023", "0.0123", "0.00456", "0.0789", "0.0987", "1.5", "95.12%", "93.21%", "12.3456", "12.6543",  # logits
    "mean 0.000321 nats, top-1 98.8%",
    "llama.cpp with this file against transformers: 2 chunks of 512 tokens", "up to 0.011 passes", "0.099 warns",
    "62 texts, 8,123 tokens", "47 checks: 0 errors", "0.2 s", "3.8 s", "71.2 s",
    "33 tensors; of 32, the sampled rows", "a note", "1.41", "0.06 to 0.08", "0.125", "0.987654", "1,234 (0.5)",
    "2026-03-04 03:06 UTC", "gguf3n " + gguf3n.__version__, "torch ", "transformers ", "xllamacpp",
    "The worst 20 of 33 tensors",
)  # fmt: skip


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_everything_stands_on_the_page(file: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"report{suffix}"
    wrong = (Problem(Verdict.FAIL, "blk.1.attn_q.weight", "it is another layer's"),)
    write_report(validation(file, stages(wrong)), path, now=NOW)
    text = path.read_text("utf-8")
    shown = Page(text).text if suffix == ".html" else re.sub(r"\\(.)", r"\1", text)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for wanted in (
        *NUMBERS, file.name, f"{file.stat().st_size:,} bytes", digest, "15 (MOSTLY_Q4_K_M)", "8.50 bits a weight",
        "google/gemma-3n-E2B-it", "FAIL", "it is another layer's", "blk.1.attn_q.weight",
        "gguf3n validate model-Q4_K_M.gguf --reference google/gemma-3n-E2B-it",
    ):  # fmt: skip
        assert wanted in shown, wanted


def test_the_page_is_whole_in_itself(file: Path, tmp_path: Path) -> None:
    write_report(validation(file), tmp_path / "x.html", now=NOW)
    text = (tmp_path / "x.html").read_text("utf-8")
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image"}
    assert not re.search(r"""(?:href|src)=["'](?!#)|url\((?!#)|@import""", text)
    assert any("Content-Security-Policy" in attributes.values() for _, attributes in page.elements)
    assert "prefers-color-scheme: dark" in text
    svg = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(svg) == 1 and svg[0]["role"] == "img" and svg[0]["aria-label"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "ffn_down" in page.text and "relative RMS error" in page.text  # the picture's own text


def test_tables_count_the_tensors_of_each_type(file: Path) -> None:
    wrong = (Problem(Verdict.FAIL, "blk.1.attn_q.weight", "wrong"),)
    page = document(validation(file, stages(wrong)), now=NOW, with_pictures=False)
    (section,) = [section for section in page.sections if section.title == "Tensors"]
    tables = [block for block in section.blocks if isinstance(block, pages.Table)]
    assert tables[0].rows == (
        ("Q6_K", "31", "0.02", "0.035", "0.05", "0.06 to 0.08", "0"),
        ("Q4_K", "1", "1.41", "1.41", "1.41", "0.06 to 0.08", "1"),
        ("F32", "1", "0", "0", "0", "0.06 to 0.08", "0"),
    )
    assert tables[1].rows == (
        ("attn_q", "1.41", "1.41", "1.41", "1"),
        ("ffn_down", "0.021", "0.0355", "0.05", "29"),
        ("token_embd", "0.02", "0.02", "0.02", "-"),
    )
    assert [row[0] for row in tables[2].rows] == [error.name for error in ERRORS[:20]]


def test_what_a_file_says_is_only_text_in_html(file: Path, tmp_path: Path) -> None:
    hostile = file.rename(tmp_path / 'a<b>"&.gguf')
    results = {
        **stages((Problem(Verdict.FAIL, HOSTILE, HOSTILE),)),
        Stage.TENSORS: TensorsResult(
            (Problem(Verdict.FAIL, HOSTILE, HOSTILE),), 1.0, (error(HOSTILE, QType.Q4_K, 0.07, 1),), weighted=False
        ),
    }
    write_report(validation(hostile, results, HOSTILE), tmp_path / "x.html", command=HOSTILE, now=NOW)
    page = Page((tmp_path / "x.html").read_text("utf-8"))
    assert "script" not in page.tags
    assert page.text.count('</code><script>alert(1)</script> & "q"') >= 4
    assert 'a<b>"&.gguf' in page.text
    assert not any(c in page.text for c in "\u202e\x07")


def rendered(markdown: str) -> Page:
    return Page(MarkdownIt("commonmark").enable("table").render(markdown))


def test_what_a_file_says_is_only_text_in_markdown(file: Path) -> None:
    problem = Problem(Verdict.WARN, HOSTILE, HOSTILE)
    tensors = TensorsResult((problem,), 1.0, (error(HOSTILE, QType.Q4_K, 0.07, 1),), weighted=False, notes=(HOSTILE,))
    results = {Stage.TENSORS: tensors}
    text = as_markdown(document(validation(file, results, HOSTILE), now=NOW, with_pictures=False))
    page = rendered(text)
    table = {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.tags == {"h1", "h2", "p", "strong", "ul", "li", "code", "pre", *table}
    assert [tag for tag, _ in page.elements].count("h1") == 1
    assert page.text.count(CLEANED) == 5  # both parts of the problem, the note, and two tables
    assert not any(c in text for c in "\u202e\x07")
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)|^    .*", "", text, flags=re.MULTILINE)  # without code
    for linked in ("@you", "https://", "www.e"):  # what GitHub's own rules make links of
        assert linked in HOSTILE and not re.search(r"(?<!\\)" + re.escape(linked), outside)


@pytest.mark.parametrize("text", ["a", "`", "``", "a`b``c", "`a`", "a\\", "<b>", "*x* _y_ [z](u)", "&amp;", " a"])
def test_names_are_code_whatever_they_are(text: str) -> None:
    in_table = pages.markdown_code(text + "|" + text, in_table=True)
    for markdown, wanted in (
        (pages.markdown_code(text + "|"), f"{text.strip()}|"),
        (f"|x|y|\n|-|-|\n| {in_table} | 1 |", f"x y {text.strip()}|{text} 1"),
    ):
        page = rendered(markdown)
        assert "code" in page.tags and not page.tags & {"em", "a", "b"}
        assert page.text == wanted


def test_a_file_that_cannot_be_opened_has_a_page(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"GGUF\x03\0")
    broken = StageResult((Problem(Verdict.FAIL, file.name, "truncated"),), 0.0)
    results = {Stage.STRUCTURE: broken, Stage.TENSORS: broken}
    write_report(validation(file, results), tmp_path / "x.html", now=NOW)
    page = Page((tmp_path / "x.html").read_text("utf-8"))
    assert "truncated" in page.text and "6 bytes" in page.text and "svg" not in page.tags
    assert "Not run: tokens, logits." in page.text
    assert "--stages structure,tensors" in page.text


def test_stages_without_what_they_may_lack(file: Path) -> None:
    results = {
        Stage.TENSORS: TensorsResult((), 1.0, (), weighted=False),
        Stage.LOGITS: replace(
            stages()[Stage.LOGITS],
            divergence=replace(DIVERGENCE, reference_perplexity=None, candidate_perplexity=None, mean=math.inf),
        ),
    }
    text = as_html(document(validation(file, results), now=NOW))
    assert "perplexity" not in Page(text).text and "inf" in Page(text).text


def test_many_problems_are_cut(file: Path) -> None:
    problems = tuple(Problem(Verdict.WARN, f"t{i}", "odd") for i in range(80))
    results = {Stage.TENSORS: TensorsResult((*problems, Problem(Verdict.FAIL, "worst", "bad")), 1.0, (), False)}
    for make in (as_html, as_markdown):
        text = make(document(validation(file, results), now=NOW))
        assert text.count("odd") == pages.N_PROBLEMS - 1 and "and 31 more" in text
        assert text.index("worst") < text.index("t0")


def test_the_path_of_a_local_reference_is_not_published(file: Path, tmp_path: Path) -> None:
    text = as_markdown(document(validation(file, reference=str(tmp_path / "My Model")), now=NOW))
    assert str(tmp_path) not in text and "--reference 'My Model'" in text


def test_all_parts_of_a_split_file_have_their_hash(file: Path, tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for number, part in enumerate(parts):
        keys = [
            KeyValue("split.no", GGUFValueType.UINT16, number),
            KeyValue("split.count", GGUFValueType.UINT16, 2),
            KeyValue("split.tensors.count", GGUFValueType.INT32, 2),
        ]
        layout = lay_out(keys, [(f"{number}.weight", (32,), QType.F32)])
        part.write_bytes(layout.header + bytes(layout.total_bytes - len(layout.header)))
    facts = document(validation(parts[0], {}), now=NOW).facts
    hashes = [value for label, value in facts if label == "SHA-256"]
    assert hashes == [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]


def test_reports_that_cannot_be_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"\.html or \.md"):
        check_report(tmp_path / "x.pdf", force=False)
    (tmp_path / "x.md").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        write_report(validation(file), tmp_path / "x.md")
    assert (tmp_path / "x.md").read_text() == "mine"
    write_report(validation(file), tmp_path / "x.md", force=True)
    assert (tmp_path / "x.md").read_text("utf-8").startswith("# model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_report(tmp_path / "y.md", force=False)
    with pytest.raises(UsageError, match=r"gguf3n\[plot\]"):
        check_report(tmp_path / "y.html", force=False)


def test_a_full_disk_leaves_no_half_page(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = WholeFile.write

    def run_full(whole: WholeFile, data: bytes) -> None:
        write(whole, data[:100])
        raise OutputError("the disk is full")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(WholeFile, "write", run_full)
    with pytest.raises(OutputError, match="full"):
        write_report(validation(file), tmp_path / "out" / "x.md", now=NOW)
    assert not list((tmp_path / "out").iterdir())
