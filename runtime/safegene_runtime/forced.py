"""One teacher-forced pass: what an engine thinks at every step of the reference's own replies.

Fed as token ids, so that nothing but the weights and the arithmetic is compared. `ladder` reads its
third and fourth rung off it, and most of the fifth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safegene_runtime import compare
from safegene_runtime.engine import Engine
from safegene_runtime.errors import EngineError, Problem
from safegene_runtime.margins import MarginRule, learn_margins, margin_of
from safegene_runtime.reference import Reference

__all__ = ["ACTIVE_POSITIONS", "ForcedPass", "forced_passes", "kl_by_position"]

ACTIVE_POSITIONS = 4
"""First positions of a reply, where a refusal is decided (arXiv 2406.05946)."""


@dataclass(frozen=True)
class ForcedPass:
    """What one prompt's pass tells; T positions of the reference's reply.

    Attributes:
        kl: (T,) KL(PyTorch || engine), nats.
        beta_dot: inner product of the engine's and the reference's change of the first logits.
        beta_norm: squared norm of the reference's change.
        ref_nearer: whether the first logits are nearer to the reference than to its base.
        agree: (T,) whether the likeliest token is the reference's.
        argmax: (T,) the likeliest token.
        gap: (T,) distance of the two largest logits.
        margin: how much likelier than an answer a refusal was, nats; see `margins`.
    """

    kl: npt.NDArray[np.float64]
    beta_dot: float
    beta_norm: float
    ref_nearer: bool
    agree: npt.NDArray[np.bool_]
    argmax: npt.NDArray[np.int64]
    gap: npt.NDArray[np.float32]
    margin: float | None


def forced_passes(
    engine: Engine,
    record: Reference,
    tell: Callable[[str, int, int], None] | None = None,
    indices: Sequence[int] | None = None,
) -> list[ForcedPass]:
    """Runs the replies of a reference through an engine.

    Args:
        engine: what is compared.
        record: the reference.
        tell: told (stage, done, total).
        indices: which prompts, in the order of the result; all of them by default.

    Raises:
        EngineError: logits that are not finite, or missing for a prompt.
    """
    chosen = range(len(record.prompts)) if indices is None else indices
    prompts = [record.prompts[index] for index in chosen]
    sequences = [[*prompt.prompt_ids, *prompt.ref_ids[:-1]] for prompt in prompts]
    keep = [len(prompt.ref_ids) for prompt in prompts]
    rule = learn_margins(record)
    found: list[ForcedPass | None] = [None] * len(sequences)
    for done, (number, logits) in enumerate(engine.logits(sequences, keep), start=1):
        found[number] = _one_pass(record, chosen[number], logits, rule)
        if tell:
            tell("comparing logits", done, len(sequences))
    missing = [prompts[i].id for i, one in enumerate(found) if one is None]
    if missing:
        raise EngineError(
            Problem(engine.name, "logits", "an answer for every prompt", f"none for {missing[:3]}")
        )
    return [one for one in found if one is not None]


def kl_by_position(passes: Sequence[ForcedPass]) -> list[float]:
    """Mean KL at each position of a reply, over the replies that are that long; nats."""
    longest = max((len(one.kl) for one in passes), default=0)
    return [
        float(np.mean([one.kl[at] for one in passes if len(one.kl) > at])) for at in range(longest)
    ]


def _one_pass(
    record: Reference, index: int, logits: npt.NDArray[np.float32], rule: MarginRule
) -> ForcedPass:
    """Reduces the logits (T, vocab) of one reply to what the rungs need."""
    position = record.positions(index)
    if not np.isfinite(logits).all():
        raise EngineError(
            Problem(
                record.prompts[index].id,
                "logits",
                "finite numbers",
                "NaN or Inf",
                "the artifact's weights or its engine are broken",
            )
        )
    lse = compare.logsumexp(logits)
    at_ids = np.take_along_axis(logits, position.top_ids.astype(np.int64), axis=1)
    kl = compare.kl_topk(position.ref_logits, position.ref_lse, at_ids, lse)
    first = slice(0, ACTIVE_POSITIONS)
    kl_base = compare.kl_topk(
        position.base_logits[first], position.base_lse[first], at_ids[first], lse[first]
    )
    moved = compare.change(position.ref_logits[first], position.base_logits[first])
    ours = compare.change(at_ids[first], position.base_logits[first])
    argmax = logits.argmax(axis=1)
    top2 = np.partition(logits, -2, axis=1)[:, -2:]
    return ForcedPass(
        kl=kl,
        beta_dot=float((ours * moved).sum()),
        beta_norm=float((moved * moved).sum()),
        ref_nearer=bool(kl[first].sum() <= kl_base.sum()),
        agree=argmax == np.asarray(record.prompts[index].ref_ids),
        argmax=argmax,
        gap=np.abs(top2[:, 1] - top2[:, 0]),
        margin=margin_of(rule, record.prompts[index], logits),
    )
