"""llama.cpp's converter with its two faults in Gemma 3n's mmproj file mended from outside; run as a program.

    python mended_converter.py convert_hf_to_gguf.py --mmproj CHECKPOINT --outfile FILE --outtype f16

As it is, it stops at the norms of the audio encoder's two convolutions, whose names its table has no more, and writes
layer_scale.gamma as vectors, which llama.cpp can't load. Nothing else of it is changed.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONV_NORM = re.compile(r"(?:conformer|model\.audio_tower)\.subsample_conv_projection\.conv_(\d)\.norm\.weight")


def mend(model: Any) -> None:
    """Change the class of the encoders."""
    map_name, modify = model.map_tensor_name, model.modify_tensors

    def map_tensor_name(self: Any, name: str, *suffixes: Any) -> str:
        match = CONV_NORM.fullmatch(name)
        return f"a.conv1d.{match[1]}.norm.weight" if match else str(map_name(self, name, *suffixes))

    def modify_tensors(self: Any, data: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
        for new_name, values in modify(self, data, name, bid):
            is_vector = new_name.endswith("layer_scale.gamma") and values.dim() == 1
            yield new_name, values[None, :, None, None] if is_vector else values

    model.map_tensor_name, model.modify_tensors = map_tensor_name, modify_tensors


def main(program: Path) -> None:
    sys.path[:0] = [str(program.parent), str(program.parent / "gguf-py")]
    import conversion.gemma  # type: ignore[import-not-found]

    mend(conversion.gemma.Gemma3nVisionAudioModel)
    sys.argv = sys.argv[1:]
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
