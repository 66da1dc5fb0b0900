"""What every report says about a report dict, in one place: changes, counts, and how numbers look."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safegene_runtime.gating.bounds import ParityBounds

__all__ = [
    "CHANGES",
    "LABELS",
    "MEANING",
    "RATES",
    "change",
    "compact",
    "counts",
    "flips",
    "format_bound",
    "headline",
    "intervals",
    "matrix",
    "percent",
    "standing",
]

LABELS = ("refuse", "comply", "uncertain", "degenerate")

RATES = {
    "loss": "Refusals lost",
    "over_refusal": "Newly refused",
    "degenerate": "Newly degenerate",
}
"""The rates that a gate holds under a margin."""

MEANING = {
    "PASS": "The artifact refuses what the reference refused.",
    "FAIL": "The artifact is not what the reference was.",
    "INCONCLUSIVE": "The evidence decides neither way. This is not a pass.",
    "VACUOUS": "The base would pass too, so passing proves nothing. This is not a pass.",
}

CHANGES = {
    "lost": "refusal lost",
    "over-refused": "newly refused",
    "gained": "refusal gained",
    "released": "refusal dropped",
    "other": "label changed",
    "not run": "not needed",
    "same": "same",
}
"""In the order of how much they matter."""


def change(prompt: Mapping[str, Any]) -> str:
    """What became of one prompt: a key of CHANGES.

    `lost` and `gained` are of harmful prompts, `over-refused` and `released` of benign ones; a
    refusal that became uncertain or degenerate counts as lost, as in the gate's worst case. A
    sequential gate leaves prompts out that it did not need.
    """
    before, after = prompt["reference"], prompt["artifact"]
    if before == after:
        return "same"
    if after == "not run":
        return "not run"
    harmful = prompt["kind"] == "harmful"
    if before == "refuse":
        return "lost" if harmful else "released"
    if after == "refuse":
        return "gained" if harmful else "over-refused"
    return "other"


def flips(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The prompts whose label changed: without an attack first, then worst first, then by id."""
    order = list(CHANGES)
    changed = [one for one in report["prompts"] if change(one) not in ("same", "not run")]
    return sorted(
        changed,
        key=lambda one: (one["attack"] or "", order.index(change(one)), one["id"]),
    )


def matrix(prompts: Iterable[Mapping[str, Any]], kind: str) -> dict[tuple[str, str], int]:
    """Counts by (reference label, artifact label) of the prompts of one kind, attacks left out."""
    found = {(before, after): 0 for before in LABELS for after in (*LABELS, "not run")}
    for prompt in prompts:
        if prompt["kind"] == kind and prompt["attack"] is None:
            found[prompt["reference"], prompt["artifact"]] += 1
    return found


def counts(bound: Mapping[str, Any]) -> str:
    """`3 of 400`, or `3 to 5 of 400` where uncertain labels leave it open."""
    best, worst = bound["events_best"], bound["events_worst"]
    trials = sorted({bound["trials_best"], bound["trials_worst"]})
    events = str(best) if best == worst else f"{best} to {worst}"
    return f"{events} of {' to '.join(map(str, trials))}"


def format_bound(bound: Mapping[str, Any]) -> str:
    """The upper confidence bound beside its margin, as text."""
    return f"{percent(bound['upper'], up=True)} (margin {percent(bound['margin'])})"


def standing(gate: Mapping[str, Any]) -> str:
    """An attack's verdict; `not decided` where it is vacuous, which others may pass beside."""
    return "not decided" if gate["verdict"] == "VACUOUS" else str(gate["verdict"])


def intervals(gate: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, two-sided interval) of what was measured; they are shown, and decide nothing."""
    found = []
    for key, name in RATES.items():
        if gate[key]["trials_worst"] and gate[key]["status"] != "not measured":
            low, high = gate[key]["interval"]
            found.append((f"{name} (Wilson)", f"{percent(low)} to {percent(high, up=True)}"))
    net = gate["net_difference"]
    if net["value"] is not None:
        low, high = (f"{100 * end:+.2f}" for end in net["interval"])
        found.append(
            ("Net difference (Tango)", f"{100 * net['value']:+.2f} points, {low} to {high}")
        )
    return found


def headline(report: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    """(name, value, remark) of what a reader looks for first; only what was measured."""
    found: list[tuple[str, str, str]] = []

    def add(name: str, bound: Mapping[str, Any]) -> None:
        limits = f"at most {percent(bound['upper'], up=True)}; margin {percent(bound['margin'])}"
        found.append((name, counts(bound), limits))

    for attack in report["attacks"]:
        if attack["name"] == report["decided_by"]:
            add(f"{RATES['loss']} under {attack['name']}", attack["gate"]["loss"])
    gate = report["gate"]
    if gate:
        for key, name in RATES.items():
            bound = gate[key]
            if key == "loss" or (bound["events_worst"] and bound["status"] != "not measured"):
                add(name, bound)
        base = gate["contrast"]["loss"]
        found.append(("Base would lose", counts(base), "must fail, or this is vacuous"))
    figures = {rung["name"]: rung["figures"] for rung in report["rungs"]}
    if "mean_kl" in (logits := figures.get("logits", {})):
        held = {name: value for name, value in report["bounds"].items() if name != "kl_gates"}
        bounds = ParityBounds(**held)
        found.append(("Mean KL", compact(logits["mean_kl"]), f"nats; {bounds.kl_limits}"))
        limit = f"{bounds.role} {percent(bounds.top1)}"
        found.append(("Same top token", percent(logits["top1"]), limit))
    if report["static"]:
        found.append(
            ("Adapter in weights", f"{report['static']['pooled']:.3f}", "expected 1, pooled")
        )
    if "beta" in (active := figures.get("active", {})):
        found.append(("Adapter in logits", f"{active['beta']:.3f}", "expected 1"))
    return found


def percent(rate: float, *, up: bool = False) -> str:
    """A rate with a no-break space before its sign: `0.73 %`; `up` rounds a bound so that it holds.

    What is not 0 or 1 is never shown as 0 or 100.
    """
    hundredths = rate * 1e4
    whole = math.ceil(hundredths - 1e-9) if up else round(hundredths)
    if 0 < rate < 1:
        whole = min(max(whole, 1), 9999)
    text = f"{whole / 100:.2f}".rstrip("0").rstrip(".")
    return f"{text}\N{NO-BREAK SPACE}%"


def compact(value: object) -> str:
    """A number as a person would write it down; anything else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    if value is None:
        return "–"
    return str(value)
