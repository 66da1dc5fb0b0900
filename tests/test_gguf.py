"""The strict GGUF reader, against gguf-py where a file is good, and against a table where not."""

from __future__ import annotations

import os
import re
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safegene_converter.bases.hf_to_gguf import find_llama_cpp
from safegene_converter.gguf.writer import OutTensor, encode_header, write_gguf
from safegene_runtime.errors import FormatError
from safegene_runtime.formats.gguf.header import GGUFFile, TensorInfo, read_gguf
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.tensors import map_tensor, read_tensor_bytes
from safegene_runtime.formats.gguf.types import (
    GGMLType,
    Texts,
    Value,
    ValueType,
    nbytes,
    type_traits,
)

MAX_SECONDS = 1.0
MAX_PEAK_BYTES = 4 << 20

# --- good files ------------------------------------------------------------------------------------


def _assert_same_as_gguf_py(path: Path) -> GGUFFile:
    """Metadata, shapes, types, offsets and bytes, all of them, in the same order."""
    mine, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(mine.metadata) == list(fields)
    assert mine.alignment == theirs.alignment
    assert mine.data_offset == theirs.data_offset
    for key, field in fields.items():
        value = mine.metadata[key]
        contents = field.contents()
        assert int(value.type) == int(field.types[0]), key
        if value.type is ValueType.ARRAY:
            assert value.element_type is not None
            assert int(value.element_type) == int(field.parts[3][0]), key
            assert value.value == tuple(contents), key
            assert not contents or type(value.value[0]) is type(contents[0]), key
        else:
            assert value.value == contents, key
            assert type(value.value) is type(contents), key
    assert list(mine.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = mine.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert int(info.type) == int(tensor.tensor_type)
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert read_tensor_bytes(info) == tensor.data.tobytes()
        assert map_tensor(info).tobytes() == tensor.data.tobytes()
    return mine


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(type: gguf.GGMLQuantizationType, rows: int, seed: int) -> np.ndarray:
    """Random bytes as rows of one block each; the reader does not look inside."""
    size = gguf.GGML_QUANT_SIZES[type][1]
    return np.random.default_rng(seed).integers(0, 256, (rows, size), np.uint8)


def test_every_value_type_is_read_as_gguf_py_wrote_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    extremes = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1,
        "int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.1,
        "float64": 0.1, "bool": True, "string": "héllo 世界 \U0001f600\n\t",
    }  # fmt: skip
    for name, value in extremes.items():
        getattr(writer, f"add_{name}")(f"test.{name}", value)
    for type in gguf.GGUFValueType:
        if type.name not in ("ARRAY", "STRING"):
            value = extremes[type.name.lower()]
            writer.add_key_value(f"array.{type.name}", [value, 0], gguf.GGUFValueType.ARRAY, type)
    writer.add_bool("test.false", False)
    writer.add_array("array.strings", ["", "a", "世界", "x" * 70_000])
    writer.add_key_value("empty.string", "", gguf.GGUFValueType.STRING)
    _finish(writer)
    found = _assert_same_as_gguf_py(tmp_path / "x.gguf")
    assert {value.type for value in found.metadata.values()} == set(ValueType)
    elements = {value.element_type for value in found.metadata.values()} - {None}
    assert elements == set(ValueType) - {ValueType.ARRAY}
    assert found.get("test.uint64") == 2**64 - 1
    assert found.get("test.missing", "default") == "default"


@pytest.mark.parametrize("alignment", [None, 32, 64, 256, 4096, 65536])
def test_every_tensor_type_is_read_as_gguf_py_wrote_it(
    tmp_path: Path, alignment: int | None
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    types = set(gguf.GGMLQuantizationType) - {gguf.GGMLQuantizationType.Q8_1}
    for index, type in enumerate(sorted(types)):
        writer.add_tensor(f"t.{type.name}", _blocks(type, 1 + index % 3, index), raw_dtype=type)
    writer.add_tensor("one", np.ones(7, np.float32))
    writer.add_tensor("four", np.arange(2 * 3 * 4 * 5, dtype=np.float16).reshape(2, 3, 4, 5))
    _finish(writer)
    found = _assert_same_as_gguf_py(tmp_path / "x.gguf")
    assert found.alignment == (alignment or 32)
    assert {int(info.type) for info in found.tensors.values()} == types


def test_the_sizes_of_blocks_are_gguf_pys() -> None:
    theirs = {int(type): sizes for type, sizes in gguf.GGML_QUANT_SIZES.items()}
    mine = {int(type): type_traits(type) for type in GGMLType}
    theirs[int(GGMLType.Q2_0)] = (64, 18)  # newer than gguf-py 0.19
    theirs[int(GGMLType.Q8_1)] = (32, 36)  # gguf-py has the block of 2023; no file holds this type
    assert mine == theirs


def test_a_real_model_is_read_as_gguf_py_reads_it() -> None:
    found = _assert_same_as_gguf_py(tiny.smollm2_gguf())
    assert len(found.tensors) == 272
    assert len(found.get("tokenizer.ggml.tokens")) == 49152


def test_strings_of_an_array_are_a_tuple_that_is_decoded_late() -> None:
    raw, meant = (b"a", b"", "世".encode(), b"\xff"), ("a", "", "世", "\udcff")
    stored = b"".join(struct.pack("<Q", len(text)) + text for text in raw)
    texts = Texts(stored, 4)
    assert texts == meant == texts == Texts(stored, 4)
    assert hash(texts) == hash(meant)
    assert (len(texts), texts[2:], list(texts)) == (4, meant[2:], [*meant])
    for other in (meant[:3], Texts(stored[:-9], 3), [*meant]):
        assert texts != other


@pytest.mark.parametrize("name", ["bert-bge", "deepseek-coder"])
def test_vocabularies_of_llama_cpp_are_read_as_gguf_py_reads_them(name: str) -> None:
    """Without tensors, without padding at the end, and with tokens that are not ASCII."""
    found = _assert_same_as_gguf_py(find_llama_cpp() / "models" / f"ggml-vocab-{name}.gguf")
    assert not found.tensors


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(TINY.replace(b"GGUF\3", b"GGUF\2", 1))
    assert _assert_same_as_gguf_py(path).version == 2


def test_a_last_tensor_without_its_padding_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(TINY[:-16])
    assert list(_assert_same_as_gguf_py(path).tensors) == ["a", "b", "c"]


# --- bad files -------------------------------------------------------------------------------------


def _text(raw: bytes | str, length: int | None = None) -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def _kv(key: bytes | str, kind: int, payload: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + payload


def _array(element: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", element, count) + payload


def _info(
    name: bytes | str = "a",
    extents: Sequence[int] = (8, 2),
    type: int = 0,
    offset: int = 0,
    *,
    n_dims: int | None = None,
) -> bytes:
    return b"".join(
        [
            _text(name),
            struct.pack("<I", len(extents) if n_dims is None else n_dims),
            struct.pack(f"<{len(extents)}Q", *extents),
            struct.pack("<IQ", type, offset),
        ]
    )


U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
ARCHITECTURE = _kv("general.architecture", STRING, _text("llama"))
KVS = (
    ARCHITECTURE,
    _kv("n", U32, struct.pack("<I", 7)),
    _kv("x", F32, struct.pack("<f", 1.5)),
    _kv("flag", BOOL, b"\1"),
    _kv("tokens", ARRAY, _array(STRING, 3, _text("one") + _text("") + _text("three"))),
    _kv("flags", ARRAY, _array(BOOL, 2, b"\0\1")),
    _kv("ids", ARRAY, _array(I32, 2, struct.pack("<2i", -1, 2))),
)
INFOS = (_info(), _info("b", (32,), 2, 64), _info("c", (4,), 0, 96))  # 64, 18 and 16 bytes
DATA = bytes(range(128))


def _file(
    kvs: Sequence[bytes] = KVS,
    infos: Sequence[bytes] = INFOS,
    data: bytes = DATA,
    *,
    n_kv: int | None = None,
    n_tensors: int | None = None,
    head: bytes = b"GGUF\3\0\0\0",
    alignment: int = 32,
) -> bytes:
    """The bytes of a file, however wrong; written from the format's description alone."""
    counts = (
        len(infos) if n_tensors is None else n_tensors,
        len(kvs) if n_kv is None else n_kv,
    )
    header = head + struct.pack("<QQ", *counts) + b"".join(kvs) + b"".join(infos)
    return header + b"\0" * (-len(header) % alignment) + data


TINY = _file()
HEADER_BYTES = len(_file(data=b"", alignment=1))


def _with(kv: bytes, *, n_kv: int | None = None, data: bytes = DATA) -> bytes:
    """The tiny file with one more value."""
    return _file((*KVS, kv), data=data, n_kv=n_kv)


def _alignment(kind: int, payload: bytes, alignment: int = 32) -> bytes:
    kv = _kv("general.alignment", kind, payload)
    return _file((*KVS, kv), INFOS[:1], alignment=alignment, data=bytes(64))


def _one(info: bytes, data: bytes = bytes(64)) -> bytes:
    """One tensor."""
    return _file(infos=[info], data=data)


def _u32(number: int) -> bytes:
    return struct.pack("<I", number)


# name -> (what the message must name, the bytes)
HOSTILE: dict[str, tuple[str, bytes]] = {
    # what is not GGUF
    "empty file": ("magic", b""),
    "one byte": ("magic", b"G"),
    "magic only": ("header: expected 24 bytes, got 4 bytes", b"GGUF"),
    "header of 23 bytes": ("header: expected 24 bytes, got 23 bytes", TINY[:23]),
    "zeros": ("magic", bytes(4096)),
    "ggml's old magic": ("magic", b"tjgg" + TINY[4:]),
    "a web page": ("magic", b"<!DOCTYPE html><html><title>404</title></html>"),
    "git-lfs pointer": (
        "git lfs pull",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ),
    "big-endian": ("version.*big-endian", b"GGUF\0\0\0\3" + TINY[8:]),
    "version 0": ("version", _file(head=b"GGUF" + _u32(0))),
    "version 1": ("version.*got 1", _file(head=b"GGUF" + _u32(1))),
    "version 4": ("version.*got 4", _file(head=b"GGUF" + _u32(4))),
    "version 2^32-1": ("version", _file(head=b"GGUF" + _u32(2**32 - 1))),
    # counts
    "n_kv 2^31": ("n_kv", _file(n_kv=2**31)),
    "n_kv 2^62": ("n_kv", _file(n_kv=2**62)),
    "n_kv 2^64-1": ("n_kv", _file(n_kv=2**64 - 1)),
    "n_kv one too many": ("tensor name", _file(n_kv=len(KVS) + 1)),
    "n_kv one too few": ("dimensions of 'ids'", _file(n_kv=len(KVS) - 1)),
    "n_tensors 2^31": ("n_tensors", _file(n_tensors=2**31)),
    "n_tensors 2^62": ("n_tensors", _file(n_tensors=2**62)),
    "n_tensors 2^64-1": ("n_tensors", _file(n_tensors=2**64 - 1)),
    "n_tensors one too many": ("tensor name", _file(n_tensors=4)),
    "n_tensors one too few": ("file size", _file(n_tensors=2)),
    "n_tensors 0": ("file size", _file(n_tensors=0)),
    # keys
    "key of 0 bytes": ("key.*1 to 65535", _with(_kv("", U8, b"\1"))),
    "key of 65536 bytes": ("key.*65536 bytes", _with(_kv("k" * 65536, U8, b"\1"))),
    "key of 2^63 bytes": ("key", _with(_text(b"", 2**63))),
    "key of 2^64-1 bytes": ("key", _with(_text(b"", 2**64 - 1))),
    "key with NUL": (r"key 'a\\x00b'", _with(_kv("a\0b", U8, b"\1"))),
    "key that is not UTF-8": ("key b'.xff.*UTF-8", _with(_kv(b"\xff\xfe", U8, b"\1"))),
    "key that is half a surrogate": ("key.*UTF-8", _with(_kv(b"\xed\xa0\x80", U8, b"\1"))),
    "key twice": ("key 'n'.*twice", _with(_kv("n", U8, b"\1"))),
    # values
    "value type 13": ("type of 'v'.*got 13", _with(_kv("v", 13, b"\1"))),
    "value type 2^32-1": ("type of 'v'", _with(_kv("v", 2**32 - 1, b"\1"))),
    "element type 13": ("element type of 'v'", _with(_kv("v", ARRAY, _array(13, 1, b"\1")))),
    "array of arrays": (
        "v: .*array of arrays",
        _with(_kv("v", ARRAY, _array(ARRAY, 1, _array(U8, 1, b"\1")))),
    ),
    "array of arrays, 5000 deep": (
        "array of arrays",
        _with(_kv("v", ARRAY, _array(ARRAY, 1) * 5000)),
    ),
    "array of 2^40 numbers": ("length of 'v'", _with(_kv("v", ARRAY, _array(I32, 2**40)))),
    "array of 2^61 numbers": ("length of 'v'", _with(_kv("v", ARRAY, _array(U64, 2**61)))),
    "array of 2^62 numbers": ("length of 'v'", _with(_kv("v", ARRAY, _array(U32, 2**62)))),
    "array of 2^64-1 bytes": ("length of 'v'", _with(_kv("v", ARRAY, _array(U8, 2**64 - 1)))),
    "array of 2^40 strings": ("length of 'v'", _with(_kv("v", ARRAY, _array(STRING, 2**40)))),
    "array of 2^64-1 strings": (
        "length of 'v'",
        _with(_kv("v", ARRAY, _array(STRING, 2**64 - 1))),
    ),
    "array one longer than the file": (
        "length of 'v'",
        _file([_kv("v", ARRAY, _array(U8, 17, bytes(16)))], [], b"", alignment=1),
    ),
    "string of 2^63 bytes": ("v at byte", _with(_kv("v", STRING, _text(b"", 2**63)))),
    "string of 2^64-1 bytes": ("v at byte", _with(_kv("v", STRING, _text(b"", 2**64 - 1)))),
    "string one longer than the file": (
        "v at byte.*6 bytes, got 5 bytes left",
        _file([_kv("v", STRING, _text(b"12345", 6))], [], b"", alignment=1),
    ),
    "string in an array of 2^63 bytes": (
        "v at byte",
        _with(_kv("v", ARRAY, _array(STRING, 2, _text("a") + _text(b"", 2**63)))),
    ),
    "string with NUL": (
        "tokenizer.chat_template.*NUL",
        _with(_kv("tokenizer.chat_template", STRING, _text("seen\0by some readers only"))),
    ),
    "bool 2": ("v at byte.*bool", _with(_kv("v", BOOL, b"\2"))),
    "bool 255": ("v at byte.*bool", _with(_kv("v", BOOL, b"\xff"))),
    "bool 2 in an array": ("v: .*bools", _with(_kv("v", ARRAY, _array(BOOL, 3, b"\0\1\2")))),
    "architecture that is a number": (
        "general.architecture.*UINT32",
        _file([_kv("general.architecture", U32, _u32(1)), *KVS[1:]]),
    ),
    # alignment
    "alignment 0": ("general.alignment", _alignment(U32, _u32(0))),
    "alignment 1": ("general.alignment", _alignment(U32, _u32(1), 1)),
    "alignment 3": ("general.alignment", _alignment(U32, _u32(3), 3)),
    "alignment 8": ("general.alignment", _alignment(U32, _u32(8), 8)),
    "alignment 33": ("general.alignment", _alignment(U32, _u32(33), 33)),
    "alignment 2^17": ("general.alignment", _alignment(U32, _u32(2**17), 2**17)),
    "alignment 2^31": ("general.alignment", _alignment(U32, _u32(2**31))),
    "alignment as a string": ("general.alignment.*STRING", _alignment(STRING, _text("32"))),
    "alignment as u64": ("general.alignment.*UINT64", _alignment(U64, struct.pack("<Q", 32))),
    "alignment as i32": ("general.alignment.*INT32", _alignment(I32, _u32(32))),
    "alignment as f32": ("general.alignment.*FLOAT32", _alignment(F32, struct.pack("<f", 32))),
    "alignment as bool": ("general.alignment.*BOOL", _alignment(BOOL, b"\1", 1)),
    "alignment as an array": ("general.alignment", _alignment(ARRAY, _array(U32, 1, _u32(32)))),
    # tensor names
    "tensor name of 0 bytes": ("tensor name.*1 to 63", _one(_info(""))),
    "tensor name of 64 bytes": ("tensor name.*64 bytes", _one(_info("n" * 64))),
    "tensor name of 2^63 bytes": ("tensor name", _one(_text(b"", 2**63) + bytes(60))),
    "tensor name with NUL": ("tensor name.*NUL", _one(_info("a\0b"))),
    "tensor name that is not UTF-8": ("tensor name.*UTF-8", _one(_info(b"\xc3\x28"))),
    "tensor name twice": ("tensor 'a'.*twice", _file(infos=[INFOS[0], _info("a", (32,), 2, 64)])),
    # tensor shapes
    "no dimensions": ("dimensions of 'a'.*got 0", _one(_info(extents=()))),
    "5 dimensions": ("dimensions of 'a'.*got 5", _one(_info(extents=(16, 1, 1, 1, 1)))),
    "2^32-1 dimensions": ("dimensions of 'a'", _one(_info(n_dims=2**32 - 1))),
    "an extent of 0": ("shape of 'a'", _one(_info(extents=(8, 0)), b"")),
    "extents 2^32 x 2^32": ("file size", _one(_info(extents=(2**32, 2**32)), b"")),
    "extents 2^31 x 2^31": ("file size", _one(_info(extents=(2**31, 2**31)))),
    "extents whose bytes wrap to 4 MiB": (
        "file size",
        _one(_info(extents=(4194305, 4194305, 211106198978564)), bytes(4 << 20)),
    ),
    "extents 2^64-1, four times": ("file size", _one(_info(extents=(2**64 - 1,) * 4))),
    "rows that are not whole blocks": ("shape of 'a'.*32 for Q4_0", _one(_info(type=2))),
    "sizes that wrap when summed": (
        "offset of 'b'|file size",
        _file(infos=[_info(extents=(2**62,)), _info("b", (16,), 0, 0)], data=bytes(64)),
    ),
    # tensor types
    "type 4, which was removed": ("type of 'a'.*got 4", _one(_info(type=4))),
    "type 31, which was removed": ("type of 'a'.*got 31", _one(_info(type=31))),
    "type 1000": ("type of 'a'.*got 1000", _one(_info(type=1000))),
    "type 2^31": ("type of 'a'", _one(_info(type=2**31))),
    "type 2^32-1": ("type of 'a'", _one(_info(type=2**32 - 1))),
    "F16 that is F32": ("offset of 'b'", _file(infos=[_info(type=1), *INFOS[1:]])),
    "F64 that is F32": ("offset of 'b'", _file(infos=[_info(type=28), *INFOS[1:]])),
    # where tensors are
    "first offset not 0": ("offset of 'a'", _one(_info(offset=32), bytes(96))),
    "offset past the end": ("offset of 'c'", _file(infos=[*INFOS[:2], _info("c", (4,), 0, 2**40)])),
    "offset that wraps into the header": (
        "offset of 'c'",
        _file(infos=[*INFOS[:2], _info("c", (4,), 0, 2**64 - 512)]),
    ),
    "overlap": ("offset of 'b'", _file(infos=[INFOS[0], _info("b", (32,), 2, 32), INFOS[2]])),
    "the same offset": ("offset of 'b'", _file(infos=[INFOS[0], _info("b", (32,), 2, 0)])),
    "swapped": ("offset of 'b'", _file(infos=[INFOS[1], INFOS[0], INFOS[2]])),
    "a gap": ("offset of 'c'", _file(infos=[*INFOS[:2], _info("c", (4,), 0, 128)], data=bytes(160))),
    "unaligned": ("offset of 'c'", _file(infos=[*INFOS[:2], _info("c", (4,), 0, 82)])),
    "no data": ("file size", _file(data=b"")),
    "half of the data": ("file size", _file(data=DATA[:64])),
    "one byte of data too few": ("file size", _file(data=DATA[: 96 + 15])),
    "one byte after the padding": ("file size", _file(data=DATA + b"\0")),
    "a block after the padding": ("file size", _file(data=DATA + bytes(32))),
    "a megabyte after the padding": ("file size", _file(data=DATA + bytes(1 << 20))),
    "data without tensors": ("file size", _file(infos=[])),
}  # fmt: skip


def _refusal(path: Path, read: Callable[[Path], Any] = read_gguf) -> str:
    """The message; checked to come soon, and without much having been allocated."""
    tracemalloc.start()
    try:
        start = time.monotonic()
        with pytest.raises(FormatError) as caught:
            read(path)
        seconds = time.monotonic() - start
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < MAX_SECONDS
    assert peak < MAX_PEAK_BYTES
    problem = caught.value.problems[0]
    assert problem.where
    assert problem.field
    assert problem.expected
    assert problem.got
    assert problem.fix
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(path))
    assert str(caught.value).replace("\n", "").isprintable()
    return str(caught.value)


def test_the_file_that_the_hostile_ones_vary_is_good(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(TINY)
    found = _assert_same_as_gguf_py(path)
    assert found.get("tokens") == ("one", "", "three")
    assert found.get("ids") == (-1, 2)
    assert read_tensor_bytes(found.tensors["c"]) == DATA[96:112]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once_and_by_name(tmp_path: Path, name: str) -> None:
    field, data = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    message = _refusal(path)
    assert re.search(field, message), message


def _link(path: Path) -> None:
    (path.parent / "real.gguf").write_bytes(TINY)
    path.symlink_to("real.gguf")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NOT_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing": ("No such file", lambda path: None),
    "symbolic link": ("symbolic link", _link),
    "dangling link": ("symbolic link", lambda path: path.symlink_to("nowhere")),
    "loop of links": ("symbolic link", lambda path: path.symlink_to(path.name)),
    "FIFO": ("regular file", os.mkfifo),
    "directory": ("regular file", os.mkdir),
    "socket": ("regular file", _socket),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", NOT_FILES)
def test_what_is_not_a_file_is_refused_and_does_not_block(tmp_path: Path, name: str) -> None:
    reason, make = NOT_FILES[name]
    path = tmp_path / "x.gguf"
    make(path)
    assert reason in _refusal(path, lambda path: read_gguf(path, follow_symlinks=False))


def test_a_link_that_the_user_named_is_followed(tmp_path: Path) -> None:
    _link(tmp_path / "x.gguf")
    assert read_gguf(tmp_path / "x.gguf").tensors


def test_a_header_that_claims_a_sparse_file_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(_file([_kv("v", ARRAY, _array(U8, 2**33))], []))
    os.truncate(path, 2**34)
    assert "length of 'v'" in _refusal(path)
    path.write_bytes(_file([_kv("v", STRING, _text(b"", 2**33))], []))
    os.truncate(path, 2**34)
    assert "that a header may take" in _refusal(path)


def test_a_message_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(_with(_kv("\x1b[2J\u202e\n", BOOL, b"\2")))
    message = _refusal(path)
    assert r"\x1b[2J\u202e\n" in message


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    whole = len(TINY) - 16  # the padding of the last tensor may be missing
    for cut in range(whole):
        path.write_bytes(TINY[:cut])
        with pytest.raises(FormatError, match=r"x\.gguf"):
            read_gguf(path)
    path.write_bytes(TINY[:whole])
    assert read_gguf(path).tensors


def _encode(found: GGUFFile) -> bytes:
    tensors = [(info.name, info.shape, info.type) for info in found.tensors.values()]
    return encode_header(found.metadata, tensors, found.alignment)[0]


@pytest.mark.timeout(60)
def test_any_changed_byte_of_a_header_is_refused_or_read_as_what_it_says(tmp_path: Path) -> None:
    """What is accepted encodes to the changed bytes: nothing was skipped, guessed or clamped."""
    path = tmp_path / "x.gguf"
    refused = accepted = 0
    for at in range(HEADER_BYTES):
        for value in {TINY[at] ^ 1, TINY[at] ^ 0x80, TINY[at] ^ 0xFF, 0} - {TINY[at]}:
            changed = TINY[:at] + bytes([value]) + TINY[at + 1 :]
            path.write_bytes(changed)
            try:
                found = read_gguf(path)
            except FormatError:
                refused += 1
                continue
            accepted += 1
            header = _encode(found)
            assert header[:4] + header[8:] == changed[:4] + changed[8 : len(header)], (at, value)
            assert found.version == changed[4]
    assert refused > 500
    assert accepted > 100  # of these only a digest can tell


# --- what is written is what is read ---------------------------------------------------------------

_INTEGERS = {
    ValueType.UINT8: (0, 2**8 - 1), ValueType.INT8: (-(2**7), 2**7 - 1),
    ValueType.UINT16: (0, 2**16 - 1), ValueType.INT16: (-(2**15), 2**15 - 1),
    ValueType.UINT32: (0, 2**32 - 1), ValueType.INT32: (-(2**31), 2**31 - 1),
    ValueType.UINT64: (0, 2**64 - 1), ValueType.INT64: (-(2**63), 2**63 - 1),
}  # fmt: skip
_TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
_SCALARS: dict[ValueType, st.SearchStrategy[Any]] = {
    **{type: st.integers(low, high) for type, (low, high) in _INTEGERS.items()},
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.FLOAT64: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.STRING: _TEXTS,
}
_NAMES = _TEXTS.filter(lambda name: 0 < len(name.encode()) <= 63)
_KEYS = _NAMES.filter(lambda key: key not in ("general.alignment", "general.architecture"))


@st.composite
def _values(draw: st.DrawFn) -> Value:
    type = draw(st.sampled_from(list(_SCALARS)))
    if draw(st.booleans()):
        return Value(type, draw(_SCALARS[type]))
    return Value(ValueType.ARRAY, tuple(draw(st.lists(_SCALARS[type], max_size=5))), type)


@st.composite
def _tensors(draw: st.DrawFn, name: str) -> OutTensor:
    type = draw(st.sampled_from(list(GGMLType)))
    outer = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (*outer, draw(st.integers(1, 3)) * type_traits(type)[0])
    size = nbytes(shape, type)
    return OutTensor(name, shape, type, draw(st.binary(min_size=1, max_size=1)) * size)


@st.composite
def _models(draw: st.DrawFn) -> tuple[dict[str, Value], list[OutTensor]]:
    metadata = draw(st.dictionaries(_KEYS, _values(), max_size=6))
    if draw(st.booleans()):
        metadata["general.alignment"] = Value(
            ValueType.UINT32, draw(st.sampled_from([32, 64, 128]))
        )
    names = draw(st.lists(_NAMES, max_size=4, unique=True))
    return metadata, [draw(_tensors(name)) for name in names]


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(model=_models())
def test_what_is_written_is_what_is_read(
    tmp_path: Path, model: tuple[dict[str, Value], list[OutTensor]]
) -> None:
    metadata, tensors = model
    path = tmp_path / "x.gguf"
    path.unlink(missing_ok=True)
    write_gguf(path, metadata, tensors)
    found = read_gguf(path)
    assert list(found.metadata.items()) == list(metadata.items())
    assert [(i.name, i.shape, i.type) for i in found.tensors.values()] == [
        (tensor.name, tensor.shape, tensor.type) for tensor in tensors
    ]
    for tensor in tensors:
        assert read_tensor_bytes(found.tensors[tensor.name]) == tensor.source


# --- shards ----------------------------------------------------------------------------------------


def _shards(folder: Path, n_tensors: int = 5, **options: Any) -> list[Path]:
    options = {"split_max_tensors": 2, **options}
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama", **options)
    writer.add_string("general.name", "shards")
    for index in range(n_tensors):
        writer.add_tensor(f"t{index}", np.full((2, 8), index, np.float32))
    _finish(writer)
    return sorted(folder.glob("x-*.gguf"))


@pytest.mark.parametrize("small_first_shard", [False, True])
def test_shards_are_read_as_one_model(tmp_path: Path, small_first_shard: bool) -> None:
    paths = _shards(tmp_path, small_first_shard=small_first_shard)
    model = open_model(paths[0])
    assert [shard.path for shard in model.shards] == paths
    assert len(paths) == 3 + small_first_shard
    assert model.get("general.name") == "shards"
    assert list(model.tensors) == [f"t{index}" for index in range(5)]
    for path in paths:
        _assert_same_as_gguf_py(path)
    for index, info in enumerate(model.tensors.values()):
        assert read_tensor_bytes(info) == np.full((2, 8), index, np.float32).tobytes()


def test_a_file_without_split_keys_is_a_model_of_one_shard(tmp_path: Path) -> None:
    path = tmp_path / "x-00002-of-00007.gguf"  # the name alone says nothing
    path.write_bytes(TINY)
    assert len(open_model(path).shards) == 1


def _rewrite(
    path: Path,
    change: Callable[[dict[str, Value]], object] = lambda metadata: None,
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Writes a shard again with other metadata or tensor names."""
    found = read_gguf(path)
    metadata = dict(found.metadata)
    change(metadata)
    tensors = [
        OutTensor(rename(i.name), i.shape, i.type, read_tensor_bytes(i))
        for i in found.tensors.values()
    ]
    path.unlink()
    write_gguf(path, metadata, tensors)


def _set(key: str, value: Any, type: ValueType = ValueType.UINT16) -> Callable[[Path], None]:
    return lambda path: _rewrite(path, lambda metadata: metadata.update({key: Value(type, value)}))


def _drop(key: str) -> Callable[[Path], None]:
    return lambda path: _rewrite(path, lambda metadata: metadata.pop(key))


# name -> (what the message must name, which shard, what is done to it)
BAD_SHARDS: dict[str, tuple[str, int, Callable[[Path], object]]] = {
    "second shard missing": ("00002-of-00003.gguf: shard", 1, Path.unlink),
    "last shard missing": ("00003-of-00003.gguf: shard", 2, Path.unlink),
    "second shard dangling": (
        "00002-of-00003.gguf: shard",
        1,
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
    ),
    "second shard a directory": (
        "regular file",
        1,
        lambda path: (path.unlink(), path.mkdir()),
    ),
    "second shard cut": ("00002-of.*file size", 1, lambda path: os.truncate(path, 200)),
    "split.count too large": ("split.count", 0, _set("split.count", 4)),
    "split.count too small": ("split.count", 0, _set("split.count", 2)),
    "split.count 65535": ("split.count", 0, _set("split.count", 65535)),
    "split.count negative": ("split.count", 0, _set("split.count", -3, ValueType.INT32)),
    "split.count 3.0": ("split.count", 0, _set("split.count", 3.0, ValueType.FLOAT32)),
    "split.count as text": ("split.count", 0, _set("split.count", "3", ValueType.STRING)),
    "split.count wrong in the second": ("00002.*split.count", 1, _set("split.count", 4)),
    "split.count missing in the second": ("00002.*split.count", 1, _drop("split.count")),
    "split.no wrong in the first": ("split.no", 0, _set("split.no", 1)),
    "split.no missing in the first": ("split.no", 0, _drop("split.no")),
    "split.no wrong in the second": ("00002.*split.no", 1, _set("split.no", 2)),
    "split.no missing in the second": ("00002.*split.no", 1, _drop("split.no")),
    "split.tensors.count too large": (
        "split.tensors.count.*got 6",
        0,
        _set("split.tensors.count", 6, ValueType.INT32),
    ),
    "split.tensors.count missing": ("split.tensors.count", 0, _drop("split.tensors.count")),
    "a tensor in two shards": (
        "tensor 't0'",
        2,
        lambda path: _rewrite(path, rename=lambda name: "t0"),
    ),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_shards_that_contradict_each_other_are_refused(tmp_path: Path, name: str) -> None:
    field, index, damage = BAD_SHARDS[name]
    paths = _shards(tmp_path)
    damage(paths[index])
    with pytest.raises(FormatError) as caught:
        open_model(paths[0])
    assert re.search(field, str(caught.value)), caught.value
    assert all(problem.fix for problem in caught.value.problems)


def test_shards_that_changed_places_are_refused(tmp_path: Path) -> None:
    paths = _shards(tmp_path, 6)
    os.rename(paths[1], tmp_path / "held")
    os.rename(paths[2], paths[1])
    os.rename(tmp_path / "held", paths[2])
    with pytest.raises(FormatError) as caught:
        open_model(paths[0])
    assert [problem.field for problem in caught.value.problems] == ["split.no"] * 2


def test_a_model_is_opened_by_its_first_shard_only(tmp_path: Path) -> None:
    paths = _shards(tmp_path)
    with pytest.raises(FormatError, match=r"(?s)split\.no.*pass x-00001-of-00003\.gguf"):
        open_model(paths[1])
    paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="restore the name"):
        open_model(tmp_path / "model.gguf")


# --- data ------------------------------------------------------------------------------------------


def _shortened(tmp_path: Path) -> TensorInfo:
    path = tmp_path / "x.gguf"
    path.write_bytes(TINY)
    info = read_gguf(path).tensors["c"]
    os.truncate(path, info.offset + info.nbytes - 1)
    return info


@pytest.mark.parametrize("read", [read_tensor_bytes, map_tensor])
def test_a_file_that_became_shorter_is_noticed(
    tmp_path: Path, read: Callable[[TensorInfo], Any]
) -> None:
    with pytest.raises(FormatError, match="c: expected 16 bytes, got 15 bytes"):
        read(_shortened(tmp_path))


def test_a_mapped_tensor_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(TINY)
    mapped = map_tensor(read_gguf(tmp_path / "x.gguf").tensors["a"])
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
