"""Recipe files that mean harm: one error of ours, soon."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from gguf3n.errors import UsageError
from gguf3n.formats.small_file import MAX_RECIPE_BYTES
from gguf3n.recipes import find_recipe, override
from gguf3n.regexes import MAX_NAME, check_regex

RULE = 'type = "Q8_0"\n[[rule]]\ntype = "Q8_0"\nreason = "x"\n'

FILES = {
    "a number of 5,000 digits": "n_layers = " + "9" * 5000,
    "the same in another base": "n_layers = 0x" + "f" * 5000,
    "layers of 5,000 digits": RULE + 'tensor = "*"\nlayers = 0x' + "f" * 5000,
    "layers of 5,000 digits as text": RULE + f'tensor = "*"\nlayers = "{"9" * 5000}"',
    "nested lists": "type = " + "[" * 20_000 + "]" * 20_000,
    "a key of many parts": "a." * 20_000 + "a = 1",
    "a table of many parts": "[" + "a." * 20_000 + "a]",
    "spaces in brackets": "x = [\n[" + " " * 50_000 + "\n],]",
    "spaces in quotes": 'x = [\n"' + " " * 50_000 + '"\n,]',
    "a name with a zero byte": 'inherit = "a\\u0000.toml"',
    "too large": "#" * (MAX_RECIPE_BYTES + 1),
    "a regular expression without end": RULE + "regex = '(a+)+$'",
    "a long regular expression": RULE + f"regex = '{'(' * 5000}'",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(FILES[name] + "\n", "utf-8")
    started = time.monotonic()
    with pytest.raises(UsageError):
        find_recipe(str(path))
    assert time.monotonic() - started < 10


def test_no_ordinary_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    for name, said in (("pipe", "a pipe"), ("zero", "a device"), ("latin", "UTF-8"), ("none", "No such file")):
        with pytest.raises(UsageError, match=said):
            find_recipe(str(tmp_path / f"{name}.toml"))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$", "(a|a)*b", "(.*)*", ".*.*.*.*.*.*", "(a?){60}a{60}", "(?:a|b?c?)" * 30, "(((a{1,9}){1,9}){1,9}){1,9}",
        "(?=(a+)+b)", "(?!(a*)*$)", "((a*)b?)*", "(x)?(?(1)(a+)+|(b+)+)", "(" * 300, "[", "a{99999999999999}",
        "a" * 2000,
    ],
)  # fmt: skip
def test_a_regular_expression_that_may_never_end(pattern: str) -> None:
    with pytest.raises(ValueError):
        check_regex(pattern)
    with pytest.raises(UsageError, match="regular expression"):
        override(find_recipe("Q8_0"), tensor_types=[f"re:{pattern}=Q8_0"])


@pytest.mark.parametrize(
    "pattern",
    [
        r"blk\.\d+\.(attn|ffn)_.*\.weight", r"blk\.(1\d|2[0-4])\.ffn_(up|gate|down)\..*", ".*.*.*.*", "(?:ab){2,5}",
        r"(?i)BLK\.(?P<bid>\d+)\.attn_[qkv]\.weight", ".*(?<!norm)\\.weight", "(a|b|c|d)(a|b|c|d)(a|b|c|d)?",
    ],
)  # fmt: skip
def test_a_regular_expression_that_ends(pattern: str) -> None:
    check_regex(pattern)
    started = time.monotonic()
    for name in ("a" * MAX_NAME, "ab" * (MAX_NAME // 2), "blk.1" + "." * (MAX_NAME - 5)):
        re.fullmatch(pattern, name)
    assert time.monotonic() - started < 1
