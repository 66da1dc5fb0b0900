"""What nobody means to type, and what an operating system says no to: exit 2, one message, no trace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from safegene_converter.cli import main
from safegene_converter.cli.stopping import Stopped, stoppable
from safegene_runtime import child, session
from safegene_runtime.child import python_environment
from safegene_runtime.errors import EngineError, SafeGeneError
from safegene_runtime.verifying import ladder

LONG = "x" * 300


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.peft_adapter("llama", tmp_path_factory.mktemp("hostile") / "adapter", scale=0.05)


def run(*arguments: object) -> int:
    """The exit code, whether it was returned or raised by the parser."""
    try:
        return main.main([os.fsdecode(os.fspath(one)) for one in map(_text, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)


def _text(argument: object) -> str | bytes:
    return argument if isinstance(argument, bytes) else str(argument)


def check_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, hint: str, *arguments: object
) -> None:
    """The command ends with 2 and one message, and `folder` holds what it held."""
    before = sorted(folder.rglob("*"))
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert hint in said.err
    assert "Traceback" not in said.err
    assert sorted(folder.rglob("*")) == before


# --- the operating system says no -----------------------------------------------------------------


@pytest.mark.parametrize("command", ["convert", "record", "inspect", "run", "demo"])
def test_a_name_too_long_is_a_message_and_never_a_verdict(
    command: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, base = tmp_path / LONG, tiny.gguf_model("llama")
    arguments = {
        "convert": (adapter, "--base", base, "-o", long),
        "record": (adapter, "--base", base, "-o", long),
        "inspect": (long,),
        "run": (long, "--prompt", "x"),
        "demo": ("-o", long),
    }[command]
    check_refused(capsys, tmp_path, "File name too long", command, *arguments)


def test_a_name_that_is_no_text_is_a_message(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = os.fsencode(tmp_path) + b"/b\xff.gguf"
    shutil.copy(tiny.gguf_model("llama"), base)
    for form in ("sidecar", "merged"):
        check_refused(
            capsys, tmp_path, "UTF-8", "convert", adapter, "--base", base, "--as", form,
            "-o", tmp_path / "out",
        )  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_a_message(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapter, tmp_path / "locked")
    (tmp_path / "locked").chmod(0)
    check_refused(capsys, tmp_path, "Permission denied", "inspect", tmp_path / "locked")


def test_an_error_without_a_name_is_still_one_line(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safegene_converter.describing.inspect", fail)
    assert run("inspect", adapter) == 2
    assert capsys.readouterr().err.splitlines()[1].endswith("got No space left on device")


@pytest.mark.parametrize("threads", [0, -1, 513, 100_000])
def test_threads_that_would_take_the_machine_down_are_refused_before_anything_is_read(
    threads: int, tmp_path: Path
) -> None:
    for check in (
        lambda: ladder.verify(tmp_path / "none", tmp_path / "none", threads=threads),
        lambda: session.open(tmp_path / "none", threads=threads),
    ):
        with pytest.raises(EngineError, match="threads: expected 1 to"):
            check()


# --- what is refused before any work ---------------------------------------------------------------


@pytest.mark.parametrize("command", ["convert", "record", "inspect", "demo"])
def test_json_that_cannot_be_written_is_refused_before_the_work(
    command: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tiny.gguf_model("llama"), tmp_path / "out"
    arguments = {
        "convert": (adapter, "--base", base, "-o", out),
        "record": (adapter, "--base", base, "-o", out),
        "inspect": (adapter,),
        "demo": ("-o", out),
    }[command]
    check_refused(
        capsys, tmp_path, "a file that can be written", command, *arguments, "--json", tmp_path
    )


@pytest.mark.parametrize("place", ["out/found.json", "adapter/found.json", "base.gguf"])
@pytest.mark.parametrize("command", ["convert", "record"])
def test_json_in_the_place_of_an_input_or_inside_the_output_is_refused(
    command: str, place: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copy(tiny.gguf_model("llama"), tmp_path / "base.gguf"))
    copied = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    before = base.read_bytes()
    check_refused(
        capsys, tmp_path, "of its own", command, copied, "--base", base, "-o", tmp_path / "out",
        "--json", tmp_path / place,
    )  # fmt: skip
    assert base.read_bytes() == before


@pytest.mark.parametrize("adapter_name", ["nothing", "wrong"])
def test_a_demo_that_cannot_be_made_leaves_the_earlier_one(
    adapter_name: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "demo"
    earlier.mkdir()
    (earlier / ".safegene-demo").touch()
    shutil.copytree(adapter, tmp_path / "wrong")  # of a tiny base
    check_refused(
        capsys, tmp_path, adapter_name, "demo", "--adapter", tmp_path / adapter_name,
        "-o", earlier,
    )  # fmt: skip


def test_a_demo_over_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    check_refused(capsys, tmp_path, "got a file", "demo", "-o", tmp_path / "file")


def test_replies_longer_than_the_context_are_refused_before_the_work(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(
        capsys, tmp_path, "context: expected at most", "record", adapter, "--base",
        tiny.hf_model("llama"), "--max-new-tokens", 100_000, "-o", tmp_path / "out",
    )  # fmt: skip


# --- what is shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a[v1]", "x[bold]8[", "[red]", "b\\"])
def test_a_path_is_shown_as_it_is_and_never_as_markup(
    name: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, name)
    assert run("inspect", name) == 0
    assert f"{name}: 6 modules" in capsys.readouterr().out
    out = f"{name}[/foo]" if "/" not in name else name
    base = tiny.gguf_model("llama")
    assert run("convert", name, "--base", base, "-o", out, "--as", "sidecar") == 0
    said = capsys.readouterr().out
    assert out in said
    assert f"+ {name} (default)" in said


def test_the_tensors_that_came_off_worst_are_named(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(
        "convert", adapter, "--base", tiny.gguf_model("llama"), "-o", out, "--no-self-check"
    ) == 0  # fmt: skip
    assert capsys.readouterr().out.count("_proj: gain ") == 3
    assert run("inspect", out, "--verbose") == 0
    assert capsys.readouterr().out.count("_proj: gain ") == 6


# --- signals ---------------------------------------------------------------------------------------


def _children(pid: int) -> list[int]:
    """The live child processes of a process, by what the kernel says."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(one) for one in task.read_text().split()]
    return found


def _until(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_conversion_leaves_no_folder_and_no_child(
    number: signal.Signals, adapter: Path, tmp_path: Path
) -> None:
    """Stopped while its self-check runs: that one is a child, and the folder is nearly done."""
    command = [
        sys.executable, "-m", "safegene_converter", "convert", str(adapter), "--base",
        str(tiny.gguf_model("llama")), "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    with subprocess.Popen(
        command, env=python_environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ours may run under nohup
    ) as running:  # fmt: skip
        _until(lambda: running.poll() is not None or _children(running.pid))
        assert list(tmp_path.glob(".out.*.partial"))
        (its_child,) = _children(running.pid)
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert f"stopped by {number.name}".encode() in said
    assert b"Traceback" not in said
    assert list(tmp_path.iterdir()) == []
    assert not Path(f"/proc/{its_child}").exists()


def test_a_signal_while_a_child_starts_waits_until_it_can_be_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel may give it to another thread than the one that starts the child."""
    original, started = child._start, []

    def start(*arguments: Any) -> Any:
        started.append(original(*arguments))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return started[0]

    monkeypatch.setattr(child, "_start", start)
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        with pytest.raises(Stopped, match="SIGTERM"), stoppable():
            child.run_child(["sleep", "60"], what="a test", error=SafeGeneError)
    finally:
        ended.set()
        other.join()
    assert started[0].poll() == -signal.SIGKILL


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_as_they_were_afterwards() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Stopped, match="SIGTERM"), stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before
