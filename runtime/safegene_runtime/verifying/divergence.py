"""Where an artifact's reply leaves the reference's, and whether rounding explains it.

Two tokens that the reference finds almost equally likely may swap places by rounding, and greedy
replies part from there on. So the first differing token of a reply is a `tie` when the reference
preferred its own by less than the noise of the artifact's precision, and `unexplained` otherwise.
The distance is to the token that the artifact chose, not to the runner-up: a third token far below
is no tie, however near the first two are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from safegene_runtime.record.reference import Reference

__all__ = ["GAP_NOISE", "Divergence", "first_divergence"]

GAP_NOISE: Mapping[str, float] = {
    "f32": 1e-3,
    "f16": 0.02,
    "bf16": 0.1,
    "8-bit": 0.5,
    "6-bit": 0.7,
    "5-bit": 1.0,
    "4-bit": 1.3,
    "low-bit": 1.3,
}
"""Largest distance of two logits that rounding may reverse, by class of precision.

For f16, bf16 and 8 bits five times the median distance where greedy replies of SmolLM2-135M parted
(0.004, 0.02, 0.10); for 4 bits the largest that was seen; 6 and 5 bits lie between. Coarser types get
no more: what they lose is to be seen.
"""


@dataclass(frozen=True)
class Divergence:
    """The first token of a reply that is not the reference's.

    Attributes:
        position: in the reply, from 0.
        gap: by how much the reference preferred its own token, nats; a lower bound where the
            artifact's token is not stored, None where one reply ends and the other goes on.
        kind: `tie` or `unexplained`.
        reference: the reference's token, None past its end.
        artifact: likewise.
    """

    position: int
    gap: float | None
    kind: Literal["tie", "unexplained"]
    reference: int | None
    artifact: int | None


def first_divergence(
    record: Reference,
    index: int,
    artifact_ids: Sequence[int],
    precision: str,
    noise: float | None = None,
) -> Divergence | None:
    """Finds and classifies the first divergence of one reply; None for equal replies.

    Args:
        record: the reference.
        index: of the prompt.
        artifact_ids: the artifact's greedy reply, stop id included.
        precision: class of the artifact; an unknown one is allowed the least noise.
        noise: replaces the table's limit, nats.
    """
    ref_ids = record.prompts[index].ref_ids
    at = next(
        (n for n, (a, b) in enumerate(zip(ref_ids, artifact_ids, strict=False)) if a != b),
        min(len(ref_ids), len(artifact_ids)),
    )
    if at == len(ref_ids) == len(artifact_ids):
        return None
    ours = int(artifact_ids[at]) if at < len(artifact_ids) else None
    theirs = ref_ids[at] if at < len(ref_ids) else None
    if ours is None or theirs is None:
        return Divergence(at, None, "unexplained", theirs, ours)
    limit = GAP_NOISE.get(precision, GAP_NOISE["f32"]) if noise is None else noise
    gap, exact = _gap(record, index, at, theirs, ours)
    return Divergence(at, gap, "tie" if exact and gap < limit else "unexplained", theirs, ours)


def _gap(record: Reference, index: int, at: int, theirs: int, ours: int) -> tuple[float, bool]:
    """The reference's logit of its own token minus that of another; whether that is exact.

    A token that is not stored is less likely, in both arms, than the greater of the two
    probabilities of every stored one.
    """
    here = record.positions(index)
    ref = here.ref_logits[at].astype(np.float64)
    stored = {int(one): float(z) for one, z in zip(here.top_ids[at], ref, strict=True)}
    own = stored.get(theirs, float(ref.max()))
    if ours in stored:
        return own - stored[ours], theirs in stored
    base = here.base_logits[at].astype(np.float64) - here.base_lse[at] + here.ref_lse[at]
    return max(own - float(np.maximum(ref, base).min()), 0.0), False
