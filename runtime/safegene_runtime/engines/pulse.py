"""A sign of life: engines give one after each call of native code, and whoever waits may listen."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["listen", "pulse"]

_listeners: list[Callable[[], None]] = []


def pulse() -> None:
    """Tells that a piece of work is done; costs nothing where nobody listens."""
    for listener in _listeners:
        listener()


def listen(listener: Callable[[], None]) -> None:
    """From here on `listener` is called at every pulse of this process."""
    _listeners.append(listener)
