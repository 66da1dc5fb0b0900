"""Publishing a folder or a file: it is there whole, or the old one is."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_files import CONTENT, _fill, _fill_and, _in_child, _raise, _tree, _without_exchange

from safegene_converter.cli.stopping import Stopped, stoppable
from safegene_runtime.errors import EngineError, OutputError
from safegene_runtime.formats import publish
from safegene_runtime.formats.publish import check_output_free, publish_file, publish_folder


def test_a_folder_appears_under_its_name_with_all_that_was_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "parent" / "out"
    with publish_folder(out) as folder:
        assert folder.parent == out.parent, "a sibling: on the same file system"
        assert not out.exists()
        _fill(folder)
    assert _tree(out) == CONTENT
    assert os.listdir(out.parent) == ["out"]


def test_a_relative_name_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with publish_folder(Path("out")) as folder:
        _fill(folder)
        monkeypatch.chdir("/")
    assert _tree(tmp_path / "out") == CONTENT


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(2), MemoryError(), GeneratorExit()]
)
@pytest.mark.parametrize("force", [False, True])
def test_an_exception_leaves_everything_as_it_was(
    tmp_path: Path, error: BaseException, force: bool
) -> None:
    out = tmp_path / "out"
    if force:
        out.mkdir()
        (out / "old").write_text("old")
    with pytest.raises(type(error)), publish_folder(out, force) as folder:
        _fill_and(folder, lambda: _raise(error))
    assert os.listdir(tmp_path) == (["out"] if force else [])
    assert not force or _tree(out) == {"old": b"old"}


def test_an_error_of_the_operating_system_becomes_an_output_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"out: output: .*No space left"),
        publish_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(EngineError), publish_folder(tmp_path / "out"):
        raise EngineError([])
    assert os.listdir(tmp_path) == []


def test_a_disk_that_refuses_to_sync_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OutputError, match="Input/output"),
        publish_folder(tmp_path / "out") as folder,
    ):
        _fill(folder)
    assert os.listdir(tmp_path) == []


def test_a_file_too_large_for_the_file_system_leaves_nothing(tmp_path: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with publish_folder(tmp_path / "out") as folder:
            _fill(folder)

    assert _in_child(work) == 3, "an OutputError"
    assert os.listdir(tmp_path) == []


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The fsyncs and renames, in order, by the path they work on; they still happen."""
    seen: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_fsync(descriptor)

    def rename(source: Any, target: Any, **options: Any) -> None:
        seen.append(("rename", Path(target).name))
        real_rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    return seen


def test_files_are_synced_then_the_manifest_then_folders_then_renamed(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    with publish_folder(tmp_path / "out") as folder:
        _fill(folder)
    assert steps == [
        ("fsync", "model.gguf"),
        ("fsync", "inner.bin"),
        ("fsync", "z.txt"),
        ("fsync", "manifest.json"),
        ("fsync", "sub"),
        ("fsync", folder.name),
        ("rename", "out"),
        ("fsync", tmp_path.name),
    ]


def _killed_at(step: int, work: Callable[[], object]) -> int:
    """Runs `work` in a child that dies by SIGKILL before its `step`-th fsync or rename."""

    def child() -> None:
        left = step

        def dying(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: Any, **options: Any) -> object:
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return real(*arguments, **options)

            return call

        for name in ("fsync", "rename", "replace", "open", "mkdir", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        work()

    return _in_child(child)


def _kill_everywhere(work: Callable[[], object], check: Callable[[int], object]) -> int:
    """Calls `check` after a death at each step, then after a run that finished."""
    for step in range(1000):
        status = _killed_at(step, work)
        assert status in (0, -signal.SIGKILL)
        check(status)
        if not status:
            return step
    raise AssertionError("the work never ends")


def _partial(folder: Path) -> list[str]:
    names = [path.name for path in folder.iterdir() if path.name != "out"]
    assert all(
        name.startswith(".out.") and name.endswith((".partial", ".old", ".lock")) for name in names
    )
    return names


def _next_run_collects(folder: Path, there: dict[str, bytes] | None = None) -> None:
    """What a dead run left goes with the next one; an old output is never lost, even if that fails."""
    with pytest.raises(EngineError), publish_folder(folder / "out", force=True):
        raise EngineError([])
    if there is not None:
        assert os.listdir(folder) == ["out"]
        assert _tree(folder / "out") == there
    with publish_folder(folder / "out", force=True) as partial:
        _fill(partial)
    assert os.listdir(folder) == ["out"]


@pytest.mark.timeout(60)
def test_killed_at_any_step_the_output_is_absent_or_complete(tmp_path: Path) -> None:
    states = set()

    def work() -> None:
        with publish_folder(tmp_path / "out") as folder:
            _fill(folder)

    def check(status: int) -> None:
        exists = (tmp_path / "out").exists()
        assert not exists or _tree(tmp_path / "out") == CONTENT
        assert exists or status
        states.add(exists)
        assert status or not _partial(tmp_path)
        _next_run_collects(tmp_path)
        shutil.rmtree(tmp_path / "out")

    assert _kill_everywhere(work, check) > 10
    assert states == {False, True}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_any_step_of_replacing_the_old_or_the_new_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        _without_exchange(monkeypatch)
    states = set()
    out, old = tmp_path / "out", {"old": b"old"}
    out.mkdir()
    (out / "old").write_text("old")

    def work() -> None:
        with publish_folder(out, force=True) as folder:
            _fill(folder)

    def check(status: int) -> None:
        found = _tree(out) if out.exists() else None
        aside = [_tree(path) for path in tmp_path.glob(".out.*.old/out")]
        states.add("new" if found == CONTENT else "old" if found == old else "aside")
        assert found in (CONTENT, old) or (found is None and aside == [old])
        assert status or (found == CONTENT and not _partial(tmp_path))
        _next_run_collects(tmp_path, found if found is not None else old)
        shutil.rmtree(out)
        out.mkdir()
        (out / "old").write_text("old")

    _kill_everywhere(work, check)
    assert states == ({"old", "new"} if exchange else {"old", "aside", "new"})


def test_a_name_that_is_replaced_is_never_missing(tmp_path: Path) -> None:
    out, missing, done = tmp_path / "out", 0, threading.Event()
    out.mkdir()

    def poll() -> None:
        nonlocal missing
        while not done.is_set():
            missing += not os.path.lexists(out)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        for _ in range(50):
            with publish_folder(out, force=True) as folder:
                _fill(folder)
    finally:
        done.set()
        poller.join()
    assert not missing
    assert os.listdir(tmp_path) == ["out"]


def test_a_parent_that_cannot_be_synced_is_said_and_the_output_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = publish._fsync

    def fsync(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(publish, "_fsync", fsync)
    with (
        pytest.raises(OutputError, match=r"in place, but .*power cut.*Input/output"),
        publish_folder(tmp_path / "out") as folder,
    ):
        _fill(folder)
    assert _tree(tmp_path / "out") == CONTENT
    with pytest.raises(OutputError, match=r"in place, but .*power cut"):
        publish_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_replacement_that_fails_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, failing: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    _without_exchange(monkeypatch)
    real, calls = os.rename, 0

    def rename(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise error
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), publish_folder(out, force=True) as folder:
        _fill(folder)
    assert _tree(out) == {"old": b"old"}
    assert os.listdir(tmp_path) == ["out"]


def _old_folder(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text("old")
    (out / "extra").write_text("old")


def _old_link(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    (out.parent / "elsewhere" / "precious").write_text("precious")
    out.symlink_to("elsewhere")


EXISTING: dict[str, Callable[[Path], object]] = {
    "folder": _old_folder,
    "empty folder": Path.mkdir,
    "file": lambda out: out.write_text("old"),
    "link": _old_link,
    "dangling link": lambda out: out.symlink_to("nowhere"),
    "FIFO": os.mkfifo,
}


@pytest.mark.parametrize("kind", EXISTING)
def test_an_existing_output_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    EXISTING[kind](out)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OutputError, match="--force"):
        check_output_free(out, force=False)
    with pytest.raises(OutputError, match="--force"), publish_folder(out):
        pytest.fail("the block must not run")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", EXISTING)
def test_force_replaces_whatever_has_the_name_and_nothing_else(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    EXISTING[kind](out)
    check_output_free(out, force=True)
    with publish_folder(out, force=True) as folder:
        _fill(folder)
    assert not out.is_symlink()
    assert _tree(out) == CONTENT
    rest = {path.name for path in tmp_path.iterdir()} - {"out"}
    assert rest == ({"elsewhere"} if kind == "link" else set())
    assert kind != "link" or (tmp_path / "elsewhere" / "precious").read_text() == "precious"


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError), publish_folder(tmp_path / "out") as folder:
        _fill_and(folder, lambda: _old_folder(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "extra").read_text() == "old"


def test_force_never_deletes_the_folder_one_works_in_or_lives_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / "me").mkdir(parents=True)
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    monkeypatch.chdir(tmp_path / "work" / "here")
    for name in (".", "..", str(tmp_path), "/", "~", "~/.."):
        with pytest.raises(OutputError, match="delete all of it"):
            check_output_free(Path(name).expanduser(), force=True)
    check_output_free(Path("out"), force=True)
    (tmp_path / "link").symlink_to(tmp_path)
    check_output_free(tmp_path / "link", force=True)  # only the link would go


def test_an_output_is_apart_from_what_it_is_made_from(tmp_path: Path) -> None:
    """With --force it would delete its own input; inside, it would become a part of it."""
    inputs = [tmp_path / "in" / "adapter", tmp_path / "in" / "base.gguf"]
    inputs[0].mkdir(parents=True)
    inputs[1].touch()
    (tmp_path / "link").symlink_to(inputs[0])
    (tmp_path / "folder").symlink_to(tmp_path / "in")
    wrong = {"in": "holds", "in/adapter": "holds", "in/base.gguf": "holds", "in/adapter/out": "inside",
             "link/out": "inside", "folder/adapter": "holds", "in/x/../adapter": "holds"}  # fmt: skip
    for name, how in wrong.items():
        with pytest.raises(OutputError, match=f"one (that )?{how} the input"):
            check_output_free(tmp_path / name, True, inputs)
    with pytest.raises(OutputError, match="holds the input"):
        check_output_free(tmp_path / "link", True, [tmp_path / "link"])
    for name in ("in/out", "in/adapter-2", "link"):  # of a link only the link would go
        check_output_free(tmp_path / name, True, inputs)


@pytest.mark.parametrize("below", ["out", "a/out", "a/b/c/out"])
@pytest.mark.parametrize("force", [False, True])
def test_a_file_where_a_folder_is_needed_is_refused_before_any_work(
    tmp_path: Path, below: str, force: bool
) -> None:
    """Also what a read-only parent looks like to a user who is not root."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file: output: expected a folder to write into"):
        check_output_free(tmp_path / "file" / below, force)
    with pytest.raises(OutputError), publish_folder(tmp_path / "file" / below, force):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="too long"), publish_folder(tmp_path / ("n" * 250)):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write where nobody else may")
def test_a_parent_that_is_read_only_is_an_output_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="denied"), publish_folder(tmp_path / "out"):
        pytest.fail("the block must not run")


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def test_rights_are_those_the_user_asked_for(tmp_path: Path, umask: int) -> None:
    theirs = tmp_path / "theirs"
    theirs.touch()
    theirs.chmod(0o640)
    with publish_folder(tmp_path / "out") as folder:
        _fill(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "private until it is done"
        publish_file(folder / "late", b"x")
        (folder / "private").touch(0o600)  # as safetensors writes
        (folder / "link").symlink_to(theirs)
        os.link(theirs, folder / "shared")
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o640, "not ours"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    for name in (*CONTENT, "late", "private"):
        if (tmp_path / "out" / name).is_file():
            assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o666 & ~umask
    assert os.umask(umask) == umask, "the process keeps its own"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [1, 2])
def test_a_signal_between_two_renames_leaves_the_old_or_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, after: int
) -> None:
    _without_exchange(monkeypatch)
    out, real, calls = tmp_path / "out", os.rename, 0
    _old_folder(out)
    old = _tree(out)

    def rename(source: Any, target: Any) -> None:
        nonlocal calls
        real(source, target)
        calls += 1
        if calls == after:
            os.kill(os.getpid(), number)

    def work() -> None:
        with (
            contextlib.suppress(KeyboardInterrupt, Stopped),
            stoppable(),
            publish_folder(out, force=True) as folder,
        ):
            _fill(folder)

    monkeypatch.setattr(os, "rename", rename)
    assert _in_child(work) == 0
    assert _tree(out) == (old if after == 1 else CONTENT)
    assert os.listdir(tmp_path) == ["out"]
