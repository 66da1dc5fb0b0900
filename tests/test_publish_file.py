"""Publishing one file."""

from __future__ import annotations

import os
import resource
import signal
import stat
from pathlib import Path

import pytest
from test_files import _in_child
from test_publish import _kill_everywhere

from safegene_runtime.errors import OutputError
from safegene_runtime.formats.publish import check_writable, publish_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    for data in (b"old", b"new and longer", b""):
        publish_file(path, data)
        assert path.read_bytes() == data
        assert os.listdir(path.parent) == ["x.json"]


def test_replacing_a_link_leaves_what_it_pointed_to(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "x").symlink_to("target")
    publish_file(tmp_path / "x", b"new")
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "x").read_bytes() == b"new"
    assert not (tmp_path / "x").is_symlink()


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_is_not_replaced_by_one(linked: bool, tmp_path: Path) -> None:
    """A device, say, or a link to one; a FIFO stands for them."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    path = tmp_path / ("link" if linked else "fifo")
    problem = check_writable(path)
    assert problem is not None
    assert problem.got == "something that is no file"
    with pytest.raises(OutputError, match="something that is no file"):
        publish_file(path, b"x")
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert path.is_symlink() is linked
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link"]


@pytest.mark.timeout(60)
def test_killed_at_any_step_a_file_is_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "out"
    states = set()
    path.write_bytes(b"old")

    def check(status: int) -> None:
        states.add(path.read_bytes())
        assert status or os.listdir(tmp_path) == ["out"]
        publish_file(path, b"old")
        assert os.listdir(tmp_path) == ["out"], "what a dead run left goes with the next"

    _kill_everywhere(lambda: publish_file(path, b"new"), check)
    assert states == {b"old", b"new"}


def test_a_file_that_cannot_be_written_keeps_its_old_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
        publish_file(path, bytes(17))

    assert _in_child(work) == 3, "an OutputError"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OutputError, match="a folder"):
        publish_file(tmp_path / "x", b"new")
    assert os.listdir(tmp_path) == ["x"]


# --- reading ---------------------------------------------------------------------------------------
