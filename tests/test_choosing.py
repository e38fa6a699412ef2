"""What fits, and what of that to take first."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from gguf3n.choosing import LADDER, Limit, choices, estimates
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.gemma3n.runtime_memory import runtime_of
from gguf3n.recipes import find_recipe, preset_names
from tests.command_line import Run, plain
from workshop.places import ROOT

GIB = 1 << 30


def test_the_ladder_goes_down() -> None:
    """A larger file is never after a smaller one, so that the first that fits is the largest that does."""
    sizes = [choice.estimate.total_bytes for choice in choices(Limit())]
    assert len(sizes) == len(LADDER) and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("size", "name"), [LADDER[0], LADDER[3], LADDER[-1]])
def test_what_fits_to_the_byte(size: str, name: str) -> None:
    found = estimates(find_recipe(name))[size]
    beside = runtime_of(PUBLISHED[size], 8192).total_bytes
    for limit, need in (
        (Limit(file_bytes=0), found.total_bytes),
        (Limit(memory_bytes=0, n_ctx=8192), found.total_bytes + beside),
    ):
        field = "file_bytes" if limit.memory_bytes is None else "memory_bytes"
        exact, less = (replace(limit, **{field: n_bytes}) for n_bytes in (need, need - 1))
        assert exact.allows(size, found) and not less.allows(size, found)
        assert exact.need(size, found) == need
        best = next(choices(exact))
        assert (best.size, best.quant) == (size, name)


def test_the_table_in_the_readme() -> None:
    """Its first row aside: that much memory is more than is needed."""
    text = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) GB \| (E\dB) \| `([\w-]+)` \| ([\d.]+) \|", text, re.M)
    assert len(rows) == 5
    for gigabytes, size, quant, gib in rows:
        best = next(choices(Limit(memory_bytes=int(gigabytes) * 10**9)))
        assert (best.size, best.quant, f"{best.estimate.total_bytes / GIB:.2f}") == (size, quant, gib)


def test_list_of_what_fits(run: Run) -> None:
    code, out, err = run("recipes", "list", "--memory", "8GB", "--ctx", "8192")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "recommended: gguf3n convert google/gemma-3n-E4B-it -q UD-Q6_K_XL"
    assert lines[1] == "  6.16 GiB file + 0.09 GiB for 8,192 tokens + 0.62 GiB to compute with = 6.88 GiB"
    assert lines[3].split() == ["name", "E2B", "E4B", "bits", "advice"]
    assert lines[4].split()[:4] == ["Q8_0", "4.45", "GiB", "-"]
    found = json.loads(run("recipes", "list", "--memory", "8GB", "--ctx", "8192", "--json")[1])
    assert [each["name"] for each in found] == [line.split()[0] for line in lines[4:]]
    marked = [(each["name"], size) for each in found for size, one in each["sizes"].items() if one["recommended"]]
    assert marked == [("UD-Q6_K_XL", "E4B")]


def test_a_longer_context_leaves_less(run: Run) -> None:
    firsts = [
        run("recipes", "list", "--memory", "5.5GB", *more)[1].splitlines()[0] for more in ((), ("--ctx", "32768"))
    ]
    assert [first.split()[-3:] for first in firsts] == [
        ["google/gemma-3n-E4B-it", "-q", "Q4_K_M"],
        ["google/gemma-3n-E2B-it", "-q", "UD-Q6_K_XL"],
    ]


def test_both_limits(run: Run) -> None:
    """The stricter decides: of the file here, of the memory there."""
    for size, memory, quant in (("3GiB", "16GB", "Q4_K_M"), ("16GB", "4GB", "Q4_K_M"), ("2.9GB", "4GB", "IQ3_M")):
        out = run("recipes", "list", "--size", size, "--memory", memory)[1]
        assert out.splitlines()[0].endswith(f"E2B-it -q {quant}"), (size, memory)


def test_importance_matrices_are_named(run: Run) -> None:
    out = run("recipes", "list", "--memory", "3GB")[1].splitlines()
    assert out[0].endswith("UD-IQ2_M") and "--imatrix" in out[2]
    assert "--imatrix" not in run("recipes", "list", "--memory", "8GB")[1].splitlines()[2]


def test_what_fits_and_is_not_recommended(run: Run) -> None:
    code, out, _ = run("recipes", "list", "--size", "1.9GiB")
    assert code == 0 and out.startswith("recommended: none") and "IQ1_M" in out
    found = json.loads(run("recipes", "list", "--size", "1.9GiB", "--json")[1])
    assert not any(one["recommended"] for each in found for one in each["sizes"].values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--memory", "1GB"), "at least 2.49 GiB, which E2B in UD-IQ1_S takes"),
        (("--size", "1GB"), "at least 1.81 GiB, which E2B in UD-IQ1_S takes"),
        (("--memory", "8"), "nothing is as small as that"),
        (("--memory", "eight"), "--memory 'eight': no size"),
        (("--size", "-4GB"), "no size"),
        (("--size", "0GB"), "no size"),
        (("--ctx", "8192"), "--ctx without --memory"),
        (("--size", "4GB", "--ctx", "8192"), "--ctx without --memory"),
        (("--memory", "8GB", "--ctx", "0"), "not a context of this model"),
        (("--memory", "8GB", "--ctx", "32769"), "1 to 32,768"),
        (("--memory", "8GB", "--mmproj"), "--memory with --mmproj"),
        (("--size", "1GB", "--mmproj"), "--size with --mmproj"),
    ],
)
def test_what_can_not_be_asked(run: Run, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run("recipes", "list", *arguments)
    assert (code, out) == (2, "") and said in err and plain(err)
    assert json.loads(run("recipes", "list", *arguments, "--json")[1])["exit_code"] == 2


def test_types_are_shown_where_they_are_asked_for(run: Run) -> None:
    plainly, with_types = (run("recipes", "list", *more)[1] for more in ((), ("--types",)))
    assert "422 F32" not in plainly
    assert len(re.findall(r"^    E4B: \d+ \w+", with_types, re.M)) == len(preset_names())
    assert "    E4B: 422 F32, 189 Q4_K" in with_types
    assert "audio: " in run("recipes", "list", "--mmproj", "--types")[1]
