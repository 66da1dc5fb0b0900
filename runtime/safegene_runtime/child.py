"""Running someone else's code in a process of its own.

llama.cpp's converter is a script, and libllama aborts the whole process on some inputs. Both run as
children: their death is an error message here, and nothing of theirs stays in our memory.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from safegene_runtime.errors import Problem, SafeGeneError
from safegene_runtime.extras import missing_package
from safegene_runtime.progress import Step

__all__ = ["answer_job", "python_environment", "run_child", "run_job"]

POLL_SECONDS = 0.1
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MESSAGE_LINES = 6


def run_child(
    command: Sequence[str | Path],
    *,
    what: str,
    error: type[SafeGeneError],
    fix: str = "",
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
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
        grows: a file it writes.
        progress: told the bytes by which that file grew.

    Raises:
        SafeGeneError: of type `error`: it could not start, failed, or was killed by a signal.
    """
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as log,
        tempfile.TemporaryFile() as given,
    ):
        given.write(stdin)
        given.seek(0)
        # while it starts nobody could end it: a signal waits until there is a child to kill
        held = _Held()
        try:
            child = _start(command, given, out, log, environment)
        except OSError as cause:
            held.release()
            raise error(
                Problem(what, "child process", "to start", str(cause), "check the installation")
            ) from cause
        try:
            held.release()
            _wait(child, grows, progress)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        log.seek(0)
        out.seek(0)
        output = out.read().decode("utf-8", "replace")
        if child.returncode != 0:
            # what went wrong stands last on standard error, not behind what was said on the way
            lines = (output + "\n" + log.read().decode("utf-8", "replace")).split("\n")
            last = [line.strip() for line in lines if line.strip()][-MESSAGE_LINES:]
            died = (
                f"signal {-child.returncode}"
                if child.returncode < 0
                else (f"exit code {child.returncode}")
            )
            raise error(
                Problem(what, "child process", "to succeed", " | ".join([died, *last]), fix)
            )
        return output


def run_job(
    module: str, job: Mapping[str, Any], *, what: str, error: type[SafeGeneError]
) -> dict[str, Any]:
    """Runs a module of ours that ends in `answer_job`, and returns its answer.

    Args:
        module: its name.
        job: what it is to do, in JSON's types.
        what: what it does, for the message.
        error: raised when it fails.

    Raises:
        SafeGeneError: of type `error`, as from `run_child`.
    """
    output = run_child(
        [sys.executable, "-m", module],
        what=what,
        error=error,
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


def python_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment for a child Python: our packages, no network, no bytecode left behind."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        **(extra or {}),
    }


class _Held:
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


def _wait(child: subprocess.Popen[bytes], grows: Path | None, progress: Step | None) -> None:
    """Waits for the child, reporting how a file grows."""
    if grows is None or progress is None:
        child.wait()
        return
    seen = 0
    running = True
    while running:
        try:
            child.wait(POLL_SECONDS)
            running = False
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(OSError):
            size = grows.stat().st_size
            if size > seen:
                progress(size - seen)
                seen = size
