"""Checks of the model: gemma3n.* keys and tensors against each other. Each yields what is wrong, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from gguf.constants import GGML_QUANT_VERSION, Keys, LlamaFileType

from gguf3n.formats.ggml_types import GGML_TYPES, TYPE_OF_FTYPE
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType, Scalar
from gguf3n.formats.gguf_reader import GGUFArray, GGUFKey
from gguf3n.gemma3n.config import LLAMA_CPP_FIXED, N_KV_LAYERS
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.text import ARCH, KEYS
from gguf3n.inspection.found import FILE, Found, absent, named, said
from gguf3n.inspection.subject import OPTIONAL_TENSORS, SIZE_KEYS, TABLES, Subject
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, PLE_TYPES

U32, I32, F32, BOOL, STRING, ARRAY = (
    GGUFValueType.UINT32,
    GGUFValueType.INT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.BOOL,
    GGUFValueType.STRING,
    GGUFValueType.ARRAY,
)
SHARED_KV = Keys.Attention.SHARED_KV_LAYERS.format(arch=ARCH)

REQUIRED: tuple[str, ...] = (
    Keys.LLM.BLOCK_COUNT,
    Keys.LLM.CONTEXT_LENGTH,
    Keys.LLM.EMBEDDING_LENGTH,
    Keys.LLM.FEED_FORWARD_LENGTH,
    Keys.Attention.HEAD_COUNT,
    Keys.Attention.LAYERNORM_RMS_EPS,
    Keys.Attention.SLIDING_WINDOW,
)
"""Without one of these llama.cpp does not load the file. Source: load_hparams, gemma3n.cpp's load_arch_hparams."""

KEY_TYPES: dict[str, tuple[GGUFValueType, ...]] = {
    Keys.General.ARCHITECTURE: (STRING,),
    Keys.General.NAME: (STRING,),
    Keys.General.FILE_TYPE: (U32,),
    Keys.General.QUANTIZATION_VERSION: (U32,),
    Keys.Tokenizer.MODEL: (STRING,),
    Keys.Tokenizer.PRE: (STRING,),
    Keys.Tokenizer.CHAT_TEMPLATE: (STRING,),
    Keys.Tokenizer.BOS_ID: (U32,),
    Keys.Tokenizer.EOS_ID: (U32,),
    Keys.Tokenizer.UNK_ID: (U32,),
    Keys.Tokenizer.PAD_ID: (U32,),
    Keys.Tokenizer.SEP_ID: (U32,),
    Keys.Tokenizer.MASK_ID: (U32,),
    Keys.Tokenizer.EOT_ID: (U32,),
    Keys.Tokenizer.EOM_ID: (U32,),
    Keys.Tokenizer.ADD_BOS: (BOOL,),
    Keys.Tokenizer.ADD_EOS: (BOOL,),
    Keys.Tokenizer.ADD_SEP: (BOOL,),
    Keys.Tokenizer.ADD_PREFIX: (BOOL,),
    **{key.name.format(arch=ARCH): (key.type,) for key in KEYS if not key.is_array},
}
"""Scalar keys and the types that their readers take. Source: get_key of llama-model-loader.cpp demands them exactly."""

ARRAY_TYPES: dict[str, tuple[GGUFValueType, ...]] = {
    Keys.Tokenizer.LIST: (STRING,),
    Keys.Tokenizer.SCORES: (F32,),
    Keys.Tokenizer.TOKEN_TYPE: (I32,),
    **{key.name.format(arch=ARCH): (key.type,) for key in KEYS if key.is_array},
    Keys.LLM.FEED_FORWARD_LENGTH.format(arch=ARCH): (I32, U32),
}
"""Array keys and the types of their elements."""

ALSO_ARRAYS = frozenset(k.format(arch=ARCH) for k in (Keys.Attention.HEAD_COUNT, Keys.Attention.HEAD_COUNT_KV))
ALSO_SCALARS = frozenset({Keys.LLM.FEED_FORWARD_LENGTH.format(arch=ARCH)})
"""Keys that llama.cpp takes as one value or as one for each layer."""

LAYER_ARRAYS: tuple[str, ...] = (
    Keys.LLM.FEED_FORWARD_LENGTH,
    Keys.Attention.SLIDING_WINDOW_PATTERN,
    Keys.LLM.ACTIVATION_SPARSITY_SCALE,
    Keys.Attention.HEAD_COUNT,
    Keys.Attention.HEAD_COUNT_KV,
)

OWN_CHECKS = (Keys.LLM.BLOCK_COUNT, Keys.Attention.SHARED_KV_LAYERS)
"""Of SIZE_KEYS, those that `block_count` and `fixed_sizes` look at."""


def missing_keys(subject: Subject) -> Iterator[Found]:
    for name in REQUIRED:
        if name.format(arch=ARCH) not in subject.gguf.keys:
            yield named(name.format(arch=ARCH), "is missing")


def assumed_keys(subject: Subject) -> Iterator[Found]:
    for key in KEYS:
        if key.name not in REQUIRED and key.name.format(arch=ARCH) not in subject.gguf.keys:
            yield named(key.name.format(arch=ARCH), "is missing")


class KeyType(NamedTuple):
    """The type that a key should have; of an array, that of its elements."""

    kind: GGUFValueType
    is_array: bool = False

    def __str__(self) -> str:
        return ("array of " if self.is_array else "") + str(self.kind.name.lower())


def shared_kv_type(subject: Subject) -> Iterator[Found]:
    key = subject.gguf.keys.get(SHARED_KV)
    if key is not None and (wanted := wanted_type(key)):
        yield Found(key.name, f"is {key.type_name}, not {wanted}")


def mistyped_keys(subject: Subject) -> Iterator[Found]:
    for key in subject.gguf.keys.values():
        if key.name != SHARED_KV and (wanted := wanted_type(key)):
            yield Found(key.name, f"is {key.type_name}, not {wanted}")


def wanted_type(key: GGUFKey) -> KeyType | None:
    """The type that a key should have, where it has none that its readers take."""
    scalars, elements = KEY_TYPES.get(key.name), ARRAY_TYPES.get(key.name)
    if isinstance(key.value, GGUFArray):
        if elements is None and key.name in ALSO_ARRAYS:
            elements = (U32, I32)
        if elements is None:
            return KeyType(scalars[0]) if scalars else None
        return None if key.value.element_type in elements else KeyType(elements[0], is_array=True)
    if scalars is None and key.name in ALSO_SCALARS:
        scalars = (U32,)
    if scalars is None:
        return KeyType(elements[0], is_array=True) if elements else None
    return None if key.type in scalars else KeyType(scalars[0])


def array_lengths(subject: Subject) -> Iterator[Found]:
    for name in LAYER_ARRAYS:
        array = subject.array(name)
        if array is not None and len(array) != subject.n_layers:
            yield Found(name.format(arch=ARCH), f"has {len(array)} items for {subject.n_layers} layers")


def block_count(subject: Subject) -> Iterator[Found]:
    count = subject.integer(Keys.LLM.BLOCK_COUNT)
    if count is not None and count != subject.n_layers:
        what = f"{count}, tensors of {subject.n_layers} layers"
        yield Found(Keys.LLM.BLOCK_COUNT.format(arch=ARCH), what, f"block_count {what}")


def size_keys(subject: Subject) -> Iterator[Found]:
    """Keys that say another size than the tensors have."""
    for name in SIZE_KEYS:
        key = subject.gguf.keys.get(name.format(arch=ARCH))
        expected = subject.expected_keys.get(name.format(arch=ARCH))
        if key is None or expected is None or name in OWN_CHECKS:
            continue
        if not _says(key, expected):
            yield Found(key.name, f"{_text(key)}, by the tensors {_text(expected)}")


def _says(key: GGUFKey, expected: KeyValue) -> bool:
    """Whether a key's value is the one expected, as a scalar or for each layer."""
    wanted = expected.value
    if isinstance(key.value, GGUFArray):
        if key.value.element_type is STRING or len(key.value) > 1 << 12:
            return False
        values = key.value.tolist()
        return values == list(wanted) if isinstance(wanted, tuple | list) else set(values) <= {wanted}
    if isinstance(wanted, tuple | list):
        return set(wanted) == {key.value}
    return key.value == wanted


def _text(key: GGUFKey | KeyValue) -> str:
    value = key.value
    items: list[Scalar] = value.head(64) if isinstance(value, GGUFArray) else []
    if isinstance(value, tuple | list):
        items = list(value)
    if not isinstance(value, GGUFArray | tuple | list):
        return str(value)
    distinct = list(dict.fromkeys(items))
    return "[" + ", ".join(map(str, distinct[:4])) + (", …]" if len(distinct) > 4 else "]")


def fixed_sizes(subject: Subject) -> Iterator[Found]:
    words = subject.sizes.by_word
    has = {
        "altup_num_inputs": words.get("altup"),
        "laurel_rank": words.get("laurel"),
        "hidden_size_per_layer_input": words.get("ple"),
        "altup_active_idx": subject.integer(Keys.LLM.ALTUP_ACTIVE_IDX),
        "n_sparse_layers": _n_sparse(subject),
        "n_kv_layers": None if subject.n_layers >= N_KV_LAYERS else subject.n_layers,
    }
    shared = subject.integer(Keys.Attention.SHARED_KV_LAYERS)
    if shared is not None and subject.n_layers >= N_KV_LAYERS:
        has["n_kv_layers"] = subject.n_layers - shared
    for name, fixed in LLAMA_CPP_FIXED:
        value = has.get(name)
        if value is not None and value != fixed:
            yield Found(name, f"is {value}, and {fixed} in llama.cpp")


def _n_sparse(subject: Subject) -> int | None:
    scales = subject.array(Keys.LLM.ACTIVATION_SPARSITY_SCALE)
    if scales is None or scales.element_type is STRING or len(scales) != subject.n_layers:
        return None
    return int((scales.numpy() > 0).sum())


def mixed_ffn(subject: Subject) -> Iterator[Found]:
    widths = Counter(width for width in subject.sizes.ffn if width)
    if len(widths) > 1:
        what = ", ".join(f"{width} in {n} layers" for width, n in widths.most_common())
        yield said(Keys.LLM.FEED_FORWARD_LENGTH.format(arch=ARCH), what)


def missing_tensors(subject: Subject) -> Iterator[Found]:
    if not subject.n_layers:
        yield said(FILE, "there are no layers")
    for name in subject.wanted:
        if name not in subject.gguf.tensors and not subject.is_idle(name):
            yield named(name, "is missing")


def missing_idle_tensors(subject: Subject) -> Iterator[Found]:
    for name in subject.wanted:
        if name not in subject.gguf.tensors and subject.is_idle(name):
            yield named(name, "is missing")


def extra_tensors(subject: Subject) -> Iterator[Found]:
    for name in subject.gguf.tensors:
        if name not in subject.wanted and name not in OPTIONAL_TENSORS:
            yield named(name, "is no tensor of a Gemma 3n")


def wrong_shapes(subject: Subject) -> Iterator[Found]:
    for tensor, rule, bid in subject.known_tensors():
        expected = subject.expected_shape(rule, bid)
        if tensor.name in TABLES and expected is not None and len(tensor.shape) == 2:
            expected = (tensor.shape[0], expected[1])  # their rows have a check of their own
        if expected is not None and tensor.shape != expected:
            yield Found(tensor.name, f"is {list(tensor.shape)}, not {list(expected)}")


def float_tensors(subject: Subject) -> Iterator[Found]:
    for tensor, rule, _ in subject.known_tensors():
        if rule.storage is Storage.FLOAT32 and tensor.qtype is not QType.F32:
            yield Found(tensor.name, f"is {tensor.qtype.name}, not F32")


def ple_type(subject: Subject) -> Iterator[Found]:
    tensor = subject.gguf.tensors.get(PER_LAYER_TOKEN_EMBD)
    if tensor is not None and tensor.qtype not in PLE_TYPES:
        yield Found(tensor.name, f"is {tensor.qtype.name}")


def table_rows(subject: Subject) -> Iterator[Found]:
    rows = {name: n for name in TABLES if (n := subject.n_rows(name)) is not None}
    if subject.tokens:
        rows["the vocabulary"] = len(subject.tokens)
    if len(set(rows.values())) > 1:
        shortest = min(rows, key=rows.__getitem__)
        yield said(shortest, ", ".join(f"{name} {n:,}" for name, n in rows.items()))


def file_type(subject: Subject) -> Iterator[Found]:
    value = subject.number(Keys.General.FILE_TYPE)
    if value is None:
        yield absent(Keys.General.FILE_TYPE)
        return
    try:
        ftype = LlamaFileType(value)
    except ValueError:
        yield Found(Keys.General.FILE_TYPE, f"{value} is none")
        return
    qtype = TYPE_OF_FTYPE.get(ftype, QType.__members__.get(ftype.name.removeprefix("MOSTLY_")))
    if qtype is not None and (found := layer_types(subject)) and qtype not in found:
        usual = ", ".join(t.name for t, _ in found.most_common(3))
        yield said(Keys.General.FILE_TYPE, f"{ftype.name}, but the matrices are {usual}")


def layer_types(subject: Subject) -> Counter[QType]:
    """How many of the matrices that a recipe may quantize have each type, the two tables left out."""
    known = subject.known_tensors()
    return Counter(t.qtype for t, rule, bid in known if rule.storage is Storage.QUANTIZABLE and bid is not None)


def guessed_file_type(subject: Subject) -> LlamaFileType | None:
    """The file type that the matrices look like; that of a type which can't be written has its name."""
    found = layer_types(subject)
    if not found:
        return None
    qtype = found.most_common(1)[0][0]
    return GGML_TYPES[qtype].ftype if qtype in GGML_TYPES else LlamaFileType.__members__.get(f"MOSTLY_{qtype.name}")


def quantization_version(subject: Subject) -> Iterator[Found]:
    value = subject.number(Keys.General.QUANTIZATION_VERSION)
    if value is None:
        yield absent(Keys.General.QUANTIZATION_VERSION)
    elif value != GGML_QUANT_VERSION:
        yield Found(Keys.General.QUANTIZATION_VERSION, f"{value}, not {GGML_QUANT_VERSION}")
