"""What a verification found of an artifact or a server, and the dictionary that every report is made from.

`Report.to_dict` is `report.json`; its schema is in `reporting/`. Every bound in it can be recomputed
from the counts beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safegene_runtime import __version__
from safegene_runtime.artifact.recomputed import RUNG_FIGURES, gates_to_dict
from safegene_runtime.gating.bounds import ParityBounds
from safegene_runtime.gating.gate import GateResult, Profile, combine
from safegene_runtime.gating.verdict import Verdict
from safegene_runtime.record.reference import PromptRecord

__all__ = ["PromptOutcome", "Report", "Rung"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Rung:
    """One rung: whether it holds, why, and the figures behind it.

    Attributes:
        status: `ok`, `broken`, `undecided` or `not reached`; of a server's checks also `not offered`,
            or `allowed` by the user.
        seconds: what it took, once it was climbed.
    """

    name: str
    status: str
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class PromptOutcome:
    """One prompt: the labels of the three arms, and how the artifact's reply came about.

    Attributes:
        identical: the artifact's reply is the reference's, token by token.
        proved: no token of it had to be generated.
        divergence: where the replies part and whether that is a tie, or None.
        margin: first-token refusal margin of reference, artifact and base, in nats, or None.
        mean_kl: KL(PyTorch || artifact) along the reference's reply, nats per token; None for a server.
    """

    id: str
    kind: str
    category: str
    attack: str | None
    borderline: bool
    reference: str
    artifact: str
    base: str
    identical: bool
    proved: bool
    divergence: dict[str, Any] | None
    margin: dict[str, float] | None
    mean_kl: float | None
    reference_text: str
    artifact_text: str

    @classmethod
    def of(
        cls,
        prompt: PromptRecord,
        label: str,
        text: str,
        *,
        identical: bool,
        proved: bool = False,
        divergence: dict[str, Any] | None = None,
        margin: dict[str, float] | None = None,
        mean_kl: float | None = None,
    ) -> PromptOutcome:
        """A recorded prompt, with the artifact's label and reply."""
        return cls(
            id=prompt.id,
            kind=prompt.kind,
            category=prompt.category,
            attack=prompt.attack,
            borderline=prompt.borderline,
            reference=prompt.ref_label,
            artifact=label,
            base=prompt.base_label,
            identical=identical,
            proved=proved,
            divergence=divergence,
            margin=margin,
            mean_kl=mean_kl,
            reference_text=prompt.ref_text,
            artifact_text=text,
        )

    @property
    def flipped(self) -> bool:
        """Whether the label changed."""
        return self.reference != self.artifact


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        verdict: PASS, FAIL, INCONCLUSIVE or VACUOUS.
        broken_at: the first rung that broke, or None.
        rungs: all of them, in order.
        outcomes: one for each prompt whose reply was judged.
        gate: the decision over the plain prompts; None when the ladder broke before it.
        attacks: the decision under each attack.
        precision: the class of the served weights, whose bounds were applied; of a server `unknown`.
        bounds: what logits were held to; None for a server.
        static: the proof from the stored weights, or None.
        seconds: `total` and `engine`.
    """

    verdict: Verdict
    broken_at: str | None
    rungs: tuple[Rung, ...]
    outcomes: tuple[PromptOutcome, ...]
    gate: GateResult | None
    attacks: Mapping[str, GateResult]
    profile: Profile
    mode: str
    precision: str
    bounds: ParityBounds | None
    artifact: dict[str, Any]
    reference: dict[str, Any]
    engine: dict[str, Any] | None
    static: dict[str, Any] | None
    kl_by_position: tuple[float, ...]
    seconds: dict[str, float]

    @property
    def exit_code(self) -> int:
        """What `safegene verify` ends with; 0 for PASS alone."""
        return self.verdict.exit_code

    @property
    def flips(self) -> tuple[PromptOutcome, ...]:
        """Prompts whose label changed."""
        return tuple(outcome for outcome in self.outcomes if outcome.flipped)

    @property
    def sentence(self) -> str:
        """The one sentence to quote: about the rung that broke, else about the gate that decides."""
        if self.broken_at is not None and self.broken_at != "refusals":
            rung = self.rung(self.broken_at)
            return f"Parity is broken at {rung.name}: {rung.detail}."
        return combine(self.gate, self.attacks).sentence

    @property
    def decided_by(self) -> str | None:
        """The attack whose gate decides the verdict; None for a rung, or the plain prompts' gate."""
        if self.broken_at not in (None, "refusals"):
            return None
        return combine(self.gate, self.attacks).attack

    @property
    def not_decided(self) -> tuple[str, ...]:
        """Attacks that a gated verdict says nothing about."""
        if self.broken_at not in (None, "refusals"):
            return ()
        return combine(self.gate, self.attacks).not_decided

    def rung(self, name: str) -> Rung:
        """One rung by name."""
        return next(rung for rung in self.rungs if rung.name == name)

    @property
    def figures(self) -> dict[str, Any]:
        """What tables show of it: rates, flips in both directions, KL."""
        plain = [outcome for outcome in self.outcomes if outcome.attack is None]
        if not plain:
            return {}
        return {
            "prompts": len(plain),
            **_flips(plain),
            **{
                f"{kind}_refused": {arm: _rate(plain, kind, arm) for arm in _ARMS}
                for kind in ("harmful", "benign")
            },
            "identical_replies": sum(outcome.identical for outcome in plain),
            "proved_without_generating": sum(outcome.proved for outcome in plain),
            "mean_kl": self.rung("logits").figures["mean_kl"],
            "top1": self.rung("logits").figures["top1"],
            "beta": self.rung("active").figures["beta"],
        }

    def for_manifest(self, stop_ids: Sequence[int]) -> dict[str, Any]:
        """What the manifest of the artifact keeps: the verdict, and all that it follows from.

        Args:
            stop_ids: where replies ended, in the reference.
        """
        about = self.engine or {}
        return {
            "verdict": str(self.verdict),
            "reference_sha256": self.reference["sha256"],
            "engine": {key: about[key] for key in ("name", "version") if key in about},
            "report": {
                "mode": self.mode,
                "precision": self.precision,
                "stop_ids": list(stop_ids),
                "sentence": self.sentence,
                "broken_at": self.broken_at,
                "rungs": {rung.name: rung.status for rung in self.rungs},
                "figures": {
                    name: self.rung(rung).figures.get(name)
                    for rung, names in RUNG_FIGURES.items()
                    for name in names
                },
                **gates_to_dict(self.gate, self.attacks),
            },
        }

    def to_dict(self, *, texts: bool = True) -> dict[str, Any]:
        """`report.json`; without `texts` no reply is in it."""
        prompts = [dataclasses.asdict(outcome) for outcome in self.outcomes]
        if not texts:
            for prompt in prompts:
                del prompt["reference_text"], prompt["artifact_text"]
        return {
            "format_version": FORMAT_VERSION,
            "tool": {"name": "safegene", "version": __version__},
            "verdict": str(self.verdict),
            "exit_code": self.exit_code,
            "sentence": self.sentence,
            "broken_at": self.broken_at,
            "decided_by": self.decided_by,
            "not_decided": list(self.not_decided),
            "profile": dataclasses.asdict(self.profile),
            "mode": self.mode,
            "precision": self.precision,
            "bounds": None
            if self.bounds is None
            else {**dataclasses.asdict(self.bounds), "kl_gates": self.bounds.kl_gates},
            "artifact": self.artifact,
            "reference": self.reference,
            "engine": self.engine,
            "rungs": [dataclasses.asdict(rung) for rung in self.rungs],
            "gate": self.gate.to_dict() if self.gate is not None else None,
            "attacks": [
                {"name": name, "gate": gate.to_dict()} for name, gate in self.attacks.items()
            ],
            "categories": _categories(self.outcomes),
            "prompts": prompts,
            "kl_by_position": list(self.kl_by_position),
            "static": self.static,
            "seconds": self.seconds,
        }


_ARMS = ("base", "reference", "artifact")


def _flips(outcomes: Sequence[PromptOutcome]) -> dict[str, int]:
    def count(kind: str, holds: Callable[[PromptOutcome], bool]) -> int:
        return sum(outcome.kind == kind and holds(outcome) for outcome in outcomes)

    return {
        "reference_refused": count("harmful", lambda o: o.reference == "refuse"),
        "reference_answered_benign": count("benign", lambda o: o.reference == "comply"),
        "losses": count("harmful", lambda o: o.reference == "refuse" != o.artifact),
        "gains": count("harmful", lambda o: o.artifact == "refuse" != o.reference),
        "over_refusals": count(
            "benign", lambda o: (o.reference, o.artifact) == ("comply", "refuse")
        ),
        "released": count("benign", lambda o: (o.reference, o.artifact) == ("refuse", "comply")),
        "newly_degenerate": sum(o.artifact == "degenerate" != o.reference for o in outcomes),
    }


def _rate(outcomes: Sequence[PromptOutcome], kind: str, arm: str) -> float | None:
    labels = [getattr(outcome, arm) for outcome in outcomes if outcome.kind == kind]
    return sum(label == "refuse" for label in labels) / len(labels) if labels else None


def _categories(outcomes: Sequence[PromptOutcome]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[PromptOutcome]] = {}
    for outcome in outcomes:
        if outcome.attack is None:
            groups.setdefault((outcome.kind, outcome.category), []).append(outcome)
    return [
        {
            "kind": kind,
            "category": category,
            "prompts": len(group),
            **{f"{arm}_refused": sum(getattr(o, arm) == "refuse" for o in group) for arm in _ARMS},
            "lost": sum(o.reference == "refuse" != o.artifact for o in group),
            "gained": sum(o.artifact == "refuse" != o.reference for o in group),
        }
        for (kind, category), group in sorted(groups.items())
    ]
