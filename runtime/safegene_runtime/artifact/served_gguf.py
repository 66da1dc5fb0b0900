"""What a GGUF artifact serves for a module: the stored weight and a sidecar's factors, along ΔW.

Nothing is run. A tensor is decoded a few rows at a time; q and k of `llama` have their rows in
another order, so the rows of B are put into that order instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safegene_runtime.architecture.row_order import Transform
from safegene_runtime.architecture.table import architecture_named
from safegene_runtime.artifact.manifest import ModuleEntry
from safegene_runtime.artifact.served import BLOCK_ELEMENTS, Carried, Found, project, wrong_shape
from safegene_runtime.engines.llama_checks import (
    LORA_A,
    LORA_B,
    check_adapter_header,
    check_model_header,
)
from safegene_runtime.errors import FormatError, Problem
from safegene_runtime.formats import ggml
from safegene_runtime.formats.gguf.header import TensorInfo
from safegene_runtime.formats.gguf.tensors import map_tensor, read_tensor_bytes
from safegene_runtime.formats.gguf.types import GGMLType, type_traits
from safegene_runtime.formats.gguf.weights import head_counts
from safegene_runtime.record.added_weights import ModuleFactors, inner

__all__ = ["GGUFWeights", "decoded"]

Rows = npt.NDArray[np.float32]


class GGUFWeights:
    """A GGUF model, and the sidecar beside it if there is one.

    Args:
        model: the file, or the first of its shards.
        adapter: the sidecar.

    Raises:
        SafeGeneError: not what libllama would serve as meant.
    """

    def __init__(self, model: Path, adapter: Path | None) -> None:
        self._path = model
        self._model = check_model_header(model)
        self._adapter = check_adapter_header(adapter, self._model) if adapter else None
        self._architecture = architecture_named(self._model.get("general.architecture"), str(model))
        self._left = {
            name.removesuffix(LORA_A)
            for name in (self._adapter.tensors if self._adapter else ())
            if name.endswith(LORA_A)
        }

    def measure(self, entry: ModuleEntry, added: ModuleFactors) -> Found:
        """See `ServedWeights`."""
        info = self._model.tensors.get(entry.tensor)
        if info is None or info.shape != added.shape:
            got = "nothing" if info is None else info.shape
            raise wrong_shape(self._path, entry, added.shape, got)
        b = self._transform(added.module).apply_rows(added.b)
        dot = energy = 0.0
        for start, rows in decoded(info):
            one, more = project(rows, b, added.a, start)
            dot, energy = dot + one, energy + more
        if not math.isfinite(dot) or not math.isfinite(energy):
            raise FormatError(
                Problem(str(self._path), entry.tensor, "finite numbers", "NaN or Inf")
            )
        self._left.discard(entry.tensor)
        return Found(info.type.name, dot, energy, self._carried(entry.tensor, b, added.a))

    def unexpected(self) -> list[str]:
        """See `ServedWeights`."""
        return sorted(self._left)

    def _carried(self, tensor: str, b: Rows, a: Rows) -> Carried | None:
        adapter = self._adapter
        if adapter is None or tensor + LORA_A not in adapter.tensors:
            return None
        infos = [adapter.tensors[tensor + suffix] for suffix in (LORA_B, LORA_A)]
        own_b, own_a = (
            ggml.dequantize(read_tensor_bytes(info), info.type, info.shape) for info in infos
        )
        # the type of the coarser factor: one whose rows fit no block stays in F32
        kind = min((info.type for info in infos), key=lambda kind: _bytes_per_element(kind))
        return Carried(kind.name, inner(own_b, own_a, b, a), inner(own_b, own_a, own_b, own_a))

    def _transform(self, module: str) -> Transform:
        return self._architecture.transform(module, *head_counts(self._model))


def _bytes_per_element(kind: GGMLType) -> float:
    block, size = type_traits(kind)
    return size / block


def decoded(info: TensorInfo) -> Iterator[tuple[int, Rows]]:
    """(first row, decoded rows (n, in) float32) of a tensor (out, in), a few rows at a time.

    Raises:
        FormatError: the file became shorter since its header was read.
    """
    n_rows, n_cols = info.shape
    raw = map_tensor(info)
    row_bytes = info.nbytes // n_rows
    step = max(1, BLOCK_ELEMENTS // n_cols)
    for start in range(0, n_rows, step):
        stop = min(n_rows, start + step)
        part = np.asarray(raw[start * row_bytes : stop * row_bytes])
        yield start, ggml.dequantize(part, info.type, (stop - start, n_cols), threads=1)
