"""`--mmproj` of convert and quantize, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import Run


@pytest.fixture(scope="module")
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(multimodal=True)


def test_text_and_encoders_from_one_read(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("convert", source, "-q", "Q8_0", "--mmproj", "F16", "--mmproj", "BF16", "-o", tmp_path)
    names = [f"{source.name}-Q8_0.gguf", f"mmproj-{source.name}-F16.gguf", f"mmproj-{source.name}-BF16.gguf"]
    assert code == 0 and all(str(tmp_path / name) in out for name in names)
    assert "convolutions are F32 here" in err and "does not run Gemma 3n's audio encoder" in err
    code, out, _ = run(
        "convert", source, "-q", "Q8_0", "--mmproj", "F16", "-o", tmp_path / "json", "--json", "--no-audio"
    )
    result = json.loads(out)
    assert [Path(each["path"]).name for each in result["outputs"]] == names[:2]
    for each in result["outputs"]:
        assert each["bytes"] == Path(each["path"]).stat().st_size
    assert any("left out 53 source tensors: audio" in notice for notice in result["notices"])


def test_a_dry_run(run: Run, source: Path) -> None:
    code, out, err = run("convert", source, "-q", "Q4_0", "--mmproj", "F16", "--dry-run", "--quiet")
    assert code == 0 and err == ""
    assert "blk.0.attn_q.weight" in out and "v.msfa.ffn.pw_exp.conv.weight" in out
    assert "depthwise: what goes in stays F32" in out and "1 x 32 x 1 x 1" in out
    code, out, _ = run("convert", source, "--mmproj", "F16", "--dry-run", "--json", "--against", "lossless")
    (planned,) = json.loads(out)["outputs"]
    assert set(planned["against"]["types"].values()) == {"F32", "BF16"}
    both = run("convert", source, "-q", "Q4_0", "--mmproj", "F16", "--dry-run", "--json", "--against", "Q4_1")[1]
    assert ["against" in output for output in json.loads(both)["outputs"]] == [True, False]
    (one,) = (tensor for tensor in planned["tensors"] if tensor["name"] == "v.blk.1.0.dw_mid.conv.weight")
    assert one["type"] == "BF16" and one["shape"] == [96, 1, 5, 5]


def test_quantize(run: Run, source: Path, tmp_path: Path) -> None:
    assert run("convert", source, "-q", "BF16", "--mmproj", "lossless", "-o", tmp_path)[0] == 0
    text, encoders = tmp_path / f"{source.name}-BF16.gguf", tmp_path / f"mmproj-{source.name}-lossless.gguf"
    code, out, _ = run("quantize", encoders, "--mmproj", "Q8_0", "--no-audio", "-o", tmp_path)
    assert code == 0 and str(tmp_path / f"mmproj-{source.name}-Q8_0.gguf") in out
    for file, option, said in ((encoders, "-q", "--mmproj"), (text, "--mmproj", "--quant")):
        code, _, err = run("quantize", file, option, "Q8_0", "-o", tmp_path / "other")
        assert code == 3 and "choose its types with " + said in err
    assert run("quantize", text, "-q", "Q8_0", "-o", tmp_path)[0] == 0
    code, _, err = run("quantize", tmp_path / f"{source.name}-Q8_0.gguf", "--mmproj", "F16", "-o", tmp_path / "other")
    assert code == 3 and "the text model" in err and "--allow-requantize" not in err
    code, _, err = run("validate", text, "--reference", encoders, "--stages", "structure")
    assert code == 3 and "give the text file instead" in err
    assert not (tmp_path / "other").exists()


def test_files_are_looked_at(run: Run, source: Path, tmp_path: Path) -> None:
    assert run("convert", source, "--mmproj", "F16", "--mmproj", "Q8_0", "--no-audio", "-o", tmp_path)[0] == 0
    files = [tmp_path / f"mmproj-{source.name}-{quant}.gguf" for quant in ("F16", "Q8_0")]
    code, out, _ = run("stats", files[1], "--against", source, "--json", "--plot", tmp_path / "plot.svg")
    errors = {tensor["name"]: tensor["rms_error"] for tensor in json.loads(out)["tensors"] if "rms_error" in tensor}
    assert code == 0 and len(errors) == 87 and (tmp_path / "plot.svg").exists()
    assert 0 < errors["mm.input_projection.weight"] < 0.01 and errors["v.blk.1.0.dw_mid.conv.weight"] == 0
    code, out, _ = run("diff", *files, "--json")
    changed = {tensor["name"] for tensor in json.loads(out)["tensors"]}
    assert code == 12 and changed == {"mm.embedding.weight", "mm.input_projection.weight"}
    assert run("edit", files[0], "--set", "general.name=Mine", "-o", tmp_path / "mmproj-mine.gguf")[0] == 0
    assert run("validate", files[0], "--reference", source, "--stages", "structure,tensors")[0] == 0
    code, out, _ = run(
        "convert",
        source,
        "--mmproj",
        "F16",
        "--validate",
        "--stages",
        "structure,tensors",
        "-o",
        tmp_path / "v",
        "--json",
    )
    (output,) = json.loads(out)["outputs"]
    assert code == 0 and output["validation"]["verdict"] == "pass"


def test_what_is_refused(run: Run, source: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pattern = "v.blk.*.dw_*.conv.weight=F32"
    for arguments, status, said in (
        ((tiny_checkpoint, "--mmproj", "F16"), 3, "no vision or audio tensors"),
        ((source, "--mmproj", "-o", tmp_path), 2, "--mmproj without a type"),
        ((source, "--mmproj", "--dry-run"), 2, "--mmproj F16"),
        ((source, "--mmproj", "Q4_K_M"), 2, "unknown quantization 'Q4_K_M' of the mmproj file"),
        ((source, "--mmproj", "F16", "--tensor-type", pattern), 2, "llama.cpp aborts while it loads"),
        ((source, "-q", "Q8_0", "--no-audio"), 2, "--no-audio is for a file that is not wanted"),
        ((source, "-q", "Q8_0", "--mmproj", "F16", "-o", tmp_path / "one.gguf"), 2, "one file name for 2"),
        ((source, "--mmproj", "F16", "--no-audio", "--no-vision"), 2, "neither vision nor audio"),
        ((source,), 2, "no quantization named"),
    ):
        code, out, err = run("convert", *arguments)
        assert (code, out) == (status, "") and said in err, err
    code, _, _ = run("convert", source, "--mmproj", "F16", "--tensor-type", pattern, "--force-types", "-o", tmp_path)
    assert code == 0


def test_recipes(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("recipes", "list", "--mmproj")
    assert code == 0 and {line.split()[0] for line in out.splitlines()[1:]} == {
        "BF16",
        "F16",
        "F32",
        "Q8_0",
        "lossless",
    }
    assert [row["name"] for row in json.loads(run("recipes", "list", "--mmproj", "--json")[1])][-1] == "Q8_0"
    code, out, _ = run("recipes", "show", "F16", "--mmproj")
    own = tmp_path / "own.toml"
    own.write_text(out)
    assert code == 0 and 'for = "mmproj"' in out
    assert run("recipes", "show", own, "--mmproj")[1] == out
    assert run("recipes", "show", own)[0] == 2
