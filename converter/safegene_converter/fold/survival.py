"""How much of the safety delta is left in the weights that are stored.

A delta is a small, structured change of the weights; storing weights on a quantised grid rounds it.
Two ways to store it, two ways to fail:

- `Mode.GRID`: the base is kept as stored, on the grid it already is on, and the merged weights go
  back onto a grid of the same kind. Rounding then favours the base: a delta smaller than half a
  step disappears, everywhere at once. gain = <W_stored - W_base, dW> / <dW, dW> says which share
  was kept, and relative error = ||W_stored - W_base - dW|| / ||dW|| how much of something else
  came with it. Both are bounded.
- `Mode.ONCE`: a float base is merged in float and quantised once. The rounding noise is larger
  than the delta, but it is the noise that the quantised base has anyway, and it favours nothing.
  The gain is bounded, and the error against the base's own quantisation error,
  ||W_stored - (W_base + dW)|| <= 1.1 x ||Q(W_base) - W_base||. A "float" base that secretly lies on
  the grid of the type (weights that were dequantised) has next to no error of its own, so an erased
  delta stands out; where such a store is exact enough to pass the bounds of `GRID`, it passes.

All sums are accumulated in float64, a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from safegene_converter.encoding import ggml_quantizer
from safegene_runtime.errors import Problem, SurvivalError
from safegene_runtime.formats.gguf.types import GGMLType, type_traits

__all__ = ["Bounds", "Meter", "Mode", "Survival", "candidates", "passes"]

FloatRows = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 18
"""Elements turned to float64 at a time: 2 MiB per operand."""


class Mode(StrEnum):
    """What the stored weights are compared with; see the module's description."""

    GRID = "grid"
    ONCE = "once"


@dataclass(frozen=True)
class Bounds:
    """What a tensor must satisfy for its delta to count as alive."""

    gain_min: float = 0.95
    gain_max: float = 1.05
    error_max: float = 0.5
    base_error_ratio_max: float = 1.1

    def __post_init__(self) -> None:
        values = (self.gain_min, self.gain_max, self.error_max, self.base_error_ratio_max)
        if not all(math.isfinite(value) and value >= 0 for value in values) or (
            self.gain_min > self.gain_max
        ):
            raise SurvivalError(
                Problem(
                    "bounds",
                    "values",
                    "finite numbers >= 0 with gain_min <= gain_max",
                    str(values),
                    "correct the options",
                )
            )


@dataclass(frozen=True)
class Survival:
    """What is left of one tensor's delta.

    Attributes:
        gain: <W_stored - W_base, dW> / <dW, dW>; 1 when everything was kept, 0 when nothing was.
        relative_error: ||W_stored - W_base - dW|| / ||dW||.
        base_error_ratio: ||W_stored - W_base - dW|| / ||Q(W_base) - W_base||; None in `Mode.GRID`,
            and where the base is represented exactly.
        mode: how to judge the numbers.
    """

    gain: float
    relative_error: float
    base_error_ratio: float | None
    mode: Mode

    def to_dict(self) -> dict[str, float | str | None]:
        """What manifests record."""
        return {
            "gain": self.gain,
            "relative_error": self.relative_error,
            "base_error_ratio": self.base_error_ratio,
            "mode": str(self.mode),
        }


def passes(survival: Survival, bounds: Bounds) -> bool:
    """Whether the delta of a tensor is alive within `bounds`."""
    if not bounds.gain_min <= survival.gain <= bounds.gain_max:
        return False
    if survival.relative_error <= bounds.error_max:
        return True
    ratio = survival.base_error_ratio
    return survival.mode is Mode.ONCE and ratio is not None and ratio <= bounds.base_error_ratio_max


class Meter:
    """Accumulates the survival of one tensor over blocks of rows, so that memory stays bounded."""

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._projection = self._delta = self._error = self._base_error = 0.0

    def add(
        self,
        base: FloatRows,
        delta: FloatRows,
        stored: FloatRows,
        base_stored: FloatRows | None = None,
    ) -> None:
        """Adds some rows, all arrays (rows, in).

        Args:
            base: W_base: decoded from the stored base, or the float base itself.
            delta: dW, as it is meant to be.
            stored: W_stored, decoded from what is written.
            base_stored: Q(W_base), the float base encoded as the same type, without delta;
                needed in `Mode.ONCE`.
        """
        if (base_stored is None) == (self._mode is Mode.ONCE):
            raise SurvivalError(
                Problem(
                    "survival",
                    "base_stored",
                    f"what mode {self._mode} needs",
                    "nothing" if base_stored is None else "an array",
                )
            )
        shapes = {array.shape for array in (base, delta, stored, base_stored) if array is not None}
        if len(shapes) != 1:
            raise SurvivalError(Problem("survival", "shapes", "one shape", str(sorted(shapes))))
        for rows in _row_slices(base):
            wide_base = base[rows].astype(np.float64)
            wide_delta = delta[rows].astype(np.float64).reshape(-1)
            change = (stored[rows] - wide_base).reshape(-1)
            self._projection += float(change @ wide_delta)
            self._delta += float(wide_delta @ wide_delta)
            change -= wide_delta
            self._error += float(change @ change)
            if base_stored is not None:
                own = (base_stored[rows] - wide_base).reshape(-1)
                self._base_error += float(own @ own)

    def result(self) -> Survival:
        """The survival of everything added.

        Raises:
            SurvivalError: the delta is zero, or a number is not finite.
        """
        sums = (self._projection, self._delta, self._error, self._base_error)
        if not all(map(math.isfinite, sums)) or self._delta <= 0:
            raise SurvivalError(
                Problem(
                    "survival",
                    "delta",
                    "finite and not zero",
                    str(self._delta),
                    "leave out modules whose delta is zero",
                )
            )
        error = math.sqrt(self._error)
        ratio = None
        if self._mode is Mode.ONCE and self._base_error > 0:
            ratio = error / math.sqrt(self._base_error)
        return Survival(
            gain=self._projection / self._delta,
            relative_error=error / math.sqrt(self._delta),
            base_error_ratio=ratio,
            mode=self._mode,
        )


# Types worth promoting to, by bytes per element; the better one first where sizes are equal.
# IQ-quants add nothing here that K-quants do not have, and BF16 loses small deltas that F16 keeps.
_LADDER = (
    "Q2_K", "Q3_K", "Q4_K", "Q4_0", "Q4_1", "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0", "F16", "F32",
)  # fmt: skip


def candidates(current: GGMLType, n_cols: int) -> tuple[GGMLType, ...]:
    """The types to try for a tensor stored as `current`, cheapest first, `current` itself leading.

    Only types that can encode rows of `n_cols` elements and are not smaller than `current`. The
    last one is F32, which always passes.
    """
    floor = _bytes_per_element(current)
    larger = [
        GGMLType[name]
        for name in _LADDER
        if GGMLType[name] is not current
        and _bytes_per_element(GGMLType[name]) >= floor
        and ggml_quantizer.can_encode(GGMLType[name], n_cols)
    ]
    larger.sort(key=_bytes_per_element)  # stable: keeps the order of the ladder within a size
    first = (current,) if ggml_quantizer.can_encode(current, n_cols) else ()
    return (*first, *larger)


def _bytes_per_element(type: GGMLType) -> float:
    block, block_bytes = type_traits(type)
    return block_bytes / block


def _row_slices(array: FloatRows) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, array[:1].size))
    for start in range(0, len(array), step):
        yield slice(start, start + step)
