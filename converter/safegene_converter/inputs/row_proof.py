"""Whether a row order is the right one, told by the weights themselves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from safegene_runtime.architecture.row_order import Transform
from safegene_runtime.errors import BaseModelError, Problem

__all__ = ["prove_transform"]


def prove_transform(
    w_hf: npt.NDArray[np.float32], w_gguf: npt.NDArray[np.float32], transform: Transform
) -> float:
    """||T(W_hf) - W_gguf|| / ||W_hf||, both (out, in): small only if the transform is right.

    What remains is the rounding of the GGUF's type: 0 for F32, about 0.1 for 4-bit types; a wrong
    row order gives about 1.4.

    Raises:
        BaseModelError: the shapes differ.
    """
    if w_hf.shape != w_gguf.shape:
        raise BaseModelError(
            Problem("base", "shape", str(w_hf.shape), str(w_gguf.shape), "are both the same model?")
        )
    error = norm = 0.0
    moved = transform.apply_rows(w_hf)
    for start in range(0, len(moved), 256):
        ours = moved[start : start + 256].astype(np.float64).reshape(-1)
        theirs = w_gguf[start : start + 256].astype(np.float64).reshape(-1)
        norm += float(ours @ ours)
        ours -= theirs
        error += float(ours @ ours)
    return float(np.sqrt(error / norm)) if norm else float(error > 0)
