"""Publishing is all or nothing, whatever happens; reading takes regular files only."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safegene_runtime.errors import FormatError, OutputError
from safegene_runtime.formats import files, publish
from safegene_runtime.formats.files import (
    open_regular,
    read_small_file,
    sha256_file,
    sha256_of,
)

CONTENT = {
    "model.gguf": b"weights" * 1000,
    "manifest.json": b"{}\n",
    "z.txt": b"",
    "sub/inner.bin": b"inner",
}


def _fill(folder: Path) -> None:
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def _fill_and(folder: Path, then: Callable[[], object]) -> None:
    _fill(folder)
    then()


def _raise(error: BaseException) -> None:
    raise error


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _in_child(work: Callable[[], object]) -> int:
    """Runs in a forked child: its exit status, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except OutputError:
            os._exit(3)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system whose C library has no renameat2."""
    monkeypatch.setattr(publish.ctypes, "CDLL", lambda *_, **__: object())


# --- publish_folder --------------------------------------------------------------------------------


def _link(path: Path) -> None:
    (path.parent / "real").write_text("x")
    path.symlink_to("real")


NOT_REGULAR: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing": ("No such file", lambda path: None),
    "link": ("a symbolic link", _link),
    "FIFO": ("a regular file", os.mkfifo),
    "folder": ("a regular file", os.mkdir),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", NOT_REGULAR)
@pytest.mark.parametrize("read", [open_regular, sha256_file, lambda path: read_small_file(path, 9)])
def test_only_regular_files_are_read_and_nothing_blocks(
    tmp_path: Path, kind: str, read: Callable[[Path], object]
) -> None:
    reason, make = NOT_REGULAR[kind]
    make(tmp_path / "x")
    with pytest.raises(FormatError, match=reason) as caught:
        read(tmp_path / "x")
    assert caught.value.problems[0].where == str(tmp_path / "x")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/full"])
def test_a_device_has_no_end_and_is_refused(device: str) -> None:
    with pytest.raises(FormatError, match="regular file"):
        open_regular(Path(device), follow_symlinks=True)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError) as caught:
        open_regular(tmp_path / name)
    assert str(caught.value).replace("\n", "").isprintable()


def test_refusals_leak_no_descriptors(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(FormatError):
            open_regular(tmp_path / "x")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_is_followed_where_the_user_named_it(tmp_path: Path) -> None:
    _link(tmp_path / "x")
    with open_regular(tmp_path / "x", follow_symlinks=True) as file:
        assert file.read() == b"x"


def test_a_small_file_is_read_whole_and_a_larger_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for size in (0, 1, 9):
        path.write_bytes(bytes(size))
        assert read_small_file(path, 9) == bytes(size)
    path.write_bytes(bytes(10))
    with pytest.raises(FormatError, match="size: expected at most 9 bytes, got 10 bytes"):
        read_small_file(path, 9)
    os.truncate(path, 1 << 40)
    with pytest.raises(FormatError, match="at most 9 bytes"):
        read_small_file(path, 9)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs a /proc")
def test_a_file_that_is_longer_than_it_says_is_refused() -> None:
    with pytest.raises(FormatError, match="size"):
        read_small_file(Path("/proc/self/status"), 1 << 20)


@pytest.mark.parametrize("size", [0, 1, files.CHUNK_BYTES, 2 * files.CHUNK_BYTES + 1])
def test_digests_are_hashlibs(tmp_path: Path, size: int) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    (tmp_path / "x").write_bytes(data)
    seen: list[int] = []
    expected = hashlib.sha256(data).hexdigest()
    assert sha256_file(tmp_path / "x", seen.append) == expected
    assert sha256_of(data) == sha256_of(memoryview(data)) == expected
    assert sum(seen) == size


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 300_000), max_size=8), seed=st.integers(0, 2**32))
def test_a_digest_that_follows_the_writer_is_the_digest_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    path = tmp_path_factory.mktemp("digest") / "file"
    data = random.Random(seed).randbytes(sum(sizes))
    with path.open("wb", buffering=0) as file:
        following, end = files.FollowingDigest(path), 0
        for size in sizes:
            file.write(data[end : end + size])
            end += size
            following.reached(end)
    assert following.result() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("announced", [0, 7, 9])
def test_a_digest_of_another_size_than_announced_is_refused(tmp_path: Path, announced: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    following = files.FollowingDigest(path)
    following.reached(announced)
    with pytest.raises(FormatError, match="size"):
        following.result()


def test_an_abandoned_digest_does_not_read_on(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # hours of hashing, and no byte on the disk
    following = files.FollowingDigest(path)
    following.reached(1 << 40)
    following.abandon()
    with pytest.raises(FormatError, match="size"):
        following.result()
