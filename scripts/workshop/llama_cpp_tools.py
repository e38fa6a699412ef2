"""Finds llama.cpp's own programs, for the scripts that compare with them.

convert_hf_to_gguf.py comes in the source distribution of llama-cpp-python, llama-quantize as a function of the module
that it builds, the other programs are compiled from the same sources. None is needed to use gguf3n.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

VERSION = "0.3.36"
HOW_TO_GET = f"""llama.cpp's tools were not found. To get them from PyPI:
    pip download --no-deps --no-binary :all: llama-cpp-python=={VERSION}
    tar xf llama_cpp_python-{VERSION}.tar.gz
    pip install ./llama_cpp_python-{VERSION}      # compiles llama.cpp: some minutes
    pip install torch transformers sentencepiece  # what its converter imports
    export LLAMA_CPP_DIR=$PWD/llama_cpp_python-{VERSION}/vendor/llama.cpp
LLAMA_CPP_PYTHON may name another Python that has llama-cpp-python."""

PROGRAMS = ("llama-imatrix", "llama-perplexity", "llama-quantize")
HOW_TO_COMPILE = f"""llama.cpp's programs were not found. To compile them from PyPI's sources:
    pip download --no-deps --no-binary :all: llama-cpp-python=={VERSION}
    tar xf llama_cpp_python-{VERSION}.tar.gz
    cd llama_cpp_python-{VERSION}/vendor/llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build build --target {" ".join(PROGRAMS)}
    export LLAMA_CPP_BIN=$PWD/build/bin"""


def converter() -> Path:
    """The path of convert_hf_to_gguf.py; leaves with advice where it is not found."""
    path = Path(os.environ.get("LLAMA_CPP_DIR", "")) / "convert_hf_to_gguf.py"
    if not path.is_file():
        sys.exit(HOW_TO_GET)
    return path


def program(name: str) -> str:
    """The path of a compiled program of PROGRAMS; leaves with advice where it is not found."""
    path = Path(os.environ.get("LLAMA_CPP_BIN", "")) / name
    if not path.is_file():
        sys.exit(HOW_TO_COMPILE)
    return str(path)


def quantizer_python() -> str:
    """A Python that has llama-cpp-python; leaves with advice where there is none."""
    if named := os.environ.get("LLAMA_CPP_PYTHON"):
        return named
    if importlib.util.find_spec("llama_cpp") is None:
        sys.exit(HOW_TO_GET)
    return sys.executable


def convert_command(source: Path, output: Path, outtype: str) -> list[str]:
    """The command line of llama.cpp's converter."""
    return [sys.executable, str(converter()), str(source), "--outfile", str(output), "--outtype", outtype]


def quantize_command(
    source: Path, output: Path, ftype: str, threads: int = 0, imatrix: Path | None = None
) -> list[str]:
    """The command line of llama-quantize, through llama-cpp-python.

    Args:
        ftype: as in "Q4_K_M".
        imatrix: an .npz with the quant_weights of each tensor, by its name.
    """
    extra = ["--imatrix", str(imatrix)] if imatrix is not None else []
    return [quantizer_python(), __file__, "quantize", str(source), str(output), ftype, str(threads), *extra]


def chosen_types(source: Path, ftype: str, imatrix: bool) -> dict[str, str]:
    """Tensor -> type as llama-quantize chooses it in a dry run, which reads no weight.

    Args:
        imatrix: as if an importance matrix were given.
    """
    command = [quantizer_python(), __file__, "types", str(source), ftype, "imatrix" if imatrix else "none"]
    return dict(json.loads(run(command)))


def run(command: list[str], *, with_log: bool = False) -> str:
    """Run a tool quietly and return its output, `with_log` its stderr too; leaves with both if the tool fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr if with_log else done.stdout


def _parameters(ftype: str) -> Any:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    named = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}", None)
    params.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32 if named is None and ftype == "F32" else named
    return params


def _imatrix(entries: dict[str, Any]) -> Any:
    import llama_cpp

    array = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()
    for item, (name, values) in zip(array, entries.items(), strict=False):
        item.name = name.encode()
        item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        item.size = values.size
    return array


def _quantize(source: str, output: str, ftype: str, threads: str, *options: str) -> int:
    import llama_cpp
    import numpy as np

    params = _parameters(ftype)
    params.nthread = int(threads)
    if "--imatrix" in options:
        with np.load(options[options.index("--imatrix") + 1]) as file:
            entries = {name: np.ascontiguousarray(file[name], np.float32) for name in file.files}
        params.imatrix = _imatrix(entries)
    return int(llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(params)))


def _types(source: str, ftype: str, imatrix: str) -> int:
    """Print what a dry run logs of each tensor, as JSON."""
    import llama_cpp
    import numpy as np

    lines: list[bytes] = []
    llama_cpp.llama_log_set(keep := llama_cpp.llama_log_callback(lambda _level, text, _data: lines.append(text)), None)
    params = _parameters(ftype)
    params.dry_run = True
    if imatrix == "imatrix":
        params.imatrix = _imatrix({"any": np.ones(1, np.float32)})
    failed = int(llama_cpp.llama_model_quantize(source.encode(), b"", ctypes.byref(params)))
    del keep
    text = b"".join(lines).decode()
    found = re.findall(r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\w+), size = .*?(?:\((\w+)\))?$", text, re.M)
    print(json.dumps({name: (new or old).upper() for name, old, new in found}))
    return failed


if __name__ == "__main__":
    sys.exit((_quantize if sys.argv[1] == "quantize" else _types)(*sys.argv[2:]))
