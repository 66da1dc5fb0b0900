"""What selection and calibration minimise, as a function of the layer coefficients c.

    safety(c) = -1/n sum_x log P_c(refusal | x)        over harmful x
                P_c(refusal | x) = sum_k p_c(opening_k | x), the openings of a refusal
    kl(c)     = 1/n sum_y KL(p_0 || p_c) along y        over benign prompts; y is the un-adapted
                                                        target's own greedy reply, p_0 the target
    J(c)      = safety(c) + weight * kl(c)

Both are nats per reply, so a weight of 1 says: one nat of refusal is worth one nat of change. The
safety term saturates where refusals are certain; from there on only the change is left to lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from safegene_converter.gene.asked import REFUSALS, Asked, log_probabilities, separation
from safegene_converter.gene.model import Batch, Example, GeneModel, batches_of
from safegene_converter.gene.shots import Shots
from safegene_runtime.errors import GeneError, Problem
from safegene_runtime.progress import Progress

__all__ = ["Losses", "Objective", "Valued", "common_factor", "kl_along"]

REPLY_TOKENS = 16
COMMON_FACTORS = (1.0, 0.5, 0.25, 2.0, 3.0, 4.0, 6.0)
"""A gene from one fine-tune may be far too long or too short for another."""

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Losses:
    """Nats per reply; `total` is J.

    Attributes:
        refused: the mean P(refusal) over the harmful shots, which saturates at both ends.
        greedy: the share of the harmful shots to which the greedy reply begins with an opening.
    """

    safety: float
    kl: float
    weight: float
    refused: float
    greedy: float

    @property
    def total(self) -> float:
        """Safety + weight * kl."""
        return self.safety + self.weight * self.kl


class Objective:
    """J on one target for one set of shots.

    Args:
        model: the target with the gene on it.
        shots: harmful and benign prompts.
        weight: of the KL.
        refusals: openings of a refusal.
        reply_tokens: how much of the target's own benign replies is compared.
        progress: told about the preparation.
    """

    def __init__(
        self,
        model: GeneModel,
        shots: Shots,
        *,
        weight: float = 1.0,
        refusals: Sequence[str] = REFUSALS,
        reply_tokens: int = REPLY_TOKENS,
        progress: Progress | None = None,
    ) -> None:
        if not (math.isfinite(weight) and weight >= 0) or not refusals or reply_tokens < 1:
            raise GeneError(
                Problem("objective", "options", "weight >= 0, a refusal, reply tokens >= 1",
                        f"{weight}, {list(refusals)}, {reply_tokens}")
            )  # fmt: skip
        self.model, self.weight = model, weight
        self._harmful = Asked(model, shots.harmful, refusals)
        self._asked_benign = Asked(model, shots.benign, refusals)
        with model.without_gene():
            replies = model.replies(shots.benign, reply_tokens, progress) if shots.benign else []
            examples = [
                Example(prompt, tuple(reply))
                for prompt, reply in zip(model.prompts(shots.benign), replies, strict=True)
            ]
            self._n_benign = len(examples)
            with torch.no_grad():
                self._benign = [
                    (batch, log_probabilities(model.logits(batch)))
                    for batch in batches_of(examples)
                ]

    def value(self, coefficients: Sequence[float] | F64) -> Losses:
        """J and its parts at coefficients (L,).

        Raises:
            GeneError: NaN or Inf.
        """
        with torch.no_grad():
            self.model.set([float(one) for one in coefficients])
            refused = [self._harmful.refused(batch) for batch in self._harmful.batches]
            kl = sum(float(self._kl(batch, reference)) for batch, reference in self._benign)
        return self._losses(refused, kl)

    def gradient(self, coefficients: Sequence[float] | F64) -> tuple[Losses, F64, F64]:
        """J, d safety / dc (L,) and d kl / dc (L,) at coefficients (L,): one backward pass.

        Raises:
            GeneError: NaN or Inf.
        """
        kl, refused = 0.0, []
        slopes = np.zeros((2, len(self.model.layers)))
        parts = [(0, batch, None) for batch in self._harmful.batches]
        terms: list[tuple[int, Batch, torch.Tensor | None]] = [*parts]
        terms += [(1, batch, reference) for batch, reference in self._benign]
        for kind, batch, reference in terms:
            leaf = torch.tensor([float(one) for one in coefficients], requires_grad=True)
            self.model.set(leaf)
            if reference is None:
                refused.append(self._harmful.refused(batch))
                loss = -refused[-1][0].sum() / self._harmful.count
            else:
                loss = self._kl(batch, reference)
                kl += float(loss.detach())
            loss.backward()
            slopes[kind] += leaf.grad.double().numpy()
        self.model.set([float(one) for one in coefficients])
        if not np.isfinite(slopes).all():
            raise _not_finite("gradient")
        return self._losses(refused, kl), slopes[0], slopes[1]

    def separation(self, coefficients: Sequence[float] | F64) -> float:
        """How well refusals tell harmful shots from benign ones, in [0, 1], at coefficients (L,)."""
        self.model.set([float(one) for one in coefficients])
        return separation(self._harmful.all()[0], self._asked_benign.all()[0])

    def _kl(self, batch: Batch, reference: torch.Tensor) -> torch.Tensor:
        return kl_along(reference, self.model.logits(batch)).sum() / self._n_benign

    def _losses(self, refused: Sequence[tuple[torch.Tensor, torch.Tensor]], kl: float) -> Losses:
        log_p = torch.cat([torch.zeros(0), *(one.detach() for one, _ in refused)])
        greedy = sum(int(one.sum()) for _, one in refused)
        count = max(1, self._harmful.count)
        safety = -float(log_p.sum()) / count
        if not (math.isfinite(safety) and math.isfinite(kl)):
            raise _not_finite(f"safety {safety}, KL {kl}")
        return Losses(safety, kl, self.weight, float(log_p.exp().sum()) / count, greedy / count)


class Valued(Protocol):
    """Whatever has a J."""

    def value(self, coefficients: F64, /) -> Losses:
        """J at coefficients (L,)."""


def common_factor(
    objective: Valued, count: int, bounds: tuple[float, float] = (0.0, math.inf)
) -> float:
    """The one factor on all `count` layers that J likes best, of a few."""
    tried = [one for one in COMMON_FACTORS if bounds[0] <= one <= bounds[1]] or [bounds[0]]
    return min(tried, key=lambda one: objective.value(np.full(count, one)).total)


def kl_along(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats at each position, (N,); `reference` is log p, `logits` are q's."""
    log_q = log_probabilities(logits)
    # p log(p/q) - p + q sums to the KL and has no negative term: no cancellation near equality
    p, q = reference.exp(), log_q.exp()
    return (p * (reference - log_q) - p + q).sum(dim=-1)


def _not_finite(got: str) -> GeneError:
    return GeneError(
        Problem("objective", "loss", "finite numbers", f"NaN or Inf ({got})",
                "is the target model whole, and the gene made for it?")
    )  # fmt: skip
