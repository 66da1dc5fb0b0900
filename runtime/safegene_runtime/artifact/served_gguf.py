"""What a GGUF artifact serves for a module: the stored weight and a sidecar's factors, along ΔW.

Nothing is run. A tensor is decoded a few rows at a time; q and k of `llama` have their rows in
another order, so the rows of B are put into that order instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from safegene_runtime.architecture.row_order import Transform
from safegene_runtime.architecture.table import architecture_named
from safegene_runtime.artifact.manifest import ModuleEntry
from safegene_runtime.engines.llama_checks import (
    LORA_A,
    LORA_B,
    check_adapter_header,
    check_model_header,
)
from safegene_runtime.errors import EngineError, FormatError, ManifestError, Problem
from safegene_runtime.formats import ggml
from safegene_runtime.formats.gguf import (
    GGMLType,
    TensorInfo,
    map_tensor,
    read_tensor_bytes,
    type_traits,
)
from safegene_runtime.record.factors import ModuleFactors, inner

__all__ = ["Carried", "Found", "GGUFWeights", "Served", "decoded", "project", "wrong_shape"]

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


class Served(Protocol):
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
        """See `Served`."""
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
        """See `Served`."""
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
        heads: list[int] = []
        for key in ("head_count", "head_count_kv"):
            value = self._model.get(f"{self._architecture.name}.attention.{key}")
            if value is None and heads:
                value = heads[0]
            if isinstance(value, (tuple, list)) and len(set(value)) == 1:
                value = value[0]
            if type(value) is not int or value < 1:
                raise EngineError(
                    Problem(str(self._path), key, "a positive integer", str(value)[:100])
                )
            heads.append(value)
        return self._architecture.transform(module, *heads)


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
