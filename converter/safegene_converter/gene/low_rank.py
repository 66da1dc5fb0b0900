"""Low-rank algebra: V = B·A is never formed when its factors are known.

A sum of products is a product of concatenations, and its singular values are those of a small core:

    sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...] = B A
    B = Q_b R_b,  A^T = Q_a R_a,  R_b R_a^T = U S Z^T  =>  B A = (Q_b U) S (Q_a Z)^T

exact up to rounding, in float64, at O((out + in) k^2) for k columns in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import GeneError, Problem

__all__ = ["Factors", "Truncated", "combine", "inner", "svd_of_dense", "svd_of_factors", "truncate"]

F64 = npt.NDArray[np.float64]
ZERO = 1e-12
"""A singular value below this share of its parts is what rounding left of a zero."""


@dataclass(frozen=True)
class Factors:
    """V = b @ a; `b` is (out, k), `a` is (k, in), float64; k may be 0."""

    b: F64
    a: F64

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of V."""
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> F64:
        """V, (out, in)."""
        product: F64 = self.b @ self.a
        return product


@dataclass(frozen=True)
class Truncated:
    """The leading part of a matrix.

    Attributes:
        factors: balanced, sqrt(S) on either side, so that both store equally well in 16 bits; rank
            0 when the matrix is zero.
        energy: share of the squared singular values that is kept.
        norm: Frobenius norm of the whole matrix.
    """

    factors: Factors
    energy: float
    norm: float

    @property
    def rank(self) -> int:
        """How many singular values are kept."""
        return int(self.factors.a.shape[0])


def combine(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """sum_i w_i V_i as factors: (out, sum of k), (sum of k, in)."""
    return Factors(
        np.concatenate([weight * part.b for part, weight in zip(parts, weights, strict=True)], 1),
        np.concatenate([part.a for part in parts], 0),
    )


def inner(left: Factors, right: Factors) -> float:
    """<V, W> = trace(V^T W), through the (k, k) cores."""
    return float(np.sum((left.b.T @ right.b) * (left.a @ right.a.T)))


def svd_of_factors(factors: Factors) -> tuple[F64, F64, F64]:
    """Thin SVD (out, k), (k,), (k, in) of a product, without the product."""
    q_b, r_b = np.linalg.qr(factors.b)
    q_a, r_a = np.linalg.qr(factors.a.T)
    u, s, z = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    scale = float(np.linalg.norm(r_b) * np.linalg.norm(r_a))
    return q_b @ u, np.where(s > ZERO * scale, s, 0.0), z @ q_a.T


def svd_of_dense(matrix: npt.NDArray[np.floating]) -> tuple[F64, F64, F64]:
    """Thin SVD (out, k), (k,), (k, in) in float64."""
    u, s, z = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return u, s, z


def truncate(
    svd: tuple[F64, F64, F64], rank: int | None = None, energy: float | None = None
) -> Truncated:
    """Keeps the leading singular values: at most `rank`, and no more than `energy` asks for.

    Args:
        svd: (out, k), (k,) descending, (k, in).
        rank: the largest rank; None: whatever `energy` takes.
        energy: the share of the squared singular values to keep; None: all that `rank` allows.

    Raises:
        GeneError: neither is given, or one is out of range.
    """
    u, s, z = svd
    if rank is None and energy is None:
        raise _wrong("rank or energy", "one of them", "neither")
    if rank is not None and rank < 1:
        raise _wrong("rank", "at least 1", str(rank))
    if energy is not None and not 0 < energy <= 1:
        raise _wrong("energy", "a share in (0, 1]", str(energy))
    squares = s**2
    total = float(squares.sum())
    count = int((s > 0).sum())
    if energy is not None and total:
        enough = np.cumsum(squares) >= energy * total * (1 - ZERO)
        count = min(count, int(np.argmax(enough)) + 1)
    if rank is not None:
        count = min(count, rank)
    root = np.sqrt(s[:count])
    return Truncated(
        Factors(u[:, :count] * root, root[:, None] * z[:count]),
        float(squares[:count].sum()) / total if total else 1.0,
        float(np.sqrt(total)),
    )


def _wrong(field: str, expected: str, got: str) -> GeneError:
    return GeneError(Problem("extract", field, expected, got, "pass --rank or --energy"))
