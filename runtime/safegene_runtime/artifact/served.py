"""What an artifact serves for a module: the stored weight, and what is added to it while running."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from safegene_runtime.artifact.manifest import ModuleEntry
from safegene_runtime.errors import ManifestError, Problem
from safegene_runtime.record.added_weights import ModuleFactors

__all__ = ["BLOCK_ELEMENTS", "Carried", "Found", "ServedWeights", "project", "wrong_shape"]

BLOCK_ELEMENTS = 1 << 20
"""Elements of a weight in float64 at a time: 8 MiB."""

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Carried:
    """The low-rank product P that is added while running, beside the stored weight.

    Attributes:
        type: what its factors are stored as.
        dot: ⟨P, ΔW⟩.
        norm: ‖P‖².
    """

    type: str
    dot: float
    norm: float


@dataclass(frozen=True)
class Found:
    """What an artifact serves for one module.

    Attributes:
        type: what the weight is stored as.
        dot: ⟨W, ΔW⟩ of the stored weight.
        energy: ‖W‖² of the stored weight.
        carried: what is added to it; None if nothing is.
    """

    type: str
    dot: float
    energy: float
    carried: Carried | None


class ServedWeights(Protocol):
    """An artifact that can be asked for one module after the other."""

    def measure(self, entry: ModuleEntry, added: ModuleFactors) -> Found:
        """What is served where `entry` says, along the ΔW of `added`."""

    def unexpected(self) -> list[str]:
        """Deltas that are carried for something that was not measured."""


def project(weight: Any, b: Rows, a: Rows, start: int = 0) -> tuple[float, float]:
    """(⟨W, B·A⟩, ‖W‖²) of some rows of a weight, in float64: Σ (Bᵀ·W) ∘ A.

    Args:
        weight: (rows, in).
        b: (out, r), of which the rows from `start` are meant.
        a: (r, in).
        start: the first row.
    """
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    wide_a = a.astype(np.float64)
    dot = energy = 0.0
    for at in range(0, len(weight), step):
        part = np.asarray(weight[at : at + step], np.float64)
        rows = b[start + at : start + at + len(part)].astype(np.float64)
        dot += float(((rows.T @ part) * wide_a).sum())
        energy += float(np.vdot(part, part))
    return dot, energy


def wrong_shape(where: Path, entry: ModuleEntry, expected: object, got: object) -> ManifestError:
    """The error for a tensor that cannot hold a module."""
    return ManifestError(
        Problem(
            str(where),
            entry.tensor,
            str(expected),
            str(got),
            "manifest and model do not belong together",
        )
    )
