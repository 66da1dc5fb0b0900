"""Importance matrices: per tensor, the mean squared activation of every input column.

llama.cpp writes them as GGUF (`<name>.in_sum2` and `<name>.counts`), and wrote a format of its own
before (imatrix-loader.cpp). Both are read; the values are what `llama-quantize` would use.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, Problem, Problems
from safegene_runtime.formats.files import open_regular, read_small_file
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes

__all__ = ["read_imatrix"]

SUMS, COUNTS = ".in_sum2", ".counts"
MAX_LEGACY_BYTES = 1 << 30


def read_imatrix(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Reads an importance matrix.

    Returns:
        GGUF tensor name -> (in,) float32; for experts (experts x in,).

    Raises:
        FormatError: neither format, empty, or values that are not finite and >= 0.
    """
    path = path.resolve()
    with open_regular(path) as file:
        magic = file.read(4)
    found = _read_gguf(path) if magic == b"GGUF" else _read_legacy(path)
    problems = Problems()
    if not found:
        problems.add(str(path), "entries", "at least one", "none", "is it an imatrix file?")
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            problems.add(str(path), name, "finite values >= 0", "others", "make the imatrix again")
    problems.raise_if_any(FormatError)
    return found


def _read_gguf(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    tensors = read_gguf(path).tensors
    problems = Problems()
    found = {}
    for name, info in tensors.items():
        if not name.endswith((SUMS, COUNTS)):
            problems.add(
                str(path),
                name,
                f"a name that ends in {SUMS} or {COUNTS}",
                name,
                "is it an imatrix file?",
            )
            continue
        if info.type.name != "F32":
            problems.add(str(path), name, "F32", info.type.name)
            continue
        other = (
            name.removesuffix(SUMS) + COUNTS
            if name.endswith(SUMS)
            else (name.removesuffix(COUNTS) + SUMS)
        )
        if other not in tensors:
            problems.add(str(path), other, "to be present", "nothing", "make the imatrix again")
    problems.raise_if_any(FormatError)
    for name, info in tensors.items():
        if name.endswith(SUMS):
            sums = np.frombuffer(read_tensor_bytes(info), dtype="<f4")
            other_info = tensors[name.removesuffix(SUMS) + COUNTS]
            counts = np.rint(np.frombuffer(read_tensor_bytes(other_info), dtype="<f4"))
            if not counts.size or sums.size % counts.size:
                raise FormatError(
                    Problem(str(path), name, f"a multiple of {counts.size} values", str(sums.size))
                )
            per_count = sums.reshape(counts.size, -1)
            counts = counts[:, None]
            # a matrix that never was used gets equal weights, as in llama-quantize
            mean = np.where(counts > 0, per_count / np.maximum(counts, 1), np.float32(1))
            found[name.removesuffix(SUMS)] = mean.astype(np.float32).reshape(-1)
    return found


def _read_legacy(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    data = read_small_file(path, MAX_LEGACY_BYTES)
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if count < 0 or count > len(data) - position:
            raise FormatError(
                Problem(
                    str(path),
                    f"byte {position}",
                    f"{count} more bytes",
                    f"{len(data) - position}",
                    "is it an imatrix file?",
                )
            )
        position += count
        return data[position - count : position]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    found = {}
    for _ in range(integer()):
        name = take(integer()).decode("utf-8", "replace")
        calls, n_values = integer(), integer()
        if name in found or n_values < 1:
            raise FormatError(Problem(str(path), name, "one entry with values", "something else"))
        values = np.frombuffer(take(4 * n_values), dtype="<f4")
        found[name] = (values / np.float32(calls) if calls > 0 else values).astype(np.float32)
    return found
