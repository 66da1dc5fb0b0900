"""How a long function tells how far it is: one signature, one way to count, one silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

__all__ = ["Progress", "Step", "counted", "silent"]


class Progress(Protocol):
    """Told what is being done: stage, amount done so far, total (bytes or items)."""

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """One step."""


Step = Callable[[int], None]
"""Told how much was done since the last call: bytes, or sequences."""


def silent(stage: str, done: int, total: int, /) -> None:
    """Tells nobody."""


def counted(tell: Progress, stage: str, total: int) -> Step:
    """Adds up the steps of one stage, and never tells more than its total."""
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        tell(stage, min(done, total), total)

    return step
