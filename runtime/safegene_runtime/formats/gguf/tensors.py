"""The stored bytes of a tensor, read or mapped."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, Problem
from safegene_runtime.formats.files import open_regular
from safegene_runtime.formats.gguf.header import TensorInfo

__all__ = ["map_tensor", "read_tensor_bytes"]


def read_tensor_bytes(info: TensorInfo) -> bytes:
    """The stored bytes of a tensor.

    Raises:
        FormatError: the file became shorter since its header was read.
    """
    with open_regular(info.path, follow_symlinks=True) as file:
        file.seek(info.offset)
        data = file.read(info.nbytes)
    if len(data) != info.nbytes:
        raise _shorter(info, len(data))
    return data


def map_tensor(info: TensorInfo) -> npt.NDArray[np.uint8]:
    """The stored bytes of a tensor, (nbytes,) uint8, read-only, paged in as they are touched.

    A file that becomes shorter while it is mapped kills the process (SIGBUS).

    Raises:
        FormatError: the file became shorter since its header was read.
    """
    with open_regular(info.path, follow_symlinks=True) as file:
        size = os.fstat(file.fileno()).st_size
        if size < info.offset + info.nbytes:
            raise _shorter(info, size - info.offset)
        return np.memmap(file, dtype=np.uint8, mode="r", offset=info.offset, shape=(info.nbytes,))


def _shorter(info: TensorInfo, left: int) -> FormatError:
    return FormatError(
        Problem(
            str(info.path),
            info.name,
            f"{info.nbytes} bytes",
            f"{max(0, left)} bytes",
            "the file changed while it was read",
        )
    )
