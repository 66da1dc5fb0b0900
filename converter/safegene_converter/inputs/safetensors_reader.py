"""A strict reader of safetensors: every byte belongs to exactly one tensor, every name is unique.

    u64 length of the header | JSON header | data
    header: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}

The `safetensors` library takes the last of two equal names and spends a gigabyte on a large header;
numpy has no BF16. Both are small to do right here, and the files are the safety delta itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, Problem, Problems
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.fields import Kind, check_fields, one_of
from safegene_runtime.formats.files import open_regular

__all__ = ["SafetensorsFile", "SafetensorsTensor", "read_safetensors"]

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 50_000
MAX_MARKS = 16 * MAX_TENSORS
"""Commas and colons of a header: a tensor of two dimensions has nine, and each costs memory."""
SAVE_AGAIN = "save the file again"
MAX_PROBLEMS = 100
"""More than anyone reads; a hostile header has one for each of its tensors."""
MAX_DIMS = 8
LENGTH_BYTES = 8

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


def _is_counts(value: list[Any]) -> bool:
    return all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _counts(words: str, least: int, most: int) -> Kind:
    return Kind((list,), words, words, lambda v: _is_counts(v) and least <= len(v) <= most)


_ENTRY = {
    "dtype": one_of(*_BITS),
    "shape": _counts(f"at most {MAX_DIMS} sizes", 0, MAX_DIMS),
    "data_offsets": _counts("[begin, end]", 2, 2),
}


@dataclass(frozen=True)
class SafetensorsTensor:
    """One tensor of the header; `begin` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """The checked header of one file, and its bytes when they were given."""

    path: Path
    tensors: Mapping[str, SafetensorsTensor]
    data: bytes | None = field(default=None, repr=False)

    def read_float32(self, name: str) -> npt.NDArray[np.float32]:
        """Reads one tensor as float32; F16 and BF16 widen exactly, F64 is rounded once.

        Raises:
            FormatError: it is not a float tensor, or the file shrank since its header was read.
        """
        info = self.tensors[name]
        if info.dtype not in _FLOATS:
            raise FormatError(
                Problem(
                    str(self.path),
                    name,
                    f"a dtype of {', '.join(_FLOATS)}",
                    info.dtype,
                    "save the tensor in a float type",
                )
            )
        values = np.frombuffer(self._bytes(name, info), _FLOATS[info.dtype]).reshape(info.shape)
        if info.dtype == "BF16":
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values.astype(np.float32)

    def _bytes(self, name: str, info: SafetensorsTensor) -> bytes:
        if self.data is not None:
            return self.data[info.begin : info.end]
        with open_regular(self.path) as file:
            file.seek(info.begin)
            found = file.read(info.end - info.begin)
        if len(found) != info.end - info.begin:
            raise FormatError(
                Problem(
                    str(self.path),
                    name,
                    f"{info.end - info.begin} bytes",
                    f"{len(found)} bytes",
                    "the file changed while it was read: try again",
                )
            )
        return found


def read_safetensors(path: Path, data: bytes | None = None) -> SafetensorsFile:
    """Reads and checks a header.

    Args:
        path: the file; a symbolic link is refused.
        data: its bytes, when the caller has read them already (and taken their digest).

    Raises:
        FormatError: a git-lfs pointer, a malformed header, duplicate names, or tensors that
            overlap, leave holes, or do not cover the file.
    """
    if data is not None:
        return SafetensorsFile(path, _parse_within_memory(path, data, len(data)), data)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(LENGTH_BYTES)
        # no more than there is: `read` asks for all of its memory first
        head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES, size))
    return SafetensorsFile(path, _parse_within_memory(path, head, size))


def _parse_within_memory(path: Path, head: bytes, size: int) -> dict[str, SafetensorsTensor]:
    try:
        return _parse(path, head, size)
    except MemoryError:
        raise FormatError(
            Problem(str(path), "header", "one that fits into memory", "more", "free some memory")
        ) from None


def _parse(path: Path, head: bytes, size: int) -> dict[str, SafetensorsTensor]:
    where = str(path)

    def wrong(name: str, expected: str, got: object, fix: str = "restore the file") -> FormatError:
        return FormatError(Problem(where, name, expected, str(got), fix))

    if head.startswith(b"version "):
        raise wrong("content", "safetensors", "a git-lfs pointer", "run `git lfs pull`")
    if size < LENGTH_BYTES + 2:
        raise wrong("size", f"at least {LENGTH_BYTES + 2} bytes", f"{size} bytes")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
        limit = f"at most {min(size - LENGTH_BYTES, MAX_HEADER_BYTES)} bytes"
        raise wrong("header length", limit, length, "is it a safetensors file, and whole?")
    header = head[LENGTH_BYTES : LENGTH_BYTES + length]
    if not header.startswith(b"{"):
        raise wrong("header", "a JSON object", repr(header[:16]), "is it a safetensors file?")
    raw = strictjson.loads(header, where, MAX_MARKS)
    if not isinstance(raw, dict):
        raise wrong("header", "a JSON object", type(raw).__name__)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise wrong("__metadata__", "an object of strings", "something else")
    if len(raw) > MAX_TENSORS:
        raise wrong("header", f"at most {MAX_TENSORS} tensors", len(raw))
    problems = Problems()
    start = LENGTH_BYTES + length
    tensors = {}
    for name, entry in raw.items():
        tensor = _tensor(where, name, entry, start, problems)
        if tensor is not None:
            tensors[name] = tensor
        elif len(problems) >= MAX_PROBLEMS:
            break
    problems.raise_if_any(FormatError)
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            what = "overlapping" if tensor.begin < position else "missing"
            got = f"{tensor.begin - start} ({what} bytes)"
            problems.add(where, f"{name}.data_offsets", f"to start at {position - start}", got,
                         SAVE_AGAIN)  # fmt: skip
            if len(problems) >= MAX_PROBLEMS:
                break
        position = max(position, tensor.end)
    if position != size and not problems:
        got = f"{size} bytes"
        problems.add(where, "size", f"{position} bytes", got, "truncated, or bytes were added")
    problems.raise_if_any(FormatError)
    return tensors


def _tensor(
    where: str, name: str, entry: Any, start: int, problems: Problems
) -> SafetensorsTensor | None:
    """Checks one entry of the header by itself."""
    if not check_fields(entry, f"{where}: {name}", _ENTRY, problems, fix=SAVE_AGAIN):
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    expected, rest = divmod(math.prod(shape) * _BITS[dtype], 8)
    if rest or offsets[1] - offsets[0] != expected:
        got = f"{offsets[1] - offsets[0]} bytes"
        problems.add(
            where, f"{name}.data_offsets", f"{expected} bytes ({dtype} {shape})", got, SAVE_AGAIN
        )
        return None
    return SafetensorsTensor(dtype, tuple(shape), start + offsets[0], start + offsets[1])
