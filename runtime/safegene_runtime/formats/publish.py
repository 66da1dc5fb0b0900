"""Publishing files and folders that must never be half there.

Everything is written into a sibling of the final name, each file is fsync'ed, the manifest comes last,
then one rename makes it visible and the parent is fsync'ed (Pillai et al., OSDI 2014). Killed at any
moment, the final name is absent, the old output, or the complete new one.

    .NAME.lock            held by who writes NAME (flock: the lock of a dead process is free)
    .NAME.TOKEN.partial   what is being written; after an exchange of names, the old output
    .NAME.TOKEN.old       holds the old output between two renames, where names cannot be exchanged

Who holds the lock collects what dead processes left: an old output whose name is missing is put back,
everything else is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from safegene_runtime.errors import OutputError, Problem
from safegene_runtime.formats.files import MANIFEST_NAME

__all__ = ["check_output_free", "check_writable", "publish_file", "publish_folder"]

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What `flock` says on a file system that has none: there, nobody is kept out, and nothing collected."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
PATIENCE = 10.0
"""Seconds that a file waits for another process that writes it: writing one takes milliseconds."""
ANY_TOKEN = "[0-9a-f]{8}"
_READING_UMASK = threading.Lock()


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
            probe = _sibling(parent / path.name, secrets.token_hex(4))
            probe.touch(exist_ok=False)
            probe.unlink(missing_ok=True)  # whoever publishes there now may have collected it
            return None
    except OSError as error:
        got = f"{parent}: {os.strerror(error.errno or 0)}"
    return Problem(
        str(path), "output", "a file that can be written", got, "check the path and rights"
    )


@contextlib.contextmanager
def publish_folder(out: Path, force: bool = False, needs: int = 0) -> Iterator[Path]:
    """Yields a temporary sibling of `out` to fill; renames it to `out` when the block succeeds.

    Meanwhile no other process can publish there. On any error before the rename, a KeyboardInterrupt
    included, the temporary folder is removed and `out` is as it was; an error after it says that the
    new output is in place. Files are fsync'ed in name order with the manifest last.

    Args:
        out: the final name.
        force: whether what has that name may be replaced.
        needs: bytes that will be written at least; without room for them the block does not run.

    Raises:
        OutputError: `out` exists (and not `force`), another process writes it, there is no room, or the
            file system said no.
    """
    check_output_free(out, force)
    out = out.absolute()
    temporary = _sibling(out, token := secrets.token_hex(4))
    written = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(out, token):
            check_output_free(out, force)  # another may have finished, or an old one was put back
            _check_room(out, needs)
            temporary.mkdir(0o700)
            try:
                yield temporary
                _make_durable(temporary)
                _rename_over(temporary, out, force)
                _fsync_names(out)
            except OSError:
                written = _size(temporary)
                raise
    except OutputError:
        raise
    except OSError as error:
        raise _failure(out, error, max(needs, written)) from error


def publish_file(path: Path, data: bytes) -> None:
    """Replaces one file atomically: temporary sibling, fsync, rename, fsync of the folder.

    Of several processes that write one file, the last one wins.

    Raises:
        OutputError: no regular file has this name, another process does not let go of it, or the file
            system said no; what is there is untouched.
    """
    path = path.absolute()
    temporary = _sibling(path, token := secrets.token_hex(4))
    try:
        if (got := _no_file(path)) is not None:
            raise OutputError(
                Problem(str(path), "output", "a file that can be written", got, "name another")
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path, token, PATIENCE):
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _fsync_names(path)
    except OutputError:
        raise
    except OSError as error:
        raise _failure(path, error, len(data)) from error


def _sibling(path: Path, token: str, kind: str = "partial") -> Path:
    return path.with_name(f".{path.name}.{token}.{kind}")


def _failure(path: Path, error: OSError, needed: int) -> OutputError:
    """What the file system said, as one message; where it is full, with bytes needed and free."""
    expected, got, fix = "to be written whole", str(error), "check the path, rights and the disk"
    if error.errno in NO_ROOM:
        expected, fix = f"room for {needed:,} bytes or more", "free some space, or write elsewhere"
        with contextlib.suppress(OSError):
            got += f"; {shutil.disk_usage(path.parent).free:,} bytes are free"
    return OutputError(Problem(str(path), "output", expected, got, fix))


def _check_room(out: Path, needs: int) -> None:
    """Raises when the file system has less room than will be needed; a quota is not seen."""
    free = shutil.disk_usage(out.parent).free
    if needs > free:
        raise OutputError(
            Problem(
                str(out), "output", f"room for {needs:,} bytes", f"{free:,} bytes that are free",
                "free some space, or choose another -o",
            )
        )  # fmt: skip


@contextlib.contextmanager
def _alone(path: Path, token: str, patience: float = 0.0) -> Iterator[None]:
    """Keeps other processes and threads from publishing at `path`; collects before and after.

    Where there are no locks, only what has our own `token` is collected.

    Raises:
        OutputError: another one publishes there, for `patience` seconds at least.
    """
    lock = path.with_name(f".{path.name}.lock")
    descriptor = _take(lock, path, patience)
    mine = token if descriptor is None else ANY_TOKEN
    try:
        if descriptor is not None:
            _collect(path, mine)
        yield
    finally:
        _collect(path, mine)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                lock.unlink()  # before it is let go of: who waits sees that it is another's
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _take(lock: Path, path: Path, patience: float) -> int | None:
    """The descriptor that holds the lock; None on a system or file system without `flock`."""
    try:
        import fcntl
    except ImportError:
        return None
    until = time.monotonic() + patience
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(lock, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.lstat(lock)):
                kept, descriptor = descriptor, -1
                return kept
        except FileNotFoundError:
            pass  # its holder ended in between, and removed it
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise OutputError(
                    Problem(
                        str(path), "output", "a name that nobody else is writing",
                        f"another process that writes it now (it holds {lock.name})",
                        "wait for it, or choose another -o",
                    )
                ) from error  # fmt: skip
            time.sleep(0.02)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            lock.unlink(missing_ok=True)
            return None
        finally:
            if descriptor != -1:
                os.close(descriptor)


def _collect(path: Path, token: str) -> None:
    """Puts an old output back whose name is missing, and removes temporaries; what resists is left."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{token}\.(partial|old)")
    with contextlib.suppress(OSError):
        found = [one for name in os.listdir(path.parent) if pattern.fullmatch(name)
                 for one in [path.with_name(name)]]  # fmt: skip
        # old ones before the rest, the latest first: the one that had the name last
        for one in sorted(found, key=lambda one: (one.suffix != ".old", -one.lstat().st_mtime_ns)):
            with contextlib.suppress(OSError):
                kept = one / path.name
                if one.suffix == ".old" and os.path.lexists(kept) and not os.path.lexists(path):
                    os.rename(kept, path)
                if one.is_symlink() or not one.is_dir():  # after an exchange, what was replaced
                    one.unlink()
                else:
                    shutil.rmtree(one)


def _make_durable(folder: Path) -> None:
    """Gives everything the user's rights, and fsyncs it: files, the manifest, folders."""
    mask = _umask()
    os.chmod(folder, 0o777 & ~mask)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        if not path.is_symlink() and path.stat().st_nlink == 1:  # else it is not ours alone
            os.chmod(path, 0o666 & ~mask)  # some libraries write for their own user only
    files.sort(key=lambda path: path.name == MANIFEST_NAME)
    for path in files:
        _fsync(path)
    for one in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _fsync(one)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    with contextlib.suppress(OSError):
        return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    return 0


def _rename_over(source: Path, out: Path, force: bool) -> None:
    """Moves the finished folder to its name.

    The kernel exchanges the two names where it can, so the name is never missing. Elsewhere the old
    output is moved aside first. `_collect` removes it from either place, or puts it back.
    """
    if not os.path.lexists(out):
        os.rename(source, out)
        return
    check_output_free(out, force)
    if not _exchange(source, out):
        aside = source.with_suffix(".old")
        aside.mkdir(0o700)
        os.rename(out, aside / out.name)
        os.rename(source, out)


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
