"""The algebra of genes: exact against dense SVD, and what several tasks share."""

from __future__ import annotations

import numpy as np
import pytest

from safegene_converter.gene.consensus import (
    ESTIMATORS,
    compare,
    shared,
    shared_dense,
    sign_consensus,
)
from safegene_converter.gene.low_rank import (
    Factors,
    combine,
    inner,
    svd_of_dense,
    svd_of_factors,
    truncate,
)
from safegene_runtime.errors import GeneError


def random_factors(seed: int, rank: int, shape: tuple[int, int] = (40, 30)) -> Factors:
    random = np.random.default_rng(seed)
    return Factors(random.normal(size=(shape[0], rank)), random.normal(size=(rank, shape[1])))


def tasks(seed: int, count: int, noise: float) -> tuple[Factors, list[Factors]]:
    """A shared part, and tasks that are it plus noise of their own."""
    joint = random_factors(seed, 2)
    return joint, [
        combine([joint, random_factors(seed + 1 + t, 3)], [1.0, noise]) for t in range(count)
    ]


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_the_svd_of_a_sum_of_products_is_the_dense_one(rank: int) -> None:
    both = combine([random_factors(0, rank), random_factors(1, 4)], [1.5, -2.0])
    u, s, z = svd_of_factors(both)
    expected = svd_of_dense(both.dense())[1]
    assert np.allclose(s, expected[: len(s)], rtol=1e-12, atol=1e-12 * expected[0])
    assert np.allclose((u * s) @ z, both.dense(), rtol=0, atol=1e-12 * expected[0])
    assert np.allclose(u.T @ u, np.eye(len(s)))
    assert np.allclose(z @ z.T, np.eye(len(s)))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncation_is_the_best_approximation_and_says_what_it_keeps(rank: int) -> None:
    matrix = np.random.default_rng(0).normal(size=(20, 12))
    cut = truncate(svd_of_dense(matrix), rank=rank)
    u, s, z = np.linalg.svd(matrix)
    assert np.allclose(cut.factors.dense(), (u[:, :rank] * s[:rank]) @ z[:rank])
    assert cut.energy == pytest.approx(1 - np.sum(s[rank:] ** 2) / np.sum(s**2))
    assert cut.norm == pytest.approx(np.linalg.norm(matrix))
    assert np.allclose(np.linalg.norm(cut.factors.b, axis=0), np.linalg.norm(cut.factors.a, axis=1))


def test_a_discrepancy_of_rank_r_is_recovered_exactly() -> None:
    planted = random_factors(3, 4)
    for svd in (svd_of_factors(planted), svd_of_dense(planted.dense())):
        cut = truncate(svd, rank=4)
        assert np.allclose(cut.factors.dense(), planted.dense(), rtol=0, atol=1e-11)
        assert cut.energy == pytest.approx(1.0)


def test_energy_takes_no_more_ranks_than_it_needs() -> None:
    matrix = np.diag([3.0, 2.0, 1.0, 0.5])
    svd = svd_of_dense(matrix)
    total = 9 + 4 + 1 + 0.25
    for energy, rank in ((9 / total, 1), (9 / total + 0.01, 2), (13 / total, 2), (1.0, 4)):
        assert truncate(svd, energy=energy).rank == rank
    assert truncate(svd, rank=2, energy=1.0).rank == 2


def test_a_product_that_cancels_has_no_singular_values() -> None:
    one = random_factors(0, 3)
    cut = truncate(svd_of_factors(combine([one, one], [1.0, -1.0])), rank=8)
    assert cut.rank == 0
    assert cut.norm == 0
    nothing = Factors(np.zeros((5, 0)), np.zeros((0, 4)))
    assert truncate(svd_of_factors(nothing), rank=8).rank == 0


@pytest.mark.parametrize(("rank", "energy"), [(None, None), (0, None), (None, 0.0), (None, 1.1)])
def test_a_rank_or_an_energy_is_needed(rank: int | None, energy: float | None) -> None:
    with pytest.raises(GeneError, match="pass --rank or --energy"):
        truncate(svd_of_dense(np.eye(2)), rank, energy)


def test_the_inner_product_needs_no_dense_matrix() -> None:
    one, two = random_factors(0, 3), random_factors(1, 5)
    assert inner(one, two) == pytest.approx(np.sum(one.dense() * two.dense()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_low_rank_and_dense_estimates_agree(estimator: str) -> None:
    _, parts = tasks(5, 3, 0.5)
    found = shared(parts, estimator)
    dense = found.dense() if isinstance(found, Factors) else found
    expected = shared_dense(np.stack([part.dense() for part in parts]), estimator)
    assert np.allclose(dense, expected, rtol=0, atol=1e-10)


def test_the_mean_is_the_mean_and_one_task_is_itself() -> None:
    _, parts = tasks(2, 4, 1.0)
    found = shared(parts, "mean")
    assert isinstance(found, Factors)
    assert np.allclose(found.dense(), np.mean([part.dense() for part in parts], axis=0))
    assert shared(parts[:1], "pca") is parts[0]


def test_equal_tasks_are_their_own_consensus() -> None:
    one = random_factors(0, 2)
    for estimator in ESTIMATORS:
        found = shared([one, one, one], estimator)
        dense = found.dense() if isinstance(found, Factors) else found
        assert np.allclose(dense, one.dense(), rtol=0, atol=1e-10)


def test_sign_consensus_keeps_what_agrees() -> None:
    stack = np.array([[[1.0, -3.0, 2.0]], [[3.0, 1.0, -2.0]], [[-1.0, -1.0, 0.0]]])
    assert np.array_equal(sign_consensus(stack), [[2.0, -2.0, 0.0]])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_several_tasks_are_nearer_to_the_shared_part_than_one(estimator: str) -> None:
    joint, parts = tasks(7, 6, 0.8)

    def cosine(dense: np.ndarray) -> float:
        norms = np.linalg.norm(dense) * np.linalg.norm(joint.dense())
        return float(np.sum(dense * joint.dense()) / norms)

    found = shared(parts, estimator)
    estimate = found.dense() if isinstance(found, Factors) else found
    best_alone = max(cosine(part.dense()) for part in parts)
    assert cosine(estimate) > best_alone + (0 if estimator == "sign" else 0.1)


def test_comparison_predicts_a_task_from_the_others() -> None:
    _, alike = tasks(11, 5, 0.3)
    _, noisy = tasks(11, 5, 3.0)
    good, bad = compare(alike), compare(noisy)
    assert good.keys() == set(ESTIMATORS)
    for estimator in ESTIMATORS:
        assert 0.5 < good[estimator] <= 1
        assert bad[estimator] < 0.5 * good[estimator]
    # under equal, independent noise no estimator beats the default by much
    assert good["mean"] >= max(good.values()) - 0.02
    with pytest.raises(GeneError, match="at least 3"):
        compare(alike[:2])


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(GeneError, match="mean, pca, sign"):
        shared([random_factors(0, 1)] * 2, "median")
