"""How often the gate errs, by simulation: the tables of docs/statistics.md.

    python benchmarks/error_rates.py [--runs 2000]

The peer is the rule nearly everybody uses: pass if the observed loss rate is within the margin.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import time

import numpy as np

from safegene_runtime.gating.gate import PROFILES, Pair, Profile, combine, decide, decide_by_attack
from safegene_runtime.gating.rates import rate_of
from safegene_runtime.gating.sequential import EProcess
from safegene_runtime.gating.statistics import max_losses_allowed, required_trials

FACTORS = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
SIZES = {"smoke": (60, 118), "ci": (150, 240), "release": (300, 500)}
BENIGN = 200


def counted(statuses: list[str | None], status: str | None) -> str:
    """The share of runs that ended so, in per cent."""
    return f"{100 * statuses.count(status) / len(statuses):.1f} %"


def row(*cells: object) -> None:
    """One line of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|")


def head(*cells: str) -> None:
    """The head of a Markdown table."""
    row(*cells)
    row(*("---" for _ in cells))


def fixed(runs: int, rng: np.random.Generator) -> None:
    """The loss rate alone, a fixed number of prompts."""
    head(
        "profile",
        "refused",
        "may be lost",
        "true loss",
        "PASS",
        "FAIL",
        "INCONCLUSIVE",
        "peer passes",
    )
    for name, sizes in SIZES.items():
        profile = PROFILES[name]
        margin, confidence = profile.loss_margin, profile.confidence

        @functools.cache
        def status(lost: int, trials: int, m: float = margin, c: float = confidence) -> str:
            return rate_of((lost, trials), (lost, trials), trials, m, c).status

        for trials in sizes:
            for factor in FACTORS:
                lost = rng.binomial(trials, factor * margin, size=runs * 10).tolist()
                found: list[str | None] = [status(one, trials) for one in lost]
                peer = sum(one <= margin * trials for one in lost) / len(lost)
                row(
                    name,
                    trials,
                    max_losses_allowed(trials, margin, confidence),
                    f"{100 * factor * margin:g} %",
                    counted(found, "PASS"),
                    counted(found, "FAIL"),
                    counted(found, "INCONCLUSIVE"),
                    f"{100 * peer:.1f} %",
                )


def boundaries(margin: float, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """For each number of events: the trials from which E passes, and up to which it fails.

    E depends on the counts alone, so the process itself is asked once for each of them.
    """
    needed = math.log(20)
    passes, fails = np.full(budget + 1, budget + 1), np.zeros(budget + 1, int)
    below, above = EProcess(margin, below=True), EProcess(margin, below=False)
    for events in range(min(budget, 150) + 1):
        low, high = copy.deepcopy(below), copy.deepcopy(above)
        for trials in range(events, budget + 1):
            if low.log_e >= needed:
                passes[events] = min(passes[events], trials)
            if high.log_e >= needed:
                fails[events] = trials
            low.add(False)
            high.add(False)
        below.add(True)
        above.add(True)
    return passes, fails


def watched(runs: int, rng: np.random.Generator) -> None:
    """The loss rate alone, looked at after every prompt, with four times the fixed budget."""
    head(
        "margin",
        "budget",
        "true loss",
        "PASS",
        "FAIL",
        "INCONCLUSIVE",
        "prompts run, mean",
        "fixed",
    )
    for margin in (0.05, 0.02, 0.01):
        fewest = required_trials(margin, 0.95)
        budget = 4 * fewest
        passes, fails = boundaries(margin, budget)
        trials = np.arange(1, budget + 1)
        for factor in FACTORS:
            found: list[str | None] = []
            length = 0
            for _ in range(runs):
                events = np.cumsum(rng.random(budget) < factor * margin)
                passed, failed = trials >= passes[events], trials <= fails[events]
                stop = int(np.argmax(passed | failed))
                decided = passed[stop] or failed[stop]
                found.append(("FAIL" if failed[stop] else "PASS") if decided else None)
                length += stop + 1 if decided else budget
            row(
                f"{100 * margin:g} %",
                budget,
                f"{100 * factor * margin:g} %",
                counted(found, "PASS"),
                counted(found, "FAIL"),
                counted(found, None),
                f"{length / len(found):.0f}",
                fewest,
            )


def table(
    lost: np.ndarray, over: np.ndarray, unsure: np.ndarray, size: int, known: bool
) -> list[Pair]:
    """Pairs whose clusters of `size` prompts share one fate, known to the gate or not."""
    pairs = []
    for number, (event, doubt) in enumerate(zip(lost, unsure, strict=True)):
        label = "uncertain" if doubt else "comply" if event else "refuse"
        cluster = f"c{number // size}" if known else f"h{number}"
        pairs.append(Pair(f"h{number}", "harmful", "-", cluster, None, "refuse", label, "comply"))
    for number, event in enumerate(over):
        label = "refuse" if event else "comply"
        pairs.append(
            Pair(f"b{number}", "benign", "-", f"b{number}", None, "comply", label, "comply")
        )
    return pairs


def whole(runs: int, rng: np.random.Generator, profile: Profile, refused: int) -> None:
    """All of `decide`: three rates, contrast, doubt, clusters, both modes."""
    margin = profile.loss_margin
    none = np.zeros(BENIGN, bool)
    sure = np.zeros(refused, bool)
    head("case", "true loss", "mode", "PASS", "FAIL", "INCONCLUSIVE")

    def show(case: str, rate: float, mode: str, made: list[list[Pair]]) -> None:
        found: list[str | None] = [
            str(decide(pairs, profile, sequential=mode == "sequential").verdict) for pairs in made
        ]
        row(case, f"{100 * rate:g} %", mode, *(counted(found, one) for one in
            ("PASS", "FAIL", "INCONCLUSIVE")))  # fmt: skip

    for rate in (0.0, margin / 10, margin, 5 * margin):
        for mode in ("fixed", "sequential"):
            made = [
                table(rng.random(refused) < rate, none, sure, 1, False) for _ in range(runs // 4)
            ]
            show("independent prompts", rate, mode, made)
    for share in (0.01, 0.05):
        for rate in (0.0, margin):
            made = [
                table(rng.random(refused) < rate, none, rng.random(refused) < share, 1, False)
                for _ in range(runs // 4)
            ]
            show(f"judge unsure of {100 * share:g} %", rate, "fixed", made)
    for known in (False, True):
        made = []
        for _ in range(runs // 4):
            fate = np.repeat(rng.random(refused) < margin, 4)
            made.append(table(fate, none, np.zeros(4 * refused, bool), 4, known))
        what = "clustered" if known else "taken for independent"
        show(f"every prompt in four wordings, {what}", margin, "fixed", made)


def attacked(name: str, refused: int, lost: int) -> list[Pair]:
    """The pairs of one attack."""
    return [
        Pair(f"h{n}@{name}", "harmful", "-", f"h{n}", name, "refuse",
             "comply" if n < lost else "refuse", "comply")
        for n in range(refused)
    ]  # fmt: skip


def several(runs: int, rng: np.random.Generator, profile: Profile, refused: int) -> None:
    """Plain prompts and attacks: some that can show parity, some with too few refusals to.

    The peer of the FAIL column takes each gate's own bound at its word.
    """
    margin = profile.loss_margin
    none, sure = np.zeros(BENIGN, bool), np.zeros(refused, bool)
    head("attacks that can show parity", "with nine refusals", "true loss", "under those",
         "PASS", "FAIL", "INCONCLUSIVE", "FAIL, each by itself")  # fmt: skip
    cases = [(0, 0, 1.0, 0.0), (8, 0, 1.0, 0.0), (0, 6, 1.0, 1.0), (8, 6, 1.0, 1.0), (8, 6, 1.0, 0.0),
             (8, 6, 0.0, 0.0), (8, 6, 0.0, 1.0), (8, 6, 0.0, 5.0), (8, 6, 0.0, 10.0)]  # fmt: skip
    for many, few, factor, weak in cases:
        found: list[str | None] = []
        alone = 0
        for _ in range(runs // 4):
            pairs = table(rng.random(refused) < factor * margin, none, sure, 1, False)
            for number in range(many):
                lost = int(rng.binomial(refused, factor * margin))
                pairs += attacked(f"many{number}", refused, lost)
            for number in range(few):
                pairs += attacked(f"few{number}", 9, int(rng.binomial(9, weak * margin)))
            plain, under = decide_by_attack(pairs, profile)
            found.append(str(combine(plain, under).verdict))
            gates = [*under.values(), *([plain] if plain else [])]
            alone += any(gate.loss.lower > margin for gate in gates)
        row(many, few, f"{100 * factor * margin:g} %", f"{100 * weak * margin:g} %" if few else "",
            *(counted(found, one) for one in ("PASS", "FAIL", "INCONCLUSIVE")),
            f"{100 * alone / len(found):.1f} %")  # fmt: skip


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    first, second, third, fourth = np.random.default_rng(arguments.seed).spawn(4)
    start = time.monotonic()
    print(f"\n### A fixed number of prompts ({arguments.runs * 10} runs a row)\n")
    fixed(arguments.runs, first)
    print(f"\n### Looked at after every prompt ({arguments.runs * 10} runs a row)\n")
    watched(arguments.runs * 10, second)
    smoke = PROFILES["smoke"]
    print(f"\n### The whole gate, {smoke.name}, 118 refused ({arguments.runs // 4} runs a row)\n")
    whole(arguments.runs, third, smoke, 118)
    print(f"\n### Several gates, {smoke.name}, 118 refused ({arguments.runs // 4} runs a row)\n")
    several(arguments.runs, fourth, smoke, 118)
    print(f"\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
