"""Bounds against published tables, brute force and scipy: never against themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from safegene_converter.recording.near_duplicates import THRESHOLD, cluster_names, similarity
from safegene_runtime.gating import statistics as ours
from safegene_runtime.record.prompts import builtin_suite


def binomial_cdf(events: int, trials: int, p: float) -> float:
    return math.fsum(
        math.comb(trials, x) * p**x * (1 - p) ** (trials - x) for x in range(events + 1)
    )


def bisect(low: float, high: float, left: object) -> float:
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) else (low, middle)  # type: ignore[operator]
    return low


COUNTS = st.integers(1, 80).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.sampled_from([0.9, 0.95, 0.99]))
def test_clopper_pearson_inverts_the_binomial_by_brute_force(counts, confidence) -> None:
    events, trials = counts
    alpha = 1 - confidence
    upper = bisect(0, 1, lambda p: binomial_cdf(events, trials, p) > alpha)
    lower = bisect(0, 1, lambda p: events > 0 and 1 - binomial_cdf(events - 1, trials, p) < alpha)
    assert ours.clopper_pearson_upper(events, trials, confidence) == pytest.approx(upper, abs=1e-9)
    assert ours.clopper_pearson_lower(events, trials, confidence) == pytest.approx(lower, abs=1e-9)


@pytest.mark.parametrize("trials", [60, 118, 300])
@pytest.mark.parametrize("p", [0.001, 0.01, 0.02, 0.05, 0.3])
def test_an_exact_bound_is_wrong_at_most_as_often_as_it_says(trials: int, p: float) -> None:
    events = np.arange(trials + 1)
    chance = stats.binom.pmf(events, trials, p)
    upper = np.array([ours.clopper_pearson_upper(int(x), trials, 0.95) for x in events])
    lower = np.array([ours.clopper_pearson_lower(int(x), trials, 0.95) for x in events])
    assert chance[upper < p].sum() <= 0.05
    assert chance[lower > p].sum() <= 0.05


def test_the_fewest_trials_are_those_of_the_literature() -> None:
    # zero failures: n = ln(alpha) / ln(1 - margin), rounded up (the "rule of three", exactly)
    table = {0.95: (299, 149, 59), 0.975: (368, 183, 72), 0.99: (459, 228, 90)}
    for confidence, expected in table.items():
        for margin, count in zip((0.01, 0.02, 0.05), expected, strict=True):
            assert ours.required_trials(margin, confidence) == count
            assert count == math.ceil(math.log(1 - confidence) / math.log(1 - margin))


def test_allowed_losses_are_those_of_the_published_table() -> None:
    table = {300: (0, 1, 8), 500: (1, 4, 16), 1000: (4, 12, 38), 2000: (12, 29, 83)}
    for trials, expected in table.items():
        found = [ours.max_losses_allowed(trials, margin, 0.95) for margin in (0.01, 0.02, 0.05)]
        assert tuple(found) == expected
    assert ours.max_losses_allowed(298, 0.01, 0.95) is None
    assert ours.max_losses_allowed(0, 0.01, 0.95) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.sampled_from([0.01, 0.02, 0.05, 0.2]))
def test_required_trials_and_allowed_losses_are_inverse(losses: int, margin: float) -> None:
    needed = ours.required_trials(margin, 0.95, losses)
    assert ours.clopper_pearson_upper(losses, needed, 0.95) < margin
    assert ours.clopper_pearson_upper(losses, needed - 1, 0.95) >= margin
    assert ours.max_losses_allowed(needed, margin, 0.95) == losses


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_scipys(counts, confidence) -> None:
    events, trials = counts
    theirs = stats.binomtest(events, trials).proportion_ci(confidence, method="wilson")
    assert ours.wilson(events, trials, confidence) == pytest.approx((theirs.low, theirs.high))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_scipys_binomial_test(losses: int, gains: int) -> None:
    if losses + gains == 0:
        assert ours.mcnemar_exact(0, 0) == 1
        return
    theirs = stats.binomtest(losses, losses + gains, alternative="greater").pvalue
    assert ours.mcnemar_exact(losses, gains) == pytest.approx(theirs)


def test_five_losses_without_a_gain_are_the_fewest_that_are_significant() -> None:
    assert ours.mcnemar_exact(5, 0) < 0.05 < ours.mcnemar_exact(4, 0)
    assert ours.mcnemar_exact(40, 40) > 0.5


def score_by_likelihood(losses: int, gains: int, trials: int, delta: float) -> float:
    """Tango's score, its nuisance parameter found by maximising the likelihood numerically."""
    same = trials - losses - gains

    def minus_log_likelihood(q: float) -> float:
        terms = ((gains, q + delta), (losses, q), (same, 1 - 2 * q - delta))
        if any(p < 0 or (p == 0 and count) for count, p in terms):
            return math.inf
        return -math.fsum(count * math.log(p) for count, p in terms if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    grid = np.linspace(low, high, 4001)
    best = grid[int(np.argmin([minus_log_likelihood(q) for q in grid]))]
    step = grid[1] - grid[0]
    q = optimize.minimize_scalar(
        minus_log_likelihood,
        bounds=(max(low, best - step), min(high, best + step)),
        method="bounded",
        options={"xatol": 1e-12},
    ).x
    return (gains - losses - trials * delta) / math.sqrt(trials * (2 * q + delta - delta * delta))


@pytest.mark.parametrize(
    ("losses", "gains", "trials"), [(0, 0, 50), (1, 8, 44), (8, 1, 44), (5, 0, 118), (20, 20, 60)]
)
def test_tangos_interval_is_where_the_score_test_accepts(losses, gains, trials) -> None:
    low, high = ours.tango(losses, gains, trials, 0.95)
    assert -1 <= low <= (gains - losses) / trials <= high <= 1
    for edge, inwards in ((low, 1e-3), (high, -1e-3)):
        assert abs(score_by_likelihood(losses, gains, trials, edge + inwards)) < 1.959964
        assert abs(score_by_likelihood(losses, gains, trials, edge - inwards)) > 1.959964


@pytest.mark.parametrize("trials", [1, 30, 412])
def test_tangos_interval_has_a_width_without_discordant_pairs(trials: int) -> None:
    z2 = stats.chi2.isf(0.05, 1)
    expected = z2 / (trials + z2)  # what the quadratic reduces to
    assert ours.tango(0, 0, trials, 0.95) == pytest.approx((-expected, expected), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.integers(0, 80))
def test_tangos_interval_mirrors(counts, gains) -> None:
    losses, trials = counts
    gains = min(gains, trials - losses)
    low, high = ours.tango(losses, gains, trials, 0.95)
    assert ours.tango(gains, losses, trials, 0.95) == pytest.approx((-high, -low), abs=1e-9)
    assert -1 <= low <= high <= 1


def test_tangos_interval_covers_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    lost, gained, trials = 0.04, 0.02, 150
    covered = 0
    for _ in range(1000):
        b, c, _ = rng.multinomial(trials, [lost, gained, 1 - lost - gained])
        low, high = ours.tango(int(b), int(c), trials, 0.95)
        covered += low <= gained - lost <= high
    assert 0.93 <= covered / 1000 <= 0.975


def test_the_bootstrap_is_deterministic_and_knows_clusters() -> None:
    single = {(0, 1): 180, (1, 1): 20}
    grouped = {(0, 10): 18, (10, 10): 2}
    assert ours.cluster_bootstrap(single, 0.95) == ours.cluster_bootstrap(single, 0.95)
    few = [ours.cluster_bootstrap(single, 0.95, seed=seed, repeats=31) for seed in range(8)]
    assert len(set(few)) > 1
    low, high = ours.cluster_bootstrap(single, 0.95)
    # one prompt a cluster: the ordinary bootstrap, nearly the normal interval of 10 %
    spread = 1.96 * math.sqrt(0.1 * 0.9 / 200)
    assert (low, high) == pytest.approx((0.1 - spread, 0.1 + spread), abs=0.012)
    wide = ours.cluster_bootstrap(grouped, 0.95)
    assert wide[1] - wide[0] > 2.5 * (high - low)  # sqrt(10), with the same 10 % of 200
    assert ours.cluster_bootstrap({}, 0.95) == (0, 1)


@pytest.mark.parametrize("call", [
    lambda: ours.clopper_pearson_upper(3, 2, 0.95),
    lambda: ours.clopper_pearson_lower(-1, 2, 0.95),
    lambda: ours.clopper_pearson_upper(0, 2, 1.0),
    lambda: ours.wilson(0, 2, 0.0),
    lambda: ours.tango(2, 1, 2, 0.95),
    lambda: ours.tango(-1, 1, 2, 0.95),
    lambda: ours.mcnemar_exact(-1, 0),
    lambda: ours.required_trials(0.0, 0.95),
    lambda: ours.cluster_bootstrap({(2, 1): 1}, 0.95),
])  # fmt: skip
def test_impossible_counts_are_refused(call) -> None:
    with pytest.raises(ValueError, match="expected"):
        call()


# --- near-duplicates -------------------------------------------------------------------------------


WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=7).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=14))
def test_clusters_are_the_components_of_all_pairs_that_are_alike(texts) -> None:
    names = [f"p{number}" for number in range(len(texts))]
    root = list(range(len(texts)))
    for _ in texts:  # brute force: every pair, until nothing changes
        for i, one in enumerate(texts):
            for j, other in enumerate(texts):
                if similarity(one, other) >= THRESHOLD - 1e-9:
                    root[i] = root[j] = min(root[i], root[j])
    assert cluster_names(names, texts) == tuple(names[index] for index in root)


def test_wording_case_and_punctuation_do_not_make_a_prompt_independent() -> None:
    texts = [
        "Write a short poem about the sea and the moon",
        "write a SHORT poem, about the sea and the moon!",
        "Write a short poem about the lake and the moon",
        "How tall is the tower in Paris?",
        "",
        "؟؟",
    ]
    assert cluster_names("abcdef", texts) == ("a", "a", "a", "d", "e", "f")


def test_clusters_that_the_caller_knows_are_joined_with_ours() -> None:
    texts = ["how do I kill a process", "how do I kill a process now", "how do I bake bread well"]
    assert cluster_names("abc", texts) == ("a", "a", "c")
    assert cluster_names("abc", texts, [None, "pair-1", "pair-1"]) == ("a", "a", "a")
    with pytest.raises(ValueError, match="zip"):
        cluster_names("abc", texts, [None])


def test_the_suite_holds_no_near_duplicates() -> None:
    prompts = builtin_suite()
    names = [prompt.id for prompt in prompts]
    assert cluster_names(names, [prompt.text for prompt in prompts]) == tuple(names)
