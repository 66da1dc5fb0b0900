"""The linear weights of a graph: none is overlooked, and what is not known is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper
from onnx_tools import session
from safetensors.numpy import load_file
from tiny_architectures import MODELS

from safegene_runtime.artifact.onnx_checks import precision_class
from safegene_runtime.errors import SafeGeneError, UnsupportedError
from safegene_runtime.formats.onnx.file import read_onnx
from safegene_runtime.formats.onnx.linear import elements_by_type, linears, read_weight

OUT, IN = 3, 4
WEIGHT = np.random.default_rng(0).standard_normal((IN, OUT)).astype(np.float32)
FLOATS = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
node = helper.make_node


def tensor(values: np.ndarray, kind: int = TensorProto.FLOAT, name: str = "w") -> onnx.TensorProto:
    if kind == TensorProto.BFLOAT16:
        bits = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return helper.make_tensor(name, kind, values.shape, bits.tobytes(), raw=True)
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(kind)), name)


def saved(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    tensors: Sequence[onnx.TensorProto],
    kind: int = TensorProto.FLOAT,
    output: str = "y",
) -> Path:
    """A graph of one input x (n, 4)."""
    graph = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info("x", kind, ["n", IN])],
        [helper.make_empty_tensor_value_info(output)], list(tensors),
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "model.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    )
    return path


WAYS: dict[str, tuple[list[onnx.NodeProto], bool]] = {
    "plain": ([node("MatMul", ["x", "w"], ["y"])], False),
    "Identity": ([node("Identity", ["w"], ["v"]), node("MatMul", ["x", "v"], ["y"])], False),
    "Transpose": (
        [node("Transpose", ["w"], ["v"], perm=[1, 0]), node("MatMul", ["x", "v"], ["y"])], True,
    ),
    "Transpose by default": (
        [node("Transpose", ["w"], ["v"]), node("MatMul", ["x", "v"], ["y"])], True,
    ),
    "both": (
        [node("Identity", ["w"], ["u"]), node("Transpose", ["u"], ["v"]),
         node("MatMul", ["x", "v"], ["y"])], True,
    ),
    "Transpose twice": (
        [node("Transpose", ["w"], ["u"]), node("Transpose", ["u"], ["v"]),
         node("MatMul", ["x", "v"], ["y"])], False,
    ),
    "Gemm": ([node("Gemm", ["x", "w"], ["y"], transB=1)], True),
    "Gemm behind Transpose": (
        [node("Transpose", ["w"], ["v"]), node("Gemm", ["x", "v"], ["y"], transB=1)], False,
    ),
    "used before it is made": (
        [node("MatMul", ["x", "v"], ["y"]), node("Identity", ["w"], ["v"])], False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_is_classed_by_its_own_type_whatever_passes_it_on(
    way: str, kind: str, tmp_path: Path
) -> None:
    nodes, turned = WAYS[way]
    weight = tensor(WEIGHT.T if turned else WEIGHT, FLOATS[kind])
    model = read_onnx(saved(tmp_path, nodes, [weight], FLOATS[kind]))
    assert precision_class(model) == kind
    assert sum(elements_by_type(model).values()) == WEIGHT.size


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_read_is_what_onnx_runtime_multiplies_with(
    way: str, tmp_path: Path
) -> None:
    nodes, turned = WAYS[way]
    if way == "used before it is made":
        nodes = nodes[::-1]  # which not every ONNX Runtime accepts
    path = saved(tmp_path, nodes, [tensor(WEIGHT.T if turned else WEIGHT)])
    model = read_onnx(path)
    (linear,) = linears(model).stored
    (computed,) = session(path).run(None, {"x": np.eye(IN, dtype=np.float32)})
    assert linear.shape == (OUT, IN)
    assert np.array_equal(read_weight(model, linear).T, computed)


def packed(bits: int | None = None, **changed: Any) -> list[onnx.NodeProto]:
    settings = {"N": OUT, "K": IN, "block_size": 16, **({} if bits is None else {"bits": bits})}
    return [node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
                 **{**settings, **changed})]  # fmt: skip


BLOCKS = [tensor(np.zeros((OUT, 1, 8)), TensorProto.UINT8), tensor(np.ones(OUT), name="s")]
BRANCH = helper.make_graph(
    [node("MatMul", ["x", "w"], ["inner"])],
    "then",
    [],
    [helper.make_empty_tensor_value_info("inner")],
)
NESTED = helper.make_graph(
    [node("If", ["x"], ["inner"], then_branch=BRANCH, else_branch=BRANCH)], "then", [],
    [helper.make_empty_tensor_value_info("inner")],
)  # fmt: skip
WHOLE = tensor(WEIGHT)
UNKNOWN: dict[str, tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]] = {
    "DOUBLE": ([node("MatMul", ["x", "w"], ["y"])], [tensor(WEIGHT, TensorProto.DOUBLE)], "DOUBLE"),
    "DOUBLE behind Transpose": (
        [node("Transpose", ["w"], ["v"]), node("MatMul", ["x", "v"], ["y"])],
        [tensor(WEIGHT.T, TensorProto.DOUBLE)], "DOUBLE",
    ),
    "a Cast from integers": (
        [node("Cast", ["w"], ["v"], to=TensorProto.FLOAT), node("MatMul", ["x", "v"], ["y"])],
        [tensor(WEIGHT, TensorProto.INT8)], "INT8",
    ),
    "QDQ": (
        [node("DequantizeLinear", ["w", "s"], ["v"]), node("MatMul", ["x", "v"], ["y"])],
        [tensor(WEIGHT, TensorProto.INT8), tensor(np.ones(()), name="s")], "DequantizeLinear",
    ),
    "a product of constants": (
        [node("Mul", ["w", "w"], ["v"]), node("MatMul", ["x", "v"], ["y"])], [WHOLE], "Mul",
    ),
    "nothing that is there": ([node("MatMul", ["x", "v"], ["y"])], [WHOLE], "not there"),
    "an endless way": (
        [node("Identity", ["b"], ["a"]), node("Identity", ["a"], ["b"]),
         node("MatMul", ["x", "a"], ["y"])], [WHOLE], "16 nodes",
    ),
    "integers": (
        [node("MatMulInteger", ["x", "w"], ["y"])], [tensor(WEIGHT, TensorProto.INT8)],
        "MatMulInteger",
    ),
    "Einsum": ([node("Einsum", ["x", "w"], ["y"], equation="ni,io->no")], [WHOLE], "Einsum"),
    "a fused product": (
        [node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")], [WHOLE], "FusedMatMul",
    ),
    "a fused attention": (
        [node("Attention", ["x", "w"], ["y"], domain="com.microsoft", num_heads=1)], [WHOLE],
        "Attention",
    ),
    "a branch of an If": (
        [node("If", ["x"], ["y"], then_branch=BRANCH, else_branch=BRANCH)], [WHOLE], "inside of If",
    ),
    "a branch of a branch": (
        [node("If", ["x"], ["y"], then_branch=NESTED, else_branch=NESTED)], [WHOLE], "inside of If",
    ),
    "2 bits": (packed(2), BLOCKS, "2 bits"),
    "no size": (packed(4, N=0), BLOCKS, "N=0"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_weight_of_unknown_precision_is_refused_by_name(case: str, tmp_path: Path) -> None:
    """Beside a plain one as well, which would else speak for both."""
    nodes, tensors, words = UNKNOWN[case]
    beside = node("MatMul", ["x", "plain"], ["z"])
    for number, more in enumerate([[], [beside]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = saved(folder, [*nodes, *more], [*tensors, tensor(WEIGHT, name="plain")])
        with pytest.raises(UnsupportedError, match=words):
            precision_class(read_onnx(path))


PLAIN = node("MatMul", ["x", "w"], ["z"])
PASSED = helper.make_graph(
    [node("Identity", ["x"], ["inner"])], "then", [], [helper.make_empty_tensor_value_info("inner")]
)
HARMLESS = {
    "a product of two constants": [node("MatMul", ["odd", "odd"], ["y"]), PLAIN],
    "integers from activations, with a constant zero point": [
        node("MatMulInteger", ["x", "x", "zero"], ["y"]), PLAIN,
    ],
    "an activation that an If with a constant condition passes on": [
        node("If", ["zero"], ["v"], then_branch=PASSED, else_branch=PASSED),
        node("MatMul", ["v", "w"], ["y"]),
    ],
    "what is done with a constant that is no operand": [
        node("Add", ["x", "odd"], ["y"]), PLAIN,
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_only_products_with_constants_are_weights(case: str, tmp_path: Path) -> None:
    odd = tensor(np.ones((IN, IN)), TensorProto.DOUBLE, "odd")
    path = saved(tmp_path, HARMLESS[case], [WHOLE, odd, tensor(np.zeros(()), name="zero")])
    assert elements_by_type(read_onnx(path)) == {"F32": WEIGHT.size}


NONE = {
    "no product": [node("Relu", ["x"], ["y"])],
    "a product of two activations": [
        node("Transpose", ["x"], ["v"]), node("MatMul", ["x", "v"], ["y"]),
    ],
    "factors only": [node("MatMul", ["x", "w.safegene.lora_A"], ["y"])],
}  # fmt: skip


@pytest.mark.parametrize("case", NONE)
def test_a_graph_without_weights_has_no_precision(case: str, tmp_path: Path) -> None:
    path = saved(tmp_path, NONE[case], [tensor(WEIGHT, name="w.safegene.lora_A")])
    with pytest.raises(UnsupportedError, match="linear weights"):
        precision_class(read_onnx(path))


@pytest.mark.parametrize(("bits", "kind"), [(None, "4-bit"), (4, "4-bit"), (8, "8-bit")])
def test_packed_weights_are_classed_by_their_bits(
    bits: int | None, kind: str, tmp_path: Path
) -> None:
    model = read_onnx(saved(tmp_path, packed(bits), BLOCKS))
    assert precision_class(model) == kind
    assert sum(elements_by_type(model).values()) == OUT * IN


@pytest.mark.parametrize(
    ("stored", "cast", "kind"),
    [
        ("f16", "f32", "f16"),
        ("f32", "f16", "f16"),
        ("bf16", "f32", "bf16"),
        ("f32", "bf16", "bf16"),
    ],
)
def test_a_cast_between_floats_counts_as_the_coarser(
    stored: str, cast: str, kind: str, tmp_path: Path
) -> None:
    nodes = [node("Cast", ["w"], ["v"], to=FLOATS[cast]), node("MatMul", ["x", "v"], ["y"])]
    model = read_onnx(saved(tmp_path, nodes, [tensor(WEIGHT, FLOATS[stored])], FLOATS[cast]))
    assert precision_class(model) == kind
    assert not linears(model).stored, "what reads and writes weights does not look through it"


def test_a_weight_in_a_constant_node_counts(tmp_path: Path) -> None:
    nodes = [node("Constant", [], ["v"], value=tensor(WEIGHT)), node("MatMul", ["x", "v"], ["y"])]
    assert elements_by_type(read_onnx(saved(tmp_path, nodes, []))) == {"F32": WEIGHT.size}


HEADS = {
    "plain": [node("MatMul", ["h", "head"], ["logits"])],
    "in a wider type": [
        node("MatMul", ["h", "head"], ["l"]), node("Cast", ["l"], ["logits"], to=TensorProto.FLOAT),
    ],
    "with a soft-cap": [
        node("MatMul", ["h", "head"], ["l"]), node("Div", ["l", "cap"], ["a"]),
        node("Tanh", ["a"], ["b"]), node("Mul", ["b", "cap"], ["logits"]),
    ],
    "quantised": [node("MatMulInteger", ["h", "head"], ["logits"])],
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_the_head_is_no_weight_of_a_block(case: str, tmp_path: Path) -> None:
    """It is often stored in another type, and larger than all the blocks of a small model."""
    nodes = [node("MatMul", ["x", "w"], ["h"]), *HEADS[case]]
    kind = TensorProto.INT8 if case == "quantised" else TensorProto.FLOAT16
    head = tensor(np.ones((OUT, 500)), kind, "head")
    path = saved(tmp_path, nodes, [WHOLE, head, tensor(np.ones(()), name="cap")], output="logits")
    assert precision_class(read_onnx(path)) == "f32"


def in_blocks(folder: Path) -> int:
    """Elements of the projections, as safetensors lists them."""
    weights = load_file(folder / "model.safetensors")
    return sum(value.size for name, value in weights.items() if name.endswith("proj.weight"))


@pytest.mark.parametrize(
    "architecture", [name for name, model in MODELS.items() if model.exporter == "builder"]
)
def test_the_builder_puts_every_projection_where_it_is_found(architecture: str) -> None:
    for precision, kind in (("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16"), ("int4", "INT4")):
        model = read_onnx(tiny.onnx_model(architecture, precision) / "model.onnx")
        assert elements_by_type(model) == {kind: in_blocks(tiny.hf_model(architecture))}


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_other_exporters_do_so_too(exporter: str) -> None:
    folder = tiny.exported_model("llama", exporter)
    model = read_onnx(next(folder.glob("*.onnx")))
    assert elements_by_type(model) == {"F32": in_blocks(tiny.hf_model("llama"))}


def test_every_complaint_is_made_at_once(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], [f"y{number}"], name=f"n{number}") for number in range(3)]
    path = saved(tmp_path, nodes, [tensor(WEIGHT, TensorProto.DOUBLE)], output="y0")
    with pytest.raises(SafeGeneError) as caught:
        precision_class(read_onnx(path))
    assert [problem.field for problem in caught.value.problems] == ["n0", "n1", "n2"]
