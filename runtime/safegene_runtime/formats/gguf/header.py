"""A strict reader of GGUF headers: it allocates nothing before it has checked that it is there.

    magic "GGUF", u32 version, u64 n_tensors, u64 n_kv
    n_kv      x  string key, u32 value type, value
    n_tensors x  string name, u32 n_dims, n_dims x u64 (innermost first), u32 type, u64 offset
    padding to `general.alignment` (32 by default), then the data, each tensor padded likewise

gguf-py 0.19 hangs on a 49-byte file and accepts overlapping offsets; libllama aborts the process on
some metadata. Nothing native or third-party sees a file before this reader has accepted it.

Rules beyond the format: unique keys and names, offsets contiguous and ascending without gaps or
overlap, no bytes after the last tensor's padding, alignment a power of two, no NUL in a string that
a C reader would cut there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from safegene_runtime.errors import FormatError, Problem
from safegene_runtime.formats.files import open_regular
from safegene_runtime.formats.gguf.types import (
    SCALAR_FORMATS,
    SCALARS,
    GGMLType,
    Texts,
    Value,
    ValueType,
    nbytes,
    type_traits,
)

__all__ = ["GGUFFile", "TensorInfo", "read_gguf"]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
ALIGNMENTS = frozenset(1 << n for n in range(5, 17))
MAX_HEADER_BYTES = 128 << 20  # the largest vocabularies take 16 MiB
MAX_DIMS = 4
MAX_NAME_BYTES = 63
MAX_KEY_BYTES = 65535
MAX_KEYS = 16_384
MAX_TENSORS = 32_768
MAX_NUMBERS = 1 << 20
"""In all arrays of a file: a vocabulary has some for each token. A number costs more than its bytes."""
MIN_KV_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
READ_BYTES = 1 << 20
SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is.

    Attributes:
        name: its name.
        shape: numpy order, (out, in) for a linear weight; the reverse of ggml's `ne`.
        type: element type.
        offset: absolute byte offset in `path`.
        nbytes: size without padding.
        path: the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int
    path: Path


@dataclass(frozen=True)
class GGUFFile:
    """One parsed header; tensors in file order."""

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Value] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    data_offset: int
    size_bytes: int

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of a metadata key."""
        found = self.metadata.get(key)
        return default if found is None else found.value


def read_gguf(path: Path, *, follow_symlinks: bool = True) -> GGUFFile:
    """Reads and checks the header of one GGUF file.

    Raises:
        FormatError: everything that can be said about what is wrong.
    """
    path = Path(path)
    with open_regular(path, follow_symlinks=follow_symlinks) as file:
        cursor = _Cursor(file, str(path))
        try:
            return _parse(cursor, path)
        except MemoryError:
            raise cursor.fail("header", "one that fits into memory", "more") from None


class _Cursor:
    """Reads forward; every read is checked against the bytes that are left."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file = file
        self.where = where
        self.size = os.fstat(file.fileno()).st_size
        self._limit = min(self.size, MAX_HEADER_BYTES)
        self._window = b""  # the bytes of the file from `_start`; `_next` is an index into it
        self._start = self._next = 0
        self._numbers = 0

    @property
    def at(self) -> int:
        return self._start + self._next

    @property
    def left(self) -> int:
        return self._limit - self.at

    def fail(self, what: str, expected: object, got: object, fix: str = "") -> FormatError:
        return FormatError(
            Problem(self.where, what, str(expected), str(got), fix or "download the file again")
        )

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        end = self._next + count
        if end > len(self._window):
            self._slide(count, what)
            end = count
        piece = self._window[self._next : end]
        self._next = end
        return piece

    def _slide(self, count: int, what: str) -> None:
        """Moves the window forward, so that it starts here and holds `count` bytes."""
        if count > self.left:
            left = f"{self.left} bytes left"
            if self.size > self._limit:
                left += f" of the {self._limit} that a header may take"
            raise self.fail(f"{what} at byte {self.at}", f"{count} bytes", left)
        rest = self._window[self._next :]
        self._start, self._next = self.at, 0
        wanted = min(max(READ_BYTES, count), self.left) - len(rest)
        self._window = rest + self._file.read(wanted)
        if len(self._window) < count:
            raise self.fail(what, f"{count} bytes", "the end of the file")

    def number(self, kind: ValueType, what: str) -> Any:
        code = SCALARS[kind]
        value = code.unpack(self.take(code.size, what))[0]
        if kind is ValueType.BOOL:
            if value > 1:
                raise self.fail(f"{what} at byte {self.at - 1}", "a bool (0 or 1)", value)
            return bool(value)
        return value

    def text(self, what: str, limit: int | None = None) -> bytes:
        length = self.number(ValueType.UINT64, f"length of {what}")
        if limit is not None and not 0 < length <= limit:
            raise self.fail(
                f"{what} at byte {self.at - 8}", f"1 to {limit} bytes", f"{length} bytes"
            )
        return self.take(length, what)

    def numbers(self, count: int, what: str) -> None:
        """Counts the numbers of an array before they are made."""
        self._numbers += count
        if self._numbers > MAX_NUMBERS:
            raise self.fail(
                f"length of {what}", f"at most {MAX_NUMBERS} numbers in all arrays", self._numbers
            )

    def texts(self, count: int, what: str) -> Texts:
        """`count` strings; a vocabulary has 100,000, so the window is walked without calls."""
        pieces: list[bytes] = []
        length, left = SCALARS[ValueType.UINT64], count
        unpack = length.unpack_from
        while left:
            window, at, size = self._window, self._next, len(self._window)
            while left and at + 8 <= size:
                end = at + 8 + unpack(window, at)[0]
                if end > size:
                    break
                at, left = end, left - 1
            pieces.append(window[self._next : at])
            self._next = at
            if left:  # the next one is cut off by the window, or by the file
                text = self.text(what)
                pieces += [length.pack(len(text)), text]
                left -= 1
        return Texts(b"".join(pieces), count)


def _parse(cursor: _Cursor, path: Path) -> GGUFFile:
    head = cursor.take(min(24, cursor.left), "header")
    if head.startswith(b"version https://git-lfs"):
        raise cursor.fail("content", "a GGUF file", "a git-lfs pointer", "run `git lfs pull`")
    if head[:4] != MAGIC:
        raise cursor.fail("magic", repr(MAGIC), repr(head[:4]), "is it a GGUF file?")
    if len(head) < 24:
        raise cursor.fail("header", "24 bytes", f"{len(head)} bytes")
    version, n_tensors, n_kv = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3):
        swapped = int.from_bytes(head[4:8], "big") in (1, 2, 3)
        raise cursor.fail(
            "version",
            "2 or 3",
            f"{version} (a big-endian file)" if swapped else version,
            "convert it to a little-endian GGUF v3",
        )
    for name, number, most, least in (
        ("n_kv", n_kv, MAX_KEYS, MIN_KV_BYTES),
        ("n_tensors", n_tensors, MAX_TENSORS, MIN_TENSOR_BYTES),
    ):
        most = min(most, cursor.left // least)
        if number > most:
            raise cursor.fail(name, f"at most {most} in {cursor.size} bytes", number)
    metadata = _metadata(cursor, n_kv)
    alignment = _alignment(cursor, metadata)
    raw = [_tensor(cursor) for _ in range(n_tensors)]
    data_offset = -(-cursor.at // alignment) * alignment
    tensors = _place(cursor, raw, alignment, data_offset, path)
    return GGUFFile(path, version, alignment, metadata, tensors, data_offset, cursor.size)


def _metadata(cursor: _Cursor, n_kv: int) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for _ in range(n_kv):
        key = _name(cursor, "key", MAX_KEY_BYTES)
        if key in found:
            raise cursor.fail(f"key {_shown(key)!r}", "each key once", "the key twice")
        found[key] = _value(cursor, key)
    if "general.architecture" in found:
        kind = found["general.architecture"].type
        if kind is not ValueType.STRING:
            raise cursor.fail("general.architecture", "a string", kind.name)
    return found


def _name(cursor: _Cursor, what: str, limit: int) -> str:
    raw = cursor.text(what, limit)
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise cursor.fail(f"{what} {raw[:40]!r}", "UTF-8", error.reason) from error
    if "\0" in name:
        raise cursor.fail(f"{what} {_shown(name)!r}", "no NUL byte", "a NUL byte")
    return name


def _shown(name: str) -> str:
    """A name as messages show it: a key may have 64 KiB."""
    return name if len(name) <= SHOWN_CHARACTERS else name[: SHOWN_CHARACTERS - 3] + "..."


def _value(cursor: _Cursor, key: str) -> Value:
    key = _shown(key)
    kind = _value_type(cursor, f"type of {key!r}")
    if kind is ValueType.STRING:
        text = cursor.text(key)
        if b"\0" in text:
            raise cursor.fail(key, "a string without NUL bytes", f"one at {text.index(0)}")
        return Value(kind, text.decode("utf-8", "surrogateescape"))
    if kind is not ValueType.ARRAY:
        return Value(kind, cursor.number(kind, key))
    element = _value_type(cursor, f"element type of {key!r}")
    count = cursor.number(ValueType.UINT64, f"length of {key!r}")
    if element is ValueType.ARRAY:
        raise cursor.fail(key, "an array of plain values", "an array of arrays")
    if element is ValueType.STRING:
        if count > cursor.left // 8:
            raise cursor.fail(f"length of {key!r}", f"at most {cursor.left // 8} strings", count)
        return Value(kind, cursor.texts(count, key), element)
    size = SCALARS[element].size
    if count > cursor.left // size:
        raise cursor.fail(f"length of {key!r}", f"at most {cursor.left // size} elements", count)
    cursor.numbers(count, repr(key))
    array = np.frombuffer(cursor.take(count * size, key), dtype=SCALAR_FORMATS[element])
    if element is ValueType.BOOL:
        if (array > 1).any():
            raise cursor.fail(key, "bools (0 or 1)", int(array.max()))
        array = array.astype(np.bool_)
    return Value(kind, tuple(array.tolist()), element)


def _value_type(cursor: _Cursor, what: str) -> ValueType:
    number = cursor.number(ValueType.UINT32, what)
    try:
        return ValueType(number)
    except ValueError as error:
        raise cursor.fail(f"{what} at byte {cursor.at - 4}", "0 to 12", number) from error


def _alignment(cursor: _Cursor, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return DEFAULT_ALIGNMENT
    if value.type is not ValueType.UINT32 or value.value not in ALIGNMENTS:
        raise cursor.fail(
            "general.alignment",
            "a u32, a power of two from 32 to 65536",
            f"{value.type.name} {value.value}",
        )
    return int(value.value)


_Raw = tuple[str, tuple[int, ...], GGMLType, int]


def _tensor(cursor: _Cursor) -> _Raw:
    name = _name(cursor, "tensor name", MAX_NAME_BYTES)
    n_dims = cursor.number(ValueType.UINT32, f"dimensions of {name!r}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"dimensions of {name!r}", f"1 to {MAX_DIMS}", n_dims)
    extents = [cursor.number(ValueType.UINT64, f"extent of {name!r}") for _ in range(n_dims)]
    kind = cursor.number(ValueType.UINT32, f"type of {name!r}")
    offset = cursor.number(ValueType.UINT64, f"offset of {name!r}")
    try:
        type = GGMLType(kind)
    except ValueError as error:
        raise cursor.fail(
            f"type of {name!r}",
            "a type that ggml knows",
            kind,
            "update safegene, or convert the model again",
        ) from error
    if 0 in extents:
        raise cursor.fail(f"shape of {name!r}", "extents of at least 1", extents)
    if extents[0] % type_traits(type)[0]:
        raise cursor.fail(
            f"shape of {name!r}",
            f"rows of a multiple of {type_traits(type)[0]} for {type.name}",
            extents,
        )
    return name, tuple(reversed(extents)), type, offset


def _place(
    cursor: _Cursor, raw: list[_Raw], alignment: int, data_offset: int, path: Path
) -> dict[str, TensorInfo]:
    """Checks that the tensors tile the data section exactly, in order."""
    found: dict[str, TensorInfo] = {}
    expected = 0
    for name, shape, type, offset in raw:
        size = nbytes(shape, type)
        if name in found:
            raise cursor.fail(f"tensor {name!r}", "each name once", "the name twice")
        if offset != expected:
            raise cursor.fail(
                f"offset of {name!r}", f"{expected}, where the last tensor ends", offset
            )
        found[name] = TensorInfo(name, shape, type, data_offset + offset, size, path)
        expected = -(-(offset + size) // alignment) * alignment
    last = raw[-1][3] + nbytes(raw[-1][1], raw[-1][2]) if raw else 0
    smallest, largest = data_offset + last, data_offset + expected
    if not raw:
        smallest = cursor.at
    if not smallest <= cursor.size <= largest:
        wanted = f"{smallest} bytes" if smallest == largest else f"{smallest} to {largest} bytes"
        raise cursor.fail("file size", wanted, f"{cursor.size} bytes")
    return found
