"""Reading files that may be hostile, and publishing files that must never be half there.

Reading: a path is opened once, without following a symbolic link in its last part, and must be a
regular file: a FIFO would block for ever, a device has no end.

Publishing (Pillai et al., OSDI 2014): everything is written into a sibling of the final name, each
file is fsync'ed, the manifest comes last, then one rename makes the folder visible and the parent
is fsync'ed. Killed at any moment, the final name is either absent or complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import queue
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

from safegene_runtime.errors import FormatError, OutputError, Problem
from safegene_runtime.progress import Step

__all__ = [
    "CHECKED",
    "FollowingDigest",
    "StrPath",
    "check_output_free",
    "check_writable",
    "found_status",
    "is_there",
    "open_regular",
    "publish_file",
    "publish_folder",
    "read_small_file",
    "sha256_file",
    "sha256_of",
]

StrPath = str | os.PathLike[str]
"""What a function that people call takes for a path."""

CHUNK_BYTES = 4 << 20
MANIFEST_NAME = "manifest.json"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_READING_UMASK = threading.Lock()


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


def check_output_free(out: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuses an output that exists, before any work is done for it.

    Args:
        out: what is to be made.
        force: whether what has that name may be replaced.
        inputs: files and folders that it is made from: it may neither hold one nor lie in one.

    Raises:
        OutputError: `out` exists and `force` is not given, or it is a folder that nobody means to
            replace; or a folder above it is a file; or it is not apart from the inputs.
    """
    target = _place(out)
    for one in inputs:
        for place in {one.resolve(), _place(one)}:
            if place.is_relative_to(target) or target.is_relative_to(place):
                how = "one that holds" if place.is_relative_to(target) else "one inside"
                got = f"{how} the input {one}"
                raise OutputError(
                    Problem(str(out), "output", "a folder of its own", got, "choose another -o")
                )
    if os.path.lexists(out) and not force:
        raise OutputError(
            Problem(
                str(out),
                "output",
                "a name that is free",
                "an existing path",
                "choose another -o, or pass --force to replace it",
            )
        )
    if out.is_dir() and not out.is_symlink():
        for place in (Path.cwd(), Path(os.path.expanduser("~"))):
            if place.resolve().is_relative_to(out.resolve()):
                raise OutputError(
                    Problem(
                        str(out),
                        "output",
                        "a folder of its own",
                        f"one that holds {place}",
                        "--force would delete all of it: choose another -o",
                    )
                )
    parent = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise OutputError(
            Problem(str(parent), "output", "a folder to write into", "a file", "choose another -o")
        )


def _place(path: Path) -> Path:
    """Where a path lies; a link is itself, not what it leads to."""
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def _no_file(path: Path) -> str | None:
    """What stands in a file's place and must not be replaced, behind a link, too; else None."""
    if path.is_dir():
        return "a folder"
    return "something that is no file" if path.exists() and not path.is_file() else None


def check_writable(path: Path) -> Problem | None:
    """Why no file could be published at `path`; asked before the work whose result it is for.

    A temporary file is made and removed where `path`, or the first folder to create for it, would lie:
    rights alone do not tell, and root has all of them.
    """
    path = path.absolute()
    parent = next(parent for parent in path.parents if os.path.lexists(parent))
    try:
        if (got := _no_file(path)) is None:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=parent)
            os.close(descriptor)
            os.unlink(temporary)
            return None
    except OSError as error:
        got = f"{parent}: {os.strerror(error.errno or 0)}"
    return Problem(
        str(path), "output", "a file that can be written", got, "check the path and rights"
    )


@contextlib.contextmanager
def publish_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling of `out` to fill; renames it to `out` when the block succeeds.

    On any error before the rename, a KeyboardInterrupt included, the temporary folder is removed and
    `out` is as it was; an error after it says that the new output is in place.
    Files are fsync'ed in name order with the manifest last.

    Raises:
        OutputError: `out` exists (and not `force`), or the file system said no.
    """
    check_output_free(out, force)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
        )
    except OSError as error:
        raise OutputError(
            Problem(str(out), "output", "a folder we may create", str(error), "check permissions")
        ) from error
    try:
        yield temporary
        mask = _umask()
        os.chmod(temporary, 0o777 & ~mask)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in files:
            if not path.is_symlink() and path.stat().st_nlink == 1:  # else it is not ours alone
                os.chmod(path, 0o666 & ~mask)  # some libraries write for their own user only
        files.sort(key=lambda path: path.name == MANIFEST_NAME)
        for path in files:
            _fsync(path)
        for folder in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
            _fsync(folder)
        _rename_over(temporary, out, force)
        _fsync_names(out)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            Problem(str(out), "output", "to be written whole", str(error), "free some space, retry")
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_file(path: Path, data: bytes) -> None:
    """Replaces one file atomically: temporary sibling, fsync, rename, fsync of the folder.

    Raises:
        OutputError: no regular file has this name, or the file system said no; what is there is
            untouched.
    """
    path = path.absolute()
    temporary = None
    try:
        if (got := _no_file(path)) is not None:
            raise OutputError(
                Problem(str(path), "output", "a file that can be written", got, "name another")
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        _fsync_names(path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            Problem(
                str(path), "output", "to be written whole", str(error), "check space and rights"
            )
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _rename_over(source: Path, out: Path, force: bool) -> None:
    """Moves the finished folder to its name; an old output is removed after that.

    The kernel exchanges the two names where it can, so the name is never missing. Elsewhere the old
    output is moved aside first, and put back when the second rename fails.
    """
    if not os.path.lexists(out):
        os.rename(source, out)
        return
    check_output_free(out, force)
    if _exchange(source, out):
        if source.is_symlink() or not source.is_dir():
            source.unlink()  # a folder is removed by `publish_folder`
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    try:
        os.rename(out, old / out.name)
        os.rename(source, out)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(old / out.name, out)
        raise
    finally:
        if os.path.lexists(out):  # else the old one is in `old`, and all there is
            shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step (`renameat2`, Linux); False where that is not to be had.

    Raises:
        OSError: the file system can, and said no.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or a C library without it
        return False
    names = os.fsencode(one), os.fsencode(other)
    if renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EPERM):  # kernel, file system, or a sandbox
        return False
    raise OSError(code, os.strerror(code), str(other))


def _fsync_names(out: Path) -> None:
    """Makes a rename last; when that fails, the output is in place all the same, and this says so."""
    try:
        _fsync(out.parent)
    except OSError as error:
        got = f"in place, but it may not survive a power cut: {error}"
        raise OutputError(
            Problem(str(out), "output", "a name that is on the disk", got, "check the disk, retry")
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    with _READING_UMASK:  # or two threads leave each other's mask behind
        mask = os.umask(0o077)  # to read it is to set it; meanwhile other threads get private files
        os.umask(mask)
    return mask
