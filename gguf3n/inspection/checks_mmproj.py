"""Checks of an mmproj file, and whether it fits its text model. Each yields what is wrong, and where.

Source: tools/mtmd/clip.cpp, mtmd.cpp and models/mobilenetv5.cpp of llama.cpp; how programs find the file:
common/download.cpp there, server/images.go of Ollama.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from gguf.constants import Keys

from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import GGUFArray
from gguf3n.formats.rows import FLOAT_DTYPES
from gguf3n.gemma3n.encoders import IMAGE_UNIT, MAX_IMAGE_SIZE, N_IMAGE_TOKENS
from gguf3n.gemma3n.mmproj import FILE_KIND, INPUT_PROJECTION, KEYS, RUNS, VisionKey, known_shapes, target_name
from gguf3n.inspection.f16_inputs import CONVOLUTION_INPUTS, input_bounds
from gguf3n.inspection.found import FILE, Found, absent, named, said
from gguf3n.inspection.subject import Subject

IMAGE_SIZE, PATCH_SIZE = "clip.vision.image_size", "clip.vision.patch_size"
WIDTH = "clip.vision.embedding_length"
TOWER = "the vision tower"
IMAGE_MARKS = ("<start_of_image>", "<end_of_image>")
"""Tokens that llama.cpp puts around an image. Source: init_vision in mtmd.cpp."""


def missing_keys(subject: Subject) -> Iterator[Found]:
    for key in KEYS:
        modality = "vision" if isinstance(key, VisionKey) else "audio"
        if modality in subject.encoders.kinds and key.name not in subject.gguf.keys:
            yield named(key.name, "is missing")


def key_types(subject: Subject) -> Iterator[Found]:
    for key in KEYS:
        found = subject.gguf.keys.get(key.name)
        if found is None:
            continue
        kind = key.type.name.lower()
        if isinstance(key, VisionKey) and key.is_array:
            value = found.value
            if not isinstance(value, GGUFArray) or value.element_type is not key.type or len(value) < 3:
                yield Found(key.name, f"is {found.type_name}, not an array of three {kind} or more")
        elif isinstance(found.value, GGUFArray) or found.type is not key.type:
            yield Found(key.name, f"is {found.type_name}, not {kind}")


def common_projector(subject: Subject) -> Iterator[Found]:
    if Keys.Clip.PROJECTOR_TYPE in subject.gguf.keys:
        yield named(Keys.Clip.PROJECTOR_TYPE, "is there")


def image_size(subject: Subject) -> Iterator[Found]:
    size, patch = subject.integer(IMAGE_SIZE), subject.integer(PATCH_SIZE)
    if size is None or patch is None:
        return
    if not 0 < size <= MAX_IMAGE_SIZE or size % IMAGE_UNIT:
        yield Found(IMAGE_SIZE, f"is {size}, not a multiple of {IMAGE_UNIT} of at most {MAX_IMAGE_SIZE}")
    elif patch <= 0 or size // patch != N_IMAGE_TOKENS:
        yield Found(PATCH_SIZE, f"is {patch}, not {size} / {N_IMAGE_TOKENS} = {size // N_IMAGE_TOKENS}")


def missing_tensors(subject: Subject) -> Iterator[Found]:
    if subject.encoders.error is not None:
        yield said(TOWER, subject.encoders.error.one_line)
    for name in subject.encoders.rules:
        if name not in subject.gguf.tensors:
            yield named(name, "is missing")


def extra_tensors(subject: Subject) -> Iterator[Found]:
    for name in subject.gguf.tensors if subject.encoders.rules else ():
        if name not in subject.encoders.rules:
            yield named(name, "is no tensor of Gemma 3n's encoders")


def wrong_shapes(subject: Subject) -> Iterator[Found]:
    for tensor, rule in subject.encoders.known_tensors():
        shapes = known_shapes(rule)
        if shapes and tensor.shape not in shapes:
            yield Found(tensor.name, f"is {list(tensor.shape)}, not {list(shapes[0])}")


def vectors_for_maps(subject: Subject) -> Iterator[Found]:
    for tensor, rule in subject.encoders.known_tensors():
        if rule.written and tensor.shape == known_shapes(rule)[1]:
            yield Found(tensor.name, f"is {list(tensor.shape)}, not {list(known_shapes(rule)[0])}")


def convolution_types(subject: Subject) -> Iterator[Found]:
    for tensor, rule in subject.encoders.known_tensors():
        types, why = RUNS.get(rule.storage, ((), ""))
        if types and tensor.qtype not in types:
            expected = " or ".join(qtype.name for qtype in types)
            yield said(tensor.name, f"{tensor.name} is {tensor.qtype.name}, not {expected}: {why}")


def float_tensors(subject: Subject) -> Iterator[Found]:
    for tensor, rule in subject.encoders.known_tensors():
        if rule.storage.forced is QType.F32 and tensor.qtype is not QType.F32:
            yield Found(tensor.name, f"is {tensor.qtype.name}, not F32")


def widths(subject: Subject) -> Iterator[Found]:
    tower, projection = subject.encoders.tower, subject.gguf.tensors.get(INPUT_PROJECTION)
    if tower is None:
        return
    value = subject.integer(WIDTH)
    if value is not None and value != tower.n_out:
        yield Found(WIDTH, f"is {value}, and the tower's output has {tower.n_out}")
    if projection is not None and projection.shape != (tower.n_out, tower.n_out):
        yield Found(INPUT_PROJECTION, f"is {list(projection.shape)}, not {tower.n_out} both ways")


def general_type(subject: Subject) -> Iterator[Found]:
    value = subject.text(Keys.General.TYPE)
    if value is None:
        yield absent(Keys.General.TYPE)
    elif value != FILE_KIND:
        yield Found(Keys.General.TYPE, f"is {value!r}, not {FILE_KIND!r}")


def file_name(subject: Subject) -> Iterator[Found]:
    name = os.path.basename(subject.gguf.name)
    if "mmproj" not in name:
        yield said(FILE, f"{name}: no mmproj in the name")


def idle_audio(subject: Subject) -> Iterator[Found]:
    if "audio" in subject.encoders.kinds:
        yield said(Keys.Clip.HAS_AUDIO_ENCODER, "it has an audio encoder")


def f16_inputs(subject: Subject) -> Iterator[Found]:
    """Convolutions with F16 kernels whose inputs may not fit F16: see f16_inputs.py."""
    tower, tensors = subject.encoders.tower, subject.gguf.tensors
    if tower is None or any(tensors[target_name(name)].qtype.name not in FLOAT_DTYPES for name in tower.tensors):
        return
    for name, bound in input_bounds(subject.gguf, tower).items():
        if bound > CONVOLUTION_INPUTS and subject.gguf.tensors[name].qtype is QType.F16:
            yield Found(name, f"may be given {bound:,.0f}", f"{name}: what goes in may be as large as {bound:,.0f}")


def text_width(subject: Subject) -> Iterator[Found]:
    """Of the text model: the encoders are of another width."""
    other = subject.mmproj
    projection = None if other is None else other.gguf.tensors.get(INPUT_PROJECTION)
    width = subject.sizes.by_word.get("embd")
    if projection is not None and width is not None and projection.shape != (width, width):
        what = f"{list(projection.shape)} in the mmproj file, and the text model has a width of {width}"
        yield said(INPUT_PROJECTION, f"{INPUT_PROJECTION} is {what}")


def image_marks(subject: Subject) -> Iterator[Found]:
    """Of the text model: its vocabulary does not know images."""
    if subject.mmproj is None or not subject.tokens:
        return
    missing = [mark for mark in IMAGE_MARKS if mark not in subject.token_ids]
    if missing:
        yield said(Keys.Tokenizer.LIST, f"{len(subject.tokens):,} tokens, and no {' or '.join(missing)} among them")
