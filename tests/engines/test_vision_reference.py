"""The vision tower in transformers: that it is taken apart rightly, and what it needs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gguf3n.engines import vision_reference as module
from gguf3n.engines.pictures import Picture, padded
from gguf3n.engines.vision_reference import EndRows, VisionReference
from gguf3n.errors import CheckpointError, ConfigError, UsageError
from gguf3n.gemma3n.source import open_checkpoint

WIDE = Picture(96, 40, 7)
BEFORE, AFTER = "<start_of_turn>user\n\n\n", "\n\nWhat is this?"


@pytest.fixture(scope="module")
def seeing(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(multimodal=True)


@pytest.fixture(scope="module")
def reference(seeing: Path) -> Iterator[VisionReference]:
    with VisionReference(open_checkpoint(seeing), device="cpu") as reference:
        yield reference


def test_the_same_as_the_whole_model(seeing: Path, reference: VisionReference) -> None:
    """Prompt, preparation, embeddings and logits against transformers' own processor and forward."""
    import torch
    import transformers

    own = transformers.AutoProcessor.from_pretrained(seeing, local_files_only=True)
    inputs = own(
        images=WIDE.pixels(),
        text="<bos><start_of_turn>user\n<image_soft_token>What is this?",
        return_tensors="pt",
        add_special_tokens=False,
    )
    (ids,) = reference.prompts(BEFORE, [AFTER])
    assert inputs["input_ids"][0].tolist() == ids
    with torch.no_grad():
        expected = reference._model(**inputs).logits[0].double().log_softmax(-1).numpy()
    seen = reference.see(reference.squashed(WIDE.pixels()))
    positions = [len(ids) - 8, len(ids) - 1]
    found = reference.logprobs(ids, seen, positions)
    np.testing.assert_allclose(found, expected[positions], atol=2e-5)


def test_what_is_given_changes_what_is_said(reference: VisionReference) -> None:
    (ids,) = reference.prompts(BEFORE, [AFTER])
    pixels = WIDE.pixels()
    squashed, as_llama_cpp = (reference.see(each) for each in (reference.squashed(pixels), padded(pixels, 256)))
    nothing = EndRows(np.zeros(256, np.float32), np.zeros(22 * 256, np.float32))
    (one,) = reference.logprobs(ids, squashed, [-1])
    for other in (
        reference.logprobs(ids, as_llama_cpp, [-1]),
        reference.logprobs(ids, squashed, [-1], nothing),
    ):
        assert np.abs(one - other[0]).max() > 1e-3
    assert reference.logprobs(ids, squashed, [-1])[0].tolist() == one.tolist()


def test_a_checkpoint_without_its_tower(tiny_checkpoint: Path, seeing: Path, tmp_path: Path) -> None:
    """Its config.json speaks of one."""
    with pytest.raises(CheckpointError, match="tensors are missing"):
        VisionReference(open_checkpoint(tiny_checkpoint_with_processor(tiny_checkpoint, seeing, tmp_path)))


def tiny_checkpoint_with_processor(tiny: Path, seeing: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder / "x")
    shutil.copy(seeing / "preprocessor_config.json", folder / "x")
    return folder / "x"


def test_a_text_only_checkpoint(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="no vision tower"):
        VisionReference(open_checkpoint(make_checkpoint(layout="text-only")))


def test_a_config_that_leaves_out_what_is_published(seeing: Path, reference: VisionReference) -> None:
    source = open_checkpoint(seeing)
    del source.raw_config["vision_soft_tokens_per_image"]
    assert module.image_tokens(source) == module.image_tokens(open_checkpoint(seeing)) == reference._tokens


@pytest.mark.parametrize(
    ("name", "value"), [("boi_token_id", None), ("image_token_id", 1088), ("vision_soft_tokens_per_image", 255)]
)
def test_tokens_that_cannot_be(seeing: Path, name: str, value: int | None) -> None:
    source = open_checkpoint(seeing)
    source.raw_config[name] = value
    with pytest.raises(ConfigError, match=f"config.json: {name} is no"):
        module.image_tokens(source)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name in ("timm", "torchvision") else found(name)
    )
    with pytest.raises(UsageError) as caught:
        module.check_packages()
    assert "timm, torchvision" in caught.value.what and caught.value.fix == "pip install 'gguf3n[vision]'"


def test_the_small_towers_are_what_config_json_says(seeing: Path, reference: VisionReference) -> None:
    """Every tensor of the tower is in the checkpoint, and no other is."""
    tower = reference._model.model.vision_tower.timm_model.state_dict()
    names = open_checkpoint(seeing).tensors
    prefix = "model.vision_tower.timm_model."
    assert {name: list(tensor.shape) for name, tensor in names.items() if name.startswith(prefix)} == {
        prefix + name: list(tensor.shape) for name, tensor in tower.items()
    }
    assert json.loads((seeing / "preprocessor_config.json").read_text("utf-8"))["size"]["height"] == 256
