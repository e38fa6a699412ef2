"""Every planted fault is found and named, in fine types and coarse ones; what is sound passes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType

import gguf3n
from gguf3n.conversion import read_gguf, read_source
from gguf3n.errors import GGUFError, Interrupted
from gguf3n.formats.gguf_draft import Draft, DraftTensor
from gguf3n.formats.gguf_reader import open_gguf, open_part
from gguf3n.formats.imatrix import Entry, ImportanceMatrix
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.progress import Progress
from gguf3n.quants import QUANTIZERS
from gguf3n.quants.api import dequantize, quantize
from gguf3n.recipes import preset_names
from gguf3n.validation import evidence, tensors, weights
from gguf3n.validation.bands import BANDS, expected_error, limits
from gguf3n.validation.result import Verdict
from gguf3n.validation.tensor_errors import TensorsResult
from gguf3n.validation.tensors import check_tensors
from gguf3n.validation.yardsticks import ROUNDING, misplaced, relative
from tests import micro
from tests.validation.plant import PLANTS, Planter
from workshop import bands

ROOT = "model.language_model."
TABLES = ("token_embd.weight", "per_layer_token_embd.weight")
KINDS = ("F16", "Q8_0", "Q4_K_M", "Q2_K", "IQ3_XXS")
WITH_IMATRIX = ("IQ3_XXS",)


def check(path: Path, source: Part, **options: Any) -> TensorsResult:
    """What is found of a file, faults of its layout included."""
    return check_tensors(open_gguf(path, strict=False), source, **options)


def importances(source: Part, seed: int = 0) -> ImportanceMatrix:
    """Of every quantizable matrix of a layer that is evaluated."""
    rng = np.random.default_rng(seed)
    entries = {
        tensor.name: Entry(
            np.exp(rng.standard_normal((1, tensor.n_per_row))).astype(np.float32), np.ones(1, np.float32)
        )
        for tensor in source.tensors
        if tensor.storage is Storage.QUANTIZABLE and tensor.bid is not None and tensor.evaluated
    }
    return ImportanceMatrix(Path("imatrix.gguf"), entries, ("text",), 1, 512)


# planted faults


@pytest.fixture(scope="module")
def planted(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`planted("Q4_K_M")`: where faults were planted in such a file, all at once, and what was found."""
    source = text_part(read_source(tiny_checkpoint))
    imatrix = importances(source)
    directory = tmp_path_factory.mktemp("planted")
    done: dict[str, SimpleNamespace] = {}

    def plant(kind: str) -> SimpleNamespace:
        if kind not in done:
            weighted = kind in WITH_IMATRIX
            path = directory / f"{kind}.gguf"
            gguf3n.convert(source.source, kind, path, imatrix=imatrix if weighted else None)
            planter = Planter(path, source, match_importance(imatrix, source).quant_weights if weighted else {})
            places = {name: plant(planter) for name, (plant, _) in PLANTS.items()}
            done[kind] = SimpleNamespace(places=places, result=check(path, source))
            path.unlink()
        return done[kind]

    return plant


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("fault", PLANTS)
def test_a_planted_fault_is_found_and_named(planted: Callable[[str], Any], kind: str, fault: str) -> None:
    found = planted(kind)
    problems = {problem.where: problem for problem in found.result.problems}
    problem = problems[found.places[fault]]
    assert problem.verdict is Verdict.FAIL
    assert re.search(PLANTS[fault][1], problem.what), problem.what


@every_kind
def test_nothing_else_is_found(planted: Callable[[str], Any], kind: str) -> None:
    found = planted(kind)
    assert len(set(found.places.values())) == len(PLANTS)
    assert {problem.where for problem in found.result.problems} == set(found.places.values())
    assert {error.name for error in found.result.errors[: len(PLANTS)]} == set(found.places.values())
    assert found.result.verdict is Verdict.FAIL


# sound files


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    """A config of three layers whose rows fit every type."""
    return micro.config(
        hidden_size=256,
        hidden_size_per_layer_input=256,
        intermediate_size=[256] * 3,
        num_attention_heads=4,
        head_dim=64,
    )


@pytest.fixture(scope="module")
def arrays(raw: dict[str, Any]) -> dict[str, np.ndarray]:
    """The last rows of the vocabulary are copies of the pad token's, as in published checkpoints."""
    arrays = micro.tensors(raw)
    table = arrays[f"{ROOT}embed_tokens.weight"]
    table[1024:] = table[0]
    return arrays


@pytest.fixture(scope="module")
def source(raw: dict[str, Any], arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Part:
    return text_part(read_source(micro.make(tmp_path_factory.mktemp("tensors") / "model", raw=raw, arrays=arrays)))


@pytest.fixture(scope="module")
def converted(source: Part, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Some files of the source, not to be changed."""
    names = ("BF16", "Q8_0", "Q4_K_M")
    directory = tmp_path_factory.mktemp("converted")
    return {each.plan.recipe.name: each.path for each in gguf3n.convert(source.source, names, directory)}


@pytest.fixture
def copy(converted: Mapping[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(converted["Q4_K_M"], tmp_path / "copy.gguf"))


def test_every_preset_passes(source: Part, tmp_path: Path) -> None:
    names = list(preset_names())
    for each in gguf3n.convert(source.source, names, tmp_path, imatrix=importances(source)):
        result = check(each.path, source)
        assert not result.problems and not result.notes, each.path.name
        assert result.weighted and result.verdict is Verdict.PASS
        each.path.unlink()


def test_without_an_importance_matrix_every_byte_is_ours(source: Part, converted: Mapping[str, Path]) -> None:
    for path in converted.values():
        result = check(path, source)
        assert not result.problems and not result.notes
        assert result.n_identical == len(result.errors) == sum(tensor.evaluated for tensor in source.tensors)
        assert {error.ratio for error in result.errors} == {1.0}
        assert not result.weighted


def test_with_the_importances_at_hand_too(source: Part, tmp_path: Path) -> None:
    imatrix = importances(source)
    quant_weights = match_importance(imatrix, source).quant_weights
    (made,) = gguf3n.convert(source.source, "Q4_K_M", tmp_path / "x.gguf", imatrix=imatrix)
    known = check(made.path, source, quant_weights=quant_weights)
    unknown = check(made.path, source)
    assert known.n_identical == len(known.errors)
    assert unknown.n_identical == len(unknown.errors) - len(quant_weights)
    assert not known.problems and not unknown.problems


def test_the_numbers_are_those_of_numpy(source: Part, converted: Mapping[str, Path]) -> None:
    result = check(converted["Q4_K_M"], source)
    planter, gguf = Planter(converted["Q4_K_M"], source), open_part(converted["Q4_K_M"])
    for error in result.errors:
        tensor = gguf.tensors[error.name]
        x = planter.values(error.name).astype(np.float64).reshape(-1, tensor.shape[-1])
        q = dequantize(gguf.read(tensor), tensor.qtype, x.shape).astype(np.float64)
        if error.name in TABLES:  # the rest is padding
            x, q = x[:1024], q[:1024]
        rows = np.sqrt(np.divide(((q - x) ** 2).sum(1), (x**2).sum(1), out=np.zeros(len(x)), where=x.any(axis=1)))
        assert error.rms_error == pytest.approx(np.linalg.norm(q - x) / np.linalg.norm(x), rel=1e-9)
        assert error.max_error == np.abs(q - x).max()
        assert error.cosine == pytest.approx((x * q).sum() / np.linalg.norm(x) / np.linalg.norm(q), rel=1e-9)
        assert error.worst_row_error == pytest.approx(rows.max(), rel=1e-9)
        assert rows[error.worst_row] == pytest.approx(rows.max(), rel=1e-9)
        assert error.expected == expected_error(tensor.qtype, {"BF16"})
        assert (error.qtype, error.shape) == (tensor.qtype, tensor.shape)
    excesses = [error.excess for error in result.errors]
    assert excesses == sorted(excesses, reverse=True)


@pytest.mark.parametrize("threads", [1, 5])
def test_threads_change_nothing(source: Part, copy: Path, threads: int) -> None:
    Planter(copy, source).write("blk.1.attn_q.weight", 0 * Planter(copy, source).values("blk.1.attn_q.weight"))
    assert replace(check(copy, source, threads=threads), seconds=0) == replace(
        check(copy, source, threads=2), seconds=0
    )


def test_without_xllamacpp_the_result_is_the_same(
    source: Part, converted: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [check(path, source) for path in converted.values()]
    monkeypatch.setattr(weights, "_has_ggml", lambda: False)
    monkeypatch.setattr(weights.ggml, "dequantize_into", None)
    after = [check(path, source) for path in converted.values()]
    assert [replace(result, seconds=0) for result in before] == [replace(result, seconds=0) for result in after]


def test_a_wheel_that_exports_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on Windows."""
    xllamacpp = pytest.importorskip("xllamacpp")
    assert weights._has_ggml()
    monkeypatch.setattr(xllamacpp, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(weights.ggml, "library", weights.ggml.library.__wrapped__)
    assert not weights._has_ggml.__wrapped__()


def n_compared(source: Part) -> int:
    """Weights, without the rows of both tables that are padding."""
    padded = {tensor.name: 1024 for tensor in source.tensors if tensor.name in TABLES}
    return sum(padded.get(tensor.name, tensor.n_rows) * tensor.n_per_row for tensor in source.tensors)


def test_progress(source: Part, converted: Mapping[str, Path]) -> None:
    seen: list[Progress] = []
    check(converted["Q8_0"], source, progress=seen.append)
    assert {(state.stage, state.unit, state.total) for state in seen} == {("tensors", "weights", n_compared(source))}
    assert seen[-1].done == seen[-1].total > 0
    done = [(state.done, state.seconds) for state in seen]
    assert done == sorted(done)


def test_an_interrupt(source: Part, converted: Mapping[str, Path]) -> None:
    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        check(converted["Q8_0"], source, progress=interrupt)


# sources


def widened(array: np.ndarray) -> np.ndarray:
    """BF16 bits to float32."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def other_source(
    tmp_path: Path, raw: Mapping[str, Any], arrays: Mapping[str, np.ndarray], change: Callable[[int, str], Any]
) -> Part:
    """The source with each array changed, by its number and name; None leaves it out."""
    changed = {name: change(i, name) for i, name in enumerate(arrays)}
    kept = {name: array for name, array in changed.items() if array is not None}
    return text_part(read_source(micro.make(tmp_path / "source", raw=raw, arrays=kept)))


def full_precision(arrays: Mapping[str, np.ndarray]) -> Callable[[int, str], np.ndarray]:
    """Values that neither BF16 nor F16 holds."""
    return lambda i, name: widened(arrays[name]) * np.float32(1.0013)


def test_sources_of_mixed_dtypes(raw: dict[str, Any], arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """In one tensor, too: the matrices of a stack."""
    kinds: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
        lambda array: array,
        lambda array: widened(array) * np.float32(1.0013),
        lambda array: (widened(array) * np.float32(1.0013)).astype(np.float16),
    )
    source = other_source(tmp_path, raw, arrays, lambda i, name: kinds[i % 3](arrays[name]))
    assert any(len(tensor.source_dtypes) == 3 for tensor in source.tensors)
    for each in gguf3n.convert(source.source, ["F32", "F16", "Q4_K_M"], tmp_path / "out"):
        result = check(each.path, source)
        assert not result.problems and not result.notes
        assert result.n_identical == len(result.errors)


def test_a_gguf_file_as_the_source(source: Part, converted: Mapping[str, Path], tmp_path: Path) -> None:
    reference = text_part(read_gguf(converted["BF16"]))
    assert check(converted["Q4_K_M"], reference).verdict is Verdict.PASS
    assert check(converted["BF16"], reference).n_identical > 0
    path = Path(shutil.copy(converted["Q4_K_M"], tmp_path / "x.gguf"))
    Planter(path, reference).write("output_norm.weight", 1 + Planter(path, reference).values("output_norm.weight"))
    assert [problem.where for problem in check(path, reference).problems] == ["output_norm.weight"]


@pytest.mark.parametrize(("quant", "detour"), [("Q4_K_M", "BF16"), ("Q4_K_M", "F16"), ("Q8_0", "BF16")])
def test_a_detour_by_way_of_16_bits_is_a_note(
    raw: dict[str, Any], arrays: dict[str, np.ndarray], tmp_path: Path, quant: str, detour: str
) -> None:
    source = other_source(tmp_path, raw, arrays, full_precision(arrays))
    (first,) = gguf3n.convert(source.source, detour, tmp_path / "first.gguf")
    (second,) = gguf3n.convert(read_gguf(first.path), quant, tmp_path / "second.gguf")
    result = check(second.path, source)
    assert not result.problems
    assert len(result.notes) == 1 and f"were rounded to {detour} on the way" in result.notes[0]


def test_a_detour_by_way_of_q8_0_is_a_warning(source: Part, converted: Mapping[str, Path], tmp_path: Path) -> None:
    (made,) = gguf3n.convert(read_gguf(converted["Q8_0"], allow_requantize=True), "Q4_K_M", tmp_path / "x.gguf")
    (problem,) = check(made.path, source).problems
    assert problem.verdict is Verdict.WARN
    assert "from Q8_0" in problem.what


def test_keys_and_values_that_are_never_evaluated(
    raw: dict[str, Any], arrays: dict[str, np.ndarray], source: Part, converted: Mapping[str, Path], tmp_path: Path
) -> None:
    """Zeros in the file, weights in the source; and the reverse."""
    shared = re.compile(r"layers\.2\.self_attn\.(k_proj|v_proj|k_norm)")
    without = other_source(tmp_path, raw, arrays, lambda i, name: None if shared.search(name) else arrays[name])
    assert sum(tensor.missing for tensor in without.tensors) == 3
    (made,) = gguf3n.convert(without.source, "Q4_K_M", tmp_path / "x.gguf")
    assert check(made.path, without).notes == ()
    for path, reference in ((made.path, source), (converted["Q4_K_M"], without)):
        result = check(path, reference)
        assert not result.problems
        assert len(result.notes) == 1 and "never evaluated" in result.notes[0]
        assert not {error.name for error in result.errors} & {
            tensor.name for tensor in without.tensors if tensor.missing
        }


# tables


def draft_rows(path: Path, n_rows: int) -> None:
    """Cut both tables."""
    draft = Draft(open_part(path))
    for i, tensor in enumerate(draft.tensors):
        if tensor.name in TABLES:
            n_bytes = open_part(path).tensors[tensor.name].n_bytes // tensor.shape[0] * n_rows
            draft.tensors[i] = replace(tensor, shape=(n_rows, *tensor.shape[1:]), n_source=n_bytes)
    draft.save()


def test_tables_without_the_padding(source: Part, copy: Path) -> None:
    draft_rows(copy, 1024)
    result = check(copy, source)
    assert not result.problems
    assert [note.partition(":")[0] for note in result.notes] == list(TABLES)


def test_tables_that_are_too_short(source: Part, copy: Path) -> None:
    draft_rows(copy, 1000)
    problems = check(copy, source).problems
    assert [problem.where for problem in problems] == list(TABLES)
    assert all("the file has 1,000 rows; the 24 more of the source are in use" in problem.what for problem in problems)


@pytest.mark.parametrize("name", TABLES)
def test_padding_may_be_zeros_or_copies_of_the_pad_row(source: Part, copy: Path, name: str) -> None:
    planter = Planter(copy, source)
    values = planter.values(name)
    values[1024:] = values[0] if name.startswith("per") else 0
    planter.write(name, values)
    assert not check(copy, source).problems
    values[1030] = values[7]
    planter.write(name, values)
    (problem,) = check(copy, source).problems
    assert problem.where == name
    assert problem.what.startswith("rows 1024-1030 of 1031: ")


# files


def test_missing_and_other_tensors(source: Part, copy: Path) -> None:
    draft = Draft(open_part(copy))
    kept = [tensor for tensor in draft.tensors if tensor.name != "blk.1.ffn_up.weight"]
    (norm,) = [i for i, tensor in enumerate(kept) if tensor.name == "blk.0.attn_norm.weight"]
    kept[norm] = replace(kept[norm], shape=(128,), n_source=0)
    draft.tensors = [*kept, DraftTensor("rope_freqs.weight", (8,), QType.F32)]
    draft.save()
    found = {problem.where: problem.what for problem in check(copy, source).problems}
    assert found == {
        "blk.1.ffn_up.weight": "missing",
        "blk.0.attn_norm.weight": "shape 128, the source's is 256",
        "rope_freqs.weight": "the source has no such tensor",
    }


def test_a_truncated_file(source: Part, copy: Path) -> None:
    last = max(open_part(copy).tensors.values(), key=lambda tensor: tensor.offset)
    with open(copy, "r+b") as file:
        file.truncate(last.offset + last.n_bytes - 1)
    (problem,) = check(copy, source).problems
    assert (problem.where, problem.what) == (last.name, "its data ends after the file's end")


def test_values_that_are_not_finite(source: Part, copy: Path) -> None:
    tensor = open_part(copy).tensors["blk.1.ffn_up.weight"]
    with open(copy, "r+b") as file:
        file.seek(tensor.offset + 5 * tensor.n_bytes // tensor.shape[0])
        file.write(b"\x00\x7e")  # a scale
    (problem,) = check(copy, source).problems
    assert problem.where == tensor.name
    assert problem.what.startswith("row 5 of 256: values that are not finite;")


def test_values_where_the_source_has_zeros(
    raw: dict[str, Any], arrays: dict[str, np.ndarray], converted: Mapping[str, Path], tmp_path: Path
) -> None:
    name = f"{ROOT}layers.1.mlp.up_proj.weight"

    def cut(i: int, other: str) -> np.ndarray:
        array = arrays[other].copy()
        if other == name:
            array[10:20] = 0
        return array

    (problem,) = check(converted["Q4_K_M"], other_source(tmp_path, raw, arrays, cut)).problems
    assert problem.where == "blk.1.ffn_up.weight"
    assert problem.what.startswith("rows 10-19 of 256: values where the source has zeros;")


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80], ids=["nan", "infinity"])
def test_a_source_that_is_not_finite(
    raw: dict[str, Any], arrays: dict[str, np.ndarray], converted: Mapping[str, Path], tmp_path: Path, bits: int
) -> None:
    name = f"{ROOT}layers.1.mlp.up_proj.weight"

    def spoil(i: int, other: str) -> np.ndarray:
        array = arrays[other].copy()
        if other == name:
            array[7, 9] = bits
        return array

    (problem,) = check(converted["Q4_K_M"], other_source(tmp_path, raw, arrays, spoil)).problems
    assert problem.where == "blk.1.ffn_up.weight"
    assert problem.what.startswith("row 7 of 256: values that are not finite, in the source;")


def test_a_file_of_another_byte_order(source: Part, tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "gemma3n", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match="big-endian"):
        check(path, source)


# importance matrices


def test_columns_that_the_importance_matrix_counts_nothing_for(source: Part, tmp_path: Path) -> None:
    """llama.cpp makes blocks of zeros of them; which is right, if it is so."""
    imatrix = importances(source)
    entry = imatrix.entries["blk.1.ffn_down.weight"]
    sums = entry.sums.copy()
    sums[:, 64:128] = 0
    entries = {**imatrix.entries, "blk.1.ffn_down.weight": Entry(sums, entry.counts)}
    (made,) = gguf3n.convert(source.source, "Q4_0", tmp_path / "x.gguf", imatrix=replace(imatrix, entries=entries))
    (problem,) = check(made.path, source).problems
    assert (problem.verdict, problem.where) == (Verdict.WARN, "blk.1.ffn_down.weight")
    assert problem.what.startswith("64 columns are zero")


def test_an_importance_matrix_that_the_keys_do_not_name(source: Part, tmp_path: Path) -> None:
    (made,) = gguf3n.convert(source.source, "Q4_K_M", tmp_path / "x.gguf", imatrix=importances(source))
    draft = Draft(open_part(made.path))
    for name in [name for name in open_part(made.path).keys if name.startswith("quantize.imatrix.")]:
        draft.unset(name)
    draft.save()
    (problem,) = check(made.path, source).problems
    assert problem.verdict is Verdict.WARN
    assert "the file's keys name none" in problem.what


# bands and yardsticks


def test_every_type_has_a_band() -> None:
    assert set(BANDS) == set(QUANTIZERS)
    for qtype, band in BANDS.items():
        low, high = band.error
        assert 0 <= low <= high < 1
        assert (band.plain is None) == (QUANTIZERS[qtype].plain is None)
        assert (band.weighted is None) == (QUANTIZERS[qtype].weighted is None)
        for weighted in (False, True):
            assert limits(qtype, weighted=weighted).ratio > 1


@pytest.mark.parametrize("qtype", [QType.F16, QType.Q8_0, QType.Q4_1, QType.Q4_K, QType.IQ2_XXS], ids=lambda q: q.name)
def test_the_bands_are_what_is_measured(qtype: QType) -> None:
    assert bands.agree(BANDS[qtype], bands.measure(qtype))


@pytest.mark.parametrize(
    ("qtype", "dtypes", "exact"),
    [
        ("F32", {"BF16", "F16", "F32"}, True),
        ("BF16", {"BF16"}, True),
        ("BF16", {"BF16", "F16"}, False),
        ("F16", {"F16"}, True),
        ("F16", {"BF16"}, False),
        ("F16", set(), True),
        ("Q8_0", {"BF16"}, False),
    ],
)
def test_what_a_type_holds_is_exact(qtype: str, dtypes: set[str], exact: bool) -> None:
    assert (expected_error(QType[qtype], dtypes) == (0, 0)) == exact


@pytest.mark.parametrize("qtype", ROUNDING, ids=lambda qtype: qtype.name)
def test_rows_of_another_version_are_misplaced(qtype: QType) -> None:
    """By 5 %, with importances where the type takes some."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 512), np.float32)
    weights = np.exp(rng.standard_normal(512)).astype(np.float32) if QUANTIZERS[qtype].weighted else None
    allowed = limits(qtype, weighted=weights is not None)
    sound, stale = (
        misplaced(x, dequantize(quantize(made_from, qtype, weights), qtype), qtype)
        for made_from in (x, x + 0.05 * rng.standard_normal(x.shape, np.float32))
    )
    assert sound.mean() <= allowed.misplaced and sound.max() <= allowed.row_misplaced
    assert stale.mean() > allowed.misplaced


@pytest.mark.parametrize("qtype", [QType.IQ1_S, QType.IQ1_M, QType.TQ1_0, QType.Q2_K], ids=lambda qtype: qtype.name)
def test_rows_of_strangers_are_known_in_the_coarsest_types(qtype: QType) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 256), np.float32)
    q = dequantize(quantize(x, qtype, np.ones(256, np.float32)), qtype)
    assert not evidence._unrelated(x, q).any()
    assert evidence._unrelated(x, np.roll(q, 1, axis=0)).mean() > 0.99


def test_misplaced_by_hand() -> None:
    q = np.repeat(np.float32([0, 1]), 16)[None]
    x = q.copy()
    assert misplaced(x, q, QType.Q4_0).tolist() == [0]
    x[0, :2] = 0.4, 0.6  # one of them is nearer to 1
    assert misplaced(x, q, QType.Q4_0).tolist() == [1 / 32]
    signs = np.tile(np.float32([1, -1]), 16)[None]
    x = signs.copy()
    x[0, 0] *= -1
    assert misplaced(x, signs, QType.IQ3_S).tolist() == [1 / 32]
    assert misplaced(x, signs, QType.IQ3_XXS).tolist() == [0]
    x[0, 1] *= -1
    assert misplaced(x, signs, QType.IQ3_XXS).tolist() == [1 / 4]
    assert misplaced(x, signs, QType.IQ1_S).tolist() == [0]


def test_relative_errors_of_nothing() -> None:
    errors, sources = np.array([0.0, 0.0, 4.0, 4.0, np.nan]), np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    assert relative(errors, sources).tolist() == [0, 0, np.inf, 2, np.inf]


def test_ranges_of_rows() -> None:
    def text(rows: Sequence[int]) -> str:
        return tensors._ranges(np.array(rows), 100)

    assert text([3]) == "row 3 of 100"
    assert text([0, 1, 2, 7]) == "rows 0-2, 7 of 100"
    assert text([1, 3, 5, 7, 9]) == "rows 1, 3, 5 and 2 more ranges of 100"
