"""The weights of an ONNX linear as (out, in) float32, and back into the bytes of its initializers.

A weight is stored as one float initializer, or as the two or three of `MatMulNBits`. Encoding gives
the new content of those initializers by name, and, where a weight was promoted to another kind, what
has to become of the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter import nbits
from safegene_converter.onnx_graph import FLOAT_DATA, Linear
from safegene_runtime.errors import BaseModelError, Problem
from safegene_runtime.onnx_file import DataType, Initializer, OnnxFile, read_initializer

__all__ = ["Encoded", "Kind", "encode", "kind_of", "kinds_to_try", "read_packed", "read_weight"]

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
        return Kind(FLOAT_DATA[linear.weight.dtype], linear.weight.dtype)
    packed = read_packed(model, linear)
    scales = _part(model, linear, 2)
    return Kind(f"INT{packed.kind.bits}", scales.dtype, packed.kind)


def read_packed(model: OnnxFile, linear: Linear) -> nbits.Packed:
    """The blocks of a MatMulNBits weight.

    Raises:
        BaseModelError: inputs we do not know.
        FormatError: sizes that contradict each other.
    """
    node = model.nodes[linear.node]
    inputs = (*node.inputs, *("",) * 6)
    if inputs[4]:
        raise BaseModelError(
            Problem(
                str(model.path),
                linear.name,
                "a MatMulNBits without g_idx",
                inputs[4],
                "export with plain block quantisation",
            )
        )
    scales = _part(model, linear, 2)
    zeros = _part(model, linear, 3) if inputs[3] else None
    kind = nbits.NBits(
        bits=_integer(node.attributes, "bits", 4),
        block_size=_integer(node.attributes, "block_size", 0),
        symmetric=zeros is None,
        scale_dtype={DataType.FLOAT: "float32", DataType.FLOAT16: "float16"}.get(
            scales.dtype, scales.dtype.name
        ),
    )
    out, cols = linear.shape
    n_blocks = -(-cols // kind.block_size) if kind.block_size > 0 else 0
    zero_points = None
    if zeros is not None:
        zero_points = read_initializer(zeros)
        if zero_points.dtype == np.uint8:
            zero_points = zero_points.reshape(out, -1)
    return nbits.Packed(
        kind=kind,
        shape=(out, cols),
        b=read_initializer(linear.weight).reshape(out, n_blocks, -1),
        scales=read_initializer(scales).reshape(out, n_blocks),
        zero_points=zero_points,
    )


def read_weight(model: OnnxFile, linear: Linear) -> Rows:
    """The weight of a linear, (out, in) float32, whatever it is stored as."""
    if linear.layout == "nbits":
        return nbits.dequantize(read_packed(model, linear))
    stored = to_float32(read_initializer(linear.weight), linear.weight.dtype)
    return stored if linear.layout == "out_in" else stored.T


def to_float32(stored: npt.NDArray[Any], kind: DataType) -> Rows:
    """Any float initializer as float32; bfloat16 comes as uint16."""
    if kind is DataType.BFLOAT16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


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
        packed = nbits.quantize(weight, kind.blocks)
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


def _part(model: OnnxFile, linear: Linear, index: int) -> Initializer:
    node = model.nodes[linear.node]
    name = node.inputs[index] if len(node.inputs) > index else ""
    if name not in model.initializers:
        raise BaseModelError(
            Problem(str(model.path), linear.name, f"a constant input {index}", repr(name))
        )
    return model.initializers[name]


def _integer(attributes: Mapping[str, Any], name: str, default: int) -> int:
    value = attributes.get(name, default)
    return value if isinstance(value, int) else default
