"""Weights in blocks of 4 or 8 bits, as ONNX Runtime's `com.microsoft.MatMulNBits` stores them.

A weight (out, in) is cut along `in` into blocks of `block_size`, the last one padded. Block j of row
i holds integers q in [0, 2^bits), one scale s and one zero point z (2^(bits-1) where none is stored):

    W = (q - z) * s          ORT's contrib_ops documentation of MatMulNBits; checked against ORT

Two 4-bit integers share a byte, the even one in the low half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, Problems

__all__ = [
    "NBits", "Packed", "blob", "can_encode", "check_kind", "dequantize", "n_blocks", "nbytes",
    "zero_points_of",
]  # fmt: skip

Rows = npt.NDArray[np.float32]

BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
SCALE_DTYPES = ("float32", "float16")
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class NBits:
    """A way to pack.

    Attributes:
        bits: 4 or 8.
        block_size: elements that share a scale.
        symmetric: whether there are no stored zero points.
        scale_dtype: numpy's name of the scales' type.
    """

    bits: int
    block_size: int
    symmetric: bool
    scale_dtype: str = "float32"


@dataclass(frozen=True)
class Packed:
    """A packed weight.

    Attributes:
        kind: how it is packed.
        shape: (out, in).
        b: (out, n_blocks, block_size * bits / 8) uint8.
        scales: (out, n_blocks).
        zero_points: (out, ceil(n_blocks * bits / 8)) uint8, None when symmetric.
    """

    kind: NBits
    shape: tuple[int, int]
    b: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    zero_points: npt.NDArray[np.uint8] | None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        rows, blocks = self.shape[0], n_blocks(self.kind, self.shape[1])
        problems = Problems()
        expected: dict[str, tuple[tuple[int, ...], Any, tuple[int, ...], str]] = {
            "B": (self.b.shape, self.b.dtype, (rows, blocks, blob(self.kind)), "uint8"),
            "scales": (
                self.scales.shape, self.scales.dtype, (rows, blocks), self.kind.scale_dtype,
            ),
        }  # fmt: skip
        if self.zero_points is not None:
            expected["zero_points"] = (
                self.zero_points.shape, self.zero_points.dtype,
                (rows, -(-blocks * self.kind.bits // 8)), "uint8",
            )  # fmt: skip
        for name, (shape, dtype, want, want_dtype) in expected.items():
            if shape != want or dtype != np.dtype(want_dtype):
                problems.add("MatMulNBits", name, f"{want_dtype} {want}", f"{dtype} {shape}")
        if (self.zero_points is None) != self.kind.symmetric:
            problems.add("MatMulNBits", "zero_points", "none if symmetric", str(self.kind))
        if not problems and not np.isfinite(self.scales).all():
            problems.add("MatMulNBits", "scales", "finite numbers", "NaN or Inf")
        problems.raise_if_any(FormatError)


def can_encode(kind: NBits, shape: tuple[int, int]) -> bool:
    """Whether a weight (out, in) can be packed this way."""
    known = kind.bits in BITS and kind.block_size in BLOCK_SIZES
    return known and kind.scale_dtype in SCALE_DTYPES and min(shape) > 0


def nbytes(kind: NBits, shape: tuple[int, int]) -> int:
    """Bytes of a packed weight (out, in), scales and zero points included."""
    rows, blocks = shape[0], n_blocks(kind, shape[1])
    zeros = 0 if kind.symmetric else -(-blocks * kind.bits // 8)
    return rows * (blocks * (blob(kind) + np.dtype(kind.scale_dtype).itemsize) + zeros)


def dequantize(packed: Packed) -> Rows:
    """The weight that a reader sees, (out, in) float32."""
    kind, (rows, cols) = packed.kind, packed.shape
    blocks = packed.scales.shape[1]
    found = np.empty((rows, cols), np.float32)
    step = max(1, CHUNK_ELEMENTS // max(cols, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes = _unpack(packed.b[part].reshape(-1, blocks, blob(kind)), kind.bits)
        zeros = zero_points_of(packed, part)
        values = (codes.astype(np.float32) - zeros[..., None]) * packed.scales[part].astype(
            np.float32
        )[..., None]
        found[part] = values.reshape(len(values), -1)[:, :cols]
    return found


def zero_points_of(packed: Packed, rows: slice) -> Rows:
    """The zero points of some rows, (rows, n_blocks) float32."""
    kind, blocks = packed.kind, packed.scales.shape[1]
    if packed.zero_points is None:
        return np.full(packed.scales[rows].shape, 2 ** (kind.bits - 1), np.float32)
    return _unpack(packed.zero_points[rows], kind.bits)[:, :blocks].astype(np.float32)


def _unpack(data: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Integers from bytes, along the last axis."""
    if bits == 8:
        return data
    both = np.stack([data & 15, data >> 4], axis=-1)
    return both.reshape(*data.shape[:-1], -1)


def n_blocks(kind: NBits, cols: int) -> int:
    """Blocks of a row."""
    return -(-cols // kind.block_size)


def blob(kind: NBits) -> int:
    """Bytes of a block, without scale and zero point."""
    return kind.block_size * kind.bits // 8


def check_kind(kind: NBits) -> None:
    """Raises FormatError for a way to pack that there is not."""
    problems = Problems()
    for name, value, known in (
        ("bits", kind.bits, BITS),
        ("block_size", kind.block_size, BLOCK_SIZES),
        ("scales", kind.scale_dtype, SCALE_DTYPES),
    ):
        if value not in known:
            problems.add("MatMulNBits", name, f"one of {known}", str(value), "export again")
    problems.raise_if_any(FormatError)
