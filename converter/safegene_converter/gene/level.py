"""As safe as a given model, and no further: the least change that makes a target refuse as that one does.

    least kl(c) such that refused(c) >= level,     refused(c) = mean P_c(refusal | x) over harmful shots

J with a fixed weight decides beforehand what a refusal may cost; how much that buys differs by fine-tune.
Here the weight falls until the level is reached. Each minimum of J is the best there is for its weight;
between the last two, on the straight line, is the point that just reaches the level.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safegene_converter.gene.model import load_gene
from safegene_converter.gene.objective import Objective, Valued
from safegene_converter.gene.shots import Shots

__all__ = ["WEIGHTS", "level_of", "reach"]

WEIGHTS = (4.0, 1.0, 0.25, 0.0625, 0.0)
"""The last one asks for refusals only."""
BISECTIONS = 6

F64 = npt.NDArray[np.float64]


def level_of(
    gene: Path, aligned: Path, harmful: tuple[str, ...], refusals: tuple[str, ...]
) -> float:
    """The mean probability with which a model refuses, without the gene.

    Raises:
        SafeGeneError: the model cannot be read, or is not one that the gene fits.
    """
    loaded = load_gene(gene, aligned)
    objective = Objective(loaded, Shots(harmful, ()), refusals=refusals)
    with loaded.without_gene():
        return objective.value(np.ones(len(loaded.layers))).refused


def reach(
    objective: Valued, minimum: Callable[[float, F64 | None], F64], level: float, low: F64
) -> F64:
    """Coefficients (L,) that just reach a level; those of the smallest weight where none does.

    Args:
        objective: of the target.
        minimum: (weight, (L,) the last minimum or None) -> (L,), where J with this weight is least.
        level: of `refused`, in [0, 1].
        low: (L,) the lower bounds.
    """
    below, found = low, None
    for weight in WEIGHTS:
        found = minimum(weight, found)
        if objective.value(found).refused >= level:
            break
        below = found
    else:
        return below
    for _ in range(BISECTIONS):
        middle = (below + found) / 2
        if objective.value(middle).refused >= level:
            found = middle
        else:
            below = middle
    return found
