"""The main recipes, through llama.cpp: the file loads and says next what the reference model says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.engines.llama_cpp import LlamaCpp
from gguf3n.engines.reference import Reference
from gguf3n.validation.divergence import measure
from workshop.comparison import random_importances

TOKENS = [2, *np.random.default_rng(1).integers(494, 1020, 31).tolist()]

BOUNDS = (
    # measured: random weights and importances, nats
    ("UD-Q4_K_XL", False, 1.2e-2),  # 8.2e-3
    ("UD-Q4_K_XL", True, 1.2e-2),  # 8.3e-3
    ("Q4_K_M", False, 1.2e-2),  # 7.8e-3
    ("UD-Q2_K_XL", False, 1e-1),  # 7.1e-2
    ("UD-IQ2_XXS", True, 1.5e-1),  # 9.9e-2
)


@pytest.mark.parametrize(("name", "guided", "bound"), BOUNDS)
def test_a_recipe_says_what_the_reference_says(
    tiny_checkpoint: Path, tmp_path: Path, name: str, guided: bool, bound: float
) -> None:
    imatrix = random_importances(tiny_checkpoint, complete=False) if guided else None
    (written,) = gguf3n.convert(tiny_checkpoint, name, tmp_path / "x.gguf", imatrix=imatrix)
    with LlamaCpp(written.path, n_ctx=128, n_threads=1) as model:
        found = measure(Reference(tiny_checkpoint).logprobs(TOKENS), model.logprobs(TOKENS))
    assert found.mean <= bound
    assert found.top1_agreement == 1
