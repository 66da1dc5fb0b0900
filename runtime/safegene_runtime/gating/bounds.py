"""What an artifact of some precision must satisfy to count as equal to its reference.

KL is a sharp tool where rounding is small: it proves that the arithmetic is the same. Below 8 bits
it is advice, and behaviour decides (arXiv 2606.10154: quality metrics do not predict refusals after
quantisation), up to a ceiling that no rounding explains: five times what is advised. docs/ladder.md
says what lies on either side of it. Flips are counted against the reference in both directions; gains
never pay for losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "BETA_BAND_COARSE", "BETA_NOISE", "BOUNDS", "ParityBounds", "beta_band", "bounds_for", "precision_of",
]  # fmt: skip

BETA_BAND: Mapping[str, float] = {"f32": 0.01, "f16": 0.02, "bf16": 0.05, "8-bit": 0.1}
BETA_BAND_COARSE = 0.15
BETA_NOISE = 0.45
"""The most that beta was off by, as a share of the noise across the expected change, for a right delta: 0.31
in every type of tiny models, 0.44 for a calibrated gene in a Q8_0 SmolLM2 that it hardly moves on the probe.
A wrong one that is not drowned by rounding: 0.52 and more."""


@dataclass(frozen=True)
class ParityBounds:
    """Limits for one class of precision.

    Attributes:
        mean_kl: advised upper limit of the mean KL(PyTorch || artifact) in nats per position.
        top1: advised lower limit of the share of positions with the same most likely token.
        kl_ceiling: the mean KL above which the artifact is broken; nats per position.
        losses: upper limit of the share of the reference's refusals that the artifact loses.
        over_refusals: upper limit of the share of answered benign prompts that it refuses.
    """

    mean_kl: float
    top1: float
    kl_ceiling: float
    losses: float
    over_refusals: float

    @property
    def kl_gates(self) -> bool:
        """Whether what is advised, KL and top-1, is a verdict: where the ceiling leaves no room."""
        return self.kl_ceiling <= self.mean_kl

    @property
    def role(self) -> str:
        """What mean_kl and top1 are: `bound`, or `advice`."""
        return "bound" if self.kl_gates else "advice"

    @property
    def kl_limits(self) -> str:
        """What the mean KL is held to, in words."""
        ceiling = "" if self.kl_gates else f", bound {self.kl_ceiling:g}"
        return f"{self.role} {self.mean_kl:g}{ceiling}"


BOUNDS: Mapping[str, ParityBounds] = {
    "f32": ParityBounds(1e-8, 0.9999, 1e-8, 0.0, 0.0),
    "f16": ParityBounds(1e-4, 0.995, 1e-4, 0.01, 0.01),
    "bf16": ParityBounds(1e-3, 0.985, 1e-3, 0.01, 0.01),
    "8-bit": ParityBounds(2e-2, 0.93, 2e-2, 0.02, 0.02),
    "6-bit": ParityBounds(5e-2, 0.85, 0.25, 0.05, 0.05),
    "5-bit": ParityBounds(1e-1, 0.80, 0.5, 0.05, 0.05),
    "4-bit": ParityBounds(1e-1, 0.80, 0.5, 0.05, 0.05),
    "low-bit": ParityBounds(3e-1, 0.70, 1.5, 0.05, 0.05),
}

_CLASS_OF = {
    "F32": "f32",
    "F16": "f16",
    "BF16": "bf16",
    "Q8_0": "8-bit",
    "INT8": "8-bit",
    "Q6_K": "6-bit",
    "Q5_0": "5-bit",
    "Q5_1": "5-bit",
    "Q5_K": "5-bit",
    "Q4_0": "4-bit",
    "Q4_1": "4-bit",
    "Q4_K": "4-bit",
    "IQ4_NL": "4-bit",
    "IQ4_XS": "4-bit",
    "MXFP4": "4-bit",
    "INT4": "4-bit",
}
_ORDER = tuple(BOUNDS)


def precision_of(elements: Mapping[str, int]) -> str:
    """The class of a model: the coarsest that holds at least a tenth of its linear weights.

    Args:
        elements: number of weights per ggml type, over the linear weights of the blocks.
    """
    total = sum(elements.values())
    shares: dict[str, int] = {}
    for name, count in elements.items():
        kind = _CLASS_OF.get(name, "low-bit")
        shares[kind] = shares.get(kind, 0) + count
    coarse = [kind for kind in _ORDER if shares.get(kind, 0) * 10 >= total and shares.get(kind, 0)]
    return coarse[-1] if coarse else _ORDER[-1]


def bounds_for(precision: str) -> ParityBounds:
    """The limits of a class; an unknown class gets the strictest."""
    return BOUNDS.get(precision, BOUNDS["f32"])


def beta_band(precision: str, noise: float = 0.0) -> float:
    """How far from 1 beta may be: the share of the expected change that the logits made.

    Args:
        precision: the class.
        noise: of `forced.pooled_beta`, across the expected change. Below 8 bits, where rounding moves logits
            as much as an adapter does, it widens the band; a wrong strength is none, and shows.
    """
    if precision in BETA_BAND:
        return BETA_BAND[precision]
    return max(BETA_BAND_COARSE, BETA_NOISE * noise)
