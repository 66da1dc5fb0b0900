"""SIGTERM and SIGHUP end a command, but not before it has cleaned up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["Stopped", "stoppable"]


class Stopped(BaseException):
    """A signal that would have ended the process at once, before anything was cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into `Stopped`, so that temporary folders and children go, too.

    A signal that is ignored (nohup) or that the embedding program handles is left alone.
    """

    def stop(number: int, frame: object) -> None:
        for taken in mine:  # cleaning up is not stopped a second time
            signal.signal(taken, signal.SIG_IGN)
        raise Stopped(number)

    mine: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        wanted = (signal.SIGTERM, signal.SIGHUP)
        mine = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
