"""Each fault of lint's table that an mmproj file can have, whether it fits a text model, what inspect says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.inspection import summary
from gguf3n.inspection.f16_inputs import input_bounds
from gguf3n.inspection.lint import CHECKS, Group, lint
from gguf3n.inspection.repair import FIXES, repair
from gguf3n.inspection.subject import Subject
from tests.command_line import Run
from tests.inspection.faults import (
    Plant,
    change_tensor,
    drafted,
    drop_tensors,
    set_array,
    set_key,
    unset_key,
    write,
)

NORM = "v.blk.2.1.pw_proj.bn.weight"
GAMMA = "v.blk.1.1.layer_scale.gamma"
CONVOLUTION = "v.msfa.ffn.pw_exp.conv.weight"


def zeroed(path: Path, name: str) -> None:
    write(path, name, bytes(open_gguf(path).tensors[name].n_bytes))


def add_tensor(path: Path, name: str) -> None:
    with drafted(path) as draft:
        draft.tensors.append(replace(draft.tensors[-1], name=name))


def renamed(path: Path) -> Path:
    return Path(shutil.move(path, path.with_name("vision.gguf")))


PLANTS: dict[str, tuple[Plant, set[str]]] = {
    "mmproj-key": (lambda path: unset_key(path, "clip.vision.image_size"), set()),
    "mmproj-key-type": (lambda path: set_key(path, "clip.vision.image_size", VT.FLOAT32, 256.0), set()),
    "mmproj-encoder": (lambda path: set_key(path, "clip.has_vision_encoder", VT.BOOL, False), set()),
    "mmproj-projector": (lambda path: set_key(path, "clip.projector_type", VT.STRING, "gemma3nv"), set()),
    "mmproj-image-size": (lambda path: set_key(path, "clip.vision.patch_size", VT.UINT32, 14), set()),
    "mmproj-tensor": (lambda path: drop_tensors(path, NORM), set()),
    "mmproj-extra-tensor": (lambda path: add_tensor(path, "mm.extra"), set()),
    "mmproj-shape": (lambda path: change_tensor(path, NORM, shape=(40, 2)), set()),
    "layer-scale": (lambda path: change_tensor(path, GAMMA, shape=(32,)), set()),
    "convolution-type": (lambda path: change_tensor(path, CONVOLUTION, qtype=QType.BF16), set()),
    "mmproj-float-tensor": (lambda path: change_tensor(path, NORM, qtype=QType.F16, shape=(80,)), set()),
    "mmproj-width": (lambda path: set_key(path, "clip.vision.embedding_length", VT.UINT32, 64), set()),
    "mmproj-type": (lambda path: set_key(path, "general.type", VT.STRING, "model"), set()),
    "mmproj-name": (renamed, set()),
    "bad-value": (lambda path: write(path, NORM, b"\x00\x00\x80\x7f"), {"f16-input"}),
    "all-zero": (lambda path: zeroed(path, "mm.hard_emb_norm.weight"), set()),
    "f16-range": (lambda path: write(path, CONVOLUTION, b"\xff\x7b"), set()),
    "f16-input": (lambda path: write(path, NORM, np.float32(1e6).tobytes()), set()),
}
"""Check -> its fault, and what else that brings with it."""


@pytest.fixture(scope="module")
def converted(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small checkpoint's text model and encoders: all, vision alone, audio alone. Not to be changed."""
    source, folder = make_checkpoint(multimodal=True), tmp_path_factory.mktemp("lint")
    text, with_audio = gguf3n.convert(source, "Q8_0", folder, mmproj="F16")
    (vision,) = gguf3n.convert(source, mmproj="F16", output=folder / "mmproj-vision.gguf", audio=False)
    (blind,) = gguf3n.convert(source, mmproj="F16", output=folder / "mmproj-audio.gguf", vision=False)
    return {"text": text.path, "audio": with_audio.path, "vision": vision.path, "blind": blind.path}


@pytest.fixture
def copy(converted: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(converted["vision"], tmp_path / "mmproj-copy.gguf"))


def ids(path: Path) -> set[str]:
    return {finding.check.id for finding in lint(path, with_data=True).findings}


def test_sound_files(converted: dict[str, Path]) -> None:
    report = lint(converted["vision"], with_data=True)
    assert report.findings == () and report.skipped is None
    groups = (Group.LAYOUT, Group.MMPROJ, Group.VALUES, Group.MMPROJ_DATA)
    assert report.n_checks == sum(check.group in groups for check in CHECKS)
    assert ids(converted["audio"]) == {"idle-audio"}
    assert ids(converted["blind"]) == {"audio-alone"}


def test_every_check_has_a_fault() -> None:
    wanted = {check.id for check in CHECKS if check.group in (Group.MMPROJ, Group.VALUES, Group.MMPROJ_DATA)}
    assert set(PLANTS) == wanted - {"idle-audio", "audio-alone"}


@pytest.mark.parametrize("check_id", PLANTS)
def test_a_fault_is_named(copy: Path, check_id: str) -> None:
    plant, more = PLANTS[check_id]
    path = plant(copy) or copy
    assert ids(path) == {check_id} | more


@pytest.mark.parametrize("check_id", [check_id for check_id in FIXES if check_id in PLANTS])
def test_a_fault_is_mended(copy: Path, converted: dict[str, Path], check_id: str) -> None:
    sound = copy.read_bytes()
    PLANTS[check_id][0](copy)
    assert [fix.check_id for fix in repair(copy).fixes] == [check_id]
    assert copy.read_bytes() == sound
    assert repair(converted["audio"], dry_run=True).fixes == ()


def test_a_tower_of_another_kind(copy: Path) -> None:
    drop_tensors(copy, *(name for name in open_gguf(copy).tensors if name.startswith("v.blk.1.")))
    (finding,) = (finding for finding in lint(copy).findings if finding.check.id == "mmproj-tensor")
    assert "block 1.0 of the vision tower is missing" in finding.found


CLAIMS: dict[str, tuple[Plant, set[str], str]] = {
    "another projector": (
        lambda path: set_key(path, "clip.vision.projector_type", VT.STRING, "gemma3"),
        {"mmproj-encoder"},
        "clip.vision.projector_type is 'gemma3', and the tensors are those of 'gemma3nv'",
    ),
    "no projector": (
        lambda path: unset_key(path, "clip.vision.projector_type"),
        {"mmproj-key"},
        "clip.vision.projector_type",
    ),
    "a denial": (
        lambda path: set_key(path, "clip.has_vision_encoder", VT.BOOL, False),
        {"mmproj-encoder"},
        "clip.has_vision_encoder is False, and there are tensors of vision",
    ),
    "a claim": (
        lambda path: set_key(path, "clip.has_audio_encoder", VT.BOOL, True),
        {"mmproj-encoder"},
        "clip.has_audio_encoder is True, and there are no tensors of audio",
    ),
}
"""What keys say of the encoders, whose tensors say otherwise: with which findings, the first in which words."""


@pytest.mark.parametrize("case", CLAIMS)
def test_keys_that_tensors_belie(copy: Path, case: str) -> None:
    plant, expected, words = CLAIMS[case]
    plant(copy)
    assert ids(copy) == expected
    assert lint(copy).findings[0].found == words


def test_an_audio_encoder_without_its_keys(converted: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(converted["blind"], tmp_path / "mmproj-copy.gguf"))
    for name in ("clip.audio.projector_type", "clip.has_audio_encoder"):
        unset_key(path, name)
    assert ids(path) == {"mmproj-key", "audio-alone"}


def drop_own_tensors(path: Path) -> None:
    drop_tensors(path, *(name for name in open_gguf(path).tensors if name.startswith("v.msfa.")))


def test_an_encoder_of_another_model_is_not_checked(copy: Path) -> None:
    drop_own_tensors(copy)
    set_key(copy, "clip.vision.projector_type", VT.STRING, "gemma3")
    report = lint(copy)
    assert report.skipped is not None and "no projector is Gemma 3n's" in report.skipped


def test_a_pair(converted: dict[str, Path], copy: Path, tmp_path: Path) -> None:
    def found(text: Path, encoders: Path) -> set[str]:
        report = lint(text, beside=open_gguf(encoders, strict=False))
        return {finding.check.id for finding in report.findings if finding.check.group is Group.PAIR}

    assert found(converted["text"], copy) == set()
    set_key(copy, "clip.vision.projection_dim", VT.UINT32, 128)
    assert found(converted["text"], copy) == {"fit-key"}
    set_key(copy, "clip.vision.projection_dim", VT.UINT32, 256)
    change_tensor(copy, "mm.input_projection.weight", shape=(128, 512))
    assert found(converted["text"], copy) == {"fit-width"}
    old = Path(shutil.copy(converted["text"], tmp_path / "old.gguf"))
    name = "tokenizer.ggml.tokens"
    texts = open_gguf(old).value(name)
    assert isinstance(texts, list)
    set_array(old, name, VT.STRING, ["?" if text == "<end_of_image>" else text for text in texts])
    assert found(old, converted["vision"]) == {"fit-images"}


@pytest.mark.parametrize("kinds", [("text", "text"), ("vision", "text"), ("vision", "audio")])
def test_no_pair(converted: dict[str, Path], kinds: tuple[str, str]) -> None:
    text, encoders = (converted[kind] for kind in kinds)
    with pytest.raises(UsageError, match="of a Gemma 3n") as caught:
        lint(text, beside=open_gguf(encoders))
    wrong, found = (encoders, "gemma3n") if kinds[0] == "text" else (text, "clip")
    assert str(wrong) in caught.value.what and caught.value.found == found
    assert caught.value.fix == "gguf3n lint TEXT.gguf --mmproj MMPROJ.gguf"


def test_no_pair_with_another_model(converted: dict[str, Path], copy: Path) -> None:
    drop_own_tensors(copy)
    set_key(copy, "clip.vision.projector_type", VT.STRING, "gemma3")
    with pytest.raises(UsageError, match="not the mmproj file") as caught:
        lint(converted["text"], beside=open_gguf(copy))
    assert caught.value.found == "clip, and no projector is Gemma 3n's"


def test_bounds_hold_for_what_goes_in(converted: dict[str, Path]) -> None:
    """A tower computed in float64, of noise and of extreme images: no input exceeds its bound, and some come near."""
    gguf = open_gguf(converted["vision"])
    tower = Subject(gguf).encoders.tower
    assert tower is not None
    bounds = input_bounds(gguf, tower)
    assert len(bounds) == sum(name.endswith("proj.weight") or ".conv" in name or "down_conv" in name for name in bounds)
    from tests.inspection.tower_in_numpy import inputs

    rng = np.random.default_rng(0)
    images = [rng.random((3, 64, 64)), np.ones((3, 64, 64)), rng.integers(0, 2, (3, 64, 64)).astype(float)]
    largest = dict.fromkeys(bounds, 0.0)
    for image in images:
        for name, value in inputs(gguf, tower, image):
            largest[name] = max(largest[name], value)
    assert all(0 < largest[name] <= bound for name, bound in bounds.items())
    assert max(largest[name] / bound for name, bound in bounds.items()) > 0.2


def test_inspect_says_what_the_encoders_are(converted: dict[str, Path]) -> None:
    facts = dict(summary.facts(open_gguf(converted["audio"])))
    assert facts["encoders"] == "vision and audio"
    assert facts["vision blocks"] == "11 (MobileNet-V5, stages of 2, 2, 4, 3)"
    assert facts["tokens an image"] == "256" == facts["image size"] == facts["text width"]
    assert facts["audio layers"] == "2"
    assert dict(summary.facts(open_gguf(converted["vision"])))["encoders"] == "vision"
    assert "chat template" not in facts


def test_the_commands(run: Run, converted: dict[str, Path]) -> None:
    def said_by(*arguments: object) -> str:
        code, out, _ = run(*arguments)
        assert code == 0
        return out

    text, encoders = converted["text"], converted["audio"]
    assert "vision blocks" in said_by("inspect", encoders)
    assert json.loads(said_by("inspect", encoders, "--json"))["encoders"]["encoders"] == "vision and audio"
    assert json.loads(said_by("inspect", text, "--json"))["encoders"] is None
    said = said_by("lint", text, "--mmproj", encoders)
    assert said.index(str(text)) < said.index(str(encoders)) < said.index("idle-audio")
    both = json.loads(said_by("lint", text, "--mmproj", encoders, "--json"))
    assert both["ok"] and both["mmproj"]["ok"]
    assert [finding["id"] for finding in both["mmproj"]["findings"]] == ["idle-audio"]
