"""The only home of the formula:  ΔW = c · s · B·A.

    A (r, in), B (out, r)   the factors as PEFT stores them
    s                       PEFT's scaling: alpha / r, or alpha / sqrt(r) under rsLoRA
                            (Kalajdzievski 2023, arXiv 2312.03732; peft LoraLayer.update_layer)
    c                       the layer's coefficient in the chosen expression
                            (SafeGene, arXiv 2606.06519); 1 for a plain LoRA

Everything that writes, checks or prints a scale or a product calls this module. The one exception is on
purpose: the self-checks recompute the product in their own way (`fold.effect`), so that a mistake here is
caught there.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["LowRank", "delta", "effective_scale", "product", "scaled_b", "scaling"]

Rows = npt.NDArray[np.float32]


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


def scaled_b(module: LowRank) -> Rows:
    """C · s · B, (out, r) float32: the product in float64, rounded once."""
    return (module.b.astype(np.float64) * effective_scale(module)).astype(np.float32)


def delta(module: LowRank, rows: slice | npt.NDArray[np.integer[Any]] = slice(None)) -> Rows:
    """ΔW or some of its rows, (rows, in) float32: computed in float64, rounded once.

    Args:
        module: the factors and their scales.
        rows: which, by their place in B; indices where a file holds them in another order.
    """
    return product(module.b[rows].astype(np.float64) * effective_scale(module), module.a)


def product(b: npt.NDArray[Any], a: npt.NDArray[Any]) -> Rows:
    """B·A of factors that hold every scale, (out, in) float32: computed in float64, rounded once."""
    return (b.astype(np.float64, copy=False) @ a.astype(np.float64)).astype(np.float32)
