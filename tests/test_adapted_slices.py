"""Adapters and slices together: an adapter of the whole model is merged before a slice is taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.engines.reference import Reference
from gguf3n.errors import CheckpointError, OutputError, UsageError
from gguf3n.formats.gguf_layout import GGUFValueType
from gguf3n.formats.gguf_reader import GGUFKey
from gguf3n.formats.rows import SideBySide, SourceTensor, View, cut
from gguf3n.gemma3n.adapter import read_adapter
from gguf3n.gemma3n.merging import merge
from gguf3n.gemma3n.named_slices import find_slice
from gguf3n.gemma3n.slice_keys import NAME, SKIPPED, WIDTHS, slice_in
from gguf3n.gemma3n.slices import Slice, SlicedCheckpoint, take_slice
from gguf3n.gemma3n.source import Checkpoint, open_checkpoint
from gguf3n.inspection.edit import edit
from gguf3n.validation.result import Stage
from tests import micro
from tests.gemma3n import trained
from tests.test_cli import Result, in_process

__all__ = ["in_process"]

Command = Callable[..., Result]

TEXT = "base_model.model.model.language_model."
TOKENS = [2, *np.random.default_rng(1).integers(494, 1020, 12).tolist()]


MODULES = (
    "layers.2.mlp.gate_proj", "layers.4.mlp.up_proj", "layers.12.mlp.down_proj", "layers.22.self_attn.q_proj",
    "layers.26.mlp.down_proj", "layers.30.self_attn.o_proj", "per_layer_model_projection",
)  # fmt: skip
"""Matrices that a slice leaves out, renumbers, and cuts in rows, in columns and in groups."""


def adapter(directory: Path, base: Path, size: float = 1.0) -> Path:
    """LoRA, DoRA and a table's."""
    rng = np.random.default_rng(5)

    def random(*shape: int) -> np.ndarray:
        return size * rng.standard_normal(shape, np.float32)

    tensors = open_checkpoint(base).tensors
    arrays = {}
    for name in MODULES:
        n_outputs, n_inputs = tensors[f"model.language_model.{name}.weight"].shape
        arrays[f"{TEXT}{name}.lora_A.weight"] = random(2, n_inputs)
        arrays[f"{TEXT}{name}.lora_B.weight"] = random(n_outputs, 2)
        if name == "layers.26.mlp.down_proj":
            arrays[f"{TEXT}{name}.lora_magnitude_vector"] = 1 + np.abs(random(n_outputs))
    n_tokens, width = tensors["model.language_model.embed_tokens_per_layer.weight"].shape
    arrays[f"{TEXT}embed_tokens_per_layer.lora_embedding_A"] = random(2, n_tokens)
    arrays[f"{TEXT}embed_tokens_per_layer.lora_embedding_B"] = random(width, 2)
    directory.mkdir()
    micro.write_json(directory / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 1})
    micro.write_safetensors(directory / "adapter_model.safetensors", arrays)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.make(tmp_path_factory.mktemp("adapted") / "e4b", raw=micro.e4b_config())


@pytest.fixture(scope="module")
def mine(base: Path) -> Path:
    return adapter(base.parent / "mine", base)


@pytest.fixture(scope="module")
def merged(base: Path, mine: Path) -> Path:
    """A checkpoint with the values of base and adapter."""
    return trained.write_merged(opened(base, mine), base.parent / "merged")


def opened(base: Path, *adapters: Path) -> Checkpoint:
    source = gguf3n.read_source(base, adapters=adapters)
    assert isinstance(source, Checkpoint)
    return source


def taken(source: Checkpoint, name: str, *, pad: bool = True) -> SlicedCheckpoint:
    return take_slice(source, find_slice(name).of(source.config), pad=pad)


@pytest.mark.parametrize("options", [("E2B",), ("E1.96B-layer",), ("E2.69B-layer",), ("E2.69B-layer", "--no-pad")])
def test_a_slice_of_base_and_adapter(
    options: tuple[str, ...], base: Path, mine: Path, merged: Path, tmp_path: Path, in_process: Command
) -> None:
    """The same values as of the slice of a merged checkpoint; and it is valid against base and adapter only."""
    words = ["-q", "F32", "--slice", *options]
    one = in_process(tmp_path, "convert", base, "--adapter", mine, *words, "--json")
    other = in_process(tmp_path, "convert", merged, *words, "-o", "other.gguf")
    assert one.code == other.code == 0
    (output,) = one.json["outputs"]
    assert output["path"] == f"e4b-mine-{options[0]}-F32.gguf"
    found = gguf3n.diff(tmp_path / output["path"], tmp_path / "other.gguf", with_data=True)
    assert not found.tensors
    keys = gguf3n.open_gguf(tmp_path / output["path"])
    assert keys.value("general.name") == f"E4B mine {options[0]}"
    assert keys.value("general.base_model.0.name") == "E4B"
    against = ["--reference", base, "--stages", "tensors", "--quiet"]
    assert in_process(tmp_path, "validate", output["path"], *against, "--adapter", mine).code == 0
    assert in_process(tmp_path, "validate", output["path"], *against).code == 12


def test_the_reference_of_both(base: Path, mine: Path, merged: Path, tmp_path: Path) -> None:
    """transformers loads the written slice of the merged checkpoint, and computes the same from memory."""
    made = taken(opened(base, mine), "E1.96B-layer")
    gguf3n.write_slice(taken(opened(merged), "E1.96B-layer", pad=False), tmp_path / "copy")
    with Reference(made) as one, Reference(tmp_path / "copy") as two, Reference(taken(opened(base), "E2B")) as other:
        ours, theirs, others = (np.array(list(each.logprobs(TOKENS))) for each in (one, two, other))
    assert (ours == theirs).all() and (ours != others).any()


def test_a_base_in_pieces(base: Path, mine: Path, tmp_path: Path) -> None:
    """As a training may save it: below each other and side by side; the file is the same."""

    def in_pieces(tensor: SourceTensor) -> SourceTensor:
        if len(tensor.shape) != 2:
            return tensor
        (rows,) = tensor.rows
        upper, lower = cut(rows, range(3)), cut(rows, range(3, rows.n_rows))
        left, right = (View(lower, range(lower.n_rows), (part,)) for part in (range(1), range(1, rows.n_per_row)))
        return replace(tensor, rows=(upper, SideBySide((left, right))))

    whole = opened(base)
    pieces = replace(whole, tensors={name: in_pieces(tensor) for name, tensor in whole.tensors.items()}, folder="e4b")
    files = []
    for name, source in (("whole", whole), ("pieces", pieces)):
        both = merge(source, [read_adapter(mine)])
        assert isinstance(both, Checkpoint)
        (written,) = gguf3n.convert(taken(both, "E2.69B-layer"), "Q8_0", tmp_path / f"{name}.gguf")
        files.append(written.path.read_bytes())
    assert files[0] == files[1]


def test_every_stage_and_lint_pass(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp says of the padded file what transformers says of base and adapter, sliced to its true widths."""
    source = make_checkpoint(size="tiny-e4b")
    both = opened(source, adapter(tmp_path / "mine", source, 0.05))
    (written,) = gguf3n.convert(taken(both, "E2.98B-block"), "F32", tmp_path / "x.gguf")
    found = gguf3n.validate(written.path, both, n_tokens=64, n_ctx=64, device="cpu")
    assert found.verdict is gguf3n.Verdict.PASS
    logits = found.stages[Stage.LOGITS]
    assert isinstance(logits, gguf3n.LogitsResult) and logits.divergence.mean < 1e-5
    assert not [each for each in gguf3n.lint(written.path).findings if each.check.severity is gguf3n.Severity.ERROR]


def test_an_importance_matrix_of_base_and_adapter(
    base: Path, mine: Path, merged: Path, tmp_path: Path, in_process: Command
) -> None:
    """What the merged checkpoint gives, and not what the base does."""
    (tmp_path / "text").write_text("one two three four five six seven eight nine ten " * 9)
    measured = []
    for name, words in (("both", [base, "--adapter", mine]), ("merged", [merged]), ("base", [base])):
        options = ["--text", "text", "--ctx", "16", "--chunks", "1", "--device", "cpu", "-o", f"{name}.gguf"]
        found = in_process(tmp_path, "imatrix", *words, *options)
        assert found.code == 0
        assert (f"merged {mine}" in " ".join(found.stderr.split())) == (name == "both")
        measured.append(gguf3n.read_imatrix(tmp_path / f"{name}.gguf").entries)
    both, expected, others = ([entry.sums.tobytes() for entry in entries.values()] for entries in measured)
    assert both == expected != others


def test_a_copy_has_no_place_for_what_is_computed(base: Path, mine: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be copied"):
        gguf3n.write_slice(taken(opened(base, mine), "E2B", pad=False), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_comes_first(base: Path, mine: Path) -> None:
    """A slice's layers have other numbers."""
    with pytest.raises(UsageError, match="before a slice is taken"):
        merge(taken(opened(base), "E2B"), [read_adapter(mine)])


@pytest.mark.parametrize("name", [None, "E2.69B-layer"])
def test_an_adapters_file_is_a_source(name: str | None, base: Path, mine: Path, tmp_path: Path) -> None:
    """Not replaced by an output, whatever it is called; and seen again when all is read."""
    weights = tmp_path / "x" / "weights.gguf"
    for file in mine.iterdir():
        weights.parent.mkdir(exist_ok=True)
        (weights.parent / file.name).write_bytes(file.read_bytes())
    given = weights.parent / "adapter_model.safetensors"
    os.link(given, weights)
    source = opened(base, weights.parent)
    source = source if name is None else taken(source, name)
    assert {given, base / "model.safetensors"} <= source.files
    with pytest.raises(OutputError, match=r"weights\.gguf is what is read"):
        gguf3n.convert(source, "Q8_0", weights, force=True)
    os.utime(given, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: changed while it was read"):
        gguf3n.convert(source, "Q8_0", tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*.gguf"))


# what a file says


def test_validate_takes_the_slice_that_the_file_says(base: Path, tmp_path: Path, in_process: Command) -> None:
    """Of E4B; a checkpoint that is the slice already is taken as it is; what the file does not say is not guessed."""
    (tmp_path / "mine.toml").write_text("skip = [20]\nwidths = 32\n")
    for name in ("E2B", "E1.96B-layer", "mine.toml"):
        options = ["-q", "Q8_0", "-o", f"{name}.gguf", "--slice", name]
        assert in_process(tmp_path, "convert", base, *options).code == 0
    gguf3n.write_slice(taken(opened(base), "E1.96B-layer", pad=False), tmp_path / "written")
    stages = ["--stages", "tensors"]
    for name in ("E2B", "E1.96B-layer", "mine.toml"):
        found = in_process(tmp_path, "validate", f"{name}.gguf", "--reference", base, *stages)
        assert found.code == 0
        assert f"held against slice {name.removesuffix('.toml')} of {base}" in " ".join(found.stderr.split())
    found = in_process(tmp_path, "validate", "E2B.gguf", "--reference", "written", *stages)
    assert found.code == 12 and "held against" not in found.stderr
    edit(tmp_path / "E2B.gguf", [{"op": "unset", "key": NAME}], output=tmp_path / "silent.gguf")
    assert in_process(tmp_path, "validate", "silent.gguf", "--reference", base, *stages).code == 12


def test_a_copy_and_the_slice_are_one_reference(base: Path, tmp_path: Path) -> None:
    """A file of true widths is valid against the checkpoint that `slice` writes, too."""
    made = taken(opened(base), "E2.69B-layer", pad=False)
    gguf3n.write_slice(made, tmp_path / "written")
    (written,) = gguf3n.convert(made, "Q8_0", tmp_path / "x.gguf")
    for reference in (base, tmp_path / "written"):
        found = gguf3n.validate(written.path, reference, stages="tensors")
        assert found.verdict is gguf3n.Verdict.PASS


def keys(base: Path, tmp_path: Path) -> dict[str, GGUFKey]:
    """Those of a file."""
    path = tmp_path / "keys.gguf"
    if not path.exists():
        gguf3n.convert(taken(opened(base), "E1.96B-layer"), "Q8_0", path)
    return dict(gguf3n.open_gguf(path).keys)


def test_the_slice_in_a_file(base: Path, tmp_path: Path) -> None:
    found = keys(base, tmp_path)
    assert slice_in(found) == Slice("E1.96B-layer", tuple(range(20, 25)), (32,) * 4 + (64,) + (32,) * 25)
    assert slice_in({name: key for name, key in found.items() if name != SKIPPED}) == Slice(
        "E1.96B-layer", (), (32,) * 4 + (64,) + (32,) * 25
    )


@pytest.mark.parametrize(
    "change",
    [
        {NAME: 5},
        {NAME: "x" * 101},
        {WIDTHS: None},
        {WIDTHS: "64"},
        {SKIPPED: 20},
        {WIDTHS: "tokenizer.ggml.scores"},
        {SKIPPED: "tokenizer.ggml.tokens"},
    ],
    ids=str,
)
def test_files_that_say_nothing_sensible(change: dict[str, object], base: Path, tmp_path: Path) -> None:
    """Numbers that are none, lists of words, and longer ones than there can be layers."""
    found = keys(base, tmp_path)
    for name, value in change.items():
        if value is None:
            del found[name]
        elif value in found:
            found[name] = found[str(value)]
        else:
            found[name] = GGUFKey(name, GGUFValueType.STRING, value)  # type: ignore[arg-type]
    assert slice_in(found) is None
