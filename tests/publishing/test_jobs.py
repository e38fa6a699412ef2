"""Jobs: what a file of them says, and that the bytes are the same here, on two workers, and after one was killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n import cli
from gguf3n.errors import UsageError
from gguf3n.formats.imatrix import Entry, ImportanceMatrix
from gguf3n.publishing import dask_executor
from gguf3n.publishing import jobs as publishing_jobs
from gguf3n.publishing.jobs import Importance, read_jobs, run_here, steps_of
from tests import micro

FILE = """
directory = "work"

[[model]]
source = "one"
repo = "me/one-GGUF"
quants = ["Q8_0", "Q4_K_M"]
despite_findings = true

[model.importance]
texts = ["text.txt"]
ctx = 16
chunks = 5
pieces = 2

[[model]]
source = "two"
repo = "me/two-GGUF"
quants = ["Q4_0"]
validate = "tensors"
despite_findings = true
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    micro.make(tmp_path / "one")
    micro.make(tmp_path / "two")
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and the dog did not. " * 20)
    (tmp_path / "jobs.toml").write_text(FILE)
    return tmp_path / "jobs.toml"


def test_steps_and_what_they_need(file: Path) -> None:
    found = {step.id: step.needs for step in steps_of(read_jobs(file), spread=True)}
    measured = ("measure me/one-GGUF 1", "measure me/one-GGUF 2")
    made = ("convert me/one-GGUF Q8_0", "convert me/one-GGUF Q4_K_M")
    assert found == {
        **dict.fromkeys(measured, ()),
        "merge me/one-GGUF": measured,
        **dict.fromkeys(made, ("merge me/one-GGUF",)),
        "publish me/one-GGUF": ("merge me/one-GGUF", *made),
        "convert me/two-GGUF Q4_0": (),
        "publish me/two-GGUF": ("convert me/two-GGUF Q4_0",),
    }
    seen: set[str] = set()
    for name, needs in found.items():
        assert seen.issuperset(needs), name
        seen.add(name)
    assert [step.kind for step in steps_of(read_jobs(file), spread=False)] == [
        "measure", "measure", "merge", "publish", "publish",
    ]  # fmt: skip


@pytest.mark.parametrize("chunks, pieces", [(5, 2), (4, 4), (7, 3), (1, 1)])
def test_pieces_are_all_chunks(chunks: int, pieces: int) -> None:
    importance = Importance(("t",), chunks, pieces=pieces)
    found = [importance.piece(number) for number in range(pieces)]
    assert [chunk for first, n in found for chunk in range(first, first + n)] == list(range(chunks))
    assert all(n for _, n in found)


WRONG: dict[str, tuple[str, str]] = {
    "not TOML": ("directory", "= ["),
    "unknown key 'quant'": ("quants =", "quant ="),
    "model 1: no repo": ('repo = "me/one-GGUF"', ""),
    "model 2: impossible value of 'quants'": ('["Q4_0"]', "[4]"),
    "impossible value of 'validate'": ('validate = "tensors"', "validate = true"),
    "model 2: no stage 'x'": ('validate = "tensors"', 'validate = "x"'),
    "model 2: unknown quantization 'Q9'": ('["Q4_0"]', '["Q9"]'),
    "importance: more pieces than chunks": ("pieces = 2", "pieces = 6"),
    "importance: impossible value of 'chunks'": ("chunks = 5", "chunks = -1"),
    "two models for one repository": ("me/two-GGUF", "me/ONE-GGUF"),
    "not the name of a repository": ("me/two-GGUF", "two"),
    "imatrix and importance": ('source = "one"', 'source = "one"\nimatrix = "x.gguf"'),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_is_wrong(what: str, file: Path) -> None:
    before, after = WRONG[what]
    assert before in FILE
    file.write_text(FILE.replace(before, after, 1))
    with pytest.raises(UsageError) as told:
        read_jobs(file)
    assert what in str(told.value) and "jobs.toml" in str(told.value)


@pytest.mark.parametrize(
    "words, told",
    [
        (("jobs.toml", "-q", "Q8_0"), "--quant with a file of jobs"),
        (("two", "me/x", "-q", "Q8_0", "--executor", "dask"), "--executor and --workers are for jobs"),
        (("two",), "two: no repository to publish to"),
        (("jobs.toml", "--executor", "ray"), "--executor ray: no such executor"),
        (("jobs.toml", "--workers", "2"), "--workers is for --executor dask"),
        (("none.toml",), "none.toml: cannot be read"),
    ],
)
def test_options_that_do_not_fit(
    words: tuple[str, ...],
    told: str,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr("sys.argv", ["gguf3n", "publish", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_dask_is_not_imported_otherwise() -> None:
    from tests.test_architecture import loaded_by

    loaded = loaded_by("import gguf3n.cli.publish", "distributed,dask")
    assert "gguf3n.publishing.jobs" in loaded


def made(directory: Path) -> dict[str, bytes]:
    """The files of all repositories but for the ledgers."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".gguf3n" not in path.parts
    }


def pretend(source: Any, texts: Any, *, n_ctx: int, n_chunks: int, first_chunk: int) -> ImportanceMatrix:
    """A measurement without an engine: other numbers for each chunk, whose float32 sums depend on their order."""
    tensors = [tensor for tensor in gguf3n.text_part(source).tensors if tensor.name.endswith(("up.weight", "q.weight"))]
    entries = {}
    for tensor in tensors:
        sums = np.zeros(tensor.n_per_row, np.float64)
        for chunk in range(first_chunk, first_chunk + n_chunks):
            sums += np.random.default_rng(chunk).random(tensor.n_per_row) ** 3 * 10.0 ** (chunk % 3)
        entries[tensor.name] = Entry(sums.astype(np.float32)[None], np.array([n_chunks * n_ctx], np.float32))
    return ImportanceMatrix(Path("x"), entries, tuple(texts), n_chunks, n_ctx)


def do_slowly(jobs: Any, step: Any, *needs: Any) -> Any:
    """A conversion in a worker that a test has time to kill."""
    publishing_jobs.measure_importance = pretend
    flag = jobs.directory.parent / f"pid-{step.kind}"
    if step.kind == "convert" and not flag.exists():
        flag.write_text(str(os.getpid()))
        time.sleep(60)
    return real(jobs, step, *needs)


real: Callable[..., Any] = dask_executor._do


@pytest.fixture
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


@pytest.mark.filterwarnings("ignore")  # of Dask's own threads and sockets
def test_the_same_bytes_with_one_worker_and_with_many(
    file: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client

    monkeypatch.setattr(publishing_jobs, "measure_importance", pretend)

    chosen = read_jobs(file, local=True, threads=1)
    done = run_here(chosen)
    assert len(done) == len(steps_of(chosen, spread=False))
    here = made(chosen.directory)
    assert {"one-GGUF/one-imatrix.gguf", "one-GGUF/one-Q4_K_M.gguf", "two-GGUF/two-Q4_0.gguf"} < set(here)
    assert gguf3n.verify(chosen.directory / "one-GGUF/one-Q4_K_M.gguf", file.parent / "one", threads=1).ok
    chosen.directory.rename(file.parent / "here")
    monkeypatch.setattr(dask_executor, "_do", do_slowly)
    with Client(cluster) as client:

        def kill() -> None:
            flag = file.parent / "pid-convert"
            while not flag.exists() or not flag.read_text():
                time.sleep(0.05)
            os.kill(int(flag.read_text()), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        done = dask_executor.run_on_client(chosen, client)
        killer.join()
    assert [each.step for each in done] == [step.id for step in steps_of(chosen, spread=True)]
    assert made(chosen.directory) == here
    assert publishing_jobs.as_dict(chosen, run_here(chosen))["ok"]  # nothing is left to do
    assert made(chosen.directory) == here


def test_the_error_of_a_step_is_its_own(file: Path) -> None:
    (file.parent / "two/config.json").write_text("{}")
    file.write_text(FILE.partition("[[model]]")[0] + "[[model]]" + FILE.rpartition("[[model]]")[2])
    with pytest.raises(gguf3n.SourceError, match="publish me/two-GGUF: "):
        run_here(read_jobs(file, local=True))
