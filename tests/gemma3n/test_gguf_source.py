"""GGUF files as sources: the bytes of a conversion from safetensors, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType

import gguf3n
from gguf3n.errors import Gguf3nError, GGUFError, MappingError, SourceError, UsageError
from gguf3n.formats.gguf_layout import KeyValue, QType
from gguf3n.formats.gguf_writer import GGUFWriter, lay_out
from gguf3n.gemma3n.part import text_part


@pytest.fixture(scope="module")
def full(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("full")
    (written,) = gguf3n.convert(tiny_checkpoint, "BF16", directory / "tiny-BF16.gguf")
    return written.path


def split(path: Path, directory: Path, n_parts: int) -> list[Path]:
    """The file in parts, as llama-gguf-split makes them: all keys in the first."""
    keys = text_part(gguf3n.read_gguf(path)).keys
    tensors = list(gguf3n.open_gguf(path).tensors.values())
    step = -(-len(tensors) // n_parts)
    parts = []
    for i in range(n_parts):
        some = tensors[i * step : (i + 1) * step]
        numbers = [
            KeyValue("split.no", GGUFValueType.UINT16, i),
            KeyValue("split.count", GGUFValueType.UINT16, n_parts),
            KeyValue("split.tensors.count", GGUFValueType.INT32, len(tensors)),
        ]
        layout = lay_out([*(keys if i == 0 else ()), *numbers], [(t.name, t.shape, t.qtype) for t in some])
        target = directory / f"tiny-BF16-{i + 1:05d}-of-{n_parts:05d}.gguf"
        with GGUFWriter(target, layout) as writer:
            for tensor, slot in zip(some, layout.slots, strict=True):
                writer.write_at(slot.offset, np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.offset))
            writer.commit()
        parts.append(target)
    return parts


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q5_1", "F32", "BF16"])
def test_the_same_file_as_from_safetensors(tiny_checkpoint: Path, full: Path, tmp_path: Path, quant: str) -> None:
    (direct,) = gguf3n.convert(tiny_checkpoint, quant, tmp_path / "direct.gguf")
    (again,) = gguf3n.convert(gguf3n.read_gguf(full), quant, tmp_path / "again.gguf")
    assert again.path.read_bytes() == direct.path.read_bytes()


def test_any_part_of_a_split_file_names_the_whole(full: Path, tmp_path: Path) -> None:
    parts = split(full, tmp_path, 3)
    (whole,) = gguf3n.convert(gguf3n.read_gguf(full), "Q8_0", tmp_path / "whole.gguf")
    model = gguf3n.read_gguf(parts[1])
    assert model.name == "tiny"
    (joined,) = gguf3n.convert(model, "Q8_0", tmp_path / "joined.gguf")
    assert joined.path.read_bytes() == whole.path.read_bytes()
    parts[2].unlink()
    with pytest.raises(GGUFError, match="00003-of-00003"):
        gguf3n.read_gguf(parts[0])


def test_a_quantized_source_only_when_asked_for(full: Path, tmp_path: Path) -> None:
    (written,) = gguf3n.convert(gguf3n.read_gguf(full), "Q8_0", tmp_path / "q8.gguf")
    with pytest.raises(UsageError, match="allow-requantize"):
        gguf3n.read_gguf(written.path)
    model = gguf3n.read_gguf(written.path, allow_requantize=True)
    assert any("Q8_0" in notice for notice in model.notices)
    (same,) = gguf3n.convert(model, "Q8_0", tmp_path / "same.gguf")
    assert same.path.read_bytes() == written.path.read_bytes()
    (lower,) = gguf3n.convert(model, "Q4_0", tmp_path / "q4.gguf")
    assert lower.path.stat().st_size < same.path.stat().st_size


@pytest.mark.parametrize(
    ("keys", "tensors", "error"),
    [
        ([KeyValue("general.architecture", GGUFValueType.STRING, "llama")], [], SourceError),
        ([], [], SourceError),
        ([KeyValue("general.architecture", GGUFValueType.STRING, "gemma3n")], [], SourceError),
        (
            [
                KeyValue("general.architecture", GGUFValueType.STRING, "gemma3n"),
                KeyValue("gemma3n.block_count", GGUFValueType.UINT32, 1),
                KeyValue("gemma3n.attention.shared_kv_layers", GGUFValueType.FLOAT32, 0.0),
            ],
            [("token_embd.weight", (4, 4), QType.F32)],
            MappingError,
        ),
    ],
    ids=["another model", "no architecture", "no layers", "tensors missing"],
)
def test_what_is_no_gemma_3n_is_refused(
    tmp_path: Path,
    keys: list[KeyValue],
    tensors: list[tuple[str, tuple[int, ...], QType]],
    error: type[Gguf3nError],
) -> None:
    path = tmp_path / "other.gguf"
    with GGUFWriter(path, lay_out(keys, tensors)) as writer:
        writer.commit()
    with pytest.raises(error, match=r"other\.gguf"):
        text_part(gguf3n.read_gguf(path))


def write_all(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "gemma3n", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    write_all(writer)
    with pytest.raises(GGUFError, match="big-endian"):
        gguf3n.read_gguf(path)


def test_parts_that_do_not_belong_together_are_refused(full: Path, tmp_path: Path) -> None:
    """Before the model is looked at, as in every other use of a split file."""
    parts = split(full, tmp_path, 3)
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(GGUFError, match="is in two parts"):
        gguf3n.read_gguf(parts[0])


def test_what_is_quantized_is_told_before_the_model_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    keys = [KeyValue("general.architecture", GGUFValueType.STRING, "llama")]
    with GGUFWriter(path, lay_out(keys, [("token_embd.weight", (4, 32), QType.Q8_0)])) as writer:
        writer.commit()
    with pytest.raises(UsageError, match="quantized already") as caught:
        gguf3n.read_gguf(path)
    assert caught.value.found == "Q8_0"
    with pytest.raises(SourceError, match="not a Gemma 3n"):
        text_part(gguf3n.read_gguf(path, allow_requantize=True))
