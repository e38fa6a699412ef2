"""What fuzzers share: values that break readers, and a run of inputs in a process of its own with limits.

An input is made from its number alone, so what fails can be made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_SECONDS = 20
"""Of the processor for one input; a sound one takes some hundredths of a second."""
MAX_WAIT = 180
"""Seconds by the clock. Why so many: where a machine is busy, what has stopped is hard to tell from what waits."""
MAX_BYTES = 768 << 20
"""Of address space beyond what the packages take when they are loaded."""
BATCH = 250
"""Inputs that a process sees before the next one is started."""
LOADING = 20
"""Inputs before processes are forked, so that what they share is imported once. One that fails shows its traceback."""
SHOWN_LINES = 3
ENDINGS = {"TooLong": f"over {MAX_SECONDS} s", "MemoryError": "over the limit of memory", "the process": "dead"}
"""How a failure begins that is no raw traceback, and what it is called."""
TRACEBACK = "raw tracebacks"

BIG_NUMBER = "a number of 5,000 digits"
DEEP = "lists nested 100,000 deep"
LONG = "a list of 100,000 zeros"
STAND_INS = {BIG_NUMBER: "9" * 5000, DEEP: "[" * 100_000 + "]" * 100_000, LONG: "[" + "0, " * 99_999 + "0]"}
"""What json can't write, or not soon, by the text that stands for it."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308,
    float("inf"), float("nan"), "", "a", "\ud800", "\0", "é" * 300, "x" * 100_000, "../../etc/passwd", "a" * 300,
    [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [1, 2], ["a", "b"], LONG, 20_000_000, 30_000_000,
    BIG_NUMBER, DEEP,
)  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Set, insert, delete, double bytes, or cut the end off."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 if at < len(out):
                out[at] = rng.randrange(256)
            case 1:
                out[at:at] = rng.randbytes(rng.randint(1, 8))
            case 2:
                del out[at : at + rng.randint(1, 64)]
            case 3:
                out[at:at] = out[max(0, at - rng.randint(1, 300)) : at]
            case 4 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 5 if rng.random() < 0.2:
                del out[at:]
    return bytes(out)


def mutate_json(value: Any, rng: random.Random) -> bytes:
    """Put a hostile value, another part of the same document or nothing in some places."""
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(list(_places(value, rng)) or [(None, None)])
        if holder is None:
            continue
        choice = rng.random()
        if choice < 0.7:
            holder[key] = copy.deepcopy(rng.choice(VALUES))  # or it would be changed for all later inputs
        elif choice < 0.8:
            del holder[key]
        elif choice < 0.9:
            other, place = rng.choice(list(_places(value, rng)) or [(holder, key)])
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = json.loads(json.dumps(other[place]))
        elif isinstance(holder, dict):
            holder[rng.choice(("", "a", "\ud800", "0", "-1", BIG_NUMBER))] = holder.pop(key)
    text = json.dumps(value)
    for stand_in, real in STAND_INS.items():
        text = text.replace(json.dumps(stand_in), real)
    return text.encode()


def _places(value: Any, rng: random.Random) -> Iterator[tuple[Any, Any]]:
    """Containers and keys in them, a few of each container."""
    if isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys if len(keys) < 200 else rng.sample(keys, 8):
            yield value, key
            yield from _places(value[key], rng)


@dataclass
class Failures:
    """What was found: inputs, and for each kind of failure how many and the first."""

    n_inputs: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, kind: str) -> None:
        self.kinds[kind] += 1
        self.first.setdefault(kind, number)

    def lines(self) -> Iterator[str]:
        """The report."""
        refused = sum(count for kind, count in self.answers.items() if kind.endswith("Error"))
        passed = self.n_inputs - refused - sum(self.kinds.values())
        endings = Counter(dict.fromkeys((TRACEBACK, *ENDINGS.values()), 0))
        for kind, count in self.kinds.items():
            endings[next((name for start, name in ENDINGS.items() if kind.startswith(start)), TRACEBACK)] += count
        yield f"{self.n_inputs:,} inputs in {self.seconds:.0f} s: " + ", ".join(
            f"{count:,} {name}"
            for name, count in {"refused with one error": refused, "passed": passed, **endings}.items()
        )
        yield "answers: " + ", ".join(f"{count:,} {kind}" for kind, count in self.answers.most_common())
        for kind, count in self.kinds.most_common():
            yield f"{count:,} x, first input {self.first[kind]}: {kind}"


class TooLong(BaseException):
    """An input that took longer than MAX_SECONDS or MAX_WAIT. Why no Exception: those are caught along the way."""


def run_all(
    check: Callable[[int], str], first: int, n_inputs: int, *, processes: int = 2, max_minutes: float = float("inf")
) -> Failures:
    """Check inputs by their numbers, in processes that may die.

    Args:
        check: returns what became of the input; an error of gguf3n's is an answer too.
    """
    found = Failures()
    started = time.monotonic()
    batches = iter(range(first, first + n_inputs, BATCH))
    running: list[_Batch] = []
    while True:
        in_time = time.monotonic() - started < 60 * max_minutes
        while in_time and len(running) < processes and (start := next(batches, None)) is not None:
            running.append(_Batch(check, start, min(BATCH, first + n_inputs - start)))
        if not running:
            break
        for batch in list(running):
            batch.collect(found)
            if batch.is_over:
                running.remove(batch)
                if batch.rest:
                    running.append(_Batch(check, batch.rest.start, len(batch.rest)))
        time.sleep(0.02)
    found.seconds = time.monotonic() - started
    return found


class _Batch:
    """A process and the inputs that it has."""

    def __init__(self, check: Callable[[int], str], start: int, count: int) -> None:
        self.rest = range(start, start + count)
        self.is_over = False
        context = multiprocessing.get_context("fork")
        self._answers, sent = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(check, self.rest, sent))
        self._process.start()
        sent.close()
        self._heard = time.monotonic()

    def collect(self, found: Failures) -> None:
        """Take the answers that are there."""
        while self._answers.poll():
            try:
                number, kind, is_failure = self._answers.recv()
            except EOFError:
                self._end(found)
                return
            found.n_inputs += 1
            if is_failure:
                found.add(number, kind)
            else:
                found.answers[kind] += 1
            self.rest = range(number + 1, self.rest.stop)
            self._heard = time.monotonic()
        if time.monotonic() - self._heard > 2 * MAX_WAIT:
            self._process.kill()

    def _end(self, found: Failures) -> None:
        """The process is over: at its last input, or it died over the next one."""
        self._process.join()
        self.is_over = True
        if self.rest:
            found.n_inputs += 1
            found.add(self.rest.start, f"the process ended with {self._process.exitcode}")
            self.rest = self.rest[1:]


def _work(check: Callable[[int], str], numbers: range, answers: Any) -> None:
    def too_long(_signal: int, _frame: object) -> None:
        raise TooLong

    for timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(timer, too_long)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_BYTES, now + MAX_BYTES))
    for number in numbers:
        _give_time(MAX_SECONDS, MAX_WAIT)
        try:
            answers.send((number, check(number), False))
        except BaseException as error:
            _give_time(0, 0)
            if isinstance(error, KeyboardInterrupt):
                sys.exit(1)
            answers.send((number, describe(error), True))
        _give_time(0, 0)


def _give_time(seconds: int, wait: int) -> None:
    """TooLong comes after so many seconds of the processor, or by the clock; never with zeros."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, wait)


def describe(error: BaseException) -> str:
    """An error and where in our code it happened, without what differs between inputs."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/gguf3n/" in frame.filename]
    places = [f"{frame.filename.rpartition('/gguf3n/')[2]}:{frame.lineno}" for frame in frames[-SHOWN_LINES:]]
    return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''} at {' > '.join(places)}"


def run_script(check: Callable[[int], str], description: str) -> None:
    """A fuzzer's command line: check so many inputs, print what was found, exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n_inputs", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no more inputs after so many")
    options = parser.parse_args()
    for number in range(LOADING):
        check(number)
    found = run_all(check, options.first, options.n_inputs, processes=options.processes, max_minutes=options.minutes)
    print(*found.lines(), sep="\n")
    sys.exit(bool(found.kinds))
