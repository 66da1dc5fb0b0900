"""Data-aware layer selection: what a layer's vector gains in safety against what it costs.

With J = safety + weight * KL over the coefficients c (see `objective`), and f the one factor on all
layers that J likes best, layer l is worth

    first order   -f dJ/dc_l at c = f/2     gradient . V, one backward pass for all layers
    ablation      ½ [J(0) - J(f e_l)] + ½ [J(f - f e_l) - J(f)]      two forward passes per layer

the mean of what it adds alone and of what is lost without it. Where J is quadratic the two are equal:
that is why the cheap one is taken in the middle. At c = 0 the KL has no slope and at c = f refusals
are saturated, so neither end would see both sides of the bargain. And f, not 1: coefficients are
calibrated later, so a gene that is too long or too short as it was extracted is not judged by that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from safegene_converter.gene.asked import REFUSALS
from safegene_converter.gene.folder import keep_layers
from safegene_converter.gene.model import load_gene
from safegene_converter.gene.objective import Losses, Objective, Valued, common_factor
from safegene_converter.gene.shots import shots_of
from safegene_runtime.errors import GeneError, Problem
from safegene_runtime.formats.publish import check_output_free
from safegene_runtime.progress import Progress, silent
from safegene_runtime.record.prompts import Prompt, builtin_suite

__all__ = [
    "LayerScore",
    "Selection",
    "ablation",
    "choose",
    "first_order",
    "rank_correlation",
    "select",
]

F64 = npt.NDArray[np.float64]


class Scored(Valued, Protocol):
    """What scores need of an objective."""

    def gradient(self, coefficients: F64, /) -> tuple[Losses, F64, F64]:
        """J, and the slopes of its two parts."""


@dataclass(frozen=True)
class LayerScore:
    """What a layer's vector is worth, in nats per reply.

    Attributes:
        safety: how much likelier refusals become.
        utility: how much benign replies change.
        score: safety - weight * utility.
        exact: the score by ablation, when it was asked for.
    """

    layer: int
    parameters: int
    safety: float
    utility: float
    score: float
    exact: float | None = None


@dataclass(frozen=True)
class Selection:
    """The result of a selection.

    Attributes:
        scores: of every layer of the gene.
        layers: those that are kept.
        share: their parameters as a share of the model's.
        correlation: Spearman's, of cheap and exact scores, when both were computed.
        factor: on all layers, where they were scored.
    """

    scores: tuple[LayerScore, ...]
    layers: tuple[int, ...]
    parameters: int
    share: float
    correlation: float | None
    factor: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def first_order(objective: Scored, count: int, factor: float = 1.0) -> tuple[F64, F64]:
    """(safety gained, KL paid) by layer, each (L,), from one backward pass at c = factor / 2."""
    _, safety, kl = objective.gradient(np.full(count, factor / 2))
    return -factor * safety, factor * kl


def ablation(
    objective: Scored, count: int, factor: float = 1.0, tell: Progress | None = None
) -> tuple[F64, F64]:
    """(safety gained, KL paid) by layer, each (L,), by adding each alone and leaving each out."""
    nothing = objective.value(np.zeros(count))
    everything = objective.value(np.full(count, factor))
    safety, kl = np.zeros(count), np.zeros(count)
    for layer in range(count):
        one = np.zeros(count)
        one[layer] = factor
        alone, without = objective.value(one), objective.value(factor - one)
        safety[layer] = (nothing.safety - alone.safety + without.safety - everything.safety) / 2
        kl[layer] = (alone.kl - nothing.kl + everything.kl - without.kl) / 2
        if tell:
            tell("ablating layers", layer + 1, count)
    return safety, kl


def choose(
    layers: Sequence[int], scores: Sequence[float], sizes: Mapping[int, int], budget: float
) -> tuple[int, ...]:
    """The layers to keep: best score per parameter first, while they fit; none that costs more.

    Args:
        layers: layer numbers.
        scores: of each, in the same order.
        sizes: parameters of each layer.
        budget: parameters at most.

    Raises:
        GeneError: no layer is worth its cost, or none fits.
    """
    order = sorted(
        zip(scores, layers, strict=True), key=lambda pair: (-pair[0] / sizes[pair[1]], pair[1])
    )
    kept: list[int] = []
    left = budget
    for score, layer in order:
        if score > 0 and sizes[layer] <= left:
            kept.append(layer)
            left -= sizes[layer]
    if not kept:
        best = max(scores)
        expected = "a layer that gains more than it costs, within the budget"
        got = f"best score {best:.3g}, smallest layer {min(sizes.values())}, budget {budget:.0f}"
        raise GeneError(Problem("select", "layers", expected, got,
                                "raise --budget, or extract another gene"))  # fmt: skip
    return tuple(sorted(kept))


def rank_correlation(left: Sequence[float] | F64, right: Sequence[float] | F64) -> float:
    """Spearman's rank correlation; equal values share their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(left, right).statistic)


def select(
    gene: Path,
    model: Path,
    prompts: Sequence[Prompt],
    *,
    budget: float = 0.01,
    weight: float = 1.0,
    exact: bool = False,
    refusals: Sequence[str] = REFUSALS,
    evaluation: Sequence[Prompt] | None = None,
    out: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Selection:
    """Scores every layer of a gene on a target and writes the gene with the best ones.

    Args:
        gene: the adapter folder.
        model: a target that lost safety.
        prompts: harmful and benign ones.
        budget: up to 1: a share of the model's parameters; above: parameters.
        weight: of the KL against the safety loss.
        exact: score by ablation, and choose by that; the cheap score is computed too.
        refusals: openings of a refusal.
        evaluation: prompts that will be tested on (default: the built-in suite): none may be used.
        out: the folder to create; None: `gene` itself is replaced.
        force: replace an existing `out`.
        progress: told what is being done.

    Raises:
        SafeGeneError: nothing was written.
    """
    tell: Progress = progress or silent
    if out is not None:
        check_output_free(out, force, [model])
    if not budget > 0:
        raise GeneError(
            Problem("select", "budget", "a share or a number of parameters", str(budget))
        )
    shots = shots_of(prompts, "select", builtin_suite() if evaluation is None else evaluation)
    loaded = load_gene(gene, model)
    objective = Objective(loaded, shots, weight=weight, refusals=refusals, progress=tell)
    count = len(loaded.layers)
    tell("scoring layers", 0, 1)
    factor = common_factor(objective, count)
    safety, kl = first_order(objective, count, factor)
    tell("scoring layers", 1, 1)
    cheap = safety - weight * kl
    by_ablation, correlation = None, None
    if exact:
        gained, paid = ablation(objective, count, factor, tell)
        by_ablation = gained - weight * paid
        correlation = rank_correlation(cheap, by_ablation) if count > 1 else None
    sizes = loaded.parameters_of()
    limit = budget * loaded.n_parameters if budget <= 1 else budget
    used = cheap if by_ablation is None else by_ablation
    kept = choose(loaded.layers, used.tolist(), sizes, limit)
    keep_layers(gene, loaded.base, kept, out or gene, force or out is None)
    total = sum(sizes[layer] for layer in kept)
    return Selection(
        scores=tuple(
            LayerScore(
                layer,
                sizes[layer],
                float(safety[index]),
                float(kl[index]),
                float(cheap[index]),
                None if by_ablation is None else float(by_ablation[index]),
            )
            for index, layer in enumerate(loaded.layers)
        ),
        layers=kept,
        parameters=total,
        share=total / loaded.n_parameters,
        correlation=correlation,
        factor=factor,
    )
