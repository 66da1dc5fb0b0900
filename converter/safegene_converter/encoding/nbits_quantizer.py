"""Packing weights for `MatMulNBits`; `safegene_runtime.formats.onnx.nbits` says what they are and reads them.

Encoding is ONNX Runtime's own (`quantize_matmul_4bits`, `_8bits`, what the onnxruntime-genai builder
calls), so a weight that is encoded here has the bytes that its users' tools would have given it.
"""

from __future__ import annotations

import numpy as np

from safegene_runtime.errors import FormatError, Problem
from safegene_runtime.formats.onnx.nbits import (
    NBits,
    Packed,
    Rows,
    blob,
    check_kind,
    n_blocks,
    zero_points_of,
)

__all__ = ["quantize"]


def quantize(weight: Rows, kind: NBits) -> Packed:
    """Packs a weight (out, in), rounding to nearest, with ONNX Runtime's own quantiser.

    Raises:
        FormatError: a way to pack that there is not, or numbers that are not finite.
    """
    check_kind(kind)
    if weight.ndim != 2 or not weight.size or not np.isfinite(weight).all():
        raise FormatError(
            Problem("weight", "values", "finite numbers (out, in)", f"shape {weight.shape}")
        )
    from onnxruntime.capi import _pybind_state

    native = getattr(_pybind_state, f"quantize_matmul_{kind.bits}bits")
    rows, cols = weight.shape
    blocks = n_blocks(kind, cols)
    b = np.zeros((rows, blocks, blob(kind)), np.uint8)
    scales = np.zeros(rows * blocks, np.float32)
    zeros = np.zeros(rows * -(-blocks * kind.bits // 8), np.uint8)
    turned = np.ascontiguousarray(weight.T, dtype=np.float32)
    native(b, turned, scales, zeros, kind.block_size, rows, cols, kind.symmetric)
    packed = Packed(
        NBits(kind.bits, kind.block_size, kind.symmetric),
        (rows, cols),
        b,
        scales.reshape(rows, blocks),
        None if kind.symmetric else zeros.reshape(rows, -1),
    )
    return packed if kind.scale_dtype == "float32" else _with_scales(packed, weight, kind)


def _with_scales(packed: Packed, weight: Rows, kind: NBits) -> Packed:
    """The same blocks with scales rounded to a narrower type, and the integers rounded again."""
    scales = packed.scales.astype(kind.scale_dtype)
    rows, cols = weight.shape
    blocks = scales.shape[1]
    wide = np.zeros((rows, blocks * kind.block_size), np.float32)
    wide[:, :cols] = weight
    step = scales.astype(np.float32)[..., None]
    zeros = zero_points_of(packed, slice(None))[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(step != 0, wide.reshape(rows, blocks, -1) / step, 0)
    codes = np.clip(np.rint(ratio) + zeros, 0, 2**kind.bits - 1).astype(np.uint8)
    b = codes if kind.bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    return Packed(kind, packed.shape, np.ascontiguousarray(b), scales, packed.zero_points)
