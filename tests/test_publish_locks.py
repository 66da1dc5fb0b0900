"""Several that publish at one name, what dead ones left, and file systems that are full."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_files import CONTENT, _fill, _fill_and, _raise, _tree

from safegene_runtime.errors import OutputError
from safegene_runtime.formats.publish import publish_folder


def _at_once(works: list[Callable[[], object]]) -> list[int]:
    """Forked children that run at the same time: exit status 0, or 3 for an OutputError."""

    children = []
    for work in works:
        if not (child := os.fork()):
            try:
                work()
                os._exit(0)
            except OutputError:
                os._exit(3)
            finally:
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.timeout(60)
def test_of_eight_that_write_one_output_one_wins_and_the_others_say_why(tmp_path: Path) -> None:
    """The others begin while the winner is at work, which ends when they have."""
    go, done = os.pipe(), os.pipe()

    def win() -> None:
        with publish_folder(tmp_path / "out", force=True) as folder:
            os.write(go[1], bytes(7))
            for _ in range(7):
                os.read(done[0], 1)
            _fill(folder)

    def lose() -> None:
        os.read(go[0], 1)
        try:
            with publish_folder(tmp_path / "out", force=True):
                pass
        except OutputError as error:
            (problem,) = error.problems
            if "another process that writes it now" in problem.got:
                raise
        finally:
            os.write(done[1], b"x")

    assert _at_once([win] + [lose] * 7) == [0] + [3] * 7
    assert _tree(tmp_path / "out") == CONTENT
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.timeout(60)
def test_eight_that_race_for_one_name_leave_one_whole_output(tmp_path: Path) -> None:
    """Without --force: who comes second is told of the lock, or of the output that is there."""
    for number in range(20):
        out = tmp_path / f"{number}" / "out"

        def work(out: Path = out) -> None:
            with publish_folder(out) as folder:
                _fill(folder)

        assert sorted(_at_once([work] * 8)) == [0] + [3] * 7
        assert _tree(out) == CONTENT
        assert os.listdir(out.parent) == ["out"]


def test_threads_keep_each_other_out_as_processes_do(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "out") as folder:
        _fill(folder)
        with (
            pytest.raises(OutputError, match="another process that writes it now"),
            publish_folder(tmp_path / "out"),
        ):
            pytest.fail("the block must not run")
    assert _tree(tmp_path / "out") == CONTENT


@pytest.mark.parametrize("missing", ["module", "file system"])
def test_without_locks_it_still_publishes_and_collects_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing == "module":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        no = OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(fcntl, "flock", lambda *_: _raise(no))
    another = tmp_path / ".out.0123abcd.partial"
    another.mkdir()
    for _ in range(2):
        with publish_folder(tmp_path / "out", force=True) as folder:
            _fill(folder)
    assert sorted(os.listdir(tmp_path)) == [another.name, "out"], "it may be of one that lives"


def test_names_that_are_not_ours_are_not_collected(tmp_path: Path) -> None:
    mine = [".out.partial", ".out.12345678.partial.bak", ".other.12345678.partial", ".out.mine.old"]
    for name in mine:
        (tmp_path / name).mkdir()
    stale = tmp_path / ".out.12345678.partial"
    stale.symlink_to(tmp_path / ".other.12345678.partial")
    with publish_folder(tmp_path / "out") as folder:
        _fill(folder)
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, "out"])


def test_room_is_asked_for_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(
            OutputError, match=r"room for 1,152,921,504,606,846,976 bytes.*bytes that are free"
        ),
        publish_folder(tmp_path / "out", needs=1 << 60),
    ):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_message_with_bytes_needed_and_free(tmp_path: Path, code: int) -> None:
    full = OSError(code, os.strerror(code))
    with (
        pytest.raises(
            OutputError, match=r"room for 7,008 bytes or more.*[\d,]+ bytes are free"
        ) as got,
        publish_folder(tmp_path / "out", needs=5) as folder,
    ):
        _fill_and(folder, lambda: _raise(full))
    assert len(got.value.problems) == 1
    assert os.listdir(tmp_path) == []
