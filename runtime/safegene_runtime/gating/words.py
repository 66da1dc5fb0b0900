"""The sentence that people quote, from a gate's figures: never more than they support."""

from __future__ import annotations

import math

from safegene_runtime.gating.profiles import Profile
from safegene_runtime.gating.rates import Rate
from safegene_runtime.gating.statistics import required_trials

__all__ = ["percent", "sentence"]


def percent(share: float, *, up: bool) -> str:
    """A share in per cent with two digits, rounded away from the claim: bounds stay bounds."""
    hundredths = share * 1e4
    rounded = math.ceil(hundredths - 1e-9) if up else math.floor(hundredths + 1e-9)
    return f"{rounded / 100:.2f} %"


def _counted(rate: Rate, what: str) -> str:
    events = f"{rate.events_worst}"
    if rate.events_best != rate.events_worst:
        events = f"{rate.events_best} to {rate.events_worst}"
    if rate.prompts == rate.trials_worst:
        return f"{events} of {rate.trials_worst} {what}"
    return f"{events} of {rate.trials_worst} independent {what} ({rate.prompts} prompts)"


def _bounded(rate: Rate, what: str, happened: str, *, advise: bool, family: int) -> str:
    text = f"{_counted(rate, what)} {happened}"
    sure, margin = f"with {rate.confidence * 100:g} % confidence", f"{rate.margin * 100:g} %"
    if rate.status == "FAIL" and family > 1:  # what all failures claim together: above the margin
        return f"{text}; {sure} more than the margin of {margin} are, with {family} gates tested at once"
    if rate.status == "FAIL":
        text += f"; {sure} more than {percent(rate.lower, up=False)} are"
        # stopped early, the margin is the bound
        return text if rate.method == "e-process" else f"{text}, and the margin is {margin}"
    if rate.upper < 1:
        text += f"; {sure} fewer than {percent(rate.upper, up=True)} are"
    if rate.status == "INCONCLUSIVE" and advise:
        text += f", which does not show fewer than {margin}"
        if rate.method != "e-process":
            needed = required_trials(rate.margin, rate.confidence, rate.events_worst)
            text += f" (with {rate.events_worst} {happened}, {needed} would)"
    return text


def sentence(
    profile: Profile,
    loss: Rate,
    over: Rate,
    broken: Rate,
    vacuous: str,
    unexplained: int,
    family: int = 1,
) -> str:
    """What the gate found, in sentences that can be quoted on their own.

    Args:
        profile: what was asked for.
        loss: rate of lost refusals.
        over: rate of benign answers newly refused.
        broken: rate of replies newly degenerate; not mentioned when it passes.
        vacuous: why the gate proves nothing, or an empty string.
        unexplained: flips that are no tie; mentioned in strict mode.
        family: how many gates were tested together.
    """
    parts = [f"Vacuous: {vacuous}"] if vacuous else []
    measured = [
        (loss, "reference refusals", "lost"),
        (over, "benign answers", "newly refused"),
        (broken, "replies", "newly degenerate"),
    ]
    failed = any(rate.status == "FAIL" for rate, _, _ in measured)
    for rate, what, happened in measured:
        silent = (rate is broken and rate.status == "PASS") or rate.status == "not measured"
        if not silent and (rate is loss or not failed or rate.status == "FAIL"):
            parts.append(_bounded(rate, what, happened, advise=not failed, family=family))
    if profile.strict and unexplained:
        parts.append(f"Flips without a tie, of which float arithmetic has none: {unexplained}")
    return ". ".join(parts) + "."
