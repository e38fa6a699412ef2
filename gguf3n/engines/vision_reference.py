"""The reference for pictures: the checkpoint's vision tower and text model in transformers, on torch.

A prompt with a picture is, with <soft> standing for its 256 places:

    <bos> before <start_of_image> <soft> ... <soft> <end_of_image> after

transformers and llama.cpp differ in what they make of it: transformers squashes the picture to a square and embeds
<end_of_image> by the vision embedder's own table; llama.cpp pads the picture, and takes what the text file has in
<end_of_image>'s rows. Both can be asked for here.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.pictures import Pixels
from gguf3n.engines.reference import check_device, device_memory, load_model
from gguf3n.engines.reference_tokenizers import open_reference
from gguf3n.errors import ConfigError, UsageError
from gguf3n.gemma3n.encoders import N_IMAGE_TOKENS, ImageTokens, read_image_tokens
from gguf3n.gemma3n.mmproj import AUDIO_NAMES
from gguf3n.gemma3n.names import ENCODER_PREFIX, TEXT_PREFIX
from gguf3n.gemma3n.source import Checkpoint

_NAMES = {
    ENCODER_PREFIX.pattern: "model.",
    rf"{TEXT_PREFIX.pattern}(?!(?:vision|audio)_tower\.|embed_(?:vision|audio)\.|language_model\.)": (
        "model.language_model."
    ),
}
"""Every way in which tensors are named, to the one that Gemma3nForConditionalGeneration uses."""

PACKAGES = ("torch", "transformers", "timm", "torchvision", "PIL")
"""What it takes: timm has the vision tower."""


@dataclass(frozen=True)
class EndRows:
    """What a text file has for <end_of_image>: a row of each embedding table.

    Shapes: token_embd `[hidden_size]`, per_layer `[n_layers * hidden_size_per_layer_input]`.
    """

    token_embd: NDArray[np.float32]
    per_layer: NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """What the tower makes of a picture, in the text model's space. Shapes: torch `[n_soft, hidden_size]`."""

    features: Any


class VisionReference:
    """A checkpoint's vision tower and text model, which transformers has loaded.

    Args:
        device, dtype: as for `Reference`.

    Raises: ConfigError: no vision tower, or tokens of a picture that can't be. CheckpointError: tensors are missing.
        UsageError: packages that are not installed, no such device.
    """

    def __init__(self, source: Checkpoint, *, device: str = "auto", dtype: str = "float32") -> None:
        check_packages()
        self.device = check_device(device, dtype)
        import torch
        import transformers

        self._torch = torch
        self.source = source = source.unpadded
        raw = source.raw_config
        if raw.get("model_type") != "gemma3n" or "vision_config" not in raw:
            raise ConfigError(
                f"{source.path / 'config.json'}: no vision tower", expected="gemma3n", found=str(raw.get("model_type"))
            )
        self._tokens = image_tokens(source)
        config = transformers.Gemma3nConfig(**raw)
        config.audio_config.conf_num_hidden_layers = 0  # nothing is heard here
        model = load_model(
            _without_audio(transformers.Gemma3nForConditionalGeneration),
            source,
            config=config,
            key_mapping=_NAMES,
            dtype=getattr(torch, dtype),
            left_out=AUDIO_NAMES,
        )
        self._memory = partial(device_memory, self.device, dtype)
        with self._memory():
            self._model = model.to(self.device)
        try:
            self._processor = transformers.AutoImageProcessor.from_pretrained(source.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{source.path}: transformers does not know how to prepare a picture",
                expected="preprocessor_config.json, as the published checkpoints have it",
                found=str(error).partition("\n")[0],
            ) from error
        self.name = f"transformers {transformers.__version__}, {dtype} on {self.device}"

    def __enter__(self) -> VisionReference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model."""
        self._model = None
        gc.collect()
        if self.device == "cuda":
            self._torch.cuda.empty_cache()

    def squashed(self, pixels: Pixels) -> Any:
        """A picture as the checkpoint's own processor prepares it."""
        return self._processor(pixels, return_tensors="pt")["pixel_values"]

    def see(self, image: Any) -> Seen:
        """What the tower makes of a picture.

        Shapes: image, square: uint8 `[size, size, 3]`, or what `squashed` returns.
        """
        torch = self._torch
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad(), self._memory():
            found = self._model.model.get_image_features(image.to(self.device, self._model.dtype))
        return Seen(found.pooler_output[0])

    def prompts(self, before: str, afters: Iterable[str]) -> list[list[int]]:
        """The ids of prompts with a picture between a text and each of others."""
        tokens = self._tokens
        soft = [tokens.image_token_id] * tokens.vision_soft_tokens_per_image
        with closing(open_reference(self.source)) as tokenizer:
            head = [*tokenizer.encode(before), tokens.boi_token_id, *soft, tokens.eoi_token_id]
            tails = [tokenizer.encode(after) for after in afters]
            return [[*head, *tail[tail[:1] == [tokenizer.bos_id] :]] for tail in tails]

    def logprobs(
        self, token_ids: Sequence[int], seen: Seen, positions: Sequence[int], end: EndRows | None = None
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities of what follows some positions of a prompt with a picture.

        Args:
            end: <end_of_image> as a text file has it; the model's own way where it is not given.

        Shapes: `[vocab]` a position.
        """
        torch, model, tokens = self._torch, self._model.model, self._tokens
        with torch.no_grad(), self._memory():
            ids = torch.tensor([list(token_ids)], device=self.device)
            text = model.language_model
            embedded, per_layer = text.embed_tokens(ids), text.get_per_layer_inputs(ids)
            is_end = ids == tokens.eoi_token_id
            if end is None:
                embedded[is_end] = model.embed_vision(input_ids=ids[is_end]).to(embedded.dtype)
            else:
                embedded[is_end] = self._row(end.token_embd, text.embed_tokens)
                row = self._row(end.per_layer, text.embed_tokens_per_layer)
                per_layer[is_end] = row.reshape(per_layer.shape[2:])
            embedded[ids == tokens.image_token_id] = seen.features.to(embedded.dtype)
            found = text(inputs_embeds=embedded, per_layer_inputs=per_layer, use_cache=False).last_hidden_state[0]
            cap = self._model.config.get_text_config().final_logit_softcapping
            logits = found[list(positions)].float() @ self._model.lm_head.weight.float().T
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            return list(torch.log_softmax(logits.double(), dim=-1).float().cpu().numpy())

    def _row(self, row: NDArray[np.float32], table: Any) -> Any:
        """A row of an embedding table as the table would give it out."""
        values = self._torch.from_numpy(row).to(self.device, table.weight.dtype)
        return values * table.embed_scale.to(table.weight.dtype)


def image_tokens(source: Checkpoint) -> ImageTokens:
    """The tokens of a picture, held against the vocabulary and the tower. Raises: ConfigError."""
    path, end = source.path / "config.json", source.config.vocab_size
    tokens = read_image_tokens(source.raw_config, path)
    for name in ("boi_token_id", "image_token_id", "eoi_token_id"):
        if getattr(tokens, name) >= end:
            raise ConfigError(
                f"{path}: {name} is no token of the model",
                expected=f"an id below vocab_size, {end:,}",
                found=f"{getattr(tokens, name):,}",
            )
    if tokens.vision_soft_tokens_per_image != N_IMAGE_TOKENS:
        raise ConfigError(
            f"{path}: vision_soft_tokens_per_image is not what the tower makes of a picture",
            expected=str(N_IMAGE_TOKENS),
            found=str(tokens.vision_soft_tokens_per_image),
        )
    return tokens


def check_packages() -> None:
    """See that all packages are there. Raises: UsageError."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the vision tower cannot be run: no module {', '.join(missing)}", fix="pip install 'gguf3n[vision]'"
        )


def _without_audio(kind: Any) -> Any:
    """A model's class that is complete without an audio encoder."""

    class Seeing(kind):  # type: ignore[misc]
        _keys_to_ignore_on_load_missing = [r"\.audio_tower\.", r"\.embed_audio\."]  # noqa: RUF012

    return Seeing
