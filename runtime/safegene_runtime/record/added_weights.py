"""The low-rank factors of a reference: what PEFT added to each module's weight, and how it lay there.

Of each module a reference keeps A (r, in) and the scaled B (out, r), so that ΔW = B·A is what PEFT
added to the weight, and two numbers that PyTorch's own weight gave:

    norm   ‖ΔW‖², summed over all elements
    s0     ⟨W_base, ΔW⟩ / ‖ΔW‖², 0 where ΔW is zero

With these an artifact's bytes can be asked for ΔW without running it; see `static_proof.py`.
Products of two low-rank matrices need no dense one: ⟨B·A, D·C⟩ = Σ (Bᵀ·D) ∘ (A·Cᵀ).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import Problems

__all__ = ["ARRAYS", "ModuleFactors", "decode", "encode", "inner"]

ARRAYS = {
    "names": "uint8",
    "shapes": "int64",
    "a": "float32",
    "b": "float32",
    "norm": "float64",
    "s0": "float64",
}
"""factors.npz: module names in UTF-8, a line each; [out, in, r] of each; A, B, norm, s0 in a row."""

NORM_ERROR_MAX = 1e-4
"""PEFT's own ΔW is rounded to float32, so its norm is that of the factors but for 1e-6."""
MAX_EXTENT = 1 << 31

Matrix = npt.NDArray[Any]


@dataclass(frozen=True)
class ModuleFactors:
    """What was added to one module.

    Attributes:
        module: its Hugging Face name.
        a: (r, in) float32.
        b: (out, r) float32, every scale in it; rows in Hugging Face order.
        norm: ‖b·a‖².
        s0: ⟨W_base, b·a⟩ / norm in PyTorch; 0 where norm is 0.
    """

    module: str
    a: npt.NDArray[np.float32] = field(repr=False)
    b: npt.NDArray[np.float32] = field(repr=False)
    norm: float
    s0: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]


def inner(b1: Matrix, a1: Matrix, b2: Matrix, a2: Matrix) -> float:
    """⟨b1·a1, b2·a2⟩ in float64; b (out, r), a (r, in), the ranks may differ."""
    left = b1.astype(np.float64).T @ b2.astype(np.float64)
    right = a1.astype(np.float64) @ a2.astype(np.float64).T
    return float((left * right).sum())


def encode(factors: Sequence[ModuleFactors]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of factors.npz."""
    text = "\n".join(factor.module for factor in factors).encode()
    return {
        "names": np.frombuffer(text, np.uint8),
        "shapes": np.asarray([[*factor.shape, len(factor.a)] for factor in factors], np.int64),
        "a": np.concatenate([factor.a.reshape(-1) for factor in factors]).astype(np.float32),
        "b": np.concatenate([factor.b.reshape(-1) for factor in factors]).astype(np.float32),
        "norm": np.asarray([factor.norm for factor in factors], np.float64),
        "s0": np.asarray([factor.s0 for factor in factors], np.float64),
    }


def decode(
    arrays: Mapping[str, npt.NDArray[Any]], where: str, problems: Problems
) -> tuple[ModuleFactors, ...]:
    """The modules of factors.npz; contradictions go to `problems`, and then nothing is returned."""
    before = len(problems)
    shapes = arrays["shapes"]
    try:
        names = arrays["names"].tobytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        names = []
        problems.add(where, "names", "UTF-8", error.reason, "record again")
    count = len(names)
    if shapes.shape != (count, 3) or (shapes < 1).any() or (shapes > MAX_EXTENT).any():
        problems.add(where, "shapes", f"[out, in, r] of {count} modules", shapes.shape)
    if len(set(names)) != count or not all(names):
        problems.add(where, "names", "each module once", f"{count} lines")
    for name in ("norm", "s0"):
        if arrays[name].shape != (count,) or (name == "norm" and (arrays[name] < 0).any()):
            problems.add(where, name, f"({count},), norms not negative", arrays[name].shape)
    if len(problems) > before:
        return ()
    sizes = {"a": shapes[:, 1] * shapes[:, 2], "b": shapes[:, 0] * shapes[:, 2]}
    for name, size in sizes.items():
        # Python integers: a sum of absurd extents must not wrap around
        expected = sum(int(one) for one in size)
        if arrays[name].shape != (expected,):
            problems.add(where, name, f"({expected},)", arrays[name].shape, "record again")
    if len(problems) > before:
        return ()
    ends = {name: np.cumsum(size) for name, size in sizes.items()}
    found = []
    for index, module in enumerate(names):
        rows, cols, rank = (int(one) for one in shapes[index])
        a, b = (
            arrays[name][ends[name][index] - sizes[name][index] : ends[name][index]]
            for name in ("a", "b")
        )
        one = ModuleFactors(
            module=module,
            a=a.reshape(rank, cols),
            b=b.reshape(rows, rank),
            norm=float(arrays["norm"][index]),
            s0=float(arrays["s0"][index]),
        )
        own = inner(one.b, one.a, one.b, one.a)
        if not abs(own - one.norm) <= NORM_ERROR_MAX * one.norm:
            problems.add(
                where, f"norm of {module}", f"{own:.6g}, as its factors have", f"{one.norm:.6g}",
                "record again",
            )  # fmt: skip
        found.append(one)
    return tuple(found)
