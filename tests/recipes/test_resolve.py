"""How a tensor's type is decided."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as QType
from gguf.constants import LlamaFileType

from gguf3n.errors import UsageError
from gguf3n.recipes import Recipe, Rule, check_rules, find_recipe, override
from gguf3n.recipes.layers import compress, parse_layers
from tests.recipes.facts import decisions, facts, tensor

LAYERS: tuple[tuple[object, int, set[int]], ...] = (
    (5, 8, {5}),
    ("5", 8, {5}),
    (-1, 8, {7}),
    ("2-4", 8, {2, 3, 4}),
    ("first 3", 8, {0, 1, 2}),
    ("last 3", 8, {5, 6, 7}),
    ("first 1/8", 30, {0, 1, 2}),
    ("last 1/8", 30, {26, 27, 28, 29}),
    ("first 1/16", 35, {0, 1}),
    ("1/8 to 7/8", 16, set(range(2, 14))),
    ("every third", 16, {4, 7, 10, 13}),
    (["first 1/8", "last 1/8", "every third"], 30, {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}),
)


@pytest.mark.parametrize(("value", "n_layers", "expected"), LAYERS, ids=[str(row[0]) for row in LAYERS])
def test_layers(value: object, n_layers: int, expected: set[int]) -> None:
    layers = parse_layers(value)
    assert {bid for bid in range(n_layers) if (bid, n_layers) in layers} == expected


@pytest.mark.parametrize("value", ["", "some", "1/8", "first", "every fourth", 1.5, True, None, [[1]], ["first 1/0"]])
def test_what_layers_are_not(value: object) -> None:
    with pytest.raises(ValueError):
        parse_layers(value)


def test_layer_numbers_in_short() -> None:
    bids = [0, 1, 2, 5, 7, 8]
    assert compress(bids) == ["0-2", 5, "7-8"]
    layers = parse_layers(compress(bids))
    assert [bid for bid in range(10) if (bid, 10) in layers] == bids


def recipe(*rules: Rule, **settings: object) -> Recipe:
    return Recipe("test", QType.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, rules, **settings)  # type: ignore[arg-type]


def rule(pattern: str = "*", qtype: QType = QType.Q6_K, **conditions: object) -> Rule:
    return Rule((pattern,), qtype, "why", place="here", **conditions)  # type: ignore[arg-type]


CONDITIONS: tuple[tuple[dict[str, object], dict[str, object], dict[str, object]], ...] = (
    ({"layers": parse_layers(5)}, {}, {"name": "blk.6.ffn_up.weight"}),
    ({"layers": parse_layers("first 1")}, {"name": "blk.0.ffn_up.weight"}, {"name": "token_embd.weight"}),
    ({"imatrix": True}, {"imatrix": True}, {}),
    ({"imatrix": False}, {}, {"imatrix": True}),
    ({"quant_weights": True}, {"imatrix": True, "quant_weights": True}, {"imatrix": True}),
    ({"evaluated": False}, {"evaluated": False}, {}),
    ({"row_multiple_of": 256}, {"n_per_row": 512}, {"n_per_row": 288}),
    ({"row_not_multiple_of": 256}, {"n_per_row": 288}, {"n_per_row": 512}),
    ({"min_gqa": 4}, {"gqa": 4}, {"gqa": 2}),
)


@pytest.mark.parametrize(("conditions", "yes", "no"), CONDITIONS, ids=[next(iter(row[0])) for row in CONDITIONS])
def test_conditions(conditions: dict[str, object], yes: dict[str, object], no: dict[str, object]) -> None:
    assert rule(**conditions).matches(tensor(**yes))  # type: ignore[arg-type]
    assert not rule(**conditions).matches(tensor(**no))  # type: ignore[arg-type]


def test_patterns_match_whole_names() -> None:
    for pattern, matches in (("blk.5.ffn_up.weight", True), ("blk.?.ffn_*", True), ("ffn_up", False), ("*FFN*", False)):
        assert rule(pattern).matches(tensor()) is matches
    assert rule(r"blk\.\d+\.ffn_(up|gate)\.weight", is_regex=True).matches(tensor())
    assert not rule(r"ffn_up", is_regex=True).matches(tensor())


def test_the_order_of_deciding() -> None:
    """Overrides, unevaluated, the first rule that matches, tables, base type."""
    whole = recipe(
        rule("*attn_v*", QType.Q6_K),
        rule("*attn_*", QType.Q5_K),
        token_embd=QType.Q8_0,
        ple=QType.Q5_1,
        unevaluated=QType.Q2_K,
    )
    expected = {
        "blk.1.attn_v.weight": (QType.Q6_K, "here"),
        "blk.1.attn_k.weight": (QType.Q5_K, "here"),
        "blk.1.ffn_up.weight": (QType.Q4_K, "type"),
        "token_embd.weight": (QType.Q8_0, "token_embd"),
        "per_layer_token_embd.weight": (QType.Q5_1, "ple"),
    }
    for name, (qtype, by) in expected.items():
        decision = whole.resolve(tensor(name))
        assert (decision.qtype, decision.rule) == (qtype, by)
    assert whole.resolve(tensor("blk.1.attn_v.weight", evaluated=False)).qtype is QType.Q2_K
    named = override(whole, tensor_types=["*.attn_v.weight=Q8_0", "*=F16"], ple="Q4_0", token_embd="Q6_K")
    assert named.resolve(tensor("blk.1.attn_v.weight", evaluated=False)).qtype is QType.Q8_0
    assert named.resolve(tensor("per_layer_token_embd.weight")).qtype is QType.F16  # --tensor-type goes before --ple
    plain = override(whole, ple="Q4_0", token_embd="Q6_K")
    assert plain.resolve(tensor("per_layer_token_embd.weight")).qtype is QType.Q4_0
    assert plain.resolve(tensor("token_embd.weight")).qtype is QType.Q6_K


FALLBACKS = [
    ("Q4_K", 288, "Q5_0"),
    ("Q5_K", 288, "Q5_1"),
    ("Q6_K", 288, "Q8_0"),
    ("Q2_K", 288, "Q4_0"),
    ("Q3_K", 288, "Q4_0"),
    ("TQ1_0", 288, "Q4_0"),
    ("IQ4_XS", 288, "IQ4_NL"),
    ("IQ3_S", 288, "IQ4_NL"),
    ("Q4_K", 520, "F16"),
    ("Q8_0", 520, "F16"),
    ("BF16", 520, "BF16"),
    ("Q4_K", 512, "Q4_K"),
]


@pytest.mark.parametrize(("qtype", "n_per_row", "expected"), FALLBACKS)
def test_rows_that_hold_no_blocks_get_another_type(qtype: str, n_per_row: int, expected: str) -> None:
    decision = recipe(rule("*", QType[qtype])).resolve(tensor(n_per_row=n_per_row))
    assert decision.qtype.name == expected
    assert (f"not {qtype}, as rows of {n_per_row}" in decision.reason) is (qtype != expected)


def test_a_users_rule_must_fit() -> None:
    with pytest.raises(UsageError, match=r"here: Q6_K can't hold blk\.5\.ffn_up\.weight") as caught:
        recipe(rule("*", strict=True)).resolve(tensor(n_per_row=288))
    assert caught.value.fix == "use Q8_0 there"


def test_types_that_need_importances() -> None:
    low = recipe(rule("*", QType.IQ2_XS))
    assert low.resolve(tensor()).lacks_importance
    assert low.resolve(tensor(imatrix=True)).lacks_importance
    assert not low.resolve(tensor(imatrix=True, quant_weights=True)).lacks_importance
    assert not low.resolve(tensor("token_embd.weight")).lacks_importance
    decision = low.resolve(tensor("blk.31.attn_k.weight", evaluated=False, imatrix=True))
    assert decision.qtype is QType.Q2_K and "never evaluated" in decision.reason


NEVER = (
    ({"patterns": ("nothing",)}, "no matrix that may be quantized is named like nothing"),
    ({"patterns": ("blk.0.attn_norm.weight",)}, "no matrix that may be quantized"),
    ({"patterns": ("blk.99.ffn_up.weight",)}, "no matrix that may be quantized"),
    ({"layers": parse_layers(40)}, "its conditions never hold in this model of 30 layers"),
    ({"row_multiple_of": 4096, "patterns": ("*.attn_q.weight",)}, "its conditions never hold"),
    ({"imatrix": False, "quant_weights": True}, "its conditions never hold"),
    ({"patterns": ("blk.25.attn_k.weight",)}, "only weights that are never evaluated"),
    ({"patterns": ("blk.3.ffn_up.weight",)}, "earlier rules decide everything"),
)


@pytest.mark.parametrize(("fields", "found"), NEVER, ids=[row[1] for row in NEVER])
def test_rules_that_can_never_match(fields: dict[str, object], found: str) -> None:
    own = Rule(**({"patterns": ("*",), "qtype": QType.Q6_K, "reason": "", "place": "mine.toml, line 7"} | fields))
    first = rule("blk.3.*", strict=True)
    whole = recipe(first, Rule(**(vars(own) | {"strict": True})), unevaluated=QType.Q2_K)
    with pytest.raises(UsageError, match=r"mine\.toml, line 7: a rule that can never match") as caught:
        check_rules(whole, facts("E2B").quantizable)
    assert found in str(caught.value.found)
    check_rules(recipe(first, own, unevaluated=QType.Q2_K), facts("E2B").quantizable)  # a preset's may be idle


def test_a_rule_that_only_an_importance_matrix_brings_to_life_is_fine() -> None:
    whole = recipe(rule("*", imatrix=False, strict=True), rule("*", quant_weights=True, strict=True))
    check_rules(whole, facts("E2B").quantizable)


def test_a_recipe_for_another_size() -> None:
    with pytest.raises(UsageError, match="for another size of model"):
        check_rules(recipe(n_layers=35), facts("E2B").quantizable)


OPTIONS: tuple[tuple[dict[str, object], str], ...] = (
    ({"tensor_types": ["Q8_0"]}, "not PATTERN=TYPE"),
    ({"tensor_types": ["=Q8_0"]}, "not PATTERN=TYPE"),
    ({"tensor_types": ["*=Q9"]}, "unusable type 'Q9'"),
    ({"tensor_types": ["re:(=Q8_0"]}, "not a regular expression"),
    ({"ple": "Q9"}, "--ple: unusable type"),
    ({"token_embd": ""}, "--token-embd: unusable type"),
    ({"keep": "q8_0"}, "--keep: unusable type"),
)


@pytest.mark.parametrize(("options", "what"), OPTIONS, ids=[row[1] for row in OPTIONS])
def test_unusable_options(options: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match="--") as caught:
        override(find_recipe("Q8_0"), **options)  # type: ignore[arg-type]
    assert what in caught.value.what


def test_overrides_with_a_regular_expression() -> None:
    named = override(find_recipe("Q4_K_M"), tensor_types=[r"re:blk\.(0|1)\.ffn_up\.weight=q6_K"])
    found = decisions(named, "E2B")
    assert [name for name, d in found.items() if d.qtype is QType.Q6_K and "ffn_up" in name] == [
        "blk.0.ffn_up.weight",
        "blk.1.ffn_up.weight",
    ]


def test_reading_presets_needs_no_numba(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, gguf3n.recipes as r; r.find_recipe('Q4_K_M'); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
