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

import functools
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, Problem, Problems
from safegene_runtime.formats.files import open_regular

__all__ = [
    "GGMLType",
    "GGUFFile",
    "GGUFModel",
    "TensorInfo",
    "Texts",
    "Value",
    "ValueType",
    "map_tensor",
    "nbytes",
    "open_model",
    "read_gguf",
    "read_tensor_bytes",
    "type_traits",
]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
ALIGNMENTS = frozenset(1 << n for n in range(5, 17))
MAX_HEADER_BYTES = 128 << 20  # the largest vocabularies take 16 MiB
MAX_DIMS = 4
MAX_NAME_BYTES = 63
MAX_KEY_BYTES = 65535
MIN_KV_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
READ_BYTES = 1 << 20
SHOWN_CHARACTERS = 80


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
_STRUCTS = {kind: struct.Struct(code) for kind, code in SCALAR_FORMATS.items()}


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
        unpack, at = _STRUCTS[ValueType.UINT64].unpack_from, 0
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


@dataclass(frozen=True)
class GGUFModel:
    """One model: a file, or all its shards; metadata is the first shard's."""

    shards: tuple[GGUFFile, ...]
    metadata: dict[str, Value] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of a metadata key."""
        return self.shards[0].get(key, default)


def read_gguf(path: Path, *, follow_symlinks: bool = True) -> GGUFFile:
    """Reads and checks the header of one GGUF file.

    Raises:
        FormatError: everything that can be said about what is wrong.
    """
    path = Path(path)
    with open_regular(path, follow_symlinks=follow_symlinks) as file:
        return _parse(_Cursor(file, str(path)), path)


class _Cursor:
    """Reads forward; every read is checked against the bytes that are left."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file = file
        self.where = where
        self.size = os.fstat(file.fileno()).st_size
        self._limit = min(self.size, MAX_HEADER_BYTES)
        self._window = b""  # the bytes of the file from `_start`; `_next` is an index into it
        self._start = self._next = 0

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
        code = _STRUCTS[kind]
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

    def texts(self, count: int, what: str) -> Texts:
        """`count` strings; a vocabulary has 100,000, so the window is walked without calls."""
        pieces: list[bytes] = []
        length, left = _STRUCTS[ValueType.UINT64], count
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
    if n_kv > cursor.left // MIN_KV_BYTES:
        raise cursor.fail(
            "n_kv", f"at most {cursor.left // MIN_KV_BYTES} in {cursor.size} bytes", n_kv
        )
    if n_tensors > cursor.left // MIN_TENSOR_BYTES:
        raise cursor.fail(
            "n_tensors",
            f"at most {cursor.left // MIN_TENSOR_BYTES} in {cursor.size} bytes",
            n_tensors,
        )
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
    size = _STRUCTS[element].size
    if count > cursor.left // size:
        raise cursor.fail(f"length of {key!r}", f"at most {cursor.left // size} elements", count)
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
    if extents[0] % _TRAITS[type][0]:
        raise cursor.fail(
            f"shape of {name!r}",
            f"rows of a multiple of {_TRAITS[type][0]} for {type.name}",
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


# --- shards ----------------------------------------------------------------------------------------

_SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)
MAX_SHARDS = 10_000


def shard_paths(path: Path) -> list[Path]:
    """Every file of a model by the name of one of them, in order; nothing is opened."""
    match = _SHARD.fullmatch(path.name)
    if not match or not 1 < int(match["count"]) <= MAX_SHARDS:
        return [path]
    names = f"{match['stem']}-{{:05}}-of-{match['count']}.gguf"
    return [path.with_name(names.format(number + 1)) for number in range(int(match["count"]))]


def open_model(path: Path, *, follow_symlinks: bool = True) -> GGUFModel:
    """Reads a model: one file, or, named by its first shard, all of them.

    Raises:
        FormatError: as `read_gguf`; or shards that are missing, out of order or contradictory.
    """
    path = Path(path)
    first = read_gguf(path, follow_symlinks=follow_symlinks)
    count = first.get("split.count", 0)
    if not count or count == 1:
        return GGUFModel((first,), first.metadata, first.tensors)
    match = _SHARD.fullmatch(path.name)
    problems = Problems()
    if (
        not match
        or type(count) is not int  # 3.0 would equal the number in the name
        or int(match["count"]) != count
        or not 1 < count <= MAX_SHARDS
    ):
        problems.add(
            str(path),
            "split.count",
            "the number in the name, as in x-00001-of-00003.gguf",
            count,
            "restore the name that the shards were made with",
        )
    elif int(match["no"]) != 1 or first.get("split.no") != 0:
        problems.add(
            str(path),
            "split.no",
            "the first shard, 0",
            f"{first.get('split.no')} in a file named {match['no']}",
            f"pass {match['stem']}-00001-of-{match['count']}.gguf",
        )
    problems.raise_if_any(FormatError)
    shards = [first]
    for number, place in enumerate(shard_paths(path)[1:], start=1):
        if not place.exists():
            problems.add(str(place), "shard", "a file", "nothing", "download all shards")
            continue
        shard = read_gguf(place, follow_symlinks=follow_symlinks)
        for key, wanted in (("split.no", number), ("split.count", count)):
            if shard.get(key) != wanted:
                problems.add(
                    str(shard.path), key, wanted, shard.get(key), "download all shards again"
                )
        shards.append(shard)
    problems.raise_if_any(FormatError)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in shard.tensors.items():
            if name in tensors:
                problems.add(
                    str(shard.path),
                    f"tensor {name!r}",
                    "in one shard",
                    "in two shards",
                    "download all shards again",
                )
            tensors[name] = info
    stated = first.get("split.tensors.count")
    if stated != len(tensors):
        problems.add(
            str(path), "split.tensors.count", len(tensors), stated, "download all shards again"
        )
    problems.raise_if_any(FormatError)
    return GGUFModel(tuple(shards), first.metadata, tensors)


# --- data ------------------------------------------------------------------------------------------


def read_tensor_bytes(info: TensorInfo) -> bytes:
    """The stored bytes of a tensor.

    Raises:
        FormatError: the file became shorter since its header was read.
    """
    with open_regular(info.path, follow_symlinks=True) as file:
        file.seek(info.offset)
        data = file.read(info.nbytes)
    if len(data) != info.nbytes:
        raise _shorter(info, len(data))
    return data


def map_tensor(info: TensorInfo) -> npt.NDArray[np.uint8]:
    """The stored bytes of a tensor, (nbytes,) uint8, read-only, paged in as they are touched.

    A file that becomes shorter while it is mapped kills the process (SIGBUS).

    Raises:
        FormatError: the file became shorter since its header was read.
    """
    with open_regular(info.path, follow_symlinks=True) as file:
        size = os.fstat(file.fileno()).st_size
        if size < info.offset + info.nbytes:
            raise _shorter(info, size - info.offset)
        return np.memmap(file, dtype=np.uint8, mode="r", offset=info.offset, shape=(info.nbytes,))


def _shorter(info: TensorInfo, left: int) -> FormatError:
    return FormatError(
        Problem(
            str(info.path),
            info.name,
            f"{info.nbytes} bytes",
            f"{max(0, left)} bytes",
            "the file changed while it was read",
        )
    )
