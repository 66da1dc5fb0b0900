"""ggml through ctypes, against gguf-py's independent numpy implementation."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import tiny

from safegene_converter.encoding import ggml_quantizer
from safegene_runtime.errors import EngineError, PostconditionError, UnsupportedError
from safegene_runtime.formats import ggml
from safegene_runtime.formats import ggml as native
from safegene_runtime.formats.gguf.types import GGMLType, type_traits

ROWS = tiny.real_weights((6, 512))
IMATRIX = np.random.default_rng(1).uniform(0.1, 2.0, 512).astype(np.float32)
TERNARY = ("Q2_0", "TQ1_0", "TQ2_0")  # made for weights that are -d, 0 or d
SLOW = ("IQ1_M", "IQ2_S", "IQ2_XS")  # ggml computes tables for seconds before the first row
TYPES = [
    pytest.param(GGMLType[name], id=name, marks=pytest.mark.slow if name in SLOW else ())
    for name in sorted(ggml_quantizer.ENCODABLE)
]


def _encode(type: GGMLType, rows: np.ndarray = ROWS) -> np.ndarray:
    return ggml_quantizer.quantize(
        rows, type, IMATRIX if ggml_quantizer.requires_imatrix(type) else None, threads=1
    )


def _kind(type: GGMLType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(int(type))


def _decode_low_bits(encoded: np.ndarray, bits: int, per_block: int) -> np.ndarray:
    """Q1_0 and Q2_0, which gguf-py does not know: one F16 scale, then `bits` bits per element."""
    blocks = encoded.reshape(-1, 2 + per_block * bits // 8)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    levels = (blocks[:, 2:, None] >> shifts) & (2**bits - 1)
    levels = levels.reshape(len(blocks), per_block).astype(np.float32)
    return (scales * (2 * levels - 1 if bits == 1 else levels - 1)).reshape(len(encoded), -1)


@pytest.mark.parametrize("type", TYPES)
def test_decoding_agrees_with_an_independent_decoder(type: GGMLType) -> None:
    encoded = _encode(type)
    if type.name in ("Q1_0", "Q2_0"):
        theirs = _decode_low_bits(encoded, int(type.name[1]), type_traits(type)[0])
    else:
        theirs = gguf.quants.dequantize(encoded, _kind(type))
    ours = ggml.dequantize(encoded, type, ROWS.shape)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]
)
def test_encoding_agrees_with_gguf_py(name: str) -> None:
    theirs = gguf.quants.quantize(ROWS, _kind(GGMLType[name])).view(np.uint8)
    ours = _encode(GGMLType[name])
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours, theirs)


def test_f16_is_numpys_rounding() -> None:
    np.testing.assert_array_equal(_encode(GGMLType.F16).view(np.float16), ROWS.astype(np.float16))


def test_bf16_is_torchs_rounding() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.from_numpy(ROWS).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(_encode(GGMLType.BF16).view(np.int16), theirs)


@pytest.mark.parametrize("type", TYPES)
def test_encoding_has_the_promised_shape_and_precision(type: GGMLType) -> None:
    rows = np.sign(ROWS) * np.float32(0.5) if type.name in TERNARY else ROWS
    encoded = _encode(type, rows)
    block, block_bytes = type_traits(type)
    assert encoded.shape == (6, 512 // block * block_bytes)
    error = np.linalg.norm(ggml.dequantize(encoded, type, rows.shape) - rows) / np.linalg.norm(rows)
    assert error < 2.0 ** (1 - 0.7 * min(12, 8 * block_bytes / block))


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K", "IQ4_XS", "IQ3_XXS", "F16"])
def test_bytes_do_not_depend_on_the_number_of_threads(name: str) -> None:
    rows = tiny.real_weights((700, 512), seed=2)
    type = GGMLType[name]
    weights = IMATRIX if ggml_quantizer.requires_imatrix(type) else None
    one = ggml_quantizer.quantize(rows, type, weights, threads=1)
    np.testing.assert_array_equal(one, ggml_quantizer.quantize(rows, type, weights, threads=3))
    np.testing.assert_array_equal(
        one[100:200], ggml_quantizer.quantize(rows[100:200], type, weights)
    )
    np.testing.assert_array_equal(
        ggml.dequantize(one, type, rows.shape, threads=1),
        ggml.dequantize(one, type, rows.shape, threads=3),
    )


def test_encoding_decoded_q8_0_again_keeps_its_bytes() -> None:
    once = _encode(GGMLType.Q8_0)
    decoded = ggml.dequantize(once, GGMLType.Q8_0, ROWS.shape)
    np.testing.assert_array_equal(_encode(GGMLType.Q8_0, decoded), once)


def test_an_imatrix_moves_the_error_to_unimportant_columns() -> None:
    important = np.ones(512, np.float32)
    important[::2] = 1000
    error = (
        ggml.dequantize(
            ggml_quantizer.quantize(ROWS, GGMLType.Q4_K, important), GGMLType.Q4_K, ROWS.shape
        )
        - ROWS
    ) ** 2
    plain = (ggml.dequantize(_encode(GGMLType.Q4_K), GGMLType.Q4_K, ROWS.shape) - ROWS) ** 2
    assert error[:, ::2].sum() < plain[:, ::2].sum()


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"])
def test_types_that_need_an_imatrix_are_refused_without(name: str) -> None:
    assert ggml_quantizer.requires_imatrix(GGMLType[name])
    with pytest.raises(UnsupportedError, match="--imatrix"):
        ggml_quantizer.quantize(ROWS, GGMLType[name])


@pytest.mark.parametrize("imatrix", [np.ones(511), np.full(512, np.nan), np.full(512, -1.0)])
def test_an_unfit_imatrix_is_refused(imatrix: np.ndarray) -> None:
    with pytest.raises(UnsupportedError, match="imatrix"):
        ggml_quantizer.quantize(ROWS, GGMLType.Q4_K, imatrix.astype(np.float32))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS", "TQ2_0"])
def test_rows_that_do_not_fill_blocks_are_refused(name: str) -> None:
    rows = tiny.real_weights((2, 576))
    assert not ggml_quantizer.can_encode(GGMLType[name], 576)
    with pytest.raises(UnsupportedError, match="multiple of 256"):
        ggml_quantizer.quantize(rows, GGMLType[name])


@pytest.mark.parametrize("name", ["I32", "Q8_1", "Q8_K", "NVFP4"])
def test_types_that_cannot_be_encoded_are_refused(name: str) -> None:
    if name not in GGMLType.__members__:
        pytest.fail(f"{name} is not in GGMLType")
    assert not ggml_quantizer.can_encode(GGMLType[name], 512)
    with pytest.raises(UnsupportedError, match="encode"):
        ggml_quantizer.quantize(ROWS, GGMLType[name])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F32", "Q4_0", "Q4_K"])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    rows = ROWS.copy()
    rows[3, 100] = bad
    with pytest.raises(PostconditionError, match="NaN or Inf"):
        ggml_quantizer.quantize(rows, GGMLType[name])


@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q8_0"])
def test_values_beyond_f16_are_refused_where_they_overflow(name: str) -> None:
    rows = ROWS.copy()
    rows[0, 0] = 1e38
    with pytest.raises(PostconditionError, match="represent"):
        ggml_quantizer.quantize(rows, GGMLType[name])
    assert ggml_quantizer.quantize(rows, GGMLType.F32).nbytes == rows.nbytes


def test_decoding_checks_the_number_of_bytes() -> None:
    encoded = _encode(GGMLType.Q8_0)
    with pytest.raises(UnsupportedError, match="bytes of Q8_0"):
        ggml.dequantize(encoded.tobytes()[:-1], GGMLType.Q8_0, ROWS.shape)
    with pytest.raises(UnsupportedError, match="bytes of Q8_0"):
        ggml.dequantize(encoded, GGMLType.Q8_0, (6, 500))


def test_integers_are_not_decoded() -> None:
    with pytest.raises(UnsupportedError, match="decode"):
        ggml.dequantize(np.zeros((2, 8), np.uint8), GGMLType.I32, (2, 2))


def test_a_missing_library_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"safegene\[gguf\]"):
        native.library.__wrapped__()


def test_a_library_with_other_types_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "type_traits", lambda type: (32, 18))
    with pytest.raises(EngineError, match="type 0"):
        native.library.__wrapped__()
