"""Each fault of lint's table: planted, named, mended where it can be, and what llama.cpp says before and after."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf.constants import Keys

import gguf3n
from gguf3n.engines.llama_cpp import LlamaCpp
from gguf3n.errors import GGUFError
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.gemma3n.config import LLAMA_CPP_FIXED
from gguf3n.inspection.checks_model import REQUIRED
from gguf3n.inspection.found import FILE, HEADER, Found, absent, named, said
from gguf3n.inspection.lint import CHECKS, Group, Severity, lint
from gguf3n.inspection.repair import FIXES, repair
from gguf3n.progress import Progress
from tests.inspection.faults import PLANTS, set_key

Planted = Callable[[str], Path]
OF_TEXT = (Group.LAYOUT, Group.MODEL, Group.VALUES, Group.DATA)
BY_ID = {check.id: check for check in CHECKS if check.group in OF_TEXT}
"""The others are in test_lint_mmproj.py."""
PROMPT = [2, 600, 700, 800]
TEXT = "A cat  sat.\n<start_of_turn>user naïve 🙂"

LOADED = (
    "duplicate-key", "gaps", "misaligned", "duplicate-tensor", "missing-key", "size-key", "missing-shared-kv",
    "table-rows", "token-scores", "token-types", "byte-type", "control-type", "special-id", "space-prefix",
)  # fmt: skip
"""Faults of which llama.cpp is asked whether they are mended; a second each."""

ALSO = {
    "overlap": {"trailing-bytes"},
    "array-length": {"size-key"},
    "mixed-ffn": {"size-key", "all-zero"},
    "long-name": {"extra-tensor", "all-zero"},
    "extra-tensor": {"all-zero"},
    "wrong-shape": {"all-zero"},
    "float-tensor": {"all-zero"},
    "ple-type": {"all-zero"},
    "split-parts": {"duplicate-tensor"},
    "big-endian": {
        "missing-key", "assumed-key", "fixed-size", "missing-tensor", "file-type", "quantization-version",
        "missing-tokenizer", "chat-template",
    },
}  # fmt: skip
"""What else a planted fault brings with it."""

REFUSED = (
    "duplicate-key", "empty-key", "alignment-key", "misaligned", "gaps", "overlap", "truncated", "duplicate-tensor",
    "long-name", "missing-key", "mistyped-key", "array-length", "block-count", "size-key", "mixed-ffn",
    "missing-tensor", "missing-shared-kv", "extra-tensor", "wrong-shape", "table-rows", "missing-tokenizer",
)  # fmt: skip
"""Faults with which llama.cpp does not load the file."""

ABORTS = ("float-tensor", "duplicate-token")
"""Faults with which llama.cpp ends the whole process."""


def ids(path: Path, *, with_data: bool = True) -> set[str]:
    return {finding.check.id for finding in lint(path, with_data=with_data).findings}


def test_a_sound_file(sound: Path) -> None:
    report = lint(sound, with_data=True)
    assert report.findings == ()
    assert report.n_checks == len(BY_ID)
    assert report.skipped is None


def test_a_fresh_conversion_has_notes_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for quant in ("F32", "Q4_0"):
        gguf3n.convert(tiny_checkpoint, quant, tmp_path / f"{quant}.gguf")
        report = lint(tmp_path / f"{quant}.gguf", with_data=True)
        assert all(finding.check.severity is Severity.NOTE for finding in report.findings), report.findings


def test_every_check_has_a_fault_and_every_fix_a_check() -> None:
    assert set(PLANTS) == set(BY_ID)
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    assert set(FIXES) < {check.id for check in CHECKS}
    for check in CHECKS:
        assert ("gguf3n repair" in check.fix) is (check.id in FIXES), check.id


@pytest.mark.parametrize("check_id", PLANTS)
def test_a_fault_is_named(planted: Planted, check_id: str) -> None:
    path = planted(check_id)
    assert ids(path, with_data=BY_ID[check_id].group.reads_data or check_id in ALSO) == {check_id} | ALSO.get(
        check_id, set()
    )


@pytest.mark.parametrize("check_id", PLANTS)
def test_a_fault_has_its_place(planted: Planted, sound: Path, check_id: str) -> None:
    """A tensor, a key or a token of the sound file or of this one, or a part of it."""
    path = planted(check_id)
    places = {FILE, HEADER, "part 1", "general.sampling", *(name for name, _ in LLAMA_CPP_FIXED)}
    for file in (sound, path) if check_id != "unreadable" else (sound,):
        gguf = open_gguf(file, strict=False)
        places |= {*gguf.keys, *gguf.tensors, *(f"token {i}" for i in range(1088))}
    places |= {name.format(arch="gemma3n") for name in (*REQUIRED, Keys.Tokenizer.EOT_ID)}
    for finding in lint(path, with_data=True).findings:
        assert finding.where in places and finding.what
        assert finding.as_dict()["found"] == finding.found


def test_words_of_a_fault() -> None:
    assert [str(fault) for fault in (Found("a", "is b"), named("a", "is b"), absent("a"), said("a", "b"))] == [
        "a is b",
        "a",
        "there is no a",
        "b",
    ]


def test_an_opened_file(copy: Path) -> None:
    PLANTS["gaps"](copy)
    assert lint(open_gguf(copy, strict=False)) == lint(copy)


def test_progress_of_the_data(sound: Path) -> None:
    told: list[Progress] = []
    lint(sound, progress=told.append)
    assert told == []
    lint(sound, with_data=True, progress=told.append)
    n_bytes = sum(tensor.n_bytes for tensor in open_gguf(sound).tensors.values())
    assert {(state.stage, state.unit, state.total) for state in told} == {("reading tensors", "bytes", n_bytes)}
    assert [state.done for state in told] == sorted(state.done for state in told)
    assert told[-1].done == n_bytes


def answers(path: Path) -> tuple[list[float], list[int]]:
    """What llama.cpp makes of a prompt and of a text, by a file."""
    with LlamaCpp(path, n_ctx=64, n_threads=1) as model:
        return model.next_token_logprobs(PROMPT).tolist(), model.tokenize(TEXT)


@pytest.fixture(scope="module")
def sound_answers(sound: Path) -> tuple[list[float], list[int]]:
    return answers(sound)


@pytest.mark.parametrize("check_id", [check_id for check_id in FIXES if check_id in BY_ID])
def test_a_fault_is_mended(planted: Planted, sound_answers: tuple[list[float], list[int]], check_id: str) -> None:
    """And llama.cpp then says the same as of the sound file, to the bit."""
    path = planted(check_id)
    result = repair(path, only=(check_id,) if BY_ID[check_id].severity is Severity.NOTE else ())
    assert {fix.check_id for fix in result.fixes} & {check_id, *ALSO.get(check_id, ())}
    assert result.left == ()
    assert ids(path) == set()
    if check_id in LOADED:
        assert answers(path) == sound_answers


@pytest.mark.parametrize("check_id", REFUSED)
def test_llama_cpp_refuses(planted: Planted, check_id: str) -> None:
    """What the table says of llama.cpp is so."""
    path = planted(check_id)
    with pytest.raises(GGUFError, match="does not load"):
        LlamaCpp(path, n_ctx=64, n_threads=1)


@pytest.mark.parametrize("check_id", ABORTS)
def test_llama_cpp_aborts(planted: Planted, check_id: str) -> None:
    code = (
        "import sys; from gguf3n.engines.llama_cpp import LlamaCpp; LlamaCpp(sys.argv[1], n_threads=1).generate('a', 1)"
    )
    command = [sys.executable, "-c", code, str(planted(check_id))]
    quiet = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # else ggml has a debugger, if there is one, print its stack
    process = subprocess.run(command, capture_output=True, check=False, timeout=120, env=quiet)
    assert process.returncode < 0


def test_a_file_type_of_zero_is_one(copy: Path) -> None:
    set_key(copy, "general.file_type", VT.UINT32, 0)
    (finding,) = lint(copy).findings
    assert finding.found.startswith("ALL_F32, but the matrices are Q8_0")


def test_a_file_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x03" + bytes(19))
    report = lint(path)
    assert report.findings == ()
    assert report.skipped is not None and "only the layout" in report.skipped


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for source in (tmp_path / "x.gguf", str(tmp_path / "x.gguf")):
        with pytest.raises(GGUFError, match="no such file"):
            lint(source)
