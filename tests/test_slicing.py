"""Slices through the commands, and from a checkpoint to llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.engines.llama_cpp import open_llama_cpp
from gguf3n.engines.reference import Reference
from gguf3n.errors import QuantizationError, UsageError
from gguf3n.formats.imatrix import Entry, ImportanceMatrix
from gguf3n.formats.safetensors_writer import write_checkpoint
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.named_slices import NAMED_SLICES, find_slice
from gguf3n.gemma3n.part import Part, mmproj_part, text_part
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.gemma3n.slices import SlicedCheckpoint, take_slice
from gguf3n.gemma3n.source import Checkpoint, open_checkpoint
from gguf3n.recipes import find_recipe
from gguf3n.slicing import GIB, choose_slice, slice_sizes
from gguf3n.validation.divergence import measure
from gguf3n.validation.result import Verdict
from tests import micro
from tests.test_cli import Result, in_process
from workshop.places import DOCS

__all__ = ["in_process"]

PAGE = DOCS / "slices.md"

TOKENS = [2, *np.random.default_rng(1).integers(494, 1020, 31).tolist()]
FEW = ("E2B", "E2.98B-block")
"""One that llama.cpp loads as it is and one that is padded; one by layers is below, with its sparse layers."""


@pytest.fixture(scope="session")
def tiny_e4b(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(size="tiny-e4b")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.make(tmp_path_factory.mktemp("slicing") / "e4b", raw=micro.e4b_config())


def taken(source: Path, name: str, *, pad: bool = True) -> SlicedCheckpoint:
    whole = open_checkpoint(source)
    return take_slice(whole, find_slice(name).of(whole.config), pad=pad)


@pytest.mark.parametrize(
    "name",
    [*FEW, *(pytest.param(n.name, marks=pytest.mark.slow) for n in NAMED_SLICES if n.name not in FEW)],
)
def test_llama_cpp_says_what_transformers_says_of_the_slice(
    name: str, tiny_e4b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that is written, of true widths and in shards, against the GGUF file, padded where they differ."""
    monkeypatch.setitem(write_checkpoint.__kwdefaults__, "max_shard_bytes", 20_000_000)
    gguf3n.write_slice(taken(tiny_e4b, name, pad=False), tmp_path / "slice")
    assert len(list((tmp_path / "slice").glob("*.safetensors"))) > 1
    (written,) = gguf3n.convert(taken(tiny_e4b, name), "F32", tmp_path / "slice.gguf")
    with closing(open_llama_cpp(written.path, n_ctx=128, n_threads=1)) as model:
        found = measure(Reference(tmp_path / "slice").logprobs(TOKENS), model.logprobs(TOKENS))
    assert found.mean <= 1e-5 and found.top1_agreement == 1


def test_zeros_for_the_gates_of_sparse_layers_would_be_wrong(tiny_e4b: Path, tmp_path: Path) -> None:
    """What the measure above sees: the same file with zeros for the rows that are repeated is another model."""
    made = taken(tiny_e4b, "E2.69B-layer")
    tensors = dict(made.tensors)
    for bid in range(10):
        name = f"model.language_model.layers.{bid}.mlp.gate_proj.weight"
        if len(tensors[name].rows) == 2:
            tensors[name] = replace(tensors[name], rows=(tensors[name].rows[0], gguf3n.Zeros(256, 256)))
    means = []
    with Reference(made) as model:
        reference = list(model.logprobs(TOKENS))
    for source in (made, replace(made, tensors=tensors)):
        (written,) = gguf3n.convert(source, "F32", tmp_path / "x.gguf", force=True)
        with closing(open_llama_cpp(written.path, n_ctx=128, n_threads=1)) as model:
            means.append(measure(reference, model.logprobs(TOKENS)).mean)
    assert means[0] <= 1e-5 and means[1] > 10 * means[0]


def test_a_padded_slice_is_valid(tiny_e4b: Path, tmp_path: Path) -> None:
    made = taken(tiny_e4b, "E2.69B-layer")
    (written,) = gguf3n.convert(made, "Q8_0", tmp_path / "x.gguf")
    assert gguf3n.validate(written.path, made, stages=["structure", "tensors"]).verdict is Verdict.PASS


def test_widths_that_differ_are_written_and_told(small: Path, tmp_path: Path) -> None:
    made = taken(small, "E2.69B-layer", pad=False)
    (written,) = gguf3n.convert(made, "Q8_0", tmp_path / "x.gguf")
    file = gguf3n.open_gguf(written.path)
    widths = file.value("gemma3n.feed_forward_length")
    assert widths == list(made.slice.widths) and len(set(widths)) == 2
    for findings in (written.plan.findings, gguf3n.lint(written.path).findings):
        assert "mixed-ffn" in [found.check.id for found in findings]


def test_vision_and_audio_belong_to_every_slice(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint(size="tiny-e4b", multimodal=True)
    made = taken(source, "E2B", pad=False)
    written = gguf3n.write_slice(made, tmp_path / "slice")
    assert {path.name for path in written} == {path.name for path in source.iterdir()}
    whole, sliced = mmproj_part(open_checkpoint(source)), mmproj_part(made)
    assert sliced.tensors == whole.tensors
    one, other = ([key for key in part.keys if not key.name.startswith("general.")] for part in (sliced, whole))
    assert one == other
    copied = mmproj_part(open_checkpoint(tmp_path / "slice"))
    assert [(t.name, t.shape) for t in copied.tensors] == [(t.name, t.shape) for t in whole.tensors]


# sizes


def test_sizes_of_the_published_model() -> None:
    sizes = slice_sizes(find_recipe("Q4_K_M"))
    assert [each.named for each in sizes] == list(NAMED_SLICES)
    by_name = {each.named.name: each for each in sizes}
    assert [each.named.name for each in sizes if not each.is_mixed] == ["E4B", "E2B"]
    assert {each.padded_bytes for each in sizes if len(each.named.skip) == 0} == {by_name["E4B"].true_bytes}
    assert all(each.true_bytes < each.padded_bytes for each in sizes if each.is_mixed)


def test_the_page_has_these_sizes() -> None:
    rows = re.findall(r"^\| `(E[\w.-]+)` \| .* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (.*) \|$", PAGE.read_text(), re.M)
    assert [tuple(row) for row in rows] == [
        (
            each.named.name,
            f"{each.named.mmlu:.1f}",
            f"{each.n_effective / 1e9:.2f}",
            f"{each.true_bytes / GIB:.2f}",
            f"{each.padded_bytes / GIB:.2f}" if each.is_mixed else "as it is",
        )
        for each in slice_sizes(find_recipe("Q4_K_M"))
    ]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_bytes": 5e9, "pad": True}, "E3.59B-layer"),
        ({"max_bytes": 4.5e9, "pad": True}, "E1.96B-layer"),
        ({"max_bytes": 4e9, "pad": True}, "E2B"),
        ({"max_bytes": 4e9, "pad": False}, "E2.69B-layer"),
        ({"max_parameters": 2.5e9}, "E2.49B-block"),
        ({"max_parameters": 2.98e9}, "E2.98B-block"),
        ({"max_parameters": 9e9}, "E3.59B-layer"),
        ({"max_bytes": 1e12, "max_parameters": 2e9}, "E1.96B-layer"),
    ],
)
def test_the_best_that_fits(options: dict[str, float], name: str) -> None:
    assert choose_slice(PUBLISHED["E4B"], find_recipe("Q4_K_M"), **options).name == name  # type: ignore[arg-type]


def test_none_fits() -> None:
    with pytest.raises(UsageError, match="no named slice fits") as caught:
        choose_slice(PUBLISHED["E4B"], find_recipe("Q8_0"), max_bytes=1e9, max_parameters=1e9)
    assert caught.value.found == "--size 1GB and --params 1B" and "E2B" in (caught.value.expected or "")


def test_a_recipe_for_another_model(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('type = "Q8_0"\nn_layers = 22\n')
    recipe = find_recipe(str(tmp_path / "other.toml"))
    assert slice_sizes(recipe) == []
    with pytest.raises(UsageError, match="for another size of model"):
        choose_slice(PUBLISHED["E4B"], recipe, max_bytes=1e12)


# importance matrices


def measured(part: Part, path: Path = Path("i.gguf")) -> ImportanceMatrix:
    rng = np.random.default_rng(0)
    entries = {
        tensor.name: Entry(rng.random((1, tensor.n_per_row), np.float32) + 0.1, np.array([64], np.float32))
        for tensor in part.tensors
        if tensor.storage is Storage.QUANTIZABLE and tensor.bid is not None and tensor.evaluated
    }
    return ImportanceMatrix(path, entries)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("name", ["E2B", "E1.96B-layer", "E2.69B-layer"])
def test_the_whole_models_importances_fit_its_slices(name: str, pad: bool, small: Path) -> None:
    """Renumbered, and of the columns that are left; each is the whole model's."""
    whole, made = text_part(open_checkpoint(small)), taken(small, name, pad=pad)
    imatrix, part = measured(whole), text_part(made)
    found = match_importance(imatrix, part)
    assert len(found.notices) == 1 and "measured on the whole model" in found.notices[0]
    assert set(found.quant_weights) == set(measured(part).entries)
    kept = made.slice.kept(35)
    for tensor in part.tensors:
        if tensor.name not in found.quant_weights:
            continue
        assert tensor.bid is not None
        there = tensor.name.replace(f"blk.{tensor.bid}.", f"blk.{kept[tensor.bid]}.")
        expected = imatrix.entries[there].quant_weights[0]
        weights = found.quant_weights[tensor.name]
        n = made.slice.widths[tensor.bid] if "ffn_down" in tensor.name else len(expected)
        assert np.array_equal(weights[:n], expected[:n])
        assert len(weights) == tensor.n_per_row
        np.testing.assert_allclose(weights[n:], expected[:n].mean(), rtol=1e-5)


def test_the_slices_own_importances_fit_it_padded_or_not(small: Path) -> None:
    made = taken(small, "E1.96B-layer")
    true, padded = text_part(made.unpadded), text_part(made)
    for part in (true, padded):
        for of in (true, padded):
            found = match_importance(measured(of), part)
            assert found.notices == () and set(found.quant_weights) == set(measured(part).entries)


def test_another_slices_importances_are_refused(small: Path, tmp_path: Path) -> None:
    other = text_part(take_slice(small, gguf3n.Slice("mine", (20,), (48,) * 34)))
    with pytest.raises(QuantizationError, match="does not fit the model"):
        match_importance(measured(other), text_part(taken(small, "E2B")))


def test_a_type_that_needs_importances(tiny_e4b: Path, tmp_path: Path) -> None:
    """Rows of zeros, columns of zeros and repeated rows, in the type that is the most particular."""
    made = taken(tiny_e4b, "E2.69B-layer")
    imatrix = measured(text_part(open_checkpoint(tiny_e4b)))
    (written,) = gguf3n.convert(made, "IQ2_XXS", tmp_path / "x.gguf", imatrix=imatrix)
    file = gguf3n.open_gguf(written.path)
    down, up, gate = (
        gguf3n.dequantize(np.frombuffer(file.read(tensor), np.uint8), tensor.qtype.name, tensor.shape)
        for tensor in (file.tensors[f"blk.0.ffn_{part}.weight"] for part in ("down", "up", "gate"))
    )
    assert not down[:, 256:].any() and not up[256:].any() and down.any() and up.any()
    assert np.array_equal(gate[256:], gate[:256])


# the commands


Command = Callable[..., Result]


def test_slices_lists_them(tmp_path: Path, in_process: Command) -> None:
    plain, as_json = in_process(tmp_path, "slices", "-q", "Q8_0"), in_process(tmp_path, "slices", "--json")
    assert plain.code == as_json.code == 0
    assert [line.split()[0] for line in plain.stdout.splitlines()[1:17]] == [named.name for named in NAMED_SLICES]
    assert all(len(line) <= 80 for line in plain.stdout.splitlines())
    entries = as_json.json["slices"]
    assert (as_json.json["schema"], as_json.json["quant"]) == ("gguf3n.slices/1", "Q4_K_M")
    assert [entry["mmlu"] for entry in entries] == [named.mmlu for named in NAMED_SLICES]
    assert entries[-1]["bytes"] == entries[-1]["padded_bytes"]
    assert in_process(tmp_path, "slices", "-q", "Q9").code == 2


def test_convert_takes_a_slice(small: Path, tmp_path: Path, in_process: Command) -> None:
    padded = in_process(tmp_path, "convert", small, "--slice", "e2.98b-block", "-q", "Q8_0", "--json")
    assert padded.code == 0
    (output,) = padded.json["outputs"]
    assert (
        output["path"] == "e4b-E2.98B-block-Q8_0.gguf" and (tmp_path / output["path"]).stat().st_size == output["bytes"]
    )
    (said,) = (notice for notice in padded.json["notices"] if "padded" in notice)
    assert said.startswith("Q8_0: 20 of 35 layers are padded to 64")
    (tmp_path / "mine.toml").write_text("skip = [20]\nwidths = 32\n")
    mine = in_process(tmp_path, "convert", small, "--slice", "mine.toml", "-q", "Q8_0", "--json", "--dry-run")
    assert mine.json["outputs"][0]["path"] == "e4b-mine-Q8_0.gguf"
    assert not any("padded" in notice for notice in mine.json["notices"])
    assert mine.json["outputs"][0]["bytes"] < output["bytes"]
    true = in_process(
        tmp_path, "convert", small, "--slice", "E2.98B-block", "--no-pad", "-q", "Q8_0", "--json", "--dry-run"
    )
    assert true.json["outputs"][0]["bytes"] < output["bytes"]
    best = in_process(
        tmp_path, "convert", small, "--slice", "auto", "--params", "10B", "-q", "Q8_0", "--json", "--dry-run"
    )
    assert best.json["outputs"][0]["path"] == "e4b-E3.59B-layer-Q8_0.gguf"


def test_slice_writes_a_checkpoint(small: Path, tmp_path: Path, in_process: Command) -> None:
    written = in_process(tmp_path, "slice", small, "E2B", "-o", "out", "--json")
    assert written.code == 0
    assert {entry["path"] for entry in written.json["files"]} == {f"out/{p.name}" for p in (tmp_path / "out").iterdir()}
    again = in_process(tmp_path, "slice", small, "E2B", "-o", "out")
    assert (again.code, again.errors) == (10, ["error: out is not empty"])
    one = in_process(tmp_path, "convert", "out", "-q", "Q8_0", "-o", "one.gguf")
    other = in_process(tmp_path, "convert", small, "--slice", "E2B", "-q", "Q8_0", "-o", "other.gguf")
    assert one.code == other.code == 0
    compared = in_process(tmp_path, "diff", "--data", "one.gguf", "other.gguf")
    assert compared.stdout.splitlines()[-1] == "different: 7 keys, values of all 727 tensors the same"


@pytest.mark.parametrize(
    ("options", "code", "what"),
    [
        (["--slice", "E5B"], 2, "unknown slice 'E5B'"),
        (["--slice", "none.toml"], 2, "cannot be read"),
        (["--slice", "auto"], 2, "how large may it be?"),
        (["--slice", "auto", "--size", "big"], 2, "--size 'big': no size"),
        (["--slice", "auto", "--size", "0GB"], 2, "--size '0GB': no size"),
        (["--slice", "auto", "--params", "2.5GB"], 2, "--params '2.5GB': no size"),
        (["--slice", "auto", "--size", "1KB"], 2, "no named slice fits"),
        (["--slice", "auto", "--size", "1GB", "-q", "Q4_0"], 2, "--size for 2 quantizations"),
        (["--slice", "E2B", "--size", "3GB"], 2, "--size without --slice auto"),
        (["--params", "3B"], 2, "--params without --slice auto"),
        (["--no-pad"], 2, "--no-pad without --slice"),
    ],
)
def test_options_that_make_no_sense(
    options: list[str], code: int, what: str, small: Path, tmp_path: Path, in_process: Command
) -> None:
    found = in_process(tmp_path, "convert", small, "-q", "Q8_0", *options)
    assert found.code == code and len(found.errors) == 1 and what in found.errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("skip = [20, 18]\nwidths = 32", "layer 18 can't be skipped"),
        ("skip = [19]\nwidths = 32", "layer 19 can't be skipped"),
        ("skip = [35]\nwidths = 32", "no layer 35 to skip"),
        ("widths = [32, 64]", "2 widths for 35 layers"),
        ("widths = 65", "layer 0 has no part of width 65"),
        ("widths = 8192\nwidth = 3", "unknown key 'width'"),
    ],
)
def test_files_that_do_not_fit_the_model(
    text: str, what: str, small: Path, tmp_path: Path, in_process: Command
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    for command in (
        ("convert", small, "-q", "Q8_0", "--slice", "mine.toml"),
        ("slice", small, "mine.toml", "-o", "out"),
    ):
        found = in_process(tmp_path, *command)
        assert found.code == 2 and len(found.errors) == 1 and what in found.errors[0]
        assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_another_model_has_none_of_the_named_slices(tiny_checkpoint: Path, tmp_path: Path, in_process: Command) -> None:
    for options in (["--slice", "E2B"], ["--slice", "auto", "--size", "4GB"]):
        found = in_process(tmp_path, "convert", tiny_checkpoint, "-q", "Q8_0", *options)
        assert found.code == 2 and "a slice of E4B, not of this model" in found.errors[0]
    close = in_process(tmp_path, "slice", tiny_checkpoint, "E2.98B-blok", "-o", "out")
    assert close.code == 2 and "did you mean E2.98B-block" in close.stderr
    assert not list(tmp_path.iterdir())


def test_a_slice_is_of_the_text_model(small: Path, tmp_path: Path, in_process: Command) -> None:
    found = in_process(tmp_path, "convert", small, "--mmproj", "F16", "--slice", "E2B")
    assert found.code == 2 and "--slice is for the text model" in found.errors[0]


def test_a_gguf_file_has_no_slices(small: Path, tmp_path: Path, in_process: Command) -> None:
    gguf3n.convert(small, "Q8_0", tmp_path / "x.gguf")
    found = in_process(tmp_path, "slice", "x.gguf", "E2B", "-o", "out")
    assert found.code in (2, 3) and len(found.errors) == 1


def test_sliced_twice_is_sliced_once(small: Path) -> None:
    """A slice is a checkpoint like any other."""
    once = taken(small, "E2B")
    twice = take_slice(once, gguf3n.Slice("less", (29,), (32,) * 29))
    assert isinstance(once, Checkpoint) and twice.config.num_hidden_layers == 29
    assert len(text_part(twice).tensors) == len(text_part(once).tensors) - 24
