"""How an engine in a child process is talked to: JSON messages over pipes, logits in shared memory."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import select
import struct
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from safegene_runtime.formats.sealed import has_memfd

__all__ = ["Channel", "SharedRows"]

LENGTH = struct.Struct("<Q")
MAX_MESSAGE_BYTES = 1 << 30
READ_BYTES = 1 << 16
TICK_SECONDS = 0.25
HEADER_BYTES = 4096


class Channel:
    """One end of a conversation; a message is a JSON object behind its length.

    Args:
        reads: a descriptor.
        writes: a descriptor.
        waiting: called about every `TICK_SECONDS` that nothing can be read or written; ends the wait by
            raising.
    """

    def __init__(self, reads: int, writes: int, waiting: Callable[[], None] | None = None) -> None:
        self._reads, self._writes, self._waiting = reads, writes, waiting
        self._buffer = bytearray()  # so that an interrupt loses nothing that came already
        if waiting is not None:
            os.set_blocking(writes, False)

    def send(self, message: dict[str, Any]) -> None:
        """Writes a message.

        Raises:
            BrokenPipeError: nobody is there to read it.
        """
        body = json.dumps(message).encode()
        data = memoryview(LENGTH.pack(len(body)) + body)
        while data:
            self._wait(self._writes, select.POLLOUT)
            data = data[os.write(self._writes, data) :]

    def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end.

        Raises:
            ValueError: what came is no message.
        """
        while True:
            if len(self._buffer) >= LENGTH.size:
                (length,) = LENGTH.unpack_from(self._buffer)
                if length > MAX_MESSAGE_BYTES:
                    raise ValueError(f"a message of {length} bytes")
                if len(self._buffer) >= LENGTH.size + length:
                    body = bytes(self._buffer[LENGTH.size : LENGTH.size + length])
                    del self._buffer[: LENGTH.size + length]
                    found: dict[str, Any] = json.loads(body)
                    return found
            self._wait(self._reads, select.POLLIN)
            data = os.read(self._reads, READ_BYTES)
            if not data:
                return None
            self._buffer += data

    def _wait(self, descriptor: int, event: int) -> None:
        if self._waiting is None:
            return
        poll = select.poll()
        poll.register(descriptor, event)
        while not poll.poll(TICK_SECONDS * 1000):
            self._waiting()


class SharedRows:
    """Memory of two processes: a counter of pulses, and rows of logits behind it.

    Args:
        descriptor: of the memory; made when None.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = _memory() if descriptor is None else descriptor
        self._map = mmap.mmap(self.descriptor, HEADER_BYTES)

    @property
    def pulses(self) -> int:
        """How many signs of life there were."""
        return int(LENGTH.unpack_from(self._map)[0])

    def pulse(self) -> None:
        """One more."""
        LENGTH.pack_into(self._map, 0, (self.pulses + 1) % (1 << 64))

    def write(self, rows: np.ndarray) -> None:
        """Puts float32 rows there, in place of those before; the writer makes room."""
        end = HEADER_BYTES + rows.nbytes
        if len(self._map) < end:
            if os.fstat(self.descriptor).st_size < end:
                os.ftruncate(self.descriptor, end)
            self._map = mmap.mmap(self.descriptor, end)
        self._rows(rows.shape)[...] = rows

    def read(self, shape: tuple[int, int]) -> np.ndarray:
        """The rows that the other side wrote, (count, n_vocab), as a view that cannot be written.

        Raises:
            ValueError: there are not so many.
        """
        end = HEADER_BYTES + 4 * shape[0] * shape[1]
        if len(self._map) < end:
            self._map = mmap.mmap(self.descriptor, end)
        found = self._rows(shape)
        found.flags.writeable = False
        return found

    def _rows(self, shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        flat = np.frombuffer(self._map, np.float32, count=count, offset=HEADER_BYTES)
        return flat.reshape(shape)

    def close(self) -> None:
        """Gives the descriptor back; views stay whole."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def _memory() -> int:
    """A descriptor of memory that grows and never shrinks under whoever has mapped it."""
    if has_memfd():
        made = os.memfd_create("safegene-logits", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(made, HEADER_BYTES)
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return made
    with tempfile.TemporaryFile() as file:  # has no name: it ends with its last descriptor
        file.truncate(HEADER_BYTES)
        return os.dup(file.fileno())
