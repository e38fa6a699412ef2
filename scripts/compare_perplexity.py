"""Compares our KL divergence with that of llama.cpp's own llama-perplexity, on the same files.

    LLAMA_CPP_BIN=.../build/bin python scripts/compare_perplexity.py CHECKPOINT [--type Q4_K_M]…

LLAMA_CPP_BIN names the directory of llama.cpp's compiled programs. Two directions for each type:

    ours      the reference is transformers; --save-reference wrote the base that llama-perplexity reads
    theirs    the reference is the F32 file; llama-perplexity wrote the base that --use-reference reads

Both then measure the same file against the same base, and must agree to what rounding allows: builds of llama.cpp add
in another order and round activations in other kernels, and llama-perplexity prints six digits. Exit code 1 if they do
not.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf3n
from gguf3n.validation.divergence import Divergence
from gguf3n.validation.texts import built_in_text
from workshop import llama_cpp_tools

TYPES = ("F16", "Q8_0", "Q4_K_M", "Q2_K")
N_CTX, N_CHUNKS = 512, 2

MEASURES: tuple[tuple[str, str, float], ...] = (
    ("mean", r"Mean\s+KLD:\s+(\S+)", 0.02),
    ("median", r"Median\s+KLD:\s+(\S+)", 0.02),
    ("p99", r"99\.0%\s+KLD:\s+(\S+)", 0.1),
    ("maximum", r"Maximum KLD:\s+(\S+)", 0.1),
    ("top1_agreement", r"Same top p:\s+(\S+)", 0.005),
    ("candidate_perplexity", r"Mean PPL\(Q\)\s+:\s+(\S+)", 1e-3),
    ("reference_perplexity", r"Mean PPL\(base\)\s+:\s+(\S+)", 1e-3),
)
"""Our name, what llama-perplexity prints, and how far apart the two may be, relatively."""

SMALLEST = 2e-5
"""Divergences below are not compared relatively: the base's 16 bits and six printed digits are as large."""


def perplexity(*arguments: object) -> str:
    """What llama-perplexity prints, run as our own engine is: no flash attention, a cache in float32."""
    options = ["-c", N_CTX, "-b", N_CTX, "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--no-warmup", "-t", 2]
    command = [llama_cpp_tools.program("llama-perplexity"), *map(str, (*options, *arguments))]
    return llama_cpp_tools.run(command, with_log=True)


def differences(ours: Divergence, theirs: str) -> Iterator[str]:
    """A line for each measure that both must have."""
    for name, pattern, tolerance in MEASURES:
        match = re.search(pattern, theirs)
        if match is None:
            sys.exit(f"llama-perplexity prints no {name}:\n{theirs[-2000:]}")
        expected = float(match[1].rstrip("%")) / (100 if name == "top1_agreement" else 1)
        found = getattr(ours, name)
        close = abs(found - expected) <= max(tolerance * abs(expected), SMALLEST)
        yield f"  {name:<22}{found:14.6f}{expected:14.6f}{'' if close else '  DIFFERENT'}"


def logits(file: Path, source: Path, **options: Path) -> gguf3n.LogitsResult:
    """What our own stage says of a file."""
    validation = gguf3n.validate(
        file,
        source,
        stages=["logits"],
        n_tokens=N_CTX * N_CHUNKS,
        n_ctx=N_CTX,
        **options,  # type: ignore[arg-type]
    )
    result = validation.stages[gguf3n.Stage.LOGITS]
    if not isinstance(result, gguf3n.LogitsResult):
        sys.exit(str(result.problems))
    return result


def compare(base: Path, file: Path, source: Path) -> bool:
    """Measure a file against a base with both; whether they agree."""
    ours = logits(file, source, use_reference=base)
    theirs = perplexity("-m", file, "--kl-divergence", "--kl-divergence-base", base)
    lines = list(differences(ours.divergence, theirs))
    print(*lines, sep="\n", flush=True)
    return not any("DIFFERENT" in line for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint directory")
    parser.add_argument("--type", action="append", help=f"repeatable; by default {', '.join(TYPES)}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        directory = Path(name)
        full, text = directory / "full.gguf", directory / "text.txt"
        gguf3n.convert(options.source, "F32", full)
        text.write_text(built_in_text(), "utf-8")
        bases = {"ours": directory / "ours.kld", "theirs": directory / "theirs.kld"}
        logits(full, options.source, save_reference=bases["ours"])
        perplexity("-m", full, "-f", text, "--chunks", N_CHUNKS, "--kl-divergence-base", bases["theirs"])
        same = True
        for quant in options.type or TYPES:
            file = directory / f"{quant}.gguf"
            gguf3n.convert(options.source, quant, file)
            for whose, base in bases.items():
                print(f"{quant}, base: {whose:<14}{'gguf3n':>14}{'llama.cpp':>14}")
                same &= compare(base, file, options.source)
            file.unlink()
    sys.exit(not same)


if __name__ == "__main__":
    main()
