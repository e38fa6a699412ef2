"""Checkpoints from the Hugging Face Hub, through huggingface_hub and its cache.

    listing      one request: the commit's file names, so that a repository we cannot convert costs nothing more
    small files  config, tokenizer, chat template, model card: together
    weights      model.safetensors, or else the shards: one after another

Cache, retries, progress bars, login, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are huggingface_hub's. Where the Hub
cannot be reached, a complete copy in the cache does. What is downloaded is held against its size and hash; what is in
the cache already was, and is not read for that again.

Why: names are exact, never patterns, so that `original/`, `onnx/`, `consolidated.safetensors` and `.bin` copies stay
on the Hub. A single file goes before an index, as in transformers: an index beside it is left over from an earlier
upload. Weights are fetched in the calling thread, because Ctrl-C does not stop the threads of `snapshot_download`;
hf_xet is parallel within a file anyway.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf3n.errors import CheckpointError, Gguf3nError, HubError, OutputError
from gguf3n.formats.checkpoint import (
    INDEX,
    MAX_HEADER_BYTES,
    SHARD,
    SINGLE,
    read_tensor_table,
    weight_map,
    what_else,
)
from gguf3n.formats.remote import RemoteFile
from gguf3n.formats.rows import SourceTensor
from gguf3n.outside import inert, masked, one_line

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
    "adapter_config.json",
    "quantize_config.json",
)
"""What is fetched beside the weights; the last two only tell an adapter or a quantized checkpoint by name."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT saves of an adapter, in the order in which they are fetched."""

HEADER_REQUEST_BYTES = 256 * 1024
"""The first request for a safetensors header; Gemma 3n's headers are smaller, so one request a shard is enough."""

SMALL_AT_ONCE = 8
"""Small files that are fetched at the same time; each waits for the Hub most of the time."""

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""What names commits and files. Why: huggingface_hub makes paths of them, whatever a server says that they are."""

MAX_FILE_BYTES = 1 << 43
"""Of a file on the Hub: 8 TiB, half of what ext4 can hold; the Hub takes files of 0.5 TB."""

HASHED_BYTES = 1 << 20
"""Read at a time for a hash."""

AGAIN = "run the same command again; it resumes with the files that are not complete"

REPO_ID = re.compile(r"\w(?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True)
class FetchedCheckpoint:
    """A repository's files at one commit, in huggingface_hub's cache.

    Args:
        directory: the snapshot; it may hold files of other programs as well.
        revision: the branch, tag or commit that was asked for.
        commit: the commit that it stood for.
        weights: the names of the safetensors files.
        from_cache: the Hub was not reached, so `commit` is the last one seen.
    """

    directory: Path
    repo_id: str
    revision: str
    commit: str
    weights: tuple[str, ...]
    from_cache: bool


def is_repo_id(source: str) -> bool:
    """Whether `source` means a repository, "org/name", and not a local path."""
    if not REPO_ID.fullmatch(source) or "--" in source or ".." in source or source.endswith(".git"):
        return False
    try:
        os.stat(source)
    except PermissionError:  # there may be such a file; the Hub is not asked for what is in somebody's directories
        return False
    except OSError:
        return True
    return False


def fetch_checkpoint(
    repo_id: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    progress: bool = True,
    weights: bool = True,
) -> FetchedCheckpoint:
    """The files of a checkpoint, downloaded unless they are in the cache.

    Args:
        token: as in huggingface_hub; None takes HF_TOKEN or the stored login.
        progress: whether to show huggingface_hub's progress bars.
        weights: False leaves the weights on the Hub, for `fetch_tensor_table`.

    Raises: HubError; OutputError if the cache cannot be written; CheckpointError for a broken index.
    """
    from huggingface_hub import snapshot_download

    revision = revision or "main"
    names, commit, unreachable = _list_files(repo_id, revision, token)
    from_cache = unreachable is not None
    if not from_cache and not _weight_files(names):
        raise _no_safetensors(repo_id, names)

    with progress_bars(progress), _checked_downloads(repo_id, commit, token) as download:

        def fetch(name: str) -> None:
            with _explained(repo_id, revision, name, unreachable):
                download(name, commit, from_cache=from_cache)

        with _explained(repo_id, revision, "the small files", unreachable):
            if from_cache:
                directory = Path(
                    snapshot_download(
                        repo_id, revision=revision, allow_patterns=list(SMALL_FILES), local_files_only=True
                    )
                )
                commit = directory.name
            else:
                first, *others = [name for name in SMALL_FILES if name in names] or _weight_files(names)[:1]
                # by its revision: huggingface_hub then notes the commit for runs without network
                directory = download(first, revision, from_cache=False).parent
                with ThreadPoolExecutor(SMALL_AT_ONCE) as pool:
                    list(pool.map(lambda name: download(name, commit, from_cache=False), others))

        if unreachable is not None:
            names = [path.name for path in directory.iterdir()]
            if not _weight_files(names):
                raise _explain(unreachable, repo_id, revision, None) from unreachable
        weight_files = _weight_files(names)
        if weight_files == [INDEX]:
            fetch(INDEX)
            weight_files = sorted(set(weight_map(directory / INDEX).values()))
            missing = [name for name in weight_files if name not in names]
            if missing and not from_cache:
                raise HubError(
                    f"{repo_id}: {missing[0]} is not in the repository",
                    expected=f"the {len(weight_files)} shards that {INDEX} names",
                    found=f"{len(weight_files) - len(missing)} of them",
                    fix="choose another revision with --revision, or ask the author to complete the upload",
                )
        if weights:
            for name in weight_files:
                fetch(name)
    return FetchedCheckpoint(directory, repo_id, revision, commit, tuple(weight_files), from_cache)


def fetch_adapter(
    repo_id: str, revision: str | None = None, *, token: str | bool | None = None, progress: bool = True
) -> Path:
    """The directory of an adapter's files, downloaded unless they are in the cache. Arguments: as `fetch_checkpoint`.

    Raises: HubError; OutputError if the cache cannot be written.
    """
    revision = revision or "main"
    names, commit, unreachable = _list_files(repo_id, revision, token)
    from_cache = unreachable is not None
    if not from_cache and not set(ADAPTER_FILES) <= set(names):
        raise HubError(
            f"{repo_id}: no adapter at the top of the repository",
            expected=" and ".join(ADAPTER_FILES),
            found=_few([name for name in names if not name.startswith(".git")]) or "no files",
            fix="download the directory that holds it, and name that",
        )
    with progress_bars(progress), _checked_downloads(repo_id, commit, token) as download:
        for name in ADAPTER_FILES:
            with _explained(repo_id, revision, name, unreachable):
                directory = download(name, revision, from_cache=from_cache).parent
    return directory


def fetch_tensor_table(checkpoint: FetchedCheckpoint, *, token: str | bool | None = None) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint whose weights may still be on the Hub; only the headers are fetched.

    Exact: equal to `read_tensor_table` of the directory once the weights are there. Each shard is imitated by a file of
    the same size that has only the header, so that every check of a local checkpoint is made here too.

    Raises: HubError; CheckpointError for a broken file.
    """
    if all((checkpoint.directory / name).is_file() for name in checkpoint.weights):
        return read_tensor_table(checkpoint.directory)
    with tempfile.TemporaryDirectory(prefix="gguf3n-headers-") as folder:
        for name in checkpoint.weights:
            with _explained(checkpoint.repo_id, checkpoint.revision, f"the header of {name}"):
                header, file_bytes = _fetch_header(checkpoint, name, token)
            with open(Path(folder, name), "wb") as file:
                file.write(header)
                file.truncate(file_bytes)
        if SINGLE not in checkpoint.weights and (checkpoint.directory / INDEX).is_file():
            shutil.copyfile(checkpoint.directory / INDEX, Path(folder, INDEX))
        try:
            return read_tensor_table(Path(folder), kept_in=checkpoint.directory)
        except CheckpointError as error:
            what = error.what.replace(folder, checkpoint.repo_id)
            raise CheckpointError(what, expected=error.expected, found=error.found, fix=error.fix) from error


def list_files(repo_id: str, revision: str | None = None, *, token: str | bool | None = None) -> list[str]:
    """The names of all files of a repository. Raises: HubError."""
    names, _, unreachable = _list_files(repo_id, revision or "main", token)
    if unreachable is not None:
        raise _explain(unreachable, repo_id, revision or "main", None) from unreachable
    return names


def file_address(
    repo_id: str, name: str, revision: str | None = None, *, token: str | bool | None = None
) -> tuple[str, dict[str, str]]:
    """Where a file is, and the headers that its server wants."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    return hf_hub_url(repo_id, name, revision=revision), build_hf_headers(token=token, library_name="gguf3n")


def _fetch_header(checkpoint: FetchedCheckpoint, name: str, token: str | bool | None) -> tuple[bytes, int]:
    """The first bytes of a safetensors file, with at least its header, and the size of the file.

    Why not by huggingface_hub: it keeps whatever a server sends, which may be the whole file.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled(f"the header of {name} is not in the cache")
    url, headers = file_address(checkpoint.repo_id, name, checkpoint.commit, token=token)
    file = RemoteFile(url, headers, name=f"{checkpoint.repo_id}/{name}", block_bytes=HEADER_REQUEST_BYTES)
    if file.n_bytes > MAX_FILE_BYTES:
        raise HubError(
            f"{checkpoint.repo_id}: {name} is too large",
            expected=f"{MAX_FILE_BYTES:,} bytes at most",
            found=f"{file.n_bytes:,}",
        )
    n_bytes = HEADER_REQUEST_BYTES
    start = file.read_at(0, 8)
    if len(start) == 8:
        n_bytes = min(max(n_bytes, 8 + struct.unpack("<Q", start)[0]), 8 + MAX_HEADER_BYTES)
    return file.read_at(0, n_bytes), file.n_bytes


def _list_files(repo_id: str, revision: str, token: str | bool | None) -> tuple[list[str], str, Exception | None]:
    """The names of all files at a revision, and its commit; or nothing, and why the Hub could not tell."""
    from huggingface_hub import HfApi, constants

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_plain_record)
    try:
        info = HfApi(library_name="gguf3n", token=token).model_info(
            repo_id, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
    except Exception as error:
        status = status_of(error)
        if isinstance(error, ValueError) or (status is not None and 400 <= status < 500 and status != 429):
            raise _explain(error, repo_id, revision, None) from error
        return [], "", error
    commit = str(info.sha)
    _check_hash(repo_id, "a commit", commit)
    return [sibling.rfilename for sibling in info.siblings or ()], commit, None


def _plain_record(record: logging.LogRecord) -> bool:
    """Makes what huggingface_hub logs printable: signed addresses and what a server wants to be shown."""
    record.msg, record.args = inert(one_line(masked(record.getMessage()))), None
    return True


def _check_hash(repo_id: str, what: str, said: str) -> None:
    if not HASH.fullmatch(said):
        raise HubError(
            f"{repo_id}: the Hub says what is not {what}",
            expected="40 or 64 hexadecimal digits",
            found=said[:80],
            fix="check HF_ENDPOINT and the proxy",
        )


class _Download:
    """Downloads files of one commit, and holds each against what the Hub says of it."""

    def __init__(self, repo_id: str, commit: str, token: str | bool | None, metadata: dict[str, Any]) -> None:
        self._repo_id, self._commit, self._token = repo_id, commit, token
        self._metadata = metadata

    def __call__(self, name: str, revision: str, *, from_cache: bool) -> Path:
        from huggingface_hub import file_download, hf_hub_download, hf_hub_url, try_to_load_from_cache

        known = try_to_load_from_cache(self._repo_id, name, revision=self._commit) if self._commit else None
        path = Path(
            hf_hub_download(
                self._repo_id,
                name,
                revision=revision,
                token=self._token,
                library_name="gguf3n",
                local_files_only=from_cache,
            )
        )
        if not from_cache and not isinstance(known, str):
            url = hf_hub_url(self._repo_id, name, revision=revision)
            metadata = self._metadata.get(url) or file_download.get_hf_file_metadata(url=url, token=self._token)
            self._check(path, metadata)
        return path

    def _check(self, path: Path, metadata: Any) -> None:
        n_bytes = path.stat().st_size
        expected = found = f"{n_bytes:,} bytes"
        if metadata.size is not None and n_bytes != metadata.size:
            expected = f"{metadata.size:,} bytes"
        else:
            try:
                digest = file_hash(path, is_sha256=len(metadata.etag) == 64)
            except BaseException:
                path.unlink()  # a name in the cache is for what was checked; the bytes stay
                raise
            if digest != metadata.etag:
                expected, found = f"hash {metadata.etag}", f"hash {digest}"
        if expected != found:
            blob = path.parent / os.readlink(path) if path.is_symlink() else path
            path.unlink()
            blob.unlink(missing_ok=True)
            raise HubError(
                f"{self._repo_id}: {path.name} is not what the Hub says it is",
                expected=expected,
                found=found,
                fix="run the same command again: the file was removed from the cache. Where it happens again, "
                "something between here and the Hub changes files: see HF_ENDPOINT and the proxy",
            )


def file_hash(path: Path, *, is_sha256: bool) -> str:
    """The hash by which the Hub names a file: SHA-256 of a large one, git's of the others."""
    if is_sha256:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while data := file.read(HASHED_BYTES):
            digest.update(data)
    return digest.hexdigest()


_ONE_AT_A_TIME = threading.Lock()
"""Why: while files are fetched a function of huggingface_hub is another one."""


@contextmanager
def _checked_downloads(repo_id: str, commit: str, token: str | bool | None) -> Iterator[_Download]:
    """What downloads; a commit or an ETag that is no hash does not reach huggingface_hub.

    Why: it asks for both just before it makes paths of them, in a function of a public name, and has no place of its
    own for a check; asking before it would leave a server the choice to answer differently the second time.
    """
    from huggingface_hub import file_download

    ask = file_download.get_hf_file_metadata
    seen: dict[str, Any] = {}

    def checked(url: str, **options: Any) -> Any:
        try:
            metadata = ask(url=url, **options)
        except Exception as error:  # huggingface_hub notes for a commit, too, which file is missing
            headers = getattr(getattr(error, "response", None), "headers", {})
            _check_hash(repo_id, "a commit", headers.get("X-Repo-Commit") or commit)
            raise
        xet_hash = None if metadata.xet_file_data is None else metadata.xet_file_data.file_hash
        for what, said in (
            ("a commit", metadata.commit_hash),
            ("the hash of a file", metadata.etag),
            ("the hash of a file", xet_hash),
        ):
            if said is not None:
                _check_hash(repo_id, what, said)
        if metadata.commit_hash not in (None, commit):
            raise HubError(
                f"{repo_id}: the repository changed while it was fetched",
                expected=f"commit {commit}",
                found=metadata.commit_hash,
                fix="run the same command again",
            )
        seen[url] = metadata
        return metadata

    with _ONE_AT_A_TIME:
        file_download.get_hf_file_metadata = checked
        try:
            yield _Download(repo_id, commit, token, seen)
        finally:
            file_download.get_hf_file_metadata = ask


def _weight_files(names: list[str]) -> list[str]:
    """Which files hold the weights: the single file, the index (still to be read), or shards without an index."""
    for name in (SINGLE, INDEX):
        if name in names:
            return [name]
    return sorted(name for name in names if SHARD.fullmatch(name))


def _no_safetensors(repo_id: str, names: list[str]) -> HubError:
    expected = f"{SINGLE}, or shards with {INDEX}"
    known = what_else(Path("DIR"), names)  # where they are once they are downloaded
    if known is not None:
        what, found, fix = known
        return HubError(f"{repo_id}: {what}", expected=expected, found=_few(found), fix=fix)
    return HubError(
        f"{repo_id}: no safetensors checkpoint at the top of the repository",
        expected=expected,
        found=_few([name for name in names if not name.startswith(".git")]) or "no files",
        fix="look for the checkpoint that this repository was made from; its model card often names it",
    )


def _few(names: list[str], n_shown: int = 5) -> str:
    more = f", and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return ", ".join(names[:n_shown]) + more


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Hides huggingface_hub's progress bars unless `show`; its environment variable has the last word."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if show or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(repo_id: str, revision: str, doing: str, unreachable: Exception | None = None) -> Iterator[None]:
    """Turns what huggingface_hub raises into our errors; a miss in the cache by why the Hub was not asked."""
    try:
        yield
    except Gguf3nError:
        raise
    except Exception as error:
        cause = unreachable if unreachable is not None and isinstance(error, FileNotFoundError) else error
        raise _explain(cause, repo_id, revision, None if cause is unreachable else doing) from cause


def _explain(error: Exception, repo_id: str, revision: str, doing: str | None) -> Gguf3nError:
    """The error a user can act on.

    Args:
        doing: what was being downloaded; None if the Hub was only asked what there is.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    causes = causes_of(error)
    page = f"https://huggingface.co/{repo_id}"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    status = next((code for code in map(status_of, causes) if code is not None), None)
    found = found_in(causes)

    def any_is(*classes: type[BaseException]) -> bool:
        return any(isinstance(cause, classes) for cause in causes)

    if any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _no_space(cause) for cause in causes):
        return OutputError(
            f"{constants.HF_HUB_CACHE}: no space left for {doing or 'the download'} of {repo_id}",
            found=found,
            fix="free some space, or set HF_HOME to a directory on a larger disk; " + AGAIN,
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return OutputError(
            f"{error.filename}: cannot be written in the download cache",
            found=error.strerror,
            fix="repair its permissions, or set HF_HOME to a directory of your own",
        )
    if any_is(hub.GatedRepoError):
        return HubError(
            f"{repo_id} is gated: its files are only for accounts that have accepted the license",
            found=found,
            fix=f"accept the license at {page} and {log_in}",
        )
    if any_is(hub.RepositoryNotFoundError):
        return HubError(
            f"{repo_id}: no such repository on the Hub, or a private one, and no such local directory",
            found=found,
            fix=f"check the name at {page}; for a private repository {log_in}",
        )
    if any_is(hub.RevisionNotFoundError):
        return HubError(
            f"{repo_id} has no revision {revision!r}",
            expected="a branch, a tag or a commit hash",
            found=found,
            fix=f"see the revisions at {page}/tree/main",
        )
    if any_is(hub.OfflineModeIsEnabled):
        return HubError(
            f"{repo_id} at {revision!r} is not complete in the cache, and HF_HUB_OFFLINE forbids fetching it",
            expected=f"all files in {constants.HF_HUB_CACHE}",
            fix="run once with HF_HUB_OFFLINE=0, or give a local directory",
        )
    if any_is(hub.HFValidationError):
        return HubError(f"{repo_id}: not the name of a repository", expected="ORG/NAME", found=found)
    if status == 401:
        return HubError(
            f"{repo_id}: the Hub does not accept the token",
            found=found,
            fix="log in again with `hf auth login`, or correct HF_TOKEN",
        )
    if status == 403:
        return HubError(
            f"{repo_id}: the Hub refuses access",
            found=found,
            fix=f"see {page}, and whether the token may read this repository",
        )
    if status == 429:
        return HubError(f"{repo_id}: too many requests to the Hub", found=found, fix=f"wait a few minutes, or {log_in}")
    if status is not None:
        what = f"{repo_id}: the Hub answers with an error" + (f" for {doing}" if doing is not None else "")
        return HubError(what, found=found, fix=AGAIN)
    if doing is not None:
        return HubError(f"{repo_id}: the download of {doing} broke off", found=found, fix=AGAIN)
    return HubError(
        f"{repo_id} at {revision!r}: the Hub cannot be reached, and the cache has no complete copy",
        expected=f"an answer from {constants.ENDPOINT}",
        found=found,
        fix="check the network, the proxy and HF_ENDPOINT, or give a local directory",
    )


def causes_of(error: BaseException | None) -> list[BaseException]:
    """The error and what it was raised from."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__
    return causes


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an answer of the Hub."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _no_space(error: BaseException) -> bool:
    """hf_xet reports a full disk only in the text of its errors."""
    return "no space left" in str(error).lower()


def found_in(causes: list[BaseException]) -> str:
    """One line on what happened: the Hub's own words if it answered, else those of the first error with a cause."""
    for cause in causes:
        status = status_of(cause)
        if status is not None:
            text = f"HTTP {status}: {getattr(cause, 'server_message', None) or str(cause)}"
            break
    else:
        # a LocalEntryNotFoundError only says that something failed
        last = next((cause for cause in causes if not isinstance(cause, FileNotFoundError)), causes[0])
        text = f"{type(last).__name__}: {last}" if str(last) else type(last).__name__
    line = masked(" ".join(text.split()))
    return line if len(line) <= 240 else line[:239] + "…"
