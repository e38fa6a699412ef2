"""Ollama's reader of Modelfiles, in plain loops: a character at a time, and no escapes.

Source: ParseFile, parseRuneForState and unquote of parser/parser.go.
"""

from __future__ import annotations

import unicodedata

COMMANDS = {
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
}  # fmt: skip


def is_printable(char: str) -> bool:
    """As strconv.IsPrint."""
    return char == " " or unicodedata.category(char)[0] in "LMNPS"


def unquote(text: str) -> str | None:
    """None where the quotes are still open."""
    if text.startswith('"""'):
        return text[3:-3] if len(text) >= 6 and text.endswith('"""') else None
    if text.startswith('"'):
        return text[1:-1] if len(text) >= 2 and text.endswith('"') else None
    return text


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Name and value of each command, parameters under their own names. Raises: ValueError."""
    commands: list[tuple[str, str]] = []
    state, name, buffer = "nothing", "", ""
    for char in text:
        if state == "nothing":
            if char == "#":
                state = "comment"
            elif char not in " \t\r\n":
                state, buffer = "name", char
        elif state == "comment":
            state = "nothing" if char in "\r\n" else state
        elif state == "name":
            if char.isascii() and char.isalpha():
                buffer += char
            elif char in " \t" and buffer.lower() in COMMANDS:
                name, state = buffer.lower(), "parameter" if buffer.lower() == "parameter" else "value"
                buffer = ""
            else:
                raise ValueError(f"no command: {buffer + char!r}")
        elif state == "parameter":
            if char in " \t":
                name, state, buffer = buffer, "value", ""
            else:
                buffer += char
        elif char in " \t\r\n":
            value = unquote(buffer.strip())
            if value is None or char in " \t":
                buffer += char
            else:
                commands.append((name, value))
                state, buffer = "nothing", ""
        elif is_printable(char):
            buffer += char
    if state == "value":
        value = unquote(buffer.strip())
        if value is None:
            raise ValueError(f"{name}: no end")
        commands.append((name, value))
    elif state not in ("nothing", "comment"):
        raise ValueError(f"{buffer!r}: no end")
    if not any(name == "from" for name, _ in commands):
        raise ValueError("no FROM")
    return commands
