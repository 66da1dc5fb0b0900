"""Encoding and decoding tensor rows with the ggml library that ships inside `llama_cpp`.

gguf-py cannot encode K- and IQ-quants, and a second implementation of a quantiser would have to be
bit-identical to the one llama.cpp users get. So the native library does it, through ctypes, without
importing `llama_cpp` (whose import starts the llama.cpp backend). ctypes releases the GIL, so rows
are encoded by a thread pool; the result does not depend on the number of threads, because ggml
encodes every row on its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import EngineError, PostconditionError, Problem, UnsupportedError
from safegene_runtime.gguf import GGMLType, type_traits

__all__ = ["can_encode", "default_threads", "dequantize", "quantize", "requires_imatrix"]

FloatRows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

CHUNK_ELEMENTS = 1 << 18
"""Elements that one thread handles at a time: large enough to amortise a call, small enough to
share a 576 x 576 tensor between threads."""

# The cases of ggml_quantize_chunk (ggml.c). NVFP4 is left out on purpose: its blocks are relative
# to a second tensor (`*.scale`), so rows alone do not say what is stored.
ENCODABLE = frozenset({
    "F32", "F16", "BF16",
    "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
})  # fmt: skip

# What llama.cpp refuses to write without an importance matrix (tensor_requires_imatrix in
# llama-quant.cpp); ggml itself aborts on three of them only, and writes garbage for the others.
NEEDS_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` (ggml.h); `_library` checks that it still looks like this."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


def default_threads() -> int:
    """The number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def can_encode(type: GGMLType, n_cols: int) -> bool:
    """Whether rows of `n_cols` elements can be written as `type`."""
    return type.name in ENCODABLE and n_cols > 0 and n_cols % type_traits(type)[0] == 0


def requires_imatrix(type: GGMLType) -> bool:
    """Whether `type` is garbage without an importance matrix."""
    return type.name in NEEDS_IMATRIX or bool(_library().ggml_quantize_requires_imatrix(int(type)))


def quantize(
    rows: FloatRows,
    type: GGMLType,
    imatrix: FloatRows | None = None,
    *,
    threads: int | None = None,
) -> Bytes:
    """Encodes rows as `type`, exactly as llama.cpp's own quantiser does.

    Args:
        rows: (out, in), float32.
        type: the type to encode as; see `can_encode`.
        imatrix: (in,), mean squared activations per input column; needed by `requires_imatrix`.
        threads: how many to use; all CPUs by default.

    Returns:
        (out, bytes per row), uint8.

    Raises:
        UnsupportedError: `type` cannot hold such rows, or needs an imatrix.
        PostconditionError: a value is not finite, or `type` cannot represent it (F16 overflow).
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if rows.ndim != 2:
        raise UnsupportedError(Problem("tensor", "shape", "two dimensions", str(rows.shape)))
    n_rows, n_cols = rows.shape
    _check_encodable(type, n_cols, imatrix)
    library = _library()
    library.ggml_quantize_init(int(type))
    block, block_bytes = type_traits(type)
    out = np.empty((n_rows, n_cols // block * block_bytes), dtype=np.uint8)
    weights = None if imatrix is None else np.ascontiguousarray(imatrix, dtype=np.float32)
    weights_at = None if weights is None else weights.ctypes.data

    def encode(start: int, stop: int) -> None:
        part, encoded = rows[start:stop], out[start:stop]
        if not np.isfinite(part).all():
            raise PostconditionError(
                Problem(
                    "tensor",
                    "values",
                    "finite numbers",
                    "NaN or Inf",
                    "check the base and the adapter",
                )
            )
        written = library.ggml_quantize_chunk(
            int(type), part.ctypes.data, encoded.ctypes.data, 0, stop - start, n_cols, weights_at
        )
        if written != encoded.nbytes:
            raise EngineError(
                Problem("ggml", f"bytes of {type.name}", str(encoded.nbytes), str(written))
            )
        if not library.ggml_validate_row_data(int(type), encoded.ctypes.data, encoded.nbytes):
            raise PostconditionError(
                Problem(
                    "tensor",
                    "values",
                    f"numbers that {type.name} can represent",
                    "a row that ggml does not validate",
                    "choose a wider type, for example f32",
                )
            )

    _for_row_chunks(encode, n_rows, n_cols, threads)
    return out


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

    _for_row_chunks(decode, n_rows, n_cols, threads)
    return out.reshape(shape)


def _check_encodable(type: GGMLType, n_cols: int, imatrix: FloatRows | None) -> None:
    """Refuses what would make ggml abort the process."""
    if type.name not in ENCODABLE:
        raise UnsupportedError(
            Problem("tensor", "type", "one that ggml can encode", type.name, "choose another type")
        )
    if not can_encode(type, n_cols):
        raise UnsupportedError(
            Problem(
                "tensor",
                "row length",
                f"a multiple of {type_traits(type)[0]} for {type.name}",
                str(n_cols),
                "choose a type with smaller blocks, for example q8_0",
            )
        )
    if imatrix is None:
        if requires_imatrix(type):
            raise UnsupportedError(
                Problem(
                    "tensor",
                    "imatrix",
                    f"an importance matrix, which {type.name} needs",
                    "none",
                    "pass --imatrix FILE or choose another type",
                )
            )
    elif imatrix.shape != (n_cols,) or not np.isfinite(imatrix).all() or (imatrix < 0).any():
        raise UnsupportedError(
            Problem(
                "tensor",
                "imatrix",
                f"({n_cols},) finite weights >= 0",
                f"{imatrix.shape}, or other values",
                "is it the imatrix of this model?",
            )
        )


def _for_row_chunks(
    work: Callable[[int, int], None], n_rows: int, n_cols: int, threads: int | None
) -> None:
    """Calls `work(start, stop)` for row ranges that cover all rows; re-raises the first error."""
    step = max(1, CHUNK_ELEMENTS // max(1, n_cols))
    ranges = [(start, min(n_rows, start + step)) for start in range(0, n_rows, step)]
    n_threads = min(threads or default_threads(), len(ranges))
    if n_threads <= 1:
        for start, stop in ranges:
            work(start, stop)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for future in [pool.submit(work, start, stop) for start, stop in ranges]:
            future.result()


def _traits(type: GGMLType) -> _TypeTraits:
    traits: _TypeTraits = _library().ggml_get_type_traits(int(type)).contents
    return traits


@functools.cache
def _library() -> Any:
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


_INSTALL = "install the llama-cpp-python this version was tested with: pip install 'safegene[gguf]'"


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
