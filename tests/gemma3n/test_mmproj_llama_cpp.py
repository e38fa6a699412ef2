"""The encoders' file in llama.cpp: the bytes of its converter, files that it runs, and those that it aborts on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gguf3n
from tests.inspection.faults import change_tensor
from workshop.mmproj_comparison import CONVOLUTIONS, DEPTHWISE, GOLDEN, THEIR_TYPES, convert_ours, digest

SEE = """
import json, sys, zlib, struct, base64
import xllamacpp
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
rows = b"".join(b"\\0" + bytes((x, y, x ^ y)[c] for x in range(256) for c in range(3)) for y in range(256))
image = b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 256, 256, 8, 2, 0, 0, 0))
image += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path = sys.argv[1:]
params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, 2
server = xllamacpp.Server(params)
print("LOADED", flush=True)
url = "data:image/png;base64," + base64.b64encode(image).decode()
content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "ba"}]
options = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 3}
answer = server.handle_chat_completions({**options, "messages": [{"role": "user", "content": content}]})
print("SEEN", json.dumps(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]), flush=True)
"""
"""What llama.cpp says of an image, in a process of its own: it ends the whole one."""


def see(text: Path, mmproj: Path) -> tuple[str, str]:
    """How far it came ("", "LOADED", "SEEN"), and what ggml said last."""
    quiet = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, "-c", SEE, str(text), str(mmproj)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=quiet)
    words = [line.partition(" ")[0] for line in done.stdout.splitlines() if line.startswith(("LOADED", "SEEN"))]
    reached = words[-1] if words else ""
    assert (done.returncode == 0) == (reached == "SEEN"), done.stderr[-2000:]
    return reached, done.stderr


@pytest.fixture(scope="module")
def seeing(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(multimodal=True)


@pytest.fixture(scope="module")
def text(seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.gguf"
    gguf3n.convert(seeing, "Q8_0", path)
    return path


@pytest.mark.parametrize("quant", THEIR_TYPES)
def test_the_bytes_of_the_converter(seeing: Path, tmp_path: Path, quant: str) -> None:
    """The whole file, header and all, where the converter's types are asked for."""
    golden = json.loads(GOLDEN.read_text("utf-8"))
    named = tmp_path / "tiny"
    named.symlink_to(seeing, target_is_directory=True)
    convert_ours(named, quant, tmp_path / "ours.gguf")
    assert digest(tmp_path / "ours.gguf") == golden[quant]


def types(depthwise: str, convolutions: str) -> list[str]:
    kinds = ((DEPTHWISE, depthwise), (CONVOLUTIONS, convolutions))
    return [f"{pattern}={qtype}" for patterns, qtype in kinds for pattern in patterns]


RUNNING = {
    "F16 / BF16": ("F16", []),
    "F32 / BF16, matrices Q4_K": ("lossless", ["mm.*=Q4_K"]),
    "F32 / F16, matrices Q8_0": ("Q8_0", types("F16", "F32")),
    "F16 / F16, matrices F32": ("F32", types("F16", "F16")),
}
"""Recipe, and rules: convolutions / depthwise ones, and two more types of the matrices."""


@pytest.mark.parametrize("case", RUNNING)
def test_llama_cpp_runs(seeing: Path, text: Path, tmp_path: Path, case: str) -> None:
    recipe, rules = RUNNING[case]
    (written,) = gguf3n.convert(seeing, mmproj=recipe, output=tmp_path, tensor_types=rules, audio=False)
    assert see(text, written.path)[0] == "SEEN"


ABORTING = {
    "convolutions BF16": (types("BF16", "BF16"), "LOADED", "kernel_type == GGML_TYPE_F16"),
    "depthwise F32": (types("F32", "F32"), "", "cur_backend_id"),
}


@pytest.mark.parametrize("case", ABORTING)
def test_llama_cpp_aborts_on_what_is_refused(seeing: Path, text: Path, tmp_path: Path, case: str) -> None:
    rules, reached, said = ABORTING[case]
    (written,) = gguf3n.convert(
        seeing, mmproj="F32", output=tmp_path, tensor_types=rules, force_types=True, audio=False
    )
    found, log = see(text, written.path)
    assert found == reached and said in log


def test_llama_cpp_aborts_on_scales_that_are_vectors(seeing: Path, text: Path, tmp_path: Path) -> None:
    (written,) = gguf3n.convert(seeing, mmproj="F16", output=tmp_path)
    for name, tensor in gguf3n.open_gguf(written.path).tensors.items():
        if name.endswith("layer_scale.gamma"):
            change_tensor(written.path, name, shape=(tensor.shape[1],))
    found, log = see(text, written.path)
    assert found == "" and "ggml_can_repeat" in log
