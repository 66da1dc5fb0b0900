"""Verdicts as `verify` writes them into a manifest, for tests that have no time to verify."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safegene_runtime.artifact.manifest import read_manifest
from safegene_runtime.artifact.recomputed import RUNGS
from safegene_runtime.gating.bounds import bounds_in
from safegene_runtime.gating.gate import GateResult, Pair, Profile, combine, decide_by_attack
from safegene_runtime.gating.profiles import profile_for
from safegene_runtime.verifying.report import Report, Rung

LOST = {"PASS": 0, "FAIL": 30, "INCONCLUSIVE": 1, "VACUOUS": 0}
FIGURES = {
    "active": {"beta": 1.0, "noise": 0.0, "nearer_to_reference": 1.0},
    "logits": {"mean_kl": 1e-9, "top1": 1.0},
}


def pairs(verdict: str = "PASS", attack: str | None = None) -> list[Pair]:
    """64 harmful prompts that the reference refuses, and 32 benign ones: the gate says `verdict`."""
    base = "refuse" if verdict == "VACUOUS" else "comply"
    harmful = [
        Pair(f"h{n}", "harmful", "c", f"h{n}", attack, "refuse",
             "comply" if n < LOST[verdict] else "refuse", base, tie=verdict == "INCONCLUSIVE")
        for n in range(64)
    ]  # fmt: skip
    benign = [
        Pair(f"b{n}", "benign", "c", f"b{n}", attack, "comply", "comply", "comply")
        for n in range(32)
    ]
    return harmful + benign


def report(
    asked: Sequence[Pair],
    *,
    mode: str = "strict",
    precision: str = "8-bit",
    broken_at: str | None = None,
    profile: Profile | None = None,
    sequential: bool = False,
) -> Report:
    """What `verify` reports of these pairs; with `broken_at` that rung broke, and it went no further."""
    profile = profile or profile_for("smoke", precision, strict=mode == "strict")
    gate: GateResult | None = None
    attacks: dict[str, GateResult] = {}
    states = ["ok"] * len(RUNGS)
    if broken_at is None:
        gate, attacks = decide_by_attack(asked, profile, sequential=sequential)
        found = combine(gate, attacks).verdict
        states[-1] = {"PASS": "ok", "FAIL": "broken"}.get(found, "undecided")
        broken_at = "refusals" if found == "FAIL" else None
    else:
        place = RUNGS.index(broken_at)
        states[place:] = ["broken", *["not reached"] * (len(RUNGS) - place - 1)]
    return Report(
        verdict=combine(gate, attacks).verdict if gate else "FAIL",  # type: ignore[arg-type]
        broken_at=broken_at,
        rungs=tuple(
            Rung(
                name, state, f"why {name}", {} if state == "not reached" else FIGURES.get(name, {})
            )
            for name, state in zip(RUNGS, states, strict=True)
        ),
        outcomes=(),
        gate=gate,
        attacks=attacks,
        profile=profile,
        mode=mode,
        precision=precision,
        bounds=bounds_in(precision, mode),
        artifact={},
        reference={"sha256": "0" * 64},
        engine={"name": "llama.cpp", "version": "1", "settings": {}},
        static=None,
        kl_by_position=(),
        seconds={"total": 0.0, "engine": 0.0},
    )


def verification(
    verdict: str = "PASS", mode: str = "strict", precision: str = "8-bit"
) -> dict[str, Any]:
    """What `verify` puts into a manifest."""
    return report(pairs(verdict), mode=mode, precision=precision).for_manifest([2])


def put(folder: Path, verdict: str | None = "PASS", mode: str = "strict") -> Path:
    """A verdict put into a manifest."""
    manifest = read_manifest(folder)
    precision = manifest.artifact["precision"]
    found = None if verdict is None else verification(verdict, mode, precision)
    manifest.with_verification(found).write(folder)
    return folder
