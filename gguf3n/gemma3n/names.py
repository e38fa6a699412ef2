"""How tensors are called in the checkpoints of Gemma 3n: one table of prefixes, whatever the layout.

published             model.language_model.layers.0.…    model.vision_tower.…    (Gemma3nForConditionalGeneration)
early multimodal      language_model.model.layers.0.…    vision_tower.…          (before transformers 4.53)
text only             model.layers.0.…                                           (Gemma3nForCausalLM)
PEFT                  any of these after base_model.model.
"""

from __future__ import annotations

import re

PEFT = r"(?:base_model\.model\.)?"
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
"""Of the text model's tensors; longer ones first."""
OTHER_PREFIXES = ("language_model.",)
"""Of an output matrix or a rotary table beside the text model in early layouts."""

TEXT_PREFIX = re.compile(f"^{PEFT}(?:{'|'.join(map(re.escape, TEXT_PREFIXES))})")
"""What stands before a text tensor's own name."""
ENCODER_PREFIX = re.compile(rf"^{PEFT}(?:model\.)?(?=(?:vision|audio)_tower\.|embed_(?:vision|audio)\.)")
"""What stands before the name of a tensor of the vision and audio encoders."""
_PREFIX = re.compile(f"^{PEFT}(?:{'|'.join(map(re.escape, (*TEXT_PREFIXES, *OTHER_PREFIXES)))})?")


def bare_name(name: str) -> str:
    """A tensor's own name, such as layers.0.mlp.up_proj.weight or vision_tower.…, whatever the layout."""
    return _PREFIX.sub("", name, count=1)
