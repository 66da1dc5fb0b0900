"""npz files of plain arrays: the same arrays are the same bytes, and nothing else is ever read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import Problems

__all__ = ["decode_npz", "encode_npz"]

MAX_BYTES = 4 << 30


def encode_npz(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """An npz whose bytes depend on nothing but the arrays."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in sorted(arrays):
            one = io.BytesIO()
            np.lib.format.write_array(one, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, one.getvalue())
    return out.getvalue()


def decode_npz(
    data: bytes, arrays: Mapping[str, str], where: str, problems: Problems
) -> dict[str, npt.NDArray[Any]]:
    """Exactly these arrays, of these types (name -> dtype), finite; never a pickle.

    What is wrong goes to `problems`, and then nothing may be done with what is returned.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = {info.filename for info in archive.infolist()}
            if sum(info.file_size for info in archive.infolist()) > MAX_BYTES:
                problems.add(where, "size", f"at most {MAX_BYTES} bytes", "more, once unpacked")
                return {}
        if names != {f"{name}.npy" for name in arrays}:
            problems.add(where, "arrays", ", ".join(sorted(arrays)), ", ".join(sorted(names)))
            return {}
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            found = {name: archive[name] for name in arrays}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        problems.add(where, "content", "an npz of plain arrays", str(error), "record again")
        return {}
    for name, kind in arrays.items():
        if found[name].dtype != np.dtype(kind):
            problems.add(where, name, kind, found[name].dtype)
        elif found[name].dtype.kind == "f" and not np.isfinite(found[name]).all():
            problems.add(where, name, "finite numbers", "NaN or Inf")
    return found
