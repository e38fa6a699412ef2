"""Manifests, and files that are made again from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n import cli
from gguf3n.conversion import parse_options
from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.gguf_writer import lay_out
from gguf3n.formats.imatrix import Entry, ImportanceMatrix, write_imatrix
from gguf3n.publishing.manifest import manifest_path, read_manifest, record_recipe
from gguf3n.publishing.verify import Comparison
from gguf3n.recipes import For, find_recipe, format_recipe, parse_recipe, preset_names
from tests import micro

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in the test's directory; gives its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["gguf3n", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return micro.make(tmp_path / "model")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def an_imatrix(source: Path, path: Path) -> Path:
    part = gguf3n.text_part(gguf3n.read_source(source))
    rng = np.random.default_rng(1)
    entries = {
        tensor.name: Entry(rng.random((1, tensor.n_per_row), np.float32) * 8, np.array([8], np.float32))
        for tensor in part.tensors
        if tensor.name.endswith(("ffn_down.weight", "attn_q.weight"))
    }
    write_imatrix(ImportanceMatrix(Path("x"), entries, ("text.txt",), 1, 8), path, force=True)
    return path


def test_what_a_manifest_says(run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "model", "-q", "Q4_0", "--ple", "Q5_1", "--manifest", "--json") == 0
    [output] = json.loads(capsys.readouterr().out)["outputs"]
    path = tmp_path / output["path"]
    assert output["manifest"] == "model-Q4_0.manifest.json"
    said = json.loads((tmp_path / output["manifest"]).read_text())
    assert said["schema"] == "gguf3n.manifest/1"
    assert said["file"] == {"name": "model-Q4_0.gguf", "bytes": path.stat().st_size, "sha256": sha256(path)}
    for name, digest in said["source"]["files"].items():
        assert digest == sha256(source / name)
    assert {"config.json", "tokenizer.json", "model.safetensors"} < set(said["source"]["files"])
    assert said["command"] == ["gguf3n", "convert", "model", "-q", "Q4_0", "--ple", "Q5_1", "--manifest", "--json"]
    assert said["versions"]["gguf3n"] == gguf3n.__version__ and said["versions"]["numpy"] == np.__version__
    assert [rule["type"] for rule in said["recipe"]["overrides"]] == ["Q5_1"]
    gguf = open_gguf(path)
    assert said["tensors"] == {
        name: hashlib.sha256(gguf.read(tensor)).hexdigest() for name, tensor in gguf.tensors.items()
    }


def test_no_manifest_unless_asked_for(run: Run, source: Path, tmp_path: Path) -> None:
    assert run("convert", "model", "-q", "Q8_0", "--quiet") == 0
    assert not manifest_path(tmp_path / "model-Q8_0.gguf").exists()


def test_secrets_are_no_part_of_a_manifest(run: Run, source: Path, tmp_path: Path) -> None:
    assert run("convert", "model", "-q", "Q8_0", "--manifest", "--quiet", "-o", "hf_abcdefghijklmnop") == 0
    assert "hf_abcdefghijklmnop" not in (tmp_path / "hf_abcdefghijklmnop/model-Q8_0.manifest.json").read_text()


def test_a_manifest_in_the_way(run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model-Q8_0.manifest.json").write_text("mine")
    assert run("convert", "model", "-q", "Q8_0", "--manifest") == 10
    assert "model-Q8_0.manifest.json exists already" in capsys.readouterr().err
    assert not (tmp_path / "model-Q8_0.gguf").exists()
    assert run("convert", "model", "-q", "Q8_0", "--manifest", "--force") == 0
    assert read_manifest(tmp_path / "model-Q8_0.manifest.json").recipe.name == "Q8_0"


def test_no_manifest_of_a_plan(run: Run, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "model", "-q", "Q8_0", "--manifest", "--dry-run") == 2
    assert "--manifest with --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("part", list(For), ids=lambda part: part.value)
def test_a_recipe_decides_as_before(part: For) -> None:
    for name in preset_names(part):
        recipe = find_recipe(name, part)
        again = parse_recipe(format_recipe(recipe), "x", part)
        bare = [replace(rule, place="") for rule in recipe.rules], [replace(rule, place="") for rule in again.rules]
        assert bare[0] == bare[1]
        assert replace(again, rules=()) == replace(recipe, rules=()), name


def test_overrides_are_taken_over(source: Path) -> None:
    options = parse_options(
        "Q4_K_M", tensor_types=["re:blk\\.[01]\\..*=Q8_0", "*attn_v*=Q5_0"], ple="Q5_1", keep="bf16"
    )
    record = record_recipe(options.recipes[0])
    again = record.recipe("x")
    before, after = (gguf3n.plan(source, recipe) for recipe in (options.recipes[0], again))
    assert [tensor.slot for tensor in before.tensors] == [tensor.slot for tensor in after.tensors]
    assert record_recipe(again).sha256 == record.sha256


def make(run: Run, *more: str) -> None:
    assert run("convert", "model", "-q", "Q4_K_M", "-o", "out", "--manifest", "--quiet", *more) == 0


def verified(run: Run, capsys: pytest.CaptureFixture[str], code: int, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run("verify", "out/model-Q4_K_M.gguf", "--source", *more, "--json", "--quiet") == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_same_bits(run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    an_imatrix(source, tmp_path / "imatrix.gguf")
    make(run, "--imatrix", "imatrix.gguf", "--tensor-type", "*attn_v*=Q5_0", "--token-embd", "Q8_0")
    before = sorted(tmp_path.rglob("*"))
    found = verified(run, capsys, 0, "model")
    assert (found["schema"], found["ok"], found["first"]) == ("gguf3n.verify/1", True, None)
    assert found["notes"] == [] and sorted(tmp_path.rglob("*")) == before
    source.rename(tmp_path / "elsewhere")  # the file says what the directory was called
    (tmp_path / "imatrix.gguf").rename(tmp_path / "other.gguf")
    assert verified(run, capsys, 0, "elsewhere", "--imatrix", "other.gguf")["ok"]
    assert run("verify", "out/model-Q4_K_M.gguf", "--source", "elsewhere") == 2
    assert "imatrix.gguf: the importance matrix is not there" in capsys.readouterr().err


def test_an_mmproj_file_and_one_from_a_gguf_file(
    run: Run, make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").symlink_to(make_checkpoint(multimodal=True))
    assert run("convert", "model", "-q", "BF16", "--mmproj", "F16", "--no-audio", "--manifest", "--quiet") == 0
    assert run("verify", "mmproj-model-F16.gguf", "--source", "model", "--quiet") == 0
    assert run("quantize", "model-BF16.gguf", "-q", "Q4_0", "-o", "out", "--manifest", "--quiet") == 0
    assert run("verify", "out/model-Q4_0.gguf", "--source", "model-BF16.gguf", "--quiet") == 0
    assert "the same, bit for bit: Q4_0 of model-BF16.gguf" in capsys.readouterr().out


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_data_that_differs(run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(run)
    path = tmp_path / "out/model-Q4_K_M.gguf"
    gguf = open_gguf(path)
    one, two = gguf.tensors["blk.1.ffn_up.weight"], gguf.tensors["blk.0.attn_q.weight"]
    flip(path, one.offset + 1)
    flip(path, two.offset + two.n_bytes - 1)
    found = verified(run, capsys, 12, "model")
    first, second = sorted([one, two], key=lambda tensor: tensor.offset)
    assert found["first"].startswith(f"tensor {first.name}: byte ") and found["differences"][1].startswith(
        f"tensor {second.name}: byte "
    )
    assert f"byte {two.n_bytes - 1:,}, in row {two.shape[0] - 1:,}; 1 bytes" in " ".join(found["differences"])
    [claim] = found["claims"]
    assert sha256(path) in claim


def test_a_key_that_differs(run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(run)
    gguf3n.edit(
        tmp_path / "out/model-Q4_K_M.gguf",
        [{"op": "set", "key": "general.name", "type": "string", "value": "Another, which is longer"}],
    )
    found = verified(run, capsys, 12, "model")
    assert found["first"] == "key general.name: Another, which is longer (string); made: Model (string)"
    assert not any(difference.startswith("tensor") for difference in found["differences"])


def test_bytes_after_the_last_tensor(
    run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(run)
    path = tmp_path / "out/model-Q4_K_M.gguf"
    path.write_bytes(path.read_bytes() + bytes(32))
    assert "trailing bytes" in verified(run, capsys, 12, "model")["first"]


def test_padding(tmp_path: Path) -> None:
    layout = lay_out([], [("a", (3,), QType.F32), ("b", (8,), QType.F32)])
    data = bytearray(layout.header + bytes(layout.total_bytes - len(layout.header)))
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert list(Comparison(open_gguf(path), layout).layout_differences()) == []
    data[layout.slots[0].offset + 12] = 1
    path.write_bytes(data)
    assert list(Comparison(open_gguf(path), layout).layout_differences()) == ["padding after tensor a: not zeros"]


def test_another_source(run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(run)
    micro.make(tmp_path / "other", arrays=micro.tensors(micro.config(), seed=1))
    found = verified(run, capsys, 12, "other")
    assert found["notes"] == ["model.safetensors differs: another source than the manifest's"]
    assert found["first"].startswith("tensor ") and found["claims"] == []


def test_another_version(run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(run)
    path = tmp_path / "out/model-Q4_K_M.manifest.json"
    raw = micro.read_json(path)
    raw["versions"]["numpy"] = "0.9"
    micro.write_json(path, raw)
    assert verified(run, capsys, 0, "model")["notes"] == [f"made with numpy 0.9, here it is {np.__version__}"]


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "not a manifest": lambda raw: raw.update(schema="gguf3n.lint/1"),
    "file: sha256": lambda raw: raw["file"].update(sha256="x"),
    "file: bytes": lambda raw: raw["file"].update(bytes=True),
    "file: not a JSON object": lambda raw: raw.update(file=[]),
    "recipe: for": lambda raw: raw["recipe"].update({"for": "audio"}),
    "recipe: sha256": lambda raw: raw["recipe"].update(text='name = "x"\ntype = "Q8_0"\n'),
    "tensors: output": lambda raw: raw["tensors"].update(output=3),
    "patterns": lambda raw: raw["recipe"].update(
        overrides=[{"patterns": ["(a+)+$"], "is_regex": True, "type": "Q8_0", "reason": "x"}]
    ),
    "type is not": lambda raw: raw["recipe"].update(
        overrides=[{"patterns": ["*"], "is_regex": False, "type": "Q9", "reason": "x"}]
    ),
    "not the name of a directory": lambda raw: raw["source"].update(directory="../x"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_that_is_none(
    what: str, run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(run)
    path = tmp_path / "out/model-Q4_K_M.manifest.json"
    raw = micro.read_json(path)
    WRONG[what](raw)
    micro.write_json(path, raw)
    assert run("verify", "out/model-Q4_K_M.gguf", "--source", "model", "--quiet") == 2
    assert what in capsys.readouterr().err


def test_no_manifest(run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "model", "-q", "Q8_0", "--quiet") == 0
    assert run("verify", "model-Q8_0.gguf", "--source", "model") == 2
    assert "no manifest beside it" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cannot be read"):
        gguf3n.verify(tmp_path / "model-Q8_0.gguf", source, manifest=tmp_path / "none.json")


def test_an_imatrix_of_others(run: Run, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    an_imatrix(source, tmp_path / "imatrix.gguf")
    make(run)
    assert run("verify", "out/model-Q4_K_M.gguf", "--source", "model", "--imatrix", "imatrix.gguf") == 2
    assert "was made without an importance matrix" in capsys.readouterr().err
    make(run, "--imatrix", "imatrix.gguf", "--force")
    shutil.copy("imatrix.gguf", "other.gguf")
    flip(tmp_path / "other.gguf", -1)
    assert run("verify", "out/model-Q4_K_M.gguf", "--source", "model", "--imatrix", "other.gguf") == 2
    assert "not the importance matrix that model-Q4_K_M.gguf was made with" in capsys.readouterr().err
