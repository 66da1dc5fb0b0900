"""Hashing a base beside the work that reads it anyway."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from safegene_runtime.progress import Step

__all__ = ["digesting"]


class _Hashable(Protocol):
    def digests(self, progress: Step | None = None) -> dict[str, str]:
        """SHA-256 of every file, by name."""
        ...


@contextmanager
def digesting(base: _Hashable) -> Iterator[Future[dict[str, str]]]:
    """A future of the base's digests; the thread behind it stops when the work ends."""
    ended = threading.Event()

    def step(count: int) -> None:
        if ended.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1, "digest") as pool:
        future = pool.submit(base.digests, step)
        try:
            yield future
        finally:
            ended.set()
