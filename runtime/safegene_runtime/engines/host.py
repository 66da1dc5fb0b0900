"""The child process that an engine runs in: it answers `apart.ChildEngine` until that is gone.

Started as `python -m safegene_runtime.engines.host REQUESTS REPLIES LIFE ROWS PARENT`: descriptors, and
the process that it must not outlive, or 0.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safegene_runtime.engines.channel import Channel, SharedRows
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.pulse import listen
from safegene_runtime.engines.registry import EngineKind, engine_names, open_engine, register
from safegene_runtime.errors import SafeGeneError
from safegene_runtime.formats.sealed import SealedFiles

PR_SET_PDEATHSIG = 1


class _Host:
    """An engine, and what was begun on it.

    Attributes:
        channel: to the parent.
        rows: shared with it.
    """

    def __init__(self, channel: Channel, rows: SharedRows) -> None:
        self.channel, self.rows = channel, rows
        self._engine: Engine | None = None
        self._begun: dict[int, Iterator[Any]] = {}
        self._progress: list[int] = []

    def serve(self) -> None:
        """Answers requests until there are no more."""
        while (request := self.channel.receive()) is not None:
            if request["do"] == "drop":
                self._begun.pop(request["of"], None)
                continue
            try:
                reply = getattr(self, "_" + request["do"])(**request["with"], number=request["id"])
            except SafeGeneError as error:
                reply = {
                    "error": type(error).__name__,
                    "problems": [dataclasses.astuple(one) for one in error.problems],
                }
            except TypeError as error:
                reply = {"error": "TypeError", "message": str(error)}
            except Exception as error:  # an engine with a fault of its own
                reply = {"error": "", "message": f"{type(error).__name__}: {error}"}
            self.channel.send({"id": request["id"], "progress": self._progress, **reply})
            self._progress.clear()  # whatever was begun goes on adding to it

    def _open(
        self,
        kind: dict[str, Any],
        model: str,
        adapter: str | None,
        settings: dict[str, Any],
        files: dict[str, Any],
        number: int,
    ) -> dict[str, Any]:
        if kind["name"] not in engine_names():  # registered by the program that asks
            register(EngineKind(**{**kind, "suffixes": tuple(kind["suffixes"])}))
        with SealedFiles.from_json(files):
            engine = open_engine(
                Path(model), Path(adapter) if adapter else None, engine=kind["name"], **settings
            )
        self._engine = engine
        about = {
            name: getattr(engine, name)
            for name in ("name", "version", "n_vocab", "settings", "bos_id", "eos_id", "add_bos")
        }
        return {**about, "eog_ids": sorted(engine.eog_ids), "template": engine.chat_template()}

    def _logits(self, sequences: list[list[int]], keep: list[int], number: int) -> dict[str, Any]:
        assert self._engine is not None
        self._begun[number] = self._engine.logits(sequences, keep, self._progress.append)
        return {}

    def _stream(
        self, prompt: list[int], max_tokens: int, stop_ids: list[int], number: int
    ) -> dict[str, Any]:
        assert self._engine is not None
        self._begun[number] = self._engine.stream(prompt, max_tokens, stop_ids)
        return {}

    def _next(self, of: int, number: int) -> dict[str, Any]:
        try:
            found = next(self._begun[of])
        except StopIteration:
            del self._begun[of]
            return {"end": True}
        except BaseException:
            del self._begun[of]
            raise
        if not isinstance(found, tuple):
            return {"id_": int(found)}
        index, rows = found
        self.rows.write(rows)
        return {"index": index, "count": len(rows)}

    def _generate(
        self,
        prompts: list[list[int]],
        max_tokens: int | list[int],
        stop_ids: list[int],
        number: int,
    ) -> dict[str, Any]:
        assert self._engine is not None

        def tell(count: int) -> None:
            self.channel.send({"id": number, "interim": True, "progress": [count]})

        return {"replies": self._engine.generate(prompts, max_tokens, stop_ids, tell)}

    def _tokenize(
        self, text: str, add_special: bool, parse_special: bool, number: int
    ) -> dict[str, Any]:
        assert self._engine is not None
        ids = self._engine.tokenize(text, add_special=add_special, parse_special=parse_special)
        return {"ids": ids}

    def _detokenize(self, ids: list[int], special: bool, number: int) -> dict[str, Any]:
        assert self._engine is not None
        return {"text": self._engine.detokenize(ids, special=special)}


def _die_with(parent: int, life: int) -> None:
    """Ends this process when its parent does, however that ends, and even in the middle of native code."""
    if parent and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was faster
            os._exit(1)

    def watch() -> None:
        os.read(life, 1)  # the parent writes nothing: this is the end of its end
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Serves until the parent closes its end, or is gone."""
    # what a terminal or a supervisor sends goes to the parent, which decides
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, replies, life, memory, parent = map(int, sys.argv[1:])
    _die_with(parent, life)
    rows = SharedRows(memory)
    listen(rows.pulse)
    _Host(Channel(requests, replies), rows).serve()
    os._exit(0)  # the system frees it all, and faster


if __name__ == "__main__":
    main()
