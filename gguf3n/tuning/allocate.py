"""The recipe of the least expected divergence that a budget of bytes allows, with a reason for each tensor."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gguf3n.conversion import plan_all
from gguf3n.errors import UsageError
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import QType, aligned, tensor_bytes
from gguf3n.formats.imatrix import ImportanceMatrix
from gguf3n.formats.sensitivity import Sensitivity
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.mapping import MappedTensor, Storage
from gguf3n.gemma3n.part import Part
from gguf3n.planning import Plan, make_plan
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, PLE_TYPES, Recipe, Rule
from gguf3n.recipes.model import UNEVALUATED_SUBSTITUTE
from gguf3n.tuning.budget import Budget
from gguf3n.tuning.costs import Costs, costs_of
from gguf3n.tuning.knapsack import Packing, pack
from gguf3n.tuning.measure import weights_hash
from gguf3n.validation.fingerprint import model_fingerprint

ENGINES = ("llama.cpp", "ollama-old")
"""What the file is for; the second is Ollama's own engine, before version 0.30, which reads the per-layer table only in
types whose rows every backend gathers (PLE_TYPES)."""

REPACKED: Mapping[QType, str] = {
    QType.Q4_0: "AVX2, NEON",
    QType.IQ4_NL: "AVX2, NEON",
    QType.Q4_K: "AVX2, NEON",
    QType.Q2_K: "AVX-512",
    QType.Q5_K: "NEON",
    QType.Q6_K: "NEON",
    QType.Q8_0: "NEON",
}
"""Types whose rows llama.cpp interleaves when it loads them, for CPUs with these instructions: reading a prompt is up
to several times as fast then. Source: ggml_repack_get_optimal_repack_type in ggml/src/ggml-cpu/repack.cpp."""

MB = 1e6


@dataclass(frozen=True)
class TypeLimits:
    """What a recipe may use.

    `types`: some of those that were measured, or all. `any_table_type`: also types of the per-layer table whose rows
    only CPUs gather. `fast_cpu`: only REPACKED types for what is multiplied.
    """

    types: tuple[QType, ...] = ()
    any_table_type: bool = False
    fast_cpu: bool = False


@dataclass(frozen=True)
class Choice:
    """A type that a tensor can have. Units: bytes of the file; nats a token."""

    qtype: QType
    n_bytes: int
    cost: float


@dataclass(frozen=True)
class Tuned:
    """A recipe and what is known of it. `divergence` is the sum of its tensors' costs; none is below `bound`."""

    recipe: Recipe
    plan: Plan
    budget: Budget
    divergence: float
    bound: float
    is_exact: bool


class Tuning:
    """A model, what was measured of it and what is allowed: recipes for any budget.

    Args:
        importance: what the file will be quantized with; as when it was measured.

    Raises: UsageError: sensitivities of another model or with other importances, or types that leave a tensor without
        any; QuantizationError; SourceError or a class below it.
    """

    def __init__(
        self,
        part: Part,
        sensitivity: Sensitivity,
        limits: TypeLimits,
        imatrix: ImportanceMatrix | None = None,
    ) -> None:
        self.part = part
        self.sensitivity = sensitivity
        check_fits(sensitivity, part, imatrix)
        self.costs: Costs = costs_of(sensitivity)
        self.importance = None if imatrix is None else match_importance(imatrix, part)
        covered = set() if self.importance is None else self.importance.quant_weights.keys()
        self.choices = {
            tensor.name: _choices(tensor, self.costs[tensor.name], limits, has_weights=tensor.name in covered)
            for tensor in part.tensors
            if tensor.name in self.costs
        }
        lightest = self._recipe(
            {name: min(choices, key=lambda choice: choice.n_bytes) for name, choices in self.choices.items()}
        )
        (plan,) = plan_all(part, [lightest], imatrix)
        self.unfit_for_f16 = {
            tensor.source.name
            for tensor in plan.tensors
            if tensor.source.storage is Storage.HALF and tensor.slot.qtype is not QType.F16
        }
        self.least_bytes = plan.total_bytes
        self.fixed_bytes = plan.total_bytes - sum(
            min(choice.n_bytes for choice in choices) for choices in self.choices.values()
        )
        """Of a file whatever the types: its header and all that is not chosen here."""
        self.overhead_bytes = plan.total_bytes - sum(tensor.slot.n_bytes for tensor in plan.tensors)
        """Of a file that are no tensor data."""

    @property
    def most_bytes(self) -> int:
        """Of the file that costs the least whatever its size."""
        best = (min(choices, key=lambda choice: (choice.cost, choice.n_bytes)) for choices in self.choices.values())
        return self.fixed_bytes + sum(choice.n_bytes for choice in best)

    def plan(self, recipe: Recipe) -> Plan:
        """Of the file that a recipe makes of this model. Raises: as `make_plan`."""
        return make_plan(self.part, recipe, self.importance, self.unfit_for_f16)

    def divergence(self, plan: Plan) -> float | None:
        """What a file of this model costs; None where one of its types was not measured."""
        types = {tensor.source.name: tensor.slot.qtype for tensor in plan.tensors}
        found = [self.costs[name].get(types[name]) for name in self.choices]
        return None if None in found else sum(cost for cost in found if cost is not None)

    def pack(self, budget: Budget) -> Packing:
        """The best choice within a budget. Raises: UsageError where nothing fits."""
        groups = list(self.choices.values())
        if budget.n_bytes < self.least_bytes:
            raise UsageError(
                f"{budget.said}: no file of this model is so small",
                expected=f"at least {self.least_bytes:,} bytes, which is the least with these types",
                found=f"{budget.n_bytes:,} bytes",
                fix="allow more bytes, or smaller types with --types",
            )
        return pack(
            [[choice.n_bytes for choice in choices] for choices in groups],
            [[choice.cost for choice in choices] for choices in groups],
            budget.n_bytes - self.fixed_bytes,
        )

    def tune(self, budget: Budget, name: str) -> Tuned:
        """The recipe for a budget. Raises: as `pack`."""
        packing = self.pack(budget)
        chosen = {
            tensor: choices[number]
            for (tensor, choices), number in zip(self.choices.items(), packing.chosen, strict=True)
        }
        recipe = self._recipe(chosen, name)
        plan = self.plan(recipe)
        assert plan.total_bytes == self.fixed_bytes + packing.weight <= budget.n_bytes
        said = f"expected KL divergence {packing.cost:.3g} nats a token in {plan.total_bytes:,} bytes"
        recipe = replace(
            recipe,
            summary=f"The least {said}: tuned for {budget.said}.",
            evidence=(said, self._proof(packing), *self._evidence()),
        )
        return Tuned(recipe, replace(plan, recipe=recipe), budget, packing.cost, packing.bound, packing.is_exact)

    def _recipe(self, chosen: Mapping[str, Choice], name: str = "tuned") -> Recipe:
        base = Counter(choice.qtype for choice in chosen.values()).most_common(1)[0][0]
        total = sum(choice.cost for choice in chosen.values())
        rules = tuple(
            Rule((tensor,), choice.qtype, self._reason(tensor, choice, total), place=f"rule {number}", strict=True)
            for number, (tensor, choice) in enumerate(chosen.items(), 1)
        )
        n_layers = 1 + max(tensor.bid for tensor in self.part.tensors if tensor.bid is not None)
        return Recipe(name, base, GGML_TYPES[base].ftype, rules, unevaluated=UNEVALUATED_SUBSTITUTE, n_layers=n_layers)

    def _reason(self, tensor: str, choice: Choice, total: float) -> str:
        """What the type costs, and what the next heavier and lighter would."""
        choices = self.choices[tensor]
        place = choices.index(choice)
        share = choice.cost / total if total else 0.0
        parts = [f"costs KL {choice.cost:.2g}, {share:.1%} of all"]
        for other, more in ((place + 1, "more"), (place - 1, "less")):
            if 0 <= other < len(choices):
                then = choices[other]
                apart = abs(then.n_bytes - choice.n_bytes) / MB
                parts.append(f"{then.qtype.name} {then.cost:.2g} for {apart:.3g} MB {more}")
        return "; ".join(parts)

    def _proof(self, packing: Packing) -> str:
        if packing.is_exact:
            return "no other choice among the measured types has less, by the measured costs"
        return f"no other choice among the measured types has less than {packing.bound:.3g}, by the measured costs"

    def _evidence(self) -> list[str]:
        """What the costs were measured on."""
        found = self.sensitivity
        spans = ", ".join(f"{first} to {first + n_chunks - 1}" for first, n_chunks in found.spans)
        lines = [f"costs by gguf3n sensitivity: {found.n_chunks} chunks of {found.ctx} tokens, {spans}, "
                 f"seed {found.seed}, {', '.join(found.engines)}"]  # fmt: skip
        lines += [f"text {text.name}: sha256 {text.sha256}" for text in found.texts]
        if found.imatrix is not None:
            lines.append(f"importances {found.imatrix.name}: sha256 {found.imatrix.sha256}")
        figures = hashlib.sha256(repr(sorted(self.costs.items())).encode()).hexdigest()
        return [*lines, f"costs: sha256 {figures}", f"model {found.model}: fingerprint {found.fingerprint}"]


def check_fits(sensitivity: Sensitivity, part: Part, imatrix: ImportanceMatrix | None) -> None:
    """Refuse what was measured of another model, or with other importances. Raises: UsageError."""
    again = "measure this model with gguf3n sensitivity"
    wanted = {tensor.name: tensor.shape for tensor in _chosen(part)}
    found = {name: tensor.shape for name, tensor in sensitivity.tensors.items()}
    if wanted != found or sensitivity.fingerprint != model_fingerprint(part):
        raise UsageError(
            f"{sensitivity.path}: measured of another model", expected=part.source.name, found=sensitivity.model,
            fix=again,
        )  # fmt: skip
    given = None if imatrix is None else weights_hash(match_importance(imatrix, part).quant_weights)
    measured = None if sensitivity.imatrix is None else sensitivity.imatrix.sha256
    if given != measured:
        raise UsageError(
            f"{sensitivity.path}: measured with other importances than --imatrix",
            expected="no --imatrix" if sensitivity.imatrix is None else f"--imatrix {sensitivity.imatrix.name}",
            found="none" if imatrix is None else str(imatrix.path),
            fix=f"give that one, or {again} --imatrix",
        )


def _chosen(part: Part) -> list[MappedTensor]:
    """The tensors whose types are chosen here."""
    return [tensor for tensor in part.tensors if tensor.storage is Storage.QUANTIZABLE and tensor.evaluated]


def _choices(
    tensor: MappedTensor, costs: Mapping[QType, float], limits: TypeLimits, *, has_weights: bool
) -> list[Choice]:
    """What a tensor may be, the lightest first; without what a lighter one beats.

    Raises: UsageError where nothing is left.
    """
    is_table = tensor.name == PER_LAYER_TOKEN_EMBD
    allowed = [
        qtype
        for qtype in costs
        if (not limits.types or qtype in limits.types)
        and (is_table or not limits.fast_cpu or qtype in REPACKED)
        and (not is_table or limits.any_table_type or qtype in PLE_TYPES)
        and (has_weights or not GGML_TYPES[qtype].needs_importances)
    ]
    if not allowed:
        gathered = f"; of this table only {', '.join(q.name for q in PLE_TYPES)}, unless --any-table-type is given"
        raise UsageError(
            f"{tensor.name}: no type is left",
            expected=f"one of {', '.join(qtype.name for qtype in costs)}" + (gathered if is_table else ""),
            found=", ".join(qtype.name for qtype in limits.types) or "all that were measured",
            fix="allow more with --types, or measure more with gguf3n sensitivity --types",
        )
    sized = [Choice(qtype, aligned(tensor_bytes(qtype, tensor.shape)), costs[qtype]) for qtype in allowed]
    kept: list[Choice] = []
    for choice in sorted(sized, key=lambda choice: (choice.n_bytes, choice.cost)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    return kept


def check_engine(engine: str, limits: TypeLimits) -> None:
    """Refuse what an engine does not read. Raises: UsageError."""
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: unknown", expected=" or ".join(ENGINES), found=engine)
    if engine != ENGINES[0] and limits.any_table_type:
        raise UsageError(
            f"--any-table-type with --engine {engine}, which reads the per-layer table in few types",
            expected=f"one of {', '.join(qtype.name for qtype in PLE_TYPES)}",
            fix="leave one of them out",
        )
