"""Encoding tensor rows with the ggml library that `safegene_runtime.formats.ggml` decodes with.

gguf-py cannot encode K- and IQ-quants, and a second implementation of a quantiser would have to be
bit-identical to the one llama.cpp users get.
"""

from __future__ import annotations

import numpy as np

from safegene_runtime.errors import EngineError, PostconditionError, Problem, UnsupportedError
from safegene_runtime.formats.ggml import Bytes, FloatRows, for_row_chunks, library
from safegene_runtime.formats.gguf.types import GGMLType, type_traits

__all__ = ["OutOfRangeError", "can_encode", "quantize", "requires_imatrix"]

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


class OutOfRangeError(PostconditionError):
    """A number that a type cannot hold; a wider one may."""


def can_encode(type: GGMLType, n_cols: int) -> bool:
    """Whether rows of `n_cols` elements can be written as `type`."""
    return type.name in ENCODABLE and n_cols > 0 and n_cols % type_traits(type)[0] == 0


def requires_imatrix(type: GGMLType) -> bool:
    """Whether `type` is garbage without an importance matrix."""
    return type.name in NEEDS_IMATRIX or bool(library().ggml_quantize_requires_imatrix(int(type)))


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
        OutOfRangeError: `type` cannot represent a value (F16 overflow).
        PostconditionError: a value is not finite.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if rows.ndim != 2:
        raise UnsupportedError(Problem("tensor", "shape", "two dimensions", str(rows.shape)))
    n_rows, n_cols = rows.shape
    _check_encodable(type, n_cols, imatrix)
    native = library()
    native.ggml_quantize_init(int(type))
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
        written = native.ggml_quantize_chunk(
            int(type), part.ctypes.data, encoded.ctypes.data, 0, stop - start, n_cols, weights_at
        )
        if written != encoded.nbytes:
            raise EngineError(
                Problem("ggml", f"bytes of {type.name}", str(encoded.nbytes), str(written))
            )
        if not native.ggml_validate_row_data(int(type), encoded.ctypes.data, encoded.nbytes):
            raise OutOfRangeError(
                Problem(
                    "tensor",
                    "values",
                    f"numbers that {type.name} can represent",
                    "a row that ggml does not validate",
                    "choose a wider type, for example f32",
                )
            )

    for_row_chunks(encode, n_rows, n_cols, threads)
    return out


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
