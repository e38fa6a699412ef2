"""Which file a tag gives: the traps that the rules of llama.cpp, the Hub and Ollama set, and our own names."""

from __future__ import annotations

from pathlib import Path

import pytest

import gguf3n
from gguf3n.publishing import labels
from gguf3n.recipes import find_recipe, preset_names, variant_names


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("gemma-3n-E4B-it-Q4_K_M.gguf", "Q4_K_M"),
        ("gemma-3n-E4B-it-q4_k_m.gguf", "Q4_K_M"),
        ("gemma-3n-E4B-it-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("gemma-3n-E4B-it-BF16.gguf", "BF16"),
        ("gemma-3n-E4B-it-BF16-Q8_0.gguf", "Q8_0"),  # the last counts
        ("gemma-3n-E4B-it-Q4_K_M@llama.cpp.gguf", "Q4_K_M"),
        ("gemma-3n-E4B-it-Q2_K_L.gguf", "Q2_K_L"),
        ("gemma-3n-E4B-it-Q3_K.gguf", None),  # K-quants of three bits have a letter
        ("gemma-3n-E4B-it-mine.gguf", None),
        ("gemma-3n-E4B-it-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("mmproj-gemma-3n-E4B-it-F16.gguf", "F16"),
        ("Q8_0/part.gguf", "Q8_0"),
    ],
)
def test_the_hubs_label(name: str, label: str | None) -> None:
    assert labels.hub_label(name) == label


@pytest.mark.parametrize(
    ("names", "tag", "file"),
    [
        (["m-BF16.gguf", "m-F16.gguf"], "F16", "m-BF16.gguf"),
        (["m-F16.gguf"], "F16", "m-F16.gguf"),
        (["m-Q2_0.gguf", "a-TQ2_0.gguf"], "Q2_0", "a-TQ2_0.gguf"),
        (["m-UD-Q4_K_XL.gguf"], "Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        (["m-Q4_K_M@llama.cpp.gguf"], "Q4_K_M", None),
        (["m-Q4_K_M.gguf"], "q4_k_m", "m-Q4_K_M.gguf"),
        (["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf"], "Q4_K_M", "m-Q4_K_M-00001-of-00002.gguf"),
        (["m-imatrix-Q4_K_M.gguf", "mmproj-m-F16.gguf"], "Q4_K_M", None),
        (["Q4_K_M-folder/m.gguf"], "Q4_K_M", "Q4_K_M-folder/m.gguf"),
        (["b-Q8_0.gguf", "a-BF16.gguf"], None, "b-Q8_0.gguf"),
        (["b-Q8_0.gguf", "c-Q4_K_M.gguf"], None, "c-Q4_K_M.gguf"),
        (["b-Q6_K.gguf", "B-Q5_0.gguf"], None, "B-Q5_0.gguf"),  # capitals are listed first
        (["mmproj-m-F16.gguf"], None, None),
        (["m-Q4_K_M.gguf"], "llama.cpp-Q4_K_M", None),
        (["m-Q4x0-.gguf"], "Q4.0", None),
    ],
)
def test_llama_cpps_choice(names: list[str], tag: str | None, file: str | None) -> None:
    assert labels.llama_cpp_file(names, tag) == labels.llama_cpp_file(names[::-1], tag) == file


@pytest.mark.parametrize(
    ("names", "tag", "files"),
    [
        (["m-BF16.gguf", "m-F16.gguf"], "f16", ["m-F16.gguf"]),
        (["m-UD-Q4_K_XL.gguf"], "Q4_K_XL", []),
        (["m-UD-Q4_K_XL.gguf"], "ud-q4_k_xl", ["m-UD-Q4_K_XL.gguf"]),
        (["m-Q4_K_M.gguf", "m-llama.cpp-Q4_K_M.gguf"], "Q4_K_M", ["m-Q4_K_M.gguf", "m-llama.cpp-Q4_K_M.gguf"]),
        (["m-Q4_K_M.gguf", "m-llama.cpp-Q4_K_M.gguf"], "m-Q4_K_M.gguf", ["m-Q4_K_M.gguf"]),
        (["m-Q4_K_M-00001-of-00002.gguf"], "Q4_K_M", []),
        (["m-Q8_0.gguf", "m-mine.gguf"], None, ["m-Q8_0.gguf", "m-mine.gguf"]),
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], None, ["m-Q4_K_M.gguf"]),
        (["m-mine.gguf"], "m-mine.gguf", ["m-mine.gguf"]),
    ],
)
def test_ollamas_choice(names: list[str], tag: str | None, files: list[str]) -> None:
    assert labels.ollama_candidates(names, tag) == files


@pytest.mark.parametrize(
    ("names", "model", "file"),
    [
        (["mmproj-m-F16.gguf", "mmproj-m-Q8_0.gguf"], "m-Q4_K_M.gguf", "mmproj-m-Q8_0.gguf"),
        (["mmproj-m-F16.gguf", "mmproj-m-lossless.gguf"], "m-Q4_K_M.gguf", "mmproj-m-lossless.gguf"),
        (["mmproj-m-F16.gguf", "a/mmproj-m-F32.gguf"], "a/m-Q4_K_M.gguf", "a/mmproj-m-F32.gguf"),
        (["a/mmproj-m-F16.gguf"], "m-Q4_K_M.gguf", None),
        (["mmproj-m-F16.gguf"], "m-BF16-00001-of-00002.gguf", "mmproj-m-F16.gguf"),
    ],
)
def test_the_mmproj_file_that_llama_cpp_takes(names: list[str], model: str, file: str | None) -> None:
    assert labels.llama_cpp_mmproj(names, model) == file


def test_labels_have_their_models() -> None:
    names = ["m-Q8_0.gguf", "x-Q8_0.gguf", "mmproj-F16.gguf", "m-mine.gguf", "m-F16-00001-of-00002.gguf"]
    names += ["m-F16-00002-of-00002.gguf", "README.md"]
    assert labels.tags(names) == {"Q8_0": ["m-Q8_0.gguf", "x-Q8_0.gguf"], "F16": ["m-F16-00001-of-00002.gguf"]}


@pytest.mark.parametrize("preset", preset_names())
def test_every_name_that_we_make_is_found_by_its_tag(preset: str) -> None:
    """Alone by its quantization's name in both programs; together the plain one is, and the variants by their own."""
    recipes = [find_recipe(name) for name in (preset, *variant_names(preset))]
    files = [f"gemma-3n-E4B-it-{recipe.label}.gguf" for recipe in recipes]
    assert len(set(files)) == len(files)
    for recipe, file in zip(recipes, files, strict=True):
        assert labels.hub_label(file) == preset.upper()
        assert labels.llama_cpp_file([file], preset) == file and labels.ollama_candidates([file], preset) == [file]
        assert labels.llama_cpp_file(files, recipe.label) == file
        assert labels.ollama_candidates(files, file) == [file]


def test_a_mixture_of_llama_cpp_has_a_name_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    made = gguf3n.convert(tiny_checkpoint, ["Q4_0", "Q4_0@llama.cpp", "Q4_0@2025"], tmp_path)
    ends = [each.path.name.removeprefix(made[0].path.name.removesuffix("-Q4_0.gguf")) for each in made]
    assert ends == ["-Q4_0.gguf", "-llama.cpp-Q4_0.gguf", "-llama.cpp-2025-Q4_0.gguf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(each.path.name for each in made)
    assert labels.llama_cpp_file([each.path.name for each in made], "Q4_0") == made[0].path.name


def test_a_recipe_of_ones_own_keeps_its_name(tmp_path: Path) -> None:
    for name in ("mine", "mine@home"):
        (tmp_path / "r.toml").write_text(f'name = "{name}"\ninherit = "Q4_0"\n')
        assert find_recipe(str(tmp_path / "r.toml")).label == name
