"""The linear weights of an ONNX graph: which there are, how they lie, what they say.

A weight is stored as one float initializer, (in, out) or (out, in), perhaps behind Transpose and
Identity, or as the two or three initializers of `MatMulNBits`. Whatever else a graph multiplies by is
named, with the reason why it is not read: a weight that is overlooked is a weight that nobody checks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import BaseModelError, Problem, Problems, UnsupportedError
from safegene_runtime.formats.onnx import nbits
from safegene_runtime.formats.onnx.file import Graph, Node, OnnxFile
from safegene_runtime.formats.onnx.tensor import DataType, Initializer, read_initializer

__all__ = [
    "FLOAT_DATA", "PASS_ON", "Layout", "Linears", "StoredLinear", "UnreadLinear", "elements_by_type",
    "linears", "part_of", "producers", "read_packed", "read_weight", "to_float32",
]  # fmt: skip

Rows = npt.NDArray[np.float32]
Layout = Literal["in_out", "out_in", "nbits"]

FLOAT_DATA = {DataType.FLOAT: "F32", DataType.FLOAT16: "F16", DataType.BFLOAT16: "BF16"}
"""Weights that are numbers, by the names that GGUF gives them, too; finest first."""
LINEAR_OPS = frozenset({"MatMul", "Gemm", "MatMulNBits"})
PASS_ON = frozenset({"Transpose", "Identity"})
"""What lies between a weight and its linear without changing a value."""
MAX_HOPS = 16
HEAD_OUTPUT = "logits"
BEHIND_HEAD = frozenset({
    "Add", "Cast", "Div", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Tanh", "Transpose",
    "Unsqueeze",
})  # fmt: skip
"""What lies between the head and the logits: types, last positions, a scaling, a soft-cap."""


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
        type: F32, F16, BF16, INT4 or INT8.
        x: the name of its input.
        y: the name of its output.
    """

    node: int
    name: str
    op: str
    weight: Initializer
    layout: Layout
    shape: tuple[int, int]
    type: str
    x: str
    y: str


@dataclass(frozen=True)
class UnreadLinear:
    """One node that multiplies by constants which are no plain weight.

    Attributes:
        node: its index in the graph, or that of the node whose graph it is in.
        name: its name, or its output's where it has none.
        constant: the input that is constant.
        why: what it is instead of a weight, for messages.
        type: what its values are stored as, where they are floats; None: unknown.
        elements: how many, where the type is known.
    """

    node: int
    name: str
    constant: str
    why: str
    type: str | None = None
    elements: int = 0


@dataclass(frozen=True)
class Linears:
    """Every product with a constant, in the order of the graph."""

    stored: tuple[StoredLinear, ...]
    unread: tuple[UnreadLinear, ...]


def linears(model: OnnxFile) -> Linears:
    """Every node that multiplies what depends on an input by what does not.

    An initializer that a caller can override is an input.
    """
    made_by, changing = producers(model), _changing(model.graph)
    stored: list[StoredLinear] = []
    unread: list[UnreadLinear] = []
    for index, node in enumerate(model.nodes):
        unread += [
            UnreadLinear(index, _name(inner), constant, f"one inside of {node.op_type}")
            for graph in _graphs(node)
            for inner, constant in _products(graph, changing, model.initializers)
        ]
        for constant in _multiplied_by(node, changing, model.initializers):
            found = _read(model, made_by, index, constant)
            if isinstance(found, StoredLinear):
                stored.append(found)
            else:
                unread.append(found)
    return Linears(tuple(stored), tuple(unread))


def elements_by_type(model: OnnxFile, without: Collection[str] = ()) -> dict[str, int]:
    """Elements of the linear weights by stored type; the head, which is no block's, is left out.

    Args:
        model: the graph.
        without: initializers that are no weights: factors of an adapter.

    Raises:
        UnsupportedError: linears whose type is not known, all of them.
    """
    found, heads = linears(model), _heads(model)
    problems = Problems()
    counted: dict[str, int] = {}
    for linear in found.stored:
        if linear.node not in heads and linear.weight.name not in without:
            counted[linear.type] = counted.get(linear.type, 0) + math.prod(linear.shape)
    for other in found.unread:
        if other.node in heads or other.constant in without:
            continue
        if other.type is None:
            problems.add(
                str(model.path), other.name, "a weight of a type that is known", other.why,
                "export with float weights, or with MatMulNBits of 4 or 8 bits",
            )  # fmt: skip
        else:
            counted[other.type] = counted.get(other.type, 0) + other.elements
    problems.raise_if_any(UnsupportedError)
    return counted


def producers(model: OnnxFile) -> dict[str, int]:
    """Which node makes each value, by index."""
    return {
        output: index for index, node in enumerate(model.nodes) for output in node.outputs if output
    }


def _changing(graph: Graph, outer: Collection[str] = ()) -> set[str]:
    """The values that depend on an input, in whatever order the nodes are."""
    users: dict[str, list[Node]] = {}
    todo = [*outer, *(value.name for value in graph.inputs)]
    for node in graph.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
        if _graphs(node):  # it sees every value outside of it
            todo += node.outputs
    found = set(todo)
    while todo:
        for node in users.get(todo.pop(), ()):
            fresh = set(node.outputs) - found - {""}
            found |= fresh
            todo += fresh
    return found


def _graphs(node: Node) -> list[Graph]:
    return [value for value in node.attributes.values() if isinstance(value, Graph)]


def _products(
    graph: Graph, outer: Collection[str], constants: Mapping[str, Initializer]
) -> Iterator[tuple[Node, str]]:
    """Each product with a constant in a graph inside of a node, and in those inside of that."""
    changing, visible = _changing(graph, outer), {**constants, **graph.initializers}
    for node in graph.nodes:
        for inner in _graphs(node):
            yield from _products(inner, changing, visible)
        for constant in _multiplied_by(node, changing, visible):
            yield node, constant


def _multiplied_by(
    node: Node, changing: Collection[str], constants: Mapping[str, Initializer]
) -> list[str]:
    """The constants among the operands of a product; none for any other node."""
    op, inputs = node.op_type, node.inputs
    if op in LINEAR_OPS:
        given = len(inputs) > 1 and inputs[0] in changing and inputs[1] not in changing
        return [inputs[1]] if given else []
    # products whose weights are not read: quantised, fused, of experts, of ONNX Runtime's Attention
    fused = op in ("Attention", "QAttention", "PackedAttention") and node.domain == "com.microsoft"
    if not (fused or op == "Einsum" or any(part in op for part in ("MatMul", "Gemm", "MoE"))):
        return []
    fixed = [name for name in inputs if name and name not in changing]
    # scales and zero points have one extent, or none
    return [name for name in fixed if name not in constants or len(constants[name].shape) > 1]


def _read(
    model: OnnxFile, made_by: Mapping[str, int], index: int, constant: str
) -> StoredLinear | UnreadLinear:
    """The linear weight behind a constant operand of a node, or what it is instead."""
    node = model.nodes[index]
    name, op = _name(node), node.op_type
    if op not in LINEAR_OPS:
        return UnreadLinear(index, name, constant, f"one in {op}")
    weight, turned, through, kinds = _behind(model, made_by, constant)
    if weight is None:
        return UnreadLinear(index, name, constant, f"one that goes through {through}")
    floats = [*FLOAT_DATA]
    is_float = op != "MatMulNBits" and all(kind in floats for kind in kinds)
    known = _layout(op, node.attributes, weight, turned)
    if isinstance(known, str) or through:
        why = known if isinstance(known, str) else f"one that goes through {through}"
        type_ = FLOAT_DATA[max(kinds, key=floats.index)] if is_float else None
        return UnreadLinear(index, name, weight.name, why, type_, math.prod(weight.shape))
    layout, shape = known
    type_ = (
        f"INT{node.attributes.get('bits', 4)}" if layout == "nbits" else FLOAT_DATA[weight.dtype]
    )
    return StoredLinear(
        node=index, name=name, op=op, weight=weight, layout=layout, shape=shape, type=type_,
        x=node.inputs[0], y=node.outputs[0],
    )  # fmt: skip


def _behind(
    model: OnnxFile, made_by: Mapping[str, int], name: str
) -> tuple[Initializer | None, bool, str, list[DataType]]:
    """The tensor behind a constant.

    Returns:
        the tensor, or None where another operation makes it; whether it is transposed on the way;
        the first operation in between that is not in `PASS_ON`; the element types on the way.
    """
    turned, through = False, ""
    kinds: list[DataType] = []
    for _ in range(MAX_HOPS):
        value = model.initializers.get(name)
        node = model.nodes[made_by[name]] if name in made_by else None
        if node is not None and node.op_type == "Constant":
            through, value = through or "Constant", node.attributes.get("value")
        if isinstance(value, Initializer):
            return value, turned, through, [*kinds, value.dtype]
        if node is None or not node.inputs:
            return (
                None,
                turned,
                through or (node.op_type if node else f"{name!r}, which is not there"),
                [],
            )
        if node.op_type == "Transpose" and tuple(node.attributes.get("perm", (1, 0))) == (1, 0):
            turned = not turned
        elif node.op_type == "Cast" and node.attributes.get("to") in DataType._value2member_map_:
            through = through or "Cast"
            kinds.append(DataType(node.attributes["to"]))
        elif node.op_type != "Identity":
            return None, turned, node.op_type, []
        name = node.inputs[0]
    return None, turned, f"{MAX_HOPS} nodes", []


def _heads(model: OnnxFile) -> set[int]:
    """The products that make the logits, by index."""
    made_by = producers(model)
    todo, seen, found = [HEAD_OUTPUT], {HEAD_OUTPUT}, set()
    while todo:
        index = made_by.get(todo.pop())
        if index is None:
            continue
        node = model.nodes[index]
        if node.op_type in BEHIND_HEAD:
            fresh = set(node.inputs) - seen
            seen |= fresh
            todo += fresh
        else:
            found.add(index)
    return found


def _name(node: Node) -> str:
    return node.name or next(filter(None, node.outputs), node.op_type)


def _layout(
    op: str, attributes: Mapping[str, Any], weight: Initializer, turned: bool
) -> tuple[Layout, tuple[int, int]] | str:
    """How a weight lies, and its (out, in); or what is wrong with it."""
    if op == "MatMulNBits":
        n, k, bits = attributes.get("N"), attributes.get("K"), attributes.get("bits", 4)
        if turned or not isinstance(n, int) or not isinstance(k, int) or min(n, k) < 1:
            return f"MatMulNBits with N={n}, K={k}"
        return ("nbits", (n, k)) if bits in nbits.BITS else f"MatMulNBits of {bits} bits"
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
