"""From an existing file's types to the recipe that reproduces them."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as QType
from gguf.constants import LlamaFileType

import gguf3n
from gguf3n.conversion import read_recipe
from gguf3n.errors import MappingError, SourceError, UsageError
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue
from gguf3n.formats.gguf_writer import lay_out
from gguf3n.gemma3n.mapping import Storage
from gguf3n.recipes import Keep, extract_recipe, find_recipe, format_recipe, preset_names
from gguf3n.recipes.extract import recipe_name
from tests.recipes.facts import all_types, types


@pytest.mark.parametrize("name", [*preset_names(), "Q3_K_M@2025"])
def test_an_extracted_recipe_reproduces_the_types(tmp_path: Path, name: str) -> None:
    recipe = find_recipe(name)
    original = {tensor.name: qtype for tensor, qtype in all_types(recipe, "E2B", imatrix=True)}
    storage = {tensor.name: tensor.storage for tensor, _ in all_types(recipe, "E2B", imatrix=True)}
    of = {each: {n: q for n, q in original.items() if storage[n] is each} for each in Storage}
    extracted = extract_recipe("x.gguf", of[Storage.QUANTIZABLE], of[Storage.HALF], recipe.ftype)
    (tmp_path / "copy.toml").write_text(format_recipe(extracted), "utf-8")
    for again in (extracted, find_recipe(str(tmp_path / "copy.toml"))):
        expected = {n: q.name for n, q in of[Storage.QUANTIZABLE].items()}
        assert types(again, "E2B", imatrix=True, complete=True) == expected
        assert again.ftype is recipe.ftype
        assert again.keep is (Keep.F32 if name == "F32" else Keep.F16)


NAMES = {
    "unsloth/gemma-3n-E4B-it-GGUF:UD-Q4_K_XL": "UD-Q4_K_XL",
    "https://host/x/gemma-3n-E4B-it-UD-IQ2_XXS.gguf": "UD-IQ2_XXS",
    "/some/where/gemma-3n-E2B-it.Q8_0.gguf": "Q8_0",
    "C:\\models\\gemma-Q4_K_M-00001-of-00003.gguf": "Q4_K_M",
    "gemma-3n-bf16.gguf": "bf16",
    "my model.gguf": "my-model",
}


@pytest.mark.parametrize("origin", NAMES)
def test_the_name_is_that_of_the_quantization(origin: str) -> None:
    assert recipe_name(origin) == NAMES[origin]


def test_a_type_that_can_not_be_written() -> None:
    with pytest.raises(UsageError, match="in a type that can't be written"):
        extract_recipe("x", {"token_embd.weight": QType.MXFP4}, {}, LlamaFileType.MOSTLY_Q8_0)


def sparse(path: Path, recipe: str, *, drop: str = "", architecture: str = "gemma3n", ftype: int = 15) -> Path:
    """A file of E2B's size that has a header and takes no space."""
    layout = lay_out(
        [
            KeyValue("general.architecture", GGUFValueType.STRING, architecture),
            KeyValue("general.file_type", GGUFValueType.UINT32, ftype),
        ],
        [(t.name, t.shape, q) for t, q in all_types(find_recipe(recipe), "E2B", imatrix=True) if t.name != drop],
    )
    with open(path, "wb") as file:
        file.write(layout.header)
        file.truncate(layout.total_bytes)
    return path


def test_from_a_file(tmp_path: Path) -> None:
    recipe = read_recipe(sparse(tmp_path / "gemma-3n-E2B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"))
    assert (recipe.name, recipe.ftype, recipe.n_layers) == ("UD-Q4_K_XL", LlamaFileType.MOSTLY_Q4_K_M, 30)
    assert types(recipe, "E2B") == types(find_recipe("UD-Q4_K_XL"), "E2B")


def test_a_file_type_of_the_future_is_guessed(tmp_path: Path) -> None:
    assert read_recipe(sparse(tmp_path / "x.gguf", "Q8_0", ftype=4711)).ftype is LlamaFileType.MOSTLY_Q8_0


def test_another_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a Gemma 3n"):
        read_recipe(sparse(tmp_path / "x.gguf", "Q8_0", architecture="gemma3"))


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match=r"blk\.3\.proj\.weight"):
        read_recipe(sparse(tmp_path / "x.gguf", "Q8_0", drop="blk.3.proj.weight"))


def test_a_file_without_layers(tmp_path: Path) -> None:
    keys = [KeyValue("general.architecture", GGUFValueType.STRING, "gemma3n")]
    layout = lay_out(keys, [("token_embd.weight", (4, 256), QType.Q8_0)])
    (tmp_path / "x.gguf").write_bytes(layout.header.ljust(layout.total_bytes, b"\0"))
    with pytest.raises(MappingError, match="no layers"):
        read_recipe(tmp_path / "x.gguf")


def test_like_a_file_that_was_converted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The whole circle on real files: convert, extract, convert again, the same bytes."""
    options = {"tensor_types": ["blk.1*.ffn_up.weight=Q5_0", "*.attn_k.weight=Q8_0"], "keep": "bf16"}
    (first,) = gguf3n.convert(tiny_checkpoint, "Q4_0@llama.cpp", tmp_path / "a-Q4_0.gguf", **options)  # type: ignore[arg-type]
    recipe = read_recipe(first.path)
    assert recipe.keep is Keep.BF16
    (again,) = gguf3n.convert(tiny_checkpoint, recipe, tmp_path / "b.gguf")
    assert again.path.read_bytes() == first.path.read_bytes()


class _Ranges(BaseHTTPRequestHandler):
    """Serves ranges of one file; `sent` counts bytes."""

    path_on_disk: Path
    sent = 0

    def do_GET(self) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        n_bytes = self.path_on_disk.stat().st_size
        end = min(int(last) + 1, n_bytes)
        with open(self.path_on_disk, "rb") as file:
            file.seek(int(first))
            data = file.read(end - int(first))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{end - 1}/{n_bytes}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        type(self).sent += len(data)

    def log_message(self, *_: object) -> None:
        pass


def test_from_a_server_by_ranges(tmp_path: Path) -> None:
    """Three gigabytes there, one or two megabytes read."""
    _Ranges.path_on_disk = sparse(tmp_path / "gemma-3n-UD-Q5_K_XL.gguf", "UD-Q5_K_XL")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Ranges) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        recipe = read_recipe(f"http://127.0.0.1:{server.server_port}/gemma-3n-UD-Q5_K_XL.gguf")
        server.shutdown()
    assert types(recipe, "E2B") == types(find_recipe("UD-Q5_K_XL"), "E2B")
    assert _Ranges.sent < 4e6
