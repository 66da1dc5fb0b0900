"""Strict safetensors: what the library writes is read alike; what is ambiguous is refused."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.numpy import load
from safetensors.torch import load_file, save_file

from safegene_converter.inputs.safetensors_reader import MAX_HEADER_BYTES, read_safetensors
from safegene_runtime.errors import FormatError


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = file_of({"a": entry(), "b": entry(8, 16)}, bytes(16))


def test_every_float_type_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        f"{dtype}-{index}".replace("torch.", ""): (torch.randn(shape) * 10).to(dtype)
        for index, shape in enumerate([(3, 5), (1,), (2, 3, 4), ()])
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    for data in (None, path.read_bytes()):
        found = read_safetensors(path, data)
        assert found.tensors.keys() == tensors.keys()
        for name, tensor in load_file(path).items():
            assert found.tensors[name].shape == tuple(tensor.shape)
            assert (found.read_float32(name) == tensor.to(torch.float32).numpy()).all()


def test_integers_are_listed_and_not_read_as_floats(tmp_path: Path) -> None:
    save_file({"i": torch.arange(4), "m": torch.ones(3, dtype=torch.bool)}, tmp_path / "x")
    found = read_safetensors(tmp_path / "x")
    assert {name: info.dtype for name, info in found.tensors.items()} == {"i": "I64", "m": "BOOL"}
    with pytest.raises(FormatError, match="float type"):
        found.read_float32("i")


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x00" * 7,
    "no header": (0).to_bytes(8, "little"),
    "header length 2^63": file_of({"a": entry()}, bytes(8), 1 << 63),
    "header length past the end": file_of({"a": entry()}, b"", 10_000),
    "header length over the cap": file_of(b"{" + b" " * 64, b"", MAX_HEADER_BYTES + 1),
    "not JSON": file_of(b"{a: 1}"),
    "a list": file_of([]),
    "leading space": file_of(b" {}"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "NaN": file_of(b'{"a": NaN}'),
    "deep": file_of(b'{"a":' + b"[" * 50_000),
    "duplicate name": file_of(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', bytes(16)),
    "duplicate field": file_of(
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "overlap": file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "the same bytes twice": file_of({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "hole": file_of({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "hole at the start": file_of({"a": entry(8, 16)}, bytes(16)),
    "trailing bytes": GOOD + b"\x00",
    "truncated": GOOD[:-1],
    "unknown dtype": file_of({"a": entry(dtype="F33")}, bytes(8)),
    "dtype a number": file_of({"a": {**entry(), "dtype": 3}}, bytes(8)),
    "wrong length": file_of({"a": entry(0, 8, (3,))}, bytes(8)),
    "negative shape": file_of({"a": entry(0, 8, (-2,))}, bytes(8)),
    "true in shape": file_of({"a": entry(0, 4, (True,))}, bytes(4)),
    "float in shape": file_of({"a": entry(0, 8, (2.0,))}, bytes(8)),
    "huge shape": file_of({"a": entry(0, 8, (1 << 40, 1 << 40))}, bytes(8)),
    "too many dimensions": file_of({"a": entry(0, 4, (1,) * 9)}, bytes(4)),
    "negative offsets": file_of({"a": entry(-8, 0)}, bytes(8)),
    "reversed offsets": file_of({"a": entry(8, 0)}, bytes(8)),
    "one offset": file_of({"a": {**entry(), "data_offsets": [0]}}, bytes(8)),
    "missing field": file_of({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "unknown field": file_of({"a": {**entry(), "checksum": 1}}, bytes(8)),
    "entry a list": file_of({"a": [1]}),
    "dtype a list": file_of({"a": {**entry(), "dtype": ["F32"]}}, bytes(8)),
    "dtype null": file_of({"a": {**entry(), "dtype": None}}, bytes(8)),
    "dtype in small letters": file_of({"a": entry(dtype="f32")}, bytes(8)),
    "empty dtype": file_of({"a": entry(dtype="")}, bytes(8)),
    "shape a number": file_of({"a": {**entry(), "shape": 2}}, bytes(8)),
    "shape a text": file_of({"a": {**entry(), "shape": "2"}}, bytes(8)),
    "shape null": file_of({"a": {**entry(), "shape": None}}, bytes(8)),
    "shape of shapes": file_of({"a": {**entry(), "shape": [[2]]}}, bytes(8)),
    "shape of 2^63": file_of({"a": entry(0, 8, (1 << 63,))}, bytes(8)),
    "shape of 400 digits": file_of({"a": entry(0, 8, (10**400,))}, bytes(8)),
    "sizes that wrap around 2^64": file_of({"a": entry(0, 8, (1 << 33, 1 << 31, 2))}, bytes(8)),
    "a size of 0 with bytes": file_of({"a": entry(0, 8, (0, 2))}, bytes(8)),
    "four bits that fill no byte": file_of({"a": entry(0, 1, (1,), "F4")}, bytes(1)),
    "offsets null": file_of({"a": {**entry(), "data_offsets": None}}, bytes(8)),
    "three offsets": file_of({"a": {**entry(), "data_offsets": [0, 4, 8]}}, bytes(8)),
    "offsets of floats": file_of({"a": {**entry(), "data_offsets": [0.0, 8.0]}}, bytes(8)),
    "offsets of texts": file_of({"a": {**entry(), "data_offsets": ["0", "8"]}}, bytes(8)),
    "offsets past the end": file_of({"a": entry(0, 8), "b": entry(8, 16)}, bytes(8)),
    "offsets of 2^63": file_of({"a": entry(1 << 63, (1 << 63) + 8)}, bytes(8)),
    "offsets that count the header": file_of({"a": entry(60, 68)}, bytes(8)),
    "entry null": file_of({"a": None}),
    "metadata a list": file_of({"__metadata__": [], "a": entry()}, bytes(8)),
    "metadata null": file_of({"__metadata__": None, "a": entry()}, bytes(8)),
    "metadata twice": file_of(b'{"__metadata__": {}, "__metadata__": {}}'),
    "text after the header": file_of(b'{} {}'),
    "half a surrogate pair as a name": file_of(b'{"\\ud800": 1}'),
    "an infinite number": file_of(b'{"a": 1e999}'),
    "a number of 5000 digits": file_of(b'{"a": ' + b"9" * 5000 + b"}"),
    "a GGUF": b"GGUF\x03\x00\x00\x00" + bytes(64),
    "a zip": b"PK\x03\x04" + bytes(64),
    "only zeros": bytes(64),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os",
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("whole", [False, True], ids=["by path", "by bytes"])
def test_a_malformed_file_is_one_typed_error(case: str, whole: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(FormatError) as caught:
        read_safetensors(path, HOSTILE[case] if whole else None)
    assert str(path) in str(caught.value)


REPRO = tiny.REPOSITORY.parent / "shared" / "repro" / "safetensors_dtype_list.safetensors"


@pytest.mark.skipif(not REPRO.exists(), reason=f"{REPRO} is not here")
def test_the_file_that_once_ended_in_a_traceback_is_one_typed_error() -> None:
    with pytest.raises(FormatError, match="dtype"):
        read_safetensors(REPRO)


JSON: dict[str, Any] = {
    "null": None, "true": True, "false": False, "zero": 0, "an integer": 7, "below zero": -1,
    "a large integer": 10**400, "a fraction": 0.5, "an empty text": "", "a text": "F32",
    "an empty list": [], "a list": [8, 16], "a list of lists": [[0, 8]], "an empty object": {},
    "an object": {"a": 1}, "deep": [[[[{"a": [None]}]]]],
}  # fmt: skip
PLACES: dict[str, Callable[[Any], Any]] = {
    "the header": lambda value: value,
    "an entry": lambda value: {"a": entry(), "b": value},
    "dtype": lambda value: {"a": entry(), "b": {**entry(8, 16), "dtype": value}},
    "shape": lambda value: {"a": entry(), "b": {**entry(8, 16), "shape": value}},
    "a size": lambda value: {"a": entry(), "b": entry(8, 16, (value,))},
    "data_offsets": lambda value: {"a": entry(), "b": {**entry(), "data_offsets": value}},
    "an offset": lambda value: {"a": entry(), "b": entry(8, value)},
    "metadata": lambda value: {"__metadata__": value, "a": entry(), "b": entry(8, 16)},
    "a value of metadata": lambda value: {
        "__metadata__": {"x": value}, "a": entry(), "b": entry(8, 16),
    },
    "a field more": lambda value: {"a": entry(), "b": {**entry(8, 16), "x": value}},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", JSON)
def test_any_json_in_any_place_of_the_header_is_read_or_one_typed_error(
    kind: str, place: str, tmp_path: Path
) -> None:
    """What is read, the safetensors library reads, too."""
    data = file_of(PLACES[place](JSON[kind]), bytes(16))
    try:
        found = read_safetensors(tmp_path / "x", data)
    except FormatError:
        return
    assert {name: info.shape for name, info in found.tensors.items()} == {
        name: tuple(value.shape) for name, value in load(data).items()
    }


def test_there_are_enough_malformed_classes() -> None:
    assert len({*HOSTILE.values()}) >= 40


BOMBS: dict[str, bytes] = {
    "empty lists": b'{"a":[' + b"[]," * 5_500_000 + b"0]}",
    "lists of objects": b'{"a":[' + b"[{}]," * 700_000 + b"0]}",
    "names": b"{" + b",".join(b'"%x":0' % n for n in range(1_500_000)) + b"}",
    "tensors without bytes": b"{"
    + b",".join(b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(60_000))
    + b"}",
    "tensors at one place": b"{"
    + b",".join(b'"%x":{"dtype":"F32","shape":[],"data_offsets":[0,4]}' % n for n in range(49_000))
    + b"}",
    "metadata": b'{"__metadata__":{' + b",".join(b'"%x":""' % n for n in range(700_000)) + b"}}",
    "one text": b'{"a":"' + b"x" * (MAX_HEADER_BYTES - 16) + b'"}',
    "one text of wide letters": b'{"a":"' + "\U0001f600".encode() * 4_000_000 + b'"}',
    "a long header that is not there": b"",
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_header_bomb_is_one_typed_error_in_64_mib_and_2_seconds(
    case: str, tmp_path: Path
) -> None:
    """64 MiB of address space besides what the imports take, seconds of processor time."""
    path = tmp_path / "x.safetensors"
    mebibytes = "64" if BOMBS[case] else "8"  # less than the header claims
    path.write_bytes(file_of(BOMBS[case], length=None if BOMBS[case] else MAX_HEADER_BYTES))
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from safegene_converter.inputs.safetensors_reader import read_safetensors\n"
        "from safegene_runtime.errors import FormatError\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (int(sys.argv[2]) << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "limit = int(used.ru_utime + used.ru_stime) + 3\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))\n"
        "try:\n    read_safetensors(Path(sys.argv[1]))\n"
        "except FormatError as error:\n    print(len(error.problems), error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), mebibytes], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, _, words = done.stdout.partition(" ")
    assert 1 <= int(count) <= 100
    if case in ("empty lists", "names", "metadata"):  # before they take memory, limited or not
        assert "commas and colons" in words


def test_a_header_over_the_cap_is_refused_whole(tmp_path: Path) -> None:
    raw = file_of(b"{" + b" " * (MAX_HEADER_BYTES + 10) + b"}")
    with pytest.raises(FormatError, match="header length"):
        read_safetensors(tmp_path / "x", raw)


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "nothing"])
def test_what_is_no_regular_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "link":
        (tmp_path / "y").write_bytes(GOOD)
        path.symlink_to(tmp_path / "y")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(FormatError):
        read_safetensors(path)


def test_any_changed_byte_of_the_header_is_an_error_or_a_consistent_file(tmp_path: Path) -> None:
    length = int.from_bytes(GOOD[:8], "little")
    for at in range(8 + length):
        for value in (0x00, 0xFF, GOOD[at] ^ 1, ord("9")):
            data = GOOD[:at] + bytes([value]) + GOOD[at + 1 :]
            try:
                found = read_safetensors(tmp_path / "x", data)
            except FormatError:
                continue
            spans = sorted((info.begin, info.end) for info in found.tensors.values())
            assert spans[0][0] == 8 + int.from_bytes(data[:8], "little")
            assert spans[-1][1] == len(data)
            assert all(one[1] == two[0] for one, two in itertools.pairwise(spans))


def test_a_file_that_shrank_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(GOOD)
    found = read_safetensors(path)
    path.write_bytes(GOOD[:-4])
    with pytest.raises(FormatError, match="changed"):
        found.read_float32("b")
