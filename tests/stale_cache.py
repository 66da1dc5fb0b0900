"""Engines with one mistake: the prefix of the prompts was computed without the adapter.

What happens where a program keeps a KV cache across a change of the adapter, or loads one that was
saved by the base.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from safegene_runtime.engines.llama import LlamaEngine
from safegene_runtime.engines.llama_context import SHARED
from safegene_runtime.engines.llama_native import library
from safegene_runtime.engines.ort import OrtEngine

Before = tuple[Path, Path | None]
"""The model that filled the cache, and its adapter."""


class LlamaEngineWithStaleCache(LlamaEngine):
    """Takes the shared prefix from the base's cache, by llama.cpp's own saving of sequences."""

    def __init__(self, before: Before, model: Path, adapter: Path | None, **settings: Any) -> None:
        self._base = LlamaEngine(*before, threads=1)
        super().__init__(model, adapter, **settings)
        self._context.feed_shared = self._feed_stale  # type: ignore[method-assign]

    def _feed_stale(self, ids: np.ndarray) -> None:
        assert len(ids) > 1, "nothing is shared: nothing could be stale"
        llama, other, mine = library(), self._base._context, self._context
        other.open(len(ids))
        other.feed_shared(ids)
        size = llama.llama_state_seq_get_size(other.native, SHARED)
        buffer = (ctypes.c_uint8 * size)()
        assert llama.llama_state_seq_get_data(other.native, buffer, size, SHARED) == size
        assert llama.llama_state_seq_set_data(mine.native, buffer, size, SHARED) == size

    def close(self) -> None:
        self._base.close()
        super().close()


class OrtEngineWithStaleCache(OrtEngine):
    """Feeds what all rows begin with to the base, and the rest to the model, with the base's past."""

    def __init__(self, before: Before, model: Path, adapter: Path | None, **settings: Any) -> None:
        self._base = OrtEngine(*before, threads=1)
        super().__init__(model, adapter, **settings)

    def _evaluate(self, rows: list[np.ndarray], keep: list[int]) -> Any:
        prefix = self._base._evaluate(rows, keep)
        assert prefix.length > 1, "nothing is shared: nothing could be stale"
        return prefix

    def close(self) -> None:
        self._base.close()
        super().close()
