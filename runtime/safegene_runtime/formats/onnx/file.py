"""What is in an ONNX model, read at the level of bytes, without the `onnx` package.

ONNX Runtime takes the last of two initializers of one name, and other runtimes another; a name is
given once here, a value is made once, and every byte is accounted for before anything is done with it.

Fields: onnx.proto of onnx 1.23. A field that it does not define is refused.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene_runtime.formats.files import open_regular
from safegene_runtime.formats.onnx.tensor import Initializer, TensorReader
from safegene_runtime.formats.onnx.wire import BYTES, FIXED32, VARINT, Span, to_signed, wrong

__all__ = ["Graph", "Node", "OnnxFile", "ValueInfo", "read_onnx"]

MAX_MODEL_BYTES = (1 << 31) - 1
MAX_DEPTH = 8
MAX_ITEMS = 50_000
"""Nodes, tensors and values of all graphs; entries of metadata."""


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
    try:
        return _read(path, data)
    except MemoryError:
        raise wrong(path, "graph", "one that fits into memory", "more") from None


def _read(path: Path, data: bytes | memoryview | None) -> OnnxFile:
    if data is not None:
        return _ModelReader(path, memoryview(data)).model()
    with open_regular(path, follow_symlinks=True) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_MODEL_BYTES:
            raise wrong(
                path, "size", "at most 2 GiB, the limit of protobuf", f"{size} bytes",
                "save the model with external data",
            )  # fmt: skip
        if not size:
            raise wrong(path, "content", "a model", "an empty file", "download it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                return _ModelReader(path, view).model()
            finally:
                view.release()


class _ModelReader(TensorReader):
    """Reads the messages of a model."""

    _items = 0

    def model(self) -> OnnxFile:
        head = bytes(self.view[:64])
        if head.startswith(b"version https://git-lfs"):
            raise self.fail("content", "a model", "a git-lfs pointer", "run `git lfs pull`")
        version, producer, span = 0, ["", ""], None
        opsets: dict[str, int] = {}
        metadata: dict[str, str] = {}
        known = {1: VARINT, 2: BYTES, 3: BYTES, 4: BYTES, 5: VARINT, 6: BYTES, 7: BYTES, 8: BYTES,
                 14: BYTES, 20: BYTES, 25: BYTES, 26: BYTES}  # fmt: skip
        everything = (0, len(self.view))
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
                key, text = self.pair(value, "metadata_props")
                if len(metadata) == MAX_ITEMS:
                    raise self.fail("metadata_props", f"at most {MAX_ITEMS}", "more")
                if key in metadata:
                    raise self.fail("metadata_props", "each key once", key)
                metadata[key] = text
            elif number == 20:
                raise self.fail("training_info", "a model for inference", "training graphs")
            elif number == 25:
                raise self.fail(
                    "functions", "operations of the standard", self._function(value),
                    "a function of the model's own may change what a node computes: inline it",
                )  # fmt: skip
            elif number == 26:
                raise self.fail("configuration", "a model for one device", "one for several")
        if not 1 <= version <= 1000:
            raise self.fail("ir_version", "3 to 13 or so", version, "is it an ONNX model?")
        if span is None:
            raise self.fail("graph", "a graph", "none", "is it an ONNX model?")
        graph = self._graph(span, 0, frozenset())
        if not graph.nodes or not graph.outputs:
            raise self.fail("graph", "nodes and outputs", "none", "is it an ONNX model?")
        self.check_overlaps()
        inputs = {value.name for value in graph.inputs}
        return OnnxFile(
            path=self.path,
            ir_version=version,
            opsets=opsets,
            producer=(producer[0], producer[1]),
            metadata=metadata,
            graph=graph,
            overridable=tuple(sorted(inputs & graph.initializers.keys())),
            files=tuple(sorted([self.path, *self.data_files])),
        )

    def _function(self, span: Span) -> str:
        """What a FunctionProto is called."""
        known = dict.fromkeys((1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14), BYTES)
        texts = {1: "", 10: "", 13: ""}
        for number, value in self.fields(span, "function", known, frozenset(known) - {1, 8, 10}):
            if number in texts:
                texts[number] = self.name(value, "function")
        return f"function {texts[10]}.{texts[1]}"

    def _opset(self, span: Span) -> tuple[str, int]:
        domain, version = "", 0
        for number, value in self.fields(span, "opset_import", {1: BYTES, 2: VARINT}, frozenset()):
            if number == 1:
                domain = self.name(value, "opset_import")
            else:
                version = value
        return ("" if domain == "ai.onnx" else domain), version

    def _graph(self, span: Span, depth: int, outer: frozenset[str]) -> Graph:
        if depth > MAX_DEPTH:
            raise self.fail("graph", f"at most {MAX_DEPTH} graphs in each other", "more")
        name = ""
        nodes_at: list[Span] = []
        initializers: dict[str, Initializer] = {}
        ports: dict[int, dict[str, ValueInfo]] = {11: {}, 12: {}}
        known = dict.fromkeys((1, 2, 5, 10, 11, 12, 13, 14, 15, 16), BYTES)
        for number, value in self.fields(
            span, "graph", known, frozenset({1, 5, 11, 12, 13, 14, 15, 16})
        ):
            self._items += 1
            if self._items > MAX_ITEMS:
                raise self.fail("graph", f"at most {MAX_ITEMS} nodes, tensors and values", "more")
            if number == 1:
                nodes_at.append(value)
            elif number == 2:
                name = self.name(value, "graph name")
            elif number == 5:
                tensor = self.tensor(value, "initializer")
                if not tensor.name:
                    raise self.fail("initializer", "a name", "none")
                if depth:
                    self.inside(tensor)
                if tensor.name in initializers or tensor.name in outer:
                    raise self.fail(
                        f"initializer {tensor.name!r}", "each name once",
                        "twice: runtimes differ in which one they take",
                    )  # fmt: skip
                initializers[tensor.name] = tensor
            elif number in ports:
                port = self._value_info(value)
                if port.name in ports[number]:
                    raise self.fail(f"input or output {port.name!r}", "each name once", "twice")
                ports[number][port.name] = port
            elif number == 13:
                self._value_info(value)
            elif number == 14:
                self._annotation(value)
            elif number == 15:
                raise self.fail("sparse_initializer", "dense tensors", "a sparse one")
            elif number == 16:
                self.pair(value, "metadata_props")
        visible = outer | initializers.keys()
        made = set(ports[11])
        nodes = []
        for node_span in nodes_at:
            node = self._node(node_span, depth, visible)
            for output in filter(None, node.outputs):
                if output in made or output in initializers:
                    raise self.fail(f"value {output!r}", "made once", "made twice")
                made.add(output)
            nodes.append(node)
        return Graph(
            name, tuple(nodes), initializers, *(tuple(ports[n].values()) for n in (11, 12))
        )

    def _node(self, span: Span, depth: int, outer: frozenset[str]) -> Node:
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
            elif number == 9:
                self.pair(value, "metadata_props")
            elif number == 10:
                raise self.fail("device_configurations", "a model for one device", "several")
        if not texts[4]:
            raise self.fail(f"node {texts[3]!r}", "an op_type", "none")
        return Node(
            texts[3], texts[4], "" if texts[7] == "ai.onnx" else texts[7],
            tuple(inputs), tuple(outputs), attributes,
        )  # fmt: skip

    def _attribute(self, span: Span, depth: int, outer: frozenset[str]) -> tuple[str, Any]:
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
                single[number] = self.float32(value)
            elif number == 3:
                single[number] = to_signed(value)
            elif number == 4:
                single[number] = bytes(self.view[value[0] : value[1]])
            elif number == 5:
                single[number] = self.inside(self.tensor(value, f"attribute {name!r}"))
            elif number == 6:
                single[number] = self._graph(value, depth + 1, outer)
            elif number == 7:
                many[7] += self.floats(value)
            elif number == 8:
                many[8] += self.integers(value)
            elif number == 9:
                many[9].append(bytes(self.view[value[0] : value[1]]))
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

    def _value_info(self, span: Span) -> ValueInfo:
        name, kind = "", None
        shape: tuple[int | str | None, ...] | None = None
        known = {1: BYTES, 2: BYTES, 3: BYTES, 4: BYTES}
        for number, value in self.fields(span, "value", known, frozenset({4})):
            if number == 1:
                name = self.name(value, "value name")
            elif number == 2:
                kind, shape = self._type(value, 0)
            elif number == 4:
                self.pair(value, "metadata_props")
        if not name:
            raise self.fail("value", "a name", "none")
        return ValueInfo(name, kind, shape)

    def _annotation(self, span: Span) -> None:
        """A TensorAnnotation is read for its form: its numbers are in the graph, too."""
        known = {1: BYTES, 2: BYTES}
        for number, value in self.fields(span, "quantization_annotation", known, frozenset({2})):
            if number == 2:
                self.pair(value, "quant_parameter_tensor_names")

    def _type(
        self, span: Span, depth: int
    ) -> tuple[int | None, tuple[int | str | None, ...] | None]:
        """Element type and shape of a TypeProto; of a list of tensors or an optional one, neither."""
        if depth > MAX_DEPTH:
            raise self.fail("type", f"at most {MAX_DEPTH} types in each other", "more")
        kind, shape = None, None
        known = dict.fromkeys((1, 4, 5, 6, 7, 8, 9), BYTES)
        for number, value in self.fields(span, "type", known, frozenset()):
            if number in (4, 9):  # sequence_type, optional_type
                for _, element in self.fields(value, "type", {1: BYTES}, frozenset()):
                    self._type(element, depth + 1)
            if number in (5, 7, 8):
                raise self.fail("type", "tensors, or lists of them", f"field {number}")
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

    def _dimension(self, span: Span) -> int | str | None:
        found: int | str | None = None
        known = {1: VARINT, 2: BYTES, 3: BYTES}
        for number, value in self.fields(span, "dimension", known, frozenset()):
            if number == 1:
                found = to_signed(value)
            elif number == 2:
                found = self.name(value, "dimension")
        return found
