"""Files that are small on disk and would be large in memory: refused, or read, in 64 MiB and 2 seconds.

Each reader runs in a process of its own, whose address space may grow by 64 MiB after the imports, and
whose processor time is limited. The bombs of safetensors are in test_safetensors_reader.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_gguf_hostile import (
    ARRAY,
    BOOL,
    F32,
    I32,
    KVS,
    STRING,
    U8,
    _array,
    _file,
    _info,
    _kv,
    _text,
)
from test_onnx_file import PLAIN, field

MIB = 1 << 20
PROGRAM = """
import os, resource, sys
from pathlib import Path
from safegene_converter.inputs.safetensors_reader import read_safetensors
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.errors import FormatError
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.onnx.file import read_onnx

READERS = {
    "gguf": read_gguf,
    "onnx": read_onnx,
    "json": strictjson.load,
    "manifest": lambda path: Manifest.from_json(path.read_bytes(), str(path)),
}


def measure(kind, path):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (4, 4))
    try:
        READERS[kind](path)
        said = "read"
    except FormatError as error:
        said = f"refused {len(error.problems)} {str(error).splitlines()[0][:300]}"
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, said, flush=True)


for line in sys.stdin:
    kind, path = line.split()
    child = os.fork()
    if not child:
        try:
            measure(kind, Path(path))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    print(f"end {status}", flush=True)
"""


@pytest.fixture(scope="module")
def reading() -> Iterator[subprocess.Popen[str]]:
    """A process that reads one file after the other, each in a fork with limits."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as child:  # fmt: skip
        yield child
        child.kill()


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def message(number: int, payload: bytes) -> bytes:
    return field(number, 2, varint(len(payload)) + payload)


def many(n_kv: int, n_tensors: int) -> bytes:
    """So many keys of one byte, and tensors of 4 bytes."""
    keys = [_kv(f"{n:x}", U8, b"\1") for n in range(n_kv)]
    infos = [_info(f"{n:x}", (1,), 0, 32 * n) for n in range(n_tensors)]
    return _file(keys, infos, bytes(32 * n_tensors))


def values(*kvs: bytes) -> Callable[[], bytes]:
    return lambda: _file((*KVS, *kvs), [], b"", alignment=1)


def graph(number: int, payload: bytes, count: int) -> Callable[[], bytes]:
    """A model whose graph has one field so many times."""
    return lambda: field(1, 0, b"\x0a") + message(7, message(number, payload) * count)


def in_attribute(payload: bytes) -> Callable[[], bytes]:
    attribute = message(1, b"a") + payload
    return graph(1, message(4, b"Op") + message(5, attribute), 1)


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "16 Mi numbers of one byte": ("gguf", values(_kv("v", ARRAY, _array(U8, 16 * MIB, bytes(16 * MIB))))),
    "4 Mi integers": (
        "gguf", values(_kv("v", ARRAY, _array(I32, 4 * MIB, b"\x12\x34\x56\x12" * (4 * MIB)))),
    ),
    "4 Mi floats": ("gguf", values(_kv("v", ARRAY, _array(F32, 4 * MIB, b"\1\2\3\4" * (4 * MIB))))),
    "16 Mi bools": ("gguf", values(_kv("v", ARRAY, _array(BOOL, 16 * MIB, bytes(16 * MIB))))),
    "16 arrays of 1 Mi numbers": (
        "gguf", values(*(_kv(f"v{n}", ARRAY, _array(U8, MIB, bytes(MIB))) for n in range(16))),
    ),
    "2 Mi empty strings": ("gguf", values(_kv("v", ARRAY, _array(STRING, 2 * MIB, bytes(16 * MIB))))),
    "a string of 16 MiB": ("gguf", values(_kv("v", STRING, _text(b"x" * (16 * MIB))))),
    "a string of 16 MiB that is not UTF-8": (
        "gguf", values(_kv("v", STRING, _text(b"\xff" * (16 * MIB)))),
    ),
    "200,000 keys": ("gguf", lambda: many(200_000, 0)),
    "100,000 tensors": ("gguf", lambda: many(0, 100_000)),
    "counts of 2^31 in a sparse file": ("gguf", lambda: b"GGUF\3\0\0\0" + (2**31).to_bytes(8, "little") * 2),
    "8 Mi empty messages": ("onnx", graph(1, b"", 8 * MIB)),
    "nodes without a name": ("onnx", graph(1, message(4, b"A"), 3 * MIB)),
    "nodes with outputs": (
        "onnx", lambda: field(1, 0, b"\x0a") + message(
            7, b"".join(message(1, message(4, b"A") + message(2, b"%x" % n)) for n in range(200_000))
        ),
    ),
    "inputs": (
        "onnx", lambda: field(1, 0, b"\x0a") + message(
            7, b"".join(message(11, message(1, b"%x" % n)) for n in range(200_000))
        ),
    ),
    "initializers": (
        "onnx", lambda: field(1, 0, b"\x0a") + message(7, b"".join(
            message(5, field(1, 0, b"\1") + field(2, 0, b"\2") + message(8, b"%x" % n)
                    + message(9, b"\0")) for n in range(200_000)
        )),
    ),
    "numbers of an attribute": ("onnx", in_attribute(message(8, bytes(16 * MIB)) + field(20, 0, b"\7"))),
    "floats of an attribute": ("onnx", in_attribute(message(7, bytes(16 * MIB)) + field(20, 0, b"\6"))),
    "strings of an attribute": ("onnx", in_attribute(message(9, b"") * (8 * MIB) + field(20, 0, b"\10"))),
    "typed numbers of a tensor": (
        "onnx", graph(5, message(8, b"t") + field(2, 0, b"\7") + field(1, 0, varint(16 * MIB))
                      + message(7, bytes(16 * MIB)), 1),
    ),
    "extents of a tensor": ("onnx", graph(5, message(8, b"t") + message(1, b"\1" * (16 * MIB)), 1)),
    "metadata": (
        "onnx", lambda: PLAIN + b"".join(
            message(14, message(1, b"%x" % n) + message(2, b"")) for n in range(60_000)
        ),
    ),
    "graphs in graphs": ("onnx", lambda: _nested(2000)),
    "lists": ("json", lambda: b"[" + b"[]," * (5 * MIB) + b"0]"),
    "lists in lists": ("json", lambda: b"[" * (16 * MIB)),
    "objects": ("json", lambda: b"[" + b"{}," * (5 * MIB) + b"0]"),
    "keys": ("json", lambda: b"{" + b",".join(b'"%x":0' % n for n in range(900_000)) + b"}"),
    "a number of 16 Mi digits": ("json", lambda: b"9" * (16 * MIB)),
    "one wide letter in 16 MiB": ("json", lambda: b'"' + b"x" * (15 * MIB) + "\U0001f600".encode() + b'"'),
    "files of a manifest": (
        "manifest", lambda: json.dumps({"format_version": 1, "files": [{}] * 2 * MIB}).encode(),
    ),
    "unknown keys of a manifest": (
        "manifest", lambda: json.dumps({f"{n:x}": 0 for n in range(90_000)}).encode(),
    ),
}  # fmt: skip


def _nested(depth: int) -> bytes:
    inner = b""
    for _ in range(depth):
        attribute = message(1, b"b") + message(6, inner) + field(20, 0, b"\5")
        inner = message(1, message(4, b"If") + message(5, attribute))
    return field(1, 0, b"\x0a") + message(7, inner)


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_costs_64_mib_and_2_seconds(
    case: str, reading: subprocess.Popen[str], tmp_path: Path
) -> None:
    kind, make = BOMBS[case]
    path = tmp_path / "bomb"
    path.write_bytes(make())
    if "sparse" in case:
        os.truncate(path, 1 << 40)
    assert reading.stdin is not None
    assert reading.stdout is not None
    print(kind, path, file=reading.stdin, flush=True)
    answer = ""
    while not answer.rpartition("\n")[2].startswith("end "):
        line = reading.stdout.readline()
        assert line, answer
        answer = (answer + "\n" + line.rstrip("\n")).strip()
    path.unlink()
    assert answer.endswith("\nend 0"), answer
    seconds, said, *rest = answer.split()
    assert float(seconds) < 2, answer
    if said != "read":
        assert str(path) in answer
        assert 1 <= int(rest[0]) <= 1000


def test_there_are_enough_bombs() -> None:
    assert len(BOMBS) >= 20
