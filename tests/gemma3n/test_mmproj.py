"""The encoders' file: every tensor and key of the published checkpoints, all layouts, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n.conversion import plan_files
from gguf3n.deciding import estimate_encoders
from gguf3n.errors import ConfigError, Gguf3nError, MappingError, SourceError, UsageError
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.rows import SourceTensor, Stored, stored_tensors
from gguf3n.gemma3n import mmproj, tower
from gguf3n.gemma3n.mapping import MappedTensor, Storage, map_tensors
from gguf3n.gemma3n.part import Part, PartKind, mmproj_part, text_part
from gguf3n.gemma3n.published import ENCODER_HEADER_BYTES
from gguf3n.gemma3n.source import Checkpoint
from gguf3n.planning import make_plan
from gguf3n.recipes import For, find_recipe, preset_names
from tests import micro
from tests.inspection.faults import change_tensor, drafted, drop_tensors, set_key
from workshop import checkpoints
from workshop.pages import MMPROJ
from workshop.places import FIXTURES

NAMES = json.loads((FIXTURES / "llama_cpp" / "mmproj_names.json").read_text("utf-8"))
"""Pattern of source names -> pattern of llama.cpp's names, its type: FTYPE is what its converter is asked for."""

THEIRS = {
    source: (target, kind)
    for pattern, (targets, kind) in NAMES.items()
    for source, target in zip(checkpoints.expand(pattern), checkpoints.expand(targets), strict=True)
}
PUBLISHED_SIZES = ("e2b", "e4b")
every_size = pytest.mark.parametrize("size", PUBLISHED_SIZES)


def published(size: str, without: str = "") -> Checkpoint:
    """A published checkpoint, of which nothing but names, shapes and config.json is there."""
    shapes = checkpoints.read_inventory(FIXTURES / "inventories" / f"gemma-3n-{size}.json")
    if without:
        shapes = {name: shape for name, shape in shapes.items() if without not in name}
    source = Checkpoint(
        origin=size,
        path=FIXTURES / "nowhere",
        name=f"gemma-3n-{size}",
        tensors=stored_tensors(Stored(name, "BF16", shape, Path("x"), 0) for name, shape in shapes.items()),
    )
    raw = json.loads((FIXTURES / "configs" / f"gemma-3n-{size}.json").read_text("utf-8"))
    source.__dict__["raw_config"] = raw  # instead of the file
    return source


def by_source(tensor: MappedTensor) -> str:
    (rows,) = tensor.rows
    assert isinstance(rows, Stored)
    return rows.name


@every_size
def test_every_tensor_is_written_as_llama_cpp_names_it(size: str) -> None:
    """In its order, and with the shapes that it can load."""
    source = published(size)
    part = mmproj_part(source)
    assert [by_source(tensor) for tensor in part.tensors] == sorted(THEIRS)
    assert len(THEIRS) == 825 == len({tensor.name for tensor in part.tensors})
    for tensor in part.tensors:
        name = by_source(tensor)
        shape = source.tensors[name].shape
        is_map = name.endswith(("layer_scale.gamma", "conv_stem.conv.bias"))
        assert tensor.name == THEIRS[name][0]
        assert tensor.shape == ((1, *shape, 1, 1) if is_map else shape)
        assert (tensor.storage.forced is QType.F32) == (THEIRS[name][1] == "F32")
    assert sum(tensor.shape[1:] == (tensor.n_weights, 1, 1) for tensor in part.tensors) == 82


def test_the_counts_in_the_docs() -> None:
    page = MMPROJ.read_text("utf-8")
    storages = Counter(tensor.storage for tensor in mmproj_part(published("e2b")).tensors)
    norms = sum("conv1d" in tensor.name and "norm" in tensor.name for tensor in mmproj_part(published("e2b")).tensors)
    for what, n in (
        ("`a.conv1d.*.norm.weight`", norms),
        ("`v.blk.*.layer_scale.gamma`", sum(name.endswith("layer_scale.gamma") for name in THEIRS)),
        ("depthwise convolutions", storages[Storage.DEPTHWISE]),
        ("other convolutions", storages[Storage.CONVOLUTION]),
    ):
        assert f"| {what} ({n})" in page


@every_size
def test_text_and_encoders_together_are_the_checkpoint(size: str) -> None:
    source = published(size)
    written = {by_source(tensor) for tensor in mmproj_part(source).tensors}
    encoders = mmproj.table(_encoders(source), source.tensors, size)
    left_out = dict(map_tensors(encoders, source.tensors, size).dropped)
    assert left_out == {mmproj.TEXT_REASON: len(source.tensors) - len(written)}


def _encoders(source: Checkpoint) -> Any:
    from gguf3n.gemma3n.encoders import read_encoders

    return read_encoders(source.raw_config, source.path, source.config.hidden_size, vision=True, audio=True)


@every_size
def test_the_keys_in_the_order_of_the_converter(size: str) -> None:
    found = [(key.name, key.value) for key in mmproj.model_keys(_encoders(published(size)))]
    assert found == [
        ("clip.has_vision_encoder", True),
        ("clip.vision.projection_dim", 2048),
        ("clip.vision.image_size", 768),
        ("clip.vision.patch_size", 3),
        ("clip.vision.embedding_length", 2048),
        ("clip.vision.feed_forward_length", 8192),
        ("clip.vision.block_count", 128),
        ("clip.vision.attention.head_count", 8),
        ("clip.vision.image_mean", [0.0, 0.0, 0.0]),
        ("clip.vision.image_std", [1.0, 1.0, 1.0]),
        ("clip.has_audio_encoder", True),
        ("clip.audio.projection_dim", 2048),
        ("clip.audio.embedding_length", 1536),
        ("clip.audio.feed_forward_length", 6144),
        ("clip.audio.block_count", 12),
        ("clip.audio.attention.head_count", 8),
        ("clip.vision.projector_type", "gemma3nv"),
        ("clip.vision.attention.layer_norm_epsilon", 1e-6),
        ("clip.audio.projector_type", "gemma3na"),
        ("clip.audio.num_mel_bins", 128),
        ("clip.audio.attention.layer_norm_epsilon", 1e-5),
    ]


def test_the_published_tower_is_read_off_its_tensors_too() -> None:
    """What small towers are read by: the same of the published one, its width apart."""
    shapes = dict(tower.PUBLISHED.tensors)
    out = {name: (16, *shape[1:]) for name, shape in shapes.items() if name == "msfa.ffn.pw_proj.conv.weight"}
    assert tower.read_tower(shapes | out, "x") == replace(tower.PUBLISHED, n_out=16)
    assert tower.PUBLISHED.n_blocks == 84 and len(shapes) == 548


BYTES = {
    ("F16", True): 1_967_748_736,
    ("F16", False): 597_757_440,
    ("lossless", True): 2_554_492_544,
    ("lossless", False): 1_184_501_248,
}
"""Of the tensors: F16 is as large as llama.cpp's, as BF16 is."""


@pytest.mark.parametrize(("name", "audio"), BYTES)
def test_sizes(name: str, audio: bool) -> None:
    found = estimate_encoders(find_recipe(name, For.MMPROJ), audio=audio)
    assert found.total_bytes - ENCODER_HEADER_BYTES == BYTES[name, audio]


@pytest.mark.parametrize("name", preset_names(For.MMPROJ))
def test_every_recipe_writes_types_that_llama_cpp_runs(name: str) -> None:
    recipe = find_recipe(name, For.MMPROJ)
    plan = make_plan(mmproj_part(published("e2b")), recipe)
    used = {tensor.rule for tensor in plan.tensors}
    assert {rule.place for rule in recipe.rules} <= used
    for tensor in plan.tensors:
        storage, qtype = tensor.source.storage, tensor.slot.qtype
        assert storage is not Storage.DEPTHWISE or qtype is QType.BF16
        assert storage is not Storage.CONVOLUTION or qtype in (QType.F16, QType.F32)
        assert storage is not Storage.QUANTIZABLE or qtype is recipe.qtype
    assert (recipe.note in plan.notices) == (name in ("BF16", "F32"))
    assert recipe.summary


@pytest.mark.parametrize("qtype", ["BF16", "F32", "Q8_0"])
@pytest.mark.parametrize("pattern", ["v.msfa.ffn.pw_exp.conv.weight", "v.blk.2.9.attn.key.down_conv.weight"])
def test_types_that_abort_are_refused(pattern: str, qtype: str) -> None:
    """Blocks of 32 do not fit rows of one or three in any case."""
    is_depthwise = "down_conv" in pattern
    rule = f"{pattern}={qtype}"
    if qtype == ("BF16" if is_depthwise else "F32"):
        gguf3n.plan(published("e2b"), find_recipe("F16", For.MMPROJ), tensor_types=[rule])
        return
    with pytest.raises(UsageError, match=r"can't (be|hold)") as error:
        gguf3n.plan(published("e2b"), find_recipe("F16", For.MMPROJ), tensor_types=[rule])
    assert error.value.fix
    if qtype != "Q8_0":
        assert "aborts" in str(error.value) and "--force-types" in str(error.value)
        options = gguf3n.parse_options(mmproj="F16", tensor_types=[rule], force_types=True)
        plan = make_plan(mmproj_part(published("e2b")), options.recipes[0], force_types=True)
        assert next(t.slot.qtype for t in plan.tensors if t.slot.name == pattern) is QType[qtype]


# what is written


@pytest.fixture(scope="module")
def seeing(make_checkpoint: Callable[..., Path]) -> Path:
    """The small checkpoint with vision and audio. Not to be changed."""
    return make_checkpoint(multimodal=True)


def test_the_values_are_those_of_the_checkpoint(seeing: Path, tmp_path: Path) -> None:
    (written,) = gguf3n.convert(seeing, mmproj="lossless", output=tmp_path)
    assert written.path == tmp_path / f"mmproj-{seeing.name}-lossless.gguf"
    source, file = gguf3n.read_source(seeing), gguf3n.open_gguf(written.path)
    with _reader() as reader:
        for tensor in written.plan.part.tensors:
            stored = source.tensors[by_source(tensor)].rows[0]
            assert isinstance(stored, Stored)
            values = [np.empty((rows.n_rows, rows.n_per_row), np.float32) for rows in (stored, tensor.rows[0])]
            reader.fill(stored, 0, values[0])
            written_rows = file.stored(file.tensors[tensor.name]).in_rows_of(values[1].shape[1])
            reader.fill(written_rows, 0, values[1])
            assert (values[0].reshape(-1) == values[1].reshape(-1)).all(), tensor.name


def _reader() -> Any:
    from contextlib import closing

    return closing(gguf3n.RowReader())


def test_one_read_writes_what_two_write(seeing: Path, tmp_path: Path) -> None:
    both = gguf3n.convert(seeing, "Q8_0", tmp_path / "both", mmproj=["F16", "Q8_0"])
    assert [each.plan.part.kind for each in both] == [PartKind.TEXT, PartKind.MMPROJ, PartKind.MMPROJ]
    gguf3n.convert(seeing, "Q8_0", tmp_path / "one")
    gguf3n.convert(seeing, output=tmp_path / "one", mmproj=["F16", "Q8_0"])
    for each in both:
        assert each.path.read_bytes() == (tmp_path / "one" / each.path.name).read_bytes()


@pytest.mark.parametrize("options", [{"layout": "nested"}, {"layout": "peft-prefix"}, {"shards": 3}])
def test_every_layout_gives_the_same_file(
    make_checkpoint: Callable[..., Path], seeing: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """`nested`: early checkpoints, whose towers have no `model.` before them."""
    files = []
    for number, source in enumerate((seeing, make_checkpoint(multimodal=True, **options))):
        named = tmp_path / str(number) / "named"
        named.parent.mkdir()
        named.symlink_to(source, target_is_directory=True)
        (written,) = gguf3n.convert(named, mmproj="F16", output=tmp_path / str(number) / "out.gguf")
        files.append(written.path.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("kept", ["vision", "audio"])
def test_one_encoder_only(seeing: Path, tmp_path: Path, kept: str) -> None:
    """From the checkpoint and from a file with both: the same."""
    wanted = {"vision": kept == "vision", "audio": kept == "audio"}
    (direct,) = gguf3n.convert(seeing, mmproj="F16", output=tmp_path / "direct.gguf", **wanted)
    file = gguf3n.open_gguf(direct.path)
    prefixes = {"vision": ("v.", "mm."), "audio": ("a.", "mm.a.")}[kept]
    assert all(name.startswith(prefixes) for name in file.tensors)
    assert not any(name.startswith("mm.a.") is (kept == "vision") for name in file.tensors if name.startswith("mm."))
    clip = [name for name in file.keys if name.startswith("clip.")]
    assert all(name == f"clip.has_{kept}_encoder" or name.startswith(f"clip.{kept}.") for name in clip)
    other = "audio" if kept == "vision" else "vision"
    assert any(f"(--no-{other})" in notice for notice in direct.plan.notices)
    (whole,) = gguf3n.convert(seeing, mmproj="lossless", output=tmp_path / "whole.gguf")
    again = gguf3n.convert(gguf3n.read_gguf(whole.path), mmproj="F16", output=tmp_path / "again.gguf", **wanted)
    size = {"general.size_label", "general.name"}  # of both encoders there
    assert _facts(again[0].path, size) == _facts(direct.path, size)


def _facts(path: Path, without: set[str]) -> dict[str, Any]:
    from workshop.comparison import describe

    return {name: fact for name, fact in describe(path).items() if not any(key in name for key in without)}


@pytest.mark.parametrize("full", ["lossless", "F32"])
def test_quantized_from_a_file_as_from_the_checkpoint(seeing: Path, tmp_path: Path, full: str) -> None:
    gguf3n.convert(seeing, output=tmp_path, mmproj=["F16", "Q8_0", full])
    source = gguf3n.read_gguf(tmp_path / f"mmproj-{seeing.name}-{full}.gguf")
    for each in gguf3n.convert(source, output=tmp_path / "again", mmproj=["F16", "Q8_0"]):
        assert each.path.read_bytes() == (tmp_path / each.path.name).read_bytes()


def test_llama_cpps_text_file_is_the_same_with_encoders_in_the_checkpoint(
    make_checkpoint: Callable[..., Path], seeing: Path, tmp_path: Path
) -> None:
    files = []
    for number, source in enumerate((make_checkpoint(), seeing)):
        named = tmp_path / str(number) / "named"
        named.parent.mkdir()
        named.symlink_to(source, target_is_directory=True)
        (written,) = gguf3n.convert(named, "Q8_0@llama.cpp", tmp_path / str(number) / "out.gguf")
        files.append(written.path.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("sources", ["preprocessor", "processor", "both"])
def test_the_processor_says_how_large_images_are(seeing: Path, tmp_path: Path, sources: str) -> None:
    """And what processor_config.json says of it counts more."""
    copy = changed(seeing, tmp_path)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (copy / name).unlink()
    if sources != "processor":
        micro.write_json(copy / "preprocessor_config.json", {"size": {"height": 512, "width": 512}, "image_mean": [9]})
    if sources != "preprocessor":
        inner = {"image_processor": {"size": {"height": 1024, "width": 1024}}, "image_seq_length": 256}
        micro.write_json(copy / "processor_config.json", inner)
    keys = {key.name: key.value for key in mmproj_part(gguf3n.read_source(copy)).keys}
    size = 512 if sources == "preprocessor" else 1024
    assert (keys["clip.vision.image_size"], keys["clip.vision.patch_size"]) == (size, size // 256)
    assert keys["clip.vision.image_mean"] == [0.0, 0.0, 0.0]


# what is refused


def changed(source: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint whose small files may be changed."""
    copy = tmp_path / "changed"
    copy.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            (copy / path.name).symlink_to(path)
        else:
            shutil.copy(path, copy / path.name)
    return copy


def with_tensors(source: Path, change: Callable[[dict[str, SourceTensor]], None]) -> Checkpoint:
    """The checkpoint with other tensors."""
    opened = gguf3n.read_source(source)
    assert isinstance(opened, Checkpoint)
    tensors = dict(opened.tensors)
    change(tensors)
    return replace(opened, tensors=tensors)


def reshaped(tensors: dict[str, SourceTensor], end: str, shape: tuple[int, ...]) -> None:
    (name,) = (name for name in tensors if name.endswith(end))
    (rows,) = tensors[name].rows
    assert isinstance(rows, Stored)
    tensors[name] = SourceTensor(name, shape, (replace(rows, shape=shape),))


def dropped(*parts: str) -> Callable[[dict[str, SourceTensor]], None]:
    def drop(tensors: dict[str, SourceTensor]) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return drop


def renamed(old: str, new: str) -> Callable[[dict[str, SourceTensor]], None]:
    def rename(tensors: dict[str, SourceTensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = replace(tensors.pop(name), name=name.replace(old, new))

    return rename


def resized(end: str, *shape: int) -> Callable[[dict[str, SourceTensor]], None]:
    return lambda tensors: reshaped(tensors, end, shape)


FAULTS: Mapping[str, tuple[Callable[[dict[str, SourceTensor]], None], str]] = {
    "no towers": (
        dropped("vision", "audio"),
        "no vision or audio tensors: a model of text only.*\n.*\n.*leave --mmproj out",
    ),
    "no audio": (dropped("audio_tower", "embed_audio"), "no audio tensors.*\n.*\n.*--no-audio"),
    "an embedder without its tower": (
        dropped("vision_tower"),
        r"no vision tensors vision_tower\.\*.*\n.*\n.*--no-vision",
    ),
    "a tower without its embedder": (dropped("embed_audio"), r"no audio tensors embed_audio\.\*"),
    "a block in the middle": (dropped("blocks.2.1."), "block 2.1 of the vision tower is missing"),
    "a stage": (dropped("blocks.1."), "block 1.0 of the vision tower is missing"),
    "the tower's end": (
        dropped("msfa.ffn.pw_proj.conv"),
        "tensor 'vision_tower.timm_model.msfa.ffn.pw_proj.conv.weight' is missing",
    ),
    "a norm": (dropped("blocks.2.1.dw_start.bn"), "blocks.2.1.dw_start.bn.weight' is missing"),
    "a conformer": (
        dropped("conformer.1.norm"),
        r"conformer.1.norm.weight' is missing\n.*in a vision tower of \d+ blocks and an audio encoder of 2 layers",
    ),
    "a conformer's shape": (resized("conformer.1.norm.weight", 9), r"has the wrong shape\n.*a Gemma 3n of this config"),
    "half an embedder": (dropped("embed_vision.soft"), "embed_vision.soft_embedding_norm.weight' is missing"),
    "another tower": (renamed("timm_model.blocks", "vision_model.encoder.layers"), "the vision tower of another model"),
    "another block": (renamed("0.0.conv_exp", "0.0.conv"), "block 0.0 of the vision tower is none of MobileNet-V5's"),
    "an even kernel": (resized("blocks.0.0.conv_exp.weight", 32, 8, 4, 2), "has an even kernel"),
    "a kernel that is not square": (resized("1.1.dw_start.conv.weight", 32, 1, 1, 5), "has the wrong shape"),
    "a matrix for a kernel": (resized("1.1.pw_exp.conv.weight", 128, 32), "is no convolution"),
    "a block too wide": (
        resized("0.1.conv_exp.weight", 32, 32, 3, 3),
        r"blocks 0\.0 and 0\.1 of the vision tower do not fit.*\n.*\n.*16 output channels of 0\.0, 32 input",
    ),
    "a vector too long": (resized("conv_stem.bn.weight", 9), "conv_stem.bn.weight' has the wrong shape"),
    "a projection of other width": (
        resized("embed_vision.embedding_projection.weight", 128, 256),
        "has the wrong shape",
    ),
    "an unknown tensor": (renamed("msfa.norm", "msfa.norms"), "1 tensor.s. that no rule knows"),
    "one tensor twice": (
        lambda tensors: tensors.update({"vision_tower.timm_model.msfa.norm.weight": _any(tensors)}),
        "are the same weight",
    ),
}


def _any(tensors: Mapping[str, SourceTensor]) -> SourceTensor:
    return tensors["model.vision_tower.timm_model.msfa.norm.weight"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_encoders(seeing: Path, fault: str) -> None:
    change, said = FAULTS[fault]
    with pytest.raises(SourceError, match=said) as error:
        mmproj_part(with_tensors(seeing, change))
    assert error.value.expected and error.value.fix


def test_a_block_that_the_published_tower_lacks() -> None:
    with pytest.raises(MappingError, match=r"blocks\.3\.38\.layer_scale\.gamma' is missing"):
        mmproj_part(published("e2b", without="blocks.3.38."))


CONFIGS: Mapping[str, tuple[Callable[[dict[str, Any]], object], type[Gguf3nError], str]] = {
    "no vision_config": (lambda raw: raw.pop("vision_config"), SourceError, "no vision_config: a model of text only"),
    "no audio_config": (lambda raw: raw.pop("audio_config"), SourceError, "no audio_config"),
    "siglip": (
        lambda raw: raw["vision_config"].update(model_type="siglip_vision_model"),
        ConfigError,
        "vision_config is of another model",
    ),
    "another net": (
        lambda raw: raw["vision_config"].update(hidden_size=2048, architecture="mobilenetv4"),
        ConfigError,
        "another vision tower",
    ),
    "another net of a small width": (
        lambda raw: raw["vision_config"].update(architecture="mobilenetv4"),
        ConfigError,
        "another vision tower.*\n.*\n.*mobilenetv4",
    ),
    "a net of no name": (
        lambda raw: raw["vision_config"].update(architecture=["x"]),
        ConfigError,
        "another vision tower.*\n.*\n.*x",
    ),
    "a list": (lambda raw: raw.update(vision_config=[]), ConfigError, "vision_config is not an object"),
    "no width": (lambda raw: raw["vision_config"].update(hidden_size=0), ConfigError, "hidden_size is impossible"),
    "a yes for a width": (lambda raw: raw["audio_config"].update(hidden_size=True), ConfigError, "is impossible"),
    "a huge audio": (
        lambda raw: raw["audio_config"].update(conf_num_hidden_layers=10**6),
        ConfigError,
        "too many conformer layers",
    ),
    "one convolution": (
        lambda raw: raw["audio_config"].update(sscp_conv_channel_size=[128]),
        ConfigError,
        "sscp_conv_channel_size is impossible",
    ),
    "kernels of text": (
        lambda raw: raw["audio_config"].update(sscp_conv_kernel_size=["33", "33"]),
        ConfigError,
        "sscp_conv_kernel_size is impossible",
    ),
    "another width": (lambda raw: raw["vision_config"].update(hidden_size=512), MappingError, "is of another width"),
    "more rows": (lambda raw: raw["vision_config"].update(vocab_size=99), MappingError, "has the wrong shape"),
    "a key that is too large": (
        lambda raw: raw["vision_config"].update(intermediate_size=1 << 30),
        ConfigError,
        "intermediate_size is impossible",
    ),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_faulty_configs(seeing: Path, tmp_path: Path, fault: str) -> None:
    change, error, said = CONFIGS[fault]
    copy = changed(seeing, tmp_path)
    raw = micro.read_json(copy / "config.json")
    change(raw)
    micro.write_json(copy / "config.json", raw)
    with pytest.raises(error, match=said):
        mmproj_part(gguf3n.read_source(copy))


PROCESSORS = {
    "no multiple of 256": {"size": {"height": 700, "width": 700}},
    "larger than llama.cpp takes": {"size": {"height": 1 << 20, "width": 1 << 20}},
    "not square": {"size": {"height": 768, "width": 512}},
    "a number": {"size": 768},
    "the shortest edge": {"size": {"shortest_edge": 768}},
    "a fraction": {"size": {"height": 0.5}},
    "another number of tokens": {"image_seq_length": 64},
    "no tokens": {"image_seq_length": 0},
}


@pytest.mark.parametrize("fault", PROCESSORS)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_faulty_processors(seeing: Path, tmp_path: Path, name: str, fault: str) -> None:
    copy = changed(seeing, tmp_path)
    (copy / "processor_config.json").unlink()
    micro.write_json(copy / name, PROCESSORS[fault])
    with pytest.raises(ConfigError, match=f"changed/{name}"):
        mmproj_part(gguf3n.read_source(copy))


@pytest.mark.parametrize("height", [0, 256.0])
def test_an_impossible_height(seeing: Path, tmp_path: Path, height: float) -> None:
    copy = changed(seeing, tmp_path)
    (copy / "processor_config.json").unlink()
    micro.write_json(copy / "preprocessor_config.json", {"size": {"height": height}})
    with pytest.raises(ConfigError, match=r"size\.height is impossible"):
        mmproj_part(gguf3n.read_source(copy))


def test_a_processor_that_is_too_large(seeing: Path, tmp_path: Path) -> None:
    copy = changed(seeing, tmp_path)
    (copy / "processor_config.json").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(ConfigError, match="too large"):
        mmproj_part(gguf3n.read_source(copy))


def test_a_checkpoint_of_text_only(make_checkpoint: Callable[..., Path], tiny_checkpoint: Path) -> None:
    with pytest.raises(SourceError, match="no vision_config: a model of text only has no mmproj file"):
        mmproj_part(gguf3n.read_source(make_checkpoint(layout="text-only")))
    with pytest.raises(SourceError, match="no vision or audio tensors: a model of text only"):
        mmproj_part(gguf3n.read_source(tiny_checkpoint))


@pytest.mark.parametrize("wanted", [("vision",), ("vision", "audio"), ("audio",)])
def test_what_llama_cpp_makes_of_the_audio_encoder(seeing: Path, wanted: tuple[str, ...]) -> None:
    notices = mmproj_part(gguf3n.read_source(seeing), vision="vision" in wanted, audio="audio" in wanted).notices
    assert any("does not run Gemma 3n's audio encoder" in each for each in notices) == (len(wanted) == 2)


def test_what_the_same_run_writes_is_not_said_to_be_left_out(seeing: Path) -> None:
    def said(**options: Any) -> set[str]:
        plans = plan_files(gguf3n.read_source(seeing), gguf3n.parse_options("Q8_0", **options))
        of_text = [notice for notice in plans[0].notices if "(--mmproj)" in notice]
        return {notice.partition("tensors: ")[2].partition(":")[0] for notice in of_text}

    everything = {"vision", "vision embedder", "audio", "audio embedder"}
    assert said() == everything
    assert said(mmproj="F16") == set()
    assert said(mmproj="F16", audio=False) == {"audio", "audio embedder"}


@pytest.mark.parametrize(
    ("end", "types"), [("msfa.ffn.pw_proj.conv.weight", "F32"), ("1.1.dw_start.conv.weight", "BF16")]
)
def test_what_to_do_about_an_overflow(seeing: Path, end: str, types: str) -> None:
    """A type that is then refused helps nobody."""
    plan = gguf3n.plan(seeing, find_recipe("F16", For.MMPROJ))
    (planned,) = (tensor for tensor in plan.tensors if tensor.slot.name.endswith(end))
    assert planned.wider == f"use {types} for this tensor, as --mmproj lossless does"
    rule = f"{planned.slot.name}={types}"
    gguf3n.plan(seeing, find_recipe("F16", For.MMPROJ), tensor_types=[rule])


def test_each_file_where_the_other_is_wanted(seeing: Path, tmp_path: Path) -> None:
    text, encoders = (each.path for each in gguf3n.convert(seeing, "BF16", tmp_path, mmproj="F16"))
    wrong: tuple[tuple[Path, Callable[[gguf3n.Source], Part], str], ...] = (
        (encoders, text_part, "the vision and audio encoders, not the text model"),
        (text, mmproj_part, "the text model"),
    )
    for path, part, said in wrong:
        with pytest.raises(SourceError, match=said) as error:
            part(gguf3n.read_gguf(path))
        assert error.value.fix and "--" in error.value.fix


def test_files_of_other_encoders(seeing: Path, tmp_path: Path) -> None:
    (written,) = gguf3n.convert(seeing, mmproj="F16", output=tmp_path / "mmproj.gguf", audio=False)
    with pytest.raises(SourceError, match="no audio encoder") as error:
        mmproj_part(gguf3n.read_gguf(written.path), vision=False)
    assert error.value.expected and error.value.fix
    change_tensor(written.path, "v.conv_stem.bn.weight", shape=(4, 2))
    with pytest.raises(MappingError, match="has the wrong shape"):
        mmproj_part(gguf3n.read_gguf(written.path))
    change_tensor(written.path, "v.conv_stem.bn.weight", shape=(8,))
    drop_tensors(written.path, "v.msfa.norm.weight")
    with pytest.raises(MappingError, match=r"'v\.msfa\.norm\.weight' is missing.*\n.*\n.*to do"):
        mmproj_part(gguf3n.read_gguf(written.path))
    set_key(written.path, "clip.vision.projector_type", VT.STRING, "gemma3")
    with pytest.raises(SourceError, match="the encoders of another model"):
        mmproj_part(gguf3n.read_gguf(written.path))


def test_keys_in_another_order(seeing: Path, tmp_path: Path) -> None:
    """Of files that others wrote: none is lost."""
    (written,) = gguf3n.convert(seeing, mmproj="F16", output=tmp_path / "mmproj.gguf", audio=False)
    with drafted(written.path) as draft:
        draft.packed.append(draft.packed.pop(1))
    (again,) = gguf3n.convert(gguf3n.read_gguf(written.path), mmproj="F16", output=tmp_path / "again.gguf")
    before, after = gguf3n.open_gguf(written.path), gguf3n.open_gguf(again.path)
    assert before.all_keys[-1].name == "general.type" and len(after.all_keys) == len(before.all_keys)
    assert set(after.keys) == set(before.keys)


def test_a_vector_of_an_older_converter_becomes_a_map(seeing: Path, tmp_path: Path) -> None:
    (sound,) = gguf3n.convert(seeing, mmproj="F16", output=tmp_path / "sound.gguf")
    broken = Path(shutil.copy(sound.path, tmp_path / "broken.gguf"))
    name = "v.blk.1.1.layer_scale.gamma"
    change_tensor(broken, name, shape=(32,))
    assert gguf3n.open_gguf(broken).tensors[name].shape == (32,)
    (mended,) = gguf3n.convert(gguf3n.read_gguf(broken), mmproj="F16", output=tmp_path / "mended.gguf")
    assert mended.path.read_bytes() == sound.path.read_bytes()


def test_options_that_go_nowhere(seeing: Path) -> None:
    for options, said in (
        ({"mmproj": "F16", "vision": False, "audio": False}, "neither vision nor audio"),
        ({"quants": "Q8_0", "audio": False}, "--no-audio is for a file that is not wanted"),
        ({"quants": "Q8_0", "force_types": True}, "--force-types is for a file"),
        ({"mmproj": "F16", "ple": "Q8_0"}, "--ple is for a file that is not wanted"),
        ({"quants": "Q8_0", "tensor_types": ["v.msfa.*=F16"]}, "is for a file that is not wanted"),
        ({"mmproj": "Q4_K_M"}, "unknown quantization 'Q4_K_M' of the mmproj file(.*\n)*.*with --quant"),
        ({"quants": "lossless"}, "unknown quantization 'lossless'(.*\n)*.*for the mmproj file: give it with --mmproj"),
        ({"mmproj": "F17"}, "did you mean F16.*`gguf3n recipes list --mmproj`"),
        ({"quants": find_recipe("F16", For.MMPROJ)}, "a recipe for the mmproj file"),
        ({"mmproj": ["F16", "f16"]}, "twice"),
        ({}, "--mmproj NAME"),
    ):
        with pytest.raises(UsageError, match=said):
            gguf3n.convert(seeing, output="/nowhere", **options)  # type: ignore[arg-type]


def test_a_recipe_of_ones_own(seeing: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    text = 'for = "mmproj"\ninherit = "F16"\n[[rule]]\ntensor = "mm.*"\ntype = "Q4_K"\nreason = "why not"\n'
    own.write_text(text)
    plan = gguf3n.plan(seeing, find_recipe(str(own), For.MMPROJ), audio=False)
    assert {tensor.slot.name for tensor in plan.tensors if tensor.slot.qtype is QType.Q4_K} == {
        "mm.embedding.weight",
        "mm.input_projection.weight",
    }
    assert plan.part.file_name(plan.recipe.name) == f"mmproj-{seeing.name}-own.gguf"
    for wrong, said in (
        (text.replace('for = "mmproj"\n', ""), "a recipe for the text file"),
        (text + "[variant.x]\nkeep = 'f16'\n", None),
        ('ple = "Q8_0"\n' + text, "ple in a recipe for the mmproj file"),
    ):
        own.write_text(wrong)
        if said is None:
            find_recipe(str(own), For.MMPROJ)
            continue
        with pytest.raises(UsageError, match=said):
            find_recipe(str(own), For.MMPROJ)
    own.write_text(text)
    with pytest.raises(UsageError, match="a recipe for the mmproj file"):
        find_recipe(str(own))
