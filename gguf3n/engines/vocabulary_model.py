"""A GGUF file's vocabulary in llama.cpp, without its weights.

llama.cpp's server cuts texts and renders chats, but it loads a model first. So it gets the file's own tokenizer keys
in front of a network of one narrow layer of zeros: some megabytes, a second at most, whatever the file's size.

Why not the C API's `vocab_only`: it renders no chat, and what its tokenizer throws (a byte that the vocabulary lacks)
ends the process, where the server answers with an error.
"""

from __future__ import annotations

import shutil
import tempfile
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, Keys

from gguf3n.engines.llama_cpp import LlamaCpp, post, said
from gguf3n.errors import GGUFError
from gguf3n.formats.gguf_draft import Draft, DraftTensor
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, open_part

ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA]
WIDTH = 32
"""Of everything in the network: one block of a quantized row."""
N_CTX = 64

SIZES: Mapping[str, int] = {
    Keys.LLM.BLOCK_COUNT: 1,
    Keys.LLM.CONTEXT_LENGTH: N_CTX,
    Keys.LLM.EMBEDDING_LENGTH: WIDTH,
    Keys.LLM.FEED_FORWARD_LENGTH: WIDTH,
    Keys.Attention.HEAD_COUNT: 1,
}
MATRICES = (
    MODEL_TENSOR.ATTN_Q,
    MODEL_TENSOR.ATTN_K,
    MODEL_TENSOR.ATTN_V,
    MODEL_TENSOR.ATTN_OUT,
    MODEL_TENSOR.FFN_GATE,
    MODEL_TENSOR.FFN_UP,
    MODEL_TENSOR.FFN_DOWN,
)
NORMS = (MODEL_TENSOR.ATTN_NORM, MODEL_TENSOR.FFN_NORM, MODEL_TENSOR.OUTPUT_NORM)


class VocabularyServer(LlamaCpp):
    """llama.cpp's server on a file that `write_vocabulary_model` made.

    Args:
        name: of the file whose vocabulary it is, in messages.
        with_template: whether the chat template is in it; one that llama.cpp can't read keeps it from loading.

    Raises: GGUFError: llama.cpp does not load it. UsageError: no xllamacpp.
    """

    def __init__(self, model: Path, name: str, *, with_template: bool) -> None:
        self._name = name
        try:
            super().__init__(model, n_ctx=N_CTX, n_threads=1)
        except GGUFError as error:
            what = "vocabulary and chat template" if with_template else "vocabulary"
            raise GGUFError(f"{name}: llama.cpp does not load this {what}", found=error.found) from error

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, as the file has them added and, if `special`, special tokens in the text recognized.

        Raises: GGUFError: the vocabulary can't express the text.
        """
        request = {"content": text, "add_special": True, "parse_special": special}
        tokens: list[int] = self._ask("/tokenize", request)["tokens"]
        return tokens

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A chat up to where the model is to speak; without the begin token, where llama.cpp adds it afterwards.

        Raises: GGUFError: the template fails.
        """
        prompt: str = self._ask("/apply-template", {"messages": [dict(message) for message in messages]})["prompt"]
        return prompt

    def _ask(self, path: str, request: dict[str, Any]) -> Any:
        try:
            return post(self.url + path, request)
        except urllib.error.HTTPError as error:
            raise GGUFError(f"{self._name}: llama.cpp's server fails at {path}", found=said(error)) from error


class VocabularyModel(VocabularyServer):
    """llama.cpp's server on the vocabulary of a GGUF file, without its chat template (see template_process).

    Raises: GGUFError: the file is none, or llama.cpp does not load its vocabulary. UsageError: no xllamacpp.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self._directory = tempfile.mkdtemp(prefix="gguf3n-")
        try:
            model = Path(self._directory) / "vocabulary.gguf"
            write_vocabulary_model(gguf, model, with_template=False)
            super().__init__(model, str(gguf.path), with_template=False)
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise

    def close(self) -> None:
        """Frees the model and removes its file."""
        super().close()
        shutil.rmtree(self._directory, ignore_errors=True)


def write_vocabulary_model(gguf: GGUFFile, output: Path, *, with_template: bool) -> None:
    """Write the small model with a file's tokenizer keys, taken over byte by byte.

    Raises: GGUFError; OutputError.
    """
    draft = Draft(gguf if len(gguf.parts) == 1 else open_part(gguf.path, strict=False))
    tokens = gguf.keys[Keys.Tokenizer.LIST].value if Keys.Tokenizer.LIST in gguf.keys else None
    if not isinstance(tokens, GGUFArray) or not len(tokens):
        raise GGUFError(f"{gguf.name}: no vocabulary", expected=Keys.Tokenizer.LIST)
    for name in draft.names():
        is_template = name.startswith(Keys.Tokenizer.CHAT_TEMPLATE)
        is_kept = name == Keys.General.NAME or name.startswith(
            "tokenizer."
        )  # llama.cpp knows some models by their name
        if not is_kept or (is_template and not with_template):
            draft.unset(name)
    draft.set(KeyValue(Keys.General.ARCHITECTURE, GGUFValueType.STRING, ARCH))
    for name, size in SIZES.items():
        draft.set(KeyValue(name.format(arch=ARCH), GGUFValueType.UINT32, size))
    draft.set(KeyValue(Keys.Attention.LAYERNORM_RMS_EPS.format(arch=ARCH), GGUFValueType.FLOAT32, 1e-6))
    draft.tensors = [_zeros(MODEL_TENSOR.TOKEN_EMBD, len(tokens), WIDTH)]
    draft.tensors += [_zeros(kind, WIDTH, WIDTH) for kind in MATRICES]
    draft.tensors += [_zeros(kind, WIDTH) for kind in NORMS]
    draft.save(output)


def _zeros(kind: MODEL_TENSOR, *shape: int) -> DraftTensor:
    name = f"{TENSOR_NAMES[kind].format(bid=0)}.weight"
    return DraftTensor(name, shape, QType.Q8_0 if len(shape) > 1 else QType.F32)
