"""Each fault of lint's table that an mmproj file can have, whether it fits a text model, what inspect says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.cli import main
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.inspection import summary
from gguf3n.inspection.f16_inputs import input_bounds
from gguf3n.inspection.lint import CHECKS, Group, lint
from gguf3n.inspection.repair import FIXES, repair
from gguf3n.inspection.subject import Subject
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
    """The small checkpoint's text model and encoders, without audio and with. Not to be changed."""
    source, folder = make_checkpoint(multimodal=True), tmp_path_factory.mktemp("lint")
    text, with_audio = gguf3n.convert(source, "Q8_0", folder, mmproj="F16")
    (vision,) = gguf3n.convert(source, mmproj="F16", output=folder / "mmproj-vision.gguf", audio=False)
    return {"text": text.path, "audio": with_audio.path, "vision": vision.path}


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


def test_every_check_has_a_fault() -> None:
    wanted = {check.id for check in CHECKS if check.group in (Group.MMPROJ, Group.VALUES, Group.MMPROJ_DATA)}
    assert set(PLANTS) == wanted - {"idle-audio"}


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


def test_another_projector_is_not_checked(copy: Path) -> None:
    set_key(copy, "clip.vision.projector_type", VT.STRING, "gemma3")
    report = lint(copy)
    assert report.skipped is not None and "no projector is Gemma 3n's" in report.skipped


def test_a_pair(converted: dict[str, Path], copy: Path, tmp_path: Path) -> None:
    def found(text: Path, encoders: Path) -> set[str]:
        report = lint(text, beside=open_gguf(encoders, strict=False))
        return {finding.check.id for finding in report.findings if finding.check.group is Group.PAIR}

    assert found(converted["text"], copy) == set()
    change_tensor(copy, "mm.input_projection.weight", shape=(128, 512))
    assert found(converted["text"], copy) == {"fit-width"}
    old = Path(shutil.copy(converted["text"], tmp_path / "old.gguf"))
    name = "tokenizer.ggml.tokens"
    texts = open_gguf(old).value(name)
    assert isinstance(texts, list)
    set_array(old, name, VT.STRING, ["?" if text == "<end_of_image>" else text for text in texts])
    assert found(old, converted["vision"]) == {"fit-images"}


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


def test_the_commands(
    converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gguf3n", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
        return capsys.readouterr().out

    text, encoders = converted["text"], converted["audio"]
    assert "vision blocks" in run("inspect", encoders)
    assert json.loads(run("inspect", encoders, "--json"))["encoders"]["encoders"] == "vision and audio"
    assert json.loads(run("inspect", text, "--json"))["encoders"] is None
    said = run("lint", text, "--mmproj", encoders)
    assert said.index(str(text)) < said.index(str(encoders)) < said.index("idle-audio")
    both = json.loads(run("lint", text, "--mmproj", encoders, "--json"))
    assert both["ok"] and both["mmproj"]["ok"]
    assert [finding["id"] for finding in both["mmproj"]["findings"]] == ["idle-audio"]
