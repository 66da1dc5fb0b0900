"""Running someone else's code in a process of its own.

llama.cpp's converter is a script, and libllama aborts the whole process on some inputs. Both run as
children: their death is an error message here, and nothing of theirs stays in our memory.

A child imports nothing from the folder that we happen to stand in, and none may go on for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from safegene_runtime.errors import Problem, SafeGeneError
from safegene_runtime.extras import missing_package
from safegene_runtime.progress import Step

__all__ = [
    "Held", "answer_job", "deadline_for", "describe_end", "import_path", "last_lines", "python_command",
    "python_environment", "run_child", "run_job",
]  # fmt: skip

POLL_SECONDS = 0.1
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MESSAGE_LINES = 6
LEAST_SECONDS = 600.0
LEAST_BYTES_PER_SECOND = 2 << 20
"""Of a child that reads and computes on a slow, busy machine; beyond it we call it a hang."""


def run_child(
    command: Sequence[str | Path],
    *,
    what: str,
    error: type[SafeGeneError],
    fix: str = "",
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    deadline_s: float = LEAST_SECONDS,
    grows: Path | None = None,
    progress: Step | None = None,
) -> str:
    """Runs a command to its end and returns its standard output.

    Args:
        command: program and arguments; no shell is involved.
        what: what the child does, for the message.
        error: raised when it fails, with the last lines it wrote.
        fix: the next step then.
        stdin: what it reads.
        environment: its whole environment; ours by default.
        deadline_s: seconds after which it is killed; every time that its file grows they begin anew.
        grows: a file it writes.
        progress: told the bytes by which that file grew.

    Raises:
        SafeGeneError: of type `error`: it could not start, failed, was killed by a signal, or took too long.
    """
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as log,
        tempfile.TemporaryFile() as given,
    ):
        given.write(stdin)
        given.seek(0)
        # while it starts nobody could end it: a signal waits until there is a child to kill
        held = Held()
        try:
            child = _start(command, given, out, log, environment)
        except OSError as cause:
            held.release()
            raise error(
                Problem(what, "child process", "to start", str(cause), "check the installation")
            ) from cause
        try:
            held.release()
            in_time = _wait(child, deadline_s, grows, progress)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        log.seek(0)
        out.seek(0)
        output = out.read().decode("utf-8", "replace")
        if child.returncode != 0:
            died = (
                describe_end(child.returncode)
                if in_time
                else f"no end within {deadline_s:.0f} s: it was killed"
            )
            # what went wrong stands last on standard error, not behind what was said on the way
            last = last_lines(output + "\n" + log.read().decode("utf-8", "replace"))
            raise error(
                Problem(what, "child process", "to succeed", " | ".join([died, *last]), fix)
            )
        return output


def deadline_for(*paths: Path | None) -> float:
    """Seconds that reading and computing on these files, or the files of these folders, may take."""
    size = 0
    for path in filter(None, paths):
        files = [path] if path.is_file() else path.rglob("*")
        with contextlib.suppress(OSError):
            size += sum(one.stat().st_size for one in files if one.is_file())
    return LEAST_SECONDS + size / LEAST_BYTES_PER_SECOND


def last_lines(text: str) -> list[str]:
    """The last lines that a process wrote, without the empty ones."""
    return [line.strip() for line in text.split("\n") if line.strip()][-MESSAGE_LINES:]


def describe_end(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def run_job(
    module: str,
    job: Mapping[str, Any],
    *,
    what: str,
    error: type[SafeGeneError],
    deadline_s: float = LEAST_SECONDS,
) -> dict[str, Any]:
    """Runs a module of ours that ends in `answer_job`, and returns its answer.

    Args:
        module: its name.
        job: what it is to do, in JSON's types.
        what: what it does, for the message.
        error: raised when it fails.
        deadline_s: seconds that it may take.

    Raises:
        SafeGeneError: of type `error`, as from `run_child`.
    """
    output = run_child(
        python_command("-m", module),
        what=what,
        error=error,
        deadline_s=deadline_s,
        stdin=json.dumps(job).encode(),
        environment=python_environment(),
    )
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def answer_job(run: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """The child's side: one job in, one line of JSON out, the reasons of a failure on standard error."""
    try:
        found = run(json.load(sys.stdin))
    except (SafeGeneError, ImportError) as error:
        print(missing_package(error) or error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


def python_command(*arguments: str | Path) -> list[str | Path]:
    """A child Python that puts neither the current folder nor a script's on its path."""
    return [sys.executable, "-P", *arguments]


def import_path() -> list[str]:
    """Where a child finds what we found: our path without the current folder.

    We may have been started with it (`python -m`), but what lies there must not run in place of a library.
    It stays only where our own packages are there.
    """
    here, own = os.path.realpath(os.getcwd()), {str(Path(__file__).resolve().parents[1])}
    entries = [os.path.abspath(entry) for entry in sys.path if entry]
    return [one for one in entries if one in own or os.path.realpath(one) != here]


def python_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment for a child Python: our packages, no network, no bytecode left behind."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(import_path()),
        "PYTHONSAFEPATH": "1",  # for the children of a child
        # ggml would start a debugger, or hang in its own backtrace, before it aborts
        "GGML_NO_BACKTRACE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        **(extra or {}),
    }


class Held:
    """Signals that Python handles, kept from their handlers until `release`.

    Masking them would not do: it holds for one thread, and the kernel gives a signal to any that has
    not masked it, a BLAS worker for one; Python then interrupts the main thread all the same.
    """

    def __init__(self) -> None:
        self._came: list[int] = []
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # the only one they interrupt
            for number in STOPPING:
                if callable(handler := signal.getsignal(number)):
                    self._handlers[number] = handler
                    signal.signal(number, lambda number, frame: self._came.append(number))

    def release(self) -> None:
        """Puts the handlers back, and calls them for what came."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for number in self._came:
            self._handlers[number](number, None)


def _start(
    command: Sequence[str | Path],
    stdin: IO[bytes],
    stdout: IO[bytes],
    stderr: IO[bytes],
    environment: Mapping[str, str] | None,
) -> subprocess.Popen[bytes]:
    parts = [str(part) for part in command]
    return subprocess.Popen(parts, stdin=stdin, stdout=stdout, stderr=stderr, env=environment)


def _wait(
    child: subprocess.Popen[bytes],
    deadline_s: float,
    grows: Path | None,
    progress: Step | None,
) -> bool:
    """Waits for the child, reporting how a file grows; False where it took too long."""
    seen, alive = 0, time.monotonic()
    running = True
    while running and time.monotonic() - alive < deadline_s:
        try:
            rest = deadline_s - (time.monotonic() - alive)
            child.wait(rest if grows is None else min(POLL_SECONDS, rest))
            running = False
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(OSError):
            size = grows.stat().st_size if grows is not None else 0
            if size > seen:
                if progress is not None:
                    progress(size - seen)
                seen, alive = size, time.monotonic()
    return not running
