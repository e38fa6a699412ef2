"""Recipe files: what they may say, and errors with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf3n.errors import UsageError
from gguf3n.recipes import Keep, find_recipe, format_recipe, preset_names, variant_names
from tests.recipes.facts import types


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    recipe = find_recipe(
        write(
            tmp_path / "mine.toml",
            """
            inherit = "Q4_K_M"
            ple = "q8_0"
            keep = "bf16"

            [[rule]]
            tensor = ["blk.*.ffn_down.weight", "blk.3.ffn_up.weight"]
            layers = ["first 2", 3]
            type = "Q5_K"
            reason = "mine"
            """,
        )
    )
    assert (recipe.name, recipe.keep) == ("mine", Keep.BF16)
    mine, theirs = types(recipe, "E2B"), types(find_recipe("Q4_K_M"), "E2B")
    changed = {name: qtype for name, qtype in mine.items() if theirs[name] != qtype}
    assert changed == {
        "per_layer_token_embd.weight": "Q8_0",
        "blk.0.ffn_down.weight": "Q5_K",
        "blk.1.ffn_down.weight": "Q5_K",
        "blk.3.ffn_down.weight": "Q5_K",
        "blk.3.ffn_up.weight": "Q5_K",
    }


def test_a_file_type_of_ones_own(tmp_path: Path) -> None:
    """F32's number is 0, which is a file type like any other."""
    for name in ("F32", "Q4_K_S"):
        recipe = find_recipe(write(tmp_path / "mine.toml", f'type = "Q8_0"\nftype = "{name}"\n'))
        assert recipe.ftype.name.endswith(f"_{name}")


def test_inheritance_from_a_file_and_a_variant(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", 'inherit = "Q4_K_M@2025"\ntoken_embd = "Q8_0"\n')
    recipe = find_recipe(write(tmp_path / "top.toml", 'inherit = "base.toml"\nname = "My-1.5"\nple = "Q5_0"\n'))
    assert recipe.name == "My-1.5"
    found = types(recipe, "E2B")
    assert found["token_embd.weight"] == "Q8_0"
    assert found["per_layer_token_embd.weight"] == "Q5_0"
    assert found["blk.25.attn_k.weight"] == "Q4_K"  # never evaluated, but as in the exact variant


FULL_RULE = '[[rule]]\ntensor = "blk.*.ffn_down.weight"\ntype = "Q6_K"\nreason = "why"\n'

FAULTS: tuple[tuple[str, str, str, int | None], ...] = (
    ("an unknown key", 'type = "Q4_K"\ntpye = "Q5_K"\n', "unknown key 'tpye'", 2),
    ("an unknown key in a rule", f'type = "Q4_K"\n\n{FULL_RULE}layer = 3\n', "unknown key 'layer'", 7),
    ("an unknown key in the second rule", f'type = "Q4_K"\n{FULL_RULE}\n{FULL_RULE}x = 3\n', "unknown key 'x'", 11),
    ("an unknown key in a variant", 'type = "Q4_K"\n[variant.a]\nrule = "x"\n', "unknown key 'rule'", 3),
    ("a dotted variant", 'type = "Q4_K"\nvariant.a.pel = "Q4_0"\n', "unknown key 'pel'", 2),
    ("no TOML", 'type = "Q4_K"\n= 3\n', "not TOML", 2),
    ("an unterminated string", 'type = "Q4_K\n', "not TOML", 1),
    ("an unknown type", 'type = "Q4_K_M"\n', "impossible value of 'type'", 1),
    ("a type that nobody writes", 'type = "Q8_1"\n', "impossible value of 'type'", 1),
    ("a type that is no string", "type = 4\n", "impossible value of 'type'", 1),
    ("an unknown file type", 'type = "Q4_K"\nftype = "Q4_K"\n', "impossible value of 'ftype'", 2),
    ("an impossible keep", 'type = "Q4_K"\nkeep = "q8_0"\n', "impossible value of 'keep'", 2),
    ("a name that is no file name", 'type = "Q4_K"\nname = "a/b"\n', "impossible value of 'name'", 2),
    ("no base type", 'ple = "Q4_0"\n', "no base type", None),
    ("a rule without a type", 'type = "Q4_K"\n[[rule]]\ntensor = "*"\nreason = "x"\n', "the rule has no type", 2),
    ("a rule without a reason", 'type = "Q4_K"\n[[rule]]\ntensor = "*"\ntype = "Q4_0"\n', "no reason", 2),
    ("a rule without tensors", 'type = "Q4_K"\n[[rule]]\ntype = "Q4_0"\nreason = "x"\n', "needs tensor or regex", 2),
    ("a rule with both", f"type = 'Q4_K'\n{FULL_RULE}regex = 'x'\n", "needs tensor or regex", 2),
    ("no pattern", 'type = "Q4_K"\n[[rule]]\ntensor = []\ntype = "Q4_0"\n', "impossible value of 'tensor'", 3),
    ("a broken regex", f"type = 'Q4_K'\n{FULL_RULE.replace('tensor', 'regex').replace('blk.', '(')}", "of 'regex'", 3),
    ("impossible layers", f'type = "Q4_K"\n{FULL_RULE}layers = "first"\n', "impossible value of 'layers'", 6),
    ("a share of nothing", f'type = "Q4_K"\n{FULL_RULE}layers = "first 1/0"\n', "impossible value of 'layers'", 6),
    ("no layers", f'type = "Q4_K"\n{FULL_RULE}layers = []\n', "impossible value of 'layers'", 6),
    ("a flag that is none", f'type = "Q4_K"\n{FULL_RULE}imatrix = 1\n', "impossible value of 'imatrix'", 6),
    ("rules that are no tables", 'type = "Q4_K"\nrule = 3\n', "not a list of tables", 2),
    ("an unknown parent", 'inherit = "Q4_K_X"\n', "'Q4_K_X', which is no recipe", None),
    ("an unknown variant", 'inherit = "Q4_K_M@2024"\n', "'Q4_K_M@2024', which is no recipe", None),
    ("a parent that is not there", 'inherit = "no.toml"\n', "cannot be read", None),
    ("itself", 'inherit = "mine.toml"\n', "inherits from itself", None),
)


@pytest.mark.parametrize(("text", "what", "line"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_faults_are_told_with_their_line(tmp_path: Path, text: str, what: str, line: int | None) -> None:
    path = write(tmp_path / "mine.toml", text)
    with pytest.raises(UsageError) as caught:
        find_recipe(path)
    assert what in caught.value.what
    if line is not None:
        assert caught.value.what.startswith(f"{path}, line {line}: ")


def test_lines_inside_strings_are_not_keys(tmp_path: Path) -> None:
    text = 'type = "Q4_K"\nnote = """\n[[rule]]\nkeep = 1\n"""\nkeep = 1\n'
    with pytest.raises(UsageError, match="line 6: impossible value of 'keep'"):
        find_recipe(write(tmp_path / "mine.toml", text))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml: cannot be read"):
        find_recipe("nowhere.toml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a text") as caught:
        find_recipe(str(tmp_path / "x.toml"))
    assert caught.value.expected == "UTF-8"


def test_names_in_any_case_and_by_alias() -> None:
    assert find_recipe("q4_k_m").name == "Q4_K_M"
    assert find_recipe("q4_k@2025").name == "Q4_K_M@2025"
    assert find_recipe("ud-q4_k_xl").name == "UD-Q4_K_XL"


def test_unknown_names_come_with_advice() -> None:
    with pytest.raises(UsageError) as caught:
        find_recipe("Q4KM")
    assert "Q4_K_M" in str(caught.value.fix) and "Q8_0" in str(caught.value.expected)
    with pytest.raises(UsageError) as caught:
        find_recipe("Q4_K_M@2024")
    assert caught.value.expected == "Q4_K_M@llama.cpp or Q4_K_M@2025"
    with pytest.raises(UsageError):
        find_recipe("_llama.cpp")


ALL_NAMES = [*preset_names(), *(variant for name in preset_names() for variant in variant_names(name))]


@pytest.mark.parametrize("name", ALL_NAMES)
def test_what_is_shown_reads_back_as_the_same_recipe(tmp_path: Path, name: str) -> None:
    recipe = find_recipe(name)
    copy = find_recipe(write(tmp_path / "copy.toml", format_recipe(recipe, ["a comment"])))
    for imatrix in (False, True):
        assert types(copy, "E4B", imatrix=imatrix) == types(recipe, "E4B", imatrix=imatrix)
    for key in ("name", "ftype", "keep", "token_embd", "ple", "unevaluated", "summary", "note"):
        assert getattr(copy, key) == getattr(recipe, key)


def test_evidence_is_a_files_own(tmp_path: Path) -> None:
    """It is printed and read back; a file that inherits from another has none of its evidence."""
    lines = ("texts: a.txt", 'costs "measured", 3e-4 nats')
    path = write(
        tmp_path / "tuned.toml", 'type = "Q4_K"\nevidence = ["texts:  a.txt", \'costs "measured", 3e-4 nats\']\n'
    )
    recipe = find_recipe(path)
    assert recipe.evidence == lines
    again = find_recipe(write(tmp_path / "again.toml", format_recipe(recipe)))
    assert again.evidence == lines
    assert find_recipe(write(tmp_path / "mine.toml", 'inherit = "tuned.toml"\nple = "Q8_0"\n')).evidence == ()
    for value in ('"a line"', "[1]", '[""]'):
        with pytest.raises(UsageError, match="impossible value of 'evidence'"):
            find_recipe(write(tmp_path / "bad.toml", f'type = "Q4_K"\nevidence = {value}\n'))
