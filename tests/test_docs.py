"""The pages: links lead somewhere, commands exist, Python runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from gguf3n.cli.application import app
from gguf3n.recipes import preset_names
from workshop.pages import QUALITY, RECIPES
from workshop.places import DOCS, ROOT

README = ROOT / "README.md"
PAGES = sorted(path for path in (README, ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")) if path.exists())
CHECKPOINT = "gemma-3n-E2B-it"
"""What the Python blocks call the checkpoint."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each code block in a language; "" for those without one."""
    text = page.read_text("utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        if match[1] == language:
            yield text.count("\n", 0, match.start(2)) + 1, match[2]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What `#…` may name in a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sizes(page: Path) -> dict[str, list[str]]:
    """Quantization -> the cells of E2B and E4B in a page's table."""
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \|", page.read_text("utf-8"), re.M)
    return {name: cells for name, *cells in rows}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"\b(?:scripts|tests|gguf3n|fixtures)/[\w/]+(?:\.\w+)?", page.read_text("utf-8")):
        assert (ROOT / name).exists() or re.fullmatch(r"gguf3n\.\w+/\d+", name), name


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    assert [
        page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"]({page.name})" not in index
    ] == []


def test_the_tables_name_every_quantization() -> None:
    for page in (RECIPES, QUALITY):
        assert set(sizes(page)) == set(preset_names()), page


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=name_of)
def test_python_blocks_run(
    page: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / CHECKPOINT).symlink_to(make_checkpoint(multimodal=True))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)
    assert capsys.readouterr().out


def commands(page: Path) -> Iterator[str]:
    for _, block in blocks(page, ""):
        yield from (line for line in block.splitlines() if line.startswith("gguf3n "))


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page)}))
def test_commands_parse(line: str) -> None:
    """Each command exists and takes these options and arguments; nothing is run."""
    _, *words = shlex.split(line.partition(" > ")[0], comments=True)
    command: Any = get_command(app)
    context = command.make_context("gguf3n", words)
    while hasattr(command, "resolve_command"):
        words = [*context._protected_args, *context.args]
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, words, parent=context)
