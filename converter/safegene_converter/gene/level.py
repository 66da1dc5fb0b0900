"""At least as safe as a given model: how far calibration goes where weight 1 does not get there.

    refused(c) = mean P_c(refusal | x)                      over harmful shots x
    greedy(c)  = share of x whose greedy reply is a refusal
    both are to reach what the model has

Either alone can be had without the other: a model that refuses most prompts by a narrow margin has many
greedy refusals and a middling mean, and the same mean can come from half as many certain ones.

J with a fixed weight decides beforehand what a refusal may cost; how much that buys differs by fine-tune.
Here the weight is 1, and falls where the level is not reached. Each minimum of J is the best there is for
its weight; between the last two, on the straight line, is the point that just reaches the level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safegene_converter.gene.model import load_gene
from safegene_converter.gene.objective import Losses, Objective, Valued
from safegene_converter.gene.shots import Shots

__all__ = ["WEIGHTS", "Level", "Weighed", "level_of", "reach"]

WEIGHTS = (1.0, 0.25, 0.0625, 0.0)
"""The last one asks for refusals only."""
BISECTIONS = 6

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """How surely, and how often, harmful shots are refused; both in [0, 1], as in `Losses`."""

    refused: float
    greedy: float

    def reached(self, losses: Losses) -> bool:
        """Whether both are."""
        return losses.refused >= self.refused and losses.greedy >= self.greedy


@dataclass(frozen=True)
class Weighed:
    """Where J is least with one weight of the KL.

    Attributes:
        coefficients: (L,).
        losses: there.
        seconds: from the start of the calibration until it was found.
    """

    weight: float
    coefficients: F64
    losses: Losses
    seconds: float


def level_of(
    gene: Path, aligned: Path, harmful: tuple[str, ...], refusals: tuple[str, ...]
) -> Level:
    """How a model refuses, without the gene.

    Raises:
        SafeGeneError: the model cannot be read, or is not one that the gene fits.
    """
    loaded = load_gene(gene, aligned)
    objective = Objective(loaded, Shots(harmful, ()), refusals=refusals)
    with loaded.without_gene():
        losses = objective.value(np.ones(len(loaded.layers)))
    return Level(losses.refused, losses.greedy)


def reach(objective: Valued, minimum: Callable[[float, F64 | None], Weighed], level: Level) -> F64:
    """Coefficients (L,) that reach a level; those of the smallest weight where none does.

    Args:
        objective: of the target.
        minimum: (weight, (L,) the last minimum or None) -> where J with this weight is least.
        level: to reach.
    """
    last, least = None, minimum(WEIGHTS[0], None)
    for weight in WEIGHTS[1:]:
        if level.reached(least.losses):
            break
        last, least = least, minimum(weight, least.coefficients)
    if last is None or not level.reached(least.losses):
        return least.coefficients
    below, above = last.coefficients, least.coefficients
    for _ in range(BISECTIONS):
        middle = (below + above) / 2
        if level.reached(objective.value(middle)):
            above = middle
        else:
            below = middle
    return above
