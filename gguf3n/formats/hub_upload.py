"""Repositories on the Hugging Face Hub that are written to, through huggingface_hub.

    create      the repository, a branch or a pull request, where they are not there yet
    hashes      what is there: SHA-256 of a large file, git's hash of another, by the Hub's own metadata
    upload      only what is not there already; what has arrived of a large file's predecessors is not sent again
    check       each file's size and hash again, by the Hub's metadata and without a download

Nothing is ever deleted: commits only add. Where the Hub is busy or the network breaks off, a request is made again
after the time that the Hub asks for. Running the same again goes on where it ended.

Source: huggingface_hub 0.34 to 2.4, create_commit: it takes a file that is there already out of the commit, and asks
the store which of the large ones it has. It repeats requests for large files by itself, and not those for the commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from gguf3n.errors import Gguf3nError, HubError
from gguf3n.formats.hub import REPO_ID, causes_of, file_hash, found_in, progress_bars, status_of
from gguf3n.formats.small_file import CHECKPOINT_FILES, read_small
from gguf3n.formats.transport import retry_after

Result = TypeVar("Result")

TRIES = 6
FIRST_WAIT = 1.0
MAX_WAIT = 300.0
"""Seconds: the Hub counts its limits over five minutes."""
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may do."""

FILES_A_COMMIT = 50
"""Source: the Hub's advice is fewer than 100."""

AGAIN = "run the same command again: it goes on where it ended"
FIXES: Mapping[int, tuple[str, str]] = {
    401: ("the Hub does not accept the token", "log in with `hf auth login` or set HF_TOKEN to a token that may write"),
    403: ("the Hub does not let this token write", "take a token with write access to this organization"),
    404: ("no such repository, or a private one", "check the name; for a private repository log in"),
    409: ("somebody else is writing to the repository", AGAIN),
    429: ("too many requests to the Hub", "wait some minutes; " + AGAIN),
}
"""Status -> what is wrong, what to do."""


@dataclass(frozen=True)
class LocalCopy:
    """A file to upload. Units: bytes."""

    name: str
    path: Path
    n_bytes: int
    sha256: str

    def is_same(self, there: HubCopy | None) -> bool:
        """Whether the Hub has these bytes under this name."""
        return there is not None and there.n_bytes == self.n_bytes and there.hash == self.hash_like(there)

    def hash_like(self, there: HubCopy | None) -> str:
        """The hash by which the Hub knows the file: git's of one that is not large."""
        is_large = there is None or there.sha256 is not None
        return self.sha256 if is_large else file_hash(self.path, is_sha256=False)


@dataclass(frozen=True)
class HubCopy:
    """What the Hub says of a file: SHA-256 only of a large one."""

    name: str
    n_bytes: int
    sha256: str | None
    git: str

    @property
    def hash(self) -> str:
        return self.sha256 or self.git


class Repository:
    """A repository to write to.

    Args:
        revision: a branch or a pull request, as in "refs/pr/3"; main by default.
        show_progress: show huggingface_hub's bars.
        notice: told in a line when something is tried again.

    Raises: HubError for a name that is none.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        show_progress: bool = False,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        check_repo_id(repo_id)
        from huggingface_hub import HfApi

        self.repo_id = repo_id
        self.revision = revision or "main"
        self._show_progress = show_progress
        self._notice = notice
        self._api = HfApi(library_name="gguf3n")

    def create(self, *, private: bool | None = None) -> None:
        """Make the repository, and the branch, where they are not there. Raises: HubError."""
        options = {} if private is None else {"private": private}
        self._try("its repository", lambda: self._api.create_repo(self.repo_id, exist_ok=True, **options))
        if self.revision != "main" and not self.revision.startswith("refs/"):
            self._try(
                f"its branch {self.revision}",
                lambda: self._api.create_branch(self.repo_id, branch=self.revision, exist_ok=True),
            )

    def open_pull_request(self, title: str, description: str) -> str:
        """Take a pull request of this title that is open, or make one; gives its revision. Raises: HubError."""

        def find() -> str | None:
            for each in self._api.get_repo_discussions(self.repo_id, discussion_type="pull_request"):
                if each.title == title and each.status in ("open", "draft"):
                    return f"refs/pr/{each.num}"
            return None

        found = self._try("its pull requests", find)
        if found is None:
            made = self._try(
                "a pull request",
                lambda: self._api.create_pull_request(self.repo_id, title=title, description=description),
                again=False,
            )
            found = f"refs/pr/{made.num}"
        self.revision = found
        return found

    def files(self, names: Iterable[str]) -> dict[str, HubCopy]:
        """What is there of these files. Raises: HubError."""
        wanted = list(names)
        if not wanted:
            return {}
        there = self._try(
            "the list of its files",
            lambda: self._api.get_paths_info(self.repo_id, wanted, revision=self.revision),
        )
        return {
            each.path: HubCopy(
                each.path, each.size, None if each.lfs is None else str(each.lfs.sha256), str(each.blob_id)
            )
            for each in there
            if hasattr(each, "blob_id")  # a folder has none
        }

    def upload(self, files: Sequence[LocalCopy], message: str) -> list[str]:
        """Add the files that are not there already, and see that they have arrived; gives their names.

        Raises: HubError, also for a file that is not there afterwards as it was sent.
        """
        there = self.files(file.name for file in files)
        missing = [file for file in files if not file.is_same(there.get(file.name))]
        for first in range(0, len(missing), FILES_A_COMMIT):
            some = missing[first : first + FILES_A_COMMIT]
            self._try(", ".join(file.name for file in some), lambda some=some: self._commit(some, message))  # type: ignore[misc]
        self.check(files)
        return [file.name for file in missing]

    def _commit(self, files: Sequence[LocalCopy], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(file.name, str(file.path)) for file in files]
        with progress_bars(self._show_progress):
            self._api.create_commit(self.repo_id, operations, commit_message=message, revision=self.revision)

    def check(self, files: Sequence[LocalCopy]) -> None:
        """Hold files against what the Hub says of them. Raises: HubError naming the first that differs."""
        there = self.files(file.name for file in files)
        for file in files:
            found = there.get(file.name)
            if file.is_same(found):
                continue
            raise HubError(
                f"{self.repo_id}: {file.name} on the Hub is not the file that was sent",
                expected=f"{file.n_bytes:,} bytes, hash {file.hash_like(found)}",
                found="no such file" if found is None else f"{found.n_bytes:,} bytes, hash {found.hash}",
                fix=f"{AGAIN}. Where it happens again, something between here and the Hub changes files: "
                "see HF_ENDPOINT and the proxy",
            )

    def fetch(self, name: str) -> bytes:
        """A small file as it is there. Raises: HubError."""
        path = self._try(name, lambda: self._api.hf_hub_download(self.repo_id, name, revision=self.revision))
        return read_small(Path(path), *CHECKPOINT_FILES["README.md"])

    def _try(self, doing: str, call: Callable[[], Result], *, again: bool = True) -> Result:
        """Call until it works, as often as is of use. Raises: HubError."""
        wait = FIRST_WAIT
        for n in range(1, TRIES + 1):
            try:
                return call()
            except Gguf3nError:
                raise
            except Exception as error:
                causes = causes_of(error)
                status = next((code for code in map(status_of, causes) if code is not None), None)
                asked = _asked(causes)
                busy = status in BUSY if status is not None else _is_network(causes)
                if not again or not busy or n == TRIES or (asked or 0) > MAX_WAIT:
                    raise self._explained(doing, status, causes) from error
                wait = max(wait, asked or 0.0)
                self._notice(f"{self.repo_id}: {doing}: {found_in(causes[::-1])}; again in {wait:.0f} s")
            time.sleep(wait)
            wait = min(2 * wait, MAX_WAIT)
        raise AssertionError

    def _explained(self, doing: str, status: int | None, causes: Sequence[BaseException]) -> HubError:
        what, fix = FIXES.get(status or 0, (f"the upload of {doing} broke off", AGAIN))
        return HubError(f"{self.repo_id}: {what}", found=found_in(list(causes)[::-1]), fix=fix)


def check_repo_id(repo_id: str) -> None:
    """Raises: HubError for what is no name of a repository to write to."""
    if not REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise HubError(f"{repo_id}: not the name of a repository", expected="ORG/NAME, as in me/gemma-3n-E2B-it-GGUF")


def _asked(causes: Sequence[BaseException]) -> float | None:
    """For how long the Hub wants to be left alone."""
    for cause in causes:
        headers: Any = getattr(getattr(cause, "response", None), "headers", None)
        if headers is not None:
            return retry_after(cast(Any, headers))
    return None


def _is_network(causes: Sequence[BaseException]) -> bool:
    """Whether no answer came. Why by name: huggingface_hub has changed its HTTP library twice."""
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "Timeout", "TimeoutError"})
