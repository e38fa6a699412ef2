"""Chats as they are given to Ollama and to jinja, and Go's own rendering of a template for them.

Source: template.go of Ollama, which gives a template System, Messages and a few more, and images as [img-0] before a
message's text (server/prompt.go).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def model(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def parts(*texts: str, images: int = 0) -> list[dict[str, str]]:
    """The content of a message as a list: images first, as Ollama has them."""
    return [{"type": "image"}] * images + [{"type": "text", "text": text} for text in texts]


CHATS: Mapping[str, Sequence[Message]] = {
    "one question": [user("Why is the sky blue?")],
    "system": [system("Be short."), user("Why?")],
    "system of lines": [system("Be short.\nBe kind.\n\nBe right."), user("Why?")],
    "empty system": [system(""), user("Why?")],
    "system in a list": [system([{"type": "text", "text": "Be short."}]), user("Why?")],
    "turns": [user("One"), model("Two"), user("Three")],
    "system and turns": [system("Count."), user("One"), model("Two"), user("Three"), model("Four"), user("Five")],
    "answer begun": [user("Say hello."), model("Hel")],
    "answer begun later": [system("s"), user("One"), model("Two"), user("Three"), model("Fo")],
    "answer not begun": [user("Say hello."), model("")],
    "empty question": [user("")],
    "empty turns": [user(""), model(""), user("")],
    "unicode": [
        system("Sé breve. 🙂"),
        user("¿Por qué es azul? 为什么天是蓝的? \u200f\u05e9\u05dc\u05d5\u05dd é"), model("因为 — ☁️"), user("नमस्ते"),
    ],
    "marks in a text": [user("What is <end_of_turn>? And <start_of_turn>model\nthis?")],
    "go's braces": [user("{{ .Messages }} {{ end }} {%- if %}"), model("`{{`"), user('"quotes" \\n')],
    "html": [user("<b>a & b</b> 'c'")],
    "lines within": [user("a\n\n\n b\t c\r\nd"), model("1.\n2.\n"[:-1]), user("e")],
    "an image": [user(parts("What is this?", images=1))],
    "images and turns": [user(parts("And these?", images=2)), model("Two."), user(parts("And now?", images=1))],
    "image alone": [user(parts(images=1))],
    "system and an image": [system("Look."), user(parts("Well?", images=1))],
    "texts in a list": [user(parts("one", "two"))],
}  # fmt: skip
"""No message begins or ends in white space, which jinja's template trims and Go's can't."""

UNTRIMMED: Sequence[Message] = [user(" padded \n")]

IMAGE = "<image_soft_token>"


def for_ollama(chat: Sequence[Message]) -> list[dict[str, str]]:
    """A chat as Ollama gives it to a template: each content a text, images numbered."""
    n_images, messages = 0, []
    for message in chat:
        content = message["content"]
        if not isinstance(content, str):
            pictures = sum(part["type"] == "image" for part in content)
            marks = "".join(f"[img-{n_images + i}]" for i in range(pictures))
            n_images += pictures
            content = marks + "".join(part.get("text", "") for part in content)
        messages.append({"role": message["role"], "content": content})
    return messages


GO_PROGRAM = """\
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type Input struct {
	Template string                `json:"template"`
	Chats    map[string][]*Message `json:"chats"`
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	var input Input
	check(json.NewDecoder(os.Stdin).Decode(&input))
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(input.Template))
	rendered := map[string]string{}
	for name, messages := range input.Chats {
		system := ""
		for _, message := range messages {
			if message.Role == "system" {
				system = message.Content
			}
		}
		var out bytes.Buffer
		check(parsed.Execute(&out, map[string]any{"System": system, "Messages": messages, "Response": ""}))
		rendered[name] = out.String()
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	check(encoder.Encode(rendered))
}
"""


def go_renderings(go: str, template: str, chats: Mapping[str, Sequence[Message]]) -> dict[str, str]:
    """What Go's text/template makes of each chat."""
    given = json.dumps({"template": template, "chats": {name: for_ollama(chat) for name, chat in chats.items()}})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "main.go").write_text(GO_PROGRAM, "utf-8")
        run = subprocess.run(
            [go, "run", "main.go"], input=given.encode(), capture_output=True, cwd=folder, check=False
        )  # fmt: skip
    if run.returncode:
        raise RuntimeError(run.stderr.decode())
    rendered: dict[str, str] = json.loads(run.stdout)
    return rendered
