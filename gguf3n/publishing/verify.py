"""Makes a file again from its source and its manifest, and compares bit for bit; nothing is written.

The data that a conversion would write is held against the file as it comes, a few rows at a time, so it takes as long
as the conversion and no disk at all.
"""

from __future__ import annotations

import tempfile
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf3n.conversion import ConversionOptions, plan_files, read_source
from gguf3n.errors import SourceError, UsageError
from gguf3n.formats.byte_source import HeaderInMemory
from gguf3n.formats.gguf_layout import row_bytes
from gguf3n.formats.gguf_reader import GGUFFile, GGUFTensor, open_gguf, read_header
from gguf3n.formats.gguf_writer import Layout, TensorSlot
from gguf3n.formats.imatrix import ImportanceMatrix, read_imatrix
from gguf3n.gemma3n.source import Checkpoint, Source
from gguf3n.inspection.diff import Difference, diff
from gguf3n.pipeline import run
from gguf3n.planning import Plan
from gguf3n.progress import OnProgress
from gguf3n.publishing.manifest import (
    Manifest,
    hash_file,
    hash_imatrix,
    manifest_path,
    read_manifest,
    record_source,
    versions,
)
from gguf3n.workers import check_threads


@dataclass(frozen=True)
class DataDifference:
    """A tensor whose data is not what the source gives: its first byte that differs, and how many do.

    `row` and `byte` are places of the first one: a row of the tensor, a byte of its data.
    """

    name: str
    row: int
    byte: int
    n_bytes: int

    def __str__(self) -> str:
        return f"tensor {self.name}: byte {self.byte:,}, in row {self.row:,}; {self.n_bytes:,} bytes of it differ"


@dataclass(frozen=True)
class Verification:
    """What came of making a file again. The file's is the first of each pair of `header`, the second is what was made.

    `claims` are sentences of the manifest that are not true of the file; `notes` may explain a difference.
    """

    path: Path
    source: str
    manifest: Manifest
    header: Difference
    data: tuple[DataDifference, ...]
    layout: tuple[str, ...]
    claims: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether every bit is what the source gives."""
        return self.header.equal and not self.data and not self.layout

    @property
    def ok(self) -> bool:
        return self.is_same and not self.claims

    @property
    def first(self) -> str | None:
        """The first difference, in the order of the file: a key, a tensor's type or shape, its data."""
        return next(self.differences(), None)

    def differences(self) -> Iterator[str]:
        """Every difference in a line."""
        for key in self.header.keys:
            yield f"key {key.name}: {_told(key.types[0], key.values[0])}; made: {_told(key.types[1], key.values[1])}"
        for tensor in self.header.tensors:
            found, made = (
                "none" if qtype is None or shape is None else f"{qtype} {' x '.join(map(str, shape))}"
                for qtype, shape in zip(tensor.types, tensor.shapes, strict=True)
            )
            yield f"tensor {tensor.name}: {found}; made: {made}"
        yield from map(str, self.data)
        yield from (*self.header.layout, *self.layout)

    def as_dict(self) -> dict[str, Any]:
        """Everything that was found."""
        return {
            "path": str(self.path),
            "source": self.source,
            "recipe": self.manifest.recipe.name,
            "ok": self.ok,
            "same": self.is_same,
            "first": self.first,
            "differences": list(self.differences()),
            "claims": list(self.claims),
            "notes": list(self.notes),
        }


def _told(type_name: str | None, value: object) -> str:
    text = str(value)
    return "none" if type_name is None else f"{text if len(text) <= 60 else text[:59] + '…'} ({type_name})"


def verify(
    path: str | Path,
    source: str | Path,
    *,
    revision: str | None = None,
    manifest: str | Path | None = None,
    imatrix: str | Path | None = None,
    threads: int | None = None,
    show_progress: bool = False,
    progress: OnProgress | None = None,
) -> Verification:
    """Make a file again and compare it bit for bit.

    Args:
        path: a GGUF file.
        source: what its manifest says it was made from: a checkpoint directory, a Hub id, or a GGUF file.
        revision: of a Hub id; by default the commit of the manifest.
        manifest: by default the one beside the file.
        imatrix: the importance matrix, where it is not where the manifest says.
        threads: workers; by default two more than there are processors.

    Raises: GGUFError for a file that can't be read; UsageError for a manifest, or an importance matrix that is not the
        manifest's; SourceError or a class below it, HubError, QuantizationError. What differs is in the result.
    """
    check_threads(threads)
    path = Path(path)
    gguf = open_gguf(path)
    beside = Path(manifest) if manifest is not None else manifest_path(path)
    if manifest is None and not beside.exists():
        raise UsageError(
            f"{path}: no manifest beside it",
            expected=str(beside),
            fix="give it with --manifest; `gguf3n convert --manifest` and `gguf3n publish` write them",
        )
    said = read_manifest(beside)
    recipe = said.recipe.recipe(str(beside))
    matrix = _imatrix(said, imatrix, beside.parent)
    with ExitStack() as stack:
        opened = _opened(said, source, revision, show_progress, stack)
        options = ConversionOptions(
            (recipe,), None, matrix, threads, vision=said.vision, audio=said.audio, force_types=said.force_types
        )
        [plan] = plan_files(opened, options)
        found = record_source(opened)
        notes = [*_source_notes(said, dict(found.files)), *_version_notes(said)]
        header = diff(gguf, read_header(HeaderInMemory("what was made", plan.layout.header, plan.total_bytes)))
        data, layout = _compare(gguf, plan, threads, progress)
    return Verification(path, str(source), said, header, data, layout, tuple(_claims(said, gguf)), tuple(notes))


def _imatrix(said: Manifest, given: str | Path | None, directory: Path) -> ImportanceMatrix | None:
    """The importance matrix of the manifest, under the name that it had: given, beside it, or where it was.

    Raises: UsageError; GGUFError.
    """
    if said.imatrix is None:
        if given is not None:
            raise UsageError(f"{given}: {said.name} was made without an importance matrix", fix="leave --imatrix out")
        return None
    path = Path(given if given is not None else said.imatrix)
    if given is None and (directory / path.name).is_file():
        path = directory / path.name
    if not path.is_file():
        raise UsageError(
            f"{path}: the importance matrix is not there",
            expected=f"the one with SHA-256 {said.imatrix_sha256}",
            fix="give it with --imatrix",
        )
    matrix = read_imatrix(path)
    if (sha256 := hash_imatrix(matrix)) != said.imatrix_sha256:
        raise UsageError(
            f"{path}: not the importance matrix that {said.name} was made with",
            expected=f"SHA-256 {said.imatrix_sha256}",
            found=sha256,
            fix="give the right one with --imatrix",
        )
    return replace(matrix, path=Path(said.imatrix))


def _opened(said: Manifest, source: str | Path, revision: str | None, show_progress: bool, stack: ExitStack) -> Source:
    """The source under the name that it had, as that is in the file. Raises: as `read_source`."""
    from gguf3n.formats.hub import is_repo_id

    if revision is None and said.source.commit is not None and is_repo_id(str(source)):
        revision = said.source.commit
    opened = read_source(source, revision=revision, allow_requantize=True, show_progress=show_progress)
    if not isinstance(opened, Checkpoint) or opened.repo_id == said.source.repo is not None:
        return opened
    if said.source.repo is not None:
        return replace(opened, repo_id=said.source.repo)
    name = said.source.directory
    if opened.repo_id is None and Path(opened.path).resolve().name == name == Path(opened.path).name:
        return opened
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UsageError(f"manifest of {said.name}: not the name of a directory", found=name)
    link = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gguf3n-verify-")), name)
    try:
        link.symlink_to(opened.path.resolve(), target_is_directory=True)
    except OSError as error:
        raise SourceError(
            f"{opened.path}: can't be given the name that it had",
            expected=name,
            found=error.strerror or str(error),
            fix="rename the directory",
        ) from error
    return read_source(link)


def _source_notes(said: Manifest, found: dict[str, str]) -> Iterator[str]:
    for name in sorted({*said.source.files, *found}):
        before, now = said.source.files.get(name), found.get(name)
        if before != now:
            what = "is not in the source" if now is None else "is not in the manifest" if before is None else "differs"
            yield f"{name} {what}: another source than the manifest's"


def _version_notes(said: Manifest) -> Iterator[str]:
    now = versions()
    for name in dict.fromkeys((*said.versions, *now)):
        if said.versions.get(name) != now.get(name):
            yield f"made with {name} {said.versions.get(name)}, here it is {now.get(name)}"


def _claims(said: Manifest, gguf: GGUFFile) -> Iterator[str]:
    """What the manifest says of the file and is not so."""
    sha256, _ = hash_file(gguf.path)
    if sha256 != said.sha256:
        yield f"the file's SHA-256 is {sha256}; the manifest says {said.sha256}"


def _compare(
    gguf: GGUFFile, plan: Plan, threads: int | None, progress: OnProgress | None
) -> tuple[tuple[DataDifference, ...], tuple[str, ...]]:
    """The data of every tensor that both have in one type and shape, and what stands around it."""
    made: list[Comparison] = []

    def sink(path: Path, layout: Layout, *, force: bool) -> Comparison:
        made.append(Comparison(gguf, layout))
        return made[0]

    run([(plan, gguf.path)], threads=threads, progress=progress, sink=sink)
    return made[0].differences(), tuple(made[0].layout_differences())


class Comparison:
    """A sink that holds the data of a layout against a file's; nothing is written.

    Tensors are found by their names, so a file whose header has another length is compared all the same; those of
    another type or shape are passed over.
    """

    def __init__(self, gguf: GGUFFile, layout: Layout) -> None:
        self.gguf = gguf
        self.layout = layout
        self._offsets = [slot.offset for slot in layout.slots]
        self._lock = threading.Lock()
        self._found: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing to undo."""

    def commit(self) -> None:
        """Nothing to keep."""

    def write_at(self, offset: int, data: np.ndarray) -> None:
        """Compare bytes that belong at a file offset. Shapes: uint8, contiguous. Raises: GGUFError."""
        slot = self.layout.slots[bisect_right(self._offsets, offset) - 1]
        tensor = self._same(slot)
        if tensor is None:
            return
        start = offset - slot.offset
        given = data.reshape(-1).view(np.uint8)
        there = np.frombuffer(self.gguf.read(tensor, start, given.nbytes), np.uint8)
        differs = np.flatnonzero(there != given)
        if differs.size:
            with self._lock:
                first, n = self._found.get(slot.name, (slot.n_bytes, 0))
                self._found[slot.name] = min(first, start + int(differs[0])), n + int(differs.size)

    def _same(self, slot: TensorSlot) -> GGUFTensor | None:
        tensor = self.gguf.tensors.get(slot.name)
        return tensor if tensor is not None and (tensor.qtype, tensor.shape) == (slot.qtype, slot.shape) else None

    def differences(self) -> tuple[DataDifference, ...]:
        """In the order of the file."""
        return tuple(
            DataDifference(slot.name, first // row_bytes(slot.qtype, slot.shape[-1]), first, n)
            for slot in self.layout.slots
            for first, n in [self._found.get(slot.name, (0, 0))]
            if n
        )

    def layout_differences(self) -> Iterator[str]:
        """What is not as it was laid out beside the data: padding, length, the header's bytes. Raises: GGUFError."""
        tensors = sorted(self.gguf.tensors.values(), key=lambda tensor: (tensor.part, tensor.offset))
        for tensor, after in zip(tensors, [*tensors[1:], None], strict=True):
            end = tensor.offset + tensor.n_bytes
            gap = -end % self.gguf.alignment
            if after is not None and after.part == tensor.part:
                gap = min(gap, after.offset - end)
            if any(self.gguf.parts[tensor.part].read_at(end, gap)):
                yield f"padding after tensor {tensor.name}: not zeros"
        if self.gguf.file_bytes != self.layout.total_bytes:
            yield f"{self.gguf.file_bytes:,} bytes; made: {self.layout.total_bytes:,}"
        elif self.gguf.parts[0].read_at(0, len(self.layout.header)) != self.layout.header:
            yield "the header's bytes"
