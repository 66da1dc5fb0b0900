"""An engine in a process of its own: native code that aborts, crashes or hangs is an error here.

libllama ends the process that runs it on some inputs, and no check of ours foresees all of them. So what
verifies and serves talks to a child (`host`): requests are JSON, logits lie in shared memory, and the
child gives a sign of life after every call of native code. It ends when we do.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from safegene_runtime import errors
from safegene_runtime.child import (
    Held,
    deadline_for,
    describe_end,
    last_lines,
    python_command,
    python_environment,
)
from safegene_runtime.engines.channel import TICK_SECONDS, Channel, SharedRows
from safegene_runtime.engines.engine import Closing
from safegene_runtime.errors import EngineError, Problem, SafeGeneError
from safegene_runtime.formats.files import CHECKED
from safegene_runtime.progress import Step

__all__ = ["ChildEngine"]

STEP_SECONDS = 600.0
"""Without a sign of life: one batch of a large model on a slow machine takes a small part of it."""
END_SECONDS = 5.0
LOG_BYTES = 1 << 16


class ChildEngine(Closing):
    """An `Engine` that runs in a child; see there for what the methods do.

    Args:
        kind: `registry.EngineKind`, as a dict.
        model: as `open_engine`.
        adapter: as `open_engine`.
        settings: the engine's.

    Raises:
        SafeGeneError: as the engine's own opening; and its process ended, or gave no sign of life.
        TypeError: an unknown setting.
    """

    def __init__(
        self,
        kind: Mapping[str, Any],
        model: Path,
        adapter: Path | None,
        settings: Mapping[str, Any],
    ) -> None:
        self._where, self._title = str(model), str(kind["title"])
        self._number = 0
        self._waited, self._ticked, self._heard = 0.0, 0.0, 0
        self._limit = deadline_for(model, adapter)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # ends with the child
        self._rows = SharedRows()
        checked = CHECKED.get()
        files = checked.to_json() if checked is not None else {"files": [], "folders": []}
        kept = [entry[2] for entry in files["files"]]
        # while it starts nobody could end it: a signal waits until there is a child to kill
        held = Held()
        try:
            self._start(kept)
        finally:
            held.release()
        try:
            about = self._ask(
                "open",
                kind=dict(kind),
                model=os.path.abspath(model),
                adapter=os.path.abspath(adapter) if adapter is not None else None,
                settings=dict(settings),
                files=files,
            )
        except BaseException:
            self.close()
            raise
        self._limit = STEP_SECONDS
        self.name, self.version = str(about["name"]), str(about["version"])
        self.n_vocab = int(about["n_vocab"])
        self.settings: dict[str, Any] = about["settings"]
        self._about = about

    def _start(self, kept: Sequence[int]) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        life, self._life = os.pipe()
        # the death signal is sent when the thread ends that started the child, not the process
        main = threading.current_thread() is threading.main_thread()
        parent = os.getpid() if main else 0
        given = [requests, replies, life, self._rows.descriptor]
        command = python_command("-m", "safegene_runtime.engines.host", *map(str, [*given, parent]))
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                env=python_environment(), pass_fds=[*given, *kept],
            )  # fmt: skip
        except OSError as error:
            for one in (self._requests, self._replies, self._life):
                os.close(one)
            self._rows.close()
            self._log.close()
            raise self._error("to start", str(error), "check the installation") from error
        finally:
            for one in (requests, replies, life):
                os.close(one)
        self._channel: Channel | None = Channel(self._replies, self._requests, self._tick)
        self._end = weakref.finalize(
            self,
            _end,
            self._child,
            [self._requests, self._replies, self._life],
            self._rows,
            self._log,
        )

    # --- asking

    def _ask(self, do: str, on_progress: Step | None = None, **what: Any) -> dict[str, Any]:
        """The reply to one request; what came late, for requests that were given up, is skipped."""
        if self._channel is None:
            raise EngineError(Problem(self._where, "engine", "an open engine", "a closed one"))
        self._number += 1
        number = self._number
        self._waited, self._heard, self._ticked = 0.0, self._rows.pulses, time.monotonic()
        try:
            self._send({"id": number, "do": do, "with": what})
            while True:
                reply = self._channel.receive()
                if reply is None:
                    raise self._gone()
                self._waited = 0.0
                if reply.get("id") != number:
                    continue
                for count in reply["progress"] if on_progress is not None else ():
                    on_progress(count)  # type: ignore[misc]
                if "interim" not in reply:
                    break
        except (BrokenPipeError, ValueError) as error:
            raise self._gone() from error
        if "error" in reply:
            raise _raised(reply, self._where, self._title)
        return reply

    def _send(self, message: dict[str, Any]) -> None:
        assert self._channel is not None
        try:
            self._channel.send(message)
        except BaseException as error:
            if not isinstance(error, OSError):  # half a message cannot be taken back
                self.close()
            raise

    def _tick(self) -> None:
        """Called while nothing comes; ends a child that gave no sign of life for too long."""
        now, pulses = time.monotonic(), self._rows.pulses
        # a process that was stopped for a while has not waited that long
        self._waited += min(now - self._ticked, 2 * TICK_SECONDS)
        if pulses != self._heard:
            self._waited = 0.0
        self._ticked, self._heard = now, pulses
        if self._waited > self._limit:
            self._child.kill()
            self._channel = None
            self._end()
            raise self._error(
                "a sign of life", f"none for {self._limit:.0f} s: it hangs, and was ended"
            )

    def _gone(self) -> EngineError:
        """What became of a child that says no more."""
        self._channel = None
        try:
            code = self._child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_BYTES))
        said = last_lines(self._log.read().decode("utf-8", "replace"))
        self._end()
        return self._error(
            "to go on", f"its process ended: {' | '.join([describe_end(code), *said])}"
        )

    def _error(self, expected: str, got: str, fix: str = "") -> EngineError:
        fix = (
            fix
            or "the file is damaged or made to do this, or the engine has a fault: report it there"
        )
        return EngineError(Problem(self._where, self._title, expected, got, fix))

    def _begun(self, number: int, on_progress: Step | None = None) -> Iterator[dict[str, Any]]:
        """The replies of something that was begun, one by one; what is left is dropped."""
        ended = False
        try:
            while not ended:
                reply = self._ask("next", on_progress, of=number)
                ended = "end" in reply
                if not ended:
                    yield reply
        finally:
            if not ended and self._channel is not None:
                with contextlib.suppress(OSError):
                    self._send({"id": 0, "do": "drop", "of": number})

    # --- Engine

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        keep: Sequence[int],
        on_progress: Step | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See `Engine.logits`; the array is shared memory, and cannot be written."""
        self._ask("logits", sequences=[_plain(ids) for ids in sequences], keep=_plain(keep))
        return self._logits(self._number, on_progress)

    def _logits(self, number: int, on_progress: Step | None) -> Iterator[tuple[int, np.ndarray]]:
        for reply in self._begun(number, on_progress):
            yield reply["index"], self._rows.read((reply["count"], self.n_vocab))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | Sequence[int],
        stop_ids: Collection[int],
        on_progress: Step | None = None,
    ) -> list[list[int]]:
        """See `Engine.generate`."""
        reply = self._ask(
            "generate",
            on_progress,
            prompts=[_plain(ids) for ids in prompts],
            max_tokens=max_tokens if isinstance(max_tokens, int) else _plain(max_tokens),
            stop_ids=_plain(stop_ids),
        )
        found: list[list[int]] = reply["replies"]
        return found

    def stream(
        self, prompt: Sequence[int], max_tokens: int, stop_ids: Collection[int]
    ) -> Iterator[int]:
        """See `Engine.stream`."""
        self._ask("stream", prompt=_plain(prompt), max_tokens=max_tokens, stop_ids=_plain(stop_ids))
        return (int(reply["id_"]) for reply in self._begun(self._number))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """See `Engine.tokenize`."""
        reply = self._ask(
            "tokenize", text=text, add_special=add_special, parse_special=parse_special
        )
        found: list[int] = reply["ids"]
        return found

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """See `Engine.detokenize`."""
        return str(self._ask("detokenize", ids=_plain(ids), special=special)["text"])

    def chat_template(self) -> str | None:
        """The model's own chat template, if it has one."""
        found: str | None = self._about["template"]
        return found

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if the model has one."""
        found: int | None = self._about["bos_id"]
        return found

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if the model has one."""
        found: int | None = self._about["eos_id"]
        return found

    @property
    def add_bos(self) -> bool:
        """Whether `tokenize(add_special=True)` begins with `bos_id`."""
        return bool(self._about["add_bos"])

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every id the model's own metadata says ends a generation."""
        return frozenset(self._about["eog_ids"])

    def close(self) -> None:
        """Ends the child; harmless when called again."""
        self._channel = None
        self._end()


def _end(
    child: subprocess.Popen[bytes], pipes: Sequence[int], rows: SharedRows, log: IO[bytes]
) -> None:
    """Ends a child that has nothing left to do; without pipes it ends by itself."""
    for one in pipes:
        os.close(one)
    try:
        child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    rows.close()
    log.close()


def _plain(ids: Collection[int]) -> list[int]:
    return [int(token) for token in ids]


def _raised(reply: Mapping[str, Any], where: str, title: str) -> Exception:
    """What was raised in the child, as it was."""
    name = reply["error"]
    if name == "TypeError":
        return TypeError(reply["message"])
    kind = getattr(errors, name, None) if name else None
    if isinstance(kind, type) and issubclass(kind, SafeGeneError):
        return kind([Problem(*one) for one in reply["problems"]])
    return EngineError(
        Problem(where, title, "to work", str(reply.get("message")), "report it to us")
    )
