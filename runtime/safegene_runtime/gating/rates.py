"""A rate under its margin: the one place where counts become bounds."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safegene_runtime.gating.pairs import Event, Pair, best_case, worst_case
from safegene_runtime.gating.sequential import EProcess, TwoSided
from safegene_runtime.gating.statistics import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    exceeds,
    wilson,
)

__all__ = ["Rate", "rate_of", "rate_over", "watched_rate", "watched_rate_of"]

DISPLAY_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """One rate under its margin; trials are clusters.

    Attributes:
        events_best, trials_best: counted with every doubt in the artifact's favour.
        events_worst, trials_worst: counted with every doubt against it.
        prompts: how many prompts the trials of the worst case stand for.
        rate: events over trials in the worst case; None without trials.
        upper: one-sided exact upper bound, worst case.
        lower: one-sided exact lower bound, best case.
        p_fail: of the test that the rate is above its margin, best case.
        interval: two-sided Wilson interval of the worst case, for display.
        status: `PASS`, `FAIL` or `INCONCLUSIVE`; `not measured` where nothing was asked for.
        method: `clopper-pearson` for a fixed number of trials, `e-process` in sequential mode.
    """

    events_best: int
    events_worst: int
    trials_best: int
    trials_worst: int
    prompts: int
    rate: float | None
    upper: float
    lower: float
    p_fail: float
    margin: float
    confidence: float
    interval: tuple[float, float]
    status: str
    method: str = "clopper-pearson"


def rate_of(
    best: tuple[int, int], worst: tuple[int, int], prompts: int, margin: float, confidence: float
) -> Rate:
    """A rate from its (events, trials) in the best and in the worst case."""
    upper = clopper_pearson_upper(*worst, confidence)
    lower = clopper_pearson_lower(*best, confidence)
    return Rate(
        events_best=best[0],
        events_worst=worst[0],
        trials_best=best[1],
        trials_worst=worst[1],
        prompts=prompts,
        rate=worst[0] / worst[1] if worst[1] else None,
        upper=upper,
        lower=lower,
        p_fail=exceeds(*best, margin),
        margin=margin,
        confidence=confidence,
        interval=wilson(*worst, DISPLAY_CONFIDENCE),
        status="PASS" if upper < margin else "FAIL" if lower > margin else "INCONCLUSIVE",
    )


def rate_over(
    pairs: Sequence[Pair],
    outcomes: Callable[[Pair], frozenset[Event]],
    margin: float,
    confidence: float,
) -> Rate:
    """A rate over prompts, each cluster of them one trial."""
    clusters: dict[str, list[frozenset[Event]]] = defaultdict(list)
    prompts = 0
    for pair in pairs:
        possible = outcomes(pair)
        clusters[pair.cluster].append(possible)
        prompts += worst_case([possible]) is not None
    worst = Counter(worst_case(members) for members in clusters.values())
    best = Counter(best_case(members) for members in clusters.values())
    return rate_of(
        (best[True], best[True] + best[False]),
        (worst[True], worst[True] + worst[False]),
        prompts,
        margin,
        confidence,
    )


def watched_rate(watched: TwoSided) -> Rate:
    """A rate that was watched trial by trial.

    Bounds for a fixed number of trials are not valid after an early stop, so the margin is all that
    the decision bounds: PASS says below it, FAIL above it, and undecided nothing.
    """
    worst = [event for event, _, _, _ in watched.path if event is not None]
    best = [event for _, event, _, _ in watched.path if event is not None]
    return watched_rate_of(
        (sum(best), len(best)),
        (sum(worst), len(worst)),
        watched.prompts,
        watched.margin,
        watched.confidence,
        watched.family,
    )


def watched_rate_of(
    best: tuple[int, int],
    worst: tuple[int, int],
    prompts: int,
    margin: float,
    confidence: float,
    family: int,
) -> Rate:
    """A watched rate from its (events, trials) where it stopped."""
    passed = EProcess.after(margin, worst, below=True).log_e
    failed = EProcess.after(margin, best, below=False).log_e
    status = TwoSided(margin, confidence, family).status_at(passed, failed)
    return Rate(
        events_best=best[0],
        events_worst=worst[0],
        trials_best=best[1],
        trials_worst=worst[1],
        prompts=prompts,
        rate=worst[0] / worst[1] if worst[1] else None,
        upper=margin if status == "PASS" else 1.0,
        lower=margin if status == "FAIL" else 0.0,
        # by Ville's inequality 1 / E is a p-value at any time
        p_fail=math.exp(min(0.0, -failed)),
        margin=margin,
        confidence=confidence,
        interval=wilson(*worst, DISPLAY_CONFIDENCE),
        status=status or "INCONCLUSIVE",
        method="e-process",
    )
