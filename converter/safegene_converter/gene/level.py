"""At least as safe as a given model: how far calibration goes where weight 1 does not get there.

    refused(c) >= level,         refused(c) = mean P_c(refusal | x) over harmful shots

J with a fixed weight decides beforehand what a refusal may cost; how much that buys differs by fine-tune.
Here the weight is 1, and falls where the level is not reached. Each minimum of J is the best there is for
its weight; between the last two, on the straight line, is the point that just reaches the level.
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

WEIGHTS = (1.0, 0.25, 0.0625, 0.0)
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


def reach(objective: Valued, minimum: Callable[[float, F64 | None], F64], level: float) -> F64:
    """Coefficients (L,) that reach a level; those of the smallest weight where none does.

    Args:
        objective: of the target.
        minimum: (weight, (L,) the last minimum or None) -> (L,), where J with this weight is least.
        level: of `refused`, in [0, 1].
    """
    below, found = None, minimum(WEIGHTS[0], None)
    for weight in WEIGHTS[1:]:
        if objective.value(found).refused >= level:
            break
        below, found = found, minimum(weight, found)
    if below is None or objective.value(found).refused < level:
        return found
    for _ in range(BISECTIONS):
        middle = (below + found) / 2
        if objective.value(middle).refused >= level:
            found = middle
        else:
            below = middle
    return found
