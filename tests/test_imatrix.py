"""Both formats of importance matrices, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from safegene_converter.encoding.imatrix import read_imatrix
from safegene_runtime.errors import FormatError

SUMS = np.array([[2.0, 4.0, 8.0]], np.float32)


def _gguf(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _legacy(entries: list[tuple[str, int, list[float]]]) -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += (
            struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        )
        data += struct.pack(f"<{len(values)}f", *values)
    return data


def test_sums_are_divided_by_counts(tmp_path: Path) -> None:
    path = _gguf(tmp_path / "a", {"x.in_sum2": SUMS, "x.counts": np.array([[4.0]], np.float32)})
    np.testing.assert_array_equal(read_imatrix(path)["x"], [0.5, 1, 2])


def test_experts_are_divided_one_by_one_and_unused_ones_weigh_equally(tmp_path: Path) -> None:
    path = _gguf(
        tmp_path / "a",
        {
            "x.in_sum2": np.concatenate([SUMS, SUMS]),
            "x.counts": np.array([[2.0], [0.0]], np.float32),
        },
    )
    np.testing.assert_array_equal(read_imatrix(path)["x"], [1, 2, 4, 1, 1, 1])


def test_the_old_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(_legacy([("x", 2, [2, 4]), ("y", 0, [3])]) + b"\x01\0\0\0\0\0\0\0")
    found = read_imatrix(path)
    np.testing.assert_array_equal(found["x"], [1, 2])
    np.testing.assert_array_equal(found["y"], [3])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "at least one"),
        ({"x.in_sum2": SUMS}, "x.counts"),
        ({"blk.0.attn_q.weight": SUMS}, "imatrix file"),
        ({"x.in_sum2": SUMS, "x.counts": np.ones((2, 1), np.float32)}, "multiple of 2"),
        ({"x.in_sum2": -SUMS, "x.counts": np.ones((1, 1), np.float32)}, "finite"),
        ({"x.in_sum2": SUMS.astype(np.float16), "x.counts": np.ones((1, 1), np.float32)}, "F32"),
    ],
)
def test_a_gguf_that_is_no_imatrix_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        read_imatrix(_gguf(tmp_path / "a", tensors))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0",
        struct.pack("<i", 5),
        struct.pack("<ii", 1, 1 << 30),
        struct.pack("<ii", 1, -1),
        _legacy([("x", 1, [1.0])])[:-1],
        _legacy([("x", 1, [])]),
        _legacy([("x", 1, [1.0]), ("x", 1, [1.0])]),
        _legacy([("x", 1, [float("nan")])]),
    ],
)
def test_a_damaged_old_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        read_imatrix(path)
