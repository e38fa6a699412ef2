"""Gradients of the model's own guesses: for each sequence, that of log p(labels) by each matrix that is quantized.

    labels     one a position, drawn from what the model itself expects there, not the text's next token: then the
               squares of these gradients are the Fisher information, which says how far a change of weights moves the
               model's distributions
    matrices   no gradient of weights is ever held: what went into a matrix and the gradient of what came out of it
               give some rows of it at a time, and whoever asked has them one after the other, the last layer's first
    head       the output matrix has a row for each token: it is gone through twice, some rows at a time, once to draw
               labels and once for the gradient
    tables     the rows that a text gathers

Memory: the model, the inputs of every layer, and what one layer computes: layers are computed a second time on the way
back (gradient checkpointing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.memory import Alternative, ModelNeed, reference_need
from gguf3n.engines.reference import Reference, device_memory
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.source import Checkpoint
from gguf3n.gemma3n.text import written_order
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD

HEAD_VALUES = 1 << 24
"""Logits in memory at once, a few times over: 67 MB each in float32."""
ROW_VALUES = 1 << 22
"""Gradients of weights that are handed over at once."""

Gradients = NDArray[np.float32]


class Listener(Protocol):
    """What is told of the gradients of some sequences."""

    def gradients(self, name: str, sequences: slice, rows: NDArray[np.int64], values: Gradients) -> None:
        """Of some rows of a matrix. Those of one sequence add up over all calls.

        Shapes: values [n_sequences, n_rows, n_per_row].
        """

    def uses(self, name: str, values: NDArray[np.float64]) -> None:
        """Of a table, summed over positions: the squared gradient by a row that is used there, whichever it is.

        Shapes: values [n_sequences, n_per_row].
        """


def run_backward(reference: Reference, sequences: Sequence[Sequence[int]], seeds: Sequence[int], to: Listener) -> float:
    """Draw labels for sequences of one length and tell of the gradients.

    Args:
        seeds: one a sequence; its labels depend on nothing else.

    Returns: minus the log-probability of the sequences themselves, of all but their first tokens. Units: nats.

    Raises: UsageError where the device has too little memory.
    """
    import torch

    text = reference.model.model
    ids = torch.tensor([list(sequence) for sequence in sequences], device=reference.device)
    with device_memory(reference.device, reference.dtype), _recomputed(text), _watched(text, to):
        with torch.no_grad():
            embedded, per_layer = text.embed_tokens(ids), text.get_per_layer_inputs(ids)
        embedded.requires_grad_()
        per_layer.requires_grad_()
        hidden = text(inputs_embeds=embedded, per_layer_inputs=per_layer, use_cache=False).last_hidden_state
        with torch.no_grad():
            loss, gradient = _head(reference, hidden.detach(), ids, seeds, to)
        hidden.backward(gradient.to(hidden.dtype))
        in_table = torch.where(ids < text.config.vocab_size_per_layer_input, ids, 0)
        for table, name, used, found in (
            (text.embed_tokens, TOKEN_EMBD, ids, embedded.grad),
            (text.embed_tokens_per_layer, PER_LAYER_TOKEN_EMBD, in_table, per_layer.grad),
        ):
            _gathered(name, used, found.flatten(2).float() * table.scalar_embed_scale, to)
    return loss


def fisher_need(source: Checkpoint, dtype: str, n_ctx: int, n_sequences: int) -> ModelNeed:
    """What it takes: the reference, each layer's input, and one layer of all sequences.

    Raises: SourceError or a class below it.
    """
    config = source.config
    item = 4 if dtype == "float32" else 2
    n_positions = n_ctx * n_sequences
    kept = n_positions * item * config.hidden_size * config.altup_num_inputs * (config.num_hidden_layers + 1)
    widths = LAYER_WIDTHS * config.hidden_size + FFN_WIDTHS * max(config.intermediate_size)
    layer = n_positions * item * widths + 4 * config.num_attention_heads * n_sequences * n_ctx**2 * item
    chunks = 4 * (HEAD_COPIES * HEAD_VALUES + ROW_COPIES * ROW_VALUES)
    extra = kept + layer + chunks
    model = reference_need(source, dtype, n_ctx)
    others = [Alternative(f"--dtype {other}") for other in ("bfloat16",) if dtype != other]
    others += [Alternative("a smaller --batch or --ctx")] if n_sequences > 1 else []
    return ModelNeed(f"the reference and its gradients in {dtype}", model.n_bytes + extra, tuple(others))


LAYER_WIDTHS, FFN_WIDTHS = 40, 8
"""Activations of one layer that are in memory together, in hidden widths and in FFN widths."""
HEAD_COPIES, ROW_COPIES = 6, 24
"""Of the logits and of the gradients of weights, with the candidates that those are held against."""


@contextmanager
def _recomputed(text: Any) -> Iterator[None]:
    """The model with layers that keep their inputs alone and are computed again on the way back; weights are fixed."""
    from torch.utils.checkpoint import checkpoint

    wanted = [weight for weight in text.parameters() if weight.requires_grad]
    for weight in wanted:
        weight.requires_grad_(False)
    for layer in text.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in text.layers:
            del layer.forward
        for weight in wanted:
            weight.requires_grad_()


@contextmanager
def _watched(text: Any, to: Listener) -> Iterator[None]:
    """The layers' matrices that are quantized telling of their gradients."""
    import torch

    class Product(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
        """x W^T, which tells of its gradient by W on the way back and never holds it."""

        @staticmethod
        def forward(context: Any, x: Any, weight: Any, tell: Any) -> Any:
            context.save_for_backward(x, weight)
            context.tell = tell
            return x @ weight.T

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            x, weight = context.saved_tensors
            context.tell(x, gradient)
            return gradient @ weight, None, None

    modules = dict(text.named_modules())
    changed = []
    for rule, bid in written_order(text.config.num_hidden_layers):
        if bid is None or rule.storage is not Storage.QUANTIZABLE:
            continue
        module = modules.get(rule.source.format(bid=bid).removesuffix(".weight"))
        if module is None:  # keys and values of KV-shared layers
            continue
        module.forward = _product(Product, module, rule.name(bid), to)
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _product(product: Any, module: Any, name: str, to: Listener) -> Callable[[Any], Any]:
    def tell(x: Any, gradient: Any) -> None:
        _tell_rows(name, x, gradient, 0, to)

    return lambda x: product.apply(x, module.weight, tell)


def _tell_rows(name: str, x: Any, gradient: Any, first: int, to: Listener) -> None:
    """Gradients of a matrix's rows from what went in and the gradient of what came out, some rows at a time.

    Shapes: x [n_sequences, n_positions, n_per_row], gradient [n_sequences, n_positions, n_rows].
    """
    import torch

    n_sequences, _, n_per_row = x.shape
    step = max(1, ROW_VALUES // (n_sequences * n_per_row))
    x = x.float()
    for start in range(0, gradient.shape[2], step):
        some = gradient[:, :, start : start + step].float()
        values = torch.bmm(some.transpose(1, 2), x).cpu().numpy()
        rows = np.arange(first + start, first + start + some.shape[2])
        to.gradients(name, slice(0, n_sequences), rows, values)


def _gathered(name: str, ids: Any, gradient: Any, to: Listener) -> None:
    """Gradients of a table's rows from those of what was gathered. Shapes: [n_sequences, n_positions, n_per_row]."""
    import torch

    for number, (own, values) in enumerate(zip(ids, gradient, strict=True)):
        rows, places = torch.unique(own, return_inverse=True)
        sums = torch.zeros(len(rows), values.shape[1], device=values.device).index_add_(0, places, values)
        to.gradients(name, slice(number, number + 1), rows.cpu().numpy(), sums[None].cpu().numpy())
    to.uses(name, gradient.square().sum(1).double().cpu().numpy())


def _head(reference: Reference, hidden: Any, ids: Any, seeds: Sequence[int], to: Listener) -> tuple[float, Any]:
    """Draws labels and tells of the output matrix's gradient.

    Shapes: hidden [n_sequences, n_positions, hidden_size]; the gradient by it likewise, in float32.

    Returns: what `run_backward` does, and that gradient.
    """
    import torch

    n_sequences, n_positions, width = hidden.shape
    x = hidden.float().reshape(-1, width)
    weight, cap = reference.model.lm_head.weight, reference.model.config.final_logit_softcapping
    step = max(1, HEAD_VALUES // len(x))
    generators = [torch.Generator(reference.device).manual_seed(seed) for seed in seeds]

    def logits(first: int) -> Any:
        raw = x @ weight[first : first + step].float().T
        return raw if cap is None else raw.div_(cap).tanh_().mul_(cap)

    following = torch.full((len(x),), -1, device=x.device)
    following.view(n_sequences, n_positions)[:, :-1] = ids[:, 1:]
    total = torch.full((len(x),), -torch.inf, device=x.device)
    best, found = total.clone(), torch.zeros_like(total)
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for first in range(0, len(weight), step):
        some = logits(first)
        total = torch.logaddexp(total, some.logsumexp(1))
        here = torch.nonzero((following >= first) & (following < first + step)).flatten()
        found[here] = some[here, following[here] - first]
        # the largest of logits with Gumbel noise is a draw from their softmax
        noise = torch.empty(n_sequences, n_positions, some.shape[1], device=x.device)
        for own, generator in zip(noise, generators, strict=True):
            own.exponential_(generator=generator)
        some -= noise.view(some.shape).log_()
        largest, place = some.max(1)
        labels = torch.where(largest > best, first + place, labels)
        best = torch.maximum(largest, best)

    gradient, spread = torch.zeros_like(x), torch.zeros_like(total)
    rows = torch.arange(len(x), device=x.device)
    for first in range(0, len(weight), step):
        some = logits(first)
        slope = 1.0 if cap is None else 1 - (some / cap).square_()
        p = (some - total[:, None]).exp_()
        spread += ((p - p * p) * slope * slope).sum(1)
        by_logit = p.neg_()
        here = (labels >= first) & (labels < first + step)
        by_logit[rows[here], labels[here] - first] += 1
        by_logit *= slope
        gradient += by_logit @ weight[first : first + step].float()
        _tell_rows(TOKEN_EMBD, x.view(hidden.shape), by_logit.view(n_sequences, n_positions, -1), first, to)
    used = (x.square() * spread[:, None]).view(hidden.shape).sum(1)
    to.uses(TOKEN_EMBD, used.double().cpu().numpy())
    loss = float((total - found)[following >= 0].double().sum())
    return loss, gradient.view(hidden.shape)
