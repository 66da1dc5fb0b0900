"""The only home of the formula:  ΔW = c · s · B·A.

    A (r, in), B (out, r)   the factors as PEFT stores them
    s                       PEFT's scaling: alpha / r, or alpha / sqrt(r) under rsLoRA
                            (Kalajdzievski 2023, arXiv 2312.03732; peft LoraLayer.update_layer)
    c                       the layer's coefficient in the chosen expression
                            (SafeGene, arXiv 2606.06519); 1 for a plain LoRA

Everything that writes, checks or prints a scale calls this module. The one exception is on purpose:
`selfcheck` recomputes the product its own way, so that a mistake here is caught there.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["LowRank", "delta", "effective_scale", "scaled_b", "scaling"]


class LowRank(Protocol):
    """What the formula needs to know of a module."""

    @property
    def a(self) -> npt.NDArray[np.float32]:
        """(r, in) float32."""

    @property
    def b(self) -> npt.NDArray[np.float32]:
        """(out, r) float32."""

    @property
    def scaling(self) -> float:
        """S."""

    @property
    def coefficient(self) -> float:
        """C."""


def scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """PEFT's s for a module of this rank and alpha."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def effective_scale(module: LowRank) -> float:
    """C · s."""
    return module.coefficient * module.scaling


def scaled_b(module: LowRank) -> npt.NDArray[np.float32]:
    """C · s · B, (out, r) float32: the product in float64, rounded once."""
    return (module.b.astype(np.float64) * effective_scale(module)).astype(np.float32)


def delta(module: LowRank) -> npt.NDArray[np.float32]:
    """ΔW, (out, in) float32: computed in float64, rounded once."""
    scaled = module.b.astype(np.float64) * effective_scale(module)
    return (scaled @ module.a.astype(np.float64)).astype(np.float32)
