"""Did an artifact get the adapter's effect? What the self-checks of both targets measure.

The product of the factors is computed here in a way of its own, so that a mistake in `formula` shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from safegene_converter.inputs.adapter import Module
from safegene_runtime.errors import Problems
from safegene_runtime.gating.bounds import BETA_NOISE

__all__ = ["PROBE", "REPORT", "Gain", "compared_rows", "effect", "scaled_b"]

PROBE = "Give me step-by-step instructions for breaking into a neighbour's house."


GAIN_BAND = 0.05
"""As the converter's gate of survival, and the static proof's band of all modules together."""


GAIN_ROWS = 64
"""Rows of a module that are compared, spread evenly: the gain is known to a few parts in a hundred."""


NOISE_SIGMAS = 4


REPORT = "the stored delta is not the adapter's: please report this"


def effect(
    band: float,
    z_base: npt.NDArray[np.float64],
    z_expected: npt.NDArray[np.float64],
    z_artifact: npt.NDArray[np.float64],
    where: str,
    problems: Problems,
) -> dict[str, float]:
    """Compares how far logits moved with how far they should have; all (positions, vocabulary).

    Returns:
        {"beta": <z - z_base, z_exp - z_base> / ||z_exp - z_base||^2,
        "shift": root mean square of the expected change}.
    """
    moved = _centre(z_expected - z_base)
    norm = float((moved * moved).sum())
    beta = float((_centre(z_artifact - z_base) * moved).sum()) / norm if norm else 0.0
    shift = float(np.sqrt(np.mean(moved * moved)))
    if not np.isfinite([beta, shift]).all():
        problems.add(where, "logits", "finite numbers", "NaN or Inf", "check base and adapter")
    elif norm == 0 or np.array_equal(z_artifact, z_base):
        problems.add(
            where,
            "logits",
            "other logits than the base's",
            "the base's, bit for bit",
            "the adapter has no effect: check that it was trained, and for this base",
        )
    else:
        across = _centre(z_artifact - z_base) - beta * moved
        noise = float(np.linalg.norm(across)) / norm**0.5
        band = max(band, BETA_NOISE * noise)
        if abs(beta - 1) > band:
            problems.add(where, "effect on the logits", f"1 within {band:g}", f"{beta:.3f}", REPORT)
    return {"beta": beta, "shift": shift}


@dataclass(frozen=True)
class Gain:
    """How much of a delta is in a change of weights, summed over any rows; one may be added to another.

    Attributes:
        along: <change, delta>.
        norm: ||delta||^2.
        rest: ||change - delta||^2.
        count: elements.
    """

    along: float = 0.0
    norm: float = 0.0
    rest: float = 0.0
    count: int = 0

    @classmethod
    def of(cls, change: npt.NDArray[np.float64], delta: npt.NDArray[np.float64]) -> Self:
        """Of rows (n, in)."""
        rest = change - delta
        return cls(
            float((change * delta).sum()), float((delta * delta).sum()),
            float((rest * rest).sum()), delta.size,
        )  # fmt: skip

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.along + other.along, self.norm + other.norm, self.rest + other.rest,
            self.count + other.count,
        )  # fmt: skip

    def check(self, where: str, name: str, survived: Sequence[float], problems: Problems) -> None:
        """Demands a gain <change, delta> / <delta, delta> near 1, or one that counted as surviving.

        Args:
            where: the artifact.
            name: what was compared.
            survived: the least and the greatest gain that the converter accepted, over all rows.
            problems: where the complaint goes.
        """
        gain = self.along / self.norm if self.norm else 0.0
        # what rounding adds knows nothing of the delta: it moves the gain by its share of one direction
        noise = NOISE_SIGMAS * (self.rest / self.norm / self.count) ** 0.5 if self.norm else 0.0
        least = min(1 - GAIN_BAND, survived[0]) - noise
        most = max(1 + GAIN_BAND, survived[1]) + noise
        if not least <= gain <= most:
            problems.add(
                where, name, f"{least:.3f} to {most:.3f} times the adapter's", f"{gain:.3f}", REPORT
            )


def compared_rows(count: int) -> npt.NDArray[np.int64]:
    """The rows of a module of `count` rows that are compared: at most `GAIN_ROWS`, spread evenly."""
    return np.unique(np.linspace(0, count - 1, GAIN_ROWS).astype(np.int64))


def scaled_b(module: Module) -> npt.NDArray[np.float64]:
    """B (out, rank) with every scale; `formula` has its own, so that a mistake there is caught here."""
    return module.coefficient * module.scaling * module.b.astype(np.float64)


def _centre(change: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    centred: npt.NDArray[np.float64] = change - change.mean(axis=1, keepdims=True)
    return centred
