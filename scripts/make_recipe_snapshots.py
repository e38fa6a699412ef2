"""Records which types llama-quantize chooses for Gemma 3n, for the tests of the exact recipes.

    python scripts/make_recipe_snapshots.py

For each file type, with and without an importance matrix, llama-quantize's dry run is asked about a sparse file that
has a real header and no weights: of E2B, E4B, the tiny test checkpoint, and a model whose rows hold no whole blocks.
The answers are written to fixtures/recipes/llama_cpp.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from workshop import llama_cpp_tools
from workshop.snapshots import FTYPES, SIZES, SNAPSHOT, compress, write_sparse


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        for size, config in SIZES.items():
            path = Path(directory) / f"{size}.gguf"
            quantizable = write_sparse(config, path)
            for ftype in FTYPES:
                plain = llama_cpp_tools.chosen_types(path, ftype, imatrix=False)
                guided = llama_cpp_tools.chosen_types(path, ftype, imatrix=True)
                for types in (plain, guided):
                    for name in set(types) - quantizable:
                        assert types.pop(name) in ("BF16", "F32"), f"{name} was not kept"
                    assert set(types) == quantizable
                entry: dict[str, object] = dict(compress(plain))
                if differs := dict(compress(guided).items() - compress(plain).items()):
                    entry["imatrix"] = dict(sorted(differs.items()))
                lines.append(f"{json.dumps(f'{size} {ftype}')}: {json.dumps(entry)}")
                print(lines[-1])
            path.unlink()
    provenance = (
        f"llama-quantize --dry-run of llama-cpp-python {llama_cpp_tools.VERSION}, scripts/{Path(__file__).name}"
    )
    SNAPSHOT.parent.mkdir(exist_ok=True)
    SNAPSHOT.write_text("{\n" + ",\n".join([f'"provenance": {json.dumps(provenance)}', *lines]) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
