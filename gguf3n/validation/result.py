"""What validation says of a file: a verdict for each stage, the worst of them for the whole.

stage       compares                                                          with
structure   keys, tensor table, layout                                        lint's checks, and the source's metadata
tensors     every weight, dequantized                                         the source's weights
tokens      llama.cpp's token ids for texts in many scripts and for a chat    the reference tokenizer's
logits      llama.cpp's next-token distributions                              the reference model's
vision      the same after pictures, with an mmproj file                      the reference model's

stages.py has a row for each of them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf3n.validation.document import Block


class Stage(enum.Enum):
    """The stages, in the order in which they run."""

    STRUCTURE = "structure"
    TENSORS = "tensors"
    TOKENS = "tokens"
    LOGITS = "logits"
    VISION = "vision"


class Verdict(enum.Enum):
    """Is the file what it should be; later ones are worse."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """PASS where there is none."""
    return max(verdicts, key=list(Verdict).index, default=Verdict.PASS)


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be; WARN or FAIL.

    `where` is a tensor, a key, or what was compared; `what` says what was expected and what was found.
    """

    verdict: Verdict
    where: str
    what: str


@dataclass(frozen=True)
class StageResult:
    """What each stage's own result adds to, and how it is printed. Units: seconds."""

    problems: tuple[Problem, ...]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        return worst(problem.verdict for problem in self.problems)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader should know that is no fault."""
        return ()

    def lines(self) -> list[str]:
        """What was measured, in a few lines for a terminal."""
        return ["could not be run"]

    def blocks(self, *, with_pictures: bool) -> Iterator[Block]:
        """The same for a page, in full."""
        return iter(())

    def details(self) -> dict[str, Any]:
        """The same for programs, in full."""
        return {}

    def as_dict(self) -> dict[str, Any]:
        """Everything that was found."""
        problems = [{**asdict(problem), "verdict": problem.verdict.value} for problem in self.problems]
        return {
            "verdict": self.verdict.value,
            "seconds": round(self.seconds, 3),
            "problems": problems,
            **self.details(),
        }
