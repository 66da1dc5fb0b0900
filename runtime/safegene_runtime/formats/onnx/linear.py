"""One linear node of an ONNX graph: which constant it multiplies by, how that lies, what it says.

A weight is stored as one float initializer, (in, out) or (out, in), perhaps behind a Transpose, or
as the two or three initializers of `MatMulNBits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import BaseModelError, Problem
from safegene_runtime.formats.onnx import nbits
from safegene_runtime.formats.onnx.file import OnnxFile
from safegene_runtime.formats.onnx.tensor import DataType, Initializer, read_initializer

__all__ = [
    "FLOAT_DATA", "LINEAR_OPS", "Layout", "StoredLinear", "constant_behind", "layout_of", "part_of",
    "producers", "read_packed", "read_weight", "to_float32",
]  # fmt: skip

Rows = npt.NDArray[np.float32]
Layout = Literal["in_out", "out_in", "nbits"]

FLOAT_DATA = {DataType.FLOAT: "F32", DataType.FLOAT16: "F16", DataType.BFLOAT16: "BF16"}
"""Weights that are numbers, by the names that GGUF gives them, too."""
LINEAR_OPS = frozenset({"MatMul", "Gemm", "MatMulNBits"})


@dataclass(frozen=True)
class StoredLinear:
    """One node that multiplies by a constant weight.

    Attributes:
        node: its index in the graph.
        name: its name, or its output's where it has none.
        op: `MatMul`, `Gemm` or `MatMulNBits`.
        weight: the initializer that holds the weight.
        layout: how it lies there: (in, out), (out, in), or packed by blocks.
        shape: (out, in).
        x: the name of its input.
        y: the name of its output.
    """

    node: int
    name: str
    op: str
    weight: Initializer
    layout: Layout
    shape: tuple[int, int]
    x: str
    y: str


def producers(model: OnnxFile) -> dict[str, int]:
    """Which node makes each value, by index."""
    return {
        output: index for index, node in enumerate(model.nodes) for output in node.outputs if output
    }


def constant_behind(
    model: OnnxFile, made_by: Mapping[str, int], name: str
) -> tuple[Initializer | None, bool, str]:
    """The initializer behind an input, whether it is transposed on the way, and what stopped us."""
    turned = False
    for _ in range(4):
        if name in model.initializers:
            return model.initializers[name], turned, ""
        index = made_by.get(name)
        if index is None:
            return None, turned, ""
        node = model.nodes[index]
        if node.op_type == "Transpose" and tuple(node.attributes.get("perm", (1, 0))) == (1, 0):
            turned = not turned
        elif node.op_type != "Identity":
            return None, turned, node.op_type if node.op_type == "DequantizeLinear" else ""
        name = node.inputs[0]
    return None, turned, ""


def layout_of(
    op: str, attributes: Mapping[str, Any], weight: Initializer, turned: bool
) -> tuple[Layout, tuple[int, int]] | str:
    """How a weight lies, and its (out, in); or what is wrong with it."""
    if op == "MatMulNBits":
        n, k = attributes.get("N"), attributes.get("K")
        if turned or not isinstance(n, int) or not isinstance(k, int) or min(n, k) < 1:
            return f"MatMulNBits with N={n}, K={k}"
        return "nbits", (n, k)
    if weight.dtype not in FLOAT_DATA or len(weight.shape) != 2:
        return f"a weight of type {weight.dtype.name} and shape {weight.shape}"
    if op == "Gemm":
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("transA", 0):
            return f"a Gemm with {dict(attributes)}"
        turned ^= bool(attributes.get("transB", 0))
    if turned:
        return "out_in", (weight.shape[0], weight.shape[1])
    return "in_out", (weight.shape[1], weight.shape[0])


def read_packed(model: OnnxFile, linear: StoredLinear) -> nbits.Packed:
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
    scales = part_of(model, linear, 2)
    zeros = part_of(model, linear, 3) if inputs[3] else None
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


def read_weight(model: OnnxFile, linear: StoredLinear) -> Rows:
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


def part_of(model: OnnxFile, linear: StoredLinear, index: int) -> Initializer:
    """The constant that is input `index` of a linear; BaseModelError if it is none."""
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
