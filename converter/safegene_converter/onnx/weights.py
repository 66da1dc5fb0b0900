"""The weights of an ONNX linear as (out, in) float32, and back into the bytes of its initializers.

A weight is stored as one float initializer, or as the two or three of `MatMulNBits`; the runtime's
`formats.onnx.linear` reads it. Encoding gives the new content of those initializers by role.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.encoding import nbits_quantizer
from safegene_converter.inputs.onnx_graph import Linear
from safegene_runtime.formats.onnx import nbits
from safegene_runtime.formats.onnx.file import OnnxFile
from safegene_runtime.formats.onnx.linear import (
    FLOAT_DATA,
    part_of,
    read_packed,
    read_weight,
    to_float32,
)
from safegene_runtime.formats.onnx.tensor import DataType

__all__ = [
    "Encoded", "Kind", "encode", "kind_of", "kinds_to_try", "read_packed", "read_weight",
    "to_float32",
]  # fmt: skip

Rows = npt.NDArray[np.float32]

BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Kind:
    """How a weight is stored: a float type, or blocks of a few bits.

    `name` is what manifests and tables show: F32, F16, BF16, INT4, INT8.
    """

    name: str
    data_type: DataType
    blocks: nbits.NBits | None = None


@dataclass(frozen=True)
class Encoded:
    """A weight, encoded: its initializers by role (`weight`, `scales`, `zero_points`)."""

    kind: Kind
    parts: Mapping[str, npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of all its initializers."""
        return sum(part.nbytes for part in self.parts.values())


def kind_of(model: OnnxFile, linear: Linear) -> Kind:
    """How the weight of a linear is stored.

    Raises:
        BaseModelError: a MatMulNBits with a group index or another layout we do not know.
    """
    if linear.layout != "nbits":
        return Kind(linear.type, linear.weight.dtype)
    packed = read_packed(model, linear)
    scales = part_of(model, linear, 2)
    return Kind(linear.type, scales.dtype, packed.kind)


def from_float32(values: Rows, kind: DataType) -> npt.NDArray[Any]:
    """Float32 as an initializer of `kind`, rounded to nearest, ties to even."""
    if kind is DataType.BFLOAT16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(np.float16 if kind is DataType.FLOAT16 else np.float32)


def kinds_to_try(now: Kind, shape: tuple[int, int]) -> tuple[Kind, ...]:
    """`now`, then what a weight may be promoted to, cheapest first: int4 -> int8 -> float.

    A float weight has nowhere to go: the graph around it has its type.
    """
    if now.blocks is None:
        return (now,)
    kinds = [now]
    if now.blocks.bits < 8:
        wider = nbits.NBits(8, now.blocks.block_size, now.blocks.symmetric, now.blocks.scale_dtype)
        if nbits.can_encode(wider, shape):
            kinds.append(Kind("INT8", now.data_type, wider))
    kinds.append(Kind(FLOAT_DATA[now.data_type], now.data_type))
    return tuple(kinds)


def encode(weight: Rows, kind: Kind, linear: Linear) -> tuple[Encoded, Rows]:
    """Encodes a whole (out, in) weight; returns it with what a reader will decode.

    A float weight keeps the layout of the linear; one that was packed becomes (in, out).
    """
    if kind.blocks is not None:
        packed = nbits_quantizer.quantize(weight, kind.blocks)
        parts: dict[str, npt.NDArray[Any]] = {"weight": packed.b, "scales": packed.scales}
        if packed.zero_points is not None:
            parts["zero_points"] = packed.zero_points
        return Encoded(kind, parts), nbits.dequantize(packed)
    laid = weight if linear.layout == "out_in" else weight.T
    stored = np.ascontiguousarray(from_float32(laid, kind.data_type))
    decoded = to_float32(stored, kind.data_type)
    return Encoded(kind, {"weight": stored}), decoded if linear.layout == "out_in" else decoded.T


def keep_rows(new: Encoded, old: nbits.Packed, rows: list[tuple[int, int]]) -> Encoded:
    """`new` inside `rows`, the old bytes everywhere else; both of the same kind."""
    before: dict[str, npt.NDArray[Any]] = {"weight": old.b, "scales": old.scales}
    if old.zero_points is not None:
        before["zero_points"] = old.zero_points
    parts = {}
    for role, data in new.parts.items():
        mixed = before[role].reshape(data.shape).astype(data.dtype).copy()
        for start, stop in rows:
            mixed[start:stop] = data[start:stop]
        parts[role] = mixed
    return Encoded(new.kind, parts)
