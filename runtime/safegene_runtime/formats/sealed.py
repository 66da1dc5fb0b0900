"""What was checked is what is read: files that are opened once, hashed, and kept where nobody can write.

Between two reads a path can be made to lead to another file, and under a mapping a file can be edited
or cut. So a file that is to be checked is opened once, and its bytes go through the hash into a sealed
memfd: memory that the kernel lets nobody change, not even us. While a `SealedFiles` is entered,
`open_regular`, and so every reader of this package, gives the copy of a path instead of the path. Native
code gets `/proc/self/fd/N`. A folder that was closed holds what was added and nothing else.

Where the system has no memfd (any but Linux) the descriptor is kept instead: a reader must find the same
file behind the path, and `recheck` hashes it again after the load. That catches a file that was
exchanged or edited; it does not catch one that is edited while it is loaded and put back before the end.
A file that native code maps is copied into a folder of our own there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from safegene_runtime.errors import FormatError, Problem
from safegene_runtime.formats.files import CHECKED, CHUNK_BYTES, open_regular

__all__ = [
    "SealedFile",
    "SealedFiles",
    "has_memfd",
    "is_sealed",
    "native_path",
    "private_path",
    "recheck",
]

LINUX = sys.platform.startswith("linux")


def has_memfd() -> bool:
    """Whether this system has memory that can be sealed, and paths that lead to it."""
    return LINUX and hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


@dataclass(frozen=True)
class SealedFile:
    """One file that was read to its end.

    Attributes:
        path: where it was, absolute.
        sha256: of its bytes.
        descriptor: of the sealed copy, or of the file itself where there is none.
        is_copy: whether it is the copy.
    """

    path: str
    sha256: str
    descriptor: int
    is_copy: bool

    @property
    def place(self) -> str:
        """Where native code finds the bytes."""
        return f"/proc/self/fd/{self.descriptor}" if self.is_copy else self.path

    def open(self) -> io.BufferedReader:
        """The bytes, from their start.

        Raises:
            FormatError: another file has taken the path, where there is no copy.
        """
        # a new descriptor, with a position of its own
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        file = os.fdopen(os.open(self.place, flags), "rb")
        if not self.is_copy:
            found, kept = os.fstat(file.fileno()), os.fstat(self.descriptor)
            if (found.st_dev, found.st_ino) != (kept.st_dev, kept.st_ino):
                file.close()
                raise self._changed("another file")
        return file

    def recheck(self) -> None:
        """Hashes the file again where it could have changed.

        Raises:
            FormatError: it did.
        """
        if self.is_copy:
            return
        with self.open() as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise self._changed(f"SHA-256 {found}")

    def _changed(self, got: str) -> FormatError:
        fix = "it changed while it was being loaded: make sure that nobody writes there, and retry"
        return FormatError(Problem(self.path, "file", f"SHA-256 {self.sha256}", got, fix))


class SealedFiles:
    """The files of one load; entered, it is what readers see of them."""

    def __init__(self) -> None:
        self._files: dict[str, SealedFile] = {}
        self._folders: set[str] = set()
        self._gone: set[str] = set()
        self._outer: SealedFiles | None = None
        self._token: Any = None

    def add(
        self,
        path: Path,
        progress: Callable[[int], None] | None = None,
        *,
        follow_symlinks: bool = False,
        alone: bool = True,
    ) -> str:
        """Reads a file to its end and keeps what was read.

        Args:
            path: the file.
            progress: told the number of bytes after each chunk.
            follow_symlinks: for what the user named on the command line.
            alone: refuse a file that has a second name (a hard link).

        Returns:
            Its SHA-256.

        Raises:
            FormatError: as `open_regular`; it changed meanwhile, or there is no room for it.
        """
        with open_regular(path, follow_symlinks=follow_symlinks, alone=alone) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                descriptor, digest, done = _keep(file, size, progress)
            except OSError as error:
                raise FormatError(
                    Problem(
                        str(path), "copy", f"room in memory for {size} bytes", str(error),
                        "free some memory",
                    )
                ) from error  # fmt: skip
        if done != size:
            os.close(descriptor)
            raise FormatError(
                Problem(str(path), "size", f"{size} bytes", f"{done} or more",
                        "the file changed while it was read")
            )  # fmt: skip
        place = os.path.abspath(path)
        self._files[place] = SealedFile(place, digest, descriptor, has_memfd())
        return digest

    def close_folder(self, folder: Path) -> None:
        """From here on the folder holds what was added, whatever appears there."""
        self._folders.add(os.path.abspath(folder))

    def find(self, path: Path) -> SealedFile | None:
        """What was read of a path; None for a path that is none of ours.

        Raises:
            FormatError: a file of a closed folder that was not added.
        """
        place = os.path.abspath(path)
        found = self._files.get(place)
        if found is None and (place in self._gone or os.path.dirname(place) in self._folders):
            raise FormatError(
                Problem(str(path), "file", "one of those that were checked", "another", "retry")
            )
        return found or (self._outer.find(path) if self._outer else None)

    def release(self, *paths: Path) -> None:
        """Gives the memory of files back that nobody will read again."""
        for path in paths:
            if (file := self._files.pop(os.path.abspath(path), None)) is not None:
                os.close(file.descriptor)
                self._gone.add(file.path)

    def all_files(self) -> list[SealedFile]:
        """Every file that can be read, those of an outer `SealedFiles` too."""
        return [*(self._outer.all_files() if self._outer else ()), *self._files.values()]

    def to_json(self) -> dict[str, Any]:
        """What another process needs to read the same, if it inherits the descriptors."""
        files = [[f.path, f.sha256, f.descriptor, f.is_copy] for f in self.all_files()]
        folders = self._folders | (self._outer._folders if self._outer else set())
        return {"files": files, "folders": sorted(folders)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The other process's side of `to_json`."""
        made = cls()
        made._files = {entry[0]: SealedFile(*entry) for entry in value["files"]}
        made._folders = set(value["folders"])
        return made

    def __enter__(self) -> Self:
        self._outer = CHECKED.get()
        self._token = CHECKED.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        CHECKED.reset(self._token)
        self.close()

    def close(self) -> None:
        """Gives all memory back; what has mapped a copy keeps it."""
        while self._files:
            os.close(self._files.popitem()[1].descriptor)


def _keep(
    file: BinaryIO, size: int, progress: Callable[[int], None] | None
) -> tuple[int, str, int]:
    """Descriptor, digest and number of bytes of a copy of at most `size` bytes, and one more."""
    sealing = has_memfd()
    if sealing:
        kept = os.memfd_create("safegene", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        kept = os.dup(file.fileno())
    try:
        digest, done = hashlib.sha256(), 0
        view = memoryview(bytearray(CHUNK_BYTES))
        while done <= size and (count := file.readinto(view)):  # type: ignore[attr-defined]
            part = view[:count]
            digest.update(part)
            while sealing and part:
                part = part[os.write(kept, part) :]
            done += count
            if progress:
                progress(count)
        if sealing:
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(kept, fcntl.F_ADD_SEALS, seals)
        return kept, digest.hexdigest(), done
    except BaseException:
        os.close(kept)
        raise


def native_path(path: Path) -> str:
    """What native code is to open in a path's place."""
    checked = CHECKED.get()
    found = checked.find(path) if checked is not None else None
    return found.place if found is not None else str(path)


def is_sealed(path: Path) -> bool:
    """Whether readers of a path get a copy that nobody can change, and that can be mapped."""
    checked = CHECKED.get()
    found = checked.find(path) if checked is not None else None
    return found is not None and bool(found.is_copy)


@contextlib.contextmanager
def private_path(path: Path) -> Iterator[str]:
    """A place with a file's bytes that nobody else can change, for code that maps what it opens.

    What was mapped stays whole after the block.
    """
    checked = CHECKED.get()
    found = checked.find(path) if checked is not None else None
    if found is not None and found.is_copy:
        yield found.place
    elif has_memfd():
        with SealedFiles() as copy:
            copy.add(path, follow_symlinks=True, alone=False)
            yield native_path(path)
    else:
        with tempfile.TemporaryDirectory() as folder, open_regular(path) as file:
            place = Path(folder) / path.name
            place.write_bytes(file.read())
            if found is not None and hashlib.sha256(place.read_bytes()).hexdigest() != found.sha256:
                raise found._changed("other bytes")
            yield str(place)


def recheck() -> None:
    """Hashes what was loaded again, where it is not a sealed copy; see `SealedFile.recheck`."""
    checked = CHECKED.get()
    for file in checked.all_files() if checked is not None else ():
        file.recheck()
