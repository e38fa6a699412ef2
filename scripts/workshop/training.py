"""Trains the small checkpoint on text, so that perplexity and KL divergence mean something.

It starts from well-conditioned random weights, trains them in float32 with transformers' own model (activation sparsity
included), and writes them in BF16 in the published layout.
"""

from __future__ import annotations

import ast
import json
import math
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workshop import checkpoints
from workshop.places import FIXTURES

DEFAULT_TEXTS = ("english.txt", "multilingual.txt")

PASSAGE = 4000
"""Characters after which a passage ends at the next blank line."""
HELD_OUT_EVERY = 20
"""One passage in so many is held out."""
SHORTEST_DOC = 200
"""Characters of a documentation string; below, it is a remark on an argument list."""
NOT_ENGLISH = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
"""Folders of the standard library that are left out: programs and tests."""

HELD_OUT, TRAIN, TRAINING = "held_out.txt", "train.txt", "training.json"


@dataclass(frozen=True)
class Options:
    """What is asked for, as on the command line."""

    steps: int = 300
    texts: tuple[Path, ...] = ()
    seed: int = 0
    threads: int = 2
    ctx: int = 256
    batch: int = 2
    learning_rate: float = 2e-3
    evaluate: int = 16
    """Windows of the held-out text, before and after."""


@dataclass(frozen=True)
class Training:
    """How it went. Units: nats a token; seconds."""

    losses: tuple[float, ...]
    n_train: int
    """Tokens to train on."""
    n_held_out: int
    perplexity_before: float
    perplexity_after: float
    seconds: float


def corpus(files: Sequence[Path]) -> list[str]:
    """The passages to train on and to hold out, in order."""
    if files:
        return [passage for file in files for passage in passages(file.read_text("utf-8"))]
    texts = [(FIXTURES / "text" / name).read_text("utf-8") for name in DEFAULT_TEXTS]
    return [passage for text in (*texts, *python_english()) for passage in passages(text)]


def passages(text: str) -> Iterator[str]:
    """A text cut at blank lines into pieces of about equal length."""
    piece: list[str] = []
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= PASSAGE:
            yield "\n\n".join(piece)
            piece = []
    if "".join(piece).strip():
        yield "\n\n".join(piece)


def python_english() -> list[str]:
    """The language reference and the standard library's documentation strings, each text once."""
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not NOT_ENGLISH & set(path.relative_to(library).parts):
            texts.append("\n\n".join(documentation(path)))
    return list(dict.fromkeys(text for text in texts if text))


def documentation(path: Path) -> list[str]:
    """A module's longer documentation strings."""
    tree = ast.parse(path.read_bytes())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in dict.fromkeys(found) if len(text) >= SHORTEST_DOC]


def split(pieces: Sequence[str]) -> tuple[list[str], list[str]]:
    """To train on, and held out; of a text that is too short for both, its last passage is held out.

    Why: every n-th, so that both hold the same mixture.
    """
    if len(pieces) < 2:
        sys.exit(f"too little text: give more than {PASSAGE:,} characters, in paragraphs")
    chosen = set(range(HELD_OUT_EVERY - 1, len(pieces), HELD_OUT_EVERY)) or {len(pieces) - 1}
    train = [piece for i, piece in enumerate(pieces) if i not in chosen]
    return train, [pieces[i] for i in sorted(chosen)]


def tokens_of(pieces: Sequence[str], directory: Path) -> Any:
    """The passages as one row of token ids, without begin marks."""
    import sentencepiece
    import torch

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    return torch.tensor([token for piece in pieces for token in tokenizer.encode(piece + "\n\n")])


def load(directory: Path) -> Any:
    """The text model in float32, as transformers has it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    text = json.loads((directory / "config.json").read_text("utf-8"))["text_config"]
    return transformers.Gemma3nForCausalLM.from_pretrained(
        directory,
        config=transformers.Gemma3nTextConfig(**text),
        dtype=torch.float32,
        attn_implementation="sdpa",
        key_mapping={r"^model\.language_model\.": "model."},
        local_files_only=True,
    )


def loss_of(model: Any, windows: Any, bos: int) -> Any:
    """Mean cross-entropy of what follows the begin mark in each window. Shapes: windows `[batch, ctx]`."""
    import torch

    begin = torch.full((len(windows), 1), bos)
    logits = model(torch.cat([begin, windows[:, :-1]], dim=1), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.flatten())


def perplexity(model: Any, tokens: Any, ctx: int, n_windows: int, bos: int) -> float:
    """Over the first windows of a text."""
    import torch

    model.eval()
    n_windows = min(n_windows, len(tokens) // ctx)
    with torch.no_grad():
        losses = [loss_of(model, tokens[None, i * ctx : (i + 1) * ctx], bos).item() for i in range(n_windows)]
    return math.exp(sum(losses) / n_windows)


def optimizer_of(model: Any, learning_rate: float) -> Any:
    """AdamW, which lets matrices decay a little and vectors not at all."""
    import torch

    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate: a linear rise over a twentieth of the steps, then half a cosine down to a tenth."""
    rise = max(steps // 20, 1)
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def train(directory: Path, options: Options) -> Training:
    """Makes the checkpoint, trains it, writes it again.

    Why: float32 throughout; in BF16 the smallest steps would be lost.
    """
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    checkpoints.make(directory, checkpoints.Options(seed=options.seed))
    model = load(directory)
    bos = model.config.bos_token_id
    kept, held_out = split(corpus(options.texts))
    for name, pieces in ((TRAIN, kept), (HELD_OUT, held_out)):
        (directory / name).write_text("\n\n".join(pieces) + "\n", "utf-8")
    tokens, unseen = (tokens_of(pieces, directory) for pieces in (kept, held_out))
    if min(len(tokens), len(unseen)) <= options.ctx:
        sys.exit(f"too little text for --ctx {options.ctx}: {len(tokens):,} and {len(unseen):,} tokens")
    print(f"{len(tokens):,} tokens to train on, {len(unseen):,} held out", flush=True)
    before = perplexity(model, unseen, options.ctx, options.evaluate, bos)
    print(f"held-out perplexity {before:.1f}", flush=True)

    optimizer = optimizer_of(model, options.learning_rate)
    chosen = torch.Generator().manual_seed(options.seed)
    started, losses = time.monotonic(), []
    model.train()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate_at(step, options.steps)
        starts = torch.randint(len(tokens) - options.ctx, (options.batch,), generator=chosen)
        loss = loss_of(model, torch.stack([tokens[i : i + options.ctx] for i in starts]), bos)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 25 == 0 or step + 1 == options.steps:
            report(step + 1, options, losses, time.monotonic() - started)
    seconds = time.monotonic() - started

    write(directory, model)
    after = perplexity(load(directory), unseen, options.ctx, options.evaluate, bos)
    print(f"held-out perplexity {after:.2f}, as written in BF16")
    training = Training(tuple(losses), len(tokens), len(unseen), before, after, seconds)
    (directory / TRAINING).write_text(json.dumps(provenance(options, training), indent=2) + "\n", "utf-8")
    return training


def provenance(options: Options, training: Training) -> dict[str, Any]:
    """What was asked for, what came of it, and on which versions."""
    import torch
    import transformers

    asked = asdict(options) | {"texts": [path.name for path in options.texts]}
    came = asdict(training) | {"losses": [round(loss, 4) for loss in training.losses]}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {**asked, **versions, "transformers": transformers.__version__, **came}


def report(step: int, options: Options, losses: Sequence[float], seconds: float) -> None:
    recent = losses[-25:]
    rate = step * options.batch * options.ctx / seconds
    left = seconds / step * (options.steps - step)
    loss = sum(recent) / len(recent)
    print(f"step {step} of {options.steps}: loss {loss:.3f}, {rate:,.0f} tokens/s, {left:.0f} s left", flush=True)


def write(directory: Path, model: Any) -> None:
    """The trained weights in BF16, in the place of the random ones.

    Why: keys and values of the KV-shared layers stay as they were, for published checkpoints have them and nothing
    evaluates them; the rows beyond the tokenizer's pieces are copies of the pad row there. The old file is replaced and
    not written over, since torch maps it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    path, new = directory / "model.safetensors", directory / "model.safetensors.new"
    weights = load_file(path)
    trained = model.state_dict()
    n_pieces = model.config.vocab_size_per_layer_input
    for name in weights:
        value = trained.get("model." + name.removeprefix(checkpoints.PUBLISHED))
        if value is not None:
            weights[name] = value.to(torch.bfloat16).contiguous()
    embeddings = weights[f"{checkpoints.PUBLISHED}embed_tokens.weight"]
    embeddings[n_pieces:] = embeddings[0]
    save_file(weights, new, metadata={"format": "pt"})
    new.chmod(path.stat().st_mode)
    new.replace(path)
    (directory / "README.md").write_text(model_card(), "utf-8")


def model_card() -> str:
    head, _, _ = checkpoints.model_card(checkpoints.Options()).partition("# Random weights")
    return head + (
        "# A small trained model in the shape of Gemma 3n\n\n"
        "Made by `scripts/train_tiny.py` in minutes: it knows what its text looks like, and nothing of the world.\n"
    )
