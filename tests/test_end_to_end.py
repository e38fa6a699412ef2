"""From a checkpoint to llama.cpp: what it says next is what the reference model says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType

import gguf3n
from gguf3n.engines.llama_cpp import LlamaCpp
from gguf3n.engines.reference import Reference
from gguf3n.formats.imatrix import Entry, ImportanceMatrix
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.part import text_part
from gguf3n.quants import QUANTIZERS
from gguf3n.validation.divergence import Divergence, measure

TOKENS = [2, *np.random.default_rng(1).integers(494, 1020, 31).tolist()]

LADDER: tuple[tuple[str, float], ...] = (
    ("F32", 1e-5),
    ("F16", 1e-5),
    ("BF16", 1e-4),
    ("Q8_0", 1e-3),
    ("Q5_1", 2e-2),
    ("Q5_0", 3e-2),
    ("Q4_1", 6e-2),
    ("Q4_0", 1e-1),
)
"""Type and the mean KL divergence it must stay below, in nats; each rung also stays below the next one's measure."""


SINGLE_TYPES: tuple[tuple[str, float], ...] = (
    ("Q8_0", 4e-4),
    ("Q6_K", 2e-3),
    ("Q5_1", 5e-3),
    ("Q5_K", 5e-3),
    ("Q5_0", 6e-3),
    ("Q4_1", 1.6e-2),
    ("Q4_K", 1.7e-2),
    ("IQ4_NL", 1.8e-2),
    ("IQ4_XS", 1.9e-2),
    ("Q4_0", 2.2e-2),
    ("Q3_K", 5e-2),
    ("IQ3_S", 5e-2),
    ("IQ3_XXS", 8e-2),
    ("IQ2_S", 1.3e-1),
    ("Q2_K", 1.5e-1),
    ("IQ2_XS", 1.6e-1),
    ("IQ2_XXS", 1.8e-1),
    ("IQ1_S", 2.6e-1),
    ("IQ1_M", 2.8e-1),
    ("TQ2_0", 4.8e-1),
    ("TQ1_0", 4.8e-1),
)
"""Type of every layer matrix and a bound on the mean KL divergence, twice what was measured."""

BANDS = (
    ("Q8_0",),
    ("Q6_K",),
    ("Q5_K", "Q5_0"),
    ("Q4_K", "Q4_0"),
    ("Q3_K", "IQ3_XXS"),
    ("IQ2_S", "IQ2_XXS"),
    ("IQ1_S",),
)
"""What must come in this order, whatever the rest does: more bits, less divergence."""


N_TEXT = 1024
"""Tokens of the text: the mark that ends a picture, which follows them, has an output row that is not the model's."""


def divergence(checkpoint: Path, quant: str, directory: Path, **options: str) -> Divergence:
    """Convert, load in llama.cpp, compare the text's tokens with transformers on the same checkpoint."""
    (written,) = gguf3n.convert(checkpoint, quant, directory / f"{quant}.gguf", **options)
    with LlamaCpp(written.path, n_ctx=128, n_threads=1) as model:
        reference, found = Reference(checkpoint).logprobs(TOKENS), model.logprobs(TOKENS)
        return measure((row[:N_TEXT] for row in reference), (row[:N_TEXT] for row in found))


def test_every_type_says_what_the_reference_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    reference = list(Reference(tiny_checkpoint).logprobs(TOKENS))
    means = []
    for quant, bound in LADDER:
        (written,) = gguf3n.convert(tiny_checkpoint, quant, tmp_path / f"{quant}.gguf")
        with LlamaCpp(written.path, n_ctx=128, n_threads=1) as model:
            found = measure(reference, model.logprobs(TOKENS))
        assert found.mean <= bound, quant
        if quant in ("F32", "F16", "BF16", "Q8_0"):
            assert found.top1_agreement == 1, quant
        means.append(found.mean)
    assert means[1:] == sorted(means[1:])  # F32 and F16 are both at the engines' own noise


def test_single_types_stand_in_order(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = gguf3n.read_source(tiny_checkpoint)
    imatrix = ImportanceMatrix(
        tmp_path / "ones.gguf",
        {
            tensor.name: Entry(np.ones((1, tensor.n_per_row), np.float32), np.ones(1, np.float32))
            for tensor in text_part(model).tensors
            if tensor.storage is Storage.QUANTIZABLE and tensor.bid is not None and tensor.evaluated
        },
    )
    reference = list(Reference(tiny_checkpoint).logprobs(TOKENS))
    means = {}
    for name, bound in SINGLE_TYPES:
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(f'type = "{name}"\ntoken_embd = "Q8_0"\nple = "Q8_0"\nunevaluated = "Q2_K"\n')
        (written,) = gguf3n.convert(model, str(recipe), tmp_path / f"{name}.gguf", imatrix=imatrix)
        with LlamaCpp(written.path, n_ctx=128, n_threads=1) as engine:
            found = measure(reference, engine.logprobs(TOKENS))
        means[name] = found.mean
        assert found.mean <= bound, name
    assert {QType[name] for name in means} == set(QUANTIZERS) - {QType.F32, QType.F16, QType.BF16}
    for better, worse in itertools.pairwise(BANDS):
        assert max(means[name] for name in better) < min(means[name] for name in worse), (better, worse)


@pytest.mark.parametrize(
    "options",
    [
        {"shared_kv": False, "tokenizer": "json"},
        {"tokenizer": "json"},
        {"layout": "text-only", "dtype": "f32"},
        {"layout": "nested", "shards": 3},
        {"layout": "peft-prefix", "dtype": "f16"},
        {"multimodal": True},
    ],
    ids=["transformers-5", "tokenizer-json", "text-only", "nested-sharded", "peft-prefix", "multimodal"],
)
def test_every_layout_says_what_the_reference_says(
    make_checkpoint: Callable[..., Path], tmp_path: Path, options: dict[str, str | int | bool]
) -> None:
    found = divergence(make_checkpoint(**options), "F32", tmp_path)
    assert found.mean <= 1e-5
    assert found.top1_agreement == 1


def test_a_fine_tune_saved_by_transformers(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """What the installed transformers itself saves: names, config and tokenizer files of its own, no shared keys."""
    import transformers

    source, saved = make_checkpoint(layout="text-only"), tmp_path / "saved"
    transformers.Gemma3nForCausalLM.from_pretrained(source, local_files_only=True).save_pretrained(saved)
    transformers.AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(saved)
    assert not (saved / "tokenizer.model").exists()
    plan = gguf3n.plan(saved, "F32")
    assert sum(tensor.source.missing for tensor in plan.tensors) == 6
    (written,) = gguf3n.convert(saved, "F32", tmp_path / "saved.gguf")
    reference = Reference(source)
    with LlamaCpp(written.path, n_ctx=128, n_threads=1) as model:
        found = measure(reference.logprobs(TOKENS), model.logprobs(TOKENS))
        assert model.tokenize("A cat  sat.\n<start_of_turn>user\n") == reference.tokenize(
            "A cat  sat.\n<start_of_turn>user\n"
        )
    assert found.mean <= 1e-5


def test_both_tokenizer_files_tokenize_alike(
    tiny_checkpoint: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    texts = (
        "Hello  world",
        "naïve café — 数学 🙂",
        "<start_of_turn>user\nHi<end_of_turn>\n",
        "\t\ttabs\n\n\n",
        "x" * 40,
    )
    reference = Reference(tiny_checkpoint)
    expected = [reference.tokenize(text) for text in texts]
    for name in ("model", "json"):
        (written,) = gguf3n.convert(make_checkpoint(tokenizer=name), "BF16", tmp_path / f"{name}.gguf")
        with LlamaCpp(written.path, n_ctx=128, n_threads=1) as model:
            assert [model.tokenize(text) for text in texts] == expected
