"""Which type each tensor of an existing Gemma 3n file has."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gguf.constants import Keys

from gguf3n.errors import MappingError, SourceError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import GGUFFile
from gguf3n.gemma3n.lora import check_no_adapter
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.text import ARCH, written_order


def types_by_storage(gguf: GGUFFile, origin: str) -> Mapping[Storage, Mapping[str, QType]]:
    """Tensor -> type, apart for those that are quantized and those that are kept.

    Raises: SourceError for another model or an adapter; MappingError for a tensor that is missing.
    """
    key = gguf.keys.get(Keys.General.ARCHITECTURE)
    if key is None or key.value != ARCH:
        found = "none" if key is None else str(key.value)
        raise SourceError(f"{origin}: not a Gemma 3n", expected=f"general.architecture {ARCH}", found=found)
    check_no_adapter(gguf)
    bids = [int(match[1]) for match in (re.match(r"blk\.(\d+)\.", name) for name in gguf.tensors) if match]
    if not bids:
        raise MappingError(f"{origin}: no layers", expected="tensors such as blk.0.attn_q.weight")
    n_layers = 1 + max(bids)
    types: dict[Storage, dict[str, QType]] = {storage: {} for storage in Storage}
    for rule, bid in written_order(n_layers):
        name = rule.name(bid)
        if name not in gguf.tensors:
            raise MappingError(f"{origin}: tensor {name!r} is missing", expected=f"it, in a model of {n_layers} layers")
        types[rule.storage][name] = gguf.tensors[name].qtype
    return types
