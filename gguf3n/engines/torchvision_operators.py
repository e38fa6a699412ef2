"""torchvision's operators, declared where they cannot be loaded.

With timm installed, transformers imports it for Gemma 3n, whatever of the model is wanted, and with it torchvision. Its
compiled operators fit the build of torch only that they were made for; beside a CPU build they are not loaded, and the
import ends with an error. Nothing here runs them.
"""

from __future__ import annotations

import functools
import importlib.util

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("torchvision::nms", "torchvision::qnms")
"""What torchvision describes to torch when it is imported. Source: torchvision/_meta_registrations.py."""


@functools.cache
def declare_operators() -> None:
    """See that transformers can import timm, if it is installed; call it before transformers loads anything."""
    if any(importlib.util.find_spec(name) is None for name in ("timm", "torchvision", "torch")):
        return
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in OPERATORS:
            torch.library.define(name, SCHEMA)
