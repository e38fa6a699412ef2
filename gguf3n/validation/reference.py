"""The reference: the checkpoint's text model in transformers, on the CPU in float32."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import CheckpointError, ConfigError, UsageError

# every way in which the text model's tensors are named, to the one that Gemma3nForCausalLM uses
_TEXT_NAMES = {r"^(base_model\.model\.)?(model\.language_model|language_model\.model|model)\.": "model."}


class Reference:
    """A checkpoint directory that transformers has loaded; only its text model, whatever else it holds.

    Exact: BF16 and F16 weights are taken to float32 as they are; attention is computed plainly ("eager").

    Raises: ConfigError: not a Gemma 3n. CheckpointError: tensors are missing. UsageError: no torch or no transformers.
    """

    def __init__(self, checkpoint: str | os.PathLike[str]) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UsageError(
                f"the reference cannot be run: no module {error.name}", fix="pip install 'gguf3n[validate]'"
            ) from error
        self.directory = Path(checkpoint)
        config = json.loads((self.directory / "config.json").read_text("utf-8"))
        text = config.get("text_config", config)
        if text.get("model_type") != "gemma3n_text":
            raise ConfigError(
                f"{self.directory / 'config.json'}: another model",
                expected="gemma3n_text",
                found=str(text.get("model_type")),
            )
        shown = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            self._model, info = transformers.Gemma3nForCausalLM.from_pretrained(
                self.directory,
                config=transformers.Gemma3nTextConfig(**text),
                dtype=torch.float32,
                attn_implementation="eager",
                key_mapping=_TEXT_NAMES,
                local_files_only=True,
                output_loading_info=True,
            )
        finally:
            transformers.logging.set_verbosity(shown)
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(f"{self.directory}: {len(missing)} tensors are missing", found=", ".join(missing[:5]))
        self._torch = torch
        self._model.eval()

    def logprobs(self, token_ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """For each position of a text the log-probabilities of what follows it; the text is read once.

        Shapes: `[vocab]` a position.
        """
        torch = self._torch
        with torch.no_grad():
            logits = self._model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        for row in logits:
            logprobs: NDArray[np.float32] = torch.log_softmax(row.double(), dim=-1).float().numpy()
            yield logprobs

    def next_token_logprobs(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities of the token after these.

        Shapes: `[vocab]`.
        """
        *_, last = self.logprobs(token_ids)
        return last

    def tokenize(self, text: str) -> list[int]:
        """Token ids, with the begin mark first and special tokens in the text recognized."""
        ids: list[int] = self._tokenizer().encode(text)
        return ids

    def generate(self, prompt: str | Sequence[int], n: int) -> str:
        """At most `n` further tokens, always the most likely one."""
        ids = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        made = self._model.generate(
            self._torch.tensor([ids]), max_new_tokens=n, do_sample=False, top_k=None, top_p=None, pad_token_id=0
        )
        text: str = self._tokenizer().decode(made[0, len(ids) :], skip_special_tokens=True)
        return text

    def _tokenizer(self) -> Any:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
