"""Source names to GGUF names: complete, unique, and refused where the checkpoint is not one of Gemma 3n."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gguf.constants import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS, TENSOR_NAMES

from gguf3n.errors import MappingError
from gguf3n.formats.rows import SourceTensor, Stored, Zeros
from gguf3n.gemma3n.config import Config
from gguf3n.gemma3n.mapping import MappedTensor, Missing, Storage, TensorMap, map_tensors
from gguf3n.gemma3n.names import bare_name
from gguf3n.gemma3n.published import PUBLISHED, outline
from gguf3n.gemma3n.text import DROPPED, RULES
from gguf3n.gemma3n.text import table as text_table
from workshop import checkpoints

Table = dict[str, Stored]
ROOT = "model.language_model."

SIZES = ("E2B", "E4B")
every_size = pytest.mark.parametrize("size", SIZES)


def table_of(size: str, dtype: str = "BF16") -> Table:
    """A table of a published size, as if all tensors were in one file."""
    table, offset = {}, 0
    for name, shape in checkpoints.read_inventory(checkpoints.INVENTORIES / f"gemma-3n-{size.lower()}.json").items():
        table[name] = Stored(name, dtype, shape, Path("dir/model.safetensors"), offset)
        offset += table[name].stored_bytes
    return table


def mapped(table: Table, config: Config = PUBLISHED["E2B"]) -> TensorMap:
    source = {name: SourceTensor(stored.name, stored.shape, (stored,)) for name, stored in table.items()}
    return map_tensors(text_table(config), source, "dir")


def llama_cpp_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that llama.cpp's loader asks for, numpy order. Source: src/models/gemma3n.cpp, load_arch_tensors."""
    n_embd, n_vocab, n_altup, n_layer = config.hidden_size, config.vocab_size, 4, config.num_hidden_layers
    n_ple, rank, n_head = config.hidden_size_per_layer_input, 64, config.head_dim
    heads, kv_heads = config.num_attention_heads * n_head, config.num_key_value_heads * n_head
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (n_vocab, n_embd),
        "per_layer_token_embd": (n_vocab, n_ple * n_layer),
        "altup_proj": (n_altup - 1, n_embd, n_embd),
        "altup_unembd_proj": (n_altup - 1, n_embd, n_embd),
        "per_layer_model_proj": (n_ple * n_layer, n_embd),
        "per_layer_proj_norm": (n_ple,),
        "output_norm": (n_embd,),
    }
    for i in range(n_layer):
        n_ff = config.intermediate_size[i]
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (n_embd,),
            "attn_q": (heads, n_embd),
            "attn_k": (kv_heads, n_embd),
            "attn_v": (kv_heads, n_embd),
            "attn_output": (n_embd, heads),
            "attn_q_norm": (n_head,),
            "attn_k_norm": (n_head,),
            "post_attention_norm": (n_embd,),
            "ffn_norm": (n_embd,),
            "ffn_gate": (n_ff, n_embd),
            "ffn_up": (n_ff, n_embd),
            "ffn_down": (n_embd, n_ff),
            "post_ffw_norm": (n_embd,),
            "inp_gate": (n_ple, n_embd),
            "proj": (n_embd, n_ple),
            "post_norm": (n_embd,),
            "altup_correct_coef": (n_altup, n_altup),
            "altup_correct_scale": (n_embd,),
            "altup_predict_coef": (n_altup * n_altup, n_altup),
            "altup_router": (n_altup, n_embd),
            "altup_router_norm": (n_embd,),
            "laurel_l": (rank, n_embd),
            "laurel_r": (n_embd, rank),
            "laurel_post_norm": (n_embd,),
        }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


# the table itself


def test_the_rules_write_every_tensor_of_the_architecture_once() -> None:
    targets = [rule.target for rule in RULES]
    assert len(set(targets)) == len(targets) == 31
    assert set(targets) == {
        f"{TENSOR_NAMES[target]}.weight"
        for target in MODEL_TENSORS[MODEL_ARCH.GEMMA3N]
        if target is not MODEL_TENSOR.OUTPUT
    }


def test_every_source_name_stands_once() -> None:
    assert len({rule.source for rule in RULES}) == len(RULES)


def test_a_rule_is_of_a_layer_where_its_target_is() -> None:
    for rule in RULES:
        assert ("{bid}" in rule.source) == ("{bid}" in rule.target)


# both published sizes


@every_size
def test_names_and_shapes_are_those_llama_cpp_asks_for(size: str) -> None:
    config = PUBLISHED[size]
    result = mapped(table_of(size), config)
    names = [tensor.name for tensor in result.tensors]
    assert len(set(names)) == len(names) == {"E2B": 727, "E4B": 847}[size]
    assert {tensor.name: tensor.shape for tensor in result.tensors} == llama_cpp_shapes(config)


@every_size
def test_what_may_be_quantized(size: str) -> None:
    counts = Counter(tensor.storage for tensor in mapped(table_of(size), PUBLISHED[size]).tensors)
    assert (
        counts
        == {
            "E2B": {Storage.FLOAT32: 362, Storage.HALF: 93, Storage.QUANTIZABLE: 272},
            "E4B": {Storage.FLOAT32: 422, Storage.HALF: 108, Storage.QUANTIZABLE: 317},
        }[size]
    )


@every_size
def test_the_number_of_weights(size: str) -> None:
    """The model's own, and the rows that pad the per-layer table to as many as there are tokens."""
    config = PUBLISHED[size]
    padding = 256 * 256 * config.num_hidden_layers
    assert mapped(table_of(size), config).n_weights == {"E2B": 4_456_156_768, "E4B": 6_866_696_688}[size] + padding


@every_size
def test_every_source_tensor_hits_one_rule_or_one_reason(size: str) -> None:
    table, config = table_of(size), PUBLISHED[size]
    patterns = [(why, pattern) for pattern, why in DROPPED]
    for rule in RULES:
        patterns.append((rule.source, re.sub(r"\\\{(bid|k)\\\}", r"\\d+", re.escape(rule.source))))
    hits: Counter[str] = Counter()
    for name in table:
        bare = bare_name(name)
        matching = [what for what, pattern in patterns if re.fullmatch(pattern, bare)]
        assert len(matching) == 1, (name, matching)
        hits[matching[0]] += 1
    for rule in RULES:
        times = config.num_hidden_layers if "{bid}" in rule.source else 3 if "{k}" in rule.source else 1
        assert hits[rule.source] == times, rule.source
    result = mapped(table, config)
    assert dict(result.dropped) == {why: hits[why] for _, why in DROPPED if hits[why]}
    used = [rows.name for tensor in result.tensors for rows in tensor.rows if isinstance(rows, Stored)]
    assert len(used) == len(set(used)) == len(table) - sum(count for _, count in result.dropped)


@every_size
def test_every_row_comes_from_somewhere(size: str) -> None:
    for tensor in mapped(table_of(size), PUBLISHED[size]).tensors:
        assert sum(rows.n_rows for rows in tensor.rows) == tensor.n_rows
        for rows in tensor.rows:
            assert rows.n_per_row == tensor.n_per_row
            if isinstance(rows, Stored):
                assert rows.shape[-1] == tensor.n_per_row
                assert math.prod(rows.shape) == rows.n_rows * tensor.n_per_row


@every_size
def test_the_outline_without_a_checkpoint_is_the_same(size: str) -> None:
    def facts(tensor: MappedTensor) -> tuple[object, ...]:
        return tensor.name, tensor.shape, tensor.storage, tensor.bid, tensor.n_rows, tensor.evaluated

    outlined = [facts(tensor) for tensor in outline(PUBLISHED[size])]
    assert outlined == [facts(tensor) for tensor in mapped(table_of(size), PUBLISHED[size]).tensors]


def test_the_dropped_tensors_are_counted_by_reason() -> None:
    counts = dict(mapped(table_of("E2B")).dropped)
    assert sorted(why.partition(":")[0] for why in counts) == ["audio", "audio embedder", "vision", "vision embedder"]
    assert counts["audio embedder: belongs in the mmproj file (--mmproj)"] == 4
    assert counts["vision embedder: belongs in the mmproj file (--mmproj)"] == 4


# what stands in one place


def by_name(result: TensorMap) -> dict[str, MappedTensor]:
    return {tensor.name: tensor for tensor in result.tensors}


@pytest.mark.parametrize(
    ("target", "source"),
    [("altup_proj", "altup_projections"), ("altup_unembd_proj", "altup_unembed_projections")],
    ids=["proj", "unembd"],
)
def test_altup_matrices_are_stacked_in_order(target: str, source: str) -> None:
    table = table_of("E2B")
    table = dict(reversed(table.items()))  # whatever the order in the file
    tensor = by_name(mapped(table))[f"{target}.weight"]
    assert tensor.rows == tuple(table[f"{ROOT}{source}.{k}.weight"] for k in range(3))
    assert [rows.n_rows for rows in tensor.rows] == [2048] * 3


def test_the_per_layer_table_is_padded_with_zeros_and_the_token_table_is_whole() -> None:
    table, tensors = table_of("E2B"), by_name(mapped(table_of("E2B")))
    assert tensors["token_embd.weight"].rows == (table[f"{ROOT}embed_tokens.weight"],)
    assert tensors["token_embd.weight"].n_rows == 262400
    assert tensors["per_layer_token_embd.weight"].rows == (
        table[f"{ROOT}embed_tokens_per_layer.weight"],
        Zeros(256, 7680),
    )
    assert [rows.n_rows for rows in tensors["per_layer_token_embd.weight"].rows] == [262144, 256]


def with_shape(name: str, *shape: int) -> Callable[[Table], Table]:
    """The table with another shape of one tensor."""

    def change(table: Table) -> Table:
        return table | {ROOT + name: replace(table[ROOT + name], shape=shape)}

    return change


@pytest.mark.parametrize("n_rows", [262144, 262200, 262399, 262400])
@pytest.mark.parametrize(
    ("name", "target", "n_per_row"),
    [("embed_tokens.weight", "token_embd", 2048), ("embed_tokens_per_layer.weight", "per_layer_token_embd", 7680)],
    ids=["token_embd", "per_layer_token_embd"],
)
def test_both_tables_have_as_many_rows_as_tokens(name: str, target: str, n_per_row: int, n_rows: int) -> None:
    tensor = by_name(mapped(with_shape(name, n_rows, n_per_row)(table_of("E2B"))))[f"{target}.weight"]
    assert tensor.shape == (262400, n_per_row)
    assert [(isinstance(rows, Zeros), rows.n_rows) for rows in tensor.rows] == [
        (False, n_rows),
        (True, 262400 - n_rows),
    ][: 1 + (n_rows < 262400)]


def test_a_stack_of_one_matrix() -> None:
    """No published model has it; llama.cpp wants three."""
    shapes = {"correction_coefs": (2, 2), "prediction_coefs": (4, 2), "modality_router": (2, 2048)}
    table = {}
    for name, tensor in table_of("E2B").items():
        if not re.search(r"altup_(unembed_)?projections\.[12]\.", name):
            part = name.removesuffix(".weight").rpartition(".")[2]
            table[name] = replace(tensor, shape=shapes.get(part, tensor.shape))
    tensor = by_name(mapped(table, replace(PUBLISHED["E2B"], altup_num_inputs=2)))["altup_proj.weight"]
    assert tensor.shape == (1, 2048, 2048)
    assert tensor.rows == (table[f"{ROOT}altup_projections.0.weight"],)
    assert tensor.n_rows == 2048


# layouts


def renamed(prefixes: dict[str, str]) -> Callable[[Table], Table]:
    def change(table: Table) -> Table:
        out = {}
        for name, tensor in table.items():
            for prefix, other in prefixes.items():
                if name.startswith(prefix):
                    out[other + name.removeprefix(prefix)] = tensor
                    break
        return out

    return change


LAYOUTS: dict[str, dict[str, str]] = {
    "published": {"model.": "model."},
    "nested": {ROOT: "language_model.model.", "model.": ""},
    "text-only": {ROOT: "model."},
    "bare": {ROOT: "", "model.": ""},
    "language_model": {ROOT: "language_model.", "model.": ""},
    "PEFT, published": {"model.": "base_model.model.model."},
    "PEFT, nested": {ROOT: "base_model.model.language_model.model.", "model.": "base_model.model."},
    "PEFT, text-only": {ROOT: "base_model.model.model."},
}


@pytest.mark.parametrize("prefixes", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_names(prefixes: dict[str, str]) -> None:
    assert mapped(renamed(prefixes)(table_of("E2B"))).tensors == mapped(table_of("E2B")).tensors


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lm_head.weight", "output matrix"),
        ("model.lm_head.weight", "output matrix"),
        ("language_model.lm_head.weight", "output matrix"),
        ("base_model.model.lm_head.weight", "output matrix"),
        ("model.language_model.rotary_emb.inv_freq", "rope base"),
        ("model.language_model.rotary_emb.full_attention_inv_freq", "rope base"),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", "rope base"),
        ("model.vision_tower.anything.at.all", "vision"),
        ("audio_tower.conformer.0.x", "audio"),
    ],
)
def test_what_is_left_out_besides(name: str, why: str) -> None:
    table = table_of("E2B")
    before = dict(mapped(table).dropped)
    after = dict(mapped(table | {name: Stored(name, "BF16", (4,), Path("x"), 0)}).dropped)
    (reason,) = [reason for reason in after if after[reason] != before.get(reason, 0)]
    assert reason.startswith(why) or why in reason
    assert after[reason] == before.get(reason, 0) + 1


# what is missing

SHARED = tuple(f"layers.{{bid}}.self_attn.{part}.weight" for part in ("k_proj", "v_proj", "k_norm"))


def without(*names: str) -> Callable[[Table], Table]:
    return lambda table: {name: tensor for name, tensor in table.items() if name.removeprefix(ROOT) not in names}


@every_size
def test_keys_and_values_of_shared_layers_may_be_missing(size: str) -> None:
    """As in every checkpoint that transformers 5 saves."""
    config = PUBLISHED[size]
    names = [name.format(bid=bid) for bid in range(20, config.num_hidden_layers) for name in SHARED]
    whole, part = mapped(table_of(size), config), mapped(without(*names)(table_of(size)), config)
    assert len(part.synthesized) == len(names) == 3 * config.num_kv_shared_layers
    assert part.synthesized[:3] == ["blk.20.attn_k.weight", "blk.20.attn_k_norm.weight", "blk.20.attn_v.weight"]
    assert whole.synthesized == []
    for before, after in zip(whole.tensors, part.tensors, strict=True):
        if after.name in part.synthesized:
            assert after == replace(before, rows=(Zeros(before.n_rows, before.n_per_row),))
            assert after.source_dtypes == set()
        else:
            assert after == before


@every_size
def test_keys_and_values_are_evaluated_below_the_shared_layers_only(size: str) -> None:
    for tensor in mapped(table_of(size), PUBLISHED[size]).tensors:
        part = tensor.name.split(".")[-2]
        shared = tensor.bid is not None and tensor.bid >= 20 and part in ("attn_k", "attn_v", "attn_k_norm")
        assert tensor.evaluated == (not shared), tensor.name


def every_name_that_must_be_there() -> Iterator[str]:
    for rule in RULES:
        for bid in (0, 19, 29) if "{bid}" in rule.source else (None,):
            if rule.missing is Missing.ERROR or bid in (0, 19):
                yield rule.source.format(bid=bid, k=1)


def test_only_three_tensors_of_a_layer_may_be_missing() -> None:
    assert {rule.source for rule in RULES if rule.missing is not Missing.ERROR} == set(SHARED)


@pytest.mark.parametrize("name", list(every_name_that_must_be_there()))
def test_a_missing_tensor(name: str) -> None:
    with pytest.raises(MappingError) as caught:
        mapped(without(name)(table_of("E2B")))
    assert caught.value.exit_code == 6
    assert caught.value.what == f"dir: tensor {name!r} is missing"


def test_a_config_of_more_layers_than_the_checkpoint() -> None:
    with pytest.raises(MappingError, match=r"embed_tokens_per_layer.* wrong shape"):
        mapped(table_of("E2B"), PUBLISHED["E4B"])


# what is wrong

LAST = "layers.29.mlp.down_proj.weight"


def with_dtype(dtype: str) -> Callable[[Table], Table]:
    return lambda table: table | {ROOT + LAST: replace(table[ROOT + LAST], dtype=dtype)}


def added(*names: str, shape: tuple[int, ...] = (4,), dtype: str = "BF16") -> Callable[[Table], Table]:
    return lambda table: table | {name: Stored(name, dtype, shape, Path("x"), 0) for name in names}


WRONG: dict[str, tuple[Callable[[Table], Table], tuple[str, ...]]] = {
    # change, what the message must say
    "transposed": (with_shape(LAST, 8192, 2048), (LAST, "wrong shape", "[2048, 8192]", "[8192, 2048]")),
    "flat": (with_shape(LAST, 2048 * 8192), (LAST, "wrong shape")),
    "a scalar": (with_shape("norm.weight"), ("norm.weight", "wrong shape", "[2048]", "[]")),
    "one dimension more": (with_shape("norm.weight", 1, 2048), ("norm.weight", "wrong shape")),
    "a stacked matrix of another size": (
        with_shape("altup_projections.2.weight", 2048, 1024),
        ("altup_projections.2.weight", "wrong shape", "[2048, 2048]"),
    ),
    "too few tokens": (with_shape("embed_tokens.weight", 262143, 2048), ("embed_tokens.weight", "wrong shape")),
    "too many tokens": (with_shape("embed_tokens.weight", 262401, 2048), ("embed_tokens.weight", "wrong shape")),
    "tokens of another width": (
        with_shape("embed_tokens.weight", 262144, 1024),
        ("embed_tokens.weight", "wrong shape"),
    ),
    "another matrix that lacks rows": (with_shape(LAST, 2047, 8192), (LAST, "wrong shape")),
    "F64": (with_dtype("F64"), (LAST, "dtype", "BF16, F16, F32", "F64")),
    "FP8": (with_dtype("F8_E4M3"), (LAST, "dtype", "F8_E4M3")),
    "integers": (with_dtype("I8"), (LAST, "dtype", "I8")),
    "the same weight twice": (
        added("language_model.model.norm.weight", shape=(2048,)),
        ("'model.language_model.norm.weight'", "'language_model.model.norm.weight'", "the same weight"),
    ),
    "one unknown": (added("model.language_model.extra"), ("1 tensor(s) that no rule knows", "language_model.extra")),
    "a layer too many": (added("model.language_model.layers.30.mlp.up_proj.weight"), ("no rule knows", "layers.30")),
    "a layer of a strange number": (added("model.language_model.layers.007.mlp.up_proj.weight"), ("no rule knows",)),
    "a fourth AltUp matrix": (added("model.language_model.altup_projections.3.weight"), ("no rule knows",)),
    "a bias": (added("model.language_model.layers.0.self_attn.q_proj.bias"), ("no rule knows", "q_proj.bias")),
    "a name that begins like one": (added("model.language_model.norm.weight.x"), ("no rule knows",)),
    "many unknown": (added(*(f"x{i:02d}" for i in range(25))), ("25 tensor(s)", "x00", "x19", "and 5 more")),
    "LoRA": (
        added("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("LoRA matrices", "lora_A", "merge the adapter"),
    ),
    "LoRA with an adapter's name": (added("x.q_proj.lora_B.default.weight"), ("LoRA matrices",)),
    "unmerged PEFT": (added("model.layers.0.mlp.up_proj.base_layer.weight"), ("unmerged", "merge_and_unload")),
    "GPTQ": (
        added("model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.g_idx"),
        ("quantized already", "qweight", "original checkpoint"),
    ),
    "AWQ": (added("model.layers.0.mlp.up_proj.qzeros"), ("quantized already", "qzeros")),
    "bitsandbytes 4-bit": (
        added("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"),
        ("quantized already", "nf4"),
    ),
    "bitsandbytes 8-bit": (added("model.layers.0.mlp.up_proj.SCB"), ("quantized already", "SCB")),
    "FP8 with scales": (added("model.layers.0.mlp.up_proj.weight_scale_inv"), ("quantized already", "weight_scale")),
    "FSDP": (added("model._fsdp_wrapped_module._flat_param_0"), ("FSDP", "merge-weights")),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_table(change: Callable[[Table], Table], said: tuple[str, ...]) -> None:
    with pytest.raises(MappingError) as caught:
        mapped(change(table_of("E2B")))
    assert caught.value.exit_code == 6
    for text in said:
        assert text in str(caught.value)
    assert "x20" not in str(caught.value)


def test_a_tensor_that_is_wrong_is_named_with_its_file() -> None:
    with pytest.raises(MappingError) as caught:
        mapped(with_shape("norm.weight", 2047)(table_of("E2B")))
    assert caught.value.what == f"dir/model.safetensors: tensor '{ROOT}norm.weight' has the wrong shape"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_dtype_of_weights(dtype: str) -> None:
    result = mapped(table_of("E2B", dtype))
    assert {dtype} == set().union(*(tensor.source_dtypes for tensor in result.tensors))
