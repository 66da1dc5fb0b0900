"""The types of GGUF: of tensors, and of metadata values."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

__all__ = ["GGMLType", "Texts", "Value", "ValueType", "nbytes", "type_traits"]


class GGMLType(IntEnum):
    """Element types of tensors: `enum ggml_type` (ggml.h)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


_T = GGMLType
_TRAITS: Mapping[GGMLType, tuple[int, int]] = {
    _T.F32: (1, 4), _T.F16: (1, 2), _T.BF16: (1, 2), _T.F64: (1, 8),
    _T.I8: (1, 1), _T.I16: (1, 2), _T.I32: (1, 4), _T.I64: (1, 8),
    _T.Q4_0: (32, 18), _T.Q4_1: (32, 20), _T.Q5_0: (32, 22), _T.Q5_1: (32, 24),
    _T.Q8_0: (32, 34), _T.Q8_1: (32, 36), _T.IQ4_NL: (32, 18), _T.MXFP4: (32, 17),
    _T.Q2_K: (256, 84), _T.Q3_K: (256, 110), _T.Q4_K: (256, 144), _T.Q5_K: (256, 176),
    _T.Q6_K: (256, 210), _T.Q8_K: (256, 292), _T.IQ2_XXS: (256, 66), _T.IQ2_XS: (256, 74),
    _T.IQ3_XXS: (256, 98), _T.IQ1_S: (256, 50), _T.IQ3_S: (256, 110), _T.IQ2_S: (256, 82),
    _T.IQ4_XS: (256, 136), _T.IQ1_M: (256, 56), _T.TQ1_0: (256, 54), _T.TQ2_0: (256, 66),
    _T.NVFP4: (64, 36), _T.Q1_0: (128, 18), _T.Q2_0: (64, 18),
}  # fmt: skip


def type_traits(type: GGMLType) -> tuple[int, int]:
    """(elements per block, bytes per block) of a type, from ggml-common.h."""
    return _TRAITS[type]


def nbytes(shape: tuple[int, ...], type: GGMLType) -> int:
    """Bytes of a tensor of `shape` (numpy order, rows last); rows must be whole blocks."""
    block, block_bytes = _TRAITS[type]
    return math.prod(shape) // block * block_bytes


class ValueType(IntEnum):
    """Types of metadata values: `enum gguf_type`."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALAR_FORMATS: Mapping[ValueType, str] = {
    ValueType.UINT8: "<B", ValueType.INT8: "<b", ValueType.UINT16: "<H", ValueType.INT16: "<h",
    ValueType.UINT32: "<I", ValueType.INT32: "<i", ValueType.FLOAT32: "<f", ValueType.BOOL: "<B",
    ValueType.UINT64: "<Q", ValueType.INT64: "<q", ValueType.FLOAT64: "<d",
}  # fmt: skip
SCALARS = {kind: struct.Struct(code) for kind, code in SCALAR_FORMATS.items()}


class Texts(Sequence[str]):
    """The strings of an array: kept as they are stored, decoded when the first one is asked for.

    A vocabulary has 100,000 of them, and most readers of a header want their number, or a copy.
    """

    def __init__(self, stored: bytes, count: int) -> None:
        self.stored = stored
        """`count` times u64 length and bytes."""
        self._count = count

    @functools.cached_property
    def _texts(self) -> tuple[str, ...]:
        found: list[str] = []
        unpack, at = SCALARS[ValueType.UINT64].unpack_from, 0
        for _ in range(self._count):
            end = at + 8 + unpack(self.stored, at)[0]
            found.append(self.stored[at + 8 : end].decode("utf-8", "surrogateescape"))
            at = end
        return tuple(found)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._texts[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return self.stored == other.stored
        return self._texts == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._texts)

    def __repr__(self) -> str:
        return repr(self._texts)


@dataclass(frozen=True)
class Value:
    """One metadata value.

    Attributes:
        type: how it is stored.
        value: a number, bool or str; a tuple for an array, or `Texts` for one of strings that was
            read. Strings that are not UTF-8 keep their bytes as surrogate escapes, so that a copy
            is exact.
        element_type: of an array.
    """

    type: ValueType
    value: Any
    element_type: ValueType | None = None
