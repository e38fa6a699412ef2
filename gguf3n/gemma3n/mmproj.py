"""The mmproj file of Gemma 3n: vision and audio encoders, which llama.cpp loads beside the text model.

`vision_rules` and `AUDIO_RULES` list every tensor that is written, `KEYS` every key of its own, in the order of
llama.cpp's converter; `dropped` says what of a checkpoint belongs in the text file. A source name that nothing here
knows is an error. `RUNS` is the table of types that llama.cpp can run.

Source: Gemma3nVisionAudioModel in conversion/gemma.py of llama.cpp; tools/mtmd/clip.cpp and models/mobilenetv5.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from gguf.constants import Keys

from gguf3n.errors import MappingError, SourceError
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType, Value
from gguf3n.formats.rows import SourceTensor
from gguf3n.gemma3n import text
from gguf3n.gemma3n.encoders import Audio, Encoders, Vision
from gguf3n.gemma3n.mapping import TOGETHER, Rule, Storage, Table
from gguf3n.gemma3n.names import bare_name
from gguf3n.gemma3n.tower import Shape, Tower, read_tower

ARCH = "clip"
FILE_KIND = "mmproj"
"""general.type."""
VISION_PROJECTOR, AUDIO_PROJECTOR = "gemma3nv", "gemma3na"

IMAGE_SIZE = "clip.vision.image_size"

TOWER = "vision_tower.timm_model."
"""What stands before a name of the vision tower."""
VISION_NAMES, AUDIO_NAMES = ("vision_tower.", "embed_vision."), ("audio_tower.", "embed_audio.")

INPUT_PROJECTION = "mm.input_projection.weight"

Q, N, A = Storage.QUANTIZABLE, Storage.NORM, Storage.AUDIO_CONVOLUTION
C, D = Storage.CONVOLUTION, Storage.DEPTHWISE

RUNS: Mapping[Storage, tuple[tuple[QType, ...], str]] = {
    Storage.CONVOLUTION: (
        (QType.F16, QType.F32),
        "llama.cpp loads another kernel and aborts at the first image: ggml_conv_2d takes F16 and F32 only",
    ),
    Storage.DEPTHWISE: (
        (QType.F16, QType.BF16),
        "llama.cpp aborts while it loads: its depthwise convolution rounds the image to F16 unless the kernel is BF16, "
        "and multiplies no other kernel by that",
    ),
}
"""The types that llama.cpp runs, and what it does with others. # measured: tests/gemma3n/test_mmproj_llama_cpp.py
Source: ggml_conv_2d_dw in ggml/src/ggml.c, ggml_call_mul_mat in ggml-cpu/ops.cpp."""


def embedder_rules(source: str, target: str, width: str) -> tuple[Rule, ...]:
    """What puts an encoder's output, or its own tokens, into the text model's space."""
    return (
        Rule(f"{source}.embedding.weight", f"{target}.embedding.weight", (f"{width}_vocab", width), Q),
        Rule(f"{source}.hard_embedding_norm.weight", f"{target}.hard_emb_norm.weight", (width,), N),
        Rule(f"{source}.soft_embedding_norm.weight", f"{target}.soft_emb_norm.weight", (width,), N),
        Rule(f"{source}.embedding_projection.weight", f"{target}.input_projection.weight", ("text", width), Q),
    )


LAYER = "audio_tower.conformer.{bid}."


def _layer(source: str, target: str, shape: tuple[str, ...], storage: Storage) -> Rule:
    return Rule(LAYER + source, "a.blk.{bid}." + target, shape, storage)


AUDIO_RULES: tuple[Rule, ...] = (
    *embedder_rules("embed_audio", "mm.a", "audio"),
    *(
        Rule(f"audio_tower.subsample_conv_projection.conv_{i}.{source}.weight", f"a.conv1d.{i}.{target}", shape, kind)
        for i in (0, 1)
        for source, target, shape, kind in (
            ("conv", "weight", (f"channels_{i}", f"inputs_{i}", f"rows_{i}", f"columns_{i}"), A),
            ("norm", "norm.weight", (f"channels_{i}",), N),
        )
    ),
    Rule(
        "audio_tower.subsample_conv_projection.input_proj_linear.weight",
        "a.pre_encode.out.weight",
        ("audio", "subsampled"),
        Q,
    ),
    _layer("attention.attn.k_proj.weight", "attn_k.weight", ("audio", "audio"), Q),
    _layer("attention.attn.per_dim_scale", "per_dim_scale", ("head",), N),
    _layer("attention.attn.q_proj.weight", "attn_q.weight", ("audio", "audio"), Q),
    _layer("attention.attn.relative_position_embedding.pos_proj.weight", "linear_pos.weight", ("audio", "audio"), Q),
    _layer("attention.attn.v_proj.weight", "attn_v.weight", ("audio", "audio"), Q),
    _layer("attention.post.weight", "attn_out.weight", ("audio", "audio"), Q),
    _layer("attention.post_norm.weight", "ln2.weight", ("audio",), N),
    _layer("attention.pre_attn_norm.weight", "ln1.weight", ("audio",), N),
    _layer("ffw_layer_end.ffw_layer_1.weight", "ffn_up_1.weight", ("ffn", "audio"), Q),
    _layer("ffw_layer_end.ffw_layer_2.weight", "ffn_down_1.weight", ("audio", "ffn"), Q),
    _layer("ffw_layer_end.post_layer_norm.weight", "ffn_post_norm_1.weight", ("audio",), N),
    _layer("ffw_layer_end.pre_layer_norm.weight", "ffn_norm_1.weight", ("audio",), N),
    _layer("ffw_layer_start.ffw_layer_1.weight", "ffn_up.weight", ("ffn", "audio"), Q),
    _layer("ffw_layer_start.ffw_layer_2.weight", "ffn_down.weight", ("audio", "ffn"), Q),
    _layer("ffw_layer_start.post_layer_norm.weight", "ffn_post_norm.weight", ("audio",), N),
    _layer("ffw_layer_start.pre_layer_norm.weight", "ffn_norm.weight", ("audio",), N),
    # ggml quirk: the names of these two norms are swapped in llama.cpp's table
    _layer("lconv1d.conv_norm.weight", "norm_conv.weight", ("audio",), N),
    _layer("lconv1d.depthwise_conv1d.weight", "conv_dw.weight", ("audio", "1", "kernel"), A),
    _layer("lconv1d.linear_end.weight", "conv_pw2.weight", ("audio", "audio"), Q),
    _layer("lconv1d.linear_start.weight", "conv_pw1.weight", ("twice", "audio"), Q),
    _layer("lconv1d.pre_layer_norm.weight", "conv_norm.weight", ("audio",), N),
    _layer("norm.weight", "layer_pre_norm.weight", ("audio",), N),
)
"""`{bid}`: a layer of the conformer."""

MAPS = ("conv_stem.conv.bias", "layer_scale.gamma")
"""Ends of names of vectors [C] that are written as maps [1, C, 1, 1], to be broadcast over an image."""


def vision_rules(tower: Tower) -> tuple[Rule, ...]:
    """A rule for each tensor of a vision tower, with its shape in numbers, and those of its embedder."""
    rules = []
    for name, shape in tower.tensors.items():
        words = tuple(map(str, shape))
        written = ("1", *words, "1", "1") if name.endswith(MAPS) else ()
        rules.append(Rule(TOWER + name, target_name(name), words, tower_storage(name, shape), written=written))
    return (*rules, *embedder_rules("embed_vision", "mm", "vision"))


def target_name(name: str) -> str:
    """The GGUF name of a tensor of the vision tower."""
    return "v." + re.sub(r"^blocks\.", "blk.", name)


def tower_storage(name: str, shape: Shape) -> Storage:
    """What a recipe may do with a tensor of the vision tower."""
    if len(shape) < 4 or name.endswith(MAPS):
        return N
    if name.startswith("conv_stem."):
        return Storage.STEM
    return D if shape[1] == 1 and shape[2] > 1 else C


def sizes(encoders: Encoders, bid: int | None) -> dict[str, int]:
    """The words that shapes in the rules are made of; the same in every layer."""
    words = {"text": encoders.text_width}
    if (vision := encoders.vision) is not None:
        words |= {"vision": vision.hidden_size, "vision_vocab": vision.vocab_size}
    if (audio := encoders.audio) is not None:
        width = audio.hidden_size
        words |= {
            "audio": width,
            "audio_vocab": audio.vocab_size,
            "twice": 2 * width,
            "ffn": 4 * width,
            "head": width // audio.conf_num_attention_heads,
            "kernel": audio.conf_conv_kernel_size,
            "subsampled": audio.subsampled_width,
            "inputs_0": 1,
            "inputs_1": audio.sscp_conv_channel_size[0],
        }
        for i in (0, 1):
            rows, columns = audio.sscp_conv_kernel_size[i]
            words |= {f"channels_{i}": audio.sscp_conv_channel_size[i], f"rows_{i}": rows, f"columns_{i}": columns}
    return words


def written_order(tower: Tower | None, n_audio_layers: int | None) -> tuple[tuple[Rule, int | None], ...]:
    """Every tensor's rule and layer, in the order of the file: by the names in the checkpoint, as llama.cpp's converter
    has it for one of a single file.

    Args:
        tower: of the vision encoder, if there is one.
        n_audio_layers: of the audio encoder, if there is one.
    """
    order: list[tuple[Rule, int | None]] = [] if tower is None else [(rule, None) for rule in vision_rules(tower)]
    if n_audio_layers is not None:
        for rule in AUDIO_RULES:
            order += [(rule, bid) for bid in (range(n_audio_layers) if rule.is_repeated else (None,))]
    return tuple(sorted(order, key=lambda entry: entry[0].source.format(bid=entry[1])))


def encoder_of(name: str) -> str:
    """Which encoder a tensor of a GGUF file belongs to: "vision" or "audio"."""
    return "audio" if name.startswith(("a.", "mm.a.")) else "vision"


def order_of_names(shapes: Mapping[str, Shape], origin: str) -> tuple[tuple[Rule, int | None], ...]:
    """The same of a GGUF file, as far as its tensors' names and shapes tell.

    Raises: MappingError for another tower.
    """
    vision = {name: shape for name, shape in shapes.items() if encoder_of(name) == "vision"}
    tower = {name.removeprefix("v."): shape for name, shape in vision.items()}
    layers = [int(match[1]) for name in shapes if (match := re.match(r"a\.blk\.(\d{1,3})\.", name))]
    has_audio = len(vision) < len(shapes)
    return written_order(
        read_tower(tower, origin) if vision else None, max(layers, default=-1) + 1 if has_audio else None
    )


def shape_from_gguf(rule: Rule, tensor: SourceTensor) -> Shape:
    """The shape that a tensor of a GGUF file is to have: a vector that its converter left one becomes a map.

    Raises: MappingError for another shape than the vision tower's.
    """
    shapes = known_shapes(rule)
    if not shapes:
        return tensor.shape
    if tensor.shape not in shapes:
        expected = str(list(shapes[0]))
        raise MappingError(f"{tensor.origin} has the wrong shape", expected=expected, found=str(list(tensor.shape)))
    return shapes[0]


def known_shapes(rule: Rule) -> tuple[Shape, ...]:
    """The shape that is written and the checkpoint's, of a tensor of the vision tower; none of others."""
    if not all(word.isdecimal() for word in rule.shape):
        return ()
    return tuple(tuple(map(int, words)) for words in (rule.written or rule.shape, rule.shape))


def _text_names() -> str:
    """A pattern of all names that belong to the text model."""
    names = (re.escape(rule.source).replace(r"\{bid\}", r"\d+").replace(r"\{k\}", r"\d+") for rule in text.RULES)
    others = (pattern for pattern, _ in text.DROPPED if not pattern.startswith(tuple(map(re.escape, ENCODER_NAMES))))
    return "|".join((*names, *others))


ENCODER_NAMES = (*VISION_NAMES, *AUDIO_NAMES)
TEXT_REASON = "text: belongs in the text model's file"


def dropped(encoders: Encoders) -> tuple[tuple[str, str], ...]:
    """Patterns of names that are known and left out, each with the reason."""
    left_out = [(_text_names(), TEXT_REASON)]
    for encoder, names, what in ((encoders.vision, VISION_NAMES, "vision"), (encoders.audio, AUDIO_NAMES, "audio")):
        if encoder is None:
            pattern = f"(?:{'|'.join(map(re.escape, names))}).+"
            left_out.append((pattern, f"{what}: not wanted (--no-{what})"))
    return tuple(left_out)


def table(encoders: Encoders, source: Mapping[str, SourceTensor], origin: str) -> Table:
    """What the mapping needs to know of the encoders of some size.

    Args:
        source: the checkpoint's tensors, whose shapes say which vision tower it is.

    Raises: SourceError for a checkpoint without their tensors; MappingError for another tower.
    """
    found = {bare_name(name): tensor.shape for name, tensor in source.items()}
    tower = None
    if encoders.vision is not None:
        _check_there(found, VISION_NAMES, "vision", origin)
        tower = read_tower(_tower_shapes(found, origin), origin)
        if tower.n_out != encoders.vision.hidden_size:
            raise MappingError(
                f"{origin}: the vision tower is of another width",
                expected=f"{encoders.vision.hidden_size}, as config.json says",
                found=str(tower.n_out),
                fix=TOGETHER,
            )
    if encoders.audio is not None:
        _check_there(found, AUDIO_NAMES, "audio", origin)
    return table_of(encoders, tower)


def table_of(encoders: Encoders, tower: Tower | None) -> Table:
    """The same for a tower that is known."""
    n_layers = encoders.audio.conf_num_hidden_layers if encoders.audio is not None else None
    return Table(
        model="the encoders of a Gemma 3n" if tower is None else f"a vision tower of {tower.n_blocks} blocks",
        order=written_order(tower if encoders.vision is not None else None, n_layers),
        dropped=dropped(encoders),
        n_stacked=0,
        sizes=lambda bid: sizes(encoders, bid),
        evaluated=lambda rule, bid: True,
        least_rows=0,
        said_by="config.json and MobileNet-V5 have it",
    )


def _check_there(names: Collection[str], prefixes: tuple[str, ...], what: str, origin: str) -> None:
    if not any(name.startswith(prefixes) for name in names):
        raise SourceError(
            f"{origin}: no {what} tensors",
            expected=f"those of {prefixes[0]}*, which config.json describes",
            fix=f"leave them out with --no-{what}, or convert the checkpoint that this one was tuned from",
        )


def _tower_shapes(found: Mapping[str, Shape], origin: str) -> dict[str, Shape]:
    """Shapes by names within the vision tower. Raises: MappingError for another tower."""
    other = [name for name in found if name.startswith(VISION_NAMES[0]) and not name.startswith(TOWER)]
    if other:
        raise MappingError(
            f"{origin}: the vision tower of another model",
            expected=f"MobileNet-V5, as {TOWER}*",
            found=min(other),
            fix="only Gemma 3n's encoders can be converted",
        )
    return {name.removeprefix(TOWER): shape for name, shape in found.items() if name.startswith(TOWER)}


def concerns(encoders: Encoders) -> list[str]:
    """Why llama.cpp would not run these encoders right, one sentence each; empty for every published size."""
    found = []
    if (vision := encoders.vision) is not None and vision.hidden_size != encoders.text_width:
        found.append(
            "llama.cpp takes a vision encoder as wide as the text model; this one has "
            f"{vision.hidden_size} for {encoders.text_width}, and is refused beside its text model"
        )
    if encoders.audio is not None:
        found.append(
            "llama.cpp does not run Gemma 3n's audio encoder yet, though it says that it can hear where one is there; "
            "--no-audio leaves it out"
        )
    return found


U32, F32, BOOL, STRING, ARRAY = (
    GGUFValueType.UINT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.BOOL,
    GGUFValueType.STRING,
    GGUFValueType.ARRAY,
)


@dataclass(frozen=True)
class VisionKey:
    """One row of the table of keys: for files with a vision encoder. `type` is of the elements, for an array."""

    name: str
    type: GGUFValueType
    value: Callable[[Vision, int], Value]
    is_array: bool = False


@dataclass(frozen=True)
class AudioKey:
    """The same for files with an audio encoder. The second argument is the text model's width."""

    name: str
    type: GGUFValueType
    value: Callable[[Audio, int], Value]


BLOCK_COUNT = 128
"""ggml quirk: the converter's number, which nobody reads: blocks are counted by their tensors."""

KEYS: tuple[VisionKey | AudioKey, ...] = (
    VisionKey(Keys.Clip.HAS_VISION_ENCODER, BOOL, lambda v, _: True),
    VisionKey("clip.vision.projection_dim", U32, lambda _, text_width: text_width),
    VisionKey("clip.vision.image_size", U32, lambda v, _: v.image_size),
    VisionKey("clip.vision.patch_size", U32, lambda v, _: v.patch_size),
    VisionKey("clip.vision.embedding_length", U32, lambda v, _: v.hidden_size),
    VisionKey("clip.vision.feed_forward_length", U32, lambda v, _: v.feed_forward_length),
    VisionKey("clip.vision.block_count", U32, lambda v, _: BLOCK_COUNT),
    VisionKey("clip.vision.attention.head_count", U32, lambda v, _: v.num_attention_heads),
    # Why: the tower takes colours from 0 to 1 as they are, whatever the processor's file says of mean and deviation
    VisionKey("clip.vision.image_mean", F32, lambda v, _: [0.0, 0.0, 0.0], is_array=True),
    VisionKey("clip.vision.image_std", F32, lambda v, _: [1.0, 1.0, 1.0], is_array=True),
    AudioKey(Keys.Clip.HAS_AUDIO_ENCODER, BOOL, lambda a, _: True),
    AudioKey("clip.audio.projection_dim", U32, lambda _, text_width: text_width),
    AudioKey("clip.audio.embedding_length", U32, lambda a, _: a.hidden_size),
    AudioKey("clip.audio.feed_forward_length", U32, lambda a, _: a.feed_forward_length),
    AudioKey("clip.audio.block_count", U32, lambda a, _: a.conf_num_hidden_layers),
    AudioKey("clip.audio.attention.head_count", U32, lambda a, _: a.conf_num_attention_heads),
    # Why not clip.projector_type: it would count for both encoders
    VisionKey("clip.vision.projector_type", STRING, lambda v, _: VISION_PROJECTOR),
    VisionKey("clip.vision.attention.layer_norm_epsilon", F32, lambda v, _: v.layer_norm_eps),
    AudioKey("clip.audio.projector_type", STRING, lambda a, _: AUDIO_PROJECTOR),
    AudioKey("clip.audio.num_mel_bins", U32, lambda a, _: a.input_feat_size),
    AudioKey("clip.audio.attention.layer_norm_epsilon", F32, lambda a, _: 1e-5),
)
"""The clip.* keys. Source: set_gguf_parameters of Gemma3nVisionAudioModel and its bases."""


def model_keys(encoders: Encoders) -> list[KeyValue]:
    """The clip.* keys."""
    keys = []
    for key in KEYS:
        if isinstance(key, AudioKey):
            if encoders.audio is not None:
                keys.append(KeyValue(key.name, key.type, key.value(encoders.audio, encoders.text_width)))
        elif encoders.vision is not None:
            value = key.value(encoders.vision, encoders.text_width)
            keys.append(
                KeyValue(key.name, ARRAY, value, key.type) if key.is_array else KeyValue(key.name, key.type, value)
            )
    return keys
