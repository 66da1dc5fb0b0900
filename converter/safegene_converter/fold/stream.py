"""Writing one file from start to end: what is made here is written, what exists is copied.

Ranges of other files are copied in the kernel (`copy_file_range`, which shares the blocks on file
systems that can). The digest is taken on the way, of what arrived in the file.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, OutputError, Problem
from safegene_runtime.formats.files import FollowingDigest, open_regular
from safegene_runtime.progress import Step

__all__ = ["Bytes", "OutputStream", "as_bytes"]

COPY_BYTES = 64 << 20
SYNC_BYTES = 256 << 20
"""How much may wait for the disk: it writes while the rest is copied, not only after the last byte."""

Bytes = bytes | memoryview | npt.NDArray[Any]

# A file system, or a pair of them, that cannot copy in the kernel says so in one of these ways.
_CANNOT_COPY = (
    errno.EXDEV,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.EBADF,
    errno.EPERM,
)


def as_bytes(data: Bytes) -> memoryview:
    """The bytes of an array or a buffer, without a copy where that is possible."""
    if isinstance(data, np.ndarray):
        return memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return memoryview(data)


class OutputStream:
    """A new file that only grows; use it as a context manager. An error leaves no file behind.

    Args:
        path: the file to create; it must not exist, so that no source can be overwritten.
        progress: told bytes as they are written.

    Raises:
        OutputError: the file system said no.
        FormatError: a source ended before the range that was to be copied.
    """

    def __init__(self, path: Path, progress: Step | None = None) -> None:
        self._path = path
        self._progress = progress
        self._file: BinaryIO
        self._following: FollowingDigest
        self._digest: str | None = None
        self._syncing: Future[None] | None = None
        self._synced = 0
        self._disk = ThreadPoolExecutor(1, "sync")

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("xb")
        except OSError as error:
            raise self._refused(error) from error
        self._following = FollowingDigest(self._path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._disk.shutdown(cancel_futures=True)
            if error is None:
                self._file.flush()
                self._following.reached(self._file.tell())
            self._file.close()
            if error is None:
                # one that had not begun was called off: it only brings forward what a sync does later
                if self._syncing is not None and not self._syncing.cancelled():
                    self._syncing.result()
                self._digest = self._following.result()
        except BaseException as caught:
            error = caught
            if isinstance(caught, OSError):
                raise self._refused(caught) from caught
            raise
        finally:
            if error is not None:
                self._following.abandon()
                self._path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise self._refused(error) from error

    @property
    def sha256(self) -> str:
        """The digest of the finished file.

        Raises:
            OutputError: it is not finished.
        """
        if self._digest is None:
            raise OutputError(Problem(str(self._path), "digest", "a finished file", "an open one"))
        return self._digest

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def write(self, data: Bytes) -> None:
        """Writes bytes."""
        view = as_bytes(data)
        self._file.write(view)
        self._tell(view.nbytes)

    def pad(self, alignment: int) -> None:
        """Writes zeros up to the next multiple of `alignment`."""
        self._file.write(b"\0" * (-self._file.tell() % alignment))

    def copy(self, source: Path, offset: int, count: int, what: str) -> None:
        """Copies `count` bytes of `source` from `offset` on; `what` names them in an error."""
        self._file.flush()
        at, end = offset, offset + count
        with open_regular(source, follow_symlinks=True) as file:
            while at < end:
                copied = self._copy_some(file, at, min(COPY_BYTES, end - at))
                if not copied:
                    raise FormatError(
                        Problem(
                            str(source),
                            what,
                            f"bytes up to {end}",
                            f"the end at {at}",
                            "the file changed while it was read",
                        )
                    )
                at += copied
                self._file.seek(0, os.SEEK_END)
                self._tell(copied)

    def _copy_some(self, file: BinaryIO, at: int, count: int) -> int:
        """One step: in the kernel where it can, else through memory."""
        if hasattr(os, "copy_file_range"):
            try:
                copied = os.copy_file_range(file.fileno(), self._file.fileno(), count, at)
                if copied:  # 0 is the end of the file, or a file system that cannot
                    return copied
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
        data = os.pread(file.fileno(), min(count, 4 << 20), at)
        view = memoryview(data)
        while view:
            view = view[os.write(self._file.fileno(), view) :]
        return len(data)

    def _tell(self, count: int) -> None:
        self._file.flush()
        written = self._file.tell()
        self._following.reached(written)
        if written - self._synced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            self._syncing = self._disk.submit(os.fsync, self._file.fileno())
            self._synced = written
        if self._progress and count:
            self._progress(count)

    def _refused(self, error: OSError) -> OutputError:
        if isinstance(error, OutputError):
            return error
        return OutputError(
            Problem(
                str(self._path), "output", "to be written", str(error), "free some space and retry"
            )
        )
