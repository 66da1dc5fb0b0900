"""Decoding tensor rows with the ggml library that ships inside `llama_cpp`.

A second implementation of a format would have to be bit-identical to the one llama.cpp users get. So
the native library decodes, through ctypes, without importing `llama_cpp` (whose import starts the
llama.cpp backend). ctypes releases the GIL, so rows are handled by a thread pool; the result does
not depend on the number of threads, because ggml handles every row on its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.cpus import usable_cpus
from safegene_runtime.errors import EngineError, Problem, UnsupportedError
from safegene_runtime.extras import install
from safegene_runtime.formats.gguf.types import GGMLType, type_traits

__all__ = ["dequantize", "for_row_chunks", "library"]

FloatRows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

CHUNK_ELEMENTS = 1 << 18
"""Elements that one thread handles at a time: large enough to amortise a call, small enough to
share a 576 x 576 tensor between threads."""

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` (ggml.h); `library` checks that it still looks like this."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


def dequantize(
    data: bytes | memoryview | Bytes,
    type: GGMLType,
    shape: tuple[int, ...],
    *,
    threads: int | None = None,
) -> FloatRows:
    """Decodes stored bytes to float32.

    Args:
        data: the bytes of the rows, in order; any shape.
        type: what they are encoded as.
        shape: (..., in), in numpy order.
        threads: how many to use; all CPUs by default.

    Returns:
        `shape`, float32, freshly allocated.

    Raises:
        UnsupportedError: ggml cannot decode `type`, or the shape does not fit the bytes.
    """
    if not isinstance(data, np.ndarray):
        data = np.frombuffer(data, dtype=np.uint8)
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    block, block_bytes = type_traits(type)
    n_cols = shape[-1] if shape else 1
    n_rows = int(np.prod(shape[:-1], dtype=np.int64))
    expected = n_rows * (n_cols // block) * block_bytes
    if n_cols % block or raw.nbytes != expected:
        raise UnsupportedError(
            Problem("tensor", f"bytes of {type.name} {shape}", str(expected), str(raw.nbytes))
        )
    out = np.empty((n_rows, n_cols), dtype=np.float32)
    if type.name == "F32":
        out.view(np.uint8).reshape(-1)[:] = raw
        return out.reshape(shape)
    address = _traits(type).to_float
    if not address:
        raise UnsupportedError(Problem("tensor", "type", "one that ggml can decode", type.name))
    to_float = _TO_FLOAT(address)
    stored = raw.reshape(n_rows, -1)

    def decode(start: int, stop: int) -> None:
        part = out[start:stop]
        to_float(stored[start:stop].ctypes.data, part.ctypes.data, part.size)

    for_row_chunks(decode, n_rows, n_cols, threads)
    return out.reshape(shape)


def for_row_chunks(
    work: Callable[[int, int], None], n_rows: int, n_cols: int, threads: int | None
) -> None:
    """Calls `work(start, stop)` for row ranges that cover all rows; re-raises the first error."""
    step = max(1, CHUNK_ELEMENTS // max(1, n_cols))
    ranges = [(start, min(n_rows, start + step)) for start in range(0, n_rows, step)]
    n_threads = min(threads or usable_cpus(), len(ranges))
    if n_threads <= 1:
        for start, stop in ranges:
            work(start, stop)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for future in [pool.submit(work, start, stop) for start, stop in ranges]:
            future.result()


def _traits(type: GGMLType) -> _TypeTraits:
    traits: _TypeTraits = library().ggml_get_type_traits(int(type)).contents
    return traits


@functools.cache
def library() -> Any:
    """Loads libggml-base and checks that its types are the ones we know.

    Raises:
        EngineError: not installed, not loadable, or its type table differs from ours.
    """
    path = _library_path()
    try:
        library = ctypes.CDLL(str(path))
        pointer, i64 = ctypes.c_void_p, ctypes.c_int64
        for name, result, arguments in (
            ("ggml_quantize_init", None, [ctypes.c_int]),
            ("ggml_quantize_requires_imatrix", ctypes.c_bool, [ctypes.c_int]),
            (
                "ggml_quantize_chunk",
                ctypes.c_size_t,
                [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer],
            ),
            ("ggml_validate_row_data", ctypes.c_bool, [ctypes.c_int, pointer, ctypes.c_size_t]),
            ("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), [ctypes.c_int]),
            ("ggml_type_size", ctypes.c_size_t, [ctypes.c_int]),
            ("ggml_type_name", ctypes.c_char_p, [ctypes.c_int]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise EngineError(
            Problem(str(path), "library", "a ggml we can use", str(error), _INSTALL)
        ) from error
    for type in GGMLType:
        expected = (type.name.upper(), *type_traits(type))
        label: bytes = library.ggml_type_name(int(type)) or b""
        found: tuple[Any, ...] = (label.decode().upper(),)
        if found[0] == expected[0]:  # else ggml may abort when asked for more
            traits = library.ggml_get_type_traits(int(type)).contents
            found = (*found, traits.blck_size, traits.type_size)
        if found != expected or library.ggml_type_size(int(type)) != expected[2]:
            raise EngineError(
                Problem(str(path), f"type {int(type)}", str(expected), str(found), _INSTALL)
            )
    return library


_INSTALL = f"install the llama-cpp-python this version was tested with: {install('gguf')}"


def _library_path() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    found = spec.submodule_search_locations if spec else None
    folders = [Path(folder) / "lib" for folder in found or ()]
    for folder in folders:
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            if (folder / name).exists():
                return folder / name
    where = ", ".join(map(str, folders)) or "llama_cpp"
    raise EngineError(Problem(where, "library", "libggml-base", "nothing", _INSTALL))
