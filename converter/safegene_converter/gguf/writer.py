"""Writing GGUF: a deterministic header, and tensors that stream.

Law: reading what was written gives the metadata and tensors that were given, in the same order.
Tensors that come unchanged from another file are copied in the kernel (`copy_file_range`, which
shares the blocks on file systems that can), neighbours in one go.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene_converter.fold.stream import Bytes, OutputStream, as_bytes
from safegene_runtime.errors import FormatError, Problem, Problems
from safegene_runtime.formats.gguf.header import (
    ALIGNMENTS,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    TensorInfo,
)
from safegene_runtime.formats.gguf.types import (
    SCALAR_FORMATS,
    GGMLType,
    Texts,
    Value,
    ValueType,
    nbytes,
    type_traits,
)
from safegene_runtime.progress import Step

__all__ = ["OutTensor", "Written", "encode_header", "write_gguf"]

VERSION = 3


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write.

    Attributes:
        name: its name.
        shape: numpy order, (out, in).
        type: how `source` is encoded.
        source: its bytes; a function that makes them when their turn comes, so that only one
            tensor is in memory; or where they already are in another file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    source: Bytes | TensorInfo | Callable[[], Bytes]

    @property
    def nbytes(self) -> int:
        """Size without padding."""
        return nbytes(self.shape, self.type)


@dataclass(frozen=True)
class Written:
    """What is in a file that was written.

    Attributes:
        sha256: of the whole file.
        tensors: SHA-256 of the stored bytes of every tensor that was not copied from a file.
    """

    sha256: str
    tensors: Mapping[str, str]


def encode_header(
    metadata: Mapping[str, Value],
    tensors: Sequence[tuple[str, tuple[int, ...], GGMLType]],
    alignment: int = DEFAULT_ALIGNMENT,
) -> tuple[bytes, list[int]]:
    """The header, padded to `alignment`, and each tensor's offset relative to its end.

    Raises:
        FormatError: an alignment, name, shape or value that GGUF cannot hold.
    """
    problems = Problems()
    if alignment not in ALIGNMENTS:
        problems.add("header", "alignment", "a power of two from 32 to 65536", alignment)
    for key in metadata:
        _check_name(key, MAX_KEY_BYTES, problems)
    seen: set[str] = set()
    for name, shape, type in tensors:
        _check_name(name, MAX_NAME_BYTES, problems)
        if name in seen:
            problems.add("header", name, "each tensor once", "twice")
        seen.add(name)
        block = type_traits(type)[0]
        if not (1 <= len(shape) <= MAX_DIMS and min(shape) > 0 and shape[-1] % block == 0):
            wanted = f"1 to {MAX_DIMS} extents, rows of a multiple of {block} for {type.name}"
            problems.add("header", f"shape of {name}", wanted, shape)
    problems.raise_if_any(FormatError)
    values = dict(metadata)
    if alignment != DEFAULT_ALIGNMENT or "general.alignment" in values:
        values["general.alignment"] = Value(ValueType.UINT32, alignment)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    for key, value in values.items():
        parts += [_text(key), struct.pack("<I", value.type), _encode(key, value)]
    offsets, end = [], 0
    for name, shape, type in tensors:
        offsets.append(end)
        parts += [
            _text(name),
            struct.pack("<I", len(shape)),
            struct.pack(f"<{len(shape)}Q", *reversed(shape)),
            struct.pack("<IQ", type, end),
        ]
        end += _padded(nbytes(shape, type), alignment)
    header = b"".join(parts)
    return header.ljust(_padded(len(header), alignment), b"\0"), offsets


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[OutTensor],
    *,
    progress: Step | None = None,
) -> Written:
    """Writes a GGUF file; not atomic, publishing is the caller's (`publish_folder`).

    An error leaves no file behind.

    Args:
        path: the file to create; it must not exist, so that no source can be overwritten.
        metadata: in the order to write it.
        tensors: in the order to write them.
        progress: told bytes as they are written.

    Returns:
        its digest, taken while it was written, and those of the tensors made here.

    Raises:
        FormatError: a source whose size is not the tensor's.
        OutputError: the file system said no.
    """
    stated = metadata.get("general.alignment")
    alignment = stated.value if stated is not None else DEFAULT_ALIGNMENT
    header, _ = encode_header(
        metadata, [(tensor.name, tensor.shape, tensor.type) for tensor in tensors], alignment
    )
    digests: dict[str, str] = {}
    with OutputStream(path, progress) as out:
        out.write(header)
        for group in _groups(tensors, alignment):
            first, last = group[0].source, group[-1].source
            if isinstance(first, TensorInfo) and isinstance(last, TensorInfo):
                size = last.offset + last.nbytes - first.offset
                out.copy(first.path, first.offset, size, group[0].name)
            elif not isinstance(first, TensorInfo):
                data = as_bytes(first() if callable(first) else first)
                if data.nbytes != group[0].nbytes:
                    raise FormatError(
                        Problem(
                            group[0].name,
                            "source",
                            f"{group[0].nbytes} bytes",
                            f"{data.nbytes} bytes",
                        )
                    )
                out.write(data)
                digests[group[0].name] = hashlib.sha256(data).hexdigest()
            out.pad(alignment)
    return Written(out.sha256, digests)


def _check_name(name: str, limit: int, problems: Problems) -> None:
    try:
        raw = name.encode()
    except UnicodeEncodeError as error:
        problems.add("header", name, "a name in UTF-8", error.reason)
        return
    if not 0 < len(raw) <= limit or b"\0" in raw:
        problems.add("header", name, f"a name of 1 to {limit} bytes, none of them NUL", len(raw))


def _groups(tensors: Sequence[OutTensor], alignment: int) -> list[list[OutTensor]]:
    """Neighbours in the same source file that can be copied as one range, padding included."""
    groups: list[list[OutTensor]] = []
    for tensor in tensors:
        previous = groups[-1][-1].source if groups else None
        if isinstance(tensor.source, TensorInfo) and tensor.source.nbytes != tensor.nbytes:
            raise FormatError(
                Problem(
                    tensor.name, "source", f"{tensor.nbytes} bytes", f"{tensor.source.nbytes} bytes"
                )
            )
        if (
            isinstance(tensor.source, TensorInfo)
            and isinstance(previous, TensorInfo)
            and tensor.source.path == previous.path
            and tensor.source.offset == previous.offset + _padded(previous.nbytes, alignment)
        ):
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
    return groups


def _encode(key: str, value: Value) -> bytes:
    if value.type is ValueType.STRING:
        text = _string(key, value.value)
        if b"\0" in text[8:]:
            raise FormatError(Problem("header", key, "a STRING without NUL", repr(value.value)))
        return text
    if value.type is not ValueType.ARRAY:
        return _scalar(key, value.type, value.value)
    element = value.element_type
    if element is None or element is ValueType.ARRAY:
        raise FormatError(Problem("header", key, "an array of plain values", str(element)))
    head = struct.pack("<IQ", element, len(value.value))
    if element is ValueType.STRING:
        if isinstance(value.value, Texts):
            return head + value.value.stored
        return head + b"".join(_string(key, text) for text in value.value)
    try:
        if element is ValueType.BOOL:
            return head + b"".join(_scalar(key, element, each) for each in value.value)
        return head + struct.pack(f"<{len(value.value)}{SCALAR_FORMATS[element][1]}", *value.value)
    except (struct.error, OverflowError) as error:
        expected = f"an array of {element.name}"
        raise FormatError(Problem("header", key, expected, str(error))) from error


def _scalar(key: str, type: ValueType, value: Any) -> bytes:
    try:
        if type is ValueType.BOOL and value not in (False, True):
            raise OverflowError
        return struct.pack(SCALAR_FORMATS[type], value)
    except (struct.error, OverflowError) as error:
        raise FormatError(Problem("header", key, f"a {type.name}", repr(value))) from error


def _string(key: str, value: Any) -> bytes:
    if not isinstance(value, str):
        raise FormatError(Problem("header", key, "a STRING", repr(value)))
    try:
        return _text(value)
    except UnicodeEncodeError as error:
        raise FormatError(Problem("header", key, "a STRING", error.reason)) from error


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
