"""Two small minimisers for a handful of coefficients inside bounds; both are deterministic.

With gradients: Adam (arXiv 1412.6980), projected onto the bounds, the best point seen is the result.
Without: one factor on all coefficients first, then one coefficient at a time (compass search), both
with multiplicative steps that halve when nothing improves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safegene_converter.gene.checkpoint import Checkpoint
from safegene_runtime.errors import GeneError, Problem
from safegene_runtime.progress import Step

__all__ = ["Minimum", "Settings", "minimise", "search"]

F64 = npt.NDArray[np.float64]
BETAS = (0.8, 0.9)
"""Shorter memories than usual: slopes are exact, and shrink by orders of magnitude on the way."""
SMALL = 1e-8
SCALES = (0.5, 0.7, 0.85, 1.2, 1.4, 2.0)
FIRST_FACTOR = 1.3
LAST_FACTOR = 1.01


@dataclass(frozen=True)
class Settings:
    """Bounds and when to stop.

    Attributes:
        bounds: of every coefficient; the lower one is above 0, which no adapter may hold.
        rate: Adam's first step size; it falls linearly to a tenth at `max_steps`.
        max_steps: gradients at most.
        patience: stop after so many steps without a relative gain of `tolerance`.
    """

    bounds: tuple[float, float] = (0.05, 8.0)
    rate: float = 0.1
    max_steps: int = 40
    patience: int = 6
    tolerance: float = 5e-3

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not (0 < low < high and math.isfinite(high)):
            raise GeneError(
                Problem("calibrate", "bounds", "0 < lower < upper", f"{low}, {high}",
                        "a layer is dropped by selection, not by a coefficient of 0")
            )  # fmt: skip
        if self.rate <= 0 or self.max_steps < 1 or self.patience < 1 or self.tolerance < 0:
            raise GeneError(
                Problem("calibrate", "options", "a rate, steps and patience above 0",
                        f"{self.rate}, {self.max_steps}, {self.patience}")
            )  # fmt: skip


@dataclass(frozen=True)
class Minimum:
    """The best point seen.

    Attributes:
        history: the value at every evaluation, in order.
        converged: whether it stopped by itself, not by the limit.
    """

    coefficients: F64
    value: float
    history: tuple[float, ...]
    converged: bool


def minimise(
    gradient: Callable[[F64], tuple[float, F64]],
    start: F64,
    settings: Settings,
    checkpoint: Checkpoint | None = None,
    tell: Step | None = None,
    stage: str = "step",
) -> Minimum:
    """Minimises with gradients.

    Args:
        gradient: coefficients (L,) -> value, slope (L,).
        start: (L,).
        settings: bounds and limits.
        checkpoint: steps that were done before are taken from it.
        tell: told how many steps are done.
        stage: the steps' name in the checkpoint, which may hold those of several minima.

    Raises:
        GeneError: a value or slope that is not finite.
    """
    point = np.clip(start.astype(np.float64), *settings.bounds)
    first, second = np.zeros_like(point), np.zeros_like(point)
    best, best_value, since = point, math.inf, 0
    history: list[float] = []
    for step in range(1, settings.max_steps + 1):
        kept = checkpoint.load(f"{stage} {step}") if checkpoint else None
        if kept is None:
            value, slope = gradient(point)
        else:
            value, slope = float(kept["value"]), kept["slope"]
        _check_finite(value, slope)
        if checkpoint and kept is None:
            checkpoint.save(f"{stage} {step}", value=value, slope=slope)
        history.append(value)
        if tell:
            tell(step)
        is_better = value < best_value - settings.tolerance * abs(best_value)
        since = 0 if is_better or not math.isfinite(best_value) else since + 1
        if value < best_value:
            best, best_value = point.copy(), value
        if since >= settings.patience:
            return Minimum(best, best_value, tuple(history), True)
        first = BETAS[0] * first + (1 - BETAS[0]) * slope
        second = BETAS[1] * second + (1 - BETAS[1]) * slope**2
        move = first / (1 - BETAS[0] ** step)
        move = move / (np.sqrt(second / (1 - BETAS[1] ** step)) + SMALL)
        # steps shrink to a tenth, so that it settles instead of circling the minimum
        rate = settings.rate * (1 - 0.9 * step / settings.max_steps)
        point = np.clip(point - rate * move, *settings.bounds)
    return Minimum(best, best_value, tuple(history), False)


def search(
    value: Callable[[F64], float],
    start: F64,
    bounds: tuple[float, float],
    max_evaluations: int,
    tell: Step | None = None,
) -> Minimum:
    """Minimises without gradients, in at most `max_evaluations` evaluations.

    The start is evaluated first, so the result is never worse than it.

    Raises:
        GeneError: a value that is not finite.
    """
    history: list[float] = []
    seen: dict[tuple[float, ...], float] = {}

    def at(point: F64) -> float:
        key = tuple(np.round(point, 6))
        if key not in seen:
            if len(history) >= max_evaluations:
                raise _SpentError
            found = value(point)
            _check_finite(found, point)
            seen[key] = found
            history.append(found)
            if tell:
                tell(len(history))
        return seen[key]

    best = np.clip(start.astype(np.float64), *bounds)
    best_value = math.inf
    converged = False
    try:
        best_value = at(best)
        for scale in SCALES:
            point = np.clip(start * scale, *bounds)
            if at(point) < best_value:
                best, best_value = point, at(point)
        factor = FIRST_FACTOR
        while factor > LAST_FACTOR:
            improved = False
            for index in range(len(best)):
                for step in (factor, 1 / factor):
                    point = best.copy()
                    point[index] = np.clip(point[index] * step, *bounds)
                    if at(point) < best_value:
                        best, best_value, improved = point, at(point), True
                        break
            if not improved:
                factor = math.sqrt(factor)
        converged = True
    except _SpentError:
        pass
    return Minimum(best, best_value, tuple(history), converged)


class _SpentError(Exception):
    """No evaluations are left."""


def _check_finite(value: float, other: F64) -> None:
    if not (math.isfinite(value) and np.isfinite(other).all()):
        raise GeneError(
            Problem("calibrate", "loss", "finite numbers", f"NaN or Inf (loss {value})",
                    "is the target model whole, and the gene made for it?")
        )  # fmt: skip
