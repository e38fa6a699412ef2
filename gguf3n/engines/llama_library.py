"""llama.cpp's C API through ctypes, in the shared object of the `xllamacpp` wheel.

The logits of a text come as an array of floats, where the server writes each of them as a JSON object.

The API passes its parameters by value, in structs that grow with every few versions. So they are taken from
llama.cpp's own `*_default_params` functions into a buffer that is longer than any of them, which no calling convention
minds, and a field is set only if every default before it is where and what the tables below say. Another version is
`UnknownLayout`, and its server is used instead.

Source: include/llama.h of llama.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.distribution import log_softmax
from gguf3n.engines.ggml import library
from gguf3n.errors import GGUFError

N_BATCH = 64
"""Tokens that are computed at once; llama.cpp keeps the logits of as many: 67 MB at 262,400 tokens."""

F32, F16 = 0, 1
"""ggml's numbers of the types."""

ERROR, CONTINUED = 4, 5
"""ggml's log levels."""

CONTEXT_FIELDS: tuple[tuple[str, str, float], ...] = (
    ("n_ctx", "I", 512),
    ("n_batch", "I", 2048),
    ("n_ubatch", "I", 512),
    ("n_seq_max", "I", 1),
    ("n_rs_seq", "I", 0),
    ("n_outputs_max", "I", 0),
    ("n_outputs_max_per_seq", "I", 1),
    ("n_threads", "i", 4),
    ("n_threads_batch", "i", 4),
    ("ctx_type", "i", 0),
    ("rope_scaling_type", "i", -1),
    ("pooling_type", "i", -1),
    ("attention_type", "i", -1),
    ("flash_attn_type", "i", -1),
    ("rope_freq_base", "f", 0.0),
    ("rope_freq_scale", "f", 0.0),
    ("yarn_ext_factor", "f", -1.0),
    ("yarn_attn_factor", "f", -1.0),
    ("yarn_beta_fast", "f", -1.0),
    ("yarn_beta_slow", "f", -1.0),
    ("yarn_orig_ctx", "I", 0),
    ("defrag_thold", "f", -1.0),
    ("cb_eval", "P", 0),
    ("cb_eval_user_data", "P", 0),
    ("type_k", "i", F16),
    ("type_v", "i", F16),
)
"""The start of llama_context_params: field, struct's letter for its type, default."""

MODEL_FIELDS: tuple[tuple[str, str, float], ...] = (
    ("devices", "P", 0),
    ("tensor_buft_overrides", "P", 0),
    ("n_gpu_layers", "i", -1),
    ("split_mode", "i", 1),
)
"""The start of llama_model_params."""

BATCH_FIELDS = ("n_tokens", "token", "embd", "pos", "n_seq_id", "seq_id", "logits")
BATCH = struct.Struct("@i6P")
"""llama_batch: the number of tokens, and arrays of one element a token."""

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class UnknownLayout(Exception):
    """This llama.cpp is of a version whose structs are not the ones known here, or has no such functions."""


class _Struct(ctypes.Structure):
    """A parameter struct, or a longer one in its place."""

    _fields_ = (("bytes", ctypes.c_uint64 * 64),)


class LlamaLibrary:
    """A GGUF file that llama.cpp has loaded, on the CPU.

    Args:
        n_ctx: the longest text.
        n_threads: that compute.

    Why: keys and values are cached in float32 and flash attention is off, so the file is measured, not the cache.

    Raises: GGUFError: llama.cpp does not load the file. UnknownLayout. UsageError: xllamacpp is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, n_ctx: int = 512, n_threads: int) -> None:
        self._lib = bindings()
        self._path = Path(path)
        self._model = self._context = None
        model = _changed(self._lib.llama_model_default_params(), MODEL_FIELDS, n_gpu_layers=0)
        context = _changed(
            self._lib.llama_context_default_params(),
            CONTEXT_FIELDS,
            n_ctx=n_ctx,
            n_batch=N_BATCH,
            n_ubatch=N_BATCH,
            n_outputs_max_per_seq=0,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            flash_attn_type=0,
            type_k=F32,
            type_v=F32,
        )
        with _logging(self._lib) as errors:
            self._model = self._lib.llama_model_load_from_file(os.fsencode(path), model)
            if self._model:
                self._context = self._lib.llama_init_from_model(self._model, context)
        if not self._context:
            self.close()
            raise GGUFError(f"{path}: llama.cpp does not load this file", found=_told(errors))
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))
        self.name = f"llama.cpp, {version()}"

    def __enter__(self) -> LlamaLibrary:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model."""
        with _logging(self._lib):
            if self._context:
                self._lib.llama_free(self._context)
            if self._model:
                self._lib.llama_model_free(self._model)
        self._model = self._context = None

    def logprobs(self, token_ids: Sequence[int], *, first: int = 0) -> Iterator[NDArray[np.float32]]:
        """For each position of a text, from `first` on, the log-probabilities of what follows it.

        Shapes: `[vocab]` a position.

        Raises: GGUFError: llama.cpp does not evaluate the text.
        """
        ids = np.asarray(token_ids, dtype=np.int32)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for start in range(0, len(ids), N_BATCH):
            end = min(start + N_BATCH, len(ids))
            self._decode(ids[start:end], start, first)
            for position in range(max(start, first), end):
                logits = self._lib.llama_get_logits_ith(self._context, position - start)
                yield log_softmax(np.ctypeslib.as_array(logits, (self.n_vocab,))).astype(np.float32)

    def _decode(self, ids: NDArray[np.int32], start: int, first: int) -> None:
        """Adds these tokens to the text; the logits of those from `first` on can be asked for then."""
        n = len(ids)
        positions = np.arange(start, start + n, dtype=np.int32)
        sequence = np.zeros(1, np.int32)
        n_sequences = np.ones(n, np.int32)
        sequences = np.full(n, sequence.ctypes.data, np.uintp)
        wanted = (positions >= first).astype(np.int8)
        arrays = (ids.ctypes.data, 0, *(a.ctypes.data for a in (positions, n_sequences, sequences, wanted)))
        batch = _Struct()
        BATCH.pack_into(batch, 0, n, *arrays)
        with _logging(self._lib) as errors:
            status = self._lib.llama_decode(self._context, batch)
        if status:
            raise GGUFError(
                f"{self._path}: llama.cpp does not evaluate these tokens", found=f"status {status}; {_told(errors)}"
            )


def version() -> str:
    """Which llama.cpp it is, by the wheel that brings it."""
    import xllamacpp

    return f"xllamacpp {xllamacpp.__version__}"


@functools.cache
def bindings() -> Any:
    """The wheel's shared object with the signatures of the functions used here, all structs checked.

    Raises: UnknownLayout. UsageError: xllamacpp is not installed.
    """
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_backend_init": (None, []),
        "llama_log_get": (None, [pointer, pointer]),
        "llama_log_set": (None, [pointer, pointer]),
        "llama_model_default_params": (_Struct, []),
        "llama_context_default_params": (_Struct, []),
        "llama_batch_init": (_Struct, [number, number, number]),
        "llama_batch_free": (None, [_Struct]),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Struct]),
        "llama_init_from_model": (pointer, [pointer, _Struct]),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (number, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_decode": (number, [pointer, _Struct]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, number]),
    }
    try:
        lib = library()
        for name, (result, arguments) in signatures.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (AttributeError, OSError) as error:
        raise UnknownLayout(str(error)) from error
    check_parameters("llama_context_params", lib.llama_context_default_params(), CONTEXT_FIELDS)
    check_parameters("llama_model_params", lib.llama_model_default_params(), MODEL_FIELDS)
    _check_batch(lib)
    lib.llama_backend_init()
    return lib


def check_parameters(name: str, defaults: Any, fields: Sequence[tuple[str, str, float]]) -> None:
    """Are the defaults where the table has them. Raises: UnknownLayout."""
    for (field, _, expected), found in zip(fields, struct.unpack_from(_codes(fields), defaults), strict=True):
        if found != expected:
            raise UnknownLayout(f"{name}.{field} is {found}, not {expected}")


def _check_batch(lib: Any) -> None:
    """Is an empty batch what llama_batch is known to be: arrays for tokens, but none for embeddings."""
    batch = lib.llama_batch_init(3, 0, 1)
    values = dict(zip(BATCH_FIELDS, BATCH.unpack_from(batch), strict=True))
    absent = {field for field, value in values.items() if not value}
    if absent != {"n_tokens", "embd"}:
        raise UnknownLayout(f"llama_batch without {', '.join(sorted(absent))}")
    if (ctypes.c_void_p * 4).from_address(values["seq_id"])[3] is not None:
        raise UnknownLayout("llama_batch.seq_id does not end in a null pointer")
    lib.llama_batch_free(batch)


def _changed(parameters: Any, fields: Sequence[tuple[str, str, float]], **changes: int) -> Any:
    """Default parameters of which some are changed."""
    values = [changes.get(field, default) for field, _, default in fields]
    struct.pack_into(_codes(fields), parameters, 0, *values)
    return parameters


def _codes(fields: Sequence[tuple[str, str, float]]) -> str:
    return "@" + "".join(code for _, code, _ in fields)


@contextlib.contextmanager
def _logging(lib: Any) -> Iterator[list[str]]:
    """What llama.cpp reports as errors meanwhile; nothing reaches the terminal.

    Why: the callback is put back at the end, since one in Python would have to wait for the interpreter's lock when
    another of llama.cpp's threads calls it.
    """
    errors: list[str] = []
    level_before = 0

    def keep(level: int, text: bytes, _: object) -> None:
        nonlocal level_before
        level_before = level_before if level == CONTINUED else level
        if level_before == ERROR:
            errors.append(text.decode(errors="replace"))

    callback = _LOG_CALLBACK(keep)
    previous, data = ctypes.c_void_p(), ctypes.c_void_p()
    lib.llama_log_get(ctypes.byref(previous), ctypes.byref(data))
    lib.llama_log_set(ctypes.cast(callback, ctypes.c_void_p), None)
    try:
        yield errors
    finally:
        lib.llama_log_set(previous, data)


def _told(errors: list[str]) -> str:
    lines = [line.strip() for line in "".join(errors).splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or "no message"
