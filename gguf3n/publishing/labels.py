"""Which file of a repository a tag gives: the rules of llama.cpp, the Hub and Ollama, which are not the same.

    rule        :TAG means                                       no tag
    llama.cpp   the first file with TAG and then . or - in its   Q4_K_M, else Q8_0, else the first model
                path, whatever stands before TAG and in any case
    Ollama      the file whose label on the Hub is TAG, or       Q4_K_M, else one that the Hub chooses
                whose name it is, in any case

So llama.cpp's `:F16` gives BF16 where that is listed before, and Ollama's does not.

Source: llama.cpp, common/download.cpp (gguf_filename_is_model, find_best_model, find_best_sibling); huggingface.js,
packages/tasks/src/gguf.ts (GGUF_QUANT_RE, parseGGUFQuantLabel); hub-docs, ollama.md. Names that tell shares in percent
(`-55IQ2_XXS-34Q2_K`), which the Hub knows too, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SUFFIX = ".gguf"

NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""What llama.cpp takes for something else than a model if it stands in a file's name, in lower case."""

HUB_QUANTS = (
    "F32", "F16", "Q4_0", "Q4_1", "Q4_1_SOME_F16", "Q4_2", "Q4_3", "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M",
    "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS",
    "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M", "IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16", "Q4_0_4_4", "Q4_0_4_8",
    "Q4_0_8_8", "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0", "Q2_K_XL", "Q3_K_XL", "Q4_K_XL", "Q5_K_XL",
    "Q6_K_XL", "Q8_K_XL",
)  # fmt: skip
"""In the order of the Hub's expression, of which the first that fits counts."""

HUB_LABEL = re.compile(rf"(?:UD-)?(?:{'|'.join(HUB_QUANTS)})(?:_[A-Z]+)?")

DEFAULTS = ("Q4_K_M", "Q8_0")
"""What llama.cpp looks for without a tag; Ollama only for the first."""

SPLIT = re.compile(r"(?P<prefix>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
TAG_AT_END = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE)


def file_name(path: str) -> str:
    """Without its folders."""
    return path.rpartition("/")[2]


def is_model(path: str) -> bool:
    """Whether llama.cpp takes a file for a model, by its name."""
    return path.endswith(SUFFIX) and not hidden_by(path)


def hidden_by(path: str) -> str | None:
    """What in a name makes llama.cpp take a file for something else than a model."""
    return next((word for word in NO_MODEL if word in file_name(path)), None)


def hub_label(path: str) -> str | None:
    """The quantization that the Hub reads from a name: the last that stands there; None where it finds none."""
    found = HUB_LABEL.findall(path.upper())
    return str(found[-1]) if found else None


def split_part(path: str) -> tuple[int, int] | None:
    """Which part of how many, counted from 1; None where the name is not that of a part."""
    found = SPLIT.fullmatch(path)
    return None if found is None else (int(found["index"]), int(found["count"]))


def is_first(path: str) -> bool:
    """Whether a file is a whole one, or the first part of a split one."""
    return (split_part(path) or (1, 1))[0] == 1


def listed(paths: Iterable[str]) -> list[str]:
    """In the order in which the Hub lists them: git's, by the bytes of the whole path."""
    return sorted(paths, key=lambda path: path.encode("utf-8", "surrogateescape"))


def llama_cpp_file(paths: Iterable[str], tag: str | None = None) -> str | None:
    """The file that `llama-server -hf ORG/REPO:TAG` loads, of a split model its first part.

    Args:
        paths: all files, in any order.
        tag: None where the user gives none.
    """
    models = [path for path in listed(paths) if is_model(path) and is_first(path)]
    for wanted in DEFAULTS if tag is None else (tag,):
        pattern = re.compile(re.escape(wanted) + "[.-]", re.IGNORECASE)
        for path in models:
            if pattern.search(path):
                return path
    return models[0] if models and tag is None else None


def llama_cpp_mmproj(paths: Iterable[str], model: str) -> str | None:
    """The mmproj file that llama.cpp takes for a model: in its folder or above it, of the nearest number of bits."""
    folder = model.split("/")[:-1]
    best: tuple[tuple[int, int], str] | None = None
    for path in listed(paths):
        own = path.split("/")[:-1]
        if not path.endswith(SUFFIX) or "mmproj" not in path or own != folder[: len(own)]:
            continue
        rank = (len(own), -abs(_bits(path) - _bits(model)))
        if best is None or rank > best[0]:
            best = rank, path
    return None if best is None else best[1]


def _bits(path: str) -> int:
    """The number in what stands at a name's end, as 4 of Q4_K_M and 16 of BF16; 0 where there is none."""
    found = SPLIT.fullmatch(path)
    end = TAG_AT_END.search(path.removesuffix(SUFFIX) if found is None else found["prefix"])
    digits = re.search(r"\d+", end[1]) if end is not None else None
    return int(digits[0]) if digits is not None else 0


def ollama_candidates(paths: Iterable[str], tag: str | None = None) -> list[str]:
    """The files that `ollama run hf.co/ORG/REPO:TAG` may mean; the Hub does not say which of several it gives.

    Why no split files: the Hub refuses them. Without a tag it is the default's, or else whatever the Hub chooses: all.
    """
    models = [path for path in listed(paths) if is_model(path) and split_part(path) is None]
    wanted = DEFAULTS[0] if tag is None else tag.upper()
    found = [path for path in models if path.upper() == wanted or hub_label(path) == wanted]
    return found if found or tag is not None else models


def tags(paths: Iterable[str]) -> dict[str, list[str]]:
    """Label -> the models that have it on the Hub, all parts of a split one as its first; None has no entry."""
    found: dict[str, list[str]] = {}
    for path in listed(paths):
        label = hub_label(path)
        if is_model(path) and label is not None and is_first(path):
            found.setdefault(label, []).append(path)
    return found
