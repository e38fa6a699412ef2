"""Broken GGUF files through commands: what the fuzzer has found once, and some inputs that are new."""

from __future__ import annotations

import pytest

from workshop import command_fuzzing

FOUND = {702227: "boolean scores", 374: "2^40 weights a row beside none", 155: "a matrix in F64", 1675: "one in I8"}


@pytest.mark.parametrize("number", FOUND, ids=FOUND.values())
def test_what_was_found(number: int) -> None:
    command_fuzzing.check(number)


def test_others() -> None:
    answers = {command_fuzzing.check(number) for number in range(40)}
    assert {"GGUFError", "exit 0", "exit 12"} <= answers
