"""The reference: the checkpoint's text model in transformers, on torch.

The output matrix has a row for each token of a large vocabulary, so the hidden states of a text are computed once and
the logits a few positions at a time: what is in memory depends on the vocabulary, not on the length of the text.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.devices import check_words
from gguf3n.engines.reference_tokenizers import load_tokenizer, open_reference
from gguf3n.engines.torchvision_operators import declare_operators
from gguf3n.errors import CheckpointError, ConfigError, UsageError
from gguf3n.formats.rows import RowReader, chunks
from gguf3n.gemma3n.mmproj import ENCODER_NAMES
from gguf3n.gemma3n.names import TEXT_PREFIX, bare_name
from gguf3n.gemma3n.source import Checkpoint, Source, open_checkpoint

_TEXT_NAMES = {TEXT_PREFIX.pattern: "model."}
"""Every way in which the text model's tensors are named, to the one that Gemma3nForCausalLM uses."""

HEAD_POSITIONS = 32
"""Positions whose logits are in memory at once: 34 MB in float32 at 262,400 tokens."""

HEAD_ROWS = 16384
"""Rows of the output matrix that are widened to float32 at once where they are not."""


class Reference:
    """A checkpoint that transformers has loaded; only its text model, whatever else it holds.

    Args:
        source: a checkpoint directory, or one that is open; also a slice, whose padding is left out.
        device: "cpu", "cuda", or "auto": CUDA where there is one.
        dtype: what the weights are taken to and the layers computed in, "float32" or "bfloat16".

    Exact: in float32, BF16 and F16 weights are what they are; attention is computed plainly ("eager"), and logits in
    float32 in either case.

    Raises: ConfigError: not a Gemma 3n. CheckpointError: tensors are missing. UsageError: no torch or no transformers,
        no such device or dtype, or a device with too little memory.
    """

    def __init__(self, source: str | Path | Source, *, device: str = "auto", dtype: str = "float32") -> None:
        self.device = check_device(device, dtype)
        import torch
        import transformers

        self._torch = torch
        self.source = open_checkpoint(source).unpadded
        self.directory = self.source.path
        self.dtype = dtype
        text = self.source.raw_config.get("text_config", self.source.raw_config)
        if text.get("model_type") != "gemma3n_text":
            raise ConfigError(
                f"{self.directory / 'config.json'}: another model",
                expected="gemma3n_text",
                found=str(text.get("model_type")),
            )
        model = load_model(
            transformers.Gemma3nForCausalLM,
            self.source,
            config=transformers.Gemma3nTextConfig(**text),
            key_mapping=_TEXT_NAMES,
            dtype=getattr(torch, dtype),
            left_out=ENCODER_NAMES,
        )
        with device_memory(self.device, self.dtype):
            self._model = model.to(self.device)
        self.name = f"transformers {transformers.__version__}, {dtype} on {self.device}"

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model."""
        self._model = None
        gc.collect()  # its parts refer to each other
        if self.device == "cuda":
            self._torch.cuda.empty_cache()

    @property
    def model(self) -> Any:
        """The torch module: transformers' Gemma3nForCausalLM, `model.model` its text model, for hooks on its parts."""
        return self._model

    @property
    def n_vocab(self) -> int:
        return int(self._model.config.vocab_size)

    def disturb(self, share: float) -> None:
        """From now on every output of a linear layer is off by up to this share of it, as by another engine's rounding.

        Why: a model that goes on to say something else then is chaotic, whatever engine runs it. Always the same noise.
        """
        torch = self._torch
        generator = torch.Generator(self.device).manual_seed(0)

        def off(module: Any, inputs: Any, output: Any) -> Any:
            noise = torch.empty_like(output, dtype=torch.float32).uniform_(-share, share, generator=generator)
            return (output * (1 + noise)).to(output.dtype)

        for module in self._model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(off)

    def run(self, token_ids: Sequence[int]) -> Any:
        """The text model without the output matrix, once over a text; what hooks on `model` see.

        Shapes: a torch tensor `[n_tokens, hidden_size]` of `dtype`, on `device`.
        """
        with self._torch.no_grad(), device_memory(self.device, self.dtype):
            ids = self._torch.tensor([list(token_ids)], device=self.device)
            return self._model.model(input_ids=ids, use_cache=False).last_hidden_state[0]

    def logprobs(self, token_ids: Sequence[int], *, first: int = 0) -> Iterator[NDArray[np.float32]]:
        """For each position of a text, from `first` on, the log-probabilities of what follows it.

        Shapes: `[vocab]` a position.
        """
        torch = self._torch
        hidden = self.run(token_ids)
        for start in range(first, len(token_ids), HEAD_POSITIONS):
            for row in self.logits(hidden[start : start + HEAD_POSITIONS]):
                logprobs: NDArray[np.float32] = torch.log_softmax(row.double(), dim=-1).float().cpu().numpy()
                yield logprobs

    def logits(self, hidden: Any) -> Any:
        """The output matrix and the soft cap, as Gemma3nForCausalLM.forward has them, but in float32 always.

        Shapes: `[n, hidden_size]` -> float32 `[n, vocab]`, on `device`.

        Why: bfloat16 logits have steps of an eighth from 16 on, more than quantization changes them.
        """
        torch = self._torch
        weight, cap = self._model.lm_head.weight, self._model.config.final_logit_softcapping
        with torch.no_grad():
            if weight.dtype == torch.float32:
                logits = hidden @ weight.T
            else:
                logits = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=self.device)
                for row in range(0, len(weight), HEAD_ROWS):
                    rows = weight[row : row + HEAD_ROWS]
                    logits[:, row : row + len(rows)] = hidden.float() @ rows.float().T
            return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def next_token_logprobs(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities of the token after these.

        Shapes: `[vocab]`.
        """
        (last,) = self.logprobs(token_ids, first=len(token_ids) - 1)
        return last

    def tokenize(self, text: str) -> list[int]:
        """Token ids, with the begin mark first and special tokens in the text recognized."""
        with closing(open_reference(self.source)) as tokenizer:
            return tokenizer.encode(text)

    def generate(self, prompt: str | Sequence[int], n: int) -> str:
        """At most `n` further tokens, always the most likely one."""
        ids = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        made = self._model.generate(
            self._torch.tensor([ids], device=self.device),
            max_new_tokens=n,
            do_sample=False,
            top_k=None,
            top_p=None,
            pad_token_id=0,
        )
        text: str = load_tokenizer(self.directory).decode(made[0, len(ids) :], skip_special_tokens=True)
        return text


@contextmanager
def device_memory(device: str, dtype: str) -> Iterator[None]:
    """Raises: UsageError where the device has too little memory for what is done in here."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UsageError(
            f"the reference in {dtype} does not fit into the memory of {device}",
            found=str(error).partition("\n")[0],
            fix="--dtype bfloat16, a smaller --ctx, or --device cpu",
        ) from error


def load_model(
    kind: Any,
    source: Checkpoint,
    key_mapping: Mapping[str, str],
    *,
    dtype: Any,
    left_out: tuple[str, ...],
    **options: Any,
) -> Any:
    """A model of a class of transformers, complete, to compute with; nothing is printed meanwhile.

    Args:
        key_mapping: how tensors are called in the model: patterns of what stands before a name, and what does there.
        left_out: how the names of tensors begin that the model does not have.

    Raises: CheckpointError: tensors are missing.
    """
    import transformers

    where: dict[str, Any] = {"pretrained_model_name_or_path": source.path}
    if not source.as_it_stands:
        where = {"pretrained_model_name_or_path": None, "state_dict": _weights(source, dtype, left_out)}
    shown = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(
            **where,
            key_mapping=dict(key_mapping),
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    finally:
        transformers.logging.set_verbosity(shown)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{source.path}: {len(missing)} tensors are missing", found=", ".join(missing[:5]))
    return model.eval()


def _weights(source: Checkpoint, dtype: Any, left_out: tuple[str, ...]) -> dict[str, Any]:
    """The tensors of a source whose files transformers can't read, or that are others than its files have."""
    import torch

    weights = {}
    with closing(RowReader()) as reader:
        for name, tensor in source.tensors.items():
            if bare_name(name).startswith(left_out):
                continue
            weights[name] = torch.empty(tensor.shape, dtype=dtype)
            into, first = weights[name].view(-1, *(tensor.shape[-1:] or (1,))), 0
            for rows in tensor.rows:
                for chunk in chunks(rows):
                    values = np.empty((chunk.n_rows, rows.n_per_row), np.float32)
                    reader.fill(rows, chunk.first, values)
                    into[first : first + chunk.n_rows] = torch.from_numpy(values)
                    first += chunk.n_rows
        reader.check_unchanged()
    return weights


def check_device(device: str, dtype: str) -> str:
    """The device that is meant.

    Raises: UsageError: no torch or no transformers, no such device or dtype.
    """
    check_words(device, dtype)
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"the reference cannot be run: no module {error.name}", fix="pip install 'gguf3n[validate]'"
        ) from error
    declare_operators()
    has_cuda = bool(torch.cuda.is_available())
    if device == "cuda" and not has_cuda:
        raise UsageError("device cuda: torch finds none here", fix="--device cpu, or a torch that is built for CUDA")
    return "cuda" if device != "cpu" and has_cuda else "cpu"
