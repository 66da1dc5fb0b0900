"""Blocks of 4 and 8 bits: what we decode is what ONNX Runtime computes with."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import onnxruntime
import pytest
import tiny
from onnx import TensorProto, helper

from safegene_converter.encoding import nbits_quantizer
from safegene_runtime.errors import FormatError
from safegene_runtime.formats.onnx import nbits
from safegene_runtime.formats.onnx.nbits import NBits

KINDS = [
    NBits(bits, block, symmetric, scale)
    for bits, block, symmetric, scale in itertools.product(
        (4, 8), (16, 32, 64, 128, 256), (True, False), ("float32", "float16")
    )
]


def computed_by_ort(packed: nbits.Packed) -> np.ndarray:
    """(out, in): what the operator multiplies the unit vectors with, activations in float."""
    rows, cols = packed.shape
    half = packed.kind.scale_dtype == "float16"
    float_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    tensors = [
        helper.make_tensor("b", TensorProto.UINT8, packed.b.shape, packed.b.tobytes(), raw=True),
        helper.make_tensor("s", float_type, packed.scales.shape, packed.scales.tobytes(), raw=True),
    ]
    if packed.zero_points is not None:
        zeros = packed.zero_points
        tensors.append(
            helper.make_tensor("z", TensorProto.UINT8, zeros.shape, zeros.tobytes(), raw=True)
        )
    node = helper.make_node(
        "MatMulNBits", ["x", *(tensor.name for tensor in tensors)], ["y"], domain="com.microsoft",
        K=cols, N=rows, bits=packed.kind.bits, block_size=packed.kind.block_size, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", float_type, ["m", cols])],
        [helper.make_tensor_value_info("y", float_type, ["m", rows])],
        tensors,
    )  # fmt: skip
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": np.eye(cols, dtype="float16" if half else "float32")})[0].T


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("cols", [64, 100, 576])
def test_decoding_is_what_onnx_runtime_computes(kind: NBits, cols: int) -> None:
    packed = nbits_quantizer.quantize(tiny.real_weights((24, cols)), kind)
    ours, theirs = nbits.dequantize(packed), computed_by_ort(packed).astype(np.float32)
    tolerance = 0 if kind.scale_dtype == "float32" else 1e-3 * np.abs(ours).max()
    assert np.abs(ours - theirs).max() <= tolerance


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_element_is_off_by_more_than_a_step(kind: NBits) -> None:
    weight = tiny.real_weights((40, 200))
    packed = nbits_quantizer.quantize(weight, kind)
    step = np.abs(np.repeat(packed.scales.astype(np.float32), kind.block_size, axis=1)[:, :200])
    # half a step by rounding; up to one where the largest value of a symmetric block is clipped
    assert (np.abs(nbits.dequantize(packed) - weight) <= 1.01 * step + 1e-6).all()
    assert (np.abs(nbits.dequantize(packed) - weight) <= 0.51 * step + 1e-6).mean() > 0.95


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_are_packed_each_on_its_own(kind: NBits) -> None:
    weight = tiny.real_weights((8, 64))
    whole, part = (
        nbits_quantizer.quantize(weight, kind),
        nbits_quantizer.quantize(weight[2:5], kind),
    )
    assert np.array_equal(whole.b[2:5], part.b)
    assert np.array_equal(whole.scales[2:5], part.scales)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sizes_are_what_is_stored(kind: NBits) -> None:
    packed = nbits_quantizer.quantize(tiny.real_weights((6, 100)), kind)
    stored = [packed.b, packed.scales, packed.zero_points]
    assert nbits.nbytes(kind, (6, 100)) == sum(part.nbytes for part in stored if part is not None)


@pytest.mark.parametrize("values", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(values: float) -> None:
    weight = np.zeros((4, 32), np.float32)
    weight[1, 3] = values
    with pytest.raises(FormatError, match="finite"):
        nbits_quantizer.quantize(weight, NBits(4, 32, True))


@pytest.mark.parametrize(
    "kind",
    [NBits(3, 32, True), NBits(4, 0, True), NBits(4, 24, True), NBits(8, 32, True, "float64")],
    ids=str,
)
def test_unknown_ways_to_pack_are_refused(kind: NBits) -> None:
    assert not nbits.can_encode(kind, (4, 32))
    with pytest.raises(FormatError, match="one of"):
        nbits_quantizer.quantize(np.zeros((4, 32), np.float32), kind)


def test_parts_of_the_wrong_size_are_refused_together() -> None:
    packed = nbits_quantizer.quantize(tiny.real_weights((4, 64)), NBits(4, 32, False))
    zeros = packed.zero_points
    assert zeros is not None
    with pytest.raises(FormatError) as caught:
        dataclasses.replace(
            packed, b=packed.b[:, :1], scales=packed.scales[:1], zero_points=zeros[:2]
        )
    assert len(caught.value.problems) == 3
    with pytest.raises(FormatError, match="zero_points"):
        dataclasses.replace(packed, zero_points=None)
    with pytest.raises(FormatError, match="finite"):
        dataclasses.replace(packed, scales=packed.scales * np.nan)
