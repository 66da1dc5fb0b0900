"""The strict GGUF reader against a table of files that are not what they say."""

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

import pytest

from safegene_converter.gguf.writer import encode_header
from safegene_runtime.errors import FormatError
from safegene_runtime.formats.gguf.header import GGUFFile, read_gguf

MAX_SECONDS = 1.0
MAX_PEAK_BYTES = 4 << 20


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


def refusal(path: Path, read: Callable[[Path], Any] = read_gguf) -> str:
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


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once_and_by_name(tmp_path: Path, name: str) -> None:
    field, data = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    message = refusal(path)
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
    assert reason in refusal(path, lambda path: read_gguf(path, follow_symlinks=False))


def test_a_link_that_the_user_named_is_followed(tmp_path: Path) -> None:
    _link(tmp_path / "x.gguf")
    assert read_gguf(tmp_path / "x.gguf").tensors


def test_a_header_that_claims_a_sparse_file_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(_file([_kv("v", ARRAY, _array(U8, 2**33))], []))
    os.truncate(path, 2**34)
    assert "length of 'v'" in refusal(path)
    path.write_bytes(_file([_kv("v", STRING, _text(b"", 2**33))], []))
    os.truncate(path, 2**34)
    assert "that a header may take" in refusal(path)


def test_a_message_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(_with(_kv("\x1b[2J\u202e\n", BOOL, b"\2")))
    message = refusal(path)
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
