"""What an ONNX artifact serves for a module: the stored weight and the branches around it, along ΔW.

Nothing is run, and names decide nothing: a branch is what the graph adds to the output of a linear,
`Add(W x, MatMul(MatMul(x, Aᵀ), Bᵀ))` with constant factors or with the slots of an adapter file.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.artifact.manifest import ModuleEntry
from safegene_runtime.artifact.served import Carried, Found, project, wrong_shape
from safegene_runtime.engines.ort_packages import ort_packages
from safegene_runtime.errors import EngineError, FormatError, Problem
from safegene_runtime.formats.onnx.file import read_onnx
from safegene_runtime.formats.onnx.linear import (
    FLOAT_DATA,
    StoredLinear,
    linears,
    producers,
    read_weight,
    to_float32,
)
from safegene_runtime.formats.onnx.tensor import DataType, read_initializer
from safegene_runtime.record.added_weights import ModuleFactors, inner

__all__ = ["OnnxWeights", "adapter_slots"]

_ROWS = re.compile(r"(?P<name>.+)\[(?P<start>[0-9]{1,12}):(?P<stop>[0-9]{1,12})\]")
_WIDTH = {"F32": 4, "F16": 2, "BF16": 1}

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Branch:
    """One branch: y += (x·Aᵀ)·Bᵀ, with A (R, in) and B (out, R)."""

    a: Rows
    b: Rows
    type: str


class OnnxWeights:
    """An ONNX graph, and the adapter file for its slots if there is one.

    Raises:
        SafeGeneError: a graph or an adapter that cannot be read.
    """

    def __init__(self, model: Path, adapter: Path | None) -> None:
        self._path = model
        self._model = read_onnx(model)
        self._made_by = producers(self._model)
        self._consumers: dict[str, list[int]] = {}
        for index, node in enumerate(self._model.nodes):
            for name in node.inputs:
                self._consumers.setdefault(name, []).append(index)
        self._slots = _read_adapter(adapter) if adapter else {}
        self._unused = set(self._slots)
        self._linears = {linear.weight.name: linear for linear in linears(self._model).stored}
        self._branches = {
            name: found
            for name, linear in self._linears.items()
            if (found := list(self._around(linear)))
        }
        self._rows: dict[str, list[tuple[int, int]]] = {}
        self._last: tuple[str, Rows] | None = None

    def measure(self, entry: ModuleEntry, added: ModuleFactors) -> Found:
        """See `ServedWeights`."""
        match = _ROWS.fullmatch(entry.tensor)
        name = match["name"] if match else entry.tensor
        linear = self._linears.get(name)
        if linear is None:
            raise wrong_shape(self._path, entry, "a weight that a linear multiplies by", "none")
        start, stop = (int(match["start"]), int(match["stop"])) if match else (0, linear.shape[0])
        got = (min(stop, linear.shape[0]) - start, linear.shape[1])
        if got != added.shape:
            raise wrong_shape(self._path, entry, added.shape, got)
        if self._last is None or self._last[0] != name:
            self._last = None  # so that two weights are never in memory together
            self._last = (name, read_weight(self._model, linear))
        dot, energy = project(self._last[1][start:stop], added.b, added.a)
        if not math.isfinite(dot) or not math.isfinite(energy):
            raise FormatError(
                Problem(str(self._path), entry.tensor, "finite numbers", "NaN or Inf")
            )
        self._rows.setdefault(name, []).append((start, stop))
        return Found(linear.type, dot, energy, self._carried(name, start, stop, added))

    def unexpected(self) -> list[str]:
        """See `ServedWeights`."""
        found = [f"slot {name}" for name in self._unused]
        for name, branches in self._branches.items():
            covered = np.zeros(self._linears[name].shape[0], bool)
            for start, stop in self._rows.get(name, ()):
                covered[start:stop] = True
            if any(branch.b[~covered].any() for branch in branches):
                found.append(name)
        return sorted(found)

    def _carried(self, name: str, start: int, stop: int, added: ModuleFactors) -> Carried | None:
        branches = self._branches.get(name)
        if not branches:
            return None
        a = np.concatenate([branch.a for branch in branches])
        b = np.concatenate([branch.b for branch in branches], axis=1)[start:stop]
        kind = min((branch.type for branch in branches), key=lambda kind: _WIDTH[kind])
        return Carried(kind, inner(b, a, added.b, added.a), inner(b, a, b, a))

    def _around(self, linear: StoredLinear) -> Iterator[_Branch]:
        """Every low-rank product that is added to the output of a linear, biases in between."""
        value = linear.y
        while True:
            adds = [
                self._model.nodes[index]
                for index in self._consumers.get(value, ())
                if self._model.nodes[index].op_type == "Add"
            ]
            if len(adds) != 1 or len(adds[0].inputs) != 2:
                return
            others = [name for name in adds[0].inputs if name != value]
            branch = self._branch(others[0], linear.x) if others else None
            if branch is not None:
                yield branch
            elif not others or others[0] not in self._model.initializers:
                return
            value = adds[0].outputs[0]

    def _branch(self, name: str, x: str) -> _Branch | None:
        """MatMul(MatMul(x, Aᵀ), Bᵀ) behind a value, or None."""
        factors = []
        for _ in range(2):
            index = self._made_by.get(name)
            if index is None or self._model.nodes[index].op_type != "MatMul":
                return None
            node = self._model.nodes[index]
            factor = self._factor(node.inputs[1])
            if factor is None:
                return None
            factors.append(factor)
            name = node.inputs[0]
        (b, b_type), (a, a_type) = factors
        if name != x or b.ndim != 2 or a.ndim != 2 or a.shape[1] != b.shape[0]:
            return None
        kind = min((a_type, b_type), key=lambda kind: _WIDTH[kind])
        return _Branch(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), kind)

    def _factor(self, name: str) -> tuple[Rows, str] | None:
        if name in self._slots and name in self._model.overridable:
            self._unused.discard(name)
            return self._slots[name]
        info = self._model.initializers.get(name)
        if info is None or info.dtype not in FLOAT_DATA:
            return None
        return to_float32(read_initializer(info), info.dtype), FLOAT_DATA[info.dtype]


def adapter_slots(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every tensor of an .onnx_adapter, by the name of its slot.

    Raises:
        EngineError: no adapter, or onnxruntime is missing.
    """
    _, values = _open_adapter(path)
    return {
        name: (tuple(value.shape()), FLOAT_DATA.get(value.element_type(), value.data_type()))
        for name, value in values.items()
    }


def _read_adapter(path: Path) -> Mapping[str, tuple[Rows, str]]:
    """The values of an .onnx_adapter, by the name of their slot."""
    _file, values = _open_adapter(path)
    return {name: _as_float(path, name, value) for name, value in values.items()}


def _open_adapter(path: Path) -> tuple[Any, Mapping[str, Any]]:
    """The adapter, which must live as long as its values are looked at, and these."""
    (onnxruntime,) = ort_packages("onnxruntime")
    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        return file, file.get_parameters()
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise EngineError(
            Problem(str(path), "adapter", "an .onnx_adapter", str(error)[:300])
        ) from error


def _as_float(path: Path, name: str, value: Any) -> tuple[Rows, str]:
    code = value.element_type()
    if code not in [int(kind) for kind in FLOAT_DATA]:
        raise EngineError(Problem(str(path), name, "float factors", value.data_type()))
    kind = DataType(code)
    if kind is DataType.BFLOAT16:  # numpy has no such type, so OrtValue.numpy refuses
        shape = tuple(value.shape())
        raw = ctypes.string_at(value.data_ptr(), 2 * math.prod(shape))
        stored: npt.NDArray[Any] = np.frombuffer(raw, np.uint16).reshape(shape)
    else:
        stored = np.array(value.numpy())
    return to_float32(stored, kind), FLOAT_DATA[kind]
