"""The thin layer over libllama's C API: loading it, hearing what it says, filling its batches.

Only the low-level bindings are used. The high-level class of llama-cpp-python swallows misspelt
arguments, and takes the NULL of an adapter that failed to load for an adapter.
"""

from __future__ import annotations

import atexit
import collections
import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from safegene_runtime.cpus import spin_briefly
from safegene_runtime.errors import EngineError, Problem
from safegene_runtime.extras import install

__all__ = ["TokenBatch", "engine_error", "forget_log", "library", "logged", "read_meta"]

LOG_WARN, LOG_ERROR, LOG_CONT = 3, 4, 5
LOG_LINES = 200
MESSAGE_LINES = 4

_log: collections.deque[tuple[int, str]] = collections.deque(maxlen=LOG_LINES)
# libllama keeps the bare pointer of the callback for as long as the process lives.
_log_callback: Any = None


@functools.cache
def library() -> Any:
    """The low-level bindings, with the backend started and the log in our hands.

    Raises:
        EngineError: llama-cpp-python is not installed, or its library does not load.
    """
    global _log_callback
    spin_briefly()
    try:
        from llama_cpp import llama_cpp as llama
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(
            Problem(
                "llama.cpp",
                "llama_cpp",
                "to be installed",
                str(error),
                install("gguf"),
            )
        ) from error
    # the binding keeps two handles of /dev/null open, and Python complains about them at its end
    from llama_cpp import _utils

    for name in ("outnull_file", "errnull_file"):
        if (handle := getattr(_utils, name, None)) is not None:
            atexit.register(handle.close)
    _log_callback = llama.llama_log_callback(_on_log)
    llama.llama_log_set(_log_callback, ctypes.c_void_p(0))
    llama.llama_backend_init()
    return llama


def _on_log(level: int, text: bytes, _data: Any) -> None:
    line = text.decode("utf-8", "replace")
    if level == LOG_CONT and _log:
        level, line = _log[-1][0], _log.pop()[1] + line
    _log.append((level, line))


def forget_log() -> None:
    """Forgets what was logged, so that an error only quotes what belongs to it."""
    _log.clear()


def logged() -> str:
    """Everything remembered of the log."""
    return "".join(line for _, line in _log)


def engine_error(where: object, field: str, expected: str, got: str, fix: str = "") -> EngineError:
    """An `EngineError` that quotes the last warnings and errors libllama logged."""
    lines = [line.strip() for level, line in _log if level in (LOG_WARN, LOG_ERROR)]
    lines = [line for line in lines if line][-MESSAGE_LINES:]
    if lines:
        got = f"{got} (llama.cpp said: {' | '.join(lines)})"
    return EngineError(Problem(str(where), field, expected, got, fix))


def read_meta(function: Callable[..., int], *arguments: Any) -> str | None:
    """Reads one string through a `llama_*_meta_*` function; None where there is no such key."""
    size = function(*arguments, None, 0)
    if size < 0:
        return None
    buffer = ctypes.create_string_buffer(size + 1)
    function(*arguments, buffer, size + 1)
    return buffer.value.decode("utf-8", "replace")


class TokenBatch:
    """A `llama_batch` over numpy arrays: filled by slices instead of token by token.

    Args:
        llama: the bindings, from `library`.
        capacity: tokens it can hold.
    """

    def __init__(self, llama: Any, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._sequences = np.zeros(capacity, np.int32)
        self._outputs = np.zeros(capacity, np.int8)
        self._ones = np.ones(capacity, np.int32)
        # One pointer per token, each to that token's only sequence id.
        self._pointers = np.arange(capacity, dtype=np.uintp) * 4 + self._sequences.ctypes.data
        self.native = llama.llama_batch()
        for field, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("seq_id", self._pointers),
            ("n_seq_id", self._ones),
            ("logits", self._outputs),
        ):
            pointer_type = dict(llama.llama_batch._fields_)[field]
            setattr(self.native, field, ctypes.cast(array.ctypes.data, pointer_type))

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.capacity - self.size

    def clear(self) -> None:
        """Empties the batch."""
        self.size = 0

    def add(self, tokens: np.ndarray, position: int, sequence: int, keep: int) -> int:
        """Appends consecutive tokens of one sequence; the last `keep` of them output logits.

        Returns:
            The index in the batch of the first token with logits.
        """
        start, end = self.size, self.size + len(tokens)
        self._tokens[start:end] = tokens
        self._positions[start:end] = np.arange(position, position + len(tokens))
        self._sequences[start:end] = sequence
        self._outputs[start:end] = 0
        self._outputs[end - keep : end] = 1
        self.size = end
        self.native.n_tokens = end
        return end - keep
