"""`gguf3n slices`: the slices of E4B that were measured when it was published."""

from __future__ import annotations

from typing import Annotated

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, human_bytes, print_json
from gguf3n.cli.paint import cut, filled, line_width, say
from gguf3n.recipes import find_recipe
from gguf3n.slicing import SliceSizes, slice_sizes

SCHEMA = "gguf3n.slices/1"


def slices(
    quant: Annotated[str, typer.Option("--quant", "-q", help="The quantization that sizes are for.")] = "Q4_K_M",
    json: options.Json = False,
) -> None:
    """List the MatFormer slices of E4B: effective parameters, published MMLU, sizes, engines that load them."""
    recipe = find_recipe(quant)
    found = slice_sizes(recipe)
    if json:
        print_json({"schema": SCHEMA, "quant": recipe.name, "slices": [_as_json(each) for each in found]})
        return
    rows = [("name", "effective", "MMLU", recipe.name, "padded", "llama.cpp")]
    for each in found:
        rows.append(
            (
                each.named.name,
                f"{each.n_effective / 1e9:.2f} B",
                f"{each.named.mmlu:.1f}",
                human_bytes(each.true_bytes),
                human_bytes(each.padded_bytes) if each.is_mixed else "",
                "padded" if each.is_mixed else "as it is",
            )
        )
    for line in columns(rows, "<>>>><"):
        say(cut(line, line_width()))
    say("")
    for line in NOTES:
        say(*filled(line, 0))


NOTES = (
    "MMLU is that of the pretrained model in full precision, as Google published it.",
    "llama.cpp, Ollama and LM Studio take one FFN width for all layers, so `convert --slice` pads slices of mixed "
    "widths; with --no-pad it writes the true ones. transformers and mistral.rs load what `slice` writes.",
)


def _as_json(each: SliceSizes) -> dict[str, object]:
    return {
        "name": each.named.name,
        "effective_parameters": each.n_effective,
        "mmlu": each.named.mmlu,
        "bytes": each.true_bytes,
        "padded_bytes": each.padded_bytes,
        "loads_unpadded": ["transformers", "mistral.rs"]
        + ([] if each.is_mixed else ["llama.cpp", "Ollama", "LM Studio"]),
    }
