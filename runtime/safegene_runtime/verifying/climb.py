"""The state of a ladder being climbed: what was asked, and what was found so far.

`ladder.verify` calls the rungs in order; this keeps their results, and makes the report of them.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from safegene_runtime.artifact.integrity import ServedModel
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.artifact.recomputed import RUNGS
from safegene_runtime.engines.engine import Engine
from safegene_runtime.gating.bounds import ParityBounds, beta_band, beta_holds, bounds_in
from safegene_runtime.gating.gate import (
    NOT_RUN,
    GateResult,
    Pair,
    Profile,
    combine,
    decide_by_attack,
    profile_for,
)
from safegene_runtime.gating.sequential import run_in_order
from safegene_runtime.gating.verdict import Verdict
from safegene_runtime.judging.judge import Judge
from safegene_runtime.progress import Progress
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.base_noise import RATIO, BaseNoise, base_kl
from safegene_runtime.verifying.divergence import Divergence, first_divergence
from safegene_runtime.verifying.forced import ForcedPass, forced_passes, kl_by_position, pooled_beta
from safegene_runtime.verifying.margins import arm_margins, learn_margins, summarise_margins
from safegene_runtime.verifying.replies import greedy_replies, label_replies
from safegene_runtime.verifying.report import PromptOutcome, Report, Rung
from safegene_runtime.verifying.static_proof import StaticProof, static_proof
from safegene_runtime.verifying.text_parity import compare_text

__all__ = ["Climb", "Mode", "refusals_rung"]

AHEAD = 16
"""Prompts run together in sequential mode: what an engine batches, and at most that many too many."""

Mode = Literal["strict", "as-shipped"]


@dataclass
class _Run:
    """What one prompt did in the artifact."""

    forced: ForcedPass
    ids: tuple[int, ...]
    proved: bool
    label: str
    text: str
    divergence: Divergence | None


@dataclass
class Climb:
    """A ladder being climbed: what was asked, and what was found so far.

    Attributes:
        chosen: the prompts that count, by their place in the record.
    """

    artifact: Path
    manifest: Manifest
    record: Reference
    judge: Judge
    asked: str | Profile
    mode: Mode
    chosen: Sequence[int]
    tell: Progress
    began: float
    served: ServedModel | None = None
    rungs: list[Rung] = field(default_factory=list)
    runs: dict[int, _Run] = field(default_factory=dict)
    proof: StaticProof | None = None
    noise: BaseNoise | None = None
    plain: GateResult | None = None
    under_attack: dict[str, GateResult] = field(default_factory=dict)
    about: dict[str, Any] | None = None
    engine_seconds: float = 0.0

    # --- settings derived from what is served

    @property
    def precision(self) -> str:
        """The bounds class of the weights that are served."""
        return self.served.precision if self.served else "unknown"

    @property
    def bounds(self) -> ParityBounds:
        """What logits are held to."""
        return bounds_in(self.precision, self.mode)

    @property
    def profile(self) -> Profile:
        """What the gate asks for, fitted to the precision."""
        if isinstance(self.asked, Profile):
            return self.asked
        return profile_for(self.asked, self.precision, strict=self.mode == "strict")

    # --- climbing

    def add(self, rung: Rung) -> None:
        """Puts a rung on the ladder; it took what has passed since the one before."""
        so_far = sum(rung.seconds or 0.0 for rung in self.rungs)
        took = time.monotonic() - self.began - so_far
        self.rungs.append(dataclasses.replace(rung, seconds=took))

    def text(self, engine: Engine) -> None:
        """Text: the artifact is asked what the reference was asked."""
        self.add(compare_text(engine, self.record))

    def static(self) -> None:
        """Static, from bytes alone."""
        assert self.served is not None
        self.proof = static_proof(
            self.manifest, self.served.model, self.served.adapter, self.record, self.tell
        )
        figures = {"pooled": self.proof.pooled, "modules": len(self.proof.modules)}
        self.add(Rung("static", self.proof.status, self.proof.detail, figures))

    def run(self, engine: Engine, indices: Sequence[int]) -> None:
        """Forces, replies and labels these prompts."""
        started = time.monotonic()
        passes = forced_passes(engine, self.record, self.tell, indices)
        replies = greedy_replies(engine, self.record, indices, passes, self.precision, self.tell)
        self.engine_seconds += time.monotonic() - started
        labelled = label_replies(engine, self.record, indices, replies, self.judge)
        for index, one, reply, said in zip(indices, passes, replies, labelled, strict=True):
            parted = first_divergence(self.record, index, reply.ids, self.precision)
            self.runs[index] = _Run(one, reply.ids, reply.proved, said.label, said.text, parted)

    def base(self, engine: Engine) -> None:
        """Runs the artifact's base, without the adapter, on some of the prompts that were run."""
        found = base_kl(engine, self.record, list(self.runs), self.tell)
        artifact = {index: run.forced.kl for index, run in self.runs.items()}
        self.noise = BaseNoise.of(found, artifact)

    def sequentially(self, engine: Engine) -> None:
        """Runs prompts in the recorded order, a batch ahead of the gate, until it is decided."""
        by_id = {self.record.prompts[index].id: index for index in self.chosen}

        def run(pairs: Sequence[Pair]) -> list[Pair]:
            indices = [by_id[pair.id] for pair in pairs]
            self.run(engine, indices)
            return [self.pair(index) for index in indices]

        run_in_order(self.pairs(), self.profile, self.record.meta["order"]["seed"], run, AHEAD)

    def compare(self) -> None:
        """Active and logits, from the teacher-forced passes that were made."""
        passes = [run.forced for run in self.runs.values()]
        if not passes:  # decided from the record alone
            return
        self.add(_active(passes, self.precision))
        self.add(_logits(passes, self.bounds, self._margin_summary(), self.noise))

    def _margin_summary(self) -> dict[str, Any]:
        ran = sorted(self.runs)
        recorded = [self._recorded_margins[index] for index in ran]
        return summarise_margins(
            [one["reference"] for one in recorded],
            [self.runs[index].forced.margin for index in ran],
            [one["base"] for one in recorded],
            self.precision,
        ).to_dict()

    def gate(self, sequential: bool) -> None:
        """Refusals: the labels, decided on."""
        self.plain, self.under_attack = decide_by_attack(
            self.pairs(),
            self.profile,
            sequential=sequential,
            seed=self.record.meta["order"]["seed"],
        )
        if not self.runs:
            return
        figures = {
            "judge": f"{self.judge.name} {self.judge.version}",
            "prompts": len(self.runs),
            "proved_without_generating": sum(run.proved for run in self.runs.values()),
        }
        self.add(refusals_rung(self.plain, self.under_attack, figures))

    # --- results

    def pair(self, index: int) -> Pair:
        """One prompt as the gate sees it."""
        prompt = self.record.prompts[index]
        run = self.runs.get(index)
        return Pair.of(
            prompt,
            run.label if run else NOT_RUN,
            identical=run is not None and run.ids == tuple(prompt.ref_ids),
            tie=run is not None and run.divergence is not None and run.divergence.kind == "tie",
        )

    def pairs(self) -> list[Pair]:
        """All prompts that count; those that were not run say so."""
        return [self.pair(index) for index in self.chosen]

    def outcome(self, index: int) -> PromptOutcome:
        """One prompt that was run, as reports show it."""
        prompt, run = self.record.prompts[index], self.runs[index]
        return PromptOutcome.of(
            prompt,
            run.label,
            run.text,
            identical=run.ids == tuple(prompt.ref_ids),
            proved=run.proved,
            divergence=None
            if run.divergence is None
            else {key: getattr(run.divergence, key) for key in ("position", "gap", "kind")},
            margin=self.margin(index),
            mean_kl=float(run.forced.kl.mean()),
        )

    def margin(self, index: int) -> dict[str, float] | None:
        """The three arms' refusal margins of one prompt, where all of them have one."""
        found = {**self._recorded_margins[index], "artifact": self.runs[index].forced.margin}
        return None if None in found.values() else found

    @functools.cached_property
    def _recorded_margins(self) -> list[dict[str, Any]]:
        rule = learn_margins(self.record)
        arms = [arm_margins(self.record, rule, arm) for arm in ("ref", "base")]
        return [{"reference": ref, "base": base} for ref, base in zip(*arms, strict=True)]

    def report(self) -> Report:
        """What was found, wherever the climb ended."""
        broken = next((rung.name for rung in self.rungs if rung.status == "broken"), None)
        verdict = Verdict.FAIL if broken else combine(self.plain, self.under_attack).verdict
        self.rungs += [Rung(name, "not reached", "") for name in RUNGS[len(self.rungs) :]]
        meta, manifest = self.record.meta, self.manifest
        return Report(
            verdict=verdict,
            broken_at=broken,
            rungs=tuple(self.rungs),
            outcomes=tuple(self.outcome(index) for index in sorted(self.runs)),
            gate=self.plain,
            attacks=self.under_attack,
            profile=self.profile,
            mode=self.mode,
            precision=self.precision,
            bounds=self.bounds,
            artifact={
                "name": self.artifact.resolve().name,
                **{
                    key: manifest.artifact[key]
                    for key in ("target", "form", "architecture", "precision")
                },
                "expression": manifest.adapter["expression"],
                "files": {entry.path: entry.sha256 for entry in manifest.files},
            },
            reference={
                "sha256": self.record.digest,
                "base": meta["base"]["name"],
                "adapter": meta["adapter"]["name"],
                "expression": meta["adapter"]["expression"],
                "versions": meta["versions"],
            },
            engine=self.about,
            static=None if self.proof is None else self.proof.to_dict(),
            kl_by_position=tuple(kl_by_position([run.forced for run in self.runs.values()])),
            seconds={"total": time.monotonic() - self.began, "engine": self.engine_seconds},
        )


# --- 4 active, 5 logits ----------------------------------------------------------------------------


def _active(passes: Sequence[ForcedPass], precision: str) -> Rung:
    beta, noise = pooled_beta(passes)
    nearer = sum(forced.ref_nearer for forced in passes) / len(passes)
    band = beta_band(precision, noise)
    figures = {"beta": beta, "nearer_to_reference": nearer, "band": band, "noise": noise}
    if abs(beta - 1) > band:
        what = (
            "the adapter is not in there" if abs(beta) < 0.1 else "the adapter has another strength"
        )
        return Rung(
            "active", "broken", f"beta {beta:.3f}, expected 1 within {band:.3g}: {what}", figures
        )
    if not beta_holds(beta, nearer, band):
        return Rung(
            "active",
            "broken",
            f"only {nearer:.0%} of prompts are nearer to the reference than to the base",
            figures,
        )
    return Rung(
        "active",
        "ok",
        f"beta {beta:.4f} (1 within {band:.2g}): logits moved as the reference's did",
        figures,
    )


def _logits(
    passes: Sequence[ForcedPass],
    bounds: ParityBounds,
    margins: dict[str, Any],
    noise: BaseNoise | None = None,
) -> Rung:
    kl = np.concatenate([forced.kl for forced in passes])
    top1 = float(np.concatenate([forced.agree for forced in passes]).mean())
    mean = float(kl.mean())
    figures = {
        "mean_kl": mean,
        "p99_kl": float(np.quantile(kl, 0.99)),
        "max_kl": float(kl.max()),
        "top1": top1,
        "positions": len(kl),
        "margins": margins,
        "base_noise": None if noise is None else noise.to_dict(),
    }
    status = "ok"
    detail = f"mean KL {mean:.2e} ({bounds.kl_limits}), top-1 {top1:.2%} ({bounds.role} {bounds.top1:.2%})"
    if not bounds.holds(mean, top1):
        status = "broken"
        if not bounds.kl_gates:
            detail += ": above the bound, which rounding does not explain at this precision"
    elif mean > bounds.mean_kl or top1 < bounds.top1:
        detail += ": outside the advice, within the bound"
    if noise is not None:
        detail += noise.remark
        if noise.breaks(bounds):
            status = "broken"
            detail += f", of which it may have {RATIO:g} times as much"
    return Rung("logits", status, detail, figures)


# --- 6 refusals ------------------------------------------------------------------------------------


def refusals_rung(
    plain: GateResult | None, attacks: Mapping[str, GateResult], figures: Mapping[str, Any]
) -> Rung:
    """What the gates say together, and the plain prompts' gate where an attack decides."""
    decision = combine(plain, attacks)
    said = [decision.sentence]
    if plain is not None and decision.attack is not None:
        said.append(f"Without an attack: {plain.sentence}")
    gates = {"plain": plain, **attacks}
    verdicts = {name: str(gate.verdict) for name, gate in gates.items() if gate}
    status = {Verdict.PASS: "ok", Verdict.FAIL: "broken"}.get(decision.verdict, "undecided")
    return Rung("refusals", status, " ".join(said), {**figures, "verdicts": verdicts})
