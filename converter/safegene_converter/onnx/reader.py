"""An ONNX model as other readers see it: `onnx` finds and reads tensors, ONNX Runtime decodes packed ones.

Nothing here goes through our own reader or decoder: the self-check asks whether these were right. A
model is opened without the data beside it, and tensors are read one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import PostconditionError, Problem
from safegene_runtime.formats.onnx.linear import PASS_ON

__all__ = ["OnnxReader", "StoredWeight", "fields_of"]

COLUMNS = 1024
"""Columns of a packed weight that are decoded at a time: whole blocks, and whole bytes of zero points."""
OPSET, IR_VERSION = 21, 10
ACCURACY_FLOAT32 = 1
"""Of MatMulNBits: what its input is rounded to before the product."""


@dataclass(frozen=True)
class StoredWeight:
    """The constants that a linear node multiplies by.

    Attributes:
        parts: each with one row per row of the weight. A float weight is one, (out, in); MatMulNBits
            has B (out, n_blocks, bytes), scales (out, n_blocks) and perhaps zero points (out, bytes).
        columns: in.
        bits: of MatMulNBits; None for floats.
    """

    parts: tuple[npt.NDArray[Any], ...]
    columns: int
    bits: int | None

    def kind(self) -> tuple[Any, ...]:
        """Equal for weights that are stored alike."""
        return self.bits, *((part.shape, part.dtype) for part in self.parts)

    def rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Decoded rows, (n, in)."""
        parts = [np.ascontiguousarray(part[rows]) for part in self.parts]
        if self.bits is None:
            return parts[0].astype(np.float64)
        return _decode(parts, self.bits)[:, : self.columns].astype(np.float64)


class OnnxReader:
    """One model.

    Attributes:
        path: the .onnx file.
        proto: the ModelProto, without the data of other files.
        tensors: its initializers by name.
        makers: the node behind each value of the main graph.
        readers: the nodes, of inner graphs as well, and graph outputs that read each value.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        self.path = path
        self.proto = onnx.load(str(path), load_external_data=False)
        graph = self.proto.graph
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
        self.makers: dict[str, Any] = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for name, reader in _readers(graph):
            self.readers.setdefault(name, []).append(reader)

    def array(self, name: str) -> npt.NDArray[Any]:
        """The values of one initializer, in its shape.

        Raises:
            PostconditionError: there is none of that name.
        """
        import onnx
        from onnx import external_data_helper, numpy_helper

        if name not in self.tensors:
            raise PostconditionError(Problem(str(self.path), name, "an initializer", "none"))
        # a copy, so that the data of one tensor and no more is in memory
        tensor = onnx.TensorProto.FromString(self.tensors[name].SerializeToString())
        if external_data_helper.uses_external_data(tensor):
            external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
        found: npt.NDArray[Any] = numpy_helper.to_array(tensor)
        return found

    def linear(self, weight: str) -> tuple[Any, bool]:
        """The node that multiplies by a weight, and whether that lies there as (out, in).

        Raises:
            PostconditionError: no such node, or several.
        """
        name, turned = weight, False
        while True:
            readers = self.readers.get(name, [])
            ops = [getattr(reader, "op_type", "output") for reader in readers]
            if len(ops) == 1 and ops[0] in PASS_ON:
                turned ^= ops[0] == "Transpose"
                name = readers[0].output[0]
                continue
            if len(ops) != 1 or ops[0] == "output" or list(readers[0].input[1:2]) != [name]:
                raise PostconditionError(
                    Problem(
                        str(self.path), weight, "one node that multiplies by it",
                        ", ".join(ops) or "none",
                    )
                )  # fmt: skip
            node = readers[0]
            return node, turned ^ bool(ops[0] == "Gemm" and _attributes(node).get("transB", 0))

    def weight(self, name: str) -> StoredWeight:
        """A weight, and the constants beside it that decoding takes.

        Raises:
            PostconditionError: constants that are missing, or whose sizes contradict the node.
        """
        node, turned = self.linear(name)
        stored = self.array(name)
        if node.op_type != "MatMulNBits":
            return StoredWeight((stored if turned else stored.T,), stored.shape[turned], None)
        said = _attributes(node)
        scales, *zeros = (self.array(one) for one in node.input[2:4] if one)
        try:
            out, columns = said["N"], said["K"]
            blocks = -(-columns // said["block_size"])
            parts = (
                stored.reshape(out, blocks, -1),
                scales.reshape(out, blocks),
                *(zero.reshape(out, -1) for zero in zeros),
            )
        except (ArithmeticError, KeyError, ValueError) as error:
            raise PostconditionError(
                Problem(
                    str(self.path), name, f"constants of the sizes that {said} asks for", str(error)
                )
            ) from error
        return StoredWeight(parts, columns, said.get("bits", 4))


def fields_of(message: Any, but: Sequence[str] = ()) -> dict[str, bytes]:
    """The fields of a protobuf message that are set, each as its bytes."""
    found = {}
    for field, value in message.ListFields():
        if field.name in but:
            continue
        one = type(message)()
        if hasattr(value, "extend"):
            getattr(one, field.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(one, field.name).CopyFrom(value)
        else:
            setattr(one, field.name, value)
        found[field.name] = one.SerializeToString(deterministic=True)
    return found


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _readers(graph: Any) -> Iterator[tuple[str, Any]]:
    for node in graph.node:
        for name in node.input:
            yield name, node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _readers(inner)
    for value in graph.output:
        yield value.name, value


def _decode(parts: Sequence[npt.NDArray[Any]], bits: int) -> npt.NDArray[np.float32]:
    """Rows of a MatMulNBits weight (n, n_blocks * block_size), by that node itself, in float32.

    The node multiplies unit vectors, a few blocks at a time: each number is one product with 1.
    """
    b, scales, *zeros = parts
    rows, blocks, width = b.shape
    block = width * 8 // bits
    found = np.empty((rows, blocks * block), np.float32)
    step = COLUMNS // block
    for start in range(0, blocks, step):
        part = slice(start, min(start + step, blocks))
        columns = (part.stop - start) * block
        feeds = {
            "x": np.eye(columns, dtype=np.float32),
            "b": np.ascontiguousarray(b[:, part]),
            "scales": np.ascontiguousarray(scales[:, part], np.float32),
        }
        if zeros:
            at = slice(start * bits // 8, -(-part.stop * bits // 8))
            feeds["zeros"] = np.ascontiguousarray(zeros[0][:, at])
        node = _node(rows, columns, bits, block, bool(zeros))
        found[:, start * block : part.stop * block] = node.run(None, feeds)[0].T
    return found


@functools.lru_cache(maxsize=64)
def _node(rows: int, columns: int, bits: int, block: int, has_zeros: bool) -> Any:
    """ONNX Runtime with one MatMulNBits node whose weight is fed, (columns, columns) @ (rows, columns)."""
    import onnxruntime
    from onnx import TensorProto, helper

    blocks = columns // block
    shapes = {
        "x": (TensorProto.FLOAT, [columns, columns]),
        "b": (TensorProto.UINT8, [rows, blocks, block * bits // 8]),
        "scales": (TensorProto.FLOAT, [rows, blocks]),
        "zeros": (TensorProto.UINT8, [rows, -(-blocks * bits // 8)]),
    }
    if not has_zeros:
        del shapes["zeros"]
    node = helper.make_node(
        "MatMulNBits", list(shapes), ["y"], domain="com.microsoft", N=rows, K=columns, bits=bits,
        block_size=block, accuracy_level=ACCURACY_FLOAT32,
    )  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, *shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])
    model = helper.make_model(
        helper.make_graph([node], "decode", inputs, [output]), ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
