"""The row order of a GGUF tensor relative to the Hugging Face weight it was made from.

For `llama` upstream reorders the rows of q and k (`LlamaModel.permute` in llama.cpp's
conversion/llama.py): Hugging Face rotates halves of a head, llama.cpp rotates neighbouring pairs. The
same reordering applies to a delta, because it acts on rows: permute(W + B A) = permute(W) +
permute(B) A. It is a pure permutation, so it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import BaseModelError, Problem

__all__ = ["Transform"]


@dataclass(frozen=True)
class Transform:
    """The row order of a GGUF tensor relative to its Hugging Face weight.

    Attributes:
        n_heads: how many heads the rows are made of, each reordered in itself; 0: order unchanged.
    """

    n_heads: int = 0

    @property
    def is_identity(self) -> bool:
        """Whether rows stay where they are."""
        return self.n_heads == 0

    @property
    def name(self) -> str:
        """For manifests: `identity`, or `permute-<n_heads>`."""
        return "identity" if self.is_identity else f"permute-{self.n_heads}"

    def apply_rows(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Hugging Face order -> GGUF order; `array` is (out, ...)."""
        if self.is_identity:
            return array
        self._check(array)
        parts = array.reshape(self.n_heads, 2, -1, *array.shape[1:])
        return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(array.shape)

    def invert_rows(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """GGUF order -> Hugging Face order; `array` is (out, ...)."""
        if self.is_identity:
            return array
        self._check(array)
        parts = array.reshape(self.n_heads, -1, 2, *array.shape[1:])
        return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(array.shape)

    def _check(self, array: npt.NDArray[Any]) -> None:
        if array.ndim == 0 or array.shape[0] % (2 * self.n_heads):
            raise BaseModelError(
                Problem(
                    "base",
                    "rows of q or k",
                    f"a multiple of 2 x {self.n_heads} heads",
                    str(array.shape),
                    "is this the base the adapter was trained on?",
                )
            )
