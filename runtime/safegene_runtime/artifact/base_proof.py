"""How the plain base of an artifact was proved, as the manifest tells it and the ladder repeats it.

An artifact carries a base. Where its format was changed on the way (Hugging Face to GGUF or ONNX, GGUF to
ONNX) two conversions may be wrong alike and agree with each other, so the plain base is run in the engine
of its source and in that of its target, along the same tokens, before the adapter is folded in.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from safegene_runtime.errors import Problems
from safegene_runtime.formats.fields import NAME, Kind, check_fields, integer
from safegene_runtime.gating.bounds import BOUNDS

__all__ = ["NOT_PROVED", "UNCHANGED", "BaseProof", "check_base_proof", "proof_words"]

UNCHANGED: dict[str, Any] = {"how": "unchanged"}
"""The artifact's base is in the format in which it was given: nothing was converted."""
NOT_PROVED = "base not proved"


@dataclass(frozen=True)
class BaseProof:
    """Logits of the plain base in the source's engine against those of the target; nats.

    Attributes:
        source: the engine that is right by definition, with version.
        target: the engine that runs what was made.
        prompts: how many, and `positions` how many logits of them were compared.
        positions: see `prompts`.
        longest: tokens of the longest prompt.
        kl_mean: mean KL(source || target) over all positions.
        kl_worst: the largest mean of one prompt; this is held to `bound`.
        kl_max: the largest of one position.
        bound: of the types involved.
        why: why this bound, and what the longest prompt was to reach.
    """

    source: str
    target: str
    prompts: int
    positions: int
    longest: int
    kl_mean: float
    kl_worst: float
    kl_max: float
    bound: float
    why: str

    def to_dict(self) -> dict[str, Any]:
        """`base.proof` of the manifest."""
        return {"how": "logits", **asdict(self)}


_COUNT = integer(1)
_KL = Kind((int, float), "a number", "a KL, 0 or more", lambda one: one >= 0)
_BOUND_VALUES = frozenset(bounds.kl_ceiling for bounds in BOUNDS.values())
_FIGURES = ("kl_mean", "kl_worst", "kl_max", "bound")
_LOGITS: dict[str, Kind] = {
    **dict.fromkeys(("how", "source", "target", "why"), NAME),
    **dict.fromkeys(("prompts", "positions", "longest"), _COUNT),
    **dict.fromkeys(_FIGURES, _KL),
}


def check_base_proof(proof: Any, unchanged: bool, where: str, problems: Problems) -> None:
    """Notes what a `base.proof` says that no conversion writes.

    Args:
        proof: the entry; None says that nothing was proved.
        unchanged: whether the base has the format of the artifact.
        where: of the entry, for the message.
        problems: what is wrong is added here.
    """
    if proof is None:
        return
    wanted = "unchanged" if unchanged else "logits"
    if proof.get("how") != wanted:
        problems.add(where, "how", f"{wanted}, or no proof", repr(proof.get("how"))[:80])
        return
    fields = {"how": NAME} if unchanged else _LOGITS
    if not check_fields(proof, where, fields, problems) or unchanged:
        return
    mean, worst, highest, bound = (proof[name] for name in _FIGURES)
    if not mean <= worst * (1 + 1e-9) or not worst <= highest * (1 + 1e-9) or not worst <= bound:
        got = f"{mean:g}, {worst:g}, {highest:g}, {bound:g}"
        problems.add(where, "kl", "kl_mean <= kl_worst <= kl_max, and kl_worst <= bound", got)
    if bound not in _BOUND_VALUES:
        problems.add(where, "bound", "that of a class of precision", f"{bound:g}")
    if not proof["prompts"] <= proof["positions"]:
        problems.add(where, "positions", "at least one per prompt", proof["positions"])


def proof_words(proof: dict[str, Any] | None) -> str:
    """How the base was proved, in a few words, for the ladder."""
    if proof is None:
        return NOT_PROVED
    if proof == UNCHANGED:
        return "base in its own format"
    return (
        f"base proved on {proof['positions']} positions: mean KL {proof['kl_mean']:.1e}, "
        f"worst prompt {proof['kl_worst']:.1e}, bound {proof['bound']:g}"
    )
