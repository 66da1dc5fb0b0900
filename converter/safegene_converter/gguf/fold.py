"""A checked fold into a GGUF, and what both forms of artifact are described with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safegene_converter import formula
from safegene_converter.fold.survival import Bounds, Survival
from safegene_converter.inputs.adapter import Adapter, Module
from safegene_converter.inputs.base import Base
from safegene_runtime import __version__
from safegene_runtime.artifact.forms import Form
from safegene_runtime.artifact.manifest import FileEntry, ModuleEntry
from safegene_runtime.artifact.provenance import ADAPTER_KEY, adapter_digest
from safegene_runtime.errors import BaseModelError, Problem
from safegene_runtime.formats.gguf.model import GGUFModel
from safegene_runtime.formats.gguf.types import GGMLType, Value, ValueType
from safegene_runtime.formats.gguf.weights import elements_by_type
from safegene_runtime.gating.bounds import precision_of

__all__ = [
    "BLOCK_ELEMENTS",
    "GGUFFold",
    "Made",
    "Rows",
    "figures",
    "starts_from_float",
    "string",
    "within",
]

BLOCK_ELEMENTS = 2 << 20
"""Elements of a touched tensor in memory at a time: 8 MiB per float32 operand."""

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Made:
    """What writing an artifact gives.

    Attributes:
        file: its entry in the manifest.
        modules: a line per module, likewise.
        precision: the class of its weights.
        base: the GGUF that the delta was added to: quantised, where the artifact is.
        promoted: what promotion did, {"tensors": how many, "bytes_added": what that cost}.
    """

    file: FileEntry
    modules: tuple[ModuleEntry, ...]
    precision: str
    base: Path
    promoted: Mapping[str, int] | None = None


@dataclass(frozen=True)
class GGUFFold:
    """An adapter, a base and how the one goes into the other.

    Everything that can be refused without reading weights was refused.
    """

    adapter: Adapter
    base: Base
    form: Form
    type_name: str
    bounds: Bounds
    promote: bool
    imatrix_path: Path | None
    imatrix: Mapping[str, Rows] = field(default_factory=dict)

    @property
    def model(self) -> GGUFModel:
        """The GGUF headers of the base; a Hugging Face folder has been converted by now."""
        if self.base.model is None:
            raise BaseModelError(Problem(str(self.base.path), "base", "GGUF headers", "none"))
        return self.base.model

    def tensor(self, module: Module) -> str:
        """The GGUF tensor of a module."""
        return self.base.tensor_name(module.name)

    def row_order(self, module: Module) -> npt.NDArray[np.int64]:
        """Which row of the module each row of its GGUF tensor is, (out,)."""
        return self.base.transform(module.name).apply_rows(np.arange(module.shape[0]))

    def factors(self, module: Module) -> tuple[Rows, Rows]:
        """(A (r, in), scaled B (out, r) in the row order of the GGUF)."""
        return module.a, formula.scaled_b(module)[self.row_order(module)]

    def provenance(self) -> dict[str, Value]:
        """`safegene.*` keys: what a reader of the single file can learn without the manifest."""
        return {
            "safegene.version": string(__version__),
            "safegene.form": string(self.form.name),
            "safegene.expression": string(self.adapter.expression),
            ADAPTER_KEY: string(adapter_digest(self.adapter.digests)),
            "safegene.modules": Value(ValueType.UINT32, len(self.adapter.modules), None),
        }

    def precision(self, after: Mapping[str, GGMLType]) -> str:
        """The class of the linear weights of the blocks, with the types in `after` in place.

        Raises:
            UnsupportedError: weights of a type that has no class.
        """
        tensors = [
            replace(info, type=after.get(name, info.type))
            for name, info in self.model.tensors.items()
        ]
        arithmetic = self.base.row.arithmetic
        return precision_of(elements_by_type(tensors), str(self.base.path), arithmetic)


def starts_from_float(base: Base, type_name: str) -> bool:
    """Whether the whole model is quantised once, delta included."""
    return base.is_float and type_name not in ("auto", "keep")


def string(text: str) -> Value:
    """A metadata value."""
    return Value(ValueType.STRING, text, None)


def within(bounds: Bounds) -> str:
    """The bounds of survival, for a message."""
    return (
        f"gain in [{bounds.gain_min:g}, {bounds.gain_max:g}] and relative error <= "
        f"{bounds.error_max:g} (or, from float, error <= {bounds.base_error_ratio_max:g} x the base's)"
    )


def figures(survival: Survival) -> str:
    """What survived of a delta, for a message."""
    text = f"gain {survival.gain:.3f}, relative error {survival.relative_error:.3f}"
    if survival.base_error_ratio is not None:
        text += f", {survival.base_error_ratio:.2f} x the base's error"
    return text
