"""A manifest beside a file: everything it was made of, so that anybody can make it again and compare.

    file         name, bytes, SHA-256
    tensors      SHA-256 of each tensor's data, in the order of the file
    source       name, Hub id and commit, SHA-256 of config, tokenizer, card and weights
    recipe       in full, what the command line wanted otherwise, and a hash of both
    encoders     of an mmproj file: which are in it
    importance   the importance matrix as it was named, and its SHA-256
    versions     of gguf3n and of the packages that bytes could depend on
    command      as it was typed, secrets masked

There is no date in it: the same command makes the same manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gguf3n
from gguf3n.conversion import Conversion, ConversionOptions
from gguf3n.errors import GGUFError, SourceError, UsageError, shown
from gguf3n.formats.gguf_writer import TensorSlot
from gguf3n.formats.hub import HASHED_BYTES, file_hash
from gguf3n.formats.imatrix import ImportanceMatrix
from gguf3n.formats.small_file import CHECKPOINT_FILES, MIB, MORE_TEMPLATES, parse_json, read_small
from gguf3n.formats.whole_file import output_error, write_whole
from gguf3n.gemma3n.source import Checkpoint, Source
from gguf3n.outside import masked
from gguf3n.recipes import For, Recipe, Rule, format_recipe, parse_recipe
from gguf3n.recipes.toml import parse_type
from gguf3n.regexes import check_regex

SCHEMA = "gguf3n.manifest/1"
SUFFIX = ".manifest.json"
MAX_BYTES = 16 * MIB
"""Of a manifest; one of an E4B file has a tenth of a megabyte."""

PACKAGES = ("gguf", "numpy", "numba", "llvmlite", "sentencepiece")
"""Those that bytes could depend on, beside gguf3n and Python."""

SHA256 = re.compile(r"[0-9a-f]{64}")
BLOBS = "blobs"
"""Where huggingface_hub keeps what it has fetched, under the hash that the download was held against."""


@dataclass(frozen=True)
class SourceRecord:
    """What a file was made from.

    `files`: SHA-256 by name, of all that was read; `directory`: its name, or the GGUF file's.
    """

    directory: str
    repo: str | None
    commit: str | None
    files: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """One hash for all of it, by which a ledger knows it; where it lay is not in it, what it is called is."""
        return hash_of({"directory": self.directory, "repo": self.repo, "files": dict(sorted(self.files.items()))})


@dataclass(frozen=True)
class RecipeRecord:
    """Which types: a recipe's text, and the rules of the command line that go before it."""

    name: str
    part: str
    text: str
    overrides: tuple[Mapping[str, Any], ...]

    @property
    def sha256(self) -> str:
        return hash_of({"text": self.text, "overrides": list(self.overrides)})

    def recipe(self, origin: str) -> Recipe:
        """The recipe itself. Raises: UsageError for a text that is none."""
        part = For(self.part)
        recipe = parse_recipe(self.text, f"{origin}: recipe.text", part)
        rules = tuple(
            Rule(
                tuple(rule["patterns"]),
                parse_type(rule["type"]),
                str(rule["reason"]),
                is_regex=bool(rule["is_regex"]),
                place=str(rule["reason"]),
            )
            for rule in self.overrides
        )
        return replace(recipe, overrides=rules)


@dataclass(frozen=True)
class Manifest:
    """What `gguf3n.manifest/1` says; see the module."""

    name: str
    n_bytes: int
    sha256: str
    tensors: Mapping[str, str]
    source: SourceRecord
    recipe: RecipeRecord
    vision: bool
    audio: bool
    force_types: bool
    imatrix: str | None
    imatrix_sha256: str | None
    versions: Mapping[str, str]
    command: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        importance = None if self.imatrix is None else {"file": self.imatrix, "sha256": self.imatrix_sha256}
        return {
            "schema": SCHEMA,
            "file": {"name": self.name, "bytes": self.n_bytes, "sha256": self.sha256},
            "source": {**asdict(self.source), "sha256": self.source.sha256},
            "recipe": {
                "name": self.recipe.name,
                "for": self.recipe.part,
                "sha256": self.recipe.sha256,
                "text": self.recipe.text,
                "overrides": [dict(rule) for rule in self.recipe.overrides],
            },
            "encoders": {"vision": self.vision, "audio": self.audio, "force_types": self.force_types},
            "importance": importance,
            "versions": dict(self.versions),
            "command": list(self.command),
            "tensors": dict(self.tensors),
        }


def hash_of(value: Any) -> str:
    """SHA-256 of a value as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_path(path: Path) -> Path:
    """Where a file's manifest stands: model.gguf has model.manifest.json."""
    return path.with_name(path.name.removesuffix(".gguf") + SUFFIX)


def check_recordable(source: Source, options: ConversionOptions) -> None:
    """Refuse what no manifest can tell how to make again. Raises: UsageError."""
    if options.correlations is not None:
        raise UsageError("a manifest does not say how codes were refined", fix="leave --manifest or --refine out")
    if isinstance(source, Checkpoint) and source.changes:
        raise UsageError(
            f"{source.origin}: a manifest does not say which adapters and slice a file was made of",
            found=", ".join(source.changes),
            fix="leave --manifest out; or write the slice as a checkpoint first, and convert that",
        )


def record_source(source: Source) -> SourceRecord:
    """Hash everything that a source is read from; weights that came from the Hub have been hashed before.

    Raises: SourceError for a file that can't be read.
    """
    named: dict[str, Path] = {}
    if isinstance(source, Checkpoint):
        named = {name: source.path / name for name in CHECKPOINT_FILES}
        named |= {f"{MORE_TEMPLATES}/{path.name}": path for path in (source.path / MORE_TEMPLATES).glob("*.jinja")}
    named |= {path.name: path for path in source.files if path != source.path or not isinstance(source, Checkpoint)}
    directory = os.path.basename(os.path.abspath(source.path))
    repo, commit = None, None
    if isinstance(source, Checkpoint):
        repo, commit = source.repo_id, source.commit
        directory = source.name if repo is not None else source.folder or directory
    return SourceRecord(
        directory=directory,
        repo=repo,
        commit=commit,
        files={name: _hash(path) for name, path in sorted(named.items()) if path.is_file()},
    )


def _hash(path: Path) -> str:
    """SHA-256 of a file of a source."""
    if path.is_symlink():
        blob = Path(os.readlink(path))
        if blob.parent.name == BLOBS and SHA256.fullmatch(blob.name):
            return blob.name
    try:
        return file_hash(path, is_sha256=True)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read", found=error.strerror or str(error)) from error


def record_recipe(recipe: Recipe) -> RecipeRecord:
    """A recipe in full."""
    overrides = tuple(
        {
            "patterns": list(rule.patterns),
            "is_regex": rule.is_regex,
            "type": rule.qtype.name,
            "reason": rule.reason,
        }
        for rule in recipe.overrides
    )
    return RecipeRecord(recipe.name, recipe.part.value, format_recipe(recipe), overrides)


@cache
def versions() -> Mapping[str, str]:
    """Of gguf3n, Python and PACKAGES, and the machine's kind."""
    found = {"gguf3n": gguf3n.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hash_imatrix(imatrix: ImportanceMatrix) -> str:
    """SHA-256 of the file that an importance matrix was read from. Raises: GGUFError."""
    try:
        return file_hash(imatrix.path, is_sha256=True)
    except OSError as error:
        raise GGUFError(f"{imatrix.path}: cannot be read", found=error.strerror or str(error)) from error


def make_manifest(
    conversion: Conversion,
    options: ConversionOptions,
    source: SourceRecord,
    command: Sequence[str] = (),
    *,
    imatrix_sha256: str | None = None,
) -> Manifest:
    """What there is to say of a file that was written; it is read once for its hashes.

    Args:
        source: what `record_source` says of the conversion's.
        command: as it was typed.
        imatrix_sha256: of the importance matrix; by default of the file that it was read from.

    Raises: OutputError for a file that can't be read; GGUFError for an importance matrix.
    """
    plan = conversion.plan
    is_text = plan.recipe.part is For.TEXT
    matrix = options.imatrix if is_text else None
    sha256, tensors = hash_file(conversion.path, plan.layout.slots)
    return Manifest(
        name=conversion.path.name,
        n_bytes=plan.total_bytes,
        sha256=sha256,
        tensors=tensors,
        source=source,
        recipe=record_recipe(plan.recipe),
        vision=options.vision,
        audio=options.audio,
        force_types=options.force_types,
        imatrix=None if matrix is None else str(matrix.path),
        imatrix_sha256=None if matrix is None else imatrix_sha256 or hash_imatrix(matrix),
        versions=versions(),
        command=tuple(masked(word) for word in command),
    )


def hash_file(path: Path, slots: Sequence[TensorSlot] = ()) -> tuple[str, dict[str, str]]:
    """SHA-256 of a file, and of each tensor in it, from one read. Raises: OutputError."""
    whole = hashlib.sha256()
    tensors: dict[str, str] = {}

    def pieces(n_bytes: int) -> Iterator[bytes]:
        while n_bytes and (data := file.read(min(n_bytes, HASHED_BYTES))):
            n_bytes -= len(data)
            whole.update(data)
            yield data

    try:
        with open(path, "rb") as file:
            for slot in slots:
                for _ in pieces(slot.offset - file.tell()):
                    pass
                own = hashlib.sha256()
                for data in pieces(slot.n_bytes):
                    own.update(data)
                tensors[slot.name] = own.hexdigest()
            while data := file.read(HASHED_BYTES):
                whole.update(data)
    except OSError as error:
        raise output_error(path, error) from error
    return whole.hexdigest(), tensors


def write_manifest(manifest: Manifest, path: str | Path, *, force: bool = False) -> None:
    """Write a manifest. Raises: OutputError."""
    write_whole(path, json.dumps(manifest.as_dict(), indent=2) + "\n", force=force)


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest. Raises: UsageError for a file that can't be read or is none."""
    path = Path(path)
    raw = parse_json(read_small(path, MAX_BYTES, UsageError), str(path), UsageError)
    take = _Fields(str(path), raw)
    if take("schema", str) != SCHEMA:
        raise UsageError(f"{path}: not a manifest", expected=f"schema {SCHEMA}", found=shown(raw.get("schema")))
    file, source, recipe, encoders = (take.table(name) for name in ("file", "source", "recipe", "encoders"))
    importance = None if raw.get("importance") is None else take.table("importance")
    part = recipe("for", str)
    if part not in [each.value for each in For]:
        raise recipe.error("for", " or ".join(each.value for each in For), part)
    manifest = Manifest(
        name=file("name", str),
        n_bytes=file("bytes", int),
        sha256=file.hash("sha256"),
        tensors=take.hashes("tensors"),
        source=SourceRecord(
            source("directory", str),
            source.optional("repo"),
            source.optional("commit"),
            source.hashes("files"),
        ),
        recipe=RecipeRecord(recipe("name", str), part, recipe("text", str), tuple(recipe.rules("overrides"))),
        vision=encoders("vision", bool),
        audio=encoders("audio", bool),
        force_types=encoders("force_types", bool),
        imatrix=None if importance is None else importance("file", str),
        imatrix_sha256=None if importance is None else importance.hash("sha256"),
        versions={name: str(found) for name, found in take("versions", dict).items()},
        command=tuple(map(str, take("command", list))),
    )
    if recipe.hash("sha256") != manifest.recipe.sha256:
        raise recipe.error("sha256", manifest.recipe.sha256, recipe.hash("sha256"))
    return manifest


class _Fields:
    """The fields of a JSON object that must be as they should be. Raises: UsageError that names one."""

    def __init__(self, origin: str, raw: Any) -> None:
        self.origin = origin
        if not isinstance(raw, dict):
            raise UsageError(f"{origin}: not a JSON object", found=type(raw).__name__)
        self.raw = raw

    def error(self, name: str, expected: str, found: Any) -> UsageError:
        return UsageError(
            f"{self.origin}: {name} is not as gguf3n writes it",
            expected=expected,
            found=shown(found),
            fix="take the manifest that was published with the file, or make it again",
        )

    def __call__(self, name: str, kind: type) -> Any:
        value = self.raw.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, {str: "a text", int: "a number", list: "a list"}.get(kind, kind.__name__), value)
        return value

    def table(self, name: str) -> _Fields:
        return _Fields(f"{self.origin}: {name}", self.raw.get(name))

    def optional(self, name: str) -> str | None:
        return None if self.raw.get(name) is None else str(self(name, str))

    def hash(self, name: str) -> str:
        value = str(self(name, str))
        if not SHA256.fullmatch(value):
            raise self.error(name, "a SHA-256", value)
        return value

    def hashes(self, name: str) -> dict[str, str]:
        fields = self.table(name)
        return {key: fields.hash(key) for key in fields.raw}

    def rules(self, name: str) -> Iterator[Mapping[str, Any]]:
        for number, raw in enumerate(self(name, list), 1):
            fields = _Fields(f"{self.origin}: {name} {number}", raw)
            patterns = [str(pattern) for pattern in fields("patterns", list)]
            is_regex = fields("is_regex", bool)
            for pattern in patterns if is_regex else ():
                try:
                    check_regex(pattern)
                except ValueError as error:
                    raise fields.error("patterns", "a regular expression that can be used", str(error)) from error
            try:
                parse_type(fields("type", str))
            except ValueError:
                raise fields.error("type", "a type that can be written", fields.raw["type"]) from None
            yield {
                "patterns": patterns,
                "is_regex": is_regex,
                "type": fields("type", str),
                "reason": fields("reason", str),
            }
