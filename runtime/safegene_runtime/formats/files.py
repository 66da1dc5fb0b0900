"""Reading files that may be hostile.

A path is opened once, without following a symbolic link in its last part, and must be a regular file:
a FIFO would block for ever, a device has no end.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

from safegene_runtime.errors import FormatError, Problem
from safegene_runtime.progress import Step

__all__ = [
    "CHECKED",
    "FollowingDigest",
    "StrPath",
    "found_status",
    "is_there",
    "open_regular",
    "read_small_file",
    "sha256_file",
    "sha256_of",
]

StrPath = str | os.PathLike[str]
"""What a function that people call takes for a path."""

CHUNK_BYTES = 4 << 20
MANIFEST_NAME = "manifest.json"


CHECKED: ContextVar[Any] = ContextVar("CHECKED", default=None)
"""The `SealedFiles` that were entered: what was read once is not read from its path again."""


def open_regular(path: Path, *, follow_symlinks: bool = False, alone: bool = False) -> BinaryIO:
    """Opens a regular file for reading; what was checked already is given from its copy (`sealed`).

    `follow_symlinks` is for what the user named on the command line; what a folder or a manifest
    names is opened without. `alone` refuses a file with a second name, through which it could be
    changed from elsewhere.

    Raises:
        FormatError: missing, not a regular file, a symbolic link, or a hard link.
    """
    checked = CHECKED.get()
    if checked is not None and (kept := checked.find(path)) is not None:
        found: BinaryIO = kept.open()
        return found
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if not follow_symlinks:
        flags |= os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte or half a surrogate pair
        got = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            got = "a symbolic link"
        raise FormatError(
            Problem(str(path), "file", "a readable regular file", got, "check the path")
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        got = "a folder" if stat.S_ISDIR(status.st_mode) else "something else"
        raise FormatError(Problem(str(path), "file", "a regular file", got, "check the path"))
    if alone and status.st_nlink != 1:
        os.close(descriptor)
        got = f"a hard link: the file has {status.st_nlink} names"
        fix = "it could be changed by its other name: put a copy in its place (cp)"
        raise FormatError(Problem(str(path), "file", "a file of its own", got, fix))
    return os.fdopen(descriptor, "rb")


def found_status(path: Path) -> os.stat_result:
    """`lstat` of a path, or the status of the copy that its readers are given.

    Raises:
        FormatError: a file of a folder that was checked, and not one of those that were.
        OSError: nothing there.
    """
    checked = CHECKED.get()
    if checked is not None and (kept := checked.find(path)) is not None:
        return os.fstat(kept.descriptor)
    return path.lstat()


def is_there(path: Path) -> bool:
    """Whether a reader would find something at a path: in a folder that was checked, what was."""
    checked = CHECKED.get()
    try:
        return (checked is not None and checked.find(path) is not None) or os.path.lexists(path)
    except FormatError:
        return False


def read_small_file(path: Path, max_bytes: int, *, follow_symlinks: bool = False) -> bytes:
    """Reads a whole file of at most `max_bytes` bytes; no more memory is asked for than it has.

    Raises:
        FormatError: as `open_regular`, the file is larger, or it changed while it was read.
    """

    def wrong_size(expected: str, got: int, fix: str) -> FormatError:
        return FormatError(Problem(str(path), "size", expected, f"{got} bytes", fix))

    with open_regular(path, follow_symlinks=follow_symlinks) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise wrong_size(f"at most {max_bytes} bytes", size, "is it the right file?")
        data = file.read(size + 1)
    if len(data) != size:
        raise wrong_size(f"{size} bytes", len(data), "the file changed while it was read")
    return data


def sha256_of(data: bytes | memoryview) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(
    path: Path,
    progress: Step | None = None,
    *,
    follow_symlinks: bool = False,
    alone: bool = False,
) -> str:
    """The SHA-256 of a regular file; `progress` is told the number of bytes after each chunk.

    Raises:
        FormatError: as `open_regular`.
    """
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with open_regular(path, follow_symlinks=follow_symlinks, alone=alone) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(view[:count])
            if progress:
                progress(count)
    return digest.hexdigest()


class FollowingDigest:
    """The SHA-256 of a file, taken by a thread while the file is being written from start to end.

    What is hashed is read back from the file, so it is the digest of what arrived there: of what the
    kernel gives to every reader. That the disk keeps it is fsync's promise, and trusted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(1, "digest")
        self._abandoned = threading.Event()
        self._digest = self._pool.submit(self._follow)

    def reached(self, size: int) -> None:
        """Tells that the first `size` bytes are in the file, flushed and final."""
        self._written.put(size)

    def result(self) -> str:
        """Waits for the end of the file; nothing may be written any more.

        Raises:
            FormatError: the file is shorter or longer than what was announced.
        """
        self._written.put(None)
        try:
            return self._digest.result()
        finally:
            self._pool.shutdown()

    def abandon(self) -> None:
        """Ends the thread without a result."""
        self._abandoned.set()
        self._written.put(None)
        self._pool.shutdown(cancel_futures=True)

    def _follow(self) -> str:
        digest, done, announced = hashlib.sha256(), 0, 0
        buffer = bytearray(CHUNK_BYTES)
        view = memoryview(buffer)
        with open_regular(self._path) as file:
            while (goal := self._written.get()) is not None:
                announced = goal
                while done < announced and not self._abandoned.is_set():
                    count = file.readinto(view[: min(CHUNK_BYTES, announced - done)])  # type: ignore[attr-defined]
                    if not count:
                        break
                    digest.update(view[:count])
                    done += count
            size = os.fstat(file.fileno()).st_size
        if not done == announced == size:
            raise FormatError(
                Problem(str(self._path), "size", f"{announced} bytes", f"{size} bytes", "retry")
            )
        return digest.hexdigest()
