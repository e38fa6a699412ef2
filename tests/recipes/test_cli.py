"""`gguf3n recipes`, and the options of `convert` that are about recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gguf3n.recipes import find_recipe, preset_names
from tests import micro
from tests.command_line import Run
from tests.recipes.facts import types
from tests.recipes.test_extract import sparse


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of three layers with rows of 64 and 128."""
    return micro.make(tmp_path / "micro")


def plan_of(run: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = run("convert", *arguments, "--dry-run", "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def plan_types(plan: dict[str, Any], index: int = 0) -> dict[str, str]:
    return {tensor["name"]: tensor["type"] for tensor in plan["outputs"][index]["tensors"]}


def test_list(run: Run) -> None:
    code, out, _ = run("recipes", "list")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["name", "E2B", "E4B", "bits", "advice"]
    assert {line.split()[0] for line in lines[1:]} == set(preset_names())
    assert next(line for line in lines if line.startswith("Q8_0 ")).split()[1:6] == [
        "4.45",
        "GiB",
        "6.83",
        "GiB",
        "8.53",
    ]


def test_list_as_json_with_all_names(run: Run) -> None:
    found = json.loads(run("recipes", "list", "--all", "--json")[1])
    assert len(found) == 32 * 3 + 12
    by_name = {recipe["name"]: recipe for recipe in found}
    assert by_name["Q4_K_M@2025"]["sizes"]["E4B"]["types"] == {"F32": 422, "Q4_K": 282, "F16": 108, "Q6_K": 35}
    assert by_name["IQ2_M"]["sizes"]["E2B"]["needs_imatrix"] is True


def test_show_says_that_a_reconstruction_is_one(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("recipes", "show", "ud-q4_k_xl")
    assert code == 0
    assert "A reconstruction, not a copy" in out
    assert "# E4B: 5.02 GiB, 6.28 bits a weight, 422 F32, 189 Q4_K" in out
    (tmp_path / "copy.toml").write_text(out, "utf-8")
    assert types(find_recipe(str(tmp_path / "copy.toml")), "E4B") == types(find_recipe("UD-Q4_K_XL"), "E4B")
    found = json.loads(run("recipes", "show", "Q5_0", "--json")[1])
    assert found["rules"][0]["patterns"] == ["blk.*.ffn_down.weight"]
    assert found["rules"][0]["imatrix"] is True


def test_extract(run: Run, tmp_path: Path) -> None:
    path, recipe = sparse(tmp_path / "x-Q4_K_M.gguf", "Q4_K_M"), tmp_path / "theirs.toml"
    code, out, _ = run("recipes", "extract", path)
    assert code == 0 and 'name = "Q4_K_M"' in out
    assert run("recipes", "extract", path, "-o", recipe)[0] == 0
    assert recipe.read_text("utf-8") == out
    code, _, err = run("recipes", "extract", path, "-o", recipe)
    assert code == 10 and "exists already" in err
    assert run("recipes", "extract", path, "-o", recipe, "--force")[0] == 0
    assert run("recipes", "extract", path, "-o", tmp_path / "no" / "x.toml")[0] == 10
    before = path.stat()
    code, _, err = run("recipes", "extract", path, "-o", path, "--force")
    assert code == 10 and "is what is read" in err and path.stat() == before
    assert run("recipes", "show", recipe)[1].startswith("# E2B: 2.94 GiB")


def test_extracting_what_can_not_be_reproduced_is_told(run: Run, tmp_path: Path, source: Path) -> None:
    (path,) = tmp_path.glob("micro")
    assert run("convert", path, "-q", "F16", "-o", tmp_path / "a.gguf", "--quiet")[0] == 0
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    name = b"altup_proj.weight"
    at = data.index(name) + len(name) + 4 + 3 * 8
    data[at] = 30  # BF16
    (tmp_path / "a.gguf").write_bytes(data)
    code, _, err = run("recipes", "extract", tmp_path / "a.gguf")
    assert code == 0 and "Not reproduced: 1 tensors such as altup_proj.weight, in BF16 there" in err


def test_dry_run_names_the_rule_and_its_reason(run: Run, source: Path) -> None:
    code, out, _ = run("convert", source, "-q", "Q4_K_M", "--dry-run")
    assert code == 0
    assert "] _K_M, line 4: attn_v and ffn_down suffer most from rounding" in out
    assert "] unevaluated: smallest type: loaded, but never evaluated" in out
    assert "not Q6_K, as rows of 64 hold no blocks of 256" in out


def test_against_another(run: Run, source: Path) -> None:
    code, out, _ = run("convert", source, "-q", "Q8_0", "--dry-run", "--against", "Q8_0@llama.cpp")
    assert code == 0
    assert out.splitlines()[-1].startswith("against Q8_0@llama.cpp: ")
    plan = plan_of(run, source, "-q", "Q4_0", "--against", "Q4_0@llama.cpp")
    different = plan["outputs"][0]["against"]["types"]
    # two attn_k/attn_v that are never evaluated fall back to Q4_0 too; only the table and the kept matrices differ
    assert different.pop("per_layer_token_embd.weight") == "Q8_0"
    assert set(different.values()) == {"BF16"}


def test_overrides(run: Run, source: Path) -> None:
    options = ("--tensor-type", "blk.1.*=Q8_0", "--tensor-type", "*.ffn_up.weight=Q5_0", "--ple", "F16")
    plan = plan_of(run, source, "-q", "Q4_0", *options, "--token-embd", "q4_1", "--keep", "bf16")
    found = plan_types(plan)
    assert found["blk.1.ffn_up.weight"] == "Q8_0"
    assert found["blk.0.ffn_up.weight"] == "Q5_0"
    assert found["per_layer_token_embd.weight"] == "F16"
    assert found["token_embd.weight"] == "Q4_1"
    assert found["altup_proj.weight"] == "BF16"
    rules = {tensor["name"]: (tensor["rule"], tensor["reason"]) for tensor in plan["outputs"][0]["tensors"]}
    assert rules["token_embd.weight"] == ("command line", "--token-embd Q4_1")


FAULTS = (
    (("--tensor-type", "ffn_up=Q8_0"), "a rule that can never match", "patterns match whole names"),
    (("--tensor-type", "*.attn_norm.weight=Q8_0"), "a rule that can never match", "no matrix that may be quantized"),
    (("--tensor-type", "*.ffn_up.weight=Q6_K"), "Q6_K can't hold", "use Q8_0 there"),
    (("-q", "Q4_0"), "the same quantization twice", "name each once"),
    (("-q", "Q4_0.5"), "unknown quantization", "did you mean Q4_0"),
    (("--like", "nothing.gguf"), "nothing.gguf", "no such file"),
)


@pytest.mark.parametrize(("arguments", "what", "more"), FAULTS, ids=[" ".join(row[0]) for row in FAULTS])
def test_faults(run: Run, source: Path, arguments: tuple[str, ...], what: str, more: str) -> None:
    code, out, err = run("convert", source, "-q", "Q4_0", *arguments, "--dry-run")
    assert code in (2, 11) and out == ""
    assert what in err and more in err


def test_nothing_asked_for(run: Run, source: Path) -> None:
    code, _, err = run("convert", source)
    assert code == 2 and "no quantization named" in err


def test_a_user_rule_that_can_never_match_is_told_with_its_line(run: Run, source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    rule = '\n[[rule]]\ntensor = "blk.*.ffn_up.weight"\ntype = "Q5_0"\nreason = "x"\n'
    recipe.write_text(f'type = "Q4_0"\n{rule}{rule}', "utf-8")
    code, _, err = run("convert", source, "-q", recipe, "--dry-run")
    assert code == 2
    assert f"{recipe}, line 8: a rule that can never match" in " ".join(err.split("\n"))


def test_like_another_file(run: Run, source: Path, tmp_path: Path) -> None:
    first = tmp_path / "first-Q5_1.gguf"
    assert (
        run("convert", source, "-q", "Q5_1@llama.cpp", "--tensor-type", "blk.0.*=Q8_0", "-o", first, "--quiet")[0] == 0
    )
    code, _, err = run("convert", source, "--like", first, "-o", tmp_path, "--quiet")
    assert code == 0, err
    assert (tmp_path / "micro-Q5_1.gguf").read_bytes() == first.read_bytes()
    code, _, err = run("quantize", first, "--like", first, "--dry-run")
    assert code == 2 and "quantized already" in err


def test_k_quants_in_the_per_layer_table_only_when_asked_for_and_with_a_warning(
    run: Run, tiny_checkpoint: Path
) -> None:
    code, _, err = run("convert", tiny_checkpoint, "-q", "Q4_K_M", "--ple", "Q6_K", "--dry-run")
    assert code == 0
    assert "per_layer_token_embd in Q6_K: GPU backends can't look up rows of that type" in err
    assert "per_layer_token_embd" not in run("convert", tiny_checkpoint, "-q", "Q4_K_M", "--dry-run")[2]


def test_matrices_that_do_not_fit_f16_stay_bf16(run: Run, tmp_path: Path) -> None:
    arrays = micro.tensors(micro.config())
    name = "model.language_model.layers.1.laurel.linear_left.weight"
    arrays[name] = micro.bf16_bits(arrays[name].astype("f4") * 0 + 1e-7)
    source = micro.make(tmp_path / "small", arrays=arrays)
    plan = plan_of(run, source, "-q", "Q8_0")
    kept = {name: qtype for name, qtype in plan_types(plan).items() if "laurel" in name and "norm" not in name}
    assert {name for name, qtype in kept.items() if qtype == "BF16"} == {"blk.1.laurel_l.weight"}
    assert set(kept.values()) == {"F16", "BF16"}
    assert any("1 tensors stay BF16" in notice and "blk.1.laurel_l.weight" in notice for notice in plan["notices"])
    assert "BF16" in plan_types(plan_of(run, source, "-q", "Q8_0", "--keep", "bf16")).values()


def test_an_importance_matrix_that_is_missing(run: Run, tiny_checkpoint: Path) -> None:
    code, _, err = run("convert", tiny_checkpoint, "-q", "IQ2_M", "--dry-run")
    assert code == 9
    assert "IQ2_M: IQ2_S needs an importance matrix" in err and "--imatrix" in err
