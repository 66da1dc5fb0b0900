"""The ONNX reader agrees with `onnx` on good models, and refuses bad ones with one typed error."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from safegene_runtime.errors import FormatError
from safegene_runtime.formats.onnx.file import read_onnx
from safegene_runtime.formats.onnx.tensor import DataType, read_initializer

FLOATS = np.arange(12, dtype=np.float32).reshape(3, 4)


def make_model(*tensors: onnx.TensorProto, **graph: Any) -> onnx.ModelProto:
    """x (n, 3) -> y = x W, with further initializers."""
    weight = numpy_helper.from_array(FLOATS, "W")
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"], name="product", domain="")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [weight, *tensors],
        **graph,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"author": "nobody"})
    return model


def external(name: str = "E", **entries: str | int) -> onnx.TensorProto:
    """Four floats in a data file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "data.bin", "offset": 0, "length": 16, **entries}.items():
        if value != "":
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def save(folder: Path, model: onnx.ModelProto | bytes, data: bytes = bytes(64)) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "data.bin").write_bytes(data)
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


# --- good models -----------------------------------------------------------------------------------


def typed(kind: int, values: np.ndarray, name: str) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, values.shape, values.reshape(-1).tolist())


GOOD = [
    numpy_helper.from_array(np.array(3.5), "scalar"),
    numpy_helper.from_array(np.zeros((0, 7), np.float32), "empty"),
    numpy_helper.from_array(np.array([True, False]), "bools"),
    typed(TensorProto.FLOAT, FLOATS, "floats"),
    typed(TensorProto.DOUBLE, FLOATS.astype(np.float64), "doubles"),
    typed(TensorProto.INT64, np.array([-1, 2**62]), "int64"),
    typed(TensorProto.INT32, np.array([-5, 7]), "int32"),
    typed(TensorProto.INT8, np.array([-128, 127]), "int8"),
    typed(TensorProto.UINT8, np.array([0, 255]), "uint8"),
    typed(TensorProto.UINT64, np.array([2**63], np.uint64), "uint64"),
    typed(TensorProto.FLOAT16, np.array([1.5, -2]), "half"),
    typed(TensorProto.BOOL, np.array([True, False]), "typed bools"),
]


def test_every_initializer_is_what_onnx_reads(tmp_path: Path) -> None:
    path = save(tmp_path, make_model(*GOOD, external(offset=16)), bytes(range(64)))
    found = read_onnx(path)
    loaded = onnx.load(path)
    assert list(found.initializers) == [tensor.name for tensor in loaded.graph.initializer]
    for tensor in loaded.graph.initializer:
        theirs = numpy_helper.to_array(tensor)
        info = found.initializers[tensor.name]
        ours = read_initializer(info)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs), tensor.name
        assert info.nbytes == theirs.nbytes


def test_what_computes_nothing_may_stand_in_a_model(tmp_path: Path) -> None:
    model = make_model(external(offset=48, length=""))
    lists = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [2]))
    model.graph.value_info.append(
        helper.make_value_info("q", helper.make_optional_type_proto(lists))
    )
    for place in (model.graph, model.graph.node[0], model.graph.initializer[0]):
        place.metadata_props.add(key="made by", value="nobody")
    note = model.graph.quantization_annotation.add(tensor_name="W")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    path = save(tmp_path, model, bytes(range(64)))
    theirs = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    found = read_onnx(path).initializers
    assert found.keys() == theirs.keys()
    assert all(np.array_equal(read_initializer(found[name]), theirs[name]) for name in found)


def test_the_rest_of_a_model_is_what_onnx_reads(tmp_path: Path) -> None:
    found = read_onnx(save(tmp_path, make_model(*GOOD, external())))
    assert (found.ir_version, dict(found.opsets)) == (10, {"": 20})
    assert dict(found.metadata) == {"author": "nobody"}
    assert [(v.name, v.elem_type, v.shape) for v in found.inputs] == [("x", 1, ("n", 3))]
    assert [(v.name, v.elem_type, v.shape) for v in found.outputs] == [("y", 1, ("n", 4))]
    node = found.nodes[0]
    assert (node.name, node.op_type, node.inputs, node.outputs) == (
        "product",
        "MatMul",
        ("x", "W"),
        ("y",),
    )
    assert [file.name for file in found.files] == ["data.bin", "model.onnx"]
    assert found.overridable == ()


def test_attributes_and_subgraphs_are_read(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["z"])], "inner", [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.ones(1, np.float32), "c")],
    )  # fmt: skip
    model = make_model()
    model.graph.node.append(
        helper.make_node(
            "Custom", ["x"], ["q"], domain="some.where", f=1.5, i=-3, s="text", fs=[1.0, 2.0],
            numbers=[1, -2], words=["a", "b"], branch=inner,
            t=numpy_helper.from_array(FLOATS, "t"),
        )
    )  # fmt: skip
    node = read_onnx(save(tmp_path, model)).nodes[1]
    found = dict(node.attributes)
    branch, tensor = found.pop("branch"), found.pop("t")
    assert found == {
        "f": 1.5, "i": -3, "s": b"text", "fs": (1.0, 2.0), "numbers": (1, -2), "words": (b"a", b"b"),
    }  # fmt: skip
    assert list(branch.initializers) == ["c"]
    assert np.array_equal(read_initializer(tensor), FLOATS)


def test_an_initializer_that_is_an_input_is_named(tmp_path: Path) -> None:
    model = make_model()
    model.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [3, 4]))
    assert read_onnx(save(tmp_path, model)).overridable == ("W",)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=4),
    dtype=st.sampled_from(["float32", "float16", "int8", "uint16", "int64", "bool"]),
)
def test_any_small_model_is_what_onnx_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: str
) -> None:
    random = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(random.integers(0, 2, shape).astype(dtype), f"t{i}")
        for i, shape in enumerate(shapes)
    ]
    path = save(tmp_path_factory.mktemp("any"), make_model(*tensors))
    found = read_onnx(path).initializers
    for tensor in tensors:
        assert np.array_equal(read_initializer(found[tensor.name]), numpy_helper.to_array(tensor))


@pytest.mark.parametrize("exporter", ["builder", "torchscript", "dynamo"])
def test_models_of_real_exporters_are_read_as_onnx_reads_them(exporter: str) -> None:
    folder = (
        tiny.onnx_model("llama")
        if exporter == "builder"
        else tiny.exported_model("llama", exporter)
    )
    found = read_onnx(folder / "model.onnx")
    loaded = onnx.load(folder / "model.onnx")
    assert [node.op_type for node in found.nodes] == [node.op_type for node in loaded.graph.node]
    for tensor in loaded.graph.initializer:
        theirs = numpy_helper.to_array(tensor)
        assert np.array_equal(read_initializer(found.initializers[tensor.name]), theirs)


def test_the_reader_needs_no_onnx() -> None:
    code = "import sys; sys.modules['onnx'] = None; import safegene_runtime.formats.onnx.file"
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=True)


# --- bad models ------------------------------------------------------------------------------------


def field(number: int, wire: int, payload: bytes) -> bytes:
    return (
        bytes([number << 3 | wire]) + payload
        if number < 16
        else (bytes([(number << 3 | wire) & 127 | 128, (number << 3 | wire) >> 7]) + payload)
    )


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = make_model()
    change(model)
    return model


def with_tensor(**fields: Any) -> onnx.ModelProto:
    """A model with one more tensor of two floats, its fields overridden."""
    given = {"name": "T", "data_type": 1, "dims": [2], "raw_data": bytes(8), **fields}
    return make_model(
        TensorProto(**{key: value for key, value in given.items() if value is not None})
    )


def in_graph(extra: bytes) -> bytes:
    """A model whose graph message has more bytes at its end."""
    model = make_model()
    graph = model.graph.SerializeToString() + extra
    model.ClearField("graph")
    length = len(graph)
    prefix = bytes([length & 127 | 128, length >> 7]) if length > 127 else bytes([length])
    return model.SerializeToString() + field(7, 2, prefix + graph)


def in_node(more: bytes) -> bytes:
    """A model whose graph has a second node, with a field more."""
    node = onnx.NodeProto(op_type="Abs", input=["x"], output=["q"]).SerializeToString() + more
    return in_graph(field(1, 2, bytes([len(node)]) + node))


PLAIN = make_model().SerializeToString()
OVERLONG = b"\xff" * 11

BAD: dict[str, tuple[onnx.ModelProto | bytes, str]] = {
    "empty file": (b"", "empty"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    "text": (b"hello world, this is no model", "field"),
    "a GGUF": (b"GGUF" + bytes(60), "field"),
    "no ir_version": (changed(lambda m: m.ClearField("ir_version")), "ir_version"),
    "negative ir_version": (changed(lambda m: setattr(m, "ir_version", -1)), "ir_version"),
    "no graph": (changed(lambda m: m.ClearField("graph")), "graph"),
    "no nodes": (changed(lambda m: m.graph.ClearField("node")), "nodes"),
    "no outputs": (changed(lambda m: m.graph.ClearField("output")), "outputs"),
    "two graphs": (PLAIN + field(7, 2, b"\0"), "field 7 once"),
    "two versions": (PLAIN + field(1, 0, b"\x0a"), "field 1 once"),
    "unknown field": (PLAIN + field(30, 0, b"\1"), "fields of onnx.proto"),
    "field 0": (PLAIN + b"\0\0", "fields of onnx.proto"),
    "wrong wire type": (field(7, 0, b"\1"), "wire type"),
    "a group": (PLAIN + field(14, 3, b""), "wire type"),
    "over-long number": (field(1, 0, OVERLONG), "64 bits"),
    "length past the end": (PLAIN + field(14, 2, b"\x7f"), "at most"),
    "length of 2^63": (PLAIN + field(14, 2, b"\xff" * 9 + b"\1"), "at most"),
    "training graphs": (changed(lambda m: m.training_info.add()), "training"),
    "a domain twice": (
        changed(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 9))), "domain",
    ),
    "a key twice": (
        changed(lambda m: m.metadata_props.add(key="author", value="somebody")), "each key once",
    ),
    "metadata that are no UTF-8": (PLAIN + field(14, 2, b"\4\x0a\2\xff\xfe"), "UTF-8"),
    "metadata with NUL": (PLAIN + field(14, 2, b"\4\x0a\2a\0"), "NUL"),
    "an initializer twice": (make_model(numpy_helper.from_array(FLOATS, "W")), "each name once"),
    "an initializer without name": (with_tensor(name=None), "a name"),
    "an input twice": (changed(lambda m: m.graph.input.append(m.graph.input[0])), "each name once"),
    "a value made twice": (changed(lambda m: m.graph.node.append(m.graph.node[0])), "made once"),
    "a node that makes an initializer": (
        changed(lambda m: m.graph.node.append(helper.make_node("Abs", ["x"], ["W"]))), "made once",
    ),
    "a node without op_type": (
        changed(lambda m: m.graph.node.append(onnx.NodeProto(output=["q"]))), "op_type",
    ),
    "a sparse initializer": (changed(lambda m: m.graph.sparse_initializer.add()), "sparse"),
    "raw data too short": (with_tensor(raw_data=bytes(7)), "8 bytes"),
    "raw data too long": (with_tensor(raw_data=bytes(9)), "8 bytes"),
    "no data": (with_tensor(raw_data=None), "no data"),
    "both kinds of data": (with_tensor(float_data=[1.0, 2.0]), "one place"),
    "too few floats": (with_tensor(raw_data=None, float_data=[1.0]), "2 elements"),
    "floats as integers": (with_tensor(raw_data=None, int64_data=[1, 2]), "data of type"),
    "integers too large": (
        with_tensor(raw_data=None, data_type=3, int32_data=[1, 300]), "8 bits",
    ),
    "text data": (with_tensor(raw_data=None, data_type=8, string_data=[b"a", b"b"]), "numbers"),
    "a segment": (
        with_tensor(segment=TensorProto.Segment(begin=0, end=1)), "numbers",
    ),
    "type 0": (with_tensor(data_type=0), "element type"),
    "type 99": (with_tensor(data_type=99), "element type"),
    "negative extent": (with_tensor(dims=[-2]), "extents"),
    "too many extents": (with_tensor(dims=[1] * 17), "extents"),
    "extents whose product wraps": (with_tensor(dims=[2**33, 2**33]), "size"),
    "data nowhere and everywhere": (with_tensor(data_location=1), "one place"),
    "external data with raw data": (
        with_tensor(external_data=[onnx.StringStringEntryProto(key="location", value="data.bin")]),
        "one place",
    ),
    "no location": (make_model(external(location="")), "own folder"),
    "an absolute location": (make_model(external(location="/etc/passwd")), "own folder"),
    "a location above": (make_model(external(location="../data.bin")), "own folder"),
    "a location below": (make_model(external(location="sub/data.bin")), "own folder"),
    "a location with a backslash": (make_model(external(location="..\\data.bin")), "own folder"),
    "a location with NUL": (make_model(external(location="data.bin\0x")), "NUL"),
    "the model as its data": (make_model(external(location="model.onnx")), "own folder"),
    "the folder as its data": (make_model(external(location="..")), "own folder"),
    "a missing data file": (make_model(external(location="missing.bin")), "missing.bin"),
    "an offset past the end": (make_model(external(offset=4096)), "64 bytes"),
    "an end past the end": (make_model(external(offset=56)), "64 bytes"),
    "a negative offset": (make_model(external(offset=-8)), "offset"),
    "an offset in words": (make_model(external(offset="zero")), "offset"),
    "an offset of 2^64": (make_model(external(offset=2**64)), "offset"),
    "a wrong length": (make_model(external(length=8)), "16 bytes"),
    "a huge length": (make_model(external(length=2**40)), "16 bytes"),
    "an unknown key": (make_model(external(__class__="x")), "location, offset, length"),
    "tensors that overlap": (
        make_model(external(), external("F", offset=8)), "bytes of its own",
    ),
    "an attribute twice": (
        changed(lambda m: m.graph.node[0].attribute.extend([helper.make_attribute("a", 1)] * 2)),
        "each attribute once",
    ),
    "an attribute of another type": (
        changed(lambda m: m.graph.node[0].attribute.add(name="a", type=1, i=3)), "type it states",
    ),
    "an attribute without type": (
        changed(lambda m: m.graph.node[0].attribute.add(name="a", i=3)), "type it states",
    ),
    "a reference attribute": (
        changed(lambda m: m.graph.node[0].attribute.add(name="a", type=2, ref_attr_name="b")),
        "number, text",
    ),
    "an unknown field in the graph": (in_graph(field(30, 0, b"\1")), "fields of onnx.proto"),
    "a graph cut off": (PLAIN[:-20], ""),
    "a function of its own": (
        changed(lambda m: m.functions.add(name="MatMul", domain="mine")), "function mine.MatMul",
    ),
    "an empty function": (PLAIN + field(25, 2, b"\0"), "inline it"),
    "devices of a model": (PLAIN + field(26, 2, b"\0"), "one device"),
    "devices of a node": (in_node(field(10, 2, b"\0")), "one device"),
    "metadata of a node that are none": (in_node(field(9, 2, b"\2\x1a\0")), "metadata_props"),
    "metadata of a graph that are none": (in_graph(field(16, 2, b"\2\x1a\0")), "metadata_props"),
    "metadata of a tensor that are none": (
        in_graph(field(5, 2, b"\5\x82\1\2\x1a\0")), "metadata_props",
    ),
    "metadata of a value that are none": (
        in_graph(field(13, 2, b"\7\x0a\1q\x22\2\x1a\0")), "metadata_props",
    ),
    "a value inside that is none": (in_graph(field(13, 2, b"\3\x0a\5q")), "at most"),
    "an annotation that is none": (in_graph(field(14, 2, b"\2\x1a\0")), "quantization"),
    "a pair of an annotation that is none": (
        in_graph(field(14, 2, b"\4\x12\2\x1a\0")), "quant_parameter",
    ),
    "a map": (in_graph(field(13, 2, b"\7\x0a\1q\x12\2\x2a\0")), "tensors, or lists"),
    "a list of what is no type": (
        in_graph(field(13, 2, b"\x0b\x0a\1q\x12\6\x22\4\x0a\2\x9a\1")), "of onnx.proto",
    ),
    "no length, and more data than the tensor": (
        make_model(external(length="")), "the length of its data",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_model_is_one_typed_error(case: str, tmp_path: Path) -> None:
    model, word = BAD[case]
    start = time.monotonic()
    with pytest.raises(FormatError) as caught:
        read_onnx(save(tmp_path, model))
    assert word in str(caught.value)
    assert "model.onnx" in str(caught.value)
    assert time.monotonic() - start < 1


def nested(depth: int) -> onnx.GraphProto:
    body = [nested(depth - 1)] if depth else []
    node = helper.make_node("If", ["x"], ["y"], **{f"b{i}": graph for i, graph in enumerate(body)})
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    return helper.make_graph([node], f"depth {depth}", [], [output])


def test_graphs_in_graphs_end_somewhere(tmp_path: Path) -> None:
    model = helper.make_model(nested(12), ir_version=10)
    with pytest.raises(FormatError, match="graphs in each other"):
        read_onnx(save(tmp_path, model))


@pytest.mark.parametrize("link", ["symbolic", "hard", "fifo", "folder"])
def test_external_data_is_a_regular_file_of_its_own(link: str, tmp_path: Path) -> None:
    path = save(tmp_path, make_model(external()))
    (tmp_path / "data.bin").rename(tmp_path / "elsewhere.bin")
    make = {
        "symbolic": lambda: (tmp_path / "data.bin").symlink_to("elsewhere.bin"),
        "hard": lambda: (tmp_path / "data.bin").hardlink_to(tmp_path / "elsewhere.bin"),
        "fifo": lambda: os.mkfifo(tmp_path / "data.bin"),
        "folder": lambda: (tmp_path / "data.bin").mkdir(),
    }
    make[link]()
    with pytest.raises(FormatError, match="regular file"):
        read_onnx(path)


def test_a_graph_of_more_than_2_gib_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = save(tmp_path, make_model())
    os.truncate(path, 2**31)
    start = time.monotonic()
    with pytest.raises(FormatError, match="external data"):
        read_onnx(path)
    assert time.monotonic() - start < 0.5


def test_no_changed_byte_does_more_than_a_typed_error(tmp_path: Path) -> None:
    data = make_model(external(), GOOD[3], GOOD[7]).SerializeToString()
    path = save(tmp_path, data)
    refused = 0
    for at in range(len(data)):
        for value in (data[at] ^ 1, data[at] ^ 0x80, 0, 255):
            mutated = data[:at] + bytes([value]) + data[at + 1 :]
            try:
                read_onnx(path, mutated)
            except FormatError:
                refused += 1
    assert refused > len(data)


def test_no_truncation_does_more_than_a_typed_error(tmp_path: Path) -> None:
    data = make_model(external(), *GOOD).SerializeToString()
    path = save(tmp_path, data)
    whole = 0
    for end in range(len(data)):
        try:
            read_onnx(path, data[:end])
            whole += 1
        except FormatError:
            pass
    assert whole <= 3, "only trailing fields that may be left out can be cut off"


def test_a_data_file_cut_off_later_is_noticed(tmp_path: Path) -> None:
    found = read_onnx(save(tmp_path, make_model(external())))
    os.truncate(tmp_path / "data.bin", 3)
    with pytest.raises(FormatError, match="changed"):
        read_initializer(found.initializers["E"])


def test_types_are_those_of_onnx() -> None:
    for kind in DataType:
        assert TensorProto.DataType.Value(kind.name) == kind
