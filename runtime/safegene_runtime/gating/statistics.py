"""Statistics of paired refusals: pure functions of counts, with the source of each formula.

`confidence` is one-sided where one bound is returned and two-sided where two are. An *event* is a
lost refusal, or whatever is counted; a *trial* is an independent chance for one. `scipy.special` does the
distributions: `scipy.stats` gives the same numbers and takes 50 MiB more of memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = [
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "cluster_bootstrap",
    "exceeds",
    "holm",
    "max_losses_allowed",
    "mcnemar_exact",
    "required_trials",
    "tango",
    "tango_score",
    "wilson",
]


def _check(events: int, trials: int, confidence: float) -> None:
    if not 0 <= events <= trials:
        raise ValueError(f"expected 0 <= events <= trials, got {events} of {trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, got {confidence}")


def _at_least(events: int, trials: int, rate: float) -> float:
    """P(X >= events) for X ~ B(trials, rate)."""
    from scipy import special

    return float(special.betainc(events, trials - events + 1, rate)) if events else 1.0


def clopper_pearson_upper(events: int, trials: int, confidence: float) -> float:
    """The exact upper bound of a rate: the largest p with P(X <= events; p) >= 1 - confidence.

    One-sided (Clopper and Pearson 1934). Without trials it is 1.

    Raises:
        ValueError: counts or confidence out of range.
    """
    from scipy import special

    _check(events, trials, confidence)
    if events == trials:
        return 1.0
    return float(special.betainccinv(events + 1, trials - events, 1 - confidence))


def clopper_pearson_lower(events: int, trials: int, confidence: float) -> float:
    """The exact lower bound of a rate: the smallest p with P(X >= events; p) >= 1 - confidence.

    One-sided (Clopper and Pearson 1934). Without trials it is 0.

    Raises:
        ValueError: counts or confidence out of range.
    """
    from scipy import special

    _check(events, trials, confidence)
    if events == 0:
        return 0.0
    return float(special.betaincinv(events, trials - events + 1, 1 - confidence))


def exceeds(events: int, trials: int, margin: float) -> float:
    """The exact one-sided p-value that a rate is above `margin`: P(X >= events; margin).

    Below 1 - confidence exactly where `clopper_pearson_lower` is above the margin. Without trials 1.

    Raises:
        ValueError: counts or margin out of range.
    """
    _check(events, trials, margin)
    return _at_least(events, trials, margin)


def holm(p_values: Sequence[float], confidence: float) -> list[bool]:
    """Which of several tests reject, so that all of them together err at most 1 - confidence.

    Step-down (Holm, Scandinavian Journal of Statistics 6, 1979, 65-70): the smallest of m p-values
    against alpha / m, the next against alpha / (m - 1), and so on until one does not reject. It holds
    however the tests depend on each other.
    """
    alpha, rejected = 1 - confidence, [False] * len(p_values)
    by_size = sorted(range(len(p_values)), key=lambda at: p_values[at])
    for done, at in enumerate(by_size):
        if p_values[at] * (len(p_values) - done) > alpha:
            break
        rejected[at] = True
    return rejected


def wilson(events: int, trials: int, confidence: float) -> tuple[float, float]:
    """The two-sided score interval of a rate, for display (Wilson 1927); (0, 1) without trials.

    Raises:
        ValueError: counts or confidence out of range.
    """
    from scipy import special

    _check(events, trials, confidence)
    if trials == 0:
        return 0.0, 1.0
    z = float(-special.ndtri((1 - confidence) / 2))
    rate, weight = events / trials, z * z / trials
    centre = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / trials + weight / (4 * trials))
    lower = 0.0 if events == 0 else max(0.0, centre - half)
    return lower, 1.0 if events == trials else min(1.0, centre + half)


def tango(losses: int, gains: int, trials: int, confidence: float) -> tuple[float, float]:
    """The two-sided score interval of the paired difference (gains - losses) / trials.

    Inverts the score test of Tango (Statistics in Medicine 17, 1998, 891-908). Unlike the Wald
    interval it has a width when no pair is discordant. (-1, 1) without trials.

    Raises:
        ValueError: counts or confidence out of range.
    """
    from scipy import optimize, special

    if min(losses, gains) < 0:
        raise ValueError(f"expected counts, got {losses} losses and {gains} gains")
    _check(losses + gains, trials, confidence)
    if trials == 0:
        return -1.0, 1.0
    z = float(-special.ndtri((1 - confidence) / 2))
    estimate = (gains - losses) / trials

    def excess(delta: float) -> float:
        return abs(tango_score(losses, gains, trials, delta)) - z

    def edge(limit: float) -> float:
        if estimate == limit or excess(limit) <= 0:
            return limit
        return float(optimize.brentq(excess, estimate, limit, xtol=1e-12))

    # at the very ends the variance vanishes; the score has its limit just inside
    nearly = 1 - 1e-12
    lower, upper = edge(-nearly), edge(nearly)
    return (-1.0 if lower <= -nearly else lower), (1.0 if upper >= nearly else upper)


def tango_score(losses: int, gains: int, trials: int, delta: float) -> float:
    """Tango's score statistic at a supposed difference `delta` of (gains - losses) / trials.

    The nuisance probability is the constrained maximum-likelihood estimate, a quadratic's root.
    """
    lost, gained = losses, gains
    a = 2.0 * trials
    b = -gained - lost + (2.0 * trials - gained + lost) * delta
    c = -lost * delta * (1.0 - delta)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = trials * (2 * q + delta * (1 - delta))
    distance = gained - lost - trials * delta
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def mcnemar_exact(losses: int, gains: int) -> float:
    """The one-sided exact p-value that refusals were lost: P(X >= losses), X ~ B(losses + gains, 1/2).

    McNemar (1947), conditional on the discordant pairs. It detects a difference and shows no
    equivalence: a large p-value with few pairs says nothing.

    Raises:
        ValueError: a negative count.
    """
    if min(losses, gains) < 0:
        raise ValueError(f"expected counts, got {losses} losses and {gains} gains")
    return _at_least(losses, losses + gains, 0.5)


def cluster_bootstrap(
    clusters: Mapping[tuple[int, int], int],
    confidence: float,
    *,
    seed: int = 0,
    repeats: int = 4000,
) -> tuple[float, float]:
    """The two-sided percentile interval of a rate whose trials come in clusters.

    Whole clusters are drawn with replacement (Miller, arXiv 2411.00640, section 2.2). Without any
    event the interval has no width: a cross-check of the exact bound, never a replacement.

    Args:
        clusters: how many clusters have (events, trials).
        confidence: two-sided.
        seed: of numpy's PCG64; the same counts and seed give the same interval.
        repeats: how many resamples.

    Raises:
        ValueError: counts or confidence out of range.
    """
    kinds = sorted(kind for kind, count in clusters.items() if kind[1] > 0 and count > 0)
    for events, trials in kinds:
        _check(events, trials, confidence)
    if not kinds:
        return 0.0, 1.0
    counts = np.array([clusters[kind] for kind in kinds])
    total = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=repeats)
    events_of, trials_of = np.array(kinds).T
    rates = (drawn @ events_of) / (drawn @ trials_of)
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(rates, [tail, 1 - tail])
    return float(lower), float(upper)


@functools.cache
def required_trials(margin: float, confidence: float, losses: int = 0) -> int:
    """The fewest trials of which `losses` may be lost and the upper bound is still below `margin`.

    Raises:
        ValueError: a margin or confidence that is not between 0 and 1, or a negative count.
    """
    if not 0 < margin < 1 or losses < 0:
        raise ValueError(f"expected a margin between 0 and 1 and a count, got {margin}, {losses}")
    low, high = losses, losses + 1
    while clopper_pearson_upper(losses, high, confidence) >= margin:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if clopper_pearson_upper(losses, middle, confidence) < margin:
            high = middle
        else:
            low = middle
    return high


def max_losses_allowed(trials: int, margin: float, confidence: float) -> int | None:
    """How many trials may be lost with the upper bound below `margin`; None if not even zero.

    Raises:
        ValueError: counts, margin or confidence out of range.
    """
    if trials < required_trials(margin, confidence):
        return None
    low, high = 0, trials
    while high - low > 1:
        middle = (low + high) // 2
        if clopper_pearson_upper(middle, trials, confidence) < margin:
            low = middle
        else:
            high = middle
    return low
