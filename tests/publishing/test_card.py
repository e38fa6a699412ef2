"""A repository's card: what it says, that its commands resolve, that people's text stays and the bytes are the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

import gguf3n
from gguf3n.dates import source_date
from gguf3n.errors import Gguf3nError, OutputError, UsageError
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.imatrix import Entry, ImportanceMatrix, write_imatrix
from gguf3n.plots import SizePoint, size_svg
from gguf3n.publishing import front_matter, labels
from gguf3n.publishing.card import END, FileFacts, Measured, make_card, read_facts
from gguf3n.publishing.checks import TAGGED, lint_repository
from gguf3n.publishing.measured import read_measured
from gguf3n.publishing.terms import SENTENCE
from tests.command_line import Run
from tests.inspection.faults import set_key

REPO, BASE = "me/tiny-GGUF", "google/gemma-3n-E2B-it"
QUANTS = ("Q8_0", "Q4_K_M", "Q4_0", "Q4_0@llama.cpp")


@pytest.fixture(scope="module")
def made(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GGUF files without anything beside them. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    gguf3n.convert(make_checkpoint(multimodal=True), QUANTS, folder, mmproj="F16", audio=False)
    for path in folder.iterdir():
        path.rename(folder / re.sub("checkpoint-[^-]+-[^-]+?(?=-(llama|Q|F))", "tiny", path.name))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny-GGUF"))


def report(folder: Path, name: str, kl: float | None = 0.02, verdict: str = "pass", **changes: Any) -> Path:
    """What `gguf3n validate --json` prints of a file."""
    divergence = {
        "mean": kl, "top1_agreement": 0.95, "candidate_perplexity": 8.25, "reference_perplexity": 8.1,
        "n_positions": 512,
    }  # fmt: skip
    logits = {"divergence": divergence | changes, "engine": "llama.cpp", "reference": "transformers"}
    stages = {"logits": logits} if kl is not None else {"structure": {"verdict": verdict}}
    result = {"schema": "gguf3n.validate/1", "path": f"/somewhere/{name}", "verdict": verdict, "stages": stages}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result))
    return path


def write(folder: Path, **options: Any) -> str:
    make_card(folder, **{"repo": REPO, "base_model": BASE, **options}).write()
    return (folder / "README.md").read_text("utf-8")


def table(card: str) -> list[list[str]]:
    """The rows below the headings."""
    rows = re.findall(r"^\| (.*) \|$", card, re.M)
    return [re.split(r" ?(?<!\\)\| ?", row) for row in rows[1:]]


def test_the_card(folder: Path) -> None:
    for name in ("tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"):
        report(folder, name)
    card = write(folder)
    assert front_matter.parse(card) == {
        "license": "gemma",
        "base_model": BASE,
        "quantized_by": "me",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "image-text-to-text",
        "tags": ["gguf", "gemma3n", "conversational"],
    }
    rows = {row[0].strip("`"): row for row in table(card)}
    assert list(rows) == [
        "tiny-Q8_0.gguf", "tiny-llama.cpp-Q4_0.gguf", "tiny-Q4_K_M.gguf", "tiny-Q4_0.gguf", "mmproj-tiny-F16.gguf"
    ]  # fmt: skip
    size = (folder / "tiny-Q4_K_M.gguf").stat().st_size / 2**30
    bits = gguf3n.open_gguf(folder / "tiny-Q4_K_M.gguf").bits_per_weight
    assert rows["tiny-Q4_K_M.gguf"][1:-1] == ["`:Q4_K_M`", f"{bits:.2f}", f"{size:.2f}", "0.02", "95.0%", "8.25"]
    assert [name for name, row in rows.items() if row[-1].startswith("Recommended.")] == ["tiny-Q4_K_M.gguf"]
    assert "llama-quantize writes today" in rows["tiny-llama.cpp-Q4_0.gguf"][-1]
    assert rows["tiny-Q4_0.gguf"][1] == "" and rows["mmproj-tiny-F16.gguf"][-1].startswith("For images")
    assert "512 positions" in card and "original's perplexity there is 8.1" in card
    assert SENTENCE in (folder / "Notice").read_text() and gguf3n.__version__ in card
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.gguf")}


def test_its_commands_resolve_and_lint_finds_nothing(folder: Path) -> None:
    (folder / "tiny-llama.cpp-Q4_0.gguf").unlink()
    card = write(folder)
    names = [path.name for path in folder.iterdir()]
    found = TAGGED.findall(card)
    assert len(found) == 2
    for repo, tag in found:
        assert repo == REPO
        assert labels.llama_cpp_file(names, tag) == "tiny-Q4_K_M.gguf"
        assert labels.ollama_candidates(names, tag) == ["tiny-Q4_K_M.gguf"]
    assert lint_repository(folder, with_data=True).findings == ()


def test_where_no_tag_means_one_file_its_name_does(folder: Path) -> None:
    for name in ("tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"):
        (folder / name).unlink()
    card = write(folder)
    assert "llama-server -hf me/tiny-GGUF -hff tiny-" in card and "ollama run hf.co/me/tiny-GGUF:tiny-" in card


def test_twice_gives_the_same_bytes(folder: Path) -> None:
    report(folder, "tiny-Q4_K_M.gguf")
    write(folder, picture=True)
    first = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    make_card(folder).write()  # what it was told before stands in the card
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == first


def test_what_people_wrote_stays(folder: Path) -> None:
    front = "# mine\nlanguage:\n- de\n\ntags:\n- poetry\nlicense: other  # asked\nlibrary_name: llama\n"
    (folder / "README.md").write_text(f"---\n{front}---\n# My model\n\nHello.\n")
    write(folder)
    card = (folder / "README.md").read_text()
    assert "# My model\n\nHello.\n\n<!-- gguf3n:begin" in card and card.count("# My model") == 1
    assert "# mine\nlanguage:\n- de\n" in card and "license: other  # asked\n" in card
    said = front_matter.parse(card)
    assert said["tags"] == ["poetry", "gguf", "gemma3n", "conversational"] and said["library_name"] == "gguf"
    (folder / "README.md").write_text(card.replace("Hello.", "Hello!") + "\nBye.\n")
    (folder / "tiny-Q8_0.gguf").unlink()
    again = write(folder)
    assert "Hello!" in again and again.endswith(f"{END}\n\nBye.\n") and "tiny-Q8_0" not in again
    (folder / "Notice").write_text("My notice.\n")
    write(folder)
    assert (folder / "Notice").read_text().startswith("My notice.\n\nGemma is provided")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- gguf3n:begin -->\n", "not a pair"),
        (f"{END}\n<!-- gguf3n:begin -->\n", "not a pair"),
        (f"<!-- gguf3n:begin -->\n{END}\n{END}\n", "not a pair"),
        ("---\na: [\n---\n", "front matter"),
        ("---\n- a\n---\n", "front matter"),
    ],
)
def test_a_card_that_can_not_be_gone_on_with(folder: Path, text: str, message: str) -> None:
    (folder / "README.md").write_text(text)
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(UsageError, match=message):
        write(folder)
    assert (folder / "README.md").read_text() == text and {path.name for path in folder.iterdir()} == before


def test_checksums_are_read_again_only_of_files_that_are_younger(folder: Path) -> None:
    write(folder)
    path = folder / "tiny-Q4_K_M.gguf"
    sums = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(sums.replace(hashlib.sha256(path.read_bytes()).hexdigest(), "0" * 64))
    write(folder)
    assert f"{'0' * 64}  {path.name}" in (folder / "SHA256SUMS").read_text()
    os.utime(path, ns=(1, (folder / "SHA256SUMS").stat().st_mtime_ns + 1))
    write(folder)
    assert (folder / "SHA256SUMS").read_text() == sums
    (folder / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(UsageError, match="line 1 is no checksum"):
        write(folder)


def test_a_file_that_fails_is_not_recommended(folder: Path) -> None:
    report(folder, "tiny-Q4_K_M.gguf", verdict="fail")
    rows = {row[0].strip("`"): row[-1] for row in table(write(folder))}
    assert rows["tiny-Q4_K_M.gguf"].startswith("Validation fails.")
    assert rows["tiny-Q8_0.gguf"].startswith("Recommended.")


def test_the_importance_matrix_is_named(folder: Path) -> None:
    entry = Entry(np.ones((1, 4), np.float32), np.ones(1, np.float32))
    matrix = ImportanceMatrix(folder, {"blk.0.attn_q.weight": entry}, (), 1, 1)
    write_imatrix(matrix, folder / "tiny-imatrix.gguf")
    for key, kind, value in (("file", VT.STRING, "/x/tiny|imatrix.gguf"), ("dataset", VT.STRING, "calm_*.txt")):
        set_key(folder / "tiny-Q4_0.gguf", f"quantize.imatrix.{key}", kind, value)
    set_key(folder / "tiny-Q4_0.gguf", "quantize.imatrix.chunks_count", VT.UINT32, 40)
    card = write(folder)
    assert r"- Q4\_0: with the importance matrix tiny\|imatrix.gguf, measured on calm\_\*.txt, 40 chunks." in card
    assert "Q8\\_0, Q4\\_0\\@llama.cpp, Q4\\_K\\_M: without" in card and "for making other files" in card
    assert "imatrix" in front_matter.parse(card)["tags"]


def test_what_files_say_is_only_text(folder: Path) -> None:
    """As a browser would have it: no element that is not ours."""
    evil = "<script>alert(1)</script> ![x](http://x) | [a](b)"
    set_key(folder / "tiny-Q4_0.gguf", "quantize.imatrix.file", VT.STRING, evil)
    shutil.copy(folder / "tiny-Q8_0.gguf", folder / "a|b <b> `c` $(rm)-Q6_K.gguf")
    report(folder, "tiny-Q8_0.gguf")
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(front_matter.split(write(folder))[1])
    body = re.sub(r"<!--.*?-->", "", html)
    elements = set(re.findall(r"<(\w+)", body))
    assert elements <= {"h1", "h2", "p", "a", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "ul", "li"}
    assert "a|b &lt;b&gt; `c` $(rm)-Q6_K.gguf" in body and body.count("<tr>") == 7


def test_an_adapter_is_no_model(folder: Path) -> None:
    set_key(folder / "tiny-Q8_0.gguf", "general.type", VT.STRING, "adapter")
    rows = {row[0].strip("`"): row for row in table(write(folder))}
    assert rows["tiny-Q8_0.gguf"][1:3] == ["", ""] and rows["tiny-Q8_0.gguf"][-1].startswith("An adapter")


def test_a_date_only_where_one_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert source_date() is None
    assert not re.search(r"\d{4}-\d\d-\d\d", write(folder))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert source_date() == datetime(1970, 1, 2, tzinfo=timezone.utc)
    assert "on 1970-01-02." in write(folder)
    for text in ("yesterday", "-1", "1.5", "9" * 30, "٣"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
        with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH is no date"):
            write(folder)


def test_files_that_are_elsewhere(folder: Path) -> None:
    """As those of a publication that the disk did not hold all at once."""
    path = folder / "tiny-Q8_0.gguf"
    facts, digest = read_facts(path), hashlib.sha256(path.read_bytes()).hexdigest()
    whole = write(folder)
    sums = (folder / "SHA256SUMS").read_text()
    path.unlink()
    assert write(folder, elsewhere={path.name: (facts, digest)}) == whole
    assert (folder / "SHA256SUMS").read_text() == sums


def test_measurements(folder: Path) -> None:
    names = ["a.gguf", "b.gguf"]
    report(folder, "a.gguf", kl=0.5)
    shutil.copy(report(folder, "a.gguf", kl=None), folder / "z.json")
    report(folder, "a.gguf", kl=0.5)
    report(folder, "other.gguf")
    (folder / "x.json").write_text('{"schema": "gguf3n.lint/1"}')
    (folder / "y.json").write_text("no json")
    found = read_measured(folder, names)
    assert found == {"a.gguf": Measured("pass", 0.5, 0.95, 8.25, 8.1, 512, "llama.cpp", "transformers")}
    text = report(folder, "b.gguf").read_text().replace("/somewhere/", "C:\\\\x\\\\")
    (folder / "b.gguf.json").write_text(text)
    assert set(read_measured(folder, names)) == {"a.gguf", "b.gguf"}
    for bad in (text.replace("0.02", '"x"'), text.replace('"verdict"', '"verdikt"'), text.replace("512", '"512"')):
        (folder / "b.gguf.json").write_text(bad)
        with pytest.raises(UsageError, match="not what a report"):
            read_measured(folder, names)
    (folder / "b.gguf.json").write_text(text[:-1])
    with pytest.raises(UsageError, match="not JSON"):
        read_measured(folder, names)


def test_the_picture(folder: Path) -> None:
    with pytest.raises(UsageError, match="nothing was measured"):
        write(folder, picture=True)
    for number, name in enumerate(("tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf", "tiny-Q4_0.gguf"), 1):
        report(folder, name, kl=0.01 * number)
    assert "![Size against KL divergence of the files](size-quality.svg)" in write(folder, picture=True)
    tree = ElementTree.fromstring((folder / "size-quality.svg").read_text())
    texts = ["".join(element.itertext()) for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Q8_0", "Q4_K_M", "Q4_0", "size, GiB", "recommended"} <= set(texts)


def test_points_that_have_no_place() -> None:
    points = [SizePoint("a", 1 << 30, 0.1), SizePoint("b", 2 << 30, 0.0), SizePoint("c", 3 << 30, float("inf"))]
    assert "not shown: 2" in size_svg(points) == size_svg(points[::-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo": "me"}, "--repo me: not the name"),
        ({"repo": "me/x; rm"}, "not the name"),
        ({"base_model": "https://x/y/z"}, "--base-model"),
    ],
)
def test_what_can_not_be(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_card(folder, **options)  # type: ignore[arg-type]


def test_directories_without_models(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="no GGUF file of a text model"):
        make_card(empty)
    with pytest.raises(UsageError, match="not a directory"):
        make_card(tmp_path / "nothing")
    set_key(folder / "tiny-Q4_0.gguf", "general.architecture", VT.STRING, "llama")
    with pytest.raises(Gguf3nError, match="not a file of Gemma 3n"):
        make_card(folder)
    (folder / "tiny-Q4_0.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(Gguf3nError, match="Git LFS pointer"):
        make_card(folder)


def test_a_read_only_card_leaves_everything_as_it_was(folder: Path) -> None:
    (folder / "README.md").write_text("# mine\n")
    (folder / "README.md").chmod(0o444)
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(OutputError, match="read-only"):
        write(folder)
    assert {path.name for path in folder.iterdir()} == before


def test_the_command(folder: Path, run: Run) -> None:
    report(folder, "tiny-Q4_K_M.gguf")
    said = run("card", folder, "--repo", REPO, "--json")
    assert said.code == 0
    result = json.loads(said.out)
    assert set(result) == {"schema", "path", "repo", "outputs", "files", "notices"}
    assert [Path(path).name for path in result["outputs"]] == ["README.md", "Notice", "SHA256SUMS"]
    (chosen,) = [file for file in result["files"] if file["recommended"]]
    assert chosen["name"] == "tiny-Q4_K_M.gguf" and chosen["kl"] == 0.02 and chosen["tag"] == "Q4_K_M"
    assert "note: the card does not say of which model" in said.err


def test_facts(made: Path) -> None:
    facts = read_facts(made / "tiny-Q4_0.gguf")
    assert isinstance(facts, FileFacts) and facts.is_model and facts.label == "Q4_0" and facts.calibration is None
    assert facts.n_bytes == (made / "tiny-Q4_0.gguf").stat().st_size
