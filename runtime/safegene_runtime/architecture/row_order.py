"""The row order of a GGUF tensor relative to the Hugging Face weight it was made from.

llama.cpp's converter (the tree's `conversion/`) moves rows in two ways. Both are permutations, and a
permutation acts on a delta as on the weight: P (W + B A) = P W + (P B) A. So it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import BaseModelError, Problem

__all__ = ["OrderKind", "Transform"]

OrderKind = Literal["identity", "permute", "regroup"]


@dataclass(frozen=True)
class Transform:
    """The row order of a GGUF tensor relative to its Hugging Face weight.

    Attributes:
        kind: `permute` is `LlamaModel.permute` of conversion/llama.py: in each head Hugging Face rotates
            halves, llama.cpp neighbouring pairs. `regroup` is what falcon.py, gptneox.py and bloom.py do
            to a fused projection: group by group its queries, a key and a value -> all queries, all keys,
            all values.
        n_heads: how many heads the rows are made of (queries, for `regroup`).
        n_groups: of `regroup`: how many keys there are, and values.
    """

    kind: OrderKind = "identity"
    n_heads: int = 0
    n_groups: int = 0

    @property
    def is_identity(self) -> bool:
        """Whether rows stay where they are."""
        return self.kind == "identity"

    def rows(self, n_rows: int) -> npt.NDArray[np.int64]:
        """Which row of the Hugging Face weight each row of the GGUF tensor is, (out,).

        Raises:
            BaseModelError: rows that are not whole heads.
        """
        rows = np.arange(n_rows)
        if self.is_identity:
            return rows
        per_group = self.n_heads // self.n_groups if self.n_groups else 0
        unit = 2 * self.n_heads if self.kind == "permute" else self.n_groups * (per_group + 2)
        if not unit or n_rows % unit:
            raise BaseModelError(
                Problem(
                    "base",
                    f"rows that are made of heads ({self.kind})",
                    f"a multiple of {unit}, of {self.n_heads} heads",
                    str(n_rows),
                    "is this the base the adapter was trained on?",
                )
            )
        if self.kind == "permute":
            return rows.reshape(self.n_heads, 2, -1).swapaxes(1, 2).reshape(-1)
        grouped = rows.reshape(self.n_groups, per_group + 2, -1)
        parts = (grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1])
        return np.concatenate([part.reshape(-1) for part in parts])

    def apply_rows(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Hugging Face order -> GGUF order; `array` is (out, ...)."""
        return array if self.is_identity else array[self.rows(len(array))]

    def invert_rows(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """GGUF order -> Hugging Face order; `array` is (out, ...)."""
        return array if self.is_identity else array[np.argsort(self.rows(len(array)))]
