"""A checked fold into an ONNX graph: which weights change, and by which modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safegene_converter import formula
from safegene_converter.fold.survival import Bounds
from safegene_converter.inputs.adapter import Adapter, Module
from safegene_converter.inputs.base import Base
from safegene_converter.inputs.onnx_base import OnnxBase
from safegene_converter.inputs.onnx_graph import Linear, Place, place_modules
from safegene_converter.inputs.row_proof import prove_transform
from safegene_converter.onnx import weights
from safegene_runtime.architecture.row_order import Transform
from safegene_runtime.artifact.forms import Form
from safegene_runtime.errors import BaseModelError, Problems

__all__ = ["OnnxFold", "Touched", "prove_weights", "touched_weights"]

WEIGHT_ERROR_MAX = 0.5
"""The right weight leaves the rounding of its type (0.1 for 4 bits), a wrong one about 1.4."""

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Touched:
    """One weight that is to change, and the modules inside it, top to bottom."""

    linear: Linear
    parts: tuple[tuple[Module, Place], ...]

    def delta(self) -> Rows:
        """DW of the whole weight, (out, in) float32; zero in rows of other modules."""
        delta = np.zeros(self.linear.shape, np.float32)
        for module, place in self.parts:
            delta[slice(*place.rows)] = formula.delta(module)
        return delta

    def factors(self) -> tuple[Rows, Rows]:
        """(A stacked (R, in), scaled B block-diagonal (out, R)), R the sum of the ranks."""
        a = np.concatenate([module.a for module, _ in self.parts])
        b = np.zeros((self.linear.shape[0], len(a)), np.float32)
        column = 0
        for module, place in self.parts:
            b[slice(*place.rows), column : column + module.rank] = formula.scaled_b(module)
            column += module.rank
        return a, b

    @property
    def rows(self) -> list[tuple[int, int]]:
        """The rows that change."""
        return [place.rows for _, place in self.parts]


@dataclass(frozen=True)
class OnnxFold:
    """An adapter, a base and how the one goes into the other; checked."""

    adapter: Adapter
    base: OnnxBase
    hf: Base | None
    form: Form
    touched: tuple[Touched, ...]
    bounds: Bounds
    promote: bool


def touched_weights(adapter: Adapter, base: OnnxBase) -> tuple[Touched, ...]:
    """The weights that change, in the order of the graph."""
    placed = place_modules(
        [module.name for module in adapter.modules], base.places, base.model, base.row
    )
    by_weight: dict[str, list[tuple[Module, Place]]] = {}
    for module in adapter.modules:
        place = placed[module.name]
        by_weight.setdefault(place.linear.weight.name, []).append((module, place))
    found = [
        Touched(parts[0][1].linear, tuple(sorted(parts, key=lambda part: part[1].rows)))
        for parts in by_weight.values()
    ]
    return tuple(sorted(found, key=lambda one: one.linear.node))


def prove_weights(touched: Sequence[Touched], base: OnnxBase, hf: Base) -> float:
    """Proves on the weights that each place holds its module, rows in our order.

    Returns:
        the largest relative error, 0 when the export is lossless.
    """
    problems, worst = Problems(), 0.0
    for one in touched:
        stored = weights.read_weight(base.model, one.linear)
        for module, place in one.parts:
            error = prove_transform(
                hf.read_weight(module.name), stored[slice(*place.rows)], Transform()
            )
            worst = max(worst, error)
            if error > WEIGHT_ERROR_MAX:
                problems.add(
                    one.linear.name,
                    module.name,
                    "the rows of the Hugging Face weight",
                    f"relative error {error:.2f} in {place.tensor}",
                    "this exporter packs projections differently: please report it",
                )
    problems.raise_if_any(BaseModelError)
    return worst
