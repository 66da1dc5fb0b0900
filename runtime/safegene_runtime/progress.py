"""What every long function is given to tell how far it is."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress"]


class Progress(Protocol):
    """Told what is being done: stage, amount done so far, total (bytes or items)."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """One step."""
