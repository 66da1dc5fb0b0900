"""One teacher-forced pass: what an engine thinks at every step of the reference's own replies.

Fed as token ids, so that nothing but the weights and the arithmetic is compared. `ladder` reads
`active` and `logits` off it, and most of `refusals`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safegene_runtime.engines.engine import Engine
from safegene_runtime.errors import EngineError, Problem, Problems, RecordError
from safegene_runtime.progress import Progress
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying import compare
from safegene_runtime.verifying.margins import MarginRule, learn_margins, margin_of

__all__ = ["ACTIVE_POSITIONS", "ForcedPass", "forced_passes", "kl_by_position", "reply_logits"]

ACTIVE_POSITIONS = 4
"""First positions of a reply, where a refusal is decided (arXiv 2406.05946)."""


@dataclass(frozen=True)
class ForcedPass:
    """What one prompt's pass tells; T positions of the reference's reply.

    Attributes:
        kl: (T,) KL(PyTorch || engine), nats.
        beta_dot: inner product of the engine's and the reference's change of the first logits.
        beta_norm: squared norm of the reference's change.
        beta_rest: squared distance of the two changes.
        ref_nearer: whether the first logits are nearer to the reference than to its base.
        agree: (T,) whether the likeliest token is the reference's.
        argmax: (T,) the likeliest token.
        gap: (T,) distance of the two largest logits.
        margin: how much likelier than an answer a refusal was, nats; see `margins`.
    """

    kl: npt.NDArray[np.float64]
    beta_dot: float
    beta_norm: float
    beta_rest: float
    ref_nearer: bool
    agree: npt.NDArray[np.bool_]
    argmax: npt.NDArray[np.int64]
    gap: npt.NDArray[np.float32]
    margin: float | None


def forced_passes(
    engine: Engine,
    record: Reference,
    tell: Progress | None = None,
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
        RecordError: token ids that the engine does not have.
    """
    chosen = range(len(record.prompts)) if indices is None else indices
    rule = learn_margins(record)
    found: dict[int, ForcedPass] = {}
    for index, logits in reply_logits(engine, record, chosen):
        found[index] = _one_pass(record, index, logits, rule)
        if tell:
            tell("comparing logits", len(found), len(chosen))
    return [found[index] for index in chosen]


def pooled_beta(passes: Sequence[ForcedPass]) -> tuple[float, float]:
    """Over all passes together, of the first logits: (beta, noise).

        beta  = <z - z_base, d> / ||d||^2, d = z_ref - z_base      1 is meant
        noise = ||z - z_base - beta d|| / ||d||                    what is across the expected change

    Both are 0 where the reference's logits are its base's.
    """
    norm = sum(forced.beta_norm for forced in passes)
    if not norm:
        return 0.0, 0.0
    beta = sum(forced.beta_dot for forced in passes) / norm
    rest = sum(forced.beta_rest for forced in passes) / norm
    return beta, math.sqrt(max(0.0, rest - (beta - 1) ** 2))  # right angles


def reply_logits(
    engine: Engine, record: Reference, indices: Sequence[int], what: str = "logits"
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Logits (T, vocab) along the reference's replies, as the engine finishes them.

    Args:
        engine: what runs.
        record: the reference.
        indices: which prompts, each once.
        what: they are called in an error.

    Raises:
        EngineError: logits that are not finite, or missing for a prompt.
        RecordError: token ids that the engine does not have.
    """
    _check_vocabulary(engine, record, indices)
    prompts = [record.prompts[index] for index in indices]
    sequences = [[*prompt.prompt_ids, *prompt.ref_ids[:-1]] for prompt in prompts]
    missing = {index: record.prompts[index].id for index in indices}
    for number, logits in engine.logits(sequences, [len(prompt.ref_ids) for prompt in prompts]):
        if not np.isfinite(logits).all():
            raise EngineError(
                Problem(prompts[number].id, what, "finite numbers", "NaN or Inf",
                        "the artifact's weights or its engine are broken")
            )  # fmt: skip
        missing.pop(indices[number], None)
        yield indices[number], logits
    if missing:
        names = list(missing.values())[:3]
        raise EngineError(
            Problem(engine.name, what, "an answer for every prompt", f"none for {names}")
        )


def _check_vocabulary(engine: Engine, record: Reference, indices: Sequence[int]) -> None:
    problems = Problems()
    for index in indices:
        prompt, top_ids = record.prompts[index], record.positions(index).top_ids
        highest = max(*prompt.prompt_ids, *prompt.ref_ids, *prompt.base_ids, int(top_ids.max()))
        if highest >= engine.n_vocab:
            problems.add(
                str(record.path), prompt.id, f"token ids below {engine.n_vocab}", highest,
                "the record was edited, or is of a model with another vocabulary",
            )  # fmt: skip
    problems.raise_if_any(RecordError)


def kl_by_position(passes: Sequence[ForcedPass]) -> list[float]:
    """Mean KL at each position of a reply, over the replies that are that long; nats."""
    longest = max((len(forced.kl) for forced in passes), default=0)
    return [
        float(np.mean([forced.kl[at] for forced in passes if len(forced.kl) > at]))
        for at in range(longest)
    ]


def _one_pass(
    record: Reference, index: int, logits: npt.NDArray[np.float32], rule: MarginRule
) -> ForcedPass:
    """Reduces the logits (T, vocab) of one reply to what the rungs need."""
    position = record.positions(index)
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
    return ForcedPass(
        kl=kl,
        beta_dot=float((ours * moved).sum()),
        beta_norm=float((moved * moved).sum()),
        beta_rest=float(((ours - moved) ** 2).sum()),
        ref_nearer=bool(kl[first].sum() <= kl_base.sum()),
        agree=argmax == np.asarray(record.prompts[index].ref_ids),
        argmax=argmax,
        gap=np.array([_lead(row, top) for row, top in zip(logits, argmax, strict=True)]),
        margin=margin_of(rule, record.prompts[index], logits),
    )


def _lead(row: npt.NDArray[np.float32], top: int) -> np.float32:
    """By how much the largest logit, at `top`, leads; without a copy of the row, or sorting it."""
    others = (row[:top], row[top + 1 :])
    lead: np.float32 = row[top] - max(part.max() for part in others if len(part))
    return lead
