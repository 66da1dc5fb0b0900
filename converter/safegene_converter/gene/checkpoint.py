"""Long work that was killed goes on where it was: one small file per finished step.

A checkpoint belongs to a request. When the request has changed, what is there is of no use and is
removed. It lies beside the output under a name of its own, and is removed when the output is there.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.formats.publish import publish_file

__all__ = ["Checkpoint", "identity"]

REQUEST_NAME = "request.json"
MAX_REQUEST_BYTES = 16 << 20


class Checkpoint:
    """Finished steps of one request, in a folder.

    Args:
        path: the folder; made when the first step is saved.
        request: everything the steps depend on.
    """

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self._path = path
        self._request = strictjson.dumps(request)
        if path.exists() and not self._is_ours():
            shutil.rmtree(path)

    def load(self, step: str) -> dict[str, npt.NDArray[Any]] | None:
        """The arrays of a finished step, or None; a damaged file is a step that is not finished."""
        file = self._file(step)
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as found:
                return dict(found)
        except (OSError, ValueError, zipfile.BadZipFile):
            return None

    def save(self, step: str, **arrays: npt.ArrayLike) -> None:
        """Keeps a finished step, atomically."""
        if not self._path.exists():
            publish_file(self._path / REQUEST_NAME, self._request)
        buffer = io.BytesIO()
        named: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
        np.savez(buffer, **named)
        publish_file(self._file(step), buffer.getvalue())

    def clear(self) -> None:
        """Removes everything: the work is done."""
        shutil.rmtree(self._path, ignore_errors=True)

    def _is_ours(self) -> bool:
        try:
            found = strictjson.dumps(strictjson.load(self._path / REQUEST_NAME, MAX_REQUEST_BYTES))
        except FormatError:
            return False
        return found == self._request

    def _file(self, step: str) -> Path:
        return self._path / f"{sha256_of(step.encode())[:24]}.npz"


def identity(path: Path) -> list[list[Any]]:
    """Name, size and time of every file of an input: enough to see that it is still the same."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
        if file.is_file()
    ]
