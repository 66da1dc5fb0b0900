"""What is in an ONNX model, read at the level of bytes, without the `onnx` package.

`onnx.checker` accepts external data past the end of its file, negative offsets and wrong lengths;
ONNX Runtime takes the last of two initializers of one name, and reads a hard link's data. So every
length is checked against the bytes that are there before anything is done with it, and every tensor
is accounted for: where its bytes are, and that they are as many as shape and type need.

Wire format: https://protobuf.dev/programming-guides/encoding; fields: onnx.proto of onnx 1.23. A
field that onnx.proto does not define is refused: another reader may know it.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, Problem, Problems
from safegene_runtime.files import open_regular

__all__ = [
    "DataType",
    "Graph",
    "Initializer",
    "Node",
    "OnnxFile",
    "ValueInfo",
    "read_initializer",
    "read_onnx",
]

MAX_MODEL_BYTES = (1 << 31) - 1
MAX_DEPTH = 8
MAX_ITEMS = 1_000_000
MAX_DIMS = 16
MAX_NAME = 4096

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class DataType(IntEnum):
    """TensorProto.DataType."""

    FLOAT = 1
    UINT8 = 2
    INT8 = 3
    UINT16 = 4
    INT16 = 5
    INT32 = 6
    INT64 = 7
    BOOL = 9
    FLOAT16 = 10
    DOUBLE = 11
    UINT32 = 12
    UINT64 = 13
    BFLOAT16 = 16
    FLOAT8E4M3FN = 17
    FLOAT8E4M3FNUZ = 18
    FLOAT8E5M2 = 19
    FLOAT8E5M2FNUZ = 20
    UINT4 = 21
    INT4 = 22


_BITS = {
    DataType.FLOAT: 32, DataType.UINT8: 8, DataType.INT8: 8, DataType.UINT16: 16,
    DataType.INT16: 16, DataType.INT32: 32, DataType.INT64: 64, DataType.BOOL: 8,
    DataType.FLOAT16: 16, DataType.DOUBLE: 64, DataType.UINT32: 32, DataType.UINT64: 64,
    DataType.BFLOAT16: 16, DataType.FLOAT8E4M3FN: 8, DataType.FLOAT8E4M3FNUZ: 8,
    DataType.FLOAT8E5M2: 8, DataType.FLOAT8E5M2FNUZ: 8, DataType.UINT4: 4, DataType.INT4: 4,
}  # fmt: skip

_NUMPY = {
    DataType.FLOAT: "<f4", DataType.UINT8: "u1", DataType.INT8: "i1", DataType.UINT16: "<u2",
    DataType.INT16: "<i2", DataType.INT32: "<i4", DataType.INT64: "<i8", DataType.BOOL: "?",
    DataType.FLOAT16: "<f2", DataType.DOUBLE: "<f8", DataType.UINT32: "<u4",
    DataType.UINT64: "<u8", DataType.BFLOAT16: "<u2",
}  # fmt: skip
"""What numpy can hold; bfloat16 stays raw, and what is not here comes as bytes."""

# Which of the typed fields holds which types, and how wide an element is there.
_TYPED = {
    4: ((DataType.FLOAT,), "<f4"),
    5: (
        tuple(kind for kind, bits in _BITS.items()
              if bits <= 16 or kind is DataType.INT32), "varint",
    ),
    7: ((DataType.INT64,), "varint"),
    10: ((DataType.DOUBLE,), "<f8"),
    11: ((DataType.UINT32, DataType.UINT64), "varint"),
}  # fmt: skip


@dataclass(frozen=True)
class Initializer:
    """A constant tensor, and where its bytes are.

    Attributes:
        name: its name.
        dtype: its element type.
        shape: its extents.
        nbytes: its size.
        path: the file that holds it; None where `data` does.
        offset: its first byte in `path`.
        data: its bytes, little-endian, where the model stores them as a list of numbers.
    """

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    nbytes: int
    path: Path | None
    offset: int
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ValueInfo:
    """An input or output: element type, and extents as numbers, names or None."""

    name: str
    elem_type: int | None
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Node:
    """One operation; attributes are numbers, bytes, tuples of them, Initializers or Graphs."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Graph:
    """A graph, the model's or the branch of a control-flow node."""

    name: str
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Initializer]
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]


@dataclass(frozen=True)
class OnnxFile:
    """A model whose every byte is accounted for.

    Attributes:
        path: the .onnx file.
        ir_version: of the format.
        opsets: version by domain; "ai.onnx" is "".
        producer: name and version of what made it.
        metadata: metadata_props.
        graph: the main graph; its parts are attributes here, too.
        overridable: initializers that are inputs, which a caller can replace.
        files: the model and every external data file, in name order.
    """

    path: Path
    ir_version: int
    opsets: Mapping[str, int]
    producer: tuple[str, str]
    metadata: Mapping[str, str]
    graph: Graph
    overridable: tuple[str, ...]
    files: tuple[Path, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes of the main graph, in order."""
        return self.graph.nodes

    @property
    def initializers(self) -> Mapping[str, Initializer]:
        """The constants of the main graph, by name."""
        return self.graph.initializers

    @property
    def inputs(self) -> tuple[ValueInfo, ...]:
        """The inputs of the main graph."""
        return self.graph.inputs

    @property
    def outputs(self) -> tuple[ValueInfo, ...]:
        """The outputs of the main graph."""
        return self.graph.outputs


def read_onnx(path: Path, data: bytes | memoryview | None = None) -> OnnxFile:
    """Reads and checks a model; tensor data is not touched.

    Args:
        path: the .onnx file; external data lies in its folder.
        data: its content, where the caller has read and verified it.

    Raises:
        FormatError: what is wrong with it.
    """
    path = Path(path)
    if data is not None:
        return _Reader(path, memoryview(data)).model()
    with open_regular(path, follow_symlinks=True) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_MODEL_BYTES:
            raise _wrong(
                path, "size", "at most 2 GiB, the limit of protobuf", f"{size} bytes",
                "save the model with external data",
            )  # fmt: skip
        if not size:
            raise _wrong(path, "content", "a model", "an empty file", "download it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                return _Reader(path, view).model()
            finally:
                view.release()


def read_initializer(info: Initializer) -> npt.NDArray[Any]:
    """The values of a constant, in its shape; bfloat16 as uint16, types below 8 bits as bytes.

    Raises:
        FormatError: the file is shorter than it was.
    """
    raw = info.data
    if raw is None:
        if info.path is None:
            raise _wrong(Path(info.name), "data", "bytes or a file", "neither")
        with open_regular(info.path, follow_symlinks=True) as file:
            file.seek(info.offset)
            raw = file.read(info.nbytes)
    if len(raw) != info.nbytes:
        raise _wrong(
            info.path or Path(info.name), info.name, f"{info.nbytes} bytes", f"{len(raw)} bytes",
            "the file changed while it was read",
        )  # fmt: skip
    dtype = _NUMPY.get(info.dtype)
    if dtype is None:
        return np.frombuffer(raw, np.uint8)
    return np.frombuffer(raw, dtype).reshape(info.shape)


def _wrong(path: Path, what: str, expected: str, got: str, fix: str = "") -> FormatError:
    return FormatError(Problem(str(path), what, expected, got, fix or "export the model again"))


_Span = tuple[int, int]


class _Reader:
    """Walks one model; every position is an index into its bytes."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self._path = path
        self._view = view
        self._items = 0
        self._data_sizes: dict[str, int] = {}
        self._ranges: dict[str, list[tuple[int, int, str]]] = {}

    def fail(self, what: str, expected: object, got: object, fix: str = "") -> FormatError:
        return _wrong(self._path, what, str(expected), str(got)[:200], fix)

    # --- the wire ----------------------------------------------------------------------------------

    def varint(self, at: int, end: int, what: str) -> tuple[int, int]:
        """(value, next position); at most ten bytes, 64 bits."""
        value = shift = 0
        view = self._view
        while at < end and shift < 70:
            byte = view[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                if value >> 64:
                    break
                return value, at
            shift += 7
        raise self.fail(f"{what} at byte {at}", "a number of at most 64 bits", "more, or its end")

    def fields(
        self, span: _Span, what: str, known: Mapping[int, int], repeated: frozenset[int]
    ) -> Iterator[tuple[int, Any]]:
        """(field, value) of one message: an int, or the span of bytes.

        Args:
            span: where the message is.
            what: its name, for messages.
            known: wire type by field number; a packed list may stand for its elements.
            repeated: fields that may come more than once.
        """
        at, end = span
        seen: set[int] = set()
        while at < end:
            start = at
            key, at = self.varint(at, end, what)
            number, wire = key >> 3, key & 7
            if number not in known:
                raise self.fail(
                    f"{what} at byte {start}", "fields of onnx.proto", f"field {number}",
                    "is it an ONNX model, of a version that safegene knows?",
                )  # fmt: skip
            if number not in repeated:
                if number in seen:
                    raise self.fail(f"{what} at byte {start}", f"field {number} once", "twice")
                seen.add(number)
            packed = wire == BYTES and number in repeated and known[number] != BYTES
            if wire != known[number] and not packed:
                raise self.fail(
                    f"{what} at byte {start}", f"wire type {known[number]} of field {number}", wire
                )
            if wire == VARINT:
                value, at = self.varint(at, end, what)
                yield number, value
            elif wire == BYTES:
                length, at = self.varint(at, end, what)
                if length > end - at:
                    raise self.fail(
                        f"{what} at byte {start}", f"at most {end - at} bytes", f"{length} bytes"
                    )
                yield number, (at, at + length)
                at += length
            else:
                width = 8 if wire == FIXED64 else 4
                if width > end - at:
                    raise self.fail(f"{what} at byte {start}", f"{width} bytes", f"{end - at} left")
                yield number, (at, at + width)
                at += width
            self._items += 1
            if self._items > 64 * MAX_ITEMS:
                raise self.fail(what, f"at most {64 * MAX_ITEMS} fields", "more")

    def text(self, span: _Span, what: str) -> str:
        raw = bytes(self._view[span[0] : span[1]])
        try:
            found = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(what, "UTF-8", error.reason) from error
        if "\0" in found:
            raise self.fail(what, "text without NUL", repr(found[:40]))
        return found

    def name(self, span: _Span, what: str) -> str:
        if span[1] - span[0] > MAX_NAME:
            raise self.fail(what, f"at most {MAX_NAME} bytes", f"{span[1] - span[0]}")
        return self.text(span, what)

    # --- messages ----------------------------------------------------------------------------------

    def model(self) -> OnnxFile:
        head = bytes(self._view[:64])
        if head.startswith(b"version https://git-lfs"):
            raise self.fail("content", "a model", "a git-lfs pointer", "run `git lfs pull`")
        version, producer, span = 0, ["", ""], None
        opsets: dict[str, int] = {}
        metadata: dict[str, str] = {}
        known = {1: VARINT, 2: BYTES, 3: BYTES, 4: BYTES, 5: VARINT, 6: BYTES, 7: BYTES, 8: BYTES,
                 14: BYTES, 20: BYTES, 25: BYTES, 26: BYTES}  # fmt: skip
        everything = (0, len(self._view))
        for number, value in self.fields(
            everything, "model", known, frozenset({8, 14, 20, 25, 26})
        ):
            if number == 1:
                version = value
            elif number in (2, 3):
                producer[number - 2] = self.text(value, "producer")
            elif number == 7:
                span = value
            elif number == 8:
                domain, opset = self._opset(value)
                if domain in opsets:
                    raise self.fail("opset_import", "each domain once", repr(domain))
                opsets[domain] = opset
            elif number == 14:
                key, text = self._pair(value, "metadata_props")
                if key in metadata:
                    raise self.fail("metadata_props", "each key once", key)
                metadata[key] = text
            elif number == 20:
                raise self.fail("training_info", "a model for inference", "training graphs")
        if not 1 <= version <= 1000:
            raise self.fail("ir_version", "3 to 13 or so", version, "is it an ONNX model?")
        if span is None:
            raise self.fail("graph", "a graph", "none", "is it an ONNX model?")
        graph = self._graph(span, 0, frozenset())
        if not graph.nodes or not graph.outputs:
            raise self.fail("graph", "nodes and outputs", "none", "is it an ONNX model?")
        self._check_overlaps()
        inputs = {value.name for value in graph.inputs}
        return OnnxFile(
            path=self._path,
            ir_version=version,
            opsets=opsets,
            producer=(producer[0], producer[1]),
            metadata=metadata,
            graph=graph,
            overridable=tuple(sorted(inputs & graph.initializers.keys())),
            files=tuple(
                sorted([self._path, *(self._path.parent / name for name in self._data_sizes)])
            ),
        )

    def _opset(self, span: _Span) -> tuple[str, int]:
        domain, version = "", 0
        for number, value in self.fields(span, "opset_import", {1: BYTES, 2: VARINT}, frozenset()):
            if number == 1:
                domain = self.name(value, "opset_import")
            else:
                version = value
        return ("" if domain == "ai.onnx" else domain), version

    def _pair(self, span: _Span, what: str) -> tuple[str, str]:
        key = text = ""
        for number, value in self.fields(span, what, {1: BYTES, 2: BYTES}, frozenset()):
            if number == 1:
                key = self.text(value, what)
            else:
                text = self.text(value, what)
        return key, text

    def _graph(self, span: _Span, depth: int, outer: frozenset[str]) -> Graph:
        if depth > MAX_DEPTH:
            raise self.fail("graph", f"at most {MAX_DEPTH} graphs in each other", "more")
        name = ""
        nodes_at: list[_Span] = []
        initializers: dict[str, Initializer] = {}
        ports: dict[int, list[ValueInfo]] = {11: [], 12: []}
        known = dict.fromkeys((1, 2, 5, 10, 11, 12, 13, 14, 15, 16), BYTES)
        for number, value in self.fields(
            span, "graph", known, frozenset({1, 5, 11, 12, 13, 14, 15, 16})
        ):
            if number == 1:
                nodes_at.append(value)
            elif number == 2:
                name = self.name(value, "graph name")
            elif number == 5:
                tensor = self._tensor(value, "initializer")
                if not tensor.name:
                    raise self.fail("initializer", "a name", "none")
                if depth:
                    self._inside(tensor)
                if tensor.name in initializers or tensor.name in outer:
                    raise self.fail(
                        f"initializer {tensor.name!r}", "each name once",
                        "twice: runtimes differ in which one they take",
                    )  # fmt: skip
                initializers[tensor.name] = tensor
            elif number in ports:
                port = self._value_info(value)
                if port.name in {other.name for other in ports[number]}:
                    raise self.fail(f"input or output {port.name!r}", "each name once", "twice")
                ports[number].append(port)
            elif number == 15:
                raise self.fail("sparse_initializer", "dense tensors", "a sparse one")
            if len(nodes_at) > MAX_ITEMS or len(initializers) > MAX_ITEMS:
                raise self.fail("graph", f"at most {MAX_ITEMS} nodes and tensors", "more")
        visible = outer | initializers.keys()
        made = {value.name for value in ports[11]}
        nodes = []
        for node_span in nodes_at:
            node = self._node(node_span, depth, visible)
            for output in filter(None, node.outputs):
                if output in made or output in initializers:
                    raise self.fail(f"value {output!r}", "made once", "made twice")
                made.add(output)
            nodes.append(node)
        return Graph(name, tuple(nodes), initializers, tuple(ports[11]), tuple(ports[12]))

    def _node(self, span: _Span, depth: int, outer: frozenset[str]) -> Node:
        texts = {3: "", 4: "", 7: "", 8: ""}
        inputs: list[str] = []
        outputs: list[str] = []
        attributes: dict[str, Any] = {}
        known = dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 8, 9, 10), BYTES)
        for number, value in self.fields(span, "node", known, frozenset({1, 2, 5, 9, 10})):
            if number == 1:
                inputs.append(self.name(value, "node input"))
            elif number == 2:
                outputs.append(self.name(value, "node output"))
            elif number in texts:
                texts[number] = self.name(value, "node")
            elif number == 5:
                name, found = self._attribute(value, depth, outer)
                if name in attributes:
                    raise self.fail(f"attribute {name!r}", "each attribute once", "twice")
                attributes[name] = found
        if not texts[4]:
            raise self.fail(f"node {texts[3]!r}", "an op_type", "none")
        return Node(
            texts[3], texts[4], "" if texts[7] == "ai.onnx" else texts[7],
            tuple(inputs), tuple(outputs), attributes,
        )  # fmt: skip

    def _attribute(self, span: _Span, depth: int, outer: frozenset[str]) -> tuple[str, Any]:
        name = ""
        single: dict[int, Any] = {}
        many: dict[int, list[Any]] = {7: [], 8: [], 9: []}
        known = {1: BYTES, 2: FIXED32, 3: VARINT, 4: BYTES, 5: BYTES, 6: BYTES, 7: FIXED32,
                 8: VARINT, 9: BYTES, 10: BYTES, 11: BYTES, 13: BYTES, 14: BYTES, 15: BYTES,
                 20: VARINT, 21: BYTES, 22: BYTES, 23: BYTES}  # fmt: skip
        kind = 0
        for number, value in self.fields(
            span, "attribute", known, frozenset({7, 8, 9, 10, 11, 15, 23})
        ):
            if number == 1:
                name = self.name(value, "attribute")
            elif number == 2:
                single[number] = self._float(value)
            elif number == 3:
                single[number] = _signed(value)
            elif number == 4:
                single[number] = bytes(self._view[value[0] : value[1]])
            elif number == 5:
                single[number] = self._inside(self._tensor(value, f"attribute {name!r}"))
            elif number == 6:
                single[number] = self._graph(value, depth + 1, outer)
            elif number == 7:
                many[7] += self._floats(value)
            elif number == 8:
                many[8] += self._integers(value)
            elif number == 9:
                many[9].append(bytes(self._view[value[0] : value[1]]))
            elif number == 20:
                kind = value
            elif number != 13:
                raise self.fail(
                    f"attribute {name!r}", "a number, text, tensor, graph or a list of numbers",
                    f"field {number}",
                )  # fmt: skip
        # AttributeProto.AttributeType: FLOAT, INT, STRING, TENSOR, GRAPH, FLOATS, INTS, STRINGS
        place = {1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9}.get(kind)
        filled = set(single) | {number for number, values in many.items() if values}
        if place is None or not name or filled - {place}:
            raise self.fail(
                f"attribute {name!r}", "one value, of the type it states", f"type {kind}, {filled}"
            )
        if place in many:
            return name, tuple(many[place])
        empty: dict[int, Any] = {2: 0.0, 3: 0, 4: b""}
        if place not in single and place not in empty:
            raise self.fail(f"attribute {name!r}", "a tensor or a graph", "none")
        return name, single.get(place, empty.get(place))

    def _value_info(self, span: _Span) -> ValueInfo:
        name, kind = "", None
        shape: tuple[int | str | None, ...] | None = None
        known = {1: BYTES, 2: BYTES, 3: BYTES, 4: BYTES}
        for number, value in self.fields(span, "value", known, frozenset({4})):
            if number == 1:
                name = self.name(value, "value name")
            elif number == 2:
                kind, shape = self._type(value)
        if not name:
            raise self.fail("value", "a name", "none")
        return ValueInfo(name, kind, shape)

    def _type(self, span: _Span) -> tuple[int | None, tuple[int | str | None, ...] | None]:
        kind, shape = None, None
        known = dict.fromkeys((1, 4, 5, 6, 7, 8, 9), BYTES)
        for number, value in self.fields(span, "type", known, frozenset()):
            if number != 1:
                continue
            for inner, found in self.fields(
                value, "tensor type", {1: VARINT, 2: BYTES}, frozenset()
            ):
                if inner == 1:
                    kind = found
                else:
                    shape = tuple(
                        self._dimension(dim)
                        for _, dim in self.fields(found, "shape", {1: BYTES}, frozenset({1}))
                    )
        return kind, shape

    def _dimension(self, span: _Span) -> int | str | None:
        found: int | str | None = None
        known = {1: VARINT, 2: BYTES, 3: BYTES}
        for number, value in self.fields(span, "dimension", known, frozenset()):
            if number == 1:
                found = _signed(value)
            elif number == 2:
                found = self.name(value, "dimension")
        return found

    # --- tensors -----------------------------------------------------------------------------------

    def _tensor(self, span: _Span, what: str) -> Initializer:
        name, kind, location = "", 0, 0
        dims: list[int] = []
        raw: _Span | None = None
        typed: dict[int, list[_Span | int]] = {}
        external: dict[str, str] = {}
        known = {1: VARINT, 2: VARINT, 3: BYTES, 4: FIXED32, 5: VARINT, 6: BYTES, 7: VARINT,
                 8: BYTES, 9: BYTES, 10: FIXED64, 11: VARINT, 12: BYTES, 13: BYTES, 14: VARINT,
                 16: BYTES}  # fmt: skip
        repeated = frozenset({1, 4, 5, 6, 7, 10, 11, 13, 16})
        for number, value in self.fields(span, what, known, repeated):
            if number == 1:
                dims += self._integers(value)
            elif number == 2:
                kind = value
            elif number == 8:
                name = self.name(value, what)
            elif number == 9:
                raw = value
            elif number == 13:
                key, text = self._pair(value, what)
                if key in external or key not in ("location", "offset", "length", "checksum"):
                    raise self.fail(
                        f"external data of {name!r}", "location, offset, length, each once", key
                    )
                external[key] = text
            elif number == 14:
                location = value
            elif number in (3, 6):
                raise self.fail(f"{what} {name!r}", "a tensor of numbers", f"field {number}")
            elif number in _TYPED:
                typed.setdefault(number, []).append(value)
        where = f"{what} {name!r}"
        if kind not in DataType._value2member_map_:
            raise self.fail(where, "a known element type", f"type {kind}")
        dtype = DataType(kind)
        if len(dims) > MAX_DIMS or any(dim < 0 for dim in dims):
            raise self.fail(where, f"at most {MAX_DIMS} extents >= 0", dims)
        count = math.prod(dims)
        if count > 1 << 48:
            raise self.fail(where, "a size that there is", dims)
        nbytes = -(-count * _BITS[dtype] // 8)
        ways = (location == 1) + (raw is not None) + bool(typed)
        if location not in (0, 1) or ways > 1 or bool(external) != (location == 1):
            raise self.fail(where, "its data in one place", f"location {location}, {ways} places")
        shape = tuple(dims)
        if location == 1:
            path, offset = self._external(where, name, external, nbytes)
            return Initializer(name, dtype, shape, nbytes, path, offset)
        if raw is not None:
            if raw[1] - raw[0] != nbytes:
                raise self.fail(
                    where, f"{nbytes} bytes for {dtype.name} {shape}", f"{raw[1] - raw[0]} bytes"
                )
            return Initializer(name, dtype, shape, nbytes, self._path, raw[0])
        data = self._typed_data(where, dtype, count, typed)
        return Initializer(name, dtype, shape, nbytes, None, 0, data)

    def _inside(self, tensor: Initializer) -> Initializer:
        """A tensor that must lie in the model itself: runtimes look elsewhere for main ones only."""
        if tensor.path not in (None, self._path):
            raise self.fail(
                f"tensor {tensor.name!r} of a node", "data in the model itself", tensor.path.name
            )
        return tensor

    def _typed_data(
        self, where: str, dtype: DataType, count: int, typed: Mapping[int, list[Any]]
    ) -> bytes:
        if not typed:
            if count:
                raise self.fail(where, f"{count} elements", "no data")
            return b""
        number, pieces = next(iter(typed.items()))
        allowed, width = _TYPED[number]
        if len(typed) > 1 or dtype not in allowed:
            raise self.fail(where, f"data of type {dtype.name}", f"fields {sorted(typed)}")
        expected = -(-count // 2) if _BITS[dtype] == 4 else count
        if width != "varint":
            raw = b"".join(bytes(self._view[start:end]) for start, end in pieces)
            got = len(raw) // int(width[-1])
            if got != expected or len(raw) % int(width[-1]):
                raise self.fail(where, f"{expected} elements", f"{len(raw)} bytes")
            return raw
        values = [one for piece in pieces for one in self._integers(piece, signed=number != 11)]
        if len(values) != expected:
            raise self.fail(where, f"{expected} elements", f"{len(values)}")
        # float16 and its kin are stored as their bits
        bits = max(_BITS[dtype], 8)
        low, high = -(1 << (bits - 1)), (1 << bits) - 1
        if any(not low <= value <= high for value in values):
            raise self.fail(where, f"numbers of {bits} bits", "larger ones")
        return b"".join((value & high).to_bytes(bits // 8, "little") for value in values)

    def _external(
        self, where: str, name: str, external: Mapping[str, str], nbytes: int
    ) -> tuple[Path, int]:
        """The file and first byte of a tensor outside the model."""
        location = external.get("location", "")
        plain = location not in ("", ".", "..") and all(
            (ord(letter) > 32 and letter not in '/\\:*?"<>|') or letter == " "
            for letter in location
        )
        if not plain or location == self._path.name:
            raise self.fail(
                where, "data in a file of the model's own folder", repr(location),
                "external data must be a plain file name",
            )  # fmt: skip
        size = self._data_size(where, location)
        numbers = {"offset": 0, "length": nbytes}
        for key in numbers:
            if key in external:
                text = external[key]
                if not (text.isascii() and text.isdigit() and len(text) <= 19):
                    raise self.fail(where, f"{key}: a number of bytes", repr(text))
                numbers[key] = int(text)
        if numbers["length"] != nbytes:
            raise self.fail(where, f"{nbytes} bytes", f"length {numbers['length']}")
        end = numbers["offset"] + nbytes
        if end > size:
            raise self.fail(
                where, f"bytes up to {end} in {location}", f"{size} bytes", "download it again"
            )
        self._ranges.setdefault(location, []).append((numbers["offset"], end, name))
        return self._path.parent / location, numbers["offset"]

    def _data_size(self, where: str, location: str) -> int:
        """The size of a data file: a regular file of its own, in this folder."""
        if location not in self._data_sizes:
            path = self._path.parent / location
            try:
                status = path.lstat()
            except (OSError, ValueError) as error:
                raise self.fail(
                    where, f"the data file {location}", str(error), "copy it beside the model"
                ) from error
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                kind = "a hard link" if stat.S_ISREG(status.st_mode) else "no regular file"
                raise self.fail(
                    where,
                    f"{location}: a regular file with one name",
                    kind,
                    "copy it, do not link it",
                )
            self._data_sizes[location] = status.st_size
        return self._data_sizes[location]

    def _check_overlaps(self) -> None:
        problems = Problems()
        for location, ranges in self._ranges.items():
            ranges.sort()
            for (start, end, name), (other, other_end, second) in itertools.pairwise(ranges):
                if other < end and (start, end) != (other, other_end):
                    problems.add(
                        str(self._path), f"external data of {second!r}",
                        f"bytes of its own in {location}", f"bytes of {name!r}, too",
                        "export the model again",
                    )  # fmt: skip
        problems.raise_if_any(FormatError)

    # --- numbers -----------------------------------------------------------------------------------

    def _float(self, span: _Span) -> float:
        value: float = struct.unpack("<f", self._view[span[0] : span[1]])[0]
        return value

    def _floats(self, span: _Span) -> list[float]:
        if (span[1] - span[0]) % 4:
            raise self.fail("floats", "a multiple of 4 bytes", f"{span[1] - span[0]}")
        found: list[float] = np.frombuffer(self._view[span[0] : span[1]], "<f4").tolist()
        return found

    def _integers(self, value: int | _Span, signed: bool = True) -> list[int]:
        """One number, or a packed list of them."""
        if isinstance(value, int):
            return [_signed(value) if signed else value]
        at, end = value
        found = []
        while at < end:
            one, at = self.varint(at, end, "numbers")
            found.append(_signed(one) if signed else one)
        return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
