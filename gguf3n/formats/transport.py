"""HTTP by urllib from a server that is not trusted: a limit for the whole request, addresses and redirects checked.

Why: urllib's time-out is for one wait: a byte of a header now and then, or `100 Continue` without end, is never over.
"""

from __future__ import annotations

import functools
import http.client
import io
import re
import socket
import string
import threading
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import IO, Any
from urllib.parse import quote, urljoin, urlsplit

MAX_REDIRECTS = 5

LENGTH = re.compile(r"[0-9]{1,18}")
"""Why a limit: int() refuses thousands of digits, and no file has more than these."""
DEFAULT_PORTS = {"http": 80, "https": 443}


class Clock:
    """When the request that is under way must be over."""

    def __init__(self) -> None:
        self._seconds = self._end = 0.0

    def start(self, seconds: float) -> None:
        """Allows so many seconds from now on."""
        self._seconds, self._end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left. Raises: TimeoutError: none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"more than {self._seconds:g} s")
        return left


def opener(clock: Clock, *handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    """What opens addresses; headers, bodies and all redirects within the clock's time."""
    return urllib.request.build_opener(_HTTP(clock), _HTTPS(clock), *handlers)


class _Timed(io.RawIOBase):
    """What a socket receives; each wait ends with the clock's time."""

    def __init__(self, received: io.RawIOBase, connection: socket.socket, clock: Clock) -> None:
        self._received, self._connection, self._clock = received, connection, clock
        self._wait = connection.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._clock.left()
        self._connection.settimeout(left if self._wait is None else min(self._wait, left))
        return self._received.readinto(buffer)

    def close(self) -> None:
        self._received.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, connection: socket.socket, *args: Any, clock: Clock, **options: Any) -> None:
        super().__init__(connection, *args, **options)
        received: io.RawIOBase = self.fp.detach()
        self.fp = io.BufferedReader(_Timed(received, connection, clock))


def _connected(clock: Clock, address: tuple[str, int], wait: float, *_: Any) -> socket.socket:
    """A connection to the first address of a name that answers, all within the clock's time.

    Why: Python's own waits as long for each address, and for DNS as long as the system does.
    """
    failed: OSError = OSError(f"no address of {address[0]}")
    for family, kind, protocol, _, place in _addresses(clock, address):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(min(wait, clock.left()))
            connection.connect(place)
            connection.settimeout(wait)
            return connection
        except OSError as error:
            failed = error
            connection.close()
        except BaseException:
            connection.close()
            raise
    raise failed


def _addresses(clock: Clock, address: tuple[str, int]) -> list[Any]:
    """What DNS knows of a name. Why a thread: nothing else ends that wait. Raises: OSError; TimeoutError."""
    found: list[Any] = []
    failed: list[Exception] = []

    def ask() -> None:
        try:
            found.extend(socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(clock.left())
    if failed:
        raise failed[0]
    if asking.is_alive():
        clock.left()
        raise TimeoutError(f"no answer from DNS for {address[0]}")
    return found


def _connection(kind: type[http.client.HTTPConnection], clock: Clock) -> Any:
    def connect(host: str, **options: Any) -> http.client.HTTPConnection:
        connection = kind(host, **options)
        connection._create_connection = functools.partial(_connected, clock)  # type: ignore[attr-defined]
        connection.response_class = functools.partial(_Response, clock=clock)  # type: ignore[assignment]
        return connection

    return connect


class _HTTP(urllib.request.HTTPHandler):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connection(http.client.HTTPConnection, self._clock), req)


class _HTTPS(urllib.request.HTTPSHandler):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connection(http.client.HTTPSConnection, self._clock), req)


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few redirects, never from https to http, and takes the login to no other origin.

    Why: urllib would take it everywhere, would read all of an answer that it leaves, and knows 308 only since Python
    3.11.
    """

    def http_error_302(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message) -> Any:
        fp.close()
        location = headers.get("Location")
        n_followed = getattr(req, "n_followed", 0) + 1
        if location is None or n_followed > MAX_REDIRECTS:
            reason = "Redirection to nowhere" if location is None else f"more than {MAX_REDIRECTS} redirects"
            raise urllib.error.HTTPError(req.full_url, code, reason, headers, None)
        try:
            location = quote(location, encoding="latin-1", safe=string.punctuation)
            is_whole = urlsplit(location).scheme != ""
            target = checked_address(location if is_whole else urljoin(req.full_url, location))
        except ValueError as error:
            reason = f"Redirection to what is not an address: {error}"
            raise urllib.error.HTTPError(req.full_url, code, reason, headers, None) from error
        if origin(req.full_url)[0] == "https" != origin(target)[0]:
            raise urllib.error.HTTPError(req.full_url, code, "Redirection from https to http", headers, None)
        request = self.followed(req, target, code)
        request.n_followed = n_followed  # type: ignore[attr-defined]
        return self.parent.open(request, timeout=req.timeout)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def followed(self, request: urllib.request.Request, target: str, code: int) -> urllib.request.Request:
        """The request to where a redirect leads."""
        following = urllib.request.Request(target, headers=dict(request.headers))
        if origin(request.full_url) != origin(target):
            following.remove_header("Authorization")
        return following


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: who gets what is sent to an address."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").rstrip("."), parts.port or DEFAULT_PORTS.get(parts.scheme)


def checked_address(url: str) -> str:
    """An address of http or https that can be asked; what is not ASCII is percent-encoded.

    Raises: ValueError: what is wrong with it.
    """
    if any(c <= " " or c == "\x7f" for c in url):  # urlsplit would drop some of them
        raise ValueError("spaces or control characters in it")
    parts = urlsplit(url)
    if parts.scheme not in DEFAULT_PORTS:
        raise ValueError(f"its scheme is {parts.scheme or 'missing'}, not http or https")
    if "@" in parts.netloc:
        raise ValueError("a user or a password in it")
    if not parts.hostname:
        raise ValueError("no host in it")
    if parts.port == 0:  # and ValueError for one that is no number, or too large
        raise ValueError("port 0")
    parts.hostname.encode("idna")
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return parts._replace(path=path, query=query, fragment="").geturl()


def content_length(headers: Message) -> int | None:
    """How long a server says that its answer is. Raises: ValueError: it says what is no length."""
    said = set(headers.get_all("Content-Length") or ())
    if not said:
        return None
    if len(said) > 1 or not LENGTH.fullmatch(min(said)):
        raise ValueError(f"Content-Length: {', '.join(sorted(said))[:80]}")
    return int(min(said))


def is_malformed(error: Exception) -> bool:
    """Whether an answer, or an address, cannot be read at all: asking again is no use."""
    if isinstance(error, http.client.IncompleteRead):
        return isinstance(error.__context__, ValueError)  # the length of a chunk
    return isinstance(error, (ValueError, http.client.HTTPException)) and not isinstance(error, OSError)


def retry_after(headers: Message) -> float | None:
    """For how many seconds a server wants to be left alone; None where it says nothing that can be read."""
    said = str(headers.get("Retry-After", "")).strip()
    if re.fullmatch(r"[0-9]+", said):
        return float(said[:18])
    try:
        when = parsedate_to_datetime(said)
        when = when if when.tzinfo is not None else when.replace(tzinfo=timezone.utc)
        return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
