"""The tensors of an ONNX model: their types, and where every byte of their data is.

`onnx.checker` accepts external data past the end of its file, negative offsets and wrong lengths, and
ONNX Runtime reads a hard link's data. Here a tensor has as many bytes as shape and type need, in one
place, and no two share some of them.
"""

from __future__ import annotations

import itertools
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, Problems
from safegene_runtime.formats.files import found_status, open_regular
from safegene_runtime.formats.onnx.wire import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    Span,
    WireReader,
    wrong,
)

__all__ = ["DataType", "Initializer", "TensorReader", "read_initializer"]

MAX_DIMS = 16


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


def read_initializer(info: Initializer) -> npt.NDArray[Any]:
    """The values of a constant, in its shape; bfloat16 as uint16, types below 8 bits as bytes.

    Raises:
        FormatError: the file is shorter than it was.
    """
    raw = info.data
    if raw is None:
        if info.path is None:
            raise wrong(Path(info.name), "data", "bytes or a file", "neither")
        with open_regular(info.path, follow_symlinks=True) as file:
            file.seek(info.offset)
            raw = file.read(info.nbytes)
    if len(raw) != info.nbytes:
        raise wrong(
            info.path or Path(info.name), info.name, f"{info.nbytes} bytes", f"{len(raw)} bytes",
            "the file changed while it was read",
        )  # fmt: skip
    dtype = _NUMPY.get(info.dtype)
    if dtype is None:
        return np.frombuffer(raw, np.uint8)
    try:
        return np.frombuffer(raw, dtype).reshape(info.shape)
    except ValueError as error:  # an empty tensor of extents that no array may have
        place = info.path or Path(info.name)
        raise wrong(place, info.name, "a shape that an array may have", str(info.shape)) from error


class TensorReader(WireReader):
    """Reads tensors, and keeps account of the data files that they point into."""

    def __init__(self, path: Path, view: memoryview) -> None:
        super().__init__(path, view)
        self._data_sizes: dict[str, int] = {}
        self._ranges: dict[str, list[tuple[int, int, str]]] = {}

    @property
    def data_files(self) -> list[Path]:
        """The data files that tensors lie in."""
        return [self.path.parent / name for name in self._data_sizes]

    def tensor(self, span: Span, what: str) -> Initializer:
        """A TensorProto whose data is where it says, and as much as shape and type need.

        Raises:
            FormatError: it is not.
        """
        name, kind, location = "", 0, 0
        dims: list[int] = []
        raw: Span | None = None
        typed: dict[int, list[Span | int]] = {}
        external: dict[str, str] = {}
        known = {1: VARINT, 2: VARINT, 3: BYTES, 4: FIXED32, 5: VARINT, 6: BYTES, 7: VARINT,
                 8: BYTES, 9: BYTES, 10: FIXED64, 11: VARINT, 12: BYTES, 13: BYTES, 14: VARINT,
                 16: BYTES}  # fmt: skip
        repeated = frozenset({1, 4, 5, 6, 7, 10, 11, 13, 16})
        for number, value in self.fields(span, what, known, repeated):
            if number == 1:
                dims += self.integers(value)
            elif number == 2:
                kind = value
            elif number == 8:
                name = self.name(value, what)
            elif number == 9:
                raw = value
            elif number == 13:
                key, text = self.pair(value, what)
                if key in external or key not in ("location", "offset", "length", "checksum"):
                    raise self.fail(
                        f"external data of {name!r}", "location, offset, length, each once", key
                    )
                external[key] = text
            elif number == 16:
                self.pair(value, "metadata_props")
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
            return Initializer(name, dtype, shape, nbytes, self.path, raw[0])
        data = self._typed_data(where, dtype, count, typed)
        return Initializer(name, dtype, shape, nbytes, None, 0, data)

    def inside(self, tensor: Initializer) -> Initializer:
        """A tensor that must lie in the model itself: runtimes look elsewhere for main ones only."""
        if tensor.path not in (None, self.path):
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
            raw = b"".join(bytes(self.view[start:end]) for start, end in pieces)
            got = len(raw) // int(width[-1])
            if got != expected or len(raw) % int(width[-1]):
                raise self.fail(where, f"{expected} elements", f"{len(raw)} bytes")
            return raw
        values = [one for piece in pieces for one in self.integers(piece, signed=number != 11)]
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
        if not plain or location == self.path.name:
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
        if "length" not in external and end != size:
            raise self.fail(
                where, "the length of its data", f"none, and {size - end} more bytes in {location}",
                "readers differ in where it ends: export the model again",
            )  # fmt: skip
        self._ranges.setdefault(location, []).append((numbers["offset"], end, name))
        return self.path.parent / location, numbers["offset"]

    def _data_size(self, where: str, location: str) -> int:
        """The size of a data file: a regular file of its own, in this folder."""
        if location not in self._data_sizes:
            path = self.path.parent / location
            try:
                status = found_status(path)
            except (OSError, ValueError) as error:
                raise self.fail(
                    where, f"the data file {location}", str(error), "copy it beside the model"
                ) from error
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                kind = "a hard link" if stat.S_ISREG(status.st_mode) else "no regular file"
                raise self.fail(
                    where,
                    f"{location}: a regular file with one name",
                    kind,
                    "copy it, do not link it",
                )
            self._data_sizes[location] = status.st_size
        return self._data_sizes[location]

    def check_overlaps(self) -> None:
        """Refuses tensors that share some of their bytes; to share all of them is fine.

        Raises:
            FormatError: all of them.
        """
        problems = Problems()
        for location, ranges in self._ranges.items():
            ranges.sort()
            for (start, end, name), (other, other_end, second) in itertools.pairwise(ranges):
                if other < end and (start, end) != (other, other_end):
                    problems.add(
                        str(self.path), f"external data of {second!r}",
                        f"bytes of its own in {location}", f"bytes of {name!r}, too",
                        "export the model again",
                    )  # fmt: skip
        problems.raise_if_any(FormatError)
