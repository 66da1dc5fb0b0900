"""What several degraded models have in common: the lost safety, without what each task taught.

D_t = W_aligned - W_degraded,t = S + N_t: a part S that every fine-tune lost, and task noise N_t.

    mean   1/T sum_t D_t. Unbiased for S; noise that tasks do not share falls with 1/T
    pca    the leading direction of the stacked vec(D_t), uncentred, at the tasks' mean length along
           it. A linear combination too; large tasks weigh more
    sign   the mean of the entries that agree with the sign of the entry's sum, zeros elsewhere
           (TIES-merging, arXiv 2306.01708). Not linear: it needs the dense matrices

`mean` is the default: it and `pca` stay inside the low-rank algebra, `mean` prefers no task for
being large, and the truncation that follows keeps directions that add up over tasks. `compare` says
what each is worth on data at hand, without a ground truth: it predicts a task from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from safegene_converter.gene.low_rank import Factors, combine, inner
from safegene_runtime.errors import GeneError, Problem

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "compare",
    "shared",
    "shared_dense",
    "sign_consensus",
    "weights_of",
]

Estimator = Literal["mean", "pca", "sign"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)

F64 = npt.NDArray[np.float64]


def weights_of(estimator: str, gram: F64) -> F64:
    """The weight of each task in a linear estimator, (T,).

    Args:
        estimator: `mean` or `pca`.
        gram: (T, T), <D_i, D_j> over whatever is to be estimated together.
    """
    count = len(gram)
    if estimator == "mean":
        return np.full(count, 1 / count)
    direction = np.linalg.eigh(gram)[1][:, -1]
    direction = direction * (1.0 if direction.sum() >= 0 else -1.0)
    weights: F64 = direction * direction.mean()  # the mean projection on the leading direction
    return weights


def sign_consensus(stack: F64) -> F64:
    """(T, out, in) -> (out, in): the mean of the entries that have the elected sign."""
    elected = np.sign(stack.sum(axis=0))
    agrees = (np.sign(stack) == elected) & (elected != 0)
    total: F64 = np.where(agrees, stack, 0.0).sum(axis=0)
    mean: F64 = total / np.maximum(agrees.sum(axis=0), 1)
    return mean


def shared(parts: Sequence[Factors], estimator: str) -> Factors | F64:
    """The shared part of one module: factors for linear estimators, dense (out, in) for `sign`.

    Raises:
        GeneError: an unknown estimator.
    """
    _check(estimator)
    if len(parts) == 1:
        return parts[0]
    if estimator == "sign":
        return sign_consensus(np.stack([part.dense() for part in parts]))
    gram = np.array([[inner(left, right) for right in parts] for left in parts])
    return combine(parts, weights_of(estimator, gram).tolist())


def shared_dense(stack: F64, estimator: str) -> F64:
    """The shared part of one module from dense matrices: (T, out, in) -> (out, in).

    Raises:
        GeneError: an unknown estimator.
    """
    _check(estimator)
    if estimator == "sign":
        return sign_consensus(stack)
    flat = stack.reshape(len(stack), -1)
    mixed: F64 = np.tensordot(weights_of(estimator, flat @ flat.T), stack, axes=1)
    return mixed


def compare(parts: Sequence[Factors]) -> dict[str, float]:
    """How much of a task each estimator predicts from the others, over all tasks of one module.

    The share of ||D_t||^2 along the estimate: cos^2(D_t, estimate from the others), so that its
    length does not matter, which calibration sets anyway; negative where it points away.

    Raises:
        GeneError: fewer than three tasks: from one other, all estimators are the same.
    """
    if len(parts) < 3:
        raise GeneError(
            Problem("compare", "degraded models", "at least 3", str(len(parts)),
                    "from one other task every estimator says the same")
        )  # fmt: skip
    found = {}
    for estimator in ESTIMATORS:
        shares = []
        for index, held_out in enumerate(parts):
            others = [part for at, part in enumerate(parts) if at != index]
            estimate = shared(others, estimator)
            if isinstance(estimate, Factors):
                product, norm = inner(held_out, estimate), inner(estimate, estimate)
            else:
                product = float((held_out.b * (estimate @ held_out.a.T)).sum())
                norm = float((estimate**2).sum())
            squares = inner(held_out, held_out) * norm
            shares.append(product * abs(product) / squares if squares else 0.0)
        found[estimator] = float(np.mean(shares))
    return found


def _check(estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise GeneError(
            Problem("extract", "estimator", f"one of {', '.join(ESTIMATORS)}", repr(estimator))
        )
