"""A GGUF file on a server, read by range requests: a few megabytes of a file of many gigabytes.

    https://host/path/model.gguf      any server; of huggingface.co also the address of a file's page
    org/repo                          on the Hub, where there is one model
    org/repo:Q4_K_M                   on the Hub, by quantization
    org/repo:name.gguf                on the Hub, by name

`gguf_reader.open_gguf` takes all of these. A server is trusted as little as a file: it may ignore ranges (then the file
is read from its start, as far as its header goes), break off, redirect, stall, or lie about sizes; every answer is
checked against what was asked, retried a few times where that can help, and bounded in time and memory.

Why: urllib, so that opening a local file imports no client, and one client does for every server; huggingface_hub
says where a repository's files are and who may read them.
"""

from __future__ import annotations

import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from email.message import Message
from urllib.parse import urlsplit

from gguf3n.errors import HubError
from gguf3n.formats.byte_source import ByteSource
from gguf3n.formats.transport import (
    Clock,
    Redirects,
    checked_address,
    content_length,
    is_malformed,
    opener,
    retry_after,
)
from gguf3n.outside import masked

BLOCK_BYTES = 1 << 20
MAX_BLOCKS = 32
"""What is kept of a file, in blocks; the header of a model with the largest vocabulary is half of it."""
MAX_STREAM_BYTES = 1 << 26
"""How far a file is read where the server ignores ranges."""
ATTEMPTS = 4
TIMEOUT_SECONDS = 10.0
"""Without a byte."""
REQUEST_SECONDS = 60.0
"""For one read, all attempts, redirects and waits together."""
MAX_RETRY_AFTER_SECONDS = 30.0
"""How long a server that asks for it is left alone; for longer, the user is told."""
BACKOFF_SECONDS = 0.25
PIECE_BYTES = 1 << 16

HUB_PAGE = re.compile(r"(https://huggingface\.co/[^/]+/[^/]+)/blob/")
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
NO_MODEL = re.compile(r"(^|/)mmproj|imatrix", re.IGNORECASE)
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def locate(source: str, *, token: str | bool | None = None) -> ByteSource:
    """The file that a URL or a Hub reference means, opened.

    Raises: HubError.
    """
    if source.startswith(("https://", "http://")):
        return RemoteFile(HUB_PAGE.sub(r"\1/resolve/", source))
    from gguf3n.formats.hub import file_address, list_files

    repo_id, _, wanted = source.partition(":")
    name = choose_file(repo_id, list_files(repo_id, token=token), wanted)
    url, headers = file_address(repo_id, name, token=token)
    return RemoteFile(url, headers, name=f"{repo_id}:{name}")


def choose_file(repo_id: str, names: list[str], wanted: str) -> str:
    """The one file of a repository that is meant: by its name, by its quantization, or the only model.

    Raises: HubError with what there is.
    """
    models = [name for name in names if name.endswith(".gguf")]
    if wanted in models:
        return wanted
    heads = [name for name in models if not NO_MODEL.search(name) and not LATER_PART.search(name)]
    if wanted:
        at_end = re.compile(rf"(^|[-._/]){re.escape(wanted)}(?=\.gguf$|-\d{{5}}-of-)", re.IGNORECASE)
        heads = [name for name in heads if at_end.search(name)]
        prefixed = [name for name in heads if re.search(rf"UD-{re.escape(wanted)}", name, re.IGNORECASE)]
        if len(heads) > len(prefixed):  # Q4_K_M is not UD-Q4_K_M
            heads = [name for name in heads if name not in prefixed]
    if len(heads) == 1:
        return heads[0]
    found = ", ".join(heads or models) or "no GGUF files"
    raise HubError(
        f"{repo_id}: " + ("which file?" if heads else f"no file {wanted!r}" if wanted else "no model"),
        expected=f"{repo_id}:FILE or {repo_id}:QUANT that means one file",
        found=found if len(found) <= 800 else found[:799] + "…",
    )


class _Busy(OSError):
    """A server that may answer later.

    Args:
        wait: for how many seconds it wants to be left alone.
    """

    def __init__(self, said: str, wait: float | None) -> None:
        super().__init__(said)
        self.wait = wait


class RemoteFile:
    """A file on a server. Blocks that were read are kept, up to a bound.

    Args:
        name: what it is called instead of its address; without one it is the address without what may be secret.
        block_bytes: read at once, from its start too.

    Raises: HubError where the server does not answer as it should, in the constructor and when reading.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        name: str | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.name = name or masked(url)
        self._block_bytes = block_bytes
        try:
            self.url = checked_address(url)
        except ValueError as error:
            raise self._error(
                "not an address", expected="one like https://host/path/model.gguf", found=str(error)
            ) from error
        self.n_bytes = 0
        self.fetched_bytes = 0
        self._headers = {"User-Agent": "gguf3n", **(headers or {}), "Accept-Encoding": "identity"}
        self._clock = Clock()
        self._opener = opener(self._clock, Redirects())
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._head: bytearray | None = None
        """What was streamed of a file whose server ignores ranges."""
        self._stream: Iterator[bytes] | None = None
        self._size: int | None = None
        self._keep(0, self._fetch(0, self._block_bytes))
        if self._size is None:
            raise self._error("the server does not say how large the file is")
        self.n_bytes = self._size

    def read_at(self, offset: int, count: int) -> bytes:
        end = min(offset + count, self.n_bytes)
        if offset >= end:
            return b""
        if self._head is not None:
            self._pull(end)
            return bytes(self._head[offset:end])
        if end - offset > self._block_bytes * MAX_BLOCKS // 2:
            return self._fetch(offset, end)
        first, last = offset // self._block_bytes, (end - 1) // self._block_bytes
        missing = [i for i in range(first, last + 1) if i not in self._blocks]
        got: dict[int, bytes] = {i: self._blocks[i] for i in range(first, last + 1) if i in self._blocks}
        if missing:
            start = missing[0] * self._block_bytes
            data = self._fetch(start, min((missing[-1] + 1) * self._block_bytes, self.n_bytes))
            got.update(self._keep(start, data))
        joined = b"".join(got[i] for i in range(first, last + 1))
        return joined[offset - first * self._block_bytes : end - first * self._block_bytes]

    def sibling(self, file_name: str) -> RemoteFile:
        """The file of another name at the same place."""
        parts = urlsplit(self.url)
        url = parts._replace(path=parts.path.rpartition("/")[0] + "/" + file_name).geturl()
        separator = "/" if "/" in self.name.rpartition(":")[2] else ":"
        return RemoteFile(url, self._headers, name=self.name.rpartition(separator)[0] + separator + file_name)

    def _keep(self, start: int, data: bytes) -> dict[int, bytes]:
        blocks = {
            (start + at) // self._block_bytes: data[at : at + self._block_bytes]
            for at in range(0, len(data), self._block_bytes)
        }
        self._blocks.update(blocks)
        while len(self._blocks) > MAX_BLOCKS:
            self._blocks.popitem(last=False)
        return blocks

    def _fetch(self, start: int, end: int) -> bytes:
        """The bytes of a range, to the file's end at most, in as many requests as it takes."""
        got = bytearray()
        self._clock.start(REQUEST_SECONDS)
        cause: Exception | None = None
        failures = 0
        while failures < ATTEMPTS:
            before = len(got)
            try:
                for piece in self._request(start + before, end):
                    got += piece
                cause = None
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, ssl.SSLCertVerificationError):
                    raise self._error("the server's certificate is not valid", found=str(reason)) from error
                if is_malformed(error):
                    raise self._malformed(error) from error
                cause = error
            if self._size is not None:
                end = min(end, self._size)
                if len(got) >= end - start:
                    return bytes(got[: end - start])
            elif cause is None:
                return bytes(got)
            if len(got) - before < PIECE_BYTES:  # else a server that breaks off, but gets on
                failures += 1
                if failures == ATTEMPTS or not self._waited(cause, BACKOFF_SECONDS * 2**failures):
                    break
        said = "" if self._size is None else f" of {self._size:,}"
        found = f"{len(got):,} bytes" if cause is None else f"{type(cause).__name__}: {cause}"
        raise self._error(
            "the server does not give what was asked for",
            expected=f"bytes {start:,} to {end:,}{said}",
            found=found,
            fix="try again, or download the file",
        ) from cause

    def _waited(self, cause: Exception | None, seconds: float) -> bool:
        """Whether there is time to ask again; waits as long as the server wants, or else for some seconds."""
        if isinstance(cause, _Busy) and cause.wait is not None:
            if cause.wait > MAX_RETRY_AFTER_SECONDS:
                raise self._error(
                    "the server wants to be left alone for a while",
                    expected=f"Retry-After: {MAX_RETRY_AFTER_SECONDS:.0f} at most",
                    found=f"{cause}, Retry-After: {cause.wait:.0f}",
                    fix=f"try again in {cause.wait:.0f} s",
                ) from cause
            seconds = max(seconds, cause.wait)
        try:
            enough = self._clock.left() > seconds
        except TimeoutError:
            return False
        if enough:
            time.sleep(seconds)
        return enough

    def _request(self, start: int, end: int) -> Iterator[bytes]:
        """What a server answers to one request for a range; takes note of the file's size."""
        headers = {**self._headers, "Range": f"bytes={start}-{end - 1}"}
        try:
            wait = min(TIMEOUT_SECONDS, self._clock.left())
            response = self._opener.open(urllib.request.Request(self.url, headers=headers), timeout=wait)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416 and start == 0:
                    self._size = 0
                    return
                if error.code == 416:
                    raise self._error(
                        "the server lies about the file's size",
                        expected=f"{self._size} bytes",
                        found=f"none at {start:,}",
                    ) from error
                if error.code in (429, 500, 502, 503, 504):
                    raise _Busy(f"HTTP {error.code} {error.reason}", retry_after(error.headers)) from error
                raise self._refused(error) from error
        try:
            length = content_length(response.headers)
        except ValueError:
            response.close()
            raise
        if encoding := response.headers.get("Content-Encoding"):
            response.close()
            raise self._error("the server changes the file", expected="its bytes", found=f"encoding {encoding}")
        if response.status == 206:
            with response:
                first, last, size = self._content_range(response.headers)
                if first != start:
                    raise self._error("the server gives another range", expected=f"byte {start:,}", found=f"{first:,}")
                if self._size is not None and size != self._size:
                    raise self._error(
                        "the file changed while it was read", expected=f"{self._size:,}", found=f"{size:,}"
                    )
                if not first <= last < size:
                    raise ValueError(f"Content-Range: {first}-{last}/{size}")
                self._size = size
                yield from map(self._counted, _pieces(response, end - start))
            return
        if start > 0 or length is None:
            response.close()
            if start > 0:
                raise OSError("the server ignores the range")
            return
        self._size = length
        self._head = bytearray()
        self._stream = _pieces(response, self._size)
        self._pull(min(end, self._size))
        yield bytes(self._head)

    def _counted(self, piece: bytes) -> bytes:
        self.fetched_bytes += len(piece)
        return piece

    def _pull(self, end: int) -> None:
        """Read a stream up to a place."""
        assert self._head is not None and self._stream is not None
        if end > MAX_STREAM_BYTES:
            raise self._error(
                "the server ignores ranges, and what is wanted lies far into the file",
                expected=f"within {MAX_STREAM_BYTES:,} bytes",
                found=f"byte {end:,}",
                fix="download the file",
            )
        self._clock.start(REQUEST_SECONDS)
        try:
            while len(self._head) < end:
                piece = next(self._stream, None)
                if piece is None:
                    raise self._error(
                        "the server ignores ranges and breaks off",
                        expected=f"{self._size:,} bytes",
                        found=f"{len(self._head):,}",
                        fix="try again, or download the file",
                    )
                self._head += self._counted(piece)
        except (OSError, http.client.HTTPException) as error:
            raise self._error("the server ignores ranges and breaks off", found=str(error)) from error

    def _content_range(self, headers: Message) -> tuple[int, int, int]:
        match = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if match is None:
            raise self._error(
                "the server does not say what it gives",
                expected="Content-Range: bytes FIRST-LAST/SIZE",
                found=str(headers.get("Content-Range"))[:80],
            )
        return int(match[1]), int(match[2]), int(match[3])

    def _malformed(self, error: Exception) -> HubError:
        return self._error("the server's answer is malformed", found=f"{type(error).__name__}: {error}")

    def _refused(self, error: urllib.error.HTTPError) -> HubError:
        fix = {
            401: "log in with `hf auth login` or set HF_TOKEN, and accept the model's license on its page",
            403: "log in with `hf auth login` or set HF_TOKEN, and accept the model's license on its page",
            404: "check the address",
        }
        is_gated = error.headers.get("X-Error-Code") == "GatedRepo"  # as the Hub says it
        what = "gated: only for accounts that have accepted the license" if is_gated else "the server refuses"
        return self._error(what, found=f"HTTP {error.code} {error.reason}", fix=fix.get(error.code))

    def _error(
        self, what: str, *, expected: str | None = None, found: str | None = None, fix: str | None = None
    ) -> HubError:
        return HubError(f"{self.name}: {what}", expected=expected, found=found, fix=fix)


def _pieces(response: http.client.HTTPResponse, count: int) -> Iterator[bytes]:
    """A body as it comes in, no more than is wanted of it."""
    with response:
        while count > 0 and (piece := response.read1(min(count, PIECE_BYTES))):
            count -= len(piece)
            yield piece
