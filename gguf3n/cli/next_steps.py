"""What to type to run a file that was just written."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from gguf3n.cli.console import columns
from gguf3n.conversion import Conversion
from gguf3n.gemma3n.part import PartKind
from gguf3n.inspection.lint import Severity
from gguf3n.publishing.ollama import MODELFILE


def next_steps(written: Sequence[Conversion]) -> Iterator[str]:
    """A line for each engine, with the first file of the text model; none for a file that lint has an error for.

    Source: the help of llama-cli and llama-mtmd-cli; `lms import`, which moves a file unless it is
    told to copy it.
    """
    texts, encoders = (
        [each for each in written if each.plan.part.kind is kind] for kind in (PartKind.TEXT, PartKind.MMPROJ)
    )
    run = [*texts[:1], *encoders[:1]]
    if not texts or any(finding.check.severity is Severity.ERROR for each in run for finding in each.plan.findings):
        return
    text = _quoted(texts[0].path)
    model = shlex.quote(texts[0].path.stem.lower())
    modelfile = _quoted(texts[0].path.parent / MODELFILE)
    with_encoders = f" --mmproj {_quoted(encoders[0].path)}" if encoders else ""
    rows = [
        ("  llama.cpp", f"{'llama-mtmd-cli' if encoders else 'llama-cli'} -m {text}{with_encoders}"),
        ("  Ollama", f"gguf3n ollama {text}{with_encoders}; ollama create {model} -f {modelfile}; ollama run {model}"),
        ("  LM Studio", f"lms import --copy {text}"),
    ]
    yield "to run it:"
    yield from columns(rows, "<<")


def _quoted(path: Path) -> str:
    """For a shell; a name that begins with a dash is no option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))
