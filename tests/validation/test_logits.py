"""The logits stage on the small checkpoint: its protocol, saved references, limits, and faults that it sees."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType
from safetensors.numpy import load_file, save_file

import gguf3n
from gguf3n.conversion import plan_all
from gguf3n.engines import memory
from gguf3n.engines.llama_cpp import LlamaCpp
from gguf3n.engines.llama_process import LlamaProcess
from gguf3n.engines.reference import Reference
from gguf3n.errors import GGUFError, OutputError, UsageError
from gguf3n.formats.logprobs import open_logprobs, write_logprobs
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.gemma3n.source import open_checkpoint, open_source
from gguf3n.inspection.subject import Subject
from gguf3n.progress import Progress
from gguf3n.quants import QUANTIZERS
from gguf3n.recipes import find_recipe
from gguf3n.validation import logits
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.divergence import Divergence, measure
from gguf3n.validation.fingerprint import check_saved, fingerprint
from gguf3n.validation.logits import (
    LIMITS,
    NOT_RUN,
    PASSED,
    Limits,
    base_qtype,
    judge,
    limits_for,
    prepare_logits,
    read_chunks,
)
from gguf3n.validation.options import parse_validation
from gguf3n.validation.result import Verdict
from gguf3n.validation.texts import built_in_text
from tests.validation.plant_keys import set_key

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("xllamacpp")

N_CTX, N_CHUNKS = 64, 2
N_SCORED = N_CTX - 1 - N_CTX // 2
FIRST = N_CTX // 2


@pytest.fixture(scope="module")
def q8_0(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logits") / "tiny-Q8_0.gguf"
    gguf3n.convert(tiny_checkpoint, "Q8_0", path)
    return path


@pytest.fixture(scope="module")
def saved(q8_0: Path, tiny_checkpoint: Path) -> Path:
    """The reference's log-probabilities, as the stage itself saves them."""
    path = q8_0.with_name("reference.safetensors")
    check(q8_0, tiny_checkpoint, n_tokens=N_CTX * N_CHUNKS, n_ctx=N_CTX, save_reference=path)
    return path


@pytest.fixture(scope="module")
def judged(q8_0: Path, tiny_checkpoint: Path, saved: Path) -> logits.LogitsResult:
    """What the stage says of the sound file by the saved log-probabilities, as many tests compare with it."""
    return check(q8_0, tiny_checkpoint, use_reference=saved)


def check(path: Path, reference: Path, **options: Any) -> logits.LogitsResult:
    """Both models over a text, as the stage runs them."""
    progress, notice = options.pop("progress", None), options.pop("notice", None)
    parsed = parse_validation(**{"threads": 1, **options})
    return prepare_logits(Candidate(path), text_part(open_source(reference)), parsed, notice).run(progress)


# protocol


def test_by_hand(q8_0: Path, tiny_checkpoint: Path, judged: logits.LogitsResult) -> None:
    """The same measured without the stage: two chunks, begin mark first, second halves, tokens that follow."""
    ids = read_chunks(open_source(tiny_checkpoint), None, 10**6, N_CTX * N_CHUNKS)[0].tolist()
    chunks = [[2, *ids[1:N_CTX]], [2, *ids[N_CTX + 1 :]]]
    assert ids[N_CTX] != 2
    with Reference(tiny_checkpoint) as reference, LlamaProcess(q8_0, n_threads=1) as engine:
        p = [row for chunk in chunks for row in list(reference.logprobs(chunk))[FIRST:-1]]
        q = [row for chunk in chunks for row in list(engine.logprobs(chunk))[FIRST:-1]]
    expected = measure(p, q, [token for chunk in chunks for token in chunk[FIRST + 1 :]])
    result = judged
    assert result.divergence.n_positions == N_CHUNKS * N_SCORED
    assert dataclasses.asdict(result.divergence) == pytest.approx(dataclasses.asdict(expected), rel=1e-3)
    assert 1e-5 < result.divergence.mean < 1e-3
    assert result.problems == ()
    assert result.verdict is Verdict.PASS
    assert (result.base_qtype, result.n_ctx, result.n_chunks, result.n_vocab) == (QType.Q8_0, N_CTX, N_CHUNKS, 1088)
    assert result.limits == LIMITS[QType.Q8_0]
    assert result.reference.startswith("transformers ")
    assert result.reference.endswith("float32 on cpu")
    assert result.engine.startswith("llama.cpp, xllamacpp ")


def test_what_is_said_meanwhile(q8_0: Path, tiny_checkpoint: Path) -> None:
    seen: list[Progress] = []
    notices: list[str] = []
    options: dict[str, Any] = {"n_tokens": 40, "n_ctx": 20}
    check(q8_0, tiny_checkpoint, progress=seen.append, notice=notices.append, **options)
    total = 2 * 2 * 9
    assert [(at.done, at.total) for at in seen] == [(done, total) for done in range(1, total + 1)]
    assert {(at.stage, at.unit) for at in seen} == {("logits", "positions")}
    (notice,) = notices
    assert re.fullmatch(
        r"memory: the reference in float32 \d+ MB; llama\.cpp with tiny-Q8_0\.gguf \d+ MB; \d+ MB on the disk in .+; "
        r"[\d.]+ GB available",
        notice,
    )


@pytest.mark.parametrize(
    ("n_ctx", "n_tokens", "shape"),
    [(512, 1024, (2, 512)), (512, 1023, (1, 512)), (100, 1024, (10, 100)), (512, 128, (1, 128)), (10**6, 10**6, None)],
)
def test_chunks(n_ctx: int, n_tokens: int, shape: tuple[int, int] | None, tiny_checkpoint: Path) -> None:
    text = "The harbour wakes before the town does. " * 400
    ids = Reference(tiny_checkpoint).tokenize(text) if shape is None else []
    chunks = read_chunks(open_source(tiny_checkpoint), text, n_ctx, n_tokens)
    assert chunks.shape == (shape or (1, len(ids)))
    assert chunks.dtype == np.int32
    assert (chunks[:, 0] == 2).all()
    assert (chunks[:, 1:] != 2).all()


def test_a_text_without_a_second_half(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="the text is too short"):
        read_chunks(open_source(tiny_checkpoint), "", 512, 1024)
    assert read_chunks(open_source(tiny_checkpoint), "abcdef", 512, 1024).shape[0] == 1


# saved references


def test_saved_reference_for_llama_perplexity(
    q8_0: Path, tiny_checkpoint: Path, saved: Path, judged: logits.LogitsResult, tmp_path: Path
) -> None:
    """In 16 bits almost the same divergence; the begin mark is put in its place as llama-perplexity does."""
    base = open_logprobs(saved)
    path = tmp_path / "base.kld"
    without_mark = base.token_ids.copy()
    without_mark[:, 0] = 700
    with write_logprobs(path, without_mark, base.n_vocab) as writer:
        for row in base.rows():
            writer.add(row)
    found, expected = check(q8_0, tiny_checkpoint, use_reference=path).divergence, judged.divergence
    assert found.mean == pytest.approx(expected.mean, rel=0.02)
    assert found.mean != expected.mean
    assert found.candidate_perplexity == expected.candidate_perplexity
    assert found.reference_perplexity == pytest.approx(expected.reference_perplexity, rel=1e-3)


def test_a_saved_reference_is_not_overwritten(q8_0: Path, tiny_checkpoint: Path, saved: Path) -> None:
    options: dict[str, Any] = {"n_tokens": 8, "n_ctx": 8}
    before = saved.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        check(q8_0, tiny_checkpoint, save_reference=saved, **options)
    with pytest.raises(UsageError, match="exclude each other"):
        check(q8_0, tiny_checkpoint, save_reference=saved, use_reference=saved)
    assert saved.read_bytes() == before
    with pytest.raises(OutputError, match="is what is read"):
        check(q8_0, tiny_checkpoint, save_reference=q8_0, force=True, **options)
    other = saved.with_name("other.kld")
    for force in (False, True):
        check(q8_0, tiny_checkpoint, save_reference=other, force=force, **options)
    assert open_logprobs(other).is_kld


# references and engines


def test_an_unquantized_file_as_reference(
    q8_0: Path, tiny_checkpoint: Path, judged: logits.LogitsResult, tmp_path: Path
) -> None:
    full = tmp_path / "full.gguf"
    gguf3n.convert(tiny_checkpoint, "F32", full)
    options: dict[str, Any] = {"n_tokens": N_CTX * N_CHUNKS, "n_ctx": N_CTX}
    itself = check(full, full, **options)
    assert itself.divergence.mean == 0
    assert itself.base_qtype is QType.F32
    assert itself.reference == itself.engine
    quantized = check(q8_0, full, **options).divergence
    assert quantized.mean == pytest.approx(judged.divergence.mean, rel=0.1)


def test_bfloat16(q8_0: Path, tiny_checkpoint: Path, judged: logits.LogitsResult) -> None:
    exact = judged
    rounded = check(q8_0, tiny_checkpoint, n_tokens=N_CTX * N_CHUNKS, n_ctx=N_CTX, dtype="bfloat16")
    assert exact.divergence.mean < rounded.divergence.mean < exact.divergence.mean + logits.BFLOAT16_NOISE
    assert rounded.limits.good == exact.limits.good + logits.BFLOAT16_NOISE
    assert "bfloat16" in rounded.reference


def test_a_running_server(q8_0: Path, tiny_checkpoint: Path, saved: Path, judged: logits.LogitsResult) -> None:
    with LlamaCpp(q8_0, n_ctx=128, n_threads=1) as model:
        found = check(q8_0, tiny_checkpoint, use_reference=saved, server=model.url)
        assert found.engine == f"llama-server at {model.url}"
    assert found.divergence.mean == pytest.approx(judged.divergence.mean, rel=0.2)


def test_a_server_with_another_model(
    q8_0: Path, tiny_checkpoint: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        name = "llama-server at http://elsewhere"

        def logprobs(self, token_ids: list[int], *, first: int) -> Iterator[np.ndarray]:
            yield np.zeros(1024, np.float32)

        def close(self) -> None:
            """Nothing is held."""

    monkeypatch.setattr(logits, "LlamaServer", lambda _: Other())
    with pytest.raises(UsageError, match="another vocabulary than the file's") as error:
        check(q8_0, tiny_checkpoint, use_reference=saved, server="http://elsewhere")
    assert (error.value.expected, error.value.found) == ("1,088 tokens", "1,024")


@pytest.mark.parametrize("n_vocab", [1200, 1060])
def test_vocabularies_of_different_length(
    n_vocab: int, q8_0: Path, tiny_checkpoint: Path, saved: Path, judged: logits.LogitsResult, tmp_path: Path
) -> None:
    """Padded on either side: the tokens that both have are compared, normalized over them."""
    base = open_logprobs(saved)
    path = tmp_path / "padded.safetensors"
    said = {name: text for name, text in base.metadata.items() if name != "engine"}
    with write_logprobs(path, base.token_ids, n_vocab, metadata=said) as writer:
        for row in base.rows():
            padded = np.full(n_vocab, -9.0, np.float32)
            padded[: min(n_vocab, 1088)] = row[:n_vocab]
            writer.add(padded)
    result = check(q8_0, tiny_checkpoint, use_reference=path)
    assert result.n_vocab == min(n_vocab, 1088)
    assert result.divergence.mean == pytest.approx(judged.divergence.mean, rel=0.2)
    assert result.reference == "padded.safetensors"
    if n_vocab > 1088:
        assert result.divergence == judged.divergence


def test_a_text_with_tokens_that_the_file_lacks(q8_0: Path, tiny_checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    path, said = tmp_path / "beyond.safetensors", open_logprobs(saved).metadata
    with write_logprobs(path, np.array([[2, 5, 1090, 7]], np.int32), 1200, metadata=said) as writer:
        writer.add(np.zeros(1200, np.float32))
    with pytest.raises(GGUFError, match="lacks tokens of the text"):
        check(q8_0, tiny_checkpoint, use_reference=path)


# whose log-probabilities they are


def renamed(source: Path, target: Path) -> Path:
    """A checkpoint with another text in place of one of its tokens."""
    shutil.copytree(source, target)
    path = target / "tokenizer.model"
    path.write_bytes(path.read_bytes().replace("▁the".encode(), "▁eht".encode()))
    return target


def test_another_model_is_refused(
    q8_0: Path, saved: Path, make_checkpoint: Callable[..., Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = make_checkpoint(seed=1)
    with pytest.raises(UsageError, match=r"reference.safetensors was made of another model") as error:
        check(q8_0, other, use_reference=saved)
    assert (error.value.expected, error.value.found) == (str(other), str(tiny_checkpoint))
    with pytest.raises(UsageError, match="was made of a model with other tokens"):
        check(q8_0, renamed(tiny_checkpoint, tmp_path / "renamed"), use_reference=saved)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": "another text"}, "was made of another text than --text"),
        ({"n_tokens": 64}, "was made with another --tokens"),
        ({"n_ctx": 32}, "was made with another --ctx"),
    ],
    ids=["text", "tokens", "ctx"],
)
def test_another_text_is_refused(
    options: dict[str, Any], said: str, q8_0: Path, tiny_checkpoint: Path, saved: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        check(q8_0, tiny_checkpoint, use_reference=saved, **options)


def test_the_same_asked_for_again_is_taken(q8_0: Path, tiny_checkpoint: Path, saved: Path) -> None:
    part = text_part(open_source(tiny_checkpoint))
    for options in ({}, {"text": built_in_text()}, {"n_tokens": N_CTX * N_CHUNKS, "n_ctx": N_CTX}):
        check_saved(open_logprobs(saved), part, parse_validation(**options))


def test_a_file_that_does_not_say_is_refused(q8_0: Path, tiny_checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    base = open_logprobs(saved)
    for name in ("model", "vocabulary", "text", "n_tokens"):
        path = tmp_path / f"{name}.safetensors"
        said = {key: text for key, text in base.metadata.items() if key != name}
        with write_logprobs(path, base.token_ids[:1, :4], base.n_vocab, metadata=said) as writer:
            writer.add(next(base.rows()))
        with pytest.raises(UsageError, match="does not say of which model and text it was made"):
            check(q8_0, tiny_checkpoint, use_reference=path)


def test_a_checkpoint_and_its_unquantized_file_are_one_model(
    tiny_checkpoint: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (written,) = gguf3n.convert(tiny_checkpoint, "BF16", tmp_path / "x.gguf")
    options = parse_validation()
    parts = [text_part(open_source(source)) for source in (tiny_checkpoint, written.path, make_checkpoint(seed=1))]
    same, again, other = (fingerprint(part, options) for part in parts)
    assert same == again
    assert {name for name, text in same.items() if other[name] != text} == {"model"}


# chaotic models


def test_what_a_chaotic_model_says_is_no_fault_of_the_file() -> None:
    def found(mean: float, top1: float = 1.0) -> Divergence:
        return Divergence(100, mean, mean, mean, mean, mean, top1, 1.0)

    def verdicts(divergence: Divergence, noise: Divergence | None) -> list[Verdict]:
        return [problem.verdict for problem in judge(divergence, QType.F32, LIMITS[QType.F32], noise)]

    assert verdicts(found(0.015), None) == verdicts(found(0.015), found(1e-6)) == [Verdict.FAIL]
    assert verdicts(found(0.015), found(0.01)) == [Verdict.WARN]
    assert verdicts(found(0.5), found(0.01)) == [Verdict.FAIL]
    assert verdicts(found(0.015, 0.9), found(0.01)) == [Verdict.FAIL, Verdict.FAIL]
    assert verdicts(found(0.015, 0.9), found(0.01, 0.95)) == [Verdict.WARN]
    assert verdicts(found(2e-4, 0.9), found(1e-4, 0.95)) == [Verdict.WARN]
    assert verdicts(found(1e-6), found(1.0)) == []
    assert verdicts(found(float("nan")), found(1.0)) == [Verdict.FAIL]


def louder(source: Path, target: Path) -> Path:
    """A chaotic model: a checkpoint whose layers add to each other as many times as much."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith(LOUDER):
                tensors[name] = tensors[name] * LOUDNESS
        save_file(tensors, path, metadata={"format": "pt"})
    return target


LOUDER = ("q_norm.weight", "k_norm.weight", "post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
LOUDNESS = np.float32(2.3)


def test_a_chaotic_model_is_told_from_a_bad_file(
    q8_0: Path, make_checkpoint: Callable[..., Path], judged: logits.LogitsResult, tmp_path: Path
) -> None:
    source = louder(make_checkpoint(dtype="f32"), tmp_path / "louder")
    (sound,) = gguf3n.convert(source, "F32", tmp_path / "x.gguf")
    result = check(sound.path, source, n_tokens=64, n_ctx=64)
    assert result.divergence.mean > LIMITS[QType.F32].good
    assert isinstance(result.noise, Divergence)
    assert [(problem.where, problem.verdict) for problem in result.problems] == [("chaotic model", Verdict.WARN)]
    assert result.details()["noise"]["mean"] == result.noise.mean
    bad = check(q8_0, source, n_tokens=64, n_ctx=64, save_reference=tmp_path / "louder.safetensors")
    assert bad.verdict is Verdict.FAIL
    again = check(sound.path, source, use_reference=tmp_path / "louder.safetensors")
    assert again.noise == NOT_RUN in again.lines()[-1]
    assert again.details()["noise"] is None
    assert judged.noise == PASSED


# limits


def test_every_type_has_limits() -> None:
    assert set(LIMITS) == set(QUANTIZERS)
    for limits in LIMITS.values():
        assert 0 < limits.good < limits.poor < 10
        assert 0 < limits.top1 < 1
    assert limits_for(QType.MXFP4) == logits.UNKNOWN_TYPE


@pytest.mark.parametrize(
    ("quant", "expected"),
    [("Q4_K_M", QType.Q4_K), ("BF16", QType.BF16), ("IQ4_XS", QType.IQ4_XS), ("Q2_K", QType.Q2_K)],
)
def test_base_type(quant: str, expected: QType, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (written,) = gguf3n.convert(tiny_checkpoint, quant, tmp_path / "x.gguf")
    assert base_qtype(Subject(gguf3n.open_gguf(written.path))) is expected


def divergence(mean: float, top1: float = 1.0) -> Divergence:
    return Divergence(100, mean, mean, mean, mean, mean, top1, 1.0, 1.0, 1.0)


def test_verdicts() -> None:
    limits = Limits(0.01, 0.1, 0.9)

    def verdicts(found: Divergence) -> list[Verdict]:
        return [problem.verdict for problem in judge(found, QType.Q6_K, limits)]

    assert verdicts(divergence(0.01, 0.9)) == []
    assert verdicts(divergence(0.1)) == [Verdict.WARN]
    assert verdicts(divergence(0.11)) == [Verdict.FAIL]
    assert verdicts(divergence(float("nan"))) == [Verdict.FAIL]
    assert verdicts(divergence(float("inf"))) == [Verdict.FAIL]
    assert verdicts(divergence(0.001, 0.89)) == [Verdict.FAIL]
    assert verdicts(dataclasses.replace(divergence(0.001, 0.5), n_positions=2)) == []  # one position is chance
    (problem,) = judge(divergence(0.0234), QType.Q6_K, limits)
    assert problem.what == "mean 0.0234 nats, expected at most 0.01 for Q6_K"
    (problem,) = judge(divergence(0, 0.5), QType.Q6_K, limits)
    assert problem.what == "the same at 50.0% of positions, expected at least 90% for Q6_K"


# faults


def swapped(part: Part) -> Part:
    """Two neighbouring layers change places."""
    rows = {tensor.name: tensor.rows for tensor in part.tensors}
    other = {3: 4, 4: 3}
    return dataclasses.replace(
        part,
        tensors=tuple(
            dataclasses.replace(t, rows=rows[t.name.replace(f"blk.{t.bid}.", f"blk.{other[t.bid]}.")])
            if t.bid in other
            else t
            for t in part.tensors
        ),
    )


def rotated(part: Part) -> Part:
    """The AltUp matrices of a stack, in another order."""
    return dataclasses.replace(
        part,
        tensors=tuple(
            dataclasses.replace(t, rows=(*t.rows[1:], t.rows[0])) if t.name == "altup_proj.weight" else t
            for t in part.tensors
        ),
    )


@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
@pytest.mark.parametrize("fault", [swapped, rotated])
def test_tensors_in_the_wrong_place_fail(
    fault: Callable[[Part], Part], quant: str, tiny_checkpoint: Path, saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "faulty.gguf"
    gguf3n.write(plan_all(fault(text_part(gguf3n.read_source(tiny_checkpoint))), [find_recipe(quant)]), path)
    result = check(path, tiny_checkpoint, use_reference=saved)
    assert result.verdict is Verdict.FAIL, result.divergence


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gemma3n.rope.freq_base_swa", 1e6),
        ("gemma3n.rope.freq_base", 1e4),
        ("gemma3n.attention.sliding_window", 8),
        ("gemma3n.attention.sliding_window_pattern", [True] * 22),
    ],
)
def test_keys_with_wrong_values_fail(key: str, value: Any, q8_0: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On longer chunks than elsewhere: positions that are close to each other differ little."""
    path = tmp_path / "faulty.gguf"
    path.write_bytes(q8_0.read_bytes())
    kind = "bool[]" if isinstance(value, list) else "uint32" if isinstance(value, int) else "float32"
    set_key(path, key, kind, value)
    base = q8_0.with_name("long.safetensors")
    options: dict[str, Any] = {"use_reference": base} if base.exists() else {"save_reference": base}
    result = check(path, tiny_checkpoint, n_tokens=192, n_ctx=192, **options)
    assert result.verdict is Verdict.FAIL, result.divergence


def test_norms_with_one_added_fail(q8_0: Path, tiny_checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "faulty.gguf"
    path.write_bytes(q8_0.read_bytes())
    data = np.memmap(path, np.uint8, "r+")
    for tensor in gguf3n.open_gguf(path).tensors.values():
        if tensor.name.endswith("_norm.weight"):
            data[tensor.offset : tensor.offset + tensor.n_bytes].view(np.float32)[:] += 1
    data.flush()
    result = check(path, tiny_checkpoint, use_reference=saved)
    assert [problem.where for problem in result.problems] == ["KL divergence", "most likely token"]


def test_what_makes_llama_cpp_abort_is_an_error(q8_0: Path, tiny_checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "faulty.gguf"
    path.write_bytes(q8_0.read_bytes())
    set_key(path, "gemma3n.attention.sliding_window_pattern", "bool[]", [False] * 22)
    with pytest.raises(GGUFError, match=r"faulty\.gguf: llama\.cpp aborts on this file"):
        check(path, tiny_checkpoint, use_reference=saved)


# memory


def test_too_little_memory(
    q8_0: Path, tiny_checkpoint: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = memory.reference_need(open_checkpoint(tiny_checkpoint), "bfloat16", 512).n_bytes
    monkeypatch.setattr(memory, "available_bytes", lambda: need)
    notices: list[str] = []
    with pytest.raises(UsageError, match="not enough memory for the reference in float32") as error:
        check(q8_0, tiny_checkpoint, notice=notices.append, save_reference=tmp_path / "x.kld")
    assert error.value.fix is not None
    assert error.value.fix.startswith("--dtype bfloat16 (")
    assert error.value.fix.endswith("), or --use-reference FILE, or --stages structure,tensors,tokens")
    assert len(notices) == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    with pytest.raises(UsageError, match=r"not enough memory for llama\.cpp with tiny-Q8_0\.gguf") as error:
        check(q8_0, tiny_checkpoint, use_reference=saved)
    assert error.value.fix == "--server URL, or --stages structure,tensors,tokens"
    with pytest.raises(UsageError, match=r"not enough memory for llama\.cpp with tiny-Q8_0\.gguf") as error:
        check(q8_0, q8_0)
    assert error.value.fix == "--use-reference FILE, or --stages structure,tensors,tokens"
